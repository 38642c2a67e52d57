//! The near ends of measured streams, in the client's namespace.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sys::netns::NetNamespace;

use super::peer::{CHUNK, RECEIVE, RECEIVE_CLOSELY, SEND};

/// Which way the bytes go, seen from the server that migd runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Direction {
    /// From the server to the client.
    Send,
    /// From the client to the server.
    Receive,
}

/// How many bytes had been received, and when.
#[derive(Debug, Clone, Copy)]
struct Sample {
    time: Instant,
    bytes: u64,
}

/// Streams at work, all in one direction.
#[derive(Debug)]
pub(super) struct Bulk(Vec<Stream>);

impl Bulk {
    /// Connects and starts the flows.
    pub(super) fn start(
        namespace: &NetNamespace,
        server: SocketAddr,
        direction: Direction,
        streams: u32,
    ) -> io::Result<Bulk> {
        let start = |_| Stream::start(namespace, server, direction, RECEIVE);
        (0..streams).map(start).collect::<io::Result<_>>().map(Bulk)
    }

    /// The same with one stream whose rate can be looked at in steps of a few milliseconds.
    pub(super) fn start_closely(
        namespace: &NetNamespace,
        server: SocketAddr,
        direction: Direction,
    ) -> io::Result<Bulk> {
        Stream::start(namespace, server, direction, RECEIVE_CLOSELY).map(|stream| Bulk(vec![stream]))
    }

    /// The rate of all together over the time to come, in Gbit/s, by the clocks of the samples themselves.
    ///
    /// # Errors
    /// When a stream broke or nothing came at all.
    pub(super) fn measure(&self, interval: Duration) -> anyhow::Result<f64> {
        let before = self.samples();
        std::thread::sleep(interval);
        let after = self.samples();
        anyhow::ensure!(!self.0.iter().any(Stream::has_ended), "a measured stream broke");
        // One stream of many may get nothing for a while; that is its rate then.
        let rate = |(before, after): (&Sample, &Sample)| {
            let seconds = (after.time - before.time).as_secs_f64();
            // Exact up to 2^53 bytes.
            #[allow(clippy::cast_precision_loss)]
            let bits = (after.bytes - before.bytes) as f64 * 8.0;
            if seconds > 0.0 { bits / seconds / 1e9 } else { 0.0 }
        };
        let total = before.iter().zip(&after).map(rate).sum();
        anyhow::ensure!(total > 0.0, "nothing came in {interval:?}");
        Ok(total)
    }

    /// Returns when bytes arrive: after a move they may be some time coming.
    ///
    /// # Errors
    /// When none does for a long time.
    pub(super) fn wait_until_it_flows(&self) -> anyhow::Result<()> {
        let before = self.bytes();
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.bytes() == before {
            anyhow::ensure!(Instant::now() < deadline, "nothing came for 20 s");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Bytes received so far over all streams.
    pub(super) fn bytes(&self) -> u64 {
        self.samples().iter().map(|sample| sample.bytes).sum()
    }

    /// The client's end of the first stream.
    pub(super) fn local_address(&self) -> io::Result<SocketAddr> {
        self.0.first().map_or_else(|| Err(io::ErrorKind::NotConnected.into()), |stream| stream.socket.local_addr())
    }

    fn samples(&self) -> Vec<Sample> {
        self.0.iter().map(Stream::sample).collect()
    }
}

/// A stream at work.
#[derive(Debug)]
struct Stream {
    socket: TcpStream,
    latest: Arc<Mutex<Sample>>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Stream {
    /// Connects and starts the flow; `receive` is how to ask the peer to receive.
    fn start(namespace: &NetNamespace, server: SocketAddr, direction: Direction, receive: u8) -> io::Result<Stream> {
        let mut socket = namespace.run(|| connect(server))?;
        let latest = Arc::new(Mutex::new(Sample { time: Instant::now(), bytes: 0 }));
        let seen = Arc::clone(&latest);
        let mut reader = socket.try_clone()?;
        let mut threads = Vec::new();
        match direction {
            Direction::Send => {
                socket.write_all(&[SEND])?;
                threads.push(std::thread::spawn(move || {
                    let mut chunk = vec![0; CHUNK];
                    let mut bytes = 0;
                    loop {
                        let count = reader.read(&mut chunk)?;
                        if count == 0 {
                            return Err(io::ErrorKind::UnexpectedEof.into());
                        }
                        bytes += count as u64;
                        note(&seen, bytes);
                    }
                }));
            }
            Direction::Receive => {
                socket.write_all(&[receive])?;
                let mut writer = socket.try_clone()?;
                threads.push(std::thread::spawn(move || {
                    let chunk = vec![0xa5; CHUNK];
                    loop {
                        writer.write_all(&chunk)?;
                    }
                }));
                threads.push(std::thread::spawn(move || {
                    loop {
                        let mut told = [0; 8];
                        reader.read_exact(&mut told)?;
                        note(&seen, u64::from_be_bytes(told));
                    }
                }));
            }
        }
        Ok(Stream { socket, latest, threads })
    }

    fn sample(&self) -> Sample {
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_ended(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Fails only when the stream is broken already; the threads end either way.
        let _ = self.socket.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

fn note(latest: &Mutex<Sample>, bytes: u64) {
    *latest.lock().unwrap_or_else(PoisonError::into_inner) = Sample { time: Instant::now(), bytes };
}

/// Connects; the server may need a moment until it listens.
pub(super) fn connect(server: SocketAddr) -> io::Result<TcpStream> {
    connect_within(server, Duration::from_secs(10))
}

/// Connects to a server that may need so long until it listens.
pub(super) fn connect_within(server: SocketAddr, patience: Duration) -> io::Result<TcpStream> {
    let deadline = Instant::now() + patience;
    loop {
        match TcpStream::connect_timeout(&server, Duration::from_secs(3)) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            other => return other,
        }
    }
}
