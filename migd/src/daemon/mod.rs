//! The daemon: one per node.
//!
//! It starts shims and follows them ([`launch`], [`supervise`], [`jobs`]), answers the command line ([`control`], [`locate`],
//! [`attach`]), talks to the other daemons ([`peer`], [`members`], [`directory`], [`migrate`], [`join`]), brings shims together for a
//! move ([`moves`]) and keeps the routes to the jobs of other nodes ([`routes`]). What it does to the machine is in [`machine`].
//!
//! Invariants: jobs never depend on it (it may be stopped, killed and upgraded while they run); it holds nothing that is
//! not also on disk or in the directory; it never changes a job's owner but by the directory's compare-and-swap.

mod addresses;
mod attach;
mod capture;
mod control;
mod directory;
mod home;
mod jobs;
mod join;
mod launch;
mod locate;
mod machine;
mod members;
mod migrate;
mod moves;
mod node;
mod peer;
mod routes;
mod supervise;

use std::fs::{self, File, TryLockError};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use ipnet::IpNet;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tracing::level_filters::LevelFilter;

use crate::api::StatePaths;
use join::Way;
use machine::Machine;
use node::Node;

/// Arguments of `migd daemon`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The node's name, unique in the cluster [default: the host name]
    #[arg(long)]
    pub name: Option<String>,
    /// State directory: control socket, jobs, and on one node the directory
    #[arg(long, value_name = "DIR", default_value = crate::api::DEFAULT_STATE)]
    pub state: PathBuf,
    /// Address and port at which other nodes reach this one; packets for its jobs are routed via this address
    #[arg(long, value_name = "IP:PORT", value_parser = parse_listen)]
    pub listen: SocketAddr,
    /// Prefix out of which jobs get their addresses, with --create; may be given more than once, for IPv4 and IPv6
    /// [default: 10.77.0.0/16 and a random unique local /64]
    #[arg(long = "prefix", value_name = "PREFIX", conflicts_with = "join")]
    pub prefixes: Vec<IpNet>,
    /// Further address of this node, for routes to its jobs' addresses of the other family than that of --listen
    /// [default: the global IPv6 addresses of the uplinks]
    #[arg(long = "hop", value_name = "IP")]
    pub hops: Vec<IpAddr>,
    /// Device on which job addresses are announced; may be given more than once
    #[arg(long = "uplink", value_name = "DEV", value_delimiter = ',')]
    pub uplinks: Vec<String>,
    /// Make a new cluster and serve its directory from this node; a node that did so before goes on with it
    #[arg(long, conflicts_with = "join")]
    pub create: bool,
    /// Join the cluster of the node that listens there
    #[arg(long, value_name = "IP:PORT", value_parser = parse_listen, required_unless_present = "create")]
    pub join: Option<SocketAddr>,
    /// Where the directory is, when it is an etcd: `etcd:http://HOST:PORT[,http://HOST:PORT...][/KEYS]`; with --join it is
    /// learned from that node if not given
    #[arg(long, value_name = "PLACE")]
    pub directory: Option<cluster_addr::etcd::Place>,
    /// What is logged to standard error: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", env = "MIGD_LOG", default_value = "info")]
    pub log: LevelFilter,
}

/// Port of peers that is used when none is given.
pub const PEER_PORT: u16 = 7070;

/// `IP:PORT`, or an IP address alone for the usual port.
fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse::<SocketAddr>().or_else(|_| text.parse().map(|ip| SocketAddr::new(ip, PEER_PORT)));
    let address = address.map_err(|_| format!("{text:?} is not IP:PORT"))?;
    if address.ip().is_unspecified() {
        return Err("give an address of this node at which the other nodes reach it".into());
    }
    Ok(address)
}

/// Runs the daemon until SIGTERM or SIGINT. The jobs run on.
///
/// # Errors
/// Whatever kept it from starting.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(args.log).with_ansi(terminal).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(run(args));
    // Tasks hold nothing that needs an orderly end.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

async fn run(args: Args) -> anyhow::Result<()> {
    let name = match args.name {
        Some(name) => name,
        None => rustix::system::uname().nodename().to_string_lossy().into_owned(),
    };
    let way = match (args.join, args.create) {
        (Some(through), _) => Way::Join(through),
        (None, true) => Way::Create { prefixes: args.prefixes },
        (None, false) => bail!("either --create or --join IP:PORT is needed"),
    };
    let hops = match args.hops.as_slice() {
        [] => machine::global_addresses6(&args.uplinks).into_iter().map(IpAddr::V6).collect(),
        _ => args.hops,
    };
    for uplink in &args.uplinks {
        if !machine::has_device(uplink)? {
            bail!("this node has no network device {uplink} (--uplink); `ip link` lists those it has");
        }
    }
    let root = std::path::absolute(&args.state).context("the state directory")?;
    let paths = StatePaths::new(root);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let _file_too_large = signal(crate::FILE_TOO_LARGE)?;
    let settings = Settings {
        name,
        paths: paths.clone(),
        listen: args.listen,
        hops,
        uplinks: args.uplinks,
        way,
        etcd: args.directory,
    };
    let result = tokio::select! {
        result = serve(settings, Arc::new(machine::Linux)) => result,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    if result.is_ok() {
        tracing::info!("stops; jobs run on");
        // So that clients learn at once that nobody serves it.
        let _ = fs::remove_file(paths.control());
    }
    result
}

/// What a daemon is told.
struct Settings {
    name: String,
    paths: StatePaths,
    listen: SocketAddr,
    hops: Vec<IpAddr>,
    uplinks: Vec<String>,
    way: Way,
    etcd: Option<cluster_addr::etcd::Place>,
}

/// Is a node's daemon; returns only with an error.
async fn serve(settings: Settings, machine: Arc<dyn Machine>) -> anyhow::Result<()> {
    let Settings { name, paths, listen, hops, uplinks, way, etcd } = settings;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(paths.jobs())
        .with_context(|| format!("can't make the state directory {}", paths.root().display()))?;
    let _lock = lock(&paths)?;
    let control = listen_control(&paths)?;
    let peers = TcpListener::bind(listen)
        .await
        .with_context(|| format!("can't listen at {listen}; is it an address of this node, and the port free?"))?;
    // With port 0 the kernel chose one.
    let peer = peers.local_addr()?;
    let node = Arc::new(Node::new(name, peer, hops, paths, uplinks, machine));
    tracing::info!(node = node.name, %peer, state = %node.paths.root().display(), "started");
    supervise::adopt(&node).await.context("can't read the jobs of the state directory")?;
    tokio::spawn(control::serve(Arc::clone(&node), control));
    tokio::spawn(peer::server::serve(Arc::clone(&node), peers));
    join::join(&node, way, etcd).await?;
    tokio::join!(routes::follow(Arc::clone(&node)), members::heartbeat(Arc::clone(&node)));
    Ok(())
}

/// One daemon for one state directory.
fn lock(paths: &StatePaths) -> anyhow::Result<File> {
    let path = paths.lock();
    let file = File::create(&path).with_context(|| format!("can't open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("another daemon runs with the state directory {}", paths.root().display())
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("can't lock {}", path.display())),
    }
}

fn listen_control(paths: &StatePaths) -> anyhow::Result<UnixListener> {
    let path = paths.control();
    // Left over from a daemon that was killed: ours is the lock.
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("can't listen at {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests;
