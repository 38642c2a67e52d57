//! Listening sockets: listen, accept, and their readability.
//!
//! The program's end of a listener is readable while connections wait: we keep one byte for each in the pair, up to
//! [`SIGNALS_MAX`]. How many wait is always asked of the stack; the bytes only wake. A surplus byte costs a program one
//! accept that says EAGAIN, and goes away with it.

use std::io::{IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use netstack::SocketId;
use sys::seccomp::Notification;
use sys::unix::{self, Receive, Timeout};

use super::connect::fill_up;
use super::notify::{Reply, int, refusal, shortage};
use super::socket::{Connected, End, Ended, Listening, Phase, Socket, SocketKey, Waiter};
use super::{Bridge, errno};

/// Most bytes that stand for waiting connections; each costs the kernel a buffer of its own.
pub(super) const SIGNALS_MAX: usize = 64;
/// `net.core.somaxconn`
const BACKLOG_MAX: i32 = 4096;

impl Bridge {
    pub(super) fn call_listen(
        &mut self,
        call: &Notification,
        key: SocketKey,
        program_end: &OwnedFd,
    ) -> Result<(), i32> {
        // A negative backlog is a huge one to the kernel, which clamps it.
        let backlog = int(call.args[1]);
        let backlog = if (0..BACKLOG_MAX).contains(&backlog) { backlog } else { BACKLOG_MAX };
        let backlog = backlog.cast_unsigned();
        let socket = self.sockets.get_mut(&key).ok_or(libc::EBADF)?;
        let revived = match socket.phase {
            Phase::Gone { ended: Ended::NotConnected, .. } => {
                Some(self.revive(call, key, unix::is_nonblocking(program_end.as_fd()).unwrap_or(true))?)
            }
            _ => None,
        };
        let program_end = revived.as_ref().unwrap_or(program_end);
        let socket = self.sockets.get_mut(&key).ok_or(libc::EBADF)?;
        match &socket.phase {
            Phase::Idle { id, .. } => {
                let id = *id;
                if self.stack.tcp_endpoints(id).0.is_none() {
                    let wildcard = socket.family.wildcard();
                    self.stack.tcp_bind(id, wildcard, netstack::Reuse::default()).map_err(errno)?;
                }
                self.stack.tcp_listen(self.now, id, backlog).map_err(errno)?;
                let gone = Phase::Gone { local: None, ended: Ended::NotConnected };
                if let Phase::Idle { id, end } = std::mem::replace(&mut socket.phase, gone) {
                    // A listener is never writable.
                    fill_up(program_end.as_fd());
                    socket.phase = Phase::Listening { id, end, listener: Listening::default() };
                }
                Ok(())
            }
            Phase::Listening { id, .. } => self.stack.tcp_listen(self.now, *id, backlog).map_err(errno),
            _ => Err(libc::EINVAL),
        }
    }

    /// `shutdown(SHUT_RD)` on a listener stops it; it keeps its port, and waiting accepts fail.
    pub(super) fn stop_listening(&mut self, key: SocketKey) {
        let Some(socket) = self.sockets.get_mut(&key) else {
            return;
        };
        let gone = Phase::Gone { local: None, ended: Ended::NotConnected };
        let Phase::Listening { id, end, listener } = std::mem::replace(&mut socket.phase, gone) else {
            return;
        };
        for &connection in &listener.returned {
            self.stack.tcp_abort(self.now, connection);
        }
        // Blocking pollers must wake as well: the end of file makes the program's end readable.
        drop(unix::shutdown(end.fd.as_fd(), unix::Half::Write));
        socket.phase = Phase::Idle { id, end };
        self.reopen(key);
        for waiter in listener.waiters {
            self.reply(&waiter.call, None, Reply::Done(Err(libc::EINVAL)));
        }
    }

    /// Gives an idle socket a new socket in the stack with the same options and the same address.
    pub(super) fn reopen(&mut self, key: SocketKey) {
        let Some(socket) = self.sockets.get_mut(&key) else {
            return;
        };
        let Phase::Idle { id, .. } = &mut socket.phase else {
            return;
        };
        let old = *id;
        let (local, _) = self.stack.tcp_endpoints(old);
        let options = super::options::all(self.stack.tcp_options(old));
        let reuse = {
            let options = self.stack.tcp_options(old);
            netstack::Reuse { address: options.reuse_address, port: options.reuse_port }
        };
        self.stack.tcp_close(self.now, old);
        let Ok(new) = self.stack.tcp_open() else {
            // The stack is lost, and with it all that the socket could do.
            return;
        };
        *id = new;
        for option in options {
            let _ = self.stack.tcp_set(self.now, new, option);
        }
        if let Some(local) = local.filter(|_| socket.bound) {
            let _ = self.stack.tcp_bind(new, local, reuse);
        }
        self.by_id.remove(&old);
        self.by_id.insert(new, key);
    }

    pub(super) fn call_accept(&mut self, call: &Notification, key: SocketKey, end: &OwnedFd, flags: i32) -> Reply {
        if flags & !(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC) != 0 {
            return Reply::Done(Err(libc::EINVAL));
        }
        let Some(socket) = self.sockets.get_mut(&key) else {
            return Reply::Done(Err(libc::EBADF));
        };
        let Phase::Listening { listener, .. } = &mut socket.phase else {
            return Reply::Done(Err(libc::EINVAL));
        };
        if self.stack.is_lost() {
            return Reply::Done(Err(libc::ENETDOWN));
        }
        // A thread waits in one call only, so an older one of its was cancelled.
        listener.waiters.retain(|waiter| waiter.call.thread != call.thread);
        let connection = self.next_connection(key);
        // Before the answer: who polls right after it must not find the listener readable for a connection that it has got.
        self.settle_signals(key, end);
        match connection {
            Some(connection) => self.give_connection(call, key, connection, flags),
            None if unix::is_nonblocking(end.as_fd()).unwrap_or(true) => Reply::Done(Err(libc::EAGAIN)),
            None => {
                let timeout = unix::timeout(end.as_fd(), Timeout::Receive).ok().flatten();
                self.hold(call, key, timeout);
                Reply::Taken
            }
        }
    }

    fn next_connection(&mut self, key: SocketKey) -> Option<SocketId> {
        let Some(Socket { phase: Phase::Listening { id, listener, .. }, .. }) = self.sockets.get_mut(&key) else {
            return None;
        };
        listener.returned.pop_front().or_else(|| self.stack.tcp_accept(self.now, *id))
    }

    fn waiting_connections(&self, key: SocketKey) -> usize {
        match self.sockets.get(&key) {
            Some(Socket { phase: Phase::Listening { id, listener, .. }, .. }) => {
                listener.returned.len() + self.stack.status(*id).acceptable
            }
            _ => 0,
        }
    }

    /// Keeps a call until something ends it.
    pub(super) fn hold(&mut self, call: &Notification, key: SocketKey, timeout: Option<std::time::Duration>) {
        let deadline = timeout.map(|timeout| self.now + timeout);
        let waiter = Waiter { call: *call, deadline };
        match self.sockets.get_mut(&key).map(|socket| &mut socket.phase) {
            Some(Phase::Listening { listener, .. }) => listener.waiters.push_back(waiter),
            Some(Phase::Connecting { connecting, .. }) => connecting.waiters.push(waiter),
            _ => return,
        }
        if let Some(deadline) = deadline {
            self.deadlines.insert((deadline, key, call.id));
        }
    }

    /// When the next held call times out.
    pub(in crate::net) fn next_deadline(&self) -> Option<netstack::Instant> {
        self.deadlines.first().map(|&(deadline, ..)| deadline)
    }

    /// Ends the held calls whose time is over.
    pub(in crate::net) fn handle_deadlines(&mut self) {
        while let Some(&(deadline, key, call)) = self.deadlines.first() {
            if deadline > self.now {
                return;
            }
            self.deadlines.pop_first();
            let (waiter, result) = match self.sockets.get_mut(&key).map(|socket| &mut socket.phase) {
                Some(Phase::Listening { listener, .. }) => {
                    let at = listener.waiters.iter().position(|waiter| waiter.call.id == call);
                    (at.and_then(|at| listener.waiters.remove(at)), libc::EAGAIN)
                }
                Some(Phase::Connecting { connecting, .. }) => {
                    let at = connecting.waiters.iter().position(|waiter| waiter.call.id == call);
                    (at.map(|at| connecting.waiters.swap_remove(at)), libc::EINPROGRESS)
                }
                _ => continue,
            };
            if let Some(waiter) = waiter {
                self.reply(&waiter.call, None, Reply::Done(Err(result)));
            }
        }
    }

    /// Drops the deadline of a call that has been answered.
    pub(super) fn forget_deadline(&mut self, key: SocketKey, waiter: &Waiter) {
        if let Some(deadline) = waiter.deadline {
            self.deadlines.remove(&(deadline, key, waiter.call.id));
        }
    }

    /// Hands waiting connections to waiting calls, and wakes pollers for the rest.
    pub(super) fn serve_listener(&mut self, key: SocketKey) {
        let Some(Socket { phase: Phase::Listening { end, .. }, .. }) = self.sockets.get(&key) else {
            return;
        };
        if end.hung_up {
            self.close(key);
            return;
        }
        if self.stack.is_lost() {
            self.fail_listener(key);
            return;
        }
        while self.waiting_connections(key) > 0 {
            let Some(Socket { phase: Phase::Listening { listener, .. }, .. }) = self.sockets.get_mut(&key) else {
                return;
            };
            let Some(waiter) = listener.waiters.pop_front() else {
                break;
            };
            if !self.listener.is_valid(waiter.call.id) {
                self.forget_deadline(key, &waiter);
                continue;
            }
            let Some(connection) = self.next_connection(key) else {
                if let Some(Socket { phase: Phase::Listening { listener, .. }, .. }) = self.sockets.get_mut(&key) {
                    listener.waiters.push_front(waiter);
                }
                break;
            };
            self.forget_deadline(key, &waiter);
            let flags = if waiter.call.number == libc::SYS_accept4 { int(waiter.call.args[3]) } else { 0 };
            let reply = self.give_connection(&waiter.call, key, connection, flags);
            self.reply(&waiter.call, None, reply);
        }
        self.signal(key);
    }

    /// The stack is lost: whoever waits at the listener is told.
    fn fail_listener(&mut self, key: SocketKey) {
        let Some(Socket { phase: Phase::Listening { end, listener, .. }, .. }) = self.sockets.get_mut(&key) else {
            return;
        };
        if listener.signalled == 0 && unix::send(end.fd.as_fd(), &[IoSlice::new(b"c")]).is_ok() {
            // Stays there: a poller finds the listener ready and the call failing, as long as it looks.
            listener.signalled = 1;
        }
        let waiters = std::mem::take(&mut listener.waiters);
        for waiter in waiters {
            self.forget_deadline(key, &waiter);
            self.reply(&waiter.call, None, Reply::Done(Err(libc::ENETDOWN)));
        }
    }

    /// Adds bytes until there is one for each waiting connection.
    pub(super) fn signal(&mut self, key: SocketKey) {
        let wanted = self.waiting_connections(key).min(SIGNALS_MAX);
        let Some(Socket { phase: Phase::Listening { end, listener, .. }, .. }) = self.sockets.get_mut(&key) else {
            return;
        };
        while listener.signalled < wanted {
            if unix::send(end.fd.as_fd(), &[IoSlice::new(b"c")]).is_err() {
                return;
            }
            listener.signalled += 1;
        }
    }

    /// Makes the bytes in the pair as many as connections wait. Taking bytes back needs the program's end.
    fn settle_signals(&mut self, key: SocketKey, program_end: &OwnedFd) {
        let wanted = self.waiting_connections(key).min(SIGNALS_MAX);
        let Some(Socket { phase: Phase::Listening { listener, .. }, .. }) = self.sockets.get_mut(&key) else {
            return;
        };
        if listener.signalled > wanted {
            let mut bytes = [0u8; SIGNALS_MAX];
            let surplus = &mut bytes[..listener.signalled - wanted];
            match unix::receive(program_end.as_fd(), &mut [IoSliceMut::new(surplus)], Receive::empty()) {
                Ok(taken) if taken > 0 => listener.signalled -= taken,
                // The program has read the bytes itself.
                _ => listener.signalled = wanted,
            }
        }
        self.signal(key);
    }

    /// Gives a connection to the caller: a new pair, its address, and the descriptor.
    fn give_connection(&mut self, call: &Notification, key: SocketKey, connection: SocketId, flags: i32) -> Reply {
        match self.try_give(call, key, connection, flags) {
            Ok(()) => Reply::Taken,
            Err((reply, keep)) => {
                if keep {
                    if let Some(Socket { phase: Phase::Listening { listener, .. }, .. }) = self.sockets.get_mut(&key) {
                        listener.returned.push_front(connection);
                    }
                    self.enqueue(key);
                } else {
                    self.stack.tcp_abort(self.now, connection);
                }
                reply
            }
        }
    }

    /// The error says what to answer, and whether the connection stays for the next caller.
    fn try_give(
        &mut self,
        call: &Notification,
        listener: SocketKey,
        connection: SocketId,
        flags: i32,
    ) -> Result<(), (Reply, bool)> {
        let short = |error: std::io::Error| (Reply::Done(Err(shortage(&error))), true);
        let (ours, theirs, inode) = self.make_pair(flags & libc::SOCK_NONBLOCK != 0).map_err(short)?;
        let key = self.new_key();
        self.watch(key, &ours).map_err(short)?;
        let parent = self.sockets.get(&listener).ok_or((Reply::Taken, true))?;
        let connected = Connected { reported: true, end_passed: false, finished: false };
        let phase = Phase::Connected { id: connection, end: End::new(ours), connected };
        let mut socket = Socket::new(parent.family, inode, phase);
        socket.options = parent.options.clone();
        socket.options.apply(theirs.as_fd());
        self.size_pair(&socket, theirs.as_fd());
        if call.args[1] != 0 {
            let remote: Option<SocketAddr> = self.stack.tcp_endpoints(connection).1;
            let bytes = remote.map(|remote| socket.family.encode(remote)).unwrap_or_default();
            match self.write_sized(call, call.args[1], call.args[2], &bytes, bytes.len()) {
                Ok(()) => {}
                Err(libc::EINTR) => return Err((Reply::Taken, true)),
                Err(number) => return Err((Reply::Done(Err(number)), false)),
            }
        }
        let early = self.copy_received(&mut socket);
        let close_on_exec = flags & libc::SOCK_CLOEXEC != 0;
        // From the answer on, whoever looks through the job's descriptors must know what this one is.
        self.by_inode.insert(inode, key);
        let number = self.listener.answer_with_descriptor(call.id, theirs.as_fd(), close_on_exec).map_err(|error| {
            self.by_inode.remove(inode, key);
            (refusal(&error), true)
        })?;
        socket.seen_at = Some((self.processes.process(call.thread), number));
        if early > 0 {
            // It is in the stack as it was, so all of it is taken.
            let _ = self.stack.tcp_recv_with(self.now, connection, |_| early);
        }
        self.insert(key, socket);
        self.enqueue(key);
        Ok(())
    }

    /// Puts what a connection has received so far into its pair, so that a program that reads or polls it right after accept
    /// finds it and needn't be woken for it; returns how much. The stack keeps it until the program is known to have the pair.
    fn copy_received(&mut self, socket: &mut Socket) -> usize {
        let Phase::Connected { id, end, .. } = &mut socket.phase else {
            return 0;
        };
        let status = self.stack.status(*id);
        if status.readable == 0 || status.urgent.is_some() {
            return 0;
        }
        let mut copied = 0;
        let _ = self.stack.tcp_recv_with(self.now, *id, |parts| {
            copied = end.write(&parts.map(IoSlice::new)).unwrap_or(0);
            0
        });
        copied
    }
}
