//! `struct tcp_info` of linux/tcp.h, as bytes.

use std::time::Duration;

use netstack::TcpInfo;

/// `TCPI_OPT_*`
const OPT_TIMESTAMPS: u8 = 1;
const OPT_SACK: u8 = 2;
const OPT_WSCALE: u8 = 4;
const OPT_ECN: u8 = 8;
/// Linux's number of a closed socket.
const STATE_CLOSED: u8 = 7;

struct Writer(Vec<u8>);

impl Writer {
    fn byte(&mut self, value: u8) {
        self.0.push(value);
    }

    fn word(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_ne_bytes());
    }

    fn long(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_ne_bytes());
    }

    fn micros(&mut self, value: Duration) {
        self.word(u32::try_from(value.as_micros()).unwrap_or(u32::MAX));
    }

    fn millis(&mut self, value: Duration) {
        self.word(u32::try_from(value.as_millis()).unwrap_or(u32::MAX));
    }
}

/// The structure as of Linux 5.5 (`tcpi_snd_wnd` and before) plus `tcpi_rcv_wnd`; a program gets as much as it asks for.
pub(super) fn encode(info: &TcpInfo) -> Vec<u8> {
    let mut out = Writer(Vec::with_capacity(256));
    let options = [
        (info.timestamps, OPT_TIMESTAMPS),
        (info.sack, OPT_SACK),
        (info.window_scaling, OPT_WSCALE),
        (info.ecn, OPT_ECN),
    ];
    out.byte(info.state.map_or(STATE_CLOSED, netstack::State::linux_number));
    out.byte(info.ca_state);
    out.byte(info.retransmits);
    out.byte(info.probes);
    out.byte(info.backoff);
    out.byte(options.iter().filter(|(on, _)| *on).fold(0, |bits, (_, bit)| bits | bit));
    // Bit fields fill from the low end: the scale to send with, then the scale to receive with.
    out.byte(info.snd_wscale & 0xf | info.rcv_wscale << 4);
    // tcpi_delivery_rate_app_limited and tcpi_fastopen_client_fail
    out.byte(0);
    out.micros(info.rto);
    out.micros(info.ato);
    out.word(info.snd_mss);
    out.word(info.rcv_mss);
    out.word(info.unacked);
    out.word(info.sacked);
    out.word(info.lost);
    out.word(info.retrans);
    // tcpi_fackets, unused since Linux 4.15
    out.word(0);
    out.millis(info.last_data_sent);
    // tcpi_last_ack_sent: "Not remembered, sorry."
    out.word(0);
    out.millis(info.last_data_recv);
    out.millis(info.last_ack_recv);
    out.word(info.pmtu);
    out.word(info.rcv_ssthresh);
    out.micros(info.rtt);
    out.micros(info.rttvar);
    out.word(info.snd_ssthresh);
    out.word(info.snd_cwnd);
    out.word(info.advmss);
    out.word(info.reordering);
    out.micros(info.rcv_rtt);
    out.word(info.rcv_space);
    out.word(info.total_retrans);
    // tcpi_pacing_rate and tcpi_max_pacing_rate: nothing is paced.
    out.long(u64::MAX);
    out.long(u64::MAX);
    out.long(info.bytes_acked);
    out.long(info.bytes_received);
    out.word(info.segs_out);
    out.word(info.segs_in);
    out.word(info.notsent_bytes);
    out.micros(info.min_rtt);
    out.word(info.data_segs_in);
    out.word(info.data_segs_out);
    // tcpi_delivery_rate, tcpi_busy_time, tcpi_rwnd_limited, tcpi_sndbuf_limited: not measured.
    for _ in 0..4 {
        out.long(0);
    }
    out.word(info.delivered);
    out.word(info.delivered_ce);
    out.long(info.bytes_sent);
    out.long(info.bytes_retrans);
    out.word(info.dsack_dups);
    out.word(info.reord_seen);
    out.word(info.rcv_ooopack);
    out.word(info.snd_wnd);
    out.word(info.rcv_wnd);
    // tcpi_rehash
    out.word(0);
    out.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offsets from linux/tcp.h, as pahole shows them.
    #[test]
    fn fields_are_where_programs_look() {
        let info = TcpInfo {
            state: Some(netstack::State::Established),
            snd_mss: 1448,
            rtt: Duration::from_micros(250),
            snd_cwnd: 10,
            total_retrans: 3,
            bytes_acked: 77,
            min_rtt: Duration::from_micros(99),
            snd_wnd: 65_535,
            ..TcpInfo::default()
        };
        let bytes = encode(&info);
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(bytes[0], 1);
        assert_eq!(word(16), 1448);
        assert_eq!(word(68), 250);
        assert_eq!(word(80), 10);
        assert_eq!(word(100), 3);
        assert_eq!(word(120), 77);
        assert_eq!(word(148), 99);
        assert_eq!(word(228), 65_535);
        assert_eq!(bytes.len(), 240);
    }
}
