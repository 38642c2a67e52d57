//! `migd bench compare`: what does handing the sockets off gain over routing them through the home node, and what does it cost
//! against a kernel socket that never moves?
//!
//! Rounds go over all tests and, within each test, over all stacks one right after the other, beginning with another one in each
//! round. The server is started anew for each measurement; where a move makes the stack, connections are opened before it
//! and live through it.

mod measure;
mod report;
mod sections;

use std::process::ExitCode;
use std::time::{Duration, Instant};

pub(super) use report::Compare;

use super::output::Output;
use super::site::Site;
use super::stack::Stack;
use measure::{Effort, Figure, measure};

/// Arguments of `migd bench compare`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Most rounds
    #[arg(long, value_name = "N", default_value_t = 9)]
    rounds: u32,
    /// Stop adding rounds after about so many minutes
    #[arg(long, value_name = "N", default_value_t = 20.0)]
    minutes: f64,
    /// One short round: under two minutes
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    output: Output,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Test {
    BulkSend,
    BulkReceive,
    Rr,
    RedisBenchmark,
    Connect,
}

impl Test {
    /// The name as in JSON.
    pub(super) fn name(self) -> &'static str {
        match self {
            Test::BulkSend => "bulk-send",
            Test::BulkReceive => "bulk-receive",
            Test::Rr => "rr",
            Test::RedisBenchmark => "redis-benchmark",
            Test::Connect => "connect",
        }
    }

    pub(super) fn unit(self) -> &'static str {
        match self {
            Test::BulkSend | Test::BulkReceive => "Gbit/s",
            Test::Rr => "us",
            Test::RedisBenchmark => "requests/s",
            Test::Connect => "connections/s",
        }
    }
}

/// The stacks in the order of the tables.
pub(super) const STACKS: [Stack; 6] =
    [Stack::Kernel, Stack::Migd, Stack::MigdMoved, Stack::HomeRouted, Stack::Smoltcp, Stack::Criu];
/// The tests with their numbers of connections.
pub(super) const TESTS: [(Test, u32); 7] = [
    (Test::BulkSend, 1),
    (Test::BulkSend, 8),
    (Test::BulkReceive, 1),
    (Test::BulkReceive, 8),
    (Test::Rr, 1),
    (Test::RedisBenchmark, super::tools::REDIS_CLIENTS),
    (Test::Connect, super::tools::WRK_CONNECTIONS),
];

/// All that was measured, before it is put together.
#[derive(Debug, Default)]
pub(super) struct Collected {
    figures: Vec<(Stack, Test, u32, Figure)>,
    /// What could not be measured, and why; each once.
    missing: Vec<(Stack, Option<Test>, String)>,
    /// Measurements that failed.
    failed: Vec<String>,
}

/// Runs it.
pub(super) fn main(args: &Args) -> anyhow::Result<ExitCode> {
    let site = Site::make()?;
    let compare = run(&site, args.rounds, Duration::from_secs_f64(args.minutes.max(0.0) * 60.0), args.quick)?;
    drop(site);
    args.output.give(&compare)?;
    Ok(if compare.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Rounds until there are enough or the time is over; at least one.
pub(super) fn run(site: &Site, rounds: u32, time: Duration, quick: bool) -> anyhow::Result<Compare> {
    anyhow::ensure!(rounds > 0, "at least one round is needed");
    let rounds = if quick { 1 } else { rounds };
    let effort = if quick { Effort::QUICK } else { Effort::FULL };
    let mut collected = Collected::default();
    let mut stacks = Vec::new();
    for stack in STACKS {
        match site.unavailable(stack) {
            None => stacks.push(stack),
            Some(reason) => {
                eprintln!("{}: not available: {reason}", stack.name());
                collected.missing.push((stack, None, reason));
            }
        }
    }
    let began = Instant::now();
    for round in 1..=rounds {
        for (test, streams) in TESTS {
            measure(site, &stacks, test, streams, round, &effort, &mut collected)?;
            let latest = collected.latest(test, streams, &stacks);
            eprintln!("round {round} of {rounds}, {} x{streams}: {latest} {}", test.name(), test.unit());
        }
        stacks.rotate_left(1);
        // Another round like those before must fit.
        let spent = began.elapsed();
        if spent + spent / round > time && round < rounds {
            eprintln!("{round} rounds took {:.0} s: no time for another", spent.as_secs_f64());
            break;
        }
    }
    Ok(Compare::new(site, collected, began.elapsed()))
}

impl Collected {
    fn add(&mut self, stack: Stack, test: Test, streams: u32, figure: Figure) {
        self.figures.push((stack, test, streams, figure));
    }

    fn miss(&mut self, stack: Stack, test: Test, why: String) {
        let entry = (stack, Some(test), why);
        if !self.missing.contains(&entry) {
            eprintln!("{}, {}: {}", stack.name(), test.name(), entry.2);
            self.missing.push(entry);
        }
    }

    fn fail(&mut self, stack: Stack, test: Test, streams: u32, error: &anyhow::Error) {
        let failure = format!("{}, {} x{streams}: {error:#}", stack.name(), test.name());
        eprintln!("{failure}");
        self.failed.push(failure);
    }

    /// The last figure of each stack, in the order of the tables.
    fn latest(&self, test: Test, streams: u32, stacks: &[Stack]) -> String {
        let last = |stack: &Stack| {
            let of_these = |entry: &&(Stack, Test, u32, Figure)| (entry.0, entry.1, entry.2) == (*stack, test, streams);
            self.figures.iter().rev().find(of_these).map(|entry| format!("{} {:.2}", stack.name(), entry.3.value))
        };
        STACKS.iter().filter(|stack| stacks.contains(stack)).filter_map(last).collect::<Vec<_>>().join(", ")
    }
}
