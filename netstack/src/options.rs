//! Options of a TCP socket, with the meanings and defaults Linux gives them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::time::is_measurable;

/// A congestion control algorithm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Congestion {
    /// RFC 9438, with HyStart++ (RFC 9406)
    #[default]
    Cubic,
    /// NewReno, RFC 5681 and RFC 6582
    Reno,
}

impl Congestion {
    /// The name `TCP_CONGESTION` uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Congestion::Cubic => "cubic",
            Congestion::Reno => "reno",
        }
    }

    /// The algorithm `TCP_CONGESTION` calls `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Congestion::Cubic, Congestion::Reno].into_iter().find(|algorithm| algorithm.name() == name)
    }
}

/// One option to set; the comment names the `setsockopt` it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TcpOption {
    /// `TCP_NODELAY`
    NoDelay(bool),
    /// `TCP_CORK`
    Cork(bool),
    /// `TCP_QUICKACK`
    QuickAck(bool),
    /// `SO_KEEPALIVE`
    KeepAlive(bool),
    /// `TCP_KEEPIDLE`
    KeepIdle(Duration),
    /// `TCP_KEEPINTVL`
    KeepInterval(Duration),
    /// `TCP_KEEPCNT`
    KeepCount(u8),
    /// `TCP_USER_TIMEOUT`; zero stands for the default
    UserTimeout(Duration),
    /// `TCP_MAXSEG`; zero stands for the path's own
    MaxSegment(u16),
    /// `TCP_LINGER2`: life of an orphan in FIN-WAIT-2; `None` (a negative value) ends it at once
    Linger2(Option<Duration>),
    /// `TCP_DEFER_ACCEPT`; zero switches it off
    DeferAccept(Duration),
    /// `TCP_SYNCNT`
    SynCount(u8),
    /// `TCP_WINDOW_CLAMP`; zero stands for none
    WindowClamp(u32),
    /// `TCP_NOTSENT_LOWAT`
    NotSentLowat(u32),
    /// `TCP_CONGESTION`
    Congestion(Congestion),
    /// `SO_SNDBUF`, in bytes as the program gave it; switches autotuning off
    SendBuffer(usize),
    /// `SO_RCVBUF`, in bytes as the program gave it; switches autotuning off
    ReceiveBuffer(usize),
    /// `SO_RCVLOWAT`
    ReceiveLowat(usize),
    /// `IP_TOS` or `IPV6_TCLASS`
    Tos(u8),
    /// `IP_TTL` or `IPV6_UNICAST_HOPS`
    Ttl(u8),
    /// `IPV6_V6ONLY`
    V6Only(bool),
    /// `SO_REUSEADDR`
    ReuseAddress(bool),
    /// `SO_REUSEPORT`
    ReusePort(bool),
    /// `IP_FREEBIND`: bind to addresses that are not the host's own
    FreeBind(bool),
    /// `SO_OOBINLINE`
    OobInline(bool),
}

/// All options of a socket. An accepted connection inherits its listener's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpOptions {
    /// `TCP_NODELAY`: small segments leave at once
    pub nodelay: bool,
    /// `TCP_CORK`: only full segments leave, or what waited for 200 ms
    pub cork: bool,
    /// `TCP_QUICKACK`: acknowledge at once
    pub quickack: bool,
    /// `SO_KEEPALIVE`
    pub keepalive: bool,
    /// `TCP_KEEPIDLE`
    pub keep_idle: Duration,
    /// `TCP_KEEPINTVL`
    pub keep_interval: Duration,
    /// `TCP_KEEPCNT`
    pub keep_count: u8,
    /// `TCP_USER_TIMEOUT`; zero stands for the default
    pub user_timeout: Duration,
    /// `TCP_MAXSEG`; zero stands for the path's own
    pub max_segment: u16,
    /// `TCP_LINGER2`: life of an orphan in FIN-WAIT-2; `None` ends it at once
    pub linger2: Option<Duration>,
    /// `TCP_DEFER_ACCEPT`; zero is off
    pub defer_accept: Duration,
    /// `TCP_SYNCNT`
    pub syn_count: u8,
    /// `TCP_WINDOW_CLAMP`; zero is none
    pub window_clamp: u32,
    /// `TCP_NOTSENT_LOWAT`; zero and `u32::MAX` are none
    pub notsent_lowat: u32,
    /// `TCP_CONGESTION`
    pub congestion: Congestion,
    /// `SO_SNDBUF` as set by the program; `None` is autotuned
    pub send_buffer: Option<usize>,
    /// `SO_RCVBUF` as set by the program; `None` is autotuned
    pub receive_buffer: Option<usize>,
    /// `SO_RCVLOWAT`
    pub receive_lowat: usize,
    /// `IP_TOS` or `IPV6_TCLASS`
    pub tos: u8,
    /// `IP_TTL` or `IPV6_UNICAST_HOPS`
    pub ttl: u8,
    /// `IPV6_V6ONLY`
    pub v6only: bool,
    /// `SO_REUSEADDR`
    pub reuse_address: bool,
    /// `SO_REUSEPORT`
    pub reuse_port: bool,
    /// `IP_FREEBIND`
    pub free_bind: bool,
    /// `SO_OOBINLINE`
    pub oob_inline: bool,
}

impl Default for TcpOptions {
    fn default() -> Self {
        TcpOptions {
            nodelay: false,
            cork: false,
            quickack: true,
            keepalive: false,
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.4
            //# This interval MUST be configurable (MUST-27) and MUST default to no less than two hours (MUST-28).
            keep_idle: Duration::from_secs(7200),
            keep_interval: Duration::from_secs(75),
            keep_count: 9,
            user_timeout: Duration::ZERO,
            max_segment: 0,
            linger2: Some(Duration::from_secs(60)),
            defer_accept: Duration::ZERO,
            syn_count: 6,
            window_clamp: 0,
            notsent_lowat: 0,
            congestion: Congestion::default(),
            send_buffer: None,
            receive_buffer: None,
            receive_lowat: 1,
            tos: 0,
            ttl: 64,
            v6only: false,
            reuse_address: false,
            reuse_port: false,
            free_bind: false,
            oob_inline: false,
        }
    }
}

impl TcpOptions {
    /// Whether the times can be calculated with; for images.
    pub(crate) fn is_consistent(&self) -> bool {
        let times = [self.keep_idle, self.keep_interval, self.user_timeout, self.defer_accept];
        times.into_iter().chain(self.linger2).all(is_measurable)
    }

    /// Sets one option.
    /// Sets one.
    pub fn set(&mut self, option: TcpOption) {
        match option {
            TcpOption::NoDelay(value) => self.nodelay = value,
            TcpOption::Cork(value) => self.cork = value,
            TcpOption::QuickAck(value) => self.quickack = value,
            TcpOption::KeepAlive(value) => self.keepalive = value,
            TcpOption::KeepIdle(value) => self.keep_idle = value,
            TcpOption::KeepInterval(value) => self.keep_interval = value,
            TcpOption::KeepCount(value) => self.keep_count = value,
            TcpOption::UserTimeout(value) => self.user_timeout = value,
            TcpOption::MaxSegment(value) => self.max_segment = value,
            TcpOption::Linger2(value) => self.linger2 = value,
            TcpOption::DeferAccept(value) => self.defer_accept = value,
            TcpOption::SynCount(value) => self.syn_count = value,
            TcpOption::WindowClamp(value) => self.window_clamp = value,
            TcpOption::NotSentLowat(value) => self.notsent_lowat = value,
            TcpOption::Congestion(value) => self.congestion = value,
            TcpOption::SendBuffer(value) => self.send_buffer = Some(value),
            TcpOption::ReceiveBuffer(value) => self.receive_buffer = Some(value),
            TcpOption::ReceiveLowat(value) => self.receive_lowat = value,
            TcpOption::Tos(value) => self.tos = value,
            TcpOption::Ttl(value) => self.ttl = value,
            TcpOption::V6Only(value) => self.v6only = value,
            TcpOption::ReuseAddress(value) => self.reuse_address = value,
            TcpOption::ReusePort(value) => self.reuse_port = value,
            TcpOption::FreeBind(value) => self.free_bind = value,
            TcpOption::OobInline(value) => self.oob_inline = value,
        }
    }
}
