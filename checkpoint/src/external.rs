//! Descriptors whose other end the caller holds: sockets of the bridge and the job's standard streams.

use serde::{Deserialize, Serialize};

/// What sort of descriptor is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FdKind {
    /// A socket.
    Socket,
    /// One end of a pipe.
    Pipe,
    /// A terminal.
    Terminal,
    /// Anything else that has an inode.
    Other,
}

/// The caller's name for a descriptor that it makes anew at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ExternalKey {
    /// The program's end of a socket.
    Socket(u64),
    /// A standard stream: 0, 1 or 2.
    Stdio(u8),
}

/// Tells which descriptors are the caller's.
pub trait External {
    /// The key of the object with this inode, or `None` when it is the job's own affair.
    fn key(&self, kind: FdKind, inode: u64) -> Option<ExternalKey>;
}
