//! When to stop copying and freeze.
//!
//! "Dirty below a threshold" is not enough: a program that writes in bursts (a server that copies a large value for each
//! request) is above any threshold half of the time and far below it the other half, and one that writes steadily never gets
//! below. So: freeze at once when little is left; go on while rounds shrink; otherwise take the best moment that comes by,
//! asking less of it the longer it takes. Rounds and time are bounded.
//!
//! Pure: the caller tells the time.

use std::time::Duration;

use super::RoundStats;

/// What a move may cost before the freeze, and what it should leave for the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// With no more than this many bytes left the freeze comes at once. A good value is what the connection carries in a tenth
    /// of the downtime that is acceptable.
    pub freeze_bytes: u64,
    /// Rounds at most.
    pub rounds: u32,
    /// No further round after this much time.
    pub time: Duration,
}

impl Default for Budget {
    /// 4 MiB left, 40 rounds, 20 seconds.
    fn default() -> Budget {
        Budget { freeze_bytes: 4 << 20, rounds: 40, time: Duration::from_secs(20) }
    }
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another round.
    Round,
    /// Freeze now: every moment that passes makes more dirty.
    Freeze(Reason),
}

/// Why it's time to freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Little is left.
    LittleLeft,
    /// It doesn't get better than this.
    GoodMoment,
    /// The budget is used up.
    BudgetSpent,
}

/// Decides after each round.
#[derive(Debug, Clone)]
pub struct Policy {
    budget: Budget,
    rounds: u32,
    /// `dirty_left` of the rounds since they stopped shrinking.
    seen: Vec<u64>,
    last_bytes: Option<u64>,
}

/// Rounds that only watch, before a moment can be called good.
const WATCHED_ROUNDS: usize = 4;

impl Policy {
    /// A policy for one move.
    #[must_use]
    pub fn new(budget: Budget) -> Policy {
        Policy { budget, rounds: 0, seen: Vec::new(), last_bytes: None }
    }

    /// Tells what a round did, `elapsed` after the first one began, and asks what to do.
    pub fn after_round(&mut self, stats: RoundStats, elapsed: Duration) -> Next {
        self.rounds += 1;
        let left = stats.dirty_left;
        if left <= self.budget.freeze_bytes {
            return Next::Freeze(Reason::LittleLeft);
        }
        if self.rounds >= self.budget.rounds || elapsed >= self.budget.time {
            return Next::Freeze(Reason::BudgetSpent);
        }
        // A round shorter than the one before leaves less for the next, so it pays to go on.
        let shrinks = self.last_bytes.is_none_or(|last| stats.bytes < last / 4 * 3);
        self.last_bytes = Some(stats.bytes);
        if shrinks {
            return Next::Round;
        }
        let is_good = self.seen.len() >= WATCHED_ROUNDS && left <= self.acceptable(elapsed);
        self.seen.push(left);
        if is_good { Next::Freeze(Reason::GoodMoment) } else { Next::Round }
    }

    /// The best moment seen at first, later any that is better than a growing share of those seen.
    fn acceptable(&self, elapsed: Duration) -> u64 {
        let spent = (elapsed.as_secs_f64() / self.budget.time.as_secs_f64())
            .max(f64::from(self.rounds) / f64::from(self.budget.rounds))
            .clamp(0.0, 1.0);
        let mut sorted = self.seen.clone();
        sorted.sort_unstable();
        let rank = (spent * spent * sorted.len() as f64) as usize;
        let value = sorted.get(rank.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0);
        // Moments that differ by a tenth are equally good.
        value + value / 10
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Runs rounds against a program that has written `written(from, to)` bytes between two instants (milliseconds), over a
    /// connection of 1 MiB a millisecond. Returns the bytes left for the freeze, the rounds and the milliseconds.
    fn run(initial: u64, written: impl Fn(u64, u64) -> u64) -> (u64, u32, u64, Reason) {
        let mut policy = Policy::new(Budget::default());
        let (mut now, mut dirty) = (0, initial);
        for round in 1.. {
            let bytes = dirty;
            let end = now + bytes / MIB + 1;
            dirty = written(now, end);
            now = end;
            let stats = RoundStats { bytes, pages: bytes / 4096, dirty_left: dirty };
            if let Next::Freeze(reason) = policy.after_round(stats, Duration::from_millis(now)) {
                return (dirty, round, now, reason);
            }
        }
        unreachable!()
    }

    #[test]
    fn an_idle_program_freezes_after_one_round() {
        assert_eq!(run(1024 * MIB, |_, _| 0), (0, 1, 1025, Reason::LittleLeft));
    }

    #[test]
    fn a_steady_writer_converges() {
        // A tenth of what the connection carries.
        let (left, rounds, _, reason) = run(1024 * MIB, |from, to| (to - from) * MIB / 10);
        assert!(left <= 4 * MIB && rounds <= 4, "{left} {rounds}");
        assert_eq!(reason, Reason::LittleLeft);
    }

    #[test]
    fn a_writer_faster_than_the_connection_is_frozen_in_bounded_time() {
        let (left, rounds, time, _) = run(256 * MIB, |from, to| ((to - from) * 2 * MIB).min(200 * MIB));
        assert!(left <= 220 * MIB);
        assert!(rounds <= 40 && time < 21_000, "{rounds} rounds, {time} ms");
    }

    #[test]
    fn a_bursty_writer_is_frozen_between_bursts() {
        // 64 MiB in 15 of every 97 milliseconds.
        let burst = |at: u64| if at % 97 < 15 { 64 * MIB / 15 } else { 0 };
        let (left, rounds, time, reason) = run(1024 * MIB, |from, to| (from..to).map(burst).sum::<u64>().min(64 * MIB));
        assert!(left <= 4 * MIB, "{left} bytes left after {rounds} rounds, {time} ms, {reason:?}");
        assert!(time < 3000, "{time} ms");
    }

    #[test]
    fn the_best_of_varying_moments_is_taken() {
        // Never little, but sometimes much less than at other times.
        let left = |from: u64, _| if from.is_multiple_of(7) { 20 * MIB } else { (60 + from % 50) * MIB };
        let (left, rounds, ..) = run(100 * MIB, left);
        assert!(left <= 80 * MIB && rounds < 40, "{left} after {rounds}");
    }
}
