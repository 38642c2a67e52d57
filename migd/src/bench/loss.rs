//! `migd bench loss`: what bad links leave of one bulk stream's goodput, the kernel's TCP (CUBIC) against migd's.
//!
//! The receiver is a kernel behind an emulated link; the sender is the same program, once as a plain process of a node,
//! once as a job on that node. Streams of both run at the same time over the same link, in pairs that share nothing but
//! its faults: without a bottleneck no stream takes room from another, so each is a bulk stream alone on the link, and
//! whatever else the machine does hits both alike. On a link with a bottleneck they take turns.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use sys::netns::NetNamespace;

use super::figures::{Spread, rounded};
use super::site::Killed;
use super::stream::{Bulk, Direction};
use crate::demo::Interrupt;
use crate::lab::{BadLink, BothWays, Bursts, Faults, Lab, Rate, Spec, own_name, remove_abandoned};

const NAME: &str = "bench";
const PORT: u16 = 5301;
const CLIENT: &str = "client1";

/// Arguments of `migd bench loss`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// How often each link is measured
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: u32,
    /// How long each measurement takes, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 8000)]
    interval_ms: u64,
    /// Flow before each measurement, so that the start is over, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    warm_up_ms: u64,
    /// Delay of the link in each direction, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 20)]
    delay_ms: u64,
    /// Streams of each stack at a time, each alone on its link
    #[arg(long, value_name = "N", default_value_t = 6)]
    pairs: usize,
    /// Only links whose name contains this
    #[arg(long, value_name = "TEXT")]
    link: Option<String>,
    /// Seed of what the links do
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Stack {
    Kernel,
    Migd,
}

/// A link to be measured.
#[derive(Debug, Clone)]
struct Link {
    name: &'static str,
    faults: Faults,
}

impl Link {
    fn has_bottleneck(&self) -> bool {
        self.faults.rate.is_some()
    }
}

/// The links that are measured.
fn links(delay: Duration) -> Vec<Link> {
    let base = Faults { delay, ..Faults::default() };
    // One bandwidth-delay product waits before the bottleneck.
    let bits_per_second = 50_000_000;
    let product = bits_per_second as f64 / 8.0 * 2.0 * delay.as_secs_f64();
    let rate = Rate { bits_per_second, queue: (product as usize).max(30_000) };
    let link = |name, faults| Link { name, faults };
    vec![
        link("no loss, 50 Mbit/s", Faults { rate: Some(rate), ..base }),
        link("loss 1%", Faults { loss: 0.01, ..base }),
        link("loss 3%", Faults { loss: 0.03, ..base }),
        // A quarter of a percent of packets begins a run of four on average.
        link("bursts 1%", Faults { bursts: Some(Bursts { begin: 0.0025, end: 0.25 }), ..base }),
        link("loss 1%, reordering 2%", Faults { loss: 0.01, reorder: 0.02, reorder_by: delay / 4, ..base }),
    ]
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    delay_ms: u64,
    rounds: u32,
    runs: Vec<Run>,
    ratios: Vec<Ratio>,
}

/// One stack on one link.
#[derive(Debug, Serialize)]
struct Run {
    stack: Stack,
    link: &'static str,
    streams: usize,
    mbit_s: Goodput,
}

/// migd's mean over the kernel's.
#[derive(Debug, Serialize)]
struct Ratio {
    link: &'static str,
    migd_over_kernel: f64,
}

/// Figures of single streams.
#[derive(Debug, Clone, Copy, Serialize)]
struct Goodput {
    mean: f64,
    #[serde(flatten)]
    spread: Spread,
}

impl Goodput {
    /// Of at least one figure.
    fn of(figures: &[f64]) -> Goodput {
        // Counts are small enough to be exact.
        let mean = figures.iter().sum::<f64>() / figures.len() as f64;
        Goodput { mean: rounded(mean), spread: Spread::of(figures.to_vec()) }
    }
}

pub(super) fn main(args: &Args) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.rounds > 0 && args.pairs > 0, "at least one round and one pair are needed");
    let wanted = |link: &Link| args.link.as_deref().is_none_or(|text| link.name.contains(text));
    let links: Vec<Link> = links(Duration::from_millis(args.delay_ms)).into_iter().filter(wanted).collect();
    anyhow::ensure!(!links.is_empty(), "no link is called like {:?}", args.link.as_deref().unwrap_or_default());
    let interrupt = Interrupt::watch()?;
    remove_abandoned(NAME);
    let bench = Bench::new(args, interrupt)?;
    let mut figures: Vec<[Vec<f64>; 2]> = vec![Default::default(); links.len()];
    for round in 0..args.rounds {
        for (link, figures) in links.iter().zip(&mut figures) {
            let [kernel, migd] = bench.round(link, round)?;
            if !args.json {
                let mean = |figures: &[f64]| figures.iter().sum::<f64>() / figures.len() as f64;
                let (name, kernel, migd) = (link.name, mean(&kernel), mean(&migd));
                eprintln!("round {}, {name}: kernel {kernel:.2}, migd {migd:.2} Mbit/s", round + 1);
            }
            figures[0].extend(kernel);
            figures[1].extend(migd);
        }
    }
    let report = Report::of(args, &links, &figures);
    if args.json {
        crate::cli::print_json(&report)?;
    } else {
        report.print();
    }
    Ok(ExitCode::SUCCESS)
}

/// The lab, with both senders at work.
struct Bench<'a> {
    args: &'a Args,
    // Dropped in this order: no stream outlives its sender, no device the lab.
    _kernel_peer: Killed,
    link: BadLink,
    client: NetNamespace,
    senders: [SocketAddr; 2],
    _lab: Lab,
    interrupt: Interrupt,
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args, interrupt: Interrupt) -> anyhow::Result<Bench<'a>> {
        let lab = Lab::up(&Spec { nodes: 1, ..Spec::new(own_name(NAME))? })?;
        let link = lab.degrade(CLIENT, BothWays::default(), args.seed)?;
        let node = lab.layout().member("A").context("the lab has no node A")?.address;
        let program = std::env::current_exe()?;
        let port = PORT.to_string();
        let mut command = Command::new(&program);
        let arguments = ["bench", "peer", "--port", &port, "--congestion", "cubic"];
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        let namespace = lab.namespace("A")?;
        namespace.run(forget_paths).context("can't set up the kernel's TCP")?;
        let peer = Killed(namespace.run(|| command.spawn())?);
        let program = program.display().to_string();
        let job = lab.run("A", "peer", &[&[program.as_str()], arguments.as_slice()].concat())?;
        let senders = [IpAddr::V4(node), IpAddr::V4(job.address)].map(|address| SocketAddr::new(address, PORT));
        Ok(Bench { args, _kernel_peer: peer, link, client: lab.namespace(CLIENT)?, senders, _lab: lab, interrupt })
    }

    /// The figures of the kernel's streams, and of migd's.
    fn round(&self, link: &Link, round: u32) -> anyhow::Result<[Vec<f64>; 2]> {
        self.link.set(BothWays::alike(link.faults));
        if link.has_bottleneck() {
            // Each goes first every other time.
            let first = (round % 2) as usize;
            let mut figures: [Vec<f64>; 2] = Default::default();
            for stack in [first, 1 - first] {
                figures[stack] = self.measure(&[self.senders[stack]])?;
            }
            return Ok(figures);
        }
        let both: Vec<SocketAddr> = self.senders.iter().flat_map(|&sender| vec![sender; self.args.pairs]).collect();
        let kernel = self.measure(&both)?;
        let (kernel, migd) = kernel.split_at(self.args.pairs);
        Ok([kernel.to_vec(), migd.to_vec()])
    }

    /// Streams from all of these senders at the same time, in Mbit/s.
    fn measure(&self, senders: &[SocketAddr]) -> anyhow::Result<Vec<f64>> {
        let start = |&sender: &SocketAddr| {
            Bulk::start(&self.client, sender, Direction::Send, 1).with_context(|| format!("no stream from {sender}"))
        };
        let streams: Vec<Bulk> = senders.iter().map(start).collect::<Result<_, _>>()?;
        self.interrupt.sleep(Duration::from_millis(self.args.warm_up_ms))?;
        let interval = Duration::from_millis(self.args.interval_ms);
        let measured = std::thread::scope(|scope| {
            let threads: Vec<_> = streams.iter().map(|stream| scope.spawn(|| stream.measure(interval))).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, anyhow::Result<f64>>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect::<anyhow::Result<Vec<f64>>>()
        })?;
        self.interrupt.check()?;
        Ok(measured.into_iter().map(|gbit_s| gbit_s * 1000.0).collect())
    }
}

/// No connection begins with what an earlier one learned.
fn forget_paths() -> std::io::Result<()> {
    std::fs::write("/proc/sys/net/ipv4/tcp_no_metrics_save", "1")
}

impl Report {
    fn of(args: &Args, links: &[Link], figures: &[[Vec<f64>; 2]]) -> Report {
        let mut report = Report { delay_ms: args.delay_ms, rounds: args.rounds, runs: Vec::new(), ratios: Vec::new() };
        for (link, figures) in links.iter().zip(figures) {
            let stacks = [Goodput::of(&figures[0]), Goodput::of(&figures[1])];
            for (stack, mbit_s) in [Stack::Kernel, Stack::Migd].into_iter().zip(stacks) {
                report.runs.push(Run { stack, link: link.name, streams: figures[0].len(), mbit_s });
            }
            report.ratios.push(Ratio { link: link.name, migd_over_kernel: rounded(stacks[1].mean / stacks[0].mean) });
        }
        report
    }

    fn print(&self) {
        let mut out = std::io::stdout().lock();
        // Whoever closed the output does not want to read it.
        let _ = writeln!(
            out,
            "\n{:<26} {:<8} {:>8} {:>8} {:>8} {:>8}  Mbit/s",
            "LINK", "STACK", "MEAN", "MEDIAN", "MIN", "MAX"
        );
        for Run { stack, link, mbit_s: Goodput { mean, spread: Spread { median, min, max } }, .. } in &self.runs {
            let stack = format!("{stack:?}").to_lowercase();
            let _ = writeln!(out, "{link:<26} {stack:<8} {mean:>8.2} {median:>8.2} {min:>8.2} {max:>8.2}");
        }
        for Ratio { link, migd_over_kernel } in &self.ratios {
            let _ = writeln!(out, "{link:<26} migd / kernel {migd_over_kernel:>11.2}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_links_of_the_bar_are_there() {
        let links = links(Duration::from_millis(20));
        for loss in [0.01, 0.03] {
            let plain = Faults { delay: Duration::from_millis(20), loss, ..Faults::default() };
            assert!(links.iter().any(|link| link.faults == plain));
        }
    }
}
