//! A listening socket: its queues and their bounds.
//!
//! The bounds are Linux's: the accept queue holds one more than the backlog; while it is full, SYNs are dropped, and a
//! final ACK is ignored so that the peer's data or the SYN-ACK's timer tries again.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Instant;

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
    /// When a SYN was last answered with a cookie.
    pub(crate) cookie_sent_at: Option<Instant>,
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

    /// Whether an ACK out of the blue may carry a cookie (Linux: `tcp_synq_no_recent_overflow`).
    pub(crate) fn expects_cookies(&self, now: Instant) -> bool {
        /// Longer than any cookie is good.
        const RECENT: Duration = Duration::from_secs(120);
        self.cookie_sent_at.is_some_and(|at| now.since(at) < RECENT)
    }

    /// Linux: `inet_csk_reqsk_queue_is_full`.
    pub(crate) fn syn_queue_is_full(&self) -> bool {
        //= https://www.rfc-editor.org/rfc/rfc4987#section-3.3
        //# The half-open connections of a listener are bounded.
        self.half_open >= self.backlog.max(1)
    }
}
