//! What headers carry: options, checksums, addresses.

use std::net::{IpAddr, SocketAddr};

use netstack::{SocketError, TcpOption};

use crate::both_with;
use crate::harness::wire::{Family, Raw, Wire, checksum, plain, pseudo, raw};
use crate::harness::{ACK, SYN};

#[test]
fn options_in_any_form_are_read() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# A given TCP implementation can support any currently defined options, but the following options MUST be
    //# supported (MUST-4 --note Maximum Segment Size Option support is also part of MUST-14 in Section 3.7.1):
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# A TCP implementation MUST be able to receive a TCP Option in any segment (MUST-5).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# A TCP implementation MUST (MUST-6) ignore without error any TCP Option it does not implement, assuming that the
    //# option has a length field.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# All TCP Options except End of Option List Option (EOL) and No-Operation (NOP) MUST have length fields, including
    //# all future options (MUST-68).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# TCP implementations MUST be prepared to handle an illegal option length (e.g., zero); a suggested procedure is
    //# to reset the connection and log the error cause (MUST-7).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.2
    //= type=test
    //# There is no guarantee that senders will use this option, so receivers MUST be prepared to process options even
    //# if they do not begin on a word boundary (MUST-64).
    for mut wire in both_with(&plain()) {
        let forms: [(&[u8], usize); 7] = [
            (&[2, 4, 1, 0, 0, 0, 0, 0], 256),
            (&[1, 2, 4, 1, 0, 1, 1, 1], 256),
            (&[254, 6, 9, 9, 9, 9, 2, 4, 1, 0, 0, 0], 256),
            (&[30, 3, 7, 2, 4, 1, 0, 0], 256),
            (&[0, 2, 4, 1, 0, 0, 0, 0], wire.family.pick(536, 1220)),
            (&[2, 0, 1, 0, 2, 4, 1, 0], wire.family.pick(536, 1220)),
            (&[2, 40, 1, 0, 1, 1, 1, 1], wire.family.pick(536, 1220)),
        ];
        let listener = wire.listen(50);
        for (options, mss) in forms {
            wire.port += 1;
            wire.syn(options);
            wire.send(raw(ACK, 1, 1).window(60_000));
            let id = wire.stack.tcp_accept(wire.now, listener).unwrap();
            assert_eq!(wire.stack.tcp_info(wire.now, id).snd_mss as usize, mss, "{options:?}");
            // And in a segment with data: options that mean nothing there change nothing.
            wire.send(raw(ACK, 1, 1).window(60_000).options(options).data(b"x"));
            let info = wire.stack.tcp_info(wire.now, id);
            assert_eq!((info.snd_mss as usize, wire.stack.status(id).readable), (mss, 1));
        }
    }
}

#[test]
fn headers_are_padded_with_zeros() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# The content of the header beyond the End of Option List Option MUST be header padding of zeros (MUST-69).
    for mut wire in both_with(&plain()) {
        wire.listen(5);
        wire.timestamps = true;
        let seen = wire.syn(&[2, 4, 5, 180, 4, 2, 1, 3, 3, 7]);
        // Walk the options as a peer would: after an end of the list only zeros come.
        let mut rest = &seen.options[..];
        while let Some(&kind) = rest.first() {
            match kind {
                0 => break,
                1 => rest = &rest[1..],
                _ => rest = &rest[usize::from(rest[1])..],
            }
        }
        assert!(rest.iter().all(|&byte| byte == 0));
    }
}

#[test]
fn checksums_are_made_and_checked() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# The sender MUST generate it (MUST-2) and the receiver MUST check it (MUST-3).
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        wire.send(Raw { bad_checksum: true, ..raw(ACK, 1, 1).data(b"x") });
        assert_eq!(wire.stack.status(id).readable, 0);
        let now = wire.now;
        wire.stack
            .tcp_send_with(now, id, |[room, _]| {
                room[..3].copy_from_slice(b"abc");
                3
            })
            .unwrap();
        let packet = wire.stack.poll_transmit(now).unwrap().to_vec();
        let segment = &packet[wire.family.header()..];
        let pseudo = pseudo(wire.family.own(), wire.family.peer(), 6, segment.len());
        assert_eq!(checksum(&[&pseudo, segment]), 0);
    }
}

#[test]
fn options_of_ip_are_ignored() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2
    //= type=test
    //# When received options are passed up to TCP from the IP layer, a TCP implementation MUST ignore options that it
    //# does not understand (MUST-50).
    // Record route and timestamp in IPv4, destination options in IPv6.
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        let packet = wire.bytes(&raw(ACK, 1, 1).data(b"x"));
        let header = wire.family.header();
        let with_options = match wire.family {
            Family::V4 => {
                let mut packet =
                    [&packet[..20], &[7, 7, 4, 0, 0, 0, 0, 68, 8, 5, 0, 0, 0, 0, 0, 0], &packet[20..]].concat();
                packet[0] = 0x49;
                let len = packet.len() as u16;
                packet[2..4].copy_from_slice(&len.to_be_bytes());
                packet[10..12].fill(0);
                let sum = checksum(&[&packet[..36]]);
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
                packet
            }
            Family::V6 => {
                let mut packet = [&packet[..40], &[6, 0, 0x1e, 4, 0, 0, 0, 0], &packet[header..]].concat();
                packet[6] = 60;
                let len = (packet.len() - 40) as u16;
                packet[4..6].copy_from_slice(&len.to_be_bytes());
                packet
            }
        };
        wire.send_bytes(&with_options, None);
        assert_eq!(wire.stack.status(id).readable, 1);
    }
}

#[test]
fn addresses_that_are_nobodys_are_refused() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.1
    //= type=test
    //# A TCP implementation MUST reject as an error a local OPEN call for an invalid remote IP address (e.g., a
    //# broadcast or multicast address) (MUST-46).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2.3
    //= type=test
    //# A TCP implementation MUST silently discard an incoming SYN segment that is addressed to a broadcast or multicast
    //# address [(MUST-57)].
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2.3
    //= type=test
    //# An incoming SYN with an invalid source address MUST be ignored either by TCP or by the IP layer [(MUST-63)] (see
    //# Section 3.2.1.3).
    for mut wire in Wire::both() {
        let wrong: [&str; 3] =
            wire.family.pick(["224.0.0.5", "255.255.255.255", "239.1.1.1"], ["ff02::1", "ff05::2", "ff0e::1"]);
        for address in wrong {
            let address: IpAddr = address.parse().unwrap();
            let id = wire.stack.tcp_open();
            let refused = wire.stack.tcp_connect(wire.now, id, SocketAddr::new(address, 80));
            assert_eq!(refused, Err(SocketError::NetworkUnreachable), "{address}");
            assert!(wire.take().is_empty());
        }
        wire.listen(5);
        for address in wrong.iter().chain(&[wire.family.pick("0.0.0.0", "::")]) {
            let address = Some(address.parse().unwrap());
            for (source, destination) in [(address, None), (None, address)] {
                (wire.source, wire.destination) = (source, destination);
                assert!(wire.send(raw(SYN, 0, 0)).is_empty(), "{source:?} {destination:?}");
                assert!(wire.send(raw(ACK, 5, 7)).is_empty(), "{source:?} {destination:?}");
            }
        }
        assert_eq!(wire.stack.connections_without_socket(), (0, 0));
    }
}
#[test]
fn the_ip_header_is_the_programs() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.9
    //= type=test
    //# The application layer MUST be able to specify the Differentiated Services field for segments that are sent on a
    //# connection (MUST-48).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.9
    //= type=test
    //# It is not required, but the application SHOULD be able to change the Differentiated Services field during the
    //# connection lifetime (SHLD-21).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.9
    //= type=test
    //# TCP implementations SHOULD pass the current Differentiated Services field value without change to the IP layer,
    //# when it sends segments on the connection (SHLD-22).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2
    //= type=test
    //# The TTL value used to send TCP segments MUST be configurable (MUST-49).
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        let field = |packet: &[u8], family: Family| match family {
            Family::V4 => (packet[1], packet[8]),
            Family::V6 => (packet[0] << 4 | packet[1] >> 4, packet[7]),
        };
        let mut looks = Vec::new();
        for (tos, ttl) in [(0, 64), (0xb8, 64), (0x20, 3)] {
            wire.stack.tcp_set(wire.now, id, TcpOption::Tos(tos)).unwrap();
            wire.stack.tcp_set(wire.now, id, TcpOption::Ttl(ttl)).unwrap();
            wire.stack.tcp_set(wire.now, id, TcpOption::NoDelay(true)).unwrap();
            wire.stack.tcp_send_with(wire.now, id, |_| 1).unwrap();
            let packet = wire.stack.poll_transmit(wire.now).unwrap().to_vec();
            looks.push(field(&packet, wire.family));
        }
        assert_eq!(looks, [(0, 64), (0xb8, 64), (0x20, 3)]);
    }
}

#[test]
fn packets_are_not_to_be_fragmented() {
    //= https://www.rfc-editor.org/rfc/rfc1191#section-3
    //= type=test
    //# Segments carry the don't-fragment bit.
    let mut wire = Wire::new(Family::V4);
    let id = wire.established();
    wire.stack.tcp_send_with(wire.now, id, |_| 3).unwrap();
    let packet = wire.stack.poll_transmit(wire.now).unwrap().to_vec();
    assert_eq!(packet[6] & 0x40, 0x40);
}
