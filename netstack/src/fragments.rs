//! Fragments: collected until their datagram is whole, and made of packets too long for the link.
//!
//! RFC 791 and RFC 8200 (4.5) with what experience has added: fragments that overlap take their datagram with them
//! (RFC 5722; an exact repetition is no overlap), what is incomplete ends after a while, and memory is bounded, altogether and for
//! each source, so that a flood of fragments leaves room for those of others. As Linux does, a fragment that finds no room
//! is dropped rather than an older one thrown out, and the marks of congestion of all fragments are joined (RFC 3168, 5.3).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Instant;
use crate::ip::{self, Datagram, Fragment};
use crate::stack::slab::Slab;
use crate::stack::timer_queue::TimerQueue;

/// How long a datagram may stay incomplete: Linux's `IP_FRAG_TIME` and `IPV6_FRAG_TIMEOUT` (RFC 8200 says 60 s).
const LIFETIME_V4: Duration = Duration::from_secs(30);
const LIFETIME_V6: Duration = Duration::from_secs(60);
/// Most bytes of incomplete datagrams (`net.ipv4.ipfrag_high_thresh`).
const MEMORY_MAX: usize = 4 << 20;
/// Most bytes of incomplete datagrams of one source.
const MEMORY_OF_SOURCE_MAX: usize = 1 << 20;
/// What a piece and what an incomplete datagram cost beside their bytes.
const OVERHEAD_OF_PIECE: usize = 64;
const OVERHEAD_OF_DATAGRAM: usize = 256;
/// Longest header that each fragment may repeat.
const HEADER_MAX: usize = 256;
/// Bytes of the first fragment, beyond its headers, kept for an ICMP error to quote.
const QUOTED: usize = 64;
/// Longest payload of an IP packet.
const PAYLOAD_MAX: usize = 65_535;

/// What tells datagrams apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Name {
    source: IpAddr,
    destination: IpAddr,
    /// IPv6 doesn't look at it (RFC 8200, 4.5).
    protocol: Option<u8>,
    identification: u32,
}

/// A datagram of which not everything has come.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Partial {
    name: Name,
    expires_at: Instant,
    /// The start of the fragment with offset 0, once it has come: the headers that the datagram begins with and a little more.
    #[serde(with = "serde_bytes")]
    head: Vec<u8>,
    header_len: usize,
    next_at: usize,
    next: u8,
    /// Length of the datagram's payload, once its last fragment has come.
    total: Option<usize>,
    /// In order, without overlap.
    pieces: Vec<Piece>,
    /// A bit for each value of the ECN field that a fragment had.
    marks: u8,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Piece {
    offset: usize,
    #[serde(with = "serde_bytes")]
    data: Vec<u8>,
}

impl Piece {
    fn end(&self) -> usize {
        self.offset + self.data.len()
    }
}

/// What a fragment led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Added {
    /// It was kept, or dropped.
    Pending,
    /// It was the last: the whole packet.
    Whole(Vec<u8>),
    /// It can't be right (IPv6 only): where in it the mistake is, for an ICMPv6 parameter problem.
    Malformed { pointer: u32 },
}

/// All incomplete datagrams.
#[derive(Debug, Default)]
pub(crate) struct Fragments {
    partial: Slab<Partial>,
    by_name: BTreeMap<Name, u32>,
    timers: TimerQueue,
    memory: usize,
    memory_of: HashMap<IpAddr, usize>,
}

impl Fragments {
    /// Takes over what an image holds.
    pub(crate) fn thaw(partial: Slab<Partial>) -> Fragments {
        let mut fragments = Fragments::default();
        for (index, datagram) in partial.iter() {
            fragments.by_name.insert(datagram.name, index);
            fragments.timers.at_latest(index, datagram.expires_at);
            fragments.memory += datagram.memory();
            *fragments.memory_of.entry(datagram.name.source).or_default() += datagram.memory();
        }
        fragments.partial = partial;
        fragments
    }

    /// What an image has to hold.
    pub(crate) fn freeze(&self) -> Slab<Partial> {
        self.partial.clone()
    }

    /// When the next incomplete datagram ends.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Ends a datagram whose time is over. Returns the start of its first fragment, empty if that never came, for the ICMP
    /// error that is due then (RFC 792, RFC 8200 4.5).
    pub(crate) fn expire(&mut self, now: Instant) -> Option<(IpAddr, IpAddr, Vec<u8>)> {
        let index = self.timers.take_due(now, |index| self.partial.get(index).map(|partial| partial.expires_at))?;
        let partial = self.remove(index)?;
        Some((partial.name.source, partial.name.destination, partial.head))
    }

    fn remove(&mut self, index: u32) -> Option<Partial> {
        self.timers.remove(index);
        let partial = self.partial.remove(index)?;
        self.by_name.remove(&partial.name);
        self.release(partial.name.source, partial.memory());
        if self.by_name.is_empty() {
            // What a flood took is given back.
            *self = Fragments::default();
        }
        Some(partial)
    }

    fn release(&mut self, source: IpAddr, bytes: usize) {
        self.memory = self.memory.saturating_sub(bytes);
        if let Some(memory) = self.memory_of.get_mut(&source) {
            *memory = memory.saturating_sub(bytes);
            if *memory == 0 {
                self.memory_of.remove(&source);
            }
        }
    }

    /// Counts memory in; false if there is no room for it.
    fn reserve(&mut self, source: IpAddr, bytes: usize) -> bool {
        let of_source = self.memory_of.get(&source).copied().unwrap_or(0);
        if self.memory + bytes > MEMORY_MAX || of_source + bytes > MEMORY_OF_SOURCE_MAX {
            return false;
        }
        self.memory += bytes;
        self.memory_of.insert(source, of_source + bytes);
        true
    }

    /// Takes in a fragment. `packet` is all of it, `datagram` what was read from it.
    pub(crate) fn add(&mut self, now: Instant, datagram: &Datagram<'_>, fragment: &Fragment, packet: &[u8]) -> Added {
        let v6 = datagram.source.is_ipv6();
        let mut data = datagram.payload;
        if fragment.more && !data.len().is_multiple_of(8) {
            if v6 {
                // RFC 8200 (4.5): the Payload Length field is to blame.
                return Added::Malformed { pointer: 4 };
            }
            data = &data[..data.len() & !7];
        }
        let end = fragment.offset + data.len();
        if v6 && end > PAYLOAD_MAX {
            return Added::Malformed { pointer: u32::try_from(fragment.header_len + 2).unwrap_or(0) };
        }
        let counted = if v6 { end } else { fragment.header_len + end };
        if data.is_empty() || counted > PAYLOAD_MAX || fragment.header_len > HEADER_MAX {
            return Added::Pending;
        }
        let name = Name {
            source: datagram.source,
            destination: datagram.destination,
            protocol: (!v6).then_some(datagram.protocol),
            identification: fragment.identification,
        };
        let known = self.by_name.get(&name).copied();
        let placed = known.and_then(|index| self.partial.get(index)).map(|partial| partial.place(fragment, end));
        let at = match placed {
            None => 0,
            Some(Place::At(at)) => at,
            Some(Place::Repeated) => return Added::Pending,
            Some(Place::Conflict) => {
                known.and_then(|index| self.remove(index));
                return Added::Pending;
            }
        };
        let new = if known.is_none() { OVERHEAD_OF_DATAGRAM } else { 0 };
        if !self.reserve(name.source, data.len() + OVERHEAD_OF_PIECE + new) {
            return Added::Pending;
        }
        let index = known.unwrap_or_else(|| self.begin(now, name));
        let Some(partial) = self.partial.get_mut(index) else {
            return Added::Pending;
        };
        partial.pieces.insert(at, Piece { offset: fragment.offset, data: data.to_vec() });
        partial.marks |= 1 << (datagram.traffic_class & 3);
        if !fragment.more {
            partial.total = Some(end);
        }
        if fragment.offset == 0 {
            let quoted = fragment.header_len + if v6 { ip::FRAGMENT_HEADER_LEN } else { 0 } + QUOTED;
            partial.head = packet[..quoted.min(packet.len())].to_vec();
            partial.header_len = fragment.header_len;
            partial.next_at = fragment.next_at;
            partial.next = datagram.protocol;
        }
        if !partial.is_whole() {
            return Added::Pending;
        }
        match self.remove(index).and_then(|partial| partial.join()) {
            Some(packet) => Added::Whole(packet),
            None => Added::Pending,
        }
    }

    fn begin(&mut self, now: Instant, name: Name) -> u32 {
        let expires_at = now + if name.source.is_ipv6() { LIFETIME_V6 } else { LIFETIME_V4 };
        let index = self.partial.insert(|_, _| Partial {
            name,
            expires_at,
            head: Vec::new(),
            header_len: 0,
            next_at: 0,
            next: 0,
            total: None,
            pieces: Vec::new(),
            marks: 0,
        });
        self.by_name.insert(name, index);
        self.timers.at_latest(index, expires_at);
        index
    }
}

/// Where a new fragment belongs.
enum Place {
    At(usize),
    /// It is there already.
    Repeated,
    /// It contradicts what is there.
    Conflict,
}

impl Partial {
    fn memory(&self) -> usize {
        let pieces: usize = self.pieces.iter().map(|piece| piece.data.len() + OVERHEAD_OF_PIECE).sum();
        pieces + OVERHEAD_OF_DATAGRAM
    }

    fn place(&self, fragment: &Fragment, end: usize) -> Place {
        let start = fragment.offset;
        let at = self.pieces.partition_point(|piece| piece.offset <= start);
        let before = at.checked_sub(1).map(|before| &self.pieces[before]);
        if before.is_some_and(|piece| end <= piece.end()) {
            return Place::Repeated;
        }
        let beyond = match (self.total, fragment.more) {
            (Some(total), true) => end > total,
            (Some(total), false) => end != total,
            (None, false) => self.pieces.last().is_some_and(|last| last.end() > end),
            (None, true) => false,
        };
        let overlaps = before.is_some_and(|piece| piece.end() > start)
            || self.pieces.get(at).is_some_and(|piece| piece.offset < end);
        if beyond || overlaps { Place::Conflict } else { Place::At(at) }
    }

    fn is_whole(&self) -> bool {
        // They don't overlap, so as many bytes as there should be are the right ones.
        let have: usize = self.pieces.iter().map(|piece| piece.data.len()).sum();
        self.total == Some(have) && !self.head.is_empty()
    }

    /// The packet; `None` if it would be longer than a packet can be, or if its marks contradict each other.
    fn join(self) -> Option<Vec<u8>> {
        const NOT_ECT: u8 = 1;
        const CE: u8 = 1 << ip::ECN_CE;
        if self.marks & NOT_ECT != 0 && self.marks != NOT_ECT {
            return None;
        }
        let mut packet = self.head.get(..self.header_len)?.to_vec();
        packet.reserve(self.total.unwrap_or(0));
        for piece in &self.pieces {
            packet.extend_from_slice(&piece.data);
        }
        let mark = (self.marks & CE != 0).then_some(ip::ECN_CE);
        ip::make_whole(&mut packet, self.header_len, self.next_at, self.next, mark).then_some(packet)
    }

    /// Whether it is what [`Fragments`] could have made; for images.
    pub(crate) fn is_consistent(&self) -> bool {
        let ordered = self.pieces.windows(2).all(|pair| pair[0].end() <= pair[1].offset);
        let end = self.pieces.last().map_or(0, Piece::end);
        let fits = self.total.map_or(end <= PAYLOAD_MAX, |total| end <= total && total <= PAYLOAD_MAX);
        let header = self.head.is_empty() || (self.header_len <= self.head.len() && self.next_at < self.header_len);
        let has_start = self.head.is_empty() || self.pieces.first().is_some_and(|piece| piece.offset == 0);
        !self.pieces.is_empty() && ordered && fits && header && has_start && !self.is_whole()
    }

    /// Whose it is.
    pub(crate) fn destination(&self) -> IpAddr {
        self.name.destination
    }
}

/// Cuts a packet with a plain header (no options, no extensions) into fragments of at most `mtu` bytes.
pub(crate) fn split(packet: &[u8], mtu: usize, identification: u32) -> Vec<Vec<u8>> {
    let v6 = packet.first().is_some_and(|first| first >> 4 == 6);
    let header_len = if v6 { 40 } else { 20 };
    let room = mtu.saturating_sub(header_len + if v6 { ip::FRAGMENT_HEADER_LEN } else { 0 }) & !7;
    let Some((header, payload)) = packet.split_at_checked(header_len).filter(|_| room > 0) else {
        return Vec::new();
    };
    let mut fragments = Vec::with_capacity(payload.len().div_ceil(room));
    let mut offset = 0;
    for piece in payload.chunks(room) {
        let more = offset + piece.len() < payload.len();
        fragments.push(ip::write_fragment(header, piece, identification, offset, more));
        offset += piece.len();
    }
    fragments
}

#[cfg(test)]
mod tests;
