//! How large packets may be: told by ICMP, found by probing, over both families.

mod harness;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use harness::wire::{Wire, raw};
use harness::{ACK, Link, Pair, Side, config, stream};
use netstack::SocketId;

const SECOND: Duration = Duration::from_secs(1);

/// Two stacks on a link of 1500 bytes over a path that silently drops what is larger than the cell says.
fn pair(v6: bool) -> (Pair, Rc<Cell<usize>>) {
    let (a, b) = if v6 { ("fd00::1", "fd00::2") } else { ("10.0.0.1", "10.0.0.2") };
    let mut pair = Pair::with(11, Link { cut: true, ..Link::default() }, config(a), config(b));
    let widest = Rc::new(Cell::new(1500));
    let (limit, ip) = (widest.clone(), if v6 { 40 } else { 20 });
    pair.drop = Some(Box::new(move |seen| ip + 20 + seen.options.len() + seen.payload > limit.get()));
    (pair, widest)
}

fn transfer(pair: &mut Pair, sender: SocketId, receiver: SocketId, len: usize) {
    let data = stream(len, 5);
    let (mut sent, mut received) = (0, 0);
    let done = pair.run_until(300 * SECOND, |pair| {
        sent += pair.write(Side::A, sender, &data[sent..]);
        let bytes = pair.read(Side::B, receiver);
        assert!(data[received..].starts_with(&bytes));
        received += bytes.len();
        received == data.len()
    });
    assert!(done, "{received} of {len} bytes came: {:?}", pair.a.tcp_info(pair.now, sender));
}

#[test]
fn a_black_hole_is_left_and_the_path_measured() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.3
    //= type=test
    //# The value of R1 SHOULD correspond to at least 3 retransmissions, at the current RTO (SHLD-10).
    //= https://www.rfc-editor.org/rfc/rfc4821#section-7.7
    //= type=test
    //# Repeated loss of full-sized segments without an ICMP message lowers the size to one that passes nearly anywhere.
    //= https://www.rfc-editor.org/rfc/rfc4821#section-7.2
    //= type=test
    //# The largest size that passes is searched between the bounds, upwards from the one that works.
    //= https://www.rfc-editor.org/rfc/rfc4821#section-7.3
    //= type=test
    //# After ten minutes the search looks for a path that has become wider.
    //= https://www.rfc-editor.org/rfc/rfc1191#section-6.3
    //= type=test
    //# After ten minutes a larger size is tried.
    for v6 in [false, true] {
        let (mut pair, widest) = pair(v6);
        let (client, server, _) = pair.establish();
        transfer(&mut pair, client, server, 100_000);
        widest.set(1400);
        transfer(&mut pair, client, server, 3_000_000);
        assert!(pair.a.tcp_info(pair.now, client).pmtu < 1400, "it gets through");
        pair.run_for(2 * SECOND);
        transfer(&mut pair, client, server, 3_000_000);
        let info = pair.a.tcp_info(pair.now, client);
        assert!((1384..=1400).contains(&info.pmtu), "v6 {v6}: {} of 1400", info.pmtu);
        // It stays at what it found: nothing more is lost.
        let lost = pair.a.tcp_info(pair.now, client).total_retrans;
        transfer(&mut pair, client, server, 3_000_000);
        assert_eq!(pair.a.tcp_info(pair.now, client).total_retrans, lost);
        // After ten minutes it looks again.
        widest.set(1500);
        pair.run_for(601 * SECOND);
        transfer(&mut pair, client, server, 1_000_000);
        assert_eq!(pair.a.tcp_info(pair.now, client).pmtu, 1500);
    }
}

#[test]
fn a_probe_that_is_lost_is_no_congestion() {
    //= https://www.rfc-editor.org/rfc/rfc4821#section-7.5
    //= type=test
    //# The loss of a probe alone is no sign of congestion.
    //= https://www.rfc-editor.org/rfc/rfc4821#section-7.4
    //= type=test
    //# A probe leaves only if enough follows it to show its loss without a time-out.
    let (mut pair, widest) = pair(false);
    let (client, server, _) = pair.establish();
    transfer(&mut pair, client, server, 100_000);
    widest.set(1400);
    transfer(&mut pair, client, server, 100_000);
    pair.run_for(2 * SECOND);
    // Too little for a probe, enough to open the window.
    for _ in 0..30 {
        transfer(&mut pair, client, server, 4_000);
    }
    let before = pair.a.tcp_info(pair.now, client);
    transfer(&mut pair, client, server, 3_000_000);
    let after = pair.a.tcp_info(pair.now, client);
    assert!(after.pmtu > before.pmtu && after.total_retrans > before.total_retrans, "{before:?}\n{after:?}");
    // In bytes, since segments have grown; give or take what counting in segments hides.
    assert!((after.snd_ssthresh + 1) * after.snd_mss >= before.snd_ssthresh * before.snd_mss);
    assert!((after.snd_cwnd + 1) * after.snd_mss >= before.snd_cwnd * before.snd_mss);
}

#[test]
fn an_outage_leaves_the_size_as_it_was() {
    let (mut pair, widest) = pair(false);
    let (client, server, _) = pair.establish();
    transfer(&mut pair, client, server, 100_000);
    widest.set(0);
    pair.write(Side::A, client, &stream(20_000, 0));
    pair.run_for(10 * SECOND);
    assert!(pair.a.tcp_info(pair.now, client).pmtu < 1500, "it was taken for a black hole");
    widest.set(1500);
    let mut received = 0;
    assert!(pair.run_until(60 * SECOND, |pair| {
        received += pair.read(Side::B, server).len();
        received == 20_000
    }));
    pair.run_for(2 * SECOND);
    transfer(&mut pair, client, server, 1_000_000);
    assert_eq!(pair.a.tcp_info(pair.now, client).pmtu, 1500, "one probe shows that it wasn't");
}

#[test]
fn what_icmp_claims_is_checked() {
    //= https://www.rfc-editor.org/rfc/rfc1191#section-3
    //= type=test
    //# What an ICMP message claims is checked against what is in flight, and never raises the size.
    //= https://www.rfc-editor.org/rfc/rfc1191#section-3
    //= type=test
    //# Sizes below a least one are not believed.
    //= https://www.rfc-editor.org/rfc/rfc8201#section-4
    //= type=test
    //# The size never falls below 1280 bytes.
    //= https://www.rfc-editor.org/rfc/rfc8201#section-4
    //= type=test
    //# The packet that a message quotes must have been sent.
    //= https://www.rfc-editor.org/rfc/rfc5927#section-4.1
    //= type=test
    //# The sequence number an ICMP error quotes must be in flight.
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.send(raw(ACK, 1, 1).window(60_000));
        wire.write(id, &[1; 5000]);
        let pmtu = |wire: &Wire| wire.stack.tcp_info(wire.now, id).pmtu;
        for (mtu, seq, expected) in [
            (1300, 90_000, 1500),
            (1300, 0, 1500),
            (9000, 1, 1500),
            (1300, 1, 1300),
            (1400, 1, 1300),
            (100, 1, wire.family.pick(552, 1280)),
        ] {
            let error = wire.too_big(mtu, seq);
            wire.send_bytes(&error, None);
            assert_eq!(pmtu(&wire), expected, "{mtu} for {seq}");
        }
    }
}
