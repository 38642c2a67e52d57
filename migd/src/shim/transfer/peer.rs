//! The connection between the two shims of a move: blocking, framed, with a limit on every wait.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use handoff::frame::{HEADER_LEN, MAX_CHUNK, MAX_PAYLOAD};
use handoff::message::{Message, SectionKind};
use handoff::{DecodeError, Header, Limits, Timer, encode, pages_prefix};

/// Frames are gathered up to so many bytes before they are written.
const GATHER_BYTES: usize = 128 << 10;
/// The buffer for a payload grows in such steps, as the bytes arrive.
const GROW_BYTES: usize = 1 << 20;
/// A wait can't be shorter than this: zero would mean forever.
const SHORTEST: Duration = Duration::from_millis(1);

/// A frame received.
#[derive(Debug)]
pub struct Frame {
    header: Header,
    bytes: Vec<u8>,
}

impl Frame {
    /// Checks and decodes the frame.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn message(&self) -> Result<Message<'_>, DecodeError> {
        self.header.open(&self.bytes[HEADER_LEN..])
    }
}

/// What a wait ended with.
#[derive(Debug)]
pub enum Arrival {
    /// A frame.
    Frame(Frame),
    /// Nothing, in the time of the timer.
    Timeout(Timer),
    /// The end of the connection, in words.
    End(String),
}

/// One side's end of the connection.
#[derive(Debug)]
pub struct Peer {
    stream: TcpStream,
    limits: Limits,
    timer: Timer,
    deadline: Instant,
    outgoing: Vec<u8>,
    /// The frame being received, and how much of it is here.
    incoming: Vec<u8>,
    received: usize,
    sent_bytes: u64,
    /// The end of the connection was told.
    ended: bool,
}

impl Peer {
    /// Takes the connection over from the daemon.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn new(stream: OwnedFd, limits: Limits) -> io::Result<Peer> {
        let stream = TcpStream::from(stream);
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        let timer = Timer::Hello;
        let duration = limits.duration(timer);
        stream.set_write_timeout(Some(duration))?;
        Ok(Peer {
            stream,
            limits,
            timer,
            deadline: Instant::now() + duration,
            outgoing: Vec::with_capacity(2 * GATHER_BYTES),
            incoming: Vec::new(),
            received: 0,
            sent_bytes: 0,
            ended: false,
        })
    }

    /// Starts the timer.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn arm(&mut self, timer: Timer) -> io::Result<()> {
        let duration = self.limits.duration(timer);
        self.deadline = Instant::now() + duration;
        if self.timer != timer {
            self.timer = timer;
            // What is written shall not wait longer than what is read; the pause before a retry is for reading only.
            if timer != Timer::Retry {
                self.stream.set_write_timeout(Some(duration))?;
            }
        }
        Ok(())
    }

    /// Bytes sent so far, those still gathered included.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Queues a message; [`Peer::flush`] sends it.
    ///
    /// # Errors
    /// As write(2); [`io::ErrorKind::InvalidInput`] when it is too large to be a frame.
    pub fn send(&mut self, message: &Message<'_>) -> io::Result<()> {
        let before = self.outgoing.len();
        if let Message::Layout(data) = message
            && data.len() > MAX_PAYLOAD
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the job has too many memory mappings to be described",
            ));
        }
        encode(message, &mut self.outgoing);
        self.sent_bytes += (self.outgoing.len() - before) as u64;
        if self.outgoing.len() >= GATHER_BYTES { self.flush() } else { Ok(()) }
    }

    /// Sends a section, cut into pieces.
    ///
    /// # Errors
    /// As write(2).
    pub fn send_section(&mut self, kind: SectionKind, data: &[u8]) -> io::Result<()> {
        data.chunks(MAX_CHUNK).try_for_each(|data| self.send(&Message::Section { kind, data }))
    }

    /// Sends memory, cut into pieces, without copying what is large.
    ///
    /// # Errors
    /// As write(2).
    pub fn send_pages(&mut self, process: u32, address: u64, data: &[u8]) -> io::Result<()> {
        let mut address = address;
        for piece in data.chunks(MAX_CHUNK) {
            let prefix = pages_prefix(process, address, piece);
            self.sent_bytes += (prefix.len() + piece.len()) as u64;
            if piece.len() < GATHER_BYTES {
                self.outgoing.extend_from_slice(&prefix);
                self.outgoing.extend_from_slice(piece);
                if self.outgoing.len() >= GATHER_BYTES {
                    self.flush()?;
                }
            } else {
                self.flush()?;
                write_all_vectored(&mut self.stream, &prefix, piece)?;
            }
            address += piece.len() as u64;
        }
        Ok(())
    }

    /// Writes what was gathered.
    ///
    /// # Errors
    /// As write(2); [`io::ErrorKind::WouldBlock`] when the peer took nothing in the time of the timer.
    pub fn flush(&mut self) -> io::Result<()> {
        let result = self.stream.write_all(&self.outgoing);
        self.outgoing.clear();
        result
    }

    /// Waits for the next frame. [`Peer::recycle`] takes its buffer back. After the end of the connection only the timer
    /// still runs.
    pub fn next(&mut self) -> Arrival {
        if self.ended {
            std::thread::sleep(self.deadline.saturating_duration_since(Instant::now()));
            return Arrival::Timeout(self.timer);
        }
        match self.receive(self.deadline) {
            Ok(Some(frame)) => {
                // The timer bounds the time without progress.
                self.deadline = Instant::now() + self.limits.duration(self.timer);
                Arrival::Frame(frame)
            }
            Ok(None) => Arrival::Timeout(self.timer),
            Err(error) => {
                self.ended = true;
                Arrival::End(error.to_string())
            }
        }
    }

    /// A frame that is there already or arrives at once, such as the reason for a connection that broke.
    pub fn last_words(&mut self) -> Option<Frame> {
        self.receive(Instant::now() + Duration::from_millis(20)).ok().flatten()
    }

    /// Gives a frame's buffer back for the next.
    pub fn recycle(&mut self, frame: Frame) {
        if self.received == 0 && frame.bytes.capacity() > self.incoming.capacity() {
            self.incoming = frame.bytes;
        }
    }

    /// `None` when the deadline passed; a frame received in part stays for the next call.
    fn receive(&mut self, deadline: Instant) -> io::Result<Option<Frame>> {
        loop {
            let header = match self.incoming.get(..self.received).and_then(|bytes| bytes.first_chunk::<HEADER_LEN>()) {
                Some(header) => Some(Header::decode(header).map_err(|error| invalid(&error))?),
                None => None,
            };
            let needed = HEADER_LEN + header.map_or(0, |header| header.payload_len());
            if let Some(header) = header
                && self.received == needed
            {
                let mut bytes = std::mem::take(&mut self.incoming);
                bytes.truncate(needed);
                self.received = 0;
                return Ok(Some(Frame { header, bytes }));
            }
            let upto = needed.min(self.received + GROW_BYTES);
            if self.incoming.len() < upto {
                self.incoming.resize(upto, 0);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left.max(SHORTEST)))?;
            match self.stream.read(&mut self.incoming[self.received..upto]) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other side closed it")),
                Ok(count) => self.received += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

fn invalid(error: &DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

fn write_all_vectored(stream: &mut TcpStream, head: &[u8], body: &[u8]) -> io::Result<()> {
    let total = head.len() + body.len();
    let mut done = 0;
    while done < total {
        let written = if done < head.len() {
            stream.write_vectored(&[IoSlice::new(&head[done..]), IoSlice::new(body)])
        } else {
            stream.write(&body[done - head.len()..])
        };
        match written {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
