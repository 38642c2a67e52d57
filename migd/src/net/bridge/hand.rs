//! Accepted connections on their way into a program's table.
//!
//! The kernel puts a descriptor into the table of a waiting thread when that thread runs next, and lets whoever asked for it wait
//! until then. For the net thread that would be a sleep for each new connection, with the work of all others waiting. So a
//! thread of its own, the hand, asks and waits.
//!
//! Between the net thread's order and the hand's outcome a connection is *given*: the stack keeps what it receives, and the bridge
//! serves it only once it is known that the program has it. The outcome says so, or what the program does with it, if that
//! is seen first. When nobody took it, it waits for the next accept, and nothing of it is lost. Nothing is given when a freeze begins.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;

use crossbeam::channel::{Receiver, SendError, Sender, unbounded};
use netstack::{Instant, SocketId};
use sys::epoll::{Epoll, EventFd, Interest};
use sys::seccomp::{Listener, Notification};

use super::Bridge;
use super::notify::refusal;
use super::socket::{Phase, Socket, SocketKey};
use crate::net::stack::Stack;

/// What the epoll instance calls the hand's outcomes.
pub(in crate::net) const TOKEN_OUTCOMES: u64 = u64::MAX - 5;

/// A connection on its way.
pub(super) struct Given {
    pub(super) call: Notification,
    pub(super) close_on_exec: bool,
    pub(super) listener: SocketKey,
    pub(super) connection: SocketId,
    /// What it will be for the bridge.
    pub(super) socket: Socket,
    /// Bytes that are in the pair, and still in the stack.
    pub(super) early: usize,
}

/// What the hand is to do.
struct Errand {
    key: SocketKey,
    call: Notification,
    program_end: OwnedFd,
    close_on_exec: bool,
}

/// What came of it.
struct Outcome {
    errand: Errand,
    result: io::Result<RawFd>,
}

/// The way to the hand and back. Its thread ends with it.
pub(super) struct Hand {
    errands: Sender<Errand>,
    outcomes: Receiver<Outcome>,
    under_way: usize,
    /// Watched as long as it is open.
    _done: Arc<EventFd>,
}

impl Hand {
    fn start(listener: &Listener, epoll: &Epoll) -> io::Result<Hand> {
        let (errands, orders) = unbounded::<Errand>();
        let (sender, outcomes) = unbounded();
        let listener = Listener::from(listener.as_fd().try_clone_to_owned()?);
        let done = Arc::new(EventFd::new()?);
        let watched = Arc::clone(&done);
        epoll.add(done.as_fd(), TOKEN_OUTCOMES, Interest::IN | Interest::EDGE)?;
        std::thread::Builder::new().name("hand".to_owned()).spawn(move || {
            for errand in orders {
                let result =
                    listener.answer_with_descriptor(errand.call.id, errand.program_end.as_fd(), errand.close_on_exec);
                // The program's end goes back with it: its last close must not be seen before the outcome is known.
                if sender.send(Outcome { errand, result }).is_err() {
                    return;
                }
                done.signal();
            }
        })?;
        Ok(Hand { errands, outcomes, under_way: 0, _done: watched })
    }
}

impl Bridge {
    /// Has a call of accept answered with a connection, whose program's end this is. On an error nothing has happened.
    pub(super) fn hand_over(&mut self, given: Given, key: SocketKey, program_end: OwnedFd) -> io::Result<()> {
        let hand = match &mut self.hand {
            Some(hand) => hand,
            empty => empty.insert(Hand::start(&self.listener, &self.epoll)?),
        };
        // From the answer on, whoever looks through the job's descriptors must know what this one is.
        self.by_inode.insert(given.socket.inode, key);
        let errand = Errand { key, call: given.call, program_end, close_on_exec: given.close_on_exec };
        self.given.insert(key, given);
        hand.under_way += 1;
        if let Err(SendError(errand)) = hand.errands.send(errand) {
            hand.under_way -= 1;
            tracing::error!("the thread that hands out connections has ended");
            self.end_errand(&errand, Err(io::ErrorKind::BrokenPipe.into()));
        }
        Ok(())
    }

    /// Whether connections are on their way.
    pub(super) fn is_handing_over(&self) -> bool {
        self.hand.as_ref().is_some_and(|hand| hand.under_way > 0)
    }

    /// Takes in what the hand has come to.
    pub(in crate::net) fn take_outcomes(&mut self) {
        while let Some(hand) = &mut self.hand
            && let Ok(Outcome { errand, result }) = hand.outcomes.try_recv()
        {
            hand.under_way -= 1;
            self.end_errand(&errand, result);
        }
    }

    /// Waits until nothing is on its way. That takes no longer than a signal takes to interrupt a call.
    pub(in crate::net) fn finish_handing_over(&mut self) {
        while let Some(hand) = self.hand.as_mut().filter(|hand| hand.under_way > 0) {
            let Ok(Outcome { errand, result }) = hand.outcomes.recv() else {
                return;
            };
            hand.under_way -= 1;
            self.end_errand(&errand, result);
        }
    }

    fn end_errand(&mut self, errand: &Errand, result: io::Result<RawFd>) {
        let Errand { key, call, .. } = *errand;
        match result {
            Ok(number) => {
                self.settle_given(key);
                let place = (self.processes.process(call.thread), number);
                if let Some(socket) = self.sockets.get_mut(&key) {
                    socket.seen_at = Some(place);
                }
            }
            Err(error) => self.take_back(key, &error),
        }
    }

    /// An event of our end of a pair that is on its way: only the program can have written into it.
    pub(super) fn note_early(&mut self, key: SocketKey, ready: Interest) {
        if self.given.contains_key(&key) {
            self.settle_given(key);
            self.handle_event(key, ready);
        }
    }

    /// The program has the connection: it is a socket like others from now on.
    pub(super) fn settle_given(&mut self, key: SocketKey) {
        let Some(Given { connection, socket, early, .. }) = self.given.remove(&key) else {
            return;
        };
        if early > 0 {
            let _ =
                self.stack.tcp_recv_with(self.now, connection, |[first, second]| early.min(first.len() + second.len()));
        }
        self.insert(key, socket);
        self.enqueue(key);
    }

    /// Nobody took the connection: it is first in line for the next accept.
    fn take_back(&mut self, key: SocketKey, error: &io::Error) {
        let Some(Given { call, listener, connection, socket, .. }) = self.given.remove(&key) else {
            return;
        };
        self.by_inode.remove(socket.inode, key);
        match self.sockets.get_mut(&listener).map(|socket| &mut socket.phase) {
            Some(Phase::Listening { listener, .. }) => listener.returned.push_back(connection),
            _ => self.stack.tcp_abort(self.now, connection),
        }
        self.enqueue(listener);
        self.reply(&call, None, refusal(error));
    }
}

/// Puts what a connection has received so far into its pair, so that a program that reads or polls it right after accept finds it
/// and needn't be woken for it; returns how much. The stack keeps it until the program is known to have the pair.
pub(super) fn copy_received(stack: &mut Stack, now: Instant, socket: &mut Socket) -> usize {
    let Phase::Connected { id, end, .. } = &mut socket.phase else {
        return 0;
    };
    let status = stack.status(*id);
    if status.readable == 0 || status.urgent.is_some() {
        return 0;
    }
    let mut copied = 0;
    let _ = stack.tcp_recv_with(now, *id, |parts| {
        copied = end.write(&parts.map(IoSlice::new)).unwrap_or(0);
        0
    });
    copied
}
