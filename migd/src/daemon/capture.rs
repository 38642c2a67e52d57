//! A job's packets, wherever it is: the stream of a recording follows the job as it moves.
//!
//! Shaped as [`super::attach`], with nothing in the other direction: [`at`] is a job on one node, [`following`] goes after it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::jobs::{LocalJob, Phase};
use super::locate;
use super::node::Node;
use super::peer::protocol::{self, PeerRequest};
use crate::api::{ApiError, CaptureEvent, Connection, ErrorKind, Reply, ShimRequest};

/// Events under way; few, so that a slow reader is felt by the shim, which counts what it drops.
const QUEUE: usize = 4;
/// How long a job may be nowhere to be found (its node's daemon restarts) before it is given up.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the supervisor may take to say what became of a shim that closed a connection.
const VERDICT: Duration = Duration::from_secs(10);
/// Pause before looking for a job again.
const RETRY: Duration = Duration::from_millis(20);

/// What to record.
#[derive(Debug, Clone)]
pub struct Request {
    /// Full id of the job.
    pub id: String,
    /// The recording's number.
    pub number: u64,
    /// Bytes kept of each packet.
    pub snap_length: u32,
}

fn is_final(event: &CaptureEvent) -> bool {
    !matches!(event, CaptureEvent::Packets { .. })
}

/// The packets of a job of this node until it ends or moves; the last event says which.
pub fn local(job: Arc<LocalJob>, request: Request) -> mpsc::Receiver<CaptureEvent> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        if from_shim(&job, &request, &sender).await {
            return;
        }
        let over = |phase: &Phase| matches!(phase, Phase::Ended(_) | Phase::MovedAway { .. } | Phase::Failed(_));
        let last = match job.wait(VERDICT, over).await.map(|standing| standing.phase) {
            Some(Phase::Ended(_)) => CaptureEvent::Ended,
            Some(Phase::MovedAway { to }) => CaptureEvent::Moved { node: to },
            Some(Phase::Failed(error)) => CaptureEvent::Failed(error),
            _ => CaptureEvent::Failed(ApiError::new(
                ErrorKind::Unavailable,
                format!("the shim of job {} closed the connection", job.label()),
            )),
        };
        // A receiver that is gone has no interest in the end either.
        let _ = sender.send(last).await;
    });
    receiver
}

/// Passes a shim's events on; whether they came to a final one, or nobody listens.
async fn from_shim(job: &LocalJob, request: &Request, events: &mpsc::Sender<CaptureEvent>) -> bool {
    let Request { number, snap_length, .. } = *request;
    let Ok(mut connection) = Connection::connect(&job.paths.socket()).await else { return false };
    if connection.send(&ShimRequest::Capture { number, snap_length }).await.is_err() {
        return false;
    }
    match connection.receive::<Reply<()>>().await {
        Ok(Some(Reply::Ok(()))) => {}
        Ok(Some(Reply::Error(error))) => {
            let _ = events.send(CaptureEvent::Failed(error)).await;
            return true;
        }
        _ => return false,
    }
    loop {
        let event = tokio::select! {
            event = connection.receive::<CaptureEvent>() => event,
            () = events.closed() => return true,
        };
        let Ok(Some(event)) = event else { return false };
        let last = is_final(&event);
        if events.send(event).await.is_err() || last {
            return true;
        }
    }
}

/// The packets of a job on the node named until it ends or moves.
async fn at(node: &Arc<Node>, place: &str, request: Request) -> Result<mpsc::Receiver<CaptureEvent>, ApiError> {
    if place == node.name {
        let job = node.jobs.get(&request.id).ok_or_else(|| locate::not_found(&request.id))?;
        return Ok(local(job, request));
    }
    let target = node.find_node(place).await?;
    let mut connection = node.peers.connect(target.peer).await?;
    let Request { id, number, snap_length } = request;
    let broken = |error: std::io::Error| {
        ApiError::new(ErrorKind::Unavailable, format!("the connection to node {place} broke: {error}"))
    };
    let ask = PeerRequest::Capture { id, number, snap_length };
    Result::from(connection.exchange::<Reply<()>>(&ask).await.map_err(broken)?)?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    let mut stream = connection.stream;
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                event = protocol::read::<CaptureEvent>(&mut stream) => event,
                () = sender.closed() => return,
            };
            let event = event.ok().flatten().unwrap_or_else(|| {
                let lost = ApiError::new(ErrorKind::Unavailable, "the connection to the job's node broke");
                CaptureEvent::Failed(lost)
            });
            let last = is_final(&event);
            if sender.send(event).await.is_err() || last {
                return;
            }
        }
    });
    Ok(receiver)
}

/// The packets of a job until it ends, wherever it moves. [`CaptureEvent::Moved`] is a notice here.
pub fn following(node: Arc<Node>, mut place: String, request: Request) -> mpsc::Receiver<CaptureEvent> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let mut lost_since: Option<Instant> = None;
        loop {
            let lost = match at(&node, &place, request.clone()).await {
                Ok(events) => match pass(events, &sender, &mut lost_since).await {
                    Some(CaptureEvent::Moved { node: to }) => {
                        place.clone_from(&to);
                        if sender.send(CaptureEvent::Moved { node: to }).await.is_err() {
                            return;
                        }
                        continue;
                    }
                    Some(CaptureEvent::Failed(error)) if error.kind == ErrorKind::Unavailable => error,
                    Some(last) => {
                        let _ = sender.send(last).await;
                        return;
                    }
                    None => return,
                },
                Err(error) => error,
            };
            if lost_since.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
                let _ = sender.send(CaptureEvent::Failed(lost)).await;
                return;
            }
            tracing::debug!(job = request.id, error = %lost, "lost sight, looking again");
            tokio::time::sleep(RETRY).await;
            if let Some(current) = locate::current_node(&node, &request.id).await {
                place = current;
            }
        }
    });
    receiver
}

/// Passes packets on and returns how they ended; `None` when nobody listens any more.
async fn pass(
    mut events: mpsc::Receiver<CaptureEvent>,
    sender: &mpsc::Sender<CaptureEvent>,
    lost_since: &mut Option<Instant>,
) -> Option<CaptureEvent> {
    loop {
        let event = tokio::select! {
            event = events.recv() => event?,
            () = sender.closed() => return None,
        };
        if is_final(&event) {
            return Some(event);
        }
        *lost_since = None;
        sender.send(event).await.ok()?;
    }
}
