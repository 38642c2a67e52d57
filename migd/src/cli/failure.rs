//! How failures look and which exit status they give.

use std::process::ExitCode;

use crate::api::{ApiError, ClientError, ErrorKind};

/// Exit status of a failed command.
pub const GENERAL: u8 = 1;
/// Exit status of `migd run` when migd itself failed; as other programs that start programs have it.
pub const RUN: u8 = 125;
/// Exit status of `migd run` when the program can't be executed.
const NOT_EXECUTABLE: u8 = 126;
/// Exit status of `migd run` when there is no such program.
const NO_SUCH_PROGRAM: u8 = 127;
/// Exit status of a move that was refused.
pub const REFUSED: u8 = 3;
/// Exit status of a move that was given up.
pub const ABORTED: u8 = 4;

/// Exit status of a command that Ctrl-C ended; as shells have it.
pub const INTERRUPTED: u8 = 130;

/// Prints an error and what to do about it.
pub fn show(error: &anyhow::Error) {
    eprintln!("migd: {error:#}");
    if let Some(hint) = hint(error) {
        eprintln!("migd: {hint}");
    }
}

/// The exit status for an error; `failed` unless it says more.
pub fn status(error: &anyhow::Error, failed: u8) -> ExitCode {
    let code = match api_error(error).map(|error| error.kind) {
        Some(ErrorKind::NoSuchProgram) => NO_SUCH_PROGRAM,
        Some(ErrorKind::NotExecutable) => NOT_EXECUTABLE,
        _ => failed,
    };
    ExitCode::from(code)
}

fn api_error(error: &anyhow::Error) -> Option<&ApiError> {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Api(error)) => Some(error),
        _ => error.downcast_ref::<ApiError>(),
    }
}

fn hint(error: &anyhow::Error) -> Option<String> {
    if let Some(ClientError::NotRunning { path, source }) = error.downcast_ref::<ClientError>() {
        return Some(match source.kind() {
            std::io::ErrorKind::PermissionDenied => "only root may use it".into(),
            _ if path.starts_with(crate::api::LAB_STATE) => {
                "is the lab up? `migd lab status` shows it, `migd lab up` makes it".into()
            }
            _ => "is the daemon running? Start it with `migd daemon --listen IP:PORT --create` (the first node) or \
                  `--join IP:PORT`; ask another one with --socket PATH or, in the lab, --node NAME"
                .into(),
        });
    }
    api_error(error)?.hint.clone()
}
