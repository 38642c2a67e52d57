//! Terminals made anew.
//!
//! A fresh `/dev/pts` gives numbers from 0 on, so those that the image leaves out are made too, and closed at the end. Only the leader of a
//! session can take a controlling terminal, and those who are born afterwards have it with it: so terminals of sessions are made as soon as
//! a layout tells of them, and get all else in the freeze.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};

use sys::proc::Place;
use sys::tape::Tape;
use sys::{Pid, fds, libc, tty};

use super::content::Pair;
use super::{LiveTerminal, MAKER, TerminalEnd, TerminalImage, quiet};
use crate::descriptors::Tapes;
use crate::descriptors::image::{Kind, OpenFile, TerminalFile, TreeDescriptors};
use crate::descriptors::namespace::enter_kinds;
use crate::error::{Error, Result};
use crate::image::{ProcessImage, ProcessState};
use crate::stubs::Stubs;

/// The terminals of a tree under construction.
#[derive(Debug)]
pub(crate) struct Terminals {
    init: Pid,
    /// Masters, by number.
    masters: BTreeMap<u32, OwnedFd>,
    /// What controls each session, by its leader.
    controlling: BTreeMap<u32, u32>,
}

/// Open files by their index in the image.
pub(crate) type Opened = HashMap<usize, OwnedFd>;

fn failed(what: &str) -> impl Fn(std::io::Error) -> Error + '_ {
    move |error| Error::system(what, error)
}

impl Terminals {
    pub fn of(init: Pid) -> Terminals {
        Terminals { init, masters: BTreeMap::new(), controlling: BTreeMap::new() }
    }

    /// A process is gone.
    pub fn forget(&mut self, process: u32) {
        self.controlling.remove(&process);
    }

    /// Makes terminals until there is this one, or one more without a number.
    fn make(&mut self, number: Option<u32>) -> Result<u32> {
        if let Some(number) = number.filter(|number| self.masters.contains_key(number)) {
            return Ok(number);
        }
        let made = enter_kinds(self.init, libc::CLONE_NEWNS, || {
            let mut made = Vec::new();
            loop {
                let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK;
                let master = fds::open_at(None, OsStr::new(MAKER), flags, 0)?;
                let index = tty::index(master.as_fd())?;
                tty::set_locked(master.as_fd(), false)?;
                made.push((index, master));
                if number.is_none_or(|number| number <= index) {
                    return Ok(made);
                }
            }
        });
        self.masters.extend(made.map_err(failed("making a terminal"))?);
        let last = self.masters.last_key_value().map_or(0, |(index, _)| *index);
        match number {
            None => Ok(last),
            Some(number) if self.masters.contains_key(&number) => Ok(number),
            Some(number) => {
                Err(Error::Refused(format!("terminal {number} can't be made: its /dev/pts has it already")))
            }
        }
    }

    fn master(&self, number: u32) -> Result<&OwnedFd> {
        self.masters.get(&number).ok_or_else(|| Error::Image(format!("terminal {number} isn't in it")))
    }

    /// Gives the leader of a session its controlling terminal.
    pub fn control(&mut self, leader: u32, number: u32, stubs: &mut Stubs) -> Result<()> {
        if self.controlling.get(&leader) == Some(&number) {
            return Ok(());
        }
        let number = self.make(Some(number))?;
        let slave = tty::open_slave(self.master(number)?.as_fd(), libc::O_RDWR | libc::O_NOCTTY);
        let slave = slave.map_err(failed("opening a terminal"))?;
        // The second argument only matters to root: never to take it from another session.
        ask(leader, stubs, &slave, &[libc::TIOCSCTTY.into(), 0.into()], "taking its controlling terminal")?;
        self.controlling.insert(leader, number);
        Ok(())
    }

    /// Makes all terminals what they were, and opens their ends.
    pub fn restore(
        mut self,
        processes: &[ProcessImage],
        descriptors: &TreeDescriptors,
        stubs: &mut Stubs,
    ) -> Result<Opened> {
        let images = &descriptors.terminals;
        let mut numbers = vec![0; images.len()];
        // Those that may have any number come after those that may not.
        let (fixed, any): (Vec<usize>, Vec<usize>) =
            (0..images.len()).partition(|&index| images[index].number.is_some());
        for index in fixed.into_iter().chain(any) {
            numbers[index] = self.make(images[index].number)?;
        }
        let mut slaves = Vec::with_capacity(images.len());
        for (image, number) in images.iter().zip(&numbers) {
            slaves.push(self.settle(image, *number)?);
        }
        for process in processes.iter().filter(|process| process.process == process.session) {
            if let Some(terminal) = process.terminal {
                self.control(process.process, terminal.number, stubs)?;
            }
        }
        for process in processes.iter().filter(|process| matches!(process.state, ProcessState::Alive(_))) {
            check(process, stubs)?;
        }
        let mut opened = Opened::new();
        for (index, file) in descriptors.files.iter().enumerate() {
            if let Kind::Terminal(end) = file.kind {
                opened.insert(index, self.open(file, end, &numbers, processes, stubs)?);
            }
        }
        for process in processes.iter().filter(|process| process.process == process.session) {
            if let Some(terminal) = process.terminal {
                self.set_foreground(process.process, terminal.number, terminal.foreground, stubs)?;
            }
        }
        for ((image, number), slave) in images.iter().zip(&numbers).zip(&slaves) {
            if let Some(live) = &image.live {
                finish(live, self.master(*number)?, slave).map_err(failed("setting up a terminal"))?;
            }
        }
        Ok(opened)
    }

    /// Gives a terminal its modes and what waits in it. Returns a slave of ours.
    fn settle(&self, image: &TerminalImage, number: u32) -> Result<OwnedFd> {
        let master = self.master(number)?.as_fd();
        let slave = tty::open_slave(master, libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK);
        let slave = slave.map_err(failed("opening a terminal"))?;
        if let Some(live) = &image.live {
            let pair = Pair { master, slave: slave.as_fd(), modes: live.modes };
            let filled = tty::set_window(master, &live.window).and_then(|()| pair.put(&live.waiting));
            filled.map_err(failed("filling a terminal"))?;
        }
        Ok(slave)
    }

    /// Opens an end, or takes one that is open.
    fn open(
        &self,
        file: &OpenFile,
        end: TerminalFile,
        numbers: &[u32],
        processes: &[ProcessImage],
        stubs: &mut Stubs,
    ) -> Result<OwnedFd> {
        let number = numbers.get(end.terminal as usize).copied().unwrap_or(u32::MAX);
        let master = self.master(number)?;
        let opened = match end.end {
            TerminalEnd::Master => master.try_clone(),
            TerminalEnd::Slave => tty::open_slave(master.as_fd(), quiet(file.flags)),
            TerminalEnd::Controlling => {
                let has_it = |process: &&ProcessImage| {
                    let is_alive = matches!(process.state, ProcessState::Alive(_));
                    is_alive && process.terminal.is_some_and(|terminal| terminal.number == number)
                };
                let Some(process) = processes.iter().find(has_it) else {
                    // Hung up, or nobody's: it can't be told from the terminal itself but by its name.
                    return tty::open_slave(master.as_fd(), quiet(file.flags)).map_err(failed("opening a terminal"));
                };
                return open_controlling(process.process, file.flags, stubs);
            }
        };
        opened.map_err(failed("opening a terminal"))
    }

    fn set_foreground(&self, leader: u32, number: u32, group: u32, stubs: &mut Stubs) -> Result<()> {
        // One without members may have given its number to somebody else.
        let is_there = stubs.inside.proc.stat(Place::Process(group)).is_ok_and(|stat| stat.group == group)
            || stubs
                .numbers()
                .into_iter()
                .any(|process| stubs.inside.proc.stat(Place::Process(process)).is_ok_and(|stat| stat.group == group));
        if !is_there {
            return Ok(());
        }
        let slave = tty::open_slave(self.master(number)?.as_fd(), libc::O_RDWR | libc::O_NOCTTY);
        let slave = slave.map_err(failed("opening a terminal"))?;
        let mut tape = Tape::new();
        let group = tape.data(&group.to_ne_bytes());
        let descriptor = Tapes::import(stubs, leader, slave.as_fd()).map_err(failed("opening a terminal"))?;
        tape.require(libc::SYS_ioctl, &[descriptor.into(), libc::TIOCSPGRP.into(), group.into()]);
        tape.require(libc::SYS_close, &[descriptor.into()]);
        stubs.get(leader)?.run(&tape, "setting the foreground of its terminal")?;
        Ok(())
    }
}

/// Has a process make a call on a terminal.
fn ask(
    process: u32,
    stubs: &mut Stubs,
    slave: &OwnedFd,
    call: &[sys::tape::Argument; 2],
    what: &'static str,
) -> Result<()> {
    let descriptor = Tapes::import(stubs, process, slave.as_fd()).map_err(failed("opening a terminal"))?;
    let mut tape = Tape::new();
    let done = tape.syscall(libc::SYS_ioctl, &[descriptor.into(), call[0], call[1]]);
    tape.require(libc::SYS_close, &[descriptor.into()]);
    let results = stubs.get(process)?.run(&tape, what)?;
    results.get(done).map_err(|error| Error::process(process, what, error))?;
    Ok(())
}

/// Whether a process has the terminal that it had. One that gave up its session's does so again.
fn check(image: &ProcessImage, stubs: &mut Stubs) -> Result<()> {
    let process = image.process;
    let stat = stubs.inside.proc.stat(Place::Process(process));
    let stat = stat.map_err(|error| Error::process(process, "reading its stat", error))?;
    let has = super::number(&stat);
    let wanted = image.terminal.map(|terminal| terminal.number);
    if has == wanted {
        return Ok(());
    }
    if wanted.is_none() && process != image.session {
        let opened = open_controlling(process, libc::O_RDWR, stubs)?;
        return ask(process, stubs, &opened, &[libc::TIOCNOTTY.into(), 0.into()], "giving up its terminal");
    }
    Err(Error::Image(format!("process {process} changed its controlling terminal while it was copied; try again")))
}

/// Has a process open its controlling terminal.
fn open_controlling(process: u32, flags: i32, stubs: &mut Stubs) -> Result<OwnedFd> {
    let mut tape = Tape::new();
    let path = tape.string(b"/dev/tty");
    let flags = quiet(flags) | libc::O_CLOEXEC;
    let opened = tape.require(libc::SYS_openat, &[libc::AT_FDCWD.into(), path.into(), flags.into()]);
    let stub = stubs.get(process)?;
    let number = i32::try_from(stub.run(&tape, "opening its terminal")?.raw(opened)).unwrap_or(-1);
    let fetched = sys::process::pidfd_open(stub.pid)
        .and_then(|process| sys::process::pidfd_getfd(process.as_fd(), number))
        .map_err(|error| Error::process(process, "opening its terminal", error))?;
    let mut tape = Tape::new();
    tape.require(libc::SYS_close, &[number.into()]);
    stub.run(&tape, "opening its terminal")?;
    Ok(fetched)
}

/// What would be in the way before.
fn finish(live: &LiveTerminal, master: &OwnedFd, slave: &OwnedFd) -> std::io::Result<()> {
    let slave = slave.as_fd();
    fds::set_owner(slave, live.owner.0, live.owner.1)?;
    fds::set_mode(slave, live.mode)?;
    if live.exclusive {
        tty::set_exclusive(slave)?;
    }
    tty::set_packet(master.as_fd(), live.packet)?;
    tty::set_locked(master.as_fd(), live.locked)
}
