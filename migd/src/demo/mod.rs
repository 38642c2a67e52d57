//! The demonstration: a redis moves while its clients talk to it.

use std::process::ExitCode;

/// Arguments of `migd demo`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs `migd demo`.
///
/// # Errors
/// Whatever went wrong, to be shown to the user.
pub fn main(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("`migd demo` is not part of this build")
}
