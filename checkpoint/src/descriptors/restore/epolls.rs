//! Fills epoll instances, in the processes that have them.
//!
//! The kernel remembers the number with which something is added, so it has to be added by a process where that number is it.
//! Where the number means something else by now, or nothing, it gets its old meaning for that moment.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::RawFd;

use sys::fds::events::epoll_event_bytes;
use sys::libc;
use sys::tape::{Argument, Tape};

use super::super::Tapes;
use super::super::image::{EpollWatch, Kind, Slot, TreeDescriptors};
use super::super::kinds::index32;
use super::tables::{Channel, fetch};
use super::{Externals, Restorer};
use crate::error::{Error, Result};

/// Bits that say how to report, not what.
const MODES: u32 = (libc::EPOLLONESHOT | libc::EPOLLET | libc::EPOLLWAKEUP | libc::EPOLLEXCLUSIVE).cast_unsigned();

/// One watch that a process adds.
#[derive(Clone, Copy)]
struct Addition {
    /// Number of the epoll in the process.
    epoll: RawFd,
    watch: EpollWatch,
}

/// Where an epoll is: indexes of tables with its number there.
fn places(image: &TreeDescriptors, epoll: usize) -> Vec<(usize, RawFd)> {
    let slot = |table: usize| image.tables[table].slots.iter().find(|slot| slot.file as usize == epoll);
    (0..image.tables.len()).filter_map(|table| Some((table, slot(table)?.number))).collect()
}

fn slot_of(slots: &[Slot], number: RawFd) -> Option<&Slot> {
    slots.binary_search_by_key(&number, |slot| slot.number).ok().map(|at| &slots[at])
}

/// Watches by the process that adds them.
#[derive(Default)]
struct Assignment {
    /// With numbers that mean their file there, by index of the table.
    straight: BTreeMap<usize, Vec<Addition>>,
    /// Others, each with the index of its table.
    displaced: Vec<(usize, Addition)>,
}

/// All watches but those that are there already: by index of the epoll's file, and number.
fn assign(image: &TreeDescriptors, watched: &HashSet<(u32, RawFd)>) -> Assignment {
    let Assignment { mut straight, mut displaced } = Assignment::default();
    for (index, file) in image.files.iter().enumerate() {
        let Kind::Epoll { watches } = &file.kind else { continue };
        let places = places(image, index);
        for &watch in watches {
            let fits = |(table, _): &&(usize, RawFd)| {
                slot_of(&image.tables[*table].slots, watch.number).is_some_and(|slot| slot.file == watch.file)
            };
            match (places.iter().find(fits), places.first()) {
                (Some(_), _) if watched.contains(&(index32(index), watch.number)) => {}
                (Some(&(table, epoll)), _) => straight.entry(table).or_default().push(Addition { epoll, watch }),
                (None, Some(&(table, epoll))) => displaced.push((table, Addition { epoll, watch })),
                (None, None) => {}
            }
        }
    }
    Assignment { straight, displaced }
}

/// Watches with numbers that mean something else, with the index of the table whose process adds them.
pub(super) fn displaced(image: &TreeDescriptors) -> Vec<(usize, EpollWatch)> {
    assign(image, &HashSet::new()).displaced.into_iter().map(|(table, addition)| (table, addition.watch)).collect()
}

/// Fills all epolls, with all but what they watch already. Every table is complete by now.
pub(super) fn fill(
    restorer: &mut Restorer,
    channels: &[Channel],
    watched: &HashSet<(u32, RawFd)>,
    tapes: &mut dyn Tapes,
    externals: &mut Externals<'_>,
) -> Result<()> {
    let Assignment { straight, displaced } = assign(&restorer.image, watched);
    for (table, additions) in straight {
        let process = channels[table].process;
        add_all(process, &additions, tapes).map_err(|error| failed(process, error))?;
    }
    for (table, addition) in displaced {
        fetch(restorer, addition.watch.file as usize, externals)?;
        let process = channels[table].process;
        add_displaced(restorer, table, &channels[table], addition, tapes).map_err(|error| failed(process, error))?;
    }
    Ok(())
}

fn failed(process: u32, error: io::Error) -> Error {
    Error::process(process, "filling its epoll", error)
}

fn control(tape: &mut Tape, operation: i32, addition: &Addition, number: Argument, events: u32) {
    let event = tape.data(&epoll_event_bytes(events, addition.watch.data));
    tape.require(libc::SYS_epoll_ctl, &[addition.epoll.into(), operation.into(), number, event.into()]);
}

/// Watches on one tape: their records of 16 bytes and the calls fit a region many times.
const ADDITIONS_ON_TAPE: usize = 4096;

fn add_all(process: u32, additions: &[Addition], tapes: &mut dyn Tapes) -> io::Result<()> {
    let is_spent = |addition: &&Addition| {
        let events = addition.watch.events;
        events & libc::EPOLLONESHOT.cast_unsigned() != 0 && events & !MODES == 0
    };
    let spent: Vec<Addition> = additions.iter().filter(is_spent).copied().collect();
    add_spent(process, &spent, tapes)?;
    let live: Vec<&Addition> = additions.iter().filter(|addition| !is_spent(addition)).collect();
    for additions in live.chunks(ADDITIONS_ON_TAPE) {
        let mut tape = Tape::new();
        for addition in additions {
            control(&mut tape, libc::EPOLL_CTL_ADD, addition, addition.watch.number.into(), addition.watch.events);
        }
        tapes.run(process, &tape)?;
    }
    Ok(())
}

/// One-shot watches that have fired: they report nothing until the program arms them again. The kernel arms whatever is
/// added, for errors and hang-ups at least; so they are added for what is probably ready, and what they report is taken.
/// One that isn't ready stays armed for errors and hang-ups.
fn add_spent(process: u32, spent: &[Addition], tapes: &mut dyn Tapes) -> io::Result<()> {
    const MOST: usize = 64;
    // 12 bytes an event.
    const ROOM: usize = MOST * 12;
    let ready = (libc::EPOLLIN | libc::EPOLLOUT).cast_unsigned();
    for additions in spent.chunks(MOST) {
        let mut tape = Tape::new();
        for addition in additions {
            control(
                &mut tape,
                libc::EPOLL_CTL_ADD,
                addition,
                addition.watch.number.into(),
                addition.watch.events | ready,
            );
        }
        let epolls: HashSet<RawFd> = additions.iter().map(|addition| addition.epoll).collect();
        let mut waits = Vec::new();
        for epoll in epolls {
            let events = tape.room(ROOM);
            let arguments = [epoll.into(), events.into(), MOST.into(), 0.into()];
            waits.push((epoll, events, tape.require(libc::SYS_epoll_wait, &arguments)));
        }
        let results = tapes.run(process, &tape)?;
        let mut fired: HashSet<(RawFd, u64)> = HashSet::new();
        for (epoll, events, call) in waits {
            let count = usize::try_from(results.get(call)?).unwrap_or(0).min(MOST);
            for event in results.data(events, count * 12).chunks_exact(12) {
                fired.insert((epoll, u64::from_ne_bytes(std::array::from_fn(|at| event[4 + at]))));
            }
        }
        let mut tape = Tape::new();
        for addition in additions.iter().filter(|addition| !fired.contains(&(addition.epoll, addition.watch.data))) {
            control(&mut tape, libc::EPOLL_CTL_MOD, addition, addition.watch.number.into(), addition.watch.events);
        }
        if !tape.is_empty() {
            tapes.run(process, &tape)?;
        }
    }
    Ok(())
}

fn add_displaced(
    restorer: &Restorer,
    table: usize,
    channel: &Channel,
    addition: Addition,
    tapes: &mut dyn Tapes,
) -> io::Result<()> {
    let file = restorer.files[addition.watch.file as usize].as_ref();
    let imported = channel.import(file.ok_or_else(|| io::Error::other("a watched file wasn't made"))?, tapes)?;
    let number = addition.watch.number;
    let present = slot_of(&restorer.image.tables[table].slots, number);
    let mut tape = Tape::new();
    if imported == number {
        control(&mut tape, libc::EPOLL_CTL_ADD, &addition, number.into(), addition.watch.events);
        tape.require(libc::SYS_close, &[imported.into()]);
        return tapes.run(channel.process, &tape).map(drop);
    }
    let saved =
        present.map(|_| tape.require(libc::SYS_fcntl, &[number.into(), libc::F_DUPFD_CLOEXEC.into(), 0.into()]));
    tape.require(libc::SYS_dup3, &[imported.into(), number.into(), libc::O_CLOEXEC.into()]);
    control(&mut tape, libc::EPOLL_CTL_ADD, &addition, number.into(), addition.watch.events);
    match (saved, present) {
        (Some(saved), Some(slot)) => {
            let flags = if slot.close_on_exec { libc::O_CLOEXEC } else { 0 };
            tape.require(libc::SYS_dup3, &[saved.into(), number.into(), flags.into()]);
            tape.require(libc::SYS_close, &[saved.into()]);
        }
        _ => {
            tape.require(libc::SYS_close, &[number.into()]);
        }
    }
    tape.require(libc::SYS_close, &[imported.into()]);
    tapes.run(channel.process, &tape).map(drop)
}
