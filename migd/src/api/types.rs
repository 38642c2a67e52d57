//! Types that several of the conversations share.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

/// Bytes as base64 in JSON: output and input of jobs need not be text.
pub mod base64_bytes {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes bytes as a base64 string.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    /// Reads bytes from a base64 string.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map_err(serde::de::Error::custom)
    }
}

/// What a job was started with. Never changes, travels with the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Unique for ever: [`cluster_addr::JobId`], 24 lower-case hexadecimal digits.
    pub id: String,
    /// Unique in the cluster, chosen by the user or made from the program's name.
    pub name: String,
    /// Program and arguments, at least one element.
    pub argv: Vec<String>,
    /// The whole environment of the job.
    pub env: Vec<(String, String)>,
    /// Absolute working directory.
    pub cwd: String,
    /// When the job was started, in milliseconds since the Unix epoch.
    pub created_ms: u64,
}

/// A node as other nodes reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAddress {
    /// The node's name.
    pub name: String,
    /// Where its daemon listens for peers. Packets for its jobs are routed via the IP address of this.
    pub peer: SocketAddr,
    /// Further addresses of the node, for routes to jobs' addresses of the other family.
    #[serde(default)]
    pub hops: Vec<IpAddr>,
}

impl NodeAddress {
    /// The next hop to an address of a job on that node: an address of the node of the same family.
    pub fn hop_for(&self, address: IpAddr) -> Option<IpAddr> {
        let mut all = std::iter::once(self.peer.ip()).chain(self.hops.iter().copied());
        all.find(|hop| hop.is_ipv4() == address.is_ipv4())
    }
}

/// `job.json`: all that a shim needs to know when it is started. Written by the daemon; the shim only reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobFile {
    /// What to run (or what is being received).
    pub spec: JobSpec,
    /// The job's cluster address.
    pub address: Ipv4Addr,
    /// Length of that address's prefix, for the netmask that the job sees.
    pub prefix_length: u8,
    /// The job's IPv6 cluster address, in a cluster that has such.
    #[serde(default)]
    pub address6: Option<Ipv6Addr>,
    /// Length of that address's prefix; 0 without one.
    #[serde(default)]
    pub prefix_length6: u8,
    /// This node.
    pub node: NodeAddress,
    /// Epoch under which this node owns the job; for a job to be received, the epoch at which the source owns it.
    pub epoch: u64,
    /// Whether the job is to be received from another node ([`super::ShimRequest::Receive`]) instead of being started.
    pub receive: bool,
    /// Devices on which the address is announced.
    pub uplinks: Vec<String>,
    /// The daemon's control socket, for [`super::DaemonRequest::Transfer`] and [`super::DaemonRequest::JobExited`].
    pub control: std::path::PathBuf,
}

impl JobFile {
    /// All the job's addresses.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.networks().into_iter().map(|(address, _)| address).collect()
    }

    /// All the job's addresses, with the lengths of their prefixes.
    pub fn networks(&self) -> Vec<(IpAddr, u8)> {
        let v4 = (IpAddr::V4(self.address), self.prefix_length);
        let v6 = self.address6.map(|address| (IpAddr::V6(address), self.prefix_length6));
        std::iter::once(v4).chain(v6).collect()
    }
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// By returning from main or calling exit, with this status.
    Code(u8),
    /// Killed by this signal.
    Signal(i32),
    /// Its shim died (killed, or the machine went down); whatever ran is gone.
    Lost,
}

impl Exit {
    /// What a shell would show: the status, or 128 plus the signal number; 255 for a lost job.
    pub fn shell_status(self) -> u8 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => u8::try_from(signal).map_or(255, |signal| signal.saturating_add(128)),
            Exit::Lost => 255,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exited ({code})"),
            Exit::Signal(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(name) => write!(f, "killed ({name})"),
                Err(_) => write!(f, "killed (signal {signal})"),
            },
            Exit::Lost => f.write_str("lost"),
        }
    }
}

/// `exit.json`: written by the shim (to a temporary file, then renamed) before it says anywhere that the job ended, so
/// that the status survives whatever happens to the daemon meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitFile {
    /// How the job ended.
    pub exit: Exit,
    /// When, in milliseconds since the Unix epoch.
    pub finished_ms: u64,
}

/// Which of the job's outputs some bytes came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// A part of the job's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Where it was written.
    pub stream: Stream,
    /// Bytes of both streams together that the job had written before these, since it was started, wherever it ran.
    pub offset: u64,
    /// The bytes.
    #[serde(with = "base64_bytes")]
    pub bytes: Vec<u8>,
}

/// What comes back while attached to a job, or while reading its log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachEvent {
    /// The job wrote.
    Output(Output),
    /// Of the standard input sent on any connection since the job started, this many bytes are in the shim's keeping: they
    /// reach the job whether it moves or not. What was not accepted before [`AttachEvent::Moved`] is to be sent again.
    Accepted {
        /// Total, not an increment.
        bytes: u64,
    },
    /// All output up to now was sent (only when not following). Ends the stream.
    CaughtUp,
    /// The job ended; all its output was sent. Ends the stream.
    Exited(Exit),
    /// The job runs on that node now; go on there from the offset reached. Ends the stream.
    Moved {
        /// The new owner.
        node: String,
    },
    /// The stream broke for a reason that is not the job's. Ends the stream.
    Failed(ApiError),
}

/// What is sent while attached with `input`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachInput {
    /// Standard input. `offset` is the number of bytes sent before these; what the shim has accepted already is skipped.
    Stdin {
        /// Position in the job's standard input.
        offset: u64,
        /// The bytes.
        #[serde(with = "base64_bytes")]
        bytes: Vec<u8>,
    },
    /// End of standard input.
    StdinEof,
    /// A signal for the job's first process.
    Signal {
        /// Signal number.
        signal: i32,
    },
}

/// What comes back while a job's packets are recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptureEvent {
    /// Whole blocks of a pcapng file; each node's begin with a section of their own.
    Packets {
        /// The blocks.
        #[serde(with = "base64_bytes")]
        blocks: Vec<u8>,
    },
    /// The job runs on that node now; go on there under the same number. Ends the stream.
    Moved {
        /// The new owner.
        node: String,
    },
    /// The job ended. Ends the stream.
    Ended,
    /// The stream broke for a reason that is not the job's. Ends the stream.
    Failed(ApiError),
}

/// Where a job's addresses and sockets are after a move.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum SocketPlace {
    /// Where the job runs.
    #[default]
    Along,
    /// Where they are now: the job's home, through which every byte passes from then on.
    Home,
}

/// Where the sockets of a job are that runs on another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomeView {
    /// The node.
    pub node: String,
    /// Bytes sent there, for the job's peers.
    pub sent_bytes: u64,
    /// Bytes that came from there.
    pub received_bytes: u64,
    /// Why it can't be reached any more; the job's connections are lost then.
    pub lost: Option<String>,
}

/// One timed part of a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovePhase {
    /// Its name: `offer`, `precopy`, `freeze`, `residual`, `commit`, `thaw`...
    pub name: String,
    /// Its length in microseconds.
    pub duration_us: u64,
    /// Bytes sent in it.
    pub bytes: u64,
}

/// What a completed move did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveSummary {
    /// Source node.
    pub from: String,
    /// Target node.
    pub to: String,
    /// The job's epoch now.
    pub epoch: u64,
    /// From the last instruction on the source to the first on the target, microseconds.
    pub downtime_us: u64,
    /// From the request to the end, microseconds.
    pub total_us: u64,
    /// Bytes sent while the job ran.
    pub precopy_bytes: u64,
    /// Bytes sent while it stood.
    pub freeze_bytes: u64,
    /// The parts in order.
    pub phases: Vec<MovePhase>,
}

/// How a move ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveOutcome {
    /// The job runs on the target.
    Moved(MoveSummary),
    /// Refused before anything was frozen; the job was not disturbed.
    Refused {
        /// One sentence each.
        reasons: Vec<String>,
    },
    /// Given up; the job runs on at the source.
    Aborted {
        /// The phase in which it happened.
        phase: String,
        /// Why.
        reason: String,
    },
}

/// What comes back during a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveEvent {
    /// It goes on.
    Progress {
        /// Phase now.
        phase: String,
        /// Pre-copy round, from 1.
        round: Option<u32>,
        /// Bytes sent so far.
        bytes: u64,
        /// Bytes expected in all, when known.
        total_bytes: Option<u64>,
    },
    /// It ended. Ends the stream.
    Done(MoveOutcome),
    /// It could not be carried out or its outcome could not be learned. Ends the stream.
    Failed(ApiError),
}

/// Kind of a failure, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// No such job or node.
    NotFound,
    /// More than one job matches.
    Ambiguous,
    /// The name is taken, or the job is not in a state for this.
    Conflict,
    /// Another node, the directory or the shim does not answer.
    Unavailable,
    /// What was asked makes no sense.
    Invalid,
    /// The program to run does not exist.
    NoSuchProgram,
    /// The program to run can't be executed.
    NotExecutable,
    /// Anything else.
    Internal,
}

/// A failure that is told to the user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Kind.
    pub kind: ErrorKind,
    /// What happened, to which job; one sentence without a full stop.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl ApiError {
    /// An error without a hint.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    /// An internal error from anything that can be shown.
    pub fn internal(error: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Internal, error.to_string())
    }

    /// Adds what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Milliseconds since the Unix epoch, now.
pub fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
