//! What is compared.

use serde::{Deserialize, Serialize};

/// Where a server's TCP is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Stack {
    /// A plain process on the node: the kernel's TCP.
    Kernel,
    /// A job that never moved.
    Migd,
    /// A job after a move.
    MigdMoved,
    /// smoltcp's own TCP over a TUN device.
    Smoltcp,
}

impl Stack {
    /// The name as in JSON.
    pub(super) fn name(self) -> &'static str {
        match self {
            Stack::Kernel => "kernel",
            Stack::Migd => "migd",
            Stack::MigdMoved => "migd-moved",
            Stack::Smoltcp => "smoltcp",
        }
    }
}
