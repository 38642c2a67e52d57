//! Asking a daemon, as the command line, the lab and the shims do.

use std::io;
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::connection::Connection;
use super::daemon_types::{DaemonRequest, Reply};
use super::types::ApiError;

/// Why a daemon (or a shim) did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody serves the socket.
    #[error("nobody answers at {path}")]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// What connect(2) said.
        source: io::Error,
    },
    /// The connection broke before the answer.
    #[error("the connection to {path} broke")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// It answered with a refusal.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// A control socket and what can be asked there. Also serves for a shim's socket with [`Client::ask_with`].
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// The daemon (or shim) that serves the socket at `path`. Connects only when something is asked.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Asks, and returns the one answer. `R` is what the request's documentation says.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn ask<R: DeserializeOwned>(&self, request: &DaemonRequest) -> Result<R, ClientError> {
        Ok(self.open(request).await?.0)
    }

    /// Asks something that is answered by a stream: the accepting answer, and the connection on which the events follow.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn open<R: DeserializeOwned>(&self, request: &DaemonRequest) -> Result<(R, Connection), ClientError> {
        self.ask_with(request).await
    }

    /// As [`Client::open`] with any request type.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn ask_with<Q: Serialize, R: DeserializeOwned>(
        &self,
        request: &Q,
    ) -> Result<(R, Connection), ClientError> {
        let mut connection = self.connect().await?;
        connection.send(request).await.map_err(|source| self.broken(source))?;
        let reply = connection.receive::<Reply<R>>().await.map_err(|source| self.broken(source))?;
        match reply {
            Some(reply) => Ok((Result::from(reply)?, connection)),
            None => Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// A bare connection.
    ///
    /// # Errors
    /// [`ClientError::NotRunning`].
    pub async fn connect(&self) -> Result<Connection, ClientError> {
        let not_running = |source| ClientError::NotRunning { path: self.path.clone(), source };
        Connection::connect(&self.path).await.map_err(not_running)
    }

    /// An error of the connection with its socket named.
    pub fn broken(&self, source: io::Error) -> ClientError {
        ClientError::Broken { path: self.path.clone(), source }
    }
}
