//! What an acknowledgment means for what is in flight: RTT, SACK, loss detection, congestion window.

use std::time::Duration;

use super::super::Env;
use super::super::congestion::Acked;
use super::super::recovery::{DUPLICATE_THRESHOLD, Frto, Phase, Reduction, Undo};
use super::super::rtt::RTO_MAX;
use super::super::segment::{Flags, Segment};
use super::super::send::Chunk;
use super::super::seq::{Seq, wire_before};
use super::super::timers::Timer;
use super::super::timestamp;
use super::{Connection, Verdict};
use crate::Instant;

/// Room a delayed ACK of the peer needs (RFC 8985: `WCDelAckT`; Linux: `TCP_RTO_MIN`).
const PEER_DELAY: Duration = Duration::from_millis(200);
/// Slack on a tail loss probe, as Linux's `TCP_TIMEOUT_MIN`.
const PROBE_SLACK: Duration = Duration::from_millis(2);

/// What one acknowledgment reported.
#[derive(Default)]
struct Report {
    /// Bytes delivered that weren't known to be.
    delivered: usize,
    /// The send time of the last segment delivered that was sent only once.
    sample: Option<Instant>,
    /// SND.UNA moved.
    advanced: bool,
    /// A D-SACK came.
    duplicate: bool,
    /// Something was delivered by a SACK.
    sacked: bool,
    /// Something before this was delivered that was never sent again.
    original_before: Option<Seq>,
    original: bool,
}

impl Report {
    fn on_delivered(&mut self, chunk: &Chunk) {
        self.delivered += chunk.len();
        if !chunk.ever_retransmitted {
            self.sample = self.sample.max(Some(chunk.sent_at));
            self.original |= self.original_before.is_some_and(|point| chunk.end <= point);
        }
    }
}

impl Connection {
    /// Records the peer's window.
    pub(super) fn set_window(&mut self, size: usize, seq: Seq, ack: Seq) {
        let grown = size > self.window.size;
        self.window.size = size;
        self.window.largest = self.window.largest.max(size);
        self.window.updated_by_seq = seq;
        self.window.updated_by_ack = ack;
        if grown {
            self.timers.stop(Timer::Persist);
            self.probing.window_probes = 0;
            self.probing.window_closed_at = None;
            self.probing.force = false;
            if self.snd.outstanding() == 0 {
                self.rtt.reset_backoff();
            }
        }
    }

    /// Takes in the acknowledgment of a segment. Returns a verdict if that ends the connection.
    pub(super) fn handle_acknowledgment(
        &mut self,
        env: &Env<'_>,
        segment: &Segment<'_>,
        seq: Seq,
        ack: Seq,
    ) -> Option<Verdict> {
        let una = self.snd.una();
        self.last_ack_received = env.now;
        // Any answer shows that the peer is there, even if its window stays shut.
        self.probing.window_probes = 0;
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
        //# The window size MUST be treated as an unsigned number, or else large window sizes will appear like negative
        //# windows and TCP will not work (MUST-1).
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
        //# It is RECOMMENDED that implementations will reserve 32-bit fields for the send and receive window sizes in
        //# the connection record and do all window computations with 32 bits (REC-1).
        let size = usize::from(segment.window) << self.window.scale;
        let old_window = self.window.size;
        // RFC 9293 (3.10.7.4): the window of the newest segment counts. Linux lets one that is equally new only widen or
        // close it, since smaller ones are as a rule overtaken.
        let newer = ack > una
            || seq > self.window.updated_by_seq
            || (seq == self.window.updated_by_seq
                && (size > self.window.size || size == 0)
                && ack >= self.window.updated_by_ack);
        if ack >= una && newer {
            self.set_window(size, seq, ack);
        }

        let had_outstanding = self.snd.outstanding() > 0;
        let mut report = Report { original_before: self.recovery.frto_point(), ..Report::default() };
        if ack > una {
            let min_rtt = self.rtt.minimum();
            let rack = &mut self.recovery.rack;
            self.snd.acknowledge(ack, |chunk| {
                report.on_delivered(chunk);
                rack.on_delivered(env.now, chunk, min_rtt);
            });
            report.advanced = true;
            self.statistics.bytes_acked += ack.since(una) as u64;
            self.recovery.timeouts = 0;
            self.recovery.retransmitting_since = None;
            self.rtt.reset_backoff();
            if self.size.raise_at.is_some() || self.size.search.is_some() {
                self.update_path_mtu(env);
            }
        }
        // After the acknowledgment and in the order of the stream, so that what arrived in order doesn't look reordered.
        if self.agreed.sack && !segment.options.sack.is_empty() {
            self.take_sack_blocks(env, segment, ack, &mut report);
        }
        if !had_outstanding {
            return None;
        }
        self.measure(env, segment, &mut report);
        self.statistics.delivered += report.delivered.div_ceil(self.mss()) as u64;
        if self.snd.outstanding() == 0 {
            self.snd.release_small(super::KEEP_SMALL);
        }
        let pure = segment.payload.is_empty() && !segment.has(Flags::FIN) && size == old_window;
        self.recover(env, segment, &report, pure && ack == una);
        if report.advanced {
            self.restart_retransmission_timer(env.now);
            self.schedule_loss_probe(env.now);
        }
        None
    }

    fn take_sack_blocks(&mut self, env: &Env<'_>, segment: &Segment<'_>, ack: Seq, report: &mut Report) {
        let una = self.snd.una();
        let min_rtt = self.rtt.minimum();
        let mut blocks = segment.options.sack.iter().map(|(left, right)| {
            let left = una.expand(left);
            (left, left.expand(right))
        });
        let mut blocks: [Option<(Seq, Seq)>; 4] = std::array::from_fn(|_| blocks.next());
        // RFC 2883: a first block below the ACK, or inside the second, reports a duplicate.
        if let Some((left, right)) = blocks[0] {
            let inside_second = blocks[1].is_some_and(|(start, end)| start <= left && right <= end);
            if left < right && (right <= ack || inside_second) {
                //= https://www.rfc-editor.org/rfc/rfc2883#section-5
                //# A sender that learns that every retransmission was a duplicate undoes its reduction.
                report.duplicate = true;
                self.on_duplicate_report(right.since(left));
            }
        }
        blocks.sort_unstable();
        for (left, right) in blocks.into_iter().flatten() {
            //= https://www.rfc-editor.org/rfc/rfc8985#section-4
            //# The connection MUST use selective acknowledgment (SACK) options [RFC2018], and the sender MUST keep SACK
            //# scoreboard information on a per-connection basis
            if right <= ack {
                continue;
            }
            let rack = &mut self.recovery.rack;
            self.snd.sack(left.max(una + 1), right, |chunk| {
                report.sacked = true;
                report.on_delivered(chunk);
                rack.on_delivered(env.now, chunk, min_rtt);
            });
        }
    }

    fn on_duplicate_report(&mut self, bytes: usize) {
        self.statistics.duplicates_reported += bytes.div_ceil(self.mss()) as u64;
        self.recovery.rack.on_dsack(self.snd.una(), self.snd.nxt());
        if let Some(undo) = &mut self.recovery.undo {
            undo.retransmitted = undo.retransmitted.saturating_sub(bytes);
        }
    }

    /// RFC 6298 and RFC 7323: a round-trip time from a segment sent once, or else from the echoed timestamp.
    fn measure(&mut self, env: &Env<'_>, segment: &Segment<'_>, report: &mut Report) {
        if let Some(sent_at) = report.sample {
            self.rtt.sample(env.now, env.now.since(sent_at));
            return;
        }
        if !report.advanced || !self.agreed.timestamps {
            return;
        }
        //= https://www.rfc-editor.org/rfc/rfc7323#section-4.1
        //# An acknowledgment that advances measures the round-trip time by the echo, also of repeated segments.
        let Some((_, echo)) = segment.options.timestamps else {
            return;
        };
        let elapsed_ms = timestamp(env.now, self.timestamps.offset).wrapping_sub(echo);
        if echo != 0 && u128::from(elapsed_ms) < RTO_MAX.as_millis() {
            self.rtt.sample(env.now, Duration::from_millis(u64::from(elapsed_ms)).max(Duration::from_micros(500)));
        }
    }

    /// Loss detection, recovery and the congestion window.
    fn recover(&mut self, env: &Env<'_>, segment: &Segment<'_>, report: &Report, duplicate_ack: bool) {
        let now = env.now;
        let mss = self.mss();
        self.try_undo(segment, report);
        self.question_time_out(report, duplicate_ack);
        self.finish_probe(report, duplicate_ack);
        if self.recovery.phase != Phase::Open && self.snd.una() >= self.recovery.point {
            self.complete();
        }
        let newly_lost =
            //= https://www.rfc-editor.org/rfc/rfc8985#section-9.2
            //# MUST NOT be used with RACK-TLP
            if self.agreed.sack { self.detect_loss(now) } else { self.count_duplicates(report, duplicate_ack) };
        let newly_lost = if newly_lost > 0 && self.only_the_probe_is_lost(now) { 0 } else { newly_lost };
        if newly_lost > 0 && matches!(self.recovery.phase, Phase::Open | Phase::Reducing) {
            self.enter_recovery();
        }
        if self.agreed.ecn && segment.has(Flags::ECE) {
            self.statistics.delivered_marked += report.delivered.div_ceil(mss) as u64;
            //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.2
            //# The window is reduced at most once for the data of one window.
            if self.recovery.phase == Phase::Open && self.snd.outstanding() > 0 {
                self.enter(Phase::Reducing);
            }
        }
        match self.recovery.phase {
            Phase::Recovery | Phase::Reducing => {
                let progress = report.advanced && newly_lost == 0;
                // Without SACK a duplicate acknowledgment is all that tells of a delivery.
                let delivered = if duplicate_ack && !self.agreed.sack { mss } else { report.delivered };
                let window = self.recovery.reduction.window(
                    delivered,
                    self.snd.pipe(),
                    self.congestion.ssthresh(),
                    mss,
                    progress,
                );
                self.congestion.set_cwnd(window, mss);
            }
            Phase::Open | Phase::Loss => self.grow(env, report),
        }
    }

    /// RFC 9293 and RFC 5681: grow only while the window is what limits.
    fn grow(&mut self, env: &Env<'_>, report: &Report) {
        //= https://www.rfc-editor.org/rfc/rfc5681#section-3.1
        //# In slow start the window grows by what was acknowledged.
        let slow = self.congestion.in_slow_start();
        let used = if slow { self.congestion.cwnd() < 2 * self.usage.most } else { self.usage.limited };
        // RFC 5681 (3.2): what was only reported beyond a hole lets new data out, but doesn't open the window; Linux goes on
        // where reordering is usual.
        //= https://www.rfc-editor.org/rfc/rfc5681#section-3.2
        //# Each of the first two duplicates lets a new segment out and leaves the window as it is.
        let progress = report.advanced || (slow && self.recovery.rack.has_reordering());
        if report.delivered == 0 || !(used || self.usage.limited) || !progress {
            return;
        }
        let acked = Acked {
            now: env.now,
            bytes: report.delivered,
            una: self.snd.una(),
            nxt: self.snd.nxt(),
            rtt: report.sample.map(|at| env.now.since(at)),
            smoothed_rtt: self.rtt.smoothed().unwrap_or_default(),
            mss: self.mss(),
        };
        self.congestion.on_ack(&acked);
    }

    /// RACK. Returns the bytes newly lost.
    pub(super) fn detect_loss(&mut self, now: Instant) -> usize {
        if self.snd.sacked() == 0 && self.snd.lost() == 0 && self.recovery.phase == Phase::Open {
            self.timers.stop(Timer::Reorder);
            return 0;
        }
        let recovering = matches!(self.recovery.phase, Phase::Recovery | Phase::Loss);
        let min_rtt = self.rtt.minimum().unwrap_or_default();
        let smoothed = self.rtt.smoothed().unwrap_or_default();
        let mss = self.mss();
        let (lost, wait) = self.recovery.rack.detect(now, &mut self.snd, recovering, min_rtt, smoothed, mss);
        match wait {
            Some(wait) => self.timers.set(Timer::Reorder, now + wait + Duration::from_micros(1)),
            None => self.timers.stop(Timer::Reorder),
        }
        lost
    }

    /// RFC 6582, for peers without SACK. Returns the bytes newly lost.
    fn count_duplicates(&mut self, report: &Report, duplicate_ack: bool) -> usize {
        let mss = self.mss();
        if report.advanced {
            self.recovery.duplicates = 0;
            //= https://www.rfc-editor.org/rfc/rfc6582#section-3.2
            //# Without SACK a partial acknowledgment in recovery repairs the next hole, and recovery lasts until all
            //# that was in flight is acknowledged.
            // A partial acknowledgment: the next hole is lost too.
            if self.recovery.phase == Phase::Recovery {
                return self.snd.mark_head_lost(mss);
            }
            return 0;
        }
        if !duplicate_ack {
            return 0;
        }
        self.recovery.duplicates = self.recovery.duplicates.saturating_add(1);
        //= https://www.rfc-editor.org/rfc/rfc5681#section-3.2
        //# The third duplicate acknowledgment repairs the first hole at once.
        if self.recovery.duplicates == DUPLICATE_THRESHOLD && self.recovery.phase == Phase::Open {
            return self.snd.mark_head_lost(mss);
        }
        0
    }

    fn enter(&mut self, phase: Phase) {
        let mss = self.mss();
        self.recovery.phase = phase;
        // RFC 3168 (6.1.2): every reduction is told to the peer, whatever the reason.
        self.ecn.confirm = self.agreed.ecn;
        self.recovery.point = self.snd.nxt();
        self.recovery.reduction = Reduction::new(self.snd.pipe().max(self.snd.outstanding() - self.snd.sacked()));
        self.congestion.on_congestion(self.snd.outstanding(), mss);
    }

    fn remember_for_undo(&mut self) {
        self.recovery.undo = Some(Undo { saved: self.congestion.save(), retransmitted: 0, timestamp: None });
    }

    /// RFC 6675 and RFC 8985: a loss begins a recovery.
    pub(super) fn enter_recovery(&mut self) {
        if self.recovery.phase == Phase::Open {
            self.remember_for_undo();
            self.enter(Phase::Recovery);
        } else {
            // The window is already being reduced: once a round trip is enough.
            self.recovery.phase = Phase::Recovery;
            self.recovery.point = self.snd.nxt();
        }
        self.timers.stop(Timer::LossProbe);
    }

    /// The recovery point is acknowledged.
    fn complete(&mut self) {
        if matches!(self.recovery.phase, Phase::Recovery | Phase::Reducing) {
            let mss = self.mss();
            self.congestion.set_cwnd(self.congestion.ssthresh(), mss);
        }
        self.recovery.rack.on_recovery_end();
        self.recovery.phase = Phase::Open;
        self.recovery.undo = None;
        self.recovery.frto = Frto::Settled;
        self.recovery.duplicates = 0;
    }

    /// Was the reduction a mistake? RFC 3522 (Eifel): an acknowledgment echoes a timestamp from before the first
    /// retransmission. RFC 3708: every retransmission was reported as a duplicate.
    fn try_undo(&mut self, segment: &Segment<'_>, report: &Report) {
        let Some(undo) = &self.recovery.undo else {
            return;
        };
        //= https://www.rfc-editor.org/rfc/rfc3522#section-3.2
        //# An acknowledgment that echoes a timestamp from before the first retransmission shows that the retransmission
        //# was spurious.
        let by_timestamp = report.advanced
            && self.agreed.timestamps
            && matches!((undo.timestamp, segment.options.timestamps), (Some(first), Some((_, echo))) if echo != 0 && wire_before(echo, first));
        let by_duplicates = report.duplicate && undo.timestamp.is_some() && undo.retransmitted == 0;
        if by_timestamp || by_duplicates {
            self.undo();
        }
    }

    /// Nothing was lost: back to where things stood before.
    fn undo(&mut self) {
        self.recovery.frto = Frto::Settled;
        if let Some(undo) = self.recovery.undo.take() {
            self.congestion.restore(undo.saved);
            self.snd.unmark_lost();
            self.recovery.phase = Phase::Open;
        }
    }

    /// RFC 5682 (3.1), after a retransmission time-out (Linux: `tcp_process_loss`).
    fn question_time_out(&mut self, report: &Report, duplicate_ack: bool) {
        if self.recovery.phase != Phase::Loss || self.recovery.frto == Frto::Settled {
            return;
        }
        // Step 3b
        if report.original {
            return self.undo();
        }
        match self.recovery.frto {
            // Step 3a: what was sent in between arrived before what is taken for lost.
            //= https://www.rfc-editor.org/rfc/rfc5682#section-3.1
            //# If what was sent after the time-out arrives while what is before it is missing, recovery goes on as
            //# usual.
            Frto::Probing if report.sacked || duplicate_ack => self.recovery.frto = Frto::Settled,
            // Step 2b
            Frto::Repeated if report.advanced && self.snd.una() < self.recovery.point => {
                let window = (self.snd.una() + self.window.size).since(self.snd.nxt());
                let may_send = self.snd.unsent_payload() > 0 && window > 0;
                self.recovery.point = self.snd.nxt();
                self.recovery.frto = if may_send { Frto::Probing } else { Frto::Settled };
            }
            _ => {}
        }
    }

    /// RTO (5.1), (5.3): restart while something is outstanding.
    pub(super) fn restart_retransmission_timer(&mut self, now: Instant) {
        if self.snd.outstanding() > 0 {
            //= https://www.rfc-editor.org/rfc/rfc6298#section-5.3
            //# An acknowledgment of new data starts it anew.
            self.timers.set(Timer::Retransmit, now + self.rtt.rto());
        } else {
            //= https://www.rfc-editor.org/rfc/rfc6298#section-5.2
            //# The timer stops when everything is acknowledged.
            self.timers.stop(Timer::Retransmit);
            self.timers.stop(Timer::LossProbe);
            self.timers.stop(Timer::Reorder);
        }
    }

    /// RFC 8985 (7.2)
    pub(super) fn schedule_loss_probe(&mut self, now: Instant) {
        //= https://www.rfc-editor.org/rfc/rfc8985#section-7.3
        //# When the PTO timer expires, the sender MUST check whether both of the following conditions are met before
        //# sending a loss probe
        let ready = self.agreed.sack
            && self.recovery.phase == Phase::Open
            && self.snd.sacked() == 0
            && self.snd.lost() == 0
            && self.recovery.probe.is_none()
            && self.snd.outstanding() > 0;
        if !ready {
            self.timers.stop(Timer::LossProbe);
            return;
        }
        let Some(smoothed) = self.rtt.smoothed() else {
            return;
        };
        //= https://www.rfc-editor.org/rfc/rfc8985#section-7.2
        //# The sender SHOULD start or restart a loss probe PTO timer after transmitting new data
        let single = self.snd.outstanding() <= self.mss();
        let timeout = smoothed * 2 + if single { PEER_DELAY } else { PROBE_SLACK };
        let at = now + timeout;
        if self.timers.get(Timer::Retransmit).is_some_and(|rto| at < rto) {
            self.timers.set(Timer::LossProbe, at);
        } else {
            self.timers.stop(Timer::LossProbe);
        }
    }

    /// RFC 8985 (7.4): what became of a tail loss probe.
    fn finish_probe(&mut self, report: &Report, duplicate_ack: bool) {
        let Some(probe) = self.recovery.probe else {
            return;
        };
        if self.snd.una() < probe.end {
            return;
        }
        let both_arrived = report.duplicate || (duplicate_ack && report.delivered == 0 && !report.advanced);
        if !probe.retransmission || both_arrived {
            self.recovery.probe = None;
        } else if self.snd.una() > probe.end {
            //= https://www.rfc-editor.org/rfc/rfc8985#section-7.4.2
            //# SHOULD invoke a congestion control response equivalent to a fast recovery.
            // The probe repaired a loss that nothing else has shown: react to it once.
            self.recovery.probe = None;
            if self.recovery.phase == Phase::Open {
                let mss = self.mss();
                self.congestion.on_congestion(self.snd.outstanding(), mss);
                self.congestion.set_cwnd(self.congestion.ssthresh(), mss);
            }
        }
    }
}
