//! Sockets as the driver sees them: names, states, errors.

use serde::{Deserialize, Serialize};

/// Names a socket of one stack, for the socket's whole life. It stays the same across freeze and thaw and is never used
/// twice by a stack and its descendants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SocketId(u64);

impl SocketId {
    pub(crate) const fn new(index: u32, generation: u32) -> Self {
        SocketId((generation as u64) << 32 | index as u64)
    }

    pub(crate) const fn index(self) -> u32 {
        (self.0 & 0xffff_ffff) as u32
    }

    pub(crate) const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The name as a number, unique within its stack.
    #[must_use]
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// The name that [`SocketId::as_u64`] gave. A number that no socket has names one that does not exist.
    #[must_use]
    pub const fn from_u64(number: u64) -> Self {
        SocketId(number)
    }
}

/// State of a TCP socket, with Linux's names (`enum` in `include/net/tcp_states.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    /// No connection, or not one any more.
    Closed,
    /// Waiting for connections.
    Listen,
    /// SYN sent.
    SynSent,
    /// SYN received, SYN-ACK sent (simultaneous open; half-open connections of a listener are no sockets yet).
    SynReceived,
    /// Data flows both ways.
    Established,
    /// This side has sent its FIN.
    FinWait1,
    /// This side's FIN is acknowledged; the peer still sends.
    FinWait2,
    /// The peer has sent its FIN; this side still sends.
    CloseWait,
    /// Both sides have sent FINs and this side's is not acknowledged.
    Closing,
    /// The peer closed first, and this side's FIN is not acknowledged.
    LastAck,
    /// Over; the pair of ends is kept from being used again for a while.
    TimeWait,
}

impl State {
    /// The number Linux gives the state in `tcp_info.tcpi_state`.
    #[must_use]
    pub const fn linux_number(self) -> u8 {
        match self {
            State::Established => 1,
            State::SynSent => 2,
            State::SynReceived => 3,
            State::FinWait1 => 4,
            State::FinWait2 => 5,
            State::TimeWait => 6,
            State::Closed => 7,
            State::CloseWait => 8,
            State::LastAck => 9,
            State::Listen => 10,
            State::Closing => 11,
        }
    }
}

/// What a socket looks like right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// State of the connection.
    pub state: State,
    /// Bytes that can be received at once.
    pub readable: usize,
    /// Bytes that can be sent at once.
    pub send_space: usize,
    /// The peer's FIN arrived and everything before it: after `readable` bytes comes the end of the stream.
    pub peer_closed: bool,
    /// Connections that wait to be accepted.
    pub acceptable: usize,
    /// Pending error; [`crate::Stack::take_error`] takes it.
    pub error: Option<SocketError>,
    /// Bytes queued and not yet sent.
    pub unsent: usize,
    /// Bytes sent and not yet acknowledged.
    pub unacked: usize,
    /// Urgent data that the program has not read past.
    pub urgent: Option<Urgent>,
}

impl Status {
    /// A socket that doesn't exist, or is in no state.
    pub const CLOSED: Status = Status {
        state: State::Closed,
        readable: 0,
        send_space: 0,
        peer_closed: false,
        acceptable: 0,
        error: None,
        unsent: 0,
        unacked: 0,
        urgent: None,
    };
}

/// Urgent data of the peer that the program has not read past (RFC 9293, 3.8.5). A driver that finds it in [`Status`]
/// tells the program (`SIGURG`, `POLLPRI`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Urgent {
    /// Bytes of the stream before the mark; at zero the stream is at the mark (`SIOCATMARK`).
    pub ahead: usize,
    /// The urgent byte is here and [`crate::Stack::tcp_recv_urgent`] would return it.
    pub available: bool,
}

/// Why a socket call or a connection failed. The variants are named after the errno a program gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum SocketError {
    /// EADDRINUSE
    #[error("address already in use")]
    AddressInUse,
    /// EADDRNOTAVAIL
    #[error("cannot assign requested address")]
    AddressNotAvailable,
    /// ECONNREFUSED
    #[error("connection refused")]
    ConnectionRefused,
    /// ECONNRESET
    #[error("connection reset by peer")]
    ConnectionReset,
    /// ETIMEDOUT
    #[error("connection timed out")]
    TimedOut,
    /// EHOSTUNREACH
    #[error("no route to host")]
    HostUnreachable,
    /// ENETUNREACH
    #[error("network is unreachable")]
    NetworkUnreachable,
    /// EPIPE: sending after shutdown or after the connection ended
    #[error("broken pipe")]
    BrokenPipe,
    /// ENOTCONN
    #[error("transport endpoint is not connected")]
    NotConnected,
    /// EISCONN
    #[error("transport endpoint is already connected")]
    IsConnected,
    /// EALREADY
    #[error("operation already in progress")]
    AlreadyInProgress,
    /// EINVAL
    #[error("invalid argument")]
    InvalidArgument,
    /// EMSGSIZE
    #[error("message too long")]
    MessageTooLong,
    /// EPROTO: the peer broke the protocol, or an ICMP parameter problem
    #[error("protocol error")]
    Protocol,
    /// ENOPROTOOPT
    #[error("protocol not available")]
    ProtocolNotAvailable,
    /// EAFNOSUPPORT
    #[error("address family not supported")]
    AddressFamily,
    /// EBADF: there is no such socket (any more)
    #[error("no such socket")]
    NoSuchSocket,
    /// ENOBUFS
    #[error("no buffer space available")]
    NoBuffers,
}

/// Whether addresses may be shared: `SO_REUSEADDR` and `SO_REUSEPORT`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reuse {
    /// `SO_REUSEADDR`
    pub address: bool,
    /// `SO_REUSEPORT`
    pub port: bool,
}

/// Which directions `shutdown(2)` ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// `SHUT_RD`
    Read,
    /// `SHUT_WR`: FIN after what is queued
    Write,
    /// `SHUT_RDWR`
    Both,
}
