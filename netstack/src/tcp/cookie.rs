//! SYN cookies (RFC 4987): a handshake that keeps no state until it is complete, for when a listener's SYN queue is full.
//!
//! The ISN carries a counter of 64 s ticks (8 bits) and a keyed hash of the connection with an index of the peer's MSS
//! added to it (24 bits). The low 6 bits of the timestamp carry what was agreed; a peer without timestamps gets neither
//! window scaling nor SACK, as with Linux.

use std::net::IpAddr;

use super::receive::SCALE_MAX;
use super::{Agreed, Tuple};
use crate::Instant;
use crate::hash::Keys;

/// Ticks for which a cookie is good, the current one included.
const TICKS_GOOD: u32 = 2;
/// Mask of the timestamp bits that carry options.
const OPTION_MASK: u32 = 0x3f;
/// The scale bits that say "no scaling".
const NO_SCALE: u32 = 0xf;
const SACK_BIT: u32 = 1 << 4;
const ECN_BIT: u32 = 1 << 5;
const HASH_MASK: u32 = 0x00ff_ffff;

/// The segment sizes a cookie can tell apart, as Linux has them.
const fn sizes(local: IpAddr) -> [u16; 4] {
    match local {
        IpAddr::V4(_) => [536, 1300, 1440, 1460],
        IpAddr::V6(_) => [1220, 1420, 1440, 8940],
    }
}

fn tick(now: Instant) -> u32 {
    u32::try_from((now.as_millis() / 64_000) & 0xff).unwrap_or(0)
}

/// The ISN for a SYN with number `irs` and the given MSS.
pub(crate) fn make(keys: &Keys, tuple: &Tuple, irs: u32, mss: u16, now: Instant) -> u32 {
    let tick = tick(now);
    let fitting = sizes(tuple.local).iter().rposition(|&size| size <= mss).unwrap_or(0);
    let index = u32::try_from(fitting).unwrap_or(0);
    tick << 24 | (keys.cookie(tuple, irs, tick).wrapping_add(index) & HASH_MASK)
}

/// The MSS that the cookie `iss` carries, if it is genuine and fresh.
pub(crate) fn check(keys: &Keys, tuple: &Tuple, irs: u32, iss: u32, now: Instant) -> Option<u16> {
    let made_at = iss >> 24;
    if tick(now).wrapping_sub(made_at) & 0xff >= TICKS_GOOD {
        return None;
    }
    let index = iss.wrapping_sub(keys.cookie(tuple, irs, made_at)) & HASH_MASK;
    sizes(tuple.local).get(usize::try_from(index).ok()?).copied()
}

/// A timestamp that carries what was agreed and isn't ahead of the clock.
pub(crate) fn encode_options(value: u32, agreed: Agreed, snd_scale: u8) -> u32 {
    let scale = if agreed.scaling { u32::from(snd_scale) & NO_SCALE } else { NO_SCALE };
    let bits = scale | if agreed.sack { SACK_BIT } else { 0 } | if agreed.ecn { ECN_BIT } else { 0 };
    let candidate = (value & !OPTION_MASK) | bits;
    if candidate.wrapping_sub(value).cast_signed() > 0 { candidate.wrapping_sub(OPTION_MASK + 1) } else { candidate }
}

/// What the echo of such a timestamp says was agreed, and the peer's window scale.
pub(crate) fn decode_options(echo: u32) -> (Agreed, u8) {
    let scale = echo & NO_SCALE;
    let scaling = scale != NO_SCALE;
    let agreed = Agreed { timestamps: true, sack: echo & SACK_BIT != 0, scaling, ecn: echo & ECN_BIT != 0 };
    (agreed, if scaling { u8::try_from(scale).unwrap_or(0).min(SCALE_MAX) } else { 0 })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Secrets;

    fn tuple(port: u16) -> Tuple {
        Tuple { local: [10, 0, 0, 1].into(), local_port: 80, remote: [10, 0, 0, 2].into(), remote_port: port }
    }

    proptest! {
        #[test]
        fn good_for_a_while_and_for_one_connection(irs in any::<u32>(), mss in 500u16..2000, at in 0u64..1 << 40, other in any::<u32>()) {
            let keys = Keys::new(&Secrets([1; 32]));
            let now = Instant::from_millis(at);
            let iss = make(&keys, &tuple(5), irs, mss, now);
            let told = check(&keys, &tuple(5), irs, iss, now);
            prop_assert!(told.is_some_and(|told| told <= mss.max(536)));
            let later = Instant::from_millis(at + 64_000);
            prop_assert_eq!(check(&keys, &tuple(5), irs, iss, later), told);
            prop_assert_eq!(check(&keys, &tuple(5), irs, iss, Instant::from_millis(at + 128_000)), None);
            prop_assert_eq!(check(&keys, &tuple(6), irs, iss, now), None);
            if other != iss {
                // Four of 2^24 hashes in two of 2^8 ticks are genuine: a guess is as good as never right.
                prop_assert!(other.wrapping_sub(iss) < 4 || iss.wrapping_sub(other) < 4 || check(&keys, &tuple(5), irs, other, now).is_none());
            }
        }

        #[test]
        fn options_come_back(value in any::<u32>(), sack: bool, scaling: bool, ecn: bool, scale in 0u8..=14) {
            let agreed = Agreed { timestamps: true, sack, scaling, ecn };
            let scale = if scaling { scale } else { 0 };
            let encoded = encode_options(value, agreed, scale);
            prop_assert_eq!(decode_options(encoded), (agreed, scale));
            prop_assert!(value.wrapping_sub(encoded) <= 2 * OPTION_MASK);
        }
    }
}
