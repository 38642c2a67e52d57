//! The namespaces a job lives in.

use std::ffi::OsString;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sys::Pid;

use crate::error::{Error, Result};
use crate::offer::Clocks;

/// What is added to this machine's clocks inside the job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockOffsets {
    /// Added to CLOCK_MONOTONIC, in nanoseconds.
    pub monotonic_ns: i64,
    /// Added to CLOCK_BOOTTIME, in nanoseconds.
    pub boottime_ns: i64,
}

impl ClockOffsets {
    /// Offsets with which the job's clocks, read just now at another machine, continue here.
    ///
    /// Add to the readings the time they may have been under way: a clock that runs ahead is harmless, one that steps
    /// back is not.
    pub fn continuing(clocks: Clocks) -> ClockOffsets {
        ClockOffsets {
            monotonic_ns: clocks.monotonic_ns - sys::process::clock_ns(sys::libc::CLOCK_MONOTONIC),
            boottime_ns: clocks.boottime_ns - sys::process::clock_ns(sys::libc::CLOCK_BOOTTIME),
        }
    }
}

/// What a sandbox is made with.
#[derive(Clone, Debug, Default)]
pub struct SandboxSpec {
    /// The job's host name.
    pub hostname: String,
    /// System call filter for everything in the sandbox, installed with a listener.
    pub filter: Option<sys::seccomp::Program>,
    /// Offsets of its clocks; `None` leaves it in the caller's time namespace.
    pub clock_offsets: Option<ClockOffsets>,
}

/// A program to start.
#[derive(Debug)]
pub struct CommandSpec {
    /// Program and arguments; a program without a slash is looked up in the `PATH` of `env`.
    pub argv: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Working directory.
    pub cwd: PathBuf,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// File mode creation mask.
    pub umask: u32,
    /// Standard input, output and error.
    pub stdio: [OwnedFd; 3],
    /// Resource limits: (RLIMIT_*, soft, hard).
    pub rlimits: Vec<(u32, u64, u64)>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(i32),
    /// A signal killed it.
    Signal(i32),
}

/// What happened in a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The job's first process ended.
    RootExited {
        /// How.
        status: ExitStatus,
    },
    /// Nothing of the job is left.
    JobEmpty,
    /// Init itself is gone, and with it everything in the sandbox.
    Gone,
}

/// Namespaces (PID, mount with a /proc of their own, network, UTS, IPC, time) with our init in them.
#[derive(Debug)]
pub struct Sandbox {
    listener: Option<OwnedFd>,
    net: OwnedFd,
    events: OwnedFd,
    init: Pid,
}

impl Sandbox {
    /// Makes the namespaces and starts init in them.
    pub fn create(_spec: SandboxSpec) -> Result<Sandbox> {
        Err(Error::Init("not there yet".into()))
    }

    /// The listener of the system call filter; `None` the second time or when there is no filter.
    pub fn take_listener(&mut self) -> Option<OwnedFd> {
        self.listener.take()
    }

    /// Init's number, as the caller sees it.
    pub fn init_pid(&self) -> Pid {
        self.init
    }

    /// The job's network namespace.
    pub fn net_namespace(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.net.as_fd()
    }

    /// Starts a program as the job's root process. Returns its number as the caller sees it.
    pub fn spawn(&mut self, _command: CommandSpec) -> Result<Pid> {
        Err(Error::Init("not there yet".into()))
    }

    /// Readable when [`Sandbox::next_event`] has something.
    pub fn events(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.events.as_fd()
    }

    /// What happened, if anything did. Never blocks.
    pub fn next_event(&mut self) -> Result<Option<Event>> {
        Ok(None)
    }

    /// Kills init and with it everything in the sandbox, and waits until it is gone.
    pub fn destroy(self) {}
}
