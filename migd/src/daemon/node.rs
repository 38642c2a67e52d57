//! What all parts of a daemon share.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use cluster_addr::{Cluster, ClusterError, DirectoryError, JobRecord, NodeRecord};

use super::directory::{Current, Location, Place};
use super::jobs::Registry;
use super::machine::Machine;
use super::peer::Peers;
use crate::api::{ApiError, DirectoryHealth, ErrorKind, NodeAddress, StatePaths};

/// This node's daemon.
pub struct Node {
    /// The node's name.
    pub name: String,
    /// Where other daemons reach this one.
    pub peer: SocketAddr,
    /// Further addresses of this node, of the other family than that of `peer`.
    pub hops: Vec<IpAddr>,
    /// The state directory.
    pub paths: StatePaths,
    /// Devices on which jobs' addresses are announced.
    pub uplinks: Vec<String>,
    /// The machine.
    pub machine: Arc<dyn Machine>,
    /// Other daemons.
    pub peers: Arc<Peers>,
    /// The jobs of this node.
    pub jobs: Registry,
    /// Where the directory is.
    pub location: Arc<Location>,
    cluster: OnceLock<Cluster>,
    view: Mutex<View>,
}

/// What was last learned of the cluster; good for finding one's way while the directory is away, never for deciding.
#[derive(Debug, Default)]
struct View {
    jobs: BTreeMap<String, JobRecord>,
    nodes: BTreeMap<String, Member>,
    /// Why the directory did not answer the last time it was asked.
    directory_failure: Option<String>,
}

/// A node of the cluster as last seen from here.
#[derive(Debug, Clone)]
pub struct Member {
    /// As in the directory.
    pub record: NodeRecord,
    /// When it last answered.
    pub heard: Option<Instant>,
}

impl Node {
    /// A daemon that has not joined yet.
    pub fn new(
        name: String,
        peer: SocketAddr,
        hops: Vec<IpAddr>,
        paths: StatePaths,
        uplinks: Vec<String>,
        machine: Arc<dyn Machine>,
    ) -> Self {
        let peers = Arc::new(Peers::new(&name));
        Self {
            name,
            peer,
            hops,
            paths,
            uplinks,
            machine,
            peers,
            jobs: Registry::default(),
            location: Arc::default(),
            cluster: OnceLock::new(),
            view: Mutex::default(),
        }
    }

    fn view(&self) -> MutexGuard<'_, View> {
        // Maps of records, each replaced by a single call: whole whatever panicked.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This node as other nodes reach it.
    pub fn address(&self) -> NodeAddress {
        NodeAddress { name: self.name.clone(), peer: self.peer, hops: self.hops.clone() }
    }

    /// Where the directory is, as soon as that is known.
    pub fn place(&self) -> Option<Place> {
        self.location.get()
    }

    /// The directory, wherever it is at the time of a request.
    pub fn directory(&self) -> Arc<Current> {
        Arc::new(Current { location: Arc::clone(&self.location), peers: Arc::clone(&self.peers) })
    }

    /// Where the directory listens, as other nodes reach it; none for an etcd.
    pub fn directory_address(&self) -> Option<SocketAddr> {
        match self.place()? {
            Place::Local(_) => Some(self.peer),
            Place::Remote(server) => Some(server),
            Place::Etcd(_) => None,
        }
    }

    /// Sets the cluster, which is then joined. Only the first call counts.
    pub fn set_cluster(&self, cluster: Cluster) {
        self.peers.set_cluster(&cluster.record().id);
        let _ = self.cluster.set(cluster);
    }

    /// The cluster's id once it was joined.
    pub fn cluster_id(&self) -> Option<String> {
        Some(self.cluster.get()?.record().id.clone())
    }

    /// The cluster.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] while it has not been joined.
    pub fn cluster(&self) -> Result<&Cluster, ApiError> {
        self.cluster.get().ok_or_else(|| {
            let reason = self.view().directory_failure.clone().unwrap_or_else(|| "it is just starting".into());
            ApiError::new(
                ErrorKind::Unavailable,
                format!("node {} has not joined its cluster yet: {reason}", self.name),
            )
            .hint(self.directory_hint())
        })
    }

    /// An error of the cluster as it is told to the user; also notes how the directory is.
    pub fn explain(&self, error: ClusterError) -> ApiError {
        let kind = match &error {
            ClusterError::Directory(DirectoryError::Unreachable(_) | DirectoryError::Unknown(_)) => {
                self.note_directory(Some(error.to_string()));
                return ApiError::new(ErrorKind::Unavailable, error.to_string()).hint(self.directory_hint());
            }
            ClusterError::NameTaken { .. }
            | ClusterError::AddressUnavailable { .. }
            | ClusterError::ReservationTaken(_)
            | ClusterError::NodeHasJobs { .. }
            | ClusterError::Contended => ErrorKind::Conflict,
            ClusterError::NoReservation(_) | ClusterError::NotFound(_) => ErrorKind::NotFound,
            ClusterError::BadName(_) | ClusterError::BadPrefix { .. } => ErrorKind::Invalid,
            ClusterError::Exhausted { .. } => ErrorKind::Unavailable,
            _ => ErrorKind::Internal,
        };
        ApiError::new(kind, error.to_string())
    }

    fn directory_hint(&self) -> String {
        if let Some(Place::Etcd(etcd)) = self.place() {
            return format!("check the members of {}; running jobs are not touched meanwhile", etcd.place());
        }
        let server = self.directory_address();
        let server = server.map_or_else(|| "the directory's node".into(), |server| format!("the node at {server}"));
        format!("check `migd daemon` on {server}, which serves the directory; running jobs are not touched meanwhile")
    }

    /// Notes whether the directory answered; says so once when that changes.
    pub fn note_directory(&self, failure: Option<String>) {
        let mut view = self.view();
        match (&view.directory_failure, &failure) {
            (None, Some(reason)) => tracing::warn!(%reason, "the directory does not answer"),
            (Some(_), None) => tracing::info!("the directory answers again"),
            _ => {}
        }
        view.directory_failure = failure;
    }

    /// How the directory is.
    pub fn directory_health(&self) -> DirectoryHealth {
        let failure = self.view().directory_failure.clone();
        match (self.place(), failure) {
            (Some(Place::Local(_)), _) => DirectoryHealth::Local,
            (Some(Place::Remote(peer)), None) => DirectoryHealth::Remote { peer },
            (Some(Place::Remote(peer)), Some(reason)) => DirectoryHealth::Unreachable { peer, reason },
            (Some(Place::Etcd(etcd)), None) => DirectoryHealth::Etcd { place: etcd.place().to_string() },
            (Some(Place::Etcd(etcd)), Some(reason)) => {
                DirectoryHealth::EtcdUnreachable { place: etcd.place().to_string(), reason }
            }
            (None, reason) => {
                let reason = reason.unwrap_or_else(|| "not joined yet".into());
                DirectoryHealth::Unreachable { peer: self.peer, reason }
            }
        }
    }

    /// All job records, as last seen.
    pub fn known_jobs(&self) -> Vec<JobRecord> {
        self.view().jobs.values().cloned().collect()
    }

    /// A job's record, as last seen.
    pub fn known_job(&self, id: &str) -> Option<JobRecord> {
        self.view().jobs.get(id).cloned()
    }

    /// Replaces what is known of the jobs; returns those that are gone.
    pub fn learn_jobs(&self, records: &[JobRecord]) -> Vec<JobRecord> {
        let fresh: BTreeMap<_, _> = records.iter().map(|r| (r.id.to_string(), r.clone())).collect();
        let before = std::mem::replace(&mut self.view().jobs, fresh.clone());
        before.into_iter().filter(|(id, _)| !fresh.contains_key(id)).map(|(_, record)| record).collect()
    }

    /// Notes one job's record, or that it is gone; returns what was known before.
    pub fn learn_job(&self, id: &str, record: Option<JobRecord>) -> Option<JobRecord> {
        let mut view = self.view();
        match record {
            Some(record) => view.jobs.insert(id.to_owned(), record),
            None => view.jobs.remove(id),
        }
    }

    /// All nodes, as last seen.
    pub fn members(&self) -> Vec<Member> {
        self.view().nodes.values().cloned().collect()
    }

    /// Where a node listens.
    pub fn member(&self, name: &str) -> Option<NodeRecord> {
        self.view().nodes.get(name).map(|member| member.record.clone())
    }

    /// Notes the nodes there are.
    pub fn learn_nodes(&self, records: Vec<NodeRecord>) {
        let mut view = self.view();
        for record in records {
            let heard = view.nodes.get(&record.name).and_then(|member| member.heard);
            view.nodes.insert(record.name.clone(), Member { record, heard });
        }
    }

    /// The node was given up.
    pub fn forget_node(&self, name: &str) {
        self.view().nodes.remove(name);
    }

    /// Notes that a node answered.
    pub fn note_heard(&self, name: &str) {
        if let Some(member) = self.view().nodes.get_mut(name) {
            member.heard = Some(Instant::now());
        }
    }

    /// Where a node listens; asks the directory when it is not known yet.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], or the directory's.
    pub async fn find_node(&self, name: &str) -> Result<NodeRecord, ApiError> {
        if let Some(record) = self.member(name) {
            return Ok(record);
        }
        let records = self.cluster()?.nodes().await.map_err(|error| self.explain(error))?;
        let names: Vec<_> = records.iter().map(|record| record.name.clone()).collect();
        self.learn_nodes(records);
        self.member(name).ok_or_else(|| {
            ApiError::new(ErrorKind::NotFound, format!("there is no node {name}"))
                .hint(format!("the nodes are: {}", names.join(", ")))
        })
    }
}
