//! Pipes and FIFOs.
//!
//! Every open end in the job belongs to one [`PipeImage`]. What waits in a pipe is copied with tee(2), so the pipe stays as it
//! is. An end that the job doesn't hold is either closed, which the other end's poll(2) tells, or held by somebody outside,
//! and then the pipe stays here.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use serde_bytes::ByteBuf;
use sys::fds;
use sys::libc;

use super::super::image::{Kind, PipeEnd, PipeImage};
use super::super::scan::Seen;
use super::{Dumping, Handler, Problem, View, index32};

/// A pipe or FIFO.
pub(in super::super) struct Pipe;

fn identity(seen: &Seen) -> Option<(u64, u64)> {
    seen.status.map(|status| (status.device, status.inode))
}

fn can_read(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_WRONLY
}

fn can_write(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

fn obstacle(seen: &Seen, view: &View<'_>) -> io::Result<Option<String>> {
    let (mut readers, mut writers) = (false, false);
    for other in view.scan.files.iter().filter(|other| identity(other) == identity(seen)) {
        let flags = other.info()?.flags;
        readers |= can_read(flags);
        writers |= can_write(flags);
    }
    let file = seen.file()?.as_fd();
    if !readers && fds::readiness(file, libc::POLLOUT)? & libc::POLLERR == 0 {
        return Ok(Some(format!("{} whose reading end is outside the job", seen.shown())));
    }
    if !writers && fds::readiness(file, libc::POLLIN)? & libc::POLLHUP == 0 {
        return Ok(Some(format!("{} whose writing end is outside the job", seen.shown())));
    }
    Ok(None)
}

impl Handler for Pipe {
    fn recognises(&self, seen: &Seen) -> bool {
        seen.file_type() == libc::S_IFIFO
    }

    fn obstacle(&self, seen: &Seen, view: &View<'_>) -> io::Result<Option<String>> {
        obstacle(seen, view)
    }

    fn dump(&self, seen: &Seen, _: usize, dump: &mut Dumping<'_>) -> Result<Kind, Problem> {
        let identity = identity(seen).ok_or_else(|| Problem::Stays("a pipe without status".into()))?;
        if let Some(&pipe) = dump.pipes.get(&identity) {
            return Ok(Kind::Pipe(PipeEnd { pipe }));
        }
        if let Some(reason) = obstacle(seen, dump.view)? {
            return Err(Problem::Stays(reason));
        }
        let image = pipe(seen, identity, dump)?;
        let pipe = index32(dump.image.pipes.len());
        dump.image.pipes.push(image);
        dump.pipes.insert(identity, pipe);
        Ok(Kind::Pipe(PipeEnd { pipe }))
    }
}

fn pipe(seen: &Seen, of: (u64, u64), dump: &Dumping<'_>) -> Result<PipeImage, Problem> {
    let path = if seen.link.starts_with(b"/") {
        let same = |status: sys::fds::Status| (status.device, status.inode) == of;
        if !dump.view.status_of(&seen.link).is_ok_and(same) {
            return Err(Problem::Stays(format!("FIFO {} was deleted or replaced", seen.shown())));
        }
        Some(ByteBuf::from(seen.link.clone()))
    } else {
        None
    };
    let capacity = fds::pipe_capacity(seen.file()?.as_fd())?;
    let (mut reader, mut writes_packets) = (None, false);
    for other in dump.view.scan.files.iter().filter(|other| identity(other) == Some(of)) {
        let flags = other.info()?.flags;
        writes_packets |= can_write(flags) && flags & libc::O_DIRECT != 0;
        if can_read(flags) {
            reader = Some(other);
        }
    }
    // Without a reader nobody can ever see what is in it.
    let (data, packets) = match reader {
        Some(reader) => copy(reader.file()?.as_fd(), capacity, writes_packets)?,
        None => (Vec::new(), false),
    };
    let (_, inode) = of;
    Ok(PipeImage { inode, path, capacity: capacity as u64, data, packets })
}

/// What waits in a pipe, and whether it is packets.
fn copy(reader: BorrowedFd<'_>, capacity: usize, writes_packets: bool) -> io::Result<(Vec<ByteBuf>, bool)> {
    let waiting = fds::bytes_waiting(reader)?;
    if waiting == 0 {
        return Ok((Vec::new(), false));
    }
    let (copy, into) = fds::pipe(libc::O_NONBLOCK)?;
    // As many buffers as the original has: partly filled ones count whole.
    fds::set_pipe_capacity(into.as_fd(), capacity)?;
    if fds::tee(reader, into.as_fd(), waiting)? != waiting {
        return Err(io::Error::other("a pipe's content could not be copied whole"));
    }
    let mut buffer = vec![0; waiting];
    let mut data = Vec::new();
    let mut left = waiting;
    while left > 0 {
        // A read ends at the end of a packet.
        let length = fds::read(copy.as_fd(), &mut buffer)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        data.push(ByteBuf::from(&buffer[..length]));
        left = left.saturating_sub(length);
    }
    let packets = writes_packets || data.len() > 1;
    Ok((data, packets))
}

/// A pipe made anew: its ends, each shared by all open files that need no other flags than its own.
#[derive(Debug)]
pub(in super::super) struct Made {
    read: OwnedFd,
    write: OwnedFd,
    /// Ends already given away: at most one open file may have the original description of each.
    given: HashMap<bool, ()>,
}

/// Makes a pipe with its content; to be called inside the job's mount namespace.
pub(in super::super) fn make(image: &PipeImage) -> io::Result<Made> {
    let (read, write) = match &image.path {
        Some(path) => {
            let path = OsStr::from_bytes(path);
            // Reading first: a FIFO can't be opened for writing alone without a reader.
            let read = fds::open_at(None, path, libc::O_RDONLY | libc::O_NONBLOCK, 0)?;
            let write = fds::open_at(None, path, libc::O_WRONLY | libc::O_NONBLOCK, 0)?;
            (read, write)
        }
        None => fds::pipe(libc::O_NONBLOCK)?,
    };
    let capacity = usize::try_from(image.capacity).map_err(io::Error::other)?;
    fds::set_pipe_capacity(write.as_fd(), capacity)?;
    // Source and target may be the same kernel, and then a FIFO is still full.
    if fds::bytes_waiting(read.as_fd())? == 0 {
        let direct = if image.packets { libc::O_DIRECT } else { 0 };
        fds::set_status_flags(write.as_fd(), libc::O_NONBLOCK | direct)?;
        for data in &image.data {
            if fds::write(write.as_fd(), data)? != data.len() {
                return Err(io::Error::other("a pipe's content doesn't fit into it"));
            }
        }
    }
    Ok(Made { read, write, given: HashMap::new() })
}

impl Made {
    /// An open file of the pipe with these flags.
    pub(in super::super) fn open(&mut self, flags: i32) -> io::Result<OwnedFd> {
        let mode = flags & libc::O_ACCMODE;
        let end = if mode == libc::O_WRONLY { &self.write } else { &self.read };
        let first = mode != libc::O_RDWR && self.given.insert(mode == libc::O_WRONLY, ()).is_none();
        let fd = if first { end.try_clone()? } else { fds::reopen(end.as_fd(), mode | libc::O_NONBLOCK)? };
        fds::set_status_flags(
            fd.as_fd(),
            flags & (libc::O_NONBLOCK | libc::O_DIRECT | libc::O_APPEND | libc::O_NOATIME),
        )?;
        Ok(fd)
    }
}
