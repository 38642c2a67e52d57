//! Small packets that belong to no connection: resets, SYN-ACKs, ACKs out of TIME-WAIT, ICMP.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::ip;
use crate::tcp::Tuple;
use crate::tcp::segment::{self, Flags, Segment};

/// Replies that may wait to be sent; in a flood the rest is dropped, as on a full link.
const REPLIES_MAX: usize = 4096;

/// Replies that wait to be sent, each a whole packet.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Replies {
    waiting: VecDeque<Reply>,
}

/// A packet and whether it is for this host itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Reply {
    #[serde(with = "serde_bytes")]
    pub(crate) packet: Vec<u8>,
    pub(crate) looped: bool,
}

impl Replies {
    pub(crate) fn push(&mut self, packet: Vec<u8>, looped: bool) {
        if self.waiting.len() < REPLIES_MAX {
            self.waiting.push_back(Reply { packet, looped });
        }
    }

    /// Puts packets for others in front of those that wait.
    pub(crate) fn push_first(&mut self, packets: Vec<Vec<u8>>) {
        for packet in packets.into_iter().rev() {
            self.waiting.push_front(Reply { packet, looped: false });
        }
    }

    /// Whether each is a packet that can be sent.
    pub(crate) fn is_consistent(&self) -> bool {
        self.waiting.iter().all(|reply| ip::is_whole(&reply.packet))
    }

    /// Those for this host itself.
    pub(crate) fn looped(&self) -> impl Iterator<Item = &[u8]> {
        self.waiting.iter().filter(|reply| reply.looped).map(|reply| reply.packet.as_slice())
    }

    pub(crate) fn pop(&mut self) -> Option<Reply> {
        self.waiting.pop_front()
    }

    /// Queues a TCP segment without payload.
    pub(crate) fn push_segment(&mut self, tuple: &Tuple, header: &segment::Header, options: &Looks, looped: bool) {
        let ip_header = ip::Header {
            source: tuple.local,
            destination: tuple.remote,
            protocol: ip::protocol::TCP,
            hop_limit: options.ttl,
            traffic_class: options.traffic_class & !3,
            identification: 0,
            flow_label: options.flow_label,
        };
        let start = ip_header.len();
        let mut packet = vec![0; start + segment::HEADER_MAX];
        let len = header.write(&mut packet[start..]);
        packet.truncate(start + len);
        ip_header.write(&mut packet, len);
        let pseudo = ip::pseudo_header_sum(tuple.local, tuple.remote, ip::protocol::TCP, len);
        let sum = ip::internet_checksum(pseudo, &[&packet[start..]]);
        packet[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
        self.push(packet, looped);
    }
}

/// What the IP header of a reply says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Looks {
    pub(crate) ttl: u8,
    pub(crate) traffic_class: u8,
    pub(crate) flow_label: u32,
}

impl Default for Looks {
    fn default() -> Self {
        Looks { ttl: 64, traffic_class: 0, flow_label: 0 }
    }
}

/// The RST that answers `segment` (RFC 9293, 3.10.7.1); `None` if it must not be answered.
pub(crate) fn reset_for(tuple: &Tuple, segment: &Segment<'_>) -> Option<segment::Header> {
    if segment.has(Flags::RST) {
        return None;
    }
    let header = segment::Header {
        source_port: tuple.local_port,
        destination_port: tuple.remote_port,
        ..segment::Header::default()
    };
    Some(if segment.has(Flags::ACK) {
        segment::Header { seq: segment.ack, flags: Flags::RST, ..header }
    } else {
        let len = u32::try_from(segment.len()).unwrap_or(u32::MAX);
        segment::Header { ack: segment.seq.wrapping_add(len), flags: Flags::RST.with(Flags::ACK), ..header }
    })
}
