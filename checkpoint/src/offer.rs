//! What a source tells a target before anything is copied, so that a refusal costs nothing.

use serde::{Deserialize, Serialize};

/// Readings of the job's clocks, nanoseconds, as the job sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// CLOCK_MONOTONIC.
    pub monotonic_ns: i64,
    /// CLOCK_BOOTTIME.
    pub boottime_ns: i64,
    /// CLOCK_REALTIME.
    pub realtime_ns: i64,
}

/// One process, for people to read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSummary {
    /// As the job numbers it.
    pub process: u32,
    /// Its parent.
    pub parent: u32,
    /// Its session.
    pub session: u32,
    /// Its name.
    pub name: String,
    /// Number of threads.
    pub threads: u32,
    /// Memory in use, in bytes.
    pub memory_bytes: u64,
}

/// What the job needs from a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The kernel's release, for messages.
    pub kernel: String,
    /// Instruction set extensions that the source's processor has.
    pub cpu_features: Vec<String>,
    /// State components that the processor saves (XCR0).
    pub xstate_features: u64,
    /// Size of a page in bytes.
    pub page_bytes: u64,
    /// Hash of the vdso's contents.
    pub vdso: u64,
    /// The processes.
    pub processes: Vec<ProcessSummary>,
    /// Memory in use by all of them, in bytes.
    pub memory_bytes: u64,
    /// Files that must be the same at the target.
    pub files: Vec<RequiredFile>,
    /// The job's clocks when the offer was made; a target's sandbox is given offsets that continue them.
    pub clocks: Clocks,
}

/// A file that must be the same at the target.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequiredFile {
    /// Path in the job's mount namespace.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// Time of the last change, nanoseconds since 1970.
    pub modified_ns: i64,
}
