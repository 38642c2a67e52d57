//! Following the directory: what jobs there are, and routes to those on other nodes.
//!
//! Each foreign job's address is routed via its owner's node, at a metric at which a shim's own route to a TUN device is
//! preferred ([`crate::shim::links::FOLLOW_METRIC`]); so following is right at every moment, whatever the shims of this node do meanwhile.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use cluster_addr::directory::{Change, DirectoryError};
use cluster_addr::{Cluster, ClusterError, JobRecord};

use super::node::Node;

/// Pause before following again after the watch ended.
const RETRY: Duration = Duration::from_millis(500);

/// Follows the directory for ever.
pub async fn follow(node: Arc<Node>) {
    loop {
        if let Ok(cluster) = node.cluster()
            && let Err(error) = follow_once(&node, cluster).await
        {
            match error {
                ClusterError::Directory(DirectoryError::Compacted(_)) => continue,
                error => drop(node.explain(error)),
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Lists, then applies changes until the watch ends.
async fn follow_once(node: &Arc<Node>, cluster: &Cluster) -> Result<(), ClusterError> {
    let (records, mut revision) = cluster.jobs().await?;
    node.note_directory(None);
    for gone in node.learn_jobs(&records) {
        forget(node, cluster, &gone);
    }
    for record in &records {
        apply(node, record).await;
    }
    remove_strays(node, cluster, &records);
    let mut watch = cluster.watch_jobs(revision).await?;
    while let Some(change) = watch.next().await {
        revision = change.revision;
        tracing::trace!(revision, key = change.key, "change");
        take(node, cluster, change).await;
    }
    Ok(())
}

async fn take(node: &Arc<Node>, cluster: &Cluster, change: Change) {
    let id = change.key.trim_start_matches(cluster_addr::records::JOBS).to_owned();
    let Some(value) = change.value else {
        if let Some(gone) = node.learn_job(&id, None) {
            forget(node, cluster, &gone);
        }
        return;
    };
    match cluster_addr::records::decode::<JobRecord>(&change.key, &value) {
        Ok(record) => {
            apply(node, &record).await;
            node.learn_job(&id, Some(record));
        }
        Err(error) => tracing::warn!(%error, "skipped"),
    }
}

fn forget(node: &Arc<Node>, cluster: &Cluster, gone: &JobRecord) {
    if gone.owner.node != node.name {
        cluster.note_released(gone.address);
    }
    unroute(node, gone.address);
}

async fn apply(node: &Arc<Node>, record: &JobRecord) {
    if record.owner.node == node.name {
        unroute(node, record.address);
        return;
    }
    let owner = match node.find_node(&record.owner.node).await {
        Ok(owner) => owner,
        Err(error) => {
            tracing::warn!(job = %record.id, %error, "can't route to the job");
            return;
        }
    };
    if let Err(error) = node.machine.follow(record.address, owner.peer.ip()) {
        tracing::warn!(job = %record.id, address = %record.address, via = %owner.peer.ip(), %error, "can't route to the job");
    }
}

fn unroute(node: &Node, address: Ipv4Addr) {
    if let Err(error) = node.machine.unfollow(address) {
        tracing::warn!(%address, %error, "can't remove a route");
    }
}

/// Removes routes that a former daemon made for jobs that are gone.
fn remove_strays(node: &Node, cluster: &Cluster, records: &[JobRecord]) {
    let wanted: BTreeSet<Ipv4Addr> = records.iter().map(|record| record.address).collect();
    let prefix = cluster.record().prefix;
    for address in node.machine.followed() {
        if prefix.contains(&address) && !wanted.contains(&address) {
            tracing::info!(%address, "removing the route of a job that is gone");
            unroute(node, address);
        }
    }
}
