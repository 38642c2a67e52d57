//! The operations on a cluster; each is one transaction of the directory.
//!
//! Invariants, whatever fails and whoever calls at the same time:
//! - an address belongs to at most one job ([`AddressRecord::Held`] is written only over nothing or a rested address);
//! - a job has one owner per epoch, and epochs only grow ([`Cluster::transfer`] is the only change of owner).

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net};

use crate::{
    allocator::Allocator,
    directory::{Directory, DirectoryError, Expect, Outcome, Revision, Transaction, Versioned, Watch},
    records::{
        ADDRESSES, AddressRecord, BLOCKS, BlockRecord, CLUSTER_KEY, ClusterRecord, JOBS, JobId, JobRecord, NODES,
        NodeRecord, Owner, address_key, block_key, decode, encode, job_key, name_key, node_key,
    },
};

/// How often an operation that lost a race is tried again before it gives up.
const RACES_MAX: usize = 64;

/// Longest job or node name in bytes: a host name label (RFC 1123 section 2.1).
pub const NAME_MAX: usize = 63;

/// A node's view of its cluster.
pub struct Cluster {
    directory: Arc<dyn Directory>,
    record: ClusterRecord,
    node: String,
    allocator: Mutex<Allocator>,
    started: Instant,
}

/// What a new job is to have.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// From fresh entropy.
    pub id: JobId,
    /// Wanted name; must be free.
    pub name: String,
    /// The command, for listings.
    pub command: Vec<String>,
    /// Milliseconds since 1970, for listings.
    pub started_ms: u64,
}

/// How a change of owner ended. Both answers are final.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transfer {
    /// The new owner, with its epoch.
    Won(Owner),
    /// Somebody else changed it before; who owns it now. `None`: there is no such job any more.
    Lost(Option<Owner>),
}

/// Why an operation on the cluster failed. Nothing was changed, but for [`DirectoryError::Unknown`].
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// See there.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The cluster has not been made.
    #[error("there is no cluster in this directory yet: start its first daemon with --create")]
    NoCluster,
    /// Another cluster, or other settings, are there already.
    #[error("the directory already holds a cluster with prefix {0}; start without --prefix, or with that one")]
    OtherCluster(Ipv4Net),
    /// No address is left.
    #[error("every address of {0} is in use or resting; end jobs, or wait five minutes for addresses lately freed")]
    Exhausted(Ipv4Net),
    /// The name is another job's.
    #[error("the name {name:?} belongs to job {job}; choose another with --name, or end that job")]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        job: String,
    },
    /// Not a host name label.
    #[error("{0:?} is no name: use 1 to 63 of a-z, A-Z, 0-9, '-', '_' and '.', beginning with a letter or digit")]
    BadName(String),
    /// A prefix too small to be cut into blocks.
    #[error("the prefix {0} is too small: a cluster needs at least a /30")]
    PrefixTooSmall(Ipv4Net),
    /// Others were faster too many times.
    #[error("the directory changed under this operation {RACES_MAX} times; try again")]
    Contended,
}

impl Cluster {
    /// Makes a cluster, or opens the one there is if it has the same prefix.
    ///
    /// # Errors
    /// [`ClusterError::OtherCluster`], [`ClusterError::PrefixTooSmall`], [`ClusterError::Directory`].
    pub async fn create(
        directory: Arc<dyn Directory>,
        id: String,
        prefix: Ipv4Net,
        node: NodeRecord,
    ) -> Result<Self, ClusterError> {
        let prefix = prefix.trunc();
        if prefix.prefix_len() > 30 {
            return Err(ClusterError::PrefixTooSmall(prefix));
        }
        // At least four blocks, so that small test clusters work too.
        let block_length = (prefix.prefix_len() + 2).clamp(26, 32);
        let record = ClusterRecord { id, prefix, block_length };
        let create = Transaction::default().expect(CLUSTER_KEY, Expect::Absent).put(CLUSTER_KEY, encode(&record));
        if let Outcome::Conflict { found: Some(found), .. } = directory.transact(&create).await? {
            let there: ClusterRecord = decode(CLUSTER_KEY, &found.value)?;
            if there.prefix != prefix {
                return Err(ClusterError::OtherCluster(there.prefix));
            }
        }
        Self::open(directory, node).await
    }

    /// Joins the cluster of a directory: registers this node and takes up the blocks it holds.
    ///
    /// # Errors
    /// [`ClusterError::NoCluster`], [`ClusterError::BadName`], [`ClusterError::Directory`].
    pub async fn open(directory: Arc<dyn Directory>, node: NodeRecord) -> Result<Self, ClusterError> {
        check_name(&node.name)?;
        let Some(found) = directory.get(CLUSTER_KEY).await? else { return Err(ClusterError::NoCluster) };
        let record: ClusterRecord = decode(CLUSTER_KEY, &found.value)?;
        let name = node.name.clone();
        directory.transact(&Transaction::default().put(node_key(&name), encode(&node))).await?;
        let cluster = Self { directory, record, node: name, allocator: Mutex::default(), started: Instant::now() };
        cluster.load_blocks().await?;
        Ok(cluster)
    }

    /// The cluster's facts.
    #[must_use]
    pub fn record(&self) -> &ClusterRecord {
        &self.record
    }

    /// The directory itself.
    #[must_use]
    pub fn directory(&self) -> &Arc<dyn Directory> {
        &self.directory
    }

    /// Gives a new job an address out of this node's blocks and makes this node its owner, at epoch 1.
    ///
    /// # Errors
    /// [`ClusterError::NameTaken`], [`ClusterError::BadName`], [`ClusterError::Exhausted`],
    /// [`ClusterError::Directory`], [`ClusterError::Contended`].
    pub async fn create_job(&self, job: NewJob) -> Result<JobRecord, ClusterError> {
        check_name(&job.name)?;
        let NewJob { id, name, command, started_ms } = job;
        for _ in 0..RACES_MAX {
            let address = self.take_address().await?;
            let key = address_key(IpAddr::V4(address));
            let there = match self.directory.get(&key).await {
                Ok(there) => there,
                Err(error) => {
                    self.allocator().free(address, self.now());
                    return Err(error.into());
                }
            };
            if let Some(Versioned { value, .. }) = &there
                && let AddressRecord::Held { .. } = decode(&key, value)?
            {
                self.allocator().mark_held(address);
                continue;
            }
            let owner = Owner { node: self.node.clone(), epoch: 1 };
            let record =
                JobRecord { id: id.clone(), name: name.clone(), address, owner, command: command.clone(), started_ms };
            let unchanged = there.map_or(Expect::Absent, |v| Expect::Revision(v.revision));
            let transaction = Transaction::default()
                .expect(job_key(&id), Expect::Absent)
                .expect(name_key(&name), Expect::Absent)
                .expect(&key, unchanged)
                .put(job_key(&id), encode(&record))
                .put(name_key(&name), encode(&id))
                .put(&key, encode(&AddressRecord::Held { job: id.clone() }));
            let outcome = self.directory.transact(&transaction).await;
            match outcome {
                Ok(Outcome::Done(_)) => return Ok(record),
                Ok(Outcome::Conflict { key: lost, found }) => {
                    if lost == key {
                        self.allocator().mark_held(address);
                        continue;
                    }
                    self.allocator().free(address, self.now());
                    if lost == name_key(&name)
                        && let Some(found) = found
                    {
                        let holder: JobId = decode(&lost, &found.value)?;
                        return Err(ClusterError::NameTaken { name, job: holder.to_string() });
                    }
                    return Err(DirectoryError::Invalid(format!("a job {id} exists already")).into());
                }
                Err(error) => {
                    // If it was written after all, the record keeps the address from being used: `mark_held` then.
                    self.allocator().free(address, self.now());
                    return Err(error.into());
                }
            }
        }
        Err(ClusterError::Contended)
    }

    /// The one change of owner: from exactly this owner to a node, at the next epoch.
    ///
    /// With `to` being the present node it is a fence: whoever else tries to take over from the same epoch loses.
    ///
    /// # Errors
    /// [`DirectoryError::Unknown`] means it may have been done: ask again with [`Cluster::job`].
    pub async fn transfer(&self, id: &JobId, from: &Owner, to: &str) -> Result<Transfer, ClusterError> {
        let key = job_key(id);
        loop {
            let Some((mut record, revision)) = self.read_job(&key).await? else { return Ok(Transfer::Lost(None)) };
            if record.owner != *from {
                return Ok(Transfer::Lost(Some(record.owner)));
            }
            record.owner = Owner { node: to.to_owned(), epoch: from.epoch + 1 };
            let swap = Transaction::default().expect(&key, Expect::Revision(revision)).put(&key, encode(&record));
            match self.directory.transact(&swap).await? {
                Outcome::Done(_) => return Ok(Transfer::Won(record.owner)),
                // Another field of the record changed, or the owner did: look again.
                Outcome::Conflict { .. } => {}
            }
        }
    }

    /// Ends a job that this owner has: its name is free at once, its address after its rest. Says whether it was done;
    /// `false` means that somebody else owns it now, or that it is gone.
    ///
    /// # Errors
    /// [`ClusterError::Directory`].
    pub async fn release(&self, id: &JobId, owner: &Owner) -> Result<bool, ClusterError> {
        let key = job_key(id);
        loop {
            let Some((record, revision)) = self.read_job(&key).await? else { return Ok(false) };
            if record.owner != *owner {
                return Ok(false);
            }
            let resting = AddressRecord::Resting { last: id.clone() };
            let release = Transaction::default()
                .expect(&key, Expect::Revision(revision))
                .delete(&key)
                .delete(name_key(&record.name))
                .put(address_key(IpAddr::V4(record.address)), encode(&resting));
            if let Outcome::Done(_) = self.directory.transact(&release).await? {
                self.allocator().free(record.address, self.now());
                return Ok(true);
            }
        }
    }

    /// One job.
    ///
    /// # Errors
    /// [`ClusterError::Directory`].
    pub async fn job(&self, id: &JobId) -> Result<Option<JobRecord>, ClusterError> {
        Ok(self.read_job(&job_key(id)).await?.map(|(record, _)| record))
    }

    /// All jobs, and the revision from which [`Cluster::watch_jobs`] continues.
    ///
    /// # Errors
    /// [`ClusterError::Directory`].
    pub async fn jobs(&self) -> Result<(Vec<JobRecord>, Revision), ClusterError> {
        let listing = self.directory.list(JOBS).await?;
        let records = listing.entries.iter().map(|e| decode(&e.key, &e.versioned.value)).collect::<Result<_, _>>()?;
        Ok((records, listing.revision))
    }

    /// Changes of job records after a revision; values decode as [`JobRecord`].
    ///
    /// # Errors
    /// [`DirectoryError::Compacted`]: list again.
    pub async fn watch_jobs(&self, after: Revision) -> Result<Watch, ClusterError> {
        Ok(self.directory.watch(JOBS, after).await?)
    }

    /// All nodes that ever joined.
    ///
    /// # Errors
    /// [`ClusterError::Directory`].
    pub async fn nodes(&self) -> Result<Vec<NodeRecord>, ClusterError> {
        let listing = self.directory.list(NODES).await?;
        Ok(listing.entries.iter().map(|e| decode(&e.key, &e.versioned.value)).collect::<Result<_, _>>()?)
    }

    /// Takes note of addresses of own blocks that other nodes released (their jobs had moved away and ended there), so
    /// that they can be used again after their rest. Call it for a deletion that [`Cluster::watch_jobs`] reports.
    pub fn note_released(&self, address: Ipv4Addr) {
        self.allocator().free(address, self.now());
    }

    async fn read_job(&self, key: &str) -> Result<Option<(JobRecord, Revision)>, ClusterError> {
        let Some(found) = self.directory.get(key).await? else { return Ok(None) };
        Ok(Some((decode(key, &found.value)?, found.revision)))
    }

    async fn take_address(&self) -> Result<Ipv4Addr, ClusterError> {
        for _ in 0..RACES_MAX {
            let address = self.allocator().allocate(self.now());
            match address {
                Some(address) => return Ok(address),
                None => self.lease_block().await?,
            }
        }
        Err(ClusterError::Contended)
    }

    /// Leases one more block, the first that nobody holds.
    async fn lease_block(&self) -> Result<(), ClusterError> {
        let prefix = self.record.prefix;
        let leased = self.leased_blocks().await?;
        let subnets = prefix.subnets(self.record.block_length);
        let subnets = subnets.map_err(|_| DirectoryError::Storage("the cluster's record is damaged".into()))?;
        for net in subnets {
            if leased.iter().any(|b| b.net == IpNet::V4(net)) {
                continue;
            }
            let block = BlockRecord { net: IpNet::V4(net), node: self.node.clone() };
            let key = block_key(block.net);
            let lease = Transaction::default().expect(&key, Expect::Absent).put(&key, encode(&block));
            if let Outcome::Done(_) = self.directory.transact(&lease).await? {
                self.take_up(net).await?;
                return Ok(());
            }
        }
        Err(ClusterError::Exhausted(prefix))
    }

    async fn leased_blocks(&self) -> Result<Vec<BlockRecord>, ClusterError> {
        let listing = self.directory.list(BLOCKS).await?;
        Ok(listing.entries.iter().map(|e| decode(&e.key, &e.versioned.value)).collect::<Result<_, _>>()?)
    }

    async fn load_blocks(&self) -> Result<(), ClusterError> {
        for block in self.leased_blocks().await? {
            if let (IpNet::V4(net), true) = (block.net, block.node == self.node) {
                self.take_up(net).await?;
            }
        }
        Ok(())
    }

    async fn take_up(&self, net: Ipv4Net) -> Result<(), ClusterError> {
        let (mut held, mut resting) = (Vec::new(), Vec::new());
        for entry in self.directory.list(ADDRESSES).await?.entries {
            let text = entry.key.trim_start_matches(ADDRESSES);
            let Ok(address) = text.parse::<Ipv4Addr>() else { continue };
            match decode(&entry.key, &entry.versioned.value)? {
                AddressRecord::Held { .. } => held.push(address),
                AddressRecord::Resting { .. } => resting.push(address),
            }
        }
        // The prefix's own first and last address mean "this network" and "everybody" to hosts that have it on-link.
        let reserved = [self.record.prefix.network(), self.record.prefix.broadcast()];
        self.allocator().add_block(net, held, resting, &reserved, self.now());
        Ok(())
    }

    fn allocator(&self) -> MutexGuard<'_, Allocator> {
        // Each operation on the allocator leaves it whole, so a poisoned lock is still good.
        self.allocator.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

fn check_name(name: &str) -> Result<(), ClusterError> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let starts = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if starts && name.len() <= NAME_MAX && name.bytes().all(good) {
        Ok(())
    } else {
        Err(ClusterError::BadName(name.to_owned()))
    }
}

#[cfg(test)]
mod tests;
