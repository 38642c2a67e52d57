//! A connection from SYN-SENT or ESTABLISHED to its end.
//!
//! Half-open connections of a listener and connections in TIME-WAIT are small records of their own
//! ([`super::half_open`], [`super::time_wait`]); everything else is this.
//!
//! * [`input`]: what a segment means, state by state.
//! * [`acknowledge`]: what an acknowledgment means for what is in flight.
//! * [`output`]: what to send next.
//! * [`timeout`]: what the timers do.
//!
//! A connection is plain data and holds its whole state: serializing it is freezing it.

mod acknowledge;
mod input;
mod output;
mod timeout;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(crate) use self::input::Verdict;
pub(crate) use self::output::Emission;
use super::congestion::Controller;
use super::half_open::HalfOpen;
use super::receive::Receiver;
use super::recovery::{Phase, Recovery};
use super::rtt::RttEstimator;
use super::send::Sender;
use super::seq::Seq;
use super::time_wait::{self, TimeWait};
use super::timers::{Timer, Timers};
use super::{Agreed, Env, MSS_MIN, Tuple, default_mss};
use crate::{Instant, SocketError, State, TcpInfo, ip};

/// Room for sending before the congestion window asks for more.
const INITIAL_SEND_LIMIT: usize = 256 << 10;
/// Empty buffers up to this size are freed at once, larger ones when the connection has been idle for a while.
const KEEP_SMALL: usize = 16 << 10;
/// Idle time after which empty buffers are freed.
const RELEASE_AFTER: Duration = Duration::from_secs(2);
/// Acknowledgments sent at once at the start, so that the peer's window opens quickly (Linux: `TCP_MAX_QUICKACKS`).
const QUICK_ACKS: u8 = 16;

/// What the peer lets this side send.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct SendWindow {
    size: usize,
    /// The largest ever told (RFC 9293, 3.8.6.2.1).
    largest: usize,
    /// SND.WL1
    updated_by_seq: Seq,
    /// SND.WL2
    updated_by_ack: Seq,
    scale: u8,
}

/// Segment sizes, without options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct SegmentSize {
    /// What the peer takes.
    peer: u16,
    /// What this side told the peer.
    own: u16,
    /// Largest packet the path carries.
    path_mtu: u32,
    /// When to try again what the link itself carries (RFC 1191, 6.3).
    raise_at: Option<Instant>,
    /// How often packets seemed to vanish for their size.
    black_holes: u8,
    /// Largest segment seen from the peer.
    received: u16,
}

/// Timestamps (RFC 7323).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Timestamps {
    offset: u32,
    /// TS.Recent
    recent: u32,
    recent_at: Instant,
    /// Last.ACK.sent
    last_ack_sent: Seq,
}

/// Which acknowledgment is owed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Acknowledging {
    /// Send one now.
    now: bool,
    /// One is owed, soon.
    owed: bool,
    /// Acknowledgments left to send without delay.
    quick: u8,
    /// The program answers what it gets, so acknowledgments ride on its data (Linux: pingpong mode).
    interactive: bool,
    last_challenge: Option<Instant>,
}

/// Explicit congestion notification (RFC 3168).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Ecn {
    /// Tell the peer about congestion until it confirms.
    echo: bool,
    /// Confirm with the next new data.
    confirm: bool,
}

/// How much of the congestion window was used.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Usage {
    limited: bool,
    most: usize,
    until: Seq,
}

/// Probing a peer that is silent or lets nothing be sent.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Probing {
    /// Zero-window probes without an answer.
    window_probes: u8,
    /// When the window closed.
    window_closed_at: Option<Instant>,
    /// Keepalive probes without an answer.
    keepalives: u8,
    /// A probe is to leave now.
    due: Option<ProbeKind>,
    /// The override of silly-window avoidance is due.
    force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum ProbeKind {
    /// An old byte's position, without the byte: the peer must answer.
    Empty,
    /// Tail loss probe.
    TailLoss,
}

/// Counters for `TCP_INFO`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Statistics {
    bytes_acked: u64,
    bytes_received: u64,
    bytes_sent: u64,
    bytes_retransmitted: u64,
    segments_out: u64,
    segments_in: u64,
    data_segments_out: u64,
    data_segments_in: u64,
    segments_retransmitted: u64,
    duplicates_reported: u64,
    out_of_order: u64,
    delivered: u64,
    delivered_marked: u64,
}

/// A connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Connection {
    pub(crate) tuple: Tuple,
    pub(crate) state: State,
    /// This side opened it.
    active: bool,
    /// The program has closed it: nobody will read, and nobody cares how it ends.
    pub(crate) orphan: bool,
    /// `shutdown(SHUT_RD)`: what arrives is thrown away.
    read_shut: bool,
    /// The peer is this host.
    pub(crate) looped: bool,
    snd: Sender,
    rcv: Receiver,
    window: SendWindow,
    size: SegmentSize,
    agreed: Agreed,
    timestamps: Timestamps,
    rtt: RttEstimator,
    congestion: Controller,
    recovery: Recovery,
    usage: Usage,
    timers: Timers,
    acking: Acknowledging,
    ecn: Ecn,
    probing: Probing,
    /// The SYN or SYN-ACK is to leave now.
    syn_due: bool,
    /// How often it left again.
    syn_repeated: u8,
    syn_sent_at: Instant,
    /// End of the last segment that wasn't full (Minshall's variant of Nagle's algorithm).
    small_end: Seq,
    /// What is corked leaves all the same up to here.
    uncorked: Seq,
    /// Urgent data ends here (RFC 6093), as told by the peer.
    urgent: Option<Seq>,
    /// Error reported by ICMP, which matters only if the connection times out (RFC 1122, 4.2.3.9).
    soft_error: Option<SocketError>,
    last_data_sent: Instant,
    last_data_received: Instant,
    last_ack_received: Instant,
    last_received: Instant,
    flow_label: u32,
    identification: u16,
    statistics: Statistics,
}

/// What a new connection gets from its stack.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beginning {
    pub(crate) tuple: Tuple,
    pub(crate) iss: u32,
    pub(crate) timestamp_offset: u32,
    pub(crate) flow_label: u32,
    pub(crate) looped: bool,
}

/// Largest packet to a peer on the link, or to this host itself.
pub(crate) fn path_mtu(config: &crate::Config, looped: bool) -> usize {
    if looped { 65_535 } else { config.mtu.clamp(576, 65_535) }
}

/// The MSS that packets of `mtu` bytes have room for.
pub(crate) fn mss_of(mtu: usize, address: std::net::IpAddr) -> u16 {
    u16::try_from(mtu.saturating_sub(ip::header_len(address) + 20)).unwrap_or(u16::MAX).max(MSS_MIN)
}

/// The MSS this side tells a peer.
pub(crate) fn own_mss(env: &Env<'_>, tuple: &Tuple, looped: bool) -> u16 {
    let own = mss_of(path_mtu(env.config, looped), tuple.remote);
    match env.options.max_segment {
        0 => own,
        set => own.min(set).max(MSS_MIN),
    }
}

/// The largest receive window worth asking for.
pub(crate) fn receive_limit(env: &Env<'_>) -> usize {
    let limit = env.options.receive_buffer.unwrap_or(env.config.receive_buffer);
    match env.options.window_clamp {
        0 => limit,
        clamp => limit.min(clamp as usize),
    }
}

impl Connection {
    fn new(env: &Env<'_>, beginning: Beginning, state: State) -> Self {
        let Beginning { tuple, iss, timestamp_offset, flow_label, looped } = beginning;
        let now = env.now;
        let own = own_mss(env, &tuple, looped);
        let fixed = env.options.receive_buffer.map(|_| receive_limit(env));
        let mut connection = Connection {
            tuple,
            state,
            active: state == State::SynSent,
            orphan: false,
            read_shut: false,
            looped,
            snd: Sender::new(Seq::initial(iss)),
            rcv: Receiver::new(fixed, receive_limit(env)),
            window: SendWindow::default(),
            size: SegmentSize {
                peer: default_mss(tuple.local),
                own,
                path_mtu: u32::try_from(path_mtu(env.config, looped)).unwrap_or(65_535),
                raise_at: None,
                black_holes: 0,
                received: default_mss(tuple.local),
            },
            agreed: Agreed::default(),
            timestamps: Timestamps { offset: timestamp_offset, ..Timestamps::default() },
            rtt: RttEstimator::default(),
            congestion: Controller::new(env.options.congestion, usize::from(own)),
            recovery: Recovery::default(),
            usage: Usage::default(),
            timers: Timers::default(),
            acking: Acknowledging { quick: QUICK_ACKS, ..Acknowledging::default() },
            ecn: Ecn::default(),
            probing: Probing::default(),
            syn_due: false,
            syn_repeated: 0,
            syn_sent_at: now,
            small_end: Seq::default(),
            uncorked: Seq::default(),
            urgent: None,
            soft_error: None,
            last_data_sent: now,
            last_data_received: now,
            last_ack_received: now,
            last_received: now,
            flow_label,
            identification: (iss >> 8) as u16,
            statistics: Statistics::default(),
        };
        connection.small_end = connection.snd.iss();
        connection
    }

    /// Opens a connection: SYN-SENT.
    pub(crate) fn connect(env: &Env<'_>, beginning: Beginning) -> Self {
        let mut connection = Connection::new(env, beginning, State::SynSent);
        connection.syn_due = true;
        connection
    }

    /// A half-open connection was confirmed: ESTABLISHED.
    pub(crate) fn accept(env: &Env<'_>, half: &HalfOpen, flow_label: u32, looped: bool) -> Self {
        let beginning =
            Beginning { tuple: half.tuple, iss: half.iss, timestamp_offset: half.timestamp_offset, flow_label, looped };
        let mut connection = Connection::new(env, beginning, State::SynReceived);
        connection.snd.syn_sent();
        connection.syn_repeated = half.timeouts;
        connection.syn_sent_at = half.sent_at;
        connection.size.own = half.own_mss;
        connection.agree(half.agreed, half.peer_mss, half.snd_scale);
        connection.timestamps.recent = half.timestamp_recent;
        connection.timestamps.recent_at = half.timestamp_recent_at;
        let irs = Seq::initial(half.irs);
        connection.rcv.synchronize(irs, half.rcv_scale, usize::from(half.offered));
        connection.timestamps.last_ack_sent = irs + 1;
        if let Some(rtt) = half.round_trip(env.now) {
            connection.rtt.sample(env.now, rtt);
        }
        connection
    }

    fn agree(&mut self, agreed: Agreed, peer_mss: u16, snd_scale: u8) {
        self.agreed = agreed;
        self.size.peer = peer_mss;
        self.window.scale = snd_scale;
    }

    /// The handshake is complete.
    fn establish(&mut self, env: &Env<'_>) {
        self.state = State::Established;
        self.snd.syn_acked();
        self.recovery.point = self.snd.una();
        self.timers.stop(Timer::Retransmit);
        self.rtt.reset_backoff();
        self.congestion.start(self.mss(), self.syn_repeated > 0);
        self.set_keepalive(env);
    }

    // ---- what the program does

    /// Most that may be queued.
    fn send_limit(&self, env: &Env<'_>) -> usize {
        match env.options.send_buffer {
            Some(limit) => limit.max(4096),
            None => (2 * self.congestion.cwnd()).max(INITIAL_SEND_LIMIT).min(env.config.send_buffer),
        }
    }

    /// Whether the program may still send.
    pub(crate) const fn can_send(&self) -> bool {
        matches!(self.state, State::Established | State::CloseWait | State::SynSent | State::SynReceived)
            && !self.snd.fin_queued()
    }

    pub(crate) fn send_space(&self, env: &Env<'_>) -> usize {
        if !self.can_send() || matches!(self.state, State::SynSent | State::SynReceived) {
            return 0;
        }
        let space = self.send_limit(env).saturating_sub(self.snd.queued());
        match env.options.notsent_lowat {
            u32::MAX => space,
            low => space.min((low as usize).saturating_sub(self.snd.unsent_payload())),
        }
    }

    pub(crate) const fn readable(&self) -> usize {
        self.rcv.readable()
    }

    pub(crate) const fn peer_closed(&self) -> bool {
        self.rcv.finished()
    }

    pub(crate) fn unsent(&self) -> usize {
        self.snd.unsent_payload()
    }

    pub(crate) fn unacked(&self) -> usize {
        self.snd.outstanding()
    }

    pub(crate) fn send_with(&mut self, env: &Env<'_>, fill: impl FnOnce([&mut [u8]; 2]) -> usize) -> usize {
        let space = self.send_space(env);
        let room = self.snd.room(space);
        let available = room[0].len() + room[1].len();
        let written = fill(room).min(available);
        self.snd.commit(written);
        self.before_sending(env);
        written
    }

    /// Queues beyond the limit.
    pub(crate) fn send_over(&mut self, env: &Env<'_>, bytes: &[u8]) {
        self.snd.append(bytes);
        self.before_sending(env);
    }

    /// RFC 5681 (4.1): after an idle time the window is no longer known to be right.
    fn before_sending(&mut self, env: &Env<'_>) {
        if self.snd.outstanding() == 0 && self.state != State::SynSent {
            let idle = env.now.since(self.last_data_sent);
            let mss = self.mss();
            if idle > self.rtt.rto() {
                self.congestion.on_idle(idle, self.rtt.rto(), mss);
                self.last_data_sent = env.now;
            }
        }
        if env.now.since(self.last_data_received) < DELAYED_ACK_MAX && self.acking.owed {
            self.acking.interactive = true;
        }
    }

    pub(crate) fn receive_with(&mut self, env: &Env<'_>, take: impl FnOnce([&[u8]; 2]) -> usize) -> usize {
        let taken = take(self.rcv.readable_parts()).min(self.rcv.readable());
        if taken > 0 {
            let before = self.rcv.window();
            self.rcv.consume(env.now, taken, self.rtt.smoothed());
            self.rcv.release_small(KEEP_SMALL);
            self.after_reading(before);
        }
        taken
    }

    /// Linux's `__tcp_cleanup_rbuf`: tell the peer when its window has at least doubled, or when all is read.
    fn after_reading(&mut self, window_told: usize) {
        if self.rcv.finished() || !self.is_synchronized() {
            return;
        }
        let possible = self.rcv.window_to_offer();
        let segment = usize::from(self.size.own).min(self.rcv.limit() / 2);
        if possible >= 2 * window_told && possible >= window_told + segment {
            self.acking.now = true;
        }
        if self.acking.owed && !self.acking.interactive && self.rcv.readable() == 0 {
            self.acking.now = true;
        }
    }

    /// The program will send no more: FIN after what is queued.
    pub(crate) fn shutdown_write(&mut self) {
        match self.state {
            State::Established | State::SynReceived => self.state = State::FinWait1,
            State::CloseWait => self.state = State::LastAck,
            _ => return,
        }
        self.snd.queue_fin();
    }

    /// The program will read no more.
    pub(crate) fn shutdown_read(&mut self, env: &Env<'_>) {
        self.read_shut = true;
        let unread = self.rcv.readable();
        self.receive_with(env, |_| unread);
    }

    /// The program has closed the socket.
    pub(crate) fn close(&mut self, env: &Env<'_>) {
        self.orphan = true;
        self.shutdown_write();
        self.timers.stop(Timer::KeepAlive);
        if self.state == State::FinWait2 {
            self.start_fin_wait_2(env);
        }
    }

    /// An orphan waits for the peer's FIN only so long.
    fn start_fin_wait_2(&mut self, env: &Env<'_>) {
        if self.orphan {
            let patience = env.options.linger2.unwrap_or(Duration::ZERO);
            self.timers.set(Timer::FinWait2, env.now + patience);
        }
    }

    /// An option was set.
    pub(crate) fn options_changed(&mut self, env: &Env<'_>, option: crate::TcpOption) {
        use crate::TcpOption;
        match option {
            TcpOption::NoDelay(true) | TcpOption::Cork(false) => self.uncorked = self.snd.end(),
            TcpOption::QuickAck(true) => {
                self.acking.interactive = false;
                self.acking.quick = QUICK_ACKS;
                self.acking.now |= self.acking.owed;
            }
            TcpOption::QuickAck(false) => self.acking.interactive = true,
            TcpOption::KeepAlive(_) | TcpOption::KeepIdle(_) | TcpOption::KeepInterval(_) => self.set_keepalive(env),
            TcpOption::ReceiveBuffer(_) | TcpOption::WindowClamp(_) => self.rcv.set_limit(receive_limit(env)),
            TcpOption::Congestion(kind) => self.congestion.switch(kind),
            _ => {}
        }
    }

    fn set_keepalive(&mut self, env: &Env<'_>) {
        if !env.options.keepalive || !self.is_synchronized() || self.orphan {
            self.timers.stop(Timer::KeepAlive);
            return;
        }
        self.timers.set(Timer::KeepAlive, self.last_received + env.options.keep_idle);
    }

    // ---- what others ask

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

    pub(crate) const fn snd_nxt(&self) -> Seq {
        self.snd.nxt()
    }

    pub(crate) const fn rcv_nxt(&self) -> Seq {
        self.rcv.nxt()
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
        let path = mss_of(self.size.path_mtu as usize, self.tuple.remote);
        let whole = usize::from(self.size.peer.min(path));
        whole.saturating_sub(super::segment::Header::options_len(self.agreed.timestamps, 0)).max(16)
    }

    /// The record that takes this connection's place in TIME-WAIT.
    pub(crate) fn to_time_wait(&self, now: Instant, reuse_address: bool) -> TimeWait {
        let window = self.rcv.window();
        TimeWait {
            tuple: self.tuple,
            snd_nxt: self.snd.nxt().wire(),
            rcv_nxt: self.rcv.nxt().wire(),
            window: u16::try_from(window >> self.rcv.scale()).unwrap_or(u16::MAX),
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

    /// After a thaw: speak at once, so that the peer needn't wait for a timer of its own.
    pub(crate) fn speak_after_thaw(&mut self, now: Instant) {
        /// A connection that has been silent for longer has nothing to say.
        const SILENT: Duration = Duration::from_secs(60);
        let active = now.since(self.last_received) < SILENT || now.since(self.last_data_sent) < SILENT;
        let holds =
            self.snd.queued() > 0 || self.rcv.readable() > 0 || self.snd.outstanding() > 0 || self.rcv.has_gaps();
        if self.is_synchronized() && (active || holds) {
            self.acking.now = true;
        }
    }

    /// Whether the parts agree with each other; for images.
    pub(crate) fn is_consistent(&self) -> bool {
        self.snd.is_consistent()
            && self.rcv.is_consistent()
            && self.size.peer >= MSS_MIN
            && self.window.scale <= super::receive::SCALE_MAX
            && self.congestion.cwnd() > 0
            && !matches!(self.state, State::Listen | State::TimeWait)
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

/// How long an acknowledgment waits for company (Linux: `TCP_DELACK_MIN`).
const DELAYED_ACK_MAX: Duration = Duration::from_millis(40);
