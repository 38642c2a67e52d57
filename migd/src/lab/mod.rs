//! A cluster of network namespaces on one machine, for trying things out and for every test.

use std::process::ExitCode;

/// Arguments of `migd lab`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs `migd lab`.
///
/// # Errors
/// Whatever went wrong, to be shown to the user.
pub fn main(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("`migd lab` is not part of this build")
}
