//! What the kernel tells about Unix sockets of a network namespace (`sock_diag(7)`): who is connected to whom.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::sockets;

/// One Unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// Its inode.
    pub inode: u64,
    /// SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
    pub kind: i32,
    /// TCP_LISTEN (10), TCP_ESTABLISHED (1), TCP_CLOSE (7).
    pub state: u8,
    /// Inode of the peer.
    pub peer: Option<u64>,
    /// The name it is bound to: a path, or what follows the leading zero byte of an abstract name.
    pub name: Option<Name>,
    /// A listener's connections that wait to be accepted: inodes of the sockets that connect (0: gone already).
    pub waiting: Vec<u64>,
    /// A listener's backlog; otherwise memory in the send queue.
    pub backlog: u32,
    /// Bytes that wait to be read (a listener: connections).
    pub queued: u32,
    /// RCV_SHUTDOWN (1) and SEND_SHUTDOWN (2).
    pub shutdown: u8,
}

/// The name of a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Name {
    /// A path as given to bind(2), perhaps relative.
    Path(Vec<u8>),
    /// An abstract name.
    Abstract(Vec<u8>),
}

/// A netlink socket to ask with; it answers for the network namespace of the thread that makes it.
pub fn open() -> io::Result<OwnedFd> {
    const NETLINK_SOCK_DIAG: i32 = 4;
    sockets::socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)
}

/// All Unix sockets of the namespace, by inode.
pub fn unix_sockets(diag: &OwnedFd) -> io::Result<HashMap<u64, UnixSocket>> {
    dump(diag, u32::MAX)
}

/// Those that listen, by inode.
pub fn unix_listeners(diag: &OwnedFd) -> io::Result<HashMap<u64, UnixSocket>> {
    const LISTENING: u32 = 10;
    dump(diag, 1 << LISTENING)
}

/// The Unix socket with this inode, if it is in the namespace.
pub fn unix_socket(diag: &OwnedFd, inode: u64) -> io::Result<Option<UnixSocket>> {
    let Ok(inode) = u32::try_from(inode) else { return Ok(None) };
    if inode == 0 {
        return Ok(None);
    }
    ask(diag, 0, u32::MAX, inode)?;
    let mut buffer = vec![0u8; 64 << 10];
    let length = super::read(diag.as_fd(), &mut buffer)?;
    match message(&buffer[..length])? {
        (Answer::Socket(socket), _) => Ok(Some(socket)),
        (Answer::Failed(libc::ENOENT), _) => Ok(None),
        (Answer::Failed(code), _) => Err(io::Error::from_raw_os_error(code)),
        (Answer::Other | Answer::Done, _) => Err(io::Error::from_raw_os_error(libc::EBADMSG)),
    }
}

/// Sends a request: for all sockets in certain states, or for the one with an inode.
fn ask(diag: &OwnedFd, flags: u16, states: u32, inode: u32) -> io::Result<()> {
    // struct nlmsghdr, struct unix_diag_req.
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLM_F_REQUEST: u16 = 1;
    // NAME | PEER | ICONS | RQLEN
    const SHOW: u32 = 1 | 4 | 8 | 16;
    let mut request = Vec::with_capacity(40);
    request.extend(40u32.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    request.extend([0; 8]);
    request.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    request.extend(states.to_ne_bytes());
    request.extend(inode.to_ne_bytes());
    request.extend(SHOW.to_ne_bytes());
    // The cookie: any.
    request.extend([0xff; 8]);
    super::write(diag.as_fd(), &request).map(drop)
}

fn dump(diag: &OwnedFd, states: u32) -> io::Result<HashMap<u64, UnixSocket>> {
    const NLM_F_DUMP: u16 = 0x300;
    ask(diag, NLM_F_DUMP, states, 0)?;
    let mut sockets = HashMap::new();
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let length = super::read(diag.as_fd(), &mut buffer)?;
        let mut rest = &buffer[..length];
        while rest.len() >= 16 {
            let (answer, size) = message(rest)?;
            match answer {
                Answer::Done => return Ok(sockets),
                Answer::Failed(code) => return Err(io::Error::from_raw_os_error(code)),
                Answer::Socket(socket) => {
                    sockets.insert(socket.inode, socket);
                }
                Answer::Other => {}
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or(&[]);
        }
        if length == 0 {
            return Err(io::Error::from_raw_os_error(libc::EBADMSG));
        }
    }
}

/// What a netlink message says.
enum Answer {
    Done,
    /// An errno.
    Failed(i32),
    Socket(UnixSocket),
    Other,
}

/// The first message, with its size.
fn message(bytes: &[u8]) -> io::Result<(Answer, usize)> {
    let malformed = || io::Error::from_raw_os_error(libc::EBADMSG);
    if bytes.len() < 16 {
        return Err(malformed());
    }
    let size = word(bytes, 0) as usize;
    if size < 16 || size > bytes.len() {
        return Err(malformed());
    }
    let answer = match i32::from(u16::from_ne_bytes([bytes[4], bytes[5]])) {
        libc::NLMSG_DONE => Answer::Done,
        libc::NLMSG_ERROR => {
            let code = if size >= 20 { word(bytes, 16) } else { 0 };
            Answer::Failed(-i32::from_ne_bytes(code.to_ne_bytes()))
        }
        _ => parse(&bytes[16..size]).map_or(Answer::Other, Answer::Socket),
    };
    Ok((answer, size))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// `struct unix_diag_msg` and its attributes.
fn parse(message: &[u8]) -> Option<UnixSocket> {
    if message.len() < 16 {
        return None;
    }
    let mut socket = UnixSocket {
        kind: i32::from(message[1]),
        state: message[2],
        inode: u64::from(word(message, 4)),
        ..UnixSocket::default()
    };
    let mut rest = &message[16..];
    while rest.len() >= 4 {
        let size = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]);
        let body = rest.get(4..size)?;
        match kind {
            // UNIX_DIAG_NAME
            0 => socket.name = Some(name(body)),
            // UNIX_DIAG_PEER
            2 => socket.peer = Some(u64::from(word(body, 0))),
            // UNIX_DIAG_ICONS
            3 => socket.waiting = (0..body.len() / 4).map(|index| u64::from(word(body, index * 4))).collect(),
            // UNIX_DIAG_RQLEN
            4 => (socket.queued, socket.backlog) = (word(body, 0), word(body, 4)),
            // UNIX_DIAG_SHUTDOWN
            6 => socket.shutdown = body.first().copied().unwrap_or(0),
            _ => {}
        }
        rest = rest.get(size.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Some(socket)
}

fn name(body: &[u8]) -> Name {
    match body.split_first() {
        Some((0, rest)) => Name::Abstract(rest.to_vec()),
        _ => Name::Path(body.strip_suffix(&[0]).unwrap_or(body).to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_socket_is_found_like_all() {
        let diag = open().expect("a netlink socket");
        let (one, other) = crate::unix::pair(false).expect("a pair");
        let inode = crate::unix::inode(one.as_fd()).expect("it has one");
        let peer = crate::unix::inode(other.as_fd()).expect("it has one");
        let found = unix_socket(&diag, inode).expect("the kernel answers").expect("it is there");
        assert_eq!(found.peer, Some(peer));
        assert_eq!(unix_sockets(&diag).expect("the kernel answers").get(&inode), Some(&found));
        assert!(!unix_listeners(&diag).expect("the kernel answers").contains_key(&inode));
        drop((one, other));
        assert_eq!(unix_socket(&diag, inode).expect("the kernel answers"), None);
    }
}
