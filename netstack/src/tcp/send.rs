//! The sending half of a connection: what is queued, what is in flight, and what became of it.
//!
//! What is in flight is a list of chunks. A chunk is what was sent as one packet, a super-packet of up to 64 KiB as a
//! rule, and is split only where an acknowledgment or a retransmission ends inside it. So a bulk stream keeps a hundred
//! entries for 6 MiB in flight rather than four thousand.
//!
//! Invariants: chunks are adjacent and cover `una..nxt` (the SYN excepted); `sacked`, `lost` and `retransmitted` are the
//! sums of the lengths of the chunks so marked; a sacked chunk is neither lost nor retransmitted.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::ring::Ring;
use super::seq::Seq;
use crate::Instant;

/// Chunks kept; a peer whose SACKs would split into more has them ignored (CVE-2019-11478 and its like).
const CHUNKS_MAX: usize = 16_384;

/// Something sent and not yet acknowledged cumulatively.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Chunk {
    pub(crate) start: Seq,
    pub(crate) end: Seq,
    /// When it was last sent.
    pub(crate) sent_at: Instant,
    /// The peer reported to have it.
    pub(crate) sacked: bool,
    /// Taken for lost.
    pub(crate) lost: bool,
    /// Sent again since it was last taken for lost.
    pub(crate) retransmitted: bool,
    /// Ever sent again: no RTT may be taken from it (Karn).
    pub(crate) ever_retransmitted: bool,
}

impl Chunk {
    pub(crate) fn len(&self) -> usize {
        self.end.since(self.start)
    }
}

/// The sending half.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sender {
    iss: Seq,
    una: Seq,
    nxt: Seq,
    /// Sequence number of the ring's first byte.
    base: Seq,
    ring: Ring,
    /// A FIN follows the queued data.
    fin: bool,
    chunks: VecDeque<Chunk>,
    sacked: usize,
    lost: usize,
    retransmitted: usize,
    highest_sacked: Seq,
    /// Nothing before it waits to be sent again.
    lost_from: Seq,
    /// How much was queued at most since the ring was last given back: what to make room for the next time.
    peak: usize,
    /// SND.UP: the end of the urgent data, until it is acknowledged.
    #[serde(default)]
    urgent: Option<Seq>,
}

impl Sender {
    pub(crate) fn new(iss: Seq) -> Self {
        Sender {
            iss,
            una: iss,
            nxt: iss,
            base: iss + 1,
            ring: Ring::default(),
            fin: false,
            chunks: VecDeque::new(),
            sacked: 0,
            lost: 0,
            retransmitted: 0,
            highest_sacked: iss,
            lost_from: iss,
            peak: 0,
            urgent: None,
        }
    }

    pub(crate) const fn iss(&self) -> Seq {
        self.iss
    }

    pub(crate) const fn una(&self) -> Seq {
        self.una
    }

    pub(crate) const fn nxt(&self) -> Seq {
        self.nxt
    }

    pub(crate) const fn sacked(&self) -> usize {
        self.sacked
    }

    pub(crate) const fn lost(&self) -> usize {
        self.lost
    }

    pub(crate) const fn retransmitted(&self) -> usize {
        self.retransmitted
    }

    /// The SYN has left (again).
    pub(crate) fn syn_sent(&mut self) {
        self.nxt = self.nxt.max(self.iss + 1);
    }

    /// The SYN was acknowledged.
    pub(crate) fn syn_acked(&mut self) {
        self.una = self.una.max(self.iss + 1);
        self.nxt = self.nxt.max(self.una);
        self.highest_sacked = self.una;
    }

    /// Bytes queued, sent or not.
    pub(crate) const fn queued(&self) -> usize {
        self.ring.len()
    }

    /// End of everything queued, the FIN included.
    pub(crate) fn end(&self) -> Seq {
        self.base + self.ring.len() + usize::from(self.fin)
    }

    /// Sequence space queued and never sent.
    pub(crate) fn unsent(&self) -> usize {
        self.end().since(self.nxt.max(self.base))
    }

    /// Payload bytes queued and never sent.
    pub(crate) fn unsent_payload(&self) -> usize {
        (self.base + self.ring.len()).since(self.nxt.max(self.base))
    }

    /// Sequence space sent and not acknowledged.
    pub(crate) fn outstanding(&self) -> usize {
        self.nxt.since(self.una)
    }

    /// What is thought to be in the network (RFC 6675 `pipe`).
    pub(crate) fn pipe(&self) -> usize {
        (self.outstanding() + self.retransmitted).saturating_sub(self.sacked + self.lost)
    }

    pub(crate) const fn fin_queued(&self) -> bool {
        self.fin
    }

    /// The FIN has been acknowledged.
    pub(crate) fn fin_acked(&self) -> bool {
        self.fin && self.una == self.end()
    }

    /// Ends the stream after what is queued.
    pub(crate) fn queue_fin(&mut self) {
        self.fin = true;
    }

    /// Room of `bytes`, to be followed by [`Sender::commit`].
    pub(crate) fn room(&mut self, bytes: usize) -> [&mut [u8]; 2] {
        let free = self.ring.capacity() - self.ring.len();
        if free < bytes {
            // Grow by what is there: a stream that fills its room gets twice as much the next time.
            let step = bytes.min(self.ring.capacity().max(4 << 10).max(self.peak.min(64 << 10)));
            self.ring.reserve(self.ring.len() + step);
        }
        self.ring.room(bytes)
    }

    pub(crate) fn commit(&mut self, bytes: usize) {
        self.ring.commit(bytes);
        self.peak = self.peak.max(self.ring.len());
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) {
        self.ring.append(bytes);
    }

    /// Everything queued so far is urgent (`MSG_OOB`).
    pub(crate) fn mark_urgent(&mut self) {
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
        //# The urgent pointer MUST point to the sequence number of the octet following the urgent data (MUST-62).
        self.urgent = Some(self.base + self.ring.len());
    }

    /// Whether the peer is still to learn of urgent data.
    pub(crate) const fn is_urgent(&self) -> bool {
        self.urgent.is_some()
    }

    /// The urgent pointer of a segment at `seq`, if it is to carry one.
    pub(crate) fn urgent_pointer(&self, seq: Seq) -> Option<u16> {
        let ahead = self.urgent?.since(seq);
        match u16::try_from(ahead) {
            Ok(0) => None,
            Ok(ahead) => Some(ahead),
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
            //# A TCP implementation MUST support a sequence of urgent data of any length (MUST-31) [19].
            // Too far for the field. It says at least that there is urgent data, if that is beyond all that was sent.
            Err(_) => (seq + usize::from(u16::MAX) > self.nxt).then_some(u16::MAX),
        }
    }

    /// Payload of `start..end` as it lies in the ring, the FIN left out: offset and length.
    pub(crate) fn payload_span(&self, start: Seq, end: Seq) -> (usize, usize) {
        let offset = start.since(self.base);
        let len = end.since(start).min(self.ring.len().saturating_sub(offset));
        (offset, len)
    }

    pub(crate) fn payload(&self, offset: usize, len: usize) -> [&[u8]; 2] {
        self.ring.parts(offset, len)
    }

    /// Whether `end` lies behind the FIN.
    pub(crate) fn covers_fin(&self, end: Seq) -> bool {
        self.fin && end == self.end()
    }

    pub(crate) fn first_chunk(&self) -> Option<&Chunk> {
        self.chunks.front()
    }

    /// `len` new bytes of sequence space leave now.
    pub(crate) fn transmitted(&mut self, now: Instant, len: usize) {
        let chunk = Chunk {
            start: self.nxt,
            end: self.nxt + len,
            sent_at: now,
            sacked: false,
            lost: false,
            retransmitted: false,
            ever_retransmitted: false,
        };
        self.nxt = chunk.end;
        self.chunks.push_back(chunk);
    }

    /// Takes a cumulative acknowledgment; `delivered` sees each chunk (or part of one) that it covers. Returns the bytes
    /// that no SACK had reported before.
    pub(crate) fn acknowledge(&mut self, ack: Seq, mut delivered: impl FnMut(&Chunk)) -> usize {
        let mut newly = 0;
        while let Some(&front) = self.chunks.front() {
            if front.start >= ack {
                break;
            }
            let covered = Chunk { end: front.end.min(ack), ..front };
            let len = covered.len();
            if covered.sacked {
                self.sacked -= len;
            } else {
                newly += len;
                delivered(&covered);
            }
            if covered.lost {
                self.lost -= len;
            }
            if covered.retransmitted {
                self.retransmitted -= len;
            }
            if front.end <= ack {
                self.chunks.pop_front();
            } else {
                self.chunks[0].start = ack;
            }
        }
        self.una = ack;
        if self.urgent.is_some_and(|end| end <= ack) {
            self.urgent = None;
        }
        self.highest_sacked = self.highest_sacked.max(ack);
        self.lost_from = self.lost_from.max(ack);
        let consumed = ack.since(self.base).min(self.ring.len());
        self.ring.consume(consumed);
        self.base += consumed;
        if self.chunks.is_empty() && self.chunks.capacity() > 64 {
            self.chunks.shrink_to(16);
        }
        newly
    }

    fn index_of(&self, position: Seq) -> usize {
        self.chunks.partition_point(|chunk| chunk.end <= position)
    }

    /// Splits so that a chunk starts at `position`, which lies inside chunk `index`. Returns false if there are too many.
    fn split(&mut self, index: usize, position: Seq) -> bool {
        let chunk = self.chunks[index];
        if position <= chunk.start || position >= chunk.end {
            return true;
        }
        if self.chunks.len() >= CHUNKS_MAX {
            return false;
        }
        self.chunks[index].end = position;
        self.chunks.insert(index + 1, Chunk { start: position, ..chunk });
        true
    }

    /// Takes a SACK block; `delivered` sees what it newly covers. Returns the bytes newly covered.
    pub(crate) fn sack(&mut self, left: Seq, right: Seq, mut delivered: impl FnMut(&Chunk)) -> usize {
        if left >= right || left <= self.una || right > self.nxt {
            return 0;
        }
        let mut newly = 0;
        let mut index = self.index_of(left);
        if index < self.chunks.len() && !self.chunks[index].sacked && self.chunks[index].start < left {
            if !self.split(index, left) {
                return 0;
            }
            index += 1;
        }
        while index < self.chunks.len() && self.chunks[index].start < right {
            if self.chunks[index].sacked {
                index += 1;
                continue;
            }
            if self.chunks[index].end > right && !self.split(index, right) {
                break;
            }
            let chunk = self.chunks[index];
            let len = chunk.len();
            delivered(&chunk);
            if chunk.lost {
                self.lost -= len;
            }
            if chunk.retransmitted {
                self.retransmitted -= len;
            }
            self.sacked += len;
            newly += len;
            self.highest_sacked = self.highest_sacked.max(chunk.end);
            let marked = &mut self.chunks[index];
            marked.sacked = true;
            marked.lost = false;
            marked.retransmitted = false;
            index = self.merge_sacked(index) + 1;
        }
        newly
    }

    /// Joins the sacked chunk `index` with sacked neighbours. Nothing but their extent matters any more. Returns where
    /// the joint chunk is.
    fn merge_sacked(&mut self, mut index: usize) -> usize {
        if index + 1 < self.chunks.len() && self.chunks[index + 1].sacked {
            self.chunks[index].end = self.chunks[index + 1].end;
            self.chunks.remove(index + 1);
        }
        if index > 0 && self.chunks[index - 1].sacked {
            self.chunks[index - 1].end = self.chunks[index].end;
            self.chunks.remove(index);
            index -= 1;
        }
        index
    }

    /// Takes every chunk for lost that `judge` says is, among those that a loss detector may judge: neither sacked nor
    /// waiting to be sent again. Returns the bytes newly lost.
    pub(crate) fn mark_lost(&mut self, mut judge: impl FnMut(&Chunk) -> bool) -> usize {
        let mut newly = 0;
        for chunk in &mut self.chunks {
            if chunk.sacked || (chunk.lost && !chunk.retransmitted) || !judge(chunk) {
                continue;
            }
            let len = chunk.len();
            if chunk.retransmitted {
                self.retransmitted -= len;
                chunk.retransmitted = false;
            }
            if !chunk.lost {
                self.lost += len;
                chunk.lost = true;
            }
            newly += len;
            self.lost_from = self.lost_from.min(chunk.start);
        }
        newly
    }

    /// How much of `start..end` is taken for lost and not sent again.
    pub(crate) fn lost_in(&self, start: Seq, end: Seq) -> usize {
        let from = self.index_of(start);
        let chunks = self.chunks.iter().skip(from).take_while(|chunk| chunk.start < end);
        chunks.filter(|chunk| chunk.lost && !chunk.retransmitted).map(Chunk::len).sum()
    }

    /// Takes the first `bytes` in flight for lost (for peers without SACK). Returns the bytes newly lost.
    pub(crate) fn mark_head_lost(&mut self, bytes: usize) -> usize {
        let limit = self.una + bytes;
        if self.chunks.is_empty() || !self.split(0, limit) {
            return 0;
        }
        self.mark_lost(|chunk| chunk.end <= limit)
    }

    /// Forgets all SACKs: the peer has thrown away what it reported (RFC 2018, 8).
    pub(crate) fn renege(&mut self) {
        for chunk in &mut self.chunks {
            chunk.sacked = false;
        }
        self.sacked = 0;
        self.highest_sacked = self.una;
    }

    /// Undoes the marks of lost chunks that were taken for lost wrongly.
    pub(crate) fn unmark_lost(&mut self) {
        for chunk in &mut self.chunks {
            chunk.lost = false;
            // An outstanding repetition counts only while its original is taken for lost.
            chunk.retransmitted = false;
        }
        self.lost = 0;
        self.retransmitted = 0;
    }

    /// The first chunk that waits to be sent again.
    pub(crate) fn next_lost(&mut self) -> Option<(usize, Chunk)> {
        if self.lost <= self.retransmitted {
            return None;
        }
        let from = self.index_of(self.lost_from);
        let found = self.chunks.iter().enumerate().skip(from).find(|(_, chunk)| chunk.lost && !chunk.retransmitted);
        let found = found.map(|(index, chunk)| (index, *chunk));
        if let Some((_, chunk)) = found {
            self.lost_from = chunk.start;
        }
        found
    }

    /// The first `len` bytes of chunk `index` leave again now.
    pub(crate) fn retransmit(&mut self, now: Instant, index: usize, len: usize) -> Chunk {
        let start = self.chunks[index].start;
        // With too many chunks to split, the whole one counts as sent again; the rest is repaired by the next loss.
        let _ = self.split(index, start + len);
        let chunk = &mut self.chunks[index];
        //= https://www.rfc-editor.org/rfc/rfc8985#section-4
        //# For each data segment sent, the sender MUST store its most recent transmission time
        chunk.sent_at = now;
        chunk.ever_retransmitted = true;
        if chunk.lost && !chunk.retransmitted {
            chunk.retransmitted = true;
            self.retransmitted += chunk.len();
        }
        *chunk
    }

    /// The last `mss` bytes in flight leave again as a probe. Returns them.
    pub(crate) fn retransmit_tail(&mut self, now: Instant, mss: usize) -> Option<Chunk> {
        let last = self.chunks.len().checked_sub(1)?;
        let chunk = self.chunks[last];
        if chunk.sacked {
            return None;
        }
        let cut = chunk.end.back(mss.min(chunk.len()));
        let index = if cut > chunk.start && self.split(last, cut) { last + 1 } else { last };
        Some(self.retransmit(now, index, usize::MAX >> 1))
    }

    pub(crate) fn release(&mut self) -> bool {
        self.ring.release()
    }

    pub(crate) fn release_small(&mut self, keep: usize) {
        if self.ring.is_empty() && self.ring.capacity() <= keep {
            self.ring.release();
            // It fades, so that one large message isn't made room for ever after.
            self.peak -= self.peak / 8;
        }
    }

    pub(crate) const fn memory(&self) -> usize {
        self.ring.capacity()
    }

    /// Drops everything queued.
    pub(crate) fn purge(&mut self) {
        let iss = self.iss;
        let position = self.nxt;
        *self = Sender::new(iss);
        self.una = position;
        self.nxt = position;
        self.base = position;
        self.highest_sacked = position;
        self.lost_from = position;
    }

    /// Whether the parts agree with each other; for images and tests.
    pub(crate) fn is_consistent(&self) -> bool {
        let adjacent =
            self.chunks.iter().zip(self.chunks.iter().skip(1)).all(|(a, b)| a.end == b.start && a.start < a.end);
        let covering = match (self.chunks.front(), self.chunks.back()) {
            (Some(first), Some(last)) => first.start == self.una && last.end == self.nxt && last.start < last.end,
            _ => self.una == self.nxt || self.nxt == self.iss + 1,
        };
        // Of chunks in order, whose lengths add up to what is between the first and the last.
        let sum =
            |judge: fn(&Chunk) -> bool| self.chunks.iter().filter(|chunk| judge(chunk)).map(Chunk::len).sum::<usize>();
        let counted = || {
            self.sacked == sum(|chunk| chunk.sacked)
                && self.lost == sum(|chunk| chunk.lost)
                && self.retransmitted == sum(|chunk| chunk.retransmitted)
        };
        let exclusive = self.chunks.iter().all(|chunk| !(chunk.sacked && (chunk.lost || chunk.retransmitted)));
        adjacent
            && covering
            && counted()
            && exclusive
            && self.iss <= self.una
            && self.una <= self.nxt
            && self.nxt <= self.end().max(self.iss + 1)
            && self.base <= self.una.max(self.iss + 1)
            && (self.una <= self.base || self.ring.is_empty())
            && self.ring.extent() == self.ring.len()
            && self.urgent.is_none_or(|end| self.una < end && end <= self.base + self.ring.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_queued_begins_where_the_acknowledged_ends() {
        let sender = Sender::new(Seq::initial(7));
        assert!(sender.is_consistent());
        assert!(!Sender { base: sender.base + 1, fin: true, ..sender }.is_consistent());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Send(usize),
        Ack(usize),
        Sack(usize, usize),
        Lose(usize),
        Retransmit(usize),
        Unmark,
        Renege,
        Tail(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (1usize..5000).prop_map(Step::Send),
            2 => (0usize..9000).prop_map(Step::Ack),
            4 => (1usize..20_000, 1usize..4000).prop_map(|(at, len)| Step::Sack(at, len)),
            1 => (0usize..10_000).prop_map(Step::Lose),
            3 => (1usize..3000).prop_map(Step::Retransmit),
            1 => Just(Step::Unmark),
            1 => Just(Step::Renege),
            1 => (1usize..2000).prop_map(Step::Tail),
        ]
    }

    proptest! {
        /// The scoreboard against one flag per byte.
        #[test]
        fn agrees_with_a_flag_per_byte(isn in any::<u32>(), steps in proptest::collection::vec(step(), 1..80)) {
            //= https://www.rfc-editor.org/rfc/rfc8985#section-4
            //= type=test
            //# The connection MUST use selective acknowledgment (SACK) options [RFC2018], and the sender MUST keep SACK
            //# scoreboard information on a per-connection basis
            let mut sender = Sender::new(Seq::initial(isn));
            sender.syn_sent();
            sender.syn_acked();
            let start = sender.una();
            let mut sacked: Vec<bool> = Vec::new();
            let mut una = 0;
            for step in steps {
                match step {
                    Step::Send(len) => {
                        sender.append(&vec![0; len]);
                        sender.transmitted(Instant::ZERO, len);
                        sacked.resize(sacked.len() + len, false);
                    }
                    Step::Ack(len) => {
                        let to = (una + len).min(sacked.len());
                        let fresh = sacked[una..to].iter().filter(|&&flag| !flag).count();
                        prop_assert_eq!(sender.acknowledge(start + to, |_| ()), fresh);
                        una = to;
                    }
                    Step::Sack(at, len) => {
                        let left = una + at;
                        let right = left + len;
                        let expected = if right <= sacked.len() {
                            let fresh = sacked[left..right].iter().filter(|&&flag| !flag).count();
                            sacked[left..right].fill(true);
                            fresh
                        } else {
                            0
                        };
                        prop_assert_eq!(sender.sack(start + left, start + right, |_| ()), expected);
                    }
                    Step::Lose(below) => {
                        let limit = start + una + below;
                        sender.mark_lost(|chunk| chunk.end <= limit);
                    }
                    Step::Retransmit(len) => {
                        if let Some((index, chunk)) = sender.next_lost() {
                            let sent = sender.retransmit(Instant::ZERO, index, len);
                            prop_assert_eq!(sent.len(), len.min(chunk.len()));
                        }
                    }
                    Step::Unmark => sender.unmark_lost(),
                    Step::Renege => {
                        sender.renege();
                        sacked.fill(false);
                    }
                    Step::Tail(mss) => {
                        let _ = sender.retransmit_tail(Instant::ZERO, mss);
                    }
                }
                prop_assert!(sender.is_consistent(), "{sender:?}");
                prop_assert_eq!(sender.sacked(), sacked[una..].iter().filter(|&&flag| flag).count());
                prop_assert_eq!(sender.outstanding(), sacked.len() - una);
            }
        }
    }
}
