//! What the program does with its connection: send, receive, close, set options.

use std::time::Duration;

use super::super::Env;
use super::super::timers::Timer;
use super::super::urgent::NoUrgent;
use super::{Connection, DELAYED_ACK_MAX, KEEP_SMALL, QUICK_ACKS, receive_limit};
use crate::State;

/// Room for sending before the congestion window asks for more.
const INITIAL_SEND_LIMIT: usize = 256 << 10;
/// Most room given at once. The ring grows only so far beyond what is queued, and what goes round in less memory finds it in the
/// processor's cache.
const ROOM_AT_ONCE: usize = 256 << 10;

/// A lower mark than this would have small segments wait for acknowledgments (Nagle). Linux as well looks at the mark only before each of
/// its buffers, which take about as much.
const LEAST_UNSENT: usize = 64 << 10;

impl Connection {
    /// Most that may be queued.
    fn send_limit(&self, env: &Env<'_>) -> usize {
        match env.options.send_buffer {
            Some(limit) => limit.max(4096),
            None => (2 * self.congestion.cwnd()).max(INITIAL_SEND_LIMIT).min(env.config.send_buffer),
        }
    }

    /// Whether the program may still send.
    pub(crate) const fn can_send(&self) -> bool {
        matches!(self.state, State::Established | State::CloseWait | State::SynSent | State::SynReceived)
            && !self.snd.fin_queued()
    }

    pub(crate) fn send_space(&self, env: &Env<'_>) -> usize {
        if !self.can_send() || matches!(self.state, State::SynSent | State::SynReceived) {
            return 0;
        }
        let space = self.send_limit(env).saturating_sub(self.snd.queued());
        match env.options.notsent_lowat {
            0 | u32::MAX => space,
            low => space.min((low as usize).max(LEAST_UNSENT).saturating_sub(self.snd.unsent_payload())),
        }
    }

    pub(crate) fn readable(&self) -> usize {
        self.rcv.readable()
    }

    pub(crate) const fn peer_closed(&self) -> bool {
        self.rcv.finished()
    }

    pub(crate) fn unsent(&self) -> usize {
        self.snd.unsent_payload()
    }

    pub(crate) fn unacked(&self) -> usize {
        self.snd.outstanding()
    }

    pub(crate) fn send_with(&mut self, env: &Env<'_>, fill: impl FnOnce([&mut [u8]; 2]) -> usize) -> usize {
        let space = self.send_space(env);
        let room = self.snd.room(space.min(ROOM_AT_ONCE));
        let available = room[0].len() + room[1].len();
        let written = fill(room).min(available);
        self.snd.commit(written);
        self.before_sending(env);
        written
    }

    /// Queues beyond the limit.
    pub(crate) fn send_over(&mut self, env: &Env<'_>, bytes: &[u8]) {
        self.snd.append(bytes);
        self.before_sending(env);
    }

    /// RFC 5681 (4.1): after an idle time the window is no longer known to be right.
    fn before_sending(&mut self, env: &Env<'_>) {
        if self.snd.outstanding() == 0 && self.state != State::SynSent {
            let idle = env.now.since(self.last_data_sent);
            let mss = self.mss();
            if idle > self.rtt.rto() {
                self.congestion.on_idle(idle, self.rtt.rto(), mss);
                self.last_data_sent = env.now;
            }
        }
        // Linux's `tcp_event_data_sent`: an answer follows soon after what it answers, acknowledged meanwhile or not.
        let received = self.statistics.data_segments_in > 0;
        if received && env.now.since(self.last_data_received) < DELAYED_ACK_MAX {
            self.acking.interactive = true;
        }
    }

    pub(crate) fn receive_with(&mut self, env: &Env<'_>, take: impl FnOnce([&[u8]; 2]) -> usize) -> usize {
        let before = self.rcv.window();
        let taken = take(self.rcv.readable_parts()).min(self.rcv.readable());
        if taken > 0 {
            self.rcv.consume(env.now, taken, self.rtt.smoothed());
            self.rcv.release_small(KEEP_SMALL);
            self.after_reading(before);
        }
        taken
    }

    /// `send(MSG_OOB)`: queues what there is room for; the last byte of it is the urgent one.
    pub(crate) fn send_urgent(&mut self, env: &Env<'_>, bytes: &[u8]) -> usize {
        let mut written = 0;
        // The buffer makes room step by step.
        while written < bytes.len() {
            let rest = &bytes[written..];
            let step = self.send_with(env, |[first, second]| {
                let head = rest.len().min(first.len());
                first[..head].copy_from_slice(&rest[..head]);
                let tail = (rest.len() - head).min(second.len());
                second[..tail].copy_from_slice(&rest[head..head + tail]);
                head + tail
            });
            if step == 0 {
                break;
            }
            written += step;
        }
        if written > 0 {
            self.snd.mark_urgent();
        }
        written
    }

    /// `recv(MSG_OOB)`
    pub(crate) fn receive_urgent(&mut self, peek: bool) -> Result<u8, NoUrgent> {
        self.rcv.take_urgent(peek)
    }

    /// How much can be read before the urgent mark, and whether the byte before it can be taken.
    pub(crate) fn urgent(&self) -> Option<(usize, bool)> {
        self.rcv.urgent()
    }

    /// Throws away what is unread, across the urgent mark.
    pub(super) fn discard_unread(&mut self, env: &Env<'_>) {
        while self.rcv.readable() > 0 {
            let unread = self.rcv.readable();
            self.receive_with(env, |_| unread);
        }
    }

    /// Linux's `__tcp_cleanup_rbuf`: tell the peer when its window has at least doubled, or when all is read.
    pub(super) fn after_reading(&mut self, window_told: usize) {
        if self.rcv.finished() || !self.is_synchronized() {
            return;
        }
        let possible = self.rcv.window_to_offer();
        let segment = usize::from(self.size.own).min(self.rcv.limit() / 2);
        if possible >= 2 * window_told && possible >= window_told + segment {
            self.acking.now = true;
        }
        if self.acking.owed && !self.acking.interactive && self.rcv.readable() == 0 {
            self.acking.soon = true;
        }
    }

    /// The program will send no more: FIN after what is queued.
    pub(crate) fn shutdown_write(&mut self) {
        match self.state {
            State::Established => self.state = State::FinWait1,
            // RFC 9293 (3.10.4): the FIN waits for the handshake.
            State::SynReceived => {}
            State::CloseWait => self.state = State::LastAck,
            _ => return,
        }
        self.snd.queue_fin();
    }

    /// The program will read no more.
    pub(crate) fn shutdown_read(&mut self, env: &Env<'_>) {
        self.read_shut = true;
        self.discard_unread(env);
    }

    /// The program has closed the socket.
    pub(crate) fn close(&mut self, env: &Env<'_>) {
        self.orphan = true;
        self.shutdown_write();
        self.timers.stop(Timer::KeepAlive);
        if self.state == State::FinWait2 {
            self.start_fin_wait_2(env);
        }
    }

    /// An orphan waits for the peer's FIN only so long.
    pub(super) fn start_fin_wait_2(&mut self, env: &Env<'_>) {
        if self.orphan {
            let patience = env.options.linger2.unwrap_or(Duration::ZERO);
            self.timers.set(Timer::FinWait2, env.now + patience);
        }
    }

    /// An option was set.
    pub(crate) fn options_changed(&mut self, env: &Env<'_>, option: crate::TcpOption) {
        use crate::TcpOption;
        match option {
            TcpOption::NoDelay(true) | TcpOption::Cork(false) => self.uncorked = self.snd.end(),
            TcpOption::QuickAck(true) => {
                self.acking.interactive = false;
                self.acking.quick = QUICK_ACKS;
                self.acking.now |= self.acking.owed;
            }
            TcpOption::QuickAck(false) => self.acking.interactive = true,
            TcpOption::KeepAlive(_) | TcpOption::KeepIdle(_) | TcpOption::KeepInterval(_) => self.set_keepalive(env),
            TcpOption::ReceiveBuffer(_) | TcpOption::WindowClamp(_) => self.rcv.set_limit(receive_limit(env)),
            TcpOption::Congestion(kind) => self.congestion.switch(kind),
            TcpOption::OobInline(inline) => self.rcv.set_urgent_inline(inline),
            _ => {}
        }
    }

    pub(super) fn set_keepalive(&mut self, env: &Env<'_>) {
        if !env.options.keepalive || !self.is_synchronized() || self.orphan {
            self.timers.stop(Timer::KeepAlive);
            return;
        }
        self.timers.set(Timer::KeepAlive, self.last_received + env.options.keep_idle);
    }
}
