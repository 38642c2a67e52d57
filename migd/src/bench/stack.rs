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
    /// A job after a move that left its sockets at home.
    HomeRouted,
    /// smoltcp's own TCP over a TUN device.
    Smoltcp,
    /// A plain process after a dump and restore by CRIU: the kernel's TCP on the other node.
    Criu,
}

impl Stack {
    /// Whether a move is what makes it.
    pub(super) fn is_moved(self) -> bool {
        matches!(self, Stack::MigdMoved | Stack::HomeRouted | Stack::Criu)
    }

    /// The name as in JSON.
    pub(super) fn name(self) -> &'static str {
        match self {
            Stack::Kernel => "kernel",
            Stack::Migd => "migd",
            Stack::MigdMoved => "migd-moved",
            Stack::HomeRouted => "home-routed",
            Stack::Criu => "criu",
            Stack::Smoltcp => "smoltcp",
        }
    }
}
