//! Moves between nodes, and the change of owner.
//!
//! The daemons only bring the two shims together: the target's daemon starts a shim that waits, both hand the connection
//! between them to their shims, and from then on the shims talk alone. The target's shim comes back with one question, the
//! transfer of ownership ([`transfer`]), which is answered by the directory or not at all.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use cluster_addr::{ClusterError, JobId, JobRecord, Owner, Transfer};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::home;
use super::jobs::{LocalJob, Phase, Standing};
use super::launch;
use super::locate::Located;
use super::node::Node;
use super::peer::client::PeerConnection;
use super::peer::protocol::{self, MoveAnswer, MoveOffer, PeerRequest};
use crate::api::{
    ApiError, Connection, ErrorKind, JobOwner, MoveEvent, MoveOutcome, NodeAddress, Reply, ShimRequest, SocketPlace,
    TransferReply,
};

/// How long the target may take to prepare a shim.
const OFFER_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a former stay of the job on the target may take to be cleared away.
const CLEARING: Duration = Duration::from_secs(5);
/// How often that is looked at.
const CLEARING_STEP: Duration = Duration::from_millis(10);
/// How long the directory is asked about a transfer that may have been made, before the shim is told to ask again.
const VERIFY: Duration = Duration::from_secs(1);

/// Begins to move a job and reports how it goes. Nobody has to listen: the move goes on by itself.
///
/// # Errors
/// When it can't even be begun; the job was not disturbed then.
pub async fn begin(
    node: &Arc<Node>,
    job: &Located,
    to: &str,
    sockets: SocketPlace,
) -> Result<mpsc::UnboundedReceiver<MoveEvent>, ApiError> {
    if job.ended {
        return Err(ApiError::new(ErrorKind::Conflict, format!("job {} has ended", job.label())));
    }
    if job.node == to {
        return Err(ApiError::new(ErrorKind::Invalid, format!("job {} is on node {to} already", job.label())));
    }
    if job.node != node.name {
        return relay(node, job, to, sockets).await;
    }
    let target = node.find_node(to).await?;
    let local = node.jobs.get(&job.id).ok_or_else(|| super::locate::not_found(&job.id))?;
    let moving = |to: &str| {
        let message = format!("job {} is moving to node {to} at this moment", job.label());
        ApiError::new(ErrorKind::Conflict, message).hint("wait for that move to end")
    };
    let departure = local.depart(to).map_err(|to| moving(&to))?;
    // It may have come a moment ago, or its last move just have failed, and its shim's word of that be on its way.
    let runs = |phase: &Phase| {
        !matches!(phase, Phase::Starting | Phase::Receiving | Phase::Home { .. } | Phase::Moving { .. })
    };
    let standing = local.wait(CLEARING, runs).await.unwrap_or_else(|| local.standing());
    match standing.phase {
        Phase::Running => {}
        Phase::Moving { to } => return Err(moving(&to)),
        _ => return Err(ApiError::new(ErrorKind::Conflict, format!("job {} does not run yet", job.label()))),
    }
    let (events, receiver) = mpsc::unbounded_channel();
    let node = Arc::clone(node);
    let target = NodeAddress { name: target.name, peer: target.peer, hops: target.hops };
    tokio::spawn(async move {
        tracing::info!(job = local.label(), to = target.name, "move begins");
        let end = match carry_out(&node, &local, target, standing.epoch, sockets, &events).await {
            Ok(outcome) => MoveEvent::Done(outcome),
            Err(error) => MoveEvent::Failed(error),
        };
        drop(departure);
        tracing::info!(job = local.label(), ?end, "move ended");
        // Whoever asked may have gone.
        let _ = events.send(end);
    });
    Ok(receiver)
}

async fn carry_out(
    node: &Arc<Node>,
    job: &LocalJob,
    target: NodeAddress,
    epoch: u64,
    sockets: SocketPlace,
    events: &mpsc::UnboundedSender<MoveEvent>,
) -> Result<MoveOutcome, ApiError> {
    let record = node.cluster()?.job(&parse(job.id())?).await.map_err(|error| node.explain(error))?;
    let record = record.ok_or_else(|| super::locate::not_found(job.id()))?;
    let line_to = home::line_to(node, &record, sockets).await?;
    let mut connection = connect(node, &job.label(), &target.name, target.peer).await?;
    let offer = MoveOffer { spec: job.file.spec.clone(), record, source: node.address(), line_to };
    let offer = PeerRequest::MoveOffer(Box::new(offer));
    let answer = connection.exchange::<Reply<MoveAnswer>>(&offer);
    let silent = |reason: String| {
        ApiError::new(ErrorKind::Unavailable, format!("node {} did not take the job: {reason}", target.name))
    };
    let answer = match tokio::time::timeout(OFFER_TIMEOUT, answer).await {
        Ok(Ok(answer)) => Result::from(answer)?,
        Ok(Err(error)) => return Err(silent(error.to_string())),
        Err(_) => return Err(silent(format!("no answer within {} s", OFFER_TIMEOUT.as_secs()))),
    };
    if let MoveAnswer::Refused { reasons } = answer {
        return Ok(MoveOutcome::Refused { reasons });
    }
    let stream = connection.stream.into_std().map_err(ApiError::internal)?;
    let lost = |what: &str| {
        ApiError::new(ErrorKind::Unavailable, format!("the shim of job {} {what} during the move", job.label()))
            .hint("`migd ps` shows where the job runs")
    };
    let shim = Connection::connect(&job.paths.socket()).await;
    let mut shim = shim.map_err(|error| lost(&format!("did not answer ({error})")))?;
    let request = ShimRequest::MoveOut { target, epoch, sockets };
    shim.send_with(&request, &[stream.as_fd()]).await.map_err(|error| lost(&format!("did not answer ({error})")))?;
    // The shim's from now on: were it kept open here, the other side could not see the shim's end.
    drop(stream);
    loop {
        match shim.receive::<MoveEvent>().await {
            Ok(Some(MoveEvent::Done(outcome))) => return Ok(outcome),
            Ok(Some(MoveEvent::Failed(error))) => return Err(error),
            Ok(Some(progress)) => drop(events.send(progress)),
            Ok(None) => return Err(lost("closed the connection")),
            Err(error) => return Err(lost(&format!("closed the connection ({error})"))),
        }
    }
}

/// A connection to a node without which the job can't move.
async fn connect(node: &Node, job: &str, name: &str, peer: SocketAddr) -> Result<PeerConnection, ApiError> {
    node.peers.connect(peer).await.map_err(|error| {
        let error = ApiError::from(error);
        ApiError { message: format!("job {job} stays where it is: node {name}: {}", error.message), ..error }
    })
}

/// Has the job's own node move it.
async fn relay(
    node: &Arc<Node>,
    job: &Located,
    to: &str,
    sockets: SocketPlace,
) -> Result<mpsc::UnboundedReceiver<MoveEvent>, ApiError> {
    let owner = node.find_node(&job.node).await?;
    let mut connection = connect(node, &job.label(), &owner.name, owner.peer).await?;
    let request = PeerRequest::Move { id: job.id.clone(), node: to.to_owned(), sockets };
    let broken = |error: std::io::Error| {
        ApiError::new(ErrorKind::Unavailable, format!("the connection to node {} broke: {error}", owner.name))
    };
    Result::from(connection.exchange::<Reply<()>>(&request).await.map_err(broken)?)?;
    let (events, receiver) = mpsc::unbounded_channel();
    let name = owner.name.clone();
    tokio::spawn(async move {
        let mut stream = connection.stream;
        loop {
            let event = match protocol::read::<MoveEvent>(&mut stream).await {
                Ok(Some(event)) => event,
                _ => MoveEvent::Failed(
                    ApiError::new(
                        ErrorKind::Unavailable,
                        format!("the connection to node {name} broke during the move"),
                    )
                    .hint("the move goes on without it; `migd ps` shows where the job runs"),
                ),
            };
            let last = !matches!(event, MoveEvent::Progress { .. });
            if events.send(event).is_err() || last {
                return;
            }
        }
    });
    Ok(receiver)
}

/// The target's side: a shim is started, the answer given, and the connection handed to the shim.
///
/// # Errors
/// As the stream's or the shim's; the source then sees the stream end.
pub async fn take(node: &Arc<Node>, mut stream: TcpStream, offer: MoveOffer) -> std::io::Result<()> {
    let epoch = offer.record.owner.epoch;
    let line = home::connect(node, offer.line_to.as_ref(), &offer.spec.id, epoch).await;
    let prepared = match line {
        Ok(line) => prepare(node, &offer).await.map(|job| (job, line)),
        Err(error) => Err(error.to_string()),
    };
    let (job, line) = match prepared {
        Ok(prepared) => prepared,
        Err(reason) => {
            tracing::warn!(job = offer.spec.id, source = offer.source.name, reason, "refused a job");
            let answer = MoveAnswer::Refused { reasons: vec![reason] };
            return protocol::write(&mut stream, &Reply::Ok(answer)).await;
        }
    };
    tracing::info!(job = job.label(), source = offer.source.name, "receiving");
    protocol::write(&mut stream, &Reply::Ok(MoveAnswer::Accepted)).await?;
    let stream = stream.into_std()?;
    let mut shim = Connection::connect(&job.paths.socket()).await?;
    let descriptors: Vec<_> = std::iter::once(stream.as_fd()).chain(line.as_ref().map(AsFd::as_fd)).collect();
    shim.send_with(&ShimRequest::Receive { source: offer.source }, &descriptors).await?;
    drop((stream, line));
    match shim.receive::<Reply<()>>().await? {
        Some(Reply::Ok(())) => Ok(()),
        Some(Reply::Error(error)) => Err(std::io::Error::other(error)),
        None => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}

async fn prepare(node: &Arc<Node>, offer: &MoveOffer) -> Result<Arc<LocalJob>, String> {
    if !super::attach::is_id(&offer.spec.id) || offer.record.id.as_str() != offer.spec.id {
        return Err(format!("{:?} is not the id of a job", offer.spec.id));
    }
    let deadline = tokio::time::Instant::now() + CLEARING;
    while let Some(former) = node.jobs.get(&offer.spec.id) {
        match stay(&former.standing(), &offer.record, &node.name) {
            Stay::Home => return Ok(former),
            Stay::Over if tokio::time::Instant::now() < deadline => tokio::time::sleep(CLEARING_STEP).await,
            Stay::Over | Stay::Present => {
                return Err(format!("node {} still has something of job {}; see `migd ps`", node.name, former.label()));
            }
        }
    }
    launch::start(node, offer.spec.clone(), &offer.record, true).map_err(|error| error.to_string())
}

/// What a job that is offered has on this node already.
#[derive(Debug, PartialEq, Eq)]
enum Stay {
    /// Its sockets; the shim that has them takes the process back.
    Home,
    /// What a shim still clears away that left, or to which the job didn't come.
    Over,
    /// The job itself, as far as is known here.
    Present,
}

/// Only the job's owner offers it, one move at a time: what the record doesn't speak of is from before.
fn stay(standing: &Standing, record: &JobRecord, node: &str) -> Stay {
    match standing.phase {
        Phase::Home { .. } if record.home.as_deref() == Some(node) => Stay::Home,
        Phase::Home { .. }
        | Phase::Starting
        | Phase::Receiving
        | Phase::MovedAway { .. }
        | Phase::Failed(_)
        | Phase::Unclear => Stay::Over,
        // Its shim may not have told yet that another node has won the job.
        _ if record.owner.epoch > standing.epoch => Stay::Over,
        _ => Stay::Present,
    }
}

/// The change of owner that a shim asks for. Never guesses: what is not known is `Unknown`.
pub async fn transfer(
    node: &Arc<Node>,
    job: &str,
    from: Owner,
    to: &str,
    home: Option<&str>,
) -> Result<TransferReply, ApiError> {
    let id = parse(job)?;
    let unknown = |error: &dyn std::fmt::Display| TransferReply::Unknown { reason: error.to_string() };
    let cluster = match node.cluster() {
        Ok(cluster) => cluster,
        Err(error) => return Ok(unknown(&error)),
    };
    let wanted = Owner { node: to.to_owned(), epoch: from.epoch.saturating_add(1) };
    let reply = match cluster.transfer(&id, &from, to, home, node.known_job(job).as_ref()).await {
        Ok(Transfer::Won(owner)) => TransferReply::Won { epoch: owner.epoch },
        // An earlier try, whose answer got lost, had made it.
        Ok(Transfer::Lost(Some(owner))) if owner == wanted => TransferReply::Won { epoch: owner.epoch },
        Ok(Transfer::Lost(owner)) => lost(owner),
        Err(ClusterError::Directory(error)) => {
            tracing::warn!(job, %error, "the directory did not answer a transfer");
            let asked = tokio::time::timeout(VERIFY, cluster.job(&id)).await;
            match asked {
                Ok(Ok(Some(record))) if record.owner == wanted => TransferReply::Won { epoch: wanted.epoch },
                // It may still be on its way to the directory.
                Ok(Ok(Some(record))) if record.owner == from => unknown(&error),
                Ok(Ok(record)) => lost(record.map(|record| record.owner)),
                Ok(Err(_)) | Err(_) => unknown(&error),
            }
        }
        Err(error) => unknown(&error),
    };
    tracing::info!(job, ?from, to, ?reply, "transfer");
    Ok(reply)
}

/// Who has a job, for a home that has lost sight of it.
///
/// # Errors
/// When the directory does not answer.
pub async fn owner(node: &Arc<Node>, job: &str) -> Result<Option<JobOwner>, ApiError> {
    let record = node.cluster()?.job(&parse(job)?).await.map_err(|error| node.explain(error))?;
    Ok(record.map(|record| JobOwner { node: record.owner.node, epoch: record.owner.epoch }))
}

fn lost(owner: Option<Owner>) -> TransferReply {
    match owner {
        Some(owner) => TransferReply::Lost { owner: Some(owner.node), epoch: owner.epoch },
        None => TransferReply::Lost { owner: None, epoch: 0 },
    }
}

fn parse(id: &str) -> Result<JobId, ApiError> {
    id.parse().map_err(|error: String| ApiError::new(ErrorKind::Invalid, error))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn what_an_offer_finds_of_the_job_is_told_by_its_record() {
        let found = |phase: Phase, epoch, home: Option<&str>| {
            let record = JobRecord {
                id: JobId::from_entropy([7; 12]),
                name: "web".into(),
                address: Ipv4Addr::new(10, 77, 0, 1),
                address6: None,
                reservation: None,
                owner: Owner { node: "B".into(), epoch: 5 },
                home: home.map(Into::into),
                command: Vec::new(),
                started_ms: 0,
            };
            stay(&Standing { phase, epoch }, &record, "A")
        };
        let home = || Phase::Home { to: "B".into() };
        assert_eq!(found(home(), 5, Some("A")), Stay::Home);
        // The sockets have left, and their shim is about to end.
        assert_eq!(found(home(), 5, None), Stay::Over);
        assert_eq!(found(home(), 4, Some("C")), Stay::Over);
        // It didn't come, and is offered anew.
        assert_eq!(found(Phase::Receiving, 5, None), Stay::Over);
        assert_eq!(found(Phase::Starting, 5, None), Stay::Over);
        // It left, which its shim has told, or not yet.
        assert_eq!(found(Phase::MovedAway { to: "B".into() }, 5, None), Stay::Over);
        assert_eq!(found(Phase::Running, 4, None), Stay::Over);
        assert_eq!(found(Phase::Running, 5, None), Stay::Present);
    }
}
