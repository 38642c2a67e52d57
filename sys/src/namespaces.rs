//! Namespaces, the mounts inside them, and where in them a thread stands.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use nix::mount::MsFlags;

use crate::outcome::check;

bitflags::bitflags! {
    /// Kinds of namespaces (unshare(2)).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Namespaces: i32 {
        /// Mounts.
        const MOUNT = libc::CLONE_NEWNS;
        /// Network.
        const NETWORK = libc::CLONE_NEWNET;
        /// Host name.
        const HOSTNAME = libc::CLONE_NEWUTS;
        /// System V IPC and POSIX message queues.
        const IPC = libc::CLONE_NEWIPC;
        /// Process numbers, of the children to come.
        const PID = libc::CLONE_NEWPID;
        /// Clocks, of the children to come.
        const TIME = 0x80;
    }
}

/// Moves the calling process into new namespaces (for [`Namespaces::PID`] and [`Namespaces::TIME`]: its future children).
pub fn unshare(namespaces: Namespaces) -> io::Result<()> {
    // SAFETY: unshare takes one integer; none of these flags affects memory.
    check(unsafe { libc::unshare(namespaces.bits()) }).map(drop)
}

/// `chroot(2)` and `chdir("/")` for the calling thread alone, which must have a file system state of its own
/// ([`leave_shared_directory`]).
pub fn change_root(directory: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: fchdir takes one integer.
    check(unsafe { libc::fchdir(directory.as_raw_fd()) })?;
    // SAFETY: the path is a literal that ends in a zero byte.
    check(unsafe { libc::chroot(c".".as_ptr()) })?;
    // SAFETY: the path is a literal that ends in a zero byte.
    check(unsafe { libc::chdir(c"/".as_ptr()) }).map(drop)
}

/// `unshare(CLONE_FS)`: from here on root, working directory and umask are the calling thread's own.
pub fn leave_shared_directory() -> io::Result<()> {
    // SAFETY: unshare takes one integer; CLONE_FS touches no memory.
    check(unsafe { libc::unshare(libc::CLONE_FS) }).map(drop)
}

/// `setns(2)` for the calling thread: `CLONE_NEW*` bits with a pidfd, or one bit with a namespace's descriptor.
pub fn enter_namespaces(of: BorrowedFd<'_>, kinds: i32) -> io::Result<()> {
    // SAFETY: setns takes two integers.
    check(unsafe { libc::setns(of.as_raw_fd(), kinds) }).map(drop)
}

/// Sets what a new time namespace adds to the clocks. Must come after [`unshare`] and before the first child.
pub fn set_clock_offsets(monotonic_ns: i64, boottime_ns: i64) -> io::Result<()> {
    const SECOND_NS: i64 = 1_000_000_000;
    // The kernel wants whole seconds of either sign and nanoseconds that aren't negative.
    let line =
        |name, offset: i64| format!("{name} {} {}\n", offset.div_euclid(SECOND_NS), offset.rem_euclid(SECOND_NS));
    fs::write("/proc/self/timens_offsets", line("monotonic", monotonic_ns) + &line("boottime", boottime_ns))
}

/// Makes changes to mounts of this namespace invisible outside of it; changes outside are still seen here.
pub fn detach_mounts() -> io::Result<()> {
    const NOTHING: Option<&str> = None;
    nix::mount::mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_SLAVE, NOTHING)?;
    Ok(())
}

/// Mounts a file system that needs no device.
pub fn mount_virtual(kind: &str, place: &Path, options: &str) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some(kind), place, Some(kind), flags, Some(options))?;
    Ok(())
}

/// Mounts an empty tmpfs, for all to write to.
pub fn mount_memory(place: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    nix::mount::mount(Some("tmpfs"), place, Some("tmpfs"), flags, Some("mode=1777"))?;
    Ok(())
}

/// Mounts pseudo-terminals of the namespace's own: for all to make, each for its user and, to write, for the group of terminals.
pub fn mount_terminals(place: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    // The group "tty" has this number on all usual systems, and grantpt(3) expects it.
    let options = "newinstance,ptmxmode=0666,mode=0620,gid=5";
    nix::mount::mount(Some("devpts"), place, Some("devpts"), flags, Some(options))?;
    Ok(())
}

/// Shows a file in another's place.
pub fn mount_over(file: &Path, place: &Path) -> io::Result<()> {
    const NOTHING: Option<&str> = None;
    nix::mount::mount(Some(file), place, NOTHING, MsFlags::MS_BIND, NOTHING)?;
    Ok(())
}

/// Takes away what was mounted last; what still uses it keeps it.
pub fn detach(place: &Path) -> io::Result<()> {
    nix::mount::umount2(place, nix::mount::MntFlags::MNT_DETACH)?;
    Ok(())
}

/// Sets the host name of this namespace.
pub fn set_hostname(name: &str) -> io::Result<()> {
    nix::unistd::sethostname(name)?;
    Ok(())
}
