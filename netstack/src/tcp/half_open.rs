//! A connection that was asked for and not yet confirmed: an entry of a listener's SYN queue.
//!
//! It is a small record rather than a connection, since a flood makes many of them (Linux: `request_sock`).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::cookie;
use super::rtt::{RTO_INITIAL, RTO_MAX};
use super::segment::{Flags, Header, Segment};
use super::seq::wire_before;
use super::{Agreed, MSS_MIN, TIMESTAMP_AGE_MAX, Tuple, default_mss, timestamp};
use crate::Instant;

/// SYN-ACKs sent again before the entry is dropped (Linux: `tcp_synack_retries`).
//= https://www.rfc-editor.org/rfc/rfc4987#section-3.4
//# Half-open connections end after five repeated SYN-ACKs.
pub(crate) const RETRIES_MAX: u8 = 5;

/// Least time between two answers to segments that have no place here (Linux: `tcp_invalid_ratelimit`).
const ANSWER_INTERVAL: Duration = Duration::from_millis(500);

/// How many time-outs of the SYN-ACK `TCP_DEFER_ACCEPT` waits for data (Linux: `secs_to_retrans`).
fn deferred_timeouts(defer: Duration) -> u8 {
    if defer.is_zero() {
        return 0;
    }
    let (mut timeouts, mut timeout, mut waited) = (1u8, RTO_INITIAL, RTO_INITIAL);
    while defer > waited && timeouts < u8::MAX {
        timeouts += 1;
        timeout = (timeout * 2).min(RTO_MAX);
        waited += timeout;
    }
    timeouts
}

/// What this side offers in its SYN-ACK.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer {
    pub(crate) iss: u32,
    pub(crate) mss: u16,
    pub(crate) scale: u8,
    pub(crate) window: usize,
    pub(crate) timestamp_offset: u32,
}

/// A half-open connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct HalfOpen {
    pub(crate) tuple: Tuple,
    /// Slot of the listener.
    pub(crate) listener: u32,
    pub(crate) iss: u32,
    pub(crate) irs: u32,
    pub(crate) agreed: Agreed,
    pub(crate) peer_mss: u16,
    pub(crate) own_mss: u16,
    pub(crate) snd_scale: u8,
    pub(crate) rcv_scale: u8,
    /// The window told in the SYN-ACK.
    pub(crate) offered: u16,
    pub(crate) timestamp_offset: u32,
    pub(crate) timestamp_recent: u32,
    pub(crate) timestamp_recent_at: Instant,
    pub(crate) timeouts: u8,
    pub(crate) created_at: Instant,
    pub(crate) sent_at: Instant,
    /// The final ACK came but the accept queue was full, or no data came with it (`TCP_DEFER_ACCEPT`).
    pub(crate) acked: bool,
    /// When a segment that has no place here was answered last.
    #[serde(default)]
    pub(crate) answered_at: Option<Instant>,
}

/// What a segment means for a half-open connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disposition {
    /// Nothing.
    Drop,
    /// The SYN again: so was the SYN-ACK lost.
    SendSynAck,
    /// Outside the window: tell where this side stands.
    SendAck,
    /// Answer with an RST; the entry stays (RFC 9293, 3.10.7.4).
    Reject,
    /// The peer gave up.
    Remove,
    /// The handshake is complete.
    Complete,
}

/// What to do when a SYN-ACK wasn't answered in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnTimeout {
    SendSynAck,
    /// Until the next deadline.
    Wait,
    Remove,
}

impl HalfOpen {
    /// Judges a SYN and makes the entry for it.
    pub(crate) fn new(tuple: Tuple, listener: u32, now: Instant, syn: &Segment<'_>, offer: Offer, ecn: bool) -> Self {
        let options = &syn.options;
        let scaling = options.window_scale.is_some();
        HalfOpen {
            tuple,
            listener,
            iss: offer.iss,
            irs: syn.seq,
            agreed: Agreed { timestamps: options.timestamps.is_some(), sack: options.sack_permitted, scaling, ecn },
            peer_mss: options.mss.unwrap_or(default_mss(tuple.local)).max(MSS_MIN),
            own_mss: offer.mss,
            //= https://www.rfc-editor.org/rfc/rfc7323#section-2.3
            //# A shift above 14 counts as 14.
            snd_scale: options.window_scale.unwrap_or(0).min(super::receive::SCALE_MAX),
            rcv_scale: if scaling { offer.scale } else { 0 },
            offered: u16::try_from(offer.window).unwrap_or(u16::MAX),
            timestamp_offset: offer.timestamp_offset,
            timestamp_recent: options.timestamps.map_or(0, |(value, _)| value),
            timestamp_recent_at: now,
            timeouts: 0,
            created_at: now,
            sent_at: now,
            acked: false,
            answered_at: None,
        }
    }

    /// Makes the entry again from the final ACK, which brings back a cookie that stood for `mss`.
    pub(crate) fn from_cookie(
        tuple: Tuple,
        listener: u32,
        now: Instant,
        segment: &Segment<'_>,
        offer: Offer,
        mss: u16,
    ) -> Self {
        let (agreed, snd_scale) = match segment.options.timestamps {
            Some((_, echo)) => cookie::decode_options(echo),
            None => (Agreed::default(), 0),
        };
        HalfOpen {
            tuple,
            listener,
            iss: offer.iss,
            irs: segment.seq.wrapping_sub(1),
            agreed,
            peer_mss: mss,
            own_mss: offer.mss,
            snd_scale,
            rcv_scale: if agreed.scaling { offer.scale } else { 0 },
            offered: u16::try_from(offer.window).unwrap_or(u16::MAX),
            timestamp_offset: offer.timestamp_offset,
            timestamp_recent: segment.options.timestamps.map_or(0, |(value, _)| value),
            timestamp_recent_at: now,
            timeouts: 0,
            created_at: now,
            sent_at: now,
            acked: true,
            answered_at: None,
        }
    }

    /// The SYN-ACK.
    pub(crate) fn syn_ack(&self, now: Instant) -> Header {
        Header {
            source_port: self.tuple.local_port,
            destination_port: self.tuple.remote_port,
            seq: self.iss,
            ack: self.irs.wrapping_add(1),
            flags: Flags::SYN.with(Flags::ACK).with_if(self.agreed.ecn, Flags::ECE),
            window: self.offered,
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.1
            //# TCP implementations SHOULD send an MSS Option in every SYN segment when its receive MSS differs from the
            //# default 536 for IPv4 or 1220 for IPv6 (SHLD-5), and MAY send it always (MAY-3).
            mss: Some(self.own_mss),
            window_scale: self.agreed.scaling.then_some(self.rcv_scale),
            //= https://www.rfc-editor.org/rfc/rfc2018#section-2
            //# SACK-permitted is sent only in SYNs, and blocks only if it was received.
            sack_permitted: self.agreed.sack,
            timestamps: self.timestamps(now),
            ..Header::default()
        }
    }

    /// A plain ACK of what has been received, for segments outside the window.
    pub(crate) fn ack(&self, now: Instant) -> Header {
        Header {
            source_port: self.tuple.local_port,
            destination_port: self.tuple.remote_port,
            seq: self.iss.wrapping_add(1),
            ack: self.irs.wrapping_add(1),
            flags: Flags::ACK,
            window: self.offered.div_ceil(1 << self.rcv_scale),
            timestamps: self.timestamps(now),
            ..Header::default()
        }
    }

    fn timestamps(&self, now: Instant) -> Option<(u32, u32)> {
        self.agreed.timestamps.then(|| (timestamp(now, self.timestamp_offset), self.timestamp_recent))
    }

    /// When the SYN-ACK is to be sent again.
    pub(crate) fn deadline(&self) -> Instant {
        self.sent_at + RTO_INITIAL.saturating_mul(1 << self.timeouts.min(7)).min(RTO_MAX)
    }

    /// The deadline came; the listener has `TCP_DEFER_ACCEPT` set to `defer` (Linux: `syn_ack_recalc`).
    pub(crate) fn on_timeout(&mut self, now: Instant, defer: Duration) -> OnTimeout {
        let deferred = deferred_timeouts(defer);
        let waits_for_data = self.acked && deferred > 0;
        if self.timeouts >= RETRIES_MAX && (!waits_for_data || self.timeouts >= deferred) {
            return OnTimeout::Remove;
        }
        // A peer that has acknowledged is left in peace, until at the end of the time its ACK is to come once more.
        let next = self.timeouts.saturating_add(1);
        let quiet = waits_for_data && next < deferred;
        self.timeouts = next;
        self.sent_at = now;
        if quiet { OnTimeout::Wait } else { OnTimeout::SendSynAck }
    }

    /// Whether a bare final ACK isn't enough yet.
    pub(crate) fn waits_for_data(&self, defer: Duration) -> bool {
        self.timeouts < deferred_timeouts(defer)
    }

    /// Whether a segment that has no place here may be answered now. Only segments without data can be part of a loop.
    pub(crate) fn may_answer(&mut self, now: Instant, segment: &Segment<'_>) -> bool {
        if segment.len() > 0 && !segment.has(Flags::SYN) {
            return true;
        }
        let may = self.answered_at.is_none_or(|at| now.since(at) >= ANSWER_INTERVAL);
        if may {
            self.answered_at = Some(now);
        }
        may
    }

    /// Whether the parts agree with each other; for images.
    pub(crate) fn is_consistent(&self) -> bool {
        self.snd_scale <= super::receive::SCALE_MAX
            && self.rcv_scale <= super::receive::SCALE_MAX
            && self.peer_mss >= MSS_MIN
            && self.tuple.local.is_ipv4() == self.tuple.remote.is_ipv4()
    }

    /// How long the handshake has taken, if nothing had to be repeated.
    pub(crate) fn round_trip(&self, now: Instant) -> Option<Duration> {
        (self.timeouts == 0).then(|| now.since(self.sent_at))
    }

    /// RFC 9293 (3.10.7.4) for SYN-RECEIVED, with RFC 5961 and PAWS.
    pub(crate) fn judge(&self, now: Instant, segment: &Segment<'_>) -> Disposition {
        let expected = self.irs.wrapping_add(1);
        let stale = self.agreed.timestamps
            && segment.options.timestamps.is_some_and(|(value, _)| wire_before(value, self.timestamp_recent))
            && now.since(self.timestamp_recent_at) < TIMESTAMP_AGE_MAX;
        if segment.has(Flags::SYN)
            && !segment.has(Flags::ACK)
            && !segment.has(Flags::RST)
            && segment.seq == self.irs
            && !stale
        {
            return Disposition::SendSynAck;
        }
        let window = u32::from(self.offered).max(1);
        let start = segment.seq.wrapping_sub(expected);
        let end = start.wrapping_add(u32::try_from(segment.len()).unwrap_or(u32::MAX));
        let inside = start < window || (segment.len() > 0 && end.wrapping_sub(1) < window);
        if !inside || stale {
            return if segment.has(Flags::RST) { Disposition::Drop } else { Disposition::SendAck };
        }
        if segment.has(Flags::RST) {
            // RFC 5961 (3.2): only an exact hit resets.
            return if segment.seq == expected { Disposition::Remove } else { Disposition::SendAck };
        }
        if segment.has(Flags::SYN) {
            return Disposition::SendAck;
        }
        if !segment.has(Flags::ACK) {
            return Disposition::Drop;
        }
        if segment.ack != self.iss.wrapping_add(1) {
            return Disposition::Reject;
        }
        Disposition::Complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deferring_is_counted_in_time_outs() {
        let counts = [0, 1, 2, 3, 5, 7, 8].map(|seconds| deferred_timeouts(Duration::from_secs(seconds)));
        assert_eq!(counts, [0, 1, 2, 2, 3, 3, 4]);
    }
}
