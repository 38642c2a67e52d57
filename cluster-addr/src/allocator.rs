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
    collections::{BTreeMap, BTreeSet},
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

/// The addresses of one family, found by address and, in the order in which they are taken, by their turn: whatever their
/// number, nothing here looks at all of them.
#[derive(Debug, Default)]
struct Pool {
    known: BTreeMap<IpAddr, Known>,
    /// Free and rested: the longest unused is taken first.
    free: BTreeMap<Turn, IpAddr>,
    /// Freed, oldest first.
    resting: BTreeMap<Turn, IpAddr>,
    /// The next turn at the end of a queue.
    next: Turn,
}

/// A place in a queue; those put at its front count down from -1.
type Turn = i64;

#[derive(Debug, Clone, Copy)]
enum Known {
    /// To be given out, with the revision of a record left.
    Free { turn: Turn, leftover: Option<Revision> },
    /// Given out, with the revision of the record; `None` while it is being written.
    Held(Option<Revision>),
    /// Freed by the change of this revision.
    Resting { turn: Turn, since: Duration, record: Revision },
}

impl Pool {
    fn set(&mut self, address: IpAddr, known: Known) {
        self.forget(address);
        match known {
            Known::Free { turn, .. } => drop(self.free.insert(turn, address)),
            Known::Resting { turn, .. } => drop(self.resting.insert(turn, address)),
            Known::Held(_) => {}
        }
        self.known.insert(address, known);
    }

    fn forget(&mut self, address: IpAddr) -> Option<Known> {
        let known = self.known.remove(&address)?;
        match known {
            Known::Free { turn, .. } => drop(self.free.remove(&turn)),
            Known::Resting { turn, .. } => drop(self.resting.remove(&turn)),
            Known::Held(_) => {}
        }
        Some(known)
    }

    fn turn(&mut self) -> Turn {
        self.next += 1;
        self.next
    }

    /// What the directory shows, from `now` on.
    fn learn(&mut self, address: IpAddr, recorded: Option<Recorded>, now: Duration) {
        let turn = self.turn();
        let known = match recorded {
            None => Known::Free { turn, leftover: None },
            Some(Recorded::Held(revision)) => Known::Held(Some(revision)),
            Some(Recorded::Resting(record)) => Known::Resting { turn, since: now, record },
        };
        self.set(address, known);
    }

    fn free_first(&mut self, address: IpAddr, leftover: Option<Revision>) {
        let turn = self.free.first_key_value().map_or(0, |(turn, _)| *turn).min(0) - 1;
        self.set(address, Known::Free { turn, leftover });
    }

    /// Those that have rested, the first that was freed first, with the revisions of their records.
    fn rested(&self, now: Duration) -> impl Iterator<Item = (IpAddr, Revision)> {
        let record = move |address: &IpAddr| match self.known.get(address) {
            Some(Known::Resting { since, record, .. }) if now.saturating_sub(*since) >= REST => {
                Some((*address, *record))
            }
            _ => None,
        };
        self.resting.values().map_while(record)
    }

    fn of_net(&self, net: IpNet) -> impl Iterator<Item = (&IpAddr, &Known)> {
        self.known.range(net.network()..=net.broadcast())
    }
}

impl Allocator {
    /// Sets the addresses that are never given out; those in use stay so until they are freed.
    pub fn set_special(&mut self, special: impl IntoIterator<Item = IpAddr>) {
        self.special = special.into_iter().collect();
        for address in &self.special {
            let pool = &mut self.pools[Family::of(*address) as usize];
            if let Some(Known::Free { .. }) = pool.known.get(address) {
                pool.forget(*address);
            }
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
            pool.learn(address, recorded.get(&address).copied(), now);
        }
    }

    /// Forgets a block that is no longer this node's.
    pub fn remove_block(&mut self, net: IpNet) {
        if self.blocks.remove(&net).is_none() {
            return;
        }
        let pool = &mut self.pools[Family::of_net(net) as usize];
        for address in pool.of_net(net).map(|(address, _)| *address).collect::<Vec<_>>() {
            pool.forget(address);
        }
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
            let mut fill = Fill { net: *net, held: 0, resting: 0, free: 0 };
            for (_, known) in self.pools[Family::of_net(*net) as usize].of_net(*net) {
                match known {
                    Known::Held(_) => fill.held += 1,
                    Known::Resting { .. } => fill.resting += 1,
                    Known::Free { .. } => fill.free += 1,
                }
            }
            fill
        };
        self.blocks.keys().map(count).collect()
    }

    /// How many addresses of a family can be given out now.
    #[must_use]
    pub fn available(&self, family: Family, now: Duration) -> usize {
        let pool = &self.pools[family as usize];
        pool.free.len() + pool.rested(now).count()
    }

    /// An address that is free and rested, now held; `None` if another block is needed.
    pub fn allocate(&mut self, family: Family, now: Duration) -> Option<Pick> {
        let pool = &self.pools[family as usize];
        // Those that have rested before those that were never used: their records are to go.
        let rested = pool.rested(now).map(|(address, _)| address).next();
        let address = rested.or_else(|| pool.free.first_key_value().map(|(_, address)| *address))?;
        self.hold(address)
    }

    /// One address in particular, now held; how it stands if it can't be had.
    ///
    /// # Errors
    /// The standing that is not [`Standing::Free`].
    pub fn take(&mut self, address: IpAddr, now: Duration) -> Result<Pick, Standing> {
        match self.standing(address, now) {
            Standing::Free => self.hold(address).ok_or(Standing::Foreign),
            other => Err(other),
        }
    }

    /// Picks an address that is free or has rested.
    fn hold(&mut self, address: IpAddr) -> Option<Pick> {
        let (block, lease) = self.block_of(address)?;
        let pool = &mut self.pools[Family::of(address) as usize];
        let leftover = match pool.forget(address) {
            Some(Known::Free { leftover, .. }) => leftover,
            Some(Known::Resting { record, .. }) => Some(record),
            Some(Known::Held(_)) | None => None,
        };
        pool.set(address, Known::Held(None));
        Some(Pick { address, block, lease: Some(lease), leftover })
    }

    /// How an address stands.
    #[must_use]
    pub fn standing(&self, address: IpAddr, now: Duration) -> Standing {
        if self.special.contains(&address) {
            return Standing::Special;
        }
        match self.pools[Family::of(address) as usize].known.get(&address) {
            Some(Known::Held(_)) => Standing::Held,
            Some(Known::Free { .. }) => Standing::Free,
            Some(Known::Resting { since, .. }) => match REST.saturating_sub(now.saturating_sub(*since)) {
                Duration::ZERO => Standing::Free,
                left => Standing::Resting(left),
            },
            None if self.block_of(address).is_some() => Standing::Free,
            None => Standing::Foreign,
        }
    }

    /// A pick was recorded at this revision.
    pub fn confirm(&mut self, pick: &Pick, record: Revision) {
        let pool = &mut self.pools[Family::of(pick.address) as usize];
        if let Some(Known::Held(held)) = pool.known.get_mut(&pick.address) {
            *held = Some(record);
        }
    }

    /// A pick was not recorded and never will be: it is free as before.
    pub fn put_back(&mut self, pick: &Pick) {
        let pool = &mut self.pools[Family::of(pick.address) as usize];
        if let Some(Known::Held(_)) = pool.known.get(&pick.address) {
            pool.free_first(pick.address, pick.leftover);
        }
    }

    /// An address was freed by a change of this revision, which left a record that it rests. One of a block of another
    /// node is ignored: that node learns of it by the directory.
    pub fn rest(&mut self, address: IpAddr, record: Revision, now: Duration) {
        if self.block_of(address).is_none() || self.special.contains(&address) {
            return;
        }
        let pool = &mut self.pools[Family::of(address) as usize];
        let later = match pool.known.get(&address) {
            Some(Known::Resting { record: there, .. }) => *there >= record,
            // A later use than the one that ended.
            Some(Known::Held(held)) => held.is_none_or(|held| held > record),
            Some(Known::Free { .. }) | None => false,
        };
        if !later {
            pool.learn(address, Some(Recorded::Resting(record)), now);
        }
    }

    /// The directory shows this record of an address whose pick failed on it, or none.
    pub fn correct(&mut self, address: IpAddr, recorded: Option<Recorded>, now: Duration) {
        if self.block_of(address).is_some() {
            self.pools[Family::of(address) as usize].learn(address, recorded, now);
        }
    }

    /// Brings a block in line with all that the directory recorded of it at `revision`. What is newer here, or is being
    /// written, is left alone.
    pub fn reconcile(&mut self, net: IpNet, recorded: &BTreeMap<IpAddr, Recorded>, revision: Revision, now: Duration) {
        if !self.blocks.contains_key(&net) {
            return;
        }
        let Self { pools, special, .. } = self;
        let pool = &mut pools[Family::of_net(net) as usize];
        for address in addresses(net).filter(|address| !special.contains(address)) {
            let recorded = recorded.get(&address).copied();
            let (newer, same) = match (pool.known.get(&address), recorded) {
                (Some(Known::Held(held)), recorded) => {
                    (held.is_none_or(|held| held > revision), matches!(recorded, Some(Recorded::Held(_))))
                }
                (Some(Known::Resting { record, .. }), recorded) => {
                    (*record > revision, recorded == Some(Recorded::Resting(*record)))
                }
                (Some(Known::Free { leftover, .. }), recorded) => (false, recorded == leftover.map(Recorded::Resting)),
                (None, recorded) => (false, recorded.is_none()),
            };
            if !newer && !same {
                pool.learn(address, recorded, now);
            }
        }
    }

    /// Addresses that have rested, with the revisions of their records, which can go. At most `limit`.
    #[must_use]
    pub fn rested(&self, now: Duration, limit: usize) -> Vec<(IpAddr, Revision)> {
        self.pools.iter().flat_map(|pool| pool.rested(now)).take(limit).collect()
    }

    /// The record of an address that has rested was removed.
    pub fn swept(&mut self, address: IpAddr, record: Revision) {
        let pool = &mut self.pools[Family::of(address) as usize];
        if let Some(Known::Resting { record: there, .. }) = pool.known.get(&address)
            && *there == record
        {
            pool.learn(address, None, Duration::ZERO);
        }
    }
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
