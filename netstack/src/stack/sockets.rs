//! The calls a program makes, as the bridge passes them on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::ports::Claim;
use super::socket::{Kind, Socket};
use super::{Flow, Stack};
use crate::tcp::connection::{Beginning, Connection};
use crate::tcp::listener::Listener;
use crate::tcp::urgent::NoUrgent;
use crate::tcp::{Env, Tuple};
use crate::{
    Instant, Reuse, Shutdown, SocketError, SocketId, State, Status, TcpInfo, TcpOption, TcpOptions, Urgent, ip,
};

type Result<T> = std::result::Result<T, SocketError>;

impl Stack {
    pub(super) fn insert_socket(&mut self, options: TcpOptions) -> u32 {
        self.sockets.insert(|index, generation| Socket::new(SocketId::new(index, generation), options))
    }

    /// What the socket looks like now. A socket that does not exist looks closed.
    #[must_use]
    pub fn status(&self, id: SocketId) -> Status {
        let mut status = Status::CLOSED;
        let Some(socket) = self.socket(id) else {
            return status;
        };
        status.error = socket.error;
        match &socket.kind {
            Kind::Idle => {}
            Kind::Listener(listener) => {
                status.state = State::Listen;
                status.acceptable = listener.queue.len();
            }
            Kind::Connection(connection) => {
                let env = self.env(self.clock.latest(), socket);
                status.state = connection.state;
                status.readable = connection.readable();
                status.send_space = connection.send_space(&env);
                status.peer_closed = connection.peer_closed();
                status.unsent = connection.unsent();
                status.unacked = connection.unacked();
                status.urgent = connection.urgent().map(|(ahead, available)| Urgent { ahead, available });
            }
        }
        status
    }

    fn env<'a>(&'a self, now: Instant, socket: &'a Socket) -> Env<'a> {
        Env { now, config: &self.config, options: &socket.options }
    }

    /// A new TCP socket, bound to nothing.
    pub fn tcp_open(&mut self) -> SocketId {
        let slot = self.insert_socket(TcpOptions::default());
        self.sockets.get(slot).map_or(SocketId::new(slot, 0), |socket| socket.id)
    }

    /// `bind(2)`: port 0 picks a free one. `[::]` takes IPv4 as well unless `IPV6_V6ONLY` is set.
    pub fn tcp_bind(&mut self, id: SocketId, address: SocketAddr, reuse: Reuse) -> Result<()> {
        let socket = self.socket(id).ok_or(SocketError::NoSuchSocket)?;
        if socket.bound.is_some() || !matches!(socket.kind, Kind::Idle) {
            return Err(SocketError::InvalidArgument);
        }
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.1
        //# The optional "local IP address" parameter MUST be supported to allow the specification of the local IP
        //# address (MUST-43).
        let host = ip::canonical(address.ip());
        if !host.is_unspecified() && !self.is_looped(host) && !socket.options.free_bind {
            return Err(SocketError::AddressNotAvailable);
        }
        let claim = Claim {
            address: SocketAddr::new(host, address.port()),
            v6only: socket.options.v6only,
            reuse_address: reuse.address,
            reuse_port: reuse.port,
            listening: false,
        };
        let bound = self.claim_port(id.index(), claim)?;
        let socket = self.socket_mut(id).ok_or(SocketError::NoSuchSocket)?;
        socket.options.reuse_address = reuse.address;
        socket.options.reuse_port = reuse.port;
        socket.bound = Some(bound);
        self.ports.add_owner(bound.port(), id.index());
        Ok(())
    }

    /// The address of a claim with its port, which is chosen if it is 0.
    fn claim_port(&mut self, slot: u32, claim: Claim) -> Result<SocketAddr> {
        if claim.address.port() != 0 {
            let taken = self.ports.conflicts(&self.sockets, &claim, slot);
            return if taken { Err(SocketError::AddressInUse) } else { Ok(claim.address) };
        }
        let start = self.keys.random();
        // Ports that nobody is on come first; those that may be shared are a last resort.
        for only_free in [true, false] {
            for port in ephemeral(self.config.ephemeral_ports, start, false) {
                if only_free && self.ports.is_used(port) {
                    continue;
                }
                let address = SocketAddr::new(claim.address.ip(), port);
                if !self.ports.conflicts(&self.sockets, &Claim { address, ..claim }, slot) {
                    return Ok(address);
                }
            }
        }
        Err(SocketError::AddressInUse)
    }

    /// `listen(2)`: an unbound socket gets a port first; on a listener it sets a new backlog.
    pub fn tcp_listen(&mut self, now: Instant, id: SocketId, backlog: u32) -> Result<()> {
        self.clock.enter(now);
        let has_v6 = self.config.addresses.iter().any(IpAddr::is_ipv6);
        let socket = self.socket_mut(id).ok_or(SocketError::NoSuchSocket)?;
        if socket.waits_at.is_some() {
            // It is nobody's before it is accepted, even if it has been reset meanwhile.
            return Err(SocketError::InvalidArgument);
        }
        match &mut socket.kind {
            Kind::Listener(listener) => {
                listener.set_backlog(backlog);
                return Ok(());
            }
            Kind::Connection(connection) if connection.state != State::Closed => {
                return Err(SocketError::InvalidArgument);
            }
            _ => {}
        }
        if socket.bound.is_none() {
            let any = if has_v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
            let reuse = Reuse { address: socket.options.reuse_address, port: socket.options.reuse_port };
            socket.kind = Kind::Idle;
            self.tcp_bind(id, SocketAddr::new(any, 0), reuse)?;
        }
        let socket = self.socket(id).ok_or(SocketError::NoSuchSocket)?;
        let Some(address) = socket.bound else {
            return Err(SocketError::InvalidArgument);
        };
        let claim = Claim {
            address,
            v6only: socket.options.v6only,
            reuse_address: socket.options.reuse_address,
            reuse_port: socket.options.reuse_port,
            listening: true,
        };
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.1
        //# Every passive OPEN call either creates a new connection record in LISTEN state, or it returns an error; it
        //# MUST NOT affect any previously created connection record (MUST-41).
        if self.ports.conflicts(&self.sockets, &claim, id.index()) {
            return Err(SocketError::AddressInUse);
        }
        let socket = self.socket_mut(id).ok_or(SocketError::NoSuchSocket)?;
        socket.kind = Kind::Listener(Listener::new(backlog));
        Ok(())
    }

    /// The longest established connection that waits at a listener.
    pub fn tcp_accept(&mut self, now: Instant, id: SocketId) -> Option<SocketId> {
        self.clock.enter(now);
        let slot = self.socket_mut(id)?.listener_mut()?.queue.pop_front()?;
        let socket = self.sockets.get_mut(slot)?;
        socket.waits_at = None;
        let accepted = socket.id;
        // What came while it waited is news to whoever has it now.
        self.note_change(slot);
        Some(accepted)
    }

    /// `connect(2)`: starts the handshake; [`Stack::status`] tells how it goes.
    pub fn tcp_connect(&mut self, now: Instant, id: SocketId, remote: SocketAddr) -> Result<()> {
        let now = self.clock.enter(now);
        let socket = self.socket(id).ok_or(SocketError::NoSuchSocket)?;
        if socket.waits_at.is_some() {
            return Err(SocketError::InvalidArgument);
        }
        match &socket.kind {
            Kind::Listener(_) => return Err(SocketError::IsConnected),
            Kind::Connection(connection) => match connection.state {
                State::SynSent | State::SynReceived => return Err(SocketError::AlreadyInProgress),
                State::Closed => {}
                _ => return Err(SocketError::IsConnected),
            },
            Kind::Idle => {}
        }
        let target = self.connect_target(ip::canonical(remote.ip()))?;
        let bound = socket.bound;
        let local = self.connect_source(bound, target)?;
        if remote.port() == 0 {
            return Err(SocketError::ConnectionRefused);
        }
        let mut tuple = Tuple { local, local_port: 0, remote: target, remote_port: remote.port() };
        tuple.local_port = match bound {
            Some(bound) => bound.port(),
            None => self.choose_port(&tuple)?,
        };
        let isn = self.make_way(now, &tuple)?;
        let beginning = Beginning {
            tuple,
            iss: isn.unwrap_or_else(|| self.keys.initial_sequence(&tuple, now)),
            timestamp_offset: self.keys.timestamp_offset(&tuple),
            flow_label: self.keys.flow_label(&tuple),
            looped: self.is_looped(target),
        };
        let slot = id.index();
        let socket = self.sockets.get_mut(slot).ok_or(SocketError::NoSuchSocket)?;
        let env = Env { now, config: &self.config, options: &socket.options };
        socket.kind = Kind::Connection(Box::new(Connection::connect(&env, beginning)));
        socket.error = None;
        socket.counted = bound.is_none();
        if socket.counted {
            let reuse_address = socket.options.reuse_address;
            self.ports.add_connection(tuple.local_address(), reuse_address);
        }
        self.flows.insert(tuple, Flow::Socket(slot));
        self.touch(slot);
        Ok(())
    }

    /// The unspecified address stands for this host, as on Linux.
    fn connect_target(&self, target: IpAddr) -> Result<IpAddr> {
        let target = match target {
            IpAddr::V4(address) if address.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(address) if address.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
            target => target,
        };
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.1
        //# A TCP implementation MUST reject as an error a local OPEN call for an invalid remote IP address (e.g., a
        //# broadcast or multicast address) (MUST-46).
        // No link is spoken to here, so what is known on one link only is known nowhere.
        let on_link = matches!(target, IpAddr::V6(address) if address.is_unicast_link_local());
        let reachable = ip::is_unicast(target) && (!on_link || self.is_own(target));
        if reachable { Ok(target) } else { Err(SocketError::NetworkUnreachable) }
    }

    /// The local address of a connection to `target`.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.1
    //# If an application on a multihomed host does not specify the local IP address when actively opening a TCP
    //# connection, then the TCP implementation MUST ask the IP layer to select a local IP address before sending the
    //# (first) SYN (MUST-44).
    fn connect_source(&self, bound: Option<SocketAddr>, target: IpAddr) -> Result<IpAddr> {
        match bound.map(|bound| bound.ip()) {
            Some(local) if !local.is_unspecified() => {
                match (local, target) {
                    // A socket of the IPv6 family that was bound to a mapped address.
                    (IpAddr::V4(_), IpAddr::V6(_)) => return Err(SocketError::AddressFamily),
                    (IpAddr::V6(_), IpAddr::V4(_)) => return Err(SocketError::NetworkUnreachable),
                    _ => {}
                }
                // A loopback address can't talk to the world.
                if local.is_loopback() && !self.is_looped(target) {
                    return Err(SocketError::InvalidArgument);
                }
                // Linux: IP_FREEBIND lets a socket listen where nobody is yet, but not speak for somebody else.
                if !self.is_looped(local) {
                    return Err(SocketError::NetworkUnreachable);
                }
                Ok(local)
            }
            Some(IpAddr::V4(_)) if target.is_ipv6() => Err(SocketError::AddressFamily),
            _ if self.is_looped(target) => Ok(target),
            _ => {
                let own = self.config.addresses.iter().find(|own| own.is_ipv4() == target.is_ipv4());
                own.copied().ok_or(SocketError::NetworkUnreachable)
            }
        }
    }

    /// RFC 6056: a port from which nobody talks to that peer yet.
    fn choose_port(&mut self, tuple: &Tuple) -> Result<u16> {
        let start = self.keys.port_offset(tuple);
        // A connection in TIME-WAIT may be replaced, but only if nothing else is to be had.
        for reuse_time_wait in [false, true] {
            for port in ephemeral(self.config.ephemeral_ports, start, true) {
                if !self.ports.owners(port).is_empty() {
                    continue;
                }
                let free = match self.flows.get(&Tuple { local_port: port, ..*tuple }) {
                    None => true,
                    Some(Flow::TimeWait(_)) => reuse_time_wait,
                    Some(_) => false,
                };
                if free {
                    return Ok(port);
                }
            }
        }
        Err(SocketError::AddressNotAvailable)
    }

    /// Makes sure that `tuple` is free. Returns an ISN beyond what a connection in TIME-WAIT there used.
    fn make_way(&mut self, now: Instant, tuple: &Tuple) -> Result<Option<u32>> {
        match self.flows.get(tuple).copied() {
            None => Ok(None),
            Some(Flow::TimeWait(index)) => {
                let entry = self.time_wait.get(index).ok_or(SocketError::AddressNotAvailable)?;
                //= https://www.rfc-editor.org/rfc/rfc6191#section-2
                //# An active opener takes a place in TIME-WAIT again once a timestamp can tell the two connections
                //# apart.
                // RFC 6191: timestamps tell old segments from new ones if a tick has passed.
                if !entry.timestamps || now.since(entry.timestamp_recent_at).as_secs() < 1 {
                    return Err(SocketError::AddressNotAvailable);
                }
                let isn = entry.successor_isn();
                self.drop_time_wait(index);
                Ok(Some(isn))
            }
            Some(_) => Err(SocketError::AddressNotAvailable),
        }
    }

    /// Why a connection can't be used.
    fn unusable(socket: &Socket) -> SocketError {
        match &socket.kind {
            Kind::Connection(connection) if connection.state == State::Closed => {
                socket.error.unwrap_or(SocketError::BrokenPipe)
            }
            Kind::Connection(_) => SocketError::BrokenPipe,
            _ => SocketError::NotConnected,
        }
    }

    /// Lets `fill` write into the send buffer, at most [`Status::send_space`] bytes in two parts, or 256 KiB if that is less; it
    /// returns how many it wrote, from the start of the first part on. Returns that number.
    pub fn tcp_send_with(
        &mut self,
        now: Instant,
        id: SocketId,
        fill: impl FnOnce([&mut [u8]; 2]) -> usize,
    ) -> Result<usize> {
        let now = self.clock.enter(now);
        let socket = self.socket(id).ok_or(SocketError::NoSuchSocket)?;
        if !socket.connection().is_some_and(Connection::can_send) {
            return Err(Self::unusable(socket));
        }
        let written = self.with_connection(now, id.index(), |connection, env| connection.send_with(env, fill));
        let written = written.ok_or(SocketError::NotConnected)?;
        if written > 0 {
            self.touch(id.index());
        }
        Ok(written)
    }

    /// Lets `take` read what was received, in two parts; it returns how many bytes it consumed. The window update follows
    /// by itself. Returns that number.
    pub fn tcp_recv_with(
        &mut self,
        now: Instant,
        id: SocketId,
        take: impl FnOnce([&[u8]; 2]) -> usize,
    ) -> Result<usize> {
        let now = self.clock.enter(now);
        let socket = self.socket(id).ok_or(SocketError::NoSuchSocket)?;
        if socket.connection().is_none() {
            return Err(SocketError::NotConnected);
        }
        let taken = self.with_connection(now, id.index(), |connection, env| connection.receive_with(env, take));
        let taken = taken.ok_or(SocketError::NotConnected)?;
        if taken > 0 {
            self.touch(id.index());
        }
        Ok(taken)
    }

    /// `send(MSG_OOB)`: queues what there is room for and marks the last byte of it as urgent. Returns how much it was.
    pub fn tcp_send_urgent(&mut self, now: Instant, id: SocketId, bytes: &[u8]) -> Result<usize> {
        let now = self.clock.enter(now);
        let socket = self.socket(id).ok_or(SocketError::NoSuchSocket)?;
        if !socket.connection().is_some_and(Connection::can_send) {
            return Err(Self::unusable(socket));
        }
        let written = self.with_connection(now, id.index(), |connection, env| connection.send_urgent(env, bytes));
        self.touch(id.index());
        written.ok_or(SocketError::NotConnected)
    }

    /// `recv(MSG_OOB)`, with `MSG_PEEK` if `peek`: the urgent byte; none if it is announced and has not come (EAGAIN, or
    /// the end of the stream if [`Status::peer_closed`]). [`SocketError::InvalidArgument`] if there is none to take, or if
    /// `SO_OOBINLINE` keeps it in the stream.
    pub fn tcp_recv_urgent(&mut self, id: SocketId, peek: bool) -> Result<Option<u8>> {
        let socket = self.socket_mut(id).ok_or(SocketError::NoSuchSocket)?;
        let Kind::Connection(connection) = &mut socket.kind else {
            return Err(SocketError::NotConnected);
        };
        match connection.receive_urgent(peek) {
            Ok(byte) => Ok(Some(byte)),
            Err(NoUrgent::NotYet) => Ok(None),
            Err(NoUrgent::Never) => Err(SocketError::InvalidArgument),
        }
    }

    /// Queues bytes beyond [`Status::send_space`]: for a freeze, where what waited in the socketpair has to go along.
    pub fn tcp_send_over(&mut self, now: Instant, id: SocketId, data: &[u8]) -> Result<()> {
        let now = self.clock.enter(now);
        let socket = self.socket(id).ok_or(SocketError::NoSuchSocket)?;
        if !socket.connection().is_some_and(Connection::can_send) {
            return Err(Self::unusable(socket));
        }
        self.with_connection(now, id.index(), |connection, env| connection.send_over(env, data));
        self.touch(id.index());
        Ok(())
    }

    /// `shutdown(2)`.
    pub fn tcp_shutdown(&mut self, now: Instant, id: SocketId, how: Shutdown) -> Result<()> {
        let now = self.clock.enter(now);
        let socket = self.socket(id).ok_or(SocketError::NoSuchSocket)?;
        match &socket.kind {
            Kind::Idle => return Err(SocketError::NotConnected),
            Kind::Listener(_) => {
                // Linux: shutdown(SHUT_RD) on a listener ends listening; the socket stays bound.
                if how != Shutdown::Write {
                    self.stop_listening(now, id.index());
                    if let Some(socket) = self.sockets.get_mut(id.index()) {
                        socket.kind = Kind::Idle;
                    }
                    self.note_change(id.index());
                }
                return Ok(());
            }
            Kind::Connection(connection) if connection.state == State::Closed => {
                return Err(SocketError::NotConnected);
            }
            Kind::Connection(connection) if connection.state == State::SynSent => {
                self.end_connection(id.index());
                self.note_change(id.index());
                return Ok(());
            }
            Kind::Connection(_) => {}
        }
        self.with_connection(now, id.index(), |connection, env| {
            if how != Shutdown::Write {
                connection.shutdown_read(env);
            }
            if how != Shutdown::Read {
                connection.shutdown_write();
            }
        });
        self.touch(id.index());
        Ok(())
    }

    /// The program closed its last descriptor: a FIN follows what is queued, and the stack keeps the orphan till it ends.
    /// The socket's name means nothing any more.
    pub fn tcp_close(&mut self, now: Instant, id: SocketId) {
        let now = self.clock.enter(now);
        let slot = id.index();
        let Some(socket) = self.socket(id) else {
            return;
        };
        match &socket.kind {
            Kind::Idle => self.free(slot),
            Kind::Listener(_) => {
                self.stop_listening(now, slot);
                self.free(slot);
            }
            Kind::Connection(connection) if matches!(connection.state, State::Closed | State::SynSent) => {
                self.free(slot)
            }
            Kind::Connection(_) => {
                self.with_connection(now, slot, |connection, env| connection.close(env));
                self.touch(slot);
            }
        }
    }

    /// Ends the connection with an RST, like `close(2)` with `SO_LINGER` 0 or with unread data. The socket is gone.
    pub fn tcp_abort(&mut self, now: Instant, id: SocketId) {
        let now = self.clock.enter(now);
        let slot = id.index();
        let Some(socket) = self.socket(id) else {
            return;
        };
        if matches!(socket.kind, Kind::Listener(_)) {
            self.stop_listening(now, slot);
        }
        self.send_reset(now, slot);
        self.free(slot);
    }

    /// What waits at a listener that ends is reset, what is half open forgotten (Linux: `inet_csk_listen_stop`).
    fn stop_listening(&mut self, now: Instant, slot: u32) {
        let Some(listener) = self.sockets.get_mut(slot).and_then(Socket::listener_mut) else {
            return;
        };
        let queue = std::mem::take(&mut listener.queue);
        for waiting in queue {
            self.send_reset(now, waiting);
            self.free(waiting);
        }
        let entries: Vec<u32> =
            self.half_open.iter().filter(|(_, entry)| entry.listener == slot).map(|(index, _)| index).collect();
        for index in entries {
            self.drop_half_open(index);
        }
    }

    /// The socket's own and its peer's address. Addresses of IPv4 are never in their IPv6-mapped form.
    #[must_use]
    pub fn tcp_endpoints(&self, id: SocketId) -> (Option<SocketAddr>, Option<SocketAddr>) {
        let Some(socket) = self.socket(id) else {
            return (None, None);
        };
        match socket.connection() {
            Some(connection) => (Some(connection.tuple.local_address()), Some(connection.tuple.remote_address())),
            None => (socket.bound, None),
        }
    }

    /// Sets an option.
    pub fn tcp_set(&mut self, now: Instant, id: SocketId, option: TcpOption) -> Result<()> {
        let now = self.clock.enter(now);
        let socket = self.socket_mut(id).ok_or(SocketError::NoSuchSocket)?;
        socket.options.set(option);
        self.with_connection(now, id.index(), |connection, env| connection.options_changed(env, option));
        self.touch(id.index());
        Ok(())
    }

    /// All options of a socket; the defaults for one that does not exist.
    #[must_use]
    pub fn tcp_options(&self, id: SocketId) -> &TcpOptions {
        self.socket(id).map_or(&self.default_options, |socket| &socket.options)
    }

    /// `TCP_INFO`.
    #[must_use]
    pub fn tcp_info(&self, now: Instant, id: SocketId) -> TcpInfo {
        let Some(socket) = self.socket(id) else {
            return TcpInfo::default();
        };
        match &socket.kind {
            Kind::Idle => TcpInfo { state: Some(State::Closed), ..TcpInfo::default() },
            Kind::Listener(listener) => TcpInfo {
                state: Some(State::Listen),
                unacked: u32::try_from(listener.queue.len()).unwrap_or(u32::MAX),
                sacked: listener.backlog,
                ..TcpInfo::default()
            },
            Kind::Connection(connection) => connection.info(&self.env(self.clock.peek(now), socket)),
        }
    }

    /// `SO_ERROR`: the pending error, which is pending no more.
    pub fn take_error(&mut self, id: SocketId) -> Option<SocketError> {
        self.socket_mut(id)?.error.take()
    }
}

/// The ephemeral ports in the order in which to try them: from a place that `start` says on, those for `connect` first or
/// those for `bind` first. Like Linux, the two prefer ports of different parity, so that a port that was just bound and
/// closed isn't at once the source of a connection to itself.
fn ephemeral((first, last): (u16, u16), start: u64, for_connect: bool) -> impl Iterator<Item = u16> {
    let pairs = (u64::from(last.saturating_sub(first)) + 1).div_ceil(2);
    let preferred = u64::from(!for_connect);
    [preferred, 1 - preferred].into_iter().flat_map(move |parity| {
        (0..pairs).filter_map(move |step| {
            let offset = (start % pairs + step) % pairs * 2 + parity;
            u16::try_from(u64::from(first) + offset).ok().filter(|&port| port <= last.max(first))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::ephemeral;

    #[test]
    fn every_ephemeral_port_comes_once_and_the_own_parity_first() {
        for (first, last) in [(32_768, 60_999), (1000, 1000), (7, 12)] {
            for for_connect in [true, false] {
                let ports: Vec<u16> = ephemeral((first, last), 123_456_789, for_connect).collect();
                let mut sorted = ports.clone();
                sorted.sort_unstable();
                assert_eq!(sorted, (first..=last).collect::<Vec<_>>());
            }
        }
        assert_eq!(ephemeral((32_768, 60_999), 5, true).next().map(|port| port % 2), Some(0));
        assert_eq!(ephemeral((32_768, 60_999), 5, false).next().map(|port| port % 2), Some(1));
    }
}
