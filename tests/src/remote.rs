//! A server under migd whose sockets a test drives step by step, so that a connection can be put into any state.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};

use sha2::{Digest, Sha256};

use crate::fixture::Fixture;
use crate::pattern::Pattern;

const SOURCE: &str = include_str!("../programs/remote.py");
const CONTROL_PORT: u16 = 7100;
const TEST_PORT: u16 = 7101;

/// The server, running as a job on node A, and the connection over which it is driven.
#[derive(Debug)]
pub struct Remote {
    control: BufReader<TcpStream>,
    /// Where its test port is.
    pub server: SocketAddr,
}

impl Remote {
    /// Name of the job.
    pub const JOB: &'static str = "remote";

    /// Starts the server.
    ///
    /// # Panics
    /// When it does not serve.
    #[must_use]
    pub fn start(fixture: &Fixture) -> Remote {
        let script = fixture.path("remote.py");
        std::fs::write(&script, SOURCE).expect("the test's directory");
        let argv = ["python3", &script, &CONTROL_PORT.to_string(), &TEST_PORT.to_string()];
        let control = fixture.serve(Remote::JOB, &argv, CONTROL_PORT);
        let stream = fixture.connect(control).expect("it just served");
        Remote { control: BufReader::new(stream), server: SocketAddr::new(control.ip(), TEST_PORT) }
    }

    /// Has a command carried out and returns the answer; see `programs/remote.py`.
    ///
    /// # Panics
    /// When the server refuses or does not answer.
    pub fn ask(&mut self, command: &str) -> String {
        self.begin(command);
        self.answer(command)
    }

    /// Sends a command whose answer is to be taken later with [`Remote::answer`].
    ///
    /// # Panics
    /// When the connection broke.
    pub fn begin(&mut self, command: &str) {
        let sent = self.control.get_mut().write_all(format!("{command}\n").as_bytes());
        sent.unwrap_or_else(|error| panic!("{command}: {error}"));
    }

    /// The answer to a command.
    ///
    /// # Panics
    /// When the server refused or does not answer.
    pub fn answer(&mut self, command: &str) -> String {
        let mut line = String::new();
        let read = self.control.read_line(&mut line);
        read.unwrap_or_else(|error| panic!("{command}: {error}"));
        assert!(!line.is_empty() && !line.starts_with("error"), "{command}: {line:?}");
        line.trim_end().to_owned()
    }

    /// Has it listen with this backlog.
    pub fn listen(&mut self, backlog: u32) {
        self.ask(&format!("listen {backlog}"));
    }

    /// Has it accept a connection; returns its number there.
    pub fn accept(&mut self) -> String {
        self.ask("accept")
    }

    /// Has it read exactly the next `count` bytes of the pattern on connection `number`.
    ///
    /// # Panics
    /// When it got anything else.
    pub fn must_receive(&mut self, number: &str, pattern: &mut Pattern, count: usize) {
        let expected = pattern.take(count);
        let hash: String = Sha256::digest(&expected).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(self.ask(&format!("recv {number} {count}")), format!("{count} {hash}"));
    }

    /// Has it read on connection `number` and find nothing but the end.
    ///
    /// # Panics
    /// When there is more.
    pub fn must_be_at_the_end(&mut self, number: &str) {
        let answer = self.ask(&format!("recv {number} 1"));
        assert!(answer.starts_with("0 "), "{answer}");
    }
}
