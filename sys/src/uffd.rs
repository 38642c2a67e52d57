//! userfaultfd used from outside the process that owns it, for write tracking only.
//!
//! The descriptor is created *inside* the tracked process (it belongs to that process's address space for ever) and fetched
//! with `pidfd_getfd`; every ioctl here then acts on the other process's memory. With `WP_ASYNC` the kernel resolves each
//! write fault by itself, so nobody has to read the descriptor and a dead tracker never blocks the tracked process.
//!
//! The registrations live as long as the *file* does, so the process can close its own number at once.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::outcome::{check, owned};

/// `flags` argument of `userfaultfd(2)` for the creation inside the process: needs no privilege there.
pub const CREATE_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY) as u64;

const USER_MODE_ONLY: libc::c_int = 1;
const API: u64 = 0xAA;

const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

const REGISTER_MODE_WP: u64 = 1 << 1;

/// The last page that x86-64 user space may use with four-level page tables.
const LAST_PAGE: u64 = 0x7fff_ffff_e000;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgument {
    range: Range,
    mode: u64,
    ioctls: u64,
}

const fn request(direction: u64, number: u64, size: usize) -> u64 {
    (direction << 30) | ((size as u64) << 16) | (0xAA << 8) | number
}
const UFFDIO_API: u64 = request(3, 0x3F, size_of::<ApiArgument>());
const UFFDIO_REGISTER: u64 = request(3, 0x00, size_of::<RegisterArgument>());
const UFFDIO_UNREGISTER: u64 = request(2, 0x01, size_of::<Range>());

/// A userfaultfd of another process (or this one) that tracks writes asynchronously.
#[derive(Debug)]
pub struct WriteTracker {
    fd: OwnedFd,
}

impl WriteTracker {
    /// Takes a fresh userfaultfd (made with [`CREATE_FLAGS`], no `UFFDIO_API` yet) and switches asynchronous write protection on.
    ///
    /// # Errors
    /// `EINVAL` when the kernel has no `WP_ASYNC` (Linux before 6.7).
    pub fn new(fd: OwnedFd) -> io::Result<WriteTracker> {
        let mut argument = ApiArgument {
            api: API,
            features: FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_WP_HUGETLBFS_SHMEM,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API reads and writes one `struct uffdio_api`, which `ApiArgument` mirrors.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut argument) };
        check(result)?;
        Ok(WriteTracker { fd })
    }

    /// Registers every mapping in `start..end` for write tracking. Pages that were never protected count as written.
    ///
    /// # Errors
    /// `ENOMEM` when the address space is gone (the process exited or called execve), `EBUSY` when another userfaultfd has
    /// a mapping in the range, `EPERM` for a mapping that can never be written, `EINVAL` when nothing is mapped there.
    pub fn register(&self, start: u64, end: u64) -> io::Result<()> {
        let mut argument =
            RegisterArgument { range: Range { start, len: end - start }, mode: REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER reads and writes one `struct uffdio_register`, which `RegisterArgument` mirrors; it changes
        // no content of the tracked memory.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut argument) };
        check(result).map(drop)
    }

    /// Whether the address space that this belongs to still exists: not after the process exited or called execve.
    ///
    /// # Errors
    /// Anything unexpected.
    pub fn is_alive(&self) -> io::Result<bool> {
        // The kernel looks for the address space before it looks for mappings, and nothing is mapped in the last page of
        // user space (if something is, it loses its tracking, which the next scan notices).
        match self.unregister(LAST_PAGE, LAST_PAGE + 4096) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ESRCH)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Ends the tracking of every mapping in `start..end` and clears their protection.
    ///
    /// # Errors
    /// As for [`WriteTracker::register`].
    pub fn unregister(&self, start: u64, end: u64) -> io::Result<()> {
        let mut argument = Range { start, len: end - start };
        // SAFETY: UFFDIO_UNREGISTER reads one `struct uffdio_range`, which `Range` mirrors; it changes no content of memory.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut argument) };
        check(result).map(drop)
    }
}

impl AsFd for WriteTracker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Creates a userfaultfd for the calling process itself.
///
/// # Errors
/// `EPERM` where `vm.unprivileged_userfaultfd` and seccomp forbid it, `ENOSYS` where the kernel has none.
pub fn create() -> io::Result<OwnedFd> {
    // SAFETY: userfaultfd takes flags only.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, CREATE_FLAGS) })
}
