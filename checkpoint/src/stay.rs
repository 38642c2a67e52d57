//! Why a tree can't move, said before anything is frozen.

use serde::{Deserialize, Serialize};

/// One thing of one process that can't be moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StayReason {
    /// The process, as the job numbers it.
    pub pid: u32,
    /// The thing: "fd 7", "mapping 7f00-7f01 /dev/fuse", "process".
    pub what: String,
    /// What about it can't move.
    pub why: String,
}

impl StayReason {
    /// A reason.
    pub fn new(pid: u32, what: impl Into<String>, why: impl Into<String>) -> StayReason {
        StayReason { pid, what: what.into(), why: why.into() }
    }
}

impl std::fmt::Display for StayReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {}: {}: {}", self.pid, self.what, self.why)
    }
}
