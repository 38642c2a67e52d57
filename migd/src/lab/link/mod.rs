//! A bad link: loss, delay, reordering and the like between a member of a lab and its switch.
//!
//! The member's uplink becomes a TAP device, and so does its port on the switch; a thread carries frames from one to the
//! other and does to them what [`Faults`] say. Neither device offers offloads, so the kernel cuts super-packets and finishes
//! checksums before it hands a frame over: every frame is a packet as it would be on a wire, and a lost one is one lost.
//!
//! What finds neighbours (ARP and its like) passes untouched: the kernel asks again only after a second, which would
//! say nothing about TCP. Linux's own emulator, netem, is not in every kernel and knows no seeds that name packets.

mod faults;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sys::epoll::{Epoll, EventFd, Events, Interest};

use self::faults::Channel;
pub use self::faults::{Bursts, Faults, Rate};

/// Frames taken from one side before the other side and the clock get their turn.
const FRAMES_A_TURN: usize = 64;
/// Packets that may be under way in one direction; on a link so long and fast that this is too few, the rest is lost.
const UNDER_WAY_MAX: usize = 200_000;
const ETHERNET: usize = 14;
const TOKEN_WAKE: u64 = 2;

/// Both directions of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BothWays {
    /// What packets from the member meet.
    pub from_member: Faults,
    /// What packets to the member meet.
    pub to_member: Faults,
}

impl BothWays {
    /// The same in both directions.
    #[must_use]
    pub const fn alike(faults: Faults) -> BothWays {
        BothWays { from_member: faults, to_member: faults }
    }
}

/// A link at work. It ends, and its devices with it, when this value goes.
#[derive(Debug)]
pub struct BadLink {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    wake: EventFd,
    stop: AtomicBool,
    change: Mutex<Option<BothWays>>,
}

impl BadLink {
    /// Joins two TAP devices: the one in the member and the one on the switch.
    pub(super) fn start(member: OwnedFd, switch: OwnedFd, faults: BothWays, seed: u64) -> io::Result<BadLink> {
        let shared = Arc::new(Shared { wake: EventFd::new()?, stop: AtomicBool::new(false), change: Mutex::new(None) });
        let epoll = Epoll::new()?;
        epoll.add(member.as_fd(), 0, Interest::IN)?;
        epoll.add(switch.as_fd(), 1, Interest::IN)?;
        epoll.add(shared.wake.as_fd(), TOKEN_WAKE, Interest::IN)?;
        let carrier = Carrier {
            ends: [File::from(member), File::from(switch)],
            channels: [
                Channel::new(faults.from_member, seed),
                // Any other seed will do.
                Channel::new(faults.to_member, !seed),
            ],
            under_way: [BinaryHeap::new(), BinaryHeap::new()],
            number: 0,
            began: Instant::now(),
            buffer: vec![0; 65_536 + ETHERNET],
            shared: Arc::clone(&shared),
        };
        let thread = std::thread::Builder::new().name("link".into()).spawn(move || {
            if let Err(error) = carrier.run(&epoll) {
                tracing::error!(%error, "an emulated link broke");
            }
        })?;
        Ok(BadLink { shared, thread: Some(thread) })
    }

    /// Changes what the link does, for packets that come from now on.
    pub fn set(&self, faults: BothWays) {
        *self.shared.change.lock().unwrap_or_else(PoisonError::into_inner) = Some(faults);
        self.shared.wake.signal();
    }
}

impl Drop for BadLink {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take() {
            // It has told its own failure.
            let _ = thread.join();
        }
    }
}

/// A frame under way; ordered by arrival, then by the order of entering.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct UnderWay {
    arrives: Duration,
    number: u64,
    frame: Box<[u8]>,
}

/// The thread's state. Index 0 is the member's end and the direction away from it.
struct Carrier {
    ends: [File; 2],
    channels: [Channel; 2],
    under_way: [BinaryHeap<Reverse<UnderWay>>; 2],
    number: u64,
    began: Instant,
    buffer: Vec<u8>,
    shared: Arc<Shared>,
}

impl Carrier {
    fn run(mut self, epoll: &Epoll) -> io::Result<()> {
        let mut events = Events::with_capacity(4);
        loop {
            let next = self.under_way.iter().filter_map(BinaryHeap::peek).map(|Reverse(next)| next.arrives).min();
            epoll.wait(&mut events, next.map(|at| at.saturating_sub(self.began.elapsed())))?;
            for event in events.iter() {
                match event.token {
                    TOKEN_WAKE => self.shared.wake.clear(),
                    side => self.take_in(usize::from(side == 1))?,
                }
            }
            if self.shared.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            if let Some(BothWays { from_member, to_member }) =
                self.shared.change.lock().unwrap_or_else(PoisonError::into_inner).take()
            {
                self.channels[0].set(from_member);
                self.channels[1].set(to_member);
            }
            self.deliver(0);
            self.deliver(1);
        }
    }

    fn take_in(&mut self, side: usize) -> io::Result<()> {
        for _ in 0..FRAMES_A_TURN {
            let length = match self.ends[side].read(&mut self.buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if length > ETHERNET {
                self.enter(side, length);
            }
        }
        Ok(())
    }

    fn enter(&mut self, side: usize, length: usize) {
        let now = self.began.elapsed();
        let frame = &mut self.buffer[..length];
        if finds_neighbours(frame) {
            return self.arrive(side, now, length);
        }
        let fate = self.channels[side].enter(now, length - ETHERNET);
        if let Some(bit) = fate.flipped {
            frame[ETHERNET + bit / 8] ^= 1 << (bit % 8);
        }
        if fate.arrivals[0].is_none() || self.under_way[side].len() >= UNDER_WAY_MAX {
            return;
        }
        for arrives in fate.arrivals.into_iter().flatten() {
            self.arrive(side, arrives, length);
        }
    }

    /// The frame in the buffer is to come out at `arrives`.
    fn arrive(&mut self, side: usize, arrives: Duration, length: usize) {
        self.number += 1;
        let frame = self.buffer[..length].into();
        self.under_way[side].push(Reverse(UnderWay { arrives, number: self.number, frame }));
    }

    fn deliver(&mut self, side: usize) {
        let now = self.began.elapsed();
        while self.under_way[side].peek().is_some_and(|Reverse(next)| next.arrives <= now) {
            let Some(Reverse(UnderWay { frame, .. })) = self.under_way[side].pop() else { return };
            // The kernel refuses when the device is down or it is short of memory: then the packet is lost.
            drop(self.ends[1 - side].write(&frame));
        }
    }
}

/// ARP, or IPv6's neighbour discovery, router discovery and group membership: all that keeps a link going.
fn finds_neighbours(frame: &[u8]) -> bool {
    const IPV4: [u8; 2] = [0x08, 0x00];
    const IPV6: [u8; 2] = [0x86, 0xdd];
    let kind = &frame[12..14];
    if kind == IPV6 {
        let next_header = frame.get(ETHERNET + 6).copied();
        let kind = frame.get(ETHERNET + 40).copied().unwrap_or(0);
        // RFC 4861: 133 to 137. Group membership (RFC 3810) comes behind a hop-by-hop header.
        return next_header == Some(0) || (next_header == Some(58) && (133..=137).contains(&kind));
    }
    kind != IPV4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_finds_neighbours_is_known() {
        let frame = |kind: [u8; 2], next: u8, first: u8| {
            let mut frame = vec![0; 80];
            frame[12..14].copy_from_slice(&kind);
            frame[ETHERNET + 6] = next;
            frame[ETHERNET + 40] = first;
            frame
        };
        assert!(finds_neighbours(&frame([0x08, 0x06], 0, 0)), "ARP");
        assert!(!finds_neighbours(&frame([0x08, 0x00], 0, 0)), "IPv4");
        assert!(finds_neighbours(&frame([0x86, 0xdd], 58, 135)), "neighbour solicitation");
        assert!(!finds_neighbours(&frame([0x86, 0xdd], 58, 2)), "packet too big");
        assert!(!finds_neighbours(&frame([0x86, 0xdd], 6, 135)), "TCP");
    }

    #[test]
    fn frames_come_out_in_the_order_of_their_arrival() {
        let mut heap = BinaryHeap::new();
        for (arrives, number) in [(5, 1), (3, 2), (5, 3), (1, 4)] {
            heap.push(Reverse(UnderWay { arrives: Duration::from_millis(arrives), number, frame: Box::default() }));
        }
        let order: Vec<u64> = std::iter::from_fn(|| heap.pop()).map(|Reverse(next)| next.number).collect();
        assert_eq!(order, [4, 2, 1, 3]);
    }
}
