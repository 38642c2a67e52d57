//! Asking the node's daemon, from the main thread: blocking, with a limit.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use handoff::Ownership;
use handoff::message::Claim;
use serde::de::DeserializeOwned;

use crate::api::{DaemonRequest, Reply, TransferReply, frame};

/// How long the daemon may take. The directory may be on another node, behind a restart.
const ANSWER: Duration = Duration::from_secs(3);

/// Asks the daemon that serves `control`.
///
/// # Errors
/// When it does not answer in time, or answers with a refusal.
pub fn ask<R: DeserializeOwned>(control: &Path, request: &DaemonRequest) -> io::Result<R> {
    let mut stream = UnixStream::connect(control)?;
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
pub fn transfer(control: &Path, claim: &Claim, to: &str) -> Ownership {
    let request = DaemonRequest::Transfer {
        job: claim.job.clone(),
        from_epoch: claim.epoch,
        from_node: claim.source.clone(),
        to_node: to.to_owned(),
    };
    match ask(control, &request) {
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
