//! What a bad link does to packets, as a function of a seed and of the packets: no descriptors, no clocks.

use std::time::Duration;

use serde::Serialize;

/// What one direction of a link does to packets. The default does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(default)]
pub struct Faults {
    /// How long a packet is under way.
    pub delay: Duration,
    /// At most so much longer, at random; packets don't overtake each other for it.
    pub jitter: Duration,
    /// Share of packets lost, each by itself; 0 to 1, as all shares.
    pub loss: f64,
    /// Losses in runs.
    pub bursts: Option<Bursts>,
    /// Share of packets that are held back by `reorder_by`, so that others overtake them.
    pub reorder: f64,
    /// How long those are held back.
    pub reorder_by: Duration,
    /// Share of packets that arrive twice.
    pub duplicate: f64,
    /// Share of packets of which one bit is flipped.
    pub corrupt: f64,
    /// How fast packets leave, with a queue before that.
    pub rate: Option<Rate>,
    /// Longest packet carried, in bytes from the IP header on; a longer one vanishes without a word.
    pub mtu: Option<usize>,
}

/// Loss in runs, after Gilbert: while the link is bad, everything is lost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bursts {
    /// Chance of a packet to find that a bad time begins.
    pub begin: f64,
    /// Chance of a packet in a bad time to be its last.
    pub end: f64,
}

/// A bottleneck.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rate {
    /// Bits a second, counted from the IP header on.
    pub bits_per_second: u64,
    /// Bytes that may wait; what comes beyond them is dropped.
    pub queue: usize,
}

impl Default for Faults {
    fn default() -> Self {
        Faults {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            bursts: None,
            reorder: 0.0,
            reorder_by: Duration::ZERO,
            duplicate: 0.0,
            corrupt: 0.0,
            rate: None,
            mtu: None,
        }
    }
}

/// What becomes of one packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fate {
    /// When it arrives, and when it arrives again.
    pub(super) arrivals: [Option<Duration>; 2],
    /// The bit, counted from the IP header on, that is flipped.
    pub(super) flipped: Option<usize>,
}

/// One direction of a link at work. Times count from its beginning.
#[derive(Clone, Debug)]
pub(super) struct Channel {
    faults: Faults,
    random: Random,
    bad: bool,
    /// When the bottleneck is done with what waits.
    free_at: Duration,
    /// No packet that is not held back arrives before it.
    latest: Duration,
}

impl Channel {
    pub(super) fn new(faults: Faults, seed: u64) -> Channel {
        Channel { faults, random: Random::new(seed), bad: false, free_at: Duration::ZERO, latest: Duration::ZERO }
    }

    /// From the next packet on.
    pub(super) fn set(&mut self, faults: Faults) {
        self.faults = faults;
    }

    /// A packet of `length` bytes enters.
    pub(super) fn enter(&mut self, now: Duration, length: usize) -> Fate {
        let Faults { delay, jitter, loss, bursts, reorder, reorder_by, duplicate, corrupt, rate, mtu } = self.faults;
        let mut fate = Fate::default();
        if mtu.is_some_and(|mtu| length > mtu) {
            return fate;
        }
        let mut leaves = now;
        if let Some(Rate { bits_per_second, queue }) = rate {
            let bits = bits_per_second.max(1) as f64;
            let waiting = self.free_at.saturating_sub(now).as_secs_f64() * bits / 8.0;
            if waiting > queue as f64 {
                return fate;
            }
            self.free_at = self.free_at.max(now) + Duration::from_secs_f64(length as f64 * 8.0 / bits);
            leaves = self.free_at;
        }
        if self.is_lost(loss, bursts) {
            return fate;
        }
        let mut arrives = (leaves + delay + jitter.mul_f64(self.random.share())).max(self.latest);
        if self.random.happens(reorder) {
            arrives += reorder_by;
        } else {
            self.latest = arrives;
        }
        fate.arrivals[0] = Some(arrives);
        if self.random.happens(duplicate) {
            fate.arrivals[1] = Some(arrives);
        }
        if self.random.happens(corrupt) {
            fate.flipped = Some(self.random.below(length * 8));
        }
        fate
    }

    fn is_lost(&mut self, loss: f64, bursts: Option<Bursts>) -> bool {
        let Some(Bursts { begin, end }) = bursts else {
            self.bad = false;
            return self.random.happens(loss);
        };
        if !self.bad {
            self.bad = self.random.happens(begin);
        }
        let lost = self.bad;
        if self.bad && self.random.happens(end) {
            self.bad = false;
        }
        lost || self.random.happens(loss)
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): one seed, the same numbers everywhere.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    const fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// From 0 up to, not including, 1.
    fn share(&mut self) -> f64 {
        // 53 bits are what an f64 holds exactly.
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// True with this chance. A chance of nothing takes no number, so that a fault that is off changes no other.
    fn happens(&mut self, chance: f64) -> bool {
        chance > 0.0 && self.share() < chance
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn run(faults: Faults, packets: u32) -> Vec<Fate> {
        let mut channel = Channel::new(faults, 7);
        (0..packets).map(|index| channel.enter(MS * index, 1000)).collect()
    }

    fn share(fates: &[Fate], judge: impl Fn(&Fate) -> bool) -> f64 {
        fates.iter().filter(|fate| judge(fate)).count() as f64 / fates.len() as f64
    }

    #[test]
    fn nothing_happens_by_default_and_a_seed_repeats_itself() {
        for (index, fate) in (0..).zip(run(Faults::default(), 100)) {
            assert_eq!(fate, Fate { arrivals: [Some(MS * index), None], flipped: None });
        }
        let bad = Faults { loss: 0.3, duplicate: 0.2, corrupt: 0.1, jitter: 5 * MS, ..Faults::default() };
        assert_eq!(run(bad, 1000), run(bad, 1000));
    }

    #[test]
    fn shares_are_met() {
        let faults = Faults { loss: 0.03, duplicate: 0.1, corrupt: 0.2, ..Faults::default() };
        let fates = run(faults, 100_000);
        assert!((share(&fates, |fate| fate.arrivals[0].is_none()) - 0.03).abs() < 0.003);
        assert!((share(&fates, |fate| fate.arrivals[1].is_some()) - 0.097).abs() < 0.005);
        assert!((share(&fates, |fate| fate.flipped.is_some()) - 0.194).abs() < 0.01);
        assert!(fates.iter().all(|fate| fate.flipped.is_none_or(|bit| bit < 8000)));
    }

    #[test]
    fn bursts_lose_runs() {
        let faults = Faults { bursts: Some(Bursts { begin: 0.005, end: 0.25 }), ..Faults::default() };
        let fates = run(faults, 200_000);
        let lost: Vec<bool> = fates.iter().map(|fate| fate.arrivals[0].is_none()).collect();
        let runs = lost.windows(2).filter(|pair| !pair[0] && pair[1]).count() as f64;
        let total = lost.iter().filter(|&&lost| lost).count() as f64;
        assert!((3.5..4.5).contains(&(total / runs)), "{}", total / runs);
        assert!((0.015..0.025).contains(&(total / lost.len() as f64)));
    }

    #[test]
    fn jitter_keeps_the_order_and_reordering_does_not() {
        let arrivals = |faults| run(faults, 1000).into_iter().map(|fate| fate.arrivals[0]).collect::<Vec<_>>();
        assert!(arrivals(Faults { jitter: 20 * MS, ..Faults::default() }).is_sorted());
        let held = arrivals(Faults { reorder: 0.01, reorder_by: 5 * MS, ..Faults::default() });
        assert!(!held.is_sorted());
        assert!(held.iter().zip(0..).all(|(arrival, index)| arrival.is_some_and(|at| at <= MS * index + 5 * MS)));
    }

    #[test]
    fn a_bottleneck_spaces_and_drops() {
        // 1000 bytes take a millisecond; 10 fit into the queue beyond the one that is leaving.
        let rate = Rate { bits_per_second: 8_000_000, queue: 10_000 };
        let mut channel = Channel::new(Faults { rate: Some(rate), ..Faults::default() }, 1);
        let arrivals: Vec<_> = (0..20).filter_map(|_| channel.enter(Duration::ZERO, 1000).arrivals[0]).collect();
        assert_eq!(arrivals.len(), 11);
        assert!(arrivals.iter().zip(1..).all(|(&arrival, index)| arrival == MS * index), "{arrivals:?}");
    }

    #[test]
    fn long_packets_vanish() {
        let mut channel = Channel::new(Faults { mtu: Some(1280), ..Faults::default() }, 1);
        assert!(channel.enter(Duration::ZERO, 1280).arrivals[0].is_some());
        assert!(channel.enter(Duration::ZERO, 1281).arrivals[0].is_none());
    }
}
