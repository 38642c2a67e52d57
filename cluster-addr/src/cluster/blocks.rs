//! Prefixes and blocks: leasing, renewing, giving back, taking over.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{Cluster, ClusterError, RACES_MAX, State, jobs::Claim, jobs::recorded};
use crate::{
    allocator::{Family, Pick, Recorded, addresses},
    directory::{Expect, Outcome, Revision, TRANSACTION_MAX, Transaction, Versioned},
    records::{
        BlockRecord, CLUSTER_KEY, ClusterRecord, JOBS, JobRecord, NodeRecord, Owner, Prefix, address_key,
        address_of_key, addresses_of_block, block_key, decode, encode, node_key,
    },
};

/// Length of IPv4 blocks: 64 addresses.
const BLOCK_LENGTH_V4: u8 = 26;
/// Length of IPv6 blocks: as many.
const BLOCK_LENGTH_V6: u8 = 122;
/// Wholly free blocks of a family that a node keeps.
const SPARE: usize = 1;
/// Records of rested addresses that are removed in one go.
const SWEEP: usize = 64;
/// A node that lost so many races for fresh blocks in a row chooses among two to this power of them.
const CROWD_BITS: u32 = 8;
/// How many jobs a refusal names.
const NAMED: usize = 3;

/// What became of the leases and jobs of a node that was given up.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Forgotten {
    /// Blocks that nobody leases now.
    pub blocks: Vec<IpNet>,
    /// Jobs whose records were removed.
    pub jobs: Vec<String>,
}

impl Cluster {
    /// An address of this node's blocks, or the first one of a block that is to be leased with it.
    pub(super) async fn claim_any(&self, family: Family) -> Result<Claim, ClusterError> {
        if let Some(pick) = self.pick(family) {
            return Ok(Claim::of(pick));
        }
        // What is believed of the leases may be old.
        let recorded = self.learn_blocks().await?;
        self.learn_cluster().await?;
        if let Some(pick) = self.pick(family) {
            return Ok(Claim::of(pick));
        }
        if self.take_over(family, recorded).await?
            && let Some(pick) = self.pick(family)
        {
            return Ok(Claim::of(pick));
        }
        let nets: Vec<_> = self.record().of_family(family).map(|prefix| prefix.net.to_string()).collect();
        Err(ClusterError::Exhausted { prefixes: nets.join(", ") })
    }

    /// A pick without asking anybody, of an own block or of one that seems to be nobody's.
    fn pick(&self, family: Family) -> Option<Pick> {
        let now = self.now();
        let mut state = self.state();
        let State { record, allocator, leased, races_lost, .. } = &mut *state;
        if let Some(pick) = allocator.allocate(family, now) {
            return Some(pick);
        }
        let (record, _) = record.as_ref()?;
        let special: BTreeSet<IpAddr> = record.special().into_iter().collect();
        let fresh = record.of_family(family).flat_map(|prefix| vacant(prefix, leased));
        let fresh = fresh.filter_map(|net| {
            let address = addresses(net).find(|address| !special.contains(address))?;
            Some(Pick { address, block: net, lease: None, leftover: None })
        });
        // The lowest; but when many nodes want one at the same time each is to try another.
        let among = 1 << (*races_lost).min(CROWD_BITS);
        let mut hasher = DefaultHasher::new();
        (&self.node.name, *races_lost).hash(&mut hasher);
        let chosen = usize::try_from(hasher.finish() % among).unwrap_or(0);
        fresh.take(chosen + 1).last()
    }

    /// Others were faster with a block that seemed to be nobody's, so more may have changed.
    pub(super) async fn lost_fresh_block(&self) -> Result<(), ClusterError> {
        {
            let mut state = self.state();
            state.races_lost = state.races_lost.saturating_add(1);
        }
        self.learn_blocks().await?;
        Ok(())
    }

    /// Learns from what was found under the key of a block where a lease of this node's, or none, had been expected.
    pub(super) async fn learn_lease(&self, net: IpNet, found: Option<&Versioned>) -> Result<(), ClusterError> {
        let there: Option<BlockRecord> = found.map(|found| decode(&block_key(net), &found.value)).transpose()?;
        let lease = {
            let mut state = self.state();
            match (there, found) {
                (Some(there), Some(found)) => {
                    let own = there.node == self.node.name && there.incarnation == state.incarnation;
                    state.leased.insert(net, there.node);
                    own.then_some(found.revision)
                }
                _ => {
                    state.leased.remove(&net);
                    None
                }
            }
        };
        match lease {
            // Its lease has another revision than was believed, or it was leased and the answer got lost.
            Some(lease) => self.take_up(net, lease).await,
            None => {
                self.state().allocator.remove_block(net);
                Ok(())
            }
        }
    }

    /// Leases a block that nobody holds, or renews the lease of an own one, and reads what is known of its addresses.
    pub(super) async fn lease(&self, net: IpNet) -> Result<(), ClusterError> {
        let key = block_key(net);
        let before = match self.block_recorded(net).await? {
            None => Expect::Absent,
            Some((there, revision)) if there.node == self.node.name => Expect::Revision(revision),
            Some((there, _)) => {
                self.state().leased.insert(net, there.node);
                return Ok(());
            }
        };
        let lease = Transaction::default().expect(&key, before).put(&key, encode(&self.lease_of(net)));
        match self.directory.transact(&lease).await? {
            Outcome::Done(revision) => self.take_up(net, revision).await,
            Outcome::Conflict { found, .. } => self.learn_lease(net, found.as_ref()).await,
        }
    }

    async fn take_up(&self, net: IpNet, lease: Revision) -> Result<(), ClusterError> {
        let (recorded, _) = self.recorded_of(net).await?;
        let mut state = self.state();
        state.allocator.add_block(net, lease, &recorded, self.now());
        state.leased.insert(net, self.node.name.clone());
        Ok(())
    }

    async fn recorded_of(&self, net: IpNet) -> Result<(BTreeMap<IpAddr, Recorded>, Revision), ClusterError> {
        let listing = self.directory.list(&addresses_of_block(net)).await?;
        let mut found = BTreeMap::new();
        for entry in listing.entries {
            if let Some(address) = address_of_key(&entry.key).filter(|address| net.contains(address)) {
                found.insert(address, recorded(&entry.key, &entry.versioned)?);
            }
        }
        Ok((found, listing.revision))
    }

    /// Brings the view of an own block in line with the directory.
    pub(super) async fn reconcile_block(&self, net: IpNet) -> Result<(), ClusterError> {
        let (recorded, revision) = self.recorded_of(net).await?;
        self.state().allocator.reconcile(net, &recorded, revision, self.now());
        Ok(())
    }

    /// At a start: renews the leases of this node's blocks, so that nothing a former start still had on its way can be done
    /// any more, and takes them up.
    pub(super) async fn renew_blocks(&self) -> Result<(), ClusterError> {
        for _ in 0..RACES_MAX {
            let recorded = self.blocks_recorded().await?;
            let mut own = Vec::new();
            {
                let mut state = self.state();
                state.leased = recorded.iter().map(|(block, _)| (block.net, block.node.clone())).collect();
            }
            let mut all_done = true;
            let here: Vec<_> = recorded.into_iter().filter(|(block, _)| block.node == self.node.name).collect();
            for chunk in here.chunks(TRANSACTION_MAX) {
                let mut renew = Transaction::default();
                for (block, revision) in chunk {
                    let key = block_key(block.net);
                    renew = renew.expect(&key, Expect::Revision(*revision)).put(key, encode(&self.lease_of(block.net)));
                }
                match self.directory.transact(&renew).await? {
                    Outcome::Done(revision) => own.extend(chunk.iter().map(|(block, _)| (block.net, revision))),
                    Outcome::Conflict { .. } => all_done = false,
                }
            }
            for (net, lease) in own {
                self.take_up(net, lease).await?;
            }
            if all_done {
                return Ok(());
            }
        }
        Err(ClusterError::Contended)
    }

    async fn learn_blocks(&self) -> Result<Vec<(BlockRecord, Revision)>, ClusterError> {
        let recorded = self.blocks_recorded().await?;
        self.state().leased = recorded.iter().map(|(block, _)| (block.net, block.node.clone())).collect();
        Ok(recorded)
    }

    async fn learn_cluster(&self) -> Result<(), ClusterError> {
        let Some(found) = self.directory.get(CLUSTER_KEY).await? else { return Err(ClusterError::NoCluster) };
        let mut state = self.state();
        if state.record.as_ref().is_none_or(|(_, revision)| *revision != found.revision) {
            let record: ClusterRecord = decode(CLUSTER_KEY, &found.value)?;
            state.allocator.set_special(record.special());
            state.record = Some((record, found.revision));
        }
        Ok(())
    }

    /// Takes over a block, of those `recorded`, of a node that owns no job, which proves that nothing of its is in use there but what other
    /// nodes run, and that has records. Whether one was taken.
    async fn take_over(&self, family: Family, recorded: Vec<(BlockRecord, Revision)>) -> Result<bool, ClusterError> {
        /// Of each job no more is wanted.
        #[derive(serde::Deserialize)]
        struct Owned {
            owner: Owner,
        }
        let jobs = self.directory.list(JOBS).await?.entries;
        let owners = jobs.iter().map(|job| Ok(decode::<Owned>(&job.key, &job.versioned.value)?.owner.node));
        let busy: BTreeSet<String> = owners.collect::<Result<_, ClusterError>>()?;
        for (block, revision) in recorded {
            let other = block.node != self.node.name && Family::of_net(block.net) == family;
            if !other || busy.contains(&block.node) {
                continue;
            }
            let key = block_key(block.net);
            let take = Transaction::default()
                .expect(&key, Expect::Revision(revision))
                .put(&key, encode(&self.lease_of(block.net)));
            if let Outcome::Done(lease) = self.directory.transact(&take).await? {
                self.take_up(block.net, lease).await?;
                if self.state().allocator.available(family, self.now()) > 0 {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// What is to be done now and then, every few seconds: settles what was in doubt, removes the records of addresses that
    /// have rested, gives back blocks that are not needed, looks whether what is believed of one of the blocks is true.
    ///
    /// # Errors
    /// [`ClusterError::Directory`]; what was not done is done the next time.
    pub async fn maintain(&self) -> Result<(), ClusterError> {
        self.settle_doubts().await?;
        self.learn_cluster().await?;
        self.sweep().await?;
        self.give_back().await?;
        let next = {
            let mut state = self.state();
            let nets: Vec<_> = state.allocator.blocks().map(|(net, _)| net).collect();
            state.reconciled = state.reconciled.wrapping_add(1);
            nets.get(state.reconciled.checked_rem(nets.len()).unwrap_or(0)).copied()
        };
        match next {
            Some(net) => self.reconcile_block(net).await,
            None => Ok(()),
        }
    }

    /// Brings the view of all own blocks in line with the directory: after a time in which changes may have been missed.
    ///
    /// # Errors
    /// [`ClusterError::Directory`].
    pub async fn reconcile(&self) -> Result<(), ClusterError> {
        let nets: Vec<_> = self.state().allocator.blocks().map(|(net, _)| net).collect();
        for net in nets {
            self.reconcile_block(net).await?;
        }
        Ok(())
    }

    async fn sweep(&self) -> Result<(), ClusterError> {
        let rested = self.state().allocator.rested(self.now(), SWEEP);
        if rested.is_empty() {
            return Ok(());
        }
        let mut sweep = Transaction::default();
        for (address, record) in &rested {
            let key = address_key(*address);
            sweep = sweep.expect(&key, Expect::Revision(*record)).delete(key);
        }
        match self.directory.transact(&sweep).await? {
            Outcome::Done(_) => {
                let mut state = self.state();
                for (address, record) in rested {
                    state.allocator.swept(address, record);
                }
            }
            Outcome::Conflict { key, found } => {
                // Given out meanwhile, or swept by a try whose answer got lost.
                if let Some((block, _)) =
                    address_of_key(&key).and_then(|address| self.state().allocator.block_of(address))
                {
                    drop(found);
                    self.reconcile_block(block).await?;
                }
            }
        }
        Ok(())
    }

    async fn give_back(&self) -> Result<(), ClusterError> {
        for family in Family::BOTH {
            let surplus: Vec<_> = {
                let mut state = self.state();
                let spare = |fill: &crate::allocator::Fill| {
                    Family::of_net(fill.net) == family && fill.held == 0 && fill.resting == 0
                };
                let spare: Vec<_> = state.allocator.fill().into_iter().filter(spare).map(|fill| fill.net).collect();
                let leases: BTreeMap<_, _> = state.allocator.blocks().collect();
                let surplus: Vec<_> = spare.into_iter().skip(SPARE).map(|net| (net, leases[&net])).collect();
                // Before the lease ends, so that nothing is picked from them meanwhile.
                for (net, _) in &surplus {
                    state.allocator.remove_block(*net);
                }
                surplus
            };
            for (net, lease) in surplus {
                let key = block_key(net);
                let end = Transaction::default().expect(&key, Expect::Revision(lease)).delete(&key);
                match self.directory.transact(&end).await {
                    Ok(Outcome::Done(_)) => drop(self.state().leased.remove(&net)),
                    Ok(Outcome::Conflict { found, .. }) => self.learn_lease(net, found.as_ref()).await?,
                    Err(error) => {
                        // If it is this node's still, it is found so when it is needed or at the next start.
                        self.state().leased.remove(&net);
                        return Err(error.into());
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds a prefix, or widens one: a prefix that contains present ones takes their place.
    ///
    /// # Errors
    /// [`ClusterError::BadPrefix`], [`ClusterError::Directory`], [`ClusterError::Contended`].
    pub async fn add_prefix(&self, net: IpNet) -> Result<ClusterRecord, ClusterError> {
        for _ in 0..RACES_MAX {
            let Some(found) = self.directory.get(CLUSTER_KEY).await? else { return Err(ClusterError::NoCluster) };
            let mut record: ClusterRecord = decode(CLUSTER_KEY, &found.value)?;
            widen(&mut record, net)?;
            refuse_nodes(net, &self.nodes().await?)?;
            let change = Transaction::default()
                .expect(CLUSTER_KEY, Expect::Revision(found.revision))
                .put(CLUSTER_KEY, encode(&record));
            if let Outcome::Done(_) = self.directory.transact(&change).await? {
                self.learn_cluster().await?;
                return Ok(record);
            }
        }
        Err(ClusterError::Contended)
    }

    /// Ends the lease of a block, whoever has it. Addresses of it that are in use stay in use; the holder notices when it
    /// tries to give out the next.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`], [`ClusterError::Directory`], [`ClusterError::Contended`].
    pub async fn release_block(&self, net: IpNet) -> Result<BlockRecord, ClusterError> {
        for _ in 0..RACES_MAX {
            let Some((block, revision)) = self.block_recorded(net).await? else {
                return Err(ClusterError::NotFound(format!("nobody leases a block {net}; see `migd addr blocks`")));
            };
            let key = block_key(net);
            let end = Transaction::default().expect(&key, Expect::Revision(revision)).delete(&key);
            if let Outcome::Done(_) = self.directory.transact(&end).await? {
                self.learn_lease(net, None).await?;
                return Ok(block);
            }
        }
        Err(ClusterError::Contended)
    }

    /// Gives up a node: its blocks become free, and with `gone`, the operator's word that nothing of it runs any more, its
    /// jobs' records are removed and their addresses rest.
    ///
    /// # Errors
    /// [`ClusterError::NodeHasJobs`] without that word, [`ClusterError::NotFound`], [`ClusterError::Directory`].
    pub async fn forget_node(&self, node: &str, gone: bool) -> Result<Forgotten, ClusterError> {
        if node == self.node.name {
            let why = format!("node {node} answers this command, so it is not gone; ask another node");
            return Err(ClusterError::NotFound(why));
        }
        if self.directory.get(&node_key(node)).await?.is_none() {
            return Err(ClusterError::NotFound(format!("there is no node {node}; see `migd nodes`")));
        }
        let mut forgotten = Forgotten::default();
        // The blocks first: from then on the node can't start a job that isn't seen below.
        for (block, _) in self.blocks_recorded().await?.into_iter().filter(|(block, _)| block.node == node) {
            if !gone {
                let jobs = self.jobs_of(node).await?;
                if let Some(first) = refusal(node, &jobs) {
                    return Err(first);
                }
            }
            if self.release_block(block.net).await.is_ok() {
                forgotten.blocks.push(block.net);
            }
        }
        let jobs = self.jobs_of(node).await?;
        if let (false, Some(refusal)) = (gone, refusal(node, &jobs)) {
            return Err(refusal);
        }
        for job in jobs {
            if self.release(&job).await? {
                forgotten.jobs.push(job.name);
            }
        }
        self.directory.transact(&Transaction::default().delete(node_key(node))).await?;
        Ok(forgotten)
    }

    async fn jobs_of(&self, node: &str) -> Result<Vec<JobRecord>, ClusterError> {
        let (mut jobs, _) = self.jobs().await?;
        jobs.retain(|job| job.owner.node == node);
        Ok(jobs)
    }
}

fn refusal(node: &str, jobs: &[JobRecord]) -> Option<ClusterError> {
    let names: Vec<_> = jobs.iter().take(NAMED).map(|job| job.name.as_str()).collect();
    (!jobs.is_empty()).then(|| ClusterError::NodeHasJobs {
        node: node.to_owned(),
        count: jobs.len(),
        jobs: names.join(", "),
    })
}

/// Adds a prefix to the cluster's, in the place of those it contains.
pub(super) fn widen(record: &mut ClusterRecord, net: IpNet) -> Result<(), ClusterError> {
    let bad = |why: String| Err(ClusterError::BadPrefix { net, why });
    if net != net.trunc() {
        return bad(format!("it has bits set beyond its length; {} is meant, perhaps", net.trunc()));
    }
    let (usual, width) = match net {
        IpNet::V4(_) => (BLOCK_LENGTH_V4, 32),
        IpNet::V6(_) => (BLOCK_LENGTH_V6, 128),
    };
    if net.prefix_len() > width - 2 {
        return bad(format!("it is too small: a cluster needs at least a /{}", width - 2));
    }
    if net.prefix_len() == 0 {
        return bad("it is all there is".to_owned());
    }
    if let Some((_, purpose)) = special_nets().find(|(special, _)| special.contains(&net) || net.contains(special)) {
        return bad(format!("it has addresses {purpose}"));
    }
    if let Some(wider) = record.prefixes.iter().find(|prefix| prefix.net.contains(&net)) {
        return bad(format!("the cluster has {} already", wider.net));
    }
    let inside = |prefix: &&Prefix| net.contains(&prefix.net);
    // Blocks that are leased keep their size, so that no two overlap. Otherwise at least four, for small clusters.
    let kept = record.prefixes.iter().find(inside).map(|prefix| prefix.block_length);
    let block_length = kept.unwrap_or((net.prefix_len() + 2).clamp(usual, width));
    if record.prefixes.iter().filter(inside).any(|prefix| prefix.block_length != block_length) {
        return bad("the prefixes it contains have blocks of different sizes".to_owned());
    }
    record.prefixes.retain(|prefix| !net.contains(&prefix.net));
    record.prefixes.push(Prefix { net, block_length });
    record.prefixes.sort_by_key(|prefix| prefix.net);
    Ok(())
}

/// Refuses a prefix out of which a job could get the address of a node.
pub(super) fn refuse_nodes(net: IpNet, nodes: &[NodeRecord]) -> Result<(), ClusterError> {
    let addresses = |node: &NodeRecord| std::iter::once(node.peer.ip()).chain(node.hops.clone()).collect::<Vec<_>>();
    let inside = |node: &NodeRecord| addresses(node).into_iter().find(|address| net.contains(address));
    match nodes.iter().find_map(|node| Some((node, inside(node)?))) {
        Some((node, address)) => {
            let why =
                format!("it has {address}, the address of node {}; take one that has no machine's address", node.name);
            Err(ClusterError::BadPrefix { net, why })
        }
        None => Ok(()),
    }
}

/// Networks of which no host can have an address that others reach (RFC 6890), and what they are for.
fn special_nets() -> impl Iterator<Item = (IpNet, &'static str)> {
    let nets = [
        ("0.0.0.0/8", "that mean this host"),
        ("127.0.0.0/8", "of the loopback device"),
        ("169.254.0.0/16", "that are valid on one link only"),
        ("224.0.0.0/4", "for multicast"),
        ("240.0.0.0/4", "that are not in use"),
        ("::/8", "with special meanings"),
        ("fe80::/10", "that are valid on one link only"),
        ("ff00::/8", "for multicast"),
    ];
    nets.into_iter().filter_map(|(net, purpose)| Some((net.parse().ok()?, purpose)))
}

/// The blocks of a prefix that nobody leases, lowest first.
fn vacant<'a>(prefix: &Prefix, leased: &'a BTreeMap<IpNet, String>) -> Box<dyn Iterator<Item = IpNet> + 'a> {
    // The record is damaged: then there is none.
    let Ok(subnets) = prefix.net.subnets(prefix.block_length) else { return Box::new(std::iter::empty()) };
    let mut taken = leased.range(prefix.net.trunc()..).map(|(net, _)| *net).peekable();
    Box::new(subnets.filter(move |net| {
        while taken.next_if(|other| other < net).is_some() {}
        taken.peek() != Some(net)
    }))
}
