//! The bytes of rtnetlink: messages, and the attributes in them.

use std::net::IpAddr;

use super::{Counters, Hop, Link, NLM_F_ACK, NLM_F_CREATE, Route};

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_EXCL: u16 = 0x200;
const NTF_PROXY: u8 = 0x08;
const NUD_PERMANENT: u16 = 0x80;
const NDA_DST: u16 = 1;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

pub(super) struct MessageHeader {
    pub(super) kind: u16,
    pub(super) sequence: u32,
}

/// The first message, its body, and what follows it.
pub(super) fn split_message(bytes: &[u8]) -> Option<(MessageHeader, &[u8], &[u8])> {
    let length = usize::try_from(word(bytes, 0)?).ok()?;
    let body = bytes.get(HEADER..length)?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let header = MessageHeader { kind, sequence: word(bytes, 8)? };
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((header, body, next))
}

pub(super) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

pub(super) fn parse_link(body: &[u8]) -> Option<Link> {
    let hardware = u16::from_ne_bytes(body.get(2..4)?.try_into().ok()?);
    let index = word(body, 4)?;
    let up = word(body, 8)? & libc::IFF_UP as u32 != 0;
    let mut name = None;
    let mut address = None;
    let mut counters = Counters::default();
    let mut mtu = 0;
    for (kind, value) in Attributes(body.get(16..)?) {
        if kind == libc::IFLA_IFNAME {
            let text = value.strip_suffix(&[0]).unwrap_or(value);
            name = Some(String::from_utf8_lossy(text).into_owned());
        } else if kind == libc::IFLA_ADDRESS {
            address = <[u8; 6]>::try_from(value).ok();
        } else if kind == libc::IFLA_STATS64 {
            counters = parse_counters(value)?;
        } else if kind == libc::IFLA_MTU {
            mtu = word(value, 0)?;
        }
    }
    let ethernet = address.filter(|_| hardware == libc::ARPHRD_ETHER);
    Some(Link { index, name: name?, ethernet, up, mtu, counters })
}

/// The first fields of `struct rtnl_link_stats64`.
pub(super) fn parse_counters(value: &[u8]) -> Option<Counters> {
    let field = |number: usize| Some(u64::from_ne_bytes(value.get(number * 8..number * 8 + 8)?.try_into().ok()?));
    Some(Counters {
        received_packets: field(0)?,
        sent_packets: field(1)?,
        received_bytes: field(2)?,
        sent_bytes: field(3)?,
    })
}

/// A request for a new device of the kind that `info` (the content of IFLA_LINKINFO) tells.
pub(super) fn new_link(name: &str, info: &[u8]) -> Request {
    let mut request = Request::new(libc::RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &[0; 16]);
    request.attribute(libc::IFLA_IFNAME, &terminated(name));
    request.attribute(libc::IFLA_LINKINFO, info);
    request
}

pub(super) fn terminated(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

pub(super) fn encode_attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut request = Request(Vec::new());
    request.attribute(kind, value);
    request.0
}

struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?);
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

pub(super) struct Request(pub(super) Vec<u8>);

impl Request {
    pub(super) fn new(kind: u16, flags: u16, body: &[u8]) -> Request {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(body);
        Request(bytes)
    }

    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).expect("attributes here are a few bytes");
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    pub(super) fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).expect("requests here are a few hundred bytes");
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

pub(super) fn route_request(kind: u16, flags: u16, route: Route, hop: Option<Hop>) -> Request {
    let mut body = [0; 12];
    body[0] = family(route.destination);
    body[1] = route.prefix_length;
    body[4] = libc::RT_TABLE_MAIN;
    // What is being deleted may be of any scope, protocol and type.
    body[6] = libc::RT_SCOPE_NOWHERE;
    if let Some(hop) = hop {
        body[5] = libc::RTPROT_STATIC;
        body[6] = match hop {
            Hop::Device(_) => libc::RT_SCOPE_LINK,
            Hop::Gateway(_) => libc::RT_SCOPE_UNIVERSE,
        };
        body[7] = libc::RTN_UNICAST;
    }
    let mut request = Request::new(kind, flags, &body);
    request.attribute(libc::RTA_DST, &octets(route.destination));
    // In IPv4 a deletion without the attribute takes the first metric that matches; zero is said by leaving it out.
    if route.metric != 0 {
        request.attribute(libc::RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    request
}

pub(super) fn proxy_request(kind: u16, flags: u16, index: u32, address: IpAddr) -> Request {
    let mut body = [0; 12];
    body[0] = family(address);
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    body[10] = NTF_PROXY;
    let mut request = Request::new(kind, flags, &body);
    request.attribute(NDA_DST, &octets(address));
    request
}

pub(super) fn family(address: IpAddr) -> u8 {
    // Both are below 256.
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_message_is_no_message() {
        assert!(split_message(&[0; 15]).is_none());
        assert!(split_message(&[255; 64]).is_none());
        // A length shorter than the header itself would never move on.
        assert!(split_message(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_none());
        assert_eq!(Attributes(&[2, 0, 1, 0]).count(), 0);
    }
}
