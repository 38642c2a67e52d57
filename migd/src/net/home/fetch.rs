//! The line of a node that is about to get a process, before it does.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use netstack::StackImage;

use super::frame::{Call, Frame};
use super::line::{Line, Packet};
use super::state::LineBoard;

/// A guest at a job's home: a connection on which nothing was said yet. Dropping it says that the process does not come.
#[derive(Debug)]
pub struct Guest {
    fd: OwnedFd,
    board: LineBoard,
}

impl Guest {
    /// Takes the connection over from the daemon.
    pub fn new(fd: OwnedFd) -> Guest {
        Guest { fd, board: LineBoard::default() }
    }

    /// Where it will be seen how the line is.
    pub fn board(&self) -> LineBoard {
        self.board.clone()
    }

    pub(super) fn into_parts(self) -> (OwnedFd, LineBoard) {
        (self.fd, self.board)
    }

    /// Stops the home's stack, for the owner to be with this epoch, and gets its image, and the packets for the process's
    /// kernel from the number `packet` on, with their numbers.
    ///
    /// # Errors
    /// The home's refusal, or that of the connection.
    pub fn fetch(&self, epoch: u64, packet: u64, limit: Duration) -> io::Result<(StackImage, Vec<(u64, Packet)>)> {
        let mut line = Line::new(self.fd.try_clone()?);
        line.outgoing.push(&Frame::Call { number: 0, call: Call::Image { epoch, packet } });
        let mut image = Vec::new();
        let mut packets = Vec::new();
        let deadline = Instant::now() + limit;
        loop {
            line.flush();
            while line.fill() {
                while let Some(frame) = line.incoming.next() {
                    match frame.map_err(invalid)? {
                        Frame::Piece { bytes } => image.extend_from_slice(bytes),
                        Frame::Packet { number, header, packet } => packets.push((number, (header, packet.to_vec()))),
                        Frame::Answer { answer, .. } => {
                            return match answer.refusal {
                                None => codec::from_slice(&image).map(|image| (image, packets)).map_err(invalid),
                                Some(refusal) => Err(io::Error::other(refusal)),
                            };
                        }
                        other => return Err(invalid(format!("the home said {other:?} to a guest"))),
                    }
                }
            }
            if let Some(reason) = line.ended() {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason.to_owned()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !line.wait(left)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    /// Tells the home that the stack goes on here, under this epoch. What can't be told the home learns from the directory.
    pub fn inherit(self, epoch: u64) {
        let mut line = Line::new(self.fd);
        line.outgoing.push(&Frame::Inherit { epoch });
        line.flush();
    }
}

fn invalid(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}
