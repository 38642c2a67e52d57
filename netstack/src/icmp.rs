//! ICMP and ICMPv6: echo, and the errors that tell about connections. Read and written through smoltcp's packet views.

use std::net::IpAddr;

use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, Icmpv6Message, Icmpv6Packet};

use crate::ip::{self, Datagram, protocol};

/// What an ICMP packet asks or tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    /// To be sent back.
    Echo(&'a [u8]),
    /// A packet of this host didn't arrive.
    Failed(Failure<'a>),
}

/// Why a packet didn't arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure<'a> {
    pub(crate) reason: Reason,
    /// The start of the packet, IP header first.
    pub(crate) original: &'a [u8],
}

/// The reasons that matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// No route to the host.
    Host,
    /// No route to its network.
    Network,
    /// Nobody listens.
    Port,
    /// The host doesn't know the protocol.
    Protocol,
    /// Forbidden.
    Prohibited,
    /// Larger than this many bytes may be (zero if unknown).
    TooBig(usize),
    /// A header was wrong.
    Parameter,
}

/// Reads an ICMP packet.
pub(crate) fn parse<'a>(datagram: &Datagram<'a>, verify: bool) -> Option<Message<'a>> {
    match datagram.protocol {
        protocol::ICMP => parse_v4(datagram.payload),
        protocol::ICMPV6 => parse_v6(datagram, verify),
        _ => None,
    }
}

fn parse_v4(payload: &[u8]) -> Option<Message<'_>> {
    let packet = Icmpv4Packet::new_checked(payload).ok()?;
    // ICMPv4's checksum is never left to a device.
    if !packet.verify_checksum() {
        return None;
    }
    let original = payload.get(8..)?;
    let reason = match packet.msg_type() {
        Icmpv4Message::EchoRequest => return Some(Message::Echo(payload)),
        Icmpv4Message::DstUnreachable => match packet.msg_code() {
            0 | 6 | 11 => Reason::Network,
            1 | 5 | 7 | 8 | 12 => Reason::Host,
            2 => Reason::Protocol,
            3 => Reason::Port,
            4 => Reason::TooBig(usize::from(u16::from_be_bytes([*payload.get(6)?, *payload.get(7)?]))),
            _ => Reason::Prohibited,
        },
        Icmpv4Message::ParamProblem => Reason::Parameter,
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2.2
        //# Source Quench TCP implementations MUST silently discard any received ICMP Source Quench messages (MUST-55).
        Icmpv4Message::TimeExceeded => Reason::Host,
        _ => return None,
    };
    Some(Message::Failed(Failure { reason, original }))
}

fn parse_v6<'a>(datagram: &Datagram<'a>, verify: bool) -> Option<Message<'a>> {
    let payload = datagram.payload;
    let packet = Icmpv6Packet::new_checked(payload).ok()?;
    if verify {
        let pseudo = ip::pseudo_header_sum(datagram.source, datagram.destination, protocol::ICMPV6, payload.len());
        if ip::internet_checksum(pseudo, &[payload]) != 0 {
            return None;
        }
    }
    let original = payload.get(8..)?;
    let reason = match packet.msg_type() {
        Icmpv6Message::EchoRequest => return Some(Message::Echo(payload)),
        Icmpv6Message::DstUnreachable => match packet.msg_code() {
            0 => Reason::Network,
            4 => Reason::Port,
            1 | 5 | 6 => Reason::Prohibited,
            _ => Reason::Host,
        },
        Icmpv6Message::PktTooBig => Reason::TooBig(
            usize::try_from(u32::from_be_bytes(payload.get(4..8)?.try_into().ok()?)).unwrap_or(usize::MAX),
        ),
        Icmpv6Message::ParamProblem => Reason::Parameter,
        Icmpv6Message::TimeExceeded => Reason::Host,
        _ => return None,
    };
    Some(Message::Failed(Failure { reason, original }))
}

/// The answer to an echo request, as a whole packet from `local` to `remote`.
pub(crate) fn echo_reply(local: IpAddr, remote: IpAddr, request: &[u8], traffic_class: u8) -> Vec<u8> {
    let mut message = request.to_vec();
    if let Some(kind) = message.first_mut() {
        *kind = if local.is_ipv4() { 0 } else { 129 };
    }
    packet(local, remote, message, traffic_class)
}

/// "Port unreachable" or "protocol unreachable" for the packet `original`, as a whole packet.
pub(crate) fn unreachable(local: IpAddr, remote: IpAddr, original: &[u8], port: bool) -> Vec<u8> {
    let (kind, code) = match (local, port) {
        (IpAddr::V4(_), true) => (3, 3),
        (IpAddr::V4(_), false) => (3, 2),
        (IpAddr::V6(_), true) => (1, 4),
        // Parameter problem, unrecognized next header, which the fixed header names at offset 6.
        (IpAddr::V6(_), false) => (4, 1),
    };
    error(local, remote, original, (kind, code), u32::from(kind == 4) * 6)
}

/// "Fragment reassembly time exceeded" (RFC 792; RFC 4443, 3.3).
pub(crate) fn reassembly_time_exceeded(local: IpAddr, remote: IpAddr, original: &[u8]) -> Vec<u8> {
    error(local, remote, original, if local.is_ipv4() { (11, 1) } else { (3, 1) }, 0)
}

/// "Parameter problem, erroneous header field" of an IPv6 packet (RFC 4443, 3.4).
pub(crate) fn parameter_problem(local: IpAddr, remote: IpAddr, original: &[u8], pointer: u32) -> Vec<u8> {
    error(local, remote, original, (4, 0), pointer)
}

fn error(local: IpAddr, remote: IpAddr, original: &[u8], (kind, code): (u8, u8), parameter: u32) -> Vec<u8> {
    // RFC 1812 (4.3.2.3): as much of the original as fits 576 bytes; RFC 4443 (2.4 c): 1280.
    let most = if local.is_ipv4() { 576 - 28 } else { 1280 - 48 };
    let mut message = vec![kind, code, 0, 0];
    message.extend_from_slice(&parameter.to_be_bytes());
    message.extend_from_slice(&original[..original.len().min(most)]);
    packet(local, remote, message, 0)
}

fn packet(local: IpAddr, remote: IpAddr, mut message: Vec<u8>, traffic_class: u8) -> Vec<u8> {
    let header = ip::Header {
        source: local,
        destination: remote,
        protocol: if local.is_ipv4() { protocol::ICMP } else { protocol::ICMPV6 },
        hop_limit: 64,
        traffic_class,
        identification: 0,
        flow_label: 0,
    };
    message[2..4].fill(0);
    let pseudo = match local {
        IpAddr::V4(_) => 0,
        IpAddr::V6(_) => ip::pseudo_header_sum(local, remote, protocol::ICMPV6, message.len()),
    };
    let sum = ip::internet_checksum(pseudo, &[&message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0; header.len()];
    header.write(&mut packet, message.len());
    packet.extend_from_slice(&message);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn echo_comes_back_both_ways() {
        for (local, remote, kind) in [("10.0.0.1", "10.0.0.2", 8u8), ("fd00::1", "fd00::2", 128)] {
            let (local, remote): (IpAddr, IpAddr) = (local.parse().unwrap(), remote.parse().unwrap());
            let request = packet(remote, local, vec![kind, 0, 0, 0, 1, 2, 3, 4, b'h', b'i', b'!'], 0);
            let datagram = ip::parse(&request, true).expect("well-formed");
            let Some(Message::Echo(body)) = parse(&datagram, true) else { panic!("not an echo") };
            let reply = echo_reply(local, remote, body, 0);
            let datagram = ip::parse(&reply, true).expect("well-formed");
            assert_eq!((datagram.source, datagram.destination), (local, remote));
            assert_eq!(&datagram.payload[4..], &[1, 2, 3, 4, b'h', b'i', b'!']);
            assert_eq!(datagram.payload[0], if kind == 8 { 0 } else { 129 });
        }
    }

    #[test]
    fn errors_carry_the_original() {
        let (local, remote): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let error = unreachable(local, remote, &[0x45; 700], true);
        let datagram = ip::parse(&error, true).expect("well-formed");
        let Some(Message::Failed(failure)) = parse(&datagram, true) else { panic!("not an error") };
        assert_eq!(failure.reason, Reason::Port);
        assert_eq!(failure.original.len(), 548);
    }
}
