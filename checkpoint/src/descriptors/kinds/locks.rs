//! Locks on files, from the `lock:` lines of fdinfo.
//!
//! flock(2) locks and open file description locks belong to the open file; POSIX locks belong to the descriptor table, and
//! fdinfo shows them with each descriptor of the file in that table.

use std::io;
use std::os::fd::BorrowedFd;

use sys::fds;

use super::super::image::LockImage;
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

/// Takes a lock that belongs to an open file description, without waiting.
pub(in super::super) fn take(fd: BorrowedFd<'_>, lock: &LockImage) -> io::Result<()> {
    if lock.whole { fds::flock(fd, lock.write) } else { fds::lock_description(fd, lock.write, lock.start, lock.length) }
}
