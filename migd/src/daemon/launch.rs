//! Starting jobs: an address and a record from the directory, a directory on disk, a shim.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cluster_addr::{JobId, JobRecord, NewJob, Wanted};

use super::jobs::{LocalJob, Phase, write_json};
use super::node::Node;
use super::peer::client::LAUNCH_TIMEOUT;
use super::peer::protocol::PeerRequest;
use super::supervise;
use crate::api::{ApiError, ErrorKind, JobFile, JobSpec, JobView, RunRequest, unix_ms};

/// How long a program may take to be started by its shim.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of a job's command that its record holds.
const RECORDED_BYTES: usize = 4096;

/// Starts a job, here or on the node asked for, and waits until its program was executed.
///
/// # Errors
/// What kept it from starting; nothing is left of it then.
pub async fn run(node: &Arc<Node>, mut request: RunRequest) -> Result<JobView, ApiError> {
    match request.node.take() {
        Some(name) if name != node.name => {
            let target = node.find_node(&name).await?;
            let answer = node.peers.ask_within(target.peer, &PeerRequest::Run(request), LAUNCH_TIMEOUT).await;
            Ok(answer?)
        }
        _ => run_here(node, request).await,
    }
}

async fn run_here(node: &Arc<Node>, request: RunRequest) -> Result<JobView, ApiError> {
    let Some(program) = request.argv.first().filter(|program| !program.is_empty()) else {
        return Err(ApiError::new(ErrorKind::Invalid, "there is no program to run"));
    };
    if !Path::new(&request.cwd).is_absolute() {
        let message = format!("the working directory {:?} is not an absolute path", request.cwd);
        return Err(ApiError::new(ErrorKind::Invalid, message));
    }
    let id = new_id()?;
    let name = request.name.unwrap_or_else(|| derive_name(program, &id));
    let started_ms = unix_ms();
    let wanted = wanted(request.address);
    let new = NewJob { id, name, command: in_brief(&request.argv), started_ms, wanted };
    let record = node.cluster()?.create_job(new).await.map_err(|error| node.explain(error))?;
    let spec = JobSpec {
        id: record.id.to_string(),
        name: record.name.clone(),
        argv: request.argv,
        env: request.env,
        cwd: request.cwd,
        created_ms: started_ms,
    };
    node.learn_job(&spec.id, Some(record.clone()));
    let job = match start(node, spec, &record, false) {
        Ok(job) => job,
        Err(error) => {
            supervise::release(node, &record).await;
            return Err(error);
        }
    };
    let decided = job.wait(START_TIMEOUT, |phase| *phase != Phase::Starting).await;
    match decided.map(|standing| standing.phase) {
        Some(Phase::Failed(error)) => Err(error),
        Some(_) => job.view().await.ok_or_else(|| {
            ApiError::new(
                ErrorKind::Conflict,
                format!("job {} moved to another node while it was started", job.label()),
            )
        }),
        None => {
            let message = format!("job {} did not start within {} s", job.label(), START_TIMEOUT.as_secs());
            let hint = format!("see {}, and `migd ps` for what becomes of it", job.paths.shim_log().display());
            Err(ApiError::new(ErrorKind::Unavailable, message).hint(hint))
        }
    }
}

/// A command as listings show it: a record of the directory has no room for all that may be a command line.
fn in_brief(argv: &[String]) -> Vec<String> {
    let mut room = RECORDED_BYTES;
    let mut brief = Vec::new();
    for argument in argv {
        if argument.len() >= room {
            let end = (0..=room).rev().find(|end| argument.is_char_boundary(*end)).unwrap_or(0);
            brief.push(format!("{}…", &argument[..end]));
            break;
        }
        // Every one counts for something.
        room -= argument.len() + 1;
        brief.push(argument.clone());
    }
    brief
}

/// What `--address` means.
fn wanted(address: Option<String>) -> Wanted {
    match address {
        None => Wanted::Any,
        Some(text) => match text.parse() {
            Ok(address) => Wanted::Address(address),
            Err(_) => Wanted::Reservation(text),
        },
    }
}

/// Makes the job's directory, starts its shim and supervises it from now on.
///
/// # Errors
/// When the directory can't be made or the shim can't be executed; nothing is left then.
pub fn start(node: &Arc<Node>, spec: JobSpec, record: &JobRecord, receive: bool) -> Result<Arc<LocalJob>, ApiError> {
    let paths = node.paths.job(&spec.id);
    let cluster = node.cluster()?;
    let length = |address| cluster.prefix_of(address).map(|prefix| prefix.net.prefix_len());
    let own = |address: IpAddr| if address.is_ipv4() { 32 } else { 128 };
    let prefix_length = |address| length(address).unwrap_or_else(|| own(address));
    let file = JobFile {
        spec,
        address: record.address,
        prefix_length: prefix_length(record.address.into()),
        address6: record.address6,
        prefix_length6: record.address6.map_or(0, |address| prefix_length(address.into())),
        node: node.address(),
        epoch: record.owner.epoch,
        receive,
        uplinks: node.uplinks.clone(),
        control: node.paths.control(),
    };
    let job = LocalJob::new(file, paths);
    if !node.jobs.insert(&job) {
        return Err(ApiError::new(
            ErrorKind::Conflict,
            format!("job {} is on node {} already", job.label(), node.name),
        ));
    }
    match prepare(&job).and_then(|listener| node.machine.start_shim(&job.paths, listener)) {
        Ok(shim) => {
            supervise::spawn(Arc::clone(node), Arc::clone(&job), Some(shim));
            Ok(job)
        }
        Err(error) => {
            supervise::remove_directory(&job);
            node.jobs.remove(job.id());
            let message = format!("can't start the shim of job {}: {error}", job.label());
            Err(ApiError::new(ErrorKind::Internal, message).hint("see the daemon's log; is the file system full?"))
        }
    }
}

/// The job's directory with its listening socket in it.
fn prepare(job: &LocalJob) -> io::Result<UnixListener> {
    fs::DirBuilder::new().mode(0o700).recursive(true).create(job.paths.root())?;
    write_json(&job.paths.spec(), &job.file)?;
    let socket = job.paths.socket();
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(&socket)
}

fn new_id() -> Result<JobId, ApiError> {
    let mut bytes = [0; 12];
    random(&mut bytes).map_err(|error| ApiError::internal(format!("no entropy: {error}")))?;
    Ok(JobId::from_entropy(bytes))
}

/// Fills a buffer with random bytes from the kernel.
///
/// # Errors
/// As getrandom(2).
pub fn random(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}

/// The program's file name and some of the id's digits, so that the same program can be started twice.
fn derive_name(program: &str, id: &JobId) -> String {
    let file = Path::new(program).file_name().map_or_else(|| "job".into(), |name| name.to_string_lossy());
    let clean: String = file.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')).collect();
    let clean = clean.trim_start_matches(['-', '_', '.']);
    let clean = if clean.is_empty() { "job" } else { &clean[..clean.len().min(48)] };
    format!("{clean}-{}", &id.as_str()[..4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_commands_are_recorded_in_brief() {
        let argv = |argument: &str, times| vec![argument.to_owned(); times];
        assert_eq!(in_brief(&argv("-x", 3)), argv("-x", 3));
        for long in [argv("é", 1 << 20), argv(&"é".repeat(1 << 20), 3), argv("", 1 << 20), argv(&"x".repeat(4095), 2)]
        {
            let brief = in_brief(&long);
            assert!(brief.len() <= RECORDED_BYTES + 1 && brief.concat().len() <= RECORDED_BYTES + 3, "{}", brief.len());
            assert!(brief.last().is_some_and(|last| last.ends_with('…')));
        }
    }

    #[test]
    fn names_are_made_from_the_program() {
        let id = JobId::from_entropy([0xab; 12]);
        assert_eq!(derive_name("/usr/bin/redis-server", &id), "redis-server-abab");
        assert_eq!(derive_name("./.hidden prog", &id), "hiddenprog-abab");
        assert_eq!(derive_name("/…", &id), "job-abab");
        assert!(derive_name(&"x".repeat(200), &id).len() <= cluster_addr::cluster::NAME_MAX);
    }
}
