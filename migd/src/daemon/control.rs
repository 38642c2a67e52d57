//! Serving `control.sock`: what the command line and the shims ask.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use cluster_addr::Owner;
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};

use super::attach::{self, Attachment};
use super::capture;
use super::jobs::{LocalJob, Phase};
use super::locate::{self, Located};
use super::node::Node;
use super::peer::protocol::PeerRequest;
use super::{addresses, launch, members, migrate, moves};
use crate::api::{
    ApiError, AttachInput, Connection, DaemonRequest, DaemonStatus, ErrorKind, JobInspection, JobView, Reply,
    ShimRequest, SocketListing, SocketPlace,
};
use crate::net::SocketDescription;

/// How long a signal is tried while the job moves.
const KILL_PATIENCE: Duration = Duration::from_secs(20);
/// Pause between tries.
const RETRY: Duration = Duration::from_millis(50);
/// Pause after the listening socket failed (descriptors used up).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves connections for ever.
pub async fn serve(node: Arc<Node>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let node = Arc::clone(&node);
                tokio::spawn(async move {
                    if let Err(error) = answer(&node, stream).await {
                        tracing::debug!(%error, "a control connection broke");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a control connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn answer(node: &Arc<Node>, stream: UnixStream) -> io::Result<()> {
    let mut connection = Connection::from(stream);
    let request = match connection.receive::<DaemonRequest>().await {
        Ok(Some(request)) => request,
        Ok(None) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            let message = format!("the daemon (version {}) does not understand: {error}", env!("CARGO_PKG_VERSION"));
            let error = ApiError::new(ErrorKind::Invalid, message).hint("are command and daemon of the same version?");
            return connection.send(&Reply::<()>::Error(error)).await;
        }
        Err(error) => return Err(error),
    };
    tracing::trace!(?request, "control");
    match request {
        DaemonRequest::Status => reply(&mut connection, status(node)).await,
        DaemonRequest::Run(request) => reply(&mut connection, launch::run(node, request).await).await,
        DaemonRequest::Jobs { all } => reply(&mut connection, Ok(locate::list(node, all).await)).await,
        DaemonRequest::Nodes => reply(&mut connection, Ok(members::list(node).await)).await,
        DaemonRequest::Inspect { job } => reply(&mut connection, inspect(node, &job).await).await,
        DaemonRequest::Sockets { job } => reply(&mut connection, sockets(node, &job).await).await,
        DaemonRequest::Capture { job, number, snap_length } => {
            let begin = async {
                let found = locate::find(node, &job).await?;
                Ok((describe(node, &found).await?, found))
            };
            stream_packets(node, connection, begin.await, number, snap_length).await
        }
        DaemonRequest::Kill { job, signal } => {
            let result = async { kill(node, &locate::find(node, &job).await?.id, signal).await };
            reply(&mut connection, result.await).await
        }
        DaemonRequest::Remove { job } => reply(&mut connection, remove(node, &job).await).await,
        DaemonRequest::Attach { job, from_offset, input } => {
            let begin = async {
                let found = locate::find(node, &job).await?;
                let id = found.id.clone();
                Ok((found, attach::Request { id, from_offset, follow: true, input }))
            };
            stream_job(node, connection, begin.await).await
        }
        DaemonRequest::Logs { job, follow, tail } => {
            stream_job(node, connection, logs(node, &job, follow, tail).await).await
        }
        DaemonRequest::Move { job, node: to, sockets } => move_job(node, &mut connection, &job, &to, sockets).await,
        DaemonRequest::Owner { job } => reply(&mut connection, moves::owner(node, &job).await).await,
        DaemonRequest::Transfer { job, from_epoch, from_node, to_node, home } => {
            let from = Owner { node: from_node, epoch: from_epoch };
            reply(&mut connection, moves::transfer(node, &job, from, &to_node, home.as_deref()).await).await
        }
        DaemonRequest::Addresses(request) => addresses::answer(node, &mut connection, request).await,
        DaemonRequest::MigrateDirectory { to } => reply(&mut connection, migrate::migrate(node, &to).await).await,
        DaemonRequest::JobExited { job, exit } => {
            tracing::debug!(job, %exit, "a shim says that its job ended");
            reply(&mut connection, Ok(())).await
        }
    }
}

/// Answers a request.
///
/// # Errors
/// As the connection's.
pub async fn reply<T: Serialize>(connection: &mut Connection, result: Result<T, ApiError>) -> io::Result<()> {
    connection.send(&Reply::from(result)).await
}

fn status(node: &Node) -> Result<DaemonStatus, ApiError> {
    let prefix = node.cluster().map(|cluster| cluster.record().prefixes_in_words());
    Ok(DaemonStatus {
        node: node.name.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        cluster: node.cluster_id(),
        prefix: prefix.ok(),
        peer: node.peer,
        pid: std::process::id(),
        directory: node.directory_health(),
    })
}

/// All that is known of a job.
async fn inspect(node: &Arc<Node>, selector: &str) -> Result<JobInspection, ApiError> {
    let found = locate::find(node, selector).await?;
    if found.node == node.name {
        return inspect_here(node, &found.id).await;
    }
    let owner = node.find_node(&found.node).await?;
    Ok(node.peers.ask(owner.peer, &PeerRequest::Inspect { id: found.id }).await?)
}

/// All that is known of a job of this node.
///
/// # Errors
/// [`ErrorKind::NotFound`].
pub async fn inspect_here(node: &Arc<Node>, id: &str) -> Result<JobInspection, ApiError> {
    let job = here(node, id)?;
    let view = job.view().await.ok_or_else(|| locate::not_found(id))?;
    let alive = !matches!(job.standing().phase, Phase::Ended(_) | Phase::Unclear);
    let detail = match alive {
        true => match job.ask::<serde_json::Value>(&ShimRequest::Inspect).await {
            Ok(detail) => Some(detail),
            Err(error) => Some(serde_json::json!({ "error": error.to_string() })),
        },
        false => None,
    };
    Ok(JobInspection { job: view, spec: Some(job.file.spec.clone()), detail })
}

/// The sockets of a job.
async fn sockets(node: &Arc<Node>, selector: &str) -> Result<SocketListing, ApiError> {
    let found = locate::find(node, selector).await?;
    let sockets = if found.node == node.name {
        sockets_here(node, &found.id).await?
    } else {
        let owner = node.find_node(&found.node).await?;
        node.peers.ask(owner.peer, &PeerRequest::Sockets { id: found.id.clone() }).await?
    };
    Ok(SocketListing { job: found.label(), node: found.node, sockets })
}

/// The sockets of a job of this node.
///
/// # Errors
/// [`ErrorKind::NotFound`], [`ErrorKind::Unavailable`] when it moves or has ended.
pub async fn sockets_here(node: &Arc<Node>, id: &str) -> Result<Vec<SocketDescription>, ApiError> {
    here(node, id)?.ask(&ShimRequest::Sockets).await
}

/// A job of this node.
///
/// # Errors
/// [`ErrorKind::NotFound`].
pub fn here(node: &Node, id: &str) -> Result<Arc<LocalJob>, ApiError> {
    node.jobs.get(id).ok_or_else(|| locate::not_found(id))
}

/// Sends a signal to a job, wherever it is; while it moves that is tried again.
///
/// # Errors
/// [`ErrorKind::NotFound`], [`ErrorKind::Invalid`] when it has ended, [`ErrorKind::Unavailable`].
pub async fn kill(node: &Arc<Node>, id: &str, signal: i32) -> Result<(), ApiError> {
    let deadline = tokio::time::Instant::now() + KILL_PATIENCE;
    loop {
        let error = match kill_once(node, id, signal).await {
            Err(error) if error.kind == ErrorKind::Conflict => error,
            other => return other,
        };
        if tokio::time::Instant::now() > deadline {
            return Err(error);
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn kill_once(node: &Arc<Node>, id: &str, signal: i32) -> Result<(), ApiError> {
    if let Some(job) = node.jobs.get(id) {
        match kill_here(&job, signal).await {
            Err(error) if error.kind == ErrorKind::NotFound => {}
            other => return other,
        }
    }
    let place = locate::find(node, id).await?;
    if place.node == node.name {
        // Just gone from here, and the directory does not show it yet; or just arriving.
        return Err(ApiError::new(ErrorKind::Conflict, format!("job {} is moving", place.label())));
    }
    let owner = node.find_node(&place.node).await?;
    match node.peers.ask(owner.peer, &PeerRequest::Kill { id: id.to_owned(), signal }).await {
        Err(super::peer::PeerError::Api(error)) if error.kind == ErrorKind::NotFound => {
            Err(ApiError::new(ErrorKind::Conflict, error.message))
        }
        other => Ok(other?),
    }
}

/// Sends a signal to a job of this node.
///
/// # Errors
/// [`ErrorKind::NotFound`] when it is not (or not any more) here, [`ErrorKind::Conflict`] when it is being moved or started.
pub async fn kill_here(job: &LocalJob, signal: i32) -> Result<(), ApiError> {
    match job.standing().phase {
        Phase::MovedAway { .. } | Phase::Failed(_) | Phase::Receiving | Phase::Home { .. } => {
            Err(locate::not_found(job.id()))
        }
        Phase::Ended(ended) => {
            let message = format!("job {} has ended: {}", job.label(), ended.exit);
            Err(ApiError::new(ErrorKind::Invalid, message))
        }
        Phase::Unclear => {
            let message = format!("the shim of job {} died", job.label());
            Err(ApiError::new(ErrorKind::Unavailable, message))
        }
        Phase::Starting => Err(ApiError::new(ErrorKind::Conflict, format!("job {} is being started", job.label()))),
        Phase::Running | Phase::Moving { .. } => match job.ask(&ShimRequest::Kill { signal }).await {
            // The shim may have ended since; then the phase is about to tell.
            Err(error) if error.kind == ErrorKind::Unavailable => {
                let over = |phase: &Phase| !matches!(phase, Phase::Running | Phase::Moving { .. });
                match job.wait(Duration::from_secs(1), over).await {
                    Some(_) => Err(ApiError::new(ErrorKind::Conflict, error.message)),
                    None => Err(error),
                }
            }
            other => other,
        },
    }
}

async fn remove(node: &Arc<Node>, selector: &str) -> Result<(), ApiError> {
    let found = locate::find(node, selector).await?;
    if found.node == node.name {
        return remove_here(node, &found.id);
    }
    let owner = node.find_node(&found.node).await?;
    Ok(node.peers.ask(owner.peer, &PeerRequest::Remove { id: found.id }).await?)
}

/// Forgets a job of this node that ended.
///
/// # Errors
/// [`ErrorKind::NotFound`]; [`ErrorKind::Conflict`] when it has not ended.
pub fn remove_here(node: &Node, id: &str) -> Result<(), ApiError> {
    let job = here(node, id)?;
    match job.standing().phase {
        Phase::Ended(_) => {
            node.jobs.remove(id);
            super::supervise::remove_directory(&job);
            Ok(())
        }
        _ => {
            let message = format!("job {} runs", job.label());
            Err(ApiError::new(ErrorKind::Conflict, message)
                .hint(format!("end it first: migd kill {}", job.file.spec.name)))
        }
    }
}

async fn logs(
    node: &Arc<Node>,
    selector: &str,
    follow: bool,
    tail: Option<u64>,
) -> Result<(Located, attach::Request), ApiError> {
    let found = locate::find(node, selector).await?;
    let from_offset = match tail {
        None => 0,
        Some(lines) if found.node == node.name => attach::tail_offset(&*here(node, &found.id)?, lines)?,
        Some(lines) => {
            let owner = node.find_node(&found.node).await?;
            node.peers.ask(owner.peer, &PeerRequest::TailOffset { id: found.id.clone(), lines }).await?
        }
    };
    let id = found.id.clone();
    Ok((found, attach::Request { id, from_offset, follow, input: false }))
}

/// The job as listings show it, or what the directory last said of it.
async fn describe(node: &Arc<Node>, found: &Located) -> Result<JobView, ApiError> {
    let known = node.known_jobs().into_iter().find(|record| record.id.as_str() == found.id);
    let view = if found.node == node.name {
        inspect_view(node, &found.id).await
    } else {
        let owner = node.find_node(&found.node).await?;
        let asked = node.peers.ask::<JobInspection>(owner.peer, &PeerRequest::Inspect { id: found.id.clone() }).await;
        asked.map(|inspection| inspection.job).map_err(ApiError::from)
    };
    match (view, known) {
        (Ok(view), _) => Ok(view),
        // It moves at this moment.
        (Err(_), Some(record)) => Ok(locate::from_record_only(&record)),
        (Err(error), None) => Err(error),
    }
}

async fn inspect_view(node: &Arc<Node>, id: &str) -> Result<JobView, ApiError> {
    here(node, id)?.view().await.ok_or_else(|| locate::not_found(id))
}

/// Answers with the job, then streams its output until it ends or the other side goes.
async fn stream_job(
    node: &Arc<Node>,
    mut connection: Connection,
    begin: Result<(Located, attach::Request), ApiError>,
) -> io::Result<()> {
    let begin = match begin {
        Ok((found, request)) => describe(node, &found).await.map(|view| (found, request, view)),
        Err(error) => Err(error),
    };
    let (found, request, view) = match begin {
        Ok(begin) => begin,
        Err(error) => return reply::<JobView>(&mut connection, Err(error)).await,
    };
    reply(&mut connection, Ok(view)).await?;
    let Attachment { mut events, input } = attach::following(Arc::clone(node), found.node, request);
    let (mut receiver, mut sender) = connection.split();
    let output = async {
        while let Some(event) = events.recv().await {
            sender.send(&event).await?;
        }
        Ok(())
    };
    let input = async {
        while let Some(message) = receiver.receive::<AttachInput>().await? {
            // Ends only with the job's output: input beyond that has no reader.
            let _ = input.send(message);
        }
        Ok(())
    };
    tokio::select! {
        ended = output => ended,
        ended = input => ended,
    }
}

/// Answers with the job, then streams its packets until it ends or the other side goes.
async fn stream_packets(
    node: &Arc<Node>,
    mut connection: Connection,
    begin: Result<(JobView, Located), ApiError>,
    number: u64,
    snap_length: u32,
) -> io::Result<()> {
    let (view, found) = match begin {
        Ok(begin) => begin,
        Err(error) => return reply::<JobView>(&mut connection, Err(error)).await,
    };
    reply(&mut connection, Ok(view)).await?;
    let request = capture::Request { id: found.id, number, snap_length };
    let mut events = capture::following(Arc::clone(node), found.node, request);
    let (mut receiver, mut sender) = connection.split();
    let output = async {
        while let Some(event) = events.recv().await {
            sender.send(&event).await?;
        }
        Ok(())
    };
    tokio::select! {
        ended = output => ended,
        // Nothing is said in this direction; what comes is the end.
        _ = receiver.receive::<serde_json::Value>() => Ok(()),
    }
}

async fn move_job(
    node: &Arc<Node>,
    connection: &mut Connection,
    selector: &str,
    to: &str,
    sockets: SocketPlace,
) -> io::Result<()> {
    let begin = async {
        let found = locate::find(node, selector).await?;
        let view = describe(node, &found).await?;
        Ok((view, moves::begin(node, &found, to, sockets).await?))
    };
    let (view, mut events) = match begin.await {
        Ok(begin) => begin,
        Err(error) => return reply::<JobView>(connection, Err(error)).await,
    };
    reply(connection, Ok(view)).await?;
    while let Some(event) = events.recv().await {
        connection.send(&event).await?;
    }
    Ok(())
}
