//! The envelope of every message: a fixed header, checked before anything is decoded.
//!
//! ```text
//!  0      4         6      8        12      16
//!  | MIGD | version | kind | length | crc32 | payload, `length` bytes |
//! ```
//!
//! Numbers are big-endian. The checksum covers version, kind, length and payload. A length above [`MAX_PAYLOAD`] is
//! refused before a byte of the payload is read, so a peer can't make this side reserve memory that it doesn't send.

use crate::message::{Kind, Message};

/// The first four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"MIGD";
/// The version of the envelope itself; what the messages mean is negotiated by [`crate::message::Hello`].
pub const VERSION: u16 = 1;
/// Bytes of a header.
pub const HEADER_LEN: usize = 16;
/// The largest payload of a frame, in bytes.
pub const MAX_PAYLOAD: usize = 64 << 20;
/// The largest piece of memory or of a section that a sender puts into one frame, in bytes.
pub const MAX_CHUNK: usize = 1 << 20;
/// Bytes before the data in the payload of a pages frame: the process and the address.
pub(crate) const PAGES_PREFIX: usize = 12;

/// Why bytes from the peer are not a message.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The stream does not carry this protocol, or lost its step.
    #[error("not a migd frame (begins with {0:02x?})")]
    Magic([u8; 4]),
    /// The peer frames its messages in another way.
    #[error("frame version {0}, this migd speaks version {VERSION}: run the same release on both nodes")]
    Version(u16),
    /// The peer sent a kind of message this side does not know.
    #[error("unknown kind of message {0}")]
    Kind(u16),
    /// The frame claims to be larger than any frame may be.
    #[error("frame of {0} bytes, the limit is {MAX_PAYLOAD}")]
    TooLarge(u32),
    /// The payload was damaged on the way.
    #[error("checksum of a {kind:?} frame is {found:08x}, its header says {expected:08x}")]
    Checksum {
        /// The kind of frame.
        kind: Kind,
        /// What the header says.
        expected: u32,
        /// What the bytes give.
        found: u32,
    },
    /// The payload is shorter than its kind needs, or has another length than its header says.
    #[error("a {0:?} frame of the wrong length")]
    Length(Kind),
    /// The payload is no valid message of its kind.
    #[error("a {kind:?} frame does not decode")]
    Payload {
        /// The kind of frame.
        kind: Kind,
        /// What the decoder found.
        #[source]
        source: rmp_serde::decode::Error,
    },
    /// The frame carries a section this side does not know.
    #[error("unknown section {0}")]
    Section(u16),
}

/// A checked header: what follows is `payload_len` bytes of `kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    kind: Kind,
    payload_len: usize,
    crc: u32,
}

impl Header {
    /// Checks the sixteen bytes of a header.
    ///
    /// # Errors
    /// Says which field is not one of this protocol.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, DecodeError> {
        let [m0, m1, m2, m3, v0, v1, k0, k1, l0, l1, l2, l3, c0, c1, c2, c3] = *bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(DecodeError::Magic([m0, m1, m2, m3]));
        }
        let version = u16::from_be_bytes([v0, v1]);
        if version != VERSION {
            return Err(DecodeError::Version(version));
        }
        let kind = u16::from_be_bytes([k0, k1]);
        let kind = Kind::from_number(kind).ok_or(DecodeError::Kind(kind))?;
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let payload_len = usize::try_from(length).map_err(|_| DecodeError::TooLarge(length))?;
        if payload_len > MAX_PAYLOAD {
            return Err(DecodeError::TooLarge(length));
        }
        Ok(Header { kind, payload_len, crc: u32::from_be_bytes([c0, c1, c2, c3]) })
    }

    /// Bytes of payload that follow this header.
    pub fn payload_len(&self) -> usize {
        self.payload_len
    }

    /// Checks the payload against the header and decodes it.
    ///
    /// # Errors
    /// When the payload is not the one the header describes, or does not decode.
    pub fn open<'a>(&self, payload: &'a [u8]) -> Result<Message<'a>, DecodeError> {
        if payload.len() != self.payload_len {
            return Err(DecodeError::Length(self.kind));
        }
        let found = checksum(self.kind, self.payload_len as u32, &[payload]);
        if found != self.crc {
            return Err(DecodeError::Checksum { kind: self.kind, expected: self.crc, found });
        }
        Message::decode(self.kind, payload)
    }
}

/// Appends `message` as one frame to `out`.
///
/// # Panics
/// When the message is larger than [`MAX_PAYLOAD`]: senders cut bulk data into pieces of [`MAX_CHUNK`], and offers are
/// bounded by the caller.
pub fn encode(message: &Message<'_>, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_LEN]);
    message.encode_payload(out);
    let header = header(message.kind(), &[&out[start + HEADER_LEN..]]);
    out[start..start + HEADER_LEN].copy_from_slice(&header);
}

/// The bytes to send before `data` to make the pages frame `(process, address, data)`, so that memory goes from where
/// it lies to the connection without a copy.
///
/// # Panics
/// When `data` is larger than a frame may be.
pub fn pages_prefix(process: u32, address: u64, data: &[u8]) -> [u8; HEADER_LEN + PAGES_PREFIX] {
    let mut place = [0; PAGES_PREFIX];
    place[..4].copy_from_slice(&process.to_be_bytes());
    place[4..].copy_from_slice(&address.to_be_bytes());
    let mut out = [0; HEADER_LEN + PAGES_PREFIX];
    out[..HEADER_LEN].copy_from_slice(&header(Kind::Pages, &[&place, data]));
    out[HEADER_LEN..].copy_from_slice(&place);
    out
}

fn header(kind: Kind, payload: &[&[u8]]) -> [u8; HEADER_LEN] {
    let length: usize = payload.iter().map(|part| part.len()).sum();
    assert!(length <= MAX_PAYLOAD, "a {kind:?} frame of {length} bytes");
    // Fits: MAX_PAYLOAD is far below 2^32.
    let length = length as u32;
    let mut out = [0; HEADER_LEN];
    out[..4].copy_from_slice(&MAGIC);
    out[4..6].copy_from_slice(&VERSION.to_be_bytes());
    out[6..8].copy_from_slice(&kind.number().to_be_bytes());
    out[8..12].copy_from_slice(&length.to_be_bytes());
    out[12..].copy_from_slice(&checksum(kind, length, payload).to_be_bytes());
    out
}

fn checksum(kind: Kind, length: u32, payload: &[&[u8]]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&VERSION.to_be_bytes());
    crc.update(&kind.number().to_be_bytes());
    crc.update(&length.to_be_bytes());
    for part in payload {
        crc.update(part);
    }
    crc.finalize()
}
