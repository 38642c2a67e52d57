//! Packets into a stack with a socket in every state.

use std::net::{IpAddr, SocketAddr};
use std::sync::LazyLock;
use std::time::Duration;

use netstack::{
    Checksum, Config, Instant, Offload, Reuse, RxPacket, Secrets, Shutdown, SocketId, Stack, StackImage, State,
    TcpOption,
};

use crate::script::Script;

/// A stack with sockets in every state, as netstack's tests keep it.
static ZOOS: LazyLock<[StackImage; 2]> = LazyLock::new(|| {
    let read = |bytes| codec::from_slice(bytes).expect("an image that the tests read");
    [
        read(include_bytes!("../../netstack/tests/images/v1-packed-ipv4.image")),
        read(include_bytes!("../../netstack/tests/images/v1-packed-ipv6.image")),
    ]
});

/// Longest script, in commands.
const COMMANDS_MAX: usize = 400;
/// Moves in a script: each costs as much as many packets.
const MOVES_MAX: usize = 6;
/// Most packets that one command can cause; the zoo has 30 KB to send.
const PACKETS_MAX: usize = 20_000;

/// A stack under test and what is known of its connections.
pub(crate) struct Subject {
    stack: Stack,
    now: Instant,
    v6: bool,
    sockets: Vec<SocketId>,
    flows: Vec<Flow>,
    /// Whether images are written and read again in moves, which costs as much as hundreds of packets. What it finds
    /// `stack_image` finds as well.
    writes: bool,
}

/// A connection as its peer knows it.
#[derive(Clone, Copy)]
struct Flow {
    local_port: u16,
    remote_port: u16,
    /// What the stack would take next, and what it sent last.
    expected: u32,
    sent: u32,
}

/// A segment to be made up.
struct Forged<'a> {
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
    urgent: u16,
    /// At most 40 bytes.
    options: &'a [u8],
    /// Bytes of payload.
    len: usize,
    traffic_class: u8,
    gso_size: Option<u16>,
}

fn address(v6: bool, own: bool) -> IpAddr {
    let text = match (v6, own) {
        (false, true) => "10.0.0.2",
        (false, false) => "10.0.0.1",
        (true, true) => "fd00::2",
        (true, false) => "fd00::1",
    };
    text.parse().expect("an address")
}

fn config(v6: bool, flags: u8) -> Config {
    let offload = if flags & 2 == 0 { Offload::FULL } else { Offload::NONE };
    Config {
        addresses: vec![address(v6, true)],
        offload,
        foreign: flags & 4 != 0,
        ecn: flags & 8 != 0,
        receive_buffer: 200_000,
        send_buffer: 200_000,
        ..Config::default()
    }
}

impl Subject {
    fn zoo(flags: u8) -> Subject {
        let v6 = flags & 1 != 0;
        let image = ZOOS[usize::from(v6)].clone();
        let now = Instant::from_millis(5000);
        let stack = Stack::thaw(image, now, config(v6, flags)).expect("the zoo thaws");
        Subject { writes: flags & 0xf0 == 0x10, ..Subject::new(stack, now, v6) }
    }

    pub(crate) fn new(stack: Stack, now: Instant, v6: bool) -> Subject {
        let sockets: Vec<SocketId> = stack.sockets().collect();
        let ports = |id: &SocketId| {
            let (local, remote) = stack.tcp_endpoints(*id);
            Some((local?.port(), remote?.port()))
        };
        let known = sockets.iter().filter_map(ports);
        let flows = known.chain([(80, 7777), (81, 7778), (82, 7779)]);
        let flows =
            flows.map(|(local_port, remote_port)| Flow { local_port, remote_port, expected: 1000, sent: 0 }).collect();
        let mut subject = Subject { stack, now, v6, sockets, flows, writes: false };
        subject.drain();
        subject
    }

    /// Takes out everything the stack has to say, and learns from it.
    fn drain(&mut self) {
        let mut count = 0;
        let header = if self.v6 { 40 } else { 20 };
        while let Some(packet) = self.stack.poll_transmit(self.now) {
            let bytes = packet.to_vec();
            count += 1;
            assert!(count < PACKETS_MAX, "it never stops sending");
            assert!(bytes.len() <= 65_575, "a packet of {} bytes", bytes.len());
            let told = match bytes[0] >> 4 {
                4 => usize::from(u16::from_be_bytes([bytes[2], bytes[3]])),
                _ => 40 + usize::from(u16::from_be_bytes([bytes[4], bytes[5]])),
            };
            assert_eq!(told, bytes.len(), "the length in the header");
            let is_tcp = if bytes[0] >> 4 == 4 { bytes[9] == 6 } else { bytes[6] == 6 };
            if !is_tcp || (bytes[0] >> 4 == 6) != self.v6 {
                continue;
            }
            let tcp = &bytes[header..];
            let word = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
            let payload = tcp.len() - usize::from(tcp[12] >> 4) * 4;
            let ports = (u16::from_be_bytes([tcp[0], tcp[1]]), u16::from_be_bytes([tcp[2], tcp[3]]));
            let space = u32::from(tcp[13] & 1 != 0) + u32::from(tcp[13] & 2 != 0);
            let known = self.flows.iter_mut().find(|flow| (flow.local_port, flow.remote_port) == ports);
            if let Some(flow) = known {
                flow.sent = word(4).wrapping_add(payload as u32).wrapping_add(space);
                if tcp[13] & 16 != 0 {
                    flow.expected = word(8);
                }
            }
        }
        while self.stack.poll_changed().is_some() {}
        while self.stack.poll_foreign().is_some() {}
    }

    fn take_in(&mut self, packet: &[u8], gso_size: Option<u16>) {
        self.stack.handle_packet(self.now, RxPacket { data: packet, checksum: Checksum::Verified, gso_size });
        self.drain();
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.stack.handle_timeout(self.now);
        self.drain();
        assert!(self.stack.poll_timeout().is_none_or(|at| at > self.now), "a timer that is due stays due");
    }

    fn ip(&self, protocol: u8, payload: &[u8], traffic_class: u8) -> Vec<u8> {
        let mut packet = Vec::with_capacity(40 + payload.len());
        match (address(self.v6, false), address(self.v6, true)) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let len = u16::try_from(20 + payload.len()).unwrap_or(u16::MAX).to_be_bytes();
                packet.extend_from_slice(&[0x45, traffic_class, len[0], len[1], 0, 1, 0, 0, 64, protocol, 0, 0]);
                packet.extend_from_slice(&from.octets());
                packet.extend_from_slice(&to.octets());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let len = u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes();
                packet.extend_from_slice(&[0x60 | traffic_class >> 4, traffic_class << 4, 0, 0]);
                packet.extend_from_slice(&[len[0], len[1], protocol, 64]);
                packet.extend_from_slice(&from.octets());
                packet.extend_from_slice(&to.octets());
            }
            _ => {}
        }
        packet.extend_from_slice(payload);
        packet
    }

    /// A segment near what the stack expects, so that it gets past the first checks.
    fn segment(&mut self, script: &mut Script<'_>) {
        let flow = self.flows[usize::from(script.byte()) % self.flows.len()];
        let shape = script.byte();
        let offset = |script: &mut Script<'_>, kind: u8| match kind & 3 {
            0 => 0,
            1 => i32::from(script.byte().cast_signed()).cast_unsigned(),
            2 => i32::from(script.half().cast_signed()).cast_unsigned(),
            _ => script.word(),
        };
        let seq = flow.expected.wrapping_add(offset(script, shape));
        let ack = flow.sent.wrapping_add(offset(script, shape >> 2));
        let flags = script.byte();
        let window = script.half();
        let options: &[u8] = if shape & 0x10 == 0 {
            &[]
        } else {
            let len = usize::from(script.byte() % 41) & !3;
            script.take(len)
        };
        let len = if shape & 0x20 == 0 { 0 } else { usize::from(script.half() % 9000) };
        let gso_size = (shape & 0x40 != 0).then(|| script.half());
        let urgent = if flags & 0x20 == 0 { 0 } else { script.half() };
        let traffic_class = if shape & 0x80 == 0 { 2 } else { 3 };
        self.forge(&flow, &Forged { seq, ack, flags, window, urgent, options, len, traffic_class, gso_size });
    }

    fn forge(&mut self, flow: &Flow, forged: &Forged<'_>) {
        let &Forged { seq, ack, flags, window, urgent, options, len, traffic_class, gso_size } = forged;
        let padded = options.len().next_multiple_of(4);
        let mut tcp = Vec::with_capacity(60 + len);
        tcp.extend_from_slice(&flow.remote_port.to_be_bytes());
        tcp.extend_from_slice(&flow.local_port.to_be_bytes());
        tcp.extend_from_slice(&seq.to_be_bytes());
        tcp.extend_from_slice(&ack.to_be_bytes());
        tcp.extend_from_slice(&[((20 + padded) as u8 / 4) << 4, flags]);
        tcp.extend_from_slice(&window.to_be_bytes());
        tcp.extend_from_slice(&[0, 0]);
        tcp.extend_from_slice(&urgent.to_be_bytes());
        tcp.extend_from_slice(options);
        tcp.resize(20 + padded, 0);
        tcp.resize(20 + padded + len, 0x5a);
        let packet = self.ip(6, &tcp, traffic_class);
        self.take_in(&packet, gso_size);
    }

    fn fragment(&mut self, script: &mut Script<'_>) {
        let shape = script.byte();
        let protocol = [6, 17, 1, 58, 44, 60, 0, 200][usize::from(shape & 7)];
        let identification = u16::from(script.byte() & 7);
        let offset = if shape & 8 == 0 { u16::from(script.byte()) } else { script.half() & 0x1fff };
        let more = shape & 0x10 != 0;
        let len = if shape & 0x20 == 0 { usize::from(script.byte()) * 8 } else { usize::from(script.half() % 3000) };
        let body = script.take(len.min(64)).to_vec();
        let mut body = body;
        body.resize(len, 0x33);
        let packet = if self.v6 {
            let word = offset << 3 | u16::from(more);
            let mut payload = vec![protocol, 0];
            payload.extend_from_slice(&word.to_be_bytes());
            payload.extend_from_slice(&u32::from(identification).to_be_bytes());
            payload.extend_from_slice(&body);
            self.ip(44, &payload, 0)
        } else {
            let mut packet = self.ip(protocol, &body, 0);
            packet[4..6].copy_from_slice(&identification.to_be_bytes());
            packet[6..8].copy_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
            packet
        };
        self.take_in(&packet, None);
    }

    fn program(&mut self, script: &mut Script<'_>) {
        let now = self.now;
        let Some(&id) = self.sockets.get(usize::from(script.byte()) % self.sockets.len().max(1)) else { return };
        let want = usize::from(script.half());
        let stack = &mut self.stack;
        match script.byte() % 12 {
            0 => self.sockets.extend(stack.tcp_accept(now, id)),
            1 => {
                let _ = stack.tcp_send_with(now, id, |[first, second]| want.min(first.len() + second.len()));
            }
            2 => {
                let _ = stack.tcp_recv_with(now, id, |[first, second]| want.min(first.len() + second.len()));
            }
            3 => {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][want % 3];
                let _ = stack.tcp_shutdown(now, id, how);
            }
            4 => stack.tcp_close(now, id),
            5 => stack.tcp_abort(now, id),
            6 => {
                let remote = SocketAddr::new(address(self.v6, false), want as u16 | 1);
                let _ = stack.tcp_connect(now, id, remote);
            }
            7 => {
                let local = SocketAddr::new(address(self.v6, true), want as u16);
                let _ = stack.tcp_bind(id, local, Reuse::default());
            }
            8 => {
                let _ = stack.tcp_listen(now, id, want as u32 % 5);
            }
            9 => {
                if self.sockets.len() < 64 {
                    self.sockets.push(stack.tcp_open());
                }
            }
            10 => {
                let options = [
                    TcpOption::Cork(want & 1 != 0),
                    TcpOption::NoDelay(want & 1 != 0),
                    TcpOption::KeepAlive(true),
                    TcpOption::KeepIdle(Duration::from_millis(want as u64)),
                    TcpOption::ReceiveBuffer(want),
                    TcpOption::SendBuffer(want),
                    TcpOption::WindowClamp(want as u32),
                    TcpOption::MaxSegment(want as u16),
                    TcpOption::UserTimeout(Duration::from_millis(want as u64)),
                    TcpOption::NotSentLowat(want as u32),
                    TcpOption::QuickAck(want & 1 != 0),
                    TcpOption::Linger2(None),
                ];
                let _ = stack.tcp_set(now, id, options[want % options.len()]);
            }
            _ => {
                let _ = (stack.take_error(id), stack.tcp_endpoints(id));
            }
        }
        self.drain();
    }

    /// Freezes and thaws: what a stack says of itself it must believe.
    fn move_on(&mut self) {
        let mut image = self.stack.freeze(self.now);
        if self.writes {
            let bytes = codec::to_vec(&image).expect("an image can be written");
            image = codec::from_slice(&bytes).expect("an image can be read");
        }
        let config = self.stack.config().clone();
        self.stack = Stack::thaw(image, self.now, config).expect("an image of a live stack is accepted");
        self.drain();
    }

    /// Looks at everything.
    fn look(&self) {
        for id in self.stack.sockets() {
            let status = self.stack.status(id);
            assert!(status.state != State::Closed || status.unsent == 0, "{status:?}");
            let _ = self.stack.tcp_info(self.now, id);
        }
    }

    pub(crate) fn play(&mut self, script: &mut Script<'_>) {
        let mut moves = 0;
        for _ in 0..COMMANDS_MAX {
            if script.is_empty() {
                break;
            }
            match script.byte() % 16 {
                0..=6 => self.segment(script),
                7 => self.fragment(script),
                8 => {
                    let len = usize::from(script.byte());
                    let packet = script.take(len);
                    self.take_in(packet, None);
                }
                9 => {
                    let protocol = script.byte();
                    let len = usize::from(script.byte());
                    let packet = self.ip(protocol, script.take(len), 0);
                    self.take_in(&packet, None);
                }
                10 | 11 => self.wait(Duration::from_millis(u64::from(script.half()))),
                12..=14 => self.program(script),
                _ if moves < MOVES_MAX => {
                    moves += 1;
                    self.move_on();
                }
                _ => {}
            }
        }
        self.look();
        // Whatever came, time goes on.
        for _ in 0..4 {
            let Some(next) = self.stack.poll_timeout() else { break };
            self.wait(next.since(self.now));
        }
    }
}

/// A script of packets, waits and calls for a stack with a socket in every state.
pub fn packets(data: &[u8]) {
    let mut script = Script::new(data);
    let mut subject = Subject::zoo(script.byte());
    subject.play(&mut script);
    subject.move_on();
    subject.look();
}

/// Options of TCP segments: the first 40 bytes in a SYN, the rest in the segments that follow.
pub fn options(data: &[u8]) {
    let mut subject = handshake(data);
    subject.move_on();
    subject.look();
}

/// A connection to a listener whose peer's options are in `data`, with some data both ways; it is the last of the sockets if it
/// came about.
fn handshake(data: &[u8]) -> Subject {
    const OPTIONS_LEN: usize = 40;
    let mut script = Script::new(data);
    let flags = script.byte();
    let v6 = flags & 1 != 0;
    let now = Instant::from_millis(5000);
    let mut stack = Stack::new(config(v6, flags), Secrets([3; 32]), now);
    let listener = stack.tcp_open();
    let local = SocketAddr::new(address(v6, true), 80);
    stack.tcp_bind(listener, local, Reuse::default()).expect("the port is free");
    stack.tcp_listen(now, listener, u32::from(flags >> 4)).expect("it is bound");
    let mut subject = Subject::new(stack, now, v6);
    let at = subject.flows.iter().position(|flow| flow.local_port == 80).expect("there is one");
    // SYN, the handshake's ACK, then data; some out of order, so that there is something to report.
    let segments = [(2u8, 0), (16, 0)].into_iter().chain((0..6).map(|index| (24, index % 3 * 700)));
    for (index, (flags, ahead)) in segments.enumerate() {
        let mut options = script.take(OPTIONS_LEN).to_vec();
        options.resize(OPTIONS_LEN, 1);
        let flow = subject.flows[at];
        let forged = Forged {
            seq: flow.expected.wrapping_add(ahead),
            ack: flow.sent,
            flags,
            window: u16::MAX,
            urgent: 0,
            options: &options,
            len: if index < 2 { 0 } else { 500 },
            traffic_class: 2,
            gso_size: None,
        };
        subject.forge(&flow, &forged);
        if let Some(id) = subject.stack.tcp_accept(subject.now, listener) {
            subject.sockets.push(id);
            let _ = subject.stack.tcp_send_with(now, id, |[first, _]| first.len().min(20_000));
            subject.drain();
        }
        subject.wait(Duration::from_millis(50));
    }
    subject
}

/// Fragments, overlapping, out of order, of every protocol.
pub fn fragments(data: &[u8]) {
    let mut script = Script::new(data);
    let mut subject = Subject::zoo(script.byte());
    for _ in 0..COMMANDS_MAX {
        if script.is_empty() {
            break;
        }
        if script.byte() & 31 == 0 {
            subject.wait(Duration::from_millis(u64::from(script.half())));
        }
        subject.fragment(&mut script);
    }
    subject.move_on();
    subject.wait(Duration::from_secs(120));
    subject.look();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_reach_a_connection() {
        let mut data = vec![0x30];
        // MSS 1460, SACK permitted, timestamps, shift 7
        let syn = [2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 1, 3, 3, 7];
        data.extend_from_slice(&syn);
        data.resize(1 + 40, 1);
        let subject = handshake(&data);
        let id = *subject.sockets.last().expect("the listener at least");
        let info = subject.stack.tcp_info(subject.now, id);
        assert!(info.sack && info.timestamps && info.window_scaling, "{info:?}");
        assert_eq!(info.snd_wscale, 7);
        assert!(subject.stack.status(id).readable >= 500);
    }

    #[test]
    fn forged_segments_reach_the_connections_of_the_zoo() {
        for v6 in [0, 1] {
            let subject = Subject::zoo(v6);
            let readable = |subject: &Subject| -> usize {
                subject.sockets.iter().map(|&id| subject.stack.status(id).readable).sum()
            };
            let before = readable(&subject);
            let reached = (0..subject.flows.len()).filter(|&flow| {
                let mut subject = Subject::zoo(v6);
                // Next in order, an ACK of everything, a window, 100 bytes.
                let flow = u8::try_from(flow).expect("a few");
                subject.segment(&mut Script::new(&[flow, 0x20, 0x10, 0xff, 0xff, 0, 100]));
                readable(&subject) > before
            });
            assert!(reached.count() >= 4);
        }
    }
}
