//! Work inside the job's namespaces.
//!
//! A thread of ours enters them and makes files and sockets there; descriptors belong to the whole process, so they are ours
//! at once. The thread ends afterwards: it is never handed out to anything else.

use std::io;
use std::os::fd::AsFd;

use sys::{Pid, libc, namespaces};

/// Runs something in a thread that is in the mount and network namespace of the job's init, at its root directory.
pub(super) fn enter<T: Send>(init: Pid, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    enter_kinds(init, libc::CLONE_NEWNS | libc::CLONE_NEWNET, work)
}

/// Runs something in a thread that is in these namespaces (`CLONE_NEW*`) of a process.
pub(crate) fn enter_kinds<T: Send>(
    process: Pid,
    kinds: i32,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("in the job".into()).spawn_scoped(scope, move || {
            namespaces::leave_shared_directory()?;
            let process = sys::process::pidfd_open(process)?;
            namespaces::enter_namespaces(process.as_fd(), kinds)?;
            work()
        })?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread inside the job's namespaces ended early")))
    })
}
