//! The directory seen from any node: served by this daemon, asked for over the peer connection of the one that serves it, or an
//! etcd. Where it is can change while the daemon runs ([`super::migrate`]): [`Current`] follows it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use cluster_addr::directory::{
    Change, Directory, DirectoryError, Expect, Listing, Outcome, Reply, Revision, Transaction, Versioned, Watch,
};
use cluster_addr::{Embedded, Etcd};
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
    /// In an etcd.
    Etcd(Arc<Etcd>),
}

/// Where the directory is at present.
#[derive(Debug, Default)]
pub struct Location {
    place: RwLock<Option<Place>>,
    /// Whether it has changed since [`Location::take_changed`] was called last.
    changed: AtomicBool,
}

impl Location {
    /// As soon as it is known.
    pub fn get(&self) -> Option<Place> {
        self.place.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets it while joining.
    pub fn set(&self, place: Place) {
        *self.place.write().unwrap_or_else(PoisonError::into_inner) = Some(place);
    }

    /// The directory has moved.
    pub fn change(&self, place: Place) {
        self.set(place);
        self.changed.store(true, Ordering::SeqCst);
    }

    /// Whether the directory has moved, so that what is known of its revisions is worth nothing. Says so once.
    pub fn take_changed(&self) -> bool {
        self.changed.swap(false, Ordering::SeqCst)
    }

    /// Has [`Location::take_changed`] say so again, when what it was to cause failed.
    pub fn put_changed(&self) {
        self.changed.store(true, Ordering::SeqCst);
    }
}

/// The directory, wherever it is. A request that is told that it has moved is made again there.
#[derive(Debug)]
pub struct Current {
    /// Where it is.
    pub location: Arc<Location>,
    /// Connections to other daemons.
    pub peers: Arc<Peers>,
}

impl Current {
    fn engine(&self) -> Result<Arc<dyn Directory>, DirectoryError> {
        match self.location.get() {
            Some(Place::Local(engine)) => Ok(engine),
            Some(Place::Remote(server)) => Ok(Arc::new(Remote { server, peers: Arc::clone(&self.peers) })),
            Some(Place::Etcd(etcd)) => Ok(etcd),
            None => Err(DirectoryError::Unreachable("this node has not joined a cluster yet".into())),
        }
    }

    /// Goes where the directory has moved to.
    async fn go(&self, to: &str) -> Result<(), DirectoryError> {
        let place: cluster_addr::etcd::Place = to.parse().map_err(DirectoryError::Invalid)?;
        if let Some(Place::Etcd(etcd)) = self.location.get()
            && *etcd.place() == place
        {
            return Ok(());
        }
        let etcd = Etcd::connect(place).await?;
        tracing::info!(to, "the directory has moved");
        self.location.change(Place::Etcd(Arc::new(etcd)));
        Ok(())
    }
}

impl Directory for Current {
    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<Versioned>> {
        Box::pin(async move {
            match self.engine()?.get(key).await {
                Err(DirectoryError::Moved(to)) => {
                    self.go(&to).await?;
                    self.engine()?.get(key).await
                }
                other => other,
            }
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, Listing> {
        Box::pin(async move {
            match self.engine()?.list(prefix).await {
                Err(DirectoryError::Moved(to)) => {
                    self.go(&to).await?;
                    self.engine()?.list(prefix).await
                }
                other => other,
            }
        })
    }

    fn transact<'a>(&'a self, transaction: &'a Transaction) -> Reply<'a, Outcome> {
        Box::pin(async move {
            match self.engine()?.transact(transaction).await {
                Err(DirectoryError::Moved(to)) => {
                    self.go(&to).await?;
                    // By a revision of the old engine it would be judged by chance.
                    if transaction.conditions.iter().any(|(_, expect)| matches!(expect, Expect::Revision(_))) {
                        return Err(DirectoryError::Unreachable(format!("it has just moved to {to}; try again")));
                    }
                    self.engine()?.transact(transaction).await
                }
                other => other,
            }
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> Reply<'a, Watch> {
        Box::pin(async move {
            match self.engine()?.watch(prefix, after).await {
                Err(DirectoryError::Moved(to)) => {
                    self.go(&to).await?;
                    // From a revision of the old engine there is nothing to go on from: it has to be listed.
                    Err(DirectoryError::Compacted(after))
                }
                other => other,
            }
        })
    }
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
