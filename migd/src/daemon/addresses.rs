//! What the command line asks about the cluster's addresses.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use cluster_addr::ClusterRecord;
use cluster_addr::cluster::Survey;
use cluster_addr::records::{AddressRecord, ReservationRecord};
use ipnet::IpNet;

use super::control::reply;
use super::node::Node;
use crate::api::{
    AddressList, AddressRequest, ApiError, BlockList, BlockView, CheckFinding, CheckReport, Connection, PrefixView,
    ReservationView,
};

/// A node heard within this time counts as alive.
const LATELY: Duration = Duration::from_secs(6);

/// Answers one request.
///
/// # Errors
/// As the connection's.
pub async fn answer(node: &Arc<Node>, connection: &mut Connection, request: AddressRequest) -> io::Result<()> {
    match request {
        AddressRequest::List => reply(connection, survey(node).await.map(|survey| list(&survey))).await,
        AddressRequest::Blocks => reply(connection, survey(node).await.map(|survey| blocks(node, &survey))).await,
        AddressRequest::Reserve { name, addresses } => {
            let reserved = async {
                let reserved = node.cluster()?.reserve(&name, &addresses).await;
                Ok(reservation(&reserved.map_err(|error| node.explain(error))?, None))
            };
            reply(connection, reserved.await).await
        }
        AddressRequest::ReleaseReservation { name } => {
            let released = async {
                let released = node.cluster()?.release_reservation(&name).await;
                Ok(reservation(&released.map_err(|error| node.explain(error))?, None))
            };
            reply(connection, released.await).await
        }
        AddressRequest::ReleaseBlock { block } => {
            let released = async {
                let survey = survey(node).await?;
                node.cluster()?.release_block(block).await.map_err(|error| node.explain(error))?;
                let before = blocks(node, &survey).blocks.into_iter().find(|view| view.net == block);
                before.ok_or_else(|| ApiError::internal("the block was leased only just now"))
            };
            reply(connection, released.await).await
        }
        AddressRequest::ForgetNode { node: name, gone } => {
            let forgotten =
                async { node.cluster()?.forget_node(&name, gone).await.map_err(|error| node.explain(error)) };
            let forgotten = forgotten.await;
            if forgotten.is_ok() {
                node.forget_node(&name);
            }
            reply(connection, forgotten).await
        }
        AddressRequest::AddPrefix { net } => {
            let added = async {
                node.cluster()?.add_prefix(net).await.map_err(|error| node.explain(error))?;
                Ok(prefixes(&survey(node).await?))
            };
            reply(connection, added.await).await
        }
        AddressRequest::Check { repair } => reply(connection, check(node, repair).await).await,
    }
}

async fn survey(node: &Node) -> Result<Survey, ApiError> {
    node.cluster()?.survey().await.map_err(|error| node.explain(error))
}

fn list(survey: &Survey) -> AddressList {
    let reservations = survey.reservations.values().map(|record| {
        let job = survey.jobs.values().find(|job| job.reservation.as_ref() == Some(&record.name));
        reservation(record, job.map(|job| job.name.clone()))
    });
    AddressList { prefixes: prefixes(survey), addresses: survey.used(), reservations: reservations.collect() }
}

fn reservation(record: &ReservationRecord, job: Option<String>) -> ReservationView {
    ReservationView { name: record.name.clone(), addresses: record.addresses.clone(), job }
}

fn prefixes(survey: &Survey) -> Vec<PrefixView> {
    let view = |prefix: &cluster_addr::Prefix| {
        let count = |wanted: fn(&AddressRecord) -> bool| {
            survey
                .addresses
                .iter()
                .filter(|(address, (record, _))| prefix.net.contains(*address) && wanted(record))
                .count()
        };
        PrefixView {
            net: prefix.net,
            block_length: prefix.block_length,
            size: size(prefix.net).saturating_sub(special_in(&survey.cluster, prefix.net)),
            held: count(|record| matches!(record, AddressRecord::Held { .. })),
            reserved: count(|record| matches!(record, AddressRecord::Reserved { .. })),
            resting: count(|record| matches!(record, AddressRecord::Resting { .. })),
            leased_blocks: survey.blocks.iter().filter(|block| prefix.net.contains(&block.net)).count(),
        }
    };
    survey.cluster.prefixes.iter().map(view).collect()
}

fn size(net: IpNet) -> u64 {
    1u64.checked_shl(u32::from(net.max_prefix_len() - net.prefix_len())).unwrap_or(u64::MAX)
}

fn special_in(cluster: &ClusterRecord, net: IpNet) -> u64 {
    u64::try_from(cluster.special().iter().filter(|address| net.contains(*address)).count()).unwrap_or(0)
}

fn blocks(node: &Node, survey: &Survey) -> BlockList {
    let alive: BTreeMap<_, _> = node
        .members()
        .into_iter()
        .map(|member| (member.record.name, member.heard.is_some_and(|heard| heard.elapsed() < LATELY)))
        .collect();
    let view = |block: &cluster_addr::BlockRecord| {
        let of_block = survey.addresses.iter().filter(|(address, _)| block.net.contains(*address));
        let (resting, held): (Vec<_>, Vec<_>) =
            of_block.partition(|(_, (record, _))| matches!(record, AddressRecord::Resting { .. }));
        let all = usize::try_from(size(block.net).saturating_sub(special_in(&survey.cluster, block.net)));
        BlockView {
            net: block.net,
            node: block.node.clone(),
            alive: block.node == node.name || alive.get(&block.node).copied().unwrap_or(false),
            held: held.len(),
            resting: resting.len(),
            free: all.unwrap_or(usize::MAX).saturating_sub(held.len() + resting.len()),
        }
    };
    BlockList { prefixes: prefixes(survey), blocks: survey.blocks.iter().map(view).collect() }
}

async fn check(node: &Node, repair: bool) -> Result<CheckReport, ApiError> {
    let cluster = node.cluster()?;
    let survey = survey(node).await?;
    let mut findings = Vec::new();
    for finding in survey.check() {
        let repaired = repair && cluster.repair(&survey, &finding).await.map_err(|error| node.explain(error))?;
        findings.push(CheckFinding { text: finding.to_string(), finding, repaired });
    }
    if repair {
        cluster.reconcile().await.map_err(|error| node.explain(error))?;
    }
    Ok(CheckReport { revision: survey.revision, jobs: survey.jobs.len(), addresses: survey.addresses.len(), findings })
}
