//! The demonstration's clients: threads in the client's namespace with plain sockets of the kernel, which know nothing
//! of migd. Each runs until it is told to stop and then tells what it saw.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use sys::netns::NetNamespace;

use super::redis::{Connection, Reply};

/// Key that the counting client adds to.
pub const COUNTER: &str = "demo:counter";
/// Key of the value that is downloaded.
pub const VALUE: &str = "demo:value";
/// Channel that the idle subscriber listens on.
pub const CHANNEL: &str = "demo:channel";
/// Size of one request for a part of the value. Redis copies a whole reply before it serves anybody else: a GET of
/// 64 MB at once stalls every other client for some 45 ms with no move at all (measured, kernel TCP), which would
/// drown what is being shown. In parts of 1 MiB the same bytes flow at the full rate and others wait 5 ms at most.
pub const PART: usize = 1 << 20;
/// Requests for parts under way at a time, so that the connection never idles.
const PARTS_AHEAD: usize = 2;

/// One operation of the counting client.
#[derive(Debug, Clone, Copy)]
pub struct Operation {
    /// Just before the request was written.
    pub began: Instant,
    /// Just after its reply was read.
    pub ended: Instant,
}

impl Operation {
    /// How long it took.
    pub fn duration(&self) -> Duration {
        self.ended - self.began
    }
}

/// What the counting client saw.
#[derive(Debug, Default)]
pub struct Counted {
    /// Every acknowledged operation, in order.
    pub operations: Vec<Operation>,
    /// Replies that were not one more than the reply before.
    pub wrong_replies: u64,
    /// What broke the connection, if anything did.
    pub broken: Option<String>,
}

/// What the downloading client saw.
#[derive(Debug, Default)]
pub struct Downloaded {
    /// When each part had arrived, and its size.
    pub parts: Vec<(Instant, usize)>,
    /// Downloads of the whole value.
    pub downloads: u64,
    /// Those with another hash than the value's.
    pub hash_mismatches: u64,
    /// What broke the connection, if anything did.
    pub broken: Option<String>,
}

/// What the subscriber saw.
#[derive(Debug, Default)]
pub struct Subscribed {
    /// The messages, in order.
    pub messages: Vec<Vec<u8>>,
    /// What broke the connection, if anything did.
    pub broken: Option<String>,
}

/// A client at work.
#[derive(Debug)]
pub struct Client<T> {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<T>,
}

impl<T: Default + Send + 'static> Client<T> {
    fn start(
        namespace: NetNamespace,
        work: impl FnOnce(&AtomicBool) -> T + Send + 'static,
        failed: impl FnOnce(io::Error) -> T + Send + 'static,
    ) -> Client<T> {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = std::thread::spawn(move || match namespace.enter() {
            Ok(()) => work(&flag),
            Err(error) => failed(error),
        });
        Client { stop, thread }
    }

    /// Tells it to stop after what it is doing and returns what it saw.
    ///
    /// # Panics
    /// When the client did.
    pub fn stop(self) -> T {
        self.stop.store(true, Ordering::Relaxed);
        self.finish()
    }

    /// Waits until it ends by itself.
    ///
    /// # Panics
    /// When the client did.
    pub fn finish(self) -> T {
        match self.thread.join() {
            Ok(seen) => seen,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Whether it ended by itself, for instance because its connection broke.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }
}

/// Starts the client that does INCR without pause over one connection.
#[must_use]
pub fn count(namespace: NetNamespace, server: SocketAddr) -> Client<Counted> {
    let work = move |stop: &AtomicBool| {
        let mut seen = Counted::default();
        let result = Connection::open(server).and_then(|mut connection| {
            let mut before = 0;
            while !stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                let value = connection.increment(COUNTER)?;
                seen.operations.push(Operation { began, ended: Instant::now() });
                seen.wrong_replies += u64::from(value != before + 1);
                before = value;
            }
            Ok(())
        });
        seen.broken = result.err().map(|error| error.to_string());
        seen
    };
    Client::start(namespace, work, |error| Counted { broken: Some(error.to_string()), ..Counted::default() })
}

/// Starts the client that downloads the value again and again and checks its hash.
#[must_use]
pub fn download(namespace: NetNamespace, server: SocketAddr, size: usize, hash: [u8; 32]) -> Client<Downloaded> {
    let work = move |stop: &AtomicBool| {
        let mut seen = Downloaded::default();
        let result = Connection::open(server).and_then(|mut connection| {
            while !stop.load(Ordering::Relaxed) {
                let found = download_once(&mut connection, size, &mut seen)?;
                seen.downloads += 1;
                seen.hash_mismatches += u64::from(found != hash);
            }
            Ok(())
        });
        seen.broken = result.err().map(|error| error.to_string());
        seen
    };
    Client::start(namespace, work, |error| Downloaded { broken: Some(error.to_string()), ..Downloaded::default() })
}

fn download_once(connection: &mut Connection, size: usize, seen: &mut Downloaded) -> io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    let mut asked = 0;
    let mut received = 0;
    while received < size {
        while asked < size && asked < received + PARTS_AHEAD * PART {
            let last = (asked + PART).min(size) - 1;
            let (from, to) = (asked.to_string(), last.to_string());
            connection.send(&super::redis::encode(&[b"GETRANGE", VALUE.as_bytes(), from.as_bytes(), to.as_bytes()]))?;
            asked = last + 1;
        }
        let length = connection.bulk(|bytes| hasher.update(bytes))?;
        if length == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the value became shorter"));
        }
        received += length;
        seen.parts.push((Instant::now(), length));
    }
    Ok(hasher.finalize().into())
}

/// Starts the client that subscribes and then only waits for `messages` messages; returns when it is subscribed.
///
/// # Errors
/// When it can't subscribe.
pub fn subscribe(namespace: NetNamespace, server: SocketAddr, messages: usize) -> io::Result<Client<Subscribed>> {
    let mut connection = namespace.run(|| Connection::open(server))?;
    match connection.command(&[b"SUBSCRIBE", CHANNEL.as_bytes()])? {
        Reply::Array(_) => {}
        other => return Err(io::Error::other(format!("SUBSCRIBE was answered by {other:?}"))),
    }
    // It waits as long as the demonstration takes; only the stop below ends it.
    connection.socket().set_read_timeout(Some(std::time::Duration::from_millis(200)))?;
    let work = move |stop: &AtomicBool| {
        let mut seen = Subscribed::default();
        while seen.messages.len() < messages {
            match connection.reply() {
                Ok(Reply::Array(parts)) => match parts.into_iter().nth(2) {
                    Some(Reply::Bulk(Some(message))) => seen.messages.push(message),
                    other => seen.broken = Some(format!("a message without content: {other:?}")),
                },
                Ok(other) => seen.broken = Some(format!("{other:?} instead of a message")),
                // Nothing came yet. A message is a few bytes that arrive at once, so none is cut in two by this.
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
                Err(error) => seen.broken = Some(error.to_string()),
            }
            if seen.broken.is_some() {
                break;
            }
        }
        seen
    };
    Ok(Client::start(namespace, work, |error| Subscribed { broken: Some(error.to_string()), ..Subscribed::default() }))
}
