//! Raw segments against one stack: what comes back, state by state.

mod harness;

use std::net::SocketAddr;
use std::time::Duration;

use harness::{ACK, FIN, RST, SYN, Seen, Side, config, describe};
use netstack::{Checksum, Config, Instant, Reuse, RxPacket, Secrets, Shutdown, SocketError, SocketId, Stack, State};

const PSH: u8 = 8;
const ECE: u8 = 0x40;
const CWR: u8 = 0x80;
/// The peer's first sequence number.
const ISN: u32 = 0xffff_fff0;

/// A peer made of raw packets.
struct Wire {
    stack: Stack,
    now: Instant,
    port: u16,
    /// The stack's initial sequence number.
    iss: u32,
    timestamps: bool,
    ts_value: u32,
}

/// A segment to send; numbers count from the SYNs.
#[derive(Clone, Default)]
struct Raw {
    seq: i64,
    ack: i64,
    flags: u8,
    window: u16,
    payload: Vec<u8>,
    options: Vec<u8>,
    ts: Option<u32>,
    gso: Option<u16>,
    ce: bool,
}

fn raw(flags: u8, seq: i64, ack: i64) -> Raw {
    Raw { seq, ack, flags, window: 1000, ..Raw::default() }
}

impl Raw {
    fn data(mut self, payload: &[u8]) -> Raw {
        self.payload = payload.to_vec();
        self
    }

    fn window(mut self, window: u16) -> Raw {
        self.window = window;
        self
    }

    fn options(mut self, options: &[u8]) -> Raw {
        self.options = options.to_vec();
        self
    }

    fn ts(mut self, value: u32) -> Raw {
        self.ts = Some(value);
        self
    }
}

const MSS: [u8; 4] = [2, 4, 0x05, 0xb4];
const SACK_PERMITTED: [u8; 4] = [1, 1, 4, 2];

impl Wire {
    fn new() -> Wire {
        Wire::with(config("10.0.0.1"))
    }

    fn with(config: Config) -> Wire {
        let now = Instant::from_millis(10_000);
        let stack = Stack::new(config, Secrets([3; 32]), now);
        Wire { stack, now, port: 5000, iss: 0, timestamps: false, ts_value: 1000 }
    }

    fn bytes(&self, raw: &Raw) -> Vec<u8> {
        let mut options = raw.options.clone();
        if self.timestamps {
            options.extend([1, 1, 8, 10]);
            options.extend(raw.ts.unwrap_or(self.ts_value).to_be_bytes());
            options.extend(0u32.to_be_bytes());
        }
        let header = 20 + options.len();
        let total = 20 + header + raw.payload.len();
        let mut packet = vec![0x45, if raw.ce { 3 } else { 0 }];
        packet.extend((total as u16).to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        packet.extend([10, 0, 0, 2, 10, 0, 0, 1]);
        packet.extend(self.port.to_be_bytes());
        packet.extend(80u16.to_be_bytes());
        packet.extend(ISN.wrapping_add(raw.seq as u32).to_be_bytes());
        let ack = if raw.flags & ACK != 0 { self.iss.wrapping_add(raw.ack as u32) } else { 0 };
        packet.extend(ack.to_be_bytes());
        packet.extend([(header as u8 / 4) << 4, raw.flags]);
        packet.extend(raw.window.to_be_bytes());
        packet.extend([0, 0, 0, 0]);
        packet.extend(options);
        packet.extend(&raw.payload);
        packet
    }

    /// Sends a segment and returns what comes back at once, with numbers that count from the SYNs.
    fn send(&mut self, raw: Raw) -> Vec<Seen> {
        let bytes = self.bytes(&raw);
        let packet = RxPacket { data: &bytes, checksum: Checksum::Verified, gso_size: raw.gso };
        self.stack.handle_packet(self.now, packet);
        self.take()
    }

    fn take(&mut self) -> Vec<Seen> {
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

    fn wait(&mut self, time: Duration) -> Vec<Seen> {
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

    fn listen(&mut self, backlog: u32) -> SocketId {
        let id = self.stack.tcp_open();
        let any: SocketAddr = "0.0.0.0:80".parse().unwrap();
        self.stack.tcp_bind(id, any, Reuse::default()).unwrap();
        self.stack.tcp_listen(self.now, id, backlog).unwrap();
        id
    }

    /// Sends a SYN and notes the stack's ISN.
    fn syn(&mut self, options: &[u8]) -> Seen {
        self.iss = 0;
        let mut seen = self.send(raw(SYN, 0, 0).options(options));
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert_eq!((seen[0].flags & (SYN | ACK), seen[0].ack), (SYN | ACK, 1));
        self.iss = seen[0].seq;
        seen.remove(0)
    }

    /// A connection in ESTABLISHED.
    fn established(&mut self) -> SocketId {
        let listener = self.listen(5);
        let mut options = MSS.to_vec();
        options.extend(SACK_PERMITTED);
        self.syn(&options);
        assert!(self.send(raw(ACK, 1, 1)).is_empty());
        self.stack.tcp_accept(self.now, listener).expect("it is established")
    }

    fn state(&self, id: SocketId) -> State {
        self.stack.status(id).state
    }

    fn write(&mut self, id: SocketId, bytes: &[u8]) -> Vec<Seen> {
        let mut written = 0;
        while written < bytes.len() {
            let rest = &bytes[written..];
            let step = self.stack.tcp_send_with(self.now, id, |[room, _]| {
                let len = rest.len().min(room.len());
                room[..len].copy_from_slice(&rest[..len]);
                len
            });
            written += step.expect("it can send");
        }
        self.take()
    }
}

/// Flags, sequence and acknowledgment numbers, payload.
fn short(seen: &[Seen]) -> Vec<(u8, u32, u32, usize)> {
    seen.iter().map(|one| (one.flags & !PSH, one.seq, one.ack, one.payload)).collect()
}

#[test]
fn listen_answers_what_it_should() {
    let mut wire = Wire::new();
    wire.listen(5);
    assert_eq!(short(&wire.send(raw(ACK, 5, 77))), [(RST, 77, 0, 0)], "an ACK out of the blue");
    assert!(wire.send(raw(RST, 5, 0)).is_empty());
    assert!(wire.send(raw(0, 5, 0).data(b"x")).is_empty(), "no SYN, no ACK");
    assert!(wire.send(raw(SYN | FIN, 5, 0)).is_empty(), "a scanner's");
    wire.syn(&MSS);
    assert_eq!(wire.stack.connections_without_socket(), (1, 0));
}

#[test]
fn closed_ports_reset() {
    let mut wire = Wire::new();
    let seen = wire.send(raw(SYN, 0, 0));
    assert_eq!(short(&seen), [(RST | ACK, 0, 1, 0)]);
    assert_eq!(short(&wire.send(raw(ACK, 5, 9).data(b"abc"))), [(RST, 9, 0, 0)]);
    assert_eq!(short(&wire.send(raw(FIN, 5, 9).data(b"abc"))), [(RST | ACK, 0, 9, 0)]);
    assert!(wire.send(raw(RST | ACK, 5, 9)).is_empty(), "never a reset for a reset");
}

#[test]
fn half_open_connections() {
    let mut wire = Wire::new();
    let listener = wire.listen(5);
    wire.syn(&MSS);
    assert_eq!(short(&wire.send(raw(SYN, 0, 0).options(&MSS))), [(SYN | ACK, 0, 1, 0)], "the SYN again");
    assert_eq!(short(&wire.send(raw(ACK, 1, 5))), [(RST, 5, 0, 0)], "acknowledges what was never sent");
    assert!(wire.send(raw(RST, 900, 0)).iter().all(|seen| seen.flags == ACK), "in the window, not exact: challenge");
    assert_eq!(short(&wire.send(raw(SYN, 900, 0))), [(ACK, 1, 1, 0)], "a SYN in the window: challenge");
    assert_eq!(short(&wire.send(raw(ACK, 100_000, 1))), [(ACK, 1, 1, 0)], "outside the window");
    assert_eq!(wire.stack.connections_without_socket(), (1, 0));
    // SYN-ACKs are repeated five times, then the entry goes.
    let again = wire.wait(Duration::from_secs(62));
    assert_eq!(again.iter().filter(|seen| seen.flags & SYN != 0).count(), 5);
    wire.wait(Duration::from_secs(10));
    assert_eq!(wire.stack.connections_without_socket(), (0, 0));
    // And an exact reset ends one at once.
    wire.syn(&MSS);
    assert!(wire.send(raw(RST, 1, 0)).is_empty());
    assert_eq!(wire.stack.connections_without_socket(), (0, 0));
    assert_eq!(wire.stack.status(listener).acceptable, 0);
}

#[test]
fn data_with_the_final_ack_is_taken() {
    let mut wire = Wire::new();
    let listener = wire.listen(5);
    wire.syn(&MSS);
    let seen = wire.send(raw(ACK | FIN, 1, 1).data(b"GET"));
    assert_eq!(short(&seen), [(ACK, 1, 5, 0)]);
    let id = wire.stack.tcp_accept(wire.now, listener).expect("complete");
    let status = wire.stack.status(id);
    assert_eq!((status.state, status.readable, status.peer_closed), (State::CloseWait, 3, true));
}

#[test]
fn syn_ack_mirrors_the_options() {
    let mut wire = Wire::new();
    wire.listen(5);
    let bare = wire.syn(&[]);
    assert_eq!(bare.options, [2, 4, 5, 180], "MSS only");
    wire.port += 1;
    let full = wire.syn(&[2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 1, 3, 3, 7]);
    assert_eq!(full.options[..8], [2, 4, 5, 180, 4, 2, 8, 10]);
    assert_eq!(full.options[12..16], [0, 0, 0, 9], "the echo");
    assert_eq!(full.options[16..], [1, 3, 3, 7]);
}

#[test]
fn ecn_is_agreed_if_asked() {
    let mut wire = Wire::new();
    let listener = wire.listen(5);
    wire.iss = 0;
    let seen = wire.send(raw(SYN | ECE | CWR, 0, 0).options(&MSS));
    assert_eq!(seen[0].flags, SYN | ACK | ECE);
    wire.iss = seen[0].seq;
    wire.send(raw(ACK, 1, 1));
    let id = wire.stack.tcp_accept(wire.now, listener).expect("complete");
    let marked = Raw { ce: true, ..raw(ACK, 1, 1).data(b"x") };
    assert_eq!(wire.send(marked)[0].flags, ACK | ECE, "congestion is echoed");
    assert_eq!(wire.send(raw(ACK, 2, 1).data(b"y"))[0].flags, ACK | ECE, "until it is confirmed");
    assert_eq!(wire.send(raw(ACK | CWR, 3, 1).data(b"z"))[0].flags, ACK);
    // And the other way: the echo halves the window once and is confirmed.
    wire.write(id, &[1; 1000]);
    wire.send(raw(ACK | ECE, 4, 500));
    let seen = wire.write(id, &[1; 10]);
    assert!(wire.stack.tcp_info(wire.now, id).ecn);
    assert!(seen.is_empty() || seen[0].flags & CWR != 0);
}

#[test]
fn resets_must_be_exact() {
    let mut wire = Wire::new();
    let id = wire.established();
    assert!(wire.send(raw(RST, 100_000, 0)).is_empty(), "outside the window: nothing");
    assert_eq!(short(&wire.send(raw(RST, 100, 0))), [(ACK, 1, 1, 0)], "inside: a challenge");
    assert!(wire.send(raw(RST, 101, 0)).is_empty(), "challenges are limited");
    assert_eq!(wire.state(id), State::Established);
    assert!(wire.send(raw(RST, 1, 0)).is_empty());
    let status = wire.stack.status(id);
    assert_eq!((status.state, status.error), (State::Closed, Some(SocketError::ConnectionReset)));
}

#[test]
fn syns_of_an_established_connection_are_challenged() {
    let mut wire = Wire::new();
    let id = wire.established();
    assert_eq!(short(&wire.send(raw(SYN, 1, 0))), [(ACK, 1, 1, 0)]);
    wire.wait(Duration::from_secs(1));
    assert_eq!(short(&wire.send(raw(SYN, 0, 0))), [(ACK, 1, 1, 0)], "a SYN as at the start");
    assert_eq!(wire.state(id), State::Established);
}

#[test]
fn acknowledgments_must_make_sense() {
    let mut wire = Wire::new();
    let id = wire.established();
    assert_eq!(short(&wire.send(raw(ACK, 1, 5000).data(b"evil"))), [(ACK, 1, 1, 0)], "of what was never sent");
    wire.wait(Duration::from_secs(1));
    assert_eq!(short(&wire.send(raw(ACK, 1, -200_000).data(b"evil"))), [(ACK, 1, 1, 0)], "far too old");
    assert!(wire.send(raw(0, 1, 0).data(b"evil")).is_empty(), "none at all");
    assert_eq!(wire.stack.status(id).readable, 0);
}

#[test]
fn old_segments_are_told_by_their_timestamps() {
    let mut wire = Wire::new();
    wire.timestamps = true;
    let listener = wire.listen(5);
    wire.syn(&MSS);
    wire.send(raw(ACK, 1, 1));
    let id = wire.stack.tcp_accept(wire.now, listener).expect("complete");
    wire.send(raw(ACK, 1, 1).data(b"new").ts(2000));
    assert_eq!(short(&wire.send(raw(ACK, 4, 1).data(b"old").ts(1500))), [(ACK, 1, 4, 0)]);
    assert_eq!(wire.stack.status(id).readable, 3);
    // A reset isn't subject to it (RFC 7323, 5.2).
    wire.send(raw(RST, 4, 0).ts(1));
    assert_eq!(wire.state(id), State::Closed);
}

#[test]
fn out_of_order_data_is_reported() {
    let mut wire = Wire::new();
    let id = wire.established();
    let seen = wire.send(raw(ACK, 101, 1).data(&[2; 100]));
    assert_eq!(short(&seen), [(ACK, 1, 1, 0)]);
    let block = |left: u32, right: u32| {
        let mut bytes = vec![1, 1, 5, 10];
        bytes.extend(ISN.wrapping_add(left).to_be_bytes());
        bytes.extend(ISN.wrapping_add(right).to_be_bytes());
        bytes
    };
    assert_eq!(seen[0].options, block(101, 201));
    let seen = wire.send(raw(ACK, 1, 1).data(&[1; 100]));
    assert_eq!(short(&seen), [(ACK, 1, 201, 0)], "the hole is filled, at once");
    assert!(seen[0].options.is_empty());
    let seen = wire.send(raw(ACK, 1, 1).data(&[1; 100]));
    assert_eq!(short(&seen), [(ACK, 1, 201, 0)]);
    assert_eq!(seen[0].options, block(1, 101), "a D-SACK for what came twice");
    assert_eq!(wire.stack.status(id).readable, 200);
}

#[test]
fn acknowledgments_count_wire_segments() {
    let mut wire = Wire::new();
    let id = wire.established();
    // Use up the acknowledgments that are sent at once at the start.
    let mut at = 1;
    for _ in 0..16 {
        assert_eq!(wire.send(raw(ACK, at, 1).data(&[0; 10])).len(), 1);
        at += 10;
    }
    let _ = wire.stack.tcp_recv_with(wire.now, id, |[a, b]| a.len() + b.len());
    wire.take();
    assert!(wire.send(raw(ACK, at, 1).data(&[0; 1460])).is_empty(), "one full segment waits");
    at += 1460;
    assert_eq!(wire.send(raw(ACK, at, 1).data(&[0; 1460])).len(), 1, "two don't");
    at += 1460;
    let coalesced = Raw { gso: Some(1460), ..raw(ACK, at, 1).data(&[0; 2920]) };
    assert_eq!(wire.send(coalesced).len(), 1, "nor does one that stands for two");
    at += 2920;
    assert!(wire.send(raw(ACK, at, 1).data(&[0; 100])).is_empty());
    let late = wire.wait(Duration::from_millis(39));
    assert!(late.is_empty());
    assert_eq!(wire.wait(Duration::from_millis(2)).len(), 1, "a delayed one comes after 40 ms");
}

#[test]
fn the_window_closes_and_opens() {
    let mut wire = Wire::new();
    let id = wire.established();
    let seen = wire.write(id, &[1; 3000]);
    assert_eq!(short(&seen), [(ACK, 1, 1, 1000)], "as far as the window reaches, since it is all there is");
    assert!(wire.send(raw(ACK, 1, 1001).window(0)).is_empty());
    let probes = wire.wait(Duration::from_secs(3));
    assert!(!probes.is_empty() && probes.iter().all(|seen| (seen.seq, seen.payload) == (1000, 0)), "{probes:?}");
    // Silly windows are not filled (RFC 9293, 3.8.6.2.1).
    assert!(wire.send(raw(ACK, 1, 1001).window(10)).is_empty());
    let seen = wire.send(raw(ACK, 1, 1001).window(5000));
    assert_eq!(seen.iter().map(|seen| seen.payload).sum::<usize>(), 2000);
}

#[test]
fn an_initial_retransmission_is_by_the_clock_and_backs_off() {
    let mut wire = Wire::new();
    let id = wire.established();
    wire.write(id, &[1; 100]);
    let start = wire.now;
    let seen = wire.wait(Duration::from_secs(10));
    let times: Vec<u128> = seen.iter().map(|seen| seen.at.since(start).as_millis()).collect();
    assert!(seen.iter().all(|seen| (seen.seq, seen.payload) == (1, 100)));
    // The tail loss probe comes first, then the RTO doubles.
    assert!(times.len() >= 5, "{times:?}");
    let gaps: Vec<u128> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps.windows(2).skip(1).all(|pair| pair[1] == 2 * pair[0]), "{gaps:?}");
}

#[test]
fn three_reports_beyond_a_hole_bring_a_retransmission() {
    let mut wire = Wire::new();
    let id = wire.established();
    let seen = wire.write(id, &[1; 1000]);
    assert_eq!(seen.len(), 1);
    wire.send(raw(ACK, 1, 1001).window(60_000));
    let seen = wire.write(id, &[1; 10_000]);
    assert_eq!(seen.iter().map(|seen| seen.payload).sum::<usize>(), 10_000);
    let sack = |right: u32| {
        let mut bytes = vec![1, 1, 5, 10];
        bytes.extend(wire.iss.wrapping_add(1001 + 1460).to_be_bytes());
        bytes.extend(wire.iss.wrapping_add(right).to_be_bytes());
        bytes
    };
    let (one, two, three) = (sack(1001 + 2920), sack(1001 + 4380), sack(1001 + 5840));
    assert!(wire.send(raw(ACK, 1, 1001).window(60_000).options(&one)).is_empty());
    assert!(wire.send(raw(ACK, 1, 1001).window(60_000).options(&two)).is_empty());
    let seen = wire.send(raw(ACK, 1, 1001).window(60_000).options(&three));
    assert_eq!(short(&seen), [(ACK, 1001, 1, 1460)]);
}

#[test]
fn the_peer_closes_first() {
    let mut wire = Wire::new();
    let id = wire.established();
    assert_eq!(short(&wire.send(raw(FIN | ACK, 1, 1))), [(ACK, 1, 2, 0)]);
    assert_eq!(wire.state(id), State::CloseWait);
    assert_eq!(short(&wire.send(raw(FIN | ACK, 1, 1))), [(ACK, 1, 2, 0)], "the FIN again");
    assert_eq!(short(&wire.write(id, b"bye")), [(ACK, 1, 2, 3)]);
    wire.stack.tcp_close(wire.now, id);
    assert_eq!(short(&wire.take()), [(FIN | ACK, 4, 2, 0)]);
    assert_eq!(wire.state(id), State::LastAck);
    assert!(wire.send(raw(ACK, 2, 5)).is_empty());
    assert_eq!(wire.stack.sockets().count(), 1, "only the listener");
}

#[test]
fn this_side_closes_first() {
    let mut wire = Wire::new();
    let id = wire.established();
    wire.stack.tcp_shutdown(wire.now, id, Shutdown::Write).unwrap();
    assert_eq!(short(&wire.take()), [(FIN | ACK, 1, 1, 0)]);
    assert_eq!(wire.state(id), State::FinWait1);
    assert!(wire.send(raw(ACK, 1, 2)).is_empty());
    assert_eq!(wire.state(id), State::FinWait2);
    wire.send(raw(ACK, 1, 2).data(b"still here"));
    assert_eq!(wire.stack.status(id).readable, 10);
    assert_eq!(short(&wire.send(raw(FIN | ACK, 11, 2))), [(ACK, 2, 12, 0)]);
    assert_eq!(wire.stack.connections_without_socket(), (0, 1));
    // TIME-WAIT: the FIN again is acknowledged again, a reset ignored (RFC 1337).
    assert_eq!(short(&wire.send(raw(FIN | ACK, 11, 2))), [(ACK, 2, 12, 0)]);
    assert!(wire.send(raw(RST, 12, 0)).is_empty());
    assert_eq!(wire.stack.connections_without_socket(), (0, 1));
    // A new SYN beyond what was used takes the place (RFC 9293, 3.6.1), with an ISN beyond it.
    let mut options = MSS.to_vec();
    options.extend(SACK_PERMITTED);
    let seen = wire.send(raw(SYN, 1000, 0).options(&options));
    assert_eq!((seen[0].flags, seen[0].ack), (SYN | ACK, 1001));
    assert!(seen[0].seq > 2 && seen[0].seq < 1 << 31, "{}", seen[0].seq);
    assert_eq!(wire.stack.connections_without_socket(), (1, 0));
}

#[test]
fn both_close_at_once() {
    let mut wire = Wire::new();
    let id = wire.established();
    wire.stack.tcp_shutdown(wire.now, id, Shutdown::Write).unwrap();
    wire.take();
    assert_eq!(short(&wire.send(raw(FIN | ACK, 1, 1))), [(ACK, 2, 2, 0)]);
    assert_eq!(wire.state(id), State::Closing);
    wire.send(raw(ACK, 2, 2));
    assert_eq!(wire.stack.connections_without_socket(), (0, 1));
}

#[test]
fn keepalive_probes_are_answered() {
    let mut wire = Wire::new();
    wire.established();
    assert_eq!(short(&wire.send(raw(ACK, 0, 1))), [(ACK, 1, 1, 0)], "Linux's, without a byte");
    assert_eq!(short(&wire.send(raw(ACK, 0, 1).data(b"g"))).len(), 1, "with one");
}

#[test]
fn initial_sequence_numbers_differ_and_advance() {
    let mut wire = Wire::new();
    wire.listen(100);
    let mut numbers = Vec::new();
    for port in 5000..5020 {
        wire.port = port;
        numbers.push(wire.syn(&MSS).seq);
    }
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 20);
}

#[test]
fn defer_accept_waits_for_data() {
    let mut wire = Wire::new();
    let listener = wire.listen(5);
    wire.stack.tcp_set(wire.now, listener, netstack::TcpOption::DeferAccept(Duration::from_secs(5))).unwrap();
    wire.syn(&MSS);
    assert!(wire.send(raw(ACK, 1, 1)).is_empty());
    assert_eq!(wire.stack.status(listener).acceptable, 0);
    wire.send(raw(ACK, 1, 1).data(b"GET"));
    assert_eq!(wire.stack.status(listener).acceptable, 1);
}

#[test]
fn a_smaller_path_is_learned_from_icmp() {
    let mut wire = Wire::new();
    let id = wire.established();
    wire.send(raw(ACK, 1, 1).window(60_000));
    let seen = wire.write(id, &[1; 5000]);
    assert_eq!(seen.len(), 1);
    // Fragmentation needed, next hop 1000 bytes, quoting the first segment.
    let mut quoted = vec![0x45, 0, 0x05, 0xdc, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    quoted.extend(80u16.to_be_bytes());
    quoted.extend(5000u16.to_be_bytes());
    quoted.extend(wire.iss.wrapping_add(1).to_be_bytes());
    let mut icmp = vec![3, 4, 0, 0, 0, 0, 0x03, 0xe8];
    icmp.extend(quoted);
    let sum = icmp.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0x45, 0];
    packet.extend(((20 + icmp.len()) as u16).to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 9, 10, 0, 0, 1]);
    packet.extend(icmp);
    let now = wire.now;
    wire.stack.handle_packet(now, RxPacket { data: &packet, checksum: Checksum::Verified, gso_size: None });
    let info = wire.stack.tcp_info(wire.now, id);
    assert_eq!((info.pmtu, info.snd_mss), (1000, 960));
    let mut sizes = Vec::new();
    while let Some(packet) = wire.stack.poll_transmit(now) {
        sizes.push(packet.gso.map_or(packet.len() - 40, |gso| usize::from(gso.size)));
    }
    assert!(!sizes.is_empty() && sizes.iter().all(|&size| size <= 960), "{sizes:?}");
}

#[test]
fn a_flood_is_met_with_cookies() {
    for timestamps in [false, true] {
        let mut wire = Wire::new();
        let listener = wire.listen(3);
        wire.timestamps = timestamps;
        let mut options = MSS.to_vec();
        options.extend(SACK_PERMITTED);
        options.extend([1, 3, 3, 9]);
        for port in 6000..6100 {
            wire.port = port;
            wire.syn(&options);
        }
        assert_eq!(wire.stack.connections_without_socket(), (3, 0), "no more state than the backlog");
        // One of the flood is a real client.
        wire.port = 5000;
        let answer = wire.syn(&options);
        if timestamps {
            let at = answer.options.windows(2).position(|pair| pair == [8, 10]).expect("timestamps");
            let value: [u8; 4] = answer.options[at + 2..at + 6].try_into().unwrap();
            let mut ack = raw(ACK, 1, 1).data(b"hello");
            wire.timestamps = false;
            ack.options = [&[1, 1, 8, 10][..], &1001u32.to_be_bytes(), &value].concat();
            wire.send(ack);
        } else {
            wire.send(raw(ACK, 1, 1).data(b"hello"));
        }
        let id = wire.stack.tcp_accept(wire.now, listener).expect("the cookie was good");
        assert_eq!(wire.stack.status(id).readable, 5);
        let info = wire.stack.tcp_info(wire.now, id);
        assert_eq!((info.sack, info.window_scaling, info.timestamps), (timestamps, timestamps, timestamps));
        assert_eq!(info.snd_wscale, if timestamps { 9 } else { 0 });
        assert_eq!(info.snd_mss, if timestamps { 1448 } else { 1460 });
        // A guess isn't.
        wire.port = 5001;
        wire.iss = 12_345;
        assert_eq!(wire.send(raw(ACK, 1, 1).data(b"hello"))[0].flags, RST);
    }
}
