//! Sockets as `migd inspect --sockets` shows them, after ss(8).

use std::net::SocketAddr;
use std::time::Duration;

use netstack::TcpInfo;
use serde::{Deserialize, Serialize};

use super::bridge::SocketKey;

/// What a socket speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// With a socket of the job's own stack.
    #[default]
    Tcp,
    /// With a socket of the kernel's.
    Udp,
}

impl Protocol {
    /// As ss(8) names it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// A socket of the job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SocketDescription {
    /// What it speaks.
    #[serde(default)]
    pub protocol: Protocol,
    /// The bridge's name of the socket; nothing when no program holds it (yet, or any more).
    pub key: Option<SocketKey>,
    /// Inode of the program's end, as in `/proc/PID/fd`.
    pub inode: Option<u64>,
    /// State, with the names of ss(8).
    pub state: String,
    /// Its own address.
    pub local: Option<SocketAddr>,
    /// Its peer's.
    pub remote: Option<SocketAddr>,
    /// Bytes received and not yet handed over to the program's descriptor; for a listener the connections that wait; for UDP the memory
    /// of the datagrams that wait, as ss(8) shows it.
    pub receive_queue: usize,
    /// Bytes that the peer hasn't acknowledged; for a listener the backlog.
    pub send_queue: usize,
    /// What `TCP_INFO` tells of a connection.
    pub tcp: Option<TcpDetail>,
}

impl SocketDescription {
    /// A socket without a state.
    pub(super) fn closed(local: Option<SocketAddr>, remote: Option<SocketAddr>) -> SocketDescription {
        let state = "UNCONN".to_owned();
        SocketDescription {
            protocol: Protocol::Tcp,
            key: None,
            inode: None,
            state,
            local,
            remote,
            receive_queue: 0,
            send_queue: 0,
            tcp: None,
        }
    }
}

/// The part of `struct tcp_info` that people look at; units are in the names, counts are segments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TcpDetail {
    /// Options agreed with the peer: `ts`, `sack`, `ecn`, `wscale:THEIRS,OURS`.
    pub options: Vec<String>,
    /// Retransmission timeout.
    pub rto_ms: f64,
    /// Consecutive timeouts.
    pub backoff: u8,
    /// Smoothed round-trip time.
    pub rtt_ms: f64,
    /// Its variation.
    pub rtt_var_ms: f64,
    /// The smallest measured.
    pub min_rtt_ms: f64,
    /// Largest segment to send, bytes.
    pub mss: u32,
    /// Path MTU, bytes.
    pub pmtu: u32,
    /// Largest segment received, bytes.
    pub rcv_mss: u32,
    /// What this side announced as its largest segment, bytes.
    pub adv_mss: u32,
    /// `open`, `disorder`, `cwr`, `recovery` or `loss`.
    pub congestion_state: String,
    /// Congestion window.
    pub cwnd: u32,
    /// Slow-start threshold; nothing before the first loss.
    pub ssthresh: Option<u32>,
    /// What window and round-trip time allow: `cwnd * mss / rtt`.
    pub send_bits_per_second: u64,
    /// Bytes sent, retransmissions included.
    pub bytes_sent: u64,
    /// Of those, retransmitted.
    pub bytes_retransmitted: u64,
    /// Bytes that the peer acknowledged.
    pub bytes_acked: u64,
    /// Bytes received in order.
    pub bytes_received: u64,
    /// Segments sent.
    pub segs_out: u32,
    /// Segments received.
    pub segs_in: u32,
    /// Sent and neither acknowledged nor known to be lost.
    pub unacked: u32,
    /// Of those the peer holds.
    pub sacked: u32,
    /// Thought lost.
    pub lost: u32,
    /// Retransmitted and under way.
    pub retrans: u32,
    /// Retransmitted ever.
    pub total_retrans: u32,
    /// Duplicates that the peer reported.
    pub dsack_dups: u32,
    /// Segments seen out of order.
    pub reord_seen: u32,
    /// Segments received out of order.
    pub rcv_ooopack: u32,
    /// Bytes that the program wrote and that have not been sent.
    pub notsent_bytes: u32,
    /// The peer's window, bytes.
    pub snd_wnd: u32,
    /// The window offered to the peer, bytes.
    pub rcv_wnd: u32,
    /// Since data was last sent.
    pub last_send_ms: u64,
    /// Since data last came.
    pub last_receive_ms: u64,
    /// Since an acknowledgement last came.
    pub last_ack_ms: u64,
}

fn milliseconds(time: Duration) -> f64 {
    // Microseconds are as fine as ss(8) shows; f64 holds them exactly for centuries.
    (time.as_micros() as f64) / 1000.0
}

fn whole_milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl From<&TcpInfo> for TcpDetail {
    fn from(info: &TcpInfo) -> TcpDetail {
        let agreed = [(info.timestamps, "ts"), (info.sack, "sack"), (info.ecn, "ecn")];
        let mut options: Vec<String> =
            agreed.into_iter().filter(|(on, _)| *on).map(|(_, name)| name.to_owned()).collect();
        if info.window_scaling {
            options.push(format!("wscale:{},{}", info.snd_wscale, info.rcv_wscale));
        }
        let congestion_state = match info.ca_state {
            0 => "open",
            1 => "disorder",
            2 => "cwr",
            3 => "recovery",
            _ => "loss",
        };
        let window_bits = u64::from(info.snd_cwnd) * u64::from(info.snd_mss) * 8;
        let rtt_us = u64::try_from(info.rtt.as_micros()).unwrap_or(u64::MAX);
        TcpDetail {
            options,
            rto_ms: milliseconds(info.rto),
            backoff: info.backoff,
            rtt_ms: milliseconds(info.rtt),
            rtt_var_ms: milliseconds(info.rttvar),
            min_rtt_ms: milliseconds(info.min_rtt),
            mss: info.snd_mss,
            pmtu: info.pmtu,
            rcv_mss: info.rcv_mss,
            adv_mss: info.advmss,
            congestion_state: congestion_state.to_owned(),
            cwnd: info.snd_cwnd,
            // Linux tells "none yet" by a number that no window reaches.
            ssthresh: (info.snd_ssthresh < 0x7fff_ffff).then_some(info.snd_ssthresh),
            send_bits_per_second: window_bits.saturating_mul(1_000_000).checked_div(rtt_us).unwrap_or(0),
            bytes_sent: info.bytes_sent,
            bytes_retransmitted: info.bytes_retrans,
            bytes_acked: info.bytes_acked,
            bytes_received: info.bytes_received,
            segs_out: info.segs_out,
            segs_in: info.segs_in,
            unacked: info.unacked,
            sacked: info.sacked,
            lost: info.lost,
            retrans: info.retrans,
            total_retrans: info.total_retrans,
            dsack_dups: info.dsack_dups,
            reord_seen: info.reord_seen,
            rcv_ooopack: info.rcv_ooopack,
            notsent_bytes: info.notsent_bytes,
            snd_wnd: info.snd_wnd,
            rcv_wnd: info.rcv_wnd,
            last_send_ms: whole_milliseconds(info.last_data_sent),
            last_receive_ms: whole_milliseconds(info.last_data_recv),
            last_ack_ms: whole_milliseconds(info.last_ack_recv),
        }
    }
}
