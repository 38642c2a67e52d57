//! A mount namespace with nothing shared: CRIU refuses trees whose mounts it can't explain, and a machine with named network
//! namespaces has such ones.

use std::fs::File;
use std::io;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use sys::netns::NetNamespace;

/// The namespace, held open.
#[derive(Debug)]
pub(super) struct Mounts(File);

impl Mounts {
    /// A copy of this process's mounts.
    pub(super) fn new() -> io::Result<Mounts> {
        on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
            File::open("/proc/thread-self/ns/mnt").map(Mounts)
        })
    }

    /// Runs `work` on a thread of its own that is in this mount namespace and that network namespace.
    pub(super) fn run<T: Send>(
        &self,
        network: &NetNamespace,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        on_own_thread(|| {
            network.enter()?;
            // A thread that shares its working directory with others can't change its mounts.
            unshare(CloneFlags::CLONE_FS)?;
            setns(&self.0, CloneFlags::CLONE_NEWNS)?;
            work()
        })
    }
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
