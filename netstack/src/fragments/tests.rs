use proptest::prelude::*;

use super::*;
use crate::ip::protocol;

const NOW: Instant = Instant::from_millis(1 << 30);

/// A packet with a plain header and a payload that tells places apart.
fn packet(v6: bool, len: usize) -> Vec<u8> {
    let (source, destination) = if v6 { ("fd00::2", "fd00::1") } else { ("10.0.0.2", "10.0.0.1") };
    let header = ip::Header {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        protocol: protocol::UDP,
        hop_limit: 64,
        traffic_class: 0,
        identification: 0,
        flow_label: 0,
    };
    let mut packet = vec![0; header.len()];
    header.write(&mut packet, len);
    packet.extend((0..len).map(|at| (at * 31 % 251) as u8));
    packet
}

fn add(fragments: &mut Fragments, now: Instant, packet: &[u8]) -> Added {
    let datagram = ip::parse(packet, true).expect("well-formed");
    let fragment = datagram.fragment.expect("a fragment");
    fragments.add(now, &datagram, &fragment, packet)
}

/// What must be the same of a packet that was cut and put together.
fn content(packet: &[u8]) -> (IpAddr, IpAddr, u8, Vec<u8>) {
    let datagram = ip::parse(packet, true).expect("well-formed");
    assert_eq!(datagram.fragment, None);
    (datagram.source, datagram.destination, datagram.protocol, datagram.payload.to_vec())
}

fn assert_empty(fragments: &Fragments) {
    assert_eq!((fragments.partial.len(), fragments.memory, fragments.next_timeout()), (0, 0, None));
    assert!(fragments.memory_of.is_empty() && fragments.by_name.is_empty());
}

proptest! {
    /// In any order, with any of them repeated, and with a freeze and thaw in between.
    #[test]
    fn what_was_cut_becomes_whole(
        v6 in any::<bool>(),
        len in 1usize..20_000,
        mtu in 300usize..1500,
        order in proptest::collection::vec(any::<u16>(), 100),
        repeat in any::<proptest::sample::Index>(),
    ) {
        let original = packet(v6, len.max(mtu));
        let mut pieces = split(&original, mtu, 77);
        prop_assert!(pieces.iter().all(|piece| piece.len() <= mtu));
        let mut keys = order.iter().cycle();
        pieces.sort_by_cached_key(|_| *keys.next().unwrap());
        let last = pieces.pop().unwrap();
        let repeated = (!pieces.is_empty()).then(|| pieces[repeat.index(pieces.len())].clone());
        pieces.extend(repeated);
        let mut fragments = Fragments::default();
        for piece in &pieces {
            prop_assert_eq!(add(&mut fragments, NOW, piece), Added::Pending);
            prop_assert!(fragments.partial.iter().all(|(_, partial)| partial.is_consistent()));
            fragments = Fragments::thaw(fragments.freeze());
        }
        let Added::Whole(whole) = add(&mut fragments, NOW, &last) else { panic!("not whole") };
        prop_assert_eq!(content(&whole), content(&original));
        assert_empty(&fragments);
    }

    /// No packet leads to a panic, and none to more memory than allowed.
    #[test]
    fn anything_may_come(pieces in proptest::collection::vec((0u16..400, 0usize..400, any::<bool>(), 0u32..3, any::<bool>()), 1..200)) {
        let mut fragments = Fragments::default();
        for (at, len, more, identification, v6) in pieces {
            let header = packet(v6, 0);
            let piece = ip::write_fragment(&header, &vec![0; len], identification, usize::from(at) * 8, more);
            let datagram = ip::parse(&piece, true).expect("well-formed");
            let Some(fragment) = datagram.fragment else { continue };
            let _ = fragments.add(NOW, &datagram, &fragment, &piece);
            let sum: usize = fragments.partial.iter().map(|(_, partial)| partial.memory()).sum();
            prop_assert_eq!(sum, fragments.memory);
            prop_assert!(fragments.partial.iter().all(|(_, partial)| partial.is_consistent()));
        }
        while fragments.expire(NOW + LIFETIME_V6).is_some() {}
        assert_empty(&fragments);
    }
}

/// RFC 5722: what overlaps takes the datagram along, pieces that come later included.
#[test]
fn overlap_takes_the_datagram_along() {
    for v6 in [false, true] {
        let original = packet(v6, 3000);
        let header = packet(v6, 0);
        let pieces = split(&original, 1300, 5);
        let mut fragments = Fragments::default();
        assert_eq!(add(&mut fragments, NOW, &pieces[0]), Added::Pending);
        let overlapping = ip::write_fragment(&header, &[1; 64], 5, 1240, true);
        assert_eq!(add(&mut fragments, NOW, &overlapping), Added::Pending);
        assert_empty(&fragments);
        for piece in &pieces[1..] {
            assert_eq!(add(&mut fragments, NOW, piece), Added::Pending);
        }
    }
}

#[test]
fn a_second_end_is_a_contradiction() {
    let header = packet(false, 0);
    let mut fragments = Fragments::default();
    add(&mut fragments, NOW, &ip::write_fragment(&header, &[1; 64], 5, 640, false));
    assert_eq!(fragments.partial.len(), 1);
    add(&mut fragments, NOW, &ip::write_fragment(&header, &[1; 64], 5, 1280, false));
    assert_empty(&fragments);
    add(&mut fragments, NOW, &ip::write_fragment(&header, &[1; 64], 5, 640, false));
    add(&mut fragments, NOW, &ip::write_fragment(&header, &[1; 64], 5, 1280, true));
    assert_empty(&fragments);
}

#[test]
fn the_incomplete_ends_and_its_start_is_quoted() {
    for (v6, lifetime) in [(false, LIFETIME_V4), (true, LIFETIME_V6)] {
        let pieces = split(&packet(v6, 3000), 1300, 5);
        let mut fragments = Fragments::default();
        add(&mut fragments, NOW, &pieces[1]);
        add(&mut fragments, NOW, &pieces[0]);
        assert_eq!(fragments.next_timeout(), Some(NOW + lifetime));
        assert_eq!(fragments.expire(NOW + lifetime - Duration::from_nanos(1)), None);
        let (source, _, head) = fragments.expire(NOW + lifetime).expect("its time is over");
        assert_eq!(source.is_ipv6(), v6);
        assert_eq!(head, pieces[0][..head.len()]);
        assert!(head.len() >= 20 + 8);
        assert_empty(&fragments);
        add(&mut fragments, NOW, &pieces[1]);
        let (.., head) = fragments.expire(NOW + lifetime).expect("its time is over");
        assert_eq!(head, [0u8; 0]);
    }
}

/// A source that floods finds its own room full; others find theirs.
#[test]
fn a_flood_leaves_room_for_others() {
    let mut fragments = Fragments::default();
    let header = packet(false, 0);
    for identification in 0..20_000 {
        add(&mut fragments, NOW, &ip::write_fragment(&header, &[1; 1024], identification, 0, true));
    }
    assert!(fragments.memory <= MEMORY_OF_SOURCE_MAX);
    let mut header = header;
    header[15] = 99;
    let original: Vec<u8> = header.iter().copied().chain([7; 3000]).collect();
    let pieces = split(&original, 1300, 5);
    let last = pieces.iter().map(|piece| add(&mut fragments, NOW, piece)).fold(Added::Pending, |_, added| added);
    assert!(matches!(last, Added::Whole(_)));
    for source in 0..10u8 {
        header[15] = source;
        for identification in 0..2000 {
            add(&mut fragments, NOW, &ip::write_fragment(&header, &[1; 1024], identification, 0, true));
        }
    }
    assert!(fragments.memory <= MEMORY_MAX);
}

#[test]
fn ipv6_mistakes_are_told() {
    let header = packet(true, 0);
    let mut fragments = Fragments::default();
    let odd = ip::write_fragment(&header, &[1; 63], 5, 0, true);
    assert_eq!(add(&mut fragments, NOW, &odd), Added::Malformed { pointer: 4 });
    let long = ip::write_fragment(&header, &[1; 64], 5, 65_528, true);
    assert_eq!(add(&mut fragments, NOW, &long), Added::Malformed { pointer: 42 });
    assert_empty(&fragments);
}

/// RFC 3168 (5.3)
#[test]
fn congestion_marks_are_joined() {
    for (marks, expected) in [([2, 3], Some(3)), ([2, 2], Some(2)), ([0, 0], Some(0)), ([0, 3], None)] {
        let mut header = packet(true, 0);
        let mut fragments = Fragments::default();
        header[1] = marks[0] << 4;
        add(&mut fragments, NOW, &ip::write_fragment(&header, &[1; 64], 5, 0, true));
        header[1] = marks[1] << 4;
        let added = add(&mut fragments, NOW, &ip::write_fragment(&header, &[1; 64], 5, 64, false));
        let mark = match added {
            Added::Whole(packet) => Some(ip::parse(&packet, true).expect("well-formed").traffic_class & 3),
            _ => None,
        };
        assert_eq!(mark, expected);
        assert_empty(&fragments);
    }
}

/// Destination options in front of the fragment header belong to the datagram; those behind it to its payload.
#[test]
fn ipv6_headers_in_front_are_kept() {
    let mut fragments = Fragments::default();
    let options = [44u8, 0, 1, 4, 0, 0, 0, 0];
    let piece = |offset: u16, more: bool| {
        let mut packet = packet(true, 0);
        packet[6] = 60;
        packet.extend_from_slice(&options);
        packet.extend_from_slice(&[protocol::UDP, 0]);
        packet.extend_from_slice(&(offset | u16::from(more)).to_be_bytes());
        packet.extend_from_slice(&9u32.to_be_bytes());
        packet.extend_from_slice(&[offset as u8; 16]);
        let len = u16::try_from(packet.len() - 40).unwrap();
        packet[4..6].copy_from_slice(&len.to_be_bytes());
        packet
    };
    assert_eq!(add(&mut fragments, NOW, &piece(16, false)), Added::Pending);
    let Added::Whole(packet) = add(&mut fragments, NOW, &piece(0, true)) else { panic!("not whole") };
    assert_eq!((packet[6], packet[40]), (60, protocol::UDP));
    assert_eq!(packet.len(), 40 + 8 + 32);
    assert_eq!(content(&packet).2, protocol::UDP);
}
