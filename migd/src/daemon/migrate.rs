//! Moving the directory of a running cluster from the node that serves it to an etcd.
//!
//! 1. The etcd is marked as the target of a move that is not finished ([`MARK`]); whoever finds the mark keeps away.
//! 2. The engine refuses changes; readers and running jobs notice nothing, and a move that is about to commit stays frozen and
//!    asks again.
//! 3. All records are copied, and compared.
//! 4. The engine is sealed: it answers everything with the new place from then on, for ever. This step decides. Before it the
//!    old directory goes on as if nothing had been, whatever dies; after it the new one is the directory.
//! 5. The mark is removed.
//!
//! The other nodes are told by the answers to their next requests ([`super::directory::Current`]) and renew their leases there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use cluster_addr::directory::{Directory, DirectoryError, Entry, Expect, Outcome, Transaction};
use cluster_addr::{Embedded, Etcd};

use super::directory::Place;
use super::node::Node;
use super::peer::protocol::PeerRequest;
use crate::api::{ApiError, ErrorKind, Migrated};

/// Key of the mark; its value is the cluster's id.
const MARK: &str = "migrating";
/// How long the node that serves the directory may take.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Records, and bytes of them, that are copied in one transaction.
const CHUNK: (usize, usize) = (100, 512 * 1024);
/// How often a change that was not answered is looked at.
const TRIES: usize = 10;

/// Moves the directory, wherever it is served.
///
/// # Errors
/// What kept it from being moved; it is where it was then, unless the message says otherwise.
pub async fn migrate(node: &Arc<Node>, to: &str) -> Result<Migrated, ApiError> {
    match node.place() {
        Some(Place::Remote(server)) => {
            let request = PeerRequest::MigrateDirectory { to: to.to_owned() };
            Ok(node.peers.ask_within(server, &request, TIMEOUT).await?)
        }
        _ => migrate_here(node, to).await,
    }
}

/// Moves the directory that this node serves.
///
/// # Errors
/// As [`migrate`].
pub async fn migrate_here(node: &Arc<Node>, to: &str) -> Result<Migrated, ApiError> {
    let place: cluster_addr::etcd::Place = to.parse().map_err(|error| ApiError::new(ErrorKind::Invalid, error))?;
    let engine = match node.place() {
        Some(Place::Local(engine)) => engine,
        Some(Place::Etcd(etcd)) => {
            let message = format!("the directory is in {} already", etcd.place());
            return Err(ApiError::new(ErrorKind::Conflict, message));
        }
        _ => return Err(ApiError::new(ErrorKind::Unavailable, format!("node {} serves no directory", node.name))),
    };
    let cluster = node.cluster()?;
    let id = cluster.record().id;
    let failed = |error: anyhow::Error| {
        ApiError::new(ErrorKind::Unavailable, format!("the directory stays where it is: {error:#}"))
            .hint("try again; what was copied is removed then")
    };
    let etcd = Etcd::connect(place).await.map_err(|error| failed(error.into()))?;
    prepare(&etcd, &id).await.map_err(failed)?;
    let began = Instant::now();
    let copied = copy(&engine, &etcd).await;
    let records = copied.map_err(|error| {
        engine.resume();
        failed(error)
    })?;
    if let Err(error) = engine.seal(&etcd.place().to_string()) {
        // Neither place may be used until the file tells which it is.
        let message = format!("it is not known whether the directory has moved: {error}");
        return Err(ApiError::new(ErrorKind::Internal, message)
            .hint(format!("start the daemon of node {} again: it finds out", node.name)));
    }
    let held_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let to = etcd.place().to_string();
    tracing::info!(to, records, held_ms, "the directory has moved");
    if let Err(error) = finish(&etcd).await {
        tracing::warn!(error = format!("{error:#}"), "the mark stays until this daemon is started again");
    }
    node.location.change(Place::Etcd(Arc::new(etcd)));
    after_change(node).await;
    Ok(Migrated { to, records, held_ms })
}

/// The directory has moved: takes up this node's leases there, and remembers the place.
pub async fn after_change(node: &Node) {
    let Ok(cluster) = node.cluster() else { return };
    if !node.location.take_changed() {
        return;
    }
    if let Err(error) = cluster.reopen().await {
        drop(node.explain(error));
        node.location.put_changed();
        return;
    }
    if let Err(error) = super::join::remember(node, &cluster.record().id) {
        tracing::warn!(%error, "can't write down where the directory is now");
    }
}

/// Refuses to use an etcd into which a directory is being moved.
///
/// # Errors
/// Says so; or when it does not answer.
pub async fn refuse_unfinished(directory: &dyn Directory) -> anyhow::Result<()> {
    if directory.get(MARK).await?.is_some() {
        bail!(
            "a cluster's directory is being moved here; if that was broken off, repeat `migd cluster migrate-directory`"
        );
    }
    Ok(())
}

/// Removes the mark after the old engine was sealed.
///
/// # Errors
/// When the etcd does not answer.
pub async fn finish(etcd: &Etcd) -> anyhow::Result<()> {
    for _ in 0..TRIES {
        // Once more does no harm.
        match etcd.transact(&Transaction::default().delete(MARK)).await {
            Ok(_) => return Ok(()),
            Err(DirectoryError::Unknown(_)) => {}
            Err(error) => return Err(error).context("can't remove the mark of the move"),
        }
    }
    bail!("the etcd did not say whether the mark of the move was removed");
}

/// Marks the etcd, and removes what an attempt that was broken off has left there.
async fn prepare(etcd: &Etcd, cluster: &str) -> anyhow::Result<()> {
    let there = etcd.list("").await?.entries;
    let mark = there.iter().find(|entry| entry.key == MARK);
    match mark {
        Some(mark) if mark.versioned.value == cluster.as_bytes() => {}
        None if there.is_empty() => {}
        _ => {
            bail!("{} holds {} other records; end the place with /KEYS for keys of its own", etcd.place(), there.len())
        }
    }
    write(etcd, &Transaction::default().put(MARK, cluster.as_bytes().to_vec())).await?;
    for entries in there.chunks(CHUNK.0) {
        let leftovers = entries.iter().filter(|entry| entry.key != MARK);
        let remove = leftovers.fold(Transaction::default(), |all, entry| all.delete(&entry.key));
        write(etcd, &remove).await?;
    }
    Ok(())
}

/// Copies all records, after which the engine still refuses changes. The number of records.
async fn copy(engine: &Embedded, etcd: &Etcd) -> anyhow::Result<usize> {
    let listing = engine.hold("it is just being moved to another engine; try again")?;
    let mut rest = listing.entries.as_slice();
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |entry: &&Entry| {
            bytes += entry.key.len() + entry.versioned.value.len();
            bytes <= CHUNK.1
        };
        let count = rest.iter().take(CHUNK.0).take_while(fits).count().max(1);
        let (now, later) = rest.split_at(count);
        let put = |all: Transaction, entry: &Entry| all.put(&entry.key, entry.versioned.value.clone());
        write(etcd, &now.iter().fold(Transaction::default(), put)).await?;
        rest = later;
    }
    let mut copy = etcd.list("").await?.entries;
    copy.retain(|entry| entry.key != MARK);
    let same = |(one, other): (&Entry, &Entry)| one.key == other.key && one.versioned.value == other.versioned.value;
    if copy.len() != listing.entries.len() || !copy.iter().zip(&listing.entries).all(same) {
        bail!("the copy in {} differs from the original: somebody else writes there", etcd.place());
    }
    Ok(copy.len())
}

/// Writes without a condition, and so again when no answer came: nobody else writes there.
async fn write(etcd: &Etcd, transaction: &Transaction) -> anyhow::Result<()> {
    debug_assert!(!transaction.conditions.iter().any(|(_, expect)| matches!(expect, Expect::Revision(_))));
    if transaction.writes.is_empty() {
        return Ok(());
    }
    for _ in 0..TRIES {
        match etcd.transact(transaction).await {
            Ok(Outcome::Done(_)) => return Ok(()),
            Ok(Outcome::Conflict { key, .. }) => bail!("{key} is in use"),
            Err(DirectoryError::Unknown(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    bail!("{} did not say whether records were written", etcd.place());
}
