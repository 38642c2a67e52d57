//! Finding jobs by name, id or prefix of an id, on any node.

use std::sync::Arc;
use std::time::Duration;

use cluster_addr::{JobRecord, NodeRecord};

use super::jobs::{LocalJob, Phase};
use super::node::Node;
use super::peer::protocol::PeerRequest;
use crate::api::{ApiError, ErrorKind, HomeView, JobList, JobState, JobView};

/// How long another node may take to list its jobs.
const LIST_TIMEOUT: Duration = Duration::from_secs(2);
/// Shorter prefixes of ids are not taken for ids.
const PREFIX_MIN: usize = 2;

/// A job that was found.
#[derive(Debug, Clone)]
pub struct Located {
    /// Full id.
    pub id: String,
    /// Name.
    pub name: String,
    /// The node where it is, or ended.
    pub node: String,
    /// Whether it ended.
    pub ended: bool,
}

impl Located {
    /// A job of this node.
    pub fn of_local(job: &LocalJob) -> Self {
        let file = &job.file;
        Self {
            id: file.spec.id.clone(),
            name: file.spec.name.clone(),
            node: file.node.name.clone(),
            ended: matches!(job.standing().phase, Phase::Ended(_)),
        }
    }

    /// How to name it in messages.
    pub fn label(&self) -> String {
        format!("{} ({})", self.name, &self.id[..self.id.len().min(12)])
    }
}

/// There is no such job.
pub fn not_found(selector: &str) -> ApiError {
    ApiError::new(ErrorKind::NotFound, format!("there is no job {selector:?}")).hint("`migd ps -a` lists the jobs")
}

/// The job that a user means: a running one before one that ended, a name before an id; of several that ended with the same
/// name, the last.
///
/// # Errors
/// [`ErrorKind::NotFound`], [`ErrorKind::Ambiguous`].
pub async fn find(node: &Arc<Node>, selector: &str) -> Result<Located, ApiError> {
    // Jobs of this node are found without the directory.
    let mut running: Vec<Located> = records(node).await.0.iter().map(from_record).collect();
    for job in node.jobs.all() {
        let known = running.iter().any(|found| found.id == job.id());
        let phase = job.standing().phase;
        if !known
            && !matches!(
                phase,
                Phase::Ended(_) | Phase::Receiving | Phase::Home { .. } | Phase::MovedAway { .. } | Phase::Failed(_)
            )
        {
            running.push(Located::of_local(&job));
        }
    }
    if let Some(found) = pick(&running, selector)? {
        return Ok(found);
    }
    let (mut views, warnings) = everywhere(node).await;
    views.retain(|view| view.state == JobState::Exited);
    views.sort_by_key(|view| std::cmp::Reverse(view.finished_ms));
    let ended: Vec<_> = views
        .iter()
        .map(|view| Located { id: view.id.clone(), name: view.name.clone(), node: view.node.clone(), ended: true })
        .collect();
    if let Some(found) = pick(&ended, selector)? {
        return Ok(found);
    }
    let mut error = not_found(selector);
    if !warnings.is_empty() {
        error = error.hint(format!("but not all could be asked: {}", warnings.join("; ")));
    }
    Err(error)
}

fn from_record(record: &JobRecord) -> Located {
    Located { id: record.id.to_string(), name: record.name.clone(), node: record.owner.node.clone(), ended: false }
}

fn pick(jobs: &[Located], selector: &str) -> Result<Option<Located>, ApiError> {
    if let Some(found) =
        jobs.iter().find(|job| job.name == selector).or_else(|| jobs.iter().find(|job| job.id == selector))
    {
        return Ok(Some(found.clone()));
    }
    if selector.len() < PREFIX_MIN {
        return Ok(None);
    }
    let matching: Vec<_> = jobs.iter().filter(|job| job.id.starts_with(selector)).collect();
    match matching[..] {
        [] => Ok(None),
        [found] => Ok(Some(found.clone())),
        _ => {
            let labels: Vec<_> = matching.iter().map(|job| job.label()).collect();
            let message = format!("{selector} could be any of {}", labels.join(", "));
            Err(ApiError::new(ErrorKind::Ambiguous, message).hint("give more digits, or the name"))
        }
    }
}

/// All job records, or the last known ones and why they may be old.
async fn records(node: &Arc<Node>) -> (Vec<JobRecord>, Option<String>) {
    let failure = match node.cluster() {
        Ok(cluster) => match cluster.jobs().await {
            Ok((records, _)) => {
                node.note_directory(None);
                return (records, None);
            }
            Err(error) => node.explain(error),
        },
        Err(error) => error,
    };
    let mut warning = format!("the list may be old: {failure}");
    if let Some(hint) = failure.hint {
        warning = format!("{warning} ({hint})");
    }
    (node.known_jobs(), Some(warning))
}

/// Where a job is now, by its full id; none when that can't be found out.
pub async fn current_node(node: &Arc<Node>, id: &str) -> Option<String> {
    let record = match node.cluster() {
        Ok(cluster) => cluster.job(&id.parse().ok()?).await,
        Err(_) => return None,
    };
    match record {
        Ok(Some(record)) => Some(record.owner.node),
        // It ended; its last node has its log.
        Ok(None) => everywhere(node).await.0.into_iter().find(|view| view.id == id).map(|view| view.node),
        Err(_) => None,
    }
}

/// The jobs that the nodes themselves know of, running or ended; and the nodes that did not answer.
pub async fn everywhere(node: &Arc<Node>) -> (Vec<JobView>, Vec<String>) {
    let mut asked = tokio::task::JoinSet::new();
    for NodeRecord { name, peer, .. } in node.members().into_iter().map(|member| member.record) {
        if name == node.name {
            continue;
        }
        let node = Arc::clone(node);
        asked.spawn(async move {
            let answer = node.peers.ask_within::<Vec<JobView>>(peer, &PeerRequest::LocalJobs, LIST_TIMEOUT).await;
            (name, answer)
        });
    }
    let mut views = local_views(node).await;
    let mut warnings = Vec::new();
    while let Some(joined) = asked.join_next().await {
        let Ok((name, answer)) = joined else { continue };
        match answer {
            Ok(more) => {
                node.note_heard(&name);
                views.extend(more);
            }
            Err(error) => warnings.push(format!("node {name} does not answer: {error}")),
        }
    }
    warnings.sort();
    (views, warnings)
}

/// The jobs of this node.
pub async fn local_views(node: &Arc<Node>) -> Vec<JobView> {
    let mut asked = tokio::task::JoinSet::new();
    for job in node.jobs.all() {
        asked.spawn(async move { job.view().await });
    }
    asked.join_all().await.into_iter().flatten().collect()
}

/// The listing of the cluster's jobs.
pub async fn list(node: &Arc<Node>, all: bool) -> JobList {
    let ((records, stale), (views, mut warnings)) = tokio::join!(records(node), everywhere(node));
    warnings.extend(stale);
    let mut jobs: Vec<JobView> = Vec::new();
    for record in &records {
        let id = record.id.as_str();
        let view = views.iter().find(|view| view.id == id && view.node == record.owner.node);
        jobs.push(view.cloned().unwrap_or_else(|| from_record_only(record)));
    }
    for view in views {
        if !jobs.iter().any(|job| job.id == view.id) {
            jobs.push(view);
        }
    }
    jobs.retain(|job| all || job.state != JobState::Exited);
    jobs.sort_by(|a, b| (a.created_ms, &a.id).cmp(&(b.created_ms, &b.id)));
    JobList { jobs, warnings }
}

/// A job whose node does not answer.
pub fn from_record_only(record: &JobRecord) -> JobView {
    JobView {
        id: record.id.to_string(),
        name: record.name.clone(),
        argv: record.command.clone(),
        created_ms: record.started_ms,
        address: record.address,
        address6: record.address6,
        node: record.owner.node.clone(),
        epoch: record.owner.epoch,
        state: JobState::Unreachable,
        home: record.home.clone().map(|node| HomeView { node, sent_bytes: 0, received_bytes: 0, lost: None }),
        moving_to: None,
        exit: None,
        finished_ms: None,
        pid: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: &str, name: &str) -> Located {
        Located { id: id.into(), name: name.into(), node: "A".into(), ended: false }
    }

    #[test]
    fn a_name_comes_before_an_id_and_an_id_before_a_prefix() {
        let jobs = [job("aa11", "web"), job("aa22", "aa11"), job("bb33", "cache")];
        assert_eq!(pick(&jobs, "aa11").unwrap().unwrap().id, "aa22", "the name wins");
        assert_eq!(pick(&jobs, "bb").unwrap().unwrap().name, "cache");
        assert_eq!(pick(&jobs, "aa22").unwrap().unwrap().id, "aa22");
        assert!(pick(&jobs, "b").unwrap().is_none(), "one digit is no prefix");
        assert!(pick(&jobs, "cc").unwrap().is_none());
        assert_eq!(pick(&jobs, "aa").unwrap_err().kind, ErrorKind::Ambiguous);
    }
}
