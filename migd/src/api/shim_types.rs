//! Daemon to shim.
//!
//! The daemon makes the listening socket `shim.sock` and gives it to the shim as its standard input
//! ([`shim_listener`]): the socket exists before the shim runs, so nobody has to wait for it to appear, and a request
//! made meanwhile waits in its queue. The shim's standard output is `/dev/null`, its standard error `shim.log`; its working directory
//! is `/`; it is the leader of a session of its own.

use serde::{Deserialize, Serialize};

use super::types::{ApiError, Exit, HomeView, NodeAddress, SocketPlace};

/// What the daemon asks a shim. The first frame on each connection to `shim.sock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShimRequest {
    /// Answered by `Reply<ShimStatus>`.
    Status,
    /// Answered by `Reply<JobFile>`: what the shim was started with, for a daemon that can't read it in the job's directory any more.
    File,
    /// Answered by `Reply<serde_json::Value>`: processes, sockets, memory and stay reasons, as shown by `migd inspect`.
    Inspect,
    /// Answered by `Reply<Vec<SocketDescription>>`.
    Sockets,
    /// Records packets. Answered by `Reply<()>`, then a stream of [`super::CaptureEvent`].
    Capture {
        /// Names the recording: asked again after a move, it goes on where it was.
        number: u64,
        /// Bytes kept of each packet.
        snap_length: u32,
    },
    /// Answered by `Reply<()>`. The signal goes to the job's first process.
    Kill {
        /// Signal number.
        signal: i32,
    },
    /// Answered by `Reply<()>`, then a stream of [`super::AttachEvent`]; with `input` the other side sends
    /// [`super::AttachInput`] frames.
    Attach {
        /// Where in the output to begin; see [`super::Output::offset`]. Beyond the end means from the end.
        from_offset: u64,
        /// Whether to go on after what there is now ([`super::AttachEvent::CaughtUp`] otherwise).
        follow: bool,
        /// Whether input frames will be sent.
        input: bool,
    },
    /// Answered by a stream of [`ShimEvent`] without end: the daemon keeps one such connection to each shim. The first event comes when
    /// the launch is decided (`Running` or `Failed`), or at once if it is; for a job to be received it is `Receiving`, and `Running`
    /// after the commit. When the connection ends without a final event, the shim died.
    Watch,
    /// With one descriptor: the stream to the target's shim, right after the target's daemon accepted. Answered by a stream of
    /// [`super::MoveEvent`]. Closing the connection does not cancel the move.
    MoveOut {
        /// The target.
        target: NodeAddress,
        /// The epoch at which this node owns the job.
        epoch: u64,
        /// Where its sockets are to be.
        #[serde(default)]
        sockets: SocketPlace,
    },
    /// With one descriptor: a line from another node's shim, which may get the process of the job whose home this is or is about to
    /// be. Answered by `Reply<()>` when the line is waited for.
    Line {
        /// The other node.
        from: NodeAddress,
        /// The epoch at which the move starts.
        epoch: u64,
    },
    /// With one descriptor, or with two when the job's sockets are, or stay, on another node: the second is the line to there.
    /// The first is the stream to the source's shim. Answered by `Reply<()>`; how it ends is told to the watchers.
    Receive {
        /// The source.
        source: NodeAddress,
    },
    /// Ends the shim of a job that is still being received and not committed (the source went away before it began). `Reply<()>`;
    /// refused when the job runs here.
    Cancel,
}

/// A job as its shim sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimStatus {
    /// The job.
    pub id: String,
    /// What it does.
    pub state: ShimState,
    /// The epoch under which the shim believes to own the job.
    pub epoch: u64,
    /// The shim's own process id.
    pub shim_pid: u32,
    /// The job's first process, in the shim's namespace.
    pub pid: Option<i32>,
    /// Bytes of output so far.
    pub output_bytes: u64,
    /// Where its sockets are, when not here.
    #[serde(default)]
    pub home: Option<HomeView>,
}

/// What a shim is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShimState {
    /// The job is being launched.
    Starting,
    /// The job runs.
    Running,
    /// The job runs or is frozen and is on its way to this node.
    Moving {
        /// Target node.
        to: String,
    },
    /// The job is on its way here.
    Receiving,
    /// The job runs on another node; its sockets are here.
    Home {
        /// The other node.
        process: String,
    },
    /// The job ended.
    Exited(Exit),
}

/// What a shim tells those that watch it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShimEvent {
    /// Waits for the stream or is in the middle of a move to this node.
    Receiving,
    /// The job runs here under this epoch.
    Running {
        /// Epoch.
        epoch: u64,
    },
    /// The job runs on that node; its sockets stay here.
    Home {
        /// The owner.
        to: String,
        /// Its epoch.
        epoch: u64,
    },
    /// A move from here began.
    Moving {
        /// Target node.
        to: String,
    },
    /// The job could not be started or received. Final.
    Failed(ApiError),
    /// The job ended. Final.
    Exited(Exit),
    /// The job belongs to that node now and this shim has discarded it. Final.
    Moved {
        /// The new owner.
        to: String,
        /// Its epoch.
        epoch: u64,
    },
}

/// The listening socket that the daemon gave to this shim as its standard input.
///
/// # Errors
/// When standard input is not a socket: the shim was not started by a daemon.
pub fn shim_listener() -> std::io::Result<std::os::unix::net::UnixListener> {
    use std::os::fd::AsFd;
    let stdin = std::io::stdin().as_fd().try_clone_to_owned()?;
    let listener = std::os::unix::net::UnixListener::from(stdin);
    listener.local_addr()?;
    Ok(listener)
}
