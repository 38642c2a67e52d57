//! The net thread stays on its processor while much is received.
//!
//! Whoever wakes a thread draws it to its own processor, unless the one where the thread was is idle. What wakes the net thread
//! is a device's interrupt, or a sender on the same machine; it finds the former processor taken by the program that reads what
//! the net thread has just given it. So the net thread would move to and fro, often to where the sender needs the processor.
//! While bulk arrives it is therefore bound to the processor on which it is, for [`HELD`] at a time. In between it is free, so
//! that the scheduler can take it away from a processor where something else works.
//!
//! Measured on two processors with the client on the same ones, with it and without in turn (sixteen and thirty runs each): 12 and
//! 17% more received over one connection. Over eight, and over one beside a busy loop, it makes no difference, nor would it for sending
//! or for new connections; to redis-benchmark with its 50 connections it would cost up to 7%.

use std::io;
use std::time::Duration;

use netstack::Instant;
use sys::process::MYSELF;

/// How long it is bound.
const HELD: Duration = Duration::from_millis(100);
/// How long it is free after that.
const FREE: Duration = Duration::from_millis(1);
/// Bulk packets received while it was free that speak for binding it again.
const MUCH: u32 = 4;

/// Binds and frees the thread that calls it.
#[derive(Debug, Default)]
pub(super) struct Stay {
    /// Bulk packets since it is free.
    count: u32,
    /// End of the present state.
    until: Instant,
    /// Where it may run when it is free, while it is bound.
    everywhere: Option<Vec<u32>>,
    /// The kernel has refused.
    never: bool,
}

impl Stay {
    /// A large packet has arrived.
    pub(super) fn note_bulk(&mut self) {
        self.count += 1;
    }

    /// To be called now and then.
    pub(super) fn turn(&mut self, now: Instant) {
        if now < self.until || self.never {
            return;
        }
        let much = std::mem::take(&mut self.count) >= MUCH;
        let (state, changed) = match self.everywhere.take() {
            Some(everywhere) => (FREE, sys::process::set_affinity(MYSELF, &everywhere)),
            None if much => (HELD, self.bind()),
            None => (FREE, Ok(())),
        };
        self.until = now + state;
        if let Err(error) = changed {
            self.never = true;
            tracing::info!(%error, "the net thread can't be bound to a processor");
        }
    }

    fn bind(&mut self) -> io::Result<()> {
        let everywhere = sys::process::affinity(MYSELF)?;
        let here = nix::sched::sched_getcpu()?;
        if let ([_, _, ..], Ok(here)) = (&everywhere[..], u32::try_from(here)) {
            sys::process::set_affinity(MYSELF, &[here])?;
            self.everywhere = Some(everywhere);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processors() -> Vec<u32> {
        sys::process::affinity(MYSELF).unwrap()
    }

    #[test]
    fn it_is_bound_while_much_arrives_and_free_in_between_and_after() {
        let everywhere = processors();
        let mut now = Instant::from_millis(1000);
        let mut stay = Stay::default();
        let mut turn = |bulk: u32, later: Duration| {
            (0..bulk).for_each(|_| stay.note_bulk());
            now += later;
            stay.turn(now);
            processors()
        };
        assert_eq!(turn(MUCH - 1, FREE), everywhere, "little has arrived");
        for _ in 0..3 {
            let bound = turn(MUCH, FREE);
            assert_eq!(bound.len(), 1);
            assert!(everywhere.contains(&bound[0]));
            assert_eq!(turn(MUCH, HELD / 2), bound);
            assert_eq!(turn(MUCH, HELD / 2), everywhere);
        }
        assert_eq!(turn(0, FREE), everywhere);
        assert_eq!(turn(0, HELD), everywhere);
    }
}
