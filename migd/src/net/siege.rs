//! Strangers are kept out by the kernel while a flood lasts: a filter on the job's TUN device, ahead of its queue.
//!
//! A forged packet that the net thread has to read costs it as much as an honest one, and takes an honest one's place in
//! the device's queue. So in a flood ([`super::door`] has turned SYNs away, or resets leave by the thousand) a program is
//! attached to the device that lets pass what belongs to a *known* flow, and of the rest only so much a second:
//!
//! | packet | passes |
//! | --- | --- |
//! | not TCP, or a fragment | always |
//! | of a known flow: one with a socket, or that the stack has sent something but a reset to lately | always |
//! | a SYN that comes again | at [`Limits::again`] |
//! | any other SYN | at [`Limits::new`] |
//! | anything else (ACKs, data and resets of connections that never were) | at [`Limits::stray`] |
//!
//! So clients get in with their second try, which forged SYNs don't make, and who asks for a connection that is gone is told, if
//! not at once. What is known stands in bit maps shared with the program, by a hash with a secret. There are two of each
//! kind, of which the older is cleared by turns, so nothing needs to be deleted; who is taken for another gets in, no more.
//!
//! The filter goes when it has had nothing to drop for a while, and is the device's: a target that is flooded begins anew.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use netstack::Instant;
use sys::ebpf::{Arithmetic, Assembler, Condition, Jump, Register, SharedWords, Size};
use sys::tun::Tun;

use self::Arithmetic::{Add, And, Multiply, Or, Set, ShiftLeft, ShiftRight, Subtract, Xor};
use self::Condition::{AnyBit, AtLeast, Equal, Greater, NotEqual};
use self::Register::{R0, R1, R2, R3, R7, R8, R9};

/// How long a SYN is remembered, at least, and at most twice that. A client's second comes after a second.
const SYN_MEMORY: Duration = Duration::from_secs(2);
/// Turns of the memory of SYNs in one of the flows': so long is a flow known that has no socket.
const TURNS_A_FLOW_MEMORY: u64 = 8;
/// Turns without a drop after which the flood is over.
const QUIET_TURNS: u32 = 3;
/// Resets in one [`RESET_WINDOW`] that are a flood of strays: far more than a job has connections to reset.
const RESETS_MAX: u64 = 2_000;
const RESET_WINDOW: Duration = Duration::from_millis(100);

/// One of so many nanoseconds passes, by kind.
#[derive(Debug, Clone, Copy)]
struct Limits {
    new: u64,
    again: u64,
    stray: u64,
    /// What wasn't used of so many nanoseconds may be made up for.
    burst: u64,
}

/// Together fewer SYNs than the door admits.
const LIMITS: Limits = Limits { new: 1_000_000_000 / 3_500, again: 250_000, stray: 1_000_000, burst: 50_000_000 };

/// Bits of a map for known flows, and of one for SYNs. A million SYNs a second fill a quarter of theirs.
const FLOW_BITS: usize = 1 << 22;
const SYN_BITS: usize = 1 << 23;

// Where things are in the shared words. The two maps of a kind lie word by word beside each other.
const SYN_GENERATION: usize = 0;
const KINDS: usize = 3;
/// For each kind of packet that is limited: when the next may pass (less the burst), dropped, passed.
const LIMITERS: usize = 8;
const LIMITER_WORDS: usize = 3;
const FLOWS: usize = 512;
const SYNS: usize = FLOWS + 2 * FLOW_BITS / 64;
const WORDS: usize = SYNS + 2 * SYN_BITS / 64;

const NEW: usize = 0;
const AGAIN: usize = 1;
const STRAY: usize = 2;

const IPPROTO_TCP: i32 = 6;
const SYN: i32 = 0x02;
const RST: i32 = 0x04;
const SYN_RST_ACK: i32 = 0x16;
const EVERYTHING: i32 = i32::MAX;
/// Knuth's multiplier, 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Watches for floods, and keeps them out.
#[derive(Debug)]
pub(super) struct Siege {
    limits: Limits,
    seed: u64,
    walls: Option<Walls>,
    /// Resets sent since then.
    resets: (Instant, u64),
    /// The kernel refused the filter, which it will do again.
    refused: bool,
}

/// What there is while a flood lasts.
#[derive(Debug)]
struct Walls {
    shared: SharedWords,
    turn_at: Instant,
    turns: u64,
    dropped: u64,
    quiet_turns: u32,
}

impl Siege {
    /// With a secret. Whatever filter the device had goes.
    pub(super) fn new(seed: u64, now: Instant, tun: &Tun) -> Siege {
        // A kernel that knows no filters has none to take off.
        let _ = tun.set_filter(None);
        Siege { limits: LIMITS, seed, walls: None, resets: (now, 0), refused: false }
    }

    /// Attaches the filter. `flows` are the connections, by local and remote address.
    pub(super) fn begin(&mut self, now: Instant, tun: &Tun, flows: impl Iterator<Item = (SocketAddr, SocketAddr)>) {
        if self.walls.is_some() || self.refused {
            return;
        }
        match self.attach(now, tun, flows) {
            Ok(()) => tracing::warn!("a flood of packets of unknown connections; the kernel drops most of them"),
            Err(error) => {
                self.refused = true;
                tracing::warn!(%error, "can't have the kernel drop a flood (it needs Linux 5.8 and CAP_BPF); \
                     it is read and dropped instead, and slows running connections down");
            }
        }
    }

    fn attach(
        &mut self,
        now: Instant,
        tun: &Tun,
        flows: impl Iterator<Item = (SocketAddr, SocketAddr)>,
    ) -> std::io::Result<()> {
        let shared = SharedWords::new(WORDS)?;
        let walls = Walls { shared, turn_at: now + SYN_MEMORY, turns: 0, dropped: 0, quiet_turns: 0 };
        for (local, remote) in flows {
            walls.note_flow(name(self.seed, remote, local));
        }
        tun.set_filter(Some(&program(&walls.shared, self.seed, &self.limits).load_filter()?))?;
        self.walls = Some(walls);
        Ok(())
    }

    /// Notes a packet that is sent, by its headers; says whether there are so many resets that a flood must be their cause.
    pub(super) fn note_sent(&mut self, now: Instant, headers: &[u8]) -> bool {
        let Some((local, remote, flags)) = segment(headers) else { return false };
        if i32::from(flags) & RST == 0 {
            if let Some(walls) = &self.walls {
                walls.note_flow(name(self.seed, remote, local));
            }
            return false;
        }
        if now.since(self.resets.0) > RESET_WINDOW {
            self.resets = (now, 0);
        }
        self.resets.1 += 1;
        self.resets.1 > RESETS_MAX && self.walls.is_none() && !self.refused
    }

    /// When [`Siege::turn`] is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.walls.as_ref().map(|walls| walls.turn_at)
    }

    /// Forgets what is old; takes the filter off when the flood is over.
    pub(super) fn turn(&mut self, now: Instant, tun: &Tun, flows: impl Iterator<Item = (SocketAddr, SocketAddr)>) {
        let Some(walls) = &mut self.walls else { return };
        let dropped = walls.dropped();
        walls.quiet_turns = if dropped == walls.dropped { walls.quiet_turns + 1 } else { 0 };
        walls.dropped = dropped;
        if walls.quiet_turns >= QUIET_TURNS {
            match tun.set_filter(None) {
                Ok(()) => {
                    tracing::info!(dropped, "the flood is over; every packet is let in again");
                    self.walls = None;
                    return;
                }
                Err(error) => tracing::warn!(%error, "can't take the filter off the TUN device; trying again"),
            }
        }
        walls.turn_at = now + SYN_MEMORY;
        walls.turns += 1;
        let words = walls.shared.words();
        clear(&words[SYNS..WORDS], walls.turns % 2);
        words[SYN_GENERATION].store(walls.turns % 2, Ordering::Relaxed);
        if walls.turns.is_multiple_of(TURNS_A_FLOW_MEMORY) {
            clear(&words[FLOWS..SYNS], walls.flow_generation());
            for (local, remote) in flows {
                walls.note_flow(name(self.seed, remote, local));
            }
        }
    }
}

impl Walls {
    fn flow_generation(&self) -> u64 {
        self.turns / TURNS_A_FLOW_MEMORY % 2
    }

    fn note_flow(&self, name: u64) {
        // Below the number of words.
        let word = (name >> 6) as usize % (FLOW_BITS / 64);
        let index = FLOWS + 2 * word + self.flow_generation() as usize;
        let bit = 1 << (name & 63);
        let word = &self.shared.words()[index];
        // Usually it is known already, and the processor's line isn't written.
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// How many packets the filter has dropped.
    fn dropped(&self) -> u64 {
        let words = self.shared.words();
        (0..KINDS).map(|kind| words[LIMITERS + LIMITER_WORDS * kind + 1].load(Ordering::Relaxed)).sum()
    }
}

/// Clears one of the two maps in `words`.
fn clear(words: &[AtomicU64], generation: u64) {
    for word in words.iter().skip(usize::from(generation == 1)).step_by(2) {
        word.store(0, Ordering::Relaxed);
    }
}

/// Local and remote address and the flags of a TCP segment that is sent.
fn segment(packet: &[u8]) -> Option<(SocketAddr, SocketAddr, u8)> {
    let (source, destination, tcp): (IpAddr, IpAddr, &[u8]) = match packet.first()? >> 4 {
        4 if i32::from(*packet.get(9)?) == IPPROTO_TCP => {
            let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            let destination: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            (source.into(), destination.into(), packet.get(usize::from(packet[0] & 15) * 4..)?)
        }
        6 if i32::from(*packet.get(6)?) == IPPROTO_TCP => {
            let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            let destination: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            (source.into(), destination.into(), packet.get(40..)?)
        }
        _ => return None,
    };
    let ports = [u16::from_be_bytes([*tcp.first()?, *tcp.get(1)?]), u16::from_be_bytes([*tcp.get(2)?, *tcp.get(3)?])];
    Some((SocketAddr::new(source, ports[0]), SocketAddr::new(destination, ports[1]), *tcp.get(13)?))
}

/// What the filter makes of the addresses and ports of a packet.
fn name(seed: u64, source: SocketAddr, destination: SocketAddr) -> u64 {
    let mut name = seed;
    let mut mix = |word: u32| {
        name = (name ^ u64::from(word)).wrapping_mul(GOLDEN);
        name ^= name >> 32;
    };
    for address in [source.ip(), destination.ip()] {
        match address {
            IpAddr::V4(address) => mix(address.to_bits()),
            IpAddr::V6(address) => {
                address.octets().chunks_exact(4).for_each(|word| {
                    mix(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
                });
            }
        }
    }
    mix(u32::from(source.port()) << 16 | u32::from(destination.port()));
    name
}

/// The filter. `R7` holds the flow's name, `R8` where the TCP header begins, `R9` a limiter.
fn program(shared: &SharedWords, seed: u64, limits: &Limits) -> Assembler {
    let mut code = Assembler::new();
    let mut pass: Vec<Jump> = Vec::new();
    code.set(R7, seed);
    code.load_packet(Size::Byte, None, 0);
    code.apply(Set, R8, R0);
    code.apply(ShiftRight, R0, 4);
    let v6 = code.jump_if(Equal, R0, 6);
    pass.push(code.jump_if(NotEqual, R0, 4));

    code.load_packet(Size::Byte, None, 9);
    pass.push(code.jump_if(NotEqual, R0, IPPROTO_TCP));
    // More fragments, or not the first.
    code.load_packet(Size::Half, None, 6);
    pass.push(code.jump_if(AnyBit, R0, 0x3fff));
    code.apply(And, R8, 15);
    code.apply(ShiftLeft, R8, 2);
    for offset in [12, 16] {
        mix(&mut code, None, offset);
    }
    let v4 = code.jump();

    code.land([v6]);
    code.load_packet(Size::Byte, None, 6);
    pass.push(code.jump_if(NotEqual, R0, IPPROTO_TCP));
    code.apply(Set, R8, 40);
    for offset in (8..40).step_by(4) {
        mix(&mut code, None, offset);
    }

    code.land([v4]);
    mix(&mut code, Some(R8), 0);
    // R0 and R1: the bit and its place among known flows.
    place(&mut code, shared, FLOWS, FLOW_BITS);
    code.load(R2, R1, 0);
    code.load(R3, R1, 1);
    code.apply(Or, R2, R3);
    pass.push(code.jump_if(AnyBit, R2, R0));

    code.load_packet(Size::Byte, Some(R8), 13);
    code.apply(And, R0, SYN_RST_ACK);
    let is_syn = code.jump_if(Equal, R0, SYN);
    let stray = limit(&mut code, shared, STRAY, limits.stray, limits.burst);

    code.land([is_syn]);
    // Another part of the name than for flows.
    code.apply(ShiftRight, R7, 20);
    place(&mut code, shared, SYNS, SYN_BITS);
    code.load(R2, R1, 0);
    code.load(R3, R1, 1);
    code.apply(Or, R2, R3);
    // Noted in the current map.
    code.address(R3, shared, SYN_GENERATION);
    code.load(R3, R3, 0);
    code.apply(And, R3, 1);
    code.apply(ShiftLeft, R3, 3);
    code.apply(Add, R1, R3);
    code.or_to(R1, 0, R0);
    let again = code.jump_if(AnyBit, R2, R0);
    let new = limit(&mut code, shared, NEW, limits.new, limits.burst);
    code.land([again]);
    let again = limit(&mut code, shared, AGAIN, limits.again, limits.burst);

    code.land(pass);
    code.land([stray, new, again]);
    code.finish(EVERYTHING);
    code
}

/// Mixes a word of the packet into the name.
fn mix(code: &mut Assembler, base: Option<Register>, offset: i32) {
    code.load_packet(Size::Word, base, offset);
    code.apply(Xor, R7, R0);
    code.set(R1, GOLDEN);
    code.apply(Multiply, R7, R1);
    code.apply(Set, R1, R7);
    code.apply(ShiftRight, R1, 32);
    code.apply(Xor, R7, R1);
}

/// `R0` becomes the name's bit in one of two maps of `bits` bits at `start`, `R1` the address of its word in the first.
fn place(code: &mut Assembler, shared: &SharedWords, start: usize, bits: usize) {
    // At most 2^23.
    let word_mask = (bits / 64 - 1) as i32;
    code.apply(Set, R2, R7);
    code.apply(ShiftRight, R2, 6);
    code.apply(And, R2, word_mask);
    code.apply(ShiftLeft, R2, 4);
    code.address(R1, shared, start);
    code.apply(Add, R1, R2);
    code.apply(Set, R2, R7);
    code.apply(And, R2, 63);
    code.apply(Set, R0, 1);
    code.apply(ShiftLeft, R0, R2);
}

/// Lets one in `interval` nanoseconds jump away, and drops the others: the virtual scheduling algorithm of ITU-T I.371.
/// Two processors that are here at once may let one too many through.
fn limit(code: &mut Assembler, shared: &SharedWords, kind: usize, interval: u64, burst: u64) -> Jump {
    code.address(R9, shared, LIMITERS + LIMITER_WORDS * kind);
    code.load_clock();
    code.load(R1, R9, 0);
    code.set(R2, burst);
    code.apply(Set, R3, 0);
    let young = code.jump_if(Greater, R2, R0);
    code.apply(Set, R3, R0);
    code.apply(Subtract, R3, R2);
    code.land([young]);
    // No earlier than a burst ago.
    let used = code.jump_if(AtLeast, R1, R3);
    code.apply(Set, R1, R3);
    code.land([used]);
    let drop = code.jump_if(Greater, R1, R0);
    code.set(R2, interval);
    code.apply(Add, R1, R2);
    code.store(R9, 0, R1);
    code.apply(Set, R1, 1);
    code.add_to(R9, 2, R1);
    let through = code.jump();
    code.land([drop]);
    code.apply(Set, R1, 1);
    code.add_to(R9, 1, R1);
    code.finish(0);
    through
}

#[cfg(test)]
mod tests;
