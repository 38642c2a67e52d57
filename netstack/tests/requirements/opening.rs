//! Opening a connection.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use netstack::{Config, Instant, Reuse, Secrets, Shutdown, SocketError, Stack, State};

use crate::SECOND;
use crate::harness::wire::{Family, MSS, Wire, raw, short};
use crate::harness::{ACK, FIN, RST, SYN};

#[test]
fn initial_numbers_follow_a_clock_and_a_secret() {
    //= https://www.rfc-editor.org/rfc/rfc6528#section-3
    //= type=test
    //# Initial sequence numbers are a clock plus a keyed hash of the connection's ends.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.4.1
    //= type=test
    //# A TCP implementation MUST use the above type of "clock" for clock-driven selection of initial sequence numbers
    //# (MUST-8), and SHOULD generate its initial sequence numbers with the expression:
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.4.1
    //= type=test
    //# where M is the 4 microsecond timer, and F() is a pseudorandom function (PRF) of the connection's identifying
    //# parameters ("localip, localport, remoteip, remoteport") and a secret key ("secretkey") (SHLD-1).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.4.1
    //= type=test
    //# F() MUST NOT be computable from the outside (MUST-9), or an attacker could still guess at sequence numbers from
    //# the ISN used for some other connection.
    for family in Family::BOTH {
        let number = |secret: u8, port: u16, after_us: u64| {
            let config = Config { addresses: vec![family.own()], ..Config::default() };
            let start = Instant::from_millis(10_000);
            let mut wire = Wire::new(family);
            wire.stack = Stack::new(config, Secrets([secret; 32]), start);
            wire.now = start + Duration::from_micros(after_us);
            wire.port = port;
            wire.listen(5);
            wire.syn(&MSS).seq
        };
        // The clock ticks at least every 4 us, and doesn't wrap within a segment's life.
        let first = number(1, 5000, 0);
        let later = number(1, 5000, 1_000_000).wrapping_sub(first);
        assert!((250_000..1 << 28).contains(&later), "{later}");
        // Another peer, another secret: nothing to be foretold.
        for other in [number(1, 5001, 0), number(2, 5000, 0)] {
            assert!(other.abs_diff(first) > 100_000, "{other} {first}");
        }
    }
}

#[test]
fn a_simultaneous_open_is_answered() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.5
    //= type=test
    //# A TCP implementation MUST support simultaneous open attempts (MUST-10).
    for mut wire in Wire::both() {
        let (id, _) = wire.connect();
        assert_eq!(short(&wire.send(raw(SYN, 0, 0).options(&MSS))), [(SYN | ACK, 0, 1, 0)]);
        assert_eq!(wire.state(id), State::SynReceived);
        // Half open, it is closed by the program: the FIN waits for the handshake, whose SYN-ACK is repeated.
        wire.stack.tcp_shutdown(wire.now, id, Shutdown::Write).unwrap();
        assert_eq!(short(&wire.wait(SECOND + SECOND / 2)), [(SYN | ACK, 0, 1, 0)]);
        assert_eq!(short(&wire.send(raw(SYN | ACK, 0, 1).options(&MSS))), [(FIN | ACK, 1, 1, 0)]);
        assert_eq!(wire.state(id), State::FinWait1);
    }
}

#[test]
fn a_half_open_connection_knows_who_opened_it() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.5
    //= type=test
    //# Note that a TCP implementation MUST keep track of whether a connection has reached SYN-RECEIVED state as the
    //# result of a passive OPEN or an active OPEN (MUST-11).
    for mut wire in Wire::both() {
        // Actively: refused.
        let (id, _) = wire.connect();
        wire.send(raw(SYN, 0, 0).options(&MSS));
        wire.send(raw(RST, 1, 0));
        assert_eq!(
            (wire.state(id), wire.stack.status(id).error),
            (State::Closed, Some(SocketError::ConnectionRefused))
        );
        wire.stack.tcp_close(wire.now, id);
        // Passively: back to listening, and nobody is told.
        let listener = wire.listen(5);
        wire.syn(&MSS);
        wire.send(raw(RST, 1, 0));
        assert_eq!(wire.stack.connections_without_socket(), (0, 0));
        let status = wire.stack.status(listener);
        assert_eq!((status.state, status.error, status.acceptable), (State::Listen, None, 0));
        wire.syn(&MSS);
        wire.send(raw(ACK, 1, 1));
        assert_eq!(wire.stack.status(listener).acceptable, 1);
    }
}

#[test]
fn sockets_of_one_port_live_beside_each_other() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.1
    //= type=test
    //# Every passive OPEN call either creates a new connection record in LISTEN state, or it returns an error; it MUST
    //# NOT affect any previously created connection record (MUST-41).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.1
    //= type=test
    //# A TCP implementation that supports multiple concurrent connections MUST provide an OPEN call that will
    //# functionally allow an application to LISTEN on a port while a connection block with the same local port is in
    //# SYN-SENT or SYN-RECEIVED state (MUST-42).
    let reuse = Reuse { address: true, port: false };
    for mut wire in Wire::both() {
        let any = SocketAddr::new(wire.family.any(), 80);
        let open = wire.stack.tcp_open();
        wire.stack.tcp_bind(open, any, reuse).unwrap();
        wire.stack.tcp_connect(wire.now, open, SocketAddr::new(wire.family.peer(), 9)).unwrap();
        wire.take();
        assert_eq!(wire.state(open), State::SynSent);
        let listener = wire.stack.tcp_open();
        wire.stack.tcp_bind(listener, any, reuse).unwrap();
        wire.stack.tcp_listen(wire.now, listener, 5).unwrap();
        // A second listener is an error, and harms nothing.
        let second = wire.stack.tcp_open();
        let refused = wire.stack.tcp_bind(second, any, reuse).and_then(|()| wire.stack.tcp_listen(wire.now, second, 5));
        assert_eq!(refused, Err(SocketError::AddressInUse));
        wire.syn(&MSS);
        wire.send(raw(ACK, 1, 1));
        assert_eq!(wire.stack.status(listener).acceptable, 1);
        assert_eq!(wire.state(open), State::SynSent);
    }
}

#[test]
fn local_addresses_are_chosen_or_given() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.1
    //= type=test
    //# The optional "local IP address" parameter MUST be supported to allow the specification of the local IP address
    //# (MUST-43).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.1
    //= type=test
    //# If an application on a multihomed host does not specify the local IP address when actively opening a TCP
    //# connection, then the TCP implementation MUST ask the IP layer to select a local IP address before sending the
    //# (first) SYN (MUST-44).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.1
    //= type=test
    //# At all other times, a previous segment has either been sent or received on this connection, and TCP
    //# implementations MUST use the same local address that was used in those previous segments (MUST-45).
    for family in Family::BOTH {
        let second: IpAddr = family.pick("10.0.0.77", "fd00::77").parse().unwrap();
        let mut wire = Wire::new(family);
        let config = Config { addresses: vec![family.own(), second], ..Config::default() };
        wire.stack = Stack::new(config, Secrets([3; 32]), wire.now);
        for (bind, expected) in [(None, family.own()), (Some(second), second)] {
            let id = wire.stack.tcp_open();
            if let Some(address) = bind {
                wire.stack.tcp_bind(id, SocketAddr::new(address, 0), Reuse::default()).unwrap();
            }
            wire.stack.tcp_connect(wire.now, id, SocketAddr::new(family.peer(), 9)).unwrap();
            let source = |packet: &[u8]| match family {
                Family::V4 => IpAddr::from(<[u8; 4]>::try_from(&packet[12..16]).unwrap()),
                Family::V6 => IpAddr::from(<[u8; 16]>::try_from(&packet[8..24]).unwrap()),
            };
            let syn = wire.stack.poll_transmit(wire.now).unwrap().to_vec();
            assert!(wire.take().is_empty());
            assert_eq!(source(&syn), expected);
            let end = wire.now + 3 * SECOND;
            wire.now = end;
            wire.stack.handle_timeout(end);
            let again = wire.stack.poll_transmit(end).unwrap().to_vec();
            assert_eq!(source(&again), expected, "the same for every segment");
            wire.stack.tcp_abort(wire.now, id);
        }
        // A listener on one address doesn't hear the others.
        let id = wire.stack.tcp_open();
        wire.stack.tcp_bind(id, SocketAddr::new(second, 80), Reuse::default()).unwrap();
        wire.stack.tcp_listen(wire.now, id, 5).unwrap();
        assert_eq!(wire.send(raw(SYN, 0, 0))[0].flags, RST | ACK);
        wire.destination = Some(second);
        assert_eq!(wire.send(raw(SYN, 0, 0))[0].flags, SYN | ACK);
    }
}
