//! The jobs of this node: one [`LocalJob`] for each directory under `STATE/jobs`, supervised from its creation until it
//! is forgotten.
//!
//! What a job is doing is told by its shim over a watch connection; how it ended is read from `exit.json`. The daemon
//! itself holds nothing that can't be found again after a restart.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::api::{
    ApiError, ErrorKind, Exit, ExitFile, JobFile, JobPaths, JobState, JobView, Reply, ShimRequest, ShimStatus,
};

/// How long a shim may take to answer a question.
const SHIM_TIMEOUT: Duration = Duration::from_secs(5);

/// What a job of this node is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Its shim was started and has not said anything yet.
    Starting,
    /// It is on its way here.
    Receiving,
    /// It runs.
    Running,
    /// It is on its way to another node.
    Moving {
        /// Which.
        to: String,
    },
    /// It runs on another node; its sockets are here.
    Home {
        /// The owner.
        to: String,
    },
    /// Its shim died; how it stands with the job is being found out.
    Unclear,
    /// It ended. Its log is kept until it is removed.
    Ended(ExitFile),
    /// It could not be started or received. Final; its directory is gone.
    Failed(ApiError),
    /// It belongs to another node. Final; its directory is gone.
    MovedAway {
        /// The new owner.
        to: String,
    },
}

/// Phase and epoch, which change together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// What it is doing.
    pub phase: Phase,
    /// The epoch under which this node owns or owned it.
    pub epoch: u64,
}

/// A job of this node.
#[derive(Debug)]
pub struct LocalJob {
    /// What its shim was started with.
    pub file: JobFile,
    /// Its directory.
    pub paths: JobPaths,
    standing: watch::Sender<Standing>,
    /// Its name and addresses are free again.
    given_back: watch::Sender<bool>,
    /// Where somebody wants it, from the request to its end: the shim can be asked for one move at a time.
    wanted_at: Mutex<Option<String>>,
}

/// A move that nobody else can ask for meanwhile.
#[derive(Debug)]
pub struct Departure(Arc<LocalJob>);

impl Drop for Departure {
    fn drop(&mut self) {
        *self.0.wanted_at() = None;
    }
}

impl LocalJob {
    /// A job whose shim is being started, or was found.
    pub fn new(file: JobFile, paths: JobPaths) -> Arc<Self> {
        let standing = Standing { phase: Phase::Starting, epoch: file.epoch };
        let (standing, given_back) = (watch::Sender::new(standing), watch::Sender::new(false));
        Arc::new(Self { file, paths, standing, given_back, wanted_at: Mutex::default() })
    }

    fn wanted_at(&self) -> MutexGuard<'_, Option<String>> {
        self.wanted_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to move it to that node.
    ///
    /// # Errors
    /// The node where it is to go already.
    pub fn depart(self: &Arc<Self>, to: &str) -> Result<Departure, String> {
        let mut wanted_at = self.wanted_at();
        match &*wanted_at {
            Some(node) => Err(node.clone()),
            None => {
                *wanted_at = Some(to.to_owned());
                Ok(Departure(Arc::clone(self)))
            }
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.file.spec.id
    }

    /// How to name it in messages.
    pub fn label(&self) -> String {
        format!("{} ({})", self.file.spec.name, &self.id()[..self.id().len().min(12)])
    }

    /// How it stands now.
    pub fn standing(&self) -> Standing {
        self.standing.borrow().clone()
    }

    /// Notes a change.
    pub fn set(&self, phase: Phase, epoch: Option<u64>) {
        self.standing.send_modify(|standing| {
            standing.phase = phase;
            standing.epoch = epoch.unwrap_or(standing.epoch);
        });
    }

    /// Notes that its name and addresses are free again.
    pub fn set_given_back(&self) {
        self.given_back.send_replace(true);
    }

    /// Waits until its name and addresses are free again, no longer than `limit`.
    pub async fn wait_given_back(&self, limit: Duration) {
        let mut receiver = self.given_back.subscribe();
        // A directory that doesn't answer keeps nobody waiting for the end of a job.
        let _ = tokio::time::timeout(limit, receiver.wait_for(|given| *given)).await;
    }

    /// Waits until the phase satisfies a condition; `None` when that takes longer than `limit`.
    pub async fn wait(&self, limit: Duration, mut until: impl FnMut(&Phase) -> bool) -> Option<Standing> {
        let mut receiver = self.standing.subscribe();
        let found = tokio::time::timeout(limit, receiver.wait_for(|standing| until(&standing.phase))).await;
        // The sender lives as long as `self`, so waiting can't fail in another way.
        found.ok()?.ok().map(|standing| standing.clone())
    }

    /// Asks the job's shim something with one answer.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when the shim does not answer, or what it answers.
    pub async fn ask<R: serde::de::DeserializeOwned>(&self, request: &ShimRequest) -> Result<R, ApiError> {
        let unavailable = |reason: String| {
            ApiError::new(ErrorKind::Unavailable, format!("the shim of job {} does not answer: {reason}", self.label()))
                .hint(format!("see {}", self.paths.shim_log().display()))
        };
        let exchange = async {
            let mut connection = crate::api::Connection::connect(&self.paths.socket()).await?;
            connection.send(request).await?;
            let reply = connection.receive::<Reply<R>>().await?;
            reply.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))
        };
        match tokio::time::timeout(SHIM_TIMEOUT, exchange).await {
            Ok(Ok(reply)) => reply.into(),
            Ok(Err(error)) => Err(unavailable(error.to_string())),
            Err(_) => Err(unavailable(format!("nothing within {} s", SHIM_TIMEOUT.as_secs()))),
        }
    }

    /// As listings show it; `None` for what is not (or no more) a job of this node.
    pub async fn view(&self) -> Option<JobView> {
        let Standing { phase, epoch } = self.standing();
        let (state, moving_to, ended) = match phase {
            Phase::Starting => (JobState::Starting, None, None),
            Phase::Running => (JobState::Running, None, None),
            Phase::Moving { to } => (JobState::Moving, Some(to), None),
            Phase::Unclear => (JobState::Unreachable, None, None),
            Phase::Ended(ended) => (JobState::Exited, None, Some(ended)),
            Phase::Receiving | Phase::Home { .. } | Phase::Failed(_) | Phase::MovedAway { .. } => return None,
        };
        let status = match state {
            JobState::Running => self.ask::<ShimStatus>(&ShimRequest::Status).await.ok(),
            _ => None,
        };
        let (pid, home) = status.map_or((None, None), |status| (status.pid, status.home));
        let spec = &self.file.spec;
        Some(JobView {
            id: spec.id.clone(),
            name: spec.name.clone(),
            argv: spec.argv.clone(),
            created_ms: spec.created_ms,
            address: self.file.address,
            address6: self.file.address6,
            node: self.file.node.name.clone(),
            epoch,
            state,
            home,
            moving_to,
            exit: ended.as_ref().map(|ended| ended.exit),
            finished_ms: ended.map(|ended| ended.finished_ms),
            pid,
        })
    }
}

/// The jobs of this node by id.
#[derive(Debug, Default)]
pub struct Registry {
    jobs: Mutex<HashMap<String, Arc<LocalJob>>>,
    /// Ids of jobs that run here and of which nothing else is known.
    strays: Mutex<HashSet<String>>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<LocalJob>>> {
        // Every operation on the map is a single call, so it is whole whatever panicked.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The job with this full id.
    pub fn get(&self, id: &str) -> Option<Arc<LocalJob>> {
        self.lock().get(id).cloned()
    }

    fn strays(&self) -> MutexGuard<'_, HashSet<String>> {
        self.strays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a job is here of which nothing else is known.
    pub fn note_stray(&self, id: &str) {
        self.strays().insert(id.to_owned());
    }

    /// Whether something of the job with this full id is here.
    pub fn is_here(&self, id: &str) -> bool {
        self.lock().contains_key(id) || self.strays().contains(id)
    }

    /// Adds a job; `false` when one with its id is there.
    pub fn insert(&self, job: &Arc<LocalJob>) -> bool {
        match self.lock().entry(job.id().to_owned()) {
            std::collections::hash_map::Entry::Occupied(_) => false,
            std::collections::hash_map::Entry::Vacant(vacant) => {
                vacant.insert(Arc::clone(job));
                true
            }
        }
    }

    /// Forgets a job.
    pub fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    /// All of them, the oldest first.
    pub fn all(&self) -> Vec<Arc<LocalJob>> {
        let mut jobs: Vec<_> = self.lock().values().cloned().collect();
        jobs.sort_by_key(|job| (job.file.spec.created_ms, job.id().to_owned()));
        jobs
    }
}

/// Reads `exit.json`, if the job ended with one.
pub fn read_exit(paths: &JobPaths) -> Option<ExitFile> {
    let text = std::fs::read(paths.exit()).ok()?;
    match serde_json::from_slice(&text) {
        Ok(exit) => Some(exit),
        Err(error) => {
            tracing::warn!(path = %paths.exit().display(), %error, "unreadable exit status");
            Some(lost_now())
        }
    }
}

/// The end of a job whose shim died.
pub fn lost_now() -> ExitFile {
    ExitFile { exit: Exit::Lost, finished_ms: crate::api::unix_ms() }
}

/// Writes JSON so that readers see all of it or nothing.
///
/// # Errors
/// As the file system's.
pub fn write_json<T: serde::Serialize>(path: &Path, value: &T) -> std::io::Result<()> {
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, serde_json::to_vec_pretty(value)?)?;
    std::fs::rename(temporary, path)
}
