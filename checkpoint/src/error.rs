//! What can go wrong with a tree.

use std::io;

use crate::stay::StayReason;

/// The result of an operation on a tree.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on a tree failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tree holds something that can't move; nothing was frozen.
    #[error("the job stays here: {}", list(.0))]
    Stays(Vec<StayReason>),
    /// This machine can't take the tree.
    #[error("this machine can't take the job: {0}")]
    Refused(String),
    /// A thread didn't stop in time.
    #[error("thread {thread} (process {process}) doesn't stop: it waits in the kernel in {place}; try again later")]
    Stuck {
        /// Process, as the job numbers it.
        process: u32,
        /// Thread, as the job numbers it.
        thread: u32,
        /// The kernel function it waits in.
        place: String,
    },
    /// The program couldn't be started.
    #[error("can't run {program}: {}", program_error(.source))]
    Program {
        /// What was to be run.
        program: String,
        /// What execve or an earlier step said.
        source: io::Error,
    },
    /// The job's init didn't do its part.
    #[error("the job's init: {0}")]
    Init(String),
    /// The image contradicts itself or what was announced before it.
    #[error("the image is not usable: {0}")]
    Image(String),
    /// The tree isn't there any more.
    #[error("the job has ended")]
    Gone,
    /// The kernel refused something about one process.
    #[error("process {process}: {what}: {source}")]
    Process {
        /// Process, as the job numbers it.
        process: u32,
        /// What was being done.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused something else.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

fn list(reasons: &[StayReason]) -> String {
    reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn program_error(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(sys::libc::ENOENT) => "no such program".into(),
        Some(sys::libc::EACCES) => "not executable (permission denied)".into(),
        _ => error.to_string(),
    }
}

impl Error {
    /// A failure of one process.
    pub fn process(process: u32, what: impl Into<String>, source: impl Into<io::Error>) -> Error {
        Error::Process { process, what: what.into(), source: source.into() }
    }

    /// A failure that belongs to no process.
    pub fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Error {
        Error::System { what: what.into(), source: source.into() }
    }
}
