//! What `TCP_INFO` tells.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::State;

/// The fields of Linux's `struct tcp_info` that have a meaning here, in plain types. Counts are in segments or bytes as
/// in Linux; units are in the names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TcpInfo {
    /// `tcpi_state`; `None` for a socket that does not exist
    pub state: Option<State>,
    /// `tcpi_ca_state`: 0 open, 1 disorder, 2 CWR, 3 recovery, 4 loss
    pub ca_state: u8,
    /// `tcpi_retransmits`: consecutive RTOs
    pub retransmits: u8,
    /// `tcpi_probes`: unanswered zero-window or keepalive probes
    pub probes: u8,
    /// `tcpi_backoff`
    pub backoff: u8,
    /// timestamps agreed (`TCPI_OPT_TIMESTAMPS`)
    pub timestamps: bool,
    /// SACK agreed (`TCPI_OPT_SACK`)
    pub sack: bool,
    /// window scaling agreed (`TCPI_OPT_WSCALE`)
    pub window_scaling: bool,
    /// ECN agreed (`TCPI_OPT_ECN`)
    pub ecn: bool,
    /// `tcpi_snd_wscale`
    pub snd_wscale: u8,
    /// `tcpi_rcv_wscale`
    pub rcv_wscale: u8,
    /// `tcpi_rto`
    pub rto: Duration,
    /// `tcpi_ato`
    pub ato: Duration,
    /// `tcpi_snd_mss`, bytes
    pub snd_mss: u32,
    /// `tcpi_rcv_mss`, bytes
    pub rcv_mss: u32,
    /// `tcpi_unacked`, segments; for a listener the length of the accept queue
    pub unacked: u32,
    /// `tcpi_sacked`, segments; for a listener the backlog
    pub sacked: u32,
    /// `tcpi_lost`, segments
    pub lost: u32,
    /// `tcpi_retrans`, segments
    pub retrans: u32,
    /// `tcpi_last_data_sent`
    pub last_data_sent: Duration,
    /// `tcpi_last_data_recv`
    pub last_data_recv: Duration,
    /// `tcpi_last_ack_recv`
    pub last_ack_recv: Duration,
    /// `tcpi_pmtu`, bytes
    pub pmtu: u32,
    /// `tcpi_rcv_ssthresh`, bytes
    pub rcv_ssthresh: u32,
    /// `tcpi_rtt`
    pub rtt: Duration,
    /// `tcpi_rttvar`
    pub rttvar: Duration,
    /// `tcpi_snd_ssthresh`, segments
    pub snd_ssthresh: u32,
    /// `tcpi_snd_cwnd`, segments
    pub snd_cwnd: u32,
    /// `tcpi_advmss`, bytes
    pub advmss: u32,
    /// `tcpi_reordering`, segments
    pub reordering: u32,
    /// `tcpi_rcv_rtt`
    pub rcv_rtt: Duration,
    /// `tcpi_rcv_space`, bytes
    pub rcv_space: u32,
    /// `tcpi_total_retrans`, segments
    pub total_retrans: u32,
    /// `tcpi_bytes_acked`
    pub bytes_acked: u64,
    /// `tcpi_bytes_received`
    pub bytes_received: u64,
    /// `tcpi_segs_out`
    pub segs_out: u32,
    /// `tcpi_segs_in`
    pub segs_in: u32,
    /// `tcpi_notsent_bytes`
    pub notsent_bytes: u32,
    /// `tcpi_min_rtt`
    pub min_rtt: Duration,
    /// `tcpi_data_segs_in`
    pub data_segs_in: u32,
    /// `tcpi_data_segs_out`
    pub data_segs_out: u32,
    /// `tcpi_bytes_sent`
    pub bytes_sent: u64,
    /// `tcpi_bytes_retrans`
    pub bytes_retrans: u64,
    /// `tcpi_dsack_dups`
    pub dsack_dups: u32,
    /// `tcpi_reord_seen`
    pub reord_seen: u32,
    /// `tcpi_rcv_ooopack`
    pub rcv_ooopack: u32,
    /// `tcpi_snd_wnd`, bytes
    pub snd_wnd: u32,
    /// `tcpi_rcv_wnd`, bytes
    pub rcv_wnd: u32,
    /// `tcpi_delivered`, segments
    pub delivered: u32,
    /// `tcpi_delivered_ce`, segments
    pub delivered_ce: u32,
}
