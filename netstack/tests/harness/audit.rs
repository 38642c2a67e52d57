//! What must hold of every segment that a TCP sends, judged by somebody who sees both ends of the wire.
//!
//! Positions are counted from the initial sequence number: the SYN is 0, the first byte of data 1.

use std::collections::HashMap;

use super::{ACK, FIN, RST, SYN, Side};

/// A TCP segment as it lies in a packet.
pub struct View<'a> {
    pub ports: (u16, u16),
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    pub options: &'a [u8],
    pub payload: &'a [u8],
}

impl<'a> View<'a> {
    /// `None` for packets of other protocols.
    pub fn new(packet: &'a [u8]) -> Option<View<'a>> {
        let (header, protocol) = match packet[0] >> 4 {
            4 => (usize::from(packet[0] & 15) * 4, packet[9]),
            _ => (40, packet[6]),
        };
        if protocol != 6 {
            return None;
        }
        let tcp = &packet[header..];
        let word = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let len = usize::from(tcp[12] >> 4) * 4;
        Some(View {
            ports: (u16::from_be_bytes([tcp[0], tcp[1]]), u16::from_be_bytes([tcp[2], tcp[3]])),
            seq: word(4),
            ack: word(8),
            flags: tcp[13],
            window: u16::from_be_bytes([tcp[14], tcp[15]]),
            options: &tcp[20..len],
            payload: &tcp[len..],
        })
    }

    fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// The body of an option.
    pub fn option(&self, kind: u8) -> Option<&'a [u8]> {
        let mut rest = self.options;
        while let [first, tail @ ..] = rest {
            match first {
                0 => return None,
                1 => rest = tail,
                _ => {
                    let len = usize::from(*tail.first()?);
                    if *first == kind {
                        return rest.get(2..len);
                    }
                    rest = rest.get(len..)?;
                }
            }
        }
        None
    }
}

/// Disjoint sorted ranges.
#[derive(Clone, Debug, Default)]
struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    fn add(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let first = self.0.partition_point(|range| range.1 < start);
        let last = first + self.0[first..].partition_point(|range| range.0 <= end);
        let mut union = (start, end);
        for range in &self.0[first..last] {
            union = (union.0.min(range.0), union.1.max(range.1));
        }
        self.0.splice(first..last, [union]);
    }

    fn contains(&self, start: u64, end: u64) -> bool {
        self.0.iter().any(|range| range.0 <= start && end <= range.1)
    }

    /// End of the run that starts at 0.
    fn prefix(&self) -> u64 {
        self.0.first().filter(|range| range.0 == 0).map_or(0, |range| range.1)
    }
}

/// One end of a connection.
#[derive(Clone, Debug, Default)]
struct End {
    iss: Option<u32>,
    /// End of what it has ever sent.
    sent: u64,
    fin_at: Option<u64>,
    scale: Option<u8>,
    mss: Option<usize>,
    timestamps: bool,
    /// What has reached it of the other's sequence space.
    arrived: Ranges,
    arrived_fin: bool,
    /// Right edge it has promised, and the highest acknowledgment it sent.
    promised: u64,
    acked: u64,
    /// Right edge that has reached it: what it may send up to.
    allowed: u64,
    timestamp: Option<u32>,
    /// The other's timestamps that have reached it.
    seen_timestamp: Option<u32>,
    reset: bool,
}

impl End {
    /// A number of this end's, as a position.
    fn position(&self, wire: u32) -> Option<u64> {
        let distance = wire.wrapping_sub(self.iss?);
        // No simulated stream is so long that it wraps; just below the ISS lie keepalive probes of an idle connection.
        Some(u64::from(distance))
    }
}

/// One connection.
struct Flow {
    ends: [End; 2],
    /// What each end's program sends.
    streams: [Vec<u8>; 2],
}

/// Sees every packet leave and arrive.
#[derive(Default)]
pub struct Audit {
    flows: HashMap<(u16, u16), Flow>,
    pub segments: u64,
}

/// Broken rules, in words.
pub type Verdict = Result<(), String>;

macro_rules! rule {
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            return Err(format!($($what)+));
        }
    };
}

impl Audit {
    /// A connection that A opens: its ports, and what A and B will send.
    pub fn expect(&mut self, port_a: u16, port_b: u16, streams: [Vec<u8>; 2]) {
        self.flows.insert((port_a, port_b), Flow { ends: [End::default(), End::default()], streams });
    }

    /// How far a stream was sent by `side`, its FIN included.
    pub fn sent(&self, ports: (u16, u16), side: Side) -> u64 {
        self.flows.get(&ports).map_or(0, |flow| flow.ends[side as usize].sent)
    }

    /// A packet leaves `from`. `mtu` is what its host may send at most on its link.
    pub fn leaves(&mut self, from: Side, packet: &[u8], gso: Option<u16>, mtu: usize) -> Verdict {
        let Some(view) = View::new(packet) else {
            return Ok(());
        };
        self.segments += 1;
        let key = if from == Side::A { view.ports } else { (view.ports.1, view.ports.0) };
        let Some(flow) = self.flows.get_mut(&key) else {
            return Ok(());
        };
        let [a, b] = &mut flow.ends;
        let (own, other, stream) = if from == Side::A { (a, b, &flow.streams[0]) } else { (b, a, &flow.streams[1]) };
        if view.has(RST) {
            own.reset = true;
            return Ok(());
        }
        if own.reset && from == Side::B {
            // A late copy of the peer's data brought its cookie back: another connection with the same numbers.
            self.flows.remove(&key);
            return Ok(());
        }
        check_size(own, other, packet, &view, gso, mtu)?;
        if view.has(SYN) {
            if own.iss.is_some_and(|iss| iss != view.seq) {
                // A listener whose queue is full answers with cookies, and later perhaps not: which answer the peer
                // takes can't be known here.
                rule!(from == Side::B && own.sent <= 1, "another ISS in a repeated SYN");
                self.flows.remove(&key);
                return Ok(());
            }
            own.iss = Some(view.seq);
            own.sent = own.sent.max(1);
            own.scale = view.option(3).map(|body| body[0]);
            own.mss = view.option(2).map(|body| usize::from(u16::from_be_bytes([body[0], body[1]])));
            own.timestamps = view.option(8).is_some();
        } else {
            check_data(own, &view, stream)?;
        }
        check_timestamps(own, other, &view)?;
        if view.has(ACK) && other.iss.is_some() {
            check_acknowledgment(own, other, &view)?;
        }
        Ok(())
    }

    /// A packet reaches `to`, unharmed.
    pub fn arrives(&mut self, to: Side, packet: &[u8]) {
        let Some(view) = View::new(packet) else { return };
        let key = if to == Side::B { view.ports } else { (view.ports.1, view.ports.0) };
        let Some(flow) = self.flows.get_mut(&key) else { return };
        let [a, b] = &mut flow.ends;
        let (own, sender) = if to == Side::A { (a, b) } else { (b, a) };
        let Some(start) = sender.position(view.seq) else { return };
        if view.has(RST) {
            return;
        }
        let start = if view.has(SYN) { 0 } else { start };
        let end = start + view.payload.len() as u64 + u64::from(view.has(SYN));
        own.arrived.add(start, end);
        if view.has(FIN) {
            own.arrived_fin = true;
            own.arrived.add(end, end + 1);
        }
        if let Some(body) = view.option(8) {
            let value = u32::from_be_bytes([body[0], body[1], body[2], body[3]]);
            if own.seen_timestamp.is_none_or(|seen| value.wrapping_sub(seen).cast_signed() > 0) {
                own.seen_timestamp = Some(value);
            }
        }
        if view.has(ACK)
            && let Some(ack) = own.position(view.ack)
        {
            let scale = if view.has(SYN) { 0 } else { sender.scale.filter(|_| own.scale.is_some()).unwrap_or(0) };
            own.allowed = own.allowed.max(ack + (u64::from(view.window) << scale));
        }
    }
}

/// Nothing larger than the link carries or the peer takes.
fn check_size(own: &End, other: &End, packet: &[u8], view: &View<'_>, gso: Option<u16>, mtu: usize) -> Verdict {
    let segment = gso.map_or(view.payload.len(), usize::from).min(view.payload.len());
    let wire = packet.len() - view.payload.len() + segment;
    rule!(wire <= mtu, "a packet of {wire} bytes on a link of {mtu}");
    if view.payload.is_empty() {
        return Ok(());
    }
    if let Some(mss) = other.mss {
        let most = mss - view.options.len().min(mss);
        rule!(segment <= most, "a segment of {segment} bytes for a peer that takes {most}");
    }
    rule!(own.iss.is_some(), "data before the SYN");
    Ok(())
}

/// In sequence, within the peer's window, and the right bytes however often they are sent.
fn check_data(own: &mut End, view: &View<'_>, stream: &[u8]) -> Verdict {
    let Some(start) = own.position(view.seq) else {
        return Err("a segment before the SYN".into());
    };
    // A probe of an idle connection lies one below.
    let start = if start == u64::from(u32::MAX) { 0 } else { start };
    rule!(start <= own.sent, "sequence {start}, but only {} was sent: a gap", own.sent);
    let end = start + view.payload.len() as u64;
    if !view.payload.is_empty() {
        rule!(end <= own.allowed, "data up to {end} beyond the peer's window, which ends at {}", own.allowed);
        let expected = usize::try_from(start).ok().and_then(|at| stream.get(at - 1..at - 1 + view.payload.len()));
        rule!(expected == Some(view.payload), "other bytes at {start} than the program sent");
        rule!(own.fin_at.is_none_or(|fin| end <= fin), "data after the FIN");
    }
    if view.has(FIN) {
        rule!(own.fin_at.is_none_or(|fin| fin == end), "a FIN at {end} after one at {:?}", own.fin_at);
        rule!(end >= own.sent || own.fin_at.is_some(), "a FIN at {end} before {}, what was sent", own.sent);
        own.fin_at = Some(end);
    }
    own.sent = own.sent.max(end + u64::from(view.has(FIN)));
    Ok(())
}

/// RFC 7323: once agreed, on every segment; never back; the echo is a value that arrived.
fn check_timestamps(own: &mut End, other: &End, view: &View<'_>) -> Verdict {
    let Some(body) = view.option(8) else {
        let agreed = own.timestamps && other.timestamps;
        rule!(!agreed || view.has(SYN), "a segment without the timestamps that were agreed on");
        return Ok(());
    };
    let word = |at: usize| u32::from_be_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]);
    let (value, echo) = (word(0), word(4));
    if !view.has(SYN) {
        if let Some(last) = own.timestamp {
            rule!(value.wrapping_sub(last).cast_signed() >= 0, "the timestamp goes back from {last} to {value}");
        }
        own.timestamp = Some(value);
    }
    if let Some(seen) = own.seen_timestamp {
        rule!(seen.wrapping_sub(echo).cast_signed() >= 0, "an echo {echo} of a timestamp that hasn't come ({seen})");
    }
    Ok(())
}

/// Acknowledgments of what arrived only, a right edge that never moves left, and true SACK blocks.
fn check_acknowledgment(own: &mut End, other: &End, view: &View<'_>) -> Verdict {
    let Some(ack) = other.position(view.ack) else {
        return Ok(());
    };
    rule!(ack <= other.sent, "an ACK of {ack}, but only {} was sent", other.sent);
    rule!(ack <= own.arrived.prefix(), "an ACK of {ack}, but only {} arrived", own.arrived.prefix());
    rule!(ack >= own.acked, "an ACK of {ack} after one of {}", own.acked);
    own.acked = ack;
    let scale = if view.has(SYN) { 0 } else { own.scale.filter(|_| other.scale.is_some()).unwrap_or(0) };
    let edge = ack + (u64::from(view.window) << scale);
    // What is told in a SYN-ACK can't be scaled, so a rounding follows it.
    rule!(edge >= own.promised, "the right edge moves left from {} to {edge}", own.promised);
    own.promised = edge;
    let Some(blocks) = view.option(5) else {
        return Ok(());
    };
    for (index, block) in blocks.chunks_exact(8).enumerate() {
        let word = |at: usize| u32::from_be_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        let (Some(left), Some(right)) = (other.position(word(0)), other.position(word(4))) else {
            return Err("a SACK block before the SYN".into());
        };
        rule!(left < right && right <= other.sent, "a SACK block {left}..{right} of {} sent", other.sent);
        rule!(own.arrived.contains(left, right), "a SACK block {left}..{right} of what never arrived");
        rule!(index == 0 || left > ack, "a SACK block {left}..{right} below the ACK of {ack} that is no D-SACK");
    }
    Ok(())
}
