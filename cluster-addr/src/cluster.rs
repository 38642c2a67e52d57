//! The operations on a cluster; each change is one transaction of the directory.
//!
//! Invariants, whatever fails and whoever calls at the same time:
//! - an address belongs to at most one job. Two conditions of the transaction that gives it out see to that, and either
//!   alone would do between sound nodes: the block it is taken from is leased by this start of this node's daemon, and the
//!   address has no record but one that it has rested ([`crate::allocator`]);
//! - a job has one owner per epoch, and epochs only grow ([`Cluster::transfer`] is the only change of owner).

mod blocks;
mod jobs;
mod reservations;
mod survey;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ipnet::IpNet;

use crate::{
    allocator::Allocator,
    directory::{Directory, DirectoryError, Expect, Outcome, Revision, Transaction, Versioned, Watch},
    records::{
        BLOCKS, BlockRecord, CLUSTER_KEY, ClusterRecord, JOBS, JobId, JobRecord, NODES, NodeRecord, Prefix, block_key,
        decode, encode, job_key, node_key,
    },
};

pub use blocks::Forgotten;
pub use jobs::{NewJob, Transfer, Wanted};
pub use survey::{Finding, Survey, UsedAddress};

/// How often an operation that lost a race is tried again before it gives up.
const RACES_MAX: usize = 64;

/// Longest job or node name in bytes: a host name label (RFC 1123 section 2.1).
pub const NAME_MAX: usize = 63;

/// The time since any fixed moment, never going back.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// A node's view of its cluster.
pub struct Cluster {
    directory: Arc<dyn Directory>,
    node: NodeRecord,
    clock: Clock,
    state: Mutex<State>,
}

/// What a node believes of the directory. Every belief is a condition of the transactions built on it.
#[derive(Default)]
struct State {
    record: Option<(ClusterRecord, Revision)>,
    /// This start of the daemon; see [`BlockRecord::incarnation`].
    incarnation: Revision,
    allocator: Allocator,
    /// All blocks that are leased, and by whom.
    leased: BTreeMap<IpNet, String>,
    /// How many fresh blocks in a row others leased faster.
    races_lost: u32,
    /// Changes of which it isn't known whether they were made.
    doubtful: Vec<jobs::Doubt>,
    /// Where the next look at a block begins.
    reconciled: usize,
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
    #[error(
        "the directory already holds a cluster with {0}; start without --prefix, or with those, and use `migd addr add` for more"
    )]
    OtherCluster(String),
    /// No address is left.
    #[error(
        "every address of {prefixes} is in use, resting or in a block of another node; end jobs and wait five minutes for \
         their addresses, add addresses with `migd addr add PREFIX`, or free the blocks of a node that is gone for ever \
         with `migd addr release --holder NODE` (`migd addr blocks` shows who has which)"
    )]
    Exhausted {
        /// The prefixes of the family that ran out.
        prefixes: String,
    },
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
    /// A prefix that can't be used.
    #[error("{net} can't be a prefix of the cluster: {why}")]
    BadPrefix {
        /// The prefix.
        net: IpNet,
        /// What is wrong with it.
        why: String,
    },
    /// The address can't be given out.
    #[error("the address {address} can't be had: {why}")]
    AddressUnavailable {
        /// Which.
        address: std::net::IpAddr,
        /// Why, and what to do.
        why: String,
    },
    /// There is no such reservation.
    #[error(
        "there is no reservation {0:?}; make it with `migd addr reserve {0}`, `migd addr ls` lists those there are"
    )]
    NoReservation(String),
    /// The name is taken.
    #[error("there is a reservation {0:?} already; `migd addr release {0}` gives it up")]
    ReservationTaken(String),
    /// There is no such block or node.
    #[error("{0}")]
    NotFound(String),
    /// The node owns jobs, so what it holds is not given to others.
    #[error(
        "the directory has {count} jobs on node {node} ({jobs}); if that machine is gone for ever, or was started afresh, say \
         so with --gone: its jobs' records are then removed. Were it still running them, their addresses could be given out twice"
    )]
    NodeHasJobs {
        /// The node.
        node: String,
        /// How many.
        count: usize,
        /// The first of them.
        jobs: String,
    },
    /// Others were faster too many times.
    #[error("the directory changed under this operation {RACES_MAX} times; try again")]
    Contended,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("node", &self.node.name).finish_non_exhaustive()
    }
}

impl Cluster {
    /// Makes a cluster, or opens the one there is if it has the same prefixes.
    ///
    /// # Errors
    /// [`ClusterError::OtherCluster`], [`ClusterError::BadPrefix`], [`ClusterError::Directory`].
    pub async fn create(
        directory: Arc<dyn Directory>,
        id: String,
        prefixes: &[IpNet],
        node: NodeRecord,
    ) -> Result<Self, ClusterError> {
        let mut record = ClusterRecord { id, prefixes: Vec::new() };
        let new = directory.get(CLUSTER_KEY).await?.is_none();
        for net in prefixes {
            blocks::widen(&mut record, *net)?;
            if new {
                blocks::refuse_nodes(*net, std::slice::from_ref(&node))?;
            }
        }
        if let (None, Some(net)) = (record.of_family(crate::allocator::Family::V4).next(), prefixes.first()) {
            let why = "a cluster needs an IPv4 prefix as well".to_owned();
            return Err(ClusterError::BadPrefix { net: *net, why });
        }
        let create = Transaction::default().expect(CLUSTER_KEY, Expect::Absent).put(CLUSTER_KEY, encode(&record));
        if let Outcome::Conflict { found: Some(found), .. } = directory.transact(&create).await? {
            let there: ClusterRecord = decode(CLUSTER_KEY, &found.value)?;
            let known = |net: &IpNet| there.prefixes.iter().any(|prefix| prefix.net.contains(net));
            if !prefixes.iter().all(known) {
                return Err(ClusterError::OtherCluster(there.prefixes_in_words()));
            }
        }
        Self::open(directory, node).await
    }

    /// Joins the cluster of a directory: registers this node and takes up the blocks it holds.
    ///
    /// # Errors
    /// [`ClusterError::NoCluster`], [`ClusterError::BadName`], [`ClusterError::Directory`].
    pub async fn open(directory: Arc<dyn Directory>, node: NodeRecord) -> Result<Self, ClusterError> {
        let started = Instant::now();
        Self::open_with_clock(directory, node, Arc::new(move || started.elapsed())).await
    }

    /// [`Cluster::open`] with a clock of the caller's, for simulations.
    ///
    /// # Errors
    /// As [`Cluster::open`].
    pub async fn open_with_clock(
        directory: Arc<dyn Directory>,
        node: NodeRecord,
        clock: Clock,
    ) -> Result<Self, ClusterError> {
        check_name(&node.name)?;
        let cluster = Self { directory, node, clock, state: Mutex::default() };
        cluster.reopen().await?;
        Ok(cluster)
    }

    /// Registers this node again and takes up its blocks anew, as after a restart: for a directory whose revisions have
    /// changed because it moved to another engine.
    ///
    /// # Errors
    /// As [`Cluster::open`].
    pub async fn reopen(&self) -> Result<(), ClusterError> {
        let Some(found) = self.directory.get(CLUSTER_KEY).await? else { return Err(ClusterError::NoCluster) };
        let record: ClusterRecord = decode(CLUSTER_KEY, &found.value)?;
        let register = Transaction::default().put(node_key(&self.node.name), encode(&self.node));
        let Outcome::Done(incarnation) = self.directory.transact(&register).await? else {
            return Err(DirectoryError::Storage("an unconditional write was refused".to_owned()).into());
        };
        let mut allocator = Allocator::default();
        allocator.set_special(record.special());
        {
            let mut state = self.state();
            let doubtful = std::mem::take(&mut state.doubtful);
            *state = State {
                record: Some((record, found.revision)),
                incarnation,
                allocator,
                leased: BTreeMap::new(),
                races_lost: 0,
                doubtful,
                reconciled: 0,
            };
        }
        self.renew_blocks().await
    }

    /// The cluster's facts as last seen.
    #[must_use]
    pub fn record(&self) -> ClusterRecord {
        let empty = || ClusterRecord { id: String::new(), prefixes: Vec::new() };
        self.state().record.as_ref().map_or_else(empty, |(record, _)| record.clone())
    }

    /// The prefix that an address lies in.
    #[must_use]
    pub fn prefix_of(&self, address: std::net::IpAddr) -> Option<Prefix> {
        self.state().record.as_ref()?.0.prefix_of(address).copied()
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

    async fn read_job(&self, key: &str) -> Result<Option<(JobRecord, Revision)>, ClusterError> {
        let Some(found) = self.directory.get(key).await? else { return Ok(None) };
        Ok(Some((decode(key, &found.value)?, found.revision)))
    }

    async fn blocks_recorded(&self) -> Result<Vec<(BlockRecord, Revision)>, ClusterError> {
        let listing = self.directory.list(BLOCKS).await?;
        let read = |entry: crate::directory::Entry| {
            Ok((decode(&entry.key, &entry.versioned.value)?, entry.versioned.revision))
        };
        listing.entries.into_iter().map(read).collect()
    }

    async fn block_recorded(&self, net: IpNet) -> Result<Option<(BlockRecord, Revision)>, ClusterError> {
        let key = block_key(net);
        let found = self.directory.get(&key).await?;
        let read = |Versioned { value, revision }: Versioned| Ok((decode(&key, &value)?, revision));
        found.map(read).transpose()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each operation on the state leaves it whole, and what it believes is checked by the directory: a poisoned lock
        // is still good.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        (self.clock)()
    }
}

/// Whether a job, a node or a reservation can have this name.
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
