//! The daemon: one per node.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `migd daemon`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The node's name, unique in the cluster [default: the host name].
    #[arg(long)]
    pub name: Option<String>,
    /// State directory: control socket, jobs, and on one node the directory.
    #[arg(long, value_name = "DIR", default_value = crate::api::DEFAULT_STATE)]
    pub state: PathBuf,
    /// Address and port at which other nodes reach this one. Packets for its jobs are routed via this address.
    #[arg(long, value_name = "IP:PORT")]
    pub listen: SocketAddr,
    /// Prefix out of which jobs get their addresses; needed with --create, otherwise the cluster's is used.
    #[arg(long, value_name = "PREFIX", default_value = "10.77.0.0/16")]
    pub prefix: String,
    /// Device on which job addresses are announced; may be given more than once.
    #[arg(long = "uplink", value_name = "DEV", value_delimiter = ',')]
    pub uplinks: Vec<String>,
    /// Make a new cluster and serve its directory from this node. Nothing is overwritten: a node that has one goes on with it.
    #[arg(long, conflicts_with = "join")]
    pub create: bool,
    /// Join the cluster that this node belongs to.
    #[arg(long, value_name = "IP:PORT", required_unless_present = "create")]
    pub join: Option<SocketAddr>,
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// Whatever kept it from starting.
pub fn main(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("the daemon is not part of this build")
}
