//! Every job has an address of each family, and both go with it wherever it moves.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};

use tests::Fixture;

/// A connection to redis that counts.
struct Counter {
    stream: BufReader<std::net::TcpStream>,
    count: u64,
}

impl Counter {
    fn new(fixture: &Fixture, server: SocketAddr) -> Counter {
        let stream = fixture.connect(server).unwrap_or_else(|error| panic!("{server}: {error}"));
        Counter { stream: BufReader::new(stream), count: 0 }
    }

    /// Increments a number of its own, and sees that the server's copy is as it was left.
    fn step(&mut self) {
        let key = self.stream.get_ref().local_addr().expect("connected").port();
        self.stream.get_mut().write_all(format!("INCR {key}\r\n").as_bytes()).expect("the connection lives");
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("the connection lives");
        self.count += 1;
        assert_eq!(line.trim_end(), format!(":{}", self.count));
    }
}

#[test]
fn a_server_keeps_its_connections_of_both_families() {
    let fixture = Fixture::new();
    let arguments =
        ["redis-server", "--bind", "0.0.0.0", "::", "--port", "6379", "--protected-mode", "no", "--save", ""];
    let job = fixture.run("A", "server", &arguments);
    let address6 = job.address6.expect("the lab has an IPv6 prefix");
    let servers = [IpAddr::V4(job.address), IpAddr::V6(address6)].map(|address| SocketAddr::new(address, 6379));
    for server in servers {
        fixture.wait_until_it_serves("server", server);
    }
    let mut counters = servers.map(|server| Counter::new(&fixture, server));
    fixture.back_and_forth("server", 3, |_| {
        for counter in &mut counters {
            for _ in 0..100 {
                counter.step();
            }
        }
        // New connections find it, too, where it is now.
        for server in servers {
            Counter::new(&fixture, server).step();
        }
    });
}
