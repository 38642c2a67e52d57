//! Connected Unix-domain sockets as carriers of other sockets' bytes: nothing here waits or raises a signal.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bitflags::bitflags;

use crate::fds;
use crate::fds::sockets::{self, int_option, set_int_option};
use crate::outcome::{check, counted};

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
    sockets::socket_pair(libc::SOCK_STREAM | if nonblocking { libc::SOCK_NONBLOCK } else { 0 })
}

/// Makes the calls on a file description that say nothing themselves not wait.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut on = 1i32;
    // SAFETY: the kernel reads one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONBIO, &raw mut on) }).map(drop)
}

/// Sends without waiting and without SIGPIPE; returns the number of bytes taken.
pub fn send(fd: BorrowedFd<'_>, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    let mut message = empty_message();
    message.msg_iov = slices.as_ptr().cast_mut().cast();
    message.msg_iovlen = slices.len();
    // SAFETY: the message points to `slices`, which have the layout of iovecs and outlive the call, and is only read.
    let count = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    counted(count)
}

/// Receives without waiting; 0 is the end of file. Descriptors that came with the bytes are dropped.
pub fn receive(fd: BorrowedFd<'_>, slices: &mut [IoSliceMut<'_>], mode: Receive) -> io::Result<usize> {
    let mut message = empty_message();
    message.msg_iov = slices.as_mut_ptr().cast();
    message.msg_iovlen = slices.len();
    // SAFETY: the message points to `slices`, which have the layout of iovecs, are held exclusively and outlive the call.
    let count = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT | mode.bits()) };
    counted(count)
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
    check(unsafe { libc::shutdown(fd.as_raw_fd(), how) }).map(drop)
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
    fds::readiness(fd, event).is_ok_and(|shown| shown & event != 0)
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
    let in_line = int_option(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE)?;
    // Each look stops at the mark, so there are several, each from where the last one ended; and the byte is to be among them.
    set_int_option(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1)?;
    let mut mark = (urgent && is_at_mark(fd)).then_some(0);
    let looked = set_int_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0).and_then(|()| {
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
    set_int_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)?;
    set_int_option(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, in_line)?;
    looked.map(|()| mark)
}

/// Sets how much a socket may have sent that its peer hasn't read. The kernel doubles the value for its bookkeeping. Goes beyond
/// `net.core.wmem_max` when privileged.
pub fn set_send_buffer(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let value = i32::try_from(bytes).unwrap_or(i32::MAX);
    match set_int_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, value) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            set_int_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, value)
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
    .map(drop)
}

/// The inode number, by which every duplicate of a socket is recognised.
pub fn inode(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let status = fds::status(fd)?;
    if status.file_type() == libc::S_IFSOCK {
        Ok(status.inode)
    } else {
        Err(io::Error::from_raw_os_error(libc::ENOTSOCK))
    }
}

/// Whether calls on the descriptor return instead of waiting (`O_NONBLOCK`).
pub fn is_nonblocking(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(fds::status_flags(fd)? & libc::O_NONBLOCK != 0)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

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
        assert!(sockets::memory_unread(ours.as_fd()).expect("outq") > 0);
        let waiting = fds::bytes_waiting(theirs.as_fd()).expect("inq");
        let mut buffer = vec![0u8; waiting];
        let count = receive(theirs.as_fd(), &mut [IoSliceMut::new(&mut buffer)], Receive::PEEK).expect("peek");
        assert_eq!((count, &buffer[..]), (6, &b"abcdef"[..]));
        let count = receive(theirs.as_fd(), &mut [IoSliceMut::new(&mut buffer)], Receive::empty()).expect("read");
        assert_eq!(count, 6);
        assert_eq!(sockets::memory_unread(ours.as_fd()).expect("outq"), 0);
    }
}
