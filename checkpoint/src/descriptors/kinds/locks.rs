//! Locks on files, from the `lock:` lines of fdinfo.
//!
//! flock(2) locks and open file description locks belong to the open file; POSIX locks belong to the descriptor table, and
//! fdinfo shows them with the open file that they were taken with.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};

use sys::tape::Tape;
use sys::{fds, libc};

use super::super::Tapes;
use super::super::image::{Kind, LockImage, ProcessLock, TreeDescriptors};
use super::super::scan::FdInfo;

/// The locks of one open file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Locks {
    /// Of the open file description.
    pub own: Vec<LockImage>,
    /// Of the table.
    pub process: Vec<LockImage>,
    /// A lease.
    pub lease: bool,
}

/// Reads the locks.
pub(in super::super) fn locks(info: &FdInfo) -> Locks {
    let mut locks = Locks::default();
    for line in info.values("lock:") {
        // "1: FLOCK  ADVISORY  WRITE 1234 00:1a:567 0 EOF"
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, kind, _, mode, _, _, start, end] = words[..] else { continue };
        let start: i64 = start.parse().unwrap_or(0);
        let length = match end.parse::<i64>() {
            Ok(end) => end.saturating_sub(start).saturating_add(1),
            Err(_) => 0,
        };
        let lock = LockImage { whole: kind == "FLOCK", write: mode == "WRITE", start, length };
        match kind {
            "FLOCK" | "OFDLCK" => locks.own.push(lock),
            "POSIX" => locks.process.push(lock),
            _ => locks.lease = true,
        }
    }
    locks
}

/// A lock of a job at its source, and where the job can be made to let go of it.
#[derive(Clone, Debug)]
pub(crate) struct HeldLock {
    process: u32,
    number: RawFd,
    /// It belongs to the table, not to the open file.
    is_process: bool,
    lock: LockImage,
}

/// The locks of a job that are in its image.
pub(crate) fn held(image: &TreeDescriptors) -> Vec<HeldLock> {
    let mut held = Vec::new();
    let mut seen = BTreeSet::new();
    for table in &image.tables {
        let Some(&process) = table.processes.first() else { continue };
        for slot in &table.slots {
            let own = image.files.get(slot.file as usize).map(|file| own_locks(&file.kind)).unwrap_or_default();
            if seen.insert(slot.file) {
                let lock =
                    |lock: &LockImage| HeldLock { process, number: slot.number, is_process: false, lock: lock.clone() };
                held.extend(own.iter().map(lock));
            }
        }
    }
    for ProcessLock { table, number, lock } in &image.process_locks {
        if let Some(&process) = image.tables.get(*table as usize).and_then(|table| table.processes.first()) {
            held.push(HeldLock { process, number: *number, is_process: true, lock: lock.clone() });
        }
    }
    held
}

/// The locks that belong to an open file.
pub(in super::super) fn own_locks(kind: &Kind) -> &[LockImage] {
    match kind {
        Kind::Path(image) => &image.locks,
        Kind::Content(image) => &image.locks,
        _ => &[],
    }
}

impl HeldLock {
    /// Lets go of it.
    pub(crate) fn release(&self, tapes: &mut dyn Tapes) -> io::Result<()> {
        let LockImage { whole, write: _, start, length } = self.lock;
        self.set(tapes, whole.then_some(libc::LOCK_UN), &fds::unlock_record_bytes(start, length))
    }

    /// Takes it, without waiting.
    pub(crate) fn take(&self, tapes: &mut dyn Tapes) -> io::Result<()> {
        let LockImage { whole, write, start, length } = self.lock;
        let operation = if write { libc::LOCK_EX } else { libc::LOCK_SH } | libc::LOCK_NB;
        self.set(tapes, whole.then_some(operation), &fds::lock_record_bytes(write, start, length))
    }

    fn set(&self, tapes: &mut dyn Tapes, operation: Option<i32>, record: &[u8]) -> io::Result<()> {
        let mut tape = Tape::new();
        if let Some(operation) = operation {
            tape.require(libc::SYS_flock, &[self.number.into(), operation.into()]);
        } else {
            let command = if self.is_process { libc::F_SETLK } else { libc::F_OFD_SETLK };
            let record = tape.data(record);
            tape.require(libc::SYS_fcntl, &[self.number.into(), command.into(), record.into()]);
        }
        tapes.run(self.process, &tape).map(drop)
    }
}

/// Takes a lock that belongs to an open file description, without waiting.
pub(in super::super) fn take(fd: BorrowedFd<'_>, lock: &LockImage) -> io::Result<()> {
    if lock.whole { fds::flock(fd, lock.write) } else { fds::lock_description(fd, lock.write, lock.start, lock.length) }
}
