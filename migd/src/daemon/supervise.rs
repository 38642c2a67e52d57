//! Following each job of this node from its start to its end.
//!
//! A task per job holds a watch connection to its shim. When that ends, what the shim last said, `exit.json` and the
//! directory together tell what became of the job. The directory's record is released only by the node that the record names
//! as the owner, and only when the job is known to be gone.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use cluster_addr::JobRecord;

use super::jobs::{LocalJob, Phase, lost_now, read_exit, write_json};
use super::machine::ShimEnd;
use super::node::Node;
use crate::api::{ApiError, Connection, ErrorKind, ExitFile, JobFile, JobPaths, Reply, ShimEvent, ShimRequest};

/// Pause before asking a shim or the directory again.
const RETRY: Duration = Duration::from_millis(100);
/// How long a shim may take to say what it was started with.
const ANSWER: Duration = Duration::from_secs(5);
/// Longest such pause.
const RETRY_MAX: Duration = Duration::from_secs(3);
/// How many ended jobs a node remembers; the oldest are forgotten first.
const ENDED_MAX: usize = 200;

/// Supervises a job whose shim was just started (`shim`), or one that was found.
pub fn spawn(node: Arc<Node>, job: Arc<LocalJob>, shim: Option<ShimEnd>) {
    tokio::spawn(async move {
        let fresh = shim.is_some();
        let last = watch(&node, &job).await;
        let moved = matches!(last, Some(ShimEvent::Moved { .. }));
        if moved {
            // It undid what led here and is done with the job's files. What is left of it ends with its process, which takes
            // the kernel its time; the job may be back before that, with another shim.
            forget(&node, &job);
        }
        if let Some(shim) = shim {
            shim.await;
        }
        if !moved {
            conclude(&node, &job, last, fresh).await;
        }
    });
}

/// Takes up the jobs that a former daemon left in the state directory.
///
/// # Errors
/// When the directory of the jobs can't be read.
pub async fn adopt(node: &Arc<Node>) -> io::Result<()> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(node.paths.jobs())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let paths = node.paths.job(&name);
        let file = std::fs::read(paths.spec()).and_then(|text| Ok(serde_json::from_slice(&text)?));
        let file: JobFile = match file {
            Ok(file) => file,
            Err(error) => match recover(&paths, &name).await {
                Recovered::File(file) => {
                    tracing::warn!(path = %paths.spec().display(), %error, "unusable, and written anew as the job's shim has it");
                    *file
                }
                Recovered::Nobody => {
                    tracing::warn!(path = %paths.root().display(), %error, "not the directory of a job, left alone");
                    continue;
                }
                Recovered::Silent => {
                    tracing::error!(
                        path = %paths.spec().display(), %error,
                        "unusable, and the job's shim, which is there, doesn't say what is in it: the job can't be seen or moved; restart \
                         the daemon when the shim answers, or end the shim"
                    );
                    node.jobs.note_stray(&name);
                    continue;
                }
            },
        };
        let job = LocalJob::new(file, paths);
        node.jobs.insert(&job);
        found.push(job);
    }
    // Only now, when all are registered: the end of one job looks at the others (see `clean_up`).
    for job in found {
        tracing::info!(job = job.label(), "found");
        spawn(Arc::clone(node), job, None);
    }
    Ok(())
}

/// What is found where a job's file should be.
enum Recovered {
    File(Box<JobFile>),
    /// No shim.
    Nobody,
    /// A shim that gives no answer.
    Silent,
}

/// Gets a job's file back from its shim. A job that runs must not be taken for one that is gone: its address would be given to another.
async fn recover(paths: &JobPaths, id: &str) -> Recovered {
    if !super::attach::is_id(id) {
        return Recovered::Nobody;
    }
    let mut connection = match Connection::connect(&paths.socket()).await {
        Ok(connection) => connection,
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
            return Recovered::Nobody;
        }
        Err(_) => return Recovered::Silent,
    };
    let exchange = async {
        connection.send(&ShimRequest::File).await?;
        connection.receive::<Reply<JobFile>>().await
    };
    match tokio::time::timeout(ANSWER, exchange).await {
        Ok(Ok(Some(Reply::Ok(file)))) if file.spec.id == id => {
            if let Err(error) = write_json(&paths.spec(), &file) {
                tracing::error!(path = %paths.spec().display(), %error, "can't be written");
            }
            Recovered::File(Box::new(file))
        }
        _ => Recovered::Silent,
    }
}

/// Follows the shim's events until it serves nobody any more; returns its final word.
async fn watch(node: &Arc<Node>, job: &Arc<LocalJob>) -> Option<ShimEvent> {
    let mut last = None;
    loop {
        let mut connection = match Connection::connect(&job.paths.socket()).await {
            Ok(connection) => connection,
            // The socket is bound before the shim starts, so this means that nobody holds it any more.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
                return last;
            }
            Err(error) => {
                tracing::warn!(job = job.label(), %error, "can't connect to the shim");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        if connection.send(&ShimRequest::Watch).await.is_ok() {
            while let Ok(Some(event)) = connection.receive::<ShimEvent>().await {
                note(node, job, &event);
                last = Some(event).filter(is_final).or(last);
            }
        }
        if last.is_some() {
            return last;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Whether a shim says nothing more after this.
pub fn is_final(event: &ShimEvent) -> bool {
    matches!(event, ShimEvent::Failed(_) | ShimEvent::Exited(_) | ShimEvent::Moved { .. })
}

fn note(node: &Arc<Node>, job: &Arc<LocalJob>, event: &ShimEvent) {
    tracing::debug!(job = job.label(), ?event, "from the shim");
    match event {
        ShimEvent::Receiving => job.set(Phase::Receiving, None),
        ShimEvent::Running { epoch } => job.set(Phase::Running, Some(*epoch)),
        ShimEvent::Moving { to } => job.set(Phase::Moving { to: to.clone() }, None),
        ShimEvent::Home { to, epoch } => job.set(Phase::Home { to: to.clone() }, Some(*epoch)),
        ShimEvent::Moved { to, epoch } => {
            tracing::info!(job = job.label(), to, epoch, "moved away");
            job.set(Phase::MovedAway { to: to.clone() }, Some(*epoch));
        }
        ShimEvent::Exited(exit) => {
            let ended = read_exit(&job.paths);
            let ended = ended.unwrap_or(ExitFile { exit: *exit, finished_ms: crate::api::unix_ms() });
            end(node, job, ended);
        }
        // Noted when everything of it is gone.
        ShimEvent::Failed(_) => {}
    }
}

/// The shim is gone: finds out what that means for the job.
async fn conclude(node: &Arc<Node>, job: &Arc<LocalJob>, last: Option<ShimEvent>, fresh: bool) {
    clean_up(node, job);
    let ended = read_exit(&job.paths);
    match (ended, last) {
        (Some(ended), _) => conclude_ended(node, job, ended).await,
        (None, Some(ShimEvent::Failed(error))) => fail(node, job, error).await,
        (None, Some(ShimEvent::Exited(exit))) => {
            let ended = ExitFile { exit, finished_ms: crate::api::unix_ms() };
            keep_exit(job, &ended);
            conclude_ended(node, job, ended).await;
        }
        (None, _) if fresh && job.standing().phase == Phase::Starting => {
            let error = format!("the shim of job {} died while it started the job{}", job.label(), last_words(job));
            fail(node, job, ApiError::new(ErrorKind::Internal, error)).await;
        }
        (None, _) => conclude_death(node, job).await,
    }
}

/// Removes what the shim may have left in the kernel, unless the address is another job's by now.
fn clean_up(node: &Arc<Node>, job: &LocalJob) {
    let taken = |other: &Arc<LocalJob>| {
        let over = matches!(other.standing().phase, Phase::Ended(_) | Phase::Failed(_) | Phase::MovedAway { .. });
        other.file.address == job.file.address && other.id() != job.id() && !over && read_exit(&other.paths).is_none()
    };
    if node.jobs.all().iter().any(taken) {
        return;
    }
    if let Err(error) = node.machine.clean_up(&job.file.addresses(), &node.uplinks) {
        tracing::warn!(job = job.label(), %error, "can't clean up after the shim");
    }
}

/// The shim died without a word. If the job is this node's, it is lost; otherwise it lives elsewhere.
async fn conclude_death(node: &Arc<Node>, job: &Arc<LocalJob>) {
    let before = job.standing().phase;
    job.set(Phase::Unclear, None);
    let record = ask_owner(node, job.id()).await;
    match record {
        Some(record) if record.owner.node != node.name => {
            tracing::info!(job = job.label(), owner = record.owner.node, "the shim ended; the job is another node's");
            job.set(Phase::MovedAway { to: record.owner.node }, Some(record.owner.epoch));
            forget(node, job);
        }
        None if before == Phase::Receiving => {
            // It ended at its source before it could come.
            let message = format!("job {} ended before it arrived", job.label());
            job.set(Phase::Failed(ApiError::new(ErrorKind::NotFound, message)), None);
            forget(node, job);
        }
        _ => {
            tracing::error!(job = job.label(), "the shim died and the job with it{}", last_words(job));
            let ended = lost_now();
            keep_exit(job, &ended);
            conclude_ended(node, job, ended).await;
        }
    }
}

async fn conclude_ended(node: &Arc<Node>, job: &Arc<LocalJob>, ended: ExitFile) {
    end(node, job, ended);
    release_if_owned(node, job.id()).await;
    prune(node);
}

fn end(node: &Arc<Node>, job: &Arc<LocalJob>, ended: ExitFile) {
    if matches!(job.standing().phase, Phase::Ended(_)) {
        return;
    }
    tracing::info!(job = job.label(), exit = %ended.exit, "ended");
    job.set(Phase::Ended(ended), None);
    // The name is to be free as soon as anybody can know that the job ended; the shim may stay a while for those attached.
    let (node, job) = (Arc::clone(node), Arc::clone(job));
    tokio::spawn(async move {
        release_if_owned(&node, job.id()).await;
        job.set_given_back();
    });
}

async fn fail(node: &Arc<Node>, job: &Arc<LocalJob>, error: ApiError) {
    if job.file.receive {
        // It stayed where it was, and the source tells whoever asked for the move.
        tracing::info!(job = job.label(), %error, "did not arrive");
    } else {
        tracing::warn!(job = job.label(), %error, "could not be started");
        release_if_owned(node, job.id()).await;
    }
    // In this order: see `forget`.
    remove_directory(job);
    node.jobs.remove(job.id());
    job.set(Phase::Failed(error), None);
}

/// Nothing of the job is left on this node.
fn forget(node: &Arc<Node>, job: &LocalJob) {
    // In this order: once it isn't registered the job may come back, into a directory of the same name.
    remove_directory(job);
    node.jobs.remove(job.id());
}

/// Removes what the job has on disk.
pub fn remove_directory(job: &LocalJob) {
    match std::fs::remove_dir_all(job.paths.root()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(job = job.label(), %error, "can't remove the job's directory");
        }
        _ => {}
    }
}

fn keep_exit(job: &LocalJob, ended: &ExitFile) {
    if let Err(error) = write_json(&job.paths.exit(), ended) {
        tracing::warn!(job = job.label(), %error, "can't keep the exit status");
    }
}

/// The last lines of the shim's log, to be put at the end of a message.
fn last_words(job: &LocalJob) -> String {
    let text = std::fs::read_to_string(job.paths.shim_log()).unwrap_or_default();
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    match &lines[lines.len().saturating_sub(3)..] {
        [] => "; it left no message".into(),
        last => format!(": {}", last.join(" / ")),
    }
}

/// The job's record; asks until the directory answers.
async fn ask_owner(node: &Arc<Node>, id: &str) -> Option<JobRecord> {
    let id = id.parse().ok()?;
    let mut pause = RETRY;
    loop {
        if let Ok(cluster) = node.cluster() {
            match cluster.job(&id).await {
                Ok(record) => return record,
                Err(error) => drop(node.explain(error)),
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

/// Gives the address and the name of an ended job back if the directory says that this node owns it.
async fn release_if_owned(node: &Arc<Node>, id: &str) {
    match ask_owner(node, id).await {
        Some(record) if record.owner.node == node.name => release(node, &record).await,
        Some(record) => tracing::warn!(job = id, owner = record.owner.node, "ended here but belongs to another node"),
        None => {}
    }
}

/// Gives the address and the name of a job back; tries until the directory answers.
pub async fn release(node: &Arc<Node>, record: &JobRecord) {
    let mut pause = RETRY;
    loop {
        if let Ok(cluster) = node.cluster() {
            match cluster.release(record).await {
                Ok(done) => {
                    tracing::debug!(job = %record.id, done, "released");
                    node.learn_job(record.id.as_str(), None);
                    return;
                }
                Err(error) => drop(node.explain(error)),
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

fn prune(node: &Arc<Node>) {
    let ended = |job: &Arc<LocalJob>| match job.standing().phase {
        Phase::Ended(ended) => Some((ended.finished_ms, Arc::clone(job))),
        _ => None,
    };
    let mut jobs: Vec<_> = node.jobs.all().iter().filter_map(ended).collect();
    jobs.sort_by_key(|(finished_ms, _)| *finished_ms);
    for (_, job) in jobs.iter().take(jobs.len().saturating_sub(ENDED_MAX)) {
        forget(node, job);
    }
}
