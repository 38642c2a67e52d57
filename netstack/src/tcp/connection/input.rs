//! What a segment means, state by state (RFC 9293, 3.10.7, with RFC 5961 and RFC 7323).
//!
//! A segment is first judged, without changing anything ([`Disposition`]); then it is acted on.

use std::time::Duration;

use super::super::receive::{Deliver, SCALE_MAX};
use super::super::segment::{Flags, Segment};
use super::super::seq::{Seq, wire_before};
use super::super::timers::Timer;
use super::super::{Agreed, Env, MSS_MIN, TIMESTAMP_AGE_MAX, default_mss, timestamp};
use super::{Connection, DELAYED_ACK_MAX, KEEP_SMALL, QUICK_ACKS, RELEASE_AFTER};
use crate::{SocketError, State};

/// Least time between two challenge ACKs of one connection (Linux: `tcp_invalid_ratelimit`).
const CHALLENGE_INTERVAL: Duration = Duration::from_millis(500);

/// Payload from which on a segment is worth a delivery of its own.
const DELIVER_LEN: usize = 8 << 10;

/// How soon a SYN leaves again after an answer to something else (Linux: `TCP_TIMEOUT_MIN`).
const SYN_AGAIN: Duration = Duration::from_millis(2);

/// What a segment did to its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It goes on.
    Continue,
    /// It goes on, and the segment is answered with an RST made from the segment itself.
    Reject,
    /// Both sides are done: TIME-WAIT takes over.
    TimeWait,
    /// It is over.
    Closed(Option<SocketError>),
    /// It is over, and the segment is answered with an RST made from the segment itself.
    Refuse,
    /// It is over, and the peer is told by an RST.
    Abort(Option<SocketError>),
}

/// What a segment of a synchronized connection deserves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disposition {
    /// Nothing.
    Drop,
    /// Say where this side stands, at once.
    Acknowledge,
    /// The same, but only so often: it may be an attack, or two stacks in a loop.
    Challenge,
    /// The peer ends the connection.
    Reset,
    /// It acknowledges what a handshake never sent.
    Reject,
    /// To be processed.
    Process { seq: Seq, ack: Seq },
}

impl Connection {
    /// Takes in a segment.
    pub(crate) fn handle_segment(
        &mut self,
        env: &Env<'_>,
        segment: &Segment<'_>,
        deliver: &mut Deliver<'_>,
    ) -> Verdict {
        self.statistics.segments_in += segment.count() as u64;
        if self.state == State::SynSent {
            return self.handle_in_syn_sent(env, segment, deliver);
        }
        match self.judge(env, segment) {
            Disposition::Drop => Verdict::Continue,
            Disposition::Acknowledge => {
                let seq = self.rcv.nxt().expand(segment.seq);
                self.rcv.note_duplicate(seq, seq + segment.len());
                self.acking.now = true;
                Verdict::Continue
            }
            Disposition::Challenge => {
                self.challenge(env);
                Verdict::Continue
            }
            Disposition::Reset => Verdict::Closed(Some(match self.state {
                //= https://www.rfc-editor.org/rfc/rfc9293#section-3.5
                //# Note that a TCP implementation MUST keep track of whether a connection has reached SYN-RECEIVED
                //# state as the result of a passive OPEN or an active OPEN (MUST-11).
                //= https://www.rfc-editor.org/rfc/rfc9293#section-3.6
                //# If the local TCP connection is closed by the remote side due to a FIN or RST received from the
                //# remote side, then the local application MUST be informed whether it closed normally or was aborted
                //# (MUST-12).
                State::SynReceived if self.active => SocketError::ConnectionRefused,
                State::CloseWait => SocketError::BrokenPipe,
                _ => SocketError::ConnectionReset,
            })),
            Disposition::Reject => Verdict::Reject,
            Disposition::Process { seq, ack } => self.process(env, segment, seq, ack, deliver),
        }
    }

    /// RFC 5961 (7): challenge ACKs are limited, per connection here and per host in the stack.
    pub(super) fn challenge(&mut self, env: &Env<'_>) {
        //= https://www.rfc-editor.org/rfc/rfc5961#section-7
        //# Challenges are limited.
        if self.acking.last_challenge.is_none_or(|at| env.now.since(at) >= CHALLENGE_INTERVAL) {
            self.acking.last_challenge = Some(env.now);
            self.acking.now = true;
        }
    }

    fn judge(&self, env: &Env<'_>, segment: &Segment<'_>) -> Disposition {
        let seq = self.rcv.nxt().expand(segment.seq);
        let end = seq + segment.len();
        let is_reset = segment.has(Flags::RST);

        //= https://www.rfc-editor.org/rfc/rfc7323#section-5.3
        //# A segment with a timestamp older than TS.Recent is acknowledged and dropped.
        //= https://www.rfc-editor.org/rfc/rfc7323#section-5.2
        //# An RST isn't subject to the test.
        //= https://www.rfc-editor.org/rfc/rfc7323#section-5.5
        //# After 24 days without a newer one TS.Recent means nothing.
        // RFC 7323 (5.3), R1: a segment older than one already seen.
        if self.agreed.timestamps
            && !is_reset
            && let Some((value, _)) = segment.options.timestamps
            && wire_before(value, self.timestamps.recent)
            && env.now.since(self.timestamps.recent_at) < TIMESTAMP_AGE_MAX
            && !self.is_reordered_ack(segment, seq, self.timestamps.recent.wrapping_sub(value))
        {
            // Linux's `PAWS_OLD_ACK`: one that was merely overtaken is common and not worth an answer.
            if segment.len() == 0 && segment.has(Flags::ACK) && seq < self.rcv.nxt() {
                return Disposition::Drop;
            }
            let limited = segment.len() == 0 || segment.has(Flags::SYN);
            return if limited { Disposition::Challenge } else { Disposition::Acknowledge };
        }

        // RFC 9293 (3.10.7.4), first: is it in the window? Like Linux, the left end is the last ACK sent, since what lies
        // between that and RCV.NXT has only been overtaken.
        let left = self.timestamps.last_ack_sent.min(self.rcv.nxt());
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.4
        //# A TCP receiver MUST process the RST and URG fields of all incoming segments, even when the receive window is
        //# zero (MUST-66).
        let right = self.rcv.nxt().max(self.rcv.edge());
        if end < left || seq > right || (seq == right && segment.len() > 0 && right > self.rcv.nxt()) {
            return if is_reset {
                Disposition::Drop
            } else if segment.len() == 0 || segment.has(Flags::SYN) {
                // Linux's `tcp_oow_rate_limited`: only these can be part of a loop of acknowledgments.
                Disposition::Challenge
            } else {
                Disposition::Acknowledge
            };
        }

        if is_reset {
            // RFC 5961 (3.2): exactly at RCV.NXT, or, as Linux has it, right behind what was received out of order.
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.5.3
            //# TCP implementations SHOULD allow a received RST segment to include data (SHLD-2).
            //= https://www.rfc-editor.org/rfc/rfc5961#section-3.2
            //# An RST ends the connection only at exactly RCV.NXT; elsewhere in the window it is challenged, outside
            //# ignored.
            let exact = seq == self.rcv.nxt() || self.rcv.rightmost() == Some(seq);
            return if exact { Disposition::Reset } else { Disposition::Challenge };
        }
        //= https://www.rfc-editor.org/rfc/rfc5961#section-4.2
        //# A SYN of a synchronized connection is challenged, whatever its number.
        // RFC 5961 (4.2); in SYN-RECEIVED after a simultaneous open the peer's SYN-ACK comes here.
        if segment.has(Flags::SYN) {
            if self.state == State::SynReceived
                && segment.has(Flags::ACK)
                && seq == self.rcv.irs()
                && segment.ack == self.snd.nxt().wire()
            {
                return Disposition::Process { seq: seq + 1, ack: self.snd.nxt() };
            }
            return Disposition::Challenge;
        }
        if !segment.has(Flags::ACK) {
            return Disposition::Drop;
        }
        let ack = self.snd.una().expand(segment.ack);
        if self.state == State::SynReceived && ack != self.snd.iss() + 1 {
            return Disposition::Reject;
        }
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.10.7.4
        //# RFC 5961 [9], Section 5 describes a potential blind data injection attack, and mitigation that
        //# implementations MAY choose to include (MAY-12).
        //= https://www.rfc-editor.org/rfc/rfc5961#section-5.2
        //# An acknowledgment of what was not sent, or older than the largest window, is challenged and its data
        //# dropped.
        // RFC 5961 (5.2)
        if ack > self.snd.nxt() {
            return Disposition::Challenge;
        }
        // No further back than was ever acknowledged (Linux: `bytes_acked`).
        let acked = self.snd.una().since(self.snd.iss() + 1);
        if ack + self.window.largest.min(acked) < self.snd.una() {
            return Disposition::Challenge;
        }
        Disposition::Process { seq, ack }
    }

    /// A pure ACK that was overtaken by a later segment is old but harmless, unless it is so old that it must be from
    /// another life (Linux: `tcp_disordered_ack`, `tcp_tsval_replay`). `age_ms` is by the peer's clock.
    fn is_reordered_ack(&self, segment: &Segment<'_>, seq: Seq, age_ms: u32) -> bool {
        let replay = self.rtt.base_rto() * 6 / 5;
        segment.len() == 0
            && seq == self.rcv.nxt()
            && self.snd.una().expand(segment.ack) >= self.snd.una()
            && Duration::from_millis(u64::from(age_ms)) <= replay
    }

    /// RFC 9293 (3.10.7.3)
    fn handle_in_syn_sent(&mut self, env: &Env<'_>, segment: &Segment<'_>, deliver: &mut Deliver<'_>) -> Verdict {
        let acceptable =
            segment.has(Flags::ACK) && segment.ack == self.snd.iss().wire().wrapping_add(1) && !self.syn_due_first();
        if segment.has(Flags::ACK) && !acceptable {
            // Linux: the peer has an older connection of these ends, which the RST is to end; the SYN again finds it gone.
            if self.syn_repeated == 0 && !self.syn_due_first() {
                self.timers.set(Timer::Retransmit, env.now + SYN_AGAIN);
            }
            return if segment.has(Flags::RST) { Verdict::Continue } else { Verdict::Reject };
        }
        //= https://www.rfc-editor.org/rfc/rfc7323#section-4.1
        //# A SYN-ACK that echoes a timestamp never sent doesn't open a connection.
        // Linux's `PAWSACTIVEREJECTED`: an echo of a timestamp that was never sent is from another life.
        if acceptable
            && let Some((_, echo)) = segment.options.timestamps
            && echo != 0
        {
            // Both by the timestamp clock, which counts whole milliseconds: the time between could be one less.
            let now = timestamp(env.now, self.timestamps.offset);
            let opened = timestamp(self.opened_at(), self.timestamps.offset);
            if now.wrapping_sub(echo) > now.wrapping_sub(opened) {
                return if segment.has(Flags::RST) { Verdict::Continue } else { Verdict::Reject };
            }
        }
        if segment.has(Flags::RST) {
            return if acceptable { Verdict::Closed(Some(SocketError::ConnectionRefused)) } else { Verdict::Continue };
        }
        if !segment.has(Flags::SYN) {
            return Verdict::Continue;
        }
        let options = &segment.options;
        let ecn = env.config.ecn
            && if acceptable {
                segment.has(Flags::ECE) && !segment.has(Flags::CWR)
            } else {
                segment.has(Flags::ECE.with(Flags::CWR))
            };
        let scaling = options.window_scale.is_some();
        self.agree(
            Agreed { timestamps: options.timestamps.is_some(), sack: options.sack_permitted, scaling, ecn },
            options.mss.unwrap_or(default_mss(self.tuple.local)).max(MSS_MIN),
            options.window_scale.unwrap_or(0).min(SCALE_MAX),
        );
        let irs = Seq::initial(segment.seq);
        let scale = if scaling { self.scale_offered(env) } else { 0 };
        self.rcv.synchronize(irs, scale, self.syn_window(env));
        self.timestamps.last_ack_sent = self.rcv.nxt();
        if let Some((value, _)) = options.timestamps {
            self.timestamps.recent = value;
            self.timestamps.recent_at = env.now;
        }
        self.last_received = env.now;
        if !acceptable {
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.5
            //# A TCP implementation MUST support simultaneous open attempts (MUST-10).
            // Simultaneous open (RFC 9293, 3.5).
            self.state = State::SynReceived;
            self.syn_due = true;
            return Verdict::Continue;
        }
        if self.syn_repeated == 0 {
            self.rtt.sample(env.now, env.now.since(self.syn_sent_at));
        }
        self.establish(env);
        //= https://www.rfc-editor.org/rfc/rfc7323#section-2.2
        //# The window of a SYN is never scaled.
        // The window of a SYN is never scaled.
        self.set_window(usize::from(segment.window), irs, self.snd.una());
        self.acking.now = true;
        if !segment.payload.is_empty() || segment.has(Flags::FIN) {
            return self.receive(env, segment, irs + 1, deliver);
        }
        Verdict::Continue
    }

    /// The SYN hasn't left yet, so nothing can acknowledge it.
    fn syn_due_first(&self) -> bool {
        self.snd.nxt() == self.snd.iss()
    }

    fn process(
        &mut self,
        env: &Env<'_>,
        segment: &Segment<'_>,
        seq: Seq,
        ack: Seq,
        deliver: &mut Deliver<'_>,
    ) -> Verdict {
        self.last_received = env.now;
        self.probing.keepalives = 0;
        //= https://www.rfc-editor.org/rfc/rfc7323#section-4.3
        //# TS.Recent is taken only from a segment that reaches back to the last acknowledgment sent.
        // RFC 7323 (4.3): only a segment that reaches back to the last ACK updates TS.Recent.
        if self.agreed.timestamps
            && let Some((value, _)) = segment.options.timestamps
            && seq <= self.timestamps.last_ack_sent
            && !wire_before(value, self.timestamps.recent)
        {
            self.timestamps.recent = value;
            self.timestamps.recent_at = env.now;
        }
        if self.state == State::SynReceived {
            let fin_queued = self.snd.fin_queued();
            self.establish(env);
            if fin_queued {
                self.state = State::FinWait1;
            }
            self.set_window(usize::from(segment.window) << self.window.scale, seq, ack);
        }
        if let Some(error) = self.handle_acknowledgment(env, segment, seq, ack) {
            return error;
        }
        if self.snd.fin_acked() {
            match self.state {
                State::FinWait1 => {
                    self.state = State::FinWait2;
                    self.start_fin_wait_2(env);
                    // Linux: with no patience at all the orphan ends here.
                    if self.orphan && env.options.linger2.is_none() {
                        return Verdict::Refuse;
                    }
                }
                State::Closing => return Verdict::TimeWait,
                State::LastAck => return Verdict::Closed(None),
                _ => {}
            }
        }
        if matches!(self.state, State::Established | State::FinWait1 | State::FinWait2) {
            if segment.has(Flags::URG) {
                self.rcv.note_urgent(seq, segment.urgent);
            }
            self.rcv.look_for_urgent(seq, segment.payload);
        }
        if segment.payload.is_empty() && !segment.has(Flags::FIN) {
            return Verdict::Continue;
        }
        self.receive(env, segment, seq, deliver)
    }

    /// Takes in payload and FIN.
    fn receive(&mut self, env: &Env<'_>, segment: &Segment<'_>, seq: Seq, deliver: &mut Deliver<'_>) -> Verdict {
        if !matches!(self.state, State::Established | State::FinWait1 | State::FinWait2) {
            // The peer's FIN has been here already: there can't be anything beyond it. Linux takes bytes in the FIN's own
            // place for data that can't be delivered.
            if seq < self.rcv.nxt() && seq + segment.payload.len() > self.rcv.nxt() {
                return Verdict::Refuse;
            }
            if segment.len() > 0 && seq + segment.len() <= self.rcv.nxt() {
                self.rcv.note_duplicate(seq, seq + segment.len());
                self.acking.now = true;
            }
            return Verdict::Continue;
        }
        // RFC 1122 (4.2.2.13): data for a program that is gone can't be delivered.
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.6.1
        //# If such a host issues a CLOSE call while received data is still pending in the TCP connection, or if new
        //# data is received after CLOSE is called, its TCP implementation SHOULD send a RST to show that data was lost
        //# (SHLD-3).
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.6.1
        //# A host MAY implement a "half-duplex" TCP close sequence, so that an application that has called CLOSE cannot
        //# continue to read data from the connection (MAY-1).
        //= https://www.rfc-editor.org/rfc/rfc1122#section-4.2.2.13
        //# Data that arrives for a socket that was closed is answered with an RST.
        if self.orphan && seq + segment.payload.len() > self.rcv.nxt() {
            return Verdict::Refuse;
        }
        //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.3
        //# A mark that arrives is echoed in every acknowledgment until the peer confirms its reduction.
        if segment.congestion_experienced && self.agreed.ecn {
            self.ecn.echo = true;
            self.acking.now = true;
        }
        if self.agreed.ecn && segment.has(Flags::CWR) {
            self.ecn.echo = segment.congestion_experienced;
        }
        let before = self.rcv.nxt();
        // Small segments of a longer stretch gather in the buffer, so that the driver moves them together.
        let prompt = segment.has(Flags::PSH) || segment.payload.len() >= DELIVER_LEN;
        let may_deliver = prompt && !self.read_shut;
        let inserted = self.rcv.insert(env.now, seq, segment.payload, segment.has(Flags::FIN), &mut |parts| {
            if may_deliver { deliver(parts) } else { 0 }
        });
        self.statistics.data_segments_in += segment.count() as u64;
        self.statistics.bytes_received += inserted.readable as u64;
        if self.read_shut && inserted.readable > 0 {
            self.discard_unread(env);
        }
        if inserted.out_of_order {
            self.statistics.out_of_order += segment.count() as u64;
        }
        // Linux waits a little before it acknowledges a FIN: as a rule the program answers it with a close.
        let program_may_close = inserted.finished && self.state == State::Established;
        self.acking.interactive |= program_may_close;
        let unusual = inserted.out_of_order || (inserted.finished && !program_may_close);
        self.owe_acknowledgment(env, segment, unusual, self.rcv.nxt() > before);
        self.last_data_received = env.now;
        if inserted.delivered > 0 {
            let window = self.rcv.window();
            self.rcv.note_read(env.now, inserted.delivered, self.rtt.smoothed());
            self.rcv.release_small(KEEP_SMALL);
            self.after_reading(window);
        }
        if self.rcv.memory() > 0 {
            self.timers.start(Timer::Release, env.now + RELEASE_AFTER);
        }
        if !inserted.finished {
            return Verdict::Continue;
        }
        self.timers.stop(Timer::KeepAlive);
        match self.state {
            State::Established => self.state = State::CloseWait,
            State::FinWait1 => self.state = State::Closing,
            State::FinWait2 => return Verdict::TimeWait,
            _ => {}
        }
        Verdict::Continue
    }

    /// RFC 5681 (4.2), RFC 9293 (3.8.6.3): at once for every second full segment and for anything unusual, soon
    /// otherwise. A coalesced segment counts as what it was on the wire.
    fn owe_acknowledgment(&mut self, env: &Env<'_>, segment: &Segment<'_>, unusual: bool, progressed: bool) {
        let full = usize::from(self.size.received);
        let seen = segment.segment_size.min(usize::from(self.size.own).max(full));
        if seen > full || env.now.since(self.last_data_received) > Duration::from_secs(1) {
            self.size.received = u16::try_from(seen.min(65_535)).unwrap_or(u16::MAX).max(MSS_MIN);
        }
        if env.now.since(self.last_data_received) > self.rtt.rto() {
            // After a pause the peer starts slowly again, so help it.
            self.acking.quick = QUICK_ACKS;
        }
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.3
        //# An ACK SHOULD be generated for at least every second full-sized segment or 2*RMSS bytes of new data (where
        //# RMSS is the MSS specified by the TCP endpoint receiving the segments to be acknowledged, or the default
        //# value if not specified) (SHLD-19).
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.3
        //# A TCP endpoint SHOULD implement a delayed ACK (SHLD-18), but an ACK should not be excessively delayed; in
        //# particular, the delay MUST be less than 0.5 seconds (MUST-40).
        let unacked = self.rcv.nxt().since(self.timestamps.last_ack_sent);
        self.acking.owed = true;
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.10.7.4
        //# A TCP implementation MAY send an ACK segment acknowledging RCV.NXT when a valid segment arrives that is in
        //# the window but not at the left window edge (MAY-13).
        //= https://www.rfc-editor.org/rfc/rfc5681#section-4.2
        //# A segment out of order, or one that fills a gap, is acknowledged at once.
        if unusual || !progressed {
            self.acking.now = true;
            if unusual {
                self.acking.quick = QUICK_ACKS;
            }
        } else if unacked > usize::from(self.size.received) {
            self.acking.soon = true;
        } else if self.acking.quick > 0 && !self.acking.interactive {
            self.acking.quick -= 1;
            self.acking.now = true;
        } else {
            self.timers.start(Timer::DelayedAck, env.now + DELAYED_ACK_MAX);
        }
    }

    /// ICMP says that the peer can't be reached. Returns whether that ends the connection.
    pub(crate) fn handle_unreachable(&mut self, error: SocketError, seq: u32) -> Option<SocketError> {
        let seq = self.snd.una().expand(seq);
        //= https://www.rfc-editor.org/rfc/rfc1122#section-4.2.3.9
        //# An ICMP error counts only if what it quotes is in flight.
        //= https://www.rfc-editor.org/rfc/rfc5927#section-4.1
        //# The sequence number an ICMP error quotes must be in flight.
        let plausible = self.snd.una() <= seq && seq <= self.snd.nxt();
        if !plausible {
            return None;
        }
        match self.state {
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2.2
            //# These are hard error conditions, so TCP implementations SHOULD abort the connection (SHLD-26). [35]
            //# notes that some implementations do not abort connections when an ICMP hard error is received for a
            //# connection that is in any of the synchronized states.
            // Linux gives an attempt up at any such error, so that programs try the next address at once (RFC 5461, 4.1).
            State::SynSent | State::SynReceived => Some(error),
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2.2
            //# Since these Unreachable messages indicate soft error conditions, a TCP implementation MUST NOT abort the
            //# connection (MUST-56), and it SHOULD make the information available to the application (SHLD-25).
            //= https://www.rfc-editor.org/rfc/rfc5927#section-5.2
            //# Hard errors don't end a synchronized connection.
            // In later states even a hard one is as good as an attack (RFC 5927, 5.2), so that it is only remembered.
            _ => {
                self.soft_error = Some(error);
                None
            }
        }
    }
}
