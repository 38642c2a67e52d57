//! A peer that sends anything, and a program that does anything: the stack must not panic, and its state must stay one
//! that an image of it is accepted.

mod harness;

use std::net::SocketAddr;
use std::time::Duration;

use harness::{Random, config, describe};
use netstack::{
    Checksum, Config, Instant, Offload, Reuse, RxPacket, Secrets, Shutdown, SocketId, Stack, StackImage, State,
    TcpOption,
};
use proptest::prelude::*;

struct Chaos {
    stack: Stack,
    now: Instant,
    random: Random,
    sockets: Vec<SocketId>,
    /// What the stack last told: sequence and acknowledgment number.
    seen: [(u32, u32); 4],
}

impl Chaos {
    fn new(seed: u64) -> Self {
        let now = Instant::from_millis(5000);
        let offload = if seed.is_multiple_of(2) { Offload::FULL } else { Offload::NONE };
        let config = Config { offload, receive_buffer: 200_000, send_buffer: 100_000, ..config("10.0.0.1") };
        let mut stack = Stack::new(config, Secrets([9; 32]), now);
        let listener = stack.tcp_open();
        let any: SocketAddr = "0.0.0.0:80".parse().unwrap();
        stack.tcp_bind(listener, any, Reuse::default()).unwrap();
        stack.tcp_listen(now, listener, 3).unwrap();
        Chaos { stack, now, random: Random::new(seed), sockets: vec![listener], seen: [(0, 0); 4] }
    }

    fn near(&mut self, center: u32) -> u32 {
        let random = self.random.next();
        match self.random.below(10) {
            0 => random as u32,
            1..=4 => center,
            5 => center.wrapping_add(1),
            6 => center.wrapping_sub(1),
            7 => center.wrapping_add((random % 5000) as u32),
            8 => center.wrapping_sub((random % 5000) as u32),
            _ => center.wrapping_add((random % 200_000) as u32),
        }
    }

    fn segment(&mut self) -> Vec<u8> {
        let port = self.random.below(4) as usize;
        let (their_seq, their_ack) = self.seen[port];
        // What they acknowledge is where we are.
        let (seq, ack) = (self.near(their_ack), self.near(their_seq));
        let flags = match self.random.below(12) {
            0 | 1 => 2,
            2..=6 => 16,
            7 => 17,
            8 => 24,
            9 if self.random.chance(0.2) => 4,
            10 => 18,
            _ => self.random.next() as u8,
        };
        let len = match self.random.below(5) {
            0 | 1 => 0,
            2 => self.random.below(20),
            3 => self.random.below(1460),
            _ => self.random.below(20_000),
        };
        let mut options = Vec::new();
        if flags & 2 != 0 && self.random.chance(0.8) {
            options.extend([2, 4, 5, 180, 1, 3, 3, self.random.below(16) as u8, 1, 1, 4, 2]);
        }
        if self.random.chance(0.4) {
            options.extend([1, 1, 8, 10]);
            options.extend((self.random.below(100) as u32).to_be_bytes());
            options.extend((self.random.next() as u32).to_be_bytes());
        }
        if flags & 2 == 0 && self.random.chance(0.4) {
            options.extend([1, 1, 5, 18]);
            for _ in 0..4 {
                let edge = self.near(ack);
                options.extend(edge.to_be_bytes());
            }
        }
        if self.random.chance(0.05) {
            let garbage: Vec<u8> = (0..8).map(|_| self.random.next() as u8).collect();
            options = garbage;
        }
        options.truncate(40);
        let header = 20 + options.len();
        let total = 20 + header + len as usize;
        let mut packet = vec![0x45, self.random.below(4) as u8];
        packet.extend((total as u16).to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
        packet.extend((5000 + port as u16).to_be_bytes());
        packet.extend(if self.random.chance(0.98) { 80u16 } else { 81 }.to_be_bytes());
        packet.extend(seq.to_be_bytes());
        packet.extend(ack.to_be_bytes());
        packet.extend([(header as u8 / 4) << 4, flags]);
        let window = match self.random.below(4) {
            0 => 0,
            1 => self.random.below(100) as u16,
            _ => self.random.next() as u16,
        };
        packet.extend(window.to_be_bytes());
        packet.extend([0, 0, self.random.next() as u8, self.random.next() as u8]);
        packet.extend(options);
        packet.resize(total, 0x5a);
        packet
    }

    fn drain(&mut self) {
        let now = self.now;
        let mut count = 0;
        while let Some(packet) = self.stack.poll_transmit(now) {
            let bytes = packet.to_vec();
            assert!(bytes.len() <= 65_535);
            let length = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
            assert_eq!(length, bytes.len(), "the length in the header");
            let seen = describe(now, harness::Side::A, &bytes);
            if seen.protocol == 6 {
                let port = usize::from(u16::from_be_bytes([bytes[22], bytes[23]])).wrapping_sub(5000);
                if let Some(known) = self.seen.get_mut(port) {
                    let syn_fin = u32::from(seen.flags & 1 != 0) + u32::from(seen.flags & 2 != 0);
                    *known = (seen.seq.wrapping_add(seen.payload as u32 + syn_fin), seen.ack);
                }
            }
            count += 1;
            assert!(count < 10_000, "it never stops sending");
        }
        while self.stack.poll_changed().is_some() {}
    }

    fn step(&mut self) {
        let now = self.now;
        match self.random.below(20) {
            0..=9 => {
                let packet = self.segment();
                let gso_size = self.random.chance(0.3).then(|| self.random.below(1500) as u16);
                self.stack.handle_packet(now, RxPacket { data: &packet, checksum: Checksum::Verified, gso_size });
            }
            10 => {
                let garbage: Vec<u8> = (0..self.random.below(100)).map(|_| self.random.next() as u8).collect();
                self.stack
                    .handle_packet(now, RxPacket { data: &garbage, checksum: Checksum::Verified, gso_size: None });
            }
            11..=13 => {
                let ms = if self.random.chance(0.1) { self.random.below(100_000) } else { self.random.below(300) };
                self.now = now + Duration::from_millis(ms);
                let now = self.now;
                self.stack.handle_timeout(now);
                assert!(self.stack.poll_timeout().is_none_or(|at| at > now), "a timer that is due stays due");
            }
            _ => self.program(now),
        }
        self.drain();
    }

    fn program(&mut self, now: Instant) {
        let index = self.random.below(self.sockets.len() as u64) as usize;
        let id = self.sockets[index];
        match self.random.below(16) {
            14 => {
                let _ = self.stack.tcp_send_urgent(now, id, &[0x21; 300]);
            }
            15 => {
                let inline = self.random.chance(0.3);
                let _ = self.stack.tcp_set(now, id, TcpOption::OobInline(inline));
                let _ = self.stack.tcp_recv_urgent(id, self.random.chance(0.5));
            }
            0..=2 => {
                if let Some(id) = self.stack.tcp_accept(now, self.sockets[0]) {
                    self.sockets.push(id);
                }
            }
            3..=5 => {
                let want = self.random.below(30_000) as usize;
                let _ = self.stack.tcp_send_with(now, id, |[first, second]| want.min(first.len() + second.len()));
            }
            6..=8 => {
                let want = self.random.below(30_000) as usize;
                let _ = self.stack.tcp_recv_with(now, id, |[first, second]| want.min(first.len() + second.len()));
            }
            9 => {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][self.random.below(3) as usize];
                if index > 0 {
                    let _ = self.stack.tcp_shutdown(now, id, how);
                }
            }
            10 if index > 0 => {
                if self.random.chance(0.5) {
                    self.stack.tcp_close(now, id);
                } else {
                    self.stack.tcp_abort(now, id);
                }
                self.sockets.swap_remove(index);
            }
            11 => {
                let size = 1 + self.random.below(100_000) as usize;
                let options = [
                    TcpOption::Cork(self.random.chance(0.3)),
                    TcpOption::NoDelay(self.random.chance(0.5)),
                    TcpOption::KeepAlive(true),
                    TcpOption::KeepIdle(Duration::from_millis(500)),
                    TcpOption::ReceiveBuffer(size),
                    TcpOption::SendBuffer(size),
                    TcpOption::WindowClamp(size as u32),
                    TcpOption::MaxSegment(size as u16),
                    TcpOption::UserTimeout(Duration::from_secs(3)),
                    TcpOption::Congestion(netstack::Congestion::Reno),
                    TcpOption::NotSentLowat(size as u32),
                ];
                let option = options[self.random.below(options.len() as u64) as usize];
                let _ = self.stack.tcp_set(now, id, option);
            }
            12 => {
                let new = self.stack.tcp_open();
                let port = 5000 + self.random.below(4) as u16;
                let remote = SocketAddr::new([10, 0, 0, 2].into(), port);
                if self.random.chance(0.5) {
                    let _ =
                        self.stack.tcp_bind(new, "0.0.0.0:80".parse().unwrap(), Reuse { address: true, port: true });
                }
                let _ = self.stack.tcp_connect(now, new, remote);
                self.sockets.push(new);
            }
            _ => {
                let image = self.stack.freeze(now);
                let bytes = codec::to_vec(&image).expect("encodes");
                let image: StackImage = codec::from_slice(&bytes).expect("decodes");
                let config = self.stack.config().clone();
                let sockets: Vec<_> = self.stack.sockets().collect();
                self.stack = Stack::thaw(image, now, config).expect("an image of a live stack is accepted");
                assert_eq!(self.stack.sockets().collect::<Vec<_>>(), sockets);
            }
        }
        let status = self.stack.status(id);
        assert!(status.state != State::Closed || status.unsent == 0);
        let _ = self.stack.tcp_info(now, id);
        let _ = self.stack.tcp_endpoints(id);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn anything_may_come(seed in any::<u64>()) {
        let mut chaos = Chaos::new(seed);
        for _ in 0..400 {
            chaos.step();
        }
    }

    /// A decoder fed with a damaged image fails or yields a stack that works; it never panics.
    #[test]
    fn damaged_images_are_refused_or_harmless(seed in any::<u64>(), at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let mut chaos = Chaos::new(seed);
        for _ in 0..100 {
            chaos.step();
        }
        let mut bytes = codec::to_vec(&chaos.stack.freeze(chaos.now)).expect("encodes");
        let at = at.index(bytes.len());
        bytes[at] = value;
        let config = chaos.stack.config().clone();
        if let Ok(image) = codec::from_slice::<StackImage>(&bytes)
            && let Ok(stack) = Stack::thaw(image, chaos.now, config)
        {
            chaos.stack = stack;
            for _ in 0..50 {
                chaos.step();
            }
        }
    }
}
