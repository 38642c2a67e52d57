//! What isn't TCP: packets for the driver, echo in fragments, errors within their limits, and all of it across a thaw.

mod harness;

use std::net::IpAddr;
use std::time::Duration;

use harness::config;
use netstack::{Checksum, Config, Handled, Instant, RxPacket, Secrets, Stack};

const NOW: Instant = Instant::from_millis(1000);
const OWN: [&str; 2] = ["10.0.0.1", "fd00::1"];
const PEERS: [&str; 2] = ["10.0.0.2", "fd00::2"];
const UDP: u8 = 17;

fn stack(foreign: bool) -> Stack {
    let addresses = OWN.iter().map(|text| text.parse().unwrap()).collect();
    Stack::new(Config { addresses, foreign, ..config(OWN[0]) }, Secrets([7; 32]), NOW)
}

/// An IP packet from a peer; `v6` says of which family.
fn packet(v6: bool, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let octets = |text: &str| match text.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let ends = [octets(PEERS[usize::from(v6)]), octets(OWN[usize::from(v6)])].concat();
    let mut packet = if v6 {
        let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
        [&[0x60, 0, 0, 0, length[0], length[1], protocol, 64][..], &ends].concat()
    } else {
        let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
        let mut header = [&[0x45, 0, length[0], length[1], 0, 9, 0, 0, 64, protocol, 0, 0][..], &ends].concat();
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum);
        header
    };
    packet.extend_from_slice(payload);
    packet
}

fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// An echo request with its checksum.
fn echo(v6: bool, len: usize) -> Vec<u8> {
    let mut message = vec![if v6 { 128 } else { 8 }, 0, 0, 0, 0, 1, 0, 2];
    message.extend((0..len).map(|at| (at % 251) as u8));
    let empty = packet(v6, 58, &[]);
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let pseudo = if v6 { [&empty[8..40], &length, &[0, 0, 0, 58]].concat() } else { Vec::new() };
    let sum = checksum(&[&pseudo, &message]);
    message[2..4].copy_from_slice(&sum);
    packet(v6, if v6 { 58 } else { 1 }, &message)
}

/// The pieces of a packet, each with 1,000 bytes.
fn cut(packet: &[u8]) -> Vec<Vec<u8>> {
    let v6 = packet[0] >> 4 == 6;
    let (header, payload) = packet.split_at(if v6 { 40 } else { 20 });
    let count = payload.chunks(1000).len();
    let piece = |(number, piece): (usize, &[u8])| {
        let more = u16::from(number + 1 < count);
        let at = u16::try_from(number * 1000 / 8).unwrap();
        let mut packet = header.to_vec();
        if v6 {
            packet.extend_from_slice(&[packet[6], 0]);
            packet.extend_from_slice(&(at << 3 | more).to_be_bytes());
            packet.extend_from_slice(&[0, 0, 0, 5]);
            packet[6] = 44;
        } else {
            packet[6..8].copy_from_slice(&(more << 13 | at).to_be_bytes());
        }
        packet.extend_from_slice(piece);
        let length = u16::try_from(if v6 { packet.len() - 40 } else { packet.len() }).unwrap().to_be_bytes();
        if v6 {
            packet[4..6].copy_from_slice(&length);
        } else {
            packet[2..4].copy_from_slice(&length);
            packet[10..12].fill(0);
            let sum = checksum(&[&packet[..20]]);
            packet[10..12].copy_from_slice(&sum);
        }
        packet
    };
    payload.chunks(1000).enumerate().map(piece).collect()
}

fn give(stack: &mut Stack, packet: &[u8]) -> Handled {
    stack.handle_packet(NOW, RxPacket { data: packet, checksum: Checksum::Verify, gso_size: None })
}

fn sent(stack: &mut Stack, now: Instant) -> Vec<Vec<u8>> {
    std::iter::from_fn(|| stack.poll_transmit(now).map(|packet| packet.to_vec())).collect()
}

fn thawed(stack: &Stack) -> Stack {
    let image = rmp_serde::to_vec_named(&stack.freeze(NOW)).expect("it can be written");
    let image = rmp_serde::from_slice(&image).expect("it can be read");
    Stack::thaw(image, NOW, stack.config().clone()).expect("it fits")
}

#[test]
fn what_is_not_tcp_is_the_drivers() {
    for v6 in [false, true] {
        let mut stack = stack(true);
        let datagram = packet(v6, UDP, &[0; 100]);
        assert_eq!(give(&mut stack, &datagram), Handled::Foreign);
        // So is an answer to an echo request that wasn't the stack's, and a complaint about a datagram.
        let mut answer = echo(v6, 10);
        answer[if v6 { 40 } else { 20 }] = if v6 { 129 } else { 0 };
        assert_eq!(give(&mut stack, &answer), Handled::Foreign);
        // But not what isn't for this host.
        let mut stray = datagram.clone();
        let last = if v6 { 39 } else { 19 };
        stray[last] ^= 0x40;
        assert_eq!(give(&mut stack, &stray), Handled::Taken);
        assert_eq!(sent(&mut stack, NOW), Vec::<Vec<u8>>::new());
    }
}

/// Also when the stack is frozen and thawed between any two pieces.
#[test]
fn the_driver_gets_datagrams_whole() {
    for v6 in [false, true] {
        let mut stack = stack(true);
        let datagram = packet(v6, UDP, &vec![3; 5000]);
        for piece in cut(&datagram).iter().rev() {
            assert_eq!(stack.poll_foreign(), None);
            assert_eq!(give(&mut stack, piece), Handled::Taken);
            stack = thawed(&stack);
        }
        let whole = stack.poll_foreign().expect("all of it has come");
        let start = if v6 { 40 } else { 20 };
        assert_eq!((whole.len(), &whole[start..]), (datagram.len(), &datagram[start..]));
        assert_eq!(stack.poll_foreign(), None);
        assert_eq!(stack.poll_timeout(), None, "nothing is left of it");
    }
}

/// A request longer than a packet is answered in packets that fit the link.
#[test]
fn long_echo_requests_are_answered_in_pieces() {
    for v6 in [false, true] {
        let mut stack = stack(false);
        let request = echo(v6, 4000);
        for piece in cut(&request) {
            give(&mut stack, &piece);
        }
        let mut answers = sent(&mut stack, NOW);
        assert!(answers.len() > 1 && answers.iter().all(|answer| answer.len() <= 1500));
        // A stack with the peer's address puts them together.
        let peer = PEERS[usize::from(v6)].parse().unwrap();
        let mut other =
            Stack::new(Config { addresses: vec![peer], foreign: true, ..config(PEERS[0]) }, Secrets([8; 32]), NOW);
        answers.reverse();
        for answer in answers {
            assert_eq!(give(&mut other, &answer), Handled::Taken);
        }
        let whole = other.poll_foreign().expect("the whole answer");
        let start = if v6 { 40 } else { 20 };
        assert_eq!(whole[start + 4..], request[start + 4..]);
        assert_eq!(whole[start], if v6 { 129 } else { 0 });
    }
}

/// RFC 1122 (4.1.3.1) and RFC 1812 (4.3.2.8): what nobody wants is refused, but not without end, and the limit moves along.
#[test]
fn refusals_are_limited() {
    for v6 in [false, true] {
        let mut stack = stack(false);
        let datagram = packet(v6, UDP, &[0; 100]);
        for _ in 0..100 {
            assert_eq!(give(&mut stack, &datagram), Handled::Taken);
        }
        let errors = sent(&mut stack, NOW);
        assert_eq!(errors.len(), 6);
        let (start, kind) = if v6 { (40, [1, 4]) } else { (20, [3, 3]) };
        assert!(
            errors.iter().all(|error| error[start..start + 2] == kind && error[start + 8..].starts_with(&datagram))
        );
        let mut stack = thawed(&stack);
        give(&mut stack, &datagram);
        assert_eq!(sent(&mut stack, NOW).len(), 0);
    }
}

/// RFC 792, RFC 8200 (4.5): who sent the start of a datagram learns that the rest never came.
#[test]
fn what_stays_incomplete_is_told_to_its_sender() {
    for (v6, seconds, kind) in [(false, 30, [11, 1]), (true, 60, [3, 1])] {
        let mut stack = stack(true);
        let pieces = cut(&packet(v6, UDP, &vec![3; 5000]));
        give(&mut stack, &pieces[0]);
        let due = stack.poll_timeout().expect("it won't be kept for ever");
        assert_eq!(due.since(NOW), Duration::from_secs(seconds));
        let mut stack = thawed(&stack);
        stack.handle_timeout(due);
        let errors = sent(&mut stack, due);
        assert_eq!(errors.len(), 1);
        let start = if v6 { 40 } else { 20 };
        assert_eq!(errors[0][start..start + 2], kind);
        assert!(pieces[0].starts_with(&errors[0][start + 8..]));
        assert_eq!(stack.poll_timeout(), None);
    }
}

/// A TCP segment may come in fragments as anything else: a SYN to a closed port is refused.
#[test]
fn segments_may_come_in_pieces() {
    let mut stack = stack(true);
    let mut segment = vec![0u8; 1200];
    segment[..4].copy_from_slice(&[0x10, 0, 0, 80]);
    segment[12..14].copy_from_slice(&[0x50, 2]);
    let whole = packet(false, 6, &segment);
    let pseudo = [&whole[12..20], &[0, 6], &1200u16.to_be_bytes()].concat();
    let sum = checksum(&[&pseudo, &segment]);
    segment[16..18].copy_from_slice(&sum);
    for piece in cut(&packet(false, 6, &segment)) {
        assert_eq!(give(&mut stack, &piece), Handled::Taken);
    }
    let answers = sent(&mut stack, NOW);
    assert_eq!(answers.len(), 1);
    assert_eq!((answers[0][9], answers[0][20 + 13] & 4), (6, 4), "a reset");
}
