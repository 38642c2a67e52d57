//! When each of many things is due: an indexed heap.
//!
//! Each key is in the heap at most once. Moving a deadline later costs nothing until the old one comes, which is what an
//! acknowledgment does to the retransmission timer each time; moving it earlier costs a sift. Of equal deadlines the smaller
//! key comes first, so that the order doesn't depend on how the queue came to be, and a thawed one has the same.

use crate::Instant;

const ARITY: usize = 4;
const ABSENT: u32 = u32::MAX;

/// A queue of deadlines keyed by small numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct TimerQueue {
    heap: Vec<(Instant, u32)>,
    /// Where each key is in the heap.
    position: Vec<u32>,
}

impl TimerQueue {
    /// Makes sure that `key` comes up at `deadline` or earlier.
    pub(crate) fn at_latest(&mut self, key: u32, deadline: Instant) {
        let slot = key as usize;
        if self.position.len() <= slot {
            self.position.resize(slot + 1, ABSENT);
        }
        let at = self.position[slot];
        if at == ABSENT {
            self.heap.push((deadline, key));
            self.rise(self.heap.len() - 1);
        } else if deadline < self.heap[at as usize].0 {
            self.heap[at as usize].0 = deadline;
            self.rise(at as usize);
        }
    }

    /// The earliest deadline.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.heap.first().map(|&(deadline, _)| deadline)
    }

    /// The earliest deadline and its key.
    pub(crate) fn first(&self) -> Option<(Instant, u32)> {
        self.heap.first().copied()
    }

    /// Takes out the first key whose deadline has come. The owner tells what that is really: one that was moved later waits on, so that
    /// the order doesn't depend on what the deadline was before, and without one there is nothing to do.
    pub(crate) fn take_due(&mut self, now: Instant, really: impl Fn(u32) -> Option<Instant>) -> Option<u32> {
        loop {
            let &(noted, key) = self.heap.first()?;
            if noted > now {
                return None;
            }
            self.remove(key);
            match really(key) {
                Some(deadline) if deadline > noted => self.at_latest(key, deadline),
                Some(_) => return Some(key),
                None => {}
            }
        }
    }

    /// Takes out a key.
    pub(crate) fn remove(&mut self, key: u32) {
        let Some(at) = self.position.get(key as usize).copied().filter(|&at| at != ABSENT) else {
            return;
        };
        let at = at as usize;
        self.position[key as usize] = ABSENT;
        self.heap.swap_remove(at);
        if at < self.heap.len() {
            self.place(at);
            self.sink(at);
            self.rise(at);
        }
    }

    fn place(&mut self, at: usize) {
        let key = self.heap[at].1;
        self.position[key as usize] = u32::try_from(at).expect("fewer timers than 2^32");
    }

    fn rise(&mut self, mut at: usize) {
        while at > 0 {
            let parent = (at - 1) / ARITY;
            if self.heap[parent] <= self.heap[at] {
                break;
            }
            self.heap.swap(parent, at);
            self.place(at);
            at = parent;
        }
        self.place(at);
    }

    fn sink(&mut self, mut at: usize) {
        loop {
            let children = at * ARITY + 1..(at * ARITY + 1 + ARITY).min(self.heap.len());
            let Some(least) = children.min_by_key(|&child| self.heap[child]) else {
                break;
            };
            if self.heap[at] <= self.heap[least] {
                break;
            }
            self.heap.swap(at, least);
            self.place(at);
            at = least;
        }
        self.place(at);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_due_comes_in_order_of_its_last_deadline() {
        let deadlines = [30, 20, 10].map(Instant::from_nanos);
        let mut queue = TimerQueue::default();
        for (key, noted) in [(0, 5), (1, 20), (2, 1)] {
            queue.at_latest(key, Instant::from_nanos(noted));
        }
        let mut next = |now| queue.take_due(Instant::from_nanos(now), |key| Some(deadlines[key as usize]));
        assert_eq!([next(25), next(25), next(25), next(30)], [Some(2), Some(1), None, Some(0)]);
    }

    proptest! {
        #[test]
        fn agrees_with_a_map(steps in proptest::collection::vec((0u8..3, 0u32..50, 0u64..1000), 1..300)) {
            let mut queue = TimerQueue::default();
            let mut model: BTreeMap<u32, u64> = BTreeMap::new();
            for (kind, key, time) in steps {
                match kind {
                    0 => {
                        queue.at_latest(key, Instant::from_nanos(time));
                        let entry = model.entry(key).or_insert(time);
                        *entry = (*entry).min(time);
                    }
                    1 => {
                        queue.remove(key);
                        model.remove(&key);
                    }
                    _ => {
                        if let Some(key) = queue.take_due(Instant::from_nanos(time), |_| Some(Instant::from_nanos(0))) {
                            let due = model.remove(&key);
                            prop_assert!(due.is_some_and(|due| due <= time));
                        } else {
                            prop_assert!(model.values().all(|&due| due > time));
                        }
                    }
                }
                prop_assert_eq!(queue.next().map(Instant::as_nanos), model.values().min().copied());
            }
        }
    }
}
