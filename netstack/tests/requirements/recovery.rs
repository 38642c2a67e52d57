//! Loss: how it is found, what is sent again, how much may be in flight.

use std::time::Duration;

use netstack::{Congestion, TcpOption};

use crate::harness::wire::{MSS, Wire, plain, raw, short};
use crate::harness::{ACK, Seen};
use crate::{SECOND, both_with, open_window};

/// A SACK option.
fn sack(wire: &Wire, blocks: &[(i64, i64)]) -> Vec<u8> {
    let mut option = vec![1, 1, 5, 2 + 8 * blocks.len() as u8];
    for (left, right) in blocks {
        option.extend(wire.iss.wrapping_add(*left as u32).to_be_bytes());
        option.extend(wire.iss.wrapping_add(*right as u32).to_be_bytes());
    }
    option
}

fn starts(seen: &[Seen]) -> Vec<i64> {
    seen.iter().map(|one| i64::from(one.seq)).collect()
}

#[test]
fn the_first_flight_is_ten_segments() {
    //= https://www.rfc-editor.org/rfc/rfc6928#section-2
    //= type=test
    //# The first flight has up to ten segments.
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        open_window(&mut wire, 1);
        let seen = wire.write(id, &vec![0; 30 * wire.family.mss()]);
        assert_eq!(seen.len(), 10);
        assert_eq!(wire.stack.tcp_info(wire.now, id).snd_cwnd, 10);
    }
}

#[test]
fn a_lost_syn_starts_carefully() {
    //= https://www.rfc-editor.org/rfc/rfc6298#section-5.7
    //= type=test
    //# If the SYN had to be repeated, data starts with a time-out of three seconds.
    //= https://www.rfc-editor.org/rfc/rfc6928#section-2
    //= type=test
    //# If the SYN was lost the first flight is one segment.
    for mut wire in both_with(&plain()) {
        let (id, _) = wire.connect();
        wire.wait(SECOND + SECOND / 2);
        wire.send(raw(ACK | 2, 0, 1).options(&MSS).window(60_000));
        let info = wire.stack.tcp_info(wire.now, id);
        assert_eq!((info.snd_cwnd, info.rto), (1, 3 * SECOND));
    }
}

#[test]
fn new_data_follows_the_first_reports_of_a_hole() {
    //= https://www.rfc-editor.org/rfc/rfc5681#section-3.2
    //= type=test
    //# Each of the first two duplicates lets a new segment out and leaves the window as it is.
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        open_window(&mut wire, 1);
        let mss = wire.family.mss() as i64;
        wire.write(id, &vec![0; 20 * mss as usize]);
        let one = sack(&wire, &[(1 + mss, 1 + 2 * mss)]);
        let seen = wire.send(raw(ACK, 1, 1).window(60_000).options(&one));
        assert_eq!(starts(&seen), [1 + 10 * mss], "a new segment for the one that arrived");
    }
}

#[test]
fn three_duplicates_repair_a_hole_without_sack() {
    //= https://www.rfc-editor.org/rfc/rfc5681#section-3.2
    //= type=test
    //# The third duplicate acknowledgment repairs the first hole at once.
    //= https://www.rfc-editor.org/rfc/rfc6582#section-3.2
    //= type=test
    //# Without SACK a partial acknowledgment in recovery repairs the next hole, and recovery lasts until all that was
    //# in flight is acknowledged.
    for mut wire in both_with(&plain()) {
        let id = wire.established_with(&MSS, raw(ACK, 1, 1).window(60_000));
        let mss = wire.family.mss() as i64;
        wire.write(id, &vec![0; 10 * mss as usize]);
        assert!(wire.send(raw(ACK, 1, 1).window(60_000)).is_empty());
        assert!(wire.send(raw(ACK, 1, 1).window(60_000)).is_empty());
        assert_eq!(short(&wire.send(raw(ACK, 1, 1).window(60_000))), [(ACK, 1, 1, mss as usize)]);
        // A partial acknowledgment shows the next hole.
        let seen = wire.send(raw(ACK, 1, 1 + 3 * mss).window(60_000));
        assert_eq!(starts(&seen), [1 + 3 * mss]);
        assert_eq!(wire.stack.tcp_info(wire.now, id).ca_state, 3);
        wire.send(raw(ACK, 1, 1 + 10 * mss).window(60_000));
        let info = wire.stack.tcp_info(wire.now, id);
        assert_eq!((info.ca_state, info.snd_cwnd), (0, info.snd_ssthresh));
    }
}

#[test]
fn what_was_reported_is_not_sent_again() {
    //= https://www.rfc-editor.org/rfc/rfc2018#section-5.1
    //= type=test
    //# What was reported isn't sent again.
    //= https://www.rfc-editor.org/rfc/rfc8985#section-4
    //= type=test
    //# For each data segment sent, the sender MUST store its most recent transmission time
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        open_window(&mut wire, 1);
        let mss = wire.family.mss() as i64;
        wire.write(id, &vec![0; 10 * mss as usize]);
        let blocks = sack(&wire, &[(1 + 4 * mss, 1 + 10 * mss), (1 + mss, 1 + 2 * mss)]);
        wire.wait(SECOND / 20);
        let mut seen = wire.send(raw(ACK, 1, 1).window(60_000).options(&blocks));
        wire.wait(SECOND / 50);
        for _ in 0..3 {
            seen.extend(wire.send(raw(ACK, 1, 1).window(60_000).options(&blocks)));
        }
        let mut again = starts(&seen);
        again.dedup();
        assert_eq!(again, [1, 1 + 2 * mss, 1 + 3 * mss]);
    }
}

#[test]
fn a_report_that_is_taken_back_is_survived() {
    //= https://www.rfc-editor.org/rfc/rfc2018#section-8
    //= type=test
    //# A time-out with the first segment reported clears all reports, since the receiver may have thrown data away.
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        open_window(&mut wire, 1);
        let mss = wire.family.mss() as i64;
        wire.write(id, &vec![0; 4 * mss as usize]);
        let all = sack(&wire, &[(1 + mss, 1 + 4 * mss)]);
        wire.send(raw(ACK, 1, 1).window(60_000).options(&all));
        // The hole is filled and acknowledged, and what was reported before is not: it was thrown away.
        wire.send(raw(ACK, 1, 1 + mss).window(60_000));
        let mut again = starts(&wire.wait(10 * SECOND));
        again.dedup();
        assert!(again.contains(&(1 + mss)), "{again:?}");
        wire.send(raw(ACK, 1, 1 + 4 * mss).window(60_000));
        assert_eq!(wire.stack.status(id).unacked, 0);
    }
}

#[test]
fn the_freshest_blocks_are_reported_as_many_as_fit() {
    //= https://www.rfc-editor.org/rfc/rfc2018#section-3
    //= type=test
    //# As many blocks are sent as fit.
    //= https://www.rfc-editor.org/rfc/rfc2018#section-4
    //= type=test
    //# The first block holds the segment that triggered the acknowledgment.
    //= https://www.rfc-editor.org/rfc/rfc2018#section-4
    //= type=test
    //# Every acknowledgment reports what is out of order while there is any.
    for (timestamps, most) in [(false, 4), (true, 3)] {
        for mut wire in Wire::both() {
            wire.timestamps = timestamps;
            wire.established();
            let mut last = Vec::new();
            for at in [101, 301, 501, 701, 901] {
                last = wire.send(raw(ACK, at, 1).data(&[0; 50]));
            }
            let option = last[0].options.windows(2).position(|pair| pair == [5, 2 + 8 * most]).expect("as many as fit");
            let left = u32::from_be_bytes(last[0].options[option + 2..option + 6].try_into().unwrap());
            assert_eq!(left.wrapping_sub(crate::harness::wire::ISN), 901, "the freshest first");
        }
    }
}

#[test]
fn what_came_twice_is_reported_once() {
    //= https://www.rfc-editor.org/rfc/rfc2883#section-4
    //= type=test
    //# The first block reports a duplicate, below the acknowledgment or inside the block that follows.
    //= https://www.rfc-editor.org/rfc/rfc2883#section-4
    //= type=test
    //# A duplicate is reported once.
    //= https://www.rfc-editor.org/rfc/rfc2883#section-4.2.3
    //= type=test
    //# A partial duplicate is reported by the part that was there already.
    for mut wire in Wire::both() {
        wire.established();
        let blocks = |seen: &Seen| -> Vec<(i64, i64)> {
            let Some(at) = seen.options.iter().position(|&kind| kind == 5) else { return vec![] };
            let word = |at: usize| {
                let wire = u32::from_be_bytes(seen.options[at..at + 4].try_into().expect("four bytes"));
                i64::from(wire.wrapping_sub(crate::harness::wire::ISN))
            };
            let count = (usize::from(seen.options[at + 1]) - 2) / 8;
            (0..count).map(|index| (word(at + 2 + 8 * index), word(at + 6 + 8 * index))).collect()
        };
        wire.send(raw(ACK, 1, 1).data(&[0; 100]));
        wire.send(raw(ACK, 201, 1).data(&[0; 100]));
        // Below the acknowledgment.
        let seen = wire.send(raw(ACK, 51, 1).data(&[0; 50]));
        assert_eq!(blocks(&seen[0]), [(51, 101), (201, 301)]);
        // Inside what waits behind a gap, whole and in part.
        let seen = wire.send(raw(ACK, 221, 1).data(&[0; 10]));
        assert_eq!(blocks(&seen[0]), [(221, 231), (201, 301)]);
        let seen = wire.send(raw(ACK, 281, 1).data(&[0; 50]));
        assert_eq!(blocks(&seen[0]), [(281, 301), (201, 331)]);
        let seen = wire.send(raw(ACK, 401, 1).data(&[0; 10]));
        assert_eq!(blocks(&seen[0]), [(401, 411), (201, 331)], "told once");
    }
}

#[test]
fn duplicates_that_are_reported_undo_a_reduction() {
    //= https://www.rfc-editor.org/rfc/rfc2883#section-5
    //= type=test
    //# A sender that learns that every retransmission was a duplicate undoes its reduction.
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        open_window(&mut wire, 1);
        let mss = wire.family.mss() as i64;
        wire.write(id, &vec![0; 10 * mss as usize]);
        let before = wire.stack.tcp_info(wire.now, id);
        let blocks = sack(&wire, &[(1 + mss, 1 + 10 * mss)]);
        let again = wire.send(raw(ACK, 1, 1).window(60_000).options(&blocks));
        assert_eq!(starts(&again)[0], 1);
        assert_eq!(wire.stack.tcp_info(wire.now, id).ca_state, 3);
        // It was only late: everything is acknowledged, and the repetition reported as a duplicate.
        let duplicate = sack(&wire, &[(1, 1 + mss)]);
        wire.send(raw(ACK, 1, 1 + 10 * mss).window(60_000).options(&duplicate));
        let after = wire.stack.tcp_info(wire.now, id);
        assert_eq!((after.ca_state, after.dsack_dups, after.snd_ssthresh), (0, 1, before.snd_ssthresh));
    }
}

#[test]
fn the_tail_is_probed_before_the_clock_runs_out() {
    //= https://www.rfc-editor.org/rfc/rfc8985#section-7.3
    //= type=test
    //# When the PTO timer expires, the sender MUST check whether both of the following conditions are met before
    //# sending a loss probe
    //= https://www.rfc-editor.org/rfc/rfc8985#section-7.2
    //= type=test
    //# The sender SHOULD start or restart a loss probe PTO timer after transmitting new data
    //= https://www.rfc-editor.org/rfc/rfc8985#section-7.3
    //= type=test
    //# If both conditions are met, then the sender SHOULD transmit a previously unsent data segment, if one exists and
    //# the receive window allows
    //= https://www.rfc-editor.org/rfc/rfc8985#section-7.3
    //= type=test
    //# If such an unsent segment is not available, then the sender SHOULD retransmit the highest-sequence segment sent
    //# so far
    //= https://www.rfc-editor.org/rfc/rfc8985#section-7.3
    //= type=test
    //# the sender MUST re-arm the RTO timer, not the PTO
    //= https://www.rfc-editor.org/rfc/rfc8985#section-7.4.2
    //= type=test
    //# SHOULD invoke a congestion control response equivalent to a fast recovery.
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        // A round trip of 100 ms.
        for at in 0..30 {
            wire.write(id, b"x");
            wire.wait(SECOND / 10);
            wire.send(raw(ACK, 1, 2 + at).window(60_000));
        }
        let mss = wire.family.mss() as i64;
        wire.write(id, &vec![0; 3 * mss as usize]);
        let info = wire.stack.tcp_info(wire.now, id);
        let start = wire.now;
        let probe = wire.wait(info.rtt * 2 + Duration::from_millis(10));
        assert_eq!(starts(&probe), [31 + 2 * mss], "the last segment, after two round trips");
        assert!(probe[0].at.since(start) >= info.rtt * 2);
        assert!(wire.stack.tcp_info(wire.now, id).ca_state == 0);
        // The probe repaired it: one reduction, although no loss was ever seen.
        let before = wire.stack.tcp_info(wire.now, id).snd_cwnd;
        wire.send(raw(ACK, 1, 31 + 3 * mss).window(60_000));
        wire.write(id, &vec![0; mss as usize]);
        wire.send(raw(ACK, 1, 31 + 4 * mss).window(60_000));
        assert!(wire.stack.tcp_info(wire.now, id).snd_ssthresh < before);
    }
}

#[test]
fn a_pause_ages_the_window() {
    //= https://www.rfc-editor.org/rfc/rfc5681#section-4.1
    //= type=test
    //# After an idle time the window restarts from no more than the initial one.
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        open_window(&mut wire, 1);
        let mut seen = wire.write(id, &vec![0; 80 * wire.family.mss()]);
        while let Some(last) = seen.last() {
            let end = i64::from(last.seq) + last.payload as i64;
            seen = wire.send(raw(ACK, 1, end).window(60_000));
        }
        let grown = wire.stack.tcp_info(wire.now, id).snd_cwnd;
        assert!(grown > 15, "{grown}");
        wire.wait(60 * SECOND);
        wire.write(id, b"x");
        assert_eq!(wire.stack.tcp_info(wire.now, id).snd_cwnd, 10);
    }
}

#[test]
fn the_window_grows_as_it_should() {
    //= https://www.rfc-editor.org/rfc/rfc5681#section-3.1
    //= type=test
    //# In slow start the window grows by what was acknowledged.
    //= https://www.rfc-editor.org/rfc/rfc5681#section-3.1
    //= type=test
    //# In congestion avoidance the window grows by one segment in a round trip.
    //= https://www.rfc-editor.org/rfc/rfc5681#section-3.1
    //= type=test
    //# A loss lowers the threshold to half of what was in flight, a time-out the window to one segment.
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        wire.stack.tcp_set(wire.now, id, TcpOption::Congestion(Congestion::Reno)).unwrap();
        open_window(&mut wire, 1);
        let mss = wire.family.mss() as i64;
        wire.write(id, &vec![0; 40 * mss as usize]);
        wire.send(raw(ACK, 1, 1 + 10 * mss).window(60_000));
        assert_eq!(wire.stack.tcp_info(wire.now, id).snd_cwnd, 20, "as much as was acknowledged");
        // A loss halves what was in flight.
        let blocks = sack(&wire, &[(1 + 11 * mss, 1 + 15 * mss)]);
        wire.send(raw(ACK, 1, 1 + 10 * mss).window(60_000).options(&blocks));
        let info = wire.stack.tcp_info(wire.now, id);
        assert_eq!((info.ca_state, info.snd_ssthresh), (3, 10));
        // A time-out leaves one segment.
        wire.wait(10 * SECOND);
        let info = wire.stack.tcp_info(wire.now, id);
        assert_eq!((info.ca_state, info.snd_cwnd <= 2), (4, true), "{info:?}");
    }
}

#[test]
fn a_time_out_that_came_too_early_is_undone() {
    //= https://www.rfc-editor.org/rfc/rfc5682#section-3.1
    //= type=test
    //# After a time-out new data goes out first; an acknowledgment of what was sent only once shows that the time-out
    //# was spurious.
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        open_window(&mut wire, 1);
        let mss = wire.family.mss() as i64;
        wire.write(id, &vec![0; 20 * mss as usize]);
        let before = wire.stack.tcp_info(wire.now, id).snd_cwnd;
        // The path stalls. A probe of the tail goes out, then the first segment again.
        let again = wire.wait(SECOND / 2 + SECOND / 4);
        assert!(again.iter().any(|one| one.seq == 1), "{again:?}");
        assert_eq!(wire.stack.tcp_info(wire.now, id).ca_state, 4);
        // The first acknowledgment may be of either copy: so new data goes out, and nothing again.
        let seen = wire.send(raw(ACK, 1, 1 + mss).window(60_000));
        assert!(!seen.is_empty() && starts(&seen).iter().all(|&start| start > 10 * mss), "{seen:?}");
        // The next is of what was never sent again: nothing was lost.
        wire.send(raw(ACK, 1, 1 + 2 * mss).window(60_000));
        let info = wire.stack.tcp_info(wire.now, id);
        assert_eq!((info.ca_state, info.lost), (0, 0));
        assert!(info.snd_cwnd >= before, "{} {before}", info.snd_cwnd);
    }
}

#[test]
fn a_time_out_for_a_reason_is_not() {
    //= https://www.rfc-editor.org/rfc/rfc5682#section-3.1
    //= type=test
    //# If what was sent after the time-out arrives while what is before it is missing, recovery goes on as usual.
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        open_window(&mut wire, 1);
        let mss = wire.family.mss() as i64;
        wire.write(id, &vec![0; 20 * mss as usize]);
        wire.wait(SECOND / 2 + SECOND / 4);
        let seen = wire.send(raw(ACK, 1, 1 + mss).window(60_000));
        let (from, to) = (i64::from(seen[0].seq), i64::from(seen[0].seq) + seen[0].payload as i64);
        // What was just sent arrives, while what is before it is still missing: it was lost.
        let blocks = sack(&wire, &[(from, to)]);
        let seen = wire.send(raw(ACK, 1, 1 + mss).window(60_000).options(&blocks));
        assert_eq!(starts(&seen)[0], 1 + mss, "repaired from the hole on");
        assert_eq!(wire.stack.tcp_info(wire.now, id).ca_state, 4);
    }
}

#[test]
fn a_retransmission_by_mistake_is_known_by_its_echo() {
    //= https://www.rfc-editor.org/rfc/rfc3522#section-3.2
    //= type=test
    //# An acknowledgment that echoes a timestamp from before the first retransmission shows that the retransmission was
    //# spurious.
    for mut wire in both_with(&plain()) {
        wire.timestamps = true;
        let id = wire.established();
        open_window(&mut wire, 1);
        let mss = wire.stack.tcp_info(wire.now, id).snd_mss as i64;
        let sent = wire.write(id, &vec![0; 10 * mss as usize]);
        let before = wire.stack.tcp_info(wire.now, id);
        let at = sent[0].options.windows(2).position(|pair| pair == [8, 10]).expect("agreed");
        let first = u32::from_be_bytes(sent[0].options[at + 2..at + 6].try_into().unwrap());
        wire.wait(SECOND / 20);
        let blocks = sack(&wire, &[(1 + mss, 1 + 10 * mss)]);
        wire.ts_echo = first;
        assert_eq!(starts(&wire.send(raw(ACK, 1, 1).window(60_000).options(&blocks)))[0], 1);
        assert_eq!(wire.stack.tcp_info(wire.now, id).ca_state, 3);
        wire.send(raw(ACK, 1, 1 + 10 * mss).window(60_000));
        let after = wire.stack.tcp_info(wire.now, id);
        assert_eq!((after.ca_state, after.snd_ssthresh), (0, before.snd_ssthresh));
        assert!(after.snd_cwnd >= before.snd_cwnd);
    }
}

#[test]
fn the_retransmission_timer_runs_while_something_is_in_flight() {
    //= https://www.rfc-editor.org/rfc/rfc6298#section-5.2
    //= type=test
    //# The timer stops when everything is acknowledged.
    //= https://www.rfc-editor.org/rfc/rfc6298#section-5.3
    //= type=test
    //# An acknowledgment of new data starts it anew.
    for mut wire in both_with(&plain()) {
        let id = wire.established_with(&MSS, raw(ACK, 1, 1).window(60_000));
        let mss = wire.family.mss() as i64;
        wire.write(id, &vec![0; 2 * mss as usize]);
        let rto = wire.stack.tcp_info(wire.now, id).rto;
        wire.wait(rto - Duration::from_millis(10));
        wire.send(raw(ACK, 1, 1 + mss).window(60_000));
        let rto = wire.stack.tcp_info(wire.now, id).rto;
        assert!(wire.wait(rto - Duration::from_millis(10)).is_empty(), "it starts anew");
        assert_eq!(starts(&wire.wait(Duration::from_millis(20))), [1 + mss]);
        wire.send(raw(ACK, 1, 1 + 2 * mss).window(60_000));
        assert!(wire.wait(100 * SECOND).is_empty(), "it has stopped");
    }
}
