//! System calls that the filter handed over: taken in, attributed to a socket, answered.

use std::os::fd::{AsFd, OwnedFd, RawFd};

use netstack::{Shutdown, TcpOption};
use sys::fds;
use sys::seccomp::{self, Notification};
use sys::unix::{self, Half};

use super::processes::has_capability;
use super::sockaddr::{self, Family, Given, Purpose};
use super::socket::{End, Ended, Phase, Socket, SocketKey, Undelivered};
use super::{Bridge, abi, errno};

/// What becomes of a call.
pub(super) enum Reply {
    /// It ends with this.
    Done(Result<i64, i32>),
    /// The kernel runs it.
    Proceed,
    /// It has been answered already, or is held.
    Taken,
}

impl From<Result<(), i32>> for Reply {
    fn from(result: Result<(), i32>) -> Reply {
        Reply::Done(result.map(|()| 0))
    }
}

/// Bits of socket(2)'s type and accept4(2)'s flags.
const TYPE_FLAGS: i32 = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
/// Ports below need a capability (`net.ipv4.ip_unprivileged_port_start`).
const FIRST_UNPRIVILEGED_PORT: u16 = 1024;
/// `CAP_NET_BIND_SERVICE`
const CAP_NET_BIND_SERVICE: u32 = 10;

/// An argument that the kernel takes as an int.
pub(super) fn int(argument: u64) -> i32 {
    (argument as u32).cast_signed()
}

impl Bridge {
    /// Takes in and answers the call that has waited longest; the listener must be readable.
    pub(in crate::net) fn handle_next_call(&mut self) {
        match self.listener.receive() {
            Ok(Some(call)) => self.handle_call(&call),
            // It was cancelled meanwhile.
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "can't receive a notification"),
        }
    }

    fn handle_call(&mut self, call: &Notification) {
        if call.number == libc::SYS_socket {
            let reply = self.call_socket(call);
            self.reply(call, None, reply);
            return;
        }
        if let libc::SYS_splice | libc::SYS_sendfile = call.number {
            self.note_splice(call);
            self.reply(call, None, Reply::Proceed);
            return;
        }
        let Some((key, end)) = self.find(call) else {
            self.reply(call, None, Reply::Proceed);
            return;
        };
        let lost = self.sockets.get_mut(&key).and_then(|socket| socket.undelivered.take());
        let reply = match lost {
            Some(lost) if lost.is_answer_to(call) => Reply::Done(lost.result),
            _ => self.dispatch(call, key, &end),
        };
        // The duplicate goes before the answer: the program may close its own right after it, and that must be seen.
        drop(end);
        self.reply(call, Some(key), reply);
        self.enqueue(key);
    }

    fn dispatch(&mut self, call: &Notification, key: SocketKey, end: &OwnedFd) -> Reply {
        match call.number {
            libc::SYS_bind => self.call_bind(call, key, end).into(),
            libc::SYS_listen => self.call_listen(call, key, end).into(),
            libc::SYS_accept => self.call_accept(call, key, end, 0),
            libc::SYS_accept4 => self.call_accept(call, key, end, int(call.args[3])),
            libc::SYS_connect => self.call_connect(call, key, end),
            libc::SYS_getsockname => self.call_name(call, key, false).into(),
            libc::SYS_getpeername => self.call_name(call, key, true).into(),
            libc::SYS_shutdown => self.call_shutdown(call, key, end).into(),
            libc::SYS_setsockopt => self.call_setsockopt(call, key, end),
            libc::SYS_getsockopt => self.call_getsockopt(call, key, end),
            libc::SYS_ioctl => self.call_ioctl(call, key),
            libc::SYS_sendto | libc::SYS_sendmsg | libc::SYS_sendmmsg => {
                if let Some(end) = self.sockets.get_mut(&key).and_then(Socket::end_mut) {
                    end.marks = true;
                }
                Reply::Proceed
            }
            // MSG_ERRQUEUE: no error is ever queued.
            libc::SYS_recvfrom | libc::SYS_recvmsg | libc::SYS_recvmmsg => Reply::Done(Err(libc::EAGAIN)),
            _ => Reply::Proceed,
        }
    }

    /// A call is about to move pages from one file into another. If the first is a socket of ours, these may be pages that were
    /// lent to it, which from then on are referred to without the socket's knowing. So nothing more is lent, and what is on
    /// loan gets new pages.
    fn note_splice(&mut self, call: &Notification) {
        if self.spliced {
            return;
        }
        let number = if call.number == libc::SYS_splice { call.args[0] } else { call.args[1] };
        let end = self.processes.duplicate(call.thread, int(number));
        let is_ours = match end.and_then(|end| unix::inode(end.as_fd())) {
            Ok(inode) => self.by_inode.open(inode).is_some(),
            // What can't be told may be one.
            Err(error) => error.raw_os_error() != Some(libc::EBADF),
        };
        if is_ours {
            self.spliced = true;
            for key in self.borrowers.drain(..) {
                if let Some(end) = self.sockets.get_mut(&key).and_then(Socket::end_mut) {
                    end.loans.clear();
                }
            }
        }
    }

    /// The socket that a call's first argument stands for, and a duplicate of the program's end. `None`: not one of ours.
    fn find(&mut self, call: &Notification) -> Option<(SocketKey, OwnedFd)> {
        let number: RawFd = int(call.args[0]);
        let end = self.processes.duplicate(call.thread, number).ok()?;
        let inode = unix::inode(end.as_fd()).ok()?;
        let key = self.by_inode.open(inode)?;
        let place = (self.processes.process(call.thread), number);
        self.sockets.get_mut(&key)?.seen_at = Some(place);
        Some((key, end))
    }

    pub(super) fn reply(&mut self, call: &Notification, key: Option<SocketKey>, reply: Reply) {
        let sent = match reply {
            Reply::Taken => return,
            Reply::Proceed => self.listener.proceed(call.id),
            Reply::Done(result) => {
                let sent = self.listener.answer(call.id, result);
                if sent.is_err() && has_lasting_effect(call) {
                    let socket = key.and_then(|key| self.sockets.get_mut(&key));
                    if let Some(socket) = socket {
                        socket.undelivered = Some(Undelivered::of(call, result));
                    }
                }
                sent
            }
        };
        if let Err(error) = sent
            && error.raw_os_error() != Some(libc::ENOENT)
        {
            tracing::warn!(%error, call = call.number, thread = call.thread, "can't answer a system call");
        }
    }

    /// Reads a structure from the calling thread's memory.
    pub(super) fn read_bytes(&self, call: &Notification, address: u64, length: usize) -> Result<Vec<u8>, i32> {
        let mut bytes = vec![0; length];
        seccomp::read_memory(call.thread, address, &mut bytes).map_err(|_| libc::EFAULT)?;
        // The thread may have died and its number been given away between the notification and the read.
        if self.listener.is_valid(call.id) { Ok(bytes) } else { Err(libc::EINTR) }
    }

    /// Reads an int from the calling thread's memory.
    pub(super) fn read_int(&self, call: &Notification, address: u64) -> Result<i32, i32> {
        let bytes = self.read_bytes(call, address, 4)?;
        Ok(i32::from_ne_bytes(bytes.try_into().expect("four bytes were asked for")))
    }

    /// Writes into the calling thread's memory.
    pub(super) fn write_bytes(&self, call: &Notification, address: u64, bytes: &[u8]) -> Result<(), i32> {
        if !self.listener.is_valid(call.id) {
            return Err(libc::EINTR);
        }
        seccomp::write_memory(call.thread, address, bytes).map_err(|_| libc::EFAULT)
    }

    /// Writes as much of a value as the caller has room for, and its length, as calls with a value-result length do.
    pub(super) fn write_sized(
        &self,
        call: &Notification,
        address: u64,
        length_address: u64,
        value: &[u8],
        length: usize,
    ) -> Result<(), i32> {
        // The read has made sure that the caller still waits; it needn't be asked again for the write that follows.
        let room = usize::try_from(self.read_int(call, length_address)?).map_err(|_| libc::EINVAL)?;
        let length = i32::try_from(length).expect("values are short");
        let places = [(address, &value[..room.min(value.len())]), (length_address, &length.to_ne_bytes()[..])];
        seccomp::write_memory_at(call.thread, places).map_err(|_| libc::EFAULT)
    }

    pub(super) fn read_address(&self, call: &Notification, family: Family, purpose: Purpose) -> Result<Given, i32> {
        let length = usize::try_from(int(call.args[2])).map_err(|_| libc::EINVAL)?;
        if length > sockaddr::LEN_MAX {
            return Err(libc::EINVAL);
        }
        let bytes = self.read_bytes(call, call.args[1], length)?;
        family.decode(&bytes, purpose)
    }

    /// `socket(AF_INET | AF_INET6, SOCK_STREAM | flags, 0 | IPPROTO_TCP)`; the filter lets nothing else through.
    fn call_socket(&mut self, call: &Notification) -> Reply {
        let family = if int(call.args[0]) == libc::AF_INET6 { Family::V6 } else { Family::V4 };
        let kind = int(call.args[1]);
        if kind & !0xf & !TYPE_FLAGS != 0 {
            return Reply::Done(Err(libc::EINVAL));
        }
        let (ours, theirs, inode) = match self.make_pair(kind & libc::SOCK_NONBLOCK != 0) {
            Ok(pair) => pair,
            Err(error) => return Reply::Done(Err(shortage(&error))),
        };
        let key = self.new_key();
        if let Err(error) = self.watch(key, &ours) {
            return Reply::Done(Err(shortage(&error)));
        }
        let id = match self.stack.tcp_open() {
            Ok(id) => id,
            Err(error) => return Reply::Done(Err(errno(error))),
        };
        self.insert(key, Socket::new(family, inode, Phase::Idle { id, end: End::new(ours) }));
        let result = self.listener.answer_with_descriptor(call.id, theirs.as_fd(), kind & libc::SOCK_CLOEXEC != 0);
        match result {
            Ok(number) => {
                let process = self.processes.process(call.thread);
                if let Some(socket) = self.sockets.get_mut(&key) {
                    socket.seen_at = Some((process, number));
                }
                Reply::Taken
            }
            Err(error) => {
                self.close(key);
                refusal(&error)
            }
        }
    }

    fn call_bind(&mut self, call: &Notification, key: SocketKey, end: &OwnedFd) -> Result<(), i32> {
        let socket = self.sockets.get(&key).ok_or(libc::EBADF)?;
        let family = socket.family;
        let Given::Address(address) = self.read_address(call, family, Purpose::Bind)? else {
            return Err(libc::EAFNOSUPPORT);
        };
        if let Phase::Gone { ended, .. } = socket.phase
            && ended != Ended::Shut
            && !socket.bound
        {
            self.revive(call, key, unix::is_nonblocking(end.as_fd()).unwrap_or(true))?;
        }
        let socket = self.sockets.get(&key).ok_or(libc::EBADF)?;
        let Phase::Idle { id, .. } = &socket.phase else {
            return Err(libc::EINVAL);
        };
        if (1..FIRST_UNPRIVILEGED_PORT).contains(&address.port()) && !has_capability(call.thread, CAP_NET_BIND_SERVICE)
        {
            return Err(libc::EACCES);
        }
        let options = self.stack.tcp_options(*id);
        if family == Family::V6 && options.v6only && address.is_ipv4() {
            return Err(libc::EINVAL);
        }
        let reuse = netstack::Reuse { address: options.reuse_address, port: options.reuse_port };
        self.stack.tcp_bind(*id, address, reuse).map_err(errno)?;
        if let Some(socket) = self.sockets.get_mut(&key) {
            socket.bound = true;
        }
        Ok(())
    }

    fn call_name(&mut self, call: &Notification, key: SocketKey, peer: bool) -> Result<(), i32> {
        let socket = self.sockets.get(&key).ok_or(libc::EBADF)?;
        let (local, remote) = self.endpoints(socket);
        let address = if peer {
            let connected = matches!(socket.phase, Phase::Connected { .. });
            remote.filter(|_| connected).ok_or(libc::ENOTCONN)?
        } else {
            local.unwrap_or_else(|| socket.family.wildcard())
        };
        let bytes = socket.family.encode(address);
        self.write_sized(call, call.args[1], call.args[2], &bytes, bytes.len())
    }

    fn call_shutdown(&mut self, call: &Notification, key: SocketKey, end: &OwnedFd) -> Result<(), i32> {
        let (half, read, write) = match int(call.args[1]) {
            libc::SHUT_RD => (Half::Read, true, false),
            libc::SHUT_WR => (Half::Write, false, true),
            libc::SHUT_RDWR => (Half::Both, true, true),
            _ => return Err(libc::EINVAL),
        };
        let socket = self.sockets.get_mut(&key).ok_or(libc::EBADF)?;
        match &mut socket.phase {
            Phase::Connected { id, connected, .. } => {
                let id = *id;
                // From now on the connection is no news to connect(2).
                connected.reported = true;
                socket.shut_read |= read;
                socket.shut_write |= write;
                if read {
                    // Linux acknowledges and keeps what still comes; nobody can read it any more, so the stack may know.
                    let _ = self.stack.tcp_shutdown(self.now, id, Shutdown::Read);
                }
                // The kernel shuts the pair: what was written before stays in front of the end of file.
                unix::shutdown(end.as_fd(), half).map_err(|error| error.raw_os_error().unwrap_or(libc::ENOTCONN))
            }
            Phase::Listening { .. } => {
                if read {
                    self.stop_listening(key);
                }
                Ok(())
            }
            Phase::Gone { ended: Ended::Shut, .. } => Ok(()),
            _ => Err(libc::ENOTCONN),
        }
    }

    fn call_ioctl(&mut self, call: &Notification, key: SocketKey) -> Reply {
        let Some(socket) = self.sockets.get(&key) else {
            return Reply::Proceed;
        };
        let waiting = socket.end().map_or(0, |end| fds::bytes_waiting(end.fd.as_fd()).unwrap_or(0));
        let status = socket.id().map(|id| {
            self.stack.refresh(id);
            self.stack.status(id)
        });
        let (unsent, unacked) = status.map_or((0, 0), |status| (status.unsent, status.unacked));
        if matches!(socket.phase, Phase::Listening { .. }) {
            return Reply::Done(Err(libc::EINVAL));
        }
        let value = match int(call.args[1]) {
            abi::SIOCOUTQNSD => unsent + waiting,
            abi::SIOCOUTQ => unsent + unacked + waiting,
            _ => return Reply::Proceed,
        };
        let value = i32::try_from(value).unwrap_or(i32::MAX);
        self.write_bytes(call, call.args[2], &value.to_ne_bytes()).into()
    }

    /// Sets an option of the stack's socket.
    pub(super) fn set_stack_option(&mut self, key: SocketKey, option: TcpOption) -> Result<(), i32> {
        match self.sockets.get(&key).and_then(Socket::id) {
            Some(id) => self.stack.tcp_set(self.now, id, option).map_err(errno),
            None => {
                if let Some(kept) = self.sockets.get_mut(&key).and_then(|socket| socket.kept.as_mut()) {
                    kept.set(option);
                }
                Ok(())
            }
        }
    }
}

/// What a program is told when the shim itself runs short.
pub(super) fn shortage(error: &std::io::Error) -> i32 {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => libc::ENFILE,
        Some(number @ (libc::ENOMEM | libc::ENOBUFS)) => number,
        _ => libc::ENOBUFS,
    }
}

/// The answer after a descriptor couldn't be put into the program's table.
pub(super) fn refusal(error: &std::io::Error) -> Reply {
    match error.raw_os_error() {
        // The call was cancelled; there is nobody to answer.
        Some(libc::ENOENT | libc::ESRCH | libc::EINTR) => Reply::Taken,
        Some(number) => Reply::Done(Err(number)),
        None => Reply::Done(Err(libc::ENOBUFS)),
    }
}

/// Whether the call has changed something that the same call, restarted, would stumble over.
fn has_lasting_effect(call: &Notification) -> bool {
    match call.number {
        libc::SYS_bind | libc::SYS_connect => true,
        libc::SYS_getsockopt => int(call.args[1]) == libc::SOL_SOCKET && int(call.args[2]) == libc::SO_ERROR,
        _ => false,
    }
}
