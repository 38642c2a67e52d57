//! A peer made of raw packets, over either family.
//!
//! Sequence and acknowledgment numbers count from the SYNs on both sides, so that what is written in a test, and what comes
//! back, is the same whatever the initial numbers are. The peer's first number is just below a wrap.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use netstack::{Checksum, Config, Instant, Offload, Reuse, RxPacket, Secrets, SocketId, Stack, State};

use super::{ACK, SYN, Seen, Side, config, describe};

pub const PSH: u8 = 8;
pub const URG: u8 = 0x20;
pub const ECE: u8 = 0x40;
pub const CWR: u8 = 0x80;
/// The peer's first sequence number.
pub const ISN: u32 = 0xffff_fff0;

/// MSS 1460
pub const MSS: [u8; 4] = [2, 4, 0x05, 0xb4];
pub const SACK_PERMITTED: [u8; 4] = [1, 1, 4, 2];

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// The stack's address.
    pub fn own(self) -> IpAddr {
        self.pick("10.0.0.1", "fd00::1").parse().expect("an address")
    }

    /// The peer's address.
    pub fn peer(self) -> IpAddr {
        self.pick("10.0.0.2", "fd00::2").parse().expect("an address")
    }

    pub fn any(self) -> IpAddr {
        self.pick("0.0.0.0", "::").parse().expect("an address")
    }

    /// Length of the IP header.
    pub fn header(self) -> usize {
        self.pick(20, 40)
    }

    /// The MSS of a link of 1500 bytes.
    pub fn mss(self) -> usize {
        1480 - self.header()
    }

    pub fn pick<T>(self, v4: T, v6: T) -> T {
        match self {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }
}

/// A stack and its peer.
pub struct Wire {
    pub stack: Stack,
    pub now: Instant,
    pub family: Family,
    /// The peer's port.
    pub port: u16,
    /// The stack's initial sequence number.
    pub iss: u32,
    /// Whether the peer's segments carry timestamps.
    pub timestamps: bool,
    pub ts_value: u32,
    pub ts_echo: u32,
    /// Source and destination of the peer's packets, if not as usual.
    pub source: Option<IpAddr>,
    pub destination: Option<IpAddr>,
}

/// A segment to send; numbers count from the SYNs.
#[derive(Clone, Default)]
pub struct Raw {
    pub seq: i64,
    pub ack: i64,
    pub flags: u8,
    pub window: u16,
    pub urgent: u16,
    pub payload: Vec<u8>,
    pub options: Vec<u8>,
    pub ts: Option<u32>,
    pub gso: Option<u16>,
    pub ce: bool,
    pub bad_checksum: bool,
}

pub fn raw(flags: u8, seq: i64, ack: i64) -> Raw {
    Raw { seq, ack, flags, window: 1000, ..Raw::default() }
}

impl Raw {
    pub fn data(mut self, payload: &[u8]) -> Raw {
        self.payload = payload.to_vec();
        self
    }

    pub fn window(mut self, window: u16) -> Raw {
        self.window = window;
        self
    }

    pub fn options(mut self, options: &[u8]) -> Raw {
        self.options = options.to_vec();
        self
    }

    pub fn ts(mut self, value: u32) -> Raw {
        self.ts = Some(value);
        self
    }

    pub fn urgent(mut self, pointer: u16) -> Raw {
        self.flags |= URG;
        self.urgent = pointer;
        self
    }
}

/// The Internet checksum.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The pseudo header of a checksum.
pub fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, len: usize) -> Vec<u8> {
    let mut bytes = [octets(source), octets(destination)].concat();
    bytes.extend((len as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes
}

/// An IP header before `payload`.
pub fn ip_packet(source: IpAddr, destination: IpAddr, protocol: u8, traffic_class: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = if source.is_ipv4() {
        let total = (20 + payload.len()) as u16;
        let mut header = vec![0x45, traffic_class];
        header.extend(total.to_be_bytes());
        header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
        header.extend(octets(source));
        header.extend(octets(destination));
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    } else {
        let mut header = vec![0x60 | traffic_class >> 4, traffic_class << 4, 0, 0];
        header.extend((payload.len() as u16).to_be_bytes());
        header.extend([protocol, 64]);
        header.extend(octets(source));
        header.extend(octets(destination));
        header
    };
    packet.extend_from_slice(payload);
    packet
}

impl Wire {
    pub fn new(family: Family) -> Wire {
        Wire::with(family, Config::default())
    }

    /// With a configuration whose addresses are the family's.
    pub fn with(family: Family, base: Config) -> Wire {
        let now = Instant::from_millis(10_000);
        let config = Config { addresses: vec![family.own()], ..base };
        let stack = Stack::new(config, Secrets([3; 32]), now);
        Wire {
            stack,
            now,
            family,
            port: 5000,
            iss: 0,
            timestamps: false,
            ts_value: 1000,
            ts_echo: 0,
            source: None,
            destination: None,
        }
    }

    /// One of each family.
    pub fn both() -> impl Iterator<Item = Wire> {
        Family::BOTH.into_iter().map(Wire::new)
    }

    /// The TCP part of a segment from the peer.
    fn segment(&self, raw: &Raw) -> Vec<u8> {
        let mut options = raw.options.clone();
        if self.timestamps {
            options.extend([1, 1, 8, 10]);
            options.extend(raw.ts.unwrap_or(self.ts_value).to_be_bytes());
            options.extend(self.ts_echo.to_be_bytes());
        }
        options.resize(options.len().next_multiple_of(4), 0);
        let header = 20 + options.len();
        let mut segment = self.port.to_be_bytes().to_vec();
        segment.extend(80u16.to_be_bytes());
        segment.extend(ISN.wrapping_add(raw.seq as u32).to_be_bytes());
        let ack = if raw.flags & ACK != 0 { self.iss.wrapping_add(raw.ack as u32) } else { 0 };
        segment.extend(ack.to_be_bytes());
        segment.extend([(header as u8 / 4) << 4, raw.flags]);
        segment.extend(raw.window.to_be_bytes());
        segment.extend([0, 0]);
        segment.extend(raw.urgent.to_be_bytes());
        segment.extend(options);
        segment.extend(&raw.payload);
        segment
    }

    /// A whole packet from the peer.
    pub fn bytes(&self, raw: &Raw) -> Vec<u8> {
        let mut segment = self.segment(raw);
        let source = self.source.unwrap_or(self.family.peer());
        let destination = self.destination.unwrap_or(self.family.own());
        let sum = checksum(&[&pseudo(source, destination, 6, segment.len()), &segment]);
        let sum = if raw.bad_checksum { !sum } else { sum };
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        ip_packet(source, destination, 6, if raw.ce { 3 } else { 0 }, &segment)
    }

    /// Sends a segment and returns what comes back at once, with numbers that count from the SYNs.
    pub fn send(&mut self, raw: Raw) -> Vec<Seen> {
        let bytes = self.bytes(&raw);
        self.send_bytes(&bytes, raw.gso)
    }

    /// The same for a whole packet.
    pub fn send_bytes(&mut self, bytes: &[u8], gso_size: Option<u16>) -> Vec<Seen> {
        self.stack.handle_packet(self.now, RxPacket { data: bytes, checksum: Checksum::Verify, gso_size });
        self.take()
    }

    /// An ICMP message of IPv4 or IPv6 from the peer as a whole packet; `body` follows the checksum.
    fn icmp(&self, kind: u8, code: u8, body: &[u8]) -> Vec<u8> {
        let (source, destination) = (self.family.peer(), self.family.own());
        let mut message = vec![kind, code, 0, 0];
        message.extend_from_slice(body);
        let protocol = self.family.pick(1, 58);
        let pseudo = self.family.pick(vec![], pseudo(source, destination, 58, message.len()));
        let sum = checksum(&[&pseudo, &message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        ip_packet(source, destination, protocol, 0, &message)
    }

    /// Sends an ICMP message from the peer.
    pub fn send_icmp(&mut self, kind: u8, code: u8, body: &[u8]) -> Vec<Seen> {
        let packet = self.icmp(kind, code, body);
        self.send_bytes(&packet, None)
    }

    /// The start of a packet of the stack that carried `seq`, as an ICMP error quotes it.
    pub fn quote(&self, seq: u32) -> Vec<u8> {
        let mut segment = 80u16.to_be_bytes().to_vec();
        segment.extend(self.port.to_be_bytes());
        segment.extend(self.iss.wrapping_add(seq).to_be_bytes());
        ip_packet(self.family.own(), self.family.peer(), 6, 0, &segment)
    }

    /// ICMP: a packet with `seq` was too big for a link of `mtu` bytes.
    pub fn too_big(&self, mtu: u16, seq: u32) -> Vec<u8> {
        let [high, low] = mtu.to_be_bytes();
        let body = [&[0, 0, high, low][..], &self.quote(seq)].concat();
        let (kind, code) = self.family.pick((3, 4), (2, 0));
        self.icmp(kind, code, &body)
    }

    /// ICMP: a packet with `seq` found nobody (a hard error: the port) or no way (soft: the host).
    pub fn send_unreachable(&mut self, hard: bool, seq: u32) -> Vec<Seen> {
        let (kind, code) = match (self.family, hard) {
            (Family::V4, true) => (3, 3),
            (Family::V4, false) => (3, 1),
            (Family::V6, true) => (1, 4),
            (Family::V6, false) => (1, 3),
        };
        let body = [&[0; 4][..], &self.quote(seq)].concat();
        self.send_icmp(kind, code, &body)
    }

    /// What the stack sends now.
    pub fn take(&mut self) -> Vec<Seen> {
        let mut seen = Vec::new();
        while let Some(packet) = self.stack.poll_transmit(self.now) {
            let mut one = describe(self.now, Side::A, &packet.to_vec());
            one.seq = one.seq.wrapping_sub(self.iss);
            if one.flags & ACK != 0 {
                one.ack = one.ack.wrapping_sub(ISN);
            }
            seen.push(one);
        }
        seen
    }

    /// Lets time pass and returns what the stack sends meanwhile.
    pub fn wait(&mut self, time: Duration) -> Vec<Seen> {
        let end = self.now + time;
        let mut seen = self.take();
        while let Some(at) = self.stack.poll_timeout().filter(|&at| at <= end) {
            self.now = self.now.max(at);
            self.stack.handle_timeout(self.now);
            seen.extend(self.take());
        }
        self.now = end;
        seen
    }

    pub fn listen(&mut self, backlog: u32) -> SocketId {
        let id = self.stack.tcp_open();
        self.stack.tcp_bind(id, SocketAddr::new(self.family.any(), 80), Reuse::default()).unwrap();
        self.stack.tcp_listen(self.now, id, backlog).unwrap();
        id
    }

    /// Sends a SYN and notes the stack's ISN.
    pub fn syn(&mut self, options: &[u8]) -> Seen {
        self.iss = 0;
        let mut seen = self.send(raw(SYN, 0, 0).options(options));
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert_eq!((seen[0].flags & (SYN | ACK), seen[0].ack), (SYN | ACK, 1));
        self.iss = seen[0].seq;
        seen.remove(0)
    }

    /// A connection in ESTABLISHED, with SACK.
    pub fn established(&mut self) -> SocketId {
        self.established_with(&[&MSS[..], &SACK_PERMITTED].concat(), raw(ACK, 1, 1))
    }

    /// A connection in ESTABLISHED whose SYN had these options, and whose handshake ended with this acknowledgment.
    pub fn established_with(&mut self, options: &[u8], acknowledgment: Raw) -> SocketId {
        let listener = self.listen(5);
        self.syn(options);
        assert!(self.send(acknowledgment).is_empty());
        self.stack.tcp_accept(self.now, listener).expect("it is established")
    }

    /// A connection that the stack opens from port 80, in SYN-SENT. Returns its SYN too.
    pub fn connect(&mut self) -> (SocketId, Seen) {
        let id = self.stack.tcp_open();
        self.stack.tcp_bind(id, SocketAddr::new(self.family.any(), 80), Reuse::default()).unwrap();
        self.stack.tcp_connect(self.now, id, SocketAddr::new(self.family.peer(), self.port)).unwrap();
        self.iss = 0;
        let mut seen = self.take();
        assert_eq!(seen.len(), 1, "{seen:?}");
        self.iss = seen[0].seq;
        seen[0].seq = 0;
        (id, seen.remove(0))
    }

    pub fn state(&self, id: SocketId) -> State {
        self.stack.status(id).state
    }

    /// Queues bytes and returns what leaves at once.
    pub fn write(&mut self, id: SocketId, bytes: &[u8]) -> Vec<Seen> {
        let mut written = 0;
        while written < bytes.len() {
            let rest = &bytes[written..];
            let step = self.stack.tcp_send_with(self.now, id, |[room, _]| {
                let len = rest.len().min(room.len());
                room[..len].copy_from_slice(&rest[..len]);
                len
            });
            let step = step.expect("it can send");
            assert!(step > 0, "no room");
            written += step;
        }
        self.take()
    }

    /// What one read gives.
    pub fn read(&mut self, id: SocketId) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = self.stack.tcp_recv_with(self.now, id, |[first, second]| {
            bytes.extend_from_slice(first);
            bytes.extend_from_slice(second);
            bytes.len()
        });
        bytes
    }
}

/// Flags (without PSH), sequence and acknowledgment numbers, payload.
pub fn short(seen: &[Seen]) -> Vec<(u8, u32, u32, usize)> {
    seen.iter().map(|one| (one.flags & !PSH, one.seq, one.ack, one.payload)).collect()
}

/// A device that does nothing, so that checksums are the stack's.
pub fn plain() -> Config {
    Config { offload: Offload::NONE, ..config("10.0.0.1") }
}
