//! The other nodes: who they are and whether they answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::node::{Member, Node};
use super::peer::PeerError;
use super::peer::protocol::{PeerRequest, Pong};
use crate::api::{ApiError, ErrorKind, NodeList, NodeView};

/// Pause between heartbeats.
const INTERVAL: Duration = Duration::from_secs(2);
/// How long an answer may take before a node counts as not answering.
const LIMIT: Duration = Duration::from_millis(1500);
/// So many heartbeats are between two looks at what the cluster's addresses need.
const MAINTENANCE: u32 = 5;

/// Keeps the list of nodes and asks each for a sign of life, for ever.
pub async fn heartbeat(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for beat in 1u32.. {
        ticks.tick().await;
        refresh(&node).await;
        if beat.is_multiple_of(MAINTENANCE)
            && let Ok(cluster) = node.cluster()
            && let Err(error) = cluster.maintain().await
        {
            drop(node.explain(error));
        }
        ask_all(&node).await;
    }
}

/// Reads the list of nodes again.
async fn refresh(node: &Arc<Node>) -> Option<String> {
    let error = match node.cluster() {
        Ok(cluster) => match cluster.nodes().await {
            Ok(records) => {
                node.note_directory(None);
                node.learn_nodes(records);
                return None;
            }
            Err(error) => node.explain(error),
        },
        Err(error) => error,
    };
    Some(match &error.hint {
        Some(hint) => format!("the list may be old: {error} ({hint})"),
        None => format!("the list may be old: {error}"),
    })
}

async fn ask_all(node: &Arc<Node>) -> Vec<(Member, Result<Pong, PeerError>)> {
    let mut asked = tokio::task::JoinSet::new();
    for member in node.members() {
        let node = Arc::clone(node);
        asked.spawn(async move {
            let itself = member.record.name == node.name;
            let answer = if itself {
                Ok(Pong { node: node.name.clone(), version: env!("CARGO_PKG_VERSION").into() })
            } else {
                let answer = node.peers.ask_within::<Pong>(member.record.peer, &PeerRequest::Ping, LIMIT).await;
                // Another node may have got the address of one that is gone.
                answer.and_then(
                    |pong| if pong.node == member.record.name { Ok(pong) } else { Err(stranger(&member, &pong)) },
                )
            };
            (member, answer)
        });
    }
    let answers = asked.join_all().await;
    for (member, answer) in &answers {
        let was_alive = member.heard.is_some_and(|heard| heard.elapsed() < INTERVAL + LIMIT * 2);
        match answer {
            Ok(_) => node.note_heard(&member.record.name),
            Err(error) if was_alive => tracing::warn!(node = member.record.name, %error, "does not answer"),
            Err(_) => {}
        }
    }
    answers
}

fn stranger(member: &Member, pong: &Pong) -> PeerError {
    let message = format!("node {} answers at {}", pong.node, member.record.peer);
    PeerError::Api(ApiError::new(ErrorKind::Unavailable, message))
}

/// The listing of the cluster's nodes; asks each of them now.
pub async fn list(node: &Arc<Node>) -> NodeList {
    let stale = refresh(node).await;
    let directory = node.directory_address();
    let jobs = node.known_jobs();
    let view = |(member, answer): (Member, Result<Pong, PeerError>)| {
        let alive = answer.is_ok();
        let heard = if alive { Some(Instant::now()) } else { member.heard };
        NodeView {
            jobs: jobs.iter().filter(|record| record.owner.node == member.record.name).count(),
            directory: directory == Some(member.record.peer),
            alive,
            last_seen_ms: heard.map(|heard| u64::try_from(heard.elapsed().as_millis()).unwrap_or(u64::MAX)),
            version: answer.ok().map(|pong| pong.version),
            peer: member.record.peer,
            name: member.record.name,
        }
    };
    let mut nodes: Vec<_> = ask_all(node).await.into_iter().map(view).collect();
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    NodeList { nodes, warnings: stale.into_iter().collect() }
}
