//! Two stacks on a simulated link in virtual time.
//!
//! Everything is decided by a seed; a failing test prints it. Time jumps to the next thing that happens.
#![allow(dead_code)]

pub mod actor;
pub mod audit;
pub mod wire;
pub mod world;
pub mod zoo;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use netstack::{Checksum, Config, Instant, Offload, RxPacket, Secrets, SocketId, Stack, StackImage, State, Status};

/// A small generator that is the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn chance(&mut self, probability: f64) -> bool {
        (self.next() >> 11) as f64 / ((1u64 << 53) as f64) < probability
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

/// What the link does to packets.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    pub delay: Duration,
    pub jitter: Duration,
    pub loss: f64,
    pub duplicate: f64,
    pub reorder: f64,
    /// Bits per second; none is infinitely fast.
    pub rate: Option<u64>,
    /// Bytes that wait for a link with a rate before more are dropped.
    pub queue: usize,
    /// Super-packets are cut into wire segments.
    pub cut: bool,
}

impl Default for Link {
    fn default() -> Self {
        Link {
            delay: Duration::from_millis(5),
            jitter: Duration::ZERO,
            loss: 0.0,
            duplicate: 0.0,
            reorder: 0.0,
            rate: None,
            queue: 1 << 20,
            cut: false,
        }
    }
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    A,
    B,
}

impl Side {
    pub fn other(self) -> Side {
        match self {
            Side::A => Side::B,
            Side::B => Side::A,
        }
    }
}

/// A packet as a capture shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Seen {
    pub at: Instant,
    pub from: Side,
    /// Source and destination; zero for other protocols than TCP.
    pub ports: (u16, u16),
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    pub urgent: u16,
    /// The two ECN bits of the IP header.
    pub ecn: u8,
    pub payload: usize,
    pub options: Vec<u8>,
    pub protocol: u8,
}

impl std::fmt::Debug for Seen {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let letters: String = "FSRPAUEC"
            .chars()
            .enumerate()
            .filter(|(bit, _)| self.flags >> bit & 1 != 0)
            .map(|(_, letter)| letter)
            .collect();
        write!(
            formatter,
            "{:>9} us {:?} {letters} {}+{} ack {} win {} {:02x?}",
            self.at.as_micros(),
            self.from,
            self.seq,
            self.payload,
            self.ack,
            self.window,
            self.options,
        )
    }
}

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Flying {
    at: Instant,
    order: u64,
    to: Side,
    gso: Option<u16>,
    bytes: Vec<u8>,
}

/// Judges packets.
pub type Judge = Box<dyn FnMut(&Seen) -> bool>;

/// The pair.
pub struct Pair {
    pub a: Stack,
    pub b: Stack,
    pub now: Instant,
    pub link: Link,
    pub random: Random,
    pub log: Vec<Seen>,
    /// Packets for which this says so are dropped.
    pub drop: Option<Judge>,
    flying: BinaryHeap<Reverse<Flying>>,
    order: u64,
    busy_until: [Instant; 2],
    pub verify: bool,
}

pub fn config(address: &str) -> Config {
    Config { addresses: vec![address.parse::<IpAddr>().expect("an address")], ..Config::default() }
}

impl Pair {
    pub fn new(seed: u64, link: Link) -> Self {
        Pair::with(seed, link, config("10.0.0.1"), config("10.0.0.2"))
    }

    /// One over IPv4 and one over IPv6.
    pub fn both(seed: u64, link: Link) -> impl Iterator<Item = Pair> {
        [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")]
            .into_iter()
            .map(move |(a, b)| Pair::with(seed, link, config(a), config(b)))
    }

    pub fn with(seed: u64, link: Link, a: Config, b: Config) -> Self {
        let now = Instant::from_millis(1000);
        let verify = a.offload == Offload::NONE;
        Pair {
            a: Stack::new(a, Secrets([seed as u8; 32]), now),
            b: Stack::new(b, Secrets([!(seed as u8); 32]), now),
            now,
            link,
            random: Random::new(seed),
            log: Vec::new(),
            drop: None,
            flying: BinaryHeap::new(),
            order: 0,
            busy_until: [now; 2],
            verify,
        }
    }

    pub fn stack(&mut self, side: Side) -> &mut Stack {
        match side {
            Side::A => &mut self.a,
            Side::B => &mut self.b,
        }
    }

    /// Both stacks send what they have.
    pub fn transmit(&mut self) {
        for side in [Side::A, Side::B] {
            loop {
                let now = self.now;
                let stack = match side {
                    Side::A => &mut self.a,
                    Side::B => &mut self.b,
                };
                let Some(packet) = stack.poll_transmit(now) else {
                    break;
                };
                let bytes = packet.to_vec();
                let gso = packet.gso.map(|gso| gso.size);
                self.send(side, bytes, gso);
            }
        }
    }

    fn send(&mut self, from: Side, bytes: Vec<u8>, gso: Option<u16>) {
        self.log.push(describe(self.now, from, &bytes));
        match gso {
            Some(size) if self.link.cut => {
                for piece in cut(&bytes, usize::from(size)) {
                    self.fly(from, piece, None);
                }
            }
            _ => self.fly(from, bytes, gso),
        }
    }

    fn fly(&mut self, from: Side, bytes: Vec<u8>, gso: Option<u16>) {
        let seen = describe(self.now, from, &bytes);
        if self.drop.as_mut().is_some_and(|drop| drop(&seen)) || self.random.chance(self.link.loss) {
            return;
        }
        let mut at = self.now;
        if let Some(rate) = self.link.rate {
            let busy = &mut self.busy_until[from as usize];
            let waiting = busy.since(self.now).as_secs_f64() * rate as f64 / 8.0;
            if waiting as usize > self.link.queue {
                return;
            }
            let nanos = bytes.len() as u64 * 8 * 1_000_000_000 / rate;
            *busy = (*busy).max(self.now) + Duration::from_nanos(nanos);
            at = *busy;
        }
        let copies = 1 + u32::from(self.random.chance(self.link.duplicate));
        for _ in 0..copies {
            let jitter = self.random.below(self.link.jitter.as_nanos() as u64 + 1);
            let late = if self.random.chance(self.link.reorder) { self.link.delay } else { Duration::ZERO };
            self.order += 1;
            self.flying.push(Reverse(Flying {
                at: at + self.link.delay + Duration::from_nanos(jitter) + late,
                order: self.order,
                to: from.other(),
                gso,
                bytes: bytes.clone(),
            }));
        }
    }

    /// Puts a packet on the wire towards a stack, to arrive now.
    pub fn inject(&mut self, to: Side, bytes: Vec<u8>) {
        let now = self.now;
        self.stack(to).handle_packet(now, RxPacket { data: &bytes, checksum: Checksum::Verified, gso_size: None });
    }

    /// When something happens next.
    pub fn next_event(&self) -> Option<Instant> {
        let arrival = self.flying.peek().map(|Reverse(flying)| flying.at);
        [arrival, self.a.poll_timeout(), self.b.poll_timeout()].into_iter().flatten().min()
    }

    /// Lets one thing happen. Returns false if nothing is left to happen, or not before `limit`.
    pub fn step(&mut self, limit: Instant) -> bool {
        self.transmit();
        let Some(next) = self.next_event() else {
            return false;
        };
        if next > limit {
            self.now = limit;
            return false;
        }
        self.now = self.now.max(next);
        while let Some(Reverse(flying)) = self.flying.peek() {
            if flying.at > self.now {
                break;
            }
            let Some(Reverse(flying)) = self.flying.pop() else {
                break;
            };
            let checksum = if self.verify { Checksum::Verify } else { Checksum::Verified };
            let now = self.now;
            let packet = RxPacket { data: &flying.bytes, checksum, gso_size: flying.gso };
            self.stack(flying.to).handle_packet(now, packet);
        }
        let now = self.now;
        for side in [Side::A, Side::B] {
            if self.stack(side).poll_timeout().is_some_and(|at| at <= now) {
                self.stack(side).handle_timeout(now);
            }
        }
        self.transmit();
        true
    }

    /// Runs until `done` or `limit` from now; returns whether it was done.
    pub fn run_until(&mut self, limit: Duration, mut done: impl FnMut(&mut Pair) -> bool) -> bool {
        let end = self.now + limit;
        loop {
            self.transmit();
            if done(self) {
                return true;
            }
            if !self.step(end) {
                self.transmit();
                return done(self);
            }
        }
    }

    pub fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.step(end) {}
        self.now = end;
        self.transmit();
    }

    /// A listener on B.
    pub fn listen(&mut self, port: u16, backlog: u32) -> SocketId {
        let now = self.now;
        let address = match self.b.config().addresses[0] {
            IpAddr::V4(_) => "0.0.0.0",
            IpAddr::V6(_) => "::",
        };
        let id = self.b.tcp_open();
        self.b
            .tcp_bind(id, SocketAddr::new(address.parse().expect("an address"), port), netstack::Reuse::default())
            .expect("the port is free");
        self.b.tcp_listen(now, id, backlog).expect("it can listen");
        id
    }

    /// Starts a connection from A to B.
    pub fn connect(&mut self, port: u16) -> SocketId {
        let now = self.now;
        let remote = SocketAddr::new(self.b.config().addresses[0], port);
        let id = self.a.tcp_open();
        self.a.tcp_connect(now, id, remote).expect("it can connect");
        id
    }

    /// A connection: its ends at A and at B, and the listener.
    pub fn establish(&mut self) -> (SocketId, SocketId, SocketId) {
        let listener = self.listen(80, 16);
        let client = self.connect(80);
        let ready = self.run_until(Duration::from_secs(300), |pair| {
            pair.a.status(client).state == State::Established && pair.b.status(listener).acceptable > 0
        });
        assert!(ready, "no connection came about: {:?} {:?}", self.a.status(client), self.b.status(listener));
        let now = self.now;
        let server = self.b.tcp_accept(now, listener).expect("one waits");
        (client, server, listener)
    }

    pub fn status(&mut self, side: Side, id: SocketId) -> Status {
        self.stack(side).status(id)
    }

    /// Queues as much of `data` as there is room for. Returns how much.
    pub fn write(&mut self, side: Side, id: SocketId, data: &[u8]) -> usize {
        let now = self.now;
        let mut written = 0;
        while written < data.len() {
            let rest = &data[written..];
            let step = self.stack(side).tcp_send_with(now, id, |[first, second]| {
                let head = rest.len().min(first.len());
                first[..head].copy_from_slice(&rest[..head]);
                let tail = (rest.len() - head).min(second.len());
                second[..tail].copy_from_slice(&rest[head..head + tail]);
                head + tail
            });
            match step {
                Ok(0) | Err(_) => break,
                Ok(bytes) => written += bytes,
            }
        }
        written
    }

    /// Reads all there is.
    pub fn read(&mut self, side: Side, id: SocketId) -> Vec<u8> {
        let now = self.now;
        let mut bytes = Vec::new();
        let _ = self.stack(side).tcp_recv_with(now, id, |[first, second]| {
            bytes.extend_from_slice(first);
            bytes.extend_from_slice(second);
            first.len() + second.len()
        });
        bytes
    }

    /// Freezes a side and thaws it from what an encoder made of the image, in no time.
    pub fn move_stack(&mut self, side: Side) {
        let now = self.now;
        let config = self.stack(side).config().clone();
        let image = self.stack(side).freeze(now);
        let bytes = codec::to_vec(&image).expect("an image can be encoded");
        let image: StackImage = codec::from_slice(&bytes).expect("an image can be decoded");
        // Another machine: another clock.
        *self.stack(side) = Stack::thaw(image, now, config).expect("an image can be thawed");
    }
}

/// What a capture would show.
pub fn describe(at: Instant, from: Side, bytes: &[u8]) -> Seen {
    let (header, protocol) = match bytes[0] >> 4 {
        4 => (20, bytes[9]),
        _ => (40, bytes[6]),
    };
    if protocol != 6 {
        return Seen {
            at,
            from,
            ports: (0, 0),
            seq: 0,
            ack: 0,
            flags: 0,
            window: 0,
            urgent: 0,
            ecn: 0,
            payload: bytes.len() - header,
            options: vec![],
            protocol,
        };
    }
    let tcp = &bytes[header..];
    let word = |at: usize| u32::from_be_bytes(tcp[at..at + 4].try_into().expect("four bytes"));
    let len = usize::from(tcp[12] >> 4) * 4;
    Seen {
        at,
        from,
        ports: (u16::from_be_bytes([tcp[0], tcp[1]]), u16::from_be_bytes([tcp[2], tcp[3]])),
        seq: word(4),
        ack: word(8),
        flags: tcp[13],
        window: u16::from_be_bytes([tcp[14], tcp[15]]),
        urgent: u16::from_be_bytes([tcp[18], tcp[19]]),
        ecn: if bytes[0] >> 4 == 4 { bytes[1] & 3 } else { bytes[1] >> 4 & 3 },
        payload: tcp.len() - len,
        options: tcp[20..len].to_vec(),
        protocol,
    }
}

/// Cuts a super-packet as a device would (its checksums are left partial).
pub fn cut(bytes: &[u8], size: usize) -> Vec<Vec<u8>> {
    let v4 = bytes[0] >> 4 == 4;
    let ip = if v4 { 20 } else { 40 };
    let headers = ip + usize::from(bytes[ip + 12] >> 4) * 4;
    let payload = &bytes[headers..];
    let pieces = payload.chunks(size).count();
    let seq = u32::from_be_bytes(bytes[ip + 4..ip + 8].try_into().expect("four bytes"));
    payload
        .chunks(size)
        .enumerate()
        .map(|(index, piece)| {
            let mut packet = bytes[..headers].to_vec();
            packet.extend_from_slice(piece);
            let len = if v4 { packet.len() } else { packet.len() - 40 } as u16;
            let at = if v4 { 2 } else { 4 };
            packet[at..at + 2].copy_from_slice(&len.to_be_bytes());
            packet[ip + 4..ip + 8].copy_from_slice(&seq.wrapping_add((index * size) as u32).to_be_bytes());
            if index + 1 < pieces {
                packet[ip + 13] &= !(FIN | 8);
            }
            if index > 0 {
                packet[ip + 13] &= !0x80;
            }
            packet
        })
        .collect()
}

/// A stream that shows where a byte is from.
pub fn stream(len: usize, salt: u64) -> Vec<u8> {
    (0..len as u64).map(|at| ((at + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}
