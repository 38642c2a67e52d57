//! Two stacks against each other in virtual time: the whole life of connections, over good and bad links.

mod harness;

use std::net::SocketAddr;
use std::time::Duration;

use harness::{Link, Pair, Side, config, stream};
use netstack::{Config, Offload, Shutdown, SocketError, SocketId, State, TcpOption};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

/// A pair over the family that the seed picks, for tests that are too long to run over both.
fn family(seed: u64, link: Link) -> Pair {
    let pick = usize::try_from(seed % 2).unwrap_or(0);
    Pair::both(seed, link).nth(pick).expect("there are two")
}

/// Sends `data` from one side to the other, checks it byte by byte, and returns how long it took.
fn transfer(
    pair: &mut Pair,
    from: Side,
    sender: SocketId,
    receiver: SocketId,
    data: &[u8],
    limit: Duration,
) -> Duration {
    let start = pair.now;
    let mut sent = 0;
    let mut received = 0;
    let done = pair.run_until(limit, |pair| {
        sent += pair.write(from, sender, &data[sent..]);
        let bytes = pair.read(from.other(), receiver);
        assert!(data[received..].starts_with(&bytes), "bytes at {received} are wrong");
        received += bytes.len();
        received == data.len()
    });
    let (a, b) = (pair.status(from, sender), pair.status(from.other(), receiver));
    assert!(done, "{received} of {} bytes came, {sent} were queued\n{a:?}\n{b:?}", data.len());
    pair.now.since(start)
}

/// Closes both ends and sees that nothing is left but, for a while, one TIME-WAIT.
fn close_all(pair: &mut Pair, client: SocketId, server: SocketId, listener: SocketId) {
    let now = pair.now;
    pair.a.tcp_close(now, client);
    pair.run_for(SECOND);
    let now = pair.now;
    pair.b.tcp_close(now, server);
    pair.run_for(300 * SECOND);
    let now = pair.now;
    pair.b.tcp_close(now, listener);
    assert_eq!(pair.a.sockets().count() + pair.b.sockets().count(), 0, "sockets are left");
    assert_eq!(pair.a.connections_without_socket(), (0, 0));
    assert_eq!(pair.b.connections_without_socket(), (0, 0));
    assert_eq!(pair.next_event(), None, "a timer still runs");
}

#[test]
fn a_connection_lives_and_dies() {
    for mut pair in Pair::both(1, Link::default()) {
        let (client, server, listener) = pair.establish();
        let (local, remote) = pair.a.tcp_endpoints(client);
        assert_eq!(pair.b.tcp_endpoints(server), (remote, local));
        transfer(&mut pair, Side::A, client, server, &stream(3_000, 1), SECOND);
        transfer(&mut pair, Side::B, server, client, &stream(3_000, 2), SECOND);
        close_all(&mut pair, client, server, listener);
        assert!(pair.log.iter().all(|seen| seen.flags & harness::RST == 0), "{:#?}", pair.log);
    }
}

#[test]
fn both_ip_versions_with_software_checksums() {
    for (a, b) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
        let make = |address: &str| Config { offload: Offload::NONE, ..config(address) };
        let mut pair = Pair::with(2, Link::default(), make(a), make(b));
        let (client, server, listener) = pair.establish();
        transfer(&mut pair, Side::A, client, server, &stream(300_001, 1), 60 * SECOND);
        transfer(&mut pair, Side::B, server, client, &stream(30_001, 1), 60 * SECOND);
        close_all(&mut pair, client, server, listener);
    }
}

#[test]
fn bulk_fills_the_pipe() {
    for cut in [false, true] {
        // 1 Gbit/s and 10 ms of round trip: 1.25 MB in flight.
        let link = Link { rate: Some(1_000_000_000), queue: 2 << 20, cut, ..Link::default() };
        let mut pair = family(3 + u64::from(cut), link);
        let (client, server, listener) = pair.establish();
        let data = stream(24 << 20, 0);
        let time = transfer(&mut pair, Side::A, client, server, &data, 60 * SECOND);
        let rate = data.len() as f64 * 8.0 / time.as_secs_f64() / 1e6;
        assert!(rate > 700.0, "{rate:.0} Mbit/s (cut: {cut})");
        close_all(&mut pair, client, server, listener);
    }
}

#[test]
fn super_packets_carry_a_bulk_stream() {
    for mut pair in Pair::both(4, Link { delay: Duration::from_micros(20), ..Link::default() }) {
        let (client, server, _) = pair.establish();
        transfer(&mut pair, Side::A, client, server, &stream(32 << 20, 0), 60 * SECOND);
        let packets = pair.log.iter().filter(|seen| seen.from == Side::A && seen.payload > 0).count();
        assert!(packets < 1000, "{packets} packets for 32 MiB");
    }
}

#[test]
fn lossy_links_deliver_everything_once() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.2
    //= type=test
    //# A TCP endpoint MUST implement the basic congestion control algorithms slow start, congestion avoidance, and
    //# exponential backoff of RTO to avoid creating congestion collapse conditions (MUST-19).
    for seed in 0..12 {
        for (loss, duplicate, reorder) in [(0.01, 0.0, 0.0), (0.05, 0.02, 0.05), (0.2, 0.1, 0.1), (0.0, 0.0, 0.3)] {
            let jitter = Duration::from_millis(2);
            let link = Link { loss, duplicate, reorder, jitter, cut: true, ..Link::default() };
            let mut pair = family(seed, link);
            let (client, server, listener) = pair.establish();
            let len = if loss > 0.1 { 100_000 } else { 600_000 };
            println!("seed {seed}, {link:?}");
            transfer(&mut pair, Side::A, client, server, &stream(len, seed), HOUR);
            transfer(&mut pair, Side::B, server, client, &stream(len / 4, seed), HOUR);
            close_all(&mut pair, client, server, listener);
        }
    }
}

#[test]
fn one_percent_loss_is_survived_at_speed() {
    let link = Link { rate: Some(100_000_000), loss: 0.001, cut: true, ..Link::default() };
    let mut pair = Pair::new(5, link);
    let (client, server, _) = pair.establish();
    let data = stream(24 << 20, 0);
    let time = transfer(&mut pair, Side::A, client, server, &data, HOUR);
    let rate = data.len() as f64 * 8.0 / time.as_secs_f64() / 1e6;
    assert!(rate > 30.0, "{rate:.1} Mbit/s of 100");
}

#[test]
fn a_full_receiver_stops_the_sender_and_lets_it_go_on() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.1
    //= type=test
    //# A TCP implementation MAY keep its offered receive window closed indefinitely (MAY-8).
    for mut pair in Pair::both(6, Link::default()) {
        let (client, server, listener) = pair.establish();
        let data = stream(8 << 20, 3);
        let mut sent = 0;
        // Nobody reads: both buffers fill.
        for _ in 0..100 {
            sent += pair.write(Side::A, client, &data[sent..]);
            pair.run_for(SECOND);
        }
        assert!(sent < data.len(), "the buffers are endless");
        let readable = pair.b.status(server).readable;
        assert!(readable > 100_000, "{readable}");
        let probes = pair.log.iter().filter(|seen| seen.from == Side::A && seen.payload == 0).count();
        assert!((3..200).contains(&probes), "{probes} zero-window probes");
        // Now it is read.
        let mut received = 0;
        let done = pair.run_until(600 * SECOND, |pair| {
            sent += pair.write(Side::A, client, &data[sent..]);
            let bytes = pair.read(Side::B, server);
            assert!(data[received..].starts_with(&bytes));
            received += bytes.len();
            received == data.len()
        });
        assert!(done, "stuck at {received}: {:?} {:?}", pair.a.status(client), pair.b.status(server));
        close_all(&mut pair, client, server, listener);
    }
}

#[test]
fn the_backlog_bounds_what_waits() {
    // With cookies, clients beyond the SYN queue would think themselves connected.
    for (a, b) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
        let b = Config { syn_cookies: false, ..config(b) };
        let mut pair = Pair::with(7, Link::default(), config(a), b);
        let listener = pair.listen(80, 2);
        let clients: Vec<SocketId> = (0..6).map(|_| pair.connect(80)).collect();
        pair.run_for(Duration::from_millis(100));
        // Linux: backlog + 1 wait, the others' SYNs or final ACKs are ignored.
        assert_eq!(pair.b.status(listener).acceptable, 2);
        pair.run_for(2 * SECOND);
        assert_eq!(pair.b.status(listener).acceptable, 3);
        let now = pair.now;
        let mut accepted = Vec::new();
        while let Some(id) = pair.b.tcp_accept(now, listener) {
            accepted.push(id);
        }
        pair.run_for(60 * SECOND);
        let now = pair.now;
        while let Some(id) = pair.b.tcp_accept(now, listener) {
            accepted.push(id);
        }
        assert_eq!(accepted.len(), 6, "the others came when there was room");
        for client in clients {
            assert_eq!(pair.a.status(client).state, State::Established);
        }
    }
}

#[test]
fn nobody_listens() {
    for mut pair in Pair::both(8, Link::default()) {
        let client = pair.connect(81);
        pair.run_for(SECOND);
        let status = pair.a.status(client);
        assert_eq!((status.state, status.error), (State::Closed, Some(SocketError::ConnectionRefused)));
        assert_eq!(pair.a.take_error(client), Some(SocketError::ConnectionRefused));
        assert_eq!(pair.a.take_error(client), None);
    }
}

#[test]
fn nobody_is_there() {
    for mut pair in Pair::both(9, Link { loss: 1.0, ..Link::default() }) {
        let client = pair.connect(80);
        pair.run_for(300 * SECOND);
        assert_eq!(pair.a.status(client).error, Some(SocketError::TimedOut));
        let syns = pair.log.iter().filter(|seen| seen.flags & harness::SYN != 0).count();
        assert_eq!(syns, 7, "one and tcp_syn_retries = 6");
        let waited = pair.log.last().expect("a SYN").at.since(pair.log[0].at).as_secs();
        assert_eq!(waited, 63, "1 + 2 + 4 + 8 + 16 + 32");
    }
}

#[test]
fn reset_keeps_what_was_received() {
    for mut pair in Pair::both(10, Link::default()) {
        let (client, server, _) = pair.establish();
        pair.write(Side::A, client, b"last words");
        pair.run_for(SECOND);
        let now = pair.now;
        pair.a.tcp_abort(now, client);
        pair.run_for(SECOND);
        let status = pair.b.status(server);
        assert_eq!(
            (status.state, status.error, status.readable),
            (State::Closed, Some(SocketError::ConnectionReset), 10)
        );
        assert_eq!(pair.read(Side::B, server), b"last words");
    }
}

#[test]
fn half_closed_either_way() {
    for mut pair in Pair::both(11, Link::default()) {
        let (client, server, _) = pair.establish();
        let now = pair.now;
        pair.a.tcp_shutdown(now, client, Shutdown::Write).expect("connected");
        pair.run_for(SECOND);
        assert_eq!(pair.a.status(client).state, State::FinWait2);
        assert_eq!(pair.b.status(server).state, State::CloseWait);
        assert!(pair.b.status(server).peer_closed);
        let data = stream(1 << 20, 9);
        transfer(&mut pair, Side::B, server, client, &data, 60 * SECOND);
        let now = pair.now;
        pair.b.tcp_close(now, server);
        pair.run_for(SECOND);
        assert_eq!(pair.b.sockets().count(), 1, "only the listener");
        assert!(pair.a.status(client).peer_closed);
        assert_eq!(pair.a.connections_without_socket(), (0, 1), "TIME-WAIT is where the close began");
    }
}

#[test]
fn simultaneous_close() {
    for mut pair in Pair::both(12, Link::default()) {
        let (client, server, _) = pair.establish();
        let now = pair.now;
        pair.a.tcp_close(now, client);
        pair.b.tcp_close(now, server);
        pair.run_for(SECOND);
        assert_eq!(pair.a.connections_without_socket().1 + pair.b.connections_without_socket().1, 2);
        pair.run_for(61 * SECOND);
        assert_eq!(pair.a.connections_without_socket().1 + pair.b.connections_without_socket().1, 0);
    }
}

#[test]
fn simultaneous_open() {
    for mut pair in Pair::both(13, Link::default()) {
        let now = pair.now;
        let reuse = netstack::Reuse::default();
        let at_a = SocketAddr::new(pair.a.config().addresses[0], 1000);
        let at_b = SocketAddr::new(pair.b.config().addresses[0], 2000);
        let a = pair.a.tcp_open();
        let b = pair.b.tcp_open();
        pair.a.tcp_bind(a, at_a, reuse).expect("free");
        pair.b.tcp_bind(b, at_b, reuse).expect("free");
        pair.a.tcp_connect(now, a, at_b).expect("can connect");
        pair.b.tcp_connect(now, b, at_a).expect("can connect");
        pair.run_for(5 * SECOND);
        assert_eq!(pair.a.status(a).state, State::Established);
        assert_eq!(pair.b.status(b).state, State::Established);
        transfer(&mut pair, Side::A, a, b, &stream(100_000, 1), 60 * SECOND);
    }
}

#[test]
fn orphan_data_is_refused() {
    for mut pair in Pair::both(14, Link::default()) {
        let (client, server, _) = pair.establish();
        let now = pair.now;
        pair.a.tcp_close(now, client);
        pair.run_for(SECOND);
        pair.write(Side::B, server, b"is anybody there?");
        pair.run_for(SECOND);
        let status = pair.b.status(server);
        assert_eq!((status.state, status.error), (State::Closed, Some(SocketError::BrokenPipe)));
        assert_eq!(pair.a.sockets().count(), 0);
    }
}

#[test]
fn an_orphan_in_fin_wait_2_ends() {
    for mut pair in Pair::both(15, Link::default()) {
        let (client, _server, _) = pair.establish();
        let now = pair.now;
        pair.a.tcp_close(now, client);
        pair.run_for(59 * SECOND);
        assert_eq!(pair.a.sockets().count(), 1);
        pair.run_for(2 * SECOND);
        assert_eq!(pair.a.sockets().count(), 0);
    }
}

#[test]
fn keepalive_finds_a_dead_peer() {
    for mut pair in Pair::both(16, Link::default()) {
        let (client, _server, _) = pair.establish();
        let now = pair.now;
        for option in [
            TcpOption::KeepIdle(Duration::from_secs(10)),
            TcpOption::KeepInterval(Duration::from_secs(2)),
            TcpOption::KeepCount(3),
            TcpOption::KeepAlive(true),
        ] {
            pair.a.tcp_set(now, client, option).expect("a socket");
        }
        pair.run_for(100 * SECOND);
        assert_eq!(pair.a.status(client).state, State::Established, "the peer answers");
        pair.link.loss = 1.0;
        pair.run_for(30 * SECOND);
        assert_eq!(pair.a.status(client).error, Some(SocketError::TimedOut));
    }
}

#[test]
fn user_timeout_ends_a_stalled_connection() {
    //= https://www.rfc-editor.org/rfc/rfc5482#section-3
    //= type=test
    //# A program can set how long data may stay unacknowledged before the connection is given up.
    for mut pair in Pair::both(17, Link::default()) {
        let (client, _server, _) = pair.establish();
        let now = pair.now;
        pair.a.tcp_set(now, client, TcpOption::UserTimeout(Duration::from_secs(5))).expect("a socket");
        pair.link.loss = 1.0;
        pair.write(Side::A, client, b"anybody?");
        pair.run_for(4 * SECOND);
        assert_eq!(pair.a.status(client).error, None);
        pair.run_for(8 * SECOND);
        assert_eq!(pair.a.status(client).error, Some(SocketError::TimedOut));
    }
}

#[test]
fn a_dead_peer_is_given_up_after_fifteen_minutes() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.3
    //= type=test
    //# The following procedure MUST be used to handle excessive retransmissions of data segments (MUST-20):
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.3
    //= type=test
    //# The value of R2 SHOULD correspond to at least 100 seconds (SHLD-11).
    for mut pair in Pair::both(18, Link::default()) {
        let (client, _server, _) = pair.establish();
        pair.link.loss = 1.0;
        pair.write(Side::A, client, b"anybody?");
        pair.run_for(900 * SECOND);
        assert_eq!(pair.a.status(client).error, None);
        pair.run_for(300 * SECOND);
        assert_eq!(pair.a.status(client).error, Some(SocketError::TimedOut));
    }
}

#[test]
fn nagle_cork_and_nodelay() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.4
    //= type=test
    //# A TCP implementation SHOULD implement the Nagle algorithm to coalesce short segments (SHLD-7).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.4
    //= type=test
    //# However, there MUST be a way for an application to disable the Nagle algorithm on an individual connection
    //# (MUST-17).
    //= https://www.rfc-editor.org/rfc/rfc1122#section-4.2.3.4
    //= type=test
    //# A partial segment leaves once nothing unacknowledged is outstanding.
    let sizes = |options: &[TcpOption]| {
        let mut pair = family(19, Link::default());
        let (client, server, _) = pair.establish();
        let now = pair.now;
        for &option in options {
            pair.a.tcp_set(now, client, option).expect("a socket");
        }
        pair.log.clear();
        for _ in 0..5 {
            pair.write(Side::A, client, &[7; 100]);
            pair.run_for(Duration::from_millis(1));
        }
        pair.run_for(SECOND);
        assert_eq!(pair.read(Side::B, server).len(), 500);
        pair.log
            .iter()
            .filter(|seen| seen.from == Side::A)
            .map(|seen| seen.payload)
            .filter(|&len| len > 0)
            .collect::<Vec<_>>()
    };
    assert_eq!(sizes(&[]), [100, 400], "Nagle");
    assert_eq!(sizes(&[TcpOption::NoDelay(true)]), [100; 5]);
    assert_eq!(sizes(&[TcpOption::Cork(true)]), [500]);
}

#[test]
fn loopback_stays_inside() {
    let both =
        Config { addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()], ..config("10.0.0.1") };
    let mut pair = Pair::with(20, Link::default(), both, config("10.0.0.2"));
    for host in ["127.0.0.1", "10.0.0.1", "[::1]", "[fd00::1]"] {
        let now = pair.now;
        let remote: SocketAddr = format!("{host}:80").parse().unwrap();
        let listener = pair.a.tcp_open();
        pair.a.tcp_bind(listener, remote, netstack::Reuse::default()).expect("free");
        pair.a.tcp_listen(now, listener, 5).expect("can listen");
        let client = pair.a.tcp_open();
        pair.a.tcp_connect(now, client, remote).expect("can connect");
        pair.run_for(Duration::from_millis(10));
        let now = pair.now;
        let server = pair.a.tcp_accept(now, listener).expect("one waits");
        let data = stream(5 << 20, 4);
        let (mut sent, mut received) = (0, 0);
        let done = pair.run_until(60 * SECOND, |pair| {
            sent += pair.write(Side::A, client, &data[sent..]);
            let bytes = pair.read(Side::A, server);
            assert!(data[received..].starts_with(&bytes));
            received += bytes.len();
            received == data.len()
        });
        assert!(done, "{received}");
        // Nobody on the port: refused.
        let now = pair.now;
        let lost = pair.a.tcp_open();
        pair.a.tcp_connect(now, lost, format!("{host}:81").parse().unwrap()).expect("can connect");
        pair.run_for(SECOND);
        assert_eq!(pair.a.status(lost).error, Some(SocketError::ConnectionRefused));
    }
    assert!(pair.log.is_empty(), "packets left: {:?}", pair.log);
}

#[test]
fn ports_are_given_as_linux_does() {
    //= https://www.rfc-editor.org/rfc/rfc6056#section-3.3.3
    //= type=test
    //# Ephemeral ports are chosen by a keyed hash of the peer and a counter.
    let mut pair = Pair::new(21, Link::default());
    let plain = netstack::Reuse::default();
    let reuse = netstack::Reuse { address: true, port: false };
    let share = netstack::Reuse { address: false, port: true };
    let any: SocketAddr = "0.0.0.0:80".parse().unwrap();
    let own: SocketAddr = "10.0.0.1:80".parse().unwrap();
    let stack = &mut pair.a;
    let mut bind = |address: SocketAddr, reuse| {
        let id = stack.tcp_open();
        stack.tcp_bind(id, address, reuse).map(|()| id)
    };
    let first = bind(any, reuse).expect("free");
    assert_eq!(bind(own, plain), Err(SocketError::AddressInUse));
    let second = bind(own, reuse).expect("both reuse and neither listens");
    assert_eq!(bind("10.0.0.9:80".parse().unwrap(), plain), Err(SocketError::AddressNotAvailable));
    let shared = bind("0.0.0.0:90".parse().unwrap(), share).expect("free");
    let shared_too = bind("0.0.0.0:90".parse().unwrap(), share).expect("shared");
    let chosen = bind("0.0.0.0:0".parse().unwrap(), plain).expect("free");
    let now = netstack::Instant::from_millis(2000);
    pair.a.tcp_listen(now, first, 1).expect("the first to listen");
    assert_eq!(pair.a.tcp_listen(now, second, 1), Err(SocketError::AddressInUse));
    pair.a.tcp_listen(now, shared, 1).expect("shared");
    pair.a.tcp_listen(now, shared_too, 1).expect("shared");
    let port = pair.a.tcp_endpoints(chosen).0.expect("bound").port();
    assert!((32_768..=60_999).contains(&port));
}

#[test]
fn idle_connections_hold_no_buffers() {
    for mut pair in Pair::both(22, Link::default()) {
        let (client, server, _) = pair.establish();
        transfer(&mut pair, Side::A, client, server, &stream(4 << 20, 0), 60 * SECOND);
        pair.run_for(10 * SECOND);
        let image = rmp_serde::to_vec_named(&pair.a.freeze(pair.now)).expect("encodes");
        assert!(image.len() < 8192, "{} bytes", image.len());
        assert_eq!(pair.next_event(), None, "an idle connection needs no timer");
    }
}

#[test]
fn an_outage_leaves_no_trace() {
    for mut pair in Pair::both(23, Link::default()) {
        let (client, server, _) = pair.establish();
        transfer(&mut pair, Side::A, client, server, &stream(1 << 20, 0), 60 * SECOND);
        pair.link.loss = 1.0;
        let sent = pair.write(Side::A, client, &stream(100_000, 0));
        pair.run_for(20 * SECOND);
        pair.link.loss = 0.0;
        let mut received = 0;
        let done = pair.run_until(60 * SECOND, |pair| {
            received += pair.read(Side::B, server).len();
            received == sent
        });
        assert!(done);
        pair.run_for(20 * SECOND);
        transfer(&mut pair, Side::A, client, server, &stream(1 << 20, 0), 60 * SECOND);
        let info = pair.a.tcp_info(pair.now, client);
        let headers = if pair.a.config().addresses[0].is_ipv4() { 52 } else { 72 };
        assert_eq!((info.snd_mss, info.pmtu), (1500 - headers, 1500));
    }
}

#[test]
fn options_of_zero_do_not_spin() {
    for mut pair in Pair::both(24, Link::default()) {
        let (client, _, _) = pair.establish();
        let now = pair.now;
        for option in [
            TcpOption::KeepIdle(Duration::ZERO),
            TcpOption::KeepInterval(Duration::ZERO),
            TcpOption::KeepAlive(true),
            TcpOption::Linger2(Some(Duration::ZERO)),
            TcpOption::WindowClamp(1),
            TcpOption::ReceiveBuffer(0),
            TcpOption::SendBuffer(0),
            TcpOption::NotSentLowat(0),
            TcpOption::MaxSegment(1),
        ] {
            pair.a.tcp_set(now, client, option).expect("a socket");
        }
        pair.run_for(SECOND);
        assert_eq!(pair.a.status(client).state, State::Established);
    }
}
