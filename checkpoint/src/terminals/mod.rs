//! Pseudo-terminals, and whom they control.
//!
//! A job has a `/dev/pts` of its own, so that its terminals have the same numbers wherever it is. Both ends of one are in the job: a
//! server of terminals (sshd, tmux) has the master, programs have the slave. One that was hung up, since its master is closed, is made
//! and hung up again.
//!
//! | module | what |
//! | --- | --- |
//! | `content` | what waits in a terminal: taken out and put back, for the kernel has no way to look at it |
//! | `restore` | terminals made anew, as controlling ones too |
//!
//! Left behind: the column that the kernel believes the cursor is in (for erasing a tab while a line is edited), whether a ^V has just
//! been typed, and echoes that wait behind a full master.

pub(crate) mod content;
mod restore;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use sys::proc::Stat;
use sys::tty::{Modes, Window};
use sys::{Pid, fds, libc, namespaces, tty};

pub(crate) use restore::Terminals;

/// Where they are.
const PLACE: &str = "/dev/pts";
/// What makes one.
const MAKER: &str = "/dev/ptmx";
/// Its own node for that.
const OWN_MAKER: &str = "/dev/pts/ptmx";
/// Major device number of slaves; the minor one is the terminal's number.
const SLAVES: u32 = 136;

/// A pseudo-terminal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalImage {
    /// Its number; `None` when nobody can tell any more.
    pub number: Option<u32>,
    /// `None` when it was hung up.
    pub live: Option<LiveTerminal>,
}

/// One that works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveTerminal {
    /// The session that it controls, as the job numbers it.
    pub session: Option<u32>,
    /// Modes.
    pub modes: Modes,
    /// Size.
    pub window: Window,
    /// The slave can't be opened.
    pub locked: bool,
    /// The master is in packet mode.
    pub packet: bool,
    /// It can't be opened once more.
    pub exclusive: bool,
    /// Permissions of the slave.
    pub mode: u32,
    /// Owner and group of the slave.
    pub owner: (u32, u32),
    /// What waits in it.
    pub waiting: Waiting,
}

/// What waits in a terminal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// Lines that a reader of the slave gets one by one (canonical mode).
    pub lines: Vec<Line>,
    /// What comes after: the line that is being typed, or in other modes all that can be read.
    pub rest: ByteBuf,
    /// What was written to the master and found no room behind that.
    pub unseen: ByteBuf,
    /// What a reader of the master gets.
    pub output: ByteBuf,
    /// The slave's output was stopped.
    pub stopped: Option<Stop>,
    /// The master's output was stopped, by tcflow(3).
    pub master_stopped: bool,
}

/// A line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// What is read of it, with what ended it unless that was an end of file.
    pub data: ByteBuf,
    /// It was ended by an end of file (^D).
    pub ended: bool,
}

/// What stopped a terminal's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stop {
    /// The character for that (^S).
    Character,
    /// tcflow(3).
    Call,
}

/// A process's controlling terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Controlling {
    /// Its number.
    pub number: u32,
    /// Its foreground process group; 0 without one.
    pub foreground: u32,
}

/// Which end of a terminal an open file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TerminalEnd {
    /// The master.
    Master,
    /// The slave.
    Slave,
    /// The slave, opened as `/dev/tty`.
    Controlling,
}

/// Number of a process's controlling terminal, when that is a pseudo-terminal.
pub(crate) fn number(stat: &Stat) -> Option<u32> {
    let (major, minor) = fds::device_numbers(tty::decode_device(stat.terminal));
    (major == SLAVES).then_some(minor)
}

/// A process's controlling terminal, when that is a pseudo-terminal.
pub(crate) fn controlling(stat: &Stat) -> Option<Controlling> {
    Some(Controlling { number: number(stat)?, foreground: u32::try_from(stat.foreground).unwrap_or(0) })
}

/// Which end of a terminal has this device number, if it is of a pseudo-terminal.
pub(crate) fn end(device: u64) -> Option<TerminalEnd> {
    match fds::device_numbers(device) {
        (5, 0) => Some(TerminalEnd::Controlling),
        (5, 2) => Some(TerminalEnd::Master),
        (SLAVES, _) => Some(TerminalEnd::Slave),
        _ => None,
    }
}

/// The device of the job's own `/dev/pts`; `None` when it has none of its own.
pub(crate) fn device(init: Pid) -> Option<u64> {
    let own = std::fs::metadata(format!("/proc/{init}/root{PLACE}")).ok()?.dev();
    let nodes = std::fs::metadata(PLACE).ok().map(|metadata| metadata.dev());
    (nodes != Some(own)).then_some(own)
}

/// Gives the calling process's mount namespace terminals of its own. Does nothing on a machine without any.
pub(crate) fn mount() -> io::Result<()> {
    let place = Path::new(PLACE);
    if !place.is_dir() {
        return Ok(());
    }
    namespaces::mount_terminals(place)?;
    match Path::new(MAKER).symlink_metadata() {
        // A link leads to the new one already.
        Ok(metadata) if !metadata.is_symlink() => namespaces::mount_over(Path::new(OWN_MAKER), Path::new(MAKER)),
        _ => Ok(()),
    }
}

/// Flags for opening an end without more effect than that.
fn quiet(flags: i32) -> i32 {
    flags & (libc::O_ACCMODE | libc::O_NONBLOCK) | libc::O_NOCTTY
}
