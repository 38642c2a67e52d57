//! Unix-domain sockets as carriers of other sockets' bytes, descriptors of other processes, and passing descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use bitflags::bitflags;

bitflags! {
    /// Modes of a receive.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Receive: i32 {
        /// Leave the bytes where they are.
        const PEEK = libc::MSG_PEEK;
        /// The urgent byte, and nothing else.
        const URGENT = libc::MSG_OOB;
    }
}

/// Which half of a connection to shut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// Nothing more is read.
    Read,
    /// Nothing more is written: the peer reads an end of file.
    Write,
    /// Both.
    Both,
}

/// A pair of connected stream sockets, close-on-exec. `nonblocking` is set on both.
pub fn pair(nonblocking: bool) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1 as RawFd; 2];
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | if nonblocking { libc::SOCK_NONBLOCK } else { 0 };
    // SAFETY: the kernel writes two descriptors into `fds`.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    let first = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    // SAFETY: likewise.
    let second = unsafe { OwnedFd::from_raw_fd(fds[1]) };
    Ok((first, second))
}

/// Makes the calls on a file description that say nothing themselves not wait.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut on = 1i32;
    // SAFETY: the kernel reads one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONBIO, &raw mut on) })
}

/// Sends without waiting and without SIGPIPE; returns the number of bytes taken.
pub fn send(fd: BorrowedFd<'_>, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    let mut message = empty_message();
    message.msg_iov = slices.as_ptr().cast_mut().cast();
    message.msg_iovlen = slices.len();
    // SAFETY: the message points to `slices`, which have the layout of iovecs and outlive the call, and is only read.
    let count = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Receives without waiting; 0 is the end of file. Descriptors that came with the bytes are dropped.
pub fn receive(fd: BorrowedFd<'_>, slices: &mut [IoSliceMut<'_>], mode: Receive) -> io::Result<usize> {
    let mut message = empty_message();
    message.msg_iov = slices.as_mut_ptr().cast();
    message.msg_iovlen = slices.len();
    // SAFETY: the message points to `slices`, which have the layout of iovecs, are held exclusively and outlive the call.
    let count = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT | mode.bits()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

fn empty_message() -> libc::msghdr {
    // SAFETY: an all-zero `msghdr` is a valid one.
    unsafe { std::mem::zeroed() }
}

/// Shuts a half of the connection.
pub fn shutdown(fd: BorrowedFd<'_>, half: Half) -> io::Result<()> {
    let how = match half {
        Half::Read => libc::SHUT_RD,
        Half::Write => libc::SHUT_WR,
        Half::Both => libc::SHUT_RDWR,
    };
    // SAFETY: takes integers only.
    check(unsafe { libc::shutdown(fd.as_raw_fd(), how) })
}

/// Bytes that wait to be read (`SIOCINQ`).
pub fn bytes_readable(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count = 0i32;
    // SAFETY: the kernel writes one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Whether an error is pending on the descriptor, without taking it.
pub fn has_error(fd: BorrowedFd<'_>) -> bool {
    shows(fd, libc::POLLERR)
}

/// Whether an urgent byte is unread.
pub fn has_urgent(fd: BorrowedFd<'_>) -> bool {
    shows(fd, libc::POLLPRI)
}

fn shows(fd: BorrowedFd<'_>, event: libc::c_short) -> bool {
    let mut request = libc::pollfd { fd: fd.as_raw_fd(), events: event, revents: 0 };
    // SAFETY: the kernel reads and writes one `pollfd`.
    let count = unsafe { libc::poll(&raw mut request, 1, 0) };
    count == 1 && request.revents & event != 0
}

/// Sends one byte as urgent, without waiting.
pub fn send_urgent(fd: BorrowedFd<'_>, byte: u8) -> io::Result<()> {
    let flags = libc::MSG_OOB | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads one byte.
    let count = unsafe { libc::send(fd.as_raw_fd(), (&raw const byte).cast(), 1, flags) };
    if count == 1 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes the urgent byte if it is the next one to read.
pub fn receive_urgent_at_mark(fd: BorrowedFd<'_>) -> Option<u8> {
    if !is_at_mark(fd) {
        return None;
    }
    let mut byte = [0];
    match receive(fd, &mut [IoSliceMut::new(&mut byte)], Receive::URGENT) {
        Ok(1) => Some(byte[0]),
        _ => None,
    }
}

/// Whether reading has come to the urgent mark (`SIOCATMARK`).
fn is_at_mark(fd: BorrowedFd<'_>) -> bool {
    /// asm-generic/sockios.h
    const SIOCATMARK: libc::c_ulong = 0x8905;
    let mut answer = 0i32;
    // SAFETY: the kernel writes one int.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCATMARK, &raw mut answer) };
    result == 0 && answer != 0
}

/// Copies all that waits to be read, of which there are exactly as many bytes as `bytes` has room for, and says which of them is
/// urgent. Everything stays where it is.
pub fn peek_across_mark(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<Option<usize>> {
    let urgent = has_urgent(fd);
    let in_line = option(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE)?;
    // Each look stops at the mark, so there are several, each from where the last one ended; and the byte is to be among them.
    set_option(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1)?;
    let mut mark = (urgent && is_at_mark(fd)).then_some(0);
    let looked = set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0).and_then(|()| {
        let mut at = 0;
        while at < bytes.len() {
            let count = receive(fd, &mut [IoSliceMut::new(&mut bytes[at..])], Receive::PEEK)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at += count;
            if at < bytes.len() && urgent {
                mark.get_or_insert(at);
            }
        }
        Ok(())
    });
    set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, in_line)?;
    looked.map(|()| mark)
}

/// Memory of what was sent and not yet read by the peer (`SIOCOUTQ`). On a Unix socket this counts the kernel's buffers,
/// so only zero is exact.
pub fn memory_unread_by_peer(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count = 0i32;
    // SAFETY: the kernel writes one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Sets an integer option of a socket.
pub fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<i32>()).expect("four fits");
    // SAFETY: the kernel reads one int.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), length) })
}

/// Reads an integer option of a socket.
pub fn option(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut value = 0i32;
    let mut length = libc::socklen_t::try_from(size_of::<i32>()).expect("four fits");
    // SAFETY: the kernel writes at most `length` bytes, one int.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length) })?;
    Ok(value)
}

/// Sets how much a socket may have sent that its peer hasn't read. The kernel doubles the value for its bookkeeping. Goes beyond
/// `net.core.wmem_max` when privileged.
pub fn set_send_buffer(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let value = i32::try_from(bytes).unwrap_or(i32::MAX);
    match set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, value) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, value)
        }
        result => result,
    }
}

/// Which of a socket's two time-outs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timeout {
    /// `SO_RCVTIMEO`.
    Receive,
    /// `SO_SNDTIMEO`.
    Send,
}

impl Timeout {
    fn name(self) -> i32 {
        match self {
            Timeout::Receive => libc::SO_RCVTIMEO,
            Timeout::Send => libc::SO_SNDTIMEO,
        }
    }
}

/// How long a socket's calls wait; `None` is for ever.
pub fn timeout(fd: BorrowedFd<'_>, which: Timeout) -> io::Result<Option<Duration>> {
    let mut value = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let mut length = libc::socklen_t::try_from(size_of::<libc::timeval>()).expect("sixteen fits");
    // SAFETY: the kernel writes at most `length` bytes, one timeval.
    check(unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, which.name(), (&raw mut value).cast(), &raw mut length)
    })?;
    let seconds = u64::try_from(value.tv_sec).unwrap_or(0);
    let micros = u64::try_from(value.tv_usec).unwrap_or(0);
    Ok((seconds != 0 || micros != 0).then(|| Duration::from_secs(seconds) + Duration::from_micros(micros)))
}

/// Sets how long a socket's calls wait; `None` is for ever.
pub fn set_timeout(fd: BorrowedFd<'_>, which: Timeout, timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.unwrap_or_default();
    let value = libc::timeval {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_usec: libc::suseconds_t::from(timeout.subsec_micros()),
    };
    let length = libc::socklen_t::try_from(size_of::<libc::timeval>()).expect("sixteen fits");
    // SAFETY: the kernel reads one timeval.
    check(unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, which.name(), (&raw const value).cast(), length)
    })
}

/// The inode number, by which every duplicate of a socket is recognised.
pub fn inode(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: an all-zero `stat` is a valid one.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills one `stat`.
    check(unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) })?;
    if stat.st_mode & libc::S_IFMT == libc::S_IFSOCK {
        Ok(stat.st_ino)
    } else {
        Err(io::Error::from_raw_os_error(libc::ENOTSOCK))
    }
}

/// Whether calls on the descriptor return instead of waiting (`O_NONBLOCK`).
pub fn is_nonblocking(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: takes integers only.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    Ok(flags & libc::O_NONBLOCK != 0)
}

/// A descriptor that stands for one thread (`PIDFD_THREAD`).
pub fn open_thread(thread: i32) -> io::Result<OwnedFd> {
    open_pidfd(thread, libc::O_EXCL)
}

/// A descriptor that stands for a process.
pub fn open_process(pid: i32) -> io::Result<OwnedFd> {
    open_pidfd(pid, 0)
}

fn open_pidfd(id: i32, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes integers only. PIDFD_THREAD has the value of O_EXCL.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, id, flags) };
    owned(fd)
}

/// A duplicate of a descriptor out of another process's table (pidfd_getfd(2)), close-on-exec.
pub fn duplicate_from(process: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes integers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    owned(fd)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Moves the calling thread, and it alone, into a network namespace. Sockets it makes from now on belong there.
pub fn enter_network_namespace(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })
}

/// Raises the soft limit of open descriptors to the hard one; returns it.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one `rlimit`.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the kernel reads one `rlimit`.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    Ok(limit.rlim_cur)
}

/// Most descriptors in one message (`SCM_MAX_FD` of linux/net/scm.h).
pub const MAX_DESCRIPTORS: usize = 253;

/// Sends bytes (at least one) together with descriptors over a Unix socket; waits as the socket does.
pub fn send_descriptors(socket: BorrowedFd<'_>, data: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if data.is_empty() || descriptors.len() > MAX_DESCRIPTORS {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let mut slice = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let mut control = ControlBuffer::new();
    let mut message = empty_message();
    message.msg_iov = &raw mut slice;
    message.msg_iovlen = 1;
    if !numbers.is_empty() {
        control.put_rights(&numbers);
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = space(numbers.len());
    }
    // SAFETY: everything that the message points to outlives the call, and is only read.
    let count = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Receives bytes and the descriptors that came with them, close-on-exec.
pub fn receive_descriptors(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut slice = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = ControlBuffer::new();
    let mut message = empty_message();
    message.msg_iov = &raw mut slice;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = space(MAX_DESCRIPTORS);
    // SAFETY: the message points to a buffer and a control buffer that we hold exclusively and that outlive the call.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    let descriptors = control
        .rights(message.msg_controllen)
        .into_iter()
        // SAFETY: the kernel has just installed these descriptors for us.
        .map(|number| unsafe { OwnedFd::from_raw_fd(number) })
        .collect();
    Ok((count, descriptors))
}

/// Room for one `SCM_RIGHTS` message, aligned as `cmsghdr` wants it.
struct ControlBuffer([u64; 2 + MAX_DESCRIPTORS.div_ceil(2)]);

const CONTROL_HEADER: usize = size_of::<libc::cmsghdr>();

fn space(descriptors: usize) -> usize {
    CONTROL_HEADER + (descriptors * size_of::<RawFd>()).next_multiple_of(size_of::<usize>())
}

// The header is `{ len: usize, level: i32, type: i32 }` and fills exactly the first two words.
const _: () = assert!(CONTROL_HEADER == 16);

impl ControlBuffer {
    fn new() -> ControlBuffer {
        ControlBuffer([0; 2 + MAX_DESCRIPTORS.div_ceil(2)])
    }

    fn put_rights(&mut self, numbers: &[RawFd]) {
        self.0[0] = (CONTROL_HEADER + size_of_val(numbers)) as u64;
        self.0[1] = join(libc::SOL_SOCKET, libc::SCM_RIGHTS);
        for (word, pair) in self.0[2..].iter_mut().zip(numbers.chunks(2)) {
            *word = join(pair[0], pair.get(1).copied().unwrap_or(0));
        }
    }

    /// The descriptors of the first message; the kernel never makes two of SCM_RIGHTS, and no other kind was asked for.
    fn rights(&self, received: usize) -> Vec<RawFd> {
        let length = usize::try_from(self.0[0]).unwrap_or(0);
        if received < CONTROL_HEADER || length < CONTROL_HEADER || self.0[1] != join(libc::SOL_SOCKET, libc::SCM_RIGHTS)
        {
            return Vec::new();
        }
        let count = ((length - CONTROL_HEADER) / size_of::<RawFd>()).min(MAX_DESCRIPTORS);
        self.0[2..].iter().flat_map(|&word| split(word)).take(count).collect()
    }
}

fn join(low: i32, high: i32) -> u64 {
    u64::from(low.cast_unsigned()) | u64::from(high.cast_unsigned()) << 32
}

fn split(word: u64) -> [i32; 2] {
    [(word as u32).cast_signed(), ((word >> 32) as u32).cast_signed()]
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn descriptors_travel_with_bytes() {
        let (one, other) = pair(false).expect("pair");
        let (carried, mate) = pair(false).expect("pair");
        for count in [0usize, 1, 2, 3, 7] {
            let descriptors: Vec<BorrowedFd<'_>> = (0..count).map(|_| carried.as_fd()).collect();
            send_descriptors(one.as_fd(), b"x", &descriptors).expect("send");
            let mut byte = [0u8; 4];
            let (length, received) = receive_descriptors(other.as_fd(), &mut byte).expect("receive");
            assert_eq!((length, received.len()), (1, count));
            for fd in &received {
                assert_eq!(inode(fd.as_fd()).expect("inode"), inode(carried.as_fd()).expect("inode"));
            }
        }
        drop(carried);
        let mut byte = [0u8; 1];
        assert_eq!(receive(mate.as_fd(), &mut [IoSliceMut::new(&mut byte)], Receive::empty()).expect("end of file"), 0);
    }

    #[test]
    fn closing_with_unread_bytes_resets_after_what_was_sent() {
        let (ours, theirs) = pair(true).expect("pair");
        send(theirs.as_fd(), &[IoSlice::new(b"unread")]).expect("send");
        send(ours.as_fd(), &[IoSlice::new(b"last words")]).expect("send");
        drop(ours);
        let mut buffer = [0u8; 32];
        let mut read = || receive(theirs.as_fd(), &mut [IoSliceMut::new(&mut buffer)], Receive::empty());
        assert_eq!(read().expect("what was sent"), 10);
        assert_eq!(read().expect_err("then the reset").raw_os_error(), Some(libc::ECONNRESET));
    }

    #[test]
    fn peeking_reads_across_messages() {
        let (ours, theirs) = pair(true).expect("pair");
        for chunk in [&b"ab"[..], b"cde", b"f"] {
            send(ours.as_fd(), &[IoSlice::new(chunk)]).expect("send");
        }
        assert!(memory_unread_by_peer(ours.as_fd()).expect("outq") > 0);
        let waiting = bytes_readable(theirs.as_fd()).expect("inq");
        let mut buffer = vec![0u8; waiting];
        let count = receive(theirs.as_fd(), &mut [IoSliceMut::new(&mut buffer)], Receive::PEEK).expect("peek");
        assert_eq!((count, &buffer[..]), (6, &b"abcdef"[..]));
        let count = receive(theirs.as_fd(), &mut [IoSliceMut::new(&mut buffer)], Receive::empty()).expect("read");
        assert_eq!(count, 6);
        assert_eq!(memory_unread_by_peer(ours.as_fd()).expect("outq"), 0);
    }
}
