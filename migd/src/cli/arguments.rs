//! The command tree.

use std::path::PathBuf;

use crate::api::SocketPlace;
use clap::{Parser, Subcommand};
use nix::sys::signal::Signal;

/// Move running Linux servers between machines without dropping a connection
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
    #[arg(long, global = true, value_name = "PATH", env = "MIGD_SOCKET", help_heading = "Which daemon")]
    pub socket: Option<PathBuf>,
    /// Ask the daemon of this node of the lab; with `run`, if there is no such lab node: run the job on that node
    #[arg(long, global = true, value_name = "NAME", help_heading = "Which daemon")]
    pub node: Option<String>,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run this node's daemon
    Daemon(crate::daemon::Args),
    /// Start a program as a job
    Run(RunArgs),
    /// List the jobs of the cluster
    Ps(PsArgs),
    /// Show all that is known of a job
    Inspect(InspectArgs),
    /// Record a job's packets, wherever it runs
    #[command(
        after_help = "The file is pcapng, for tcpdump and Wireshark. It goes on while and after the job moves, each node's \
        packets under a section of their own. Large packets are the ones that the kernel cuts or has joined; packets that go out may \
        have checksums that are yet to be filled in. What the reader is too slow for is dropped and counted in the file. \
        At most eight recordings of a job are made at a time."
    )]
    Pcap(PcapArgs),
    /// Print what a job wrote, wherever it ran
    Logs(LogsArgs),
    /// Send a signal to a job
    #[command(
        after_help = "The signal goes to the job's first process; when that has ended while others run on, as when a \
        program made itself a daemon, to those that it left without a parent. KILL goes to all of the job."
    )]
    Kill(KillArgs),
    /// Forget jobs that ended, and their logs
    Rm(RmArgs),
    /// Move a job to another node
    #[command(after_help = "Exit status: 0 moved, 1 error, 3 refused before anything was touched, 4 given up in the \
        course of the move; after 3 and 4 the job runs on where it was. Ctrl-C ends only the command (status 130): the move goes on.")]
    Move(MoveArgs),
    /// List the nodes of the cluster
    Nodes(NodesArgs),
    /// Look after the addresses that jobs have
    Addr(super::addr::AddrArgs),
    /// Look after the cluster as a whole
    Cluster(super::addr::ClusterArgs),
    /// Make, use and take down a cluster of network namespaces on this machine
    Lab(crate::lab::Args),
    /// Show a server moving under load
    Demo(crate::demo::Args),
    /// Measure
    Bench(crate::bench::Args),
    /// Hold one job (started by the daemon)
    #[command(hide = true)]
    Shim(crate::shim::Args),
}

/// Arguments of `migd run`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "In the foreground (without -d) the job's output and exit status are passed on and signals are \
    forwarded, also while and after it moves. Exit status: the job's, 128+N if signal N ended it; 125 if migd failed, \
    126 if the program can't be executed, 127 if there is none."
)]
pub struct RunArgs {
    /// Stay in the background: print the job's id and return as soon as the program runs
    #[arg(short, long)]
    pub detach: bool,
    /// The job's name, unique in the cluster [default: made from the program's name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Set a variable in the job's environment, on top of the present one; may be given more than once
    #[arg(short, long = "env", value_name = "KEY=VALUE", value_parser = parse_variable)]
    pub env: Vec<(String, String)>,
    /// The job's address: the name of a reservation (`migd addr reserve`) or an address of the cluster [default: any]
    #[arg(long, value_name = "NAME|IP")]
    pub address: Option<String>,
    /// The job's working directory [default: the present one]
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
    pub argv: Vec<String>,
}

/// Arguments of `migd ps`.
#[derive(Debug, clap::Args)]
pub struct PsArgs {
    /// Also jobs that ended
    #[arg(short, long)]
    pub all: bool,
    /// Print the ids alone
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print as JSON: an array of jobs
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `migd inspect`.
#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// Name, id or unique beginning of an id
    #[arg(value_name = "JOB")]
    pub job: String,
    /// Show each socket with its queues and the state of its connection, as `ss -tiem` does
    #[arg(short, long)]
    pub sockets: bool,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `migd pcap`.
#[derive(Debug, clap::Args)]
pub struct PcapArgs {
    /// Where to write; `-` is standard output
    #[arg(short, long, value_name = "FILE")]
    pub write: PathBuf,
    /// Keep only the first bytes of each packet
    #[arg(short, long, value_name = "BYTES", default_value_t = 262_144, value_parser = clap::value_parser!(u32).range(20..))]
    pub snap_length: u32,
    /// End after so many packets [default: when the job ends, or at Ctrl-C]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Name, id or unique beginning of an id
    #[arg(value_name = "JOB")]
    pub job: String,
}

/// Arguments of `migd logs`.
#[derive(Debug, clap::Args)]
pub struct LogsArgs {
    /// Go on until the job ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last N lines
    #[arg(short = 'n', long, value_name = "N")]
    pub tail: Option<u64>,
    /// Name, id or unique beginning of an id
    #[arg(value_name = "JOB")]
    pub job: String,
}

/// Arguments of `migd kill`.
#[derive(Debug, clap::Args)]
pub struct KillArgs {
    /// Name or number of the signal
    #[arg(short, long, value_name = "SIGNAL", default_value = "TERM", value_parser = parse_signal)]
    pub signal: i32,
    /// Names, ids or unique beginnings of ids
    #[arg(required = true, value_name = "JOB")]
    pub jobs: Vec<String>,
}

/// Arguments of `migd rm`.
#[derive(Debug, clap::Args)]
pub struct RmArgs {
    /// Names, ids or unique beginnings of ids
    #[arg(required = true, value_name = "JOB")]
    pub jobs: Vec<String>,
}

/// Arguments of `migd move`.
#[derive(Debug, clap::Args)]
pub struct MoveArgs {
    /// Name, id or unique beginning of an id
    #[arg(value_name = "JOB")]
    pub job: String,
    /// Where to
    // Not `node`: that would be the global option.
    #[arg(value_name = "NODE", id = "to")]
    pub to: String,
    /// Whether the job's sockets and address come along, or stay at home: where they are now, with every byte relayed
    #[arg(long, value_name = "PLACE", value_enum, default_value_t)]
    pub sockets: SocketPlace,
    /// Print the outcome as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `migd nodes`.
#[derive(Debug, clap::Args)]
pub struct NodesArgs {
    /// Print as JSON: an array of nodes
    #[arg(long)]
    pub json: bool,
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

/// A signal's number, or its name with or without SIG.
fn parse_signal(text: &str) -> Result<i32, String> {
    // Real-time signals have numbers only.
    const LAST: i32 = 64;
    if let Ok(number) = text.parse::<i32>() {
        return if (0..=LAST).contains(&number) { Ok(number) } else { Err(format!("there is no signal {number}")) };
    }
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    name.parse::<Signal>().map(|signal| signal as i32).map_err(|_| format!("there is no signal {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_tree_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_follows_the_program_is_the_programs() {
        for line in ["migd run -d --name web -- prog -d --name x", "migd run -d --name web prog -d --name x"] {
            let Command::Run(run) = parse(line).unwrap().command else { panic!("{line} is a run") };
            assert_eq!(run.argv, ["prog", "-d", "--name", "x"]);
            assert!(run.detach);
            assert_eq!(run.name.as_deref(), Some("web"));
        }
        assert!(parse("migd run -d").is_err(), "a program is needed");
    }

    #[test]
    fn a_job_and_its_target_are_not_the_global_option() {
        let arguments = parse("migd move web B --node A").unwrap();
        assert_eq!(arguments.target.node.as_deref(), Some("A"));
        let Command::Move(args) = arguments.command else { panic!("a move") };
        assert_eq!((args.job.as_str(), args.to.as_str()), ("web", "B"));
    }

    #[test]
    fn the_daemon_needs_to_know_its_cluster() {
        assert!(parse("migd daemon --listen 10.0.0.1:7070").is_err());
        assert!(parse("migd daemon --listen 10.0.0.1:7070 --create --join 10.0.0.2:7070").is_err());
        assert!(parse("migd daemon --listen 0.0.0.0:7070 --create").is_err(), "others can't reach 0.0.0.0");
        let Command::Daemon(args) = parse("migd daemon --listen 10.0.0.1 --create").unwrap().command else {
            panic!("a daemon")
        };
        assert_eq!(args.listen, "10.0.0.1:7070".parse().unwrap());
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["KILL", "SIGKILL", "sigkill", "9"] {
            assert_eq!(parse_signal(text), Ok(9));
        }
        assert!(parse_signal("65").is_err());
        assert!(parse_signal("NOPE").is_err());
    }

    #[test]
    fn variables_have_a_name() {
        assert_eq!(parse_variable("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(parse_variable("A="), Ok(("A".into(), String::new())));
        assert!(parse_variable("=b").is_err());
        assert!(parse_variable("A").is_err());
    }
}
