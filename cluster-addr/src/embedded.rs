//! The embedded engine: one redb file, served by the node that made the cluster.
//!
//! Every transaction is on disk before it is answered. The newest [`HISTORY_MAX`] changes are kept, so that a watch can
//! be taken up again after a broken connection.

use std::{path::Path, sync::Mutex};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use serde_bytes::ByteBuf;
use tokio::sync::mpsc;

use crate::directory::{
    Change, Directory, DirectoryError, Entry, KEY_MAX, Listing, Outcome, Reply, Revision, TRANSACTION_MAX, Transaction,
    VALUE_MAX, Versioned, Watch,
};

/// How many changes are kept for watches that come back.
pub const HISTORY_MAX: u64 = 10_000;

/// Key -> 8 bytes of revision (little-endian) and the value.
const DATA: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("data");
/// (revision, position in its transaction) -> (key, there is a value, value).
const HISTORY: TableDefinition<'_, (u64, u32), (&str, bool, &[u8])> = TableDefinition::new("history");
/// "revision" -> the newest; "compacted" -> the newest change no longer in the history.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

/// The engine. Cheap to share behind an `Arc`; calls block for the time of a disk write.
pub struct Embedded {
    database: Database,
    /// Held over a write and the reports of it, so that every watch sees changes in order and none twice.
    watches: Mutex<Vec<Subscription>>,
}

struct Subscription {
    prefix: String,
    sender: mpsc::UnboundedSender<Change>,
}

impl std::fmt::Debug for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedded").finish_non_exhaustive()
    }
}

impl Embedded {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// [`DirectoryError::Storage`] if it can't be opened, is held by another process or is damaged.
    pub fn open(path: &Path) -> Result<Self, DirectoryError> {
        let database = Database::create(path).map_err(storage)?;
        let write = database.begin_write().map_err(storage)?;
        {
            write.open_table(DATA).map_err(storage)?;
            write.open_table(HISTORY).map_err(storage)?;
            write.open_table(META).map_err(storage)?;
        }
        write.commit().map_err(storage)?;
        Ok(Self { database, watches: Mutex::new(Vec::new()) })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Subscription>> {
        // A panic while the lock was held leaves only a list of senders, which is sound at every moment.
        self.watches.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn read(&self, key: &str) -> Result<Option<Versioned>, DirectoryError> {
        let read = self.database.begin_read().map_err(storage)?;
        let data = read.open_table(DATA).map_err(storage)?;
        data.get(key).map_err(storage)?.map(|stored| unpack(stored.value())).transpose()
    }

    fn read_all(&self, prefix: &str) -> Result<Listing, DirectoryError> {
        let read = self.database.begin_read().map_err(storage)?;
        let data = read.open_table(DATA).map_err(storage)?;
        let mut entries = Vec::new();
        for item in data.range(prefix..).map_err(storage)? {
            let (key, stored) = item.map_err(storage)?;
            if !key.value().starts_with(prefix) {
                break;
            }
            entries.push(Entry { key: key.value().to_owned(), versioned: unpack(stored.value())? });
        }
        let meta = read.open_table(META).map_err(storage)?;
        let revision = meta.get("revision").map_err(storage)?.map_or(0, |r| r.value());
        Ok(Listing { entries, revision })
    }

    fn write(&self, transaction: &Transaction) -> Result<Outcome, DirectoryError> {
        validate(transaction)?;
        let mut watches = self.lock();
        let mut write = self.database.begin_write().map_err(storage)?;
        write.set_durability(Durability::Immediate).map_err(storage)?;
        let revision;
        {
            let mut data = write.open_table(DATA).map_err(storage)?;
            for (key, expect) in &transaction.conditions {
                let found = data.get(key.as_str()).map_err(storage)?.map(|s| unpack(s.value())).transpose()?;
                if !expect.holds(found.as_ref()) {
                    // Dropping the write transaction undoes it.
                    return Ok(Outcome::Conflict { key: key.clone(), found });
                }
            }
            let mut meta = write.open_table(META).map_err(storage)?;
            let newest = meta.get("revision").map_err(storage)?.map_or(0, |r| r.value());
            if transaction.writes.is_empty() {
                return Ok(Outcome::Done(newest));
            }
            revision = newest + 1;
            meta.insert("revision", revision).map_err(storage)?;
            let mut history = write.open_table(HISTORY).map_err(storage)?;
            for (position, (key, value)) in (0u32..).zip(&transaction.writes) {
                match value {
                    Some(value) => {
                        let mut stored = revision.to_le_bytes().to_vec();
                        stored.extend_from_slice(value);
                        data.insert(key.as_str(), stored.as_slice()).map_err(storage)?;
                    }
                    None => {
                        data.remove(key.as_str()).map_err(storage)?;
                    }
                }
                let bytes = value.as_ref().map_or(&[][..], |v| v.as_slice());
                history.insert((revision, position), (key.as_str(), value.is_some(), bytes)).map_err(storage)?;
            }
            if let Some(compacted) = revision.checked_sub(HISTORY_MAX).filter(|c| *c > 0) {
                history.retain_in((0, 0)..(compacted + 1, 0), |_, _| false).map_err(storage)?;
                meta.insert("compacted", compacted).map_err(storage)?;
            }
        }
        write.commit().map_err(storage)?;
        watches.retain(|subscription| {
            let mut changes = transaction.writes.iter().filter(|(key, _)| key.starts_with(&subscription.prefix));
            changes.all(|(key, value)| {
                subscription.sender.send(Change { revision, key: key.clone(), value: value.clone() }).is_ok()
            }) && !subscription.sender.is_closed()
        });
        Ok(Outcome::Done(revision))
    }

    fn subscribe(&self, prefix: &str, after: Revision) -> Result<Watch, DirectoryError> {
        let mut watches = self.lock();
        let (sender, receiver) = mpsc::unbounded_channel();
        let read = self.database.begin_read().map_err(storage)?;
        let meta = read.open_table(META).map_err(storage)?;
        let compacted = meta.get("compacted").map_err(storage)?.map_or(0, |r| r.value());
        if after < compacted {
            return Err(DirectoryError::Compacted(compacted));
        }
        let history = read.open_table(HISTORY).map_err(storage)?;
        for item in history.range((after.saturating_add(1), 0)..).map_err(storage)? {
            let (at, change) = item.map_err(storage)?;
            let (key, present, bytes) = change.value();
            if key.starts_with(prefix) {
                let value = present.then(|| ByteBuf::from(bytes.to_vec()));
                // The receiver is in this function: it can't be gone.
                let _ = sender.send(Change { revision: at.value().0, key: key.to_owned(), value });
            }
        }
        watches.push(Subscription { prefix: prefix.to_owned(), sender });
        Ok(Watch(receiver))
    }
}

impl Directory for Embedded {
    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<Versioned>> {
        Box::pin(async move { self.read(key) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, Listing> {
        Box::pin(async move { self.read_all(prefix) })
    }

    fn transact<'a>(&'a self, transaction: &'a Transaction) -> Reply<'a, Outcome> {
        Box::pin(async move { self.write(transaction) })
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> Reply<'a, Watch> {
        Box::pin(async move { self.subscribe(prefix, after) })
    }
}

fn validate(transaction: &Transaction) -> Result<(), DirectoryError> {
    let invalid = |text: String| Err(DirectoryError::Invalid(text));
    if transaction.conditions.len() > TRANSACTION_MAX || transaction.writes.len() > TRANSACTION_MAX {
        return invalid(format!("more than {TRANSACTION_MAX} conditions or writes"));
    }
    let keys = transaction.conditions.iter().map(|(k, _)| k).chain(transaction.writes.iter().map(|(k, _)| k));
    for key in keys {
        if key.is_empty() || key.len() > KEY_MAX {
            return invalid(format!("a key has 1 to {KEY_MAX} bytes, this one {}", key.len()));
        }
    }
    for (key, value) in &transaction.writes {
        if value.as_ref().is_some_and(|v| v.len() > VALUE_MAX) {
            return invalid(format!("the value for {key} is longer than {VALUE_MAX} bytes"));
        }
    }
    Ok(())
}

fn unpack(stored: &[u8]) -> Result<Versioned, DirectoryError> {
    match stored.split_first_chunk::<8>() {
        Some((revision, value)) => Ok(Versioned { revision: u64::from_le_bytes(*revision), value: value.to_vec() }),
        None => Err(DirectoryError::Storage("a stored value is cut short".to_owned())),
    }
}

fn storage(error: impl std::fmt::Display) -> DirectoryError {
    DirectoryError::Storage(error.to_string())
}

#[cfg(test)]
mod tests;
