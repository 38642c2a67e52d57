//! A fixture per state, each made from the one before it.

use std::time::Duration;

use netstack::{Shutdown, SocketId, Stack, State};

use crate::harness::wire::{Family, MSS, SACK_PERMITTED, Wire, raw};
use crate::harness::{ACK, FIN, SYN};

/// A connection in some state; all numbers count from the SYNs.
pub struct Fixture {
    pub wire: Wire,
    /// The connection, if it is a socket.
    pub socket: Option<SocketId>,
    pub listener: Option<SocketId>,
    /// What the peer sends next, and what it has acknowledged.
    pub seq: i64,
    pub una: i64,
    /// What the stack sends next.
    pub nxt: i64,
}

impl Fixture {
    fn new(family: Family) -> Fixture {
        Fixture { wire: Wire::new(family), socket: None, listener: None, seq: 1, una: 1, nxt: 1 }
    }

    /// How things stand: the state, what can be read, the pending error.
    pub fn stands(&self) -> String {
        let stack = &self.wire.stack;
        let (half_open, time_wait) = stack.connections_without_socket();
        let mut text = match self.socket {
            Some(id) if stack.sockets().any(|one| one == id) => {
                let status = stack.status(id);
                let mut text = format!("{:?}", status.state);
                if status.readable > 0 {
                    text += &format!(", {} to read", status.readable);
                }
                if status.peer_closed {
                    text += ", end of stream";
                }
                if let Some(urgent) = status.urgent {
                    text += &format!(", urgent after {}", urgent.ahead);
                }
                if let Some(error) = status.error {
                    text += &format!(", {error:?}");
                }
                text
            }
            _ => "no socket".to_owned(),
        };
        let waiting = self.listener.map_or(0, |id| stack.status(id).acceptable);
        for (count, name) in [(half_open, "half open"), (time_wait, "in TIME-WAIT"), (waiting, "to accept")] {
            if count > 0 {
                text += &format!(", {count} {name}");
            }
        }
        text
    }

    /// Freezes the stack and continues it from what an encoder made of the image. What it says of itself then is heard here.
    pub fn move_stack(&mut self) {
        let wire = &mut self.wire;
        let image = rmp_serde::to_vec_named(&wire.stack.freeze(wire.now)).expect("an image can be encoded");
        let config = wire.stack.config().clone();
        let image = rmp_serde::from_slice(&image).expect("an image can be decoded");
        wire.stack = Stack::thaw(image, wire.now, config).expect("an image can be thawed");
        wire.take();
    }

    fn expect(&self, state: State) {
        assert_eq!(self.socket.map(|id| self.wire.state(id)), Some(state));
    }
}

type Make = fn(Family) -> Fixture;

/// Every state with its fixture. CLOSED has no connection, LISTEN a listener only.
pub const STATES: &[(&str, Make)] = &[
    ("closed", closed),
    ("listen", listen),
    ("syn-sent", syn_sent),
    ("syn-received", syn_received),
    ("syn-received-active", syn_received_active),
    ("established", established),
    ("established-in-flight", established_in_flight),
    ("established-timestamps", established_timestamps),
    ("established-window-closed", established_window_closed),
    ("fin-wait-1", fin_wait_1),
    ("fin-wait-2", fin_wait_2),
    ("fin-wait-2-orphan", fin_wait_2_orphan),
    ("closing", closing),
    ("time-wait", time_wait),
    ("close-wait", close_wait),
    ("last-ack", last_ack),
];

fn closed(family: Family) -> Fixture {
    Fixture::new(family)
}

fn listen(family: Family) -> Fixture {
    let mut fixture = Fixture::new(family);
    fixture.listener = Some(fixture.wire.listen(5));
    fixture
}

fn syn_sent(family: Family) -> Fixture {
    let mut fixture = Fixture::new(family);
    let (id, _) = fixture.wire.connect();
    fixture.socket = Some(id);
    fixture.expect(State::SynSent);
    fixture
}

/// A listener's, half open.
fn syn_received(family: Family) -> Fixture {
    let mut fixture = listen(family);
    let options = [&MSS[..], &SACK_PERMITTED].concat();
    fixture.wire.syn(&options);
    fixture
}

/// After a simultaneous open.
fn syn_received_active(family: Family) -> Fixture {
    let mut fixture = syn_sent(family);
    let options = [&MSS[..], &SACK_PERMITTED].concat();
    let seen = fixture.wire.send(raw(SYN, 0, 0).options(&options));
    assert_eq!(seen.len(), 1);
    fixture.expect(State::SynReceived);
    fixture
}

fn established(family: Family) -> Fixture {
    let mut fixture = syn_received(family);
    let listener = fixture.listener.expect("there is one");
    assert!(fixture.wire.send(raw(ACK, 1, 1)).is_empty());
    fixture.socket = fixture.wire.stack.tcp_accept(fixture.wire.now, listener);
    fixture.expect(State::Established);
    fixture
}

/// With 500 bytes sent and not acknowledged.
fn established_in_flight(family: Family) -> Fixture {
    let mut fixture = established(family);
    let id = fixture.socket.expect("there is one");
    assert_eq!(fixture.wire.write(id, &[7; 500]).len(), 1);
    fixture.nxt = 501;
    fixture
}

/// With timestamps agreed; the peer's stand still.
fn established_timestamps(family: Family) -> Fixture {
    let mut fixture = listen(family);
    fixture.wire.timestamps = true;
    let options = [&MSS[..], &SACK_PERMITTED].concat();
    fixture.wire.syn(&options);
    assert!(fixture.wire.send(raw(ACK, 1, 1)).is_empty());
    let listener = fixture.listener.expect("there is one");
    fixture.socket = fixture.wire.stack.tcp_accept(fixture.wire.now, listener);
    fixture.expect(State::Established);
    fixture
}

/// With 500 bytes queued that the peer has no room for.
fn established_window_closed(family: Family) -> Fixture {
    let mut fixture = established(family);
    let id = fixture.socket.expect("there is one");
    assert!(fixture.wire.send(raw(ACK, 1, 1).window(0)).is_empty());
    assert!(fixture.wire.write(id, &[7; 500]).is_empty());
    fixture
}

fn fin_wait_1(family: Family) -> Fixture {
    let mut fixture = established(family);
    let id = fixture.socket.expect("there is one");
    fixture.wire.stack.tcp_shutdown(fixture.wire.now, id, Shutdown::Write).expect("it is connected");
    assert_eq!(fixture.wire.take().len(), 1);
    fixture.nxt = 2;
    fixture.expect(State::FinWait1);
    fixture
}

fn fin_wait_2(family: Family) -> Fixture {
    let mut fixture = fin_wait_1(family);
    assert!(fixture.wire.send(raw(ACK, 1, 2)).is_empty());
    fixture.una = 2;
    fixture.expect(State::FinWait2);
    fixture
}

/// The program has closed the socket.
fn fin_wait_2_orphan(family: Family) -> Fixture {
    let mut fixture = fin_wait_2(family);
    let id = fixture.socket.expect("there is one");
    fixture.wire.stack.tcp_close(fixture.wire.now, id);
    assert!(fixture.wire.take().is_empty());
    fixture
}

fn closing(family: Family) -> Fixture {
    let mut fixture = fin_wait_1(family);
    assert_eq!(fixture.wire.send(raw(FIN | ACK, 1, 1)).len(), 1);
    fixture.seq = 2;
    fixture.expect(State::Closing);
    fixture
}

fn time_wait(family: Family) -> Fixture {
    let mut fixture = fin_wait_2(family);
    assert_eq!(fixture.wire.send(raw(FIN | ACK, 1, 2)).len(), 1);
    fixture.seq = 2;
    assert_eq!(fixture.wire.stack.connections_without_socket(), (0, 1));
    fixture
}

fn close_wait(family: Family) -> Fixture {
    let mut fixture = established(family);
    // The acknowledgment waits for the program, which may answer with a close.
    assert!(fixture.wire.send(raw(FIN | ACK, 1, 1)).is_empty());
    assert_eq!(fixture.wire.wait(Duration::from_millis(40)).len(), 1);
    fixture.seq = 2;
    fixture.expect(State::CloseWait);
    fixture
}

fn last_ack(family: Family) -> Fixture {
    let mut fixture = close_wait(family);
    let id = fixture.socket.expect("there is one");
    fixture.wire.stack.tcp_close(fixture.wire.now, id);
    assert_eq!(fixture.wire.take().len(), 1);
    fixture.nxt = 2;
    fixture.expect(State::LastAck);
    fixture
}
