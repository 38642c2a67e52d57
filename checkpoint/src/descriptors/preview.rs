//! Sockets of the caller's, as they are while the job still runs.
//!
//! Making a socket and putting it into a process costs many times what looking after it in the freeze costs. So the source
//! says before the freeze what it sees, the target makes that, and in the freeze only what has changed since is made anew.
//! A preview is a guess: nothing may depend on it but time.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

use super::Job;
use super::kinds::View;
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
}

/// Where sockets of the caller's were put before the freeze: by process and number.
pub(crate) type Early = BTreeMap<(u32, RawFd), ExternalKey>;

/// What the processes of a running job have open now, at most `most` slots in a part.
///
/// # Errors
/// /proc can't be read.
pub fn preview(job: &Job<'_>, external: &dyn External, most: usize) -> Result<Vec<Preview>> {
    let scan = scan::scan(job).map_err(|error| Error::system("reading the job's descriptors", error))?;
    let view = View::new(job, external, &scan, false);
    let mut uses = vec![0u32; scan.files.len()];
    for entry in scan.tables.iter().flat_map(|table| &table.entries) {
        uses[entry.file] += 1;
    }
    let mut parts = Vec::new();
    for table in &scan.tables {
        let [process] = table.processes[..] else { continue };
        let slot = |entry: &scan::Entry| {
            let key = view.key(&scan.files[entry.file]).filter(|key| matches!(key, ExternalKey::Socket(_)))?;
            (uses[entry.file] == 1).then_some((entry.number, key))
        };
        let slots: Vec<_> = table.entries.iter().filter_map(slot).collect();
        parts.extend(slots.chunks(most).map(|slots| Preview { process: process.process, slots: slots.to_vec() }));
    }
    Ok(parts)
}
