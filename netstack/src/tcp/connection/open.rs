//! How a connection begins: what it starts with, and the sizes both sides agree on.

use super::super::half_open::HalfOpen;
use super::super::seq::Seq;
use super::super::timers::Timer;
use super::super::{Agreed, Env, MSS_MIN, Tuple, default_mss};
use super::parts::{Acknowledging, Ecn, Probing, SegmentSize, SendWindow, Statistics, Timestamps, Usage};
use super::{Connection, QUICK_ACKS};
use crate::tcp::congestion::Controller;
use crate::tcp::receive::Receiver;
use crate::tcp::recovery::Recovery;
use crate::tcp::rtt::RttEstimator;
use crate::tcp::send::Sender;
use crate::tcp::timers::Timers;
use crate::{State, ip};

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
//= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.1
//# where MMS_R is the maximum size for a transport-layer message that can be received (and reassembled at the IP layer)
//# (MUST-67).
//= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.3
//# As a result, when the effective MTU of an interface varies packet-to-packet, TCP implementations SHOULD use the
//# smallest effective MTU of the interface to calculate the value to advertise in the MSS Option (SHLD-6).
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
                search: None,
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
            opened_at: now,
            small_end: Seq::default(),
            uncorked: Seq::default(),
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
        connection.rcv.set_urgent_inline(env.options.oob_inline);
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

    pub(super) fn agree(&mut self, agreed: Agreed, peer_mss: u16, snd_scale: u8) {
        self.agreed = agreed;
        self.size.peer = peer_mss;
        self.window.scale = snd_scale;
    }

    /// The handshake is complete.
    pub(super) fn establish(&mut self, env: &Env<'_>) {
        self.state = State::Established;
        self.snd.syn_acked();
        self.recovery.point = self.snd.una();
        self.timers.stop(Timer::Retransmit);
        self.rtt.on_established(self.syn_repeated > 0);
        //= https://www.rfc-editor.org/rfc/rfc6928#section-2
        //# If the SYN was lost the first flight is one segment.
        self.congestion.start(self.mss(), self.syn_repeated > 0);
        self.set_keepalive(env);
    }
}
