//! What fails, and how the program and the peer learn of it.

use std::time::Duration;

use netstack::{SocketError, State, TcpOption};

use crate::SECOND;
use crate::harness::wire::{Family, MSS, Wire, raw, short};
use crate::harness::{ACK, RST};

#[test]
fn errors_of_icmp_are_remembered() {
    //= https://www.rfc-editor.org/rfc/rfc5927#section-5.2
    //= type=test
    //# Hard errors don't end a synchronized connection.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2.2
    //= type=test
    //# TCP implementations MUST act on an ICMP error message passed up from the IP layer, directing it to the
    //# connection that created the error (MUST-54).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2.2
    //= type=test
    //# Since these Unreachable messages indicate soft error conditions, a TCP implementation MUST NOT abort the
    //# connection (MUST-56), and it SHOULD make the information available to the application (SHLD-25).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.8
    //= type=test
    //# There MUST be a mechanism for reporting soft TCP error conditions to the application (MUST-47).
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.write(id, &[0; 100]);
        let body = |wire: &Wire| [&[0; 4][..], &wire.quote(1)].concat();
        // No route, time exceeded, a parameter problem: none ends a connection.
        wire.send_unreachable(false, 1);
        let quote = body(&wire);
        let (exceeded, parameter) = wire.family.pick(((11, 0), (12, 0)), ((3, 0), (4, 0)));
        for (kind, code) in [exceeded, parameter] {
            wire.send_icmp(kind, code, &quote);
        }
        assert_eq!((wire.state(id), wire.stack.status(id).error), (State::Established, None));
        // The one that came last is the reason if the connection fails.
        wire.send_unreachable(false, 1);
        wire.wait(Duration::from_secs(1100));
        assert_eq!((wire.state(id), wire.stack.status(id).error), (State::Closed, Some(SocketError::HostUnreachable)));
    }
}

#[test]
fn a_hard_error_refuses_a_connection() {
    //= https://www.rfc-editor.org/rfc/rfc1122#section-4.2.3.9
    //= type=test
    //# An ICMP error counts only if what it quotes is in flight.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2.2
    //= type=test
    //# These are hard error conditions, so TCP implementations SHOULD abort the connection (SHLD-26). [35] notes that
    //# some implementations do not abort connections when an ICMP hard error is received for a connection that is in
    //# any of the synchronized states.
    for mut wire in Wire::both() {
        let (id, _) = wire.connect();
        wire.send_unreachable(true, 90_000);
        assert_eq!(wire.state(id), State::SynSent, "it quotes what was never sent");
        wire.send_unreachable(true, 0);
        assert_eq!((wire.state(id), wire.stack.take_error(id)), (State::Closed, Some(SocketError::ConnectionRefused)));
    }
}

#[test]
fn source_quench_is_silence() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2.2
    //= type=test
    //# Source Quench TCP implementations MUST silently discard any received ICMP Source Quench messages (MUST-55).
    let mut wire = Wire::new(Family::V4);
    let id = wire.established();
    wire.write(id, &[0; 100]);
    let before = wire.stack.tcp_info(wire.now, id);
    let body = [&[0; 4][..], &wire.quote(1)].concat();
    assert!(wire.send_icmp(4, 0, &body).is_empty());
    let after = wire.stack.tcp_info(wire.now, id);
    assert_eq!((after.snd_cwnd, after.state), (before.snd_cwnd, before.state));
}

#[test]
fn retransmission_gives_up_when_the_program_said() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.3
    //= type=test
    //# An application MUST (MUST-21) be able to set the value for R2 for a particular connection.
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.stack.tcp_set(wire.now, id, TcpOption::UserTimeout(30 * SECOND)).unwrap();
        wire.write(id, b"anybody?");
        let seen = wire.wait(29 * SECOND);
        assert!(seen.len() > 3 && seen.iter().all(|one| one.flags & RST == 0));
        assert_eq!(wire.state(id), State::Established);
        wire.wait(60 * SECOND);
        assert_eq!(wire.stack.status(id).error, Some(SocketError::TimedOut));
        assert!(wire.take().is_empty(), "like Linux, without a word to the peer");
    }
}

#[test]
fn repeated_syns_give_up_like_repeated_data() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.3
    //= type=test
    //# SYN retransmissions MUST be handled in the general way just described for data retransmissions, including
    //# notification of the application layer.
    for mut wire in Wire::both() {
        let (id, _) = wire.connect();
        wire.stack.tcp_set(wire.now, id, TcpOption::SynCount(2)).unwrap();
        let start = wire.now;
        let times: Vec<_> = wire.wait(60 * SECOND).iter().map(|one| one.at.since(start).as_secs()).collect();
        assert_eq!(times, [1, 3], "by the same clock, backing off");
        assert_eq!(wire.stack.status(id).error, Some(SocketError::TimedOut));
    }
}

#[test]
fn keepalive_is_for_who_asks() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.4
    //= type=test
    //# Implementers MAY include "keep-alives" in their TCP implementations (MAY-5), although this practice is not
    //# universally accepted.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.4
    //= type=test
    //# Keep-alive packets MUST only be sent when no sent data is outstanding, and no data or acknowledgment packets
    //# have been received for the connection within an interval (MUST-26).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.4
    //= type=test
    //# An implementation SHOULD send a keep-alive segment with no data (SHLD-12); however, it MAY be configurable to
    //# send a keep-alive segment containing one garbage octet (MAY-6), for compatibility with erroneous TCP
    //# implementations.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.4
    //= type=test
    //# Consequently, if a keep-alive mechanism is implemented it MUST NOT interpret failure to respond to any specific
    //# probe as a dead connection (MUST-29).
    for mut wire in Wire::both() {
        let id = wire.established();
        assert!(wire.wait(Duration::from_secs(100_000)).is_empty(), "off unless asked for");
        wire.stack.tcp_set(wire.now, id, TcpOption::KeepAlive(true)).unwrap();
        let options = wire.stack.tcp_options(id).clone();
        assert_eq!(options.keep_idle, Duration::from_secs(7200));
        wire.send(raw(ACK, 1, 1).data(b"x"));
        let start = wire.now;
        let probes = wire.wait(Duration::from_secs(7199));
        assert!(probes.iter().all(|one| one.at.since(start) < SECOND), "nothing while it isn't idle for long enough");
        // Eight in a row may be lost.
        let probes = wire.wait(Duration::from_secs(1 + 8 * 75));
        assert_eq!(short(&probes), vec![(ACK, 0, 2, 0); 9]);
        assert_eq!(wire.state(id), State::Established);
        wire.send(raw(ACK, 2, 1));
        assert!(wire.wait(Duration::from_secs(7199)).is_empty(), "the one answer counts");
        // While something is in flight it is for the retransmission to find out.
        wire.write(id, b"y");
        wire.send(raw(ACK, 2, 2));
        wire.wait(Duration::from_secs(7200 + 9 * 75 + 10));
        assert_eq!(wire.stack.status(id).error, Some(SocketError::TimedOut));
    }
}

#[test]
fn keepalive_is_as_the_program_says() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.4
    //= type=test
    //# If keep-alives are included, the application MUST be able to turn them on or off for each TCP connection
    //# (MUST-24), and they MUST default to off (MUST-25).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.4
    //= type=test
    //# This interval MUST be configurable (MUST-27) and MUST default to no less than two hours (MUST-28).
    for mut wire in Wire::both() {
        let id = wire.established();
        for option in [TcpOption::KeepIdle(10 * SECOND), TcpOption::KeepInterval(2 * SECOND), TcpOption::KeepCount(3)] {
            wire.stack.tcp_set(wire.now, id, option).unwrap();
        }
        wire.stack.tcp_set(wire.now, id, TcpOption::KeepAlive(true)).unwrap();
        wire.send(raw(ACK, 1, 1));
        let start = wire.now;
        let seen = wire.wait(60 * SECOND);
        let times: Vec<_> = seen.iter().map(|one| (one.flags, one.at.since(start).as_secs())).collect();
        assert_eq!(times, [(ACK, 10), (ACK, 12), (ACK, 14), (RST | ACK, 16)], "the peer is told");
        assert_eq!(wire.stack.status(id).error, Some(SocketError::TimedOut));
        let id = {
            wire.port += 1;
            let listener = wire.stack.sockets().next().unwrap();
            wire.syn(&MSS);
            wire.send(raw(ACK, 1, 1));
            wire.stack.tcp_accept(wire.now, listener).unwrap()
        };
        wire.stack.tcp_set(wire.now, id, TcpOption::KeepAlive(true)).unwrap();
        wire.stack.tcp_set(wire.now, id, TcpOption::KeepAlive(false)).unwrap();
        assert!(wire.wait(Duration::from_secs(10_000)).is_empty());
    }
}
