//! The receiving half of a connection: reassembly, SACK blocks, the window and its growth.
//!
//! Invariants: bytes `nxt - ring.len() (- 1 after the FIN) .. nxt` are the ring's content; `ranges` are disjoint, not
//! adjacent, sorted, all beyond `nxt`, and their bytes lie in the ring ahead of its content; `edge` never moves left.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ring::Ring;
use super::segment::SackBlocks;
use super::seq::Seq;
use super::urgent::{NoUrgent, Urgent, UrgentByte};
use crate::Instant;
use crate::time::is_measurable;

/// Ranges kept out of order; a peer that makes more has its data dropped and must send it again.
const RANGES_MAX: usize = 2048;
/// What a connection may hold unread before it has shown that it needs more. Several super-packets fit.
pub(crate) const INITIAL_LIMIT: usize = 256 << 10;
/// Longest shift RFC 7323 allows.
pub(crate) const SCALE_MAX: u8 = 14;

/// A run of bytes that arrived out of order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Range {
    start: Seq,
    end: Seq,
    /// When it last grew, as a counter: RFC 2018 wants the freshest first.
    stamp: u64,
}

/// Takes bytes that are next in the stream, in three parts, and returns how many of them: what it leaves is kept to be read.
pub(crate) type Deliver<'a> = dyn FnMut([&[u8]; 3]) -> usize + 'a;

/// What taking in a segment's payload did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inserted {
    /// Bytes that became readable, those delivered at once included.
    pub(crate) readable: usize,
    /// Bytes that were delivered at once; some may have been readable before.
    pub(crate) delivered: usize,
    /// The segment left or met a gap, or was a duplicate: acknowledge at once (RFC 5681, 4.2).
    pub(crate) out_of_order: bool,
    /// The peer's FIN was reached.
    pub(crate) finished: bool,
}

/// The receiving half.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Receiver {
    irs: Seq,
    nxt: Seq,
    ring: Ring,
    ranges: Vec<Range>,
    stamp: u64,
    fin: Option<Seq>,
    finished: bool,
    edge: Seq,
    scale: u8,
    limit: usize,
    limit_max: usize,
    dsack: Option<(Seq, Seq)>,
    autotune: Autotune,
    #[serde(default)]
    urgent: Option<Urgent>,
    /// `SO_OOBINLINE`
    #[serde(default)]
    urgent_inline: bool,
}

/// Dynamic right-sizing: the limit follows twice what the program reads in a round trip.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Autotune {
    enabled: bool,
    rtt: Option<Duration>,
    rtt_from: Instant,
    rtt_target: Seq,
    copied: usize,
    copied_from: Instant,
    space: usize,
}

impl Receiver {
    /// A receiver before the peer's SYN; `scale` is what will be offered.
    pub(crate) fn new(limit: Option<usize>, limit_max: usize) -> Self {
        let limit_max = limit_max.max(4096);
        Receiver {
            irs: Seq::initial(0),
            nxt: Seq::initial(0),
            ring: Ring::default(),
            ranges: Vec::new(),
            stamp: 0,
            fin: None,
            finished: false,
            edge: Seq::initial(0),
            scale: 0,
            limit: limit.unwrap_or(INITIAL_LIMIT.min(limit_max)),
            limit_max,
            dsack: None,
            autotune: Autotune { enabled: limit.is_none(), ..Autotune::default() },
            urgent: None,
            urgent_inline: false,
        }
    }

    /// The shift to offer so that the largest window can be told.
    pub(crate) fn scale_to_offer(limit_max: usize) -> u8 {
        (0..SCALE_MAX).find(|&scale| limit_max >> scale <= usize::from(u16::MAX)).unwrap_or(SCALE_MAX)
    }

    /// The peer's SYN arrived. `offered` is the window that was or will be told in this side's SYN.
    pub(crate) fn synchronize(&mut self, irs: Seq, scale: u8, offered: usize) {
        self.irs = irs;
        self.nxt = irs + 1;
        self.edge = self.nxt + offered;
        self.scale = scale;
    }

    pub(crate) const fn irs(&self) -> Seq {
        self.irs
    }

    pub(crate) const fn nxt(&self) -> Seq {
        self.nxt
    }

    pub(crate) const fn finished(&self) -> bool {
        self.finished
    }

    pub(crate) const fn scale(&self) -> u8 {
        self.scale
    }

    /// Most that may be held unread.
    pub(crate) const fn limit(&self) -> usize {
        self.limit
    }

    /// Right end of what the peer may send.
    pub(crate) const fn edge(&self) -> Seq {
        self.edge
    }

    /// The window the peer knows of.
    pub(crate) fn window(&self) -> usize {
        self.edge.since(self.nxt)
    }

    /// Bytes that can be read at once: a read ends at the urgent mark, and the byte before it isn't in the stream.
    pub(crate) fn readable(&self) -> usize {
        match self.urgent {
            None => self.ring.len(),
            Some(urgent) => match urgent.at.since(self.base()) {
                0 if self.urgent_inline => self.ring.len(),
                0 => self.ring.len().saturating_sub(1),
                ahead => self.ring.len().min(ahead),
            },
        }
    }

    pub(crate) const fn has_gaps(&self) -> bool {
        !self.ranges.is_empty()
    }

    /// Blocks there would be to report, had an option room for all.
    pub(crate) fn blocks_len(&self) -> usize {
        self.ranges.len() + usize::from(self.dsack.is_some()) + usize::from(self.lone_fin().is_some())
    }

    pub(crate) const fn receive_rtt(&self) -> Option<Duration> {
        self.autotune.rtt
    }

    /// End of the out-of-order data furthest right.
    pub(crate) fn rightmost(&self) -> Option<Seq> {
        self.ranges.last().map(|range| range.end)
    }

    /// The first byte the program has not read.
    fn base(&self) -> Seq {
        self.nxt.back(self.ring.len() + usize::from(self.finished))
    }

    /// Bytes that can be read. Steps over an urgent byte that isn't part of the stream.
    pub(crate) fn readable_parts(&mut self) -> [&[u8]; 2] {
        if let Some(urgent) = self.urgent
            && urgent.at == self.base()
            && !self.urgent_inline
            && !self.ring.is_empty()
        {
            self.ring.consume(1);
            self.urgent = None;
        }
        self.ring.parts(0, self.readable())
    }

    /// Drops what the program has read.
    pub(crate) fn consume(&mut self, now: Instant, bytes: usize, rtt: Option<Duration>) {
        self.ring.consume(bytes);
        if self.urgent.is_some_and(|urgent| urgent.at < self.base()) {
            self.urgent = None;
        }
        self.note_read(now, bytes, rtt);
    }

    /// The program has been given bytes: grows the limit if it keeps up.
    pub(crate) fn note_read(&mut self, now: Instant, bytes: usize, rtt: Option<Duration>) {
        if self.autotune.enabled {
            self.adjust_limit(now, bytes, rtt);
        }
    }

    /// Linux's `tcp_rcv_space_adjust`: what was read within a round trip says what the next one can bring.
    fn adjust_limit(&mut self, now: Instant, bytes: usize, rtt: Option<Duration>) {
        let tune = &mut self.autotune;
        tune.copied += bytes;
        let round = match (tune.rtt, rtt) {
            (Some(own), Some(measured)) => own.min(measured),
            (own, measured) => own.or(measured).unwrap_or(Duration::from_millis(100)),
        };
        if now.since(tune.copied_from) < round {
            return;
        }
        if tune.copied > tune.space {
            tune.space = tune.copied;
            // Twice, since in slow start the peer sends twice as much the next round; and half again, since what is
            // being read is in flight a second time when window updates are late.
            let wanted = tune.copied.saturating_mul(3) + (16 << 10);
            self.limit = self.limit.max(wanted.min(self.limit_max));
        }
        tune.copied = 0;
        tune.copied_from = now;
    }

    /// Without timestamps of its own to go by, a receiver measures how long a window takes to arrive.
    fn measure_round_trip(&mut self, now: Instant) {
        let window = self.window();
        let tune = &mut self.autotune;
        if !tune.enabled || self.nxt < tune.rtt_target {
            return;
        }
        if tune.rtt_target != Seq::default() {
            let sample = now.since(tune.rtt_from).max(Duration::from_micros(1));
            tune.rtt = Some(tune.rtt.map_or(sample, |rtt| if sample < rtt { sample } else { (rtt * 7 + sample) / 8 }));
        }
        tune.rtt_from = now;
        tune.rtt_target = self.nxt + window;
    }

    /// Fixes the limit (`SO_RCVBUF`). What was promised stays promised.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit.max(2048);
        self.limit_max = self.limit_max.max(self.limit);
        self.autotune.enabled = false;
    }

    /// An urgent pointer came with a segment at `seq` (Linux: `tcp_check_urg`). Comes before the segment's payload is taken in.
    pub(crate) fn note_urgent(&mut self, seq: Seq, pointer: u16) {
        // The pointer says what follows the urgent data; a pointer of zero is no one's, and is read as Linux reads it.
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
        //# However, TCP implementations MUST still include support for the urgent mechanism (MUST-30).
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
        //# The urgent pointer MUST point to the sequence number of the octet following the urgent data (MUST-62).
        let at = seq + usize::from(pointer).saturating_sub(1);
        if at < self.nxt || at < self.base() {
            return;
        }
        if let Some(known) = self.urgent {
            if at <= known.at {
                return;
            }
            // The last urgent byte was never stepped over: it mustn't come up as data behind the mark that moves on.
            if known.at == self.base() && !self.urgent_inline && !self.ring.is_empty() {
                self.ring.consume(1);
            }
        }
        self.urgent = Some(Urgent { at, byte: UrgentByte::Awaited });
    }

    /// Looks for the urgent byte in a segment's payload.
    pub(crate) fn look_for_urgent(&mut self, seq: Seq, payload: &[u8]) {
        if let Some(urgent) = &mut self.urgent {
            urgent.look_into(seq, payload);
        }
    }

    /// What is known of urgent data: how much can be read before the mark, and whether the byte is there to be taken.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
    //# The TCP implementation MUST (MUST-33) provide a way for the application to learn how much urgent data remains to
    //# be read from the connection, or at least to determine whether more urgent data remains to be read [19].
    pub(crate) fn urgent(&self) -> Option<(usize, bool)> {
        let held = |urgent: &Urgent| matches!(urgent.byte, UrgentByte::Held(_)) && !self.urgent_inline;
        self.urgent.map(|urgent| (urgent.at.since(self.base()), held(&urgent)))
    }

    /// `recv(MSG_OOB)`, with `MSG_PEEK` if `peek`.
    pub(crate) fn take_urgent(&mut self, peek: bool) -> Result<u8, NoUrgent> {
        let urgent = self.urgent.as_mut().filter(|_| !self.urgent_inline).ok_or(NoUrgent::Never)?;
        match urgent.byte {
            UrgentByte::Awaited => Err(NoUrgent::NotYet),
            UrgentByte::Taken => Err(NoUrgent::Never),
            UrgentByte::Held(byte) => {
                if !peek {
                    urgent.byte = UrgentByte::Taken;
                }
                Ok(byte)
            }
        }
    }

    /// `SO_OOBINLINE`
    pub(crate) fn set_urgent_inline(&mut self, inline: bool) {
        self.urgent_inline = inline;
    }

    /// A segment lies wholly before what is expected: the peer sent it twice (RFC 2883).
    pub(crate) fn note_duplicate(&mut self, start: Seq, end: Seq) {
        if start < end && end <= self.nxt {
            self.dsack = Some((start, end));
        }
    }

    /// Takes in a segment's payload and FIN. What lies outside the window is cut off. What is next in the stream is
    /// offered to `deliver` together with all that was readable before, and copied into the buffer only if not taken.
    pub(crate) fn insert(
        &mut self,
        now: Instant,
        seq: Seq,
        payload: &[u8],
        fin: bool,
        deliver: &mut Deliver<'_>,
    ) -> Inserted {
        let mut inserted = Inserted::default();
        let mut start = seq;
        let mut payload = payload;
        let mut fin = fin;
        if start < self.nxt {
            // RFC 2883: tell the peer what it sent twice.
            let duplicate_end = (start + payload.len() + usize::from(fin)).min(self.nxt);
            if duplicate_end > start {
                self.dsack = Some((start, duplicate_end));
                inserted.out_of_order = true;
            }
            let skip = self.nxt.since(start);
            if skip > payload.len() {
                // Even the FIN is old.
                return inserted;
            }
            payload = &payload[skip..];
            start = self.nxt;
        }
        let room = self.edge.since(start);
        if payload.len() > room {
            payload = &payload[..room];
            fin = false;
            inserted.out_of_order = true;
        }
        let end = start + payload.len();
        if self.fin.is_some_and(|at| end > at) || self.finished {
            // Data beyond a FIN: the peer is confused; RFC 9293 has it ignored.
            return inserted;
        }
        if fin {
            self.fin = Some(end);
        }
        if start == self.nxt {
            self.insert_in_order(now, payload, &mut inserted, deliver);
        } else {
            inserted.out_of_order = true;
            self.insert_ahead(start, end, payload);
        }
        if self.fin == Some(self.nxt) && !self.finished {
            self.nxt += 1;
            self.finished = true;
            inserted.finished = true;
            self.ranges.clear();
            self.edge = self.edge.max(self.nxt);
        }
        inserted
    }

    fn insert_in_order(&mut self, now: Instant, payload: &[u8], inserted: &mut Inserted, deliver: &mut Deliver<'_>) {
        let before = self.nxt;
        if !payload.is_empty() {
            let mut rest = payload;
            // With a gap behind it the payload joins what lies beyond, and all of that is read together. An urgent byte
            // has to be taken out.
            if self.ranges.is_empty() && self.urgent.is_none() {
                let waiting = self.ring.len();
                let [first, second] = self.ring.parts(0, waiting);
                inserted.delivered = deliver([first, second, payload]).min(waiting + payload.len());
                let old = inserted.delivered.min(waiting);
                self.ring.consume(old);
                rest = &payload[inserted.delivered - old..];
            }
            self.ring.write_at(self.ring.len(), rest);
            self.ring.commit(rest.len());
            self.nxt += payload.len();
        }
        let mut merged = 0;
        while let Some(range) = self.ranges.get(merged).filter(|range| range.start <= self.nxt) {
            if range.end > self.nxt {
                self.ring.commit(range.end.since(self.nxt));
                self.nxt = range.end;
            }
            merged += 1;
        }
        if merged > 0 {
            self.ranges.drain(..merged);
            // RFC 5681 (4.2): filling a gap is acknowledged at once.
            inserted.out_of_order = true;
        }
        inserted.out_of_order |= !self.ranges.is_empty();
        inserted.readable = self.nxt.since(before);
        self.measure_round_trip(now);
    }

    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.10.7.4
    //# Segments with higher beginning sequence numbers SHOULD be held for later processing (SHLD-31).
    fn insert_ahead(&mut self, start: Seq, end: Seq, payload: &[u8]) {
        if payload.is_empty() {
            // With a FIN alone, the block that it belongs to has grown.
            if self.fin == Some(end)
                && let Some(range) = self.ranges.iter_mut().find(|range| range.end == end)
            {
                self.stamp = self.stamp.saturating_add(1);
                range.stamp = self.stamp;
            }
            return;
        }
        // First range that ends at or after the new one's start: the first it can touch.
        let first = self.ranges.partition_point(|range| range.end < start);
        let last = first + self.ranges[first..].partition_point(|range| range.start <= end);
        if first == last && self.ranges.len() >= RANGES_MAX {
            return;
        }
        // RFC 2883 (4.2.3): what of it was here already, as far as it is contiguous.
        //= https://www.rfc-editor.org/rfc/rfc2883#section-4.2.3
        //# A partial duplicate is reported by the part that was there already.
        let overlap = self.ranges[first..last].iter().find(|range| range.start < end && start < range.end);
        if let Some(range) = overlap {
            self.dsack = Some((start.max(range.start), end.min(range.end)));
        }
        self.ring.write_at(start.since(self.base()), payload);
        self.stamp = self.stamp.saturating_add(1);
        let mut union = Range { start, end, stamp: self.stamp };
        for range in &self.ranges[first..last] {
            union.start = union.start.min(range.start);
            union.end = union.end.max(range.end);
        }
        self.ranges.splice(first..last, [union]);
    }

    /// The blocks to report, at most `most`: a duplicate first (RFC 2883), then the freshest (RFC 2018).
    pub(crate) fn sack_blocks(&self, most: usize) -> SackBlocks {
        let mut blocks = SackBlocks::default();
        //= https://www.rfc-editor.org/rfc/rfc2883#section-4
        //# The first block reports a duplicate, below the acknowledgment or inside the block that follows.
        if let Some((start, end)) = self.dsack {
            blocks.push(start.wire(), end.wire());
        }
        let mut below = u64::MAX;
        //= https://www.rfc-editor.org/rfc/rfc2018#section-3
        //# As many blocks are sent as fit.
        while blocks.len() < most {
            //= https://www.rfc-editor.org/rfc/rfc2018#section-4
            //# The first block holds the segment that triggered the acknowledgment.
            let freshest = self.ranges.iter().filter(|range| range.stamp < below).max_by_key(|range| range.stamp);
            let Some(range) = freshest else { break };
            // A FIN that came early takes its place in the sequence space like everything else.
            let end = range.end + usize::from(self.fin == Some(range.end));
            blocks.push(range.start.wire(), end.wire());
            below = range.stamp;
        }
        if let Some(fin) = self.lone_fin().filter(|_| blocks.len() < most) {
            blocks.push(fin.wire(), (fin + 1).wire());
        }
        blocks
    }

    /// A FIN that came early, with a gap before it.
    fn lone_fin(&self) -> Option<Seq> {
        self.fin.filter(|&fin| fin > self.nxt && self.rightmost() != Some(fin))
    }

    /// Whether there is anything to report.
    pub(crate) fn has_sack(&self) -> bool {
        //= https://www.rfc-editor.org/rfc/rfc2018#section-4
        //# Every acknowledgment reports what is out of order while there is any.
        self.dsack.is_some() || !self.ranges.is_empty() || self.lone_fin().is_some()
    }

    /// A duplicate is reported once.
    //= https://www.rfc-editor.org/rfc/rfc2883#section-4
    //# A duplicate is reported once.
    pub(crate) fn sack_sent(&mut self) {
        self.dsack = None;
    }

    /// What the window could be, were it told now.
    pub(crate) fn window_to_offer(&self) -> usize {
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.1
        //# A TCP implementation MAY keep its offered receive window closed indefinitely (MAY-8).
        self.limit.saturating_sub(self.ring.len()).min(usize::from(u16::MAX) << self.scale)
    }

    /// The window to write into a segment, and the promise that goes with it.
    ///
    /// It never moves the right edge left (RFC 9293, 3.8.6), and moves it right only by a worthwhile amount (RFC 1122,
    /// 4.2.3.3).
    pub(crate) fn advertise(&mut self, segment: usize) -> u16 {
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6
        //# A TCP receiver SHOULD NOT shrink the window, i.e., move the right window edge to the left (SHLD-14).
        let current = self.window();
        let possible = self.window_to_offer();
        let unit = 1usize << self.scale;
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.2.2
        //# A TCP implementation MUST include a SWS avoidance algorithm in the receiver (MUST-39).
        let worthwhile = segment.min(self.limit / 2).max(unit);
        let window = if possible >= current + worthwhile { (possible & !(unit - 1)).max(current) } else { current };
        // What the wire can express must not be less than what was promised.
        let told = window.div_ceil(unit).min(usize::from(u16::MAX));
        self.edge = self.edge.max(self.nxt + (told << self.scale));
        u16::try_from(told).unwrap_or(u16::MAX)
    }

    /// The window the peer knows of, as a segment writes it: rounded up, since down would take back what was promised.
    pub(crate) fn window_told(&self) -> u16 {
        u16::try_from(self.window().div_ceil(1 << self.scale)).unwrap_or(u16::MAX)
    }

    /// Gives memory back if nothing is held. Returns whether none is held now.
    pub(crate) fn release(&mut self) -> bool {
        if self.ranges.is_empty() {
            self.ring.forget_ahead();
            self.ranges.shrink_to_fit();
        }
        self.ring.release()
    }

    /// Bytes of memory held.
    pub(crate) const fn memory(&self) -> usize {
        self.ring.capacity()
    }

    /// Frees small buffers at once when they are empty; big ones wait for [`Receiver::release`].
    pub(crate) fn release_small(&mut self, keep: usize) {
        if self.ring.is_empty() && self.ranges.is_empty() && self.ring.capacity() <= keep {
            self.release();
        }
    }

    /// Whether the parts agree with each other; for images.
    pub(crate) fn is_consistent(&self) -> bool {
        // What the pointer can express, and never behind what was read.
        let marked = self.urgent.is_none_or(|urgent| {
            urgent.at >= self.base() && urgent.at.since(self.edge.max(self.nxt)) <= usize::from(u16::MAX)
        });
        let sorted = self.ranges.windows(2).all(|pair| pair[0].end < pair[1].start);
        let beyond = self.ranges.iter().all(|range| self.nxt < range.start && range.start < range.end);
        let held = self.rightmost().is_none_or(|end| end.since(self.base()) <= self.ring.extent());
        sorted
            && marked
            && beyond
            && held
            && self.scale <= SCALE_MAX
            && self.irs < self.nxt.max(self.irs + 1)
            && self.window() <= usize::from(u16::MAX) << SCALE_MAX
            && self.ring.len() <= 1 << 30
            && self.receive_rtt().is_none_or(is_measurable)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn receiver(isn: u32) -> Receiver {
        let mut receiver = Receiver::new(Some(1 << 20), 1 << 20);
        receiver.synchronize(Seq::initial(isn), 7, 1 << 16);
        receiver
    }

    proptest! {
        /// Whatever the order, overlap and repetition of segments, and however much of them is taken on arrival, the
        /// stream comes out whole and once.
        #[test]
        fn reassembles(isn in any::<u32>(), mut pieces in proptest::collection::vec((0usize..5000, 1usize..700), 1..60), seed in any::<u64>()) {
            let stream: Vec<u8> = (0..6000u32).map(|i| (i.wrapping_mul(31) >> 3) as u8).collect();
            let mut receiver = receiver(isn);
            let start = receiver.nxt();
            // Everything once, so that the end is reached.
            for at in (0..6000).step_by(500) {
                pieces.push((at, 500));
            }
            let mut random = seed | 1;
            let mut covered = vec![false; 6000];
            let mut delivered = Vec::new();
            while !pieces.is_empty() {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let (at, len) = pieces.swap_remove((random % pieces.len() as u64) as usize);
                let end = (at + len).min(6000);
                receiver.insert(Instant::ZERO, start + at, &stream[at..end], end == 6000, &mut |parts| {
                    let offered = parts.concat();
                    let taken = (random >> 20) as usize % 3 * offered.len() / 2;
                    delivered.extend_from_slice(&offered[..taken]);
                    taken
                });
                covered[at..end].fill(true);
                let in_order = covered.iter().take_while(|&&seen| seen).count();
                let fin = usize::from(in_order == 6000);
                prop_assert_eq!(receiver.nxt().since(start), in_order + fin);
                prop_assert!(receiver.is_consistent());
                // The blocks are exactly the covered runs beyond what is in order.
                for (left, right) in receiver.sack_blocks(4).iter().skip(usize::from(receiver.dsack.is_some())) {
                    let left = start.expand(left).since(start);
                    // The FIN is one more.
                    let right = start.expand(right).since(start).min(6000);
                    prop_assert!(left > in_order && covered[left..right].iter().all(|&seen| seen));
                    prop_assert!(!covered[left - 1] && (right == 6000 || !covered[right]));
                }
            }
            prop_assert!(receiver.finished());
            delivered.extend(receiver.readable_parts().concat());
            prop_assert_eq!(delivered, stream);
        }

        #[test]
        fn right_edge_never_moves_left(steps in proptest::collection::vec((0usize..3000, 0usize..4000), 1..80), scale in 0u8..8) {
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6
            //= type=test
            //# A TCP receiver SHOULD NOT shrink the window, i.e., move the right window edge to the left (SHLD-14).
            let mut receiver = Receiver::new(Some(20_000), 20_000);
            receiver.synchronize(Seq::initial(7), scale, 20_000);
            let mut edge = receiver.edge();
            for (arrive, read) in steps {
                let bytes = vec![1; arrive];
                receiver.insert(Instant::ZERO, receiver.nxt(), &bytes, false, &mut |_| 0);
                let told = usize::from(receiver.advertise(1460)) << scale;
                let told_edge = receiver.nxt() + told;
                prop_assert!(told_edge >= edge, "{told_edge:?} < {edge:?}");
                edge = told_edge;
                receiver.consume(Instant::ZERO, read.min(receiver.readable()), None);
            }
        }
    }

    #[test]
    fn freshest_block_first_and_duplicates_before_it() {
        let mut receiver = receiver(1);
        let nxt = receiver.nxt();
        receiver.insert(Instant::ZERO, nxt + 1000, &[1; 100], false, &mut |_| 0);
        receiver.insert(Instant::ZERO, nxt + 3000, &[1; 100], false, &mut |_| 0);
        receiver.insert(Instant::ZERO, nxt + 1100, &[1; 100], false, &mut |_| 0);
        let blocks: Vec<_> =
            receiver.sack_blocks(3).iter().map(|(l, r)| (nxt.expand(l).since(nxt), nxt.expand(r).since(nxt))).collect();
        assert_eq!(blocks, [(1000, 1200), (3000, 3100)]);
        receiver.insert(Instant::ZERO, nxt + 3000, &[1; 50], false, &mut |_| 0);
        let first =
            receiver.sack_blocks(3).iter().next().map(|(l, r)| (nxt.expand(l).since(nxt), nxt.expand(r).since(nxt)));
        assert_eq!(first, Some((3000, 3050)));
        receiver.sack_sent();
        assert_eq!(receiver.sack_blocks(3).len(), 2);
    }

    #[test]
    fn a_fin_alone_freshens_its_block() {
        let mut receiver = receiver(1);
        let nxt = receiver.nxt();
        for (start, len, fin) in [(40, 10, false), (20, 10, false), (50, 0, true)] {
            receiver.insert(Instant::ZERO, nxt + start, &[1; 10][..len], fin, &mut |_| 0);
        }
        let blocks: Vec<_> =
            receiver.sack_blocks(3).iter().map(|(l, r)| (nxt.expand(l).since(nxt), nxt.expand(r).since(nxt))).collect();
        assert_eq!(blocks, [(40, 51), (20, 30)]);
    }

    #[test]
    fn fin_out_of_order_waits() {
        let mut receiver = receiver(1);
        let nxt = receiver.nxt();
        assert!(!receiver.insert(Instant::ZERO, nxt + 10, &[2; 10], true, &mut |_| 0).finished);
        assert!(receiver.insert(Instant::ZERO, nxt, &[1; 10], false, &mut |_| 0).finished);
        assert_eq!(receiver.nxt(), nxt + 21);
        assert_eq!(receiver.readable(), 20);
    }
}
