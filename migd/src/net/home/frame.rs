//! What the two ends of a line say to each other.
//!
//! A frame is a header of 16 bytes, big-endian, and a payload: the length of the payload (4 bytes), the kind (1), zeros (3), and a
//! number (8) whose meaning depends on the kind, mostly the socket's. What is frequent has its values in the header or
//! as raw bytes; the rest is MessagePack with field names.

use std::net::SocketAddr;

use netstack::{Reuse, Shutdown, SocketError, SocketId, State, Status, TcpInfo, TcpOption, TcpOptions};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sys::tun;

/// Length of a frame's header, in bytes.
pub(super) const HEADER_LEN: usize = 16;
/// The longest payload, in bytes. Longer things are cut.
pub(super) const PAYLOAD_MAX: usize = 1 << 20;
/// The longest stretch of a socket's bytes in one frame, so that sockets share a line fairly.
pub(super) const DATA_MAX: usize = 256 << 10;

/// What makes a line unusable: the other end does not keep to the protocol.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    #[error("a frame of {0} bytes is longer than any can be")]
    TooLong(usize),
    #[error("frames of kind {0} are not known here: run releases that belong together")]
    Kind(u8),
    #[error("a frame of kind {0} is malformed")]
    Malformed(u8),
}

/// One frame. *Out* goes from the process's node to the home, *in* the other way.
#[derive(Debug)]
pub(super) enum Frame<'a> {
    /// Bytes of a socket. Out: written by the program; in: received, a copy of what the home's stack still holds.
    Data { id: SocketId, bytes: &'a [u8] },
    /// A packet that is no TCP: the header of a TUN device, and the packet. Lost when the line is full, as packets are. In: with
    /// its place among all that came to this home.
    Packet { number: u64, header: [u8; tun::HEADER_LEN], packet: &'a [u8] },
    /// Out: so many received bytes are with the program; the home's stack may forget them.
    Taken { id: SocketId, count: u64 },
    /// In: since this line was activated so many bytes of the socket may be sent in all.
    Room { id: SocketId, upto: u64 },
    /// In: what a socket looks like once every byte of data sent before is read.
    Look { id: SocketId, look: Look },
    /// Out: `shutdown(2)`.
    Shutdown { id: SocketId, how: Shutdown },
    /// Out: the program closed it.
    Close { id: SocketId },
    /// Out: to be reset once what was sent before is out.
    Abort { id: SocketId },
    /// Out: the pending error was told to the program.
    ErrorTaken { id: SocketId },
    /// Out: to be answered by [`Frame::Answer`] with the same number.
    Call { number: u64, call: Call },
    /// In.
    Answer { number: u64, answer: Box<Answer> },
    /// In, before the answer to [`Call::Image`] or [`Call::Report`]: a piece of what was asked for.
    Piece { bytes: &'a [u8] },
    /// Out: the process is here, the owner with this epoch; the line that served it before is to be forgotten. It has had the
    /// packets before this number.
    Activate { epoch: u64, packet: u64 },
    /// Out: the stack was thawed here and belongs to the owner with this epoch; the home is one no more.
    Inherit { epoch: u64 },
    /// Out: the move that froze the stack came to nothing.
    Resume,
}

/// A call with an answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Call {
    Open,
    Bind {
        id: SocketId,
        address: SocketAddr,
        reuse: Reuse,
    },
    Listen {
        id: SocketId,
        backlog: u32,
    },
    Connect {
        id: SocketId,
        remote: SocketAddr,
    },
    Accept {
        id: SocketId,
    },
    Set {
        id: SocketId,
        option: TcpOption,
    },
    /// What `TCP_INFO` tells, and how many bytes are on their way out.
    Inform {
        id: SocketId,
    },
    /// The same of every socket, as pieces that decode as a list of [`Report`].
    Report,
    /// Nothing: the answer says that everything sent before was taken in.
    Settle,
    /// The program has ended and closed everything: the home goes on alone with what is on its way out.
    Finish,
    /// Stop the stack and send its image, for the owner to be with this epoch, and the packets from this number on.
    Image {
        epoch: u64,
        #[serde(default)]
        packet: u64,
    },
}

/// What a [`Call::Report`] tells of a socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) id: SocketId,
    pub(super) look: Look,
    pub(super) info: TcpInfo,
}

/// The answer to any [`Call`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) result: Result<(), SocketError>,
    /// The socket that the call was about, or made, as it is now.
    #[serde(default)]
    pub(super) socket: Option<SocketImage>,
    #[serde(default)]
    pub(super) info: Option<TcpInfo>,
    #[serde(default)]
    pub(super) look: Option<Look>,
    /// Why a frozen stack's image can't be had.
    #[serde(default)]
    pub(super) refusal: Option<String>,
}

impl Answer {
    pub(super) fn of(result: Result<(), SocketError>) -> Answer {
        Answer { result, socket: None, info: None, look: None, refusal: None }
    }
}

/// What of a socket only changes by calls, so that the end that makes them always knows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SocketImage {
    pub(super) id: SocketId,
    pub(super) state: State,
    pub(super) local: Option<SocketAddr>,
    pub(super) remote: Option<SocketAddr>,
    pub(super) options: TcpOptions,
    #[serde(default)]
    pub(super) acceptable: usize,
}

/// What of a socket changes by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Look {
    pub(super) state: State,
    pub(super) peer_closed: bool,
    pub(super) acceptable: usize,
    pub(super) error: Option<SocketError>,
    pub(super) unsent: usize,
    pub(super) unacked: usize,
}

impl Look {
    pub(super) fn of(status: &Status) -> Look {
        let Status { state, readable: _, send_space: _, peer_closed, acceptable, error, unsent, unacked, urgent: _ } =
            *status;
        Look { state, peer_closed, acceptable, error, unsent, unacked }
    }

    /// Whether a program could tell the two apart without asking for what is on its way out.
    pub(super) fn same_to_program(&self, other: &Look) -> bool {
        let Look { state, peer_closed, acceptable, error, unsent: _, unacked: _ } = other;
        (self.state, self.peer_closed, self.acceptable, self.error) == (*state, *peer_closed, *acceptable, *error)
    }
}

const DATA: u8 = 1;
const TAKEN: u8 = 2;
const ROOM: u8 = 3;
const LOOK: u8 = 4;
const SHUTDOWN: u8 = 5;
const CLOSE: u8 = 6;
const ABORT: u8 = 7;
const ERROR_TAKEN: u8 = 8;
const CALL: u8 = 9;
const ANSWER: u8 = 10;
const PIECE: u8 = 11;
const ACTIVATE: u8 = 12;
const INHERIT: u8 = 13;
const RESUME: u8 = 14;
const PACKET: u8 = 15;

/// A decoded header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) length: usize,
    kind: u8,
    number: u64,
}

impl Header {
    pub(super) fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, FrameError> {
        let [l0, l1, l2, l3, kind, _, _, _, number @ ..] = *bytes;
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if length > PAYLOAD_MAX {
            return Err(FrameError::TooLong(length));
        }
        Ok(Header { length, kind, number: u64::from_be_bytes(number) })
    }

    pub(super) fn open(self, payload: &[u8]) -> Result<Frame<'_>, FrameError> {
        let id = SocketId::from_u64(self.number);
        let number = self.number;
        let value = || -> Result<u64, FrameError> {
            let bytes = payload.first_chunk().ok_or(FrameError::Malformed(self.kind))?;
            Ok(u64::from_be_bytes(*bytes))
        };
        Ok(match self.kind {
            DATA => Frame::Data { id, bytes: payload },
            TAKEN => Frame::Taken { id, count: value()? },
            ROOM => Frame::Room { id, upto: value()? },
            LOOK => Frame::Look { id, look: self.unpack(payload)? },
            SHUTDOWN => {
                let how = match payload {
                    [0] => Shutdown::Read,
                    [1] => Shutdown::Write,
                    [2] => Shutdown::Both,
                    _ => return Err(FrameError::Malformed(self.kind)),
                };
                Frame::Shutdown { id, how }
            }
            CLOSE => Frame::Close { id },
            ABORT => Frame::Abort { id },
            ERROR_TAKEN => Frame::ErrorTaken { id },
            CALL => Frame::Call { number, call: self.unpack(payload)? },
            ANSWER => Frame::Answer { number, answer: self.unpack(payload)? },
            PIECE => Frame::Piece { bytes: payload },
            ACTIVATE => Frame::Activate { epoch: number, packet: value()? },
            INHERIT => Frame::Inherit { epoch: number },
            RESUME => Frame::Resume,
            PACKET => {
                let (header, packet) = payload.split_first_chunk().ok_or(FrameError::Malformed(self.kind))?;
                Frame::Packet { number, header: *header, packet }
            }
            kind => return Err(FrameError::Kind(kind)),
        })
    }

    fn unpack<T: DeserializeOwned>(self, payload: &[u8]) -> Result<T, FrameError> {
        rmp_serde::from_slice(payload).map_err(|_| FrameError::Malformed(self.kind))
    }
}

impl Frame<'_> {
    /// Appends the frame.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Frame::Data { id, bytes } => append(out, DATA, id.as_u64(), bytes),
            Frame::Taken { id, count } => append(out, TAKEN, id.as_u64(), &count.to_be_bytes()),
            Frame::Room { id, upto } => append(out, ROOM, id.as_u64(), &upto.to_be_bytes()),
            Frame::Look { id, look } => append(out, LOOK, id.as_u64(), &pack(look)),
            Frame::Shutdown { id, how } => {
                let how = match how {
                    Shutdown::Read => 0,
                    Shutdown::Write => 1,
                    Shutdown::Both => 2,
                };
                append(out, SHUTDOWN, id.as_u64(), &[how]);
            }
            Frame::Close { id } => append(out, CLOSE, id.as_u64(), &[]),
            Frame::Abort { id } => append(out, ABORT, id.as_u64(), &[]),
            Frame::ErrorTaken { id } => append(out, ERROR_TAKEN, id.as_u64(), &[]),
            Frame::Call { number, call } => append(out, CALL, *number, &pack(call)),
            Frame::Answer { number, answer } => append(out, ANSWER, *number, &pack(answer)),
            Frame::Piece { bytes } => append(out, PIECE, 0, bytes),
            Frame::Activate { epoch, packet } => append(out, ACTIVATE, *epoch, &packet.to_be_bytes()),
            Frame::Inherit { epoch } => append(out, INHERIT, *epoch, &[]),
            Frame::Resume => append(out, RESUME, 0, &[]),
            Frame::Packet { number, header, packet } => {
                self::header(out, PACKET, *number, header.len() + packet.len());
                out.extend_from_slice(header);
                out.extend_from_slice(packet);
            }
        }
    }
}

/// Appends the header of a data frame whose payload follows.
pub(super) fn data_header(out: &mut Vec<u8>, id: SocketId, length: usize) {
    header(out, DATA, id.as_u64(), length);
}

fn header(out: &mut Vec<u8>, kind: u8, number: u64, length: usize) {
    debug_assert!(length <= PAYLOAD_MAX);
    let length = u32::try_from(length).expect("payloads are at most a megabyte");
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&[kind, 0, 0, 0]);
    out.extend_from_slice(&number.to_be_bytes());
}

fn append(out: &mut Vec<u8>, kind: u8, number: u64, payload: &[u8]) {
    header(out, kind, number, payload.len());
    out.extend_from_slice(payload);
}

fn pack<T: Serialize>(value: &T) -> Vec<u8> {
    rmp_serde::to_vec_named(value).expect("plain data into memory always encodes")
}
