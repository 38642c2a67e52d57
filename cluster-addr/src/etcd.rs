//! The etcd engine, for clusters that outgrow one node's file or have an etcd already.
//!
//! A transaction is one etcd transaction, its revisions are etcd's own, reads are linearizable, and a watch is resumed at
//! another member from the last change it reported. A request goes to one member at a time, the one that answered last.
//! What certainly did not reach a member is sent to the next; a change of which that isn't certain is
//! [`DirectoryError::Unknown`] and never sent twice.
//!
//! This is the one part of the crate that needs an async runtime, tokio's: the protocol is gRPC, and `etcd-client` speaks it
//! with tonic. It stays behind the trait's boxed futures, so that nothing else here knows of it, and behind the feature
//! `etcd`, so that the rest can be had without.
//!
//! Left out on purpose: compaction, which is the operator's choice (`--auto-compaction-retention`); a watch or a listing
//! overtaken by it says so or starts again. Each record lives until somebody removes it: etcd's leases would remove those of
//! a node that merely can't reach the directory while its jobs run.

mod failure;
mod place;
mod watching;

use std::{
    future::Future,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, GetOptions, KeyValue, KvClient, Txn, TxnOp, TxnOpResponse,
};

use crate::directory::{
    Directory, DirectoryError, Entry, Expect, Listing, Outcome, Reply, Revision, Transaction, Versioned, Watch,
};
use failure::Failure;

pub use place::Place;

/// How long one member may take to answer before the next is asked.
const ATTEMPT: Duration = Duration::from_millis(1500);
/// How long all of them together may take.
const TIMEOUT: Duration = Duration::from_secs(4);
/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_millis(1000);
/// A member that says nothing for so long is asked for a sign of life (etcd refuses less than 5 s)...
const KEEP_ALIVE: Duration = Duration::from_secs(6);
/// ...and is given up after so long.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause before all members are tried once more.
const PAUSE: Duration = Duration::from_millis(50);
/// Entries of one page of a listing.
const PAGE: i64 = 512;
/// Longest message that is accepted: a page of the longest entries.
const MESSAGE_MAX: usize = 64 << 20;

/// The engine.
pub struct Etcd {
    place: Place,
    members: Vec<Member>,
    /// The member that answered last.
    preferred: AtomicUsize,
}

struct Member {
    endpoint: String,
    client: Client,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Etcd").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Etcd {
    /// Prepares connections to all members; none is made before it is needed. To be called in a tokio runtime, which the
    /// engine keeps using.
    ///
    /// # Errors
    /// [`DirectoryError::Invalid`] when an endpoint is none.
    pub async fn connect(place: Place) -> Result<Self, DirectoryError> {
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(KEEP_ALIVE, KEEP_ALIVE_TIMEOUT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        let mut members = Vec::new();
        for endpoint in place.endpoints() {
            let client = Client::connect([endpoint], Some(options.clone())).await;
            let client = client.map_err(|error| DirectoryError::Invalid(format!("{endpoint}: {error}")))?;
            members.push(Member { endpoint: endpoint.clone(), client });
        }
        Ok(Self { place, members, preferred: AtomicUsize::new(0) })
    }

    /// Where it is.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Asks the members one after the other, beginning with the one that answered last, until one does.
    ///
    /// `once`: what may have been done must not be asked for again.
    async fn ask<'a, T, F>(&'a self, once: bool, request: impl Fn(&'a Member) -> F) -> Result<T, DirectoryError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let deadline = tokio::time::Instant::now() + TIMEOUT;
        let mut last = String::from("no member was asked");
        loop {
            let first = self.preferred.load(Ordering::Relaxed);
            for turn in 0..self.members.len() {
                let index = (first + turn) % self.members.len();
                let Some(member) = self.members.get(index) else { continue };
                let failure = match tokio::time::timeout(ATTEMPT, request(member)).await {
                    Ok(Ok(answer)) => {
                        self.preferred.store(index, Ordering::Relaxed);
                        return Ok(answer);
                    }
                    Ok(Err(error)) => Failure::of(&error),
                    Err(_) => Failure::Unclear(format!("no answer within {} ms", ATTEMPT.as_millis())),
                };
                match failure {
                    Failure::Final(error) => return Err(error),
                    Failure::Unclear(reason) if once => {
                        // Not again the member that failed.
                        self.preferred.store(index + 1, Ordering::Relaxed);
                        return Err(DirectoryError::Unknown(format!("{}: {reason}", member.endpoint)));
                    }
                    Failure::Unclear(reason) | Failure::NotDone(reason) => {
                        last = format!("{}: {reason}", member.endpoint);
                    }
                }
            }
            if tokio::time::Instant::now() + PAUSE >= deadline {
                return Err(DirectoryError::Unreachable(last));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn list_page(
        &self,
        from: Vec<u8>,
        end: Vec<u8>,
        revision: i64,
    ) -> Result<etcd_client::GetResponse, DirectoryError> {
        let options = GetOptions::new().with_range(end).with_limit(PAGE).with_revision(revision);
        self.ask(false, move |member| {
            let (from, options) = (from.clone(), options.clone());
            let mut kv = kv(member);
            async move { kv.get(from, Some(options)).await }
        })
        .await
    }

    async fn list_all(&self, prefix: &str) -> Result<Listing, DirectoryError> {
        let first = self.place.key(prefix);
        let end = place::end_of_prefix(&first);
        let mut from = first.clone();
        let mut entries = Vec::new();
        // Of which moment: that of the first page.
        let mut revision = 0;
        loop {
            let page = match self.list_page(from.clone(), end.clone(), revision).await {
                // A compaction has overtaken the listing: it begins anew.
                Err(DirectoryError::Compacted(_)) if revision != 0 => {
                    (from, revision) = (first.clone(), 0);
                    entries.clear();
                    continue;
                }
                other => other?,
            };
            if revision == 0 {
                revision = page.header().map_or(0, etcd_client::ResponseHeader::revision);
            }
            for entry in page.kvs() {
                entries.push(Entry { key: self.place.strip(entry.key())?, versioned: versioned(entry) });
            }
            match page.kvs().last() {
                Some(last) if page.more() => {
                    from = last.key().to_vec();
                    from.push(0);
                }
                _ => return Ok(Listing { entries, revision: unsigned(revision) }),
            }
        }
    }

    async fn transact_once(&self, transaction: &Transaction) -> Result<Outcome, DirectoryError> {
        transaction.check()?;
        let Transaction { conditions, writes } = transaction;
        let key = |key: &String| self.place.key(key);
        let compare = |(name, expect): &(String, Expect)| match expect {
            Expect::Absent => Compare::create_revision(key(name), CompareOp::Equal, 0),
            // A revision beyond etcd's numbers was never given out.
            Expect::Revision(revision) => {
                let revision = i64::try_from(*revision).unwrap_or(i64::MAX);
                Compare::mod_revision(key(name), CompareOp::Equal, revision)
            }
            Expect::Value(value) => Compare::value(key(name), CompareOp::Equal, value.to_vec()),
        };
        let write = |(name, value): &(String, Option<serde_bytes::ByteBuf>)| match value {
            Some(value) => TxnOp::put(key(name), value.to_vec(), None),
            None => TxnOp::delete(key(name), None),
        };
        let txn = Txn::new()
            .when(conditions.iter().map(compare).collect::<Vec<_>>())
            .and_then(writes.iter().map(write).collect::<Vec<_>>())
            .or_else(conditions.iter().map(|(name, _)| TxnOp::get(key(name), None)).collect::<Vec<_>>());
        let response = self
            .ask(!writes.is_empty(), move |member| {
                let (txn, mut kv) = (txn.clone(), kv(member));
                async move { kv.txn(txn).await }
            })
            .await?;
        if response.succeeded() {
            return Ok(Outcome::Done(unsigned(response.header().map_or(0, etcd_client::ResponseHeader::revision))));
        }
        for ((key, expect), there) in conditions.iter().zip(response.op_responses()) {
            let TxnOpResponse::Get(there) = there else { continue };
            let found = there.kvs().first().map(versioned);
            if !expect.holds(found.as_ref()) {
                return Ok(Outcome::Conflict { key: key.clone(), found });
            }
        }
        Err(DirectoryError::Storage("etcd refused a transaction all of whose conditions hold".to_owned()))
    }
}

/// A client for one request.
fn kv(member: &Member) -> KvClient {
    member.client.kv_client().max_decoding_message_size(MESSAGE_MAX)
}

fn versioned(entry: &KeyValue) -> Versioned {
    Versioned { value: entry.value().to_vec(), revision: unsigned(entry.mod_revision()) }
}

/// etcd's revisions are never negative.
fn unsigned(revision: i64) -> Revision {
    Revision::try_from(revision).unwrap_or(0)
}

impl Directory for Etcd {
    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<Versioned>> {
        Box::pin(async move {
            let key = self.place.key(key);
            let response = self
                .ask(false, move |member| {
                    let (key, mut kv) = (key.clone(), kv(member));
                    async move { kv.get(key, None).await }
                })
                .await?;
            Ok(response.kvs().first().map(versioned))
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, Listing> {
        Box::pin(self.list_all(prefix))
    }

    fn transact<'a>(&'a self, transaction: &'a Transaction) -> Reply<'a, Outcome> {
        Box::pin(self.transact_once(transaction))
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> Reply<'a, Watch> {
        Box::pin(self.watch_from(prefix, after))
    }
}
