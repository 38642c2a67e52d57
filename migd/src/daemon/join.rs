//! Becoming part of a cluster: making one, joining one, or coming back to the one joined before.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use cluster_addr::records::CLUSTER_KEY;
use cluster_addr::{Cluster, Directory, Embedded, Etcd, NodeRecord};
use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::directory::Place;
use super::jobs::write_json;
use super::launch::random;
use super::node::Node;
use super::peer::PeerError;
use super::peer::protocol::{PeerRequest, Pong};

/// Prefix of a new cluster that was not given another.
const DEFAULT_PREFIX: &str = "10.77.0.0/16";
/// How long a node that never joined tries to before it gives up.
const FIRST_JOIN: Duration = Duration::from_secs(30);
/// Pause between tries.
const RETRY: Duration = Duration::from_millis(200);
/// Longest such pause.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// How this node came to its cluster.
#[derive(Debug, Clone)]
pub enum Way {
    /// It serves the directory.
    Create {
        /// Prefixes asked for; the usual ones when none are.
        prefixes: Vec<IpNet>,
    },
    /// It belongs to the cluster of that node.
    Join(SocketAddr),
}

/// `cluster.json`: what a node remembers of its cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    cluster: String,
    directory: SocketAddr,
    /// When the directory is an etcd.
    #[serde(default)]
    etcd: Option<cluster_addr::etcd::Place>,
}

/// Joins; returns when that is done.
///
/// # Errors
/// When it is refused, or a node that never was in a cluster finds none.
///
/// `etcd`: where the directory is, if the operator said so.
pub async fn join(node: &Arc<Node>, way: Way, etcd: Option<cluster_addr::etcd::Place>) -> anyhow::Result<()> {
    let memory = node.paths.root().join("cluster.json");
    let damaged = || {
        let file = memory.display();
        format!(
            "{file} is damaged; remove it and start again with --join and a node of the cluster (--create if this node serves its directory)"
        )
    };
    let remembered: Option<Remembered> = match std::fs::read(&memory) {
        Ok(text) => Some(serde_json::from_slice(&text).with_context(damaged)?),
        Err(_) => None,
    };
    if let Some(remembered) = &remembered {
        node.peers.set_cluster(&remembered.cluster);
    }
    let cluster = match way {
        Way::Create { prefixes } => {
            if let Some(remembered) = &remembered
                && !node.paths.directory().exists()
                && etcd.is_none()
                && remembered.etcd.is_none()
            {
                bail!(no_longer(remembered, node));
            }
            let etcd = etcd.or_else(|| remembered.as_ref().and_then(|known| known.etcd.clone()));
            create(node, &prefixes, etcd, remembered.as_ref()).await?
        }
        Way::Join(through) => join_until(node, through, remembered.as_ref(), etcd.as_ref()).await?,
    };
    let id = cluster.record().id;
    remember(node, &id).with_context(|| format!("can't write {}", memory.display()))?;
    node.learn_nodes(cluster.nodes().await?);
    release_leaks(node, &cluster).await?;
    tracing::info!(cluster = id, prefixes = cluster.record().prefixes_in_words(), place = ?node.place(), "joined");
    node.set_cluster(cluster);
    node.note_directory(None);
    Ok(())
}

fn own_record(node: &Node) -> NodeRecord {
    NodeRecord { name: node.name.clone(), peer: node.peer, hops: node.hops.clone() }
}

/// Writes down where the cluster is found again.
///
/// # Errors
/// As the file system's.
pub fn remember(node: &Node, cluster: &str) -> std::io::Result<()> {
    let memory = node.paths.root().join("cluster.json");
    let etcd = match node.place() {
        Some(Place::Etcd(etcd)) => Some(etcd.place().clone()),
        _ => None,
    };
    let directory = node.directory_address().unwrap_or(node.peer);
    let fresh = Remembered { cluster: cluster.to_owned(), directory, etcd };
    let there = std::fs::read(&memory).ok().and_then(|text| serde_json::from_slice(&text).ok());
    if there.as_ref() == Some(&fresh) { Ok(()) } else { write_json(&memory, &fresh) }
}

/// Where a daemon that makes, or made, the cluster finds its directory.
async fn own_place(node: &Arc<Node>, etcd: Option<cluster_addr::etcd::Place>) -> anyhow::Result<Place> {
    let path = node.paths.directory();
    // The file knows best: it may have been given up for an etcd.
    if path.exists() || etcd.is_none() {
        let engine = Embedded::open(&path).with_context(|| {
            let path = path.display();
            format!(
                "can't open the directory {path}; jobs run on without it: put a whole copy of it back and start again"
            )
        })?;
        let Some(to) = engine.moved() else {
            if let Some(etcd) = etcd {
                bail!("this node serves a cluster's directory; move it with: migd cluster migrate-directory {etcd}");
            }
            return Ok(Place::Local(Arc::new(engine)));
        };
        let to = to.parse().map_err(|error: String| anyhow::anyhow!(error))?;
        let etcd = Etcd::connect(to).await?;
        super::migrate::finish(&etcd).await?;
        return Ok(Place::Etcd(Arc::new(etcd)));
    }
    let Some(etcd) = etcd else { bail!("there is no directory") };
    Ok(Place::Etcd(Arc::new(Etcd::connect(etcd).await?)))
}

/// What to do about a node that is told to make a cluster, remembers one, and has no directory.
fn no_longer(remembered: &Remembered, node: &Node) -> String {
    let Remembered { cluster, directory, etcd } = remembered;
    if let Some(etcd) = etcd {
        format!(
            "the etcd {etcd} holds nothing of cluster {cluster}, to which this node belongs; begin anew with an empty --state"
        )
    } else if *directory == node.peer {
        let path = node.paths.directory();
        format!(
            "this node served the directory of cluster {cluster}, and {} is gone or empty: put a copy of it back; if there is none the cluster \
             is lost, and every node needs an empty --state to begin anew",
            path.display()
        )
    } else {
        format!(
            "this node joined cluster {cluster} before, so it can't make a new one; use --join {directory}, or an empty --state"
        )
    }
}

async fn create(
    node: &Arc<Node>,
    prefixes: &[IpNet],
    etcd: Option<cluster_addr::etcd::Place>,
    remembered: Option<&Remembered>,
) -> anyhow::Result<Cluster> {
    node.location.set(own_place(node, etcd).await?);
    let engine = node.directory();
    super::migrate::refuse_unfinished(engine.as_ref()).await?;
    let exists = engine.get(CLUSTER_KEY).await?.is_some();
    if !exists && let Some(remembered) = remembered {
        bail!(no_longer(remembered, node));
    }
    if exists && prefixes.is_empty() {
        return Ok(Cluster::open(engine, own_record(node)).await?);
    }
    let mut bytes = [0; 8];
    random(&mut bytes)?;
    let id = format!("{:016x}", u64::from_be_bytes(bytes));
    let mut prefixes = prefixes.to_vec();
    if !exists && !prefixes.iter().any(|net| net.addr().is_ipv4()) {
        prefixes.push(DEFAULT_PREFIX.parse()?);
    }
    if !exists && !prefixes.iter().any(|net| net.addr().is_ipv6()) {
        prefixes.push(local_prefix(bytes));
    }
    Ok(Cluster::create(engine, id, &prefixes, own_record(node)).await?)
}

/// A prefix of unique local addresses (RFC 4193 section 3.1): 40 random bits after fd00::/8, and subnet 0.
fn local_prefix(random: [u8; 8]) -> IpNet {
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&random[..5]);
    IpNet::V6(Ipv6Net::new_assert(octets.into(), 64))
}

async fn join_until(
    node: &Arc<Node>,
    through: SocketAddr,
    remembered: Option<&Remembered>,
    etcd: Option<&cluster_addr::etcd::Place>,
) -> anyhow::Result<Cluster> {
    let began = Instant::now();
    let mut pause = RETRY;
    loop {
        let failure = match join_once(node, through, remembered, etcd).await {
            Ok(cluster) => return Ok(cluster),
            Err(failure) => failure,
        };
        let error = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Passing(error) => error,
        };
        node.note_directory(Some(format!("{error:#}")));
        if remembered.is_none() && began.elapsed() > FIRST_JOIN {
            return Err(error.context(format!("no cluster at {through}; is its daemon running?")));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

enum Failure {
    Final(anyhow::Error),
    Passing(anyhow::Error),
}

async fn join_once(
    node: &Arc<Node>,
    through: SocketAddr,
    remembered: Option<&Remembered>,
    etcd: Option<&cluster_addr::etcd::Place>,
) -> Result<Cluster, Failure> {
    let passing = |error: anyhow::Error| Failure::Passing(error);
    let (server, etcd) = match (node.peers.connect(through).await, remembered) {
        _ if etcd.is_some() => (None, etcd.cloned()),
        (Ok(connection), _) => (connection.welcome.directory, connection.welcome.etcd),
        (Err(PeerError::Api(error)), _) => return Err(Failure::Final(error.into())),
        // The node named may be down while the directory's is not.
        (Err(_), Some(remembered)) => (Some(remembered.directory), remembered.etcd.clone()),
        (Err(error), None) => return Err(Failure::Passing(error.into())),
    };
    node.location.set(match (server, etcd) {
        (_, Some(etcd)) => {
            let etcd = Etcd::connect(etcd).await.map_err(|error| Failure::Final(error.into()))?;
            Place::Etcd(Arc::new(etcd))
        }
        (Some(server), None) => Place::Remote(server),
        (None, None) => {
            return Err(passing(anyhow::anyhow!("the node at {through} has not joined a cluster itself yet")));
        }
    });
    let directory = node.directory();
    super::migrate::refuse_unfinished(directory.as_ref()).await.map_err(passing)?;
    refuse_twin(node, directory.as_ref()).await?;
    let cluster = Cluster::open(directory, own_record(node)).await.map_err(|error| match error {
        cluster_addr::ClusterError::BadName(_) => Failure::Final(error.into()),
        error => passing(error.into()),
    })?;
    Ok(cluster)
}

/// Another daemon with this name must not lose its jobs to this one.
async fn refuse_twin(node: &Arc<Node>, directory: &dyn Directory) -> Result<(), Failure> {
    let key = cluster_addr::records::node_key(&node.name);
    let found = directory.get(&key).await.map_err(|error| Failure::Passing(error.into()))?;
    let Some(found) = found else { return Ok(()) };
    let record: NodeRecord = match cluster_addr::records::decode(&key, &found.value) {
        Ok(record) => record,
        Err(error) => return Err(Failure::Final(error.into())),
    };
    if record.peer == node.peer {
        return Ok(());
    }
    match node.peers.ask::<Pong>(record.peer, &PeerRequest::Ping).await {
        Ok(pong) if pong.node == node.name => Err(Failure::Final(anyhow::anyhow!(
            "the cluster has a node {} at {}, which answers; choose another --name",
            node.name,
            record.peer
        ))),
        _ => Ok(()),
    }
}

/// Gives back what the directory holds for jobs of this node that do not exist (the machine was switched off, or the
/// daemon was killed between the record and the job). Before anything can be started here.
async fn release_leaks(node: &Arc<Node>, cluster: &Cluster) -> anyhow::Result<()> {
    let (records, _) = cluster.jobs().await?;
    for record in records.iter().filter(|record| record.owner.node == node.name) {
        if !node.jobs.is_here(record.id.as_str()) {
            tracing::warn!(job = %record.id, name = record.name, "not here any more, its address and name are given back");
            cluster.release(record).await?;
        }
    }
    let _ = node.learn_jobs(&records);
    Ok(())
}
