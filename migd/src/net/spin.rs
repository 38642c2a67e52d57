//! Whether to look for the next event a little longer before going to sleep.
//!
//! Between a request and its answer the net thread would go to sleep and be woken again at each step, and a wake-up across
//! processors costs tens of microseconds on a virtual machine, much more than what there is to do. So after sleeps that
//! were shorter than a [`WINDOW`] it looks again for as long before it sleeps. That stops with the first few looks in vain,
//! so an idle thread sleeps; while packets are large, since then the processor is better left to the programs; and
//! when another connection becomes active, since what comes from many is better gathered and moved together.

use std::time::Duration;

/// Longest time to look.
pub(super) const WINDOW: Duration = Duration::from_micros(50);

/// Short sleeps in a row before looking begins.
const CREDIT_TO_SPIN: u8 = 4;
const CREDIT_MAX: u8 = 16;
/// What a look in vain costs: the fourth of what can be saved up.
const CREDIT_A_MISS: u8 = 4;

/// What the last waits were like.
#[derive(Debug, Default)]
pub(super) struct Spin {
    credit: u8,
    /// The socket that was served last.
    latest: u64,
    /// There is one processor only: whoever looks keeps everybody else from going on.
    never: bool,
}

impl Spin {
    pub(super) fn new() -> Spin {
        Spin { credit: 0, latest: 0, never: std::thread::available_parallelism().is_ok_and(|count| count.get() == 1) }
    }

    /// Whether to look before sleeping.
    pub(super) fn pays(&self) -> bool {
        !self.never && self.credit >= CREDIT_TO_SPIN
    }

    /// An event ended a sleep.
    pub(super) fn slept(&mut self, time: Duration) {
        if time < WINDOW {
            self.hit();
        } else {
            self.missed();
        }
    }

    /// Looking found an event.
    pub(super) fn hit(&mut self) {
        self.credit = (self.credit + 1).min(CREDIT_MAX);
    }

    /// Looking found nothing.
    pub(super) fn missed(&mut self) {
        self.credit = self.credit.saturating_sub(CREDIT_A_MISS);
    }

    /// A socket is served.
    pub(super) fn note_socket(&mut self, socket: u64) {
        if socket != self.latest {
            self.latest = socket;
            self.credit = 0;
        }
    }

    /// A lot of data passed.
    pub(super) fn note_bulk(&mut self) {
        self.credit = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sleeps_begin_it_and_looks_in_vain_end_it() {
        let mut spin = Spin::default();
        for _ in 0..CREDIT_TO_SPIN {
            assert!(!spin.pays());
            spin.slept(WINDOW / 2);
        }
        assert!(spin.pays());
        for _ in 0..100 {
            spin.hit();
        }
        let mut looks = 0;
        while spin.pays() {
            spin.missed();
            looks += 1;
        }
        assert!(looks <= 4, "{looks}");
        for _ in 0..100 {
            spin.slept(WINDOW * 2);
        }
        assert!(!spin.pays());
    }

    #[test]
    fn bulk_and_a_lonely_processor_forbid_it() {
        let eager = || Spin { credit: CREDIT_MAX, latest: 7, never: false };
        let mut spin = eager();
        spin.note_bulk();
        assert!(!spin.pays());
        assert!(!Spin { never: true, ..eager() }.pays());
    }

    #[test]
    fn it_is_for_one_connection_alone() {
        let mut spin = Spin { credit: CREDIT_MAX, latest: 7, never: false };
        spin.note_socket(7);
        assert!(spin.pays());
        spin.note_socket(8);
        assert!(!spin.pays());
    }
}
