//! What waits in a terminal.
//!
//! The kernel shows it to nobody but who reads it. So while everybody stands still it is read, and put back at once; at the target
//! it is put into the new terminal in the same way. The modes are others meanwhile, under which what goes in stays what it is.
//!
//! In canonical mode lines that are complete are read one by one, since only that tells where they end: a line may be ended by an end of
//! file, which isn't among its bytes. The line that is being typed is read after the mode was left, and typed again after that was
//! entered.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use serde_bytes::ByteBuf;
use sys::tty::Modes;
use sys::{fds, libc, tty};

use super::{Line, Stop, Waiting};

const START: u8 = 0x11;
const STOP: u8 = 0x13;
const END_OF_FILE: u8 = 0x04;
/// So many bytes that were read of a terminal's input find room in it again.
const CAPACITY: usize = 4095;
/// What an end that isn't read has no room for, the kernel keeps in blocks, each for at most twice as many bytes (`TTY_BUFFER_PAGE`).
const BLOCK: usize = 1792;
/// The same for the smallest blocks. Once made, they are had again however much is kept.
const SMALL_BLOCK: usize = 256;
/// New blocks are made until there are some for twice as many bytes (`tty_buffer_set_limit` for pseudo-terminals).
const LIMIT: usize = 8192;
/// So many bytes are put into small blocks at first, for the last large one to be made when the limit is just reached.
const FIRST: usize = 2 * (LIMIT % BLOCK);
/// What all small blocks hold that were ever made, beside the first.
const SMALL_BLOCKS: usize = 2 * (LIMIT + SMALL_BLOCK) - FIRST;
/// How long to wait for the kernel to pass on what was written, and how long between two looks. A thread of the kernel does it, which on
/// a busy machine waits for a processor for a good part of a second; nothing tells when it is done, and there always is room in the end.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(1);

/// Both ends of a terminal of which nobody else makes use now.
pub(crate) struct Pair<'a> {
    /// The master, not in packet mode.
    pub master: BorrowedFd<'a>,
    /// An open slave that doesn't wait.
    pub slave: BorrowedFd<'a>,
    /// The modes it is to have afterwards.
    pub modes: Modes,
}

fn is_canonical(modes: &Modes) -> bool {
    modes.local & libc::ICANON != 0 && modes.local & libc::EXTPROC == 0
}

fn is_writable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(fds::readiness(fd, libc::POLLOUT)? & libc::POLLOUT != 0)
}

fn is_readable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(fds::readiness(fd, libc::POLLIN)? & libc::POLLIN != 0)
}

impl Pair<'_> {
    /// Nothing that goes in is changed or has an effect, and all can be read at once.
    fn plain(&self) -> Modes {
        let mut characters = [0; 19];
        characters[libc::VMIN] = 1;
        Modes { input: 0, output: 0, local: self.modes.local & libc::EXTPROC, characters, ..self.modes }
    }

    /// The same but for lines, which end as they would.
    fn by_lines(&self) -> Modes {
        let mut modes = Modes { local: libc::ICANON, ..self.plain() };
        for character in [libc::VEOL, libc::VEOL2] {
            modes.characters[character] = self.modes.characters[character];
        }
        modes
    }

    /// The terminal's own modes with one more character.
    fn with_flow(&self, character: usize, byte: u8) -> Modes {
        let mut modes = Modes { input: self.modes.input | libc::IXON, ..self.modes };
        modes.characters[character] = byte;
        modes
    }

    /// Takes all out and adds it to what is known. What is known is right also when this fails.
    pub fn take(&self, waiting: &mut Waiting) -> io::Result<()> {
        self.take_output(waiting)?;
        if !is_writable(self.slave)? {
            self.start(waiting)?;
            self.take_output(waiting)?;
        }
        self.take_input(waiting)?;
        if !is_writable(self.master)? {
            tty::set_output_stopped(self.master, false)?;
            waiting.master_stopped = true;
        }
        // Echoes of what was typed found room now.
        self.take_output(waiting)
    }

    fn take_output(&self, waiting: &mut Waiting) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 16];
        while is_readable(self.master)? {
            let length = fds::read(self.master, &mut buffer)?;
            waiting.output.extend_from_slice(&buffer[..length]);
        }
        Ok(())
    }

    /// Lets stopped output go on, and notes what it was stopped by.
    fn start(&self, waiting: &mut Waiting) -> io::Result<()> {
        tty::set_modes(self.slave, &self.with_flow(libc::VSTART, START))?;
        tty::type_byte(self.slave, START)?;
        if is_writable(self.slave)? {
            waiting.stopped = Some(Stop::Character);
        } else {
            tty::set_output_stopped(self.slave, false)?;
            waiting.stopped = Some(Stop::Call);
        }
        tty::set_modes(self.slave, &self.modes)
    }

    fn take_input(&self, waiting: &mut Waiting) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 16];
        if is_canonical(&self.modes) {
            let ends = [b'\n', self.modes.characters[libc::VEOL], self.modes.characters[libc::VEOL2]];
            while is_readable(self.slave)? {
                let length = fds::read(self.slave, &mut buffer)?;
                let data = &buffer[..length];
                let ended = data.last().is_none_or(|last| *last == 0 || !ends.contains(last));
                waiting.lines.push(Line { data: ByteBuf::from(data), ended });
            }
        }
        tty::set_modes(self.slave, &self.plain())?;
        // What is there by now went through the terminal's modes; what comes after it had no room and did not.
        let mut seen = fds::bytes_waiting(self.slave)?;
        loop {
            let length = match fds::read(self.slave, &mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Ok(0) => return Ok(()),
                other => other?,
            };
            let (known, new) = buffer[..length].split_at(seen.min(length));
            waiting.rest.extend_from_slice(known);
            waiting.unseen.extend_from_slice(new);
            seen -= known.len();
        }
    }

    /// Puts all in, and gives the terminal its modes.
    pub fn put(&self, waiting: &Waiting) -> io::Result<()> {
        tty::set_modes(self.slave, &self.plain())?;
        write_all(self.slave, self.master, &waiting.output, CAPACITY)?;
        let late = self.put_input(waiting)?;
        if waiting.stopped == Some(Stop::Character) {
            tty::set_modes(self.slave, &self.with_flow(libc::VSTOP, STOP))?;
            tty::type_byte(self.slave, STOP)?;
        }
        tty::set_modes(self.slave, &self.modes)?;
        if !late.is_empty() {
            let flags = fds::status_flags(self.master)?;
            fds::set_status_flags(self.master, flags | libc::O_NONBLOCK)?;
            let written = write_all(self.master, self.slave, &late, 0);
            fds::set_status_flags(self.master, flags)?;
            written?;
        }
        if waiting.stopped == Some(Stop::Call) {
            tty::set_output_stopped(self.slave, true)?;
        }
        if waiting.master_stopped {
            tty::set_output_stopped(self.master, true)?;
        }
        Ok(())
    }

    /// Types all input. Returns what can only be written to the master, when the terminal has its own modes again.
    fn put_input(&self, waiting: &Waiting) -> io::Result<Vec<u8>> {
        let mut room = CAPACITY;
        let mut late = Vec::new();
        let mut put = |data: &[u8], room: &mut usize| -> io::Result<()> {
            let (first, second) = data.split_at(if late.is_empty() { data.len().min(*room) } else { 0 });
            *room -= first.len();
            late.extend_from_slice(second);
            first.iter().try_for_each(|byte| tty::type_byte(self.slave, *byte))
        };
        if is_canonical(&self.modes) {
            let lines = self.by_lines();
            tty::set_modes(self.slave, &lines)?;
            let mut ending = lines;
            ending.characters[libc::VEOF] = END_OF_FILE;
            for line in &waiting.lines {
                put(&line.data, &mut room)?;
                if line.ended {
                    tty::set_modes(self.slave, &ending)?;
                    put(&[END_OF_FILE], &mut room)?;
                    tty::set_modes(self.slave, &lines)?;
                }
            }
        }
        put(&waiting.rest, &mut room)?;
        late.extend_from_slice(&waiting.unseen);
        Ok(late)
    }
}

/// Writes to one end while nobody reads the other, which takes so many bytes at once. The rest is kept between them, where as much has
/// room as any writer had found there.
fn write_all(to: BorrowedFd<'_>, other: BorrowedFd<'_>, data: &[u8], taken: usize) -> io::Result<()> {
    let (taken, mut kept) = data.split_at(taken.min(data.len()));
    if kept.len() > LIMIT {
        make_small_blocks(to, other, !taken.is_empty())?;
    }
    write_pieces(to, taken, SMALL_BLOCK)?;
    until(taken.len(), || Ok(fds::bytes_waiting(other)? >= taken.len()))?;
    if kept.len() > SMALL_BLOCKS {
        let (first, rest) = kept.split_at(FIRST);
        let (large, rest) = rest.split_at(rest.len().saturating_sub(SMALL_BLOCKS).next_multiple_of(BLOCK));
        write_pieces(to, first, SMALL_BLOCK)?;
        write_pieces(to, large, BLOCK)?;
        kept = rest;
    }
    write_pieces(to, kept, SMALL_BLOCK)
}

/// Has the kernel make as many small blocks as it ever does, and leave none half full.
fn make_small_blocks(to: BorrowedFd<'_>, other: BorrowedFd<'_>, is_empty: bool) -> io::Result<()> {
    // What is in use at first may be large.
    for _ in 0..2 {
        while write_piece(to, &[0; SMALL_BLOCK])? > 0 {}
        tty::discard_output(to)?;
        if is_empty {
            tty::discard_input(other)?;
        }
    }
    Ok(())
}

/// Writes all in pieces of this size, each for a block or the half of one.
fn write_pieces(to: BorrowedFd<'_>, mut data: &[u8], size: usize) -> io::Result<()> {
    while !data.is_empty() {
        let mut written = 0;
        // The kernel may yet have to let go of a block whose content was passed on.
        until(data.len(), || {
            written = write_piece(to, &data[..data.len().min(size)])?;
            Ok(written > 0)
        })?;
        data = &data[written..];
    }
    Ok(())
}

/// Writes what has room. Returns how much that was.
fn write_piece(to: BorrowedFd<'_>, piece: &[u8]) -> io::Result<usize> {
    match fds::write(to, piece) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        written => written,
    }
}

/// Gives the kernel time until this holds. So many bytes wait for it.
fn until(length: usize, mut holds: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let begun = Instant::now();
    while !holds()? {
        if begun.elapsed() > PATIENCE {
            return Err(io::Error::other(format!("{length} bytes that waited in a terminal have no room in it")));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}
