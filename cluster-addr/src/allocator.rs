//! Which addresses a new job gets.
//!
//! A node holds some blocks of each prefix and picks from them without asking anybody. A freed address rests before it is
//! used again, longer than twice the maximum segment lifetime (RFC 9293 section 3.4.1, MSL = 2 minutes), so that no old
//! segment reaches the next holder. Rest is counted on this node's monotonic clock from when this node first knew of it: a
//! restart or a jump of the wall clock can only make it longer.
//!
//! What is here is a *view*. A pick is valid only together with the transaction that records it, which requires that the
//! block is still this node's ([`Pick::lease`]) and that the address's record is as it was believed to be
//! ([`Pick::leftover`]). So nothing here has to survive a crash: an address that was picked but not recorded was never
//! used, and one that was recorded is found in the directory.
//!
//! No I/O and no clock: `now` is the time since any fixed moment.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    time::Duration,
};

use ipnet::IpNet;

use crate::directory::Revision;

/// How long an address rests. 2 MSL is 4 minutes; one minute more for what the network holds on top.
pub const REST: Duration = Duration::from_secs(5 * 60);

/// Most addresses of a block that are looked at; the blocks that a cluster makes have 64.
const BLOCK_MAX: usize = 4096;

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// 32 bits.
    V4,
    /// 128 bits.
    V6,
}

impl Family {
    /// Both, in the order in which they are listed.
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// The family of a network.
    #[must_use]
    pub fn of_net(net: IpNet) -> Self {
        Self::of(net.addr())
    }
}

/// An address picked, and what must hold in the directory for it to be this node's to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pick {
    /// The address.
    pub address: IpAddr,
    /// Its block.
    pub block: IpNet,
    /// Revision of the block's lease; `None` when the block is to be leased by the same transaction.
    pub lease: Option<Revision>,
    /// Revision of the record that its last use left; `None` when there is no record.
    pub leftover: Option<Revision>,
}

/// How an address stands in this node's view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Not of a block of this node.
    Foreign,
    /// Can be given out.
    Free,
    /// In use, or kept for a reservation.
    Held,
    /// Freed, to be used again after so long.
    Resting(Duration),
    /// Never given out: it has a meaning of its own in its prefix.
    Special,
}

/// What the directory's record of an address says, with the record's revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// In use or reserved.
    Held(Revision),
    /// Resting.
    Resting(Revision),
}

/// A block and how full it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// The addresses.
    pub net: IpNet,
    /// Given out or reserved.
    pub held: usize,
    /// Freed and not yet rested.
    pub resting: usize,
    /// To be given out.
    pub free: usize,
}

/// The addresses of this node's blocks and what is known of each.
#[derive(Debug, Default)]
pub struct Allocator {
    /// The blocks, with the revision of their lease.
    blocks: BTreeMap<IpNet, Revision>,
    pools: [Pool; 2],
    /// Never given out.
    special: BTreeSet<IpAddr>,
}

/// The addresses of one family.
#[derive(Debug, Default)]
struct Pool {
    /// Free and rested, with the revision of a record left: the longest unused is taken first.
    free: VecDeque<(IpAddr, Option<Revision>)>,
    /// Given out, with the revision of the record; `None` while it is being written.
    held: BTreeMap<IpAddr, Option<Revision>>,
    /// Freed, oldest first.
    resting: VecDeque<Resting>,
}

#[derive(Debug, Clone, Copy)]
struct Resting {
    address: IpAddr,
    since: Duration,
    record: Revision,
}

impl Allocator {
    /// Sets the addresses that are never given out; those of blocks added before stay as they are.
    pub fn set_special(&mut self, special: impl IntoIterator<Item = IpAddr>) {
        self.special = special.into_iter().collect();
        let Self { pools, special, .. } = self;
        for pool in pools {
            pool.free.retain(|(address, _)| !special.contains(address));
        }
    }

    /// Takes up a block whose lease has this revision, with what is recorded of its addresses. What is not recorded is
    /// free. A block that is here already only gets the new revision.
    pub fn add_block(&mut self, net: IpNet, lease: Revision, recorded: &BTreeMap<IpAddr, Recorded>, now: Duration) {
        if self.blocks.insert(net, lease).is_some() {
            return;
        }
        let special = &self.special;
        let pool = &mut self.pools[Family::of_net(net) as usize];
        for address in addresses(net).filter(|address| !special.contains(address)) {
            match recorded.get(&address) {
                None => pool.free.push_back((address, None)),
                Some(Recorded::Held(revision)) => drop(pool.held.insert(address, Some(*revision))),
                Some(Recorded::Resting(record)) => {
                    pool.resting.push_back(Resting { address, since: now, record: *record });
                }
            }
        }
    }

    /// Forgets a block that is no longer this node's.
    pub fn remove_block(&mut self, net: IpNet) {
        if self.blocks.remove(&net).is_none() {
            return;
        }
        let pool = &mut self.pools[Family::of_net(net) as usize];
        pool.free.retain(|(address, _)| !net.contains(address));
        pool.held.retain(|address, _| !net.contains(address));
        pool.resting.retain(|resting| !net.contains(&resting.address));
    }

    /// The blocks held, with the revisions of their leases.
    pub fn blocks(&self) -> impl Iterator<Item = (IpNet, Revision)> {
        self.blocks.iter().map(|(net, lease)| (*net, *lease))
    }

    /// The block that an address is in, if it is one of this node's.
    #[must_use]
    pub fn block_of(&self, address: IpAddr) -> Option<(IpNet, Revision)> {
        // The blocks are disjoint, so only the last one that begins at or before the address can have it.
        let single = IpNet::new(address, if address.is_ipv4() { 32 } else { 128 }).ok()?;
        let (net, lease) = self.blocks.range(..=single).next_back().filter(|(net, _)| net.contains(&address))?;
        Some((*net, *lease))
    }

    /// How full each block is.
    #[must_use]
    pub fn fill(&self) -> Vec<Fill> {
        let count = |net: &IpNet| {
            let pool = &self.pools[Family::of_net(*net) as usize];
            Fill {
                net: *net,
                held: pool.held.keys().filter(|address| net.contains(*address)).count(),
                resting: pool.resting.iter().filter(|resting| net.contains(&resting.address)).count(),
                free: pool.free.iter().filter(|(address, _)| net.contains(address)).count(),
            }
        };
        self.blocks.keys().map(count).collect()
    }

    /// How many addresses of a family can be given out now.
    #[must_use]
    pub fn available(&self, family: Family, now: Duration) -> usize {
        let pool = &self.pools[family as usize];
        pool.free.len() + pool.resting.iter().take_while(|resting| rested(resting, now)).count()
    }

    /// An address that is free and rested, now held; `None` if another block is needed.
    pub fn allocate(&mut self, family: Family, now: Duration) -> Option<Pick> {
        let pool = &mut self.pools[family as usize];
        let (address, leftover) = match pool.resting.front() {
            // Those that have rested before those that were never used: their records are to go.
            Some(resting) if rested(resting, now) => {
                let Resting { address, record, .. } = *resting;
                pool.resting.pop_front();
                (address, Some(record))
            }
            _ => pool.free.pop_front()?,
        };
        pool.held.insert(address, None);
        let (block, lease) = self.block_of(address)?;
        Some(Pick { address, block, lease: Some(lease), leftover })
    }

    /// One address in particular, now held; how it stands if it can't be had.
    ///
    /// # Errors
    /// The standing that is not [`Standing::Free`].
    pub fn take(&mut self, address: IpAddr, now: Duration) -> Result<Pick, Standing> {
        let Standing::Free = self.standing(address, now) else { return Err(self.standing(address, now)) };
        let (block, lease) = self.block_of(address).ok_or(Standing::Foreign)?;
        let pool = &mut self.pools[Family::of(address) as usize];
        let free = pool.free.iter().position(|(there, _)| *there == address);
        let leftover = match free.and_then(|position| pool.free.remove(position)) {
            Some((_, leftover)) => leftover,
            None => {
                let position = pool.resting.iter().position(|resting| resting.address == address);
                position.and_then(|position| pool.resting.remove(position)).map(|resting| resting.record)
            }
        };
        pool.held.insert(address, None);
        Ok(Pick { address, block, lease: Some(lease), leftover })
    }

    /// How an address stands.
    #[must_use]
    pub fn standing(&self, address: IpAddr, now: Duration) -> Standing {
        let pool = &self.pools[Family::of(address) as usize];
        if self.special.contains(&address) {
            return Standing::Special;
        }
        if pool.held.contains_key(&address) {
            return Standing::Held;
        }
        if let Some(resting) = pool.resting.iter().find(|resting| resting.address == address) {
            let left = REST.saturating_sub(now.saturating_sub(resting.since));
            return if left.is_zero() { Standing::Free } else { Standing::Resting(left) };
        }
        if self.block_of(address).is_some() { Standing::Free } else { Standing::Foreign }
    }

    /// A pick was recorded at this revision.
    pub fn confirm(&mut self, pick: &Pick, record: Revision) {
        if let Some(held) = self.pools[Family::of(pick.address) as usize].held.get_mut(&pick.address) {
            *held = Some(record);
        }
    }

    /// A pick was not recorded and never will be: it is free as before.
    pub fn put_back(&mut self, pick: &Pick) {
        let pool = &mut self.pools[Family::of(pick.address) as usize];
        if pool.held.remove(&pick.address).is_some() && self.blocks.contains_key(&pick.block) {
            pool.free.push_front((pick.address, pick.leftover));
        }
    }

    /// An address was freed by a change of this revision, which left a record that it rests. One of a block of another
    /// node is ignored: that node learns of it by the directory.
    pub fn rest(&mut self, address: IpAddr, record: Revision, now: Duration) {
        if self.block_of(address).is_none() || self.special.contains(&address) {
            return;
        }
        let pool = &mut self.pools[Family::of(address) as usize];
        if pool.resting.iter().any(|resting| resting.address == address && resting.record >= record) {
            return;
        }
        // A later use than the one that ended.
        if pool.held.get(&address).is_some_and(|held| held.is_none_or(|held| held > record)) {
            return;
        }
        pool.held.remove(&address);
        pool.free.retain(|(free, _)| *free != address);
        pool.resting.retain(|resting| resting.address != address);
        pool.resting.push_back(Resting { address, since: now, record });
    }

    /// The directory shows this record of an address whose pick failed on it, or none.
    pub fn correct(&mut self, address: IpAddr, recorded: Option<Recorded>, now: Duration) {
        if self.block_of(address).is_none() {
            return;
        }
        let pool = &mut self.pools[Family::of(address) as usize];
        pool.held.remove(&address);
        pool.free.retain(|(free, _)| *free != address);
        pool.resting.retain(|resting| resting.address != address);
        match recorded {
            None => pool.free.push_back((address, None)),
            Some(Recorded::Held(revision)) => drop(pool.held.insert(address, Some(revision))),
            Some(Recorded::Resting(record)) => pool.resting.push_back(Resting { address, since: now, record }),
        }
    }

    /// Brings a block in line with all that the directory recorded of it at `revision`. What is newer here, or is being
    /// written, is left alone.
    pub fn reconcile(&mut self, net: IpNet, recorded: &BTreeMap<IpAddr, Recorded>, revision: Revision, now: Duration) {
        for address in addresses(net).filter(|address| !self.special.contains(address)).collect::<Vec<_>>() {
            let pool = &self.pools[Family::of(address) as usize];
            let resting = pool.resting.iter().find(|resting| resting.address == address);
            let newer = match (pool.held.get(&address), resting) {
                (Some(None), _) => true,
                (Some(Some(held)), _) => *held > revision,
                (None, Some(resting)) => resting.record > revision,
                (None, None) => false,
            };
            let same = match (recorded.get(&address), pool.held.get(&address), resting) {
                (Some(Recorded::Held(_)), Some(_), _) => true,
                (Some(Recorded::Resting(record)), None, Some(resting)) => resting.record == *record,
                (None, None, None) => true,
                _ => false,
            };
            if !newer && !same {
                self.correct(address, recorded.get(&address).copied(), now);
            }
        }
    }

    /// Addresses that have rested, with the revisions of their records, which can go. At most `limit`.
    #[must_use]
    pub fn rested(&self, now: Duration, limit: usize) -> Vec<(IpAddr, Revision)> {
        let all = self.pools.iter().flat_map(|pool| pool.resting.iter().take_while(|resting| rested(resting, now)));
        all.map(|resting| (resting.address, resting.record)).take(limit).collect()
    }

    /// The record of an address that has rested was removed.
    pub fn swept(&mut self, address: IpAddr, record: Revision) {
        let pool = &mut self.pools[Family::of(address) as usize];
        let before = pool.resting.len();
        pool.resting.retain(|resting| (resting.address, resting.record) != (address, record));
        if pool.resting.len() != before {
            pool.free.push_back((address, None));
        }
    }
}

fn rested(resting: &Resting, now: Duration) -> bool {
    now.saturating_sub(resting.since) >= REST
}

/// Every address of a block, the first and the last included.
pub(crate) fn addresses(net: IpNet) -> impl Iterator<Item = IpAddr> {
    let (first, last) = match net.trunc() {
        IpNet::V4(net) => (u128::from(net.network().to_bits()), u128::from(net.broadcast().to_bits())),
        IpNet::V6(net) => (net.network().to_bits(), net.broadcast().to_bits()),
    };
    let v4 = net.addr().is_ipv4();
    let address = move |bits: u128| match u32::try_from(bits) {
        Ok(bits) if v4 => IpAddr::V4(bits.into()),
        _ => IpAddr::V6(bits.into()),
    };
    (first..=last).take(BLOCK_MAX).map(address)
}

#[cfg(test)]
mod tests;
