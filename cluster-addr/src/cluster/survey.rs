//! The whole directory at one moment, for listings, and what is wrong with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Cluster, ClusterError};
use crate::{
    directory::{Expect, Listing, Outcome, Revision, Transaction},
    records::{
        ADDRESSES, AddressRecord, BLOCKS, BlockRecord, CLAIMED_NAMES, CLUSTER_KEY, ClusterRecord, JOBS, JobId,
        JobRecord, NODES, NodeRecord, RESERVATIONS, ReservationRecord, address_key, address_of_key, decode, encode,
        name_key,
    },
};

/// All records, as they were at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// Of what moment.
    pub revision: Revision,
    /// The cluster.
    pub cluster: ClusterRecord,
    /// Its nodes.
    pub nodes: Vec<NodeRecord>,
    /// The leased blocks.
    pub blocks: Vec<BlockRecord>,
    /// The addresses with a record.
    pub addresses: BTreeMap<IpAddr, (AddressRecord, Revision)>,
    /// The jobs.
    pub jobs: BTreeMap<JobId, JobRecord>,
    /// Claims on names, with their revision.
    pub names: BTreeMap<String, (JobId, Revision)>,
    /// The reservations.
    pub reservations: BTreeMap<String, ReservationRecord>,
}

/// An address with a record, and what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsedAddress {
    /// The address.
    pub address: IpAddr,
    /// `held`, `reserved` or `resting`.
    pub state: String,
    /// The job that has it; after its end, the last that had it.
    pub job: Option<String>,
    /// Name of that job, while there is one.
    pub name: Option<String>,
    /// Where that job runs.
    pub node: Option<String>,
    /// The reservation it is of.
    pub reservation: Option<String>,
    /// Its block.
    pub block: Option<IpNet>,
    /// The node that leases the block.
    pub leased_by: Option<String>,
}

/// Something that contradicts the rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Finding {
    /// Two jobs have the same address. Never repaired by itself: one of them must end.
    Shared {
        /// The address.
        address: IpAddr,
        /// The jobs.
        jobs: Vec<String>,
    },
    /// A job's address has no record, or one that says otherwise.
    Unrecorded {
        /// The address.
        address: IpAddr,
        /// The job.
        job: String,
    },
    /// An address is held for a job that does not exist.
    Leaked {
        /// The address.
        address: IpAddr,
        /// The job named.
        job: String,
    },
    /// An address is kept for a reservation that does not exist, or that does not have it.
    LeakedReservation {
        /// The address.
        address: IpAddr,
        /// The reservation named.
        reservation: String,
    },
    /// An address with a record lies in no prefix.
    OutsidePrefixes {
        /// The address.
        address: IpAddr,
    },
    /// A leased block lies in no prefix, or is not of the size of its prefix's blocks.
    OddBlock {
        /// The block.
        block: IpNet,
    },
    /// Two leased blocks overlap.
    Overlap {
        /// One.
        block: IpNet,
        /// The other.
        other: IpNet,
    },
    /// A block is leased by a node that is not in the directory.
    UnknownHolder {
        /// The block.
        block: IpNet,
        /// The node named.
        node: String,
    },
    /// A name is claimed by a job that does not exist or has another name.
    LeakedName {
        /// The name.
        name: String,
        /// The job named.
        job: String,
    },
    /// A job's name is not claimed, or by another job.
    UnclaimedName {
        /// The name.
        name: String,
        /// The job.
        job: String,
    },
    /// A job belongs to a node that is not in the directory.
    UnknownOwner {
        /// The job.
        job: String,
        /// The node named.
        node: String,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shared { address, jobs } => write!(f, "{address} is had by several jobs: {}", jobs.join(", ")),
            Self::Unrecorded { address, job } => write!(f, "{address} of job {job} is not recorded as the job's"),
            Self::Leaked { address, job } => write!(f, "{address} is held for job {job}, which does not exist"),
            Self::LeakedReservation { address, reservation } => {
                write!(f, "{address} is kept for reservation {reservation}, which does not have it")
            }
            Self::OutsidePrefixes { address } => write!(f, "{address} lies in no prefix of the cluster"),
            Self::OddBlock { block } => write!(f, "{block} is no block of any prefix of the cluster"),
            Self::Overlap { block, other } => write!(f, "the blocks {block} and {other} overlap"),
            Self::UnknownHolder { block, node } => write!(f, "{block} is leased by {node}, which is no node"),
            Self::LeakedName { name, job } => {
                write!(f, "the name {name} is claimed by job {job}, which does not have it")
            }
            Self::UnclaimedName { name, job } => write!(f, "the name {name} of job {job} is not claimed by it"),
            Self::UnknownOwner { job, node } => write!(f, "job {job} belongs to {node}, which is no node"),
        }
    }
}

impl Survey {
    /// Takes a listing of the whole directory apart.
    ///
    /// # Errors
    /// [`ClusterError::NoCluster`]; [`ClusterError::Directory`] when a record can't be read.
    pub fn of(listing: &Listing) -> Result<Self, ClusterError> {
        let mut cluster = None;
        let mut survey = Self {
            revision: listing.revision,
            cluster: ClusterRecord { id: String::new(), prefixes: Vec::new() },
            nodes: Vec::new(),
            blocks: Vec::new(),
            addresses: BTreeMap::new(),
            jobs: BTreeMap::new(),
            names: BTreeMap::new(),
            reservations: BTreeMap::new(),
        };
        for entry in &listing.entries {
            let (key, value, revision) = (&entry.key, &entry.versioned.value, entry.versioned.revision);
            if key == CLUSTER_KEY {
                cluster = Some(decode(key, value)?);
            } else if key.starts_with(NODES) {
                survey.nodes.push(decode(key, value)?);
            } else if key.starts_with(BLOCKS) {
                survey.blocks.push(decode(key, value)?);
            } else if key.starts_with(ADDRESSES) {
                if let Some(address) = address_of_key(key) {
                    survey.addresses.insert(address, (decode(key, value)?, revision));
                }
            } else if key.starts_with(JOBS) {
                let job: JobRecord = decode(key, value)?;
                survey.jobs.insert(job.id.clone(), job);
            } else if let Some(name) = key.strip_prefix(CLAIMED_NAMES) {
                survey.names.insert(name.to_owned(), (decode(key, value)?, revision));
            } else if let Some(name) = key.strip_prefix(RESERVATIONS) {
                survey.reservations.insert(name.to_owned(), decode(key, value)?);
            }
        }
        survey.cluster = cluster.ok_or(ClusterError::NoCluster)?;
        Ok(survey)
    }

    /// The leased block of an address.
    #[must_use]
    pub fn block_of(&self, address: IpAddr) -> Option<&BlockRecord> {
        self.blocks.iter().find(|block| block.net.contains(&address))
    }

    /// Every address with a record.
    #[must_use]
    pub fn used(&self) -> Vec<UsedAddress> {
        let describe = |(address, (record, _)): (&IpAddr, &(AddressRecord, Revision))| {
            let (state, id, reservation) = match record {
                AddressRecord::Held { job } => ("held", Some(job), None),
                AddressRecord::Resting { last } => ("resting", last.as_ref(), None),
                AddressRecord::Reserved { name } => ("reserved", None, Some(name.clone())),
            };
            let job = id.and_then(|id| self.jobs.get(id));
            let block = self.block_of(*address);
            UsedAddress {
                address: *address,
                state: state.to_owned(),
                job: id.map(ToString::to_string),
                name: job.map(|job| job.name.clone()),
                node: job.map(|job| job.owner.node.clone()),
                reservation: reservation.or_else(|| job.and_then(|job| job.reservation.clone())),
                block: block.map(|block| block.net),
                leased_by: block.map(|block| block.node.clone()),
            }
        };
        self.addresses.iter().map(describe).collect()
    }

    /// Holds the records against the rules.
    #[must_use]
    pub fn check(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        self.check_addresses(&mut findings);
        self.check_blocks(&mut findings);
        self.check_jobs(&mut findings);
        findings
    }

    fn check_addresses(&self, findings: &mut Vec<Finding>) {
        let mut users: BTreeMap<IpAddr, Vec<&JobRecord>> = BTreeMap::new();
        for job in self.jobs.values() {
            for address in job.addresses() {
                users.entry(address).or_default().push(job);
            }
        }
        for (address, jobs) in &users {
            if jobs.len() > 1 {
                let jobs = jobs.iter().map(|job| job.id.to_string()).collect();
                findings.push(Finding::Shared { address: *address, jobs });
            }
        }
        for (address, (record, _)) in &self.addresses {
            let address = *address;
            if self.cluster.prefix_of(address).is_none() {
                findings.push(Finding::OutsidePrefixes { address });
            }
            match record {
                AddressRecord::Held { job } if !self.jobs.contains_key(job) => {
                    findings.push(Finding::Leaked { address, job: job.to_string() });
                }
                AddressRecord::Reserved { name }
                    if self.reservations.get(name).is_none_or(|kept| !kept.addresses.contains(&address)) =>
                {
                    findings.push(Finding::LeakedReservation { address, reservation: name.clone() });
                }
                _ => {}
            }
        }
    }

    fn check_blocks(&self, findings: &mut Vec<Finding>) {
        let nodes: BTreeSet<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
        for (position, block) in self.blocks.iter().enumerate() {
            let prefix = self.cluster.prefix_of(block.net.addr());
            if prefix.is_none_or(|prefix| prefix.block_length != block.net.prefix_len()) {
                findings.push(Finding::OddBlock { block: block.net });
            }
            if !nodes.contains(block.node.as_str()) {
                findings.push(Finding::UnknownHolder { block: block.net, node: block.node.clone() });
            }
            for other in &self.blocks[position + 1..] {
                if block.net.contains(&other.net) || other.net.contains(&block.net) {
                    findings.push(Finding::Overlap { block: block.net, other: other.net });
                }
            }
        }
    }

    fn check_jobs(&self, findings: &mut Vec<Finding>) {
        let nodes: BTreeSet<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
        for job in self.jobs.values() {
            let id = job.id.to_string();
            for address in job.addresses() {
                let recorded = self.addresses.get(&address).map(|(record, _)| record);
                if recorded != Some(&AddressRecord::Held { job: job.id.clone() }) {
                    findings.push(Finding::Unrecorded { address, job: id.clone() });
                }
            }
            if self.names.get(&job.name).is_none_or(|(holder, _)| *holder != job.id) {
                findings.push(Finding::UnclaimedName { name: job.name.clone(), job: id.clone() });
            }
            if !nodes.contains(job.owner.node.as_str()) {
                findings.push(Finding::UnknownOwner { job: id, node: job.owner.node.clone() });
            }
        }
        for (name, (job, _)) in &self.names {
            if self.jobs.get(job).is_none_or(|job| job.name != *name) {
                findings.push(Finding::LeakedName { name: name.clone(), job: job.to_string() });
            }
        }
    }

    /// The transaction that undoes a leak, if the finding is one: nothing but what nobody uses is touched, and only if it
    /// is still as it was surveyed.
    #[must_use]
    pub fn repair(&self, finding: &Finding) -> Option<Transaction> {
        match finding {
            Finding::Leaked { address, job } => {
                let (_, revision) = self.addresses.get(address)?;
                let key = address_key(*address);
                let resting = AddressRecord::Resting { last: job.parse().ok() };
                Some(Transaction::default().expect(&key, Expect::Revision(*revision)).put(&key, encode(&resting)))
            }
            Finding::LeakedReservation { address, .. } => {
                let (_, revision) = self.addresses.get(address)?;
                let key = address_key(*address);
                let resting = AddressRecord::Resting { last: None };
                Some(Transaction::default().expect(&key, Expect::Revision(*revision)).put(&key, encode(&resting)))
            }
            Finding::LeakedName { name, .. } => {
                let (_, revision) = self.names.get(name)?;
                let key = name_key(name);
                Some(Transaction::default().expect(&key, Expect::Revision(*revision)).delete(&key))
            }
            _ => None,
        }
    }
}

impl Cluster {
    /// The whole directory at one moment.
    ///
    /// # Errors
    /// [`ClusterError::Directory`].
    pub async fn survey(&self) -> Result<Survey, ClusterError> {
        Survey::of(&self.directory.list("").await?)
    }

    /// Undoes a leak found by a survey. Whether it was done: `false` when the finding is of another kind, or things have
    /// changed since.
    ///
    /// # Errors
    /// [`ClusterError::Directory`].
    pub async fn repair(&self, survey: &Survey, finding: &Finding) -> Result<bool, ClusterError> {
        let Some(repair) = survey.repair(finding) else { return Ok(false) };
        Ok(matches!(self.directory.transact(&repair).await?, Outcome::Done(_)))
    }
}
