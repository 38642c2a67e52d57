//! When and what to acknowledge.

use netstack::Config;

use crate::harness::wire::{CWR, ECE, MSS, SACK_PERMITTED, Wire, plain, raw, short};
use crate::harness::{ACK, SYN};
use crate::{SECOND, both_with};

#[test]
fn several_segments_are_acknowledged_together() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.10.7.4
    //= type=test
    //# In general, the processing of received segments MUST be implemented to aggregate ACK segments whenever possible
    //# (MUST-58).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.10.7.4
    //= type=test
    //# For example, if the TCP endpoint is processing a series of queued segments, it MUST process them all before
    //# sending any ACK segments (MUST-59).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.10.7.4
    //= type=test
    //# Segments with higher beginning sequence numbers SHOULD be held for later processing (SHLD-31).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.10.7.4
    //= type=test
    //# A TCP implementation MAY send an ACK segment acknowledging RCV.NXT when a valid segment arrives that is in the
    //# window but not at the left window edge (MAY-13).
    for mut wire in Wire::both() {
        let id = wire.established();
        assert_eq!(short(&wire.send(raw(ACK, 101, 1).data(&[2; 100]))), [(ACK, 1, 1, 0)], "out of order: at once");
        // Several that arrive before the stack is asked to send.
        for at in [201, 301, 1] {
            let bytes = wire.bytes(&raw(ACK, at, 1).data(&[3; 100]));
            let packet = netstack::RxPacket { data: &bytes, checksum: netstack::Checksum::Verify, gso_size: None };
            wire.stack.handle_packet(wire.now, packet);
        }
        assert_eq!(short(&wire.take()), [(ACK, 1, 401, 0)], "one for all");
        assert_eq!(wire.stack.status(id).readable, 400);
    }
}

#[test]
fn a_series_of_packets_is_acknowledged_at_its_end() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.10.7.4
    //= type=test
    //# For example, if the TCP endpoint is processing a series of queued segments, it MUST process them all before
    //# sending any ACK segments (MUST-59).
    for mut wire in Wire::both() {
        let id = wire.established();
        let mss = wire.family.mss();
        let mut at = 1u32;
        let mut send = |wire: &mut Wire, count: usize| {
            let mut answers = Vec::new();
            for _ in 0..count {
                answers.extend(wire.send(raw(ACK, i64::from(at), 1).data(&vec![0; mss])));
                at += mss as u32;
                wire.read(id);
            }
            (at, answers)
        };
        send(&mut wire, 20);
        wire.wait(SECOND / 10);
        wire.stack.set_more_queued(true);
        assert!(send(&mut wire, 4).1.is_empty(), "more are waiting");
        wire.stack.set_more_queued(false);
        let end = send(&mut wire, 0).0;
        assert_eq!(short(&wire.take()), [(ACK, 1, end, 0)], "one for all");
        wire.stack.set_more_queued(true);
        let answers = send(&mut wire, 200).1;
        assert!(
            (1..=40).contains(&answers.len()),
            "{} for 200 segments: when much of the window is used",
            answers.len()
        );
        // One that is held leaves after a move.
        send(&mut wire, 4);
        let image = wire.stack.freeze(wire.now);
        let config = wire.stack.config().clone();
        wire.stack = netstack::Stack::thaw_silently(image, wire.now, config).expect("its own image");
        let end = send(&mut wire, 0).0;
        assert_eq!(short(&wire.take()), [(ACK, 1, end, 0)]);
    }
}

#[test]
fn acknowledgments_are_delayed_a_little() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.3
    //= type=test
    //# A TCP endpoint SHOULD implement a delayed ACK (SHLD-18), but an ACK should not be excessively delayed; in
    //# particular, the delay MUST be less than 0.5 seconds (MUST-40).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.3
    //= type=test
    //# An ACK SHOULD be generated for at least every second full-sized segment or 2*RMSS bytes of new data (where RMSS
    //# is the MSS specified by the TCP endpoint receiving the segments to be acknowledged, or the default value if not
    //# specified) (SHLD-19).
    for mut wire in Wire::both() {
        let id = wire.established();
        let mss = wire.family.mss();
        // Those that are sent at once at the start; and so that it knows what a full segment is.
        let mut at = 1;
        while !wire.send(raw(ACK, at, 1).data(&vec![0; mss])).is_empty() {
            at += mss as i64;
            wire.read(id);
            assert!(at < 100_000);
        }
        at += mss as i64;
        let start = wire.now;
        let seen = wire.wait(SECOND / 10);
        assert_eq!(seen.len(), 1);
        assert!(seen[0].at.since(start) < SECOND / 2);
        assert!(wire.send(raw(ACK, at, 1).data(&vec![0; mss])).is_empty());
        assert_eq!(wire.send(raw(ACK, at + mss as i64, 1).data(&vec![0; mss])).len(), 1, "every second one");
    }
}
#[test]
fn congestion_is_told_both_ways() {
    //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.2
    //= type=test
    //# New data leaves marked as ECN-capable.
    //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.5
    //= type=test
    //# What is sent again is not marked.
    //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.4
    //= type=test
    //# Segments without data are not marked.
    //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.2
    //= type=test
    //# The window is reduced at most once for the data of one window.
    //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.2
    //= type=test
    //# CWR goes out with the first new data after any reduction.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.2
    //= type=test
    //# A TCP endpoint SHOULD implement ECN as described in RFC 3168 (SHLD-8).
    for mut wire in both_with(&Config { ecn: true, ..plain() }) {
        let (id, syn) = wire.connect();
        assert_eq!(syn.flags, SYN | ECE | CWR);
        wire.send(raw(SYN | ACK | ECE, 0, 1).options(&[&MSS[..], &SACK_PERMITTED].concat()).window(60_000));
        assert!(wire.stack.tcp_info(wire.now, id).ecn);
        let mss = wire.family.mss();
        let seen = wire.write(id, &vec![0; 2 * mss]);
        assert!(seen.iter().all(|one| one.ecn == 2), "new data is marked as able: {seen:?}");
        // The echo reduces once and is confirmed with new data.
        let before = wire.stack.tcp_info(wire.now, id).snd_cwnd;
        wire.send(raw(ACK | ECE, 1, 1 + mss as i64).window(60_000));
        wire.send(raw(ACK | ECE, 1, 1 + 2 * mss as i64).window(60_000));
        let after = wire.stack.tcp_info(wire.now, id);
        assert!(after.snd_ssthresh < before && after.snd_ssthresh >= before / 2, "{after:?}");
        let seen = wire.write(id, &vec![0; 2 * mss]);
        let told: Vec<_> = seen.iter().map(|one| one.flags & CWR).collect();
        assert_eq!(told, [CWR, 0]);
        // A loss is confirmed too.
        wire.send(raw(ACK, 1, 1 + 4 * mss as i64).window(60_000));
        wire.write(id, &vec![0; mss]);
        let again = wire.wait(2 * SECOND);
        assert!(
            !again.is_empty() && again.iter().all(|one| (one.flags & CWR, one.ecn) == (0, 0)),
            "not what is sent again"
        );
        assert_eq!(wire.send(raw(ACK, 11, 1 + 4 * mss as i64).data(b"x"))[0].ecn, 0, "nor a bare acknowledgment");
        wire.send(raw(ACK, 1, 1 + 5 * mss as i64).window(60_000));
        assert_eq!(wire.write(id, &vec![0; mss])[0].flags & CWR, CWR);
    }
}

#[test]
fn a_syn_that_asks_for_notification_in_vain_asks_no_more() {
    //= https://www.rfc-editor.org/rfc/rfc3168#section-6.1.1.1
    //= type=test
    //# A SYN that is repeated doesn't ask.
    for mut wire in both_with(&Config { ecn: true, ..plain() }) {
        let (_, syn) = wire.connect();
        assert_eq!(syn.flags, SYN | ECE | CWR);
        assert_eq!(wire.wait(SECOND + SECOND / 2)[0].flags, SYN);
    }
}
