//! One socket of a program, as the bridge sees it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::time::Duration;

use netstack::{Instant, SocketId, TcpOptions};
use serde::{Deserialize, Serialize};
use sys::epoll::{Epoll, Interest};
use sys::fds::sockets;
use sys::seccomp::Notification;
use sys::unix;

use super::WATCHED;
use super::sockaddr::Family;
use crate::net::lending::{Desk, Loan};

/// The bridge's name of a program's socket: the same before and after a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SocketKey(pub u64);

impl fmt::Display for SocketKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0)
    }
}

/// A program's socket.
pub(super) struct Socket {
    pub(super) family: Family,
    /// Inode of the program's end, which is the same for every duplicate of it.
    pub(super) inode: u64,
    pub(super) phase: Phase,
    /// Options that live outside the stack.
    pub(super) options: BridgeOptions,
    /// A process and its number for the program's end, when last seen. May be out of date.
    pub(super) seen_at: Option<(i32, RawFd)>,
    /// The last answer that didn't reach its caller, because a signal cancelled the call first. The kernel restarts the
    /// call, which must then not find its own effects in the way.
    pub(super) undelivered: Option<Undelivered>,
    /// What SO_ERROR tells next, once the stack's socket is gone.
    pub(super) error: Option<i32>,
    /// The options of the stack's socket, once that is gone: the program may connect or listen anew.
    pub(super) kept: Option<Box<TcpOptions>>,
    /// The program chose its own address with bind(2).
    pub(super) bound: bool,
    /// The program shut its writing half.
    pub(super) shut_write: bool,
    /// The program shut its reading half.
    pub(super) shut_read: bool,
}

/// Where a socket is in its life. Everything but [`Phase::Gone`] has a socket in the stack and our end of the pair.
pub(super) enum Phase {
    /// Neither connected nor listening; perhaps bound.
    Idle {
        id: SocketId,
        end: End,
    },
    Listening {
        id: SocketId,
        end: End,
        listener: Listening,
    },
    Connecting {
        id: SocketId,
        end: End,
        connecting: Connecting,
    },
    Connected {
        id: SocketId,
        end: End,
        connected: Connected,
    },
    /// Over: the stack has let go of it and our end is closed, in a way that shows the program how it ended. The program may still
    /// hold its end and ask questions; since nothing tells when it closes it, only so many of these are remembered.
    Gone {
        local: Option<SocketAddr>,
        ended: Ended,
    },
}

/// How a socket ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ended {
    /// A connection attempt failed, and the next connect reports that.
    Failed,
    /// As if never connected: the program may try again.
    NotConnected,
    /// The connection broke: reads give what was received, then an error.
    Broken,
    /// The program shut both directions; the peer may not be done.
    Shut,
    /// Both directions came to their end.
    Finished,
}

/// The send buffer of a program's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProgramBuffer {
    /// It has the kernel's default size.
    Small,
    /// It should be larger.
    Cramped,
    /// It has grown, or can't.
    Settled,
}

/// Our end of the pair, with what the edges last said of it.
pub(super) struct End {
    pub(super) fd: OwnedFd,
    /// Bytes, an end of file or an error may wait to be read.
    pub(super) readable: bool,
    /// Bytes may be written. Once it is false [`End::watch_for_room`] has to be called.
    pub(super) writable: bool,
    /// An event tells when there is room again.
    room_watched: bool,
    /// The program shut its writing half, or is gone.
    pub(super) read_hung_up: bool,
    /// Both halves are shut: the program is gone, unless we and it shut one half each.
    pub(super) hung_up: bool,
    /// Its send buffer, which holds what the program hasn't read, has the kernel's default size.
    pub(super) small: bool,
    /// Bytes taken from it since the bridge last counted them.
    pub(super) pulled: usize,
    /// How far the program's own send buffer has come.
    pub(super) program_buffer: ProgramBuffer,
    /// Bytes ever written into it.
    pub(super) written: u64,
    /// Memory that it has in its queue, oldest first.
    pub(super) loans: VecDeque<Loan>,
    /// The program has sent urgent data: from then on each read looks for the mark first.
    pub(super) marks: bool,
}

impl End {
    pub(super) fn new(fd: OwnedFd) -> End {
        End {
            fd,
            readable: false,
            writable: true,
            room_watched: false,
            read_hung_up: false,
            hung_up: false,
            small: true,
            pulled: 0,
            program_buffer: ProgramBuffer::Small,
            written: 0,
            loans: VecDeque::new(),
            marks: false,
        }
    }

    /// Makes sure that an event tells when a pair that is full has room again. It stays so: a pair that was full once is likely
    /// to be so again.
    pub(super) fn watch_for_room(&mut self, epoll: &Epoll, key: SocketKey) {
        if self.writable || self.room_watched {
            return;
        }
        // Room that there is already is an event as well.
        match epoll.modify(self.fd.as_fd(), key.0, WATCHED | Interest::OUT) {
            Ok(()) => self.room_watched = true,
            Err(error) => {
                tracing::error!(%error, %key, "can't have a socket pair watched for room; it is tried again with the next packet");
                self.writable = true;
            }
        }
    }

    /// Writes into the pair; returns how many bytes it took.
    pub(super) fn write(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let count = unix::send(self.fd.as_fd(), parts)?;
        self.written += count as u64;
        Ok(count)
    }

    /// The same with the payload of a packet of `length` bytes, lent if that pays.
    pub(super) fn lend(&mut self, payload: &[u8], length: usize, desk: &Desk) -> io::Result<usize> {
        if !Desk::pays(payload) {
            return self.write(&[IoSlice::new(payload)]);
        }
        if self.loans.is_empty() {
            // Lending knows no flag for a single call. The program's end is another file.
            unix::set_nonblocking(self.fd.as_fd())?;
        } else {
            self.settle_loans();
        }
        let Some(lent) = desk.lend(self.fd.as_fd(), payload, length) else {
            return self.write(&[IoSlice::new(payload)]);
        };
        let (count, mut loan) = lent?;
        self.written += count as u64;
        loan.end = self.written;
        self.loans.push_back(loan);
        Ok(count)
    }

    /// Gives back what the program has read.
    pub(super) fn settle_loans(&mut self) {
        let Ok(unread) = sockets::memory_unread(self.fd.as_fd()) else {
            return;
        };
        let read = self.written.saturating_sub(unread as u64);
        let settled = self.loans.partition_point(|loan| loan.end <= read);
        self.loans.drain(..settled).for_each(Loan::settle);
    }
}

#[derive(Default)]
pub(super) struct Listening {
    /// Bytes in the pair, one for each waiting connection up to [`super::listen::SIGNALS_MAX`].
    pub(super) signalled: usize,
    /// Calls of accept that wait for a connection, in order of arrival.
    pub(super) waiters: VecDeque<Waiter>,
    /// Connections that were accepted for a caller that had gone; first in line for the next.
    pub(super) returned: VecDeque<SocketId>,
}

#[derive(Default)]
pub(super) struct Connecting {
    /// Bytes put into the program's end so that it isn't writable.
    pub(super) fill: usize,
    /// Calls of connect that wait.
    pub(super) waiters: Vec<Waiter>,
}

pub(super) struct Connected {
    /// connect(2) has told the program so, or the connection was accepted.
    pub(super) reported: bool,
    /// The peer's end of file has been passed on.
    pub(super) end_passed: bool,
    /// The program's end of file has been passed on.
    pub(super) finished: bool,
}

/// A held call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiter {
    pub(super) call: Notification,
    pub(super) deadline: Option<Instant>,
}

/// An answer that was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Undelivered {
    pub(super) number: i64,
    pub(super) args: [u64; 3],
    pub(super) result: Result<i64, i32>,
}

impl Undelivered {
    pub(super) fn of(call: &Notification, result: Result<i64, i32>) -> Undelivered {
        Undelivered { number: call.number, args: [call.args[0], call.args[1], call.args[2]], result }
    }

    pub(super) fn is_answer_to(&self, call: &Notification) -> bool {
        self.number == call.number && self.args[..] == call.args[..3]
    }
}

/// Options that are not the stack's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BridgeOptions {
    /// SO_LINGER in seconds.
    pub(super) linger: Option<u32>,
    /// The program's SO_LINGER seconds while lingering is off, which getsockopt shows.
    pub(super) linger_off_seconds: u32,
    /// Set on the program's end itself, and remembered to be set again after a move.
    pub(super) receive_timeout: Option<Duration>,
    pub(super) send_timeout: Option<Duration>,
    pub(super) receive_low_water: Option<i32>,
    pub(super) priority: Option<i32>,
    /// SO_BINDTODEVICE
    pub(super) device: String,
    /// Options with no effect here, by level and name: what was set is what is read.
    pub(super) inert: BTreeMap<(i32, i32), i32>,
}

impl Socket {
    pub(super) fn new(family: Family, inode: u64, phase: Phase) -> Socket {
        Socket {
            family,
            inode,
            phase,
            options: BridgeOptions::default(),
            seen_at: None,
            undelivered: None,
            error: None,
            kept: None,
            bound: false,
            shut_write: false,
            shut_read: false,
        }
    }

    pub(super) fn id(&self) -> Option<SocketId> {
        match &self.phase {
            Phase::Idle { id, .. }
            | Phase::Listening { id, .. }
            | Phase::Connecting { id, .. }
            | Phase::Connected { id, .. } => Some(*id),
            Phase::Gone { .. } => None,
        }
    }

    pub(super) fn end(&self) -> Option<&End> {
        match &self.phase {
            Phase::Idle { end, .. }
            | Phase::Listening { end, .. }
            | Phase::Connecting { end, .. }
            | Phase::Connected { end, .. } => Some(end),
            Phase::Gone { .. } => None,
        }
    }

    pub(super) fn end_mut(&mut self) -> Option<&mut End> {
        match &mut self.phase {
            Phase::Idle { end, .. }
            | Phase::Listening { end, .. }
            | Phase::Connecting { end, .. }
            | Phase::Connected { end, .. } => Some(end),
            Phase::Gone { .. } => None,
        }
    }
}
