//! The move of a job: the two state machines of `handoff`, driven over a connection by the main thread.
//!
//! [`source`] and [`target`] carry out what the machines ask for; this file holds what both need. Everything blocks:
//! ptrace belongs to the thread, and a job that is being moved is not served otherwise.

mod peer;
mod source;
mod stats;
mod target;

use std::io;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Shared;
use super::commands::{Command, Commands};
use super::job::{Job, wait_for};
use crate::api::{ApiError, ErrorKind};

pub use source::{Outcome, forward_strays, move_out};
pub use target::{Back, take_back};

/// Where a job's sockets are when a move begins, and whether they stay there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct NetOffer {
    /// The node with the sockets.
    at: String,
    /// They stay.
    stay: bool,
}

/// How long a shim that is to receive a job waits for the connection.
const CONNECTION_WAIT: Duration = Duration::from_secs(30);

/// Waits for the connection to the source and takes the job over. `None` when it was called off.
pub fn receive(shared: &std::sync::Arc<Shared>, queue: &mut Commands) -> anyhow::Result<Option<Job>> {
    use std::os::fd::AsFd;
    let until = Instant::now() + CONNECTION_WAIT;
    loop {
        while let Some(command) = queue.take() {
            match command {
                Command::Receive { source, stream, line } => {
                    return target::receive(shared, &source, stream, line).map(Some);
                }
                Command::Cancel | Command::Shutdown => {
                    let error = ApiError::new(ErrorKind::Unavailable, "the move was called off before it began");
                    return Err(error.into());
                }
                // Nothing to describe and nothing to move yet; dropping the request tells its asker.
                Command::Line { .. }
                | Command::Inspect(_)
                | Command::Sockets(_)
                | Command::Record { .. }
                | Command::Signal { .. }
                | Command::MoveOut { .. } => {}
            }
        }
        if Instant::now() >= until {
            let error = ApiError::new(ErrorKind::Unavailable, "the source never connected");
            return Err(error.into());
        }
        wait_for(&[queue.as_fd()], Some(until))?;
    }
}

fn pack<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    rmp_serde::to_vec_named(value).map_err(io::Error::other)
}

/// A section for a peer that speaks `protocol`: packed, since it may hold thousands of connections and the job stands
/// still, unless the peer is too old to read that.
fn pack_section<T: Serialize>(protocol: u16, value: &T) -> io::Result<Vec<u8>> {
    if protocol >= 2 { codec::to_vec(value).map_err(io::Error::other) } else { pack(value) }
}

fn unpack<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> io::Result<T> {
    let invalid = |error: &dyn std::fmt::Display| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{what} does not decode: {error}"))
    };
    if codec::is_packed(bytes) {
        codec::from_slice(bytes).map_err(|error| invalid(&error))
    } else {
        rmp_serde::from_slice(bytes).map_err(|error| invalid(&error))
    }
}

/// An error with all its causes in one line.
fn in_words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        // Some messages hold their cause already.
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        cause = error.source();
    }
    text
}
