//! Who is let in when everybody knocks: SYNs that come faster than connections could be served are dropped as they are read.
//!
//! To answer a SYN costs several times what it costs to read it, even with a cookie that keeps no state. In a flood the
//! answers would take the net thread's time from the established connections, whose packets would then be lost in the
//! device's full queue. So only so many SYNs a second are handed to the stack. A client whose SYN was dropped sends it
//! again, as after any loss, and a SYN that comes again goes first: forged ones don't come twice.
//!
//! The first SYN that is turned away is also how a flood is noticed: [`super::siege`] then has the kernel drop most of it before
//! it is read, and lets through fewer than are turned away here.
//!
//! Nothing of this moves with a job: a target that is flooded learns it anew.

use std::time::Duration;

use netstack::Instant;

/// SYNs answered each second: more than a job accepts.
const RATE_PER_S: u64 = 20_000;
/// The same once some had to be turned away.
const SIEGE_PER_S: u64 = 8_000;
/// SYNs answered at once after a quiet time.
const BURST: u64 = 2_000;
/// Of those, the last so many are kept for SYNs that come again.
const RESERVED: u64 = 500;
/// How long a SYN that was dropped is remembered, at least and at most twice that. A client's second SYN comes after a second.
const MEMORY: Duration = Duration::from_secs(2);
/// Bits that remember. Two seconds of a flood of a million a second fill a good tenth of them.
const BITS: usize = 1 << 24;

const TCP: u8 = 6;
const SYN: u8 = 0x02;
const SYN_ACK_RST: u8 = 0x16;

/// A token bucket for SYNs, and what it turned away.
#[derive(Debug)]
pub(super) struct Door {
    /// SYNs that may be answered now.
    tokens: u64,
    filled_at: Instant,
    turned_away: u64,
    memory: Option<Memory>,
}

impl Door {
    pub(super) fn new(now: Instant) -> Door {
        Door { tokens: BURST, filled_at: now, turned_away: 0, memory: None }
    }

    /// Whether a packet is to be handed to the stack. `now` is asked for SYNs only.
    pub(super) fn admits(&mut self, packet: &[u8], now: impl FnOnce() -> Instant) -> bool {
        let Some(name) = name_of_syn(packet) else { return true };
        let now = now();
        self.fill(now);
        let comes_again = self.tokens <= RESERVED && self.memory.as_mut().is_some_and(|memory| memory.knows(now, name));
        if self.tokens > if comes_again { 0 } else { RESERVED } {
            self.tokens -= 1;
            return true;
        }
        self.memory.get_or_insert_with(|| Memory::new(now)).note(now, name);
        self.turned_away += 1;
        if self.turned_away.is_power_of_two() {
            tracing::warn!(count = self.turned_away, "SYNs come faster than {RATE_PER_S} a second and were dropped");
        }
        false
    }

    fn fill(&mut self, now: Instant) {
        let nanos = u64::try_from(now.since(self.filled_at).as_nanos()).unwrap_or(u64::MAX);
        let interval = 1_000_000_000 / if self.memory.is_some() { SIEGE_PER_S } else { RATE_PER_S };
        let new = nanos / interval;
        if new == 0 {
            return;
        }
        self.tokens = self.tokens.saturating_add(new).min(BURST);
        self.filled_at = if self.tokens == BURST {
            // The memory isn't needed while all are let in.
            if self.memory.as_ref().is_some_and(|memory| now.since(memory.since) > 2 * MEMORY) {
                self.memory = None;
            }
            now
        } else {
            self.filled_at + Duration::from_nanos(new * interval)
        };
    }
}

/// SYNs seen lately: two bit maps, one that is written and the one before. Some that were never seen look as if they had been.
#[derive(Debug)]
struct Memory {
    /// When the current one began.
    since: Instant,
    current: Box<[u64]>,
    previous: Box<[u64]>,
}

impl Memory {
    fn new(now: Instant) -> Memory {
        let map = || vec![0; BITS / 64].into_boxed_slice();
        Memory { since: now, current: map(), previous: map() }
    }

    fn turn(&mut self, now: Instant) {
        let age = now.since(self.since);
        if age < MEMORY {
            return;
        }
        std::mem::swap(&mut self.current, &mut self.previous);
        self.current.fill(0);
        if age >= 2 * MEMORY {
            self.previous.fill(0);
        }
        self.since = now;
    }

    fn place(name: u64) -> (usize, u64) {
        // Below BITS.
        let bit = (name % BITS as u64) as usize;
        (bit / 64, 1 << (bit % 64))
    }

    fn knows(&mut self, now: Instant, name: u64) -> bool {
        self.turn(now);
        let (word, bit) = Memory::place(name);
        (self.current[word] | self.previous[word]) & bit != 0
    }

    fn note(&mut self, now: Instant, name: u64) {
        self.turn(now);
        let (word, bit) = Memory::place(name);
        self.current[word] |= bit;
    }
}

/// What tells a SYN from others and is the same when it comes again: addresses, ports and number, hashed. `None` for what is no
/// SYN, or might be something else.
fn name_of_syn(packet: &[u8]) -> Option<u64> {
    let (addresses, tcp) = match packet.first()? >> 4 {
        4 => {
            let offset = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x1fff;
            if *packet.get(9)? != TCP || offset != 0 {
                return None;
            }
            (packet.get(12..20)?, packet.get(usize::from(packet[0] & 15) * 4..)?)
        }
        6 if *packet.get(6)? == TCP => (packet.get(8..40)?, packet.get(40..)?),
        _ => return None,
    };
    if tcp.get(13)? & SYN_ACK_RST != SYN {
        return None;
    }
    let ports_and_number = tcp.get(..8)?;
    // FNV-1a over words; whoever makes names collide only has his SYNs taken for repeated ones.
    let words = addresses.chunks_exact(4).chain(ports_and_number.chunks_exact(4));
    let hash = words.fold(0xcbf2_9ce4_8422_2325_u64, |hash, word| {
        let word = u32::from_be_bytes([word[0], word[1], word[2], word[3]]);
        (hash ^ u64::from(word)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    Some(hash ^ hash >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(source: u32, flags: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, TCP, 0, 0];
        packet.extend(source.to_be_bytes());
        packet.extend([10, 0, 0, 1, 0x10, 0, 0, 80]);
        packet.extend([0; 8]);
        packet.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        packet
    }

    fn segment6(source: u128, flags: u8) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 20, TCP, 64];
        packet.extend(source.to_be_bytes());
        packet.extend([0xfd; 16]);
        packet.extend(&segment(0, flags)[20..]);
        packet
    }

    #[test]
    fn only_syns_are_counted() {
        let now = Instant::from_millis(1000);
        let mut door = Door::new(now);
        let mut fragment = segment(1, SYN);
        fragment[7] = 1;
        let mut datagram = segment(1, SYN);
        datagram[9] = 17;
        let others = [segment(1, 0x12), segment(1, 0x10), segment(1, 0x06), segment6(1, 0x18), fragment, datagram];
        for other in others.iter().chain(&[Vec::new(), vec![0x45; 19], segment(1, SYN)[..30].to_vec()]) {
            for _ in 0..2 * BURST {
                assert!(door.admits(other, || unreachable!("{other:02x?} is no SYN")));
            }
        }
        assert!(name_of_syn(&segment(1, SYN)).is_some() && name_of_syn(&segment6(1, SYN | 0xc0)).is_some());
    }

    #[test]
    fn a_flood_is_thinned_and_who_comes_again_gets_in() {
        let start = Instant::from_millis(1000);
        let mut door = Door::new(start);
        let mut admitted = 0;
        for count in 0..600_000_u32 {
            // 200,000 a second for three seconds.
            let now = start + Duration::from_micros(5) * count;
            let forged = if count % 2 == 0 { segment(count, SYN) } else { segment6(u128::from(count) << 64, SYN) };
            admitted += u64::from(door.admits(&forged, || now));
            if count == 300_000 {
                assert!(!door.admits(&segment(u32::MAX, SYN), || now), "a stranger");
            }
            if count == 500_000 {
                assert!(door.admits(&segment(u32::MAX, SYN), || now), "the same a second later");
            }
        }
        assert!((3 * SIEGE_PER_S / 2..BURST + 3 * SIEGE_PER_S + 100).contains(&admitted), "{admitted}");
        // Then quiet, and a rush that is no flood.
        let later = start + Duration::from_secs(60);
        assert!((0..1000).all(|count| door.admits(&segment(count, SYN), || later)));
        assert!(door.memory.is_none(), "given back");
    }
}
