//! The program at the far end of a measured stream: the same one under the kernel's TCP and under migd.
//!
//! A client says in one byte what it wants: [`SEND`], and the peer sends until the client hangs up; [`RECEIVE`], and the
//! peer receives and tells now and then, in eight bytes big-endian, how many bytes it has received (so every rate is
//! taken at the receiving end); [`RECEIVE_CLOSELY`], and it tells more often; or [`ECHO`], and the peer sends back what it
//! receives.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;

/// Asks the peer to send.
pub(super) const SEND: u8 = b's';
/// Asks the peer to receive.
pub(super) const RECEIVE: u8 = b'r';
/// Asks the peer to receive, for a rate that is taken in steps of a few milliseconds.
pub(super) const RECEIVE_CLOSELY: u8 = b'c';
/// Asks the peer to send back what it receives.
pub(super) const ECHO: u8 = b'e';
/// Size of each read and write.
pub(super) const CHUNK: usize = 256 << 10;
/// How often the peer tells how much it received: so seldom that it costs nothing beside the stream.
pub(super) const TELL: Duration = Duration::from_millis(10);
/// The same where it is asked for [`RECEIVE_CLOSELY`].
const TELL_CLOSELY: Duration = Duration::from_millis(1);

/// Serves until it is killed.
///
/// `congestion` is the congestion control that its connections use; by default that of the machine.
pub(super) fn main(port: u16, congestion: Option<&str>) -> anyhow::Result<ExitCode> {
    let listener =
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).with_context(|| format!("can't listen on {port}"))?;
    if let Some(name) = congestion {
        // Connections inherit it.
        rustix::net::sockopt::set_tcp_congestion(&listener, name).with_context(|| format!("can't choose {name}"))?;
    }
    loop {
        let (stream, _) = listener.accept().context("can't accept")?;
        // A client that hangs up is how every stream ends.
        std::thread::spawn(move || drop(serve(stream)));
    }
}

fn serve(mut stream: TcpStream) -> io::Result<()> {
    let mut wish = [0];
    stream.read_exact(&mut wish)?;
    let mut chunk = vec![0x5a; CHUNK];
    if wish[0] == SEND {
        loop {
            stream.write_all(&chunk)?;
        }
    }
    stream.set_nodelay(true)?;
    if wish[0] == ECHO {
        loop {
            let count = stream.read(&mut chunk)?;
            if count == 0 {
                return Ok(());
            }
            stream.write_all(&chunk[..count])?;
        }
    }
    let tell = if wish[0] == RECEIVE_CLOSELY { TELL_CLOSELY } else { TELL };
    let mut received: u64 = 0;
    let mut told = Instant::now();
    loop {
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            return Ok(());
        }
        received += count as u64;
        if told.elapsed() >= tell {
            told = Instant::now();
            stream.write_all(&received.to_be_bytes())?;
        }
    }
}
