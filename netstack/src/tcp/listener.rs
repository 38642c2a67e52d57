//! A listening socket: its queues and their bounds.
//!
//! The bounds are Linux's: the accept queue holds one more than the backlog; while it is full, SYNs are dropped, and a
//! final ACK is ignored so that the peer's data or the SYN-ACK's timer tries again.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Ceiling of a backlog (Linux: `somaxconn`).
pub(crate) const BACKLOG_MAX: u32 = 4096;

/// The part of a socket that listens.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Listener {
    pub(crate) backlog: u32,
    /// Half-open connections.
    pub(crate) half_open: u32,
    /// Slots of connections that wait to be accepted, the longest waiting first.
    pub(crate) queue: VecDeque<u32>,
    /// SYNs and final ACKs that found no room.
    pub(crate) overflows: u64,
}

impl Listener {
    pub(crate) fn new(backlog: u32) -> Self {
        Listener { backlog: backlog.min(BACKLOG_MAX), ..Listener::default() }
    }

    pub(crate) fn set_backlog(&mut self, backlog: u32) {
        self.backlog = backlog.min(BACKLOG_MAX);
    }

    /// Linux: `sk_acceptq_is_full`.
    pub(crate) fn accept_queue_is_full(&self) -> bool {
        self.queue.len() > self.backlog as usize
    }

    /// Linux: `inet_csk_reqsk_queue_is_full`.
    pub(crate) fn syn_queue_is_full(&self) -> bool {
        self.half_open >= self.backlog.max(1)
    }
}
