//! Descriptors of this and of other processes: identity, flags, content, and the making of every kind.
//!
//! | module | what |
//! | --- | --- |
//! | this one | kcmp, fcntl, files, pipes |
//! | [`events`] | eventfd, timerfd, signalfd, epoll, inotify |
//! | [`sockets`] | sockets with raw addresses and options, descriptors in messages, peeking |
//! | [`diag`] | what the kernel tells about Unix sockets (`sock_diag(7)`) |
//!
//! Raw addresses, masks and numbers are passed through as the kernel has them: whoever dumps and restores must not
//! interpret more than necessary.

pub mod diag;
pub mod events;
pub mod sockets;

use std::cmp::Ordering;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::Pid;
use crate::outcome::{check, counted, owned};

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// What `kcmp(2)` compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compare {
    /// Open file descriptions: the indexes are descriptor numbers.
    File,
    /// Descriptor tables; the indexes say nothing.
    Table,
    /// Address spaces; the indexes say nothing.
    Memory,
}

fn kcmp_order(result: i64) -> io::Result<Ordering> {
    match check(result)? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // Not equal, and the kernel gives no order: it has none to give for the kinds used here.
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// `kcmp(2)`: the order of two kernel objects, stable until the machine is started again.
pub fn kcmp(what: Compare, one: (Pid, RawFd), other: (Pid, RawFd)) -> io::Result<Ordering> {
    // From linux/kcmp.h.
    let kind = match what {
        Compare::File => 0,
        Compare::Memory => 1,
        Compare::Table => 2,
    };
    // SAFETY: kcmp takes five integers with these two types.
    kcmp_order(unsafe { libc::syscall(libc::SYS_kcmp, one.0.as_raw(), other.0.as_raw(), kind, one.1, other.1) })
}

/// Whether descriptor `file` of `process` is what an epoll instance watches as number `target`. Several open files can
/// be watched under one number; `skip` of them are passed over.
pub fn kcmp_epoll_target(file: (Pid, RawFd), epoll: (Pid, RawFd), target: RawFd, skip: u32) -> io::Result<bool> {
    const KCMP_EPOLL_TFD: i32 = 7;
    let number = |fd: RawFd| u32::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF));
    // `struct kcmp_epoll_slot`.
    let slot = [number(epoll.1)?, number(target)?, skip];
    // SAFETY: the kernel reads 12 bytes from the address, which is that of an array of three u32.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            file.0.as_raw(),
            epoll.0.as_raw(),
            KCMP_EPOLL_TFD,
            i64::from(file.1),
            slot.as_ptr(),
        )
    };
    Ok(check(result)? == 0)
}

fn fcntl(fd: BorrowedFd<'_>, command: i32, argument: i32) -> io::Result<i32> {
    // SAFETY: callers pass commands that take an integer or nothing.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) };
    check(result).map(|_| result)
}

/// `F_GETFL`: access mode and status flags.
pub fn status_flags(fd: BorrowedFd<'_>) -> io::Result<i32> {
    fcntl(fd, libc::F_GETFL, 0)
}

/// `F_SETFL`. Flags that can't be changed are ignored by the kernel.
pub fn set_status_flags(fd: BorrowedFd<'_>, flags: i32) -> io::Result<()> {
    fcntl(fd, libc::F_SETFL, flags).map(drop)
}

/// `F_SETFD`.
pub fn set_close_on_exec(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    fcntl(fd, libc::F_SETFD, if on { libc::FD_CLOEXEC } else { 0 }).map(drop)
}

/// `F_GETSIG`: the signal sent for I/O; 0 is SIGIO without information.
pub fn io_signal(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // F_GETSIG; libc doesn't have it for every target.
    fcntl(fd, 11, 0)
}

/// `F_SETSIG`.
pub fn set_io_signal(fd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    fcntl(fd, 10, signal).map(drop)
}

/// Who gets the signals of a descriptor (`F_GETOWN_EX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// One thread.
    Thread(Pid),
    /// A process.
    Process(Pid),
    /// A process group.
    Group(Pid),
}

#[repr(C)]
struct OwnerEx {
    kind: i32,
    pid: i32,
}

/// `F_GETOWN_EX`; `None` when nobody is.
pub fn io_owner(fd: BorrowedFd<'_>) -> io::Result<Option<Owner>> {
    let mut owner = OwnerEx { kind: 0, pid: 0 };
    // SAFETY: F_GETOWN_EX (16) writes a struct f_owner_ex, which OwnerEx is.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), 16, &raw mut owner) })?;
    let pid = Pid::from_raw(owner.pid);
    Ok(match (owner.pid, owner.kind) {
        (0, _) => None,
        (_, 0) => Some(Owner::Thread(pid)),
        (_, 1) => Some(Owner::Process(pid)),
        _ => Some(Owner::Group(pid)),
    })
}

/// `F_SETOWN_EX`.
pub fn set_io_owner(fd: BorrowedFd<'_>, owner: Owner) -> io::Result<()> {
    let (kind, pid) = match owner {
        Owner::Thread(pid) => (0, pid),
        Owner::Process(pid) => (1, pid),
        Owner::Group(pid) => (2, pid),
    };
    let owner = OwnerEx { kind, pid: pid.as_raw() };
    // SAFETY: F_SETOWN_EX (15) reads a struct f_owner_ex, which OwnerEx is.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), 15, &raw const owner) }).map(drop)
}

/// `F_GETPIPE_SZ` in bytes.
pub fn pipe_capacity(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let bytes = fcntl(fd, libc::F_GETPIPE_SZ, 0)?;
    usize::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// `F_SETPIPE_SZ`.
pub fn set_pipe_capacity(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = i32::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    fcntl(fd, libc::F_SETPIPE_SZ, bytes).map(drop)
}

/// `flock(2)` without waiting: shared, exclusive.
pub fn flock(fd: BorrowedFd<'_>, exclusive: bool) -> io::Result<()> {
    let operation = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH } | libc::LOCK_NB;
    // SAFETY: flock takes two integers.
    check(unsafe { libc::flock(fd.as_raw_fd(), operation) }).map(drop)
}

/// `F_OFD_SETLK`: a lock on a range that belongs to the open file description. `length` 0 reaches to the end.
pub fn lock_description(fd: BorrowedFd<'_>, write: bool, start: i64, length: i64) -> io::Result<()> {
    let mut lock = lock_record(write, start, length);
    // SAFETY: F_OFD_SETLK reads a struct flock.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) }).map(drop)
}

fn lock_record(write: bool, start: i64, length: i64) -> libc::flock {
    libc::flock {
        l_type: if write { libc::F_WRLCK } else { libc::F_RDLCK } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

/// `struct flock` for a lock on a range, as bytes for a call made elsewhere.
pub fn lock_record_bytes(write: bool, start: i64, length: i64) -> [u8; size_of::<libc::flock>()] {
    record_bytes(lock_record(write, start, length))
}

/// The same to let go of it.
pub fn unlock_record_bytes(start: i64, length: i64) -> [u8; size_of::<libc::flock>()] {
    record_bytes(libc::flock { l_type: libc::F_UNLCK as libc::c_short, ..lock_record(false, start, length) })
}

fn record_bytes(lock: libc::flock) -> [u8; size_of::<libc::flock>()] {
    let mut bytes = [0; size_of::<libc::flock>()];
    // l_type and l_whence are two shorts; l_start, l_len and l_pid follow at the alignment of off_t.
    bytes[0..2].copy_from_slice(&lock.l_type.to_ne_bytes());
    bytes[2..4].copy_from_slice(&lock.l_whence.to_ne_bytes());
    bytes[8..16].copy_from_slice(&lock.l_start.to_ne_bytes());
    bytes[16..24].copy_from_slice(&lock.l_len.to_ne_bytes());
    bytes
}

/// What `stat(2)` says, as far as it is needed here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Device that the inode is on.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Hard links.
    pub links: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// For devices: their number.
    pub special: u64,
    /// Size in bytes.
    pub size: u64,
    /// Last change of the content, nanoseconds since 1970.
    pub modified_ns: i64,
}

impl Status {
    /// The file type bits of `mode`.
    pub fn file_type(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    fn from_raw(raw: &libc::stat) -> Status {
        Status {
            device: raw.st_dev,
            inode: raw.st_ino,
            mode: raw.st_mode,
            links: raw.st_nlink,
            uid: raw.st_uid,
            gid: raw.st_gid,
            special: raw.st_rdev,
            size: u64::try_from(raw.st_size).unwrap_or(0),
            modified_ns: raw.st_mtime.saturating_mul(1_000_000_000).saturating_add(raw.st_mtime_nsec),
        }
    }
}

/// Bytes of a `struct stat`.
pub const STATUS_BYTES: usize = size_of::<libc::stat>();

/// Mode and inode of a `struct stat` that somebody else's fstat(2) filled; zeros when it is cut off.
pub fn mode_and_inode(bytes: &[u8]) -> (u32, u64) {
    let part = |at: usize| bytes.get(at..);
    let inode = part(std::mem::offset_of!(libc::stat, st_ino)).and_then(|rest| rest.first_chunk::<8>());
    let mode = part(std::mem::offset_of!(libc::stat, st_mode)).and_then(|rest| rest.first_chunk::<4>());
    (mode.map_or(0, |mode| u32::from_ne_bytes(*mode)), inode.map_or(0, |inode| u64::from_ne_bytes(*inode)))
}

/// `fstat(2)`.
pub fn status(fd: BorrowedFd<'_>) -> io::Result<Status> {
    let mut raw = MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the kernel fills a struct stat at the address of one.
    check(unsafe { libc::fstat(fd.as_raw_fd(), raw.as_mut_ptr()) })?;
    // SAFETY: it is initialised, by zeros at first and by the kernel now.
    Ok(Status::from_raw(unsafe { raw.assume_init_ref() }))
}

/// `fstatat(2)`. An empty name means the directory descriptor itself.
pub fn status_at(directory: BorrowedFd<'_>, name: &CStr, follow: bool) -> io::Result<Status> {
    let mut raw = MaybeUninit::<libc::stat>::zeroed();
    let flags = if follow { 0 } else { libc::AT_SYMLINK_NOFOLLOW } | libc::AT_EMPTY_PATH;
    // SAFETY: the name ends in a zero byte; the kernel fills a struct stat at the address of one.
    check(unsafe { libc::fstatat(directory.as_raw_fd(), name.as_ptr(), raw.as_mut_ptr(), flags) })?;
    // SAFETY: it is initialised, by zeros at first and by the kernel now.
    Ok(Status::from_raw(unsafe { raw.assume_init_ref() }))
}

/// `readlinkat(2)` into a buffer; the bytes of the link.
pub fn read_link_at<'b>(directory: BorrowedFd<'_>, name: &CStr, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
    // SAFETY: the name ends in a zero byte; the kernel writes at most the buffer's length into it.
    let result =
        unsafe { libc::readlinkat(directory.as_raw_fd(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    let length = counted(result)?;
    Ok(&buffer[..length])
}

/// The type of the file system that a file is on (`f_type` of statfs(2)).
pub fn file_system(fd: BorrowedFd<'_>) -> io::Result<i64> {
    let mut raw = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel fills a struct statfs at the address of one.
    check(unsafe { libc::fstatfs(fd.as_raw_fd(), raw.as_mut_ptr()) })?;
    // SAFETY: it is initialised, by zeros at first and by the kernel now.
    Ok(unsafe { raw.assume_init_ref() }.f_type)
}

/// `fchmod(2)`.
pub fn set_mode(fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    // SAFETY: fchmod takes two integers.
    check(unsafe { libc::fchmod(fd.as_raw_fd(), mode & 0o7777) }).map(drop)
}

/// `fchown(2)`.
pub fn set_owner(fd: BorrowedFd<'_>, uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: fchown takes three integers.
    check(unsafe { libc::fchown(fd.as_raw_fd(), uid, gid) }).map(drop)
}

/// `ftruncate(2)`.
pub fn set_size(fd: BorrowedFd<'_>, size: u64) -> io::Result<()> {
    let size = i64::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: ftruncate takes two integers.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), size) }).map(drop)
}

/// Major and minor number of a device.
pub fn device_numbers(device: u64) -> (u32, u32) {
    (libc::major(device), libc::minor(device))
}

/// Where a descriptor of ours points to, as /proc shows it.
pub fn link_of(fd: BorrowedFd<'_>) -> io::Result<OsString> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map(|path| path.into_os_string())
}

/// `openat(2)` with raw flags; `O_CLOEXEC` is added. Relative names start at the directory when there is one.
pub fn open_at(directory: Option<BorrowedFd<'_>>, path: &OsStr, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    let path = c_string(path)?;
    let directory = directory.map_or(libc::AT_FDCWD, |fd| fd.as_raw_fd());
    // SAFETY: the path ends in a zero byte.
    owned(unsafe { libc::openat(directory, path.as_ptr(), flags | libc::O_CLOEXEC, mode) })
}

/// Opens what a descriptor of ours refers to once more: a new open file description of the same file.
pub fn reopen(fd: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    open_at(None, OsStr::new(&format!("/proc/self/fd/{}", fd.as_raw_fd())), flags, 0)
}

/// `renameat(2)` inside one directory.
pub fn rename_at(directory: BorrowedFd<'_>, from: &OsStr, to: &OsStr) -> io::Result<()> {
    let (from, to, directory) = (c_string(from)?, c_string(to)?, directory.as_raw_fd());
    // SAFETY: both paths end in a zero byte.
    check(unsafe { libc::renameat(directory, from.as_ptr(), directory, to.as_ptr()) }).map(drop)
}

/// `mkfifo(3)`: a named pipe, for its owner only.
pub fn make_fifo(path: &Path) -> io::Result<()> {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR)?;
    Ok(())
}

/// `unlinkat(2)`: removes a file or an empty directory.
pub fn remove_at(directory: BorrowedFd<'_>, path: &OsStr, is_directory: bool) -> io::Result<()> {
    let path = c_string(path)?;
    let flags = if is_directory { libc::AT_REMOVEDIR } else { 0 };
    // SAFETY: the path ends in a zero byte.
    check(unsafe { libc::unlinkat(directory.as_raw_fd(), path.as_ptr(), flags) }).map(drop)
}

/// `mkdirat(2)`.
pub fn make_directory_at(directory: BorrowedFd<'_>, path: &OsStr, mode: u32) -> io::Result<()> {
    let path = c_string(path)?;
    // SAFETY: the path ends in a zero byte.
    check(unsafe { libc::mkdirat(directory.as_raw_fd(), path.as_ptr(), mode) }).map(drop)
}

/// Owner (user, group) and permissions of the file that an O_PATH descriptor names; not for symbolic links.
pub fn change_node(node: BorrowedFd<'_>, owner: Option<(u32, u32)>, mode: u32) -> io::Result<()> {
    let number = node.as_raw_fd();
    if let Some((uid, gid)) = owner {
        // SAFETY: the path is a literal that ends in a zero byte; an empty one means the descriptor.
        check(unsafe { libc::fchownat(number, c"".as_ptr(), uid, gid, libc::AT_EMPTY_PATH) })?;
    }
    // fchmodat2(2), which takes AT_EMPTY_PATH; libc doesn't have its number on every target.
    const SYS_FCHMODAT2: libc::c_long = 452;
    // SAFETY: the path is a literal that ends in a zero byte; an empty one means the descriptor.
    let result = unsafe { libc::syscall(SYS_FCHMODAT2, number, c"".as_ptr(), mode & 0o7777, libc::AT_EMPTY_PATH) };
    check(result).map(drop)
}

/// Whether files can be made in a directory.
pub fn is_writable(path: &CStr) -> bool {
    // SAFETY: the path ends in a zero byte.
    unsafe { libc::access(path.as_ptr(), libc::W_OK | libc::X_OK) == 0 }
}

/// `lseek(2)` with SEEK_SET.
pub fn seek(fd: BorrowedFd<'_>, offset: i64) -> io::Result<()> {
    // SAFETY: lseek takes three integers.
    check(unsafe { libc::lseek(fd.as_raw_fd(), offset, libc::SEEK_SET) }).map(drop)
}

/// `pipe2(2)`: read end, write end. `O_CLOEXEC` is added.
pub fn pipe(flags: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: the kernel writes two descriptor numbers into an array of two.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), flags | libc::O_CLOEXEC) })?;
    Ok((owned(ends[0])?, owned(ends[1])?))
}

/// `tee(2)`: puts up to `length` bytes of one pipe into another too, without taking them from the first or waiting.
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
    // SAFETY: tee takes integers only.
    let result = unsafe { libc::tee(from.as_raw_fd(), to.as_raw_fd(), length, libc::SPLICE_F_NONBLOCK) };
    counted(result)
}

/// `FIONREAD`: bytes that wait to be read.
pub fn bytes_waiting(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes an int at the address of one.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// `read(2)`.
pub fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most the buffer's length into it.
    let result = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    counted(result)
}

/// `write(2)`.
pub fn write(fd: BorrowedFd<'_>, data: &[u8]) -> io::Result<usize> {
    // SAFETY: the kernel reads at most the slice's length from it.
    let result = unsafe { libc::write(fd.as_raw_fd(), data.as_ptr().cast(), data.len()) };
    counted(result)
}

/// The events that hold for a descriptor right now (`poll(2)` without waiting).
pub fn readiness(fd: BorrowedFd<'_>, events: i16) -> io::Result<i16> {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one pollfd at the address of one.
    check(unsafe { libc::poll(&raw mut entry, 1, 0) })?;
    Ok(entry.revents)
}

/// The entries of a directory that are numbers, unsorted: what /proc/PID/fd, /proc/PID/task hold.
pub fn numbers_in(directory: BorrowedFd<'_>) -> io::Result<Vec<RawFd>> {
    let mut numbers = Vec::new();
    let mut buffer = vec![0u8; 1 << 16];
    // The descriptor may have been listed before.
    seek(directory, 0)?;
    loop {
        // SAFETY: the kernel writes at most the buffer's length into it.
        let result =
            unsafe { libc::syscall(libc::SYS_getdents64, directory.as_raw_fd(), buffer.as_mut_ptr(), buffer.len()) };
        let length = usize::try_from(check(result)?).unwrap_or(0);
        if length == 0 {
            return Ok(numbers);
        }
        let mut rest = &buffer[..length];
        // struct linux_dirent64: ino u64, off i64, reclen u16, type u8, name with its zero byte.
        while rest.len() > 19 {
            let size = usize::from(u16::from_ne_bytes([rest[16], rest[17]]));
            if size <= 19 || size > rest.len() {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            let name = &rest[19..size];
            let digits = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
            if let Some(number) = std::str::from_utf8(&name[..digits]).ok().and_then(|text| text.parse().ok()) {
                numbers.push(number);
            }
            rest = &rest[size..];
        }
    }
}

/// Changes effective user and group of the calling thread alone; the real and saved ones stay, so that it can go back.
pub fn set_thread_identity(uid: u32, gid: u32) -> io::Result<()> {
    let keep = u32::MAX;
    if uid == 0 {
        // Back to root first: only root may change the group.
        // SAFETY: setresuid takes three integers; the raw call changes this thread only.
        check(unsafe { libc::syscall(libc::SYS_setresuid, keep, uid, keep) })?;
    }
    // SAFETY: setresgid takes three integers; the raw call changes this thread only.
    check(unsafe { libc::syscall(libc::SYS_setresgid, keep, gid, keep) })?;
    // SAFETY: setresuid takes three integers; the raw call changes this thread only.
    check(unsafe { libc::syscall(libc::SYS_setresuid, keep, uid, keep) }).map(drop)
}

#[cfg(test)]
mod tests;
