//! The embedded engine: one redb file, served by the node that made the cluster.
//!
//! Every transaction is on disk before it is answered. The newest changes ([`HISTORY_MAX`]) are kept, so that a watch can
//! be taken up again after a broken connection.
//!
//! redb refuses everything after a failed write, since what it believes to be on disk may not be. The engine then opens the
//! file anew with the next request, which repairs it: once a full disk has room again, all goes on.
//!
//! The engine can be given up for another ([`Embedded::hold`], [`Embedded::seal`]); from then on it answers everything with the
//! new place.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use serde_bytes::ByteBuf;
use tokio::sync::mpsc;

use crate::directory::{
    Change, Directory, DirectoryError, Entry, Listing, Outcome, Reply, Revision, Transaction, Versioned, Watch,
};

/// How many changes are kept for watches that come back.
pub const HISTORY_MAX: u64 = 10_000;

/// Key -> 8 bytes of revision (little-endian) and the value.
const DATA: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("data");
/// (revision, position in its transaction) -> (key, there is a value, value).
const HISTORY: TableDefinition<'_, (u64, u32), (&str, bool, &[u8])> = TableDefinition::new("history");
/// "revision" -> the newest; "compacted" -> the newest change no longer in the history.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

/// "moved" -> where the directory is now.
const NOTES: TableDefinition<'_, &str, &str> = TableDefinition::new("notes");

/// The engine. Cheap to share behind an `Arc`; calls block for the time of a disk write.
pub struct Embedded {
    path: PathBuf,
    /// `None` after a failed write, until it is opened again.
    database: RwLock<Option<Arc<Database>>>,
    /// Held over a write and the reports of it, so that every watch sees changes in order and none twice.
    writer: Mutex<Writer>,
    /// Where the directory is now, if not here.
    moved: RwLock<Option<String>>,
    /// How many changes are kept.
    history: u64,
}

#[derive(Default)]
struct Writer {
    watches: Vec<Subscription>,
    /// Why nothing is written at present.
    held: Option<String>,
}

struct Subscription {
    prefix: String,
    sender: mpsc::UnboundedSender<Change>,
}

impl std::fmt::Debug for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedded").field("path", &self.path).finish_non_exhaustive()
    }
}

/// How a write failed.
enum Failure {
    /// Before anything could count as written.
    Before(DirectoryError),
    /// In the commit: what is on disk is known when the file is opened again.
    Committing(DirectoryError),
}

impl Embedded {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// [`DirectoryError::Storage`] if it can't be opened, is held by another process or is damaged.
    pub fn open(path: &Path) -> Result<Self, DirectoryError> {
        Self::open_keeping(path, HISTORY_MAX)
    }

    /// [`Embedded::open`] with another number of changes that are kept for watches that come back.
    ///
    /// # Errors
    /// As [`Embedded::open`].
    pub fn open_keeping(path: &Path, history: u64) -> Result<Self, DirectoryError> {
        let database = Database::create(path).map_err(storage)?;
        let write = database.begin_write().map_err(storage)?;
        {
            write.open_table(DATA).map_err(storage)?;
            write.open_table(HISTORY).map_err(storage)?;
            write.open_table(META).map_err(storage)?;
            write.open_table(NOTES).map_err(storage)?;
        }
        write.commit().map_err(storage)?;
        let read = database.begin_read().map_err(storage)?;
        let notes = read.open_table(NOTES).map_err(storage)?;
        let moved = notes.get("moved").map_err(storage)?.map(|place| place.value().to_owned());
        drop((notes, read));
        Ok(Self {
            path: path.to_owned(),
            database: RwLock::new(Some(Arc::new(database))),
            writer: Mutex::default(),
            moved: RwLock::new(moved),
            history,
        })
    }

    /// Where the directory is now, if it was given up here.
    #[must_use]
    pub fn moved(&self) -> Option<String> {
        self.moved.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Refuses changes from now on (nothing is done, callers try again), and returns all there is: nothing is added to it
    /// until [`Embedded::resume`]. Forgotten when the process ends.
    ///
    /// # Errors
    /// [`DirectoryError::Storage`]; [`DirectoryError::Moved`].
    pub fn hold(&self, reason: &str) -> Result<Listing, DirectoryError> {
        self.still_here()?;
        self.lock().held = Some(reason.to_owned());
        self.read_all("").inspect_err(|_| self.resume())
    }

    /// Ends [`Embedded::hold`].
    pub fn resume(&self) {
        self.lock().held = None;
    }

    /// The directory is at another place from now on, for ever. The one step that decides it; watches end.
    ///
    /// # Errors
    /// [`DirectoryError::Unknown`]: [`Embedded::moved`] tells after opening the file again.
    pub fn seal(&self, place: &str) -> Result<(), DirectoryError> {
        let mut writer = self.lock();
        let database = self.database()?;
        let write = database.begin_write().map_err(storage)?;
        write.open_table(NOTES).map_err(storage)?.insert("moved", place).map_err(storage)?;
        if let Err(error) = write.commit() {
            drop(database);
            self.close();
            return Err(DirectoryError::Unknown(error.to_string()));
        }
        *self.moved.write().unwrap_or_else(PoisonError::into_inner) = Some(place.to_owned());
        writer.watches.clear();
        Ok(())
    }

    fn still_here(&self) -> Result<(), DirectoryError> {
        self.moved().map_or(Ok(()), |place| Err(DirectoryError::Moved(place)))
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        // A panic while the lock was held leaves only a list of senders and a reason, which are sound at every moment.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn database(&self) -> Result<Arc<Database>, DirectoryError> {
        if let Some(database) = &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
            return Ok(Arc::clone(database));
        }
        let mut place = self.database.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(database) = &*place {
            return Ok(Arc::clone(database));
        }
        // Fails while somebody still reads by the old handle: then the next request succeeds.
        let database = Arc::new(Database::create(&self.path).map_err(storage)?);
        *place = Some(Arc::clone(&database));
        Ok(database)
    }

    /// A write failed: the file is to be opened anew with the next request.
    fn close(&self) {
        *self.database.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn read(&self, key: &str) -> Result<Option<Versioned>, DirectoryError> {
        let read = self.database()?.begin_read().map_err(storage)?;
        let data = read.open_table(DATA).map_err(storage)?;
        data.get(key).map_err(storage)?.map(|stored| unpack(stored.value())).transpose()
    }

    fn read_all(&self, prefix: &str) -> Result<Listing, DirectoryError> {
        let read = self.database()?.begin_read().map_err(storage)?;
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
        transaction.check()?;
        let mut writer = self.lock();
        self.still_here()?;
        if let Some(reason) = writer.held.as_ref().filter(|_| !transaction.writes.is_empty()) {
            return Err(DirectoryError::Unreachable(reason.clone()));
        }
        let database = self.database()?;
        let written = write_to(&database, transaction, self.history);
        drop(database);
        let outcome = match written {
            Ok(outcome) => outcome,
            Err(failure) => {
                self.close();
                // It may have been written, so that they would miss it.
                writer.watches.clear();
                return Err(match failure {
                    Failure::Before(error) => error,
                    Failure::Committing(error) => DirectoryError::Unknown(error.to_string()),
                });
            }
        };
        if let Outcome::Done(revision) = outcome {
            writer.watches.retain(|subscription| {
                let mut changes = transaction.writes.iter().filter(|(key, _)| key.starts_with(&subscription.prefix));
                changes.all(|(key, value)| {
                    subscription.sender.send(Change { revision, key: key.clone(), value: value.clone() }).is_ok()
                }) && !subscription.sender.is_closed()
            });
        }
        Ok(outcome)
    }

    fn subscribe(&self, prefix: &str, after: Revision) -> Result<Watch, DirectoryError> {
        let mut writer = self.lock();
        self.still_here()?;
        let (sender, receiver) = mpsc::unbounded_channel();
        let read = self.database()?.begin_read().map_err(storage)?;
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
        writer.watches.push(Subscription { prefix: prefix.to_owned(), sender });
        Ok(Watch(receiver))
    }
}

impl Directory for Embedded {
    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<Versioned>> {
        Box::pin(async move {
            self.still_here()?;
            self.read(key)
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, Listing> {
        Box::pin(async move {
            self.still_here()?;
            self.read_all(prefix)
        })
    }

    fn transact<'a>(&'a self, transaction: &'a Transaction) -> Reply<'a, Outcome> {
        Box::pin(async move { self.write(transaction) })
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> Reply<'a, Watch> {
        Box::pin(async move { self.subscribe(prefix, after) })
    }
}

fn write_to(database: &Database, transaction: &Transaction, history_max: u64) -> Result<Outcome, Failure> {
    let mut write = database.begin_write().map_err(storage).map_err(Failure::Before)?;
    write.set_durability(Durability::Immediate).map_err(storage).map_err(Failure::Before)?;
    let outcome = apply(&write, transaction, history_max).map_err(Failure::Before)?;
    match outcome {
        Outcome::Done(_) if !transaction.writes.is_empty() => {
            write.commit().map_err(storage).map_err(Failure::Committing)?;
        }
        // Dropping the write transaction undoes it.
        _ => {}
    }
    Ok(outcome)
}

/// Checks the conditions and makes the writes, without committing.
fn apply(
    write: &redb::WriteTransaction,
    transaction: &Transaction,
    history_max: u64,
) -> Result<Outcome, DirectoryError> {
    let mut data = write.open_table(DATA).map_err(storage)?;
    for (key, expect) in &transaction.conditions {
        let found = data.get(key.as_str()).map_err(storage)?.map(|s| unpack(s.value())).transpose()?;
        if !expect.holds(found.as_ref()) {
            return Ok(Outcome::Conflict { key: key.clone(), found });
        }
    }
    let mut meta = write.open_table(META).map_err(storage)?;
    let newest = meta.get("revision").map_err(storage)?.map_or(0, |r| r.value());
    if transaction.writes.is_empty() {
        return Ok(Outcome::Done(newest));
    }
    let revision = newest + 1;
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
    if let Some(compacted) = revision.checked_sub(history_max).filter(|c| *c > 0) {
        history.retain_in((0, 0)..(compacted + 1, 0), |_, _| false).map_err(storage)?;
        meta.insert("compacted", compacted).map_err(storage)?;
    }
    Ok(Outcome::Done(revision))
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
