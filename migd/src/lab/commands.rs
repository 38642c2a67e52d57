//! `migd lab`: the commands.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::Subcommand;
use serde::Serialize;
use sys::netns::NetNamespace;

use super::layout::{Kind, Layout, Member, Names};
use super::{Lab, Spec, ask, down};
use crate::api::{DaemonRequest, DaemonStatus};

/// Arguments of `migd lab`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A lab is a cluster on this machine: nodes A, B... with a daemon each, clients client1..., and a switch, each a network \
namespace of its own. Try:

  migd lab up
  migd --node A run -d --name web -- python3 -m http.server 80
  migd --node A ps
  migd lab exec client1 -- curl http://10.77.0.1/      (the address that ps shows)
  migd --node A move web B
  migd lab down

The namespaces are called migd-LAB-MEMBER (ip netns exec works, too), the state of a node is in /run/migd-LAB/NODE with \
its daemon's log. Nodes of a lab other than the default one are addressed as --node LAB/NODE.")]
pub struct Args {
    #[command(subcommand)]
    command: LabCommand,
    /// Which lab; several can be up side by side (letters and digits)
    #[arg(long = "lab", global = true, value_name = "NAME", default_value = Names::DEFAULT)]
    lab: String,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Make a lab: namespaces, links and a daemon in each node
    Up {
        /// How many nodes (A, B...)
        #[arg(long, default_value_t = 2)]
        nodes: usize,
        /// How many clients (client1, client2...)
        #[arg(long, default_value_t = 1)]
        clients: usize,
        /// IPv4 prefix out of which jobs get their addresses
        #[arg(long, value_name = "PREFIX", default_value = "10.77.0.0/16")]
        prefix: String,
        /// Where the cluster's directory is: a file that node A serves, or an etcd of three members (Debian's etcd-server)
        #[arg(long, value_name = "ENGINE", default_value = "embedded")]
        directory: Engine,
    },
    /// Run a command in a node or a client
    Exec {
        /// The node or client
        #[arg(value_name = "NODE|CLIENT")]
        place: String,
        /// The command and its arguments
        #[arg(required = true, last = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// Show what the lab is made of and whether its daemons answer
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Take the lab down: its processes, namespaces and files, also after a crash of anything
    Down,
}

/// Which engine a lab's directory has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// A file that node A serves.
    Embedded,
    /// An etcd of three members.
    Etcd,
}

impl Engine {
    /// For [`Spec::etcd`].
    #[must_use]
    pub fn members(self) -> usize {
        match self {
            Engine::Embedded => 0,
            Engine::Etcd => 3,
        }
    }
}

/// Runs `migd lab`.
///
/// # Errors
/// Whatever went wrong, to be shown to the user.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        LabCommand::Up { nodes, clients, prefix, directory } => up(&args.lab, nodes, clients, prefix, directory),
        LabCommand::Exec { place, command } => exec(&args.lab, &place, &command),
        LabCommand::Status { json } => status(&args.lab, json),
        LabCommand::Down => take_down(&args.lab),
    }
}

fn up(lab: &str, nodes: usize, clients: usize, prefix: String, directory: Engine) -> anyhow::Result<ExitCode> {
    let spec = Spec { nodes, clients, prefix, etcd: directory.members(), ..Spec::new(lab)? };
    let lab = Lab::up(&spec)?;
    print(&describe(lab.layout(), lab.names()), false)?;
    lab.keep();
    Ok(ExitCode::SUCCESS)
}

fn exec(lab: &str, place: &str, command: &[String]) -> anyhow::Result<ExitCode> {
    let layout = Layout::load(&Names::new(lab)?)?;
    let Some(member) = layout.member(place) else {
        let all: Vec<_> = layout.members().map(|member| member.name.as_str()).collect();
        bail!("lab {lab} has no {place}; it has {}", all.join(", "));
    };
    let (program, arguments) = command.split_first().context("no command was given")?;
    let namespace = NetNamespace::open_named(&member.namespace);
    let namespace = namespace.with_context(|| format!("the namespace {} is gone", member.namespace))?;
    namespace.enter().with_context(|| format!("can't enter {} (this needs root)", member.namespace))?;
    // Returns only when it failed.
    let error = Command::new(program).args(arguments).exec();
    eprintln!("migd: can't run {program}: {error}");
    // As shells do: 127 when there is no such program, 126 when it can't be executed.
    Ok(ExitCode::from(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 }))
}

fn status(lab: &str, json: bool) -> anyhow::Result<ExitCode> {
    let names = Names::new(lab)?;
    let layout = Layout::load(&names)?;
    let status = describe(&layout, &names);
    print(&status, json)?;
    let well = status.nodes.iter().all(|node| node.daemon.is_some());
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn take_down(lab: &str) -> anyhow::Result<ExitCode> {
    let leftovers = down(lab)?;
    if leftovers.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    bail!("lab {lab}: {leftovers}");
}

/// What `migd lab status --json` prints.
#[derive(Debug, Serialize)]
struct Status {
    lab: String,
    prefix: String,
    prefix6: ipnet::Ipv6Net,
    switch: String,
    nodes: Vec<NodeStatus>,
    clients: Vec<Member>,
    etcd: Vec<Member>,
}

#[derive(Debug, Serialize)]
struct NodeStatus {
    #[serde(flatten)]
    member: Member,
    state: std::path::PathBuf,
    /// What the daemon says about itself; null when it does not answer.
    daemon: Option<DaemonStatus>,
}

fn describe(layout: &Layout, names: &Names) -> Status {
    let node = |member: &Member| {
        let state = names.state(&member.name);
        let daemon = ask(&state.join("control.sock"), &DaemonRequest::Status).ok();
        NodeStatus { member: member.clone(), state, daemon }
    };
    Status {
        lab: layout.lab.clone(),
        prefix: layout.prefix.clone(),
        prefix6: layout.prefix6,
        switch: layout.switch.clone(),
        nodes: layout.nodes.iter().map(node).collect(),
        clients: layout.clients.clone(),
        etcd: layout.etcd.clone(),
    }
}

fn print(status: &Status, json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(status)?)?;
        return Ok(());
    }
    writeln!(out, "lab {}: jobs get addresses of {} and {}", status.lab, status.prefix, status.prefix6)?;
    writeln!(out, "{:<9} {:<7} {:<12} {:<12} {:<24} DAEMON", "NAME", "KIND", "ADDRESS", "IPV6", "NAMESPACE")?;
    let line = |out: &mut std::io::StdoutLock<'_>, member: &Member, daemon: &str| {
        let Member { name, kind, namespace, address, address6 } = member;
        let (kind, address, address6) = (kind.to_string(), address.to_string(), address6.to_string());
        writeln!(out, "{name:<9} {kind:<7} {address:<12} {address6:<12} {namespace:<24} {daemon}")
    };
    for node in &status.nodes {
        let daemon = match &node.daemon {
            Some(daemon) => format!("running (pid {})", daemon.pid),
            None => format!("does not answer; see {}", node.state.join("daemon.log").display()),
        };
        line(&mut out, &node.member, &daemon)?;
    }
    for client in &status.clients {
        debug_assert_eq!(client.kind, Kind::Client);
        line(&mut out, client, "-")?;
    }
    for member in &status.etcd {
        line(&mut out, member, "-")?;
    }
    Ok(())
}
