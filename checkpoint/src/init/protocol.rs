//! What a sandbox and its init say to each other.
//!
//! Messages are a length and msgpack, over stream sockets and with plain reads and writes only: the filter on init may
//! hand calls that carry addresses or descriptors to a supervisor that doesn't run yet.

use std::io::{self, Read, Write};
use std::net::IpAddr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::sandbox::{ClockOffsets, ExitStatus};

/// A message can't be longer: arguments and environment of a program are limited by the kernel to less.
const MAX_BYTES: usize = 16 << 20;

/// For the process that makes the namespaces.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub clock_offsets: Option<ClockOffsets>,
}

/// For PID 1, first.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Begin {
    pub hostname: String,
    pub addresses: Vec<IpAddr>,
    pub filter: Option<sys::seccomp::Program>,
}

/// For PID 1, afterwards.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Start the job's first process.
    Spawn(Spawn),
    /// The job is there already, restored, with its processes standing still.
    Adopt(Root),
    /// Tell what became of the first process.
    Root,
    /// Kill all processes of the job.
    Kill,
}

/// The job's first process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Root {
    /// It is a child of init.
    Runs(i32),
    /// It has ended; others may go on.
    Ended(ExitStatus),
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Spawn {
    pub argv: Vec<serde_bytes::ByteBuf>,
    pub env: Vec<(serde_bytes::ByteBuf, serde_bytes::ByteBuf)>,
    pub cwd: serde_bytes::ByteBuf,
    /// Numbers of descriptors of the sandbox's owner.
    pub stdio: [i32; 3],
}

/// From the process that makes the namespaces, from PID 1 when it is set up, and in answer to each request.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// PID 1 was started, with this number outside.
    Started {
        pid: i32,
    },
    /// PID 1 is ready; there, the listener of its filter and the descriptor for the owner's process have these numbers.
    Ready {
        listener: Option<i32>,
        owner: i32,
    },
    /// A program runs, with this number inside.
    Spawned {
        pid: i32,
    },
    Adopted,
    /// What became of the first process; `None` when there is no job, or nothing of it is left.
    Root(Option<Root>),
    Killed,
    /// Something failed.
    Failed {
        what: String,
        errno: Option<i32>,
    },
}

/// Unasked, on the socket for events.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Notice {
    RootExited { status: ExitStatus },
    JobEmpty,
}

/// Sends a message with one write, so that messages of two processes on one socket don't mix.
pub(crate) fn send<T: Serialize>(mut to: impl Write, message: &T) -> io::Result<()> {
    let mut bytes = vec![0; 4];
    rmp_serde::encode::write_named(&mut bytes, message).map_err(io::Error::other)?;
    let length = u32::try_from(bytes.len() - 4).map_err(io::Error::other)?;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    to.write_all(&bytes)
}

/// Receives a message. `UnexpectedEof` when the other side is gone.
pub(crate) fn receive<T: DeserializeOwned>(mut from: impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message of init's is too long"));
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    rmp_serde::from_slice(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
