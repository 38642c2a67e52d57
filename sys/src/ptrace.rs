//! Tracing threads (ptrace(2), seized, never attached).
//!
//! A thread goes through two types. [`Seized`] is traced and running; [`Seized::interrupt`] and [`Seized::poll_stop`]
//! bring it to a [`Stopped`], on which everything else works. Dropping either lets the thread run on as if nothing had
//! been, with the registers and the signal mask it had when it stopped.
//!
//! ptrace belongs to the thread that seized: on any other thread all of this fails with `ESRCH`. Tracees are killed by
//! the kernel when that thread ends without letting them go.

mod filters;
mod registers;
mod seized;
mod stopped;

use std::io;
use std::os::raw::c_void;

use crate::Pid;
use crate::outcome::check;

pub use registers::{Register, Registers, restart};
pub use seized::{Progress, Seized, pause};
pub use stopped::{RseqConfiguration, Stopped};

const PTRACE_EVENT_STOP: i32 = 128;

/// Follow new threads and processes, and don't let a tracee outlive its tracer.
const FOLLOW: i32 =
    libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK | libc::PTRACE_O_EXITKILL;

/// One ptrace request whose arguments are integers or the address of something of ours that outlives the call.
fn request(request: u32, thread: Pid, address: usize, data: usize) -> io::Result<i64> {
    // SAFETY: callers in this module pass, where the kernel takes a pointer, one to memory of ours that is valid for the
    // size they state; what it does to the tracee's memory is the tracee's affair.
    check(unsafe { libc::ptrace(request, thread.as_raw(), address as *mut c_void, data as *mut c_void) })
}

/// What waiting for a tracee brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Report {
    Stopped { signal: i32, event: i32 },
    Ended,
}

fn wait(thread: Pid, options: libc::c_int) -> io::Result<Option<Report>> {
    loop {
        let mut status = 0;
        // SAFETY: the status pointer is to an int of ours that outlives the call.
        let result = unsafe { libc::waitpid(thread.as_raw(), &raw mut status, options | libc::__WALL) };
        if result == 0 {
            return Ok(None);
        }
        if result < 0 {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                // A thread of a process that executed a program or ended is collected by the kernel itself.
                Some(libc::ECHILD) => return Ok(Some(Report::Ended)),
                _ => return Err(error),
            }
        }
        if libc::WIFSTOPPED(status) {
            return Ok(Some(Report::Stopped { signal: libc::WSTOPSIG(status), event: status >> 16 }));
        }
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            return Ok(Some(Report::Ended));
        }
    }
}

/// Why a thread stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// We interrupted it, or it is new.
    Interrupted,
    /// Its process is stopped by this signal and stays so when let go.
    Group(i32),
}

fn event_message(thread: Pid) -> io::Result<Pid> {
    let mut message = 0usize;
    request(libc::PTRACE_GETEVENTMSG, thread, 0, (&raw mut message).addr())?;
    let number = i32::try_from(message).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))?;
    Ok(Pid::from_raw(number))
}

fn resume(kind: u32, thread: Pid, signal: i32) -> io::Result<()> {
    request(kind, thread, 0, signal.unsigned_abs() as usize).map(drop)
}
