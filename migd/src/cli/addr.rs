//! `migd addr` and `migd cluster`: the cluster's addresses and its directory.

use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::bail;
use clap::Subcommand;
use ipnet::IpNet;

use super::Target;
use super::listing::{print, print_json, print_table};
use crate::api::{
    AddressList, AddressRequest, BlockList, BlockView, CheckReport, DaemonRequest, Migrated, PrefixView,
    ReservationView,
};

/// Arguments of `migd addr`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each job has one IPv4 and one IPv6 address out of the cluster's prefixes. Nodes lease blocks of them and give out addresses of \
their own blocks; a freed address rests for five minutes before it is used again.

  migd addr reserve web                 keep a pair of addresses under a name...
  migd run -d --address web nginx       ...and give them to a job, wherever and as often as it is started")]
pub struct AddrArgs {
    #[command(subcommand)]
    command: AddrCommand,
    /// Print as JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum AddrCommand {
    /// List the prefixes and every address that is in use, reserved or resting
    Ls,
    /// List the blocks that nodes lease, and how full they are
    Blocks,
    /// Keep addresses under a name, for `migd run --address NAME`
    Reserve {
        /// The name
        name: String,
        /// Addresses to reserve, at most one of IPv4 and one of IPv6 [default: any]
        addresses: Vec<IpAddr>,
    },
    /// Give up a reservation, a block's lease, or a node that is gone for ever
    Release {
        /// Name of a reservation, or a block
        #[arg(value_name = "NAME|BLOCK", required_unless_present = "holder", conflicts_with = "holder")]
        what: Option<String>,
        /// Free all blocks of this node and forget it
        #[arg(long, value_name = "NODE")]
        holder: Option<String>,
        /// Your word that nothing of that node runs any more: the records of its jobs are removed, too
        #[arg(long, requires = "holder")]
        gone: bool,
    },
    /// Add a prefix, or widen one: a prefix that contains present ones takes their place
    Add {
        /// Such as 10.78.0.0/16 or fd78::/64
        prefix: IpNet,
    },
    /// Hold all records against the rules: each address one job's, each in its block, no leaks; status 1 when something is wrong
    Check {
        /// Undo leaks: what is held for jobs that do not exist
        #[arg(long)]
        repair: bool,
    },
}

/// Arguments of `migd cluster`.
#[derive(Debug, clap::Args)]
pub struct ClusterArgs {
    #[command(subcommand)]
    command: ClusterCommand,
}

#[derive(Debug, Subcommand)]
enum ClusterCommand {
    /// Move the cluster's directory from the node that serves it to an etcd, while all jobs run
    #[command(
        after_help = "Jobs can be neither started nor moved for a moment; running ones notice nothing. All nodes learn \
        of the new place by themselves. If anything fails, the directory stays where it is."
    )]
    MigrateDirectory {
        /// Where to: `etcd:http://HOST:PORT[,http://HOST:PORT...][/KEYS]`
        #[arg(value_name = "PLACE")]
        to: cluster_addr::etcd::Place,
        /// Print as JSON
        #[arg(long)]
        json: bool,
    },
}

/// `migd cluster`.
pub async fn cluster(target: &Target, args: ClusterArgs) -> anyhow::Result<ExitCode> {
    let ClusterCommand::MigrateDirectory { to, json } = args.command;
    let request = DaemonRequest::MigrateDirectory { to: to.to_string() };
    let migrated: Migrated = target.client()?.ask(&request).await?;
    if json {
        print_json(&migrated)?;
    } else {
        let Migrated { to, records, held_ms } = migrated;
        print(&format!("the directory is in {to} now: {records} records, no change possible for {held_ms} ms\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `migd addr`.
pub async fn addr(target: &Target, args: AddrArgs) -> anyhow::Result<ExitCode> {
    let client = target.client()?;
    let ask = |request| DaemonRequest::Addresses(request);
    let json = args.json;
    match args.command {
        AddrCommand::Ls => {
            let list: AddressList = client.ask(&ask(AddressRequest::List)).await?;
            if json { print_json(&list)? } else { print_list(&list)? }
        }
        AddrCommand::Blocks => {
            let list: BlockList = client.ask(&ask(AddressRequest::Blocks)).await?;
            if json { print_json(&list)? } else { print_blocks(&list)? }
        }
        AddrCommand::Reserve { name, addresses } => {
            let view: ReservationView = client.ask(&ask(AddressRequest::Reserve { name, addresses })).await?;
            if json { print_json(&view)? } else { print(&format!("{}: {}\n", view.name, words(&view.addresses)))? }
        }
        AddrCommand::Release { what: _, holder: Some(node), gone } => {
            let request = AddressRequest::ForgetNode { node: node.clone(), gone };
            let forgotten: cluster_addr::cluster::Forgotten = client.ask(&ask(request)).await?;
            if json {
                print_json(&forgotten)?;
            } else {
                let (blocks, jobs) = (forgotten.blocks.len(), forgotten.jobs.len());
                print(&format!("node {node} is forgotten: {blocks} blocks are free, {jobs} jobs were removed\n"))?;
            }
        }
        AddrCommand::Release { what: Some(what), .. } => match what.parse::<IpNet>() {
            Ok(block) => {
                let view: BlockView = client.ask(&ask(AddressRequest::ReleaseBlock { block })).await?;
                if json {
                    print_json(&view)?
                } else {
                    print(&format!("{} is no longer leased by {}\n", view.net, view.node))?
                }
            }
            Err(_) => {
                let view: ReservationView = client.ask(&ask(AddressRequest::ReleaseReservation { name: what })).await?;
                if json {
                    print_json(&view)?
                } else {
                    print(&format!("{} is free: {}\n", view.name, words(&view.addresses)))?
                }
            }
        },
        AddrCommand::Release { .. } => bail!("what is to be released?"),
        AddrCommand::Add { prefix } => {
            let prefixes: Vec<PrefixView> = client.ask(&ask(AddressRequest::AddPrefix { net: prefix })).await?;
            if json { print_json(&prefixes)? } else { print_prefixes(&prefixes)? }
        }
        AddrCommand::Check { repair } => {
            let report: CheckReport = client.ask(&ask(AddressRequest::Check { repair })).await?;
            let wrong = report.findings.iter().any(|finding| !finding.repaired);
            if json {
                print_json(&report)?
            } else {
                print_report(&report)?
            }
            return Ok(if wrong { ExitCode::FAILURE } else { ExitCode::SUCCESS });
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn words(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn print_prefixes(prefixes: &[PrefixView]) -> std::io::Result<()> {
    let row = |prefix: &PrefixView| {
        let size = if prefix.size == u64::MAX { "2^64 or more".to_owned() } else { prefix.size.to_string() };
        [
            prefix.net.to_string(),
            size,
            prefix.held.to_string(),
            prefix.reserved.to_string(),
            prefix.resting.to_string(),
            prefix.leased_blocks.to_string(),
        ]
    };
    let header = ["PREFIX", "ADDRESSES", "HELD", "RESERVED", "RESTING", "BLOCKS"].map(str::to_owned);
    print_table(header, prefixes.iter().map(row))
}

fn print_list(list: &AddressList) -> std::io::Result<()> {
    print_prefixes(&list.prefixes)?;
    print("\n")?;
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let row = |used: &cluster_addr::cluster::UsedAddress| {
        [
            used.address.to_string(),
            used.state.clone(),
            or_dash(&used.name),
            or_dash(&used.node),
            or_dash(&used.reservation),
            used.block.map_or_else(|| "-".to_owned(), |block| block.to_string()),
            or_dash(&used.leased_by),
        ]
    };
    let header = ["ADDRESS", "STATE", "JOB", "NODE", "RESERVATION", "BLOCK", "LEASED BY"].map(str::to_owned);
    print_table(header, list.addresses.iter().map(row))
}

fn print_blocks(list: &BlockList) -> std::io::Result<()> {
    let row = |block: &BlockView| {
        let node = if block.alive { block.node.clone() } else { format!("{} (silent)", block.node) };
        let [held, resting, free] = [block.held, block.resting, block.free].map(|count| count.to_string());
        [block.net.to_string(), node, held, resting, free]
    };
    print_table(["BLOCK", "NODE", "HELD", "RESTING", "FREE"].map(str::to_owned), list.blocks.iter().map(row))
}

fn print_report(report: &CheckReport) -> std::io::Result<()> {
    for finding in &report.findings {
        let repaired = if finding.repaired { " (undone)" } else { "" };
        print(&format!("{}{repaired}\n", finding.text))?;
    }
    let CheckReport { revision, jobs, addresses, findings } = report;
    let count = findings.len();
    let verdict = if count == 0 { "all is well".to_owned() } else { format!("{count} things are wrong") };
    print(&format!("{jobs} jobs and {addresses} addresses at revision {revision}: {verdict}\n"))
}
