//! Benchmarks.

use std::process::ExitCode;

/// Arguments of `migd bench`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs `migd bench`.
///
/// # Errors
/// Whatever went wrong, to be shown to the user.
pub fn main(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("`migd bench` is not part of this build")
}
