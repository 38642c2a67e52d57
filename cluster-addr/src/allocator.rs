//! Which address a new job gets.
//!
//! A node holds some blocks and picks from them without asking anybody. A freed address rests before it is used again,
//! longer than twice the maximum segment lifetime (RFC 9293 section 3.4.1, MSL = 2 minutes), so that no old segment
//! reaches the next holder. Rest is counted on this node's monotonic clock from when this node first knew of it: a
//! restart or a jump of the wall clock can only make it longer.
//!
//! No I/O and no clock: `now` is the time since any fixed moment.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::Ipv4Addr,
    time::Duration,
};

use ipnet::Ipv4Net;

/// How long an address rests. 2 MSL is 4 minutes; one minute more for what the network holds on top.
pub const REST: Duration = Duration::from_secs(5 * 60);

/// The addresses of this node's blocks and what is known of each.
#[derive(Debug, Default)]
pub struct Allocator {
    blocks: BTreeMap<Ipv4Net, Block>,
}

#[derive(Debug)]
struct Block {
    /// Free and rested, in the order in which they became so: the longest unused is taken first.
    free: VecDeque<Ipv4Addr>,
    /// Given out.
    held: BTreeSet<Ipv4Addr>,
    /// Freed, with the moment; oldest first.
    resting: VecDeque<(Ipv4Addr, Duration)>,
}

impl Allocator {
    /// Takes up a block, with what the directory knows of its addresses. `reserved` addresses are never given out.
    pub fn add_block(
        &mut self,
        net: Ipv4Net,
        held: impl IntoIterator<Item = Ipv4Addr>,
        resting: impl IntoIterator<Item = Ipv4Addr>,
        reserved: &[Ipv4Addr],
        now: Duration,
    ) {
        let held: BTreeSet<_> = held.into_iter().filter(|a| net.contains(a)).collect();
        let resting: VecDeque<_> =
            resting.into_iter().filter(|a| net.contains(a) && !held.contains(a)).map(|a| (a, now)).collect();
        let taken = |a: &Ipv4Addr| held.contains(a) || reserved.contains(a) || resting.iter().any(|(r, _)| r == a);
        // `Ipv4Net::hosts` leaves out the first and last address of the block, which are ordinary ones here.
        let first = u32::from(net.network());
        let free = (first..=u32::from(net.broadcast())).map(Ipv4Addr::from).filter(|a| !taken(a)).collect();
        self.blocks.insert(net, Block { free, held, resting });
    }

    /// The blocks held.
    pub fn blocks(&self) -> impl Iterator<Item = Ipv4Net> {
        self.blocks.keys().copied()
    }

    /// An address that is free and rested, now held; `None` if another block is needed.
    pub fn allocate(&mut self, now: Duration) -> Option<Ipv4Addr> {
        self.blocks.values_mut().find_map(|block| block.allocate(now))
    }

    /// Gives back an address. One of a block of another node is ignored: that node learns of it by the directory.
    pub fn free(&mut self, address: Ipv4Addr, now: Duration) {
        for (net, block) in &mut self.blocks {
            if net.contains(&address) && block.held.remove(&address) {
                block.resting.push_back((address, now));
            }
        }
    }

    /// Records that an address of an own block turned out to be held by another job.
    pub fn mark_held(&mut self, address: Ipv4Addr) {
        for (net, block) in &mut self.blocks {
            if net.contains(&address) {
                block.free.retain(|a| *a != address);
                block.resting.retain(|(a, _)| *a != address);
                block.held.insert(address);
            }
        }
    }
}

impl Block {
    fn allocate(&mut self, now: Duration) -> Option<Ipv4Addr> {
        while let Some((address, since)) = self.resting.front().copied() {
            if now.saturating_sub(since) < REST {
                break;
            }
            self.resting.pop_front();
            self.free.push_back(address);
        }
        let address = self.free.pop_front()?;
        self.held.insert(address);
        Some(address)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn allocator(net: &str) -> Allocator {
        let mut allocator = Allocator::default();
        allocator.add_block(net.parse().expect("a net"), [], [], &[], Duration::ZERO);
        allocator
    }

    #[test]
    fn a_freed_address_rests() {
        let mut allocator = allocator("10.77.0.0/31");
        let (first, second) = (allocator.allocate(Duration::ZERO), allocator.allocate(Duration::ZERO));
        assert_ne!(first, second);
        assert_eq!(allocator.allocate(Duration::ZERO), None);
        allocator.free(first.expect("there were two"), Duration::from_secs(10));
        assert_eq!(allocator.allocate(Duration::from_secs(10) + REST - Duration::from_nanos(1)), None);
        assert_eq!(allocator.allocate(Duration::from_secs(10) + REST), first);
    }

    #[test]
    fn what_the_directory_knows_is_respected() {
        let mut allocator = Allocator::default();
        let address = |last| Ipv4Addr::new(10, 77, 0, last);
        let net = "10.77.0.0/30".parse().expect("a net");
        allocator.add_block(net, [address(1)], [address(2)], &[address(0)], Duration::ZERO);
        assert_eq!(allocator.allocate(Duration::ZERO), Some(address(3)));
        assert_eq!(allocator.allocate(Duration::ZERO), None);
        assert_eq!(allocator.allocate(REST), Some(address(2)));
    }

    proptest! {
        #[test]
        fn no_address_is_held_twice_or_reused_too_soon(steps in prop::collection::vec((any::<bool>(), 0u64..200), 1..300)) {
            let mut allocator = allocator("10.77.0.0/28");
            let mut held: Vec<Ipv4Addr> = Vec::new();
            let mut freed: BTreeMap<Ipv4Addr, Duration> = BTreeMap::new();
            let mut now = Duration::ZERO;
            for (allocate, seconds) in steps {
                now += Duration::from_secs(seconds);
                if allocate {
                    if let Some(address) = allocator.allocate(now) {
                        prop_assert!(!held.contains(&address));
                        if let Some(at) = freed.get(&address) {
                            prop_assert!(now - *at >= REST);
                        }
                        held.push(address);
                    } else {
                        let resting = freed.iter().filter(|(a, at)| !held.contains(a) && now - **at < REST).count();
                        prop_assert_eq!(held.len() + resting, 16);
                    }
                } else if let Some(address) = held.pop() {
                    allocator.free(address, now);
                    freed.insert(address, now);
                }
            }
        }
    }
}
