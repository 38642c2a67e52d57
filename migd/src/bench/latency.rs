//! Request and response over one connection: a byte to the peer and a byte back, as netperf's TCP_RR does it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sys::netns::NetNamespace;

use super::figures::quantile;
use super::peer::ECHO;
use super::stream::connect;
use crate::demo::clients::Operation;

/// Exchanges before each measurement.
const WARM_UP: Duration = Duration::from_millis(200);

/// Times of exchanges, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Latency {
    pub(super) median_us: f64,
    pub(super) p99_us: f64,
}

/// An open connection to an echoing peer.
#[derive(Debug)]
pub(super) struct Exchange {
    socket: TcpStream,
}

impl Exchange {
    /// Connects.
    pub(super) fn open(namespace: &NetNamespace, server: SocketAddr) -> std::io::Result<Exchange> {
        let mut socket = namespace.run(|| connect(server))?;
        socket.set_nodelay(true)?;
        // A peer that went silent is an error, not a hang.
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        socket.write_all(&[ECHO])?;
        Ok(Exchange { socket })
    }

    /// Over a connection to a server that does nothing but echo.
    pub(super) fn over(socket: TcpStream) -> std::io::Result<Exchange> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Exchange { socket })
    }

    /// Exchanges bytes without pause on a thread of its own, and keeps every time.
    pub(super) fn record(mut self) -> Recording {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut operations = Vec::new();
            while !flag.load(Ordering::Relaxed) {
                let began = Instant::now();
                self.once()?;
                operations.push(Operation { began, ended: Instant::now() });
            }
            Ok(operations)
        });
        Recording { stop, thread }
    }

    /// Exchanges bytes for some time and tells how long exchanges took.
    pub(super) fn measure(&mut self, interval: Duration) -> std::io::Result<Latency> {
        let begin = Instant::now() + WARM_UP;
        let mut times_ns: Vec<u32> = Vec::new();
        loop {
            let before = Instant::now();
            self.once()?;
            let after = Instant::now();
            if before >= begin {
                times_ns.push(u32::try_from((after - before).as_nanos()).unwrap_or(u32::MAX));
                if after >= begin + interval {
                    break;
                }
            }
        }
        times_ns.sort_unstable();
        let us = |share| f64::from(quantile(&times_ns, share)) / 1000.0;
        Ok(Latency { median_us: us(0.5), p99_us: us(0.99) })
    }

    /// One byte there and back.
    pub(super) fn once(&mut self) -> std::io::Result<()> {
        let mut byte = [0x5a];
        self.socket.write_all(&byte)?;
        self.socket.read_exact(&mut byte)
    }
}

/// Exchanges that go on until they are asked for.
#[derive(Debug)]
pub(super) struct Recording {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<Vec<Operation>>>,
}

impl Recording {
    /// Ends it.
    ///
    /// # Errors
    /// When the connection broke meanwhile.
    pub(super) fn stop(self) -> std::io::Result<Vec<Operation>> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(operations) => operations,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
