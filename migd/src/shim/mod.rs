//! The shim: one process per job, the job's parent, tracer, system-call supervisor and TCP/IP stack.
//!
//! # Threads
//!
//! | thread | what it does |
//! | --- | --- |
//! | main | owns the [`job::Job`] (or, when the process is elsewhere, the [`home::Home`]): launch, exit, moves. Every ptrace call and the job's parent-death signal belong to it |
//! | control | a tokio runtime that serves `shim.sock` ([`control`]) and asks the main thread for what only it can do |
//! | stdio | moves the job's standard input and output ([`stdio`]) |
//! | net | the packet pump and bridge (`crate::net`) |
//!
//! # Invariants
//!
//! * Everything of the job hangs on this process: its init dies with the main thread, its TUN device with the
//!   descriptor. A shim that is killed leaves nothing that runs or answers.
//! * `exit.json` exists before anybody is told that the job ended.
//! * The daemon may come and go: nothing here waits for it but a move's commit.

pub mod links;
pub mod output;

mod commands;
mod control;
mod daemon;
mod home;
mod job;
mod stdio;
mod transfer;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use anyhow::Context;
use checkpoint::Obstacle;
use tokio::sync::watch;

use crate::api::{ApiError, ErrorKind, HomeView, JobFile, JobPaths, ShimEvent, ShimState};
use crate::net::LineBoard;

use commands::Commands;
use job::{Left, Remains};
use stdio::Stdio;

/// Arguments of `migd shim`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The job's directory.
    #[arg(long)]
    pub dir: PathBuf,
}

/// What the main thread and the control thread both see.
#[derive(Debug)]
struct Shared {
    file: JobFile,
    paths: JobPaths,
    /// What the watchers are told, last; nothing before the launch is decided.
    event: watch::Sender<Option<ShimEvent>>,
    /// There once the job has its streams.
    stdio: watch::Sender<Option<Arc<Stdio>>>,
    status: Mutex<Status>,
    /// The node with the job's sockets and the line to it, when they are not here.
    home: Mutex<Option<(String, LineBoard)>>,
}

#[derive(Debug, Clone)]
struct Status {
    state: ShimState,
    epoch: u64,
    /// The job's first process; none when that has ended, or the job does not run here.
    root: Option<sys::Pid>,
}

impl Shared {
    fn new(file: JobFile, paths: JobPaths) -> Shared {
        let state = if file.receive { ShimState::Receiving } else { ShimState::Starting };
        let first = file.receive.then_some(ShimEvent::Receiving);
        let status = Status { state, epoch: file.epoch, root: None };
        let (event, _) = watch::channel(first);
        let (stdio, _) = watch::channel(None);
        Shared { file, paths, event, stdio, status: Mutex::new(status), home: Mutex::default() }
    }

    fn status(&self) -> Status {
        self.status.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    fn set_status(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    /// Where the job's sockets are, when they are not here.
    fn home(&self) -> Option<HomeView> {
        let home = self.home.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        home.as_ref().map(|(node, line)| line.view(node))
    }

    fn set_home(&self, home: Option<(String, LineBoard)>) {
        *self.home.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = home;
    }

    fn tell(&self, event: ShimEvent) {
        self.event.send_replace(Some(event));
    }

    /// The job runs here under this epoch.
    fn tell_running(&self, epoch: u64, root: Option<sys::Pid>) {
        self.set_status(|status| *status = Status { state: ShimState::Running, epoch, root });
        self.tell(ShimEvent::Running { epoch });
    }
}

/// Whether this event is the last.
fn is_final(event: &ShimEvent) -> bool {
    matches!(event, ShimEvent::Failed(_) | ShimEvent::Exited(_) | ShimEvent::Moved { .. })
}

/// Whether the job does not run here any more after this.
fn has_left(event: &ShimEvent) -> bool {
    is_final(event) || matches!(event, ShimEvent::Home { .. })
}

/// Runs a job's shim until the job has ended or moved away.
///
/// # Errors
/// Whatever kept it from starting.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    // Standard error is the job's shim.log. A subscriber set by whoever runs us in a test is as good.
    let _ = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).try_init();
    let paths = JobPaths::new(args.dir);
    let listener = crate::api::shim_listener()
        .context("migd shim is started by the daemon, with the job's control socket as its standard input")?;
    let spec = paths.spec();
    let text = std::fs::read(&spec).with_context(|| format!("can't read {}", spec.display()))?;
    let file: JobFile = serde_json::from_slice(&text).with_context(|| format!("{} is not usable", spec.display()))?;
    tracing::info!(job = file.spec.id, name = file.spec.name, receive = file.receive, "shim starts");

    let shared = Arc::new(Shared::new(file, paths));
    let (commands, queue) = commands::channel()?;
    let control = control::start(listener, Arc::clone(&shared), commands)?;
    let remains = live(&shared, queue).unwrap_or_else(|error| {
        tracing::error!(error = format!("{error:#}"), "the job is not here");
        shared.tell(ShimEvent::Failed(api_error(&error)));
        None
    });
    // Those who listen hear the end before the process goes.
    control.finish();
    // Last: a job that comes back doesn't wait for it.
    if let Some(remains) = remains {
        remains.take_down();
    }
    Ok(ExitCode::SUCCESS)
}

/// From nothing to the job's end or departure. What is left then is to be taken down.
fn live(shared: &Arc<Shared>, mut queue: Commands) -> anyhow::Result<Option<Box<Remains>>> {
    let job = if shared.file.receive {
        match transfer::receive(shared, &mut queue)? {
            Some(job) => job,
            None => return Ok(None),
        }
    } else {
        job::launch(shared)?
    };
    let mut job = job;
    loop {
        job = match job.serve(&mut queue)? {
            Left::Gone(remains) => return Ok(remains),
            Left::Home(home) => match home.serve(&mut queue)? {
                Some(job) => job,
                None => return Ok(None),
            },
        };
    }
}

/// What the user is told of a failure.
fn api_error(error: &anyhow::Error) -> ApiError {
    if let Some(error) = error.downcast_ref::<ApiError>() {
        return error.clone();
    }
    let kind = match error.downcast_ref::<checkpoint::Error>() {
        Some(checkpoint::Error::Program { obstacle, .. }) => match obstacle {
            Obstacle::Missing => ErrorKind::NoSuchProgram,
            Obstacle::WorkingDirectory { .. } => ErrorKind::Invalid,
            Obstacle::Directory | Obstacle::Interpreter | Obstacle::Denied | Obstacle::Other(_) => {
                ErrorKind::NotExecutable
            }
        },
        _ => ErrorKind::Internal,
    };
    ApiError::new(kind, format!("{error:#}"))
}
