//! A stack with a socket in every state that can be held still.

use std::cell::RefCell;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use netstack::{Config, Reuse, Shutdown, SocketId, State, TcpOption};

use super::{Link, Pair, Side, stream};

const SECOND: Duration = Duration::from_secs(1);

/// What lives in the zoo.
pub struct Zoo {
    /// The zoo is side B.
    pub pair: Pair,
    /// Every socket of B that a program holds, with a name.
    pub kept: Vec<(&'static str, SocketId)>,
    silent: Silent,
}

/// Ports of A whose packets get lost from now on.
type Silent = Rc<RefCell<HashSet<u16>>>;

/// Builds it for one address family.
pub fn zoo(v6: bool) -> Zoo {
    let (a, b) = if v6 { ("fd00::1", "fd00::2") } else { ("10.0.0.1", "10.0.0.2") };
    let make = |address: &str| Config { ecn: true, ..super::config(address) };
    let pair = Pair::with(7, Link { cut: true, ..Link::default() }, make(a), make(b));
    let silent = Silent::default();
    let mut zoo = Zoo { pair, kept: Vec::new(), silent };
    zoo.hear_nothing_of_the_silent();
    let listener = zoo.pair.listen(80, 64);
    zoo.keep("listener", listener);
    zoo.open_ones(listener);
    zoo.closing_ones(listener);
    zoo.without_connection();
    zoo.listening_ones(v6);
    // The next packet of each is still to come, some of them at once.
    zoo
}

impl Zoo {
    fn keep(&mut self, name: &'static str, id: SocketId) {
        self.kept.push((name, id));
    }

    /// A connection from A to B's port 80: its two ends.
    fn connection(&mut self, listener: SocketId) -> (SocketId, SocketId) {
        let client = self.pair.connect(80);
        assert!(self.pair.run_until(SECOND, |pair| pair.b.status(listener).acceptable > 0));
        let now = self.pair.now;
        (client, self.pair.b.tcp_accept(now, listener).expect("one waits"))
    }

    fn hear_nothing_of_the_silent(&mut self) {
        let silent = Rc::clone(&self.silent);
        self.pair.drop = Some(Box::new(move |packet| {
            let silent = silent.borrow();
            silent.contains(&packet.ports.0) || silent.contains(&packet.ports.1)
        }));
    }

    /// From now on no packet of this connection gets through.
    fn silence(&mut self, client: SocketId) {
        let port = self.pair.a.tcp_endpoints(client).0.expect("it is connected").port();
        self.silent.borrow_mut().insert(port);
    }

    fn settle(&mut self) {
        self.pair.run_for(Duration::from_millis(60));
    }

    fn open_ones(&mut self, listener: SocketId) {
        let (client, server) = self.connection(listener);
        self.pair.write(Side::A, client, &stream(700, 1));
        self.settle();
        self.keep("unread", server);

        let (_, server) = self.connection(listener);
        let now = self.pair.now;
        for option in [TcpOption::Cork(true), TcpOption::KeepAlive(true), TcpOption::Tos(0x20), TcpOption::Ttl(33)] {
            self.pair.b.tcp_set(now, server, option).expect("it can be set");
        }
        self.pair.write(Side::B, server, &stream(100, 2));
        self.keep("corked", server);

        let (client, server) = self.connection(listener);
        let now = self.pair.now;
        self.pair.a.tcp_set(now, client, TcpOption::ReceiveBuffer(4096)).expect("it can be set");
        self.pair.write(Side::B, server, &stream(9_000, 3));
        self.pair.run_for(3 * SECOND);
        self.pair.read(Side::A, client);
        self.settle();
        let now = self.pair.now;
        self.pair.a.tcp_set(now, client, TcpOption::ReceiveBuffer(2048)).expect("it can be set");
        self.pair.run_for(3 * SECOND);
        self.keep("window closed", server);

        // Holes on both sides: the first segment of several is lost.
        let (client, server) = self.connection(listener);
        for (side, id) in [(Side::A, client), (Side::B, server)] {
            let mut seen = 0;
            self.pair.drop = Some(Box::new(move |packet| {
                seen += u32::from(packet.from == side && packet.payload > 0);
                seen == 1 && packet.payload > 0
            }));
            self.pair.write(side, id, &stream(6000, 4));
            self.pair.run_for(Duration::from_millis(11));
        }
        self.silence(client);
        self.hear_nothing_of_the_silent();
        self.keep("holes", server);

        let (client, server) = self.connection(listener);
        self.silence(client);
        self.pair.write(Side::B, server, &stream(9000, 5));
        self.keep("timed out once", server);

        let (_, server) = self.connection(listener);
        let now = self.pair.now;
        self.pair.b.tcp_shutdown(now, server, Shutdown::Read).expect("it is open");
        self.keep("reads no more", server);
    }

    fn closing_ones(&mut self, listener: SocketId) {
        let (client, server) = self.connection(listener);
        let now = self.pair.now;
        self.pair.a.tcp_shutdown(now, client, Shutdown::Write).expect("it is open");
        self.settle();
        assert_eq!(self.pair.b.status(server).state, State::CloseWait);
        self.keep("close-wait", server);

        let (client, server) = self.connection(listener);
        let now = self.pair.now;
        self.pair.a.tcp_shutdown(now, client, Shutdown::Write).expect("it is open");
        self.settle();
        self.silence(client);
        self.pair.b.tcp_shutdown(now, server, Shutdown::Write).expect("it is open");
        assert_eq!(self.pair.b.status(server).state, State::LastAck);
        self.keep("last-ack", server);

        let (_, server) = self.connection(listener);
        let now = self.pair.now;
        self.pair.b.tcp_shutdown(now, server, Shutdown::Write).expect("it is open");
        self.settle();
        assert_eq!(self.pair.b.status(server).state, State::FinWait2);
        self.keep("fin-wait-2", server);

        let (_, server) = self.connection(listener);
        let now = self.pair.now;
        self.pair.b.tcp_close(now, server);
        self.settle();

        let (client, server) = self.connection(listener);
        let now = self.pair.now;
        self.silence(client);
        self.pair.write(Side::B, server, &stream(300, 6));
        self.pair.b.tcp_shutdown(now, server, Shutdown::Write).expect("it is open");
        assert_eq!(self.pair.b.status(server).state, State::FinWait1);
        self.keep("fin-wait-1", server);

        // Both at once: A's FIN comes, B's is lost.
        let (client, server) = self.connection(listener);
        let now = self.pair.now;
        self.pair.a.tcp_shutdown(now, client, Shutdown::Write).expect("it is open");
        self.pair.transmit();
        self.silence(client);
        self.pair.b.tcp_shutdown(now, server, Shutdown::Write).expect("it is open");
        self.pair.run_for(Duration::from_millis(6));
        assert_eq!(self.pair.b.status(server).state, State::Closing);
        self.keep("closing", server);

        let (client, server) = self.connection(listener);
        let now = self.pair.now;
        self.pair.b.tcp_close(now, server);
        self.settle();
        let now = self.pair.now;
        self.pair.a.tcp_close(now, client);
        self.settle();

        let (client, server) = self.connection(listener);
        self.pair.write(Side::A, client, &stream(50, 7));
        self.settle();
        let now = self.pair.now;
        self.pair.a.tcp_abort(now, client);
        self.settle();
        assert!(self.pair.b.status(server).error.is_some());
        self.keep("reset", server);
    }

    fn without_connection(&mut self) {
        let idle = self.pair.b.tcp_open();
        self.keep("idle", idle);
        let bound = self.pair.b.tcp_open();
        let address = SocketAddr::new(self.pair.b.config().addresses[0], 1234);
        self.pair.b.tcp_bind(bound, address, Reuse { address: true, port: false }).expect("the port is free");
        self.keep("bound", bound);
        let opening = self.pair.b.tcp_open();
        let remote = SocketAddr::new(self.pair.a.config().addresses[0], 4321);
        self.silent.borrow_mut().insert(4321);
        let now = self.pair.now;
        self.pair.b.tcp_connect(now, opening, remote).expect("it can connect");
        self.pair.transmit();
        assert_eq!(self.pair.b.status(opening).state, State::SynSent);
        self.keep("syn-sent", opening);
    }

    fn listening_ones(&mut self, v6: bool) {
        // A full accept queue with data in it, half-open connections behind it, and cookies.
        let listener = self.pair.listen(81, 1);
        for index in 0..6 {
            let client = self.pair.connect(81);
            self.pair.run_for(Duration::from_millis(15));
            self.pair.write(Side::A, client, &stream(20, index));
        }
        assert!(self.pair.b.status(listener).acceptable > 0);
        self.keep("full listener", listener);
        let waiting = self.pair.listen(82, 32);
        for _ in 0..3 {
            self.pair.connect(82);
        }
        self.pair.run_for(Duration::from_millis(6));
        assert!(self.pair.b.connections_without_socket().0 >= 3);
        self.keep("listener with half-open ones", waiting);
        // A connection of B to itself.
        let own = if v6 { "[fd00::2]:80" } else { "127.0.0.1:80" };
        let now = self.pair.now;
        let looped = self.pair.b.tcp_open();
        self.pair.b.tcp_connect(now, looped, own.parse().expect("an address")).expect("it can connect");
        while self.pair.b.poll_transmit(now).is_some() {}
        self.keep("to itself", looped);
    }
}
