//! The Internet layer: IPv4 and IPv6 headers, read and written through smoltcp's packet views.
//!
//! The views don't judge, so everything is checked here once and trusted afterwards. `Ipv4Repr` isn't used, since it
//! zeroes DSCP and ECN.

use std::net::{IpAddr, Ipv6Addr};

use smoltcp::wire::{IpProtocol, Ipv4Packet, Ipv6Packet, checksum};

/// Protocol numbers that matter here.
pub(crate) mod protocol {
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
    pub(crate) const ICMPV6: u8 = 58;
}

/// Congestion experienced, in the two low bits of TOS or traffic class (RFC 3168).
pub(crate) const ECN_CE: u8 = 0b11;
/// ECN-capable transport (0).
pub(crate) const ECN_ECT0: u8 = 0b10;

/// A piece of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub(crate) identification: u32,
    pub(crate) offset: usize,
    pub(crate) more: bool,
    /// Bytes before the piece that the whole datagram begins with as well: the IPv4 header, or all headers in front of the
    /// IPv6 fragment header.
    pub(crate) header_len: usize,
    /// Where among those the number of the protocol that follows stands.
    pub(crate) next_at: usize,
}

/// Length of the IPv6 fragment header.
pub(crate) const FRAGMENT_HEADER_LEN: usize = 8;

/// A datagram (or a piece of one) that was checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Datagram<'a> {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) traffic_class: u8,
    pub(crate) fragment: Option<Fragment>,
    pub(crate) payload: &'a [u8],
}

/// Reads an IP packet. `None` for one that is malformed; such packets are dropped silently.
pub(crate) fn parse(data: &[u8], verify: bool) -> Option<Datagram<'_>> {
    match data.first()? >> 4 {
        4 => parse_v4(data, verify),
        6 => parse_v6(data),
        _ => None,
    }
}

/// Whether these bytes are one packet with nothing behind it.
pub(crate) fn is_whole(data: &[u8]) -> bool {
    let word = |at: usize| data.get(at..at + 2).map(|bytes| usize::from(u16::from_be_bytes([bytes[0], bytes[1]])));
    let told = match data.first().map(|first| first >> 4) {
        Some(4) => word(2),
        Some(6) => word(4).map(|len| HEADER_LEN_V6 + len),
        _ => None,
    };
    told == Some(data.len()) && parse(data, false).is_some()
}

fn parse_v4(data: &[u8], verify: bool) -> Option<Datagram<'_>> {
    let packet = Ipv4Packet::new_checked(data).ok()?;
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2
    //# When received options are passed up to TCP from the IP layer, a TCP implementation MUST ignore options that it
    //# does not understand (MUST-50).
    let header_len = usize::from(packet.header_len());
    if header_len < 20 || (verify && !packet.verify_checksum()) {
        return None;
    }
    let fragment = (packet.more_frags() || packet.frag_offset() != 0).then(|| Fragment {
        identification: u32::from(packet.ident()),
        offset: usize::from(packet.frag_offset()),
        more: packet.more_frags(),
        header_len,
        next_at: 9,
    });
    Some(Datagram {
        source: IpAddr::V4(packet.src_addr()),
        destination: IpAddr::V4(packet.dst_addr()),
        protocol: packet.next_header().into(),
        traffic_class: packet.dscp() << 2 | packet.ecn(),
        fragment,
        payload: packet.payload(),
    })
}

/// Extension headers a packet may have before it is taken for an attack.
const EXTENSIONS_MAX: usize = 8;
/// The number of the fragment header.
const EXTENSION_FRAGMENT: u8 = 44;
const HEADER_LEN_V6: usize = 40;

fn parse_v6(data: &[u8]) -> Option<Datagram<'_>> {
    let packet = Ipv6Packet::new_checked(data).ok()?;
    let mut next: u8 = packet.next_header().into();
    let mut payload = packet.payload();
    let mut next_at = 6;
    for _ in 0..EXTENSIONS_MAX {
        let len = match next {
            // hop-by-hop, routing, destination options
            0 | 43 | 60 => {
                let len = 8 + 8 * usize::from(*payload.get(1)?);
                // A routing header with segments left is for a router, which this isn't (RFC 5095).
                if next == 43 && *payload.get(3)? != 0 {
                    return None;
                }
                len
            }
            EXTENSION_FRAGMENT => {
                let word = u16::from_be_bytes(payload.get(2..4)?.try_into().ok()?);
                let piece = Fragment {
                    identification: u32::from_be_bytes(payload.get(4..8)?.try_into().ok()?),
                    offset: usize::from(word & !7),
                    more: word & 1 != 0,
                    header_len: HEADER_LEN_V6 + packet.payload().len() - payload.len(),
                    next_at,
                };
                // An atomic fragment is a whole datagram (RFC 6946).
                if piece.more || piece.offset != 0 {
                    return Some(Datagram {
                        source: IpAddr::V6(packet.src_addr()),
                        destination: IpAddr::V6(packet.dst_addr()),
                        protocol: *payload.first()?,
                        traffic_class: packet.traffic_class(),
                        fragment: Some(piece),
                        payload: payload.get(FRAGMENT_HEADER_LEN..)?,
                    });
                }
                FRAGMENT_HEADER_LEN
            }
            _ => {
                return Some(Datagram {
                    source: IpAddr::V6(packet.src_addr()),
                    destination: IpAddr::V6(packet.dst_addr()),
                    protocol: next,
                    traffic_class: packet.traffic_class(),
                    fragment: None,
                    payload,
                });
            }
        };
        next = *payload.first()?;
        next_at = HEADER_LEN_V6 + packet.payload().len() - payload.len();
        payload = payload.get(len..)?;
    }
    None
}

/// Makes a packet of the headers that its fragments repeated (the first `header_len` bytes of `packet`) and their joined pieces.
/// False if it is too long for one.
pub(crate) fn make_whole(
    packet: &mut [u8],
    header_len: usize,
    next_at: usize,
    next: u8,
    congestion_mark: Option<u8>,
) -> bool {
    let (len, v6) = (packet.len(), packet.first().is_some_and(|first| first >> 4 == 6));
    let Ok(len) = u16::try_from(if v6 { len - HEADER_LEN_V6 } else { len }) else {
        return false;
    };
    let Some(header) = packet.get_mut(..header_len) else {
        return false;
    };
    if v6 {
        header[next_at] = next;
        let mut view = Ipv6Packet::new_unchecked(header);
        view.set_payload_len(len);
        if let Some(mark) = congestion_mark {
            let class = view.traffic_class();
            view.set_traffic_class(class | mark);
        }
    } else {
        let mut view = Ipv4Packet::new_unchecked(header);
        view.set_total_len(len);
        view.clear_flags();
        view.set_frag_offset(0);
        if let Some(mark) = congestion_mark {
            view.set_ecn(mark);
        }
        view.fill_checksum();
    }
    true
}

/// One fragment of a packet with the plain header `header`.
pub(crate) fn write_fragment(header: &[u8], piece: &[u8], identification: u32, offset: usize, more: bool) -> Vec<u8> {
    let mut packet = header.to_vec();
    let offset = u16::try_from(offset).unwrap_or(!7);
    if packet[0] >> 4 == 6 {
        packet.push(packet[6]);
        packet.push(0);
        packet.extend_from_slice(&(offset | u16::from(more)).to_be_bytes());
        packet.extend_from_slice(&identification.to_be_bytes());
        packet.extend_from_slice(piece);
        let len = u16::try_from(packet.len() - HEADER_LEN_V6).unwrap_or(u16::MAX);
        packet[6] = EXTENSION_FRAGMENT;
        Ipv6Packet::new_unchecked(&mut packet).set_payload_len(len);
    } else {
        packet.extend_from_slice(piece);
        let len = u16::try_from(packet.len()).unwrap_or(u16::MAX);
        let mut view = Ipv4Packet::new_unchecked(&mut packet);
        view.set_total_len(len);
        view.clear_flags();
        view.set_more_frags(more);
        view.set_frag_offset(offset);
        view.set_ident((identification & 0xffff) as u16);
        view.fill_checksum();
    }
    packet
}

/// A header to write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) hop_limit: u8,
    pub(crate) traffic_class: u8,
    pub(crate) identification: u16,
    pub(crate) flow_label: u32,
}

impl Header {
    /// Bytes the header takes.
    pub(crate) const fn len(&self) -> usize {
        header_len(self.destination)
    }

    /// Writes the header for `payload_len` bytes of payload into the start of `buffer`.
    pub(crate) fn write(&self, buffer: &mut [u8], payload_len: usize) {
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let total = u16::try_from(20 + payload_len).unwrap_or(u16::MAX);
                buffer[..20].fill(0);
                let mut packet = Ipv4Packet::new_unchecked(&mut buffer[..20]);
                packet.set_version(4);
                packet.set_header_len(20);
                packet.set_dscp(self.traffic_class >> 2);
                packet.set_ecn(self.traffic_class & 3);
                packet.set_total_len(total);
                packet.set_ident(self.identification);
                //= https://www.rfc-editor.org/rfc/rfc1191#section-3
                //# Segments carry the don't-fragment bit.
                packet.set_dont_frag(true);
                packet.set_hop_limit(self.hop_limit);
                packet.set_next_header(IpProtocol::from(self.protocol));
                packet.set_src_addr(source);
                packet.set_dst_addr(destination);
                packet.fill_checksum();
            }
            (source, destination) => {
                buffer[..40].fill(0);
                let mut packet = Ipv6Packet::new_unchecked(&mut buffer[..40]);
                packet.set_version(6);
                packet.set_traffic_class(self.traffic_class);
                packet.set_flow_label(self.flow_label);
                packet.set_payload_len(u16::try_from(payload_len).unwrap_or(u16::MAX));
                packet.set_next_header(IpProtocol::from(self.protocol));
                packet.set_hop_limit(self.hop_limit);
                packet.set_src_addr(v6(source));
                packet.set_dst_addr(v6(destination));
            }
        }
    }
}

/// Length of the header of packets to `destination`.
pub(crate) const fn header_len(destination: IpAddr) -> usize {
    match destination {
        IpAddr::V4(_) => 20,
        IpAddr::V6(_) => 40,
    }
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V6(address) => address,
        IpAddr::V4(address) => address.to_ipv6_mapped(),
    }
}

/// The address with an IPv4 one freed from its IPv6-mapped form.
pub(crate) fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// Sum of the pseudo header, not complemented.
pub(crate) fn pseudo_header_sum(source: IpAddr, destination: IpAddr, protocol: u8, len: usize) -> u16 {
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            checksum::pseudo_header_v4(&source, &destination, IpProtocol::from(protocol), len)
        }
        (source, destination) => {
            checksum::pseudo_header_v6(&v6(source), &v6(destination), IpProtocol::from(protocol), len)
        }
    }
}

/// The Internet checksum of `parts` one after the other, on top of `initial`, complemented.
pub(crate) fn internet_checksum(initial: u16, parts: &[&[u8]]) -> u16 {
    let mut sums = [0u16; 4];
    let mut odd = false;
    debug_assert!(parts.len() < sums.len());
    sums[0] = initial;
    for (sum, part) in sums[1..].iter_mut().zip(parts) {
        let of_part = checksum::data(part);
        // A part that starts at an odd offset has its bytes swapped within the words of the whole.
        *sum = if odd { of_part.swap_bytes() } else { of_part };
        odd ^= part.len() % 2 == 1;
    }
    !checksum::combine(&sums)
}

/// Whether packets may go to or come from the address as a peer of a connection.
pub(crate) fn is_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            !address.is_unspecified() && !address.is_multicast() && !address.is_broadcast() && address.octets()[0] != 0
        }
        IpAddr::V6(address) => !address.is_unspecified() && !address.is_multicast(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn checksum_of_parts_is_checksum_of_whole(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..300, cut2 in 0usize..300) {
            let cut = cut.min(bytes.len());
            let cut2 = cut2.clamp(cut, bytes.len());
            let whole = internet_checksum(7, &[&bytes]);
            let parts = internet_checksum(7, &[&bytes[..cut], &bytes[cut..cut2], &bytes[cut2..]]);
            prop_assert_eq!(whole, parts);
        }

        #[test]
        fn parse_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..120), version in prop_oneof![Just(4u8), Just(6u8)]) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = version << 4 | (*first & 15);
            }
            let _ = parse(&bytes, false);
        }
    }

    #[test]
    fn header_round_trip() {
        for (source, destination) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let header = Header {
                source: source.parse().unwrap(),
                destination: destination.parse().unwrap(),
                protocol: protocol::TCP,
                hop_limit: 63,
                traffic_class: 0x2a,
                identification: 77,
                flow_label: 0,
            };
            let mut buffer = vec![0xff; header.len() + 5];
            header.write(&mut buffer, 5);
            let datagram = parse(&buffer, true).expect("what was written parses");
            assert_eq!((datagram.source, datagram.destination), (header.source, header.destination));
            assert_eq!((datagram.protocol, datagram.traffic_class), (6, 0x2a));
            assert_eq!(datagram.payload, [0xff; 5]);
            assert_eq!(datagram.fragment, None);
        }
    }
}
