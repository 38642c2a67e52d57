//! What others ask of a connection: for sending its packets, for `TCP_INFO`, for images.

use super::super::recovery::Phase;
use super::super::segment::{Flags, Header};
use super::super::time_wait::{self, TimeWait};
use super::super::timers::Timer;
use super::super::{Env, MSS_MIN, timestamp};
use super::parts::{Acknowledging, Probing};
use super::{Connection, DELAYED_ACK_MAX, mss_of};
use crate::{Instant, State, TcpInfo};

/// What a connection is right after a thaw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterThaw {
    /// Something may be to be done for it.
    Busy,
    /// Nothing waits here, but the peer may have sent something that was lost on the way.
    Idle {
        /// When the two last spoke.
        latest: Instant,
    },
}

impl Connection {
    pub(crate) const fn is_synchronized(&self) -> bool {
        matches!(
            self.state,
            State::Established | State::FinWait1 | State::FinWait2 | State::CloseWait | State::Closing | State::LastAck
        )
    }

    /// Whether a close must tell the peer by RST: Linux sends one in the states where the peer may still care.
    pub(crate) const fn abort_needs_reset(&self) -> bool {
        matches!(
            self.state,
            State::Established | State::FinWait1 | State::FinWait2 | State::CloseWait | State::SynReceived
        )
    }

    /// The RST that tells the peer that the connection is over, with what Linux puts into it.
    pub(crate) fn reset_header(&self, now: Instant) -> Header {
        Header {
            source_port: self.tuple.local_port,
            destination_port: self.tuple.remote_port,
            seq: self.snd.nxt().wire(),
            ack: self.rcv.nxt().wire(),
            flags: Flags::RST.with(Flags::ACK),
            window: self.rcv.window_told(),
            timestamps: self
                .agreed
                .timestamps
                .then(|| (timestamp(now, self.timestamps.offset), self.timestamps.recent)),
            ..Header::default()
        }
    }

    /// When the first SYN left.
    pub(super) const fn opened_at(&self) -> Instant {
        self.opened_at
    }

    /// Whether the peer waits for an acknowledgment.
    pub(crate) const fn owes_acknowledgment(&self) -> bool {
        self.acking.now || self.acking.soon
    }

    /// A stretch of what is queued to be sent.
    pub(crate) fn payload(&self, offset: usize, len: usize) -> [&[u8]; 2] {
        self.snd.payload(offset, len)
    }

    pub(crate) const fn flow_label(&self) -> u32 {
        self.flow_label
    }

    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Payload bytes a segment may carry, the timestamp option allowed for.
    pub(crate) fn mss(&self) -> usize {
        self.mss_without_options().saturating_sub(Header::options_len(self.agreed.timestamps, 0)).max(16)
    }

    /// The same with the option's bytes.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.1
    //# The maximum size of a segment that a TCP endpoint really sends, the "effective send MSS", MUST be the smaller
    //# (MUST-16) of the send MSS (that reflects the available reassembly buffer size at the remote host, the EMTU_R
    //# [19]) and the largest transmission size permitted by the IP layer (EMTU_S [19]):
    pub(super) fn mss_without_options(&self) -> usize {
        usize::from(self.size.peer.min(mss_of(self.size.path_mtu as usize, self.tuple.remote)))
    }

    /// The record that takes this connection's place in TIME-WAIT.
    pub(crate) fn to_time_wait(&self, now: Instant, reuse_address: bool) -> TimeWait {
        let window = self.rcv.window();
        TimeWait {
            tuple: self.tuple,
            snd_nxt: self.snd.nxt().wire(),
            rcv_nxt: self.rcv.nxt().wire(),
            window: self.rcv.window_told(),
            rcv_wnd: u32::try_from(window).unwrap_or(u32::MAX),
            timestamps: self.agreed.timestamps,
            timestamp_offset: self.timestamps.offset,
            timestamp_recent: self.timestamps.recent,
            timestamp_recent_at: self.timestamps.recent_at,
            acked_at: None,
            ends_at: now + time_wait::DURATION,
            reuse_address,
        }
    }

    /// The connection is over; only what is unread stays.
    pub(crate) fn end(&mut self) {
        self.state = State::Closed;
        self.timers.stop_all();
        self.snd.purge();
        self.syn_due = false;
        self.acking = Acknowledging::default();
        self.probing = Probing::default();
    }

    /// Whether an established connection holds nothing, neither for its peer nor for its program.
    pub(crate) fn is_idle(&self) -> bool {
        self.state == State::Established
            && self.snd.queued() == 0
            && self.snd.outstanding() == 0
            && self.rcv.readable() == 0
            && !self.rcv.has_gaps()
    }

    /// After a thaw: one that holds something acknowledges at once, so that the peer needn't wait for a timer of its own.
    pub(crate) fn wake_after_thaw(&mut self, env: &Env<'_>) -> AfterThaw {
        // Images of earlier releases don't have it here.
        self.rcv.set_urgent_inline(env.options.oob_inline);
        if self.is_idle() {
            return AfterThaw::Idle { latest: self.last_received.max(self.last_data_sent) };
        }
        if self.is_synchronized() {
            self.acking.now = true;
        }
        AfterThaw::Busy
    }

    /// After a thaw: acknowledge what came so far, at this time at the latest.
    pub(crate) fn speak_at(&mut self, now: Instant, at: Instant) {
        if at <= now {
            self.acking.now = true;
            return;
        }
        self.acking.owed = true;
        self.timers.start(Timer::DelayedAck, at);
    }

    /// Whether the parts agree with each other; for images.
    pub(crate) fn is_consistent(&self) -> bool {
        self.snd.is_consistent()
            && self.rcv.is_consistent()
            && self.size.peer >= MSS_MIN
            && self.window.scale <= super::super::receive::SCALE_MAX
            && self.congestion.is_consistent()
            && self.statistics.is_consistent()
            && self.rtt.is_consistent()
            && self.recovery.rack.is_consistent()
            && !matches!(self.state, State::Listen | State::TimeWait)
            && (self.state != State::Closed || self.next_timeout().is_none())
            && self.tuple.local.is_ipv4() == self.tuple.remote.is_ipv4()
    }

    pub(crate) fn info(&self, env: &Env<'_>) -> TcpInfo {
        let mss = self.mss().max(1);
        let segments = |bytes: usize| u32::try_from(bytes.div_ceil(mss)).unwrap_or(u32::MAX);
        let narrow = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        let bytes = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let now = env.now;
        let statistics = &self.statistics;
        TcpInfo {
            state: Some(self.state),
            ca_state: match self.recovery.phase {
                Phase::Open if self.snd.sacked() > 0 => 1,
                Phase::Open => 0,
                Phase::Reducing => 2,
                Phase::Recovery => 3,
                Phase::Loss => 4,
            },
            retransmits: self.recovery.timeouts,
            probes: self.probing.window_probes.max(self.probing.keepalives),
            backoff: self.rtt.backoff(),
            timestamps: self.agreed.timestamps,
            sack: self.agreed.sack,
            window_scaling: self.agreed.scaling,
            ecn: self.agreed.ecn,
            snd_wscale: self.window.scale,
            rcv_wscale: self.rcv.scale(),
            rto: self.rtt.rto(),
            ato: DELAYED_ACK_MAX,
            snd_mss: bytes(mss),
            rcv_mss: u32::from(self.size.received),
            unacked: segments(self.snd.outstanding()),
            sacked: segments(self.snd.sacked()),
            lost: segments(self.snd.lost()),
            retrans: segments(self.snd.retransmitted()),
            last_data_sent: now.since(self.last_data_sent),
            last_data_recv: now.since(self.last_data_received),
            last_ack_recv: now.since(self.last_ack_received),
            pmtu: self.size.path_mtu,
            rcv_ssthresh: bytes(self.rcv.limit()),
            rtt: self.rtt.smoothed().unwrap_or_default(),
            rttvar: self.rtt.variance(),
            snd_ssthresh: segments(self.congestion.ssthresh()).min(0x7fff_ffff),
            snd_cwnd: segments(self.congestion.cwnd()),
            advmss: u32::from(self.size.own),
            reordering: if self.recovery.rack.has_reordering() { 300 } else { 3 },
            rcv_rtt: self.rcv.receive_rtt().unwrap_or_default(),
            rcv_space: bytes(self.rcv.limit()),
            total_retrans: narrow(statistics.segments_retransmitted),
            bytes_acked: statistics.bytes_acked,
            bytes_received: statistics.bytes_received,
            segs_out: narrow(statistics.segments_out),
            segs_in: narrow(statistics.segments_in),
            notsent_bytes: bytes(self.snd.unsent_payload()),
            min_rtt: self.rtt.minimum().unwrap_or_default(),
            data_segs_in: narrow(statistics.data_segments_in),
            data_segs_out: narrow(statistics.data_segments_out),
            bytes_sent: statistics.bytes_sent,
            bytes_retrans: statistics.bytes_retransmitted,
            dsack_dups: narrow(statistics.duplicates_reported),
            reord_seen: self.recovery.rack.reorderings,
            rcv_ooopack: narrow(statistics.out_of_order),
            snd_wnd: bytes(self.window.size),
            rcv_wnd: bytes(self.rcv.window()),
            delivered: narrow(statistics.delivered),
            delivered_ce: narrow(statistics.delivered_marked),
        }
    }
}
