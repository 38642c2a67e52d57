//! The server whose move is timed: so much memory, so much of it written each second, any number of connections that get back
//! what they send. Nothing of it knows that it may be moved.

use std::io;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

const PAGE: usize = 4096;
/// How often a portion is written.
const STEP: Duration = Duration::from_millis(5);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4096;

/// Serves until it is killed.
pub(super) fn main(port: u16, resident_mb: usize, dirty_mb_s: usize) -> anyhow::Result<ExitCode> {
    let memory = vec![0_u8; resident_mb << 20];
    let memory = filled(memory);
    if dirty_mb_s > 0 && !memory.is_empty() {
        std::thread::spawn(move || dirty(memory, dirty_mb_s));
    } else {
        // It stays until the process ends.
        std::mem::forget(memory);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(port)).with_context(|| format!("can't serve on {port}"))?;
    Ok(ExitCode::SUCCESS)
}

/// Every page with content of its own, so that none is like another or like none.
fn filled(mut memory: Vec<u8>) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in memory.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    memory
}

/// Writes a word into page after page, round and round: of each second's share a portion in each step, by the clock, so that
/// a pause is not made up for.
fn dirty(mut memory: Vec<u8>, mb_s: usize) {
    let pages = memory.len() / PAGE;
    let pages_s = (mb_s << 20) / PAGE;
    let mut page = 0;
    let mut count = 0_u64;
    let mut last = Instant::now();
    loop {
        std::thread::sleep(STEP);
        let passed = last.elapsed().min(2 * STEP);
        last = Instant::now();
        let portion = pages_s * usize::try_from(passed.as_micros()).unwrap_or(0) / 1_000_000;
        for _ in 0..portion {
            count = count.wrapping_add(0x9e37_79b9);
            memory[page * PAGE..][..8].copy_from_slice(&count.to_le_bytes());
            page = (page + 1) % pages;
        }
    }
}

async fn serve(port: u16) -> io::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv4Addr::UNSPECIFIED, port).into())?;
    let listener: TcpListener = socket.listen(BACKLOG)?;
    loop {
        let (stream, _) = listener.accept().await?;
        // A client that hangs up is how every connection ends.
        tokio::spawn(async move { drop(echo(stream).await) });
    }
}

async fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut bytes = [0; 256];
    loop {
        match stream.read(&mut bytes).await? {
            0 => return Ok(()),
            count => stream.write_all(&bytes[..count]).await?,
        }
    }
}
