//! Bringing together the two ends of a line between a job's home and the node where its process is to be.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use cluster_addr::JobRecord;
use tokio::net::TcpStream;

use super::control;
use super::node::Node;
use super::peer::protocol::{self, PeerRequest};
use crate::api::{ApiError, Connection, ErrorKind, NodeAddress, Reply, ShimRequest, SocketPlace};

/// The node to which the target of a move needs a line: the one with the sockets, unless they travel with the process.
///
/// # Errors
/// When the home is no node of the cluster.
pub async fn line_to(
    node: &Arc<Node>,
    record: &JobRecord,
    sockets: SocketPlace,
) -> Result<Option<NodeAddress>, ApiError> {
    match (&record.home, sockets) {
        (None, SocketPlace::Along) => Ok(None),
        (None, SocketPlace::Home) => Ok(Some(node.address())),
        (Some(home), _) => {
            let home = node.find_node(home).await?;
            Ok(Some(NodeAddress { name: home.name, peer: home.peer, hops: home.hops }))
        }
    }
}

/// Connects to the shim at a job's home. `None` when the home is this node.
///
/// # Errors
/// When the home can't be reached, or does not have the job's sockets.
pub async fn connect(
    node: &Arc<Node>,
    home: Option<&NodeAddress>,
    id: &str,
    epoch: u64,
) -> Result<Option<std::net::TcpStream>, ApiError> {
    let Some(home) = home.filter(|home| home.name != node.name) else { return Ok(None) };
    let failed = |error: io::Error| {
        let message = format!("node {}, where the job's sockets are, can't be reached: {error}", home.name);
        ApiError::new(ErrorKind::Unavailable, message)
    };
    let mut connection = node.peers.connect(home.peer).await?;
    let request = PeerRequest::Line { id: id.to_owned(), from: node.address(), epoch };
    Result::from(connection.exchange::<Reply<()>>(&request).await.map_err(failed)?)?;
    connection.stream.into_std().map(Some).map_err(failed)
}

/// The home's side: the line is handed to the shim, and the answer given when that waits for it.
///
/// # Errors
/// As the stream's.
pub async fn serve_line(
    node: &Arc<Node>,
    mut stream: TcpStream,
    id: &str,
    from: NodeAddress,
    epoch: u64,
) -> io::Result<()> {
    let handed = async {
        let job = control::here(node, id)?;
        let mut shim = Connection::connect(&job.paths.socket()).await.map_err(ApiError::internal)?;
        let request = ShimRequest::Line { from, epoch };
        shim.send_with(&request, &[stream.as_fd()]).await.map_err(ApiError::internal)?;
        let reply = shim.receive::<Reply<()>>().await.map_err(ApiError::internal)?;
        reply.map_or_else(|| Err(ApiError::internal("the job's shim has gone")), Result::from)
    };
    // Nothing is said over the line by either shim before this answer has arrived.
    let answer = handed.await;
    protocol::write(&mut stream, &Reply::from(answer)).await
}
