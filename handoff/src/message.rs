//! What the two sides say to each other.
//!
//! Control messages are MessagePack maps with named fields, so that a field can be added without breaking the peer;
//! bulk data (memory, layouts, sections) is raw bytes that this crate carries without looking inside.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::frame::{DecodeError, PAGES_PREFIX};

/// The oldest meaning of the messages that this release understands.
pub const PROTOCOL_MIN: u16 = 1;
/// The newest meaning of the messages that this release understands. 2: sections may be packed images (crate `codec`)
/// rather than plain MessagePack, and a preview may come before the freeze. 3: sockets' images may come before the freeze.
pub const PROTOCOL_MAX: u16 = 3;

/// The first message of each side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The oldest protocol the sender speaks.
    pub protocol_min: u16,
    /// The newest protocol the sender speaks.
    pub protocol_max: u16,
    /// The sender's node.
    pub node: String,
    /// The sender's release, for people.
    pub release: String,
}

impl Hello {
    /// The greeting of `node` running this release.
    pub fn new(node: &str) -> Hello {
        Hello {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            node: node.to_owned(),
            release: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// The newest protocol both sides speak.
    pub fn common_protocol(&self) -> Option<u16> {
        let newest = self.protocol_max.min(PROTOCOL_MAX);
        (newest >= self.protocol_min.max(PROTOCOL_MIN)).then_some(newest)
    }
}

/// Which ownership changes hands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The job's identifier in the directory.
    pub job: String,
    /// The owner's fencing number before the move.
    pub epoch: u64,
    /// The node that owns the job now.
    pub source: String,
    /// The node that shall own it.
    pub target: String,
}

/// What the source offers; the target accepts or refuses it as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The ownership to be transferred.
    pub claim: Claim,
    /// The job's specification, as the source's shim holds it.
    #[serde(with = "serde_bytes")]
    pub spec: Vec<u8>,
    /// The process tree's requirements (a `checkpoint` offer).
    #[serde(with = "serde_bytes")]
    pub process: Vec<u8>,
    /// Where the job's sockets are and where they are to be. Empty: with the process, before and after.
    #[serde(default, with = "serde_bytes")]
    pub net: Vec<u8>,
}

/// The end of a pre-copy round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// The round, counted from 1.
    pub number: u32,
}

/// Everything was sent: after this frame the target may take the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResidualEnd {
    /// Every section sent with its length in bytes, so that a lost piece is noticed.
    pub sections: Vec<(SectionKind, u64)>,
}

/// The target won the swap and runs the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// The target's epoch.
    pub epoch: u64,
    /// When the job's first instruction ran at the target, CLOCK_REALTIME in nanoseconds.
    pub running_at_ns: u64,
    /// What the target did since the end of the residual: names and durations in microseconds, for people.
    #[serde(default)]
    pub steps: Vec<(String, u64)>,
}

/// Why a side does not go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// In words, for the person who asked for the move.
    pub reason: String,
}

/// A named piece of the image that is no memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SectionKind {
    /// The process tree.
    Tree,
    /// The sockets and the TCP/IP stack.
    Net,
    /// Frames of the output log, in order; may begin before the freeze.
    Output,
    /// The shim's own state (descriptors of standard input and output, counters).
    Shim,
    /// What the job has open while it still runs, so that the target can make it before the freeze. Each piece stands for
    /// itself; it is no part of the image.
    Preview,
    /// Images of sockets that the job has while it still runs. Each piece stands for itself; the sockets' section names those that
    /// are left out of it.
    NetPreview,
}

impl SectionKind {
    const ALL: [SectionKind; 6] = [
        SectionKind::Tree,
        SectionKind::Net,
        SectionKind::Output,
        SectionKind::Shim,
        SectionKind::Preview,
        SectionKind::NetPreview,
    ];

    fn number(self) -> u16 {
        match self {
            SectionKind::Tree => 1,
            SectionKind::Net => 2,
            SectionKind::Output => 3,
            SectionKind::Shim => 4,
            SectionKind::Preview => 5,
            SectionKind::NetPreview => 6,
        }
    }
}

/// One message. Bulk variants borrow the bytes they were decoded from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// Both sides, first.
    Hello(Hello),
    /// Source: the job to be moved.
    Offer(Offer),
    /// Target: go on.
    Accept,
    /// Target: this job can't run here.
    Refuse(Reason),
    /// Source: the address spaces that the following pages belong to.
    Layout(&'a [u8]),
    /// Source: memory.
    Pages {
        /// The process, as numbered by the layout.
        process: u32,
        /// Where the memory lies in that process.
        address: u64,
        /// Its content.
        data: &'a [u8],
    },
    /// Source: the end of a round.
    RoundEnd(Round),
    /// Target: everything up to the end of that round is in place.
    RoundAck(Round),
    /// Source: the job stops now, what follows is the residual.
    Freezing,
    /// Source: a piece of a section.
    Section {
        /// Which section.
        kind: SectionKind,
        /// The next bytes of it.
        data: &'a [u8],
    },
    /// Source: the image is complete.
    ResidualEnd(ResidualEnd),
    /// Target: everything is ready; the swap is being asked for.
    Prepared,
    /// Target: the job runs here.
    Committed(Committed),
    /// Either side: the move is off, see the promise in the crate's documentation.
    Abort(Reason),
}

/// The kinds of messages, as numbered on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants are those of Message")]
pub enum Kind {
    Hello,
    Offer,
    Accept,
    Refuse,
    Layout,
    Pages,
    RoundEnd,
    RoundAck,
    Freezing,
    Section,
    ResidualEnd,
    Prepared,
    Committed,
    Abort,
}

impl Kind {
    /// Every kind; a kind's number on the wire is its place here plus one.
    pub const ALL: [Kind; 14] = [
        Kind::Hello,
        Kind::Offer,
        Kind::Accept,
        Kind::Refuse,
        Kind::Layout,
        Kind::Pages,
        Kind::RoundEnd,
        Kind::RoundAck,
        Kind::Freezing,
        Kind::Section,
        Kind::ResidualEnd,
        Kind::Prepared,
        Kind::Committed,
        Kind::Abort,
    ];

    pub(crate) fn number(self) -> u16 {
        self as u16 + 1
    }

    pub(crate) fn from_number(number: u16) -> Option<Kind> {
        let index = usize::from(number).checked_sub(1)?;
        Kind::ALL.get(index).copied()
    }
}

impl<'a> Message<'a> {
    /// The kind of this message.
    pub fn kind(&self) -> Kind {
        match self {
            Message::Hello(_) => Kind::Hello,
            Message::Offer(_) => Kind::Offer,
            Message::Accept => Kind::Accept,
            Message::Refuse(_) => Kind::Refuse,
            Message::Layout(_) => Kind::Layout,
            Message::Pages { .. } => Kind::Pages,
            Message::RoundEnd(_) => Kind::RoundEnd,
            Message::RoundAck(_) => Kind::RoundAck,
            Message::Freezing => Kind::Freezing,
            Message::Section { .. } => Kind::Section,
            Message::ResidualEnd(_) => Kind::ResidualEnd,
            Message::Prepared => Kind::Prepared,
            Message::Committed(_) => Kind::Committed,
            Message::Abort(_) => Kind::Abort,
        }
    }

    /// An abort for `reason`.
    pub fn abort(reason: impl Into<String>) -> Message<'static> {
        Message::Abort(Reason { reason: reason.into() })
    }

    pub(crate) fn encode_payload(&self, out: &mut Vec<u8>) {
        match self {
            Message::Hello(hello) => pack(hello, out),
            Message::Offer(offer) => pack(offer, out),
            Message::Refuse(reason) | Message::Abort(reason) => pack(reason, out),
            Message::RoundEnd(round) | Message::RoundAck(round) => pack(round, out),
            Message::ResidualEnd(end) => pack(end, out),
            Message::Committed(committed) => pack(committed, out),
            Message::Accept | Message::Freezing | Message::Prepared => {}
            Message::Layout(data) => out.extend_from_slice(data),
            Message::Pages { process, address, data } => {
                out.extend_from_slice(&process.to_be_bytes());
                out.extend_from_slice(&address.to_be_bytes());
                out.extend_from_slice(data);
            }
            Message::Section { kind, data } => {
                out.extend_from_slice(&kind.number().to_be_bytes());
                out.extend_from_slice(data);
            }
        }
    }

    pub(crate) fn decode(kind: Kind, payload: &'a [u8]) -> Result<Message<'a>, DecodeError> {
        Ok(match kind {
            Kind::Hello => Message::Hello(unpack(kind, payload)?),
            Kind::Offer => Message::Offer(unpack(kind, payload)?),
            Kind::Accept => empty(kind, payload, Message::Accept)?,
            Kind::Refuse => Message::Refuse(unpack(kind, payload)?),
            Kind::Layout => Message::Layout(payload),
            Kind::Pages => {
                let (place, data) = payload.split_first_chunk::<PAGES_PREFIX>().ok_or(DecodeError::Length(kind))?;
                let [p0, p1, p2, p3, address @ ..] = *place;
                Message::Pages {
                    process: u32::from_be_bytes([p0, p1, p2, p3]),
                    address: u64::from_be_bytes(address),
                    data,
                }
            }
            Kind::RoundEnd => Message::RoundEnd(unpack(kind, payload)?),
            Kind::RoundAck => Message::RoundAck(unpack(kind, payload)?),
            Kind::Freezing => empty(kind, payload, Message::Freezing)?,
            Kind::Section => {
                let (number, data) = payload.split_first_chunk::<2>().ok_or(DecodeError::Length(kind))?;
                let number = u16::from_be_bytes(*number);
                let kind = SectionKind::ALL.into_iter().find(|kind| kind.number() == number);
                Message::Section { kind: kind.ok_or(DecodeError::Section(number))?, data }
            }
            Kind::ResidualEnd => Message::ResidualEnd(unpack(kind, payload)?),
            Kind::Prepared => empty(kind, payload, Message::Prepared)?,
            Kind::Committed => Message::Committed(unpack(kind, payload)?),
            Kind::Abort => Message::Abort(unpack(kind, payload)?),
        })
    }
}

fn pack<T: Serialize>(value: &T, out: &mut Vec<u8>) {
    rmp_serde::encode::write_named(out, value).expect("plain data into memory always encodes");
}

fn unpack<T: DeserializeOwned>(kind: Kind, payload: &[u8]) -> Result<T, DecodeError> {
    rmp_serde::from_slice(payload).map_err(|source| DecodeError::Payload { kind, source })
}

fn empty<'a>(kind: Kind, payload: &[u8], message: Message<'a>) -> Result<Message<'a>, DecodeError> {
    if payload.is_empty() { Ok(message) } else { Err(DecodeError::Length(kind)) }
}
