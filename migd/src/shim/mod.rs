//! The shim: one process per job, the job's parent, tracer, system-call supervisor and TCP/IP stack.

use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `migd shim`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The job's directory.
    #[arg(long)]
    pub dir: PathBuf,
}

/// Runs a job's shim until the job has ended or moved away.
///
/// # Errors
/// Whatever kept it from starting.
pub fn main(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("the shim is not part of this build")
}
