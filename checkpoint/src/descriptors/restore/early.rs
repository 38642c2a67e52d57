//! What is put into the stubs while the job still runs: sockets of the caller's, and epoll instances that watch them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use sys::fds::events::epoll_event_bytes;
use sys::tape::Tape;
use sys::{Pid, libc};

use super::super::image::{EpollWatch, Kind, OpenFile, Slot};
use super::super::preview::{EpollPreview, Preview};
use super::super::{Early, Tapes};
use super::{Restorer, make};
use crate::error::{Error, Result};
use crate::external::ExternalKey;

/// Watches on one tape: their records and the calls fit a region many times.
const WATCHES_ON_TAPE: usize = 4096;

/// Puts the caller's descriptors for a preview's slots, in that order, where the preview saw them, and makes the epoll
/// instances that it saw. What can't go there is left out. `owner` is the number with which the stub knows our process.
pub(crate) fn place(
    early: &mut Early,
    preview: &Preview,
    descriptors: &[OwnedFd],
    (pid, owner): (Pid, RawFd),
    tapes: &mut dyn Tapes,
) -> io::Result<()> {
    let process = preview.process;
    let (_, most) = sys::process::limit(pid, libc::RLIMIT_NOFILE)?;
    // The soft limit is set to the job's later.
    sys::process::set_limit(pid, libc::RLIMIT_NOFILE, most, most)?;
    let most = RawFd::try_from(most).unwrap_or(RawFd::MAX);
    let mut tape = Tape::new();
    let mut fetches = Vec::with_capacity(descriptors.len());
    let mut taken = early.taken(process);
    taken.insert(owner);
    let mut lowest_free = 0;
    for (&(number, key), descriptor) in preview.slots.iter().zip(descriptors) {
        if !(0..most).contains(&number) || taken.contains(&number) {
            continue;
        }
        // The kernel gives it the lowest free number, which may be the right one.
        let arguments = [owner.into(), descriptor.as_raw_fd().into(), 0.into()];
        let fetched = tape.require(libc::SYS_pidfd_getfd, &arguments);
        while taken.contains(&lowest_free) {
            lowest_free += 1;
        }
        let is_next = lowest_free == number;
        if !is_next {
            tape.require(libc::SYS_dup3, &[fetched.into(), number.into(), libc::O_CLOEXEC.into()]);
            tape.require(libc::SYS_close, &[fetched.into()]);
        }
        taken.insert(number);
        fetches.push((fetched, is_next, number, key));
    }
    let results = tapes.run(process, &tape)?;
    for (fetched, is_next, number, key) in fetches {
        if !is_next || RawFd::try_from(results.get(fetched)?) == Ok(number) {
            early.slots.insert((process, number), key);
        }
    }
    for epoll in &preview.epolls {
        let is_free = (0..most).contains(&epoll.number) && !taken.contains(&epoll.number);
        let known = early.epolls.contains_key(&(process, epoll.number));
        if known || (is_free && make_epoll(process, epoll.number, tapes)?) {
            taken.insert(epoll.number);
            watch(early, process, epoll, tapes)?;
        }
    }
    Ok(())
}

/// Makes an epoll instance with this number.
fn make_epoll(process: u32, number: RawFd, tapes: &mut dyn Tapes) -> io::Result<bool> {
    let mut tape = Tape::new();
    let made = tape.require(libc::SYS_epoll_create1, &[libc::EPOLL_CLOEXEC.into()]);
    let made = tapes.run(process, &tape)?.get(made)?;
    if RawFd::try_from(made) == Ok(number) {
        return Ok(true);
    }
    let mut tape = Tape::new();
    tape.require(libc::SYS_dup3, &[made.into(), number.into(), libc::O_CLOEXEC.into()]);
    tape.require(libc::SYS_close, &[made.into()]);
    tapes.run(process, &tape)?;
    Ok(true)
}

fn watch(early: &mut Early, process: u32, epoll: &EpollPreview, tapes: &mut dyn Tapes) -> io::Result<()> {
    let watches = early.epolls.entry((process, epoll.number)).or_default();
    let placed =
        |watch: &&(RawFd, u32, u64)| early.slots.contains_key(&(process, watch.0)) && !watches.contains_key(&watch.0);
    let new: Vec<(RawFd, u32, u64)> = epoll.watches.iter().filter(placed).copied().collect();
    for chunk in new.chunks(WATCHES_ON_TAPE) {
        let mut tape = Tape::new();
        for &(number, events, data) in chunk {
            let event = tape.data(&epoll_event_bytes(events, data));
            let arguments = [epoll.number.into(), libc::EPOLL_CTL_ADD.into(), number.into(), event.into()];
            tape.require(libc::SYS_epoll_ctl, &arguments);
        }
        tapes.run(process, &tape)?;
    }
    watches.extend(new.into_iter().map(|(number, events, data)| (number, (events, data))));
    Ok(())
}

/// Which slots of a table are as the image has them already: their numbers. What else there is of them is put on the tape.
pub(super) fn kept(restorer: &Restorer, process: u32, slots: &[Slot], tape: &mut Tape) -> BTreeSet<RawFd> {
    let mut kept = BTreeSet::new();
    for slot in slots {
        let is_epoll = restorer.kept_epolls.get(&slot.file) == Some(&(process, slot.number));
        if !is_epoll && !is_in_place(restorer, process, slot) {
            continue;
        }
        kept.insert(slot.number);
        let flags = restorer.image.files[slot.file as usize].flags & make::SETTABLE;
        // They came non-blocking, as nearly all are.
        if flags != libc::O_NONBLOCK && !is_epoll {
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
    let Kind::External(key) = file.kind else { return false };
    is_simple(file)
        && restorer.early.slots.get(&(process, slot.number)) == Some(&key)
        && restorer.files[slot.file as usize].is_none()
}

fn is_simple(file: &OpenFile) -> bool {
    file.owner.is_none() && file.flags & libc::O_ASYNC == 0
}

/// The epoll instances that are in place: by index of the file, the process and the number.
pub(super) fn kept_epolls(restorer: &Restorer) -> HashMap<u32, (u32, RawFd)> {
    let mut kept = HashMap::new();
    if restorer.early.epolls.is_empty() {
        return kept;
    }
    for table in &restorer.image.tables {
        let process = table.processes.first().copied().unwrap_or_default();
        for slot in &table.slots {
            let file = &restorer.image.files[slot.file as usize];
            let is_plain = is_simple(file) && file.flags & make::SETTABLE == 0;
            let place = (process, slot.number);
            if matches!(file.kind, Kind::Epoll { .. }) && is_plain && restorer.early.epolls.contains_key(&place) {
                kept.entry(slot.file).or_insert(place);
            }
        }
    }
    kept
}

/// Takes the watches out of the epoll instances in place that the image doesn't have. Returns those it has, by the index of the
/// instance's file and the number.
pub(super) fn settle_watches(restorer: &Restorer, tapes: &mut dyn Tapes) -> Result<HashSet<(u32, RawFd)>> {
    let mut there = HashSet::new();
    for (&index, &(process, epoll)) in &restorer.kept_epolls {
        let place = (process, epoll);
        let (Some(early), Kind::Epoll { watches }) =
            (restorer.early.epolls.get(&place), &restorer.image.files[index as usize].kind)
        else {
            continue;
        };
        let tables = &restorer.image.tables;
        let Some(table) = tables.iter().find(|table| table.processes.first() == Some(&process)) else { continue };
        let is_there = |watch: &&EpollWatch| {
            let same = early.get(&watch.number) == Some(&(watch.events, watch.data));
            let slot = table.slots.binary_search_by_key(&watch.number, |slot| slot.number).ok();
            let slot = slot.map(|at| &table.slots[at]).filter(|slot| slot.file == watch.file);
            same && slot.is_some_and(|slot| is_in_place(restorer, process, slot))
        };
        there.extend(watches.iter().filter(is_there).map(|watch| (index, watch.number)));
        let gone: Vec<RawFd> = early.keys().copied().filter(|&number| !there.contains(&(index, number))).collect();
        for chunk in gone.chunks(WATCHES_ON_TAPE) {
            let mut tape = Tape::new();
            for &number in chunk {
                let arguments = [epoll.into(), libc::EPOLL_CTL_DEL.into(), number.into(), 0.into()];
                tape.require(libc::SYS_epoll_ctl, &arguments);
            }
            let failed = |error| Error::process(process, "emptying its epoll", error);
            tapes.run(process, &tape).map_err(failed)?;
        }
    }
    Ok(there)
}

/// Fetches those that the image has elsewhere, or more than once, before their numbers are given to others.
pub(super) fn fetch_misplaced(restorer: &mut Restorer, uses: &[u32]) -> Result<()> {
    for (&index, &place) in restorer.kept_epolls.iter().filter(|(index, _)| uses[**index as usize] > 1) {
        let fd = fetch(restorer, place).map_err(|error| Error::system("taking over an epoll", error))?;
        restorer.files[index as usize] = Some(fd);
    }
    if restorer.early.slots.is_empty() {
        return Ok(());
    }
    let mut in_place = HashSet::new();
    for table in &restorer.image.tables {
        let process = table.processes.first().copied().unwrap_or_default();
        in_place.extend(table.slots.iter().filter(|slot| is_in_place(restorer, process, slot)).map(|slot| slot.file));
    }
    let is_settled =
        |index: usize| uses[index] == 1 && u32::try_from(index).is_ok_and(|index| in_place.contains(&index));
    let unsettled: HashMap<ExternalKey, usize> = restorer
        .image
        .files
        .iter()
        .enumerate()
        .filter(|(index, _)| !is_settled(*index))
        .filter_map(|(index, file)| match file.kind {
            Kind::External(key) => Some((key, index)),
            _ => None,
        })
        .collect();
    if unsettled.is_empty() {
        return Ok(());
    }
    let misplaced: Vec<((u32, RawFd), ExternalKey, usize)> = restorer
        .early
        .slots
        .iter()
        .filter_map(|(place, key)| unsettled.get(key).map(|index| (*place, *key, *index)))
        .collect();
    for (place, key, index) in misplaced {
        let fd = fetch(restorer, place)
            .and_then(|fd| make::finish(restorer, &restorer.image.files[index], &fd).map(|()| fd))
            .map_err(|error| Error::system(format!("taking over {key:?}"), error))?;
        restorer.files[index] = Some(fd);
    }
    Ok(())
}

fn fetch(restorer: &Restorer, (process, number): (u32, RawFd)) -> io::Result<OwnedFd> {
    let pid = make::pid_of(restorer, process).ok_or(io::ErrorKind::NotFound)?;
    sys::process::pidfd_getfd(sys::process::pidfd_open(pid)?.as_fd(), number)
}
