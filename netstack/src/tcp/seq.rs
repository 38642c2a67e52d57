//! Sequence numbers.
//!
//! On the wire they are 32 bits and wrap. Inside they are 64 bits and never do: a [`Seq`] is the wire's number with the
//! count of wraps above it, so comparing and subtracting are plain arithmetic and can't be got wrong. The only place
//! where the modulus matters is [`Seq::expand`], which puts a number from the wire next to one that is known.

use std::ops::{Add, AddAssign, Sub};

use serde::{Deserialize, Serialize};

/// A position in one direction of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Seq(u64);

impl Seq {
    /// The first position of a connection: one wrap up, so that numbers below it can be expressed too.
    pub(crate) const fn initial(wire: u32) -> Self {
        Seq((1 << 32) + wire as u64)
    }

    /// The number as the wire carries it.
    pub(crate) const fn wire(self) -> u32 {
        (self.0 & 0xffff_ffff) as u32
    }

    /// The position nearest to `self` that the wire would write as `wire`.
    pub(crate) const fn expand(self, wire: u32) -> Seq {
        let distance = wire.wrapping_sub(self.wire()).cast_signed();
        Seq(self.0.wrapping_add_signed(distance as i64))
    }

    /// How far `self` is beyond `earlier`; zero if it isn't.
    pub(crate) const fn since(self, earlier: Seq) -> usize {
        self.0.saturating_sub(earlier.0) as usize
    }

    /// `self` moved back; at most to zero, which no connection reaches.
    pub(crate) const fn back(self, bytes: usize) -> Seq {
        Seq(self.0.saturating_sub(bytes as u64))
    }
}

impl Add<usize> for Seq {
    type Output = Seq;

    fn add(self, bytes: usize) -> Seq {
        Seq(self.0.saturating_add(bytes as u64))
    }
}

impl AddAssign<usize> for Seq {
    fn add_assign(&mut self, bytes: usize) {
        *self = *self + bytes;
    }
}

impl Sub<Seq> for Seq {
    type Output = usize;

    fn sub(self, earlier: Seq) -> usize {
        self.since(earlier)
    }
}

/// Whether `a` lies before `b` on the wire's circle; for timestamps and numbers of connections that are no more.
pub(crate) const fn wire_before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn expand_finds_what_was_written(base in any::<u32>(), travelled in 0u64..1 << 40, offset in -(1i64 << 31) + 1..1 << 31) {
            let known = Seq(Seq::initial(base).0 + travelled);
            let other = Seq(known.0.wrapping_add_signed(offset));
            prop_assert_eq!(known.expand(other.wire()), other);
        }

        #[test]
        fn before_agrees_with_the_line(a in any::<u32>(), ahead in 1u32..1 << 31) {
            prop_assert!(wire_before(a, a.wrapping_add(ahead)));
            prop_assert!(!wire_before(a.wrapping_add(ahead), a));
            prop_assert!(!wire_before(a, a));
        }
    }
}
