//! Timestamps and window scaling.

use std::time::Duration;

use netstack::State;

use crate::harness::wire::{MSS, SACK_PERMITTED, Wire, plain, raw, short};
use crate::harness::{ACK, RST, SYN, Seen};
use crate::{SECOND, both_with};

/// Value and echo of a packet's timestamps.
fn stamps(seen: &Seen) -> Option<(u32, u32)> {
    let at = seen.options.windows(2).position(|pair| pair == [8, 10])?;
    let word = |at: usize| u32::from_be_bytes(seen.options[at..at + 4].try_into().expect("four bytes"));
    Some((word(at + 2), word(at + 6)))
}

/// A connection with timestamps in ESTABLISHED, the peer's clock at 1000.
fn established(wire: &mut Wire) -> netstack::SocketId {
    wire.timestamps = true;
    let listener = wire.listen(5);
    let answer = wire.syn(&[&MSS[..], &SACK_PERMITTED].concat());
    wire.ts_echo = stamps(&answer).expect("agreed").0;
    wire.send(raw(ACK, 1, 1).window(60_000));
    wire.stack.tcp_accept(wire.now, listener).expect("established")
}

#[test]
fn an_echo_that_was_never_sent_opens_nothing() {
    //= https://www.rfc-editor.org/rfc/rfc7323#section-4.1
    //= type=test
    //# A SYN-ACK that echoes a timestamp never sent doesn't open a connection.
    for mut wire in Wire::both() {
        let (id, syn) = wire.connect();
        let (value, _) = stamps(&syn).expect("offered");
        wire.timestamps = true;
        wire.ts_echo = value.wrapping_add(50);
        assert_eq!(short(&wire.send(raw(SYN | ACK, 0, 1).options(&MSS))), [(RST, 1, 0, 0)]);
        assert_eq!(wire.state(id), State::SynSent);
        wire.ts_echo = value;
        assert_eq!(short(&wire.send(raw(SYN | ACK, 0, 1).options(&MSS))), [(ACK, 1, 1, 0)]);
    }
}

#[test]
fn every_segment_has_them_once_agreed() {
    //= https://www.rfc-editor.org/rfc/rfc7323#section-3.2
    //= type=test
    //# Once both SYNs carried timestamps, every segment but an RST carries them.
    for mut wire in both_with(&plain()) {
        let id = established(&mut wire);
        let mut seen = wire.write(id, &[0; 5000]);
        seen.extend(wire.send(raw(ACK, 1, 1).data(b"x")));
        wire.stack.tcp_shutdown(wire.now, id, netstack::Shutdown::Write).unwrap();
        seen.extend(wire.take());
        seen.extend(wire.wait(3 * SECOND));
        assert!(seen.len() > 6 && seen.iter().all(|one| stamps(one).is_some()), "{seen:?}");
        // And a peer that didn't offer them gets none.
        wire.timestamps = false;
        wire.port += 1;
        assert!(stamps(&wire.syn(&MSS)).is_none());
    }
}

#[test]
fn what_is_echoed_comes_from_the_left_edge() {
    //= https://www.rfc-editor.org/rfc/rfc7323#section-4.3
    //= type=test
    //# TS.Recent is taken only from a segment that reaches back to the last acknowledgment sent.
    for mut wire in Wire::both() {
        established(&mut wire);
        let seen = wire.send(raw(ACK, 101, 1).data(&[0; 100]).ts(1050));
        assert_eq!(stamps(&seen[0]).map(|(_, echo)| echo), Some(1000), "what left a gap isn't echoed");
        let seen = wire.send(raw(ACK, 1, 1).data(&[0; 100]).ts(1040));
        assert_eq!(stamps(&seen[0]).map(|(_, echo)| echo), Some(1040), "what fills it is");
        let seen = wire.send(raw(ACK, 201, 1).data(&[0; 100]).ts(1060));
        assert_eq!(stamps(&seen[0]).map(|(_, echo)| echo), Some(1060));
    }
}

#[test]
fn old_values_lose_their_meaning_after_24_days() {
    //= https://www.rfc-editor.org/rfc/rfc7323#section-5.5
    //= type=test
    //# After 24 days without a newer one TS.Recent means nothing.
    for mut wire in Wire::both() {
        let id = established(&mut wire);
        wire.send(raw(ACK, 1, 1).data(b"a").ts(2000));
        wire.read(id);
        wire.wait(Duration::from_secs(23 * 24 * 3600));
        wire.send(raw(ACK, 2, 1).data(b"b").ts(1999));
        assert_eq!(wire.stack.status(id).readable, 0, "still old");
        wire.wait(Duration::from_secs(2 * 24 * 3600));
        wire.send(raw(ACK, 2, 1).data(b"b").ts(1999));
        assert_eq!(wire.stack.status(id).readable, 1, "it may have wrapped");
    }
}

#[test]
fn repeated_segments_are_measured_by_their_echo() {
    //= https://www.rfc-editor.org/rfc/rfc7323#section-4.1
    //= type=test
    //# An acknowledgment that advances measures the round-trip time by the echo, also of repeated segments.
    for mut wire in both_with(&plain()) {
        let id = established(&mut wire);
        wire.write(id, b"lost");
        let again = wire.wait(SECOND);
        let (value, _) = stamps(again.last().expect("sent again")).expect("agreed");
        let sent_at = again.last().map(|one| one.at).expect("sent again");
        wire.ts_echo = value;
        let smoothed = wire.stack.tcp_info(wire.now, id).rtt;
        wire.send(raw(ACK, 1, 5).window(60_000));
        let measured = wire.now.since(sent_at);
        let after = wire.stack.tcp_info(wire.now, id).rtt;
        let expected = (smoothed * 7 + measured) / 8;
        assert!(after.abs_diff(expected) < Duration::from_millis(2), "{after:?} {expected:?}");
    }
}

#[test]
fn a_repeated_segment_without_them_is_no_measure() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.1
    //= type=test
    //# The RTO MUST be computed according to the algorithm in [10], including Karn's algorithm for taking RTT samples
    //# (MUST-18).
    //= https://www.rfc-editor.org/rfc/rfc6298#section-3
    //= type=test
    //# No measurement is taken from a segment that was sent again, unless timestamps tell the copies apart.
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        let before = wire.stack.tcp_info(wire.now, id).rtt;
        wire.write(id, b"lost");
        assert!(!wire.wait(SECOND).is_empty());
        wire.send(raw(ACK, 1, 5));
        assert_eq!(wire.stack.tcp_info(wire.now, id).rtt, before);
        // One that was sent once is.
        wire.write(id, b"kept");
        wire.wait(Duration::from_millis(100));
        wire.send(raw(ACK, 1, 9));
        assert!(wire.stack.tcp_info(wire.now, id).rtt > before + Duration::from_millis(10));
    }
}

#[test]
fn scaling_is_for_both_or_none() {
    //= https://www.rfc-editor.org/rfc/rfc7323#section-2.2
    //= type=test
    //# Windows are scaled only if both SYNs carried the option.
    //= https://www.rfc-editor.org/rfc/rfc7323#section-2.2
    //= type=test
    //# The window of a SYN is never scaled.
    //= https://www.rfc-editor.org/rfc/rfc7323#section-2.3
    //= type=test
    //# A shift above 14 counts as 14.
    for mut wire in Wire::both() {
        // An active opener: the window in the SYN-ACK isn't scaled, those after it are.
        let (id, syn) = wire.connect();
        assert!(syn.options.windows(2).any(|pair| pair == [3, 3]), "offered");
        wire.send(raw(SYN | ACK, 0, 1).options(&[2, 4, 5, 180, 1, 3, 3, 7]).window(1000));
        assert_eq!(wire.stack.tcp_info(wire.now, id).snd_wnd, 1000);
        wire.send(raw(ACK, 1, 1).window(1001));
        assert_eq!(wire.stack.tcp_info(wire.now, id).snd_wnd, 1001 << 7);
        wire.stack.tcp_abort(wire.now, id);
        wire.take();
        // A shift beyond 14 counts as 14; no offer, no scaling.
        let listener = wire.listen(5);
        for (options, shift) in [(&[2, 4, 5, 180, 1, 3, 3, 200][..], 14), (&[2, 4, 5, 180][..], 0)] {
            wire.port += 1;
            let answer = wire.syn(options);
            assert_eq!(answer.options.windows(2).any(|pair| pair == [3, 3]), shift > 0);
            wire.send(raw(ACK, 1, 1).window(3));
            let id = wire.stack.tcp_accept(wire.now, listener).unwrap();
            assert_eq!(wire.stack.tcp_info(wire.now, id).snd_wnd, 3 << shift);
        }
    }
}

#[test]
fn the_clocks_of_two_peers_cannot_be_compared() {
    //= https://www.rfc-editor.org/rfc/rfc7323#section-5.4
    //= type=test
    //# The timestamp clock starts at a random offset for each pair of hosts.
    for mut wire in Wire::both() {
        wire.timestamps = true;
        wire.listen(5);
        let first = stamps(&wire.syn(&MSS)).expect("agreed").0;
        wire.port += 1;
        assert_eq!(stamps(&wire.syn(&MSS)).expect("agreed").0, first, "one peer sees one clock");
        wire.source = Some(wire.family.pick("10.0.0.3", "fd00::3").parse().unwrap());
        let other = stamps(&wire.syn(&MSS)).expect("agreed").0;
        assert!(other.abs_diff(first) > 1_000_000, "{first} {other}");
    }
}
