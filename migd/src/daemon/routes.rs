//! Following the directory: what jobs there are, and routes to those on other nodes.
//!
//! Each foreign job's address is routed via its owner's node, at a metric at which a shim's own route to a TUN device is
//! preferred ([`crate::shim::links::FOLLOW_METRIC`]); so following is right at every moment, whatever the shims of this node do meanwhile.

use std::collections::BTreeSet;
use std::net::IpAddr;
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
    super::migrate::after_change(node).await;
    let (records, mut revision) = cluster.jobs().await?;
    if node.location.take_changed() {
        // It was found to have moved just now.
        node.location.put_changed();
        super::migrate::after_change(node).await;
    }
    node.note_directory(None);
    for gone in node.learn_jobs(&records) {
        unroute(node, &gone);
    }
    // Releases may have been missed.
    cluster.reconcile().await?;
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
            cluster.note_released(&gone, change.revision);
            unroute(node, &gone);
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

async fn apply(node: &Arc<Node>, record: &JobRecord) {
    let at = record.addressed_at();
    if at == node.name {
        unroute(node, record);
        return;
    }
    let owner = match node.find_node(at).await {
        Ok(owner) => owner,
        Err(error) => {
            tracing::warn!(job = %record.id, %error, "can't route to the job");
            return;
        }
    };
    for address in record.addresses() {
        let Some(via) = owner.hop_for(address) else {
            tracing::warn!(job = %record.id, %address, node = owner.name, "that node has no address of this kind, see its --hop");
            continue;
        };
        if let Err(error) = node.machine.follow(address, via) {
            tracing::warn!(job = %record.id, %address, %via, %error, "can't route to the job");
        }
    }
}

fn unroute(node: &Node, record: &JobRecord) {
    for address in record.addresses() {
        unroute_address(node, address);
    }
}

fn unroute_address(node: &Node, address: IpAddr) {
    if let Err(error) = node.machine.unfollow(address) {
        tracing::warn!(%address, %error, "can't remove a route");
    }
}

/// Removes routes that a former daemon made for jobs that are gone.
fn remove_strays(node: &Node, cluster: &Cluster, records: &[JobRecord]) {
    let wanted: BTreeSet<IpAddr> = records.iter().flat_map(JobRecord::addresses).collect();
    for address in node.machine.followed() {
        if cluster.prefix_of(address).is_some() && !wanted.contains(&address) {
            tracing::info!(%address, "removing the route of a job that is gone");
            unroute_address(node, address);
        }
    }
}
