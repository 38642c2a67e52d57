//! Benchmarks. Each makes a lab of its own, measures all that it compares in the same run, round by round in turn, so
//! that what else the machine does hits all alike, and takes the lab down.

mod chart;
mod compare;
mod cpu;
mod criu;
mod downtime;
mod figures;
mod flood;
mod latency;
mod loss;
mod machine;
mod output;
mod pauses;
mod peer;
mod programs;
mod report;
mod resident;
mod results;
mod rr;
mod site;
mod smoltcp;
mod stack;
mod stream;
mod throughput;
mod timeline;
mod tools;

use std::process::ExitCode;
use std::time::Duration;

/// Arguments of `migd bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, clap::Subcommand)]
enum BenchCommand {
    /// Bulk streams in each direction: kernel TCP, migd, migd after a move of the running streams, smoltcp's TCP over TUN
    Throughput {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// How often each combination is measured
        #[arg(long, value_name = "N", default_value_t = 5)]
        rounds: u32,
        /// How many streams at once, several numbers one after the other
        #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [1, 8], value_parser = clap::value_parser!(u32).range(1..=16))]
        streams: Vec<u32>,
        /// How long each measurement takes, in milliseconds
        #[arg(long, value_name = "MS", default_value_t = 1000)]
        interval_ms: u64,
    },
    /// Request and response over one connection, redis-benchmark, and new connections: kernel TCP and migd
    Rr {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// How often each combination is measured
        #[arg(long, value_name = "N", default_value_t = 7)]
        rounds: u32,
        /// How long requests and responses over one connection are measured each time, in milliseconds
        #[arg(long, value_name = "MS", default_value_t = 1000)]
        interval_ms: u64,
    },
    /// One bulk stream over links with loss and delay: the kernel's TCP and migd
    Loss(loss::Args),
    /// What floods of forged segments leave of running transfers: the kernel's TCP and migd
    Flood(flood::Args),
    /// Everything against everything: kernel TCP, a job before and after a move, home-routed, smoltcp, CRIU
    Compare(compare::Args),
    /// How long a client waits over a move, against memory, dirty rate and connections: migd and CRIU
    Downtime(downtime::Args),
    /// What clients see over a move: throughput in steps of 10 ms, and every request's latency
    Timeline(timeline::Args),
    /// Compare, downtime and timeline in one run, as a page with pictures
    Results(results::Args),
    /// The far end of a measured stream (started by the benchmarks)
    #[command(hide = true)]
    Peer {
        /// Port to listen on
        #[arg(long)]
        port: u16,
        /// Congestion control to use
        #[arg(long)]
        congestion: Option<String>,
    },
    /// A server with memory, of which it writes some all the time (started by the benchmarks)
    #[command(hide = true)]
    Resident {
        /// Port to listen on
        #[arg(long)]
        port: u16,
        /// Memory beside the program's own
        #[arg(long)]
        resident_mb: usize,
        /// How much of it is written in a second
        #[arg(long)]
        dirty_mb_s: usize,
    },
    /// A server on smoltcp's own sockets over a TUN device (started by the benchmarks)
    #[command(hide = true)]
    Smoltcp {
        /// Its address
        #[arg(long)]
        address: std::net::Ipv4Addr,
    },
}

/// Runs `migd bench`.
///
/// # Errors
/// Whatever went wrong, to be shown to the user.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        BenchCommand::Throughput { json, rounds, streams, interval_ms } => {
            throughput::main(json, rounds, &streams, Duration::from_millis(interval_ms))
        }
        BenchCommand::Rr { json, rounds, interval_ms } => rr::main(json, rounds, Duration::from_millis(interval_ms)),
        BenchCommand::Compare(args) => compare::main(&args),
        BenchCommand::Downtime(args) => downtime::main(&args),
        BenchCommand::Results(args) => results::main(&args),
        BenchCommand::Timeline(args) => timeline::main(&args),
        BenchCommand::Resident { port, resident_mb, dirty_mb_s } => resident::main(port, resident_mb, dirty_mb_s),
        BenchCommand::Smoltcp { address } => smoltcp::main(address),
        BenchCommand::Loss(args) => loss::main(&args),
        BenchCommand::Flood(args) => flood::main(&args),
        BenchCommand::Peer { port, congestion } => peer::main(port, congestion.as_deref()),
    }
}
