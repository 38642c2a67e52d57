//! Peers that mean harm: whatever they send, memory stays bounded, nothing panics, and the connections of others are served on.
//!
//! Memory is what this process has allocated, so the tests of this file take turns.

mod harness;

use std::alloc::System;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cap::Cap;
use harness::wire::{Family, MSS, PSH, Raw, SACK_PERMITTED, Wire, ip_packet, raw};
use harness::{ACK, RST, Random, SYN, Seen};
use netstack::{Checksum, RxPacket, SocketId, State};

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    // What another test left behind is dropped.
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes allocated since `before`.
fn grown(before: usize) -> usize {
    MEMORY.allocated().saturating_sub(before)
}

const SECOND: Duration = Duration::from_secs(1);

/// A stack with a listener and a connection of an honest peer.
struct Host {
    wire: Wire,
    listener: SocketId,
    honest: SocketId,
    /// The honest peer's port, the stack's ISN, and how far both directions are.
    port: u16,
    iss: u32,
    received: i64,
    sent: i64,
    random: Random,
}

impl Host {
    fn new(family: Family, backlog: u32) -> Host {
        Host::with(Wire::new(family), backlog)
    }

    fn with(mut wire: Wire, backlog: u32) -> Host {
        let listener = wire.listen(backlog);
        let (honest, iss) = open(&mut wire, listener, &[MSS, SACK_PERMITTED].concat());
        let port = wire.port;
        Host { wire, listener, honest, port, iss, received: 1, sent: 1, random: Random::new(7) }
    }

    fn both(backlog: u32) -> impl Iterator<Item = Host> {
        Family::BOTH.into_iter().map(move |family| Host::new(family, backlog))
    }

    /// An address of nobody.
    fn forged(&mut self) -> IpAddr {
        let bits = self.random.next();
        match self.wire.family {
            Family::V4 => Ipv4Addr::from(0x0b00_0000 | bits as u32 & 0xff_ffff).into(),
            Family::V6 => Ipv6Addr::from(0xfd01 << 112 | u128::from(bits)).into(),
        }
    }

    /// A segment from a forged address and any port.
    fn forge(&mut self, mut segment: Raw) -> Vec<u8> {
        let source = self.forged();
        segment.seq = i64::from(self.random.next() as u32);
        segment.ack = i64::from(self.random.next() as u32);
        self.wire.source = Some(source);
        self.wire.port = 1024 + self.random.below(60_000) as u16;
        let bytes = self.wire.bytes(&segment);
        self.wire.source = None;
        self.wire.port = self.port;
        bytes
    }

    fn take_in(&mut self, packet: &[u8]) {
        let packet = RxPacket { data: packet, checksum: Checksum::Verify, gso_size: None };
        self.wire.stack.handle_packet(self.wire.now, packet);
    }

    /// What has to be sent, counted.
    fn drain(&mut self) -> usize {
        let mut count = 0;
        while self.wire.stack.poll_transmit(self.wire.now).is_some() {
            count += 1;
        }
        count
    }

    /// The honest peer says something and is answered.
    fn assert_serves(&mut self) {
        self.drain();
        (self.wire.port, self.wire.iss) = (self.port, self.iss);
        self.wire.send(raw(ACK | PSH, self.received, self.sent).data(b"ping"));
        self.received += 4;
        assert_eq!(self.wire.read(self.honest), b"ping");
        let seen = self.wire.write(self.honest, b"pong");
        let told = |seen: &Seen| (seen.seq, seen.ack, seen.payload);
        let expected = (self.sent as u32, self.received as u32, 4);
        assert!(seen.iter().any(|seen| told(seen) == expected), "{seen:?}");
        self.sent += 4;
        self.wire.send(raw(ACK, self.received, self.sent));
    }

    /// A new connection from port `port` with the peer's options; numbers of what follows count from its SYNs.
    fn connect(&mut self, port: u16, options: &[u8]) -> SocketId {
        self.wire.port = port;
        open(&mut self.wire, self.listener, options).0
    }
}

/// A connection that is made and accepted, and the stack's ISN.
fn open(wire: &mut Wire, listener: SocketId, options: &[u8]) -> (SocketId, u32) {
    wire.syn(options);
    wire.send(raw(ACK, 1, 1));
    (wire.stack.tcp_accept(wire.now, listener).expect("it is established"), wire.iss)
}

#[test]
fn a_syn_flood_costs_a_backlog() {
    const BACKLOG: u32 = 64;
    let _turn = turn();
    for mut host in Host::both(BACKLOG) {
        host.assert_serves();
        let before = MEMORY.allocated();
        let mut answers = 0;
        for count in 0..40_000 {
            let syn = host.forge(raw(SYN, 0, 0).options(&MSS));
            host.take_in(&syn);
            host.wire.now += Duration::from_micros(3);
            if count % 50 == 49 {
                answers += host.drain();
            }
            if count % 1000 == 999 {
                host.assert_serves();
                assert!(grown(before) < 64 << 10, "{} bytes", grown(before));
            }
        }
        let (half_open, _) = host.wire.stack.connections_without_socket();
        assert_eq!(half_open, BACKLOG as usize);
        assert_eq!(answers, 40_000, "cookies are for everybody");
        // One that means it comes through.
        host.connect(7000, &MSS);
        host.assert_serves();

        // Nobody takes the answers out: they wait only so long.
        for _ in 0..40_000 {
            let syn = host.forge(raw(SYN, 0, 0).options(&MSS));
            host.take_in(&syn);
        }
        assert!(grown(before) < 1 << 20, "{} bytes", grown(before));
        assert!(host.drain() <= 4096);
        host.assert_serves();

        // What half-open connections there were have an end.
        host.wire.wait(200 * SECOND);
        assert_eq!(host.wire.stack.connections_without_socket(), (0, 0));
        host.assert_serves();
    }
}

#[test]
fn acknowledgments_of_nothing_leave_nothing() {
    let _turn = turn();
    for mut host in Host::both(4) {
        // Cookies have been sent, so any ACK may bring one back.
        for _ in 0..10 {
            let syn = host.forge(raw(SYN, 0, 0).options(&MSS));
            host.take_in(&syn);
        }
        host.assert_serves();
        let before = MEMORY.allocated();
        let sockets = host.wire.stack.sockets().count();
        for count in 0..40_000 {
            let ack = host.forge(raw(ACK, 0, 0).data(if count % 2 == 0 { b"" } else { b"x" }));
            host.take_in(&ack);
            if count % 100 == 99 {
                assert_eq!(host.drain(), 100, "each is refused");
            }
            if count % 2000 == 1999 {
                host.assert_serves();
            }
        }
        assert!(grown(before) < 16 << 10, "{} bytes", grown(before));
        assert_eq!(host.wire.stack.sockets().count(), sockets);
        assert_eq!(host.wire.stack.tcp_accept(host.wire.now, host.listener), None);
    }
}

#[test]
fn segments_beside_the_window_are_hardly_answered() {
    let _turn = turn();
    for mut host in Host::both(4) {
        host.assert_serves();
        let before = MEMORY.allocated();
        type Forge = fn(&mut Random) -> Raw;
        // Data is answered each time, as by Linux: a peer that sends data that isn't expected has to learn what is.
        let kinds: [(&str, usize, Forge); 6] = [
            ("RST in the window", 40, |random| raw(RST, 10_000 + random.below(50_000) as i64, 0)),
            ("RST anywhere", 0, |random| raw(RST, 1_000_000 + random.below(1 << 31) as i64, 0)),
            ("old data", 10_000, |random| raw(ACK, -(1000 + random.below(1 << 20) as i64), 1).data(&[1; 100])),
            ("data too far", 10_000, |random| raw(ACK, 10_000_000 + random.below(1 << 20) as i64, 1).data(&[2; 100])),
            ("SYN", 40, |random| raw(SYN, random.below(60_000) as i64, 0)),
            ("ACK of the unsent", 40, |random| raw(ACK, 5, 100_000 + random.below(1 << 20) as i64)),
        ];
        for (name, answers_max, forge) in kinds {
            let mut answers = 0;
            for count in 0..10_000 {
                let segment = forge(&mut host.random);
                (host.wire.port, host.wire.iss) = (host.port, host.iss);
                let bytes = host.wire.bytes(&segment);
                host.take_in(&bytes);
                // Two seconds in all.
                host.wire.now += Duration::from_micros(200);
                answers += host.drain();
                if count % 1000 == 999 {
                    host.assert_serves();
                }
            }
            assert!(answers <= answers_max, "{name}: {answers} answers to 10,000 in 2 s");
            assert_eq!(host.wire.state(host.honest), State::Established, "{name}");
        }
        assert!(grown(before) < 16 << 10, "{} bytes", grown(before));
    }
}

/// Every other byte of a window: as many islands as there can be.
#[test]
fn islands_in_the_window_are_bounded_and_joined() {
    const LEN: usize = 60_000;
    let _turn = turn();
    for mut host in Host::both(4) {
        let id = host.connect(7000, &[MSS, SACK_PERMITTED].concat());
        let before = MEMORY.allocated();
        let byte = |at: usize| (at % 251) as u8;
        for at in (1..LEN).step_by(2).rev() {
            let bytes = host.wire.bytes(&raw(ACK, 1 + at as i64, 1).data(&[byte(at)]));
            host.take_in(&bytes);
            host.drain();
        }
        assert!(grown(before) < 512 << 10, "{} bytes", grown(before));
        let mut received = Vec::new();
        let whole: Vec<u8> = (0..LEN).map(byte).collect();
        for (index, piece) in whole.chunks(1000).enumerate() {
            let seen = host.wire.send(raw(ACK, 1 + 1000 * index as i64, 1).data(piece));
            assert!(seen.iter().all(|seen| seen.options.len() <= 40));
            received.extend(host.wire.read(id));
        }
        assert_eq!(received, whole);
        host.assert_serves();
    }
}

/// Overlapping segments that contradict each other: the stream has one content, and each byte of it was sent at that place.
#[test]
fn contradictions_are_settled() {
    const LEN: usize = 20_000;
    let _turn = turn();
    for mut host in Host::both(4) {
        let id = host.connect(7000, &[MSS, SACK_PERMITTED].concat());
        let before = MEMORY.allocated();
        // A byte says its place, and in the high bit which of two versions it is of.
        let byte = |at: usize, version: u8| (at % 127) as u8 | version << 7;
        let mut received = Vec::new();
        for round in 0..4000 {
            let start = host.random.below(LEN as u64) as usize;
            let len = 1 + host.random.below(1400.min((LEN - start) as u64)) as usize;
            let version = (round % 2) as u8;
            let payload: Vec<u8> = (start..start + len).map(|at| byte(at, version)).collect();
            host.wire.send(raw(ACK, 1 + start as i64, 1).data(&payload));
            received.extend(host.wire.read(id));
        }
        for start in (0..LEN).step_by(1000) {
            let payload: Vec<u8> = (start..start + 1000).map(|at| byte(at, 0)).collect();
            host.wire.send(raw(ACK, 1 + start as i64, 1).data(&payload));
            received.extend(host.wire.read(id));
        }
        assert_eq!(received.len(), LEN);
        assert!(received.iter().enumerate().all(|(at, &got)| got & 0x7f == (at % 127) as u8));
        assert!(grown(before) < 512 << 10, "{} bytes", grown(before));
        host.assert_serves();
    }
}

/// CVE-2019-11477 to 11479: the smallest segments, and reports that split what is in flight at every other byte.
#[test]
fn reports_that_split_everything_are_bounded() {
    const LEN: usize = 600_000;
    let _turn = turn();
    for mut host in Host::both(4) {
        // An MSS of 8 counts as the least.
        let options = [&[2, 4, 0, 8][..], &SACK_PERMITTED, &[1, 3, 3, 14]].concat();
        let id = host.connect(7000, &options);
        let iss = host.wire.iss;
        let content = vec![0x77; LEN];
        let mut written = 0;
        let mut write = |host: &mut Host| {
            let step = host.wire.stack.tcp_send_with(host.wire.now, id, |[first, _]| {
                let len = first.len().min(content.len() - written);
                first[..len].fill(0x77);
                len
            });
            written += step.unwrap_or(0);
        };
        // What the stack has sent, as far as it got; takes out all there is.
        let mut reached = 1i64;
        let send = |host: &mut Host, reached: &mut i64| {
            let mut count = 0;
            while let Some(packet) = host.wire.stack.poll_transmit(host.wire.now) {
                let seen = harness::describe(host.wire.now, harness::Side::A, &packet.to_vec());
                if seen.ports.1 == 7000 {
                    *reached = (*reached).max(i64::from(seen.seq.wrapping_sub(iss)) + seen.payload as i64);
                }
                count += 1;
            }
            count
        };
        let mut packets = 0;
        let mut acknowledged = 1;
        let before = MEMORY.allocated();
        // The congestion window opens until enough is in flight.
        while reached - acknowledged < 60_000 {
            acknowledged = reached;
            write(&mut host);
            host.wire.now += Duration::from_millis(1);
            let bytes = host.wire.bytes(&raw(ACK, 1, acknowledged).window(u16::MAX));
            host.take_in(&bytes);
            packets += send(&mut host, &mut reached);
            assert!(packets < 20_000, "the window does not open");
        }
        for index in 0..30_000 {
            let left = iss.wrapping_add(acknowledged as u32 + 1 + index * 2 % 60_000);
            let block = [&[1, 1, 5, 10][..], &left.to_be_bytes(), &left.wrapping_add(1).to_be_bytes()].concat();
            let bytes = host.wire.bytes(&raw(ACK, 1, acknowledged).window(u16::MAX).options(&block));
            host.take_in(&bytes);
            packets += send(&mut host, &mut reached);
        }
        assert!(grown(before) < 8 << 20, "{} bytes", grown(before));
        assert!(packets < 200_000, "{packets} packets");
        host.assert_serves();
        // The peer comes to reason, and the stream goes on to its end.
        (host.wire.port, host.wire.iss) = (7000, iss);
        for _ in 0..5000 {
            write(&mut host);
            send(&mut host, &mut reached);
            let bytes = host.wire.bytes(&raw(ACK, 1, reached).window(u16::MAX));
            host.take_in(&bytes);
            host.wire.now += Duration::from_millis(10);
            host.wire.stack.handle_timeout(host.wire.now);
        }
        assert_eq!(reached, 1 + LEN as i64, "everything arrived");
    }
}

/// A peer whose window is a few bytes, and one that opens it byte by byte.
#[test]
fn a_window_of_bytes_costs_the_peer_only() {
    let _turn = turn();
    for mut host in Host::both(4) {
        let id = host.connect(7000, &MSS);
        host.wire.send(raw(ACK, 1, 1).window(1));
        let before = MEMORY.allocated();
        let mut sent = host.wire.write(id, &[0x33; 20_000]);
        let mut acknowledged = 1;
        let mut packets = 0;
        // A minute of it.
        for _ in 0..600 {
            packets += sent.len();
            let reached = sent.iter().map(|seen| i64::from(seen.seq) + seen.payload as i64).max();
            acknowledged = acknowledged.max(reached.unwrap_or(0));
            sent = host.wire.send(raw(ACK, 1, acknowledged).window(1));
            sent.extend(host.wire.wait(Duration::from_millis(100)));
        }
        assert!(acknowledged > 10, "it goes on slowly: {acknowledged}");
        assert!(packets <= 1300, "{packets} packets in a minute");
        assert!(grown(before) < 128 << 10, "{} bytes", grown(before));
        host.assert_serves();
    }
}

/// Sockstress: the program has closed, and the peer says for ever that it has no room.
#[test]
fn an_orphan_does_not_wait_for_ever() {
    let _turn = turn();
    for mut host in Host::both(4) {
        let sockets = host.wire.stack.sockets().count();
        let id = host.connect(7000, &MSS);
        host.wire.send(raw(ACK, 1, 1).window(0));
        host.wire.write(id, &[0x33; 20_000]);
        host.wire.stack.tcp_close(host.wire.now, id);
        let mut hours = 0;
        while host.wire.stack.sockets().count() > sockets {
            for _ in 0..3600 {
                let probes = host.wire.wait(SECOND);
                if !probes.is_empty() {
                    host.wire.send(raw(ACK, 1, 1).window(0));
                }
            }
            hours += 1;
            assert!(hours < 3, "it waits for ever");
        }
        host.assert_serves();
    }
}

/// A fragment of an IP packet from a forged or the honest peer's address.
fn fragment(host: &mut Host, source: IpAddr, name: u32, offset: u16, more: bool, data: &[u8]) -> Vec<u8> {
    let own = host.wire.family.own();
    match host.wire.family {
        Family::V4 => {
            let mut packet = ip_packet(source, own, 6, 0, data);
            packet[4..6].copy_from_slice(&(name as u16).to_be_bytes());
            packet[6..8].copy_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
            packet[10..12].fill(0);
            let sum = harness::wire::checksum(&[&packet[..20]]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            packet
        }
        Family::V6 => {
            let mut payload = vec![6, 0];
            payload.extend((offset << 3 | u16::from(more)).to_be_bytes());
            payload.extend(name.to_be_bytes());
            payload.extend_from_slice(data);
            ip_packet(source, own, 44, 0, &payload)
        }
    }
}

#[test]
fn fragments_that_never_become_whole_are_bounded() {
    let _turn = turn();
    for mut host in Host::both(4) {
        host.assert_serves();
        let before = MEMORY.allocated();
        for name in 0..20_000u32 {
            let source = host.forged();
            let packet = fragment(&mut host, source, name, 1 + (name % 100) as u16, true, &[0x44; 1400]);
            host.take_in(&packet);
            if name % 1000 == 999 {
                host.assert_serves();
            }
        }
        assert!(grown(before) < 8 << 20, "{} bytes", grown(before));
        // Tiny ones cost more than their bytes.
        for name in 0..20_000u32 {
            let source = host.forged();
            let packet = fragment(&mut host, source, name, 1, true, &[0x44; 8]);
            host.take_in(&packet);
        }
        assert!(grown(before) < 8 << 20, "{} bytes", grown(before));
        host.assert_serves();
        host.wire.wait(120 * SECOND);
        assert!(grown(before) < 256 << 10, "{} bytes are left", grown(before));
        host.assert_serves();
    }
}

#[test]
fn fragments_that_overlap_or_reach_too_far_are_dropped() {
    let _turn = turn();
    for mut host in Host::both(4) {
        host.assert_serves();
        let before = MEMORY.allocated();
        let peer = host.wire.family.peer();
        // Teardrop: the second lies within the first. Its like: the same end twice, and a hole that two ends surround.
        let patterns: [&[(u16, bool, usize)]; 5] = [
            &[(0, true, 64), (3, false, 8)],
            &[(0, true, 64), (8, false, 16), (9, false, 16)],
            &[(4, false, 8), (8, true, 8), (0, true, 32)],
            // Ping of death: the last one ends beyond what a packet can be.
            &[(0, true, 1480), (8189, false, 1400)],
            // RFC 1858: flags of TCP overwritten by a second fragment.
            &[(0, true, 16), (1, false, 24)],
        ];
        for (round, pattern) in patterns.iter().cycle().take(5000).enumerate() {
            for &(offset, more, len) in *pattern {
                let data = vec![0x55; len];
                let packet = fragment(&mut host, peer, round as u32, offset, more, &data);
                host.take_in(&packet);
            }
            if round % 500 == 499 {
                host.drain();
                host.assert_serves();
            }
        }
        assert!(grown(before) < 8 << 20, "{} bytes", grown(before));
        host.wire.wait(120 * SECOND);
        assert!(grown(before) < 256 << 10, "{} bytes are left", grown(before));
        // A segment in honest pieces still arrives.
        (host.wire.port, host.wire.iss) = (host.port, host.iss);
        let whole = host.wire.bytes(&raw(ACK | PSH, host.received, host.sent).data(&[0x66; 100]));
        let segment = whole[host.wire.family.header()..].to_vec();
        for (offset, more, range) in [(8, false, 64..segment.len()), (0, true, 0..64)] {
            let packet = fragment(&mut host, peer, 99_999, offset, more, &segment[range]);
            host.take_in(&packet);
        }
        assert_eq!(host.wire.read(host.honest), [0x66; 100]);
        host.received += 100;
        host.assert_serves();
    }
}
