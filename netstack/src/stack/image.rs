//! Freeze and thaw.
//!
//! Everything a stack knows is plain data, and every time in it is told by the stack's own clock, which stands still
//! while the stack is frozen. So an image is a copy of the data and the clock's reading; lookup tables, timer queues and
//! ready lists are derived from it again. Both directions name every field of [`Stack`], so that a new one can't be
//! forgotten.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::clock::Clock;
use super::limit::Limiter;
use super::reply::Replies;
use super::slab::{Rest, Slab};
use super::socket::{Kind, Socket};
use super::{Flow, Stack};
use crate::fragments::{Fragments, Partial};
use crate::hash::Keys;
use crate::ip;
use crate::tcp::Tuple;
use crate::tcp::connection::AfterThaw;
use crate::tcp::half_open::HalfOpen;
use crate::tcp::time_wait::TimeWait;
use crate::{Config, Instant, State};

/// Format of the image. It grows when an older release could not go on with what is in an image. Older formats stay
/// readable: what a field must be that they don't have is said by its `#[serde(default)]`. `tests/golden.rs` thaws images
/// of every format.
const VERSION: u32 = 1;

/// A connection that has been silent for longer has nothing to say after a thaw.
const SILENT: Duration = Duration::from_secs(60);
/// After a thaw so many idle connections acknowledge at a time, and more when that would take more steps than these: an
/// acknowledgment may be delayed by half a second (RFC 9293, MUST-40).
const SPEAK_AT_A_TIME: usize = 64;
const SPEAK_STEP: Duration = Duration::from_micros(2500);
const SPEAK_STEPS: usize = 160;

/// A frozen stack: every socket in every state. Made by [`Stack::freeze`], continued by [`Stack::thaw`].
///
/// It holds secrets and what the connections carry, so it is to be treated like the memory of the programs it belongs to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StackImage {
    version: u32,
    /// The stack's clock at the freeze; all times in the image are told by it.
    frozen_at: Instant,
    keys: Keys,
    pub(super) sockets: Slab<Socket>,
    half_open: Slab<HalfOpen>,
    time_wait: Slab<TimeWait>,
    /// Connections in the order in which they were to send.
    ready: VecDeque<u32>,
    changed: VecDeque<u32>,
    replies: Replies,
    looped: VecDeque<serde_bytes::ByteBuf>,
    #[serde(default)]
    limiter: Limiter,
    /// Datagrams of which not everything has come.
    #[serde(default)]
    fragments: Slab<Partial>,
    /// Packets that the driver had yet to take.
    #[serde(default)]
    foreign: VecDeque<serde_bytes::ByteBuf>,
    /// In the place of `sockets`, those that were not told before.
    #[serde(default)]
    pub(super) rest: Option<Rest<Socket>>,
}

/// Why an image can't be thawed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// The image was made by a release whose format this one doesn't know.
    #[error("stack image has format {found}, this release reads format {known}: update the node that is behind")]
    Version {
        /// The image's format.
        found: u32,
        /// The format known here.
        known: u32,
    },
    /// The image contradicts itself.
    #[error("stack image is corrupt: {0}")]
    Corrupt(String),
    /// The new configuration doesn't fit the image.
    #[error("stack image doesn't fit the configuration: {0}")]
    Mismatch(String),
}

impl StackImage {
    /// How many sockets, half-open connections and connections in TIME-WAIT the image holds.
    #[must_use]
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.sockets.len(), self.half_open.len(), self.time_wait.len())
    }
}

impl Stack {
    /// The whole stack as data. Changes nothing: a stack that is frozen in vain simply goes on.
    #[must_use]
    pub fn freeze(&self, now: Instant) -> StackImage {
        self.image(now, self.sockets.clone(), None)
    }

    /// The same without the sockets that are as they were told ([`Stack::tell`]): [`StackImage::complete`] puts them in.
    #[must_use]
    pub fn freeze_untold(&self, now: Instant) -> StackImage {
        self.image(now, Slab::default(), Some(self.sockets.rest()))
    }

    fn image(&self, now: Instant, copied: Slab<Socket>, rest: Option<Rest<Socket>>) -> StackImage {
        let Stack {
            config: _,
            keys,
            clock,
            sockets: _,
            half_open,
            time_wait,
            flows: _,
            ports: _,
            socket_timers: _,
            half_open_timers: _,
            time_wait_timers: _,
            ready,
            more_queued: _,
            held,
            changed,
            replies,
            limiter,
            fragments,
            foreign,
            looped,
            scratch: _,
            default_options: _,
            moved_at: _,
        } = self;
        StackImage {
            version: VERSION,
            frozen_at: clock.peek(now),
            keys: keys.clone(),
            sockets: copied,
            rest,
            half_open: half_open.clone(),
            time_wait: time_wait.clone(),
            ready: ready.iter().chain(held.iter().filter(|slot| !ready.contains(slot))).copied().collect(),
            changed: changed.clone(),
            replies: replies.clone(),
            looped: looped.iter().map(|packet| serde_bytes::ByteBuf::from(packet.clone())).collect(),
            limiter: limiter.clone(),
            fragments: fragments.freeze(),
            foreign: foreign.iter().map(|packet| serde_bytes::ByteBuf::from(packet.clone())).collect(),
        }
    }

    /// Continues a frozen stack. Every connection with something to say says it at the next [`Stack::poll_transmit`].
    pub fn thaw(image: StackImage, now: Instant, config: Config) -> Result<Stack, ImageError> {
        let frozen_at = image.frozen_at;
        let mut stack = Stack::thaw_silently(image, now, config)?;
        stack.speak(frozen_at);
        stack.moved_at = Some(frozen_at);
        Ok(stack)
    }

    /// Continues a frozen stack as if it had never been frozen: what follows is, segment by segment, what the frozen one would
    /// have done. After a move [`Stack::thaw`] is better, since packets were lost meanwhile.
    pub fn thaw_silently(image: StackImage, now: Instant, config: Config) -> Result<Stack, ImageError> {
        image.check(&config)?;
        let StackImage {
            version: _,
            frozen_at,
            keys,
            sockets,
            half_open,
            time_wait,
            ready,
            changed,
            replies,
            looped,
            limiter,
            fragments,
            foreign,
            rest: _,
        } = image;
        let mut stack = Stack::with_keys(config, keys, Clock::resume(frozen_at, now));
        stack.sockets = sockets;
        stack.half_open = half_open;
        stack.time_wait = time_wait;
        stack.replies = replies;
        stack.looped = looped.into_iter().map(serde_bytes::ByteBuf::into_vec).collect();
        stack.limiter = limiter;
        stack.fragments = Fragments::thaw(fragments);
        stack.foreign = foreign.into_iter().map(serde_bytes::ByteBuf::into_vec).collect();
        for &slot in &ready {
            if let Some(socket) = stack.sockets.get_mut(slot) {
                socket.ready = true;
            }
        }
        stack.ready = ready;
        stack.changed = changed;
        stack.rebuild();
        Ok(stack)
    }

    /// Derives the tables from the data.
    fn rebuild(&mut self) {
        self.flows.reserve(self.sockets.len() + self.half_open.len() + self.time_wait.len());
        for (slot, socket) in self.sockets.iter() {
            if let Some(bound) = socket.bound {
                self.ports.add_owner(bound.port(), slot);
            }
            let Kind::Connection(connection) = &socket.kind else {
                continue;
            };
            if connection.state != State::Closed {
                self.flows.insert(connection.tuple, Flow::Socket(slot));
            }
            if socket.counted {
                self.ports.add_connection(connection.tuple.local_address(), socket.options.reuse_address);
            }
            if let Some(deadline) = connection.next_timeout() {
                self.socket_timers.at_latest(slot, deadline);
            }
        }
        for (index, entry) in self.half_open.iter() {
            self.flows.insert(entry.tuple, Flow::HalfOpen(index));
            self.half_open_timers.at_latest(index, entry.deadline());
        }
        for (index, entry) in self.time_wait.iter() {
            self.flows.insert(entry.tuple, Flow::TimeWait(index));
            self.ports.add_connection(entry.tuple.local_address(), entry.reuse_address);
            self.time_wait_timers.at_latest(index, entry.ends_at);
        }
    }

    /// Lets every connection with something to say say it, and the driver look at every socket that isn't idle.
    ///
    /// Idle ones whose peers may have spoken in vain acknowledge what they have, those that spoke last first, some at a time:
    /// all at once, thousands of them would hold up those with something to say.
    fn speak(&mut self, now: Instant) {
        let slots: Vec<u32> = self.sockets.iter().map(|(slot, _)| slot).collect();
        let mut idle = Vec::new();
        for slot in slots {
            match self.with_connection(now, slot, |connection, env| connection.wake_after_thaw(env)) {
                Some(AfterThaw::Idle { latest }) => idle.push((latest, slot)),
                _ => {
                    self.touch(slot);
                    self.note_change(slot);
                }
            }
        }
        idle.retain(|(latest, _)| now.since(*latest) < SILENT);
        idle.sort_unstable_by_key(|&(latest, slot)| (std::cmp::Reverse(latest), slot));
        let at_a_time = idle.len().div_ceil(SPEAK_STEPS).max(SPEAK_AT_A_TIME);
        let mut at = now;
        for some in idle.chunks(at_a_time) {
            for &(_, slot) in some {
                self.with_connection(now, slot, |connection, _| connection.speak_at(now, at));
                if at == now {
                    self.touch(slot);
                } else {
                    self.watch_timers(slot);
                }
            }
            at += SPEAK_STEP;
        }
    }
}

/// A stack's clock begins near zero with the stack. Far later times have no times after them: what would be due then is due forever.
const LATEST: Instant = Instant::from_nanos(1 << 62);

impl StackImage {
    /// Whether the image can be trusted not to lead a stack astray. It comes from a peer that was authenticated, but a
    /// bug there must not become a panic here.
    fn check(&self, config: &Config) -> Result<(), ImageError> {
        if !(1..=VERSION).contains(&self.version) {
            return Err(ImageError::Version { found: self.version, known: VERSION });
        }
        let corrupt = |what: String| Err(ImageError::Corrupt(what));
        if self.rest.is_some() {
            return corrupt("the sockets are missing that were told before".into());
        }
        if self.frozen_at > LATEST {
            return corrupt("its clock is at the end of time".into());
        }
        if !self.sockets.is_consistent()
            || !self.half_open.is_consistent()
            || !self.time_wait.is_consistent()
            || !self.fragments.is_consistent()
        {
            return corrupt("free places don't match".into());
        }
        let mut flows = std::collections::HashSet::with_capacity_and_hasher(self.sockets.len(), self.keys.table);
        let mut claim = |tuple: &Tuple| -> Result<(), ImageError> {
            if !tuple.local.is_loopback() && !config.addresses.contains(&tuple.local) {
                let text =
                    format!("a connection of {} is in the image, which isn't an address of this host", tuple.local);
                return Err(ImageError::Mismatch(text));
            }
            if !flows.insert(*tuple) {
                return Err(ImageError::Corrupt(format!("two connections {tuple:?}")));
            }
            Ok(())
        };
        for (slot, socket) in self.sockets.iter() {
            if socket.id.index() != slot {
                return corrupt(format!("socket {:?} is at place {slot}", socket.id));
            }
            if !socket.options.is_consistent() {
                return corrupt(format!("socket {:?} has times without end among its options", socket.id));
            }
            match &socket.kind {
                Kind::Idle => {}
                Kind::Listener(listener) => {
                    let waiting = |slot: &u32| {
                        self.sockets.get(*slot).is_some_and(|socket| matches!(socket.kind, Kind::Connection(_)))
                    };
                    if socket.bound.is_none() || !listener.queue.iter().all(waiting) {
                        return corrupt(format!("listener {:?} is not bound or has strangers in its queue", socket.id));
                    }
                }
                Kind::Connection(connection) => {
                    if !connection.is_consistent() {
                        return corrupt(format!(
                            "connection {:?} ({:?}) contradicts itself",
                            socket.id, connection.state
                        ));
                    }
                    if connection.state != State::Closed {
                        claim(&connection.tuple)?;
                    }
                }
            }
        }
        let own = |address: IpAddr| address.is_loopback() || config.addresses.contains(&address);
        let to_itself = |packet: &[u8]| {
            ip::parse(packet, false).is_some_and(|datagram| own(datagram.source) && own(datagram.destination))
        };
        if !self.looped.iter().all(|packet| to_itself(packet)) || !self.replies.looped().all(to_itself) {
            return corrupt("a packet of this host to itself has an address of another".into());
        }
        if !self.replies.is_consistent() || !self.foreign.iter().all(|packet| ip::is_whole(packet)) {
            return corrupt("what waits to be sent or handed on is no packet".into());
        }
        for (_, datagram) in self.fragments.iter() {
            if !datagram.is_consistent() || !config.addresses.contains(&datagram.destination()) {
                return corrupt("the pieces of a datagram don't fit together".into());
            }
        }
        for (_, entry) in self.half_open.iter() {
            if !entry.is_consistent() {
                return Err(ImageError::Corrupt("a half-open connection contradicts itself".into()));
            }
            claim(&entry.tuple)?;
        }
        for (_, entry) in self.time_wait.iter() {
            claim(&entry.tuple)?;
        }
        Ok(())
    }
}
