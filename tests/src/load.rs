//! Loads: clients at work in the client's namespace, each of which verifies every byte it gets.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use migd::demo::redis::{Connection, Reply};
use sys::netns::NetNamespace;

use crate::pattern::Pattern;

/// Longest a worker may be without progress. No move comes near it.
const PROGRESS: Duration = Duration::from_secs(20);

/// What a worker shares with its load.
#[derive(Debug, Default)]
pub struct Shared {
    stop: AtomicBool,
    steps: AtomicU64,
}

impl Shared {
    /// Whether the worker should end after what it is doing.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Counts a verified piece of work.
    pub fn step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }
}

/// Workers at work.
#[derive(Debug)]
pub struct Load {
    workers: Vec<(Arc<Shared>, JoinHandle<io::Result<()>>)>,
}

impl Load {
    /// Starts `count` workers in a namespace. `work` gets the worker's number and works until told to stop.
    pub fn start(
        namespace: impl Fn() -> NetNamespace,
        count: u64,
        work: impl Fn(u64, &Shared) -> io::Result<()> + Clone + Send + 'static,
    ) -> Load {
        let start = |number| {
            let (shared, namespace, work) = (Arc::new(Shared::default()), namespace(), work.clone());
            let theirs = Arc::clone(&shared);
            let thread = std::thread::spawn(move || {
                namespace.enter()?;
                work(number, &theirs)
            });
            (shared, thread)
        };
        Load { workers: (0..count).map(start).collect() }
    }

    /// Both loads as one.
    #[must_use]
    pub fn and(mut self, mut other: Load) -> Load {
        self.workers.append(&mut other.workers);
        self
    }

    /// Waits until every worker has done something more.
    ///
    /// # Panics
    /// When one does not, or has ended.
    pub fn must_progress(&self) {
        let before: Vec<u64> = self.workers.iter().map(|(shared, _)| shared.steps.load(Ordering::Relaxed)).collect();
        let deadline = Instant::now() + PROGRESS;
        for (number, ((shared, thread), before)) in self.workers.iter().zip(before).enumerate() {
            while shared.steps.load(Ordering::Relaxed) <= before {
                assert!(!thread.is_finished(), "worker {number} has ended after {before} steps; stop() tells why");
                assert!(Instant::now() < deadline, "worker {number} hangs after {before} steps");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    /// Stops the workers; returns how many steps they did together.
    ///
    /// # Errors
    /// What the workers that failed said.
    ///
    /// # Panics
    /// When a worker did.
    pub fn stop(self) -> Result<u64, String> {
        for (shared, _) in &self.workers {
            shared.stop.store(true, Ordering::Relaxed);
        }
        let mut steps = 0;
        let mut errors = Vec::new();
        for (number, (shared, thread)) in self.workers.into_iter().enumerate() {
            match thread.join() {
                Ok(Ok(())) => steps += shared.steps.load(Ordering::Relaxed),
                Ok(Err(error)) => {
                    let done = shared.steps.load(Ordering::Relaxed);
                    errors.push(format!("worker {number} after {done} steps: {error}"));
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        if errors.is_empty() { Ok(steps) } else { Err(errors.join("\n")) }
    }
}

/// A connection as loads make it.
///
/// # Errors
/// As connect(2).
pub fn connect(server: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, Duration::from_secs(10))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PROGRESS))?;
    stream.set_write_timeout(Some(PROGRESS))?;
    Ok(stream)
}

/// Streams bytes through an echo server without pause: one thread writes, this one reads and compares.
///
/// # Errors
/// When the connection broke or a byte was wrong.
///
/// # Panics
/// When the writing thread did.
pub fn echo(server: SocketAddr, seed: u64, shared: &Shared) -> io::Result<()> {
    const PIECE: usize = 16 << 10;
    let mut stream = connect(server)?;
    let mut writer = stream.try_clone()?;
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || {
            let mut pattern = Pattern::new(seed);
            let mut piece = vec![0; PIECE];
            let mut sent = 0;
            while !shared.stopped() {
                pattern.fill(&mut piece);
                writer.write_all(&piece)?;
                sent += PIECE;
            }
            writer.shutdown(std::net::Shutdown::Write)?;
            io::Result::Ok(sent)
        });
        let mut pattern = Pattern::new(seed);
        let mut piece = vec![0; PIECE];
        let mut received = 0;
        let outcome = loop {
            match stream.read(&mut piece) {
                Ok(0) => break Ok(received),
                Ok(count) => {
                    if let Err(error) = pattern.check(&piece[..count]) {
                        break Err(error);
                    }
                    received += count;
                    shared.step();
                }
                Err(error) => break Err(error),
            }
        };
        if outcome.is_err() {
            // The writer would otherwise wait for room for ever. It fails only when the connection is gone.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        let sent = match writing.join() {
            Ok(sent) => sent,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let (received, sent) = (outcome?, sent?);
        if received == sent { Ok(()) } else { Err(io::Error::other(format!("{sent} bytes sent, {received} echoed"))) }
    })
}

/// Counts in redis and writes and reads back values; the counter must be exact and each value the one written.
///
/// # Errors
/// When the connection broke or an answer was wrong.
pub fn redis(server: SocketAddr, seed: u64, shared: &Shared) -> io::Result<()> {
    let mut connection = Connection::open(server)?;
    let (counter, key) = (format!("counter:{seed}"), format!("value:{seed}"));
    let mut pattern = Pattern::new(seed);
    let mut count = 0;
    while !shared.stopped() {
        count += 1;
        let value = connection.increment(&counter)?;
        if value != count {
            return Err(io::Error::other(format!("the counter is {value} after {count} increments")));
        }
        let written = pattern.take(1 + usize::try_from(count % 7).unwrap_or(0) * 5000);
        connection.command(&[b"SET", key.as_bytes(), &written])?;
        if connection.command(&[b"GET", key.as_bytes()])? != Reply::Bulk(Some(written)) {
            return Err(io::Error::other("redis returned another value than was written"));
        }
        shared.step();
    }
    Ok(())
}

/// Writes and reads back values in memcached.
///
/// # Errors
/// When the connection broke or an answer was wrong.
pub fn memcached(server: SocketAddr, seed: u64, shared: &Shared) -> io::Result<()> {
    let mut connection = BufReader::new(connect(server)?);
    let mut pattern = Pattern::new(seed);
    let mut count = 0;
    while !shared.stopped() {
        count += 1;
        let value = pattern.take(1 + (count % 5) * 20_000);
        let mut request = format!("set key{seed} 0 0 {}\r\n", value.len()).into_bytes();
        request.extend_from_slice(&value);
        request.extend_from_slice(format!("\r\nget key{seed}\r\n").as_bytes());
        connection.get_mut().write_all(&request)?;
        expect_line(&mut connection, "STORED")?;
        expect_line(&mut connection, &format!("VALUE key{seed} 0 {}", value.len()))?;
        let mut read = vec![0; value.len()];
        connection.read_exact(&mut read)?;
        if read != value {
            return Err(io::Error::other("memcached returned another value than was written"));
        }
        expect_line(&mut connection, "")?;
        expect_line(&mut connection, "END")?;
        shared.step();
    }
    Ok(())
}

fn expect_line(reader: &mut impl BufRead, expected: &str) -> io::Result<()> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if line.trim_end() == expected {
        Ok(())
    } else {
        Err(io::Error::other(format!("{line:?} instead of {expected:?}")))
    }
}

/// Downloads a file again and again, each time over a new connection, and compares every byte with the pattern of `seed`.
///
/// # Errors
/// When a connection broke or a byte was wrong.
pub fn http(server: SocketAddr, path: &str, seed: u64, size: usize, shared: &Shared) -> io::Result<()> {
    while !shared.stopped() {
        let mut connection = BufReader::with_capacity(64 << 10, connect(server)?);
        let request = format!("GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n");
        connection.get_mut().write_all(request.as_bytes())?;
        let mut status = String::new();
        connection.read_line(&mut status)?;
        if status.split(' ').nth(1) != Some("200") {
            return Err(io::Error::other(format!("{path} was answered by {status:?}")));
        }
        let mut header = String::new();
        while {
            header.clear();
            connection.read_line(&mut header)?
        } > 2
        {}
        // In steps, so that a slow download shows progress.
        let mut pattern = Pattern::new(seed);
        let mut left = size;
        while left > 0 {
            let part = left.min(256 << 10);
            pattern.check_from(&mut connection, part)?;
            left -= part;
            shared.step();
        }
        // The server closes first; reading on to its FIN keeps this end from closing with data unread, which is a reset.
        if connection.read(&mut [0])? != 0 {
            return Err(io::Error::other("more bytes than the file has"));
        }
    }
    Ok(())
}
