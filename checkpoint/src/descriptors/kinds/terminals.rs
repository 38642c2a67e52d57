//! Ends of pseudo-terminals, see [`crate::terminals`].

use std::io;
use std::os::fd::AsFd;

use sys::{fds, libc, tty};

use super::super::image::{Kind, TerminalFile};
use super::super::scan::Seen;
use super::{Dumping, Handler, Problem, View, index32};
use crate::terminals::content::Pair;
use crate::terminals::{self, LiveTerminal, TerminalEnd, TerminalImage, Waiting};

/// An end of a pseudo-terminal.
pub(in super::super) struct Terminal;

fn end(seen: &Seen) -> Option<TerminalEnd> {
    seen.status.filter(|status| status.file_type() == libc::S_IFCHR).and_then(|status| terminals::end(status.special))
}

/// The number of the terminal behind a file that isn't hung up.
fn number(seen: &Seen) -> io::Result<Option<u32>> {
    let (_, minor) = fds::device_numbers(match end(seen) {
        Some(TerminalEnd::Master) => return Ok(seen.info()?.value("tty-index:").and_then(|index| index.parse().ok())),
        Some(TerminalEnd::Slave) => seen.status.map_or(0, |status| status.special),
        Some(TerminalEnd::Controlling) => tty::device(seen.file()?.as_fd())?,
        None => return Ok(None),
    });
    Ok(Some(minor))
}

fn is_hung_up(seen: &Seen) -> io::Result<bool> {
    match tty::modes(seen.file()?.as_fd()) {
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(true),
        other => other.map(|_| false),
    }
}

/// The master of a terminal of the job's.
pub(in super::super) fn master<'a>(wanted: u32, view: &View<'a>) -> io::Result<Option<&'a Seen>> {
    for seen in &view.scan.files {
        let is_own = || seen.status.map(|status| status.device) == view.terminals();
        if end(seen) == Some(TerminalEnd::Master) && is_own() && number(seen)? == Some(wanted) {
            return Ok(Some(seen));
        }
    }
    Ok(None)
}

impl Handler for Terminal {
    fn recognises(&self, seen: &Seen) -> bool {
        end(seen).is_some()
    }

    fn obstacle(&self, seen: &Seen, view: &View<'_>) -> io::Result<Option<String>> {
        let stays = |why: &str| Ok(Some(format!("terminal {}; {why}", seen.shown())));
        let foreign = "run the program without one, or with one of its own";
        let is_own = seen.status.map(|status| status.device) == view.terminals();
        match end(seen) {
            Some(TerminalEnd::Master) if is_own && seen.info()?.flags & libc::O_ACCMODE == libc::O_RDWR => Ok(None),
            Some(TerminalEnd::Master) if is_own => stays("its master is open for reading or for writing only"),
            Some(TerminalEnd::Slave) if !is_own => stays(foreign),
            Some(TerminalEnd::Slave | TerminalEnd::Controlling) => {
                // A descriptor is hung up as a whole or not; only a living terminal has a master.
                if is_hung_up(seen)? || number(seen)?.map_or(Ok(None), |number| master(number, view))?.is_some() {
                    return Ok(None);
                }
                stays(foreign)
            }
            _ => stays(foreign),
        }
    }

    fn dump(&self, seen: &Seen, _: usize, dump: &mut Dumping<'_>) -> Result<Kind, Problem> {
        if let Some(reason) = self.obstacle(seen, dump.view)? {
            return Err(Problem::Stays(reason));
        }
        let end = end(seen).ok_or_else(|| Problem::Stays("a terminal without a number".into()))?;
        let is_live = end == TerminalEnd::Master || !is_hung_up(seen)?;
        let number = match end {
            // What it was opened as leads nowhere any more.
            TerminalEnd::Controlling if !is_live => None,
            _ => number(seen)?,
        };
        let master = number.map_or(Ok(None), |number| master(number, dump.view))?;
        // The number of one that is hung up is kept for it, unless it was hung up in another way.
        let number = if is_live || master.is_none() { number } else { None };
        let known =
            |image: &TerminalImage| number.is_some() && (image.number, image.live.is_some()) == (number, is_live);
        let terminal = match dump.image.terminals.iter().position(known) {
            Some(index) => index,
            None => {
                let live = match (master, number) {
                    (Some(master), Some(number)) if is_live => Some(live(master, number, dump.view)?),
                    _ => None,
                };
                dump.image.terminals.push(TerminalImage { number, live });
                dump.image.terminals.len() - 1
            }
        };
        Ok(Kind::Terminal(TerminalFile { terminal: index32(terminal), end }))
    }
}

/// Whether somebody has the slave open.
fn has_slave(wanted: u32, view: &View<'_>) -> io::Result<bool> {
    for seen in &view.scan.files {
        let is_slave = matches!(end(seen), Some(TerminalEnd::Slave | TerminalEnd::Controlling));
        if is_slave && !is_hung_up(seen)? && number(seen)? == Some(wanted) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What there is to a terminal. It is as before afterwards.
fn live(master: &Seen, number: u32, view: &View<'_>) -> Result<LiveTerminal, Problem> {
    let stays = |why: &str| Err(Problem::Stays(format!("terminal {number}, {why}")));
    let master = master.file()?.as_fd();
    let events = fds::readiness(master, libc::POLLPRI)?;
    // To open it only to look, and to close it again, would tell the master that whoever used it has gone.
    if events & libc::POLLHUP == 0 && !has_slave(number, view)? {
        return stays("which nobody has opened yet; try again");
    }
    let packet = tty::is_packet(master)?;
    if packet && events & libc::POLLPRI != 0 {
        return stays("of which a change of state (TIOCPKT) waits to be read; try again");
    }
    let locked = tty::is_locked(master)?;
    if locked {
        tty::set_locked(master, false)?;
    }
    let slave = tty::open_slave(master, libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK);
    if locked {
        tty::set_locked(master, true)?;
    }
    let slave = slave?;
    let slave = slave.as_fd();
    if [master, slave].map(tty::line_discipline).into_iter().any(|found| found.ok() != Some(tty::N_TTY)) {
        return stays("which has another line discipline than terminals have");
    }
    let session = tty::session(master).ok().and_then(|leader| view.job.number_of(sys::Pid::from_raw(leader)));
    let node = fds::status(slave)?;
    let modes = tty::modes(slave)?;
    tty::set_packet(master, false)?;
    let pair = Pair { master, slave, modes };
    let mut waiting = Waiting::default();
    let taken = pair.take(&mut waiting);
    let put = pair.put(&waiting);
    tty::set_packet(master, packet)?;
    if let Err(error) = &put {
        tracing::error!(%error, terminal = number, "a part of what waited in a terminal of the job is lost");
    }
    taken.and(put)?;
    Ok(LiveTerminal {
        session,
        modes,
        window: tty::window(slave)?,
        locked,
        packet,
        exclusive: tty::is_exclusive(slave)?,
        mode: node.mode & 0o7777,
        owner: (node.uid, node.gid),
        waiting,
    })
}
