//! What can go wrong with a tree.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

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
    #[error("can't run {program}: {obstacle}")]
    Program {
        /// What was to be run.
        program: String,
        /// Why not.
        obstacle: Obstacle,
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

/// Why a program couldn't be started.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    /// There is none.
    #[error("no such program")]
    Missing,
    /// The working directory isn't one.
    #[error("the working directory {} can't be used: {error}", .directory.display())]
    WorkingDirectory {
        /// Which.
        directory: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It is a directory.
    #[error("it is a directory")]
    Directory,
    /// It is there, and what is to run it is not.
    #[error("the interpreter is missing that its first line, or its ELF header, names")]
    Interpreter,
    /// The file may not be executed.
    #[error("not executable (permission denied)")]
    Denied,
    /// What else execve(2) or an earlier step said.
    #[error("{0}")]
    Other(io::Error),
}

impl Obstacle {
    /// What an error number of execve(2) means for this program in this directory. Looks at the files as they are now.
    pub(crate) fn of(error: io::Error, program: &Path, directory: &Path) -> Obstacle {
        match fs::metadata(directory) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => {
                let error = io::Error::from_raw_os_error(sys::libc::ENOTDIR);
                return Obstacle::WorkingDirectory { directory: directory.into(), error };
            }
            Err(error) => return Obstacle::WorkingDirectory { directory: directory.into(), error },
        }
        // One without a slash was looked up in PATH.
        let is_path = program.as_os_str().as_bytes().contains(&b'/');
        let found = fs::metadata(directory.join(program)).ok().filter(|_| is_path);
        match error.raw_os_error() {
            Some(sys::libc::ENOENT) if found.is_some() => Obstacle::Interpreter,
            Some(sys::libc::ENOENT) => Obstacle::Missing,
            Some(sys::libc::EACCES) if found.is_some_and(|found| found.is_dir()) => Obstacle::Directory,
            Some(sys::libc::EACCES) => Obstacle::Denied,
            _ => Obstacle::Other(error),
        }
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
