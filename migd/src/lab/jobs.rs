//! Starting and moving jobs in a lab, from outside any async runtime.

use std::time::Instant;

use anyhow::{Context, bail};

use super::{Lab, ask};
use crate::api::{
    Client, DaemonRequest, JobList, JobView, MoveEvent, MoveOutcome, MoveSummary, RunRequest, SocketPlace,
};

/// A completed move, with the times at which its request was made and its end was known.
#[derive(Debug, Clone)]
pub struct Moved {
    /// What the shims measured.
    pub summary: MoveSummary,
    /// Just before the request.
    pub began: Instant,
    /// Just after the answer.
    pub ended: Instant,
}

/// An error that says what to install, unless the program is found.
///
/// # Errors
/// That one.
pub fn require(program: &str, package: &str) -> anyhow::Result<()> {
    let installed = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(program).is_file()));
    if !installed {
        bail!("{program} is not installed; install it (Debian: apt-get install {package}) and try again");
    }
    Ok(())
}

impl Lab {
    /// Starts a job on a node; returns when its program was executed.
    ///
    /// # Errors
    /// What the daemon said.
    pub fn run(&self, node: &str, name: &str, argv: &[&str]) -> anyhow::Result<JobView> {
        let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
        let request = RunRequest {
            name: Some(name.to_owned()),
            argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
            env: vec![("PATH".to_owned(), path), ("HOME".to_owned(), "/root".to_owned())],
            cwd: "/tmp".to_owned(),
            node: None,
            address: None,
        };
        ask(&self.control(node), &DaemonRequest::Run(request))
            .with_context(|| format!("can't run {} on node {node}", argv.first().unwrap_or(&"nothing")))
    }

    /// Moves a job, asking the daemon of `from`, and returns when it is done or was given up.
    ///
    /// # Errors
    /// When the daemon could not carry it out or its outcome is not known.
    pub fn try_move(&self, job: &str, from: &str, to: &str) -> anyhow::Result<MoveOutcome> {
        self.try_move_with(job, from, to, SocketPlace::Along)
    }

    /// As [`Lab::try_move`], with the job's sockets there or at home.
    ///
    /// # Errors
    /// As [`Lab::try_move`].
    pub fn try_move_with(&self, job: &str, from: &str, to: &str, sockets: SocketPlace) -> anyhow::Result<MoveOutcome> {
        let client = Client::new(self.control(from));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let request = DaemonRequest::Move { job: job.to_owned(), node: to.to_owned(), sockets };
            let (_, mut events) = client.open::<JobView>(&request).await?;
            loop {
                match events.receive::<MoveEvent>().await? {
                    Some(MoveEvent::Done(outcome)) => return Ok(outcome),
                    Some(MoveEvent::Failed(error)) => return Err(error.into()),
                    Some(MoveEvent::Progress { .. }) => {}
                    None => bail!("the daemon of node {from} ended the connection before the move of {job} was done"),
                }
            }
        })
    }

    /// Moves a job; one that was refused or given up is an error here.
    ///
    /// # Errors
    /// As [`Lab::try_move`], and when the job did not move.
    pub fn move_job(&self, job: &str, from: &str, to: &str) -> anyhow::Result<Moved> {
        self.move_job_with(job, from, to, SocketPlace::Along)
    }

    /// As [`Lab::move_job`], with the job's sockets there or at home.
    ///
    /// # Errors
    /// As [`Lab::move_job`].
    pub fn move_job_with(&self, job: &str, from: &str, to: &str, sockets: SocketPlace) -> anyhow::Result<Moved> {
        let began = Instant::now();
        let outcome = self.try_move_with(job, from, to, sockets);
        let ended = Instant::now();
        match outcome.with_context(|| format!("the move of {job} from {from} to {to} failed"))? {
            MoveOutcome::Moved(summary) => Ok(Moved { summary, began, ended }),
            MoveOutcome::Refused { reasons } => bail!("the move of {job} to {to} was refused: {}", reasons.join("; ")),
            MoveOutcome::Aborted { phase, reason } => {
                bail!("the move of {job} to {to} was given up in phase {phase}: {reason}")
            }
        }
    }

    /// Kills a job (SIGKILL), asking the daemon of `node`.
    ///
    /// # Errors
    /// What the daemon said.
    pub fn kill(&self, node: &str, job: &str) -> anyhow::Result<()> {
        let request = DaemonRequest::Kill { job: job.to_owned(), signal: nix::sys::signal::Signal::SIGKILL as i32 };
        ask(&self.control(node), &request).with_context(|| format!("can't kill {job}"))
    }

    /// The jobs that a node's daemon lists.
    ///
    /// # Errors
    /// What the daemon said.
    pub fn jobs(&self, node: &str) -> anyhow::Result<Vec<JobView>> {
        Ok(ask::<JobList>(&self.control(node), &DaemonRequest::Jobs { all: true })?.jobs)
    }
}
