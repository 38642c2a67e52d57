//! Raw segments against one stack: what comes back, state by state, over both families.

mod harness;

use std::time::Duration;

use harness::wire::{CWR, ECE, ISN, MSS, Raw, SACK_PERMITTED, Wire, raw, short};
use harness::{ACK, FIN, RST, SYN};
use netstack::{Checksum, RxPacket, Shutdown, SocketError, Stack, State};

#[test]
fn listen_answers_what_it_should() {
    for mut wire in Wire::both() {
        wire.listen(5);
        assert_eq!(short(&wire.send(raw(ACK, 5, 77))), [(RST, 77, 0, 0)], "an ACK out of the blue");
        assert!(wire.send(raw(RST, 5, 0)).is_empty());
        assert!(wire.send(raw(0, 5, 0).data(b"x")).is_empty(), "no SYN, no ACK");
        assert!(wire.send(raw(SYN | FIN, 5, 0)).is_empty(), "a scanner's");
        wire.syn(&MSS);
        assert_eq!(wire.stack.connections_without_socket(), (1, 0));
    }
}

#[test]
fn closed_ports_reset() {
    for mut wire in Wire::both() {
        let seen = wire.send(raw(SYN, 0, 0));
        assert_eq!(short(&seen), [(RST | ACK, 0, 1, 0)]);
        assert_eq!(short(&wire.send(raw(ACK, 5, 9).data(b"abc"))), [(RST, 9, 0, 0)]);
        assert_eq!(short(&wire.send(raw(FIN, 5, 9).data(b"abc"))), [(RST | ACK, 0, 9, 0)]);
        assert!(wire.send(raw(RST | ACK, 5, 9)).is_empty(), "never a reset for a reset");
    }
}

#[test]
fn half_open_connections() {
    //= https://www.rfc-editor.org/rfc/rfc4987#section-3.4
    //= type=test
    //# Half-open connections end after five repeated SYN-ACKs.
    for mut wire in Wire::both() {
        let listener = wire.listen(5);
        wire.syn(&MSS);
        assert_eq!(short(&wire.send(raw(SYN, 0, 0).options(&MSS))), [(SYN | ACK, 0, 1, 0)], "the SYN again");
        assert_eq!(short(&wire.send(raw(ACK, 1, 5))), [(RST, 5, 0, 0)], "acknowledges what was never sent");
        assert!(
            wire.send(raw(RST, 900, 0)).iter().all(|seen| seen.flags == ACK),
            "in the window, not exact: challenge"
        );
        assert!(wire.send(raw(SYN, 900, 0)).is_empty(), "one answer in half a second");
        wire.wait(Duration::from_millis(500));
        assert_eq!(short(&wire.send(raw(SYN, 900, 0))), [(ACK, 1, 1, 0)], "a SYN in the window: challenge");
        let mut again = wire.wait(Duration::from_millis(500));
        assert_eq!(short(&wire.send(raw(ACK, 100_000, 1))), [(ACK, 1, 1, 0)], "outside the window");
        assert_eq!(wire.stack.connections_without_socket(), (1, 0));
        // SYN-ACKs are repeated five times, then the entry goes.
        again.extend(wire.wait(Duration::from_secs(61)));
        assert_eq!(again.iter().filter(|seen| seen.flags & SYN != 0).count(), 5);
        wire.wait(Duration::from_secs(10));
        assert_eq!(wire.stack.connections_without_socket(), (0, 0));
        // And an exact reset ends one at once.
        wire.syn(&MSS);
        assert!(wire.send(raw(RST, 1, 0)).is_empty());
        assert_eq!(wire.stack.connections_without_socket(), (0, 0));
        assert_eq!(wire.stack.status(listener).acceptable, 0);
    }
}

#[test]
fn data_with_the_final_ack_is_taken() {
    for mut wire in Wire::both() {
        let listener = wire.listen(5);
        wire.syn(&MSS);
        assert!(wire.send(raw(ACK | FIN, 1, 1).data(b"GET")).is_empty(), "the program may answer with a close");
        assert_eq!(short(&wire.wait(Duration::from_millis(40))), [(ACK, 1, 5, 0)]);
        let id = wire.stack.tcp_accept(wire.now, listener).expect("complete");
        let status = wire.stack.status(id);
        assert_eq!((status.state, status.readable, status.peer_closed), (State::CloseWait, 3, true));
    }
}

#[test]
fn syn_ack_mirrors_the_options() {
    //= https://www.rfc-editor.org/rfc/rfc2018#section-2
    //= type=test
    //# SACK-permitted is sent only in SYNs, and blocks only if it was received.
    for mut wire in Wire::both() {
        wire.listen(5);
        let low = wire.family.pick(180, 160);
        let bare = wire.syn(&[]);
        assert_eq!(bare.options, [2, 4, 5, low], "MSS only");
        wire.port += 1;
        let full = wire.syn(&[2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 1, 3, 3, 7]);
        assert_eq!(full.options[..8], [2, 4, 5, low, 4, 2, 8, 10]);
        assert_eq!(full.options[12..16], [0, 0, 0, 9], "the echo");
        assert_eq!(full.options[16..], [1, 3, 3, 7]);
    }
}

#[test]
fn ecn_is_agreed_if_asked() {
    //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.1
    //= type=test
    //# An opener asks by ECE and CWR; the peer agrees by ECE alone, and only if it was asked.
    //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.3
    //= type=test
    //# A mark that arrives is echoed in every acknowledgment until the peer confirms its reduction.
    for mut wire in Wire::both() {
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
}

#[test]
fn resets_must_be_exact() {
    //= https://www.rfc-editor.org/rfc/rfc5961#section-3.2
    //= type=test
    //# An RST ends the connection only at exactly RCV.NXT; elsewhere in the window it is challenged, outside ignored.
    //= https://www.rfc-editor.org/rfc/rfc5961#section-7
    //= type=test
    //# Challenges are limited.
    for mut wire in Wire::both() {
        let id = wire.established();
        assert!(wire.send(raw(RST, 100_000, 0)).is_empty(), "outside the window: nothing");
        assert_eq!(short(&wire.send(raw(RST, 100, 0))), [(ACK, 1, 1, 0)], "inside: a challenge");
        assert!(wire.send(raw(RST, 101, 0)).is_empty(), "challenges are limited");
        assert_eq!(wire.state(id), State::Established);
        assert!(wire.send(raw(RST, 1, 0)).is_empty());
        let status = wire.stack.status(id);
        assert_eq!((status.state, status.error), (State::Closed, Some(SocketError::ConnectionReset)));
    }
}

#[test]
fn syns_of_an_established_connection_are_challenged() {
    //= https://www.rfc-editor.org/rfc/rfc5961#section-4.2
    //= type=test
    //# A SYN of a synchronized connection is challenged, whatever its number.
    for mut wire in Wire::both() {
        let id = wire.established();
        assert_eq!(short(&wire.send(raw(SYN, 1, 0))), [(ACK, 1, 1, 0)]);
        wire.wait(Duration::from_secs(1));
        assert_eq!(short(&wire.send(raw(SYN, 0, 0))), [(ACK, 1, 1, 0)], "a SYN as at the start");
        assert_eq!(wire.state(id), State::Established);
    }
}

#[test]
fn acknowledgments_must_make_sense() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.10.7.4
    //= type=test
    //# RFC 5961 [9], Section 5 describes a potential blind data injection attack, and mitigation that implementations
    //# MAY choose to include (MAY-12).
    //= https://www.rfc-editor.org/rfc/rfc5961#section-5.2
    //= type=test
    //# An acknowledgment of what was not sent, or older than the largest window, is challenged and its data dropped.
    for mut wire in Wire::both() {
        let id = wire.established();
        assert_eq!(short(&wire.send(raw(ACK, 1, 5000).data(b"evil"))), [(ACK, 1, 1, 0)], "of what was never sent");
        wire.wait(Duration::from_secs(1));
        assert_eq!(short(&wire.send(raw(ACK, 1, -200_000).data(b"evil"))), [(ACK, 1, 1, 0)], "far too old");
        assert!(wire.send(raw(0, 1, 0).data(b"evil")).is_empty(), "none at all");
        assert_eq!(wire.stack.status(id).readable, 0);
    }
}

#[test]
fn old_segments_are_told_by_their_timestamps() {
    //= https://www.rfc-editor.org/rfc/rfc7323#section-5.3
    //= type=test
    //# A segment with a timestamp older than TS.Recent is acknowledged and dropped.
    //= https://www.rfc-editor.org/rfc/rfc7323#section-5.2
    //= type=test
    //# An RST isn't subject to the test.
    for mut wire in Wire::both() {
        wire.timestamps = true;
        let id = wire.established_with(&MSS, raw(ACK, 1, 1));
        wire.send(raw(ACK, 1, 1).data(b"new").ts(2000));
        assert_eq!(short(&wire.send(raw(ACK, 4, 1).data(b"old").ts(1500))), [(ACK, 1, 4, 0)]);
        assert_eq!(wire.stack.status(id).readable, 3);
        // A reset isn't subject to it (RFC 7323, 5.2).
        wire.send(raw(RST, 4, 0).ts(1));
        assert_eq!(wire.state(id), State::Closed);
    }
}

#[test]
fn out_of_order_data_is_reported() {
    //= https://www.rfc-editor.org/rfc/rfc5681#section-4.2
    //= type=test
    //# A segment out of order, or one that fills a gap, is acknowledged at once.
    for mut wire in Wire::both() {
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
}

#[test]
fn acknowledgments_count_wire_segments() {
    for mut wire in Wire::both() {
        let id = wire.established();
        let mss = wire.family.mss();
        // Use up the acknowledgments that are sent at once at the start.
        let mut at = 1;
        for _ in 0..16 {
            assert_eq!(wire.send(raw(ACK, at, 1).data(&[0; 10])).len(), 1);
            at += 10;
        }
        let _ = wire.stack.tcp_recv_with(wire.now, id, |[a, b]| a.len() + b.len());
        wire.take();
        assert!(wire.send(raw(ACK, at, 1).data(&vec![0; mss])).is_empty(), "one full segment waits");
        at += mss as i64;
        assert_eq!(wire.send(raw(ACK, at, 1).data(&vec![0; mss])).len(), 1, "two don't");
        at += mss as i64;
        let coalesced = Raw { gso: Some(mss as u16), ..raw(ACK, at, 1).data(&vec![0; 2 * mss]) };
        assert_eq!(wire.send(coalesced).len(), 1, "nor does one that stands for two");
        at += 2 * mss as i64;
        assert!(wire.send(raw(ACK, at, 1).data(&[0; 100])).is_empty());
        let late = wire.wait(Duration::from_millis(39));
        assert!(late.is_empty());
        assert_eq!(wire.wait(Duration::from_millis(2)).len(), 1, "a delayed one comes after 40 ms");
    }
}

#[test]
fn the_window_closes_and_opens() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.2.1
    //= type=test
    //# A TCP implementation MUST include a SWS avoidance algorithm in the sender (MUST-38).
    for mut wire in Wire::both() {
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
}

#[test]
fn an_initial_retransmission_is_by_the_clock_and_backs_off() {
    //= https://www.rfc-editor.org/rfc/rfc6298#section-5.4
    //= type=test
    //# When it expires the earliest segment is sent again.
    //= https://www.rfc-editor.org/rfc/rfc6298#section-5.5
    //= type=test
    //# Each time it expires the time-out doubles.
    for mut wire in Wire::both() {
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
}

#[test]
fn three_reports_beyond_a_hole_bring_a_retransmission() {
    //= https://www.rfc-editor.org/rfc/rfc8985#section-9.2
    //= type=test
    //# MUST NOT be used with RACK-TLP
    for mut wire in Wire::both() {
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
}

#[test]
fn the_peer_closes_first() {
    for mut wire in Wire::both() {
        let id = wire.established();
        assert!(wire.send(raw(FIN | ACK, 1, 1)).is_empty(), "the program may answer with a close");
        assert_eq!(short(&wire.wait(Duration::from_millis(40))), [(ACK, 1, 2, 0)]);
        assert_eq!(wire.state(id), State::CloseWait);
        assert_eq!(short(&wire.send(raw(FIN | ACK, 1, 1))), [(ACK, 1, 2, 0)], "the FIN again");
        assert_eq!(short(&wire.write(id, b"bye")), [(ACK, 1, 2, 3)]);
        wire.stack.tcp_close(wire.now, id);
        assert_eq!(short(&wire.take()), [(FIN | ACK, 4, 2, 0)]);
        assert_eq!(wire.state(id), State::LastAck);
        assert!(wire.send(raw(ACK, 2, 5)).is_empty());
        assert_eq!(wire.stack.sockets().count(), 1, "only the listener");
    }
}

#[test]
fn this_side_closes_first() {
    //= https://www.rfc-editor.org/rfc/rfc1337#section-3
    //= type=test
    //# An RST doesn't end TIME-WAIT.
    //= https://www.rfc-editor.org/rfc/rfc6191#section-2
    //= type=test
    //# A SYN with a newer timestamp or a higher number replaces a connection in TIME-WAIT.
    for mut wire in Wire::both() {
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
}

#[test]
fn a_fin_that_was_repeated_during_a_move_is_answered_once() {
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.stack.tcp_shutdown(wire.now, id, Shutdown::Write).unwrap();
        wire.take();
        wire.send(raw(ACK, 1, 2));
        assert_eq!(wire.state(id), State::FinWait2);
        let config = wire.stack.config().clone();
        wire.stack = Stack::thaw(wire.stack.freeze(wire.now), wire.now, config).unwrap();
        wire.take();
        // A peer that hears the first answer is gone, and would answer another with an RST.
        assert_eq!(short(&wire.send(raw(FIN | ACK, 1, 2))), [(ACK, 2, 2, 0)]);
        assert!(wire.send(raw(FIN | ACK, 1, 2)).is_empty());
        // One that didn't hear it repeats its FIN later.
        wire.wait(Duration::from_secs(1));
        assert_eq!(short(&wire.send(raw(FIN | ACK, 1, 2))), [(ACK, 2, 2, 0)]);
    }
}

#[test]
fn both_close_at_once() {
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.stack.tcp_shutdown(wire.now, id, Shutdown::Write).unwrap();
        wire.take();
        assert_eq!(short(&wire.send(raw(FIN | ACK, 1, 1))), [(ACK, 2, 2, 0)]);
        assert_eq!(wire.state(id), State::Closing);
        wire.send(raw(ACK, 2, 2));
        assert_eq!(wire.stack.connections_without_socket(), (0, 1));
    }
}

#[test]
fn keepalive_probes_are_answered() {
    for mut wire in Wire::both() {
        wire.established();
        assert_eq!(short(&wire.send(raw(ACK, 0, 1))), [(ACK, 1, 1, 0)], "Linux's, without a byte");
        assert_eq!(short(&wire.send(raw(ACK, 0, 1).data(b"g"))).len(), 1, "with one");
    }
}

#[test]
fn initial_sequence_numbers_differ_and_advance() {
    for mut wire in Wire::both() {
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
}

#[test]
fn defer_accept_waits_for_data() {
    for mut wire in Wire::both() {
        let listener = wire.listen(5);
        wire.stack.tcp_set(wire.now, listener, netstack::TcpOption::DeferAccept(Duration::from_secs(5))).unwrap();
        wire.syn(&MSS);
        assert!(wire.send(raw(ACK, 1, 1)).is_empty());
        assert_eq!(wire.stack.status(listener).acceptable, 0);
        wire.send(raw(ACK, 1, 1).data(b"GET"));
        assert_eq!(wire.stack.status(listener).acceptable, 1);
    }
}

#[test]
fn a_smaller_path_is_learned_from_icmp() {
    //= https://www.rfc-editor.org/rfc/rfc1191#section-3
    //= type=test
    //# A next-hop MTU told by ICMP lowers the size of segments, and what was too big is sent again at once.
    //= https://www.rfc-editor.org/rfc/rfc8201#section-4
    //= type=test
    //# A packet-too-big message lowers the size of segments.
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.send(raw(ACK, 1, 1).window(60_000));
        let seen = wire.write(id, &[1; 5000]);
        assert_eq!(seen.len(), 1);
        // Next hop 1300 bytes, quoting the first segment: RFC 8201 has no smaller path than 1280.
        let now = wire.now;
        let error = wire.too_big(1300, 1);
        wire.stack.handle_packet(now, RxPacket { data: &error, checksum: Checksum::Verify, gso_size: None });
        let info = wire.stack.tcp_info(wire.now, id);
        let mss = 1300 - 20 - wire.family.header();
        assert_eq!((info.pmtu, info.snd_mss as usize), (1300, mss));
        let mut sizes = Vec::new();
        while let Some(packet) = wire.stack.poll_transmit(now) {
            sizes.push(packet.gso.map_or(packet.len() - 20 - wire.family.header(), |gso| usize::from(gso.size)));
        }
        assert!(!sizes.is_empty() && sizes.iter().all(|&size| size <= mss), "{sizes:?}");
    }
}

#[test]
fn a_flood_is_met_with_cookies() {
    //= https://www.rfc-editor.org/rfc/rfc4987#section-3.3
    //= type=test
    //# The half-open connections of a listener are bounded.
    //= https://www.rfc-editor.org/rfc/rfc4987#section-3.6
    //= type=test
    //# Beyond the bound a SYN is answered with a cookie that keeps no state.
    //= https://www.rfc-editor.org/rfc/rfc4987#section-3.6
    //= type=test
    //# The options agreed on travel in the timestamp of the cookie.
    for (mut wire, timestamps) in Wire::both().zip([false; 2]).chain(Wire::both().zip([true; 2])) {
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
        let mss = wire.family.mss();
        assert_eq!(info.snd_mss as usize, if timestamps { mss - 12 } else { mss });
        // A guess isn't.
        wire.port = 5001;
        wire.iss = 12_345;
        assert_eq!(wire.send(raw(ACK, 1, 1).data(b"hello"))[0].flags, RST);
    }
}
