//! Packets to be injected, and what is to be compared of packets that come back.

use std::net::IpAddr;

use pnet::packet::icmp::{IcmpTypes, echo_request};
use pnet::packet::icmpv6::{Icmpv6Types, MutableIcmpv6Packet};
use pnet::packet::ip::{IpNextHeaderProtocol, IpNextHeaderProtocols};
use pnet::packet::ipv4::{Ipv4Packet, MutableIpv4Packet};
use pnet::packet::ipv6::{Ipv6Packet, MutableIpv6Packet};
use pnet::packet::tcp::{MutableTcpPacket, TcpPacket, ipv4_checksum, ipv6_checksum};
use pnet::packet::{MutablePacket, Packet, icmp, icmpv6};

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;
pub const URG: u8 = 0x20;
pub const ECE: u8 = 0x40;
pub const CWR: u8 = 0x80;

/// A segment to be injected; numbers are as on the wire.
#[derive(Clone, Debug, Default)]
pub struct Segment {
    pub source_port: u16,
    pub destination_port: u16,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    pub urgent: u16,
    /// As they are, padded with zeros to a multiple of four.
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
    /// Instead of the true length of the header, in words.
    pub data_offset: Option<u8>,
    pub bad_checksum: bool,
}

impl Segment {
    pub fn encode(&self, source: IpAddr, destination: IpAddr) -> Vec<u8> {
        let mut options = self.options.clone();
        options.resize(options.len().next_multiple_of(4), 0);
        let header = 20 + options.len();
        let mut bytes = vec![0; header + self.payload.len()];
        bytes[20..header].copy_from_slice(&options);
        bytes[header..].copy_from_slice(&self.payload);
        let mut packet = MutableTcpPacket::new(&mut bytes).expect("long enough");
        packet.set_source(self.source_port);
        packet.set_destination(self.destination_port);
        packet.set_sequence(self.seq);
        packet.set_acknowledgement(self.ack);
        packet.set_data_offset(self.data_offset.unwrap_or(u8::try_from(header / 4).expect("at most 15 words")));
        packet.set_flags(self.flags);
        packet.set_window(self.window);
        packet.set_urgent_ptr(self.urgent);
        let packet = packet.to_immutable();
        let mut checksum = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => ipv4_checksum(&packet, &source, &destination),
            (IpAddr::V6(source), IpAddr::V6(destination)) => ipv6_checksum(&packet, &source, &destination),
            _ => unreachable!("addresses are of one family"),
        };
        if self.bad_checksum {
            checksum ^= 0x5a5a;
        }
        bytes[16..18].copy_from_slice(&checksum.to_be_bytes());
        in_ip(source, destination, IpNextHeaderProtocols::Tcp, &bytes, 0)
    }
}

/// Wraps a transport packet.
pub fn in_ip(
    source: IpAddr,
    destination: IpAddr,
    protocol: IpNextHeaderProtocol,
    payload: &[u8],
    traffic_class: u8,
) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut bytes = vec![0; 20 + payload.len()];
            let mut packet = MutableIpv4Packet::new(&mut bytes).expect("long enough");
            packet.set_version(4);
            packet.set_header_length(5);
            packet.set_dscp(traffic_class >> 2);
            packet.set_ecn(traffic_class & 3);
            packet.set_total_length(u16::try_from(20 + payload.len()).expect("short"));
            packet.set_identification(77);
            packet.set_ttl(64);
            packet.set_next_level_protocol(protocol);
            packet.set_source(source);
            packet.set_destination(destination);
            packet.payload_mut().copy_from_slice(payload);
            let checksum = pnet::packet::ipv4::checksum(&packet.to_immutable());
            packet.set_checksum(checksum);
            bytes
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut bytes = vec![0; 40 + payload.len()];
            let mut packet = MutableIpv6Packet::new(&mut bytes).expect("long enough");
            packet.set_version(6);
            packet.set_traffic_class(traffic_class);
            packet.set_payload_length(u16::try_from(payload.len()).expect("short"));
            packet.set_next_header(protocol);
            packet.set_hop_limit(64);
            packet.set_source(source);
            packet.set_destination(destination);
            packet.set_payload(payload);
            bytes
        }
        _ => unreachable!("addresses are of one family"),
    }
}

/// Cuts a packet into two fragments, the first with `first` bytes (a multiple of eight) of payload.
pub fn fragments(packet: &[u8], first: usize) -> [Vec<u8>; 2] {
    if packet[0] >> 4 == 4 {
        let payload = packet[20..].to_vec();
        [(0, first, true), (first, payload.len(), false)].map(|(from, to, more)| {
            let mut bytes = packet[..20].to_vec();
            bytes.extend(&payload[from..to]);
            let mut fragment = MutableIpv4Packet::new(&mut bytes).expect("long enough");
            fragment.set_total_length(u16::try_from(20 + to - from).expect("short"));
            fragment.set_flags(u8::from(more));
            fragment.set_fragment_offset(u16::try_from(from / 8).expect("short"));
            let checksum = pnet::packet::ipv4::checksum(&fragment.to_immutable());
            fragment.set_checksum(checksum);
            bytes
        })
    } else {
        let payload = packet[40..].to_vec();
        [(0, first, true), (first, payload.len(), false)].map(|(from, to, more)| {
            let mut bytes = packet[..40].to_vec();
            let next = std::mem::replace(&mut bytes[6], 44);
            let offset = u16::try_from(from).expect("short") | u16::from(more);
            bytes.extend([next, 0]);
            bytes.extend(offset.to_be_bytes());
            bytes.extend(77u32.to_be_bytes());
            bytes.extend(&payload[from..to]);
            let length = u16::try_from(bytes.len() - 40).expect("short");
            bytes[4..6].copy_from_slice(&length.to_be_bytes());
            bytes
        })
    }
}

/// An ICMP error about `original`, a packet of `destination`'s. `word` is the second word of the header (the MTU).
pub fn icmp_error(source: IpAddr, destination: IpAddr, kind: u8, code: u8, word: u32, original: &[u8]) -> Vec<u8> {
    let mut body = vec![kind, code, 0, 0];
    body.extend(word.to_be_bytes());
    match (source, destination) {
        (IpAddr::V4(_), IpAddr::V4(_)) => {
            body.extend(&original[..original.len().min(28)]);
            let checksum = pnet::util::checksum(&body, 1);
            body[2..4].copy_from_slice(&checksum.to_be_bytes());
            in_ip(source, destination, IpNextHeaderProtocols::Icmp, &body, 0)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            body.extend(&original[..original.len().min(1200)]);
            let checksum = {
                let packet = icmpv6::Icmpv6Packet::new(&body).expect("long enough");
                icmpv6::checksum(&packet, &from, &to)
            };
            body[2..4].copy_from_slice(&checksum.to_be_bytes());
            in_ip(source, destination, IpNextHeaderProtocols::Icmpv6, &body, 0)
        }
        _ => unreachable!("addresses are of one family"),
    }
}

/// An echo request with this number.
pub fn echo(source: IpAddr, destination: IpAddr, number: u16) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(_), IpAddr::V4(_)) => {
            let mut bytes = vec![0; 16];
            let mut packet = echo_request::MutableEchoRequestPacket::new(&mut bytes).expect("long enough");
            packet.set_icmp_type(IcmpTypes::EchoRequest);
            packet.set_sequence_number(number);
            let checksum = icmp::checksum(&icmp::IcmpPacket::new(&bytes).expect("long enough"));
            bytes[2..4].copy_from_slice(&checksum.to_be_bytes());
            in_ip(source, destination, IpNextHeaderProtocols::Icmp, &bytes, 0)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut bytes = vec![0; 16];
            bytes[6..8].copy_from_slice(&number.to_be_bytes());
            let mut packet = MutableIcmpv6Packet::new(&mut bytes).expect("long enough");
            packet.set_icmpv6_type(Icmpv6Types::EchoRequest);
            let checksum = icmpv6::checksum(&packet.to_immutable(), &from, &to);
            packet.set_checksum(checksum);
            in_ip(source, destination, IpNextHeaderProtocols::Icmpv6, &bytes, 0)
        }
        _ => unreachable!("addresses are of one family"),
    }
}

/// A packet that came back.
#[derive(Clone, Debug)]
pub struct Answer {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub bytes: Vec<u8>,
    pub kind: Kind,
}

#[derive(Clone, Debug)]
pub enum Kind {
    Tcp(Tcp),
    EchoReply(u16),
    /// Type and code.
    Icmp(u8, u8),
    Other(u8),
}

/// What of a segment can be compared.
#[derive(Clone, Debug)]
pub struct Tcp {
    pub source_port: u16,
    pub destination_port: u16,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    pub options: Options,
    pub payload: usize,
    pub traffic_class: u8,
}

#[derive(Clone, Debug, Default)]
pub struct Options {
    pub mss: Option<u16>,
    pub sack_permitted: bool,
    pub scale: Option<u8>,
    pub timestamps: Option<(u32, u32)>,
    pub sack: Vec<(u32, u32)>,
    pub unknown: Vec<u8>,
}

impl Answer {
    /// `None` for what isn't a whole IP packet.
    pub fn parse(bytes: &[u8]) -> Option<Answer> {
        let (source, destination, protocol, payload, traffic_class): (IpAddr, IpAddr, _, Vec<u8>, u8) =
            match bytes.first()? >> 4 {
                4 => {
                    let packet = Ipv4Packet::new(bytes)?;
                    let class = packet.get_dscp() << 2 | packet.get_ecn();
                    let protocol = packet.get_next_level_protocol();
                    let payload = packet.payload().to_vec();
                    (packet.get_source().into(), packet.get_destination().into(), protocol, payload, class)
                }
                6 => {
                    let packet = Ipv6Packet::new(bytes)?;
                    let protocol = packet.get_next_header();
                    let payload = packet.payload().to_vec();
                    let class = packet.get_traffic_class();
                    (packet.get_source().into(), packet.get_destination().into(), protocol, payload, class)
                }
                _ => return None,
            };
        let kind = match protocol {
            IpNextHeaderProtocols::Tcp => Kind::Tcp(Tcp::parse(&payload, source, destination, traffic_class)?),
            IpNextHeaderProtocols::Icmp | IpNextHeaderProtocols::Icmpv6 => match (payload.first()?, payload.get(6..8)?)
            {
                (0 | 129, number) => Kind::EchoReply(u16::from_be_bytes([number[0], number[1]])),
                (&kind, _) => Kind::Icmp(kind, payload[1]),
            },
            other => Kind::Other(other.0),
        };
        Some(Answer { source, destination, bytes: bytes.to_vec(), kind })
    }
}

impl Tcp {
    fn parse(bytes: &[u8], source: IpAddr, destination: IpAddr, traffic_class: u8) -> Option<Tcp> {
        let packet = TcpPacket::new(bytes)?;
        let expected = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => ipv4_checksum(&packet, &source, &destination),
            (IpAddr::V6(source), IpAddr::V6(destination)) => ipv6_checksum(&packet, &source, &destination),
            _ => return None,
        };
        // In one's complement all ones and all zeros are the same number.
        let normal = |sum: u16| if sum == 0xffff { 0 } else { sum };
        assert_eq!(normal(packet.get_checksum()), normal(expected), "the checksum of an answer");
        let header = usize::from(packet.get_data_offset()) * 4;
        Some(Tcp {
            source_port: packet.get_source(),
            destination_port: packet.get_destination(),
            seq: packet.get_sequence(),
            ack: packet.get_acknowledgement(),
            flags: packet.get_flags(),
            window: packet.get_window(),
            options: Options::parse(bytes.get(20..header)?),
            payload: bytes.len() - header,
            traffic_class,
        })
    }
}

impl Options {
    fn parse(mut bytes: &[u8]) -> Options {
        let mut options = Options::default();
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().expect("four bytes"));
        while let Some(&kind) = bytes.first() {
            if kind < 2 {
                bytes = &bytes[1..];
                continue;
            }
            let length = usize::from(bytes[1]);
            let body = &bytes[2..length];
            match kind {
                2 => options.mss = Some(u16::from_be_bytes([body[0], body[1]])),
                3 => options.scale = Some(body[0]),
                4 => options.sack_permitted = true,
                5 => options.sack = body.chunks(8).map(|block| (word(&block[..4]), word(&block[4..]))).collect(),
                8 => options.timestamps = Some((word(&body[..4]), word(&body[4..8]))),
                other => options.unknown.push(other),
            }
            bytes = &bytes[length..];
        }
        options
    }
}
