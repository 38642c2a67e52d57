//! The command tree.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Moves running Linux servers between machines without dropping a connection.
#[derive(Debug, Parser)]
#[command(name = "migd", version, disable_help_subcommand = true)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// Which daemon to ask.
    #[command(flatten)]
    pub target: Target,
}

/// Which daemon to ask.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Target {
    /// Control socket of the daemon to ask [default: /run/migd/control.sock]
    #[arg(long, global = true, value_name = "PATH", env = "MIGD_SOCKET")]
    pub socket: Option<PathBuf>,
    /// Ask the daemon of this node of the lab (see `migd lab`); with `run` and no such lab node: run the job on that node
    #[arg(long, global = true, value_name = "NAME")]
    pub node: Option<String>,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run this node's daemon
    Daemon(crate::daemon::Args),
    /// Hold one job (started by the daemon)
    #[command(hide = true)]
    Shim(crate::shim::Args),
    /// Be process 1 of a job (started by the shim)
    #[command(hide = true)]
    Init,
    /// Make or take down a cluster of network namespaces on this machine
    Lab(crate::lab::Args),
    /// Show a server moving under load
    Demo(crate::demo::Args),
    /// Measure
    Bench(crate::bench::Args),
}
