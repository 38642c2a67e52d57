//! Asking the node's daemon, from the main thread: blocking, with a limit.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use handoff::Ownership;
use handoff::message::Claim;
use serde::de::DeserializeOwned;

use crate::api::{DaemonRequest, DaemonStatus, DirectoryHealth, JobOwner, Reply, TransferReply, frame};

/// How long the daemon may take. The directory may be on another node, behind a restart.
const ANSWER: Duration = Duration::from_secs(3);

/// Asks the daemon that serves `control`.
///
/// # Errors
/// When it does not answer in time, or answers with a refusal.
pub fn ask<R: DeserializeOwned>(control: &Path, request: &DaemonRequest) -> io::Result<R> {
    ask_over(UnixStream::connect(control)?, request)
}

fn ask_over<R: DeserializeOwned>(mut stream: UnixStream, request: &DaemonRequest) -> io::Result<R> {
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    stream.write_all(&frame::encode(request)?)?;
    let mut header = [0; 4];
    stream.read_exact(&mut header)?;
    let length = frame::body_length(header)?;
    let mut body = Vec::new();
    stream.take(length as u64).read_to_end(&mut body)?;
    match frame::decode::<Reply<R>>(&body)? {
        Reply::Ok(answer) => Ok(answer),
        Reply::Error(error) => Err(io::Error::other(error)),
    }
}

/// Asks the directory to make `to` the owner of what `claim` describes. Whatever goes wrong on the way is an unknown
/// answer: the swap may have been made.
///
/// `home` is the node with the job's sockets then, when that is not `to`.
pub fn transfer(control: &Path, claim: &Claim, to: &str, home: Option<&str>) -> Ownership {
    let request = DaemonRequest::Transfer {
        job: claim.job.clone(),
        from_epoch: claim.epoch,
        from_node: claim.source.clone(),
        to_node: to.to_owned(),
        home: home.map(str::to_owned),
    };
    let stream = match UnixStream::connect(control) {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(%error, control = %control.display(), "the daemon is not there");
            return Ownership::Unasked;
        }
    };
    match ask_over(stream, &request) {
        Ok(TransferReply::Won { epoch }) => Ownership::Won { epoch },
        Ok(TransferReply::Lost { owner, epoch }) => {
            Ownership::Lost { owner: owner.unwrap_or_else(|| "nobody".to_owned()), epoch }
        }
        Ok(TransferReply::Unknown { reason }) => {
            tracing::warn!(reason, "the directory does not answer");
            Ownership::Unknown
        }
        Err(error) => {
            tracing::warn!(%error, control = %control.display(), "the daemon does not answer");
            Ownership::Unknown
        }
    }
}

/// Who the directory says has the job; none when it has ended.
///
/// # Errors
/// When the daemon or the directory does not answer.
pub fn owner(control: &Path, job: &str) -> io::Result<Option<JobOwner>> {
    ask(control, &DaemonRequest::Owner { job: job.to_owned() })
}

/// Whether the daemon and the directory answer now. Asked before a job is frozen: without them the move can't be
/// committed, and the job would stand still until they are back.
///
/// # Errors
/// Says which of them does not answer.
pub fn check(control: &Path) -> Result<(), String> {
    match ask::<DaemonStatus>(control, &DaemonRequest::Status) {
        Err(error) => Err(format!("the daemon of this node does not answer: {error}")),
        Ok(DaemonStatus { directory: DirectoryHealth::Unreachable { peer, reason }, .. }) => {
            Err(format!("the directory at {peer} does not answer: {reason}"))
        }
        Ok(DaemonStatus { directory: DirectoryHealth::EtcdUnreachable { place, reason }, .. }) => {
            Err(format!("the directory at {place} does not answer: {reason}"))
        }
        Ok(_) => Ok(()),
    }
}
