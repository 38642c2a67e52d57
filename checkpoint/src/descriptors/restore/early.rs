//! Sockets that were put into the stubs while the job still ran.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use sys::tape::Tape;
use sys::{fds, libc};

use super::super::image::{Kind, Slot};
use super::{Restorer, make};
use crate::error::{Error, Result};
use crate::external::ExternalKey;

/// Which slots of a table are as the image has them already: their numbers. What else there is of them is put on the tape.
pub(super) fn kept(restorer: &Restorer, process: u32, slots: &[Slot], tape: &mut Tape) -> BTreeSet<RawFd> {
    let mut kept = BTreeSet::new();
    for slot in slots {
        if !is_in_place(restorer, process, slot) {
            continue;
        }
        kept.insert(slot.number);
        let flags = restorer.image.files[slot.file as usize].flags & make::SETTABLE;
        if flags != 0 {
            tape.require(libc::SYS_fcntl, &[slot.number.into(), libc::F_SETFL.into(), flags.into()]);
        }
        // They were placed close-on-exec, as nearly all are.
        if !slot.close_on_exec {
            tape.require(libc::SYS_fcntl, &[slot.number.into(), libc::F_SETFD.into(), 0.into()]);
        }
    }
    kept
}

fn is_in_place(restorer: &Restorer, process: u32, slot: &Slot) -> bool {
    let file = &restorer.image.files[slot.file as usize];
    let is_simple = file.owner.is_none() && file.flags & libc::O_ASYNC == 0;
    let Kind::External(key) = file.kind else { return false };
    is_simple
        && restorer.early.get(&(process, slot.number)) == Some(&key)
        && restorer.files[slot.file as usize].is_none()
}

/// Fetches those that the image has elsewhere, or more than once, before their numbers are given to others.
pub(super) fn fetch_misplaced(restorer: &mut Restorer, uses: &[u32]) -> Result<()> {
    if restorer.early.is_empty() {
        return Ok(());
    }
    let mut in_place = BTreeSet::new();
    for table in &restorer.image.tables {
        let process = table.processes.first().copied().unwrap_or_default();
        for slot in table.slots.iter().filter(|slot| is_in_place(restorer, process, slot)) {
            in_place.insert(slot.file);
        }
    }
    let by_key: std::collections::HashMap<ExternalKey, (u32, RawFd)> =
        restorer.early.iter().map(|(place, key)| (*key, *place)).collect();
    for (index, &uses) in uses.iter().enumerate() {
        let Kind::External(key) = restorer.image.files[index].kind else { continue };
        let is_settled = u32::try_from(index).is_ok_and(|index| in_place.contains(&index)) && uses == 1;
        if let Some(&place) = by_key.get(&key).filter(|_| !is_settled) {
            let fd = fetch(restorer, place)
                .and_then(|fd| make::finish(restorer, &restorer.image.files[index], &fd).map(|()| fd))
                .map_err(|error| Error::system(format!("taking over {key:?}"), error))?;
            restorer.files[index] = Some(fd);
        }
    }
    Ok(())
}

fn fetch(restorer: &Restorer, (process, number): (u32, RawFd)) -> std::io::Result<OwnedFd> {
    let pid = make::pid_of(restorer, process).ok_or(std::io::ErrorKind::NotFound)?;
    fds::pidfd_getfd(fds::pidfd_open(pid)?.as_fd(), number)
}
