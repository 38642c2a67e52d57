//! Memory files: creation, seals, holes.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::outcome::{check, owned};

/// Creates a memory file (close-on-exec, sealing allowed).
///
/// # Errors
/// As memfd_create(2).
pub fn create(name: &CStr) -> io::Result<File> {
    // SAFETY: the name is a terminated string that outlives the call.
    owned(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) }).map(File::from)
}

/// The seals (`F_SEAL_*`) of a memory file; none for a file that has no seals at all.
///
/// # Errors
/// As fcntl(2), except for `EINVAL`.
pub fn seals(file: impl AsFd) -> io::Result<u32> {
    // SAFETY: F_GET_SEALS takes no argument.
    let seals = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_GET_SEALS) };
    u32::try_from(seals).or_else(|_| match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EINVAL) => Ok(0),
        error => Err(error),
    })
}

/// Adds seals to a memory file.
///
/// # Errors
/// As fcntl(2): `EBUSY` for `F_SEAL_WRITE` while there are writable shared mappings.
pub fn add_seals(file: impl AsFd, seals: u32) -> io::Result<()> {
    // SAFETY: F_ADD_SEALS takes an integer.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_ADD_SEALS, seals) };
    check(result).map(drop)
}

/// The first run of data at or after `offset`: its start and end. `None` when there is none.
///
/// # Errors
/// As lseek(2).
pub fn next_data(file: impl AsFd, offset: u64) -> io::Result<Option<(u64, u64)>> {
    let fd = file.as_fd().as_raw_fd();
    let Some(start) = seek(fd, offset, libc::SEEK_DATA)? else { return Ok(None) };
    let Some(end) = seek(fd, start, libc::SEEK_HOLE)? else { return Ok(None) };
    Ok(Some((start, end)))
}

fn seek(fd: libc::c_int, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: lseek takes numbers only.
    let result = unsafe { libc::lseek(fd, offset, whence) };
    match u64::try_from(result) {
        Ok(position) => Ok(Some(position)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// Turns `start..end` of the file into a hole that reads as zeros.
///
/// # Errors
/// As fallocate(2).
pub fn punch_hole(file: impl AsFd, start: u64, end: u64) -> io::Result<()> {
    let overflow = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
    let (offset, length) = (i64::try_from(start).map_err(overflow)?, i64::try_from(end - start).map_err(overflow)?);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: fallocate takes numbers only.
    let result = unsafe { libc::fallocate(file.as_fd().as_raw_fd(), mode, offset, length) };
    check(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_and_seals() {
        let file = create(c"test").unwrap();
        file.set_len(5 << 12).unwrap();
        assert_eq!(next_data(&file, 0).unwrap(), None);
        file.write_all_at(b"x", 2 << 12).unwrap();
        file.write_all_at(b"x", 3 << 12).unwrap();
        assert_eq!(next_data(&file, 0).unwrap(), Some((2 << 12, 4 << 12)));
        punch_hole(&file, 2 << 12, 3 << 12).unwrap();
        assert_eq!(next_data(&file, 0).unwrap(), Some((3 << 12, 4 << 12)));
        assert_eq!(seals(&file).unwrap(), 0);
        add_seals(&file, libc::F_SEAL_GROW as u32).unwrap();
        assert_eq!(seals(&file).unwrap(), libc::F_SEAL_GROW as u32);
        assert!(file.set_len(6 << 12).is_err());
    }
}
