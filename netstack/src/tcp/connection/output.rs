//! What to send next.
//!
//! [`Connection::poll_output`] is called until it returns nothing. It decides on one packet at a time, in this order:
//! SYN, what is lost, probes, new data, FIN, and an acknowledgment if none of those carried it.

use std::time::Duration;

use super::super::recovery::{Frto, Phase, Probe};
use super::super::segment::{Flags, Header};
use super::super::send::Chunk;
use super::super::seq::Seq;
use super::super::timers::Timer;
use super::super::{Env, timestamp};
use super::{Connection, ProbeKind, RELEASE_AFTER, own_mss, receive_limit};
use crate::tcp::receive::{INITIAL_LIMIT, Receiver};
use crate::{State, ip};

/// Longest time a corked partial segment waits (Linux: 200 ms).
const CORK_MAX: Duration = Duration::from_millis(200);

/// While a series of packets is taken in, this part of the window that is left is acknowledged without waiting for its end.
const UNACKED_SHARE: usize = 4;

/// A packet decided on: its header, and where its payload lies in the send buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Emission {
    pub(crate) header: Header,
    pub(crate) payload: (usize, usize),
    /// Payload of each segment, if there are to be several.
    pub(crate) segment_size: Option<u16>,
    /// The two ECN bits of the IP header.
    pub(crate) ecn: u8,
    /// For IPv4; grows by one for each segment.
    pub(crate) identification: u16,
}

impl Connection {
    /// The window shift this side's SYN offers.
    pub(super) fn scale_offered(&self, env: &Env<'_>) -> u8 {
        Receiver::scale_to_offer(receive_limit(env).max(env.config.receive_buffer))
    }

    /// The window this side's SYN tells; it is never scaled.
    pub(super) fn syn_window(&self, env: &Env<'_>) -> usize {
        receive_limit(env).min(INITIAL_LIMIT).min(usize::from(u16::MAX))
    }

    /// Whether to acknowledge data that came in order yet. `more` is when packets have arrived that aren't taken in.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.10.7.4
    //# For example, if the TCP endpoint is processing a series of queued segments, it MUST process them all before
    //# sending any ACK segments (MUST-59).
    // All, unless there are so many that the peer runs out of window.
    pub(crate) fn settle_acknowledgment(&mut self, more: bool) {
        let unacked = self.rcv.nxt().since(self.timestamps.last_ack_sent);
        if self.acking.soon && (!more || unacked >= self.rcv.window() / UNACKED_SHARE) {
            self.acking.now = true;
        }
    }

    /// The next packet of this connection, if there is one to send now.
    pub(crate) fn poll_output(&mut self, env: &Env<'_>) -> Option<Emission> {
        match self.state {
            State::SynSent => return self.poll_syn(env),
            State::SynReceived => return self.poll_syn(env).or_else(|| self.poll_acknowledgment(env)),
            State::Closed | State::Listen | State::TimeWait => return None,
            _ => {}
        }
        //= https://www.rfc-editor.org/rfc/rfc5682#section-3.1
        //# After a time-out new data goes out first; an acknowledgment of what was sent only once shows that the
        //# time-out was spurious.
        if self.recovery.frto == Frto::Probing
            && let Some(held) = self.poll_instead_of_retransmission(env)
        {
            return held;
        }
        self.poll_retransmission(env)
            .or_else(|| self.poll_probe(env))
            .or_else(|| self.poll_new_data(env))
            .or_else(|| self.poll_acknowledgment(env))
    }

    /// F-RTO, step 2b: new data leaves, and what is taken for lost waits for the next acknowledgment. Nothing if there is
    /// no new data to send after all.
    fn poll_instead_of_retransmission(&mut self, env: &Env<'_>) -> Option<Option<Emission>> {
        if let Some(fresh) = self.poll_new_data(env) {
            return Some(Some(fresh));
        }
        if self.snd.nxt() > self.recovery.point {
            return Some(self.poll_acknowledgment(env));
        }
        self.recovery.frto = Frto::Settled;
        None
    }

    fn poll_syn(&mut self, env: &Env<'_>) -> Option<Emission> {
        if !self.syn_due {
            return None;
        }
        self.syn_due = false;
        self.syn_sent_at = env.now;
        self.last_data_sent = env.now;
        self.snd.syn_sent();
        self.timers.set(Timer::Retransmit, env.now + self.rtt.rto());
        let first = self.state == State::SynSent;
        // RFC 3168 (6.1.1.1): a repeated SYN doesn't ask, since the question may be why it was lost.
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.2
        //# A TCP endpoint SHOULD implement ECN as described in RFC 3168 (SHLD-8).
        //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.1.1
        //# A SYN that is repeated doesn't ask.
        let ask_ecn = first && env.config.ecn && self.syn_repeated == 0;
        //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.1
        //# An opener asks by ECE and CWR; the peer agrees by ECE alone, and only if it was asked.
        let echo_ecn = !first && self.agreed.ecn;
        let window = self.syn_window(env);
        let header = Header {
            source_port: self.tuple.local_port,
            destination_port: self.tuple.remote_port,
            seq: self.snd.iss().wire(),
            ack: if first { 0 } else { self.rcv.nxt().wire() },
            flags: Flags::SYN
                .with_if(!first, Flags::ACK)
                .with_if(ask_ecn, Flags::ECE.with(Flags::CWR))
                .with_if(echo_ecn, Flags::ECE),
            window: u16::try_from(window).unwrap_or(u16::MAX),
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
            //# A given TCP implementation can support any currently defined options, but the following options MUST be
            //# supported (MUST-4 --note Maximum Segment Size Option support is also part of MUST-14 in Section 3.7.1):
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.2
            //# This field may be sent in the initial connection request (i.e., in segments with the SYN control bit
            //# set) and MUST NOT be sent in other segments (MUST-65).
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.1
            //# TCP implementations SHOULD send an MSS Option in every SYN segment when its receive MSS differs from the
            //# default 536 for IPv4 or 1220 for IPv6 (SHLD-5), and MAY send it always (MAY-3).
            mss: Some(own_mss(env, &self.tuple, self.looped)),
            //= https://www.rfc-editor.org/rfc/rfc7323#section-2.2
            //# Windows are scaled only if both SYNs carried the option.
            window_scale: (first || self.agreed.scaling).then(|| self.scale_offered(env)),
            sack_permitted: first || self.agreed.sack,
            timestamps: (first || self.agreed.timestamps)
                .then(|| (timestamp(env.now, self.timestamps.offset), self.timestamps.recent)),
            ..Header::default()
        };
        self.statistics.segments_out += 1;
        Some(self.emission(header, (0, 0), None, 0))
    }

    fn emission(&mut self, header: Header, payload: (usize, usize), segment_size: Option<u16>, ecn: u8) -> Emission {
        let identification = self.identification;
        let segments = segment_size.map_or(1, |size| payload.1.div_ceil(usize::from(size.max(1))));
        self.identification = identification.wrapping_add(u16::try_from(segments).unwrap_or(1));
        Emission { header, payload, segment_size, ecn, identification }
    }

    /// The header of a segment that acknowledges; whatever acknowledgment is owed is paid by it.
    fn acknowledging_header(&mut self, env: &Env<'_>, seq: Seq, flags: Flags) -> Header {
        let window = self.rcv.advertise(usize::from(self.size.own));
        let most = if self.agreed.timestamps { 3 } else { 4 };
        let sack =
            if self.agreed.sack && self.rcv.has_sack() { self.rcv.sack_blocks(most) } else { Default::default() };
        self.rcv.sack_sent();
        self.acking.now = false;
        self.acking.soon = false;
        self.acking.owed = false;
        self.timers.stop(Timer::DelayedAck);
        self.timestamps.last_ack_sent = self.rcv.nxt();
        let urgent = self.snd.urgent_pointer(seq);
        Header {
            source_port: self.tuple.local_port,
            destination_port: self.tuple.remote_port,
            seq: seq.wire(),
            ack: self.rcv.nxt().wire(),
            flags: flags.with(Flags::ACK).with_if(self.ecn.echo, Flags::ECE).with_if(urgent.is_some(), Flags::URG),
            window,
            urgent: urgent.unwrap_or(0),
            //= https://www.rfc-editor.org/rfc/rfc7323#section-3.2
            //# Once both SYNs carried timestamps, every segment but an RST carries them.
            timestamps: self
                .agreed
                .timestamps
                .then(|| (timestamp(env.now, self.timestamps.offset), self.timestamps.recent)),
            sack,
            ..Header::default()
        }
    }

    /// Payload of one segment now, with what the SACK option takes away.
    pub(super) fn segment_size(&self) -> usize {
        let blocks = if self.agreed.sack && self.rcv.has_sack() {
            let most = if self.agreed.timestamps { 3 } else { 4 };
            self.rcv.blocks_len().min(most)
        } else {
            0
        };
        self.mss().saturating_sub(Header::options_len(false, blocks)).max(16)
    }

    /// Most payload of one packet.
    fn packet_limit(&self, env: &Env<'_>, segment: usize) -> usize {
        // A device that cuts packets would repeat the urgent pointer, which counts from each segment's own start.
        if self.looped || !env.config.offload.tso || self.snd.is_urgent() {
            return segment;
        }
        let headers = ip::header_len(self.tuple.remote) + 60;
        let device = env.config.offload.max_size.min(65_535).saturating_sub(headers);
        // Linux's TSO autosizing: about a millisecond's worth, more when the path is short, so that a slow path doesn't
        // get bursts that stand in the way of others.
        let goal = match (self.rtt.smoothed(), self.rtt.minimum()) {
            (Some(smoothed), Some(minimum)) => {
                let smoothed_us = smoothed.as_micros().max(1);
                let rate_share = 2 * self.congestion.cwnd() as u128 * 1000 / smoothed_us;
                let bonus = 65_536u128 >> (minimum.as_micros() >> 9).min(64);
                usize::try_from(rate_share + bonus).unwrap_or(usize::MAX)
            }
            _ => usize::MAX,
        };
        let limit = device.min(goal.max(2 * segment));
        (limit / segment).max(1) * segment
    }

    /// Wraps a stretch of the stream into a packet and does what sending it entails.
    pub(super) fn emit_stream(&mut self, env: &Env<'_>, start: Seq, end: Seq, segment: usize, fresh: bool) -> Emission {
        let payload = self.snd.payload_span(start, end);
        let fin = self.snd.covers_fin(end);
        let drains = end.since(self.snd.una())
            >= self.snd.end().since(self.snd.una()) - usize::from(self.snd.fin_queued() && !fin);
        //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.2
        //# CWR goes out with the first new data after any reduction.
        let confirm = fresh && self.ecn.confirm && payload.1 > 0;
        if confirm {
            self.ecn.confirm = false;
        }
        let flags = Flags::NONE
            .with_if(fin, Flags::FIN)
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.2
            //# (1) MUST NOT buffer data indefinitely (MUST-60), and (2) MUST set the PSH bit in the last buffered
            //# segment (i.e., when there is no more queued data to be sent) (MUST-61).
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.2
            //# The transmitter SHOULD collapse successive bits when it packetizes data, to send the largest possible
            //# segment (SHLD-27).
            .with_if(payload.1 > 0 && drains, Flags::PSH)
            .with_if(confirm, Flags::CWR);
        let header = self.acknowledging_header(env, start, flags);
        let segment_size = (payload.1 > segment).then(|| u16::try_from(segment).unwrap_or(u16::MAX));
        let segments = payload.1.div_ceil(segment).max(1) as u64;
        self.statistics.segments_out += segments;
        if payload.1 > 0 {
            self.statistics.data_segments_out += segments;
        }
        self.statistics.bytes_sent += payload.1 as u64;
        if !fresh {
            self.statistics.bytes_retransmitted += payload.1 as u64;
            self.statistics.segments_retransmitted += segments;
        }
        self.last_data_sent = env.now;
        self.recovery.reduction.on_sent(end.since(start));
        self.timers.start(Timer::Retransmit, env.now + self.rtt.rto());
        // RFC 3168 (6.1.5): what is sent again isn't marked, so that an old copy can't fake congestion.
        //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.2
        //# New data leaves marked as ECN-capable.
        //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.5
        //# What is sent again is not marked.
        //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.4
        //# Segments without data are not marked.
        let ecn = if self.agreed.ecn && fresh && payload.1 > 0 { ip::ECN_ECT0 } else { 0 };
        self.emission(header, payload, segment_size, ecn)
    }

    fn poll_retransmission(&mut self, env: &Env<'_>) -> Option<Emission> {
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6
        //# If this happens, the sender SHOULD NOT send new data (SHLD-15), but SHOULD retransmit normally the old
        //# unacknowledged data between SND.UNA and SND.UNA+SND.WND (SHLD-16).
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6
        //# The sender MAY also retransmit old data beyond SND.UNA+SND.WND (MAY-7), but SHOULD NOT time out the
        //# connection if data beyond the right window edge is not acknowledged (SHLD-17).
        //= https://www.rfc-editor.org/rfc/rfc2018#section-5.1
        //# What was reported isn't sent again.
        let (index, chunk) = self.snd.next_lost()?;
        let segment = self.segment_size();
        let room = self.congestion.cwnd().saturating_sub(self.snd.pipe());
        let least = segment.min(chunk.len());
        if room < least && self.snd.pipe() > 0 {
            self.usage.limited = true;
            return None;
        }
        let mut len = chunk.len().min(self.packet_limit(env, segment));
        if room < len {
            len = (room / segment * segment).max(least);
        }
        let first = self.recovery.retransmitting_since.is_none();
        let sent = self.snd.retransmit(env.now, index, len);
        if first {
            self.recovery.retransmitting_since = Some(env.now);
            // RFC 6298 (5.1) with the repetition as the segment that is timed.
            self.timers.set(Timer::Retransmit, env.now + self.rtt.rto());
        }
        self.note_retransmission(env, &sent);
        let end = sent.end.min(sent.start + len);
        Some(self.emit_stream(env, sent.start, end, segment, false))
    }

    fn note_retransmission(&mut self, env: &Env<'_>, chunk: &Chunk) {
        let value = timestamp(env.now, self.timestamps.offset);
        if let Some(undo) = &mut self.recovery.undo {
            undo.retransmitted += chunk.len();
            undo.timestamp.get_or_insert(value);
        }
    }

    fn poll_probe(&mut self, env: &Env<'_>) -> Option<Emission> {
        match self.probing.due? {
            ProbeKind::Urgent => {
                // Linux's `tcp_write_wakeup`: the first byte's position, so that the peer takes the pointer as new.
                self.probing.due = Some(ProbeKind::Empty);
                let header = self.acknowledging_header(env, self.snd.una(), Flags::NONE);
                self.statistics.segments_out += 1;
                Some(self.emission(header, (0, 0), None, 0))
            }
            ProbeKind::Empty => {
                self.probing.due = None;
                // RFC 9293 (3.8.4): a position already acknowledged, so that the peer must answer.
                //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.4
                //# An implementation SHOULD send a keep-alive segment with no data (SHLD-12); however, it MAY be
                //# configurable to send a keep-alive segment containing one garbage octet (MAY-6), for compatibility
                //# with erroneous TCP implementations.
                let seq = self.snd.una().back(1);
                let header = self.acknowledging_header(env, seq, Flags::NONE);
                self.statistics.segments_out += 1;
                Some(self.emission(header, (0, 0), None, 0))
            }
            ProbeKind::TailLoss => {
                self.probing.due = None;
                let segment = self.segment_size();
                let window = (self.snd.una() + self.window.size).since(self.snd.nxt());
                let fresh = self.snd.unsent_payload().min(segment).min(window);
                let start = self.snd.nxt();
                // RFC 8985 (7.3): new data if there is any, else the last segment again.
                //= https://www.rfc-editor.org/rfc/rfc8985#section-7.3
                //# If both conditions are met, then the sender SHOULD transmit a previously unsent data segment, if one
                //# exists and the receive window allows
                let emission = if fresh > 0 {
                    let end = start
                        + fresh
                        + usize::from(self.snd.fin_queued() && fresh == self.snd.unsent_payload() && fresh < window);
                    self.snd.transmitted(env.now, end.since(start));
                    self.recovery.probe = Some(Probe { end, retransmission: false });
                    self.emit_stream(env, start, end, segment, true)
                } else {
                    //= https://www.rfc-editor.org/rfc/rfc8985#section-7.3
                    //# If such an unsent segment is not available, then the sender SHOULD retransmit the
                    //# highest-sequence segment sent so far
                    let sent = self.snd.retransmit_tail(env.now, segment)?;
                    self.recovery.probe = Some(Probe { end: self.snd.nxt(), retransmission: true });
                    self.note_retransmission(env, &sent);
                    self.emit_stream(env, sent.start, sent.end, segment, false)
                };
                //= https://www.rfc-editor.org/rfc/rfc8985#section-7.3
                //# the sender MUST re-arm the RTO timer, not the PTO
                self.timers.set(Timer::Retransmit, env.now + self.rtt.rto());
                Some(emission)
            }
        }
    }

    fn poll_new_data(&mut self, env: &Env<'_>) -> Option<Emission> {
        if self.snd.unsent() == 0 {
            return None;
        }
        if self.size.search.is_some()
            && let Some(probe) = self.poll_mtu_probe(env)
        {
            return Some(probe);
        }
        let segment = self.segment_size();
        let len = self.new_data_len(env, segment)?;
        let start = self.snd.nxt();
        let unsent = self.snd.unsent_payload();
        let window = (self.snd.una() + self.window.size).since(start);
        let fin = self.snd.fin_queued() && len == unsent && len < window;
        if len == 0 && !fin {
            return None;
        }
        let end = start + len + usize::from(fin);
        self.probing.force = false;
        let fresh_flight = self.snd.outstanding() == 0;
        self.snd.transmitted(env.now, end.since(start));
        if len % segment != 0 {
            self.small_end = end;
        }
        self.note_usage();
        if fresh_flight {
            self.timers.set(Timer::Retransmit, env.now + self.rtt.rto());
        }
        self.timers.stop(Timer::Persist);
        self.timers.stop(Timer::Cork);
        let emission = self.emit_stream(env, start, end, segment, true);
        self.schedule_loss_probe(env.now);
        if self.snd.memory() + self.rcv.memory() > 0 {
            self.timers.start(Timer::Release, env.now + RELEASE_AFTER);
        }
        Some(emission)
    }

    /// RFC 7661 in Linux's manner: how much of the window was used in the last round trip.
    pub(super) fn note_usage(&mut self) {
        let pipe = self.snd.pipe();
        if self.snd.una() >= self.usage.until || pipe > self.usage.most {
            self.usage.most = pipe;
            self.usage.until = self.snd.nxt();
            self.usage.limited = false;
        }
    }

    /// How many bytes of new data to send now; nothing if it is better to wait. Zero if only a FIN may leave.
    fn new_data_len(&mut self, env: &Env<'_>, segment: usize) -> Option<usize> {
        let unsent = self.snd.unsent_payload();
        let outstanding = self.snd.outstanding();
        let window = (self.snd.una() + self.window.size).since(self.snd.nxt());
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6
        //# If this happens, the sender SHOULD NOT send new data (SHLD-15), but SHOULD retransmit normally the old
        //# unacknowledged data between SND.UNA and SND.UNA+SND.WND (SHLD-16).
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6
        //# However, a sending TCP peer MUST be robust against window shrinking, which may cause the "usable window"
        //# (see Section 3.8.6.2.1) to become negative (MUST-34).
        let congestion = self.congestion.cwnd().saturating_sub(self.snd.pipe());
        if unsent == 0 {
            // Only the FIN is left. It needs window, but no congestion window.
            if window == 0 {
                self.wait_for_window(env);
                return None;
            }
            return Some(0);
        }
        if window == 0 {
            self.wait_for_window(env);
            return None;
        }
        if congestion < segment.min(unsent) {
            self.usage.limited = true;
            return None;
        }
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.2
        //# However, a TCP implementation SHOULD send a maximum-sized segment whenever possible (SHLD-28) to improve
        //# performance (see Section 3.8.6.2.1).
        let permitted = window.min(congestion);
        let packet = self.packet_limit(env, segment);
        let wanted = unsent.min(packet);
        if permitted < wanted {
            return self.limited_len(env, permitted, wanted, segment, congestion <= window);
        }
        if wanted < unsent {
            return Some(wanted);
        }
        // Everything that is queued fits; its last segment may be partial.
        let tail = unsent % segment;
        if tail == 0 || self.snd.fin_queued() || !self.holds_back(env, outstanding) {
            return Some(unsent);
        }
        let whole = unsent - tail;
        (whole > 0).then_some(whole)
    }

    /// A window permits less than is wanted: full segments only (RFC 9293, 3.8.6.2.1), and rather a large packet soon
    /// than a small one now.
    fn limited_len(
        &mut self,
        env: &Env<'_>,
        permitted: usize,
        wanted: usize,
        segment: usize,
        by_congestion: bool,
    ) -> Option<usize> {
        if by_congestion {
            self.usage.limited = true;
        }
        let outstanding = self.snd.outstanding();
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.2.1
        //# A TCP implementation MUST include a SWS avoidance algorithm in the sender (MUST-38).
        let whole = permitted / segment * segment;
        if whole == 0 {
            if permitted >= self.window.largest / 2 || (self.probing.force && outstanding == 0) {
                return Some(permitted);
            }
            self.wait_for_window(env);
            return None;
        }
        // Linux's `tcp_tso_should_defer`.
        let enough = (self.window.size.min(self.congestion.cwnd()) / 3).max(segment);
        let may_defer =
            outstanding > 0 && matches!(self.recovery.phase, Phase::Open) && whole < enough && whole < wanted;
        if may_defer {
            let age = self.snd.first_chunk().map_or(Duration::ZERO, |chunk| env.now.since(chunk.sent_at));
            if age * 2 >= self.rtt.smoothed().unwrap_or_default() {
                return None;
            }
        }
        Some(whole)
    }

    /// Nagle's algorithm in Minshall's variant, and the cork.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.4
    //# A TCP implementation SHOULD implement the Nagle algorithm to coalesce short segments (SHLD-7).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.2
    //# When an application issues a series of SEND calls without setting the PUSH flag, the TCP implementation MAY
    //# aggregate the data internally without sending it (MAY-16).
    //= https://www.rfc-editor.org/rfc/rfc1122#section-4.2.3.4
    //# A partial segment leaves once nothing unacknowledged is outstanding.
    fn holds_back(&mut self, env: &Env<'_>, outstanding: usize) -> bool {
        if self.uncorked > self.snd.nxt() || self.snd.is_urgent() {
            return false;
        }
        if env.options.cork {
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.2
            //# (1) MUST NOT buffer data indefinitely (MUST-60), and (2) MUST set the PSH bit in the last buffered
            //# segment (i.e., when there is no more queued data to be sent) (MUST-61).
            self.timers.start(Timer::Cork, env.now + CORK_MAX);
            return true;
        }
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.4
        //# However, there MUST be a way for an application to disable the Nagle algorithm on an individual connection
        //# (MUST-17).
        !env.options.nodelay && outstanding > 0 && self.small_end > self.snd.una()
    }

    /// Nothing can leave for want of window. If nothing is in flight, nobody else will say when it opens.
    fn wait_for_window(&mut self, env: &Env<'_>) {
        if self.snd.outstanding() == 0 {
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.1
            //# Probing of zero (offered) windows MUST be supported (MUST-36).
            self.probing.window_closed_at.get_or_insert(env.now);
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.1
            //# The transmitting host SHOULD send the first zero-window probe when a zero window has existed for the
            //# retransmission timeout period (SHLD-29) (Section 3.8.1), and SHOULD increase exponentially the interval
            //# between successive probes (SHLD-30).
            self.timers.start(Timer::Persist, env.now + self.rtt.rto());
        }
    }

    fn poll_acknowledgment(&mut self, env: &Env<'_>) -> Option<Emission> {
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.10.7.4
        //# In general, the processing of received segments MUST be implemented to aggregate ACK segments whenever
        //# possible (MUST-58).
        if !self.acking.now {
            return None;
        }
        let header = self.acknowledging_header(env, self.snd.nxt(), Flags::NONE);
        self.statistics.segments_out += 1;
        Some(self.emission(header, (0, 0), None, 0))
    }
}
