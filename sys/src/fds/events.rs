//! Descriptors that report events: eventfd, timerfd, signalfd, epoll, inotify.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::c_string;
use crate::outcome::{check, owned};

/// `eventfd2(2)`; close-on-exec.
pub fn eventfd(count: u64, semaphore: bool) -> io::Result<OwnedFd> {
    let flags = libc::EFD_CLOEXEC | if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: eventfd takes two integers.
    let fd = owned(unsafe { libc::eventfd(0, flags) })?;
    if count > 0 {
        // The argument of the call has 32 bits only.
        super::write(std::os::fd::AsFd::as_fd(&fd), &count.to_ne_bytes())?;
    }
    Ok(fd)
}

/// `timerfd_create(2)`; close-on-exec.
pub fn timerfd(clock: i32) -> io::Result<OwnedFd> {
    // SAFETY: timerfd_create takes two integers.
    owned(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) })
}

fn time_spec(time: Duration) -> io::Result<libc::timespec> {
    let seconds = i64::try_from(time.as_secs()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    Ok(libc::timespec { tv_sec: seconds, tv_nsec: i64::from(time.subsec_nanos()) })
}

/// `timerfd_settime(2)`: `flags` are `TFD_TIMER_*`; a first expiry of zero disarms.
pub fn set_timer(fd: BorrowedFd<'_>, flags: i32, first: Duration, interval: Duration) -> io::Result<()> {
    let value = libc::itimerspec { it_interval: time_spec(interval)?, it_value: time_spec(first)? };
    // SAFETY: the kernel reads a struct itimerspec at the address of one; null is allowed for the old value.
    let result = unsafe { libc::timerfd_settime(fd.as_raw_fd(), flags, &raw const value, std::ptr::null_mut()) };
    check(result).map(drop)
}

/// `timerfd_gettime(2)`, of which only an effect is wanted. The kernel lets a periodic timer that has expired rest until somebody
/// asks; then it counts the expiries since, and lets it run again.
pub fn count_expiries(fd: BorrowedFd<'_>) -> io::Result<()> {
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut value = libc::itimerspec { it_interval: zero, it_value: zero };
    // SAFETY: the kernel writes a struct itimerspec to the address of one.
    check(unsafe { libc::timerfd_gettime(fd.as_raw_fd(), &raw mut value) }).map(drop)
}

/// `TFD_IOC_SET_TICKS`: expiries that were not read yet. The kernel takes no zero.
pub fn set_timer_ticks(fd: BorrowedFd<'_>, ticks: u64) -> io::Result<()> {
    // _IOW('T', 0, __u64)
    const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
    // SAFETY: the kernel reads a u64 at the address of one.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) }).map(drop)
}

/// `signalfd4(2)`; close-on-exec. Bit 0 of the mask is signal 1.
pub fn signalfd(mask: u64) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads 8 bytes of mask at the address of a u64.
    owned(unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, libc::SFD_CLOEXEC) })
}

/// `epoll_create1(2)`; close-on-exec.
pub fn epoll() -> io::Result<OwnedFd> {
    // SAFETY: epoll_create1 takes one integer.
    owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })
}

/// `struct epoll_event` as bytes, for a call made elsewhere.
pub fn epoll_event_bytes(events: u32, data: u64) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&events.to_ne_bytes());
    bytes[4..].copy_from_slice(&data.to_ne_bytes());
    bytes
}

/// `inotify_init1(2)`; close-on-exec.
pub fn inotify() -> io::Result<OwnedFd> {
    // SAFETY: inotify_init1 takes one integer.
    owned(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) })
}

/// `inotify_add_watch(2)` that gets the given watch number.
pub fn inotify_watch(fd: BorrowedFd<'_>, path: &OsStr, mask: u32, number: i32) -> io::Result<()> {
    // _IOW('I', 0, __s32)
    const INOTIFY_IOC_SETNEXTWD: libc::c_ulong = 0x4004_4900;
    let path = c_string(path)?;
    // SAFETY: this ioctl takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), INOTIFY_IOC_SETNEXTWD, number) })?;
    // SAFETY: the path ends in a zero byte.
    let given = check(unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), mask) })?;
    if given == i64::from(number) { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EEXIST)) }
}

/// `open_by_handle_at(2)`: a file by its handle; `mount` is any descriptor on its file system. `O_CLOEXEC` is added.
pub fn open_by_handle(mount: BorrowedFd<'_>, kind: i32, handle: &[u8], flags: i32) -> io::Result<OwnedFd> {
    // struct file_handle: bytes u32, type i32, then the handle (at most 128 bytes).
    if handle.len() > 128 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut record = [0u32; 34];
    record[0] = u32::try_from(handle.len()).unwrap_or(0);
    record[1] = u32::from_ne_bytes(kind.to_ne_bytes());
    for (word, bytes) in record[2..].iter_mut().zip(handle.chunks(4)) {
        let mut padded = [0; 4];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_ne_bytes(padded);
    }
    // SAFETY: the kernel reads a struct file_handle of 8 bytes and as many as its first field says, at most 136 in all,
    // the size of the array.
    let result = unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), record.as_mut_ptr(), flags | libc::O_CLOEXEC)
    };
    owned(result)
}
