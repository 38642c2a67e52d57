//! Loss detection and recovery: RACK-TLP (RFC 8985), proportional rate reduction (RFC 6937), undo.
//!
//! Pure parts: they judge and count; [`super::connection`] acts on it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::congestion::Saved;
use super::send::{Chunk, Sender};
use super::seq::Seq;
use crate::Instant;
use crate::time::is_measurable;

/// Segments that must be reported beyond a hole for it to count as a loss at once (RFC 5681).
pub(crate) const DUPLICATE_THRESHOLD: usize = 3;

/// The phases of congestion avoidance (Linux: `tcp_ca_state`; its "disorder" is `Open` with something sacked).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    /// Nothing is wrong.
    #[default]
    Open,
    /// The window is being reduced because of an ECN mark.
    Reducing,
    /// Fast recovery.
    Recovery,
    /// After a retransmission time-out.
    Loss,
}

/// Proportional rate reduction.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Reduction {
    prior: usize,
    delivered: usize,
    sent: usize,
}

impl Reduction {
    /// Starts from `prior` in flight.
    pub(crate) fn new(prior: usize) -> Self {
        Reduction { prior: prior.max(1), delivered: 0, sent: 0 }
    }

    /// Counts what leaves.
    pub(crate) fn on_sent(&mut self, bytes: usize) {
        self.sent += bytes;
    }

    /// The window after an acknowledgment that delivered `delivered` bytes. `progress` if it advanced and nothing new was
    /// found lost.
    pub(crate) fn window(
        &mut self,
        delivered: usize,
        pipe: usize,
        ssthresh: usize,
        mss: usize,
        progress: bool,
    ) -> usize {
        self.delivered += delivered;
        let quota = if pipe > ssthresh {
            //= https://www.rfc-editor.org/rfc/rfc6937#section-3
            //# During recovery the window shrinks in proportion to what is delivered, and ends at the threshold.
            let due = (self.delivered as u128 * ssthresh as u128).div_ceil(self.prior as u128);
            usize::try_from(due).unwrap_or(usize::MAX).saturating_sub(self.sent)
        } else {
            // The safe slow-start reduction bound of RFC 9937.
            let bound = self.delivered.saturating_sub(self.sent).max(delivered) + if progress { mss } else { 0 };
            bound.min(ssthresh - pipe)
        };
        // The fast retransmission itself always leaves.
        let quota = if self.sent == 0 { quota.max(mss) } else { quota };
        pipe + quota
    }
}

/// What is needed to undo a reduction that turns out to be a mistake.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Undo {
    /// What to go back to.
    pub(crate) saved: Saved,
    /// Bytes sent again since; a D-SACK for each proves that none was lost.
    pub(crate) retransmitted: usize,
    /// The timestamp of the first retransmission: an echo of an older one proves the same (RFC 3522).
    pub(crate) timestamp: Option<u32>,
}

/// RACK: what was delivered last, in the order of sending.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Rack {
    sent_at: Instant,
    end: Seq,
    rtt: Duration,
    furthest: Seq,
    reordering_seen: bool,
    window_multiplier: u8,
    persist: u8,
    dsack_round: Option<Seq>,
    pub(crate) reorderings: u32,
}

impl Rack {
    /// Whether the time can be calculated with; for images.
    pub(crate) fn is_consistent(&self) -> bool {
        is_measurable(self.rtt)
    }

    /// RFC 8985 (6.2), steps 1 to 3: `chunk` was delivered.
    pub(crate) fn on_delivered(&mut self, now: Instant, chunk: &Chunk, min_rtt: Option<Duration>) {
        let rtt = now.since(chunk.sent_at);
        if chunk.ever_retransmitted && min_rtt.is_some_and(|min| rtt < min) {
            // Acknowledges the original, so its time says nothing about the repetition.
            return;
        }
        self.rtt = rtt;
        if (chunk.sent_at, chunk.end) > (self.sent_at, self.end) {
            self.sent_at = chunk.sent_at;
            self.end = chunk.end;
        }
        if chunk.end > self.furthest {
            self.furthest = chunk.end;
        } else if !chunk.ever_retransmitted && !chunk.lost && chunk.end < self.furthest {
            self.reordering_seen = true;
            self.reorderings = self.reorderings.saturating_add(1);
        }
    }

    pub(crate) const fn has_reordering(&self) -> bool {
        self.reordering_seen
    }

    /// RFC 8985 (6.2), step 4: a D-SACK says that a retransmission was needless, so tolerate more reordering.
    pub(crate) fn on_dsack(&mut self, una: Seq, nxt: Seq) {
        if self.dsack_round.is_none_or(|round| una >= round) {
            self.dsack_round = Some(nxt);
            //= https://www.rfc-editor.org/rfc/rfc8985#section-3.3.2
            //# The RACK reordering window SHOULD adaptively increase
            self.window_multiplier = self.window_multiplier.saturating_add(1).min(64);
            self.persist = 16;
            self.reordering_seen = true;
        }
    }

    /// A recovery ended: after 16 without a D-SACK the tolerance goes back.
    pub(crate) fn on_recovery_end(&mut self) {
        self.persist = self.persist.saturating_sub(1);
        if self.persist == 0 {
            self.window_multiplier = 0;
        }
    }

    fn window(&self, recovering: bool, sacked: usize, min_rtt: Duration, smoothed: Duration, mss: usize) -> Duration {
        //= https://www.rfc-editor.org/rfc/rfc8985#section-3.3.2
        //# The reordering window SHOULD be set to zero if no reordering has been observed on the connection so far, and
        //# either (a) three segments have been SACKed since the last recovery or (b) the sender is already in fast or
        //# RTO recovery.
        if !self.reordering_seen && (recovering || sacked >= DUPLICATE_THRESHOLD * mss) {
            return Duration::ZERO;
        }
        //= https://www.rfc-editor.org/rfc/rfc8985#section-3.3.2
        //# The RACK reordering window MUST be bounded, and this bound SHOULD be SRTT.
        (min_rtt / 4 * (1 + u32::from(self.window_multiplier))).min(smoothed)
    }

    /// Whether `chunk` was sent long enough ago for one sent later to have arrived.
    pub(crate) fn is_expired(&self, now: Instant, chunk: &Chunk) -> bool {
        chunk.sent_at + self.rtt <= now
    }

    /// RFC 8985 (6.2), step 5: marks what must be lost. Returns the bytes newly lost, and how long to wait until more may
    /// turn out to be.
    pub(crate) fn detect(
        &self,
        now: Instant,
        sender: &mut Sender,
        recovering: bool,
        min_rtt: Duration,
        smoothed: Duration,
        mss: usize,
    ) -> (usize, Option<Duration>) {
        let window = self.window(recovering, sender.sacked(), min_rtt, smoothed, mss);
        let mut wait: Option<Duration> = None;
        let lost = sender.mark_lost(|chunk| {
            if (chunk.sent_at, chunk.end) >= (self.sent_at, self.end) {
                return false;
            }
            let deadline = chunk.sent_at + self.rtt + window;
            if deadline <= now {
                return true;
            }
            let remaining = deadline.since(now);
            wait = Some(wait.map_or(remaining, |wait| wait.max(remaining)));
            false
        });
        (lost, wait)
    }
}

/// A tail loss probe that is out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Probe {
    pub(crate) end: Seq,
    pub(crate) retransmission: bool,
}

/// Was a retransmission time-out spurious? F-RTO (RFC 5682, 3.1, the variant for SACK, as in Linux) for peers whose
/// acknowledgments carry no timestamp that would tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Frto {
    /// Not in question, or answered.
    #[default]
    Settled,
    /// The first segment was sent again; the next acknowledgment tells more.
    Repeated,
    /// That acknowledgment advanced, so new data leaves rather than what is taken for lost: only an original that was
    /// late, and no repetition, can explain an acknowledgment of what was never sent again.
    Probing,
}

/// All of it for one connection.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Recovery {
    pub(crate) phase: Phase,
    /// Recovery ends when this is acknowledged.
    pub(crate) point: Seq,
    pub(crate) reduction: Reduction,
    pub(crate) undo: Option<Undo>,
    pub(crate) rack: Rack,
    pub(crate) probe: Option<Probe>,
    /// For peers without SACK: duplicate acknowledgments in a row.
    pub(crate) duplicates: usize,
    /// Time-outs in a row.
    pub(crate) timeouts: u8,
    /// When the first retransmission of what is still outstanding left.
    pub(crate) retransmitting_since: Option<Instant>,
    #[serde(default)]
    pub(crate) frto: Frto,
}

impl Recovery {
    /// Up to where delivery of what was sent only once would show that a time-out was spurious.
    pub(crate) fn frto_point(&self) -> Option<Seq> {
        (self.frto != Frto::Settled).then_some(self.point)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn sender(chunks: usize) -> Sender {
        let mut sender = Sender::new(Seq::initial(0));
        sender.syn_sent();
        sender.syn_acked();
        for index in 0..chunks {
            sender.append(&[0; 1000]);
            sender.transmitted(Instant::from_millis(index as u64), 1000);
        }
        sender
    }

    #[test]
    fn three_later_segments_make_a_loss() {
        //= https://www.rfc-editor.org/rfc/rfc8985#section-3.3.2
        //= type=test
        //# The reordering window SHOULD be set to zero if no reordering has been observed on the connection so far, and
        //# either (a) three segments have been SACKed since the last recovery or (b) the sender is already in fast or
        //# RTO recovery.
        let mut sender = sender(5);
        let mut rack = Rack::default();
        let una = sender.una();
        let now = Instant::from_millis(20);
        sender.sack(una + 1000, una + 3000, |chunk| rack.on_delivered(now, chunk, None));
        let (lost, wait) = rack.detect(now, &mut sender, false, 20 * MS, 20 * MS, 1000);
        assert_eq!(lost, 0, "two are within the reordering window");
        assert!(wait.is_some());
        sender.sack(una + 3000, una + 4000, |chunk| rack.on_delivered(now, chunk, None));
        let (lost, _) = rack.detect(now, &mut sender, false, 20 * MS, 20 * MS, 1000);
        assert_eq!(lost, 1000);
        assert_eq!(sender.lost(), 1000, "the fifth was sent after all that is known to be delivered");
    }

    #[test]
    fn reordering_widens_the_window() {
        let mut sender = sender(5);
        let mut rack = Rack::default();
        let una = sender.una();
        let now = Instant::from_millis(20);
        sender.sack(una + 1000, una + 2000, |chunk| rack.on_delivered(now, chunk, None));
        sender.acknowledge(una + 1000, |chunk| rack.on_delivered(now, chunk, None));
        assert!(rack.has_reordering());
        sender.sack(una + 3000, una + 5000, |chunk| rack.on_delivered(now, chunk, None));
        let (lost, wait) = rack.detect(now, &mut sender, false, 20 * MS, 20 * MS, 1000);
        assert_eq!(lost, 0);
        assert!(wait.is_some_and(|wait| wait <= 5 * MS));
    }

    #[test]
    fn rate_is_reduced_in_proportion() {
        //= https://www.rfc-editor.org/rfc/rfc6937#section-3
        //= type=test
        //# During recovery the window shrinks in proportion to what is delivered, and ends at the threshold.
        let mut reduction = Reduction::new(100_000);
        let mut pipe = 100_000;
        let mut sent = 0;
        for _ in 0..100 {
            pipe -= 1000;
            let window = reduction.window(1000, pipe, 70_000, 1000, true);
            while pipe + 1000 <= window {
                pipe += 1000;
                sent += 1000;
                reduction.on_sent(1000);
            }
        }
        assert!((69_000..=71_000).contains(&pipe), "{pipe}");
        assert!((68_000..=71_000).contains(&sent), "{sent}");
    }

    #[test]
    fn duplicates_widen_the_window_up_to_a_round_trip() {
        //= https://www.rfc-editor.org/rfc/rfc8985#section-3.3.2
        //= type=test
        //# The RACK reordering window SHOULD adaptively increase
        //= https://www.rfc-editor.org/rfc/rfc8985#section-3.3.2
        //= type=test
        //# The RACK reordering window MUST be bounded, and this bound SHOULD be SRTT.
        let mut rack = Rack::default();
        let window = |rack: &Rack| rack.window(true, 0, 20 * MS, 30 * MS, 1000);
        assert_eq!(window(&rack), Duration::ZERO);
        let una = Seq::initial(0);
        rack.on_dsack(una, una + 1000);
        assert_eq!(window(&rack), 10 * MS);
        rack.on_dsack(una, una + 1000);
        assert_eq!(window(&rack), 10 * MS, "once in a round trip");
        for round in 1..100 {
            rack.on_dsack(una + 1000 * round, una + 1000 * (round + 1));
        }
        assert_eq!(window(&rack), 30 * MS, "no more than SRTT");
        for _ in 0..16 {
            rack.on_recovery_end();
        }
        assert_eq!(window(&rack), 5 * MS, "16 recoveries without a duplicate");
    }
}
