//! Following the directory: what jobs there are, and routes to those on other nodes.
//!
//! Each foreign job's address is routed via its owner's node, at a metric at which a shim's own route to a TUN device is
//! preferred ([`links::FOLLOW_METRIC`]); so following is right at every moment, whatever the shims of this node do meanwhile.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use cluster_addr::directory::{Change, DirectoryError};
use cluster_addr::{Cluster, ClusterError, JobRecord};

use super::node::Node;
use crate::shim::links;

/// Pause before following again after the watch ended.
const RETRY: Duration = Duration::from_millis(500);

/// Follows the directory for ever.
pub async fn follow(node: Arc<Node>) {
    loop {
        if let Ok(cluster) = node.cluster() {
            if let Err(error) = follow_once(&node, cluster).await {
                match error {
                    ClusterError::Directory(DirectoryError::Compacted(_)) => continue,
                    error => drop(node.explain(error)),
                }
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
    remove_strays(cluster, &records);
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
    unroute(gone.address);
}

async fn apply(node: &Arc<Node>, record: &JobRecord) {
    if record.owner.node == node.name {
        unroute(record.address);
        return;
    }
    let owner = match node.find_node(&record.owner.node).await {
        Ok(owner) => owner,
        Err(error) => {
            tracing::warn!(job = %record.id, %error, "can't route to the job");
            return;
        }
    };
    if let Err(error) = links::follow(record.address, owner.peer.ip()) {
        tracing::warn!(job = %record.id, address = %record.address, via = %owner.peer.ip(), %error, "can't route to the job");
    }
}

fn unroute(address: Ipv4Addr) {
    if let Err(error) = links::unfollow(address) {
        tracing::warn!(%address, %error, "can't remove a route");
    }
}

/// Removes routes that a former daemon made for jobs that are gone.
fn remove_strays(cluster: &Cluster, records: &[JobRecord]) {
    let wanted: BTreeSet<Ipv4Addr> = records.iter().map(|record| record.address).collect();
    let prefix = cluster.record().prefix;
    let table = std::fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
    for address in followed(&table).filter(|address| prefix.contains(address) && !wanted.contains(address)) {
        tracing::info!(%address, "removing the route of a job that is gone");
        unroute(address);
    }
}

/// Addresses with host routes at our metric in the format of proc_net_route: numbers in hexadecimal, addresses as the
/// machine's words.
fn followed(table: &str) -> impl Iterator<Item = Ipv4Addr> {
    table.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let destination = u32::from_str_radix(fields.get(1)?, 16).ok()?;
        let metric: u32 = fields.get(6)?.parse().ok()?;
        let mask = *fields.get(7)?;
        let ours = mask.eq_ignore_ascii_case("FFFFFFFF") && metric == links::FOLLOW_METRIC;
        ours.then(|| Ipv4Addr::from(destination.to_ne_bytes()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_host_routes_of_our_metric_are_ours() {
        let [a, b, c] = [[10, 77, 0, 5], [10, 77, 0, 6], [10, 77, 0, 0]].map(u32::from_ne_bytes);
        let table = format!(
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
             eth0\t{a:08X}\t0263630A\t0007\t0\t0\t100\tFFFFFFFF\t0\t0\t0\n\
             mig0\t{b:08X}\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n\
             eth0\t{c:08X}\t00000000\t0001\t0\t0\t100\t0000FFFF\t0\t0\t0\nnonsense\n"
        );
        assert_eq!(followed(&table).collect::<Vec<_>>(), [Ipv4Addr::new(10, 77, 0, 5)]);
    }
}
