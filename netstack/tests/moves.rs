//! Freeze and thaw: at every point of a connection's life, the thawed stack does what the frozen one would have done.

mod harness;

use std::net::SocketAddr;
use std::time::Duration;

use harness::{ACK, FIN, Link, Pair, RST, SYN, Seen, Side, stream};
use netstack::{Instant, Reuse, Shutdown, SocketError, State, TcpOption};

const SECOND: Duration = Duration::from_secs(1);

/// What both sides do in a scenario, as a function of what they see only, so that it is the same with and without moves.
struct Script {
    data: Vec<u8>,
    answer: Vec<u8>,
}

/// Runs a request and an answer over a connection that opens and closes. `moves` tells after which steps a side moves.
/// Returns the capture without pure acknowledgments and the steps it took.
fn run(seed: u64, link: Link, script: &Script, mut moves: impl FnMut(usize) -> Option<Side>) -> (Vec<Seen>, usize) {
    let mut pair = Pair::new(seed, link);
    let listener = pair.listen(80, 4);
    let client = pair.connect(80);
    let mut server = None;
    let (mut sent, mut answered) = (0, 0);
    let (mut asked, mut heard) = (Vec::new(), Vec::new());
    let mut closed = [false, false];
    let limit = pair.now + Duration::from_secs(7200);
    let mut steps = 0;
    let mut over = false;
    while pair.step(limit) {
        steps += 1;
        if let Some(side) = moves(steps) {
            pair.move_stack(side);
        }
        let now = pair.now;
        if pair.a.status(client).state == State::Established {
            sent += pair.write(Side::A, client, &script.data[sent..]);
        }
        if sent == script.data.len() && !closed[0] {
            closed[0] = true;
            pair.a.tcp_shutdown(now, client, Shutdown::Write).expect("connected");
        }
        heard.extend(pair.read(Side::A, client));
        if server.is_none() {
            server = pair.b.tcp_accept(now, listener);
        }
        if let Some(server) = server {
            asked.extend(pair.read(Side::B, server));
            if pair.b.status(server).peer_closed && pair.b.status(server).readable == 0 {
                if answered < script.answer.len() {
                    answered += pair.write(Side::B, server, &script.answer[answered..]);
                }
                if answered == script.answer.len() && !closed[1] {
                    closed[1] = true;
                    pair.b.tcp_close(now, server);
                }
            }
        }
        if closed == [true, true] && pair.a.status(client).state == State::Closed && !over {
            over = true;
            pair.a.tcp_close(now, client);
            pair.b.tcp_close(now, listener);
        }
    }
    assert_eq!(asked, script.data, "what B heard (seed {seed})");
    assert_eq!(heard, script.answer, "what A heard (seed {seed})");
    assert!(over, "the connection didn't end (seed {seed})");
    assert_eq!(pair.a.sockets().count() + pair.b.sockets().count(), 0, "sockets are left (seed {seed})");
    let mut log = pair.log;
    // Where packets are lost or doubled, a late ACK may find its connection gone and earn a reset, as anywhere.
    let clean = link.loss == 0.0 && link.duplicate == 0.0 && link.reorder == 0.0;
    assert!(!clean || log.iter().all(|seen| seen.flags & RST == 0), "a reset (seed {seed}): {log:#?}");
    log.retain(|seen| seen.payload > 0 || seen.flags & (SYN | FIN) != 0);
    (log, steps)
}

/// The segments without what an extra acknowledgment may change.
fn essence(log: &[Seen]) -> Vec<(Instant, Side, u32, u8, usize)> {
    log.iter().map(|seen| (seen.at, seen.from, seen.seq, seen.flags & (SYN | FIN | ACK), seen.payload)).collect()
}

#[test]
fn at_every_cut_of_a_clean_trace_the_same_segments_follow() {
    let script = Script { data: stream(200_000, 1), answer: stream(150_000, 2) };
    let link = Link { cut: true, ..Link::default() };
    let (expected, steps) = run(1, link, &script, |_| None);
    for cut in 1..=steps {
        for side in [Side::A, Side::B] {
            let (log, _) = run(1, link, &script, |step| (step == cut).then_some(side));
            assert_eq!(essence(&log), essence(&expected), "moved {side:?} after step {cut}");
        }
    }
}

#[test]
fn at_every_cut_of_a_bad_trace_the_stream_is_whole() {
    for seed in 0..6 {
        let script = Script { data: stream(60_000, seed), answer: stream(40_000, seed + 1) };
        let link = Link {
            loss: 0.05,
            duplicate: 0.02,
            reorder: 0.05,
            jitter: Duration::from_millis(1),
            cut: true,
            ..Link::default()
        };
        let (_, steps) = run(seed, link, &script, |_| None);
        for cut in (1..=steps).step_by(3) {
            run(seed, link, &script, |step| (step == cut).then_some(if cut % 2 == 0 { Side::A } else { Side::B }));
        }
    }
}

#[test]
fn moving_all_the_time_harms_nothing() {
    let script = Script { data: stream(300_000, 5), answer: stream(300_000, 6) };
    run(9, Link { loss: 0.02, cut: true, ..Link::default() }, &script, |step| {
        Some(if step % 2 == 0 { Side::A } else { Side::B })
    });
}

#[test]
fn a_frozen_stack_thaws_to_the_same_image() {
    let mut pair = Pair::new(3, Link { loss: 0.05, reorder: 0.1, cut: true, ..Link::default() });
    let (client, server, _) = pair.establish();
    let data = stream(400_000, 1);
    let mut sent = 0;
    for _ in 0..200 {
        sent += pair.write(Side::A, client, &data[sent..]);
        let limit = pair.now + SECOND;
        pair.step(limit);
        let image = pair.b.freeze(pair.now);
        let config = pair.b.config().clone();
        // Freezing is looking: twice gives the same.
        let bytes = codec::to_vec(&image).expect("encodes");
        assert_eq!(bytes, codec::to_vec(&pair.b.freeze(pair.now)).expect("encodes"));
        let thawed = netstack::Stack::thaw(image, pair.now, config).expect("thaws");
        assert_eq!(thawed.status(server).readable, pair.b.status(server).readable);
        assert_eq!(thawed.poll_timeout().is_some(), pair.b.poll_timeout().is_some());
        assert_eq!(thawed.tcp_info(pair.now, server), pair.b.tcp_info(pair.now, server));
    }
}

#[test]
fn everything_is_said_at_once_after_a_thaw() {
    let mut pair = Pair::new(4, Link::default());
    let (client, server, _) = pair.establish();
    pair.write(Side::A, client, &[1; 5000]);
    pair.run_for(SECOND);
    pair.log.clear();
    pair.move_stack(Side::B);
    pair.transmit();
    let spoken: Vec<_> = pair.log.iter().filter(|seen| seen.from == Side::B).collect();
    assert_eq!(spoken.len(), 1, "{spoken:?}");
    assert!(spoken[0].window > 0 && spoken[0].flags & ACK != 0);
    assert_eq!(pair.read(Side::B, server).len(), 5000);
}

#[test]
fn thousands_that_have_nothing_to_say_do_not_say_it_first() {
    const MANY: usize = 300;
    let mut pair = Pair::new(4, Link::default());
    let listener = pair.listen(80, 512);
    let clients: Vec<_> = (0..MANY).map(|_| pair.connect(80)).collect();
    assert!(
        pair.run_until(SECOND, |pair| {
            clients.iter().all(|&client| pair.a.status(client).state == State::Established)
        })
    );
    pair.run_for(SECOND);
    let now = pair.now;
    let servers: Vec<_> = std::iter::from_fn(|| pair.b.tcp_accept(now, listener)).collect();
    assert_eq!(servers.len(), MANY);
    // One has something to say: what was written while nobody sent.
    let written = pair.b.tcp_send_with(now, servers[7], |[room, _]| {
        room[..3].fill(7);
        3
    });
    assert_eq!(written, Ok(3));
    pair.log.clear();
    pair.move_stack(Side::B);
    pair.transmit();
    let spoken = pair.log.iter().filter(|seen| seen.from == Side::B).count();
    assert!(spoken < MANY / 2, "{spoken} at once");
    assert!(pair.log.iter().any(|seen| seen.from == Side::B && seen.payload == 3));
    pair.run_for(Duration::from_millis(500));
    let spoken = pair.log.iter().filter(|seen| seen.from == Side::B).count();
    assert!(spoken >= MANY, "{spoken}: each, and none later than an acknowledgment may be");
}

#[test]
fn the_clock_of_the_target_may_say_anything() {
    let mut pair = Pair::new(5, Link::default());
    let (client, server, _) = pair.establish();
    pair.write(Side::A, client, &[1; 5000]);
    let image = pair.a.freeze(pair.now);
    let config = pair.a.config().clone();
    // The target has just booted.
    let booted = Instant::from_nanos(7);
    let mut thawed = netstack::Stack::thaw(image, booted, config).expect("thaws");
    let before: Vec<u32> = pair.log.iter().filter_map(|seen| timestamp(&seen.options)).collect();
    let mut told = Vec::new();
    let mut received = 0;
    for _ in 0..10 {
        while let Some(packet) = thawed.poll_transmit(booted) {
            let bytes = packet.to_vec();
            told.extend(timestamp(&harness::describe(booted, Side::A, &bytes).options));
            pair.inject(Side::B, bytes);
            received += pair.read(Side::B, server).len();
        }
    }
    assert_eq!(received, 5000);
    let last = *before.iter().max().expect("timestamps were told");
    assert!(told.iter().all(|&value| value.wrapping_sub(last) < 10_000), "timestamps went on: {last} then {told:?}");
    let _ = client;
}

#[test]
fn what_was_due_before_the_freeze_is_due_after_the_thaw() {
    let mut pair = Pair::new(5, Link::default());
    let (client, ..) = pair.establish();
    pair.write(Side::A, client, &[1; 500]);
    pair.transmit();
    let due = pair.a.poll_timeout().expect("it waits for an acknowledgment");
    // Nobody came to look between the deadline and the freeze.
    let image = pair.a.freeze(due + SECOND);
    let mut now = Instant::from_nanos(7);
    let mut thawed = netstack::Stack::thaw(image, now, pair.a.config().clone()).expect("thaws");
    let mut repeated = 0;
    while repeated < 3 {
        now = thawed.poll_timeout().expect("it still waits").max(now);
        assert!(now < Instant::from_nanos(7) + 60 * SECOND, "the timer is lost");
        thawed.handle_timeout(now);
        while let Some(packet) = thawed.poll_transmit(now) {
            repeated += usize::from(packet.to_vec().len() > 500);
        }
    }
}

fn timestamp(options: &[u8]) -> Option<u32> {
    let at = options.windows(2).position(|pair| pair == [8, 10])?;
    Some(u32::from_be_bytes(options.get(at + 2..at + 6)?.try_into().ok()?))
}

#[test]
fn sockets_that_were_told_before_are_left_out_until_something_touches_them() {
    let mut pair = Pair::new(4, Link::default());
    let listener = pair.listen(80, 16);
    let clients: Vec<_> = (0..8).map(|_| pair.connect(80)).collect();
    pair.run_for(SECOND);
    let now = pair.now;
    let servers: Vec<_> = std::iter::from_fn(|| pair.b.tcp_accept(now, listener)).collect();
    assert_eq!(servers.len(), 8);
    assert!(pair.b.tell(listener).is_none(), "no connection");
    pair.write(Side::A, clients[0], b"asked");
    pair.run_for(SECOND);
    // The first holds what nobody has read. The times of the others pass meanwhile, which changes nothing of their images.
    let copies: Vec<_> = servers.iter().filter_map(|&server| pair.b.tell(server)).collect();
    assert_eq!(copies.len(), 7);
    pair.write(Side::A, clients[3], b"asked as well");
    pair.run_for(SECOND);
    let told: Vec<bool> = servers.iter().map(|&server| pair.b.is_as_told(server)).collect();
    assert_eq!(told.iter().filter(|told| **told).count(), 6, "{told:?}");

    let whole = codec::to_vec(&pair.b.freeze(pair.now)).expect("encodes");
    let mut image = pair.b.freeze_untold(pair.now);
    let partial = codec::to_vec(&image).expect("encodes");
    assert!(partial.len() * 3 < whole.len() * 2, "{} of {}", partial.len(), whole.len());
    let config = pair.b.config().clone();
    assert!(netstack::Stack::thaw(image.clone(), pair.now, config.clone()).is_err(), "most of it is missing");
    let gathered = |copies: &[netstack::SocketCopy]| {
        let mut told = netstack::ToldSockets::default();
        copies.iter().for_each(|copy| told.add(copy.clone()));
        told
    };
    assert!(image.clone().complete(gathered(&copies[..2])).is_err(), "some of it is missing");
    image.complete(gathered(&copies)).expect("all were told");
    assert_eq!(codec::to_vec(&image).expect("encodes"), whole);
    netstack::Stack::thaw(image, pair.now, config).expect("thaws");

    pair.b.forget_told();
    let mut image = pair.b.freeze_untold(pair.now);
    image.complete(gathered(&[])).expect("nothing is left out");
    assert_eq!(codec::to_vec(&image).expect("encodes"), whole);
}

/// What can't be thawed elsewhere doesn't come about: a connection from an address that isn't this host's.
#[test]
fn nobody_speaks_for_another_host() {
    let mut pair = Pair::new(7, Link::default());
    let id = pair.a.tcp_open();
    pair.a.tcp_set(pair.now, id, TcpOption::FreeBind(true)).expect("it can be set");
    let elsewhere = "192.0.2.7:4000".parse().expect("an address");
    pair.a.tcp_bind(id, elsewhere, Reuse::default()).expect("it may be bound there");
    // As Linux has it.
    let server = SocketAddr::new(pair.b.config().addresses[0], 80);
    assert_eq!(pair.a.tcp_connect(pair.now, id, server), Err(SocketError::NetworkUnreachable));
    let image = pair.a.freeze(pair.now);
    netstack::Stack::thaw(image, pair.now, pair.a.config().clone()).expect("it can move");
}
