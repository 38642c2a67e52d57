//! Maps and sets whose keys are numbers that we or the kernel count up: sockets, inodes. Nobody outside chooses them, so they need no
//! keyed hash, which costs more than all else in a look-up and is paid several times for each request of a connection.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// A map by such numbers.
pub(super) type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;
/// A set of such numbers.
pub(super) type NumberSet<K> = HashSet<K, BuildHasherDefault<NumberHasher>>;

/// An odd number without a pattern in its bits: 2^64 over the golden ratio.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Multiplies, and adds the upper half of the product to the lower: neighbours come to lie far apart, and every bit of the number
/// shows in those that tables look at.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(u64::from(byte)));
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number) * u128::from(FACTOR);
        self.0 = (product as u64) ^ ((product >> 64) as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::hash::BuildHasher;

    use super::*;

    #[test]
    fn numbers_in_a_row_and_at_steps_fall_into_different_buckets() {
        let build = BuildHasherDefault::<NumberHasher>::default();
        for step in [1u64, 2, 16, 1 << 12, 1 << 32] {
            let buckets: HashSet<u64> = (0..1024).map(|index| build.hash_one(index * step) & 0xfff).collect();
            assert!(buckets.len() > 800, "step {step}: {} buckets", buckets.len());
            let tags: HashSet<u64> = (0..1024).map(|index| build.hash_one(index * step) >> 57).collect();
            assert!(tags.len() > 100, "step {step}: {} tags", tags.len());
        }
    }
}
