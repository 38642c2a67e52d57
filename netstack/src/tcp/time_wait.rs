//! What is left of a connection in TIME-WAIT: enough to answer a repeated FIN and to refuse old segments.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::segment::{Flags, Header, Segment};
use super::seq::wire_before;
use super::{TIMESTAMP_AGE_MAX, Tuple, timestamp};
use crate::Instant;

/// Twice the maximum segment lifetime, as Linux has it (`TCP_TIMEWAIT_LEN`).
//= https://www.rfc-editor.org/rfc/rfc9293#section-3.6.1
//# When a connection is closed actively, it MUST linger in the TIME-WAIT state for a time 2xMSL (Maximum Segment
//# Lifetime) (MUST-13).
pub(crate) const DURATION: Duration = Duration::from_secs(60);
/// Least time between two ACKs, to repeated FINs and to segments outside the window (Linux: `tcp_invalid_ratelimit`).
const ACK_INTERVAL: Duration = Duration::from_millis(500);

/// A connection in TIME-WAIT.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TimeWait {
    pub(crate) tuple: Tuple,
    pub(crate) snd_nxt: u32,
    pub(crate) rcv_nxt: u32,
    /// As last told, scaled.
    pub(crate) window: u16,
    /// In bytes.
    pub(crate) rcv_wnd: u32,
    pub(crate) timestamps: bool,
    pub(crate) timestamp_offset: u32,
    pub(crate) timestamp_recent: u32,
    pub(crate) timestamp_recent_at: Instant,
    pub(crate) acked_at: Option<Instant>,
    pub(crate) ends_at: Instant,
    /// Whether the local port may be bound again meanwhile (`SO_REUSEADDR`).
    pub(crate) reuse_address: bool,
}

/// What a segment means in TIME-WAIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disposition {
    Drop,
    /// Acknowledge; `restart` starts the wait again.
    Acknowledge {
        restart: bool,
    },
    /// A new connection may take the place; its ISN must lie beyond what was used (RFC 6191, RFC 1122 4.2.2.13).
    Reopen,
}

impl TimeWait {
    /// RFC 9293 (3.10.7.4) for TIME-WAIT; RFC 1337: an RST doesn't end it.
    pub(crate) fn judge(&mut self, now: Instant, segment: &Segment<'_>) -> Disposition {
        let value = segment.options.timestamps.map(|(value, _)| value).filter(|_| self.timestamps);
        let stale = value.is_some_and(|value| wire_before(value, self.timestamp_recent))
            && now.since(self.timestamp_recent_at) < TIMESTAMP_AGE_MAX;
        let len = u32::try_from(segment.len()).unwrap_or(u32::MAX);
        //= https://www.rfc-editor.org/rfc/rfc1337#section-3
        //# An RST doesn't end TIME-WAIT.
        if segment.has(Flags::RST) {
            return Disposition::Drop;
        }
        if segment.has(Flags::SYN) && !segment.has(Flags::ACK) && !stale {
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.6.1
            //# However, it MAY accept a new SYN from the remote TCP endpoint to reopen the connection directly from
            //# TIME-WAIT state (MAY-2), if it:
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.6.1
            //# This algorithm for reducing TIME-WAIT is a Best Current Practice that SHOULD be implemented since
            //# Timestamp Options are commonly used, and using them to reduce TIME-WAIT provides benefits for busy
            //# Internet servers (SHLD-4).
            //= https://www.rfc-editor.org/rfc/rfc6191#section-2
            //# A SYN with a newer timestamp or a higher number replaces a connection in TIME-WAIT.
            let newer_sequence = wire_before(self.rcv_nxt, segment.seq);
            let newer_timestamp = value.is_some_and(|value| wire_before(self.timestamp_recent, value));
            if newer_sequence || newer_timestamp {
                return Disposition::Reopen;
            }
        }
        let exact = segment.seq == self.rcv_nxt && len == 0;
        if !stale && exact && !segment.has(Flags::SYN) {
            if let Some(value) = value {
                self.timestamp_recent = value;
                self.timestamp_recent_at = now;
            }
            return Disposition::Drop;
        }
        let repeated_fin = segment.has(Flags::FIN) && segment.seq.wrapping_add(len) == self.rcv_nxt;
        if self.acked_at.is_some_and(|at| now.since(at) < ACK_INTERVAL) {
            return Disposition::Drop;
        }
        self.acked_at = Some(now);
        Disposition::Acknowledge { restart: repeated_fin }
    }

    /// The ACK that answers.
    pub(crate) fn ack(&self, now: Instant) -> Header {
        Header {
            source_port: self.tuple.local_port,
            destination_port: self.tuple.remote_port,
            seq: self.snd_nxt,
            ack: self.rcv_nxt,
            flags: Flags::ACK,
            window: self.window,
            timestamps: self.timestamps.then(|| (timestamp(now, self.timestamp_offset), self.timestamp_recent)),
            ..Header::default()
        }
    }

    /// An ISN for a connection that takes the place, certainly beyond what this one used.
    pub(crate) const fn successor_isn(&self) -> u32 {
        self.snd_nxt.wrapping_add(65_535 + 2)
    }
}
