//! The connection between the two ends: frames in order, without waiting.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use sys::tun::HEADER_LEN as HEADER;
use sys::unix::{self, Receive};

use super::frame::{Frame, HEADER_LEN, Header, data_header};

/// Room kept free for each read, in bytes.
const READ_BYTES: usize = 256 << 10;
/// More than this waiting to be written, and sockets are left alone until it is less, in bytes.
pub(super) const BACKLOG_MAX: usize = 1 << 20;

/// A packet with the header of a TUN device.
pub type Packet = ([u8; HEADER], Vec<u8>);
/// Packets kept for whoever polls them; more are dropped.
pub(super) const PACKETS_MAX: usize = 1024;

/// One end of a line.
pub(super) struct Line {
    fd: OwnedFd,
    pub(super) outgoing: Outgoing,
    pub(super) incoming: Incoming,
    /// Why nothing more comes or goes.
    ended: Option<String>,
}

/// Frames to be written.
#[derive(Default)]
pub(super) struct Outgoing {
    bytes: Vec<u8>,
    written: usize,
    total: u64,
    writable: bool,
    closed: bool,
}

/// Bytes that were read.
#[derive(Default)]
pub(super) struct Incoming {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    total: u64,
    readable: bool,
}

impl Line {
    pub(super) fn new(fd: OwnedFd) -> Line {
        let mut line = Line { fd, outgoing: Outgoing::default(), incoming: Incoming::default(), ended: None };
        line.note_ready();
        line
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The descriptor may be read and written again; trying tells.
    pub(super) fn note_ready(&mut self) {
        self.incoming.readable = true;
        self.outgoing.writable = true;
    }

    pub(super) fn ended(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    pub(super) fn end(&mut self, reason: impl Into<String>) {
        self.ended.get_or_insert(reason.into());
        self.incoming.readable = false;
        self.outgoing = Outgoing { closed: true, total: self.outgoing.total, ..Outgoing::default() };
    }

    /// Bytes written and read since the beginning.
    pub(super) fn totals(&self) -> (u64, u64) {
        (self.outgoing.total, self.incoming.total)
    }

    /// Whether something may still be read.
    pub(super) fn is_readable(&self) -> bool {
        self.incoming.readable
    }

    /// Reads once. False when there was nothing.
    pub(super) fn fill(&mut self) -> bool {
        if !self.incoming.readable || self.ended.is_some() {
            return false;
        }
        let room = self.incoming.room();
        match unix::receive(self.fd.as_fd(), &mut [IoSliceMut::new(room)], Receive::empty()) {
            Ok(0) => self.end("the other side closed it"),
            Ok(count) => {
                self.incoming.end += count;
                self.incoming.total += count as u64;
                return true;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.incoming.readable = false,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => self.end(error.to_string()),
        }
        false
    }

    /// Writes as much as goes.
    pub(super) fn flush(&mut self) {
        while self.outgoing.backlog() > 0 && self.outgoing.writable && self.ended.is_none() {
            match unix::send(self.fd.as_fd(), &[IoSlice::new(&self.outgoing.bytes[self.outgoing.written..])]) {
                Ok(count) => self.outgoing.note_written(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.outgoing.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // What the other side said before it went may still be there to be read.
                Err(error) if is_gone(&error) && self.incoming.readable => {
                    self.outgoing.bytes.clear();
                    self.outgoing.written = 0;
                }
                Err(error) => self.end(error.to_string()),
            }
        }
    }

    /// Waits until something can be read, or written if something is to be; false when the time ran out.
    pub(super) fn wait(&mut self, limit: std::time::Duration) -> io::Result<bool> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut flags = PollFlags::POLLIN;
        if self.outgoing.backlog() > 0 {
            flags |= PollFlags::POLLOUT;
        }
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let count = match poll(&mut [PollFd::new(self.fd.as_fd(), flags)], timeout) {
            Err(nix::errno::Errno::EINTR) => 1,
            other => other?,
        };
        self.note_ready();
        Ok(count > 0)
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
}

impl Outgoing {
    /// Adds a frame, unless nothing goes any more.
    pub(super) fn push(&mut self, frame: &Frame<'_>) {
        if !self.closed {
            frame.encode(&mut self.bytes);
        }
    }

    /// Adds a packet, unless so much waits already that it is dropped.
    pub(super) fn push_packet(&mut self, number: u64, header: &[u8; HEADER], packet: &[u8]) {
        if self.has_room() {
            self.push(&Frame::Packet { number, header: *header, packet });
        }
    }

    /// Adds a socket's bytes, which come in two parts.
    pub(super) fn push_data(&mut self, id: netstack::SocketId, parts: [&[u8]; 2]) {
        if !self.closed {
            data_header(&mut self.bytes, id, parts[0].len() + parts[1].len());
            parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
        }
    }

    /// Bytes that wait.
    pub(super) fn backlog(&self) -> usize {
        self.bytes.len() - self.written
    }

    /// Whether sockets' bytes may be added.
    pub(super) fn has_room(&self) -> bool {
        self.backlog() < BACKLOG_MAX
    }

    fn note_written(&mut self, count: usize) {
        self.written += count;
        self.total += count as u64;
        if self.written == self.bytes.len() {
            self.bytes.clear();
            self.written = 0;
        } else if self.written > BACKLOG_MAX {
            self.bytes.drain(..self.written);
            self.written = 0;
        }
    }
}

impl Incoming {
    fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.bytes.len() - self.end < READ_BYTES && self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.bytes.len() - self.end < READ_BYTES {
            self.bytes.resize(self.end + 2 * READ_BYTES, 0);
        }
        &mut self.bytes[self.end..]
    }

    /// The next whole frame, if it is here. An error is final.
    pub(super) fn next(&mut self) -> Option<Result<Frame<'_>, super::frame::FrameError>> {
        let here = &self.bytes[self.start..self.end];
        let header = match Header::decode(here.first_chunk::<HEADER_LEN>()?) {
            Ok(header) => header,
            Err(error) => return Some(Err(error)),
        };
        let payload = here.get(HEADER_LEN..HEADER_LEN + header.length)?;
        self.start += HEADER_LEN + header.length;
        Some(header.open(payload))
    }
}
