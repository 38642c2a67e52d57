//! Watches that outlive the member they began at.

use etcd_client::{EventType, GetOptions, WatchOptions, WatchStream};
use serde_bytes::ByteBuf;
use tokio::sync::mpsc;

use super::{ATTEMPT, Etcd, Failure, Member, PAUSE, Place, kv, unsigned};
use crate::directory::{Change, DirectoryError, Revision, Watch};

/// What a watch needs to go on by itself.
struct Watcher {
    place: Place,
    clients: Vec<etcd_client::Client>,
    /// Which of them is asked next.
    turn: usize,
    prefix: Vec<u8>,
    /// Every change up to this one was reported.
    seen: Revision,
    sender: mpsc::UnboundedSender<Change>,
}

/// How a stream of changes ended.
enum End {
    /// Nobody listens any more.
    Unwanted,
    /// The member went away, or its connection did.
    Broken,
    /// What was to come next is no longer kept.
    Compacted,
}

impl Etcd {
    pub(super) async fn watch_from(&self, prefix: &str, after: Revision) -> Result<Watch, DirectoryError> {
        self.refuse_compacted(after).await?;
        let prefix = self.place.key(prefix);
        // Established here, so that a caller learns when there is nobody to watch at.
        let stream = {
            let prefix = prefix.clone();
            self.ask(false, move |member: &Member| open(member.client.clone(), prefix.clone(), after)).await?
        };
        let (sender, receiver) = mpsc::unbounded_channel();
        let watcher = Watcher {
            place: self.place.clone(),
            clients: self.members.iter().map(|member| member.client.clone()).collect(),
            turn: self.preferred.load(std::sync::atomic::Ordering::Relaxed),
            prefix,
            seen: after,
            sender,
        };
        tokio::spawn(watcher.run(stream));
        Ok(Watch(receiver))
    }

    /// A watch that begins at a revision etcd no longer has would be cancelled only after it was made.
    async fn refuse_compacted(&self, after: Revision) -> Result<(), DirectoryError> {
        // Revision 1 is that of an empty etcd.
        let revision = i64::try_from(after.max(1)).unwrap_or(i64::MAX);
        let key = self.place.key("");
        let asked = self
            .ask(false, move |member| {
                let options = GetOptions::new().with_revision(revision).with_count_only();
                let (key, mut kv) = (key.clone(), kv(member));
                async move { kv.get(key, Some(options)).await }
            })
            .await;
        match asked {
            Err(DirectoryError::Compacted(_)) => Err(DirectoryError::Compacted(after)),
            // One from the future: nothing of it is lost.
            Ok(_) | Err(DirectoryError::Invalid(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Begins a watch and waits until the member confirms it.
async fn open(
    mut client: etcd_client::Client,
    prefix: Vec<u8>,
    after: Revision,
) -> Result<WatchStream, etcd_client::Error> {
    let start = i64::try_from(after.saturating_add(1)).unwrap_or(i64::MAX);
    let options = WatchOptions::new().with_prefix().with_start_revision(start).with_progress_notify();
    let mut stream = client.watch(prefix, Some(options)).await?;
    match stream.message().await? {
        Some(message) if message.created() && !message.canceled() => Ok(stream),
        _ => Err(etcd_client::Error::WatchError("the member did not begin the watch".to_owned())),
    }
}

impl Watcher {
    async fn run(mut self, mut stream: WatchStream) {
        loop {
            match self.pass_on(stream).await {
                End::Unwanted => return,
                // The receiver sees the end, watches again from what it saw last, and is told.
                End::Compacted => return,
                End::Broken => {}
            }
            match self.again().await {
                Some(next) => stream = next,
                None => return,
            }
        }
    }

    async fn pass_on(&mut self, mut stream: WatchStream) -> End {
        loop {
            let message = tokio::select! {
                message = stream.message() => message,
                () = self.sender.closed() => return End::Unwanted,
            };
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) | Err(_) => return End::Broken,
            };
            if message.compact_revision() != 0 {
                return End::Compacted;
            }
            if message.canceled() {
                return End::Broken;
            }
            // All changes of one revision are in one message, so that `seen` is never in the middle of one.
            let mut newest = self.seen;
            for event in message.events() {
                let Some(entry) = event.kv() else { continue };
                let revision = unsigned(entry.mod_revision());
                // A foreign key can't be under the prefix; and what was seen is not told again.
                let (Ok(key), true) = (self.place.strip(entry.key()), revision > self.seen) else { continue };
                let value = (event.event_type() == EventType::Put).then(|| ByteBuf::from(entry.value().to_vec()));
                newest = newest.max(revision);
                if self.sender.send(Change { revision, key, value }).is_err() {
                    return End::Unwanted;
                }
            }
            if message.events().is_empty() && !message.created() {
                // A sign of progress: nothing was missed up to here.
                newest = newest.max(message.header().map_or(0, |header| unsigned(header.revision())));
            }
            self.seen = newest;
        }
    }

    /// Begins again at the next member, for as long as somebody listens.
    async fn again(&mut self) -> Option<WatchStream> {
        loop {
            self.turn = (self.turn + 1) % self.clients.len().max(1);
            let client = self.clients.get(self.turn)?.clone();
            let begun = tokio::select! {
                begun = tokio::time::timeout(ATTEMPT, open(client, self.prefix.clone(), self.seen)) => begun,
                () = self.sender.closed() => return None,
            };
            match begun {
                Ok(Ok(stream)) => return Some(stream),
                Ok(Err(error)) if matches!(Failure::of(&error), Failure::Final(_)) => return None,
                Ok(Err(_)) | Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }
}
