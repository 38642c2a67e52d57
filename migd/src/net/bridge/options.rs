//! getsockopt(2) and setsockopt(2), as Linux answers them for TCP.
//!
//! Options of TCP and IP live in the stack. A few of the socket level live here ([`BridgeOptions`]). Some act on the program's end
//! itself, which is a real socket: for these the kernel runs the call, and the bridge takes note for the image. Options that
//! can have no effect here but that Linux accepts are remembered, so that what was set is what is read. The rest
//! gets ENOPROTOOPT, as from a kernel that was built without them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use netstack::{Congestion, TcpOption, TcpOptions};
use sys::fds::sockets;
use sys::seccomp::Notification;
use sys::unix::{self, Timeout};

use super::notify::{Reply, int};
use super::sockaddr::Family;
use super::socket::{BridgeOptions, Phase, Socket, SocketKey};
use super::{Bridge, PAIR_BUFFER, abi, errno, info};

/// `TCP_CA_NAME_MAX`
const CONGESTION_NAME_MAX: usize = 16;
/// `IFNAMSIZ`
const DEVICE_NAME_MAX: usize = 16;
/// `net.core.wmem_max` and `rmem_max` as Linux ships them, for a system that doesn't tell.
const BUFFER_MAX_DEFAULT: i32 = 212_992;
/// `SOCK_MIN_SNDBUF` and `SOCK_MIN_RCVBUF`, halved as the program would give them.
const SEND_BUFFER_MIN: i32 = 2304;
const RECEIVE_BUFFER_MIN: i32 = 1152;
/// Defaults of `net.ipv4.tcp_wmem` and `tcp_rmem`, which a fresh socket shows.
const SEND_BUFFER_DEFAULT: i32 = 16_384;
const RECEIVE_BUFFER_DEFAULT: i32 = 131_072;
/// `MAX_TCP_KEEPIDLE` and `MAX_TCP_KEEPINTVL` in seconds, `MAX_TCP_KEEPCNT`, `MAX_TCP_SYNCNT`.
const KEEP_SECONDS_MAX: i32 = 32_767;
const KEEP_COUNT_MAX: i32 = 127;

const IPV6_AUTOFLOWLABEL: i32 = 70;

/// Options with no effect here that Linux accepts, by level and name; all are ints.
const INERT: [(i32, i32); 28] = [
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (libc::IPPROTO_IP, libc::IP_RECVERR),
    (libc::IPPROTO_IP, libc::IP_PKTINFO),
    (libc::IPPROTO_IP, libc::IP_RECVTOS),
    (libc::IPPROTO_IP, libc::IP_RECVTTL),
    (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (libc::IPPROTO_IP, libc::IP_MINTTL),
    (libc::IPPROTO_IP, libc::IP_RECVORIGDSTADDR),
    (libc::IPPROTO_IP, 51), // IP_LOCAL_PORT_RANGE
    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_ADDR_PREFERENCES),
    (libc::IPPROTO_IPV6, IPV6_AUTOFLOWLABEL),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP),
    (libc::IPPROTO_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS),
    (libc::IPPROTO_TCP, libc::TCP_THIN_DUPACK),
    (libc::IPPROTO_TCP, libc::TCP_FASTOPEN),
    (libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT),
    (libc::IPPROTO_TCP, 34), // TCP_FASTOPEN_NO_COOKIE
    (libc::IPPROTO_TCP, 27), // TCP_SAVE_SYN
    (libc::IPPROTO_TCP, 37), // TCP_TX_DELAY
    (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE),
];

/// What Linux tells of an inert option that was not set.
fn fresh(level: i32, name: i32) -> i32 {
    match (level, name) {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER) => libc::IP_PMTUDISC_WANT,
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER) => libc::IPV6_PMTUDISC_WANT,
        (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL | libc::IP_MULTICAST_LOOP)
        | (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS | libc::IPV6_MULTICAST_LOOP | IPV6_AUTOFLOWLABEL) => 1,
        // IPV6_PREFER_SRC_PUBTMP_DEFAULT, IPV6_PREFER_SRC_HOME
        (libc::IPPROTO_IPV6, libc::IPV6_ADDR_PREFERENCES) => 0x500,
        _ => 0,
    }
}

/// Whether Linux takes this value of an inert option of a stream.
fn accepts(level: i32, name: i32, value: i32) -> bool {
    match (level, name) {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER) | (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER) => {
            (libc::IP_PMTUDISC_DONT..=libc::IP_PMTUDISC_OMIT).contains(&value)
        }
        (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL) => false,
        _ => true,
    }
}

/// What getsockopt hands back.
enum Value {
    Int(i32),
    Bytes(Vec<u8>),
}

impl Bridge {
    pub(super) fn call_setsockopt(&mut self, call: &Notification, key: SocketKey, end: &OwnedFd) -> Reply {
        match self.set_option(call, key, end) {
            Ok(reply) => reply,
            Err(number) => Reply::Done(Err(number)),
        }
    }

    fn set_option(&mut self, call: &Notification, key: SocketKey, end: &OwnedFd) -> Result<Reply, i32> {
        let (level, name) = (int(call.args[1]), int(call.args[2]));
        let length = usize::try_from(int(call.args[4])).map_err(|_| libc::EINVAL)?;
        let family = self.sockets.get(&key).ok_or(libc::EBADF)?.family;
        if level == libc::IPPROTO_IPV6 && family == Family::V4 {
            return Err(libc::ENOPROTOOPT);
        }
        match (level, name) {
            (libc::SOL_SOCKET, _) => return self.set_socket_level(call, key, end, name, length),
            (libc::IPPROTO_TCP, libc::TCP_CONGESTION) => {
                let bytes = self.read_bytes(call, call.args[3], length.min(CONGESTION_NAME_MAX - 1))?;
                if bytes.is_empty() {
                    return Err(libc::EINVAL);
                }
                let algorithm = Congestion::from_name(&text(&bytes)).ok_or(libc::ENOENT)?;
                self.set_stack_option(key, TcpOption::Congestion(algorithm))?;
                return Ok(Reply::Done(Ok(0)));
            }
            // The kernel's TLS is an upgrade that programs try and do without.
            (libc::IPPROTO_TCP, libc::TCP_ULP) => return Err(libc::ENOENT),
            _ => {}
        }
        let value = self.read_option_int(call, level, length)?;
        match stack_option(level, name, value)? {
            Some(TcpOption::V6Only(_)) if self.is_bound(key) => return Err(libc::EINVAL),
            Some(TcpOption::WindowClamp(0)) if self.is_in_use(key) => return Err(libc::EINVAL),
            Some(option) => self.set_stack_option(key, option)?,
            None if INERT.contains(&(level, name)) => {
                if !accepts(level, name, value) {
                    return Err(libc::EINVAL);
                }
                let socket = self.sockets.get_mut(&key).ok_or(libc::EBADF)?;
                socket.options.inert.insert((level, name), value);
            }
            None => return Err(libc::ENOPROTOOPT),
        }
        Ok(Reply::Done(Ok(0)))
    }

    fn is_bound(&self, key: SocketKey) -> bool {
        self.sockets.get(&key).is_some_and(|socket| self.endpoints(socket).0.is_some())
    }

    fn is_in_use(&self, key: SocketKey) -> bool {
        let phase = self.sockets.get(&key).map(|socket| &socket.phase);
        matches!(phase, Some(Phase::Listening { .. } | Phase::Connecting { .. } | Phase::Connected { .. }))
    }

    /// Options of the IP levels may be given as a single byte.
    fn read_option_int(&self, call: &Notification, level: i32, length: usize) -> Result<i32, i32> {
        let ip = level == libc::IPPROTO_IP;
        match length {
            0 if ip => Ok(0),
            1..4 if ip => Ok(i32::from(self.read_bytes(call, call.args[3], 1)?[0])),
            0..4 => Err(libc::EINVAL),
            _ => self.read_int(call, call.args[3]),
        }
    }

    fn set_socket_level(
        &mut self,
        call: &Notification,
        key: SocketKey,
        end: &OwnedFd,
        name: i32,
        length: usize,
    ) -> Result<Reply, i32> {
        let done = Ok(Reply::Done(Ok(0)));
        match name {
            libc::SO_LINGER => {
                if length < 8 {
                    return Err(libc::EINVAL);
                }
                let bytes = self.read_bytes(call, call.args[3], 8)?;
                let on = i32::from_ne_bytes(bytes[..4].try_into().expect("four bytes")) != 0;
                let seconds = u32::from_ne_bytes(bytes[4..].try_into().expect("four bytes"));
                let options = &mut self.sockets.get_mut(&key).ok_or(libc::EBADF)?.options;
                options.linger = on.then_some(seconds);
                options.linger_off_seconds = seconds;
                return done;
            }
            libc::SO_BINDTODEVICE => {
                let device = text(&self.read_bytes(call, call.args[3], length.min(DEVICE_NAME_MAX))?);
                if !["", "lo", "eth0"].contains(&device.as_str()) {
                    return Err(libc::ENODEV);
                }
                self.sockets.get_mut(&key).ok_or(libc::EBADF)?.options.device = device;
                return done;
            }
            libc::SO_RCVTIMEO | libc::SO_SNDTIMEO | abi::SO_RCVTIMEO_NEW | abi::SO_SNDTIMEO_NEW => {
                if length < 16 {
                    return Ok(Reply::Proceed);
                }
                let timeout = duration(&self.read_bytes(call, call.args[3], 16)?);
                let options = &mut self.sockets.get_mut(&key).ok_or(libc::EBADF)?.options;
                if matches!(name, libc::SO_RCVTIMEO | abi::SO_RCVTIMEO_NEW) {
                    options.receive_timeout = timeout;
                } else {
                    options.send_timeout = timeout;
                }
                return Ok(Reply::Proceed);
            }
            _ => {}
        }
        if length < 4 {
            return Err(libc::EINVAL);
        }
        let value = self.read_int(call, call.args[3])?;
        let on = value != 0;
        let socket = self.sockets.get_mut(&key).ok_or(libc::EBADF)?;
        let option = match name {
            libc::SO_RCVLOWAT => {
                socket.options.receive_low_water = Some(value);
                return Ok(Reply::Proceed);
            }
            libc::SO_PRIORITY => {
                socket.options.priority = Some(value);
                return Ok(Reply::Proceed);
            }
            libc::SO_OOBINLINE => {
                // The program's end keeps the mark, and the kernel the option; the stack hands the byte over as urgent either way.
                socket.options.inert.insert((libc::SOL_SOCKET, name), i32::from(on));
                return Ok(Reply::Proceed);
            }
            libc::SO_KEEPALIVE => TcpOption::KeepAlive(on),
            libc::SO_REUSEADDR => TcpOption::ReuseAddress(on),
            libc::SO_REUSEPORT => TcpOption::ReusePort(on),
            libc::SO_SNDBUF | libc::SO_SNDBUFFORCE => {
                let bytes = clamp(value, SEND_BUFFER_MIN, buffer_max("wmem_max"));
                // The pair is part of the buffer, so a small one must keep the pair small as well. While a connection is being made
                // the pair is kept unwritable on purpose.
                if !matches!(socket.phase, Phase::Connecting { .. } | Phase::Listening { .. }) {
                    drop(unix::set_send_buffer(end.as_fd(), bytes.min(PAIR_BUFFER / 2)));
                }
                TcpOption::SendBuffer(bytes)
            }
            libc::SO_RCVBUF | libc::SO_RCVBUFFORCE => {
                let bytes = clamp(value, RECEIVE_BUFFER_MIN, buffer_max("rmem_max"));
                if let Some(end) = socket.end() {
                    drop(unix::set_send_buffer(end.fd.as_fd(), bytes.min(PAIR_BUFFER / 2)));
                }
                TcpOption::ReceiveBuffer(bytes)
            }
            _ => return Ok(Reply::Proceed),
        };
        self.set_stack_option(key, option)?;
        done
    }

    pub(super) fn call_getsockopt(&mut self, call: &Notification, key: SocketKey, end: &OwnedFd) -> Reply {
        let result = self.option_value(call, key, end).and_then(|value| {
            let bytes = match value {
                Value::Int(value) => value.to_ne_bytes().to_vec(),
                Value::Bytes(bytes) => bytes,
            };
            let room = usize::try_from(self.read_int(call, call.args[4])?).map_err(|_| libc::EINVAL)?;
            self.write_sized(call, call.args[3], call.args[4], &bytes, room.min(bytes.len()))
        });
        result.into()
    }

    fn option_value(&mut self, call: &Notification, key: SocketKey, end: &OwnedFd) -> Result<Value, i32> {
        let (level, name) = (int(call.args[1]), int(call.args[2]));
        let socket = self.sockets.get(&key).ok_or(libc::EBADF)?;
        if level == libc::IPPROTO_IPV6 && socket.family == Family::V4 {
            return Err(libc::EOPNOTSUPP);
        }
        if (level, name) == (libc::SOL_SOCKET, libc::SO_ERROR) {
            return Ok(Value::Int(self.pending_error(key, end)));
        }
        let told_by_info = [
            (libc::IPPROTO_TCP, libc::TCP_INFO),
            (libc::IPPROTO_TCP, libc::TCP_MAXSEG),
            (libc::IPPROTO_IP, libc::IP_MTU),
            (libc::IPPROTO_IPV6, libc::IPV6_MTU),
        ];
        if let Some(id) = socket.id().filter(|_| told_by_info.contains(&(level, name))) {
            self.stack.refresh(id);
        }
        if (level, name) == (libc::IPPROTO_TCP, libc::TCP_INFO) {
            let info = socket.id().map(|id| self.stack.tcp_info(self.now, id)).unwrap_or_default();
            return Ok(Value::Bytes(info::encode(&info)));
        }
        let defaults = TcpOptions::default();
        let options = match socket.id() {
            Some(id) => self.stack.tcp_options(id),
            None => socket.kept.as_deref().unwrap_or(&defaults),
        };
        let value = match level {
            libc::SOL_SOCKET => socket_level_value(socket, options, name),
            libc::IPPROTO_TCP => {
                let mss = socket.id().map_or(0, |id| self.stack.tcp_info(self.now, id).snd_mss);
                tcp_value(options, name, mss)
            }
            libc::IPPROTO_IP => match name {
                libc::IP_TOS => Some(Value::Int(i32::from(options.tos))),
                libc::IP_TTL => Some(Value::Int(i32::from(options.ttl))),
                libc::IP_FREEBIND | libc::IP_TRANSPARENT => Some(Value::Int(i32::from(options.free_bind))),
                libc::IP_OPTIONS => Some(Value::Bytes(Vec::new())),
                libc::IP_MTU => return self.path_mtu(key).map(Value::Int),
                _ => None,
            },
            _ => match name {
                libc::IPV6_V6ONLY => Some(Value::Int(i32::from(options.v6only))),
                libc::IPV6_TCLASS => Some(Value::Int(i32::from(options.tos))),
                libc::IPV6_UNICAST_HOPS => Some(Value::Int(i32::from(options.ttl))),
                libc::IPV6_MTU => return self.path_mtu(key).map(Value::Int),
                _ => None,
            },
        };
        value
            .or_else(|| {
                let inert = INERT.contains(&(level, name));
                inert.then(|| {
                    Value::Int(socket.options.inert.get(&(level, name)).copied().unwrap_or(fresh(level, name)))
                })
            })
            .ok_or(libc::ENOPROTOOPT)
    }

    fn path_mtu(&self, key: SocketKey) -> Result<i32, i32> {
        let socket = self.sockets.get(&key).ok_or(libc::EBADF)?;
        match (&socket.phase, socket.id()) {
            (Phase::Connected { .. }, Some(id)) => {
                Ok(i32::try_from(self.stack.tcp_info(self.now, id).pmtu).unwrap_or(i32::MAX))
            }
            _ => Err(libc::ENOTCONN),
        }
    }

    /// SO_ERROR, which is told once.
    fn pending_error(&mut self, key: SocketKey, end: &OwnedFd) -> i32 {
        // The kernel's idea of a broken pair must go as well, whatever it is.
        let native = sockets::int_option(end.as_fd(), libc::SOL_SOCKET, libc::SO_ERROR).unwrap_or(0);
        let Some(socket) = self.sockets.get_mut(&key) else {
            return native;
        };
        if let Some(number) = socket.error.take() {
            return number;
        }
        match socket.id() {
            // An error of the stack's is on its way through the pair, behind what was received; this tells it early and only here.
            Some(id) => self.stack.status(id).error.map_or(native, errno),
            None => native,
        }
    }
}

impl BridgeOptions {
    /// Whether [`BridgeOptions::apply`] has nothing to do.
    pub(super) fn is_in_bridge_only(&self) -> bool {
        let BridgeOptions {
            linger: _,
            linger_off_seconds: _,
            receive_timeout,
            send_timeout,
            receive_low_water,
            priority,
            device: _,
            inert,
        } = self;
        let in_line = inert.contains_key(&(libc::SOL_SOCKET, libc::SO_OOBINLINE));
        !in_line
            && receive_timeout.is_none()
            && send_timeout.is_none()
            && receive_low_water.is_none()
            && priority.is_none()
    }

    /// Sets what acts on the program's end itself.
    pub(super) fn apply(&self, end: BorrowedFd<'_>) {
        if let Some(on) = self.inert.get(&(libc::SOL_SOCKET, libc::SO_OOBINLINE)) {
            drop(sockets::set_int_option(end, libc::SOL_SOCKET, libc::SO_OOBINLINE, *on));
        }
        if self.receive_timeout.is_some() {
            drop(unix::set_timeout(end, Timeout::Receive, self.receive_timeout));
        }
        if self.send_timeout.is_some() {
            drop(unix::set_timeout(end, Timeout::Send, self.send_timeout));
        }
        if let Some(bytes) = self.receive_low_water {
            drop(sockets::set_int_option(end, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes));
        }
        if let Some(priority) = self.priority {
            drop(sockets::set_int_option(end, libc::SOL_SOCKET, libc::SO_PRIORITY, priority));
        }
    }
}

fn socket_level_value(socket: &Socket, options: &TcpOptions, name: i32) -> Option<Value> {
    let doubled = |set: Option<usize>, default: i32| {
        set.map_or(default, |bytes| i32::try_from(bytes.saturating_mul(2)).unwrap_or(i32::MAX))
    };
    Some(match name {
        libc::SO_DOMAIN => Value::Int(socket.family.number()),
        libc::SO_PROTOCOL => Value::Int(libc::IPPROTO_TCP),
        libc::SO_ACCEPTCONN => Value::Int(i32::from(matches!(socket.phase, Phase::Listening { .. }))),
        libc::SO_LINGER => {
            let on = i32::from(socket.options.linger.is_some());
            let seconds = socket.options.linger_off_seconds;
            Value::Bytes([on.to_ne_bytes(), seconds.to_ne_bytes()].concat())
        }
        libc::SO_KEEPALIVE => Value::Int(i32::from(options.keepalive)),
        libc::SO_REUSEADDR => Value::Int(i32::from(options.reuse_address)),
        libc::SO_REUSEPORT => Value::Int(i32::from(options.reuse_port)),
        libc::SO_SNDBUF => Value::Int(doubled(options.send_buffer, SEND_BUFFER_DEFAULT)),
        libc::SO_RCVBUF => Value::Int(doubled(options.receive_buffer, RECEIVE_BUFFER_DEFAULT)),
        libc::SO_BINDTODEVICE => {
            let mut name = socket.options.device.clone().into_bytes();
            if !name.is_empty() {
                name.push(0);
            }
            Value::Bytes(name)
        }
        // A TCP socket has no credentials of its peer: pid 0, and the invalid user and group.
        libc::SO_PEERCRED => Value::Bytes([0i32.to_ne_bytes(), (-1i32).to_ne_bytes(), (-1i32).to_ne_bytes()].concat()),
        _ => return None,
    })
}

fn tcp_value(options: &TcpOptions, name: i32, mss: u32) -> Option<Value> {
    let seconds = |duration: Duration| i32::try_from(duration.as_secs()).unwrap_or(i32::MAX);
    let number = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
    Some(match name {
        libc::TCP_NODELAY => Value::Int(i32::from(options.nodelay)),
        libc::TCP_CORK => Value::Int(i32::from(options.cork)),
        libc::TCP_QUICKACK => Value::Int(i32::from(options.quickack)),
        libc::TCP_MAXSEG if options.max_segment != 0 && mss == 0 => Value::Int(i32::from(options.max_segment)),
        // Linux shows TCP_MSS_DEFAULT before there is a connection.
        libc::TCP_MAXSEG => Value::Int(if mss == 0 { 536 } else { number(mss) }),
        libc::TCP_KEEPIDLE => Value::Int(seconds(options.keep_idle)),
        libc::TCP_KEEPINTVL => Value::Int(seconds(options.keep_interval)),
        libc::TCP_KEEPCNT => Value::Int(i32::from(options.keep_count)),
        libc::TCP_SYNCNT => Value::Int(i32::from(options.syn_count)),
        libc::TCP_LINGER2 => Value::Int(options.linger2.map_or(-1, seconds)),
        libc::TCP_DEFER_ACCEPT => Value::Int(seconds(options.defer_accept)),
        libc::TCP_WINDOW_CLAMP => Value::Int(number(options.window_clamp)),
        libc::TCP_USER_TIMEOUT => Value::Int(i32::try_from(options.user_timeout.as_millis()).unwrap_or(i32::MAX)),
        libc::TCP_NOTSENT_LOWAT => Value::Int(options.notsent_lowat.cast_signed()),
        libc::TCP_CONGESTION => {
            let mut name = options.congestion.name().as_bytes().to_vec();
            name.resize(CONGESTION_NAME_MAX, 0);
            Value::Bytes(name)
        }
        // No upper layer protocol, no saved SYN.
        libc::TCP_ULP | libc::TCP_SAVED_SYN => Value::Bytes(Vec::new()),
        libc::TCP_TIMESTAMP => Value::Int(0),
        _ => return None,
    })
}

/// The stack's option for an int option, its range checked; `None` when the stack has no such option.
fn stack_option(level: i32, name: i32, value: i32) -> Result<Option<TcpOption>, i32> {
    let on = value != 0;
    let seconds = |range: std::ops::RangeInclusive<i32>| {
        let value = range.contains(&value).then_some(value).ok_or(libc::EINVAL)?;
        Ok::<_, i32>(Duration::from_secs(u64::try_from(value).unwrap_or(0)))
    };
    let byte = |range: std::ops::RangeInclusive<i32>| {
        let value = range.contains(&value).then_some(value).ok_or(libc::EINVAL)?;
        u8::try_from(value).map_err(|_| libc::EINVAL)
    };
    let unsigned = u32::try_from(value).map_err(|_| libc::EINVAL);
    Ok(Some(match (level, name) {
        (libc::IPPROTO_TCP, libc::TCP_NODELAY) => TcpOption::NoDelay(on),
        (libc::IPPROTO_TCP, libc::TCP_CORK) => TcpOption::Cork(on),
        (libc::IPPROTO_TCP, libc::TCP_QUICKACK) => TcpOption::QuickAck(on),
        (libc::IPPROTO_TCP, libc::TCP_MAXSEG) => match value {
            0 | 88..=32_767 => TcpOption::MaxSegment(u16::try_from(value).map_err(|_| libc::EINVAL)?),
            _ => return Err(libc::EINVAL),
        },
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE) => TcpOption::KeepIdle(seconds(1..=KEEP_SECONDS_MAX)?),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL) => TcpOption::KeepInterval(seconds(1..=KEEP_SECONDS_MAX)?),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT) => TcpOption::KeepCount(byte(1..=KEEP_COUNT_MAX)?),
        (libc::IPPROTO_TCP, libc::TCP_SYNCNT) => TcpOption::SynCount(byte(1..=KEEP_COUNT_MAX)?),
        (libc::IPPROTO_TCP, libc::TCP_LINGER2) => {
            TcpOption::Linger2(u64::try_from(value).ok().map(Duration::from_secs))
        }
        (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT) => {
            TcpOption::DeferAccept(Duration::from_secs(u64::try_from(value).unwrap_or(0)))
        }
        (libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP) => TcpOption::WindowClamp(unsigned?),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT) => {
            TcpOption::UserTimeout(Duration::from_millis(u64::from(unsigned?)))
        }
        (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT) => TcpOption::NotSentLowat(value.cast_unsigned()),
        (libc::IPPROTO_IP, libc::IP_TOS) => TcpOption::Tos((value & 0xff) as u8),
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => TcpOption::Tos(if value == -1 { 0 } else { byte(0..=255)? }),
        (libc::IPPROTO_IP, libc::IP_TTL) => TcpOption::Ttl(if value == -1 { 64 } else { byte(1..=255)? }),
        (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS) => TcpOption::Ttl(if value == -1 { 64 } else { byte(0..=255)? }),
        (libc::IPPROTO_IP, libc::IP_FREEBIND | libc::IP_TRANSPARENT)
        | (libc::IPPROTO_IPV6, libc::IPV6_FREEBIND | libc::IPV6_TRANSPARENT) => TcpOption::FreeBind(on),
        (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY) => TcpOption::V6Only(on),
        _ => return Ok(None),
    }))
}

/// Every option of a socket, to be set on another.
pub(super) fn all(options: &TcpOptions) -> Vec<TcpOption> {
    let TcpOptions {
        nodelay,
        cork,
        quickack,
        keepalive,
        keep_idle,
        keep_interval,
        keep_count,
        user_timeout,
        max_segment,
        linger2,
        defer_accept,
        syn_count,
        window_clamp,
        notsent_lowat,
        congestion,
        send_buffer,
        receive_buffer,
        receive_lowat,
        tos,
        ttl,
        v6only,
        reuse_address,
        reuse_port,
        free_bind,
        oob_inline,
    } = options;
    let mut all = vec![
        TcpOption::NoDelay(*nodelay),
        TcpOption::Cork(*cork),
        TcpOption::QuickAck(*quickack),
        TcpOption::KeepAlive(*keepalive),
        TcpOption::KeepIdle(*keep_idle),
        TcpOption::KeepInterval(*keep_interval),
        TcpOption::KeepCount(*keep_count),
        TcpOption::UserTimeout(*user_timeout),
        TcpOption::MaxSegment(*max_segment),
        TcpOption::Linger2(*linger2),
        TcpOption::DeferAccept(*defer_accept),
        TcpOption::SynCount(*syn_count),
        TcpOption::WindowClamp(*window_clamp),
        TcpOption::NotSentLowat(*notsent_lowat),
        TcpOption::Congestion(*congestion),
        TcpOption::ReceiveLowat(*receive_lowat),
        TcpOption::Tos(*tos),
        TcpOption::Ttl(*ttl),
        TcpOption::V6Only(*v6only),
        TcpOption::ReuseAddress(*reuse_address),
        TcpOption::ReusePort(*reuse_port),
        TcpOption::FreeBind(*free_bind),
        TcpOption::OobInline(*oob_inline),
    ];
    all.extend(send_buffer.map(TcpOption::SendBuffer));
    all.extend(receive_buffer.map(TcpOption::ReceiveBuffer));
    all
}

/// Buffer sizes are clamped to the system's limits rather than refused; a negative one is the largest.
fn clamp(value: i32, least: i32, most: i32) -> usize {
    let value = if value < 0 { most } else { value.min(most) };
    usize::try_from(value.max(least)).expect("at least the least")
}

fn buffer_max(name: &str) -> i32 {
    let text = std::fs::read_to_string(format!("/proc/sys/net/core/{name}")).unwrap_or_default();
    text.trim().parse().unwrap_or(BUFFER_MAX_DEFAULT)
}

fn duration(timeval: &[u8]) -> Option<Duration> {
    let word = |at: usize| timeval.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, i64::from_ne_bytes);
    let seconds = u64::try_from(word(0)).unwrap_or(0);
    let micros = u64::try_from(word(8)).unwrap_or(0);
    (seconds != 0 || micros != 0).then(|| Duration::from_secs(seconds).saturating_add(Duration::from_micros(micros)))
}

/// A C string in a buffer that needn't end in NUL.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_linux() {
        for (name, good, bad) in [
            (libc::TCP_KEEPIDLE, 32_767, 32_768),
            (libc::TCP_KEEPINTVL, 1, 0),
            (libc::TCP_KEEPCNT, 127, 128),
            (libc::TCP_MAXSEG, 88, 87),
            (libc::TCP_USER_TIMEOUT, 0, -1),
        ] {
            assert!(matches!(stack_option(libc::IPPROTO_TCP, name, good), Ok(Some(_))), "{name} {good}");
            assert_eq!(stack_option(libc::IPPROTO_TCP, name, bad), Err(libc::EINVAL), "{name} {bad}");
        }
        assert_eq!(stack_option(libc::IPPROTO_TCP, 9999, 1), Ok(None));
    }

    #[test]
    fn buffer_sizes_are_clamped() {
        assert_eq!(clamp(-1, SEND_BUFFER_MIN, BUFFER_MAX_DEFAULT), 212_992);
        assert_eq!(clamp(1, SEND_BUFFER_MIN, BUFFER_MAX_DEFAULT), 2304);
        assert_eq!(clamp(65_536, SEND_BUFFER_MIN, BUFFER_MAX_DEFAULT), 65_536);
    }

    #[test]
    fn copied_options_are_the_same_options() {
        let options = TcpOptions { nodelay: true, tos: 8, ..TcpOptions::default() };
        assert!(all(&options).contains(&TcpOption::NoDelay(true)));
        assert!(all(&options).contains(&TcpOption::Tos(8)));
    }
}
