//! Closing, and what is left of a connection.

use std::net::SocketAddr;

use netstack::{Config, SocketError};

use crate::harness::wire::{MSS, Wire, plain, raw, short};
use crate::harness::{ACK, FIN, RST, SYN};
use crate::{SECOND, both_with};

#[test]
fn time_wait_lasts_twice_a_segments_life() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.6.1
    //= type=test
    //# When a connection is closed actively, it MUST linger in the TIME-WAIT state for a time 2xMSL (Maximum Segment
    //# Lifetime) (MUST-13).
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.stack.tcp_close(wire.now, id);
        wire.take();
        wire.send(raw(FIN | ACK, 1, 2));
        wire.wait(59 * SECOND);
        assert_eq!(wire.stack.connections_without_socket(), (0, 1));
        wire.wait(2 * SECOND);
        assert_eq!(wire.stack.connections_without_socket(), (0, 0));
    }
}

#[test]
fn timestamps_shorten_time_wait() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.6.1
    //= type=test
    //# However, it MAY accept a new SYN from the remote TCP endpoint to reopen the connection directly from TIME-WAIT
    //# state (MAY-2), if it:
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.6.1
    //= type=test
    //# This algorithm for reducing TIME-WAIT is a Best Current Practice that SHOULD be implemented since Timestamp
    //# Options are commonly used, and using them to reduce TIME-WAIT provides benefits for busy Internet servers
    //# (SHLD-4).
    for mut wire in Wire::both() {
        wire.timestamps = true;
        let id = wire.established_with(&MSS, raw(ACK, 1, 1));
        wire.stack.tcp_close(wire.now, id);
        wire.take();
        wire.send(raw(FIN | ACK, 1, 2));
        // Its sequence number says nothing, its timestamp everything.
        assert_eq!(wire.send(raw(SYN, -5000, 0).options(&MSS).ts(999))[0].flags, ACK, "an old one");
        let seen = wire.send(raw(SYN, -5000, 0).options(&MSS).ts(1001));
        assert_eq!(seen[0].flags, SYN | ACK);
        assert_eq!(wire.stack.connections_without_socket(), (1, 0));
    }
}

#[test]
fn a_port_in_time_wait_is_used_again_to_the_same_peer() {
    //= https://www.rfc-editor.org/rfc/rfc6191#section-2
    //= type=test
    //# An active opener takes a place in TIME-WAIT again once a timestamp can tell the two connections apart.
    // No other port is left.
    for mut wire in both_with(&Config { ephemeral_ports: (80, 80), ..plain() }) {
        let connect = |wire: &mut Wire| {
            let id = wire.stack.tcp_open();
            wire.stack.tcp_connect(wire.now, id, SocketAddr::new(wire.family.peer(), wire.port)).map(|()| id)
        };
        let first = connect(&mut wire).unwrap();
        let former = wire.take()[0].seq;
        wire.iss = former;
        wire.timestamps = true;
        wire.send(raw(SYN | ACK, 0, 1).options(&MSS));
        wire.stack.tcp_close(wire.now, first);
        wire.take();
        wire.send(raw(FIN | ACK, 1, 2));
        assert_eq!(wire.stack.connections_without_socket(), (0, 1));
        assert_eq!(connect(&mut wire).err(), Some(SocketError::AddressNotAvailable), "its timestamps can't tell yet");
        wire.wait(2 * SECOND);
        connect(&mut wire).unwrap();
        let seen = wire.take();
        assert_eq!(seen[0].flags, SYN);
        assert!(seen[0].seq > 2 && seen[0].seq < 1 << 31, "beyond what the former connection used");
    }
}

#[test]
fn the_end_is_told_from_an_abort() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.6
    //= type=test
    //# If the local TCP connection is closed by the remote side due to a FIN or RST received from the remote side, then
    //# the local application MUST be informed whether it closed normally or was aborted (MUST-12).
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.send(raw(FIN | ACK, 1, 1));
        let status = wire.stack.status(id);
        assert_eq!((status.peer_closed, status.error), (true, None), "an end");
        wire.stack.tcp_abort(wire.now, id);
        wire.take();
        wire.port += 1;
        let listener = wire.stack.sockets().next().unwrap();
        wire.syn(&MSS);
        wire.send(raw(ACK, 1, 1));
        let id = wire.stack.tcp_accept(wire.now, listener).unwrap();
        wire.send(raw(RST, 1, 0));
        let status = wire.stack.status(id);
        assert_eq!((status.peer_closed, status.error), (false, Some(SocketError::ConnectionReset)), "an abort");
    }
}

#[test]
fn data_for_nobody_is_refused() {
    //= https://www.rfc-editor.org/rfc/rfc1122#section-4.2.2.13
    //= type=test
    //# Data that arrives for a socket that was closed is answered with an RST.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.6.1
    //= type=test
    //# A host MAY implement a "half-duplex" TCP close sequence, so that an application that has called CLOSE cannot
    //# continue to read data from the connection (MAY-1).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.6.1
    //= type=test
    //# If such a host issues a CLOSE call while received data is still pending in the TCP connection, or if new data is
    //# received after CLOSE is called, its TCP implementation SHOULD send a RST to show that data was lost (SHLD-3).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.5.3
    //= type=test
    //# TCP implementations SHOULD allow a received RST segment to include data (SHLD-2).
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.stack.tcp_close(wire.now, id);
        wire.take();
        assert_eq!(short(&wire.send(raw(ACK, 1, 2).data(b"late"))), [(RST, 2, 0, 0)]);
        assert!(wire.stack.sockets().all(|one| one != id));
        // A reset may say why.
        wire.port += 1;
        let listener = wire.stack.sockets().next().unwrap();
        wire.syn(&MSS);
        wire.send(raw(ACK, 1, 1));
        let id = wire.stack.tcp_accept(wire.now, listener).unwrap();
        wire.send(raw(RST | ACK, 1, 1).data(b"because"));
        let status = wire.stack.status(id);
        assert_eq!((status.error, status.readable), (Some(SocketError::ConnectionReset), 0));
    }
}

#[test]
fn a_late_acknowledgment_after_the_end_earns_a_reset() {
    // As from Linux: the connection is gone, and its listener doesn't know the segment.
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.send(raw(FIN | ACK, 1, 1));
        wire.stack.tcp_close(wire.now, id);
        wire.take();
        assert!(wire.send(raw(ACK, 2, 2)).is_empty());
        assert_eq!(short(&wire.send(raw(ACK, 2, 2))), [(RST, 2, 0, 0)]);
    }
}
