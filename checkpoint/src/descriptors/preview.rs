//! Sockets of the caller's, and what watches them, as they are while the job still runs.
//!
//! Making a socket and putting it into a process costs many times what looking after it in the freeze costs. So the source
//! says before the freeze what it sees, the target makes that, and in the freeze only what has changed since is made anew.
//! A preview is a guess: nothing may depend on it but time.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};
use sys::libc;

use super::Job;
use super::ahead::{self, EpollInfo};
use super::kinds::{View, epoll};
use super::scan;
use crate::error::{Error, Result};
use crate::external::{External, ExternalKey};

/// A part of what one process has open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preview {
    /// The process.
    pub process: u32,
    /// Numbers, and which of the caller's sockets they mean. Each socket is open there and nowhere else.
    pub slots: Vec<(RawFd, ExternalKey)>,
    /// Its epoll instances, with what they watch among the slots of this part and those before.
    #[serde(default)]
    pub epolls: Vec<EpollPreview>,
}

/// A part of what an epoll instance watches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollPreview {
    /// Its number.
    pub number: RawFd,
    /// Numbers, EPOLL*, and the program's word.
    pub watches: Vec<(RawFd, u32, u64)>,
}

/// What was put into stubs before the freeze, by process and number.
#[derive(Debug, Default)]
pub(crate) struct Early {
    /// Sockets of the caller's.
    pub slots: HashMap<(u32, RawFd), ExternalKey>,
    /// Epoll instances: what they watch, by number.
    pub epolls: HashMap<(u32, RawFd), HashMap<RawFd, (u32, u64)>>,
}

impl Early {
    /// Numbers of a process that are taken.
    pub fn taken(&self, process: u32) -> BTreeSet<RawFd> {
        let places = self.slots.keys().chain(self.epolls.keys());
        places.filter(|place| place.0 == process).map(|place| place.1).collect()
    }

    /// A process is gone with all it had.
    pub fn forget(&mut self, process: u32) {
        self.slots.retain(|place, _| place.0 != process);
        self.epolls.retain(|place, _| place.0 != process);
    }
}

/// Watches in one part.
const WATCHES: usize = 4096;
/// Watches that report in another way than most are added in the freeze.
const RARE_MODES: u32 = (libc::EPOLLONESHOT | libc::EPOLLWAKEUP | libc::EPOLLEXCLUSIVE).cast_unsigned();

/// What the processes of a running job have open now, at most `most` slots in a part.
///
/// Also returns the epoll instances, for [`super::dump()`].
///
/// # Errors
/// /proc can't be read.
pub fn preview(job: &Job<'_>, external: &dyn External, most: usize) -> Result<(Vec<Preview>, Vec<EpollInfo>)> {
    let scan = scan::scan(job).map_err(|error| Error::system("reading the job's descriptors", error))?;
    let view = View::new(job, external, &scan, false);
    let epolls = ahead::epolls(&scan);
    let mut uses = vec![0u32; scan.files.len()];
    for entry in scan.tables.iter().flat_map(|table| &table.entries) {
        uses[entry.file] += 1;
    }
    let mut parts = Vec::new();
    let mut looked_at = HashSet::new();
    for table in &scan.tables {
        let [process] = table.processes[..] else { continue };
        let slot = |entry: &scan::Entry| {
            let key = view.key(&scan.files[entry.file]).filter(|key| matches!(key, ExternalKey::Socket(_)))?;
            (uses[entry.file] == 1).then_some((entry.number, key))
        };
        let slots: Vec<_> = table.entries.iter().filter_map(slot).collect();
        let process = process.process;
        let told = |slots: &[_]| Preview { process, slots: slots.to_vec(), epolls: Vec::new() };
        parts.extend(slots.chunks(most).map(told));
        let numbers: HashSet<RawFd> = slots.iter().map(|(number, _)| *number).collect();
        for entry in &table.entries {
            // Its other numbers are made of the first.
            if !looked_at.insert(entry.file) {
                continue;
            }
            let watches = watches(&scan, table, entry, &numbers);
            let part = |watches: &[_]| EpollPreview { number: entry.number, watches: watches.to_vec() };
            let epolls = watches.chunks(WATCHES).map(|watches| vec![part(watches)]);
            parts.extend(epolls.map(|epolls| Preview { process, slots: Vec::new(), epolls }));
        }
    }
    Ok((parts, epolls))
}

/// What an epoll instance watches among these numbers; nothing when it is none.
fn watches(
    scan: &scan::Scan,
    table: &scan::TableSeen,
    entry: &scan::Entry,
    numbers: &HashSet<RawFd>,
) -> Vec<(RawFd, u32, u64)> {
    let seen = &scan.files[entry.file];
    if !ahead::is_epoll(seen) {
        return Vec::new();
    }
    // It may be closed by now.
    let Ok(info) = seen.info() else { return Vec::new() };
    let inode_of = |number: RawFd| {
        let at = table.entries.binary_search_by_key(&number, |entry| entry.number).ok()?;
        scan.files[table.entries[at].file].socket()
    };
    let lines = info.values("tfd:").filter_map(epoll::parse);
    let plain = lines.filter(|line| {
        line.events & RARE_MODES == 0 && numbers.contains(&line.number) && inode_of(line.number) == Some(line.inode)
    });
    plain.map(|line| (line.number, line.events, line.data)).collect()
}
