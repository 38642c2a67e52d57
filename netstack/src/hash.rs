//! Keyed hashing (SipHash-2-4): initial sequence numbers, timestamp offsets, ports, SYN cookies and the lookup tables are
//! all unpredictable to who doesn't know the stack's secrets, and the same again after a thaw.

use std::hash::{BuildHasher, Hasher};

use serde::{Deserialize, Serialize};

use crate::tcp::Tuple;
use crate::{Instant, Secrets};

/// A SipHash key.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Key(u64, u64);

/// SipHash over whole words: `Tuple` and the other inputs are fed as words, never as byte strings of unknown length.
#[derive(Clone)]
pub(crate) struct SipHasher {
    v: [u64; 4],
    words: u64,
}

impl SipHasher {
    const fn new(key: Key) -> Self {
        SipHasher {
            v: [
                key.0 ^ 0x736f_6d65_7073_6575,
                key.1 ^ 0x646f_7261_6e64_6f6d,
                key.0 ^ 0x6c79_6765_6e65_7261,
                key.1 ^ 0x7465_6462_7974_6573,
            ],
            words: 0,
        }
    }

    const fn round(&mut self) {
        let [mut v0, mut v1, mut v2, mut v3] = self.v;
        v0 = v0.wrapping_add(v1);
        v2 = v2.wrapping_add(v3);
        v1 = v1.rotate_left(13) ^ v0;
        v3 = v3.rotate_left(16) ^ v2;
        v0 = v0.rotate_left(32);
        v2 = v2.wrapping_add(v1);
        v0 = v0.wrapping_add(v3);
        v1 = v1.rotate_left(17) ^ v2;
        v3 = v3.rotate_left(21) ^ v0;
        v2 = v2.rotate_left(32);
        self.v = [v0, v1, v2, v3];
    }

    const fn word(&mut self, word: u64) {
        self.v[3] ^= word;
        self.round();
        self.round();
        self.v[0] ^= word;
        self.words = self.words.wrapping_add(1);
    }
}

impl Hasher for SipHasher {
    fn finish(&self) -> u64 {
        let mut last = self.clone();
        last.word(self.words << 59);
        last.v[2] ^= 0xff;
        for _ in 0..4 {
            last.round();
        }
        last.v[0] ^ last.v[1] ^ last.v[2] ^ last.v[3]
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.word(u64::from(value));
    }

    fn write_u16(&mut self, value: u16) {
        self.word(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.word(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.word(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.word(value as u64);
    }
}

impl BuildHasher for Key {
    type Hasher = SipHasher;

    fn build_hasher(&self) -> SipHasher {
        SipHasher::new(*self)
    }
}

impl Key {
    fn of(self, parts: impl IntoIterator<Item = u64>) -> u64 {
        let mut hasher = SipHasher::new(self);
        for part in parts {
            hasher.word(part);
        }
        hasher.finish()
    }

    fn of_tuple(self, tuple: &Tuple, extra: u64) -> u64 {
        let mut hasher = SipHasher::new(self);
        std::hash::Hash::hash(tuple, &mut hasher);
        hasher.word(extra);
        hasher.finish()
    }
}

/// All keys of a stack, and its source of random numbers.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Keys {
    isn: Key,
    timestamp: Key,
    port: Key,
    pub(crate) table: Key,
    cookie: Key,
    random: Key,
    drawn: u64,
    ports_given: u64,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Keys(..)")
    }
}

impl Keys {
    pub(crate) fn new(secrets: &Secrets) -> Self {
        let mut words =
            secrets.0.chunks_exact(8).map(|word| word.iter().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte)));
        let mut next = || words.next().unwrap_or_default();
        let (low, high) = (Key(next(), next()), Key(next(), next()));
        let derive = |index: u64| Key(low.of([index, high.0, high.1]), high.of([index, low.0, low.1]));
        Keys {
            isn: derive(1),
            timestamp: derive(2),
            port: derive(3),
            table: derive(4),
            cookie: derive(6),
            random: derive(5),
            drawn: 0,
            ports_given: 0,
        }
    }

    /// RFC 6528: a clock of 64 ns ticks (like Linux's) plus a secret function of the connection's ends.
    pub(crate) fn initial_sequence(&self, tuple: &Tuple, now: Instant) -> u32 {
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.4.1
        //# A TCP implementation MUST use the above type of "clock" for clock-driven selection of initial sequence
        //# numbers (MUST-8), and SHOULD generate its initial sequence numbers with the expression:
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.4.1
        //# where M is the 4 microsecond timer, and F() is a pseudorandom function (PRF) of the connection's identifying
        //# parameters ("localip, localport, remoteip, remoteport") and a secret key ("secretkey") (SHLD-1).
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.4.1
        //# F() MUST NOT be computable from the outside (MUST-9), or an attacker could still guess at sequence numbers
        //# from the ISN used for some other connection.
        //= https://www.rfc-editor.org/rfc/rfc6528#section-3
        //# Initial sequence numbers are a clock plus a keyed hash of the connection's ends.
        let clock = now.as_nanos() >> 6;
        (self.isn.of_tuple(tuple, 0).wrapping_add(clock) & 0xffff_ffff) as u32
    }

    /// The offset of the timestamp clock towards a peer; the same for all connections between two addresses, so that
    /// RFC 6191 works across connections.
    pub(crate) fn timestamp_offset(&self, tuple: &Tuple) -> u32 {
        //= https://www.rfc-editor.org/rfc/rfc7323#section-5.4
        //# The timestamp clock starts at a random offset for each pair of hosts.
        let ends = Tuple { local_port: 0, remote_port: 0, ..*tuple };
        (self.timestamp.of_tuple(&ends, 0) & 0xffff_ffff) as u32
    }

    pub(crate) fn flow_label(&self, tuple: &Tuple) -> u32 {
        (self.timestamp.of_tuple(tuple, 1) & 0xf_ffff) as u32
    }

    /// A number for choosing among listeners of one port.
    pub(crate) fn spread(&self, tuple: &Tuple) -> u64 {
        self.port.of_tuple(tuple, 1)
    }

    /// RFC 6056, algorithm 3: where to start looking for a port towards a peer.
    pub(crate) fn port_offset(&mut self, tuple: &Tuple) -> u64 {
        //= https://www.rfc-editor.org/rfc/rfc6056#section-3.3.3
        //# Ephemeral ports are chosen by a keyed hash of the peer and a counter.
        self.ports_given = self.ports_given.wrapping_add(1);
        self.port.of_tuple(tuple, 0).wrapping_add(self.ports_given)
    }

    /// The keyed part of a SYN cookie.
    pub(crate) fn cookie(&self, tuple: &Tuple, irs: u32, tick: u32) -> u32 {
        (self.cookie.of_tuple(tuple, u64::from(irs) << 32 | u64::from(tick)) & 0xffff_ffff) as u32
    }

    /// A random number.
    pub(crate) fn random(&mut self) -> u64 {
        self.drawn = self.drawn.wrapping_add(1);
        self.random.of([self.drawn])
    }
}
