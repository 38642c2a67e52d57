//! Segments and windows: how much leaves at once, and what a peer's window allows.

use std::time::Duration;

use netstack::{Config, State, TcpOption};

use crate::harness::wire::{MSS, PSH, Wire, plain, raw, short};
use crate::harness::{ACK, RST};
use crate::{SECOND, both_with, open_window};

#[test]
fn push_marks_the_end_of_what_is_queued() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.2
    //= type=test
    //# The transmitter SHOULD collapse successive bits when it packetizes data, to send the largest possible segment
    //# (SHLD-27).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.2
    //= type=test
    //# However, a TCP implementation SHOULD send a maximum-sized segment whenever possible (SHLD-28) to improve
    //# performance (see Section 3.8.6.2.1).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.2
    //= type=test
    //# (1) MUST NOT buffer data indefinitely (MUST-60), and (2) MUST set the PSH bit in the last buffered segment
    //# (i.e., when there is no more queued data to be sent) (MUST-61).
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        open_window(&mut wire, 1);
        let mss = wire.family.mss();
        wire.stack.tcp_set(wire.now, id, TcpOption::Cork(true)).unwrap();
        let mut seen = Vec::new();
        for _ in 0..5 {
            seen.extend(wire.write(id, &vec![1; mss / 2]));
        }
        wire.stack.tcp_set(wire.now, id, TcpOption::Cork(false)).unwrap();
        seen.extend(wire.take());
        assert_eq!(seen.iter().map(|one| one.payload).collect::<Vec<_>>(), [mss, mss, mss / 2]);
        assert_eq!(seen.last().map(|one| one.flags), Some(ACK | PSH));
    }
}

#[test]
fn nothing_waits_for_ever() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.2
    //= type=test
    //# (1) MUST NOT buffer data indefinitely (MUST-60), and (2) MUST set the PSH bit in the last buffered segment
    //# (i.e., when there is no more queued data to be sent) (MUST-61).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.2
    //= type=test
    //# When an application issues a series of SEND calls without setting the PUSH flag, the TCP implementation MAY
    //# aggregate the data internally without sending it (MAY-16).
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        wire.stack.tcp_set(wire.now, id, TcpOption::Cork(true)).unwrap();
        assert!(wire.write(id, b"abc").is_empty());
        assert_eq!(short(&wire.wait(Duration::from_millis(201))), [(ACK, 1, 1, 3)], "a cork holds for 200 ms");
        wire.stack.tcp_set(wire.now, id, TcpOption::Cork(false)).unwrap();
        assert!(wire.write(id, b"def").is_empty(), "Nagle");
        assert_eq!(short(&wire.send(raw(ACK, 1, 4))), [(ACK, 4, 1, 3)], "holds for a round trip");
    }
}

#[test]
fn segment_sizes_are_what_both_sides_said() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# A given TCP implementation can support any currently defined options, but the following options MUST be
    //# supported (MUST-4 --note Maximum Segment Size Option support is also part of MUST-14 in Section 3.7.1):
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.1
    //= type=test
    //# If an MSS Option is not received at connection setup, TCP implementations MUST assume a default send MSS of 536
    //# (576 - 40) for IPv4 or 1220 (1280 - 60) for IPv6 (MUST-15).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.1
    //= type=test
    //# The maximum size of a segment that a TCP endpoint really sends, the "effective send MSS", MUST be the smaller
    //# (MUST-16) of the send MSS (that reflects the available reassembly buffer size at the remote host, the EMTU_R
    //# [19]) and the largest transmission size permitted by the IP layer (EMTU_S [19]):
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.1
    //= type=test
    //# where MMS_R is the maximum size for a transport-layer message that can be received (and reassembled at the IP
    //# layer) (MUST-67).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.1
    //= type=test
    //# TCP implementations SHOULD send an MSS Option in every SYN segment when its receive MSS differs from the default
    //# 536 for IPv4 or 1220 for IPv6 (SHLD-5), and MAY send it always (MAY-3).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.2
    //= type=test
    //# This field may be sent in the initial connection request (i.e., in segments with the SYN control bit set) and
    //# MUST NOT be sent in other segments (MUST-65).
    for (options, of_v4, of_v6) in
        [(&[][..], 536, 1220), (&[2, 4, 2, 0][..], 512, 512), (&[2, 4, 0x23, 0][..], 1460, 1440)]
    {
        for mut wire in both_with(&plain()) {
            let listener = wire.listen(5);
            let answer = wire.syn(options);
            assert_eq!(answer.options, [&[2, 4][..], &(wire.family.mss() as u16).to_be_bytes()].concat());
            wire.send(raw(ACK, 1, 1).window(60_000));
            let id = wire.stack.tcp_accept(wire.now, listener).unwrap();
            let seen = wire.write(id, &[0; 4000]);
            assert_eq!(seen[0].payload, wire.family.pick(of_v4, of_v6));
            assert!(seen.iter().all(|one| one.options.is_empty()), "no MSS outside a SYN");
        }
    }
}

#[test]
fn the_advertised_segment_is_the_links() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.3
    //= type=test
    //# As a result, when the effective MTU of an interface varies packet-to-packet, TCP implementations SHOULD use the
    //# smallest effective MTU of the interface to calculate the value to advertise in the MSS Option (SHLD-6).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.1
    //= type=test
    //# TCP implementations SHOULD send an MSS Option in every SYN segment when its receive MSS differs from the default
    //# 536 for IPv4 or 1220 for IPv6 (SHLD-5), and MAY send it always (MAY-3).
    for mtu in [600, 1280, 1500, 9000] {
        for mut wire in both_with(&Config { mtu, ..plain() }) {
            wire.listen(5);
            let mss = (mtu - 20 - wire.family.header()) as u16;
            assert_eq!(wire.syn(&MSS).options, [&[2, 4][..], &mss.to_be_bytes()].concat());
        }
    }
}
#[test]
fn large_windows_are_large() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# The window size MUST be treated as an unsigned number, or else large window sizes will appear like negative
    //# windows and TCP will not work (MUST-1).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# It is RECOMMENDED that implementations will reserve 32-bit fields for the send and receive window sizes in the
    //# connection record and do all window computations with 32 bits (REC-1).
    for mut wire in Wire::both() {
        let id = wire.established_with(&[2, 4, 5, 180, 1, 3, 3, 14], raw(ACK, 1, 1).window(0xffff));
        assert_eq!(wire.stack.tcp_info(wire.now, id).snd_wnd, 0xffff << 14);
    }
}

#[test]
fn a_window_that_shrinks_is_borne() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6
    //= type=test
    //# However, a sending TCP peer MUST be robust against window shrinking, which may cause the "usable window" (see
    //# Section 3.8.6.2.1) to become negative (MUST-34).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6
    //= type=test
    //# If this happens, the sender SHOULD NOT send new data (SHLD-15), but SHOULD retransmit normally the old
    //# unacknowledged data between SND.UNA and SND.UNA+SND.WND (SHLD-16).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6
    //= type=test
    //# The sender MAY also retransmit old data beyond SND.UNA+SND.WND (MAY-7), but SHOULD NOT time out the connection
    //# if data beyond the right window edge is not acknowledged (SHLD-17).
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        open_window(&mut wire, 1);
        let mss = wire.family.mss() as u32;
        assert_eq!(wire.write(id, &[1; 6000]).len(), 5);
        assert!(wire.send(raw(ACK, 1, 1).window(60_000)).is_empty());
        // The newest segment counts, so that this is no old one overtaken.
        wire.send(raw(ACK, 1, 1).window(1000).data(b"x"));
        wire.send(raw(ACK, 2, 1).window(1000));
        assert_eq!(wire.stack.tcp_info(wire.now, id).snd_wnd, 1000);
        assert!(wire.write(id, &[2; 6000]).is_empty(), "nothing new");
        let again = wire.wait(5 * SECOND);
        assert!(!again.is_empty() && again.iter().any(|one| (one.seq, one.payload) == (1, mss as usize)));
        assert!(again.iter().all(|one| one.seq < 6001), "nothing new: {again:?}");
        assert_eq!(wire.state(id), State::Established);
        // And it goes on when the window is back.
        let seen = wire.send(raw(ACK, 2, 6001).window(60_000));
        assert_eq!(seen.iter().map(|one| one.payload).sum::<usize>(), 6000);
    }
}

#[test]
fn a_closed_window_is_probed_for_ever() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6
    //= type=test
    //# If the window shrinks to zero, the TCP implementation MUST probe it in the standard way (described below)
    //# (MUST-35).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.1
    //= type=test
    //# Probing of zero (offered) windows MUST be supported (MUST-36).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.1
    //= type=test
    //# As long as the receiving TCP peer continues to send acknowledgments in response to the probe segments, the
    //# sending TCP peer MUST allow the connection to stay open (MUST-37).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.1
    //= type=test
    //# The transmitting host SHOULD send the first zero-window probe when a zero window has existed for the
    //# retransmission timeout period (SHLD-29) (Section 3.8.1), and SHOULD increase exponentially the interval between
    //# successive probes (SHLD-30).
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.send(raw(ACK, 1, 1).window(0));
        assert!(wire.write(id, b"data").is_empty());
        let start = wire.now;
        let mut times = Vec::new();
        while wire.now.since(start) < Duration::from_secs(4 * 3600) {
            for probe in wire.wait(SECOND / 10) {
                assert_eq!((probe.flags, probe.seq, probe.payload), (ACK, 0, 0));
                times.push(wire.now.since(start));
                // The peer answers.
                wire.send(raw(ACK, 1, 1).window(0));
            }
        }
        let rto = wire.stack.tcp_info(wire.now, id).rto;
        assert!(times[0] >= Duration::from_millis(200) && times[0] <= SECOND, "{:?} {rto:?}", times[0]);
        for (index, pair) in times.windows(2).enumerate().take(6) {
            let (gap, before) = (pair[1] - pair[0], if index == 0 { times[0] } else { pair[0] - times[index - 1] });
            assert!(gap > before, "they come ever more rarely: {times:?}");
        }
        assert_eq!(wire.state(id), State::Established);
        let seen = wire.send(raw(ACK, 1, 1).window(1000));
        assert_eq!(short(&seen), [(ACK, 1, 1, 4)]);
    }
}

#[test]
fn resets_and_urgent_pointers_pass_a_closed_window() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.4
    //= type=test
    //# A TCP receiver MUST process the RST and URG fields of all incoming segments, even when the receive window is
    //# zero (MUST-66).
    for mut wire in both_with(&Config { receive_buffer: 4096, ..plain() }) {
        let id = wire.established();
        let mut seq = 1;
        for _ in 0..50 {
            let seen = wire.send(raw(ACK, seq, 1).data(&[0; 512]));
            seq = seen.last().map_or(seq, |one| i64::from(one.ack));
        }
        let seen = wire.send(raw(ACK, seq, 1).data(b"!"));
        assert_eq!(seen.last().map(|one| (one.window, i64::from(one.ack))), Some((0, seq)), "the window is closed");
        assert_eq!(wire.stack.status(id).urgent, None);
        wire.send(raw(ACK, seq, 1).data(b"!").urgent(1));
        let urgent = wire.stack.status(id).urgent.expect("the pointer was taken");
        assert_eq!(urgent.ahead as i64, seq - 1);
        wire.send(raw(RST, seq, 0));
        assert_eq!(wire.state(id), State::Closed);
    }
}

#[test]
fn small_window_updates_are_held_back() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.2.2
    //= type=test
    //# A TCP implementation MUST include a SWS avoidance algorithm in the receiver (MUST-39).
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        wire.stack.tcp_set(wire.now, id, TcpOption::ReceiveBuffer(8000)).unwrap();
        let mut seq = 1;
        loop {
            let mut seen = wire.send(raw(ACK, seq, 1).data(&[0; 500]));
            seen.extend(wire.wait(SECOND / 10));
            let last = seen.last().expect("it is acknowledged");
            seq = i64::from(last.ack);
            if last.window == 0 {
                break;
            }
        }
        // One byte read opens nothing.
        wire.stack.tcp_recv_with(wire.now, id, |_| 1).unwrap();
        assert!(wire.take().is_empty());
        let seen = wire.send(raw(ACK, seq - 1, 1));
        assert_eq!(seen[0].window, 0, "nor does it show in an answer");
        while !wire.read(id).is_empty() {}
        let seen = wire.take();
        assert!(seen[0].window >= 4000, "{seen:?}");
    }
}
