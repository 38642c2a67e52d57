//! The stack's own clock.
//!
//! It runs with the driver's but has its own epoch, and it stands still while the stack is frozen. So every time in a
//! stack image means the same after a thaw on another machine, and the timestamps told to peers go on without a step.

use serde::{Deserialize, Serialize};

use crate::Instant;

/// Where the clock of a new stack starts: late enough that ages can be subtracted.
const START: Instant = Instant::from_millis(1 << 30);

/// Translates between the driver's clock and the stack's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Clock {
    /// The stack's time minus the driver's, modulo 2^64.
    ahead: u64,
    latest: Instant,
}

impl Clock {
    pub(crate) const fn new(driver: Instant) -> Self {
        Clock::resume(START, driver)
    }

    /// A clock that shows `own` when the driver's shows `driver`.
    pub(crate) const fn resume(own: Instant, driver: Instant) -> Self {
        Clock { ahead: own.as_nanos().wrapping_sub(driver.as_nanos()), latest: own }
    }

    /// The stack's time. It never goes back, even if the driver's does.
    pub(crate) fn enter(&mut self, driver: Instant) -> Instant {
        self.latest = self.peek(driver);
        self.latest
    }

    /// The stack's time, for looking only.
    pub(crate) fn peek(&self, driver: Instant) -> Instant {
        let own = Instant::from_nanos(driver.as_nanos().wrapping_add(self.ahead));
        // A driver's clock that went back would otherwise seem to have leapt ahead by centuries.
        own.max(self.latest)
    }

    /// The latest time the stack has seen.
    pub(crate) const fn latest(&self) -> Instant {
        self.latest
    }

    /// The driver's time for a time of the stack; zero for one before the driver's clock began, as what was due before a thaw may be.
    pub(crate) const fn leave(&self, own: Instant) -> Instant {
        let (own, latest) = (own.as_nanos(), self.latest.as_nanos());
        let driver = latest.wrapping_sub(self.ahead);
        Instant::from_nanos(match own.checked_sub(latest) {
            Some(ahead) => driver.saturating_add(ahead),
            None => driver.saturating_sub(latest - own),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_on_where_it_was() {
        let mut clock = Clock::new(Instant::from_millis(5));
        let before = clock.enter(Instant::from_millis(1005));
        let mut thawed = Clock::resume(before, Instant::from_nanos(3));
        assert_eq!(thawed.enter(Instant::from_nanos(13)).as_nanos(), before.as_nanos() + 10);
        assert_eq!(thawed.leave(before), Instant::from_nanos(3));
        assert_eq!(thawed.enter(Instant::from_nanos(4)).as_nanos(), before.as_nanos() + 10, "never back");
    }

    #[test]
    fn what_was_due_before_a_thaw_is_due_at_once() {
        let mut clock = Clock::new(Instant::from_millis(5));
        let [due, frozen] = [1005, 1006].map(|at| clock.enter(Instant::from_millis(at)));
        let thawed = Clock::resume(frozen, Instant::from_nanos(3));
        assert_eq!(thawed.leave(due), Instant::from_nanos(0));
        assert_eq!(Clock::resume(frozen, Instant::from_millis(7)).leave(due), Instant::from_millis(6));
    }
}
