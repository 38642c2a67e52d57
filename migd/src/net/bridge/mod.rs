//! The bridge: gives unmodified programs sockets whose TCP runs in the stack.
//!
//! A program's socket is one end of a Unix socket pair, so everything that moves bytes or waits for them is the kernel's. We hold
//! the other end. Calls that a Unix socket would answer wrongly arrive as seccomp notifications and are answered here as
//! Linux answers them for TCP.
//!
//! * `notify`: takes calls in, finds the socket they are about, and answers.
//! * `listen`, `connect`, `options`: the calls by subject; `sockaddr`, `info` and `abi`: their data in a program's memory.
//! * `transfer`: bytes, ends of file and resets between pair and stack.
//! * `socket`: one socket and its phases; `processes`: descriptors in the job's processes.
//! * `image`: freeze and thaw.

pub(super) mod abi;
mod connect;
mod image;
mod info;
mod keys;
mod listen;
mod notify;
mod options;
mod processes;
mod sockaddr;
mod socket;
mod transfer;

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use netstack::{Instant, SocketError, SocketId, State};
use sys::epoll::{Epoll, Interest};
use sys::seccomp::Listener;
use sys::unix;

use super::describe::{SocketDescription, TcpDetail};
use super::numbers::{NumberMap, NumberSet};
use super::stack::Stack;
use processes::Processes;
use socket::{Phase, Socket};

pub use image::BridgeImage;
pub(super) use image::SocketImage;
pub use keys::DescriptorKeys;
pub use socket::SocketKey;

/// How much a program may have written that the stack hasn't taken, and the other way round, a socket. The kernel counts its own
/// bookkeeping in, so about half of it is payload. Memory is used only while bytes wait. A pair begins with the kernel's
/// default (`net.core.wmem_default`) and grows to this when that has been full.
const PAIR_BUFFER: usize = 512 << 10;
/// Sockets that are over and still remembered, see [`Phase::Gone`].
const GONE_MAX: usize = 4096;
/// Sockets served in one go before the pump looks at packets again.
pub(super) const SERVED_A_ROUND: usize = 1024;

/// The two ends of a socket, whose kernel sockets belong to the network namespace of the thread that makes them.
pub(super) struct Pair {
    pub(super) ours: OwnedFd,
    pub(super) theirs: OwnedFd,
    /// Of the program's end.
    pub(super) inode: u64,
}

impl Pair {
    pub(super) fn new(nonblocking: bool) -> io::Result<Pair> {
        let (ours, theirs) = unix::pair(nonblocking)?;
        let inode = unix::inode(theirs.as_fd())?;
        Ok(Pair { ours, theirs, inode })
    }
}

/// What is watched for at our end of a pair. Room is not among it: each read of the program makes some, which would be an event,
/// and often a wake-up, for each request of a connection that never lacks room. [`socket::End::watch_for_room`] adds it.
const WATCHED: Interest = Interest::IN.union(Interest::READ_HANG_UP).union(Interest::EDGE);

/// Has our end of a socket's pair watched.
pub(super) fn watch(epoll: &Epoll, key: SocketKey, ours: &OwnedFd) -> io::Result<()> {
    epoll.add(ours.as_fd(), key.0, WATCHED)
}

/// The bridge of one job, together with the stack that it feeds.
pub(super) struct Bridge {
    pub(super) stack: Stack,
    listener: Listener,
    epoll: Rc<Epoll>,
    now: Instant,
    sockets: NumberMap<SocketKey, Socket>,
    by_inode: DescriptorKeys,
    by_id: NumberMap<SocketId, SocketKey>,
    next_key: u64,
    /// Bytes taken from pairs since it was last asked.
    pulled: usize,
    /// Sockets that memory has been lent to.
    borrowers: Vec<SocketKey>,
    /// A program takes pages out of its sockets, and may keep them longer than the kernel says: nothing is lent any more.
    spliced: bool,
    /// Sockets to serve, each once.
    queue: VecDeque<SocketKey>,
    queued: NumberSet<SocketKey>,
    /// Connections to reset once what they have queued has been handed out.
    resets: Vec<SocketId>,
    /// The sockets in [`Phase::Gone`], oldest first.
    gone: VecDeque<SocketKey>,
    /// Deadlines of held calls: when, whose, and which call.
    deadlines: BTreeSet<(Instant, SocketKey, u64)>,
    processes: Processes,
    /// What the target of a move was told of sockets before the freeze.
    told: HashMap<SocketKey, SocketImage>,
}

impl Bridge {
    pub(super) fn new(stack: Stack, listener: Listener, epoll: Rc<Epoll>, init_pid: Option<i32>) -> Bridge {
        Bridge {
            stack,
            listener,
            epoll,
            now: Instant::ZERO,
            sockets: NumberMap::default(),
            by_inode: DescriptorKeys::default(),
            by_id: NumberMap::default(),
            next_key: 1,
            pulled: 0,
            borrowers: Vec::new(),
            spliced: false,
            queue: VecDeque::new(),
            queued: NumberSet::default(),
            resets: Vec::new(),
            gone: VecDeque::new(),
            deadlines: BTreeSet::new(),
            processes: Processes::new(init_pid),
            told: HashMap::new(),
        }
    }

    pub(super) fn listener(&self) -> &Listener {
        &self.listener
    }

    /// The time of everything that follows.
    pub(super) fn set_now(&mut self, now: Instant) {
        self.now = now;
    }

    /// Notes an event of our end of a pair.
    pub(super) fn handle_event(&mut self, key: SocketKey, ready: Interest) {
        let Some(end) = self.sockets.get_mut(&key).and_then(Socket::end_mut) else {
            return;
        };
        let ended = Interest::READ_HANG_UP | Interest::HANG_UP | Interest::ERROR;
        end.readable |= ready.intersects(Interest::IN | ended);
        end.writable |= ready.intersects(Interest::OUT | Interest::HANG_UP | Interest::ERROR);
        end.read_hung_up |= ready.intersects(ended);
        end.hung_up |= ready.contains(Interest::HANG_UP);
        self.enqueue(key);
    }

    fn enqueue(&mut self, key: SocketKey) {
        if self.queued.insert(key) {
            self.queue.push_back(key);
        }
    }

    /// Has every socket served that holds something on either side.
    pub(super) fn enqueue_busy(&mut self) {
        let is_idle = |socket: &Socket| image::is_calm(socket) && socket.id().is_some_and(|id| self.stack.is_idle(id));
        let busy = self.sockets.iter().filter(|(_, socket)| !is_idle(socket));
        let keys: Vec<SocketKey> = busy.map(|(key, _)| *key).collect();
        for key in keys {
            self.enqueue(key);
        }
    }

    /// Whether sockets are still to be served.
    pub(super) fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Serves the sockets that changed on either side.
    pub(super) fn serve(&mut self) {
        for _ in 0..SERVED_A_ROUND {
            if self.serve_next().is_none() {
                return;
            }
        }
    }

    /// Bytes that programs have written since this was last asked.
    pub(super) fn take_pulled(&mut self) -> usize {
        std::mem::take(&mut self.pulled)
    }

    /// Serves one socket that changed, and says which; `None` when there is none.
    pub(super) fn serve_next(&mut self) -> Option<SocketKey> {
        while let Some(id) = self.stack.poll_changed() {
            if let Some(&key) = self.by_id.get(&id) {
                self.enqueue(key);
            }
        }
        let key = self.queue.pop_front()?;
        self.queued.remove(&key);
        self.serve_socket(key);
        Some(key)
    }

    fn serve_socket(&mut self, key: SocketKey) {
        let Some(socket) = self.sockets.get(&key) else {
            return;
        };
        if socket.id().is_some_and(|id| !self.stack.is_settled(id)) {
            // What is still to be told of it comes as a change.
            return;
        }
        match &socket.phase {
            Phase::Idle { end, .. } => {
                if end.hung_up {
                    self.close(key);
                }
            }
            Phase::Listening { .. } => self.serve_listener(key),
            Phase::Connecting { .. } => self.serve_connecting(key),
            Phase::Connected { .. } => self.serve_connected(key),
            Phase::Gone { .. } => {}
        }
    }

    /// Resets the connections whose last bytes are out; true when there were any.
    pub(super) fn finish_resets(&mut self) -> bool {
        let any = !self.resets.is_empty();
        for id in self.resets.drain(..) {
            self.stack.tcp_abort(self.now, id);
        }
        any
    }

    /// A pair for a program: our end, and the program's with its inode.
    fn make_pair(&self, nonblocking: bool) -> io::Result<(OwnedFd, OwnedFd, u64)> {
        let Pair { ours, theirs, inode } = Pair::new(nonblocking)?;
        Ok((ours, theirs, inode))
    }

    /// How many sockets the job has had.
    pub(super) fn sockets_made(&self) -> u64 {
        self.next_key
    }

    fn new_key(&mut self) -> SocketKey {
        let key = SocketKey(self.next_key);
        self.next_key += 1;
        key
    }

    fn watch(&self, key: SocketKey, ours: &OwnedFd) -> io::Result<()> {
        watch(&self.epoll, key, ours)
    }

    /// Makes room for so many sockets.
    fn reserve(&mut self, count: usize) {
        self.sockets.reserve(count);
        self.by_id.reserve(count);
        self.by_inode.reserve(count);
    }

    fn insert(&mut self, key: SocketKey, socket: Socket) {
        self.by_inode.insert(socket.inode, key);
        if let Some(id) = socket.id() {
            self.by_id.insert(id, key);
        } else {
            self.gone.push_back(key);
        }
        self.sockets.insert(key, socket);
    }

    /// Forgets a socket; the stack's part of it is the caller's.
    fn remove(&mut self, key: SocketKey) -> Option<Socket> {
        let socket = self.sockets.remove(&key)?;
        self.by_inode.remove(socket.inode, key);
        if let Some(id) = socket.id() {
            self.by_id.remove(&id);
        }
        Some(socket)
    }

    /// The program closed a socket that isn't connected.
    fn close(&mut self, key: SocketKey) {
        let Some(socket) = self.remove(key) else {
            return;
        };
        if let Phase::Listening { listener, .. } = &socket.phase {
            for &connection in &listener.returned {
                self.stack.tcp_abort(self.now, connection);
            }
        }
        if let Some(id) = socket.id() {
            self.stack.tcp_close(self.now, id);
        }
    }

    /// Lets go of the pair, and remembers how the socket ended. The stack's part is the caller's.
    fn set_gone(&mut self, key: SocketKey, ended: socket::Ended) {
        let Some(socket) = self.sockets.get_mut(&key) else {
            return;
        };
        if let Some(id) = socket.id() {
            let mut local = self.stack.tcp_endpoints(id).0;
            if !socket.bound && matches!(ended, socket::Ended::NotConnected | socket::Ended::Failed) {
                // The address was chosen for that one connection; the port is still shown, as Linux does.
                local = local.map(|local| SocketAddr::new(socket.family.wildcard().ip(), local.port()));
            }
            socket.kept = Some(Box::new(self.stack.tcp_options(id).clone()));
            self.by_id.remove(&id);
            socket.phase = Phase::Gone { local, ended };
            self.gone.push_back(key);
        }
        while self.gone.len() > GONE_MAX {
            if let Some(oldest) = self.gone.pop_front()
                && matches!(self.sockets.get(&oldest), Some(Socket { phase: Phase::Gone { .. }, .. }))
            {
                self.remove(oldest);
            }
        }
    }

    /// A duplicate of the program's end, wherever in the job it is open. `None` when no process has it.
    fn program_end(&mut self, key: SocketKey) -> Option<OwnedFd> {
        let socket = self.sockets.get(&key)?;
        let inode = socket.inode;
        if let Some(end) = socket.seen_at.and_then(|place| self.duplicate_checked(place, inode)) {
            return Some(end);
        }
        // Everything found on the way is noted, so that the next search ends above.
        for (inode, place) in self.processes.scan() {
            if let Some(socket) = self.by_inode.open(inode).and_then(|key| self.sockets.get_mut(&key)) {
                socket.seen_at = Some(place);
            }
        }
        let place = self.sockets.get(&key)?.seen_at?;
        self.duplicate_checked(place, inode)
    }

    fn duplicate_checked(&mut self, (process, number): (i32, i32), inode: u64) -> Option<OwnedFd> {
        let end = self.processes.duplicate(process, number).ok()?;
        (unix::inode(end.as_fd()).ok()? == inode).then_some(end)
    }

    /// The addresses of a socket.
    fn endpoints(&self, socket: &Socket) -> (Option<SocketAddr>, Option<SocketAddr>) {
        match &socket.phase {
            Phase::Gone { local, .. } => (*local, None),
            _ => socket.id().map_or((None, None), |id| self.stack.tcp_endpoints(id)),
        }
    }

    /// All sockets, for inspection: those of the programs, then those that wait to be accepted or outlive their program.
    pub(super) fn describe(&mut self) -> Vec<SocketDescription> {
        self.stack.refresh_all();
        let mut held: Vec<_> = self.sockets.iter().collect();
        held.sort_unstable_by_key(|(key, _)| **key);
        let known: HashSet<SocketId> = held.iter().filter_map(|(_, socket)| socket.id()).collect();
        let programs = held.iter().map(|(key, socket)| {
            let (local, remote) = self.endpoints(socket);
            let described = socket.id().map(|id| self.describe_in_stack(id));
            let described = described.unwrap_or_else(|| SocketDescription::closed(local, remote));
            SocketDescription { key: Some(**key), inode: Some(socket.inode), ..described }
        });
        let others =
            self.stack.sockets().into_iter().filter(|id| !known.contains(id)).map(|id| self.describe_in_stack(id));
        programs.chain(others).collect()
    }

    fn describe_in_stack(&self, id: SocketId) -> SocketDescription {
        let (local, remote) = self.stack.tcp_endpoints(id);
        let status = self.stack.status(id);
        let info = self.stack.tcp_info(self.now, id);
        let backlog = usize::try_from(info.sacked).unwrap_or(usize::MAX);
        let (receive_queue, send_queue) = match status.state {
            State::Listen => (status.acceptable, backlog),
            _ => (status.readable, status.unsent + status.unacked),
        };
        let tcp = remote.is_some().then(|| TcpDetail::from(&info));
        let state = state_name(status.state).to_owned();
        SocketDescription { state, receive_queue, send_queue, tcp, ..SocketDescription::closed(local, remote) }
    }

    /// Whether nothing is on its way out. The job has ended.
    pub(super) fn is_quiet(&mut self) -> bool {
        // A closed end that is still here waits for room in the stack.
        let leaving = |socket: &Socket| socket.end().is_some_and(|end| end.hung_up);
        if !self.queue.is_empty() || !self.resets.is_empty() || self.sockets.values().any(leaving) {
            return false;
        }
        match self.stack.as_away() {
            Some(away) => away.finish(),
            None => !self.stack.sockets().into_iter().any(|id| is_busy(&self.stack.status(id))),
        }
    }

    /// The stack's sockets that the programs have.
    pub(super) fn ids(&self) -> Vec<SocketId> {
        let returned = self.sockets.values().flat_map(|socket| match &socket.phase {
            Phase::Listening { listener, .. } => listener.returned.iter().copied().collect(),
            _ => Vec::new(),
        });
        self.by_id.keys().copied().chain(returned).collect()
    }

    /// The processes are gone, and their sockets go on without a pair here.
    pub(super) fn leave(&mut self) {
        self.sockets.clear();
        self.by_inode = DescriptorKeys::default();
        self.by_id.clear();
        self.queue.clear();
        self.queued.clear();
        self.gone.clear();
        self.deadlines.clear();
    }

    /// The key of each program's end by inode.
    pub(super) fn descriptor_keys(&self) -> DescriptorKeys {
        self.by_inode.clone()
    }
}

/// Whether a socket of the stack has something on its way out.
pub(super) fn is_busy(status: &netstack::Status) -> bool {
    let closing = matches!(status.state, State::FinWait1 | State::Closing | State::LastAck);
    status.unsent > 0 || status.unacked > 0 || closing
}

/// Names of states as ss(8) prints them.
fn state_name(state: State) -> &'static str {
    match state {
        State::Closed => "UNCONN",
        State::Listen => "LISTEN",
        State::SynSent => "SYN-SENT",
        State::SynReceived => "SYN-RECV",
        State::Established => "ESTAB",
        State::FinWait1 => "FIN-WAIT-1",
        State::FinWait2 => "FIN-WAIT-2",
        State::CloseWait => "CLOSE-WAIT",
        State::Closing => "CLOSING",
        State::LastAck => "LAST-ACK",
        State::TimeWait => "TIME-WAIT",
    }
}

/// The errno that a program gets for an error of the stack.
fn errno(error: SocketError) -> i32 {
    match error {
        SocketError::AddressInUse => libc::EADDRINUSE,
        SocketError::AddressNotAvailable => libc::EADDRNOTAVAIL,
        SocketError::ConnectionRefused => libc::ECONNREFUSED,
        SocketError::ConnectionReset => libc::ECONNRESET,
        SocketError::TimedOut => libc::ETIMEDOUT,
        SocketError::HostUnreachable => libc::EHOSTUNREACH,
        SocketError::NetworkUnreachable => libc::ENETUNREACH,
        SocketError::BrokenPipe => libc::EPIPE,
        SocketError::NotConnected => libc::ENOTCONN,
        SocketError::IsConnected => libc::EISCONN,
        SocketError::AlreadyInProgress => libc::EALREADY,
        SocketError::InvalidArgument => libc::EINVAL,
        SocketError::MessageTooLong => libc::EMSGSIZE,
        SocketError::Protocol => libc::EPROTO,
        SocketError::ProtocolNotAvailable => libc::ENOPROTOOPT,
        SocketError::AddressFamily => libc::EAFNOSUPPORT,
        SocketError::NoSuchSocket => libc::EBADF,
        SocketError::NoBuffers => libc::ENOBUFS,
    }
}
