//! What a C call returned, as a `Result`. The error number is that of the calling thread's last call, so these come straight
//! after it.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// A number, or -1 and an error number.
pub(crate) fn check(result: impl Into<i64>) -> io::Result<i64> {
    let result = result.into();
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A count of bytes, or -1 and an error number.
pub(crate) fn counted(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// A new descriptor, or -1 and an error number.
pub(crate) fn owned(result: impl Into<i64>) -> io::Result<OwnedFd> {
    let number = check(result)?;
    let number = RawFd::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just made this descriptor for the caller, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
