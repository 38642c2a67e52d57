//! A hundred thousand idle connections in one stack: what each costs in memory, what they cost a timer's tick, and whether one
//! more is served as quickly as in an empty stack.
//!
//! `make bench-idle`, or `cargo bench --package netstack --bench idle`. Fails if an idle connection takes 4 KiB or more. Memory is what
//! the process allocated, the stack's tables included. The peers are raw packets, so that no other stack is measured along.
//!
//! Seen on a virtual machine with two cores: 2,044 bytes each, a tick in 30 ns, one more connection served in 4.7 us (4.4 us in an
//! empty stack).

use std::alloc::System;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use cap::Cap;
use netstack::{Checksum, Config, Instant, Reuse, RxPacket, Secrets, SocketId, Stack, State, TcpOption};

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

const IDLE: u32 = 100_000;
/// What an idle connection may take, in bytes.
const BAR: usize = 4096;
/// Connections whose service is timed, and ticks.
const SAMPLES: u32 = 20_000;

const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const PORT: u16 = 80;
const FIN: u8 = 1;
const SYN: u8 = 2;
const PSH: u8 = 8;
const ACK: u8 = 16;
const MESSAGE: [u8; 100] = [0x5a; 100];

struct Host {
    stack: Stack,
    now: Instant,
    listener: SocketId,
}

/// A peer and how far the two directions are.
#[derive(Clone, Copy)]
struct Peer {
    address: Ipv4Addr,
    port: u16,
    sent: u32,
    received: u32,
}

impl Peer {
    /// Each has an address and port of its own.
    fn new(number: u32) -> Peer {
        let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 1, 0, 0)) + number / 50_000);
        // 10,000 to 59,999
        Peer { address, port: (10_000 + number % 50_000) as u16, sent: 1000, received: 0 }
    }

    fn packet(&self, flags: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
        let header = 20 + options.len();
        let length = (20 + header + payload.len()) as u16;
        let mut packet = vec![0x45, 0];
        packet.extend(length.to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        packet.extend(self.address.octets());
        packet.extend(OWN.octets());
        packet.extend(self.port.to_be_bytes());
        packet.extend(PORT.to_be_bytes());
        packet.extend(self.sent.to_be_bytes());
        packet.extend(self.received.to_be_bytes());
        packet.extend([(header as u8 / 4) << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
        packet.extend(options);
        packet.extend(payload);
        packet
    }
}

impl Host {
    fn new() -> Host {
        let now = Instant::from_millis(1000);
        let config = Config { addresses: vec![IpAddr::V4(OWN)], ..Config::default() };
        let mut stack = Stack::new(config, Secrets([7; 32]), now);
        let listener = stack.tcp_open();
        stack.tcp_bind(listener, SocketAddr::new(IpAddr::V4(OWN), PORT), Reuse::default()).expect("the port is free");
        stack.tcp_listen(now, listener, 128).expect("it is bound");
        Host { stack, now, listener }
    }

    /// Hands in a packet of the peer, and takes out the answers.
    fn send(&mut self, peer: &mut Peer, flags: u8, options: &[u8], payload: &[u8]) {
        let packet = peer.packet(flags, options, payload);
        self.stack.handle_packet(self.now, RxPacket { data: &packet, checksum: Checksum::Verified, gso_size: None });
        peer.sent = peer.sent.wrapping_add(payload.len() as u32 + u32::from(flags & (SYN | FIN) != 0));
        self.take(peer);
    }

    fn take(&mut self, peer: &mut Peer) {
        while let Some(packet) = self.stack.poll_transmit(self.now) {
            let header = packet.header;
            let word = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let payload = packet.payload[0].len() + packet.payload[1].len();
            let space = payload as u32 + u32::from(header[33] & (SYN | FIN) != 0);
            if u16::from_be_bytes([header[22], header[23]]) == peer.port {
                peer.received = word(24).wrapping_add(space);
            }
        }
        while self.stack.poll_changed().is_some() {}
    }

    /// A connection that is accepted and has had a request and an answer.
    fn serve(&mut self, peer: &mut Peer) -> SocketId {
        // MSS 1460, SACK permitted, timestamps left out, shift 7
        self.send(peer, SYN, &[2, 4, 5, 180, 1, 1, 4, 2, 1, 3, 3, 7], &[]);
        self.send(peer, ACK, &[], &[]);
        let id = self.stack.tcp_accept(self.now, self.listener).expect("it is established");
        self.send(peer, ACK | PSH, &[], &MESSAGE);
        let read = self.stack.tcp_recv_with(self.now, id, |[first, _]| first.len()).expect("it can be read");
        assert_eq!(read, MESSAGE.len());
        let wrote = self.stack.tcp_send_with(self.now, id, |[room, _]| {
            room[..MESSAGE.len()].copy_from_slice(&MESSAGE);
            MESSAGE.len()
        });
        assert_eq!(wrote, Ok(MESSAGE.len()));
        self.take(peer);
        self.send(peer, ACK, &[], &[]);
        id
    }

    /// The peer closes, and then the program.
    fn end(&mut self, peer: &mut Peer, id: SocketId) {
        self.send(peer, ACK | FIN, &[], &[]);
        self.stack.tcp_close(self.now, id);
        self.take(peer);
        self.send(peer, ACK, &[], &[]);
    }

    fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.stack.poll_timeout().filter(|&at| at <= end) {
            self.now = self.now.max(at);
            self.stack.handle_timeout(self.now);
            while self.stack.poll_transmit(self.now).is_some() {}
        }
        self.now = end;
    }

    /// Nanoseconds in which one more connection is made, served and ended; sorted.
    fn time_service(&mut self, first: u32) -> Vec<u128> {
        let mut times: Vec<u128> = (first..first + SAMPLES)
            .map(|number| {
                let mut peer = Peer::new(number);
                let began = std::time::Instant::now();
                let id = self.serve(&mut peer);
                self.end(&mut peer, id);
                let time = began.elapsed().as_nanos();
                self.now += Duration::from_micros(100);
                time
            })
            .collect();
        times.sort_unstable();
        times
    }

    /// Nanoseconds of a tick with nothing due; sorted.
    fn time_ticks(&mut self) -> Vec<u128> {
        let mut times: Vec<u128> = (0..SAMPLES)
            .map(|_| {
                self.now += Duration::from_micros(1);
                let began = std::time::Instant::now();
                self.stack.handle_timeout(self.now);
                let next = self.stack.poll_timeout();
                let time = began.elapsed().as_nanos();
                assert!(next.is_none_or(|at| at > self.now));
                time
            })
            .collect();
        times.sort_unstable();
        times
    }
}

fn print(what: &str, times: &[u128]) {
    let at = |share: usize| times[(times.len() - 1) * share / 100];
    println!("{what:<58} median {:>7} ns, 99% {:>7} ns", at(50), at(99));
}

fn main() -> ExitCode {
    let mut empty = Host::new();
    // Once to warm up.
    empty.time_service(0);
    print("one connection served, nothing else there", &empty.time_service(SAMPLES));
    print("a tick, nothing else there", &empty.time_ticks());
    drop(empty);

    let before = MEMORY.allocated();
    let mut host = Host::new();
    let idle: Vec<SocketId> = (0..IDLE)
        .map(|number| {
            let id = host.serve(&mut Peer::new(number));
            host.now += Duration::from_micros(10);
            id
        })
        .collect();
    host.wait(Duration::from_secs(10));
    let each = (MEMORY.allocated() - before - size_of_val(idle.as_slice())) / idle.len();
    let established = idle.iter().filter(|&&id| host.stack.status(id).state == State::Established).count();
    assert_eq!(established, idle.len(), "all are established");
    println!("{IDLE} idle connections: {each} bytes each (at most {BAR})");
    print("one more connection served", &host.time_service(IDLE));
    print("a tick", &host.time_ticks());

    // Each has a timer now, and one after the other comes.
    for &id in &idle {
        host.stack.tcp_set(host.now, id, TcpOption::KeepAlive(true)).expect("it is open");
        host.now += Duration::from_micros(10);
    }
    print("a tick, with keepalive on all", &host.time_ticks());
    host.now += Duration::from_secs(7100);
    let mut probes: Vec<u128> = (0..SAMPLES)
        .filter_map(|_| {
            host.now = host.now.max(host.stack.poll_timeout()?);
            let began = std::time::Instant::now();
            host.stack.handle_timeout(host.now);
            while host.stack.poll_transmit(host.now).is_some() {}
            Some(began.elapsed().as_nanos())
        })
        .collect();
    probes.sort_unstable();
    print("a tick in which one keepalive probe is due", &probes);
    print("one more connection served, with keepalive on all", &host.time_service(IDLE + SAMPLES));

    if each >= BAR {
        eprintln!("an idle connection takes {each} bytes, {BAR} or more");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
