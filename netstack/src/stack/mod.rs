//! The host: everything between packets and sockets.
//!
//! * this file: the stack's parts, its clock, timers and queues, and what happens when a connection changes;
//! * [`sockets`]: the calls a program makes;
//! * [`receive`]: packets in;
//! * [`transmit`]: packets out, and the loop back;
//! * [`image`]: freeze and thaw;
//! * [`told`]: what of it leaves before the freeze.

mod clock;
mod image;
mod limit;
mod ports;
mod receive;
mod reply;
pub(crate) mod slab;
mod socket;
mod sockets;
pub(crate) mod timer_queue;
mod told;
mod transmit;

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

pub use self::image::{ImageError, StackImage};
pub use self::told::{SocketCopy, ToldSockets};

use self::clock::Clock;
use self::limit::Limiter;
use self::ports::Ports;
use self::reply::Replies;
use self::slab::Slab;
use self::socket::{Kind, Socket};
use self::timer_queue::TimerQueue;
use self::transmit::Scratch;
use crate::fragments::Fragments;
use crate::hash::{Key, Keys};
use crate::tcp::connection::{Connection, Verdict};
use crate::tcp::half_open::{HalfOpen, OnTimeout};
use crate::tcp::time_wait::TimeWait;
use crate::tcp::{Env, Tuple};
use crate::{Config, Instant, Secrets, SocketId, State, TcpOptions};

/// Who a segment between two ends is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Socket(u32),
    HalfOpen(u32),
    TimeWait(u32),
}

/// How long after a move segments may arrive that a peer sent during it.
const AFTER_MOVE: std::time::Duration = std::time::Duration::from_millis(500);

/// One host: addresses, sockets, connections.
pub struct Stack {
    config: Config,
    keys: Keys,
    clock: Clock,
    sockets: Slab<Socket>,
    half_open: Slab<HalfOpen>,
    time_wait: Slab<TimeWait>,
    flows: HashMap<Tuple, Flow, Key>,
    ports: Ports,
    socket_timers: TimerQueue,
    half_open_timers: TimerQueue,
    time_wait_timers: TimerQueue,
    /// Connections that may have something to send, each at most once.
    ready: VecDeque<u32>,
    /// The driver has packets that weren't taken in yet.
    more_queued: bool,
    /// Connections that owe an acknowledgment which waits for those.
    held: Vec<u32>,
    /// Sockets whose status has changed, each at most once.
    changed: VecDeque<u32>,
    replies: Replies,
    /// How many errors may be among those.
    limiter: Limiter,
    /// Datagrams of which not everything has come.
    fragments: Fragments,
    /// Packets for the driver that came in fragments.
    foreign: VecDeque<Vec<u8>>,
    /// Packets from this host to itself.
    looped: VecDeque<Vec<u8>>,
    scratch: Scratch,
    default_options: TcpOptions,
    /// When it came here, on its own clock.
    moved_at: Option<Instant>,
}

impl Stack {
    /// A host without sockets.
    #[must_use]
    pub fn new(config: Config, secrets: Secrets, now: Instant) -> Stack {
        Stack::with_keys(config, Keys::new(&secrets), Clock::new(now))
    }

    fn with_keys(config: Config, keys: Keys, clock: Clock) -> Stack {
        Stack {
            config,
            clock,
            sockets: Slab::default(),
            half_open: Slab::default(),
            time_wait: Slab::default(),
            flows: HashMap::with_hasher(keys.table),
            ports: Ports::new(keys.table),
            keys,
            socket_timers: TimerQueue::default(),
            half_open_timers: TimerQueue::default(),
            time_wait_timers: TimerQueue::default(),
            ready: VecDeque::new(),
            more_queued: false,
            held: Vec::new(),
            changed: VecDeque::new(),
            replies: Replies::default(),
            limiter: Limiter::default(),
            fragments: Fragments::default(),
            foreign: VecDeque::new(),
            looped: VecDeque::new(),
            scratch: Scratch::default(),
            default_options: TcpOptions::default(),
            moved_at: None,
        }
    }

    /// What the stack was configured with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// When [`Stack::handle_timeout`] is to be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let queues = [&self.socket_timers, &self.half_open_timers, &self.time_wait_timers];
        let timers = queues.into_iter().filter_map(TimerQueue::next);
        timers.chain(self.fragments.next_timeout()).min().map(|at| self.clock.leave(at))
    }

    /// Does what was due by `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        let now = self.clock.enter(now);
        while let Some(slot) = self.due_socket(now) {
            let outcome = self.with_connection(now, slot, |connection, env| connection.handle_timeout(env));
            match outcome {
                Some(Err(verdict)) => self.finish(now, slot, verdict),
                Some(Ok(())) => self.touch(slot),
                None => {}
            }
        }
        self.expire_fragments(now);
        while let Some(index) =
            self.half_open_timers.take_due(now, |index| self.half_open.get(index).map(HalfOpen::deadline))
        {
            self.half_open_timeout(now, index);
        }
        while let Some(index) =
            self.time_wait_timers.take_due(now, |index| self.time_wait.get(index).map(|entry| entry.ends_at))
        {
            self.drop_time_wait(index);
        }
    }

    fn due_socket(&mut self, now: Instant) -> Option<u32> {
        self.socket_timers.take_due(now, |slot| self.sockets.get(slot)?.connection()?.next_timeout())
    }

    /// A socket whose status has changed since it was last returned here.
    pub fn poll_changed(&mut self) -> Option<SocketId> {
        while let Some(slot) = self.changed.pop_front() {
            if let Some(socket) = self.sockets.get_mut(slot) {
                socket.changed = false;
                return Some(socket.id);
            }
        }
        None
    }

    /// Every socket, including those that wait to be accepted and orphans.
    pub fn sockets(&self) -> impl Iterator<Item = SocketId> + '_ {
        self.sockets.iter().map(|(_, socket)| socket.id)
    }

    /// How many connections are half open and how many are in TIME-WAIT; neither are sockets.
    #[must_use]
    pub fn connections_without_socket(&self) -> (usize, usize) {
        (self.half_open.len(), self.time_wait.len())
    }

    // ---- shared by the parts

    fn socket(&self, id: SocketId) -> Option<&Socket> {
        self.sockets.get(id.index()).filter(|socket| socket.id == id)
    }

    fn socket_mut(&mut self, id: SocketId) -> Option<&mut Socket> {
        self.sockets.get_mut(id.index()).filter(|socket| socket.id == id)
    }

    /// Whether the address is this host's.
    fn is_own(&self, address: IpAddr) -> bool {
        self.config.addresses.contains(&address)
    }

    /// Whether packets to the address stay here.
    fn is_looped(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.is_own(address)
    }

    /// Does something to the connection in `slot`, if there is one.
    fn with_connection<R>(
        &mut self,
        now: Instant,
        slot: u32,
        act: impl FnOnce(&mut Connection, &Env<'_>) -> R,
    ) -> Option<R> {
        let Socket { options, kind, .. } = self.sockets.get_mut(slot)?;
        let Kind::Connection(connection) = kind else {
            return None;
        };
        let env = Env { now, config: &self.config, options };
        Some(act(connection, &env))
    }

    /// Notes that the connection in `slot` may have something to send, and when its timers are due.
    fn touch(&mut self, slot: u32) {
        let Some(socket) = self.sockets.get_mut(slot) else {
            return;
        };
        if !socket.ready {
            socket.ready = true;
            self.ready.push_back(slot);
        }
        self.watch_timers(slot);
    }

    fn watch_timers(&mut self, slot: u32) {
        let deadline = self.sockets.get(slot).and_then(Socket::connection).and_then(Connection::next_timeout);
        if let Some(deadline) = deadline {
            self.socket_timers.at_latest(slot, deadline);
        }
    }

    /// Notes that the driver should look at the socket in `slot`.
    fn note_change(&mut self, slot: u32) {
        let Some(socket) = self.sockets.get_mut(slot) else {
            return;
        };
        let orphan = socket.connection().is_some_and(|connection| connection.orphan);
        if !socket.changed && !orphan && socket.waits_at.is_none() {
            socket.changed = true;
            self.changed.push_back(slot);
        }
    }

    /// Acts on what a segment or a timer did to a connection. What answers a segment has been sent.
    fn finish(&mut self, now: Instant, slot: u32, verdict: Verdict) {
        let (error, reset) = match verdict {
            Verdict::Continue | Verdict::Reject => return self.touch(slot),
            Verdict::TimeWait => {
                self.enter_time_wait(now, slot);
                (None, false)
            }
            Verdict::Closed(error) => (error, false),
            Verdict::Refuse => (None, false),
            Verdict::Abort(error) => (error, true),
        };
        if reset {
            self.send_reset(now, slot);
        }
        self.end_connection(slot);
        let Some(socket) = self.sockets.get_mut(slot) else {
            return;
        };
        socket.error = error.or(socket.error);
        let orphan = socket.connection().is_none_or(|connection| connection.orphan);
        if orphan {
            self.free(slot);
        } else {
            self.note_change(slot);
        }
    }

    /// Tells the peer that the connection in `slot` is over.
    fn send_reset(&mut self, now: Instant, slot: u32) {
        let Some(Socket { options, kind: Kind::Connection(connection), .. }) = self.sockets.get(slot) else {
            return;
        };
        if !connection.abort_needs_reset() {
            return;
        }
        let header = connection.reset_header(now);
        let looks = reply::Looks { ttl: options.ttl, traffic_class: options.tos, flow_label: connection.flow_label() };
        self.replies.push_segment(&connection.tuple, &header, &looks, connection.looped);
    }

    /// The connection in `slot` ends; the socket stays with what is unread.
    fn end_connection(&mut self, slot: u32) {
        let Some(socket) = self.sockets.get_mut(slot) else {
            return;
        };
        let reuse_address = socket.options.reuse_address;
        let counted = std::mem::take(&mut socket.counted);
        let Kind::Connection(connection) = &mut socket.kind else {
            return;
        };
        let tuple = connection.tuple;
        if connection.state != State::Closed {
            connection.end();
        }
        self.socket_timers.remove(slot);
        if self.flows.get(&tuple) == Some(&Flow::Socket(slot)) {
            self.flows.remove(&tuple);
        }
        if counted {
            self.ports.remove_connection(tuple.local_address(), reuse_address);
        }
    }

    /// The socket in `slot` is gone.
    fn free(&mut self, slot: u32) {
        self.end_connection(slot);
        self.socket_timers.remove(slot);
        let Some(socket) = self.sockets.remove(slot) else {
            return;
        };
        if let Some(bound) = socket.bound {
            self.ports.remove_owner(bound.port(), slot);
        }
        if let Some(listener) = socket.waits_at
            && let Some(listener) = self.sockets.get_mut(listener).and_then(Socket::listener_mut)
        {
            listener.queue.retain(|&waiting| waiting != slot);
        }
    }

    /// Replaces the connection in `slot` by a record in TIME-WAIT and acknowledges the peer's FIN.
    fn enter_time_wait(&mut self, now: Instant, slot: u32) {
        let Some(Socket { options, kind: Kind::Connection(connection), .. }) = self.sockets.get(slot) else {
            return;
        };
        let mut entry = connection.to_time_wait(now, options.reuse_address);
        // A peer whose FIN waited while the stack moved may have repeated it, and all of them arrive now. Its connection ends
        // with the first answer, and to another it would answer with an RST.
        if self.moved_at.is_some_and(|at| now.since(at) < AFTER_MOVE) {
            entry.acked_at = Some(now);
        }
        let looks = reply::Looks { ttl: options.ttl, traffic_class: options.tos, flow_label: connection.flow_label() };
        let (tuple, looped) = (connection.tuple, connection.looped);
        if connection.owes_acknowledgment() {
            self.replies.push_segment(&tuple, &entry.ack(now), &looks, looped);
        }
        self.end_connection(slot);
        while self.time_wait.len() >= self.config.time_wait_limit.max(1) {
            let Some((due, oldest)) = self.time_wait_timers.first() else {
                break;
            };
            match self.time_wait.get(oldest).map(|entry| entry.ends_at) {
                // Its wait has begun again since.
                Some(ends_at) if ends_at > due => {
                    self.time_wait_timers.remove(oldest);
                    self.time_wait_timers.at_latest(oldest, ends_at);
                }
                _ => self.drop_time_wait(oldest),
            }
        }
        let ends_at = entry.ends_at;
        self.ports.add_connection(tuple.local_address(), entry.reuse_address);
        let index = self.time_wait.insert(|_, _| entry);
        self.flows.insert(tuple, Flow::TimeWait(index));
        self.time_wait_timers.at_latest(index, ends_at);
    }

    fn drop_time_wait(&mut self, index: u32) {
        self.time_wait_timers.remove(index);
        let Some(entry) = self.time_wait.remove(index) else {
            return;
        };
        if self.flows.get(&entry.tuple) == Some(&Flow::TimeWait(index)) {
            self.flows.remove(&entry.tuple);
        }
        self.ports.remove_connection(entry.tuple.local_address(), entry.reuse_address);
    }

    fn drop_half_open(&mut self, index: u32) -> Option<HalfOpen> {
        self.half_open_timers.remove(index);
        let entry = self.half_open.remove(index)?;
        if self.flows.get(&entry.tuple) == Some(&Flow::HalfOpen(index)) {
            self.flows.remove(&entry.tuple);
        }
        if let Some(listener) = self.sockets.get_mut(entry.listener).and_then(Socket::listener_mut) {
            listener.half_open = listener.half_open.saturating_sub(1);
        }
        Some(entry)
    }

    fn half_open_timeout(&mut self, now: Instant, index: u32) {
        let Some(entry) = self.half_open.get_mut(index) else {
            return;
        };
        let defer = self.sockets.get(entry.listener).map_or(Duration::ZERO, |socket| socket.options.defer_accept);
        match entry.on_timeout(now, defer) {
            OnTimeout::SendSynAck => self.send_syn_ack(now, index),
            OnTimeout::Wait => {
                let deadline = entry.deadline();
                self.half_open_timers.at_latest(index, deadline);
            }
            OnTimeout::Remove => {
                self.drop_half_open(index);
            }
        }
    }

    /// Sends the SYN-ACK of a half-open connection (again) and starts its timer.
    fn send_syn_ack(&mut self, now: Instant, index: u32) {
        let Some(entry) = self.half_open.get(index) else {
            return;
        };
        let looks = self.looks_of(entry.listener, &entry.tuple);
        let looped = self.is_looped(entry.tuple.remote);
        let header = entry.syn_ack(now);
        let deadline = entry.deadline();
        self.replies.push_segment(&entry.tuple, &header, &looks, looped);
        self.half_open_timers.remove(index);
        self.half_open_timers.at_latest(index, deadline);
    }

    fn looks_of(&self, slot: u32, tuple: &Tuple) -> reply::Looks {
        let flow_label = self.keys.flow_label(tuple);
        self.sockets.get(slot).map_or(reply::Looks { flow_label, ..reply::Looks::default() }, |socket| reply::Looks {
            ttl: socket.options.ttl,
            traffic_class: socket.options.tos,
            flow_label,
        })
    }
}
