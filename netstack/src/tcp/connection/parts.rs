//! What a connection consists of beside its two streams: small records, one idea each.
//!
//! They are plain data, and their fields are the connection's own: [`super::Connection`] is what keeps them in step.

use serde::{Deserialize, Serialize};

use super::super::seq::Seq;
use super::mtu::Search;
use crate::Instant;

/// What the peer lets this side send.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct SendWindow {
    pub(super) size: usize,
    /// The largest ever told (RFC 9293, 3.8.6.2.1).
    pub(super) largest: usize,
    /// SND.WL1
    pub(super) updated_by_seq: Seq,
    /// SND.WL2
    pub(super) updated_by_ack: Seq,
    pub(super) scale: u8,
}

/// Segment sizes, without options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct SegmentSize {
    /// What the peer takes.
    pub(super) peer: u16,
    /// What this side told the peer.
    pub(super) own: u16,
    /// Largest packet the path carries.
    pub(super) path_mtu: u32,
    /// When to search for a larger one (RFC 1191, 6.3).
    pub(super) raise_at: Option<Instant>,
    /// How often packets seemed to vanish for their size.
    pub(super) black_holes: u8,
    /// Largest segment seen from the peer.
    pub(super) received: u16,
    /// The search for the path's largest packet.
    #[serde(default)]
    pub(super) search: Option<Search>,
}

/// Timestamps (RFC 7323).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Timestamps {
    pub(super) offset: u32,
    /// TS.Recent
    pub(super) recent: u32,
    pub(super) recent_at: Instant,
    /// Last.ACK.sent
    pub(super) last_ack_sent: Seq,
}

/// Which acknowledgment is owed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Acknowledging {
    /// Send one now.
    pub(super) now: bool,
    /// Send one as soon as what has arrived is taken in, or so much of it that the peer may wait for window.
    #[serde(default)]
    pub(super) soon: bool,
    /// One is owed, soon.
    pub(super) owed: bool,
    /// Acknowledgments left to send without delay.
    pub(super) quick: u8,
    /// The program answers what it gets, so acknowledgments ride on its data (Linux: pingpong mode).
    pub(super) interactive: bool,
    pub(super) last_challenge: Option<Instant>,
}

/// Explicit congestion notification (RFC 3168).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Ecn {
    /// Tell the peer about congestion until it confirms.
    pub(super) echo: bool,
    /// Confirm with the next new data.
    pub(super) confirm: bool,
}

/// How much of the congestion window was used.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Usage {
    pub(super) limited: bool,
    pub(super) most: usize,
    pub(super) until: Seq,
}

/// Probing a peer that is silent or lets nothing be sent.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Probing {
    /// Zero-window probes without an answer.
    pub(super) window_probes: u8,
    /// When the window closed.
    pub(super) window_closed_at: Option<Instant>,
    /// Keepalive probes without an answer.
    pub(super) keepalives: u8,
    /// A probe is to leave now.
    pub(super) due: Option<ProbeKind>,
    /// The override of silly-window avoidance is due.
    pub(super) force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ProbeKind {
    /// An old byte's position, without the byte: the peer must answer.
    Empty,
    /// Tail loss probe.
    TailLoss,
    /// The urgent pointer, for which a closed window is no obstacle, and then an empty probe.
    Urgent,
}

/// Counters for `TCP_INFO`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Statistics {
    pub(super) bytes_acked: u64,
    pub(super) bytes_received: u64,
    pub(super) bytes_sent: u64,
    pub(super) bytes_retransmitted: u64,
    pub(super) segments_out: u64,
    pub(super) segments_in: u64,
    pub(super) data_segments_out: u64,
    pub(super) data_segments_in: u64,
    pub(super) segments_retransmitted: u64,
    pub(super) duplicates_reported: u64,
    pub(super) out_of_order: u64,
    pub(super) delivered: u64,
    pub(super) delivered_marked: u64,
}

impl Statistics {
    /// Whether there is room to count on; for images.
    pub(super) fn is_consistent(&self) -> bool {
        let Statistics {
            bytes_acked,
            bytes_received,
            bytes_sent,
            bytes_retransmitted,
            segments_out,
            segments_in,
            data_segments_out,
            data_segments_in,
            segments_retransmitted,
            duplicates_reported,
            out_of_order,
            delivered,
            delivered_marked,
        } = *self;
        let all = [
            bytes_acked,
            bytes_received,
            bytes_sent,
            bytes_retransmitted,
            segments_out,
            segments_in,
            data_segments_out,
            data_segments_in,
            segments_retransmitted,
            duplicates_reported,
            out_of_order,
            delivered,
            delivered_marked,
        ];
        all.into_iter().all(|count| count < u64::MAX / 2)
    }
}
