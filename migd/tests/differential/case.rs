//! One connection of a script: numbers relative to its beginnings, and a transcript that two stacks can be compared by.
//!
//! What legitimately differs is left out: initial sequence numbers, timestamp values, windows unless they are shut, window
//! shifts, PSH, the order of options, IP identification and hop limits. An answer that repeats an earlier one is a
//! retransmission by a timer, which a busy machine brings and a quiet one doesn't, and is left out too.

use std::collections::HashSet;
use std::time::Duration;

use super::packet::{ACK, Answer, CWR, ECE, FIN, Kind, PSH, RST, SYN, Segment, Tcp, URG, fragments, icmp_error, in_ip};
use super::rig::Rig;

/// How long anything may take on a busy machine before it counts as not happening.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longer than Linux delays an acknowledgment.
const DELAYED: Duration = Duration::from_millis(500);
/// Where the client's numbers begin.
const ISN: u32 = 0xffff_ff00;
/// Where the server's are taken to begin while nobody knows.
const GUESS: u32 = 0x5000_0000;
/// Where the client's clock begins.
const CLOCK: u32 = 1000;

/// One step and what came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its name, and after ": " what the program answered.
    pub what: String,
    pub answers: Vec<String>,
}

/// A segment to be injected, relative to the connection's beginnings.
#[derive(Clone, Debug)]
pub struct P {
    flags: u8,
    seq: i64,
    ack: i64,
    data: Vec<u8>,
    options: Option<Vec<u8>>,
    timestamp: Stamp,
    window: u16,
    urgent: u16,
    data_offset: Option<u8>,
    bad_checksum: bool,
    source_port: Option<u16>,
    traffic_class: u8,
    cut_at: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stamp {
    /// As agreed.
    Auto,
    None,
    /// So much older than now.
    Old(u32),
}

/// A segment with these flags (letters of FSRPAUEC).
pub fn p(flags: &str, seq: i64, ack: i64) -> P {
    let bit = |letter| match letter {
        'F' => FIN,
        'S' => SYN,
        'R' => RST,
        'P' => PSH,
        'A' => ACK,
        'U' => URG,
        'E' => ECE,
        'C' => CWR,
        other => panic!("no flag {other}"),
    };
    P {
        flags: flags.chars().map(bit).fold(0, |all, bit| all | bit),
        seq,
        ack,
        data: Vec::new(),
        options: None,
        timestamp: Stamp::Auto,
        window: 64_000,
        urgent: 0,
        data_offset: None,
        bad_checksum: false,
        source_port: None,
        traffic_class: 0,
        cut_at: None,
    }
}

impl P {
    pub fn data(self, text: &str) -> P {
        P { data: text.as_bytes().to_vec(), ..self }
    }
    pub fn options(self, bytes: &[u8]) -> P {
        P { options: Some(bytes.to_vec()), ..self }
    }
    pub fn without_timestamp(self) -> P {
        P { timestamp: Stamp::None, ..self }
    }
    pub fn old_by(self, ticks: u32) -> P {
        P { timestamp: Stamp::Old(ticks), ..self }
    }
    pub fn window(self, window: u16) -> P {
        P { window, ..self }
    }
    pub fn urgent(self, urgent: u16) -> P {
        P { urgent, ..self }
    }
    pub fn data_offset(self, words: u8) -> P {
        P { data_offset: Some(words), ..self }
    }
    pub fn bad_checksum(self) -> P {
        P { bad_checksum: true, ..self }
    }
    pub fn sent_from(self, port: u16) -> P {
        P { source_port: Some(port), ..self }
    }
    pub fn marked(self, traffic_class: u8) -> P {
        P { traffic_class, ..self }
    }
    pub fn cut_at(self, bytes: usize) -> P {
        P { cut_at: Some(bytes), ..self }
    }
}

/// A connection at work.
pub struct Case<'r> {
    pub rig: &'r mut Rig,
    pub client_port: u16,
    pub server_port: u16,
    /// Ports of the segments looked for: the client's, and the server's if it is known.
    ports: (u16, Option<u16>),
    server_isn: Option<u32>,
    /// Timestamps are agreed on; the client's clock, and the server's last word.
    clock: Option<u32>,
    server_clock: u32,
    steps: Vec<Step>,
    /// How many answers are to be waited for in each step.
    expected: Option<Vec<usize>>,
    seen: HashSet<(u32, u8, usize)>,
    last: Option<Answer>,
}

impl<'r> Case<'r> {
    pub fn new(rig: &'r mut Rig, ports: (u16, u16), expected: Option<Vec<usize>>) -> Case<'r> {
        Case {
            rig,
            client_port: ports.0,
            server_port: ports.1,
            ports: (ports.0, Some(ports.1)),
            server_isn: None,
            clock: None,
            server_clock: 0,
            steps: Vec::new(),
            expected,
            seen: HashSet::new(),
            last: None,
        }
    }

    /// What was taken down. The program gives up what the case left to it.
    pub fn end(self) -> Vec<Step> {
        let listener = format!("close l{}", self.server_port);
        for command in ["set c 1 linger 0", "close c", &listener] {
            // What isn't there can't be closed.
            let _ = self.rig.call(command);
        }
        self.steps
    }

    /// From here on segments carry timestamps.
    pub fn with_timestamps(&mut self) {
        self.clock = Some(CLOCK);
    }

    /// Injects a segment and takes down the answers.
    pub fn inject(&mut self, what: &str, segment: P) {
        let is_syn = segment.flags & SYN != 0;
        self.ports.0 = segment.source_port.unwrap_or(self.client_port);
        let packets = self.encode(&segment);
        for packet in &packets {
            self.rig.inject(packet);
        }
        self.take_down(what, is_syn, 0);
    }

    /// The same for data that is to be acknowledged. Whether Linux does so at once depends on how quickly one packet came
    /// after the other; in the end it does.
    pub fn inject_data(&mut self, what: &str, segment: P) {
        self.ports.0 = segment.source_port.unwrap_or(self.client_port);
        for packet in self.encode(&segment) {
            self.rig.inject(&packet);
        }
        if self.expected.is_some() {
            return self.take_down(what, false, 0);
        }
        let (client, ports) = (self.rig.client, self.ports);
        let early = self.rig.collect(1, DELAYED, |answer| answer.destination == client && is_of(ports, answer));
        self.take_down_found(what, false, early);
    }

    fn encode(&mut self, segment: &P) -> Vec<Vec<u8>> {
        let mut options = segment.options.clone().unwrap_or_default();
        if let Some(clock) = &mut self.clock {
            *clock += 1;
            let value = match segment.timestamp {
                Stamp::Auto => Some(*clock),
                Stamp::None => None,
                Stamp::Old(ticks) => Some(clock.wrapping_sub(ticks)),
            };
            if let Some(value) = value {
                options.extend(timestamps(value, self.server_clock));
            }
        }
        let base = self.server_isn.unwrap_or(GUESS);
        let encoded = Segment {
            source_port: segment.source_port.unwrap_or(self.client_port),
            destination_port: self.server_port,
            seq: at(ISN, segment.seq),
            ack: if segment.flags & ACK == 0 { 0 } else { at(base, segment.ack) },
            flags: segment.flags,
            window: segment.window,
            urgent: segment.urgent,
            options,
            payload: segment.data.clone(),
            data_offset: segment.data_offset,
            bad_checksum: segment.bad_checksum,
        }
        .encode(self.rig.client, self.rig.server);
        let encoded = if segment.traffic_class == 0 {
            encoded
        } else {
            let header = if self.rig.client.is_ipv4() { 20 } else { 40 };
            let tcp = pnet::packet::ip::IpNextHeaderProtocols::Tcp;
            in_ip(self.rig.client, self.rig.server, tcp, &encoded[header..], segment.traffic_class)
        };
        match segment.cut_at {
            None => vec![encoded],
            Some(first) => fragments(&encoded, first).to_vec(),
        }
    }

    /// Injects an ICMP error about the server's last packet. Types are those of IPv4 and IPv6; `shift` falsifies the
    /// sequence number that is quoted.
    pub fn icmp(&mut self, what: &str, v4: (u8, u8), v6: (u8, u8), word: u32, shift: u32) {
        let Some(last) = &self.last else { return };
        let mut original = last.bytes.clone();
        let header = if self.rig.client.is_ipv4() { 20 } else { 40 };
        let seq = u32::from_be_bytes(original[header + 4..header + 8].try_into().expect("four bytes"));
        original[header + 4..header + 8].copy_from_slice(&seq.wrapping_add(shift).to_be_bytes());
        let (kind, code) = if self.rig.client.is_ipv4() { v4 } else { v6 };
        let packet = icmp_error(self.rig.client, self.rig.server, kind, code, word, &original);
        self.rig.inject(&packet);
        self.take_down(what, false, 0);
    }

    /// Has the program do something; its answer is part of the transcript.
    pub fn call(&mut self, command: &str) {
        let answer = self.rig.call(command);
        self.take_down(&format!("{command}: {answer}"), false, 0);
    }

    /// The program is about to connect, nobody knows from which port.
    pub fn expect_any_port(&mut self) {
        self.ports.1 = None;
    }

    /// Takes down something that no packet tells.
    pub fn note(&mut self, what: &str) {
        self.steps.push(Step { what: what.to_owned(), answers: Vec::new() });
    }

    /// Waits for so many answers that a timer brings.
    pub fn wait(&mut self, what: &str, count: usize) {
        self.take_down(what, false, count);
    }

    fn take_down(&mut self, what: &str, repeats_count: bool, least: usize) {
        let least =
            least.max(self.expected.as_ref().and_then(|counts| counts.get(self.steps.len())).copied().unwrap_or(0));
        let (client, ports, seen) = (self.rig.client, self.ports, self.seen.clone());
        let found = self.rig.collect(least, PATIENCE, |answer| {
            answer.destination == client && is_of(ports, answer) && !is_repeated(answer, &seen, repeats_count)
        });
        self.take_down_found(what, repeats_count, found);
    }

    fn take_down_found(&mut self, what: &str, repeats_count: bool, found: Vec<Answer>) {
        let (client, ports) = (self.rig.client, self.ports);
        let mut answers: Vec<String> = Vec::new();
        for answer in found {
            let ours = answer.destination == client && is_of(ports, &answer);
            if !ours || is_repeated(&answer, &self.seen, repeats_count) {
                continue;
            }
            let line = self.describe(&answer);
            self.last = Some(answer);
            if answers.last() != Some(&line) {
                answers.push(line);
            }
        }
        self.steps.push(Step { what: what.to_owned(), answers });
    }

    fn describe(&mut self, answer: &Answer) -> String {
        match &answer.kind {
            Kind::Tcp(tcp) => {
                self.seen.extend(key(tcp));
                self.describe_tcp(tcp)
            }
            Kind::EchoReply(_) => "echo reply".to_owned(),
            Kind::Icmp(kind, code) => format!("ICMP {kind}/{code}"),
            Kind::Other(protocol) => format!("protocol {protocol}"),
        }
    }

    fn describe_tcp(&mut self, tcp: &Tcp) -> String {
        if self.ports.1.is_none() {
            self.server_port = tcp.source_port;
            self.ports.1 = Some(tcp.source_port);
        }
        if tcp.flags & SYN != 0 {
            self.server_isn = Some(tcp.seq);
        }
        // Where Linux sets PSH beside the end of what was written depends on how its buffers happen to be cut.
        let letters = "FSR-AUEC".chars().enumerate().filter(|&(_, letter)| letter != '-');
        let mut text: String = letters.filter(|(bit, _)| tcp.flags & 1 << bit != 0).map(|(_, letter)| letter).collect();
        let base = self.server_isn.unwrap_or(GUESS);
        let seq = if tcp.seq == 0 && tcp.flags & RST != 0 { 0 } else { distance(base, tcp.seq) };
        text += &format!(" seq {seq}");
        if tcp.flags & ACK != 0 {
            text += &format!(" ack {}", distance(ISN, tcp.ack));
        }
        if tcp.payload > 0 {
            text += &format!(" len {}", tcp.payload);
        }
        if tcp.window == 0 && tcp.flags & RST == 0 {
            text += " shut";
        }
        let options = &tcp.options;
        if let Some(mss) = options.mss {
            // As if every header were IPv4's.
            let mss = if self.rig.client.is_ipv4() { mss } else { mss + 20 };
            text += &format!(" mss {mss}");
        }
        if options.sack_permitted {
            text += " sackok";
        }
        if options.scale.is_some() {
            text += " scale";
        }
        if let Some((value, echo)) = options.timestamps {
            self.server_clock = value;
            text += &match echo {
                0 => " ts".to_owned(),
                echo => format!(" ts echo {}", distance(CLOCK, echo)),
            };
        }
        for &(left, right) in &options.sack {
            text += &format!(" sack {}-{}", distance(ISN, left), distance(ISN, right));
        }
        if !options.unknown.is_empty() {
            text += &format!(" options {:?}", options.unknown);
        }
        if tcp.traffic_class & 3 != 0 {
            text += &format!(" ecn {}", tcp.traffic_class & 3);
        }
        text
    }
}

/// What a retransmission has in common with its original; `None` for what occupies no sequence space.
fn key(tcp: &Tcp) -> Option<(u32, u8, usize)> {
    // Whether data was pushed, or a FIN rides on it, may be another the second time.
    (tcp.payload > 0 || tcp.flags & (SYN | FIN) != 0).then_some((tcp.seq, tcp.flags & SYN, tcp.payload))
}

fn is_of((client, server): (u16, Option<u16>), answer: &Answer) -> bool {
    match &answer.kind {
        Kind::Tcp(tcp) => {
            tcp.destination_port == client && server.is_none_or(|port| port == tcp.source_port || tcp.flags & RST != 0)
        }
        _ => true,
    }
}

fn is_repeated(answer: &Answer, seen: &HashSet<(u32, u8, usize)>, repeats_count: bool) -> bool {
    match &answer.kind {
        Kind::Tcp(tcp) if !repeats_count => key(tcp).is_some_and(|key| seen.contains(&key)),
        _ => false,
    }
}

pub fn timestamps(value: u32, echo: u32) -> Vec<u8> {
    let mut bytes = vec![1, 1, 8, 10];
    bytes.extend(value.to_be_bytes());
    bytes.extend(echo.to_be_bytes());
    bytes
}

/// A SACK option relative to the server's beginning can't be known here, so it takes absolute numbers from it.
pub fn sack(case: &Case<'_>, blocks: &[(i64, i64)]) -> Vec<u8> {
    let base = case.server_isn.unwrap_or(GUESS);
    let mut bytes = vec![1, 1, 5, u8::try_from(2 + 8 * blocks.len()).expect("few blocks")];
    for &(left, right) in blocks {
        bytes.extend(at(base, left).to_be_bytes());
        bytes.extend(at(base, right).to_be_bytes());
    }
    bytes
}

fn at(base: u32, offset: i64) -> u32 {
    // Wrapping on purpose: sequence numbers do.
    base.wrapping_add(offset as u32)
}

fn distance(from: u32, to: u32) -> i32 {
    to.wrapping_sub(from).cast_signed()
}
