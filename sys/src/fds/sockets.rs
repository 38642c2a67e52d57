//! Sockets with raw addresses and raw option values, descriptors in messages, and reading a queue without emptying it.
//!
//! Addresses are `struct sockaddr` as bytes, of exactly the length the kernel reports: an abstract or unnamed Unix address
//! means something else with another length.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use crate::outcome::{check, counted, owned};

/// The most descriptors that one message can carry (SCM_MAX_FD).
pub const DESCRIPTORS_IN_MESSAGE: usize = 253;

/// `socket(2)`; close-on-exec.
pub fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: socket takes three integers.
    owned(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) })
}

/// `socketpair(2)` in AF_UNIX; close-on-exec.
pub fn socket_pair(kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    let kind = kind | libc::SOCK_CLOEXEC;
    // SAFETY: the kernel writes two descriptor numbers into an array of two.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) })?;
    Ok((owned(ends[0])?, owned(ends[1])?))
}

fn address_length(address: &[u8]) -> io::Result<u32> {
    u32::try_from(address.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// `bind(2)`.
pub fn bind(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let length = address_length(address)?;
    // SAFETY: the kernel reads as many bytes as the slice has.
    check(unsafe { libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), length) }).map(drop)
}

/// `connect(2)`.
pub fn connect(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let length = address_length(address)?;
    // SAFETY: the kernel reads as many bytes as the slice has.
    check(unsafe { libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), length) }).map(drop)
}

/// `listen(2)`.
pub fn listen(fd: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    // SAFETY: listen takes two integers.
    check(unsafe { libc::listen(fd.as_raw_fd(), backlog) }).map(drop)
}

/// `accept4(2)`; close-on-exec.
pub fn accept(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let none = std::ptr::null_mut();
    // SAFETY: null is allowed for address and length.
    owned(unsafe { libc::accept4(fd.as_raw_fd(), none, none.cast(), libc::SOCK_CLOEXEC) })
}

/// `getsockname(2)`.
pub fn local_address(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut buffer = [0u8; 128];
    let mut length: libc::socklen_t = 128;
    // SAFETY: the kernel writes at most `length` bytes into the buffer of that length.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), &raw mut length) })?;
    Ok(buffer[..(length as usize).min(128)].to_vec())
}

/// `getpeername(2)`.
pub fn peer_address(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut buffer = [0u8; 128];
    let mut length: libc::socklen_t = 128;
    // SAFETY: the kernel writes at most `length` bytes into the buffer of that length.
    check(unsafe { libc::getpeername(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), &raw mut length) })?;
    Ok(buffer[..(length as usize).min(128)].to_vec())
}

/// `getsockopt(2)`: the option's bytes, at most 256.
pub fn option(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<Vec<u8>> {
    let mut buffer = [0u8; 256];
    let mut length: libc::socklen_t = 256;
    // SAFETY: the kernel writes at most `length` bytes into the buffer of that length.
    let result = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut length) };
    check(result)?;
    Ok(buffer[..(length as usize).min(256)].to_vec())
}

/// An option that is an int.
pub fn int_option(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let bytes = option(fd, level, name)?;
    bytes.try_into().map(i32::from_ne_bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// `setsockopt(2)`.
pub fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let length = address_length(value)?;
    // SAFETY: the kernel reads as many bytes as the slice has.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), length) }).map(drop)
}

/// `setsockopt(2)` of an option that is an int.
pub fn set_int_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_option(fd, level, name, &value.to_ne_bytes())
}

/// SO_PEERCRED: process, user, group.
pub fn peer_credentials(fd: BorrowedFd<'_>) -> io::Result<(i32, u32, u32)> {
    let bytes = option(fd, libc::SOL_SOCKET, libc::SO_PEERCRED)?;
    let word = |at: usize| -> io::Result<[u8; 4]> {
        let bytes = bytes.get(at..at + 4).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        bytes.try_into().map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
    };
    Ok((i32::from_ne_bytes(word(0)?), u32::from_ne_bytes(word(4)?), u32::from_ne_bytes(word(8)?)))
}

/// `SIOCUNIXFILE`: the file that a Unix socket is bound to, as an O_PATH descriptor. `ENOENT` when it has none.
pub fn bound_file(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SIOCPROTOPRIVATE
    const SIOCUNIXFILE: libc::c_ulong = 0x89e0;
    // SAFETY: this ioctl takes no argument.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE, 0) };
    let file = owned(result)?;
    super::set_close_on_exec(std::os::fd::AsFd::as_fd(&file), true)?;
    Ok(file)
}

/// `SIOCOUTQ`: memory of what was sent and not yet received by the peer. On a Unix socket this counts the kernel's buffers, so
/// only zero is exact.
pub fn memory_unread(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: TIOCOUTQ writes an int at the address of one.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

#[repr(C, align(8))]
struct Control([u8; 2048]);

/// Sends data with descriptors (at most [`DESCRIPTORS_IN_MESSAGE`]) without waiting.
pub fn send_with_descriptors(fd: BorrowedFd<'_>, data: &[u8], descriptors: &[RawFd]) -> io::Result<usize> {
    if descriptors.len() > DESCRIPTORS_IN_MESSAGE {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut control = Control([0; 2048]);
    let length = control_message(&mut control.0, libc::SCM_RIGHTS, descriptors);
    send_message(fd, data, &[], &control.0[..length])
}

/// Writes one control message of SOL_SOCKET with ints; its length.
fn control_message(control: &mut [u8; 2048], kind: i32, values: &[i32]) -> usize {
    if values.is_empty() {
        return 0;
    }
    // struct cmsghdr: length (size_t), level, type; 16 bytes in all, its data follow.
    let length = 16 + values.len() * 4;
    control[..8].copy_from_slice(&length.to_ne_bytes());
    control[8..12].copy_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
    control[12..16].copy_from_slice(&kind.to_ne_bytes());
    for (place, value) in control[16..].chunks_exact_mut(4).zip(values) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
    length.next_multiple_of(8)
}

/// The control message with descriptors as bytes, for a call made elsewhere: what a receiver must make room for.
pub fn rights_message_bytes(count: usize) -> usize {
    (16 + count * 4).next_multiple_of(8)
}

/// Sends one message without waiting, to an address (empty: the connected peer), with the credentials of another process
/// when given (process, user, group).
pub fn send_as(
    fd: BorrowedFd<'_>,
    data: &[u8],
    address: &[u8],
    credentials: Option<(i32, u32, u32)>,
) -> io::Result<usize> {
    let mut control = Control([0; 2048]);
    let length = match credentials {
        Some((pid, uid, gid)) => {
            let values = [pid, i32::from_ne_bytes(uid.to_ne_bytes()), i32::from_ne_bytes(gid.to_ne_bytes())];
            control_message(&mut control.0, libc::SCM_CREDENTIALS, &values)
        }
        None => 0,
    };
    send_message(fd, data, address, &control.0[..length])
}

fn send_message(fd: BorrowedFd<'_>, data: &[u8], address: &[u8], control: &[u8]) -> io::Result<usize> {
    let mut part = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let mut message = empty_message();
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if !control.is_empty() {
        message.msg_control = control.as_ptr().cast_mut().cast();
        message.msg_controllen = control.len();
    }
    if !address.is_empty() {
        message.msg_name = address.as_ptr().cast_mut().cast();
        message.msg_namelen = address_length(address)?;
    }
    // SAFETY: all pointers of the message are to slices that outlive the call, with their lengths; all are only read.
    let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    counted(sent)
}

fn empty_message() -> libc::msghdr {
    // SAFETY: a msghdr of zeros is valid: null pointers with zero lengths.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn receive_message(
    fd: BorrowedFd<'_>,
    data: &mut [u8],
    name: &mut [u8],
    control: &mut [u8],
    flags: i32,
) -> io::Result<(usize, usize, usize, i32)> {
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    let mut message = empty_message();
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = control.len();
    message.msg_name = name.as_mut_ptr().cast();
    message.msg_namelen = address_length(name)?;
    // SAFETY: all pointers of the message are to slices held exclusively for the call, with their lengths.
    let received = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) };
    let received = counted(received)?;
    let name_length = (message.msg_namelen as usize).min(name.len());
    Ok((received, name_length, message.msg_controllen.min(control.len()), message.msg_flags))
}

fn each_control(mut control: &[u8], mut take: impl FnMut(i32, i32, &[u8])) {
    while let Some(header) = control.get(..16) {
        let (size, rest) = header.split_at(8);
        let length = usize::from_ne_bytes(size.try_into().unwrap_or([0; 8]));
        let level = i32::from_ne_bytes(rest[..4].try_into().unwrap_or([0; 4]));
        let kind = i32::from_ne_bytes(rest[4..8].try_into().unwrap_or([0; 4]));
        let Some(body) = control.get(16..length) else { return };
        take(level, kind, body);
        control = control.get(length.next_multiple_of(8)..).unwrap_or(&[]);
    }
}

/// One message in a socket's queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peeked {
    /// Its data.
    pub data: Vec<u8>,
    /// The sender's address; empty when it has none.
    pub sender: Vec<u8>,
    /// The sender's process, user and group, when the socket asks for them.
    pub credentials: Option<(i32, u32, u32)>,
    /// There are descriptors with it.
    pub carries_descriptors: bool,
}

/// Reads a socket's whole queue and leaves it as it is.
///
/// The position for peeking (SO_PEEK_OFF) belongs to the socket and is put back afterwards, so nobody else may use the
/// socket in the meantime. Data of stream sockets come in pieces of any size.
pub fn peek_queue(fd: BorrowedFd<'_>, stream: bool) -> io::Result<Vec<Peeked>> {
    let before = int_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    let result = set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &0i32.to_ne_bytes())
        .and_then(|()| peek_from_position(fd, stream));
    set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &before.to_ne_bytes())?;
    result
}

/// A datagram in the queue of an IP socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeekedDatagram {
    /// Its data.
    pub data: Vec<u8>,
    /// The sender's address (`struct sockaddr`).
    pub sender: Vec<u8>,
    /// What the socket's options have the kernel tell with it: level, kind and bytes of each control message.
    pub control: Vec<(i32, i32, Vec<u8>)>,
}

/// Reads the queue of an IP datagram socket and leaves it as it is. As with [`peek_queue`], nobody else may use the socket in the
/// meantime.
///
/// A pending error of the socket is taken and forgotten, as by any receive. A datagram without a single byte is passed over if it
/// was peeked at before, which the kernel remembers of each.
pub fn peek_datagrams(fd: BorrowedFd<'_>) -> io::Result<Vec<PeekedDatagram>> {
    let before = int_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &0i32.to_ne_bytes())?;
    let mut queue = Vec::new();
    // No datagram is longer.
    let mut buffer = vec![0u8; 1 << 16];
    let mut name = [0u8; 128];
    let mut control = Control([0; 2048]);
    let mut errors = 0;
    let result = loop {
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        match receive_message(fd, &mut buffer, &mut name, &mut control.0, flags) {
            Ok((length, name_length, control_length, _)) => {
                let mut told = Vec::new();
                each_control(&control.0[..control_length], |level, kind, body| told.push((level, kind, body.to_vec())));
                let sender = name[..name_length].to_vec();
                // A socket shut for reading says 0 bytes from nobody for ever.
                if length == 0 && sender.is_empty() {
                    break Ok(queue);
                }
                queue.push(PeekedDatagram { data: buffer[..length].to_vec(), sender, control: told });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(queue),
            Err(_) if errors < ERRORS_MAX => errors += 1,
            Err(error) => break Err(error),
        }
    };
    set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &before.to_ne_bytes())?;
    result
}

/// More pending errors than a datagram socket can have.
const ERRORS_MAX: usize = 8;

/// Bytes of memory that what waits in the socket's receive queue takes (SO_MEMINFO).
pub fn receive_memory(fd: BorrowedFd<'_>) -> io::Result<usize> {
    // linux/socket.h; the first of an array of words (linux/sock_diag.h, SK_MEMINFO_RMEM_ALLOC).
    const SO_MEMINFO: i32 = 55;
    let words = option(fd, libc::SOL_SOCKET, SO_MEMINFO)?;
    let first = words.first_chunk().copied().unwrap_or_default();
    Ok(usize::try_from(u32::from_ne_bytes(first)).unwrap_or(0))
}

fn peek_from_position(fd: BorrowedFd<'_>, stream: bool) -> io::Result<Vec<Peeked>> {
    let mut queue = Vec::new();
    // More than the largest datagram that a socket with the greatest send buffer can have sent grows the buffer below.
    let mut buffer = vec![0u8; 256 << 10];
    let mut name = [0u8; 128];
    // Room for credentials where they come, and for nothing more: descriptors then show as a truncated control message
    // and are not made.
    let with_credentials = int_option(fd, libc::SOL_SOCKET, libc::SO_PASSCRED)? != 0;
    let mut control = vec![0u8; if with_credentials { 32 } else { 0 }];
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | if stream { 0 } else { libc::MSG_TRUNC };
    loop {
        // An empty queue says EAGAIN, a shut one 0 bytes (which a datagram may have as well).
        let waiting = super::readiness(fd, libc::POLLIN)? & libc::POLLIN != 0;
        if !waiting {
            return Ok(queue);
        }
        let position = int_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
        let (length, name_length, control_length, received) =
            match receive_message(fd, &mut buffer, &mut name, &mut control, flags) {
                Ok(result) => result,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(queue),
                Err(error) => return Err(error),
            };
        if length > buffer.len() {
            buffer.resize(length.next_power_of_two(), 0);
            set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &position.to_ne_bytes())?;
            continue;
        }
        if length == 0 && (stream || received & libc::MSG_EOR == 0 && name_length == 0 && is_shut(fd)?) {
            return Ok(queue);
        }
        let mut credentials = None;
        each_control(&control[..control_length], |_, kind, body| {
            if kind == libc::SCM_CREDENTIALS && body.len() >= 12 {
                let word = |at: usize| u32::from_ne_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]);
                credentials = Some((i32::from_ne_bytes(word(0).to_ne_bytes()), word(4), word(8)));
            }
        });
        queue.push(Peeked {
            data: buffer[..length].to_vec(),
            // An unnamed sender has an address of the family alone.
            sender: if name_length > 2 { name[..name_length].to_vec() } else { Vec::new() },
            credentials,
            carries_descriptors: received & libc::MSG_CTRUNC != 0,
        });
    }
}

fn is_shut(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(super::readiness(fd, libc::POLLRDHUP)? & (libc::POLLRDHUP | libc::POLLHUP) != 0)
}
