//! The directory: keys, values, transactions, watches.
//!
//! An engine promises: transactions are linearizable; a revision grows by one with every transaction that writes; a
//! watch reports every change after its starting revision, in order and without gaps, or fails with
//! [`DirectoryError::Compacted`], after which the caller lists again.

use std::{future::Future, pin::Pin};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// Number of a change, cluster-wide, growing. 0 is "before the first change".
pub type Revision = u64;

/// What an engine returns: a boxed future, so that engines can be chosen at run time.
pub type Reply<'a, T> = Pin<Box<dyn Future<Output = Result<T, DirectoryError>> + Send + 'a>>;

/// Longest key in bytes.
pub const KEY_MAX: usize = 512;

/// Longest value in bytes.
pub const VALUE_MAX: usize = 64 * 1024;

/// Most conditions, and most writes, of one transaction.
pub const TRANSACTION_MAX: usize = 128;

/// Most bytes of keys and values of one transaction.
pub const TRANSACTION_BYTES_MAX: usize = 1 << 20;

/// A value with the revision that wrote it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versioned {
    /// The bytes stored.
    #[serde(with = "serde_bytes")]
    pub value: Vec<u8>,
    /// Revision of the transaction that wrote them.
    pub revision: Revision,
}

/// A key and what is stored under it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Its value.
    pub versioned: Versioned,
}

/// All entries under a prefix, and the revision they were read at (where a watch continues).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// Entries in order of key.
    pub entries: Vec<Entry>,
    /// Revision of the newest change that the listing contains.
    pub revision: Revision,
}

/// What a transaction requires of a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Expect {
    /// Nothing is stored under it.
    Absent,
    /// It was last written at this revision.
    Revision(Revision),
    /// Exactly these bytes are stored under it, whenever they were written.
    Value(serde_bytes::ByteBuf),
}

impl Expect {
    /// [`Expect::Value`] of these bytes.
    #[must_use]
    pub fn value(bytes: Vec<u8>) -> Self {
        Self::Value(serde_bytes::ByteBuf::from(bytes))
    }

    /// Whether it holds for what is stored.
    #[must_use]
    pub fn holds(&self, found: Option<&Versioned>) -> bool {
        match (self, found) {
            (Self::Absent, None) => true,
            (Self::Revision(wanted), Some(found)) => found.revision == *wanted,
            (Self::Value(wanted), Some(found)) => found.value == **wanted,
            _ => false,
        }
    }
}

/// Conditions, and the writes that happen only if all of them hold.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Transaction {
    /// All must hold.
    pub conditions: Vec<(String, Expect)>,
    /// Done together: a value to store, or `None` to delete.
    pub writes: Vec<(String, Option<serde_bytes::ByteBuf>)>,
}

impl Transaction {
    /// Adds a condition.
    #[must_use]
    pub fn expect(mut self, key: impl Into<String>, expect: Expect) -> Self {
        self.conditions.push((key.into(), expect));
        self
    }

    /// Adds a write.
    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: Vec<u8>) -> Self {
        self.writes.push((key.into(), Some(serde_bytes::ByteBuf::from(value))));
        self
    }

    /// Adds a deletion.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.writes.push((key.into(), None));
        self
    }
}

impl Transaction {
    /// Whether it keeps the bounds of the interface; engines ask before anything else.
    ///
    /// # Errors
    /// [`DirectoryError::Invalid`].
    pub fn check(&self) -> Result<(), DirectoryError> {
        let invalid = |text: String| Err(DirectoryError::Invalid(text));
        let Self { conditions, writes } = self;
        if conditions.len() > TRANSACTION_MAX || writes.len() > TRANSACTION_MAX {
            return invalid(format!("more than {TRANSACTION_MAX} conditions or writes"));
        }
        let mut bytes = 0;
        for key in conditions.iter().map(|(key, _)| key).chain(writes.iter().map(|(key, _)| key)) {
            bytes += key.len();
            if key.is_empty() || key.len() > KEY_MAX {
                return invalid(format!("a key has 1 to {KEY_MAX} bytes, this one {}", key.len()));
            }
        }
        let expected = conditions.iter().filter_map(|(key, expect)| match expect {
            Expect::Value(value) => Some((key, value)),
            Expect::Absent | Expect::Revision(_) => None,
        });
        let written = writes.iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
        for (key, value) in expected.chain(written) {
            bytes += value.len();
            if value.len() > VALUE_MAX {
                return invalid(format!("the value for {key} is longer than {VALUE_MAX} bytes"));
            }
        }
        if bytes > TRANSACTION_BYTES_MAX {
            return invalid(format!("{bytes} bytes are more than {TRANSACTION_BYTES_MAX}"));
        }
        let mut keys: Vec<_> = writes.iter().map(|(key, _)| key).collect();
        keys.sort_unstable();
        match keys.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => invalid(format!("{} is written twice", pair[0])),
            None => Ok(()),
        }
    }
}

/// How a transaction ended. Both answers are final.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// All conditions held and the writes are durable.
    Done(Revision),
    /// A condition did not hold; nothing was written. The key, and what is there.
    Conflict {
        /// The first key whose condition failed.
        key: String,
        /// What is stored under it.
        found: Option<Versioned>,
    },
}

/// One change that a watch reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Revision of the change.
    pub revision: Revision,
    /// The key changed.
    pub key: String,
    /// Its new value; `None` after a deletion.
    pub value: Option<serde_bytes::ByteBuf>,
}

/// A running watch: changes in order of revision. Ends (yields `None`) when the engine goes away; the caller then
/// watches again from the last revision it saw.
#[derive(Debug)]
pub struct Watch(pub mpsc::UnboundedReceiver<Change>);

impl Watch {
    /// The next change.
    pub async fn next(&mut self) -> Option<Change> {
        self.0.recv().await
    }
}

/// Why the directory could not answer.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum DirectoryError {
    /// Nothing was reached, nothing was done.
    #[error("the directory can't be reached: {0}")]
    Unreachable(String),
    /// The request was sent and no answer came, or one that leaves it open: it may or may not have been done. Ask again by reading.
    #[error("the directory did not confirm the change, which may or may not have been made: {0}")]
    Unknown(String),
    /// The engine's storage failed; nothing was done.
    #[error("the directory's storage failed: {0}")]
    Storage(String),
    /// The changes asked for are no longer kept: list and watch from there.
    #[error("changes before revision {0} are no longer kept")]
    Compacted(Revision),
    /// The directory is served elsewhere now, for ever; nothing was done. Where, as [`crate::etcd::Place`] reads it.
    #[error("the directory has moved to {0}")]
    Moved(String),
    /// The request breaks a bound of the interface.
    #[error("bad directory request: {0}")]
    Invalid(String),
}

/// The one authority on who owns what. See the module's promises.
pub trait Directory: Send + Sync + 'static {
    /// The value under a key.
    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<Versioned>>;

    /// Everything under a prefix.
    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, Listing>;

    /// Checks the conditions and writes, as one step.
    fn transact<'a>(&'a self, transaction: &'a Transaction) -> Reply<'a, Outcome>;

    /// Reports changes under a prefix that come after a revision.
    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> Reply<'a, Watch>;
}
