//! Open files to an image and back.
//!
//! | module | what |
//! | --- | --- |
//! | [`image`] | tables, open files and objects as plain data |
//! | `scan` | which descriptors there are, and which are the same open file |
//! | `kinds` | one handler for each kind: recognises, says what keeps it here, dumps; and makes it anew |
//! | `ahead` | what a second thread reads in the freeze |
//! | `dump` | asks the handlers, gathers flags |
//! | `preview` | which sockets of the caller's are likely to be there in the freeze |
//! | `namespace` | work done inside the job's mount and network namespaces |
//! | `restore` | makes everything anew and puts it into the stubs |
//!
//! Invariants:
//! - A dump changes nothing the job could notice: queues are peeked, pipes are copied with tee(2). After an abort it
//!   carries on as if nothing had been.
//! - Open files shared at the source (by dup, fork or CLONE_FILES) are shared at the target.
//! - What two machines can't both have (locks, the names of Unix sockets in a shared file system) is taken in
//!   [`Restorer::finish`], after the job's owner has changed.

mod ahead;
pub(crate) mod calm;
mod dump;
pub mod image;
mod kinds;
pub(crate) mod namespace;
mod preview;
mod restore;
mod scan;

use std::io;
use std::os::fd::{BorrowedFd, RawFd};

use sys::Pid;
use sys::tape::{Results, Tape};

pub use ahead::EpollInfo;
pub(crate) use dump::FOREIGN_TERMINAL;
pub use dump::{dump, required_files, stay_reasons};
pub use image::TreeDescriptors;
pub(crate) use kinds::locks::{HeldLock, held as held_locks};
pub(crate) use preview::Early;
pub use preview::{EpollPreview, Preview, preview};
pub use restore::Restorer;
pub(crate) use restore::place_early;

/// A process of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number in the job.
    pub process: u32,
    /// Its number as we see it.
    pub pid: Pid,
}

/// The processes whose descriptors are meant, parents first.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// The job's init, whose mount and network namespace are the job's.
    pub init: Pid,
    /// Its processes (not init).
    pub processes: &'a [Process],
}

impl Job<'_> {
    /// Our number for a process of the job.
    fn pid_of(&self, process: u32) -> Option<Pid> {
        self.processes.iter().find(|candidate| candidate.process == process).map(|candidate| candidate.pid)
    }

    /// The job's number for a process that we see.
    fn number_of(&self, pid: Pid) -> Option<u32> {
        self.processes.iter().find(|candidate| candidate.pid == pid).map(|candidate| candidate.process)
    }
}

/// Runs tapes in stopped processes of a job.
pub trait Tapes {
    /// Runs a tape in a process (by its number in the job).
    ///
    /// # Errors
    /// A required call failed, or the process can't run it.
    fn run(&mut self, process: u32, tape: &Tape) -> io::Result<Results>;

    /// Duplicates a descriptor of ours into a stub, close-on-exec, and returns its number there.
    ///
    /// # Errors
    /// The stub can't take it, or isn't one.
    fn import(&mut self, process: u32, descriptor: BorrowedFd<'_>) -> io::Result<RawFd>;
}
