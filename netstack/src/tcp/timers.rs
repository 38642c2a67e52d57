//! The timers of one connection.

use serde::{Deserialize, Serialize};

use crate::Instant;

/// What can be due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timer {
    /// RTO, also of SYN and SYN-ACK.
    Retransmit,
    /// The reordering window of RACK is over.
    Reorder,
    /// Tail loss probe.
    LossProbe,
    /// Zero-window probe, or the override of silly-window avoidance.
    Persist,
    /// Delayed ACK.
    DelayedAck,
    /// Keepalive.
    KeepAlive,
    /// An orphan's life in FIN-WAIT-2 ends.
    FinWait2,
    /// A corked partial segment leaves.
    Cork,
    /// Memory of idle buffers is given back.
    Release,
}

const COUNT: usize = 9;

const ALL: [Timer; COUNT] = [
    Timer::Retransmit,
    Timer::Reorder,
    Timer::LossProbe,
    Timer::Persist,
    Timer::DelayedAck,
    Timer::KeepAlive,
    Timer::FinWait2,
    Timer::Cork,
    Timer::Release,
];

/// When each timer is due.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Timers {
    due: [Option<Instant>; COUNT],
}

impl Timers {
    pub(crate) fn set(&mut self, timer: Timer, at: Instant) {
        self.due[timer as usize] = Some(at);
    }

    /// Sets the timer unless it runs.
    pub(crate) fn start(&mut self, timer: Timer, at: Instant) {
        self.due[timer as usize].get_or_insert(at);
    }

    pub(crate) fn stop(&mut self, timer: Timer) {
        self.due[timer as usize] = None;
    }

    pub(crate) fn stop_all(&mut self) {
        self.due = [None; COUNT];
    }

    pub(crate) fn get(&self, timer: Timer) -> Option<Instant> {
        self.due[timer as usize]
    }

    /// When the first is due.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.due.iter().flatten().min().copied()
    }

    /// Stops and returns a timer that is due by `now`.
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<Timer> {
        let timer = ALL.into_iter().find(|&timer| self.due[timer as usize].is_some_and(|at| at <= now))?;
        self.stop(timer);
        Some(timer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_timer_has_its_own_place() {
        for (index, timer) in ALL.into_iter().enumerate() {
            assert_eq!(timer as usize, index);
        }
    }

    #[test]
    fn due_ones_come_out_once() {
        let mut timers = Timers::default();
        timers.set(Timer::KeepAlive, Instant::from_millis(5));
        timers.set(Timer::Cork, Instant::from_millis(3));
        timers.start(Timer::Cork, Instant::from_millis(1));
        assert_eq!(timers.next(), Some(Instant::from_millis(3)));
        assert_eq!(timers.take_due(Instant::from_millis(4)), Some(Timer::Cork));
        assert_eq!(timers.take_due(Instant::from_millis(4)), None);
        assert_eq!(timers.take_due(Instant::from_millis(5)), Some(Timer::KeepAlive));
    }
}
