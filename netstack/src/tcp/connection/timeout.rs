//! What a connection's timers do.

use std::time::Duration;

use super::super::Env;
use super::super::recovery::{Frto, Phase};
use super::super::rtt::{RTO_MAX, RTO_MIN};
use super::super::timers::Timer;
use super::{Connection, ProbeKind, RELEASE_AFTER, Verdict};
use crate::{Instant, SocketError, State};

/// Time-outs after which a connection is given up, as Linux counts them (`tcp_retries2`).
//= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.3
//# The value of R2 SHOULD correspond to at least 100 seconds (SHLD-11).
const RETRIES_MAX: u32 = 15;
/// The same for an orphan (`tcp_orphan_retries`).
const ORPHAN_RETRIES_MAX: u32 = 8;

/// Least time between two looks at a silent peer: the unit of the options that set it.
const KEEPALIVE_LEAST: Duration = Duration::from_secs(1);

/// How long `retries` time-outs take from a first RTO of 200 ms on (Linux: `tcp_model_timeout`).
fn patience(retries: u32) -> Duration {
    // 2^9 times 200 ms is the last doubling below two minutes.
    const DOUBLINGS: u32 = 9;
    let doubled = RTO_MIN * ((2 << retries.min(DOUBLINGS)) - 1);
    doubled + RTO_MAX * retries.saturating_sub(DOUBLINGS)
}

impl Connection {
    /// Does what is due. Fails with a verdict if that ends the connection. As with Linux, only a peer that leaves keepalive
    /// probes unanswered is told.
    pub(crate) fn handle_timeout(&mut self, env: &Env<'_>) -> Result<(), Verdict> {
        while let Some(timer) = self.timers.take_due(env.now) {
            match timer {
                Timer::Retransmit => self.on_retransmission_timeout(env)?,
                Timer::Reorder => {
                    let lost = self.detect_loss(env.now) > 0 && !self.only_the_probe_is_lost(env.now);
                    if lost && matches!(self.recovery.phase, Phase::Open | Phase::Reducing) {
                        self.enter_recovery();
                        let mss = self.mss();
                        let window = self.recovery_window(mss);
                        self.congestion.set_cwnd(window, mss);
                    }
                }
                Timer::LossProbe => {
                    if self.snd.outstanding() > 0 && self.recovery.phase == Phase::Open {
                        self.probing.due = Some(ProbeKind::TailLoss);
                    }
                }
                Timer::Persist => self.on_persist_timeout(env)?,
                Timer::DelayedAck => {
                    self.acking.now |= self.acking.owed;
                    // The program didn't answer in time, so don't wait for it the next time.
                    self.acking.interactive = false;
                }
                Timer::KeepAlive => self.on_keepalive_timeout(env)?,
                Timer::FinWait2 => {
                    if self.state == State::FinWait2 && self.orphan {
                        return Err(Verdict::Closed(None));
                    }
                }
                Timer::Cork => self.uncorked = self.snd.end(),
                Timer::Release => self.on_release(env.now),
            }
        }
        Ok(())
    }

    fn recovery_window(&mut self, mss: usize) -> usize {
        self.recovery.reduction.window(0, self.snd.pipe(), self.congestion.ssthresh(), mss, false)
    }

    fn on_retransmission_timeout(&mut self, env: &Env<'_>) -> Result<(), Verdict> {
        if matches!(self.state, State::SynSent | State::SynReceived) {
            return self.on_syn_timeout(env);
        }
        if self.snd.outstanding() == 0 {
            return Ok(());
        }
        let mut since = self.recovery.retransmitting_since.unwrap_or(env.now);
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.1
        //# As long as the receiving TCP peer continues to send acknowledgments in response to the probe segments, the
        //# sending TCP peer MUST allow the connection to stay open (MUST-37).
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6
        //# The sender MAY also retransmit old data beyond SND.UNA+SND.WND (MAY-7), but SHOULD NOT time out the
        //# connection if data beyond the right window edge is not acknowledged (SHLD-17).
        if self.window.size == 0 {
            // A peer that answers but has shut its window is alive (RFC 9293, 3.8.6.1).
            since = since.max(self.last_ack_received);
        }
        if self.recovery.timeouts > 0 && self.is_hopeless(env, since) {
            return Err(Verdict::Closed(Some(self.timeout_error())));
        }
        let mss = self.mss();
        // RFC 2018 (8): a peer that reported the first segment and still doesn't acknowledge it has thrown it away.
        //= https://www.rfc-editor.org/rfc/rfc2018#section-8
        //# A time-out with the first segment reported clears all reports, since the receiver may have thrown data away.
        if self.snd.first_chunk().is_some_and(|chunk| chunk.sacked) {
            self.snd.renege();
        }
        // RFC 5682 (3.1), step 1: not in the middle of another recovery, which has sent again more than the first segment.
        let questionable = matches!(self.recovery.phase, Phase::Open | Phase::Reducing) || self.recovery.timeouts > 0;
        self.recovery.frto = if questionable && self.agreed.sack { Frto::Repeated } else { Frto::Settled };
        if self.recovery.phase != Phase::Loss {
            self.enter_loss();
        }
        self.recovery.point = self.snd.nxt();
        self.recovery.probe = None;
        self.probing.due = None;
        self.give_up_probe();
        //= https://www.rfc-editor.org/rfc/rfc6298#section-5.4
        //# When it expires the earliest segment is sent again.
        self.mark_timed_out(env.now);
        // RFC 5681 (3.1): one segment, beyond what is still believed to be on its way.
        //= https://www.rfc-editor.org/rfc/rfc5681#section-3.1
        //# A loss lowers the threshold to half of what was in flight, a time-out the window to one segment.
        let window = self.snd.pipe() + mss;
        self.congestion.set_cwnd(window, mss);
        self.rtt.back_off();
        self.recovery.timeouts = self.recovery.timeouts.saturating_add(1);
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.3
        //# The value of R1 SHOULD correspond to at least 3 retransmissions, at the current RTO (SHLD-10).
        // The second time for a path that doesn't even carry the size of the first.
        if matches!(self.recovery.timeouts, 3 | 5) {
            self.suspect_black_hole(env);
        }
        self.timers.stop(Timer::LossProbe);
        self.timers.stop(Timer::Reorder);
        self.timers.set(Timer::Retransmit, env.now + self.rtt.rto());
        Ok(())
    }

    fn enter_loss(&mut self) {
        let mss = self.mss();
        if self.recovery.phase == Phase::Open {
            self.recovery.undo =
                Some(super::super::recovery::Undo { saved: self.congestion.save(), retransmitted: 0, timestamp: None });
            self.congestion.on_congestion(self.snd.outstanding(), mss);
            self.ecn.confirm = self.agreed.ecn;
        }
        self.recovery.phase = Phase::Loss;
    }

    /// Everything that isn't known to have arrived is lost, but for what RACK says was sent only just now.
    fn mark_timed_out(&mut self, now: Instant) {
        let head = self.snd.una();
        let rack = &self.recovery.rack;
        self.snd.mark_lost(|chunk| chunk.start == head || rack.is_expired(now, chunk));
    }

    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.8
    //# There MUST be a mechanism for reporting soft TCP error conditions to the application (MUST-47).
    fn timeout_error(&self) -> SocketError {
        self.soft_error.unwrap_or(SocketError::TimedOut)
    }

    /// Whether nothing has come back for so long that the connection is given up.
    fn is_hopeless(&self, env: &Env<'_>, since: Instant) -> bool {
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.3
        //# The following procedure MUST be used to handle excessive retransmissions of data segments (MUST-20):
        let waited = env.now.since(since);
        let user = env.options.user_timeout;
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.3
        //# An application MUST (MUST-21) be able to set the value for R2 for a particular connection.
        //= https://www.rfc-editor.org/rfc/rfc5482#section-3
        //# A program can set how long data may stay unacknowledged before the connection is given up.
        if !user.is_zero() && !self.orphan {
            return waited >= user;
        }
        waited >= patience(if self.orphan { ORPHAN_RETRIES_MAX } else { RETRIES_MAX })
    }

    fn on_syn_timeout(&mut self, env: &Env<'_>) -> Result<(), Verdict> {
        let retries =
            if self.state == State::SynSent { env.options.syn_count } else { super::super::half_open::RETRIES_MAX };
        let user = env.options.user_timeout;
        let expired = !user.is_zero() && env.now.since(self.last_received) >= user;
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.3
        //# SYN retransmissions MUST be handled in the general way just described for data retransmissions, including
        //# notification of the application layer.
        if self.syn_repeated >= retries || expired {
            return Err(Verdict::Closed(Some(self.timeout_error())));
        }
        self.syn_repeated = self.syn_repeated.saturating_add(1);
        self.syn_due = true;
        self.rtt.back_off();
        Ok(())
    }

    /// RFC 9293 (3.8.6.1): probe a closed window, or override silly-window avoidance.
    fn on_persist_timeout(&mut self, env: &Env<'_>) -> Result<(), Verdict> {
        if self.snd.outstanding() > 0 || self.snd.unsent() == 0 {
            return Ok(());
        }
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6
        //# If the window shrinks to zero, the TCP implementation MUST probe it in the standard way (described below)
        //# (MUST-35).
        let closed_at = *self.probing.window_closed_at.get_or_insert(env.now);
        let user = env.options.user_timeout;
        let silent = u32::from(self.probing.window_probes) >= RETRIES_MAX;
        let impatient = if self.orphan {
            env.now.since(closed_at) >= patience(ORPHAN_RETRIES_MAX)
        } else {
            !user.is_zero() && env.now.since(closed_at) >= user
        };
        if silent || impatient {
            return Err(Verdict::Closed(Some(self.timeout_error())));
        }
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.1
        //# The transmitting host SHOULD send the first zero-window probe when a zero window has existed for the
        //# retransmission timeout period (SHLD-29) (Section 3.8.1), and SHOULD increase exponentially the interval
        //# between successive probes (SHLD-30).
        let window = (self.snd.una() + self.window.size).since(self.snd.nxt());
        if window > 0 {
            self.probing.force = true;
        } else {
            let urgent = self.snd.urgent_pointer(self.snd.una()).is_some();
            self.probing.due = Some(if urgent { ProbeKind::Urgent } else { ProbeKind::Empty });
            self.probing.window_probes = self.probing.window_probes.saturating_add(1);
        }
        self.rtt.back_off();
        self.timers.set(Timer::Persist, env.now + self.rtt.rto());
        Ok(())
    }

    /// RFC 9293 (3.8.4)
    fn on_keepalive_timeout(&mut self, env: &Env<'_>) -> Result<(), Verdict> {
        let options = env.options;
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.4
        //# Implementers MAY include "keep-alives" in their TCP implementations (MAY-5), although this practice is not
        //# universally accepted.
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.4
        //# If keep-alives are included, the application MUST be able to turn them on or off for each TCP connection
        //# (MUST-24), and they MUST default to off (MUST-25).
        if !options.keepalive || self.orphan || !self.is_synchronized() {
            return Ok(());
        }
        let idle = env.now.since(self.last_received);
        // While something is in flight or waits for a window, its own timers watch the peer.
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.4
        //# Keep-alive packets MUST only be sent when no sent data is outstanding, and no data or acknowledgment packets
        //# have been received for the connection within an interval (MUST-26).
        let busy = self.snd.outstanding() > 0 || self.snd.unsent() > 0;
        if busy || (idle < options.keep_idle && self.probing.keepalives == 0) {
            let again = if busy { env.now + options.keep_idle } else { self.last_received + options.keep_idle };
            self.timers.set(Timer::KeepAlive, again.max(env.now + KEEPALIVE_LEAST));
            return Ok(());
        }
        let user = options.user_timeout;
        let given_up = if user.is_zero() {
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.4
            //# Consequently, if a keep-alive mechanism is implemented it MUST NOT interpret failure to respond to any
            //# specific probe as a dead connection (MUST-29).
            self.probing.keepalives >= options.keep_count
        } else {
            idle >= user && self.probing.keepalives > 0
        };
        if given_up {
            return Err(Verdict::Abort(Some(self.timeout_error())));
        }
        self.probing.keepalives = self.probing.keepalives.saturating_add(1);
        self.probing.due = Some(ProbeKind::Empty);
        self.timers.set(Timer::KeepAlive, env.now + options.keep_interval.max(KEEPALIVE_LEAST));
        Ok(())
    }

    /// Idle buffers are given back.
    fn on_release(&mut self, now: Instant) {
        let idle = now.since(self.last_data_sent.max(self.last_data_received)) >= RELEASE_AFTER;
        let mut done = false;
        if idle {
            let sent = self.snd.release();
            let received = self.rcv.release();
            done = sent && received;
        }
        if !done && self.snd.memory() + self.rcv.memory() > 0 {
            self.timers.set(Timer::Release, now + RELEASE_AFTER);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_linuxs() {
        // ip-sysctl: "the default of 15 yields a hypothetical timeout of 924.6 seconds"
        assert_eq!(patience(RETRIES_MAX), Duration::from_millis(924_600));
        assert_eq!(patience(ORPHAN_RETRIES_MAX), Duration::from_millis(102_200));
    }
}
