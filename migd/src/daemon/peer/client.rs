//! Asking other daemons.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::protocol::{self, Hello, MAGIC, PROTOCOL, PeerRequest, Welcome};
use crate::api::{ApiError, ErrorKind, Reply};

/// How long a connection may take to be made, hello included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long an ordinary answer may take.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an answer may take that starts a job.
pub const LAUNCH_TIMEOUT: Duration = Duration::from_secs(40);
/// Connections kept for the next request, to each peer.
const IDLE_MAX: usize = 4;

/// Why another daemon did not answer.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Nothing was asked.
    #[error("{peer} can't be reached: {reason}")]
    Unreachable {
        /// Where.
        peer: SocketAddr,
        /// What was seen.
        reason: String,
    },
    /// The question was sent and no answer came.
    #[error("{peer} did not answer: {reason}")]
    NoAnswer {
        /// Where.
        peer: SocketAddr,
        /// What was seen.
        reason: String,
    },
    /// It answered with a refusal.
    #[error(transparent)]
    Api(#[from] ApiError),
}

impl From<PeerError> for ApiError {
    fn from(error: PeerError) -> Self {
        match error {
            PeerError::Api(error) => error,
            other => ApiError::new(ErrorKind::Unavailable, other.to_string())
                .hint("is its daemon running? Jobs there run on without it"),
        }
    }
}

/// A connection to another daemon after the hello.
#[derive(Debug)]
pub struct PeerConnection {
    /// The stream; nothing of it has been read ahead.
    pub stream: TcpStream,
    /// What the other side said of itself.
    pub welcome: Welcome,
    peer: SocketAddr,
}

/// Makes and keeps connections to other daemons.
#[derive(Debug)]
pub struct Peers {
    node: String,
    cluster: OnceLock<String>,
    idle: Mutex<HashMap<SocketAddr, Vec<PeerConnection>>>,
}

impl Peers {
    /// For the daemon of this node.
    pub fn new(node: &str) -> Self {
        Self { node: node.to_owned(), cluster: OnceLock::new(), idle: Mutex::default() }
    }

    /// Sets the cluster that hellos name from now on. Only the first call counts.
    pub fn set_cluster(&self, id: &str) {
        // A second call has the same value: a daemon never changes its cluster.
        let _ = self.cluster.set(id.to_owned());
    }

    /// A new connection, for a stream or to be given away.
    ///
    /// # Errors
    /// [`PeerError::Unreachable`]; [`PeerError::Api`] when the other side refuses this node.
    pub async fn connect(&self, peer: SocketAddr) -> Result<PeerConnection, PeerError> {
        let unreachable = |reason: String| PeerError::Unreachable { peer, reason };
        let greet = async {
            let mut stream = TcpStream::connect(peer).await?;
            set_options(&stream)?;
            let hello = Hello {
                magic: MAGIC.into(),
                protocol: PROTOCOL,
                cluster: self.cluster.get().cloned(),
                node: self.node.clone(),
            };
            protocol::write(&mut stream, &hello).await?;
            let reply = protocol::read::<Reply<Welcome>>(&mut stream).await?;
            Ok::<_, io::Error>((stream, reply.ok_or(io::ErrorKind::UnexpectedEof)?))
        };
        let (stream, reply) = match timeout(CONNECT_TIMEOUT, greet).await {
            Ok(Ok(greeted)) => greeted,
            Ok(Err(error)) => return Err(unreachable(error.to_string())),
            Err(_) => return Err(unreachable(format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()))),
        };
        let welcome = Result::from(reply)?;
        Ok(PeerConnection { stream, welcome, peer })
    }

    /// Asks, with an ordinary answer.
    ///
    /// # Errors
    /// See [`PeerError`].
    pub async fn ask<R: DeserializeOwned>(&self, peer: SocketAddr, request: &PeerRequest) -> Result<R, PeerError> {
        self.ask_within(peer, request, ANSWER_TIMEOUT).await
    }

    /// Asks, with an ordinary answer that may take so long.
    ///
    /// # Errors
    /// See [`PeerError`].
    pub async fn ask_within<R: DeserializeOwned>(
        &self,
        peer: SocketAddr,
        request: &PeerRequest,
        limit: Duration,
    ) -> Result<R, PeerError> {
        let reply: Reply<R> = self.exchange(peer, request, limit).await?;
        Ok(Result::from(reply)?)
    }

    /// Sends a request and reads the one frame that answers it, over a connection kept from before if there is one.
    ///
    /// # Errors
    /// [`PeerError::NoAnswer`] when it may have been carried out.
    pub async fn exchange<A: DeserializeOwned>(
        &self,
        peer: SocketAddr,
        request: &PeerRequest,
        limit: Duration,
    ) -> Result<A, PeerError> {
        let mut connection = match self.take_idle(peer) {
            Some(connection) => connection,
            None => self.connect(peer).await?,
        };
        let answer = match timeout(limit, connection.exchange(request)).await {
            Ok(answer) => answer.map_err(|error| PeerError::NoAnswer { peer, reason: error.to_string() })?,
            Err(_) => {
                return Err(PeerError::NoAnswer { peer, reason: format!("nothing within {} s", limit.as_secs()) });
            }
        };
        self.put_idle(connection);
        Ok(answer)
    }

    fn take_idle(&self, peer: SocketAddr) -> Option<PeerConnection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = idle.get_mut(&peer)?;
        while let Some(connection) = kept.pop() {
            // A connection that has something to say between two requests has ended.
            let quiet = matches!(connection.stream.try_read(&mut [0]), Err(e) if e.kind() == io::ErrorKind::WouldBlock);
            if quiet {
                return Some(connection);
            }
        }
        None
    }

    fn put_idle(&self, connection: PeerConnection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = idle.entry(connection.peer).or_default();
        if kept.len() < IDLE_MAX {
            kept.push(connection);
        }
    }
}

impl PeerConnection {
    /// Sends a request and reads the one frame that answers it.
    ///
    /// # Errors
    /// As the stream's.
    pub async fn exchange<A: DeserializeOwned>(&mut self, request: &PeerRequest) -> io::Result<A> {
        protocol::write(&mut self.stream, request).await?;
        Ok(protocol::read(&mut self.stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?)
    }
}

/// Small messages at once, and silence noticed: reading from a machine that lost its power must end. (No TCP_USER_TIMEOUT: it also
/// ends connections whose reader merely pauses.)
pub fn set_options(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(1))?;
    sockopt::set_tcp_keepcnt(stream, 5)?;
    Ok(())
}
