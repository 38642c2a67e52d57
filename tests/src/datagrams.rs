//! Loads of datagrams, none of which is sent twice: one that doesn't come back fails the test.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use crate::fixture::Fixture;
use crate::load::Shared;
use crate::pattern::Pattern;

/// Longest a datagram may be on its way. No move comes near it.
const LOST: Duration = Duration::from_secs(30);
/// Datagrams of one worker that are on their way. All that are must find room in the server's socket at once.
const WINDOW: usize = 8;
/// One in so many is longer than a packet.
const LONG_EVERY: u64 = 16;
const LONG: usize = 4000;
const SHORT: usize = 1200;

fn socket(server: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(LOST))?;
    Ok(socket)
}

/// Keeps numbered datagrams on their way through an echo server; each must come back as it was.
///
/// # Errors
/// When one doesn't, or the server's host says that there is no server.
pub fn echo(server: SocketAddr, seed: u64, shared: &Shared) -> io::Result<()> {
    let socket = socket(server)?;
    let content = |number: u64| {
        let longest = if number.is_multiple_of(LONG_EVERY) { LONG } else { SHORT };
        let mut pattern = Pattern::new(seed ^ number << 8);
        let size = usize::try_from(number * 37).unwrap_or(0) % longest;
        [&number.to_be_bytes()[..], &pattern.take(size)].concat()
    };
    let mut waiting = Vec::new();
    let mut next = 0;
    let mut buffer = vec![0; 1 << 16];
    loop {
        while waiting.len() < WINDOW && !shared.stopped() {
            socket.send(&content(next))?;
            waiting.push(next);
            next += 1;
        }
        if waiting.is_empty() {
            return Ok(());
        }
        let count = match socket.recv(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::other(format!("of {next} datagrams these are lost: {waiting:?}")));
            }
            Err(error) => return Err(error),
        };
        let number = buffer[..count].first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
        let place = waiting.iter().position(|waiting| Some(*waiting) == number);
        let Some(place) = place else {
            return Err(io::Error::other(format!("datagram {number:?} came twice, or was never sent")));
        };
        let number = waiting.swap_remove(place);
        if buffer[..count] != content(number) {
            return Err(io::Error::other(format!("datagram {number} is not what it was")));
        }
        shared.step();
    }
}

/// Asks a DNS server for one name after the other, which must all have this address; no question is repeated.
///
/// # Errors
/// When an answer doesn't come or is wrong.
pub fn dns(server: SocketAddr, seed: u64, answer: Ipv4Addr, shared: &Shared) -> io::Result<()> {
    let socket = socket(server)?;
    let mut buffer = [0; 512];
    let mut number = 0u64;
    while !shared.stopped() {
        number += 1;
        let query = query(number, &format!("n{seed}-{number}"));
        socket.send(&query)?;
        let count =
            socket.recv(&mut buffer).map_err(|error| io::Error::other(format!("question {number}: {error}")))?;
        let reply = &buffer[..count];
        let same = reply.get(..2) == query.get(..2) && reply.get(12..query.len()) == query.get(12..);
        if !same || !reply.ends_with(&answer.octets()) {
            return Err(io::Error::other(format!("question {number} has the answer {reply:02x?}")));
        }
        shared.step();
    }
    Ok(())
}

/// A question for the address of `name.test` (RFC 1035, 4.1).
fn query(number: u64, name: &str) -> Vec<u8> {
    let mut query = u16::try_from(number & 0xffff).unwrap_or(0).to_be_bytes().to_vec();
    // Recursion desired; one question.
    query.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in [name, "test"] {
        query.push(u8::try_from(label.len()).unwrap_or(0));
        query.extend_from_slice(label.as_bytes());
    }
    // The root; type A, class IN.
    query.extend_from_slice(&[0, 0, 1, 0, 1]);
    query
}

/// Starts a server on node A and waits until it answers `probe` from the client, at each address of the job, which it returns.
///
/// # Panics
/// When it does not answer in time; what it wrote is shown.
#[must_use]
pub fn serve(fixture: &Fixture, name: &str, argv: &[&str], port: u16, probe: &[u8]) -> Vec<SocketAddr> {
    let job = fixture.run("A", name, argv);
    let addresses = [Some(IpAddr::V4(job.address)), job.address6.map(IpAddr::V6)];
    let servers: Vec<SocketAddr> = addresses.into_iter().flatten().map(|ip| SocketAddr::new(ip, port)).collect();
    let until = Instant::now() + LOST;
    let answers = |server: SocketAddr| {
        fixture.client().run(|| {
            let socket = socket(server)?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            socket.send(probe)?;
            socket.recv(&mut [0; 512])
        })
    };
    for &server in &servers {
        while let Err(error) = answers(server) {
            assert!(Instant::now() < until, "{name} does not answer at {server}: {error}\n{}", fixture.logs("A", name));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    servers
}

/// A question to find out with whether a DNS server answers.
#[must_use]
pub fn dns_probe() -> Vec<u8> {
    query(0, "probe")
}
