//! Answering other daemons.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use cluster_addr::directory::{Directory, DirectoryError};
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::client::set_options;
use super::protocol::{self, Hello, MAGIC, PROTOCOL, PeerRequest, Pong, Welcome};
use crate::api::{ApiError, ErrorKind, Reply, SocketPlace};
use crate::daemon::directory::Place;
use crate::daemon::node::Node;
use crate::daemon::{attach, capture, control, directory, home, launch, locate, migrate, moves};

/// How long the other side may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after the listening socket failed (descriptors used up).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves connections for ever.
pub async fn serve(node: Arc<Node>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let node = Arc::clone(&node);
                tokio::spawn(async move {
                    if let Err(error) = converse(&node, stream).await {
                        tracing::debug!(%from, %error, "a peer connection broke");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a peer connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn converse(node: &Arc<Node>, mut stream: TcpStream) -> io::Result<()> {
    set_options(&stream)?;
    let hello = timeout(HELLO_TIMEOUT, protocol::read::<Hello>(&mut stream)).await?;
    let Some(hello) = hello? else { return Ok(()) };
    let welcome = greet(node, &hello);
    let refused = welcome.is_err();
    protocol::write(&mut stream, &Reply::from(welcome)).await?;
    if refused {
        return Ok(());
    }
    while let Some(request) = protocol::read::<PeerRequest>(&mut stream).await? {
        tracing::trace!(from = hello.node, ?request, "peer");
        match request {
            PeerRequest::Watch { prefix, after } => return watch(node, stream, &prefix, after).await,
            PeerRequest::Attach { id, from_offset, follow, input } => {
                let request = attach::Request { id, from_offset, follow, input };
                return serve_attach(node, stream, request).await;
            }
            PeerRequest::Capture { id, number, snap_length } => {
                let request = capture::Request { id, number, snap_length };
                return serve_capture(node, stream, request).await;
            }
            PeerRequest::Move { id, node: to, sockets } => return serve_move(node, stream, &id, &to, sockets).await,
            PeerRequest::Line { id, from, epoch } => return home::serve_line(node, stream, &id, from, epoch).await,
            PeerRequest::MoveOffer(offer) => return moves::take(node, stream, *offer).await,
            other => answer(node, &mut stream, other).await?,
        }
    }
    Ok(())
}

fn greet(node: &Node, hello: &Hello) -> Result<Welcome, ApiError> {
    if hello.magic != MAGIC {
        return Err(ApiError::new(ErrorKind::Invalid, "this is the peer port of a migd daemon"));
    }
    if hello.protocol != PROTOCOL {
        let message = format!("node {} speaks protocol {PROTOCOL}, not {}", node.name, hello.protocol);
        return Err(ApiError::new(ErrorKind::Conflict, message).hint("run the same version of migd on all nodes"));
    }
    let own = node.cluster_id();
    if let (Some(own), Some(theirs)) = (&own, &hello.cluster)
        && own != theirs
    {
        let message = format!("node {} belongs to cluster {own}, node {} to cluster {theirs}", node.name, hello.node);
        return Err(ApiError::new(ErrorKind::Conflict, message)
            .hint("a node that is to change its cluster needs an empty state directory"));
    }
    Ok(Welcome {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").into(),
        cluster: own,
        node: node.name.clone(),
        directory: node.directory_address(),
        etcd: match node.place() {
            Some(Place::Etcd(etcd)) => Some(etcd.place().clone()),
            _ => None,
        },
    })
}

async fn reply<T: Serialize>(stream: &mut TcpStream, result: Result<T, ApiError>) -> io::Result<()> {
    protocol::write(stream, &Reply::from(result)).await
}

/// Requests with one answer, after which the next may come.
async fn answer(node: &Arc<Node>, stream: &mut TcpStream, request: PeerRequest) -> io::Result<()> {
    match request {
        PeerRequest::Ping => {
            let pong = Pong { node: node.name.clone(), version: env!("CARGO_PKG_VERSION").into() };
            reply(stream, Ok(pong)).await
        }
        PeerRequest::Directory(request) => {
            let answer = match node.place() {
                Some(Place::Local(engine)) => directory::serve(&engine, request).await,
                _ => Err(not_served(node)),
            };
            protocol::write(stream, &answer).await
        }
        PeerRequest::MigrateDirectory { to } => reply(stream, migrate::migrate_here(node, &to).await).await,
        PeerRequest::Run(mut request) => {
            // Asked for by another node, so it is this one that was meant.
            request.node = None;
            reply(stream, launch::run(node, request).await).await
        }
        PeerRequest::LocalJobs => reply(stream, Ok(locate::local_views(node).await)).await,
        PeerRequest::Inspect { id } => reply(stream, control::inspect_here(node, &id).await).await,
        PeerRequest::Sockets { id } => reply(stream, control::sockets_here(node, &id).await).await,
        PeerRequest::Kill { id, signal } => {
            let result = match control::here(node, &id) {
                Ok(job) => control::kill_here(&job, signal).await,
                Err(error) => Err(error),
            };
            reply(stream, result).await
        }
        PeerRequest::Remove { id } => reply(stream, control::remove_here(node, &id)).await,
        PeerRequest::TailOffset { id, lines } => {
            let result = control::here(node, &id).and_then(|job| attach::tail_offset(&job, lines));
            reply(stream, result).await
        }
        PeerRequest::Watch { .. }
        | PeerRequest::Attach { .. }
        | PeerRequest::Capture { .. }
        | PeerRequest::Move { .. }
        | PeerRequest::Line { .. }
        | PeerRequest::MoveOffer(_) => unreachable!("these end the connection and are dispatched before"),
    }
}

fn not_served(node: &Node) -> DirectoryError {
    match node.place() {
        Some(Place::Etcd(etcd)) => DirectoryError::Moved(etcd.place().to_string()),
        _ => DirectoryError::Unreachable(format!("node {} does not serve the directory", node.name)),
    }
}

async fn watch(node: &Node, mut stream: TcpStream, prefix: &str, after: u64) -> io::Result<()> {
    let watch = match node.place() {
        Some(Place::Local(engine)) => engine.watch(prefix, after).await,
        _ => Err(not_served(node)),
    };
    let mut watch = match watch {
        Ok(watch) => watch,
        Err(error) => return protocol::write(&mut stream, &Err::<(), _>(error)).await,
    };
    protocol::write(&mut stream, &Ok::<(), DirectoryError>(())).await?;
    let (mut read_half, mut write_half) = stream.split();
    loop {
        tokio::select! {
            change = watch.next() => match change {
                Some(change) => protocol::write(&mut write_half, &change).await?,
                None => return Ok(()),
            },
            // The other side says nothing more; that it ends is all that can come.
            _ = protocol::read::<()>(&mut read_half) => return Ok(()),
        }
    }
}

async fn serve_attach(node: &Arc<Node>, mut stream: TcpStream, request: attach::Request) -> io::Result<()> {
    match control::here(node, &request.id) {
        Ok(job) => {
            reply(&mut stream, Ok(())).await?;
            attach::serve_peer(stream, attach::local(job, request)).await
        }
        Err(error) => reply::<()>(&mut stream, Err(error)).await,
    }
}

async fn serve_capture(node: &Arc<Node>, mut stream: TcpStream, request: capture::Request) -> io::Result<()> {
    let job = match control::here(node, &request.id) {
        Ok(job) => job,
        Err(error) => return reply::<()>(&mut stream, Err(error)).await,
    };
    reply(&mut stream, Ok(())).await?;
    let mut events = capture::local(job, request);
    while let Some(event) = events.recv().await {
        protocol::write(&mut stream, &event).await?;
    }
    Ok(())
}

async fn serve_move(
    node: &Arc<Node>,
    mut stream: TcpStream,
    id: &str,
    to: &str,
    sockets: SocketPlace,
) -> io::Result<()> {
    let begin = async {
        let job = control::here(node, id)?;
        let found = locate::Located::of_local(&job);
        moves::begin(node, &found, to, sockets).await
    };
    match begin.await {
        Ok(mut events) => {
            reply(&mut stream, Ok(())).await?;
            while let Some(event) = events.recv().await {
                protocol::write(&mut stream, &event).await?;
            }
            Ok(())
        }
        Err(error) => reply::<()>(&mut stream, Err(error)).await,
    }
}
