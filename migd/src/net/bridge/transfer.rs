//! Bytes between a pair and the stack, and how connections end.
//!
//! Back-pressure goes both ways. What the stack has no room for stays in the pair, where it blocks the program; what
//! the pair has no room for stays in the stack, where it closes the window.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::os::fd::AsFd;

use netstack::{Handled, Instant, RxPacket, Shutdown, SocketError, SocketId, State};
use sys::fds;
use sys::unix::{self, Half, Receive};

use super::socket::{Connected, End, Ended, Phase, ProgramBuffer, Socket, SocketKey};
use super::{Bridge, PAIR_BUFFER, errno};
use crate::net::lending::Desk;
use crate::net::stack::Stack;

/// A program that has written this much at once is sending in bulk.
const BULK: usize = 64 << 10;

/// What reading the pair came to.
#[derive(Debug, PartialEq, Eq)]
enum Pulled {
    /// The pair is empty, or the stack is full.
    Pending,
    /// The program has ended its stream.
    End,
    /// The program closed its end while bytes for it were unread.
    Reset,
}

/// What writing the pair came to.
#[derive(Debug, PartialEq, Eq)]
enum Pushed {
    /// Everything received so far has been handed over.
    All,
    /// The pair is full.
    Pending,
}

/// What becomes of a connection after a round of moving bytes.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Open,
    /// The program closed its last descriptor.
    Closed {
        reset: bool,
    },
    /// Both directions have come to their end; the program may still hold its descriptor.
    Finished,
    Broken(SocketError),
}

impl Bridge {
    /// Takes in a packet. What is next in a stream goes from the packet straight into the pair, if that has room.
    pub(in crate::net) fn handle_packet(&mut self, packet: RxPacket<'_>, desk: &Desk) -> Handled {
        let Bridge { stack, now, sockets, by_id, borrowers, spliced, epoll, .. } = self;
        let length = packet.data.len();
        stack.handle_packet_with(*now, packet, &mut |id, parts| {
            let key = by_id.get(&id).copied();
            let socket = key.and_then(|key| sockets.get_mut(&key));
            let Some(Socket { phase: Phase::Connected { end, .. }, shut_read: false, .. }) = socket else {
                return 0;
            };
            if !end.writable || end.hung_up {
                return 0;
            }
            // An error is met again, and dealt with, where what was received is pushed.
            let written = match parts {
                [[], [], payload] if !*spliced => {
                    let before = end.loans.len();
                    let written = end.lend(payload, length, desk);
                    if before == 0 && !end.loans.is_empty() {
                        borrowers.extend(key);
                    }
                    written
                }
                _ => end.write(&parts.map(IoSlice::new)),
            };
            match written {
                Ok(count) => count,
                Err(error) => {
                    end.writable &= error.kind() != ErrorKind::WouldBlock || end.small;
                    if let Some(key) = key {
                        end.watch_for_room(epoll, key);
                    }
                    0
                }
            }
        })
    }

    /// Whether several programs' sockets have memory on loan, as far as it is known yet that it was given back.
    pub(in crate::net) fn lends_to_several(&self) -> bool {
        self.borrowers.len() > 1
    }

    /// Has programs' sockets give back the memory that was lent to them and has been read.
    pub(in crate::net) fn settle_loans(&mut self) {
        let Bridge { sockets, borrowers, .. } = self;
        borrowers.retain(|key| {
            let Some(end) = sockets.get_mut(key).and_then(Socket::end_mut) else {
                return false;
            };
            end.settle_loans();
            !end.loans.is_empty()
        });
    }

    pub(super) fn serve_connected(&mut self, key: SocketKey) {
        let Some(socket) = self.sockets.get_mut(&key) else {
            return;
        };
        let (shut_read, shut_write) = (socket.shut_read, socket.shut_write);
        let Phase::Connected { id, end, connected } = &mut socket.phase else {
            return;
        };
        let id = *id;
        let verdict = move_bytes(&mut self.stack, self.now, id, end, connected, shut_read, shut_write);
        self.pulled += std::mem::take(&mut end.pulled);
        end.watch_for_room(&self.epoll, key);
        match verdict {
            Verdict::Open => {
                if end.program_buffer == ProgramBuffer::Cramped {
                    self.enlarge_program_buffer(key);
                }
            }
            Verdict::Closed { reset } => {
                let reset = reset || socket.options.linger == Some(0) || self.stack.status(id).readable > 0;
                self.remove(key);
                if reset {
                    // What the program wrote before still goes out, as it would have at once on Linux.
                    self.resets.push(id);
                } else {
                    self.stack.tcp_close(self.now, id);
                }
            }
            Verdict::Finished => {
                let ended = if connected.end_passed { Ended::Finished } else { Ended::Shut };
                self.set_gone(key, ended);
                self.stack.tcp_close(self.now, id);
            }
            Verdict::Broken(error) => {
                self.stack.take_error(id);
                self.break_pair(key, errno(error), Ended::Broken);
                self.stack.tcp_close(self.now, id);
            }
        }
    }

    /// Gives a program that writes much at once more room for it, unless it chose the size itself.
    fn enlarge_program_buffer(&mut self, key: SocketKey) {
        let Some(socket) = self.sockets.get_mut(&key) else {
            return;
        };
        let Phase::Connected { id, end, .. } = &mut socket.phase else {
            return;
        };
        end.program_buffer = ProgramBuffer::Settled;
        if self.stack.tcp_options(*id).send_buffer.is_none()
            && let Some(end) = self.program_end(key)
        {
            drop(unix::set_send_buffer(end.as_fd(), PAIR_BUFFER / 2));
        }
    }

    /// Closes our end so that the program, once it has read what was received, gets an error: the kernel reports
    /// ECONNRESET when bytes were unread on the side that is closed.
    ///
    /// A connection whose peer had ended its stream before shows EPIPE to writers and still the end of file to readers.
    pub(super) fn break_pair(&mut self, key: SocketKey, number: i32, ended: Ended) {
        if number == libc::EPIPE {
            if let Some(end) = self.sockets.get_mut(&key).and_then(Socket::end_mut) {
                discard(end);
            }
            self.set_gone(key, ended);
            return;
        }
        let unread = |bridge: &Bridge| {
            let end = bridge.sockets.get(&key).and_then(Socket::end);
            end.is_some_and(|end| fds::bytes_waiting(end.fd.as_fd()).is_ok_and(|count| count > 0))
        };
        if !unread(self) {
            let sent = self.program_end(key).map(|end| unix::send(end.as_fd(), &[IoSlice::new(b"x")]));
            if !matches!(sent, Some(Ok(1))) {
                tracing::debug!(%key, "the program sees the end of the stream instead of a reset");
            }
        }
        if let Some(socket) = self.sockets.get_mut(&key) {
            socket.error = Some(number);
        }
        self.set_gone(key, ended);
    }
}

fn move_bytes(
    stack: &mut Stack,
    now: Instant,
    id: SocketId,
    end: &mut End,
    connected: &mut Connected,
    shut_read: bool,
    shut_write: bool,
) -> Verdict {
    let pushed = push(stack, now, id, end, shut_read);
    let pulled = if end.readable && !connected.finished { pull(stack, now, id, end) } else { Pulled::Pending };
    match pulled {
        Pulled::Pending => {}
        Pulled::Reset => return Verdict::Closed { reset: true },
        // Every shutdown passes through us, so an end of file without one is a close.
        Pulled::End if !shut_write => return Verdict::Closed { reset: false },
        Pulled::End => {
            connected.finished = true;
            let _ = stack.tcp_shutdown(now, id, Shutdown::Write);
        }
    }
    if connected.finished && end.hung_up && !connected.end_passed && !shut_read {
        return Verdict::Closed { reset: closed_unread(end) };
    }
    let status = stack.status(id);
    if pushed == Pushed::All && status.readable == 0 {
        if let Some(error) = status.error {
            return Verdict::Broken(error);
        }
        let over = status.peer_closed || status.state == State::Closed;
        if over && !connected.end_passed {
            connected.end_passed = true;
            drop(unix::shutdown(end.fd.as_fd(), Half::Write));
        }
    }
    if connected.finished && (connected.end_passed || shut_read) { Verdict::Finished } else { Verdict::Open }
}

/// Moves bytes from the pair into the stack's send buffer.
fn pull(stack: &mut Stack, now: Instant, id: SocketId, end: &mut End) -> Pulled {
    loop {
        if stack.status(id).send_space == 0 {
            return if end.read_hung_up { look_for_end(end) } else { Pulled::Pending };
        }
        if end.marks
            && let Some(byte) = unix::receive_urgent_at_mark(end.fd.as_fd())
        {
            // That nothing can be sent any more is met below.
            let _ = stack.tcp_send_urgent(now, id, byte);
            continue;
        }
        let mut outcome = Ok(0);
        let mut offered = 0;
        let sent = stack.tcp_send_with(now, id, |[first, second]| {
            offered = first.len() + second.len();
            outcome =
                unix::receive(end.fd.as_fd(), &mut [IoSliceMut::new(first), IoSliceMut::new(second)], Receive::empty());
            *outcome.as_ref().unwrap_or(&0)
        });
        if sent.is_err() {
            // The connection takes nothing any more. What the program writes now can't arrive; it learns of that from the reset
            // that follows, which wants these bytes unread. Only a close has to be noticed.
            return if end.hung_up { discard(end) } else { Pulled::Pending };
        }
        end.pulled += sent.unwrap_or(0);
        if sent.is_ok_and(|count| count >= BULK) && end.program_buffer == ProgramBuffer::Small {
            end.program_buffer = ProgramBuffer::Cramped;
        }
        match outcome {
            Ok(0) => return Pulled::End,
            // Less than there was room for: the pair is empty, and the next byte is an edge. But a read stops at a mark as well.
            Ok(count) if count < offered && !end.read_hung_up && !end.marks => {
                end.readable = false;
                return Pulled::Pending;
            }
            Ok(_) => {}
            Err(error) => match interpret(&error, end) {
                Some(pulled) => return pulled,
                None => continue,
            },
        }
    }
}

/// What an error of a read says; `None` is to read again.
fn interpret(error: &io::Error, end: &mut End) -> Option<Pulled> {
    match error.kind() {
        ErrorKind::WouldBlock => {
            end.readable = false;
            Some(Pulled::Pending)
        }
        ErrorKind::Interrupted => None,
        ErrorKind::ConnectionReset => Some(Pulled::Reset),
        _ => Some(Pulled::End),
    }
}

/// With no room in the stack, whether the stream ends right here. Reads no byte of it.
fn look_for_end(end: &mut End) -> Pulled {
    if fds::bytes_waiting(end.fd.as_fd()).is_ok_and(|count| count > 0) {
        return Pulled::Pending;
    }
    discard(end)
}

/// Reads and drops everything up to the end of the stream.
fn discard(end: &mut End) -> Pulled {
    let mut block = [0u8; 4096];
    loop {
        match unix::receive(end.fd.as_fd(), &mut [IoSliceMut::new(&mut block)], Receive::empty()) {
            Ok(0) => return Pulled::End,
            Ok(_) => {}
            Err(error) => {
                if let Some(pulled) = interpret(&error, end) {
                    return pulled;
                }
            }
        }
    }
}

/// Whether a program that shut its writing half before has closed with bytes unread.
fn closed_unread(end: &mut End) -> bool {
    discard(end) == Pulled::Reset
}

/// Moves received bytes into the pair.
fn push(stack: &mut Stack, now: Instant, id: SocketId, end: &mut End, shut_read: bool) -> Pushed {
    let mut unwanted = shut_read;
    loop {
        let status = stack.status(id);
        if status.urgent.is_some_and(|urgent| urgent.ahead == 0 && urgent.available)
            && let Some(pushed) = push_urgent(stack, id, end, shut_read, &mut unwanted)
        {
            return pushed;
        }
        if status.readable == 0 {
            return Pushed::All;
        }
        if !end.writable && !unwanted {
            return Pushed::Pending;
        }
        let mut outcome = Ok(0);
        let taken = stack.tcp_recv_with(now, id, |[first, second]| {
            if unwanted {
                return first.len() + second.len();
            }
            outcome = end.write(&[IoSlice::new(first), IoSlice::new(second)]);
            *outcome.as_ref().unwrap_or(&0)
        });
        if taken.is_err() {
            return Pushed::All;
        }
        match outcome {
            Ok(_) => {}
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock if end.small => {
                    end.small = false;
                    if stack.tcp_options(id).receive_buffer.is_none() {
                        drop(unix::set_send_buffer(end.fd.as_fd(), PAIR_BUFFER / 2));
                    }
                }
                ErrorKind::WouldBlock => {
                    end.writable = false;
                    return Pushed::Pending;
                }
                ErrorKind::Interrupted => {}
                // The program has gone. Its close is seen where the pair is read; what it left here says that it was unread.
                _ if end.hung_up || !shut_read => return Pushed::Pending,
                _ => unwanted = true,
            },
        }
    }
}

/// Moves the urgent byte that is next into the pair, where the kernel keeps it as urgent. `None`: that is done.
fn push_urgent(stack: &mut Stack, id: SocketId, end: &mut End, shut_read: bool, unwanted: &mut bool) -> Option<Pushed> {
    if !end.writable && !*unwanted {
        return Some(Pushed::Pending);
    }
    let byte = stack.tcp_recv_urgent(id, true)?;
    if !*unwanted && let Err(error) = unix::send_urgent(end.fd.as_fd(), byte) {
        match error.kind() {
            ErrorKind::WouldBlock => {
                end.writable = false;
                return Some(Pushed::Pending);
            }
            _ if end.hung_up || !shut_read => return Some(Pushed::Pending),
            _ => *unwanted = true,
        }
    } else if !*unwanted {
        end.written += 1;
    }
    stack.tcp_recv_urgent(id, false);
    None
}
