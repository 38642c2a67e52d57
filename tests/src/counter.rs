//! One connection to a redis, over which both sides count.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::fixture::Fixture;

/// A job may stand still for as long as its directory is away in the middle of a move.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to redis that counts, and sees that the server counts the same.
#[derive(Debug)]
pub struct Counter {
    stream: BufReader<TcpStream>,
    key: u16,
    count: u64,
}

impl Counter {
    /// Connects from the client.
    ///
    /// # Panics
    /// When nobody serves there.
    #[must_use]
    pub fn new(fixture: &Fixture, server: SocketAddr) -> Counter {
        let stream = fixture.connect(server).unwrap_or_else(|error| panic!("{server}: {error}"));
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let key = stream.local_addr().expect("connected").port();
        Counter { stream: BufReader::new(stream), key, count: 0 }
    }

    /// Counts on, so many times.
    ///
    /// # Panics
    /// When the connection ends, or the server has counted otherwise.
    pub fn steps(&mut self, count: usize) {
        for _ in 0..count {
            let command = format!("INCR {}\r\n", self.key);
            self.stream.get_mut().write_all(command.as_bytes()).expect("the connection lives");
            let mut line = String::new();
            self.stream.read_line(&mut line).expect("the connection lives");
            self.count += 1;
            assert_eq!(line.trim_end(), format!(":{}", self.count));
        }
    }
}
