//! The directory seen from any node: served by this daemon, or asked for over the peer connection of the one that serves it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cluster_addr::Embedded;
use cluster_addr::directory::{
    Change, Directory, DirectoryError, Listing, Outcome, Reply, Revision, Transaction, Versioned, Watch,
};
use tokio::sync::mpsc;

use super::peer::protocol::{self, DirectoryAnswer, DirectoryReply, DirectoryRequest, PeerRequest};
use super::peer::{PeerError, Peers};

/// How long the directory may take to answer.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Where the directory is.
#[derive(Debug, Clone)]
pub enum Place {
    /// Here.
    Local(Arc<Embedded>),
    /// At that daemon.
    Remote(SocketAddr),
}

/// A directory served by another daemon.
#[derive(Debug)]
pub struct Remote {
    /// That daemon.
    pub server: SocketAddr,
    /// Connections to it.
    pub peers: Arc<Peers>,
}

impl Remote {
    async fn ask(&self, request: DirectoryRequest) -> Result<DirectoryAnswer, DirectoryError> {
        let request = PeerRequest::Directory(request);
        self.peers.exchange::<DirectoryReply>(self.server, &request, TIMEOUT).await.map_err(convert)?
    }
}

fn convert(error: PeerError) -> DirectoryError {
    match error {
        PeerError::NoAnswer { .. } => DirectoryError::Unknown(error.to_string()),
        PeerError::Unreachable { .. } | PeerError::Api(_) => DirectoryError::Unreachable(error.to_string()),
    }
}

fn mixed_up<T>() -> Result<T, DirectoryError> {
    Err(DirectoryError::Unknown("the directory answered something else than was asked".into()))
}

impl Directory for Remote {
    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<Versioned>> {
        Box::pin(async move {
            match self.ask(DirectoryRequest::Get(key.to_owned())).await? {
                DirectoryAnswer::Get(found) => Ok(found),
                _ => mixed_up(),
            }
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, Listing> {
        Box::pin(async move {
            match self.ask(DirectoryRequest::List(prefix.to_owned())).await? {
                DirectoryAnswer::List(listing) => Ok(listing),
                _ => mixed_up(),
            }
        })
    }

    fn transact<'a>(&'a self, transaction: &'a Transaction) -> Reply<'a, Outcome> {
        Box::pin(async move {
            match self.ask(DirectoryRequest::Transact(transaction.clone())).await? {
                DirectoryAnswer::Transact(outcome) => Ok(outcome),
                _ => mixed_up(),
            }
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> Reply<'a, Watch> {
        Box::pin(async move {
            let mut connection = self.peers.connect(self.server).await.map_err(convert)?;
            let request = PeerRequest::Watch { prefix: prefix.to_owned(), after };
            let accepted = connection.exchange::<Result<(), DirectoryError>>(&request);
            match tokio::time::timeout(TIMEOUT, accepted).await {
                Ok(Ok(accepted)) => accepted?,
                Ok(Err(error)) => return Err(DirectoryError::Unreachable(error.to_string())),
                Err(_) => return Err(DirectoryError::Unreachable("no answer".into())),
            }
            let (sender, receiver) = mpsc::unbounded_channel();
            tokio::spawn(async move {
                let mut stream = connection.stream;
                loop {
                    let change = tokio::select! {
                        change = protocol::read::<Change>(&mut stream) => change,
                        () = sender.closed() => return,
                    };
                    // At its end the watch ends too; whoever watches takes it up again.
                    let Ok(Some(change)) = change else { return };
                    if sender.send(change).is_err() {
                        return;
                    }
                }
            });
            Ok(Watch(receiver))
        })
    }
}

/// Carries out a request from another daemon.
pub async fn serve(engine: &Embedded, request: DirectoryRequest) -> DirectoryReply {
    match request {
        DirectoryRequest::Get(key) => engine.get(&key).await.map(DirectoryAnswer::Get),
        DirectoryRequest::List(prefix) => engine.list(&prefix).await.map(DirectoryAnswer::List),
        DirectoryRequest::Transact(transaction) => engine.transact(&transaction).await.map(DirectoryAnswer::Transact),
    }
}
