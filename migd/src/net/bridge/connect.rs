//! connect(2), in all its returns.
//!
//! A non-blocking connect must leave the descriptor unwritable until the connection stands. The program's end is filled up for
//! that (its buffer shrunk first, so that the fill is small); draining our end later is the very edge that epoll reports.
//! When the attempt fails, closing our end with the fill unread makes the program's end report an error. A blocking connect
//! just holds its caller, and leaves the pair as good as new when it fails.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use netstack::State;
use sys::fds::sockets;
use sys::seccomp::Notification;
use sys::unix::{self, Receive, Timeout};

use super::notify::{Reply, shortage};
use super::sockaddr::{Given, Purpose};
use super::socket::{Connected, Connecting, End, Ended, Phase, Socket, SocketKey};
use super::{Bridge, PAIR_BUFFER, errno};

/// What a step of connect decided.
enum Step {
    Done(Result<(), i32>),
    Hold,
}

impl Bridge {
    pub(super) fn call_connect(&mut self, call: &Notification, key: SocketKey, end: &OwnedFd) -> Reply {
        match self.connect(call, key, end) {
            Ok(Step::Done(result)) => result.into(),
            Ok(Step::Hold) => {
                let timeout = unix::timeout(end.as_fd(), Timeout::Send).ok().flatten();
                self.hold(call, key, timeout);
                Reply::Taken
            }
            Err(number) => Reply::Done(Err(number)),
        }
    }

    fn connect(&mut self, call: &Notification, key: SocketKey, end: &OwnedFd) -> Result<Step, i32> {
        let socket = self.sockets.get_mut(&key).ok_or(libc::EBADF)?;
        let family = socket.family;
        let given = self.read_address(call, family, Purpose::Connect)?;
        let Given::Address(address) = given else {
            return self.disconnect(key).map(|()| Step::Done(Ok(())));
        };
        let nonblocking = unix::is_nonblocking(end.as_fd()).unwrap_or(true);
        let socket = self.sockets.get_mut(&key).ok_or(libc::EBADF)?;
        match &mut socket.phase {
            Phase::Idle { .. } => self.start(key, reachable(address), nonblocking, end.as_fd()),
            Phase::Connecting { connecting, .. } => {
                connecting.waiters.retain(|waiter| waiter.call.thread != call.thread);
                if nonblocking { Err(libc::EALREADY) } else { Ok(Step::Hold) }
            }
            Phase::Connected { connected, .. } => {
                if connected.reported {
                    return Err(libc::EISCONN);
                }
                connected.reported = true;
                Ok(Step::Done(Ok(())))
            }
            Phase::Gone { ended: ended @ Ended::Failed, .. } => {
                *ended = Ended::NotConnected;
                // The kernel's note of it goes as well.
                let _ = sockets::int_option(end.as_fd(), libc::SOL_SOCKET, libc::SO_ERROR);
                Err(socket.error.take().unwrap_or(libc::ECONNABORTED))
            }
            Phase::Gone { ended: Ended::NotConnected, .. } => {
                socket.error = None;
                let end = self.revive(call, key, nonblocking)?;
                self.start(key, reachable(address), nonblocking, end.as_fd())
            }
            Phase::Listening { .. } | Phase::Gone { .. } => Err(libc::EISCONN),
        }
    }

    /// Begins to connect an idle socket. What the program wrote before, which Linux would have refused, is dropped.
    fn start(
        &mut self,
        key: SocketKey,
        remote: SocketAddr,
        nonblocking: bool,
        program_end: BorrowedFd<'_>,
    ) -> Result<Step, i32> {
        let socket = self.sockets.get_mut(&key).ok_or(libc::EBADF)?;
        let Phase::Idle { id, end } = &socket.phase else {
            return Err(libc::EISCONN);
        };
        let id = *id;
        if self.stack.tcp_options(id).v6only && remote.is_ipv4() {
            return Err(libc::ENETUNREACH);
        }
        self.stack.tcp_connect(self.now, id, remote).map_err(errno)?;
        drain(end.fd.as_fd(), usize::MAX);
        let fill = if nonblocking { fill_up(program_end) } else { 0 };
        let gone = Phase::Gone { local: None, ended: Ended::NotConnected };
        if let Phase::Idle { id, end } = std::mem::replace(&mut socket.phase, gone) {
            let connecting = Connecting { fill, ..Connecting::default() };
            socket.phase = Phase::Connecting { id, end, connecting };
        }
        if nonblocking { Ok(Step::Done(Err(libc::EINPROGRESS))) } else { Ok(Step::Hold) }
    }

    /// `connect(AF_UNSPEC)`: back to an unconnected socket.
    fn disconnect(&mut self, key: SocketKey) -> Result<(), i32> {
        let socket = self.sockets.get_mut(&key).ok_or(libc::EBADF)?;
        match &mut socket.phase {
            Phase::Idle { .. } => Ok(()),
            Phase::Gone { local, ended } => {
                if *ended == Ended::Shut {
                    socket.error = Some(libc::ECONNRESET);
                }
                if !socket.bound {
                    *local = local.map(|local| SocketAddr::new(socket.family.wildcard().ip(), local.port()));
                }
                *ended = Ended::NotConnected;
                Ok(())
            }
            Phase::Listening { .. } => {
                self.stop_listening(key);
                Ok(())
            }
            Phase::Connecting { .. } | Phase::Connected { .. } => {
                let connecting = matches!(socket.phase, Phase::Connecting { .. });
                self.abandon(key, (libc::ECONNABORTED, Ended::NotConnected));
                if let Some(socket) = self.sockets.get_mut(&key) {
                    socket.error = (!connecting).then_some(libc::ECONNRESET);
                }
                Ok(())
            }
        }
    }

    /// Resets the connection at the program's own wish.
    fn abandon(&mut self, key: SocketKey, (number, ended): (i32, Ended)) {
        if let Some(id) = self.sockets.get(&key).and_then(Socket::id) {
            self.break_pair(key, number, ended);
            self.stack.tcp_abort(self.now, id);
        }
    }

    /// Gives the caller's process a new pair after the old one went with a connection, for all its descriptors of the socket. The
    /// socket keeps its options and the address it was bound to.
    pub(super) fn revive(&mut self, call: &Notification, key: SocketKey, nonblocking: bool) -> Result<OwnedFd, i32> {
        let former = self.sockets.get(&key).ok_or(libc::EBADF)?.inode;
        let short = |error: io::Error| shortage(&error);
        let (ours, theirs, inode) = self.make_pair(nonblocking).map_err(short)?;
        self.watch(key, &ours).map_err(short)?;
        // Another process that has it keeps what is left of the old pair.
        for number in self.processes.numbers_of(call.thread, former) {
            let close_on_exec = self.processes.closes_on_exec(call.thread, number);
            self.listener
                .replace_descriptor(call.id, theirs.as_fd(), number, close_on_exec)
                .map_err(|error| error.raw_os_error().unwrap_or(libc::EINTR))?;
        }
        let id = self.stack.tcp_open().map_err(errno)?;
        let Some(mut socket) = self.remove(key) else {
            return Err(libc::EBADF);
        };
        if let Some(kept) = socket.kept.take() {
            let reuse = netstack::Reuse { address: kept.reuse_address, port: kept.reuse_port };
            for option in super::options::all(&kept) {
                let _ = self.stack.tcp_set(self.now, id, option);
            }
            // Somebody else may have taken the port meanwhile; then the socket is no longer bound.
            socket.bound = match &socket.phase {
                Phase::Gone { local: Some(local), .. } if socket.bound => {
                    self.stack.tcp_bind(id, *local, reuse).is_ok()
                }
                _ => false,
            };
        }
        self.gone.retain(|&gone| gone != key);
        socket.inode = inode;
        socket.phase = Phase::Idle { id, end: End::new(ours) };
        socket.shut_read = false;
        socket.shut_write = false;
        socket.options.apply(theirs.as_fd());
        self.insert(key, socket);
        Ok(theirs)
    }

    /// Looks how a connection attempt goes.
    pub(super) fn serve_connecting(&mut self, key: SocketKey) {
        let Some(Socket { phase: Phase::Connecting { id, end, .. }, .. }) = self.sockets.get(&key) else {
            return;
        };
        let id = *id;
        let hung_up = end.hung_up;
        match self.stack.status(id).state {
            _ if hung_up => self.close(key),
            State::SynSent | State::SynReceived => {}
            State::Closed => self.fail(key),
            _ => self.establish(key),
        }
    }

    fn establish(&mut self, key: SocketKey) {
        let fill = match self.sockets.get(&key) {
            Some(Socket { phase: Phase::Connecting { connecting, .. }, .. }) => connecting.fill,
            _ => return,
        };
        if fill > 0 {
            // The buffer grows back before the drain, which then reports it writable in its full size.
            match self.program_end(key) {
                Some(end) => drop(unix::set_send_buffer(end.as_fd(), PAIR_BUFFER / 2)),
                None => tracing::debug!(%key, "the program's end of a socket can't be found; its buffer stays small"),
            }
        }
        let Some(socket) = self.sockets.get_mut(&key) else {
            return;
        };
        let gone = Phase::Gone { local: None, ended: Ended::NotConnected };
        let Phase::Connecting { id, end, connecting } = std::mem::replace(&mut socket.phase, gone) else {
            return;
        };
        drain(end.fd.as_fd(), connecting.fill);
        let mut connected = Connected { reported: false, end_passed: false, finished: false };
        connected.reported = connecting.waiters.iter().any(|waiter| self.listener.is_valid(waiter.call.id));
        socket.phase = Phase::Connected { id, end, connected };
        for waiter in connecting.waiters {
            self.forget_deadline(key, &waiter);
            self.reply(&waiter.call, Some(key), Reply::Done(Ok(0)));
        }
        if let Some(end) = self.sockets.get_mut(&key).and_then(Socket::end_mut) {
            end.readable = true;
            end.writable = true;
        }
        self.enqueue(key);
    }

    fn fail(&mut self, key: SocketKey) {
        let Some(socket) = self.sockets.get_mut(&key) else {
            return;
        };
        let gone = Phase::Gone { local: None, ended: Ended::NotConnected };
        let Phase::Connecting { id, end, connecting } = std::mem::replace(&mut socket.phase, gone) else {
            return;
        };
        let number = self.stack.take_error(id).map_or(libc::ECONNREFUSED, errno);
        let waiters: Vec<_> =
            connecting.waiters.into_iter().filter(|waiter| self.listener.is_valid(waiter.call.id)).collect();
        socket.phase = Phase::Idle { id, end };
        if waiters.is_empty() || connecting.fill > 0 {
            self.break_pair(key, number, Ended::Failed);
            self.stack.tcp_close(self.now, id);
        } else {
            self.reopen(key);
        }
        for (index, waiter) in waiters.into_iter().enumerate() {
            self.forget_deadline(key, &waiter);
            // The error is told once; another thread in the same connect hears what Linux says of an unconnected socket.
            let number = if index == 0 { number } else { libc::ECONNABORTED };
            self.reply(&waiter.call, Some(key), Reply::Done(Err(number)));
        }
    }
}

/// Connecting to the wildcard address means the host itself.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// Writes into the program's end until it isn't writable any more; returns how much.
pub(super) fn fill_up(program_end: BorrowedFd<'_>) -> usize {
    // The kernel raises this to its minimum of some 4.5 KiB.
    drop(sockets::set_int_option(program_end, libc::SOL_SOCKET, libc::SO_SNDBUF, 0));
    let block = [0u8; 2048];
    let mut filled = 0;
    while let Ok(count) = unix::send(program_end, &[IoSlice::new(&block)]) {
        filled += count;
    }
    filled
}

/// Takes the fill back out of our end.
fn drain(end: BorrowedFd<'_>, mut fill: usize) {
    let mut block = [0u8; 4096];
    while fill > 0 {
        let length = fill.min(block.len());
        match unix::receive(end, &mut [IoSliceMut::new(&mut block[..length])], Receive::empty()) {
            Ok(count) if count > 0 => fill -= count,
            _ => return,
        }
    }
}
