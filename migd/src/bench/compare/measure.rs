//! One test on all stacks.

use std::time::Duration;

use sys::capture::Sieve;

use super::{Collected, Test};
use crate::bench::cpu;
use crate::bench::latency::Exchange;
use crate::bench::programs::Program;
use crate::bench::site::{HOME, Server, Site};
use crate::bench::stack::Stack;
use crate::bench::stream::{Bulk, Direction};
use crate::bench::tools::{redis_benchmark, wrk_connects};
use crate::demo::wire::Watch;

/// How long things are measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    /// Flow before each measurement of a stream.
    warm_up: Duration,
    interval: Duration,
    /// Requests of each kind in a run of redis-benchmark.
    requests: u32,
    connect_seconds: u64,
}

impl Effort {
    pub(super) const FULL: Effort = Effort {
        warm_up: Duration::from_millis(300),
        interval: Duration::from_millis(1000),
        requests: 40_000,
        connect_seconds: 1,
    };
    pub(super) const QUICK: Effort = Effort {
        warm_up: Duration::from_millis(200),
        interval: Duration::from_millis(400),
        requests: 20_000,
        connect_seconds: 1,
    };
}

/// What one measurement gave.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Figure {
    /// In the test's unit.
    pub(super) value: f64,
    /// Of latencies.
    pub(super) p99: Option<f64>,
    /// Of streams.
    pub(super) cost: Option<Cost>,
    /// Connections that failed.
    pub(super) errors: u64,
}

/// What it cost to carry the bytes of a stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cost {
    /// Bytes delivered while it was counted.
    pub(super) bytes: f64,
    /// Processor time of the whole machine.
    pub(super) machine_s: f64,
    /// Processor time of the home node's processes.
    pub(super) home_s: f64,
    /// Bytes on the home node's uplink, both ways: all of them, or those of the job's address after a direct move.
    pub(super) home_bytes: u64,
}

/// Measures a test once on each stack.
pub(super) fn measure(
    site: &Site,
    stacks: &[Stack],
    test: Test,
    streams: u32,
    round: u32,
    effort: &Effort,
    collected: &mut Collected,
) -> anyhow::Result<()> {
    for &stack in stacks {
        if stack == Stack::Smoltcp && test == Test::RedisBenchmark {
            collected.miss(stack, test, "redis can't run on smoltcp, which has no sockets for programs".to_owned());
            continue;
        }
        let name = format!("{}-{}-{streams}-{round}", stack.name(), test.name());
        let measured = once(site, stack, &name, test, streams, effort);
        site.check()?;
        match measured {
            Ok(figures) => figures.into_iter().for_each(|(stack, figure)| collected.add(stack, test, streams, figure)),
            // One that fails must not take all the others with it; it is shown, and the status tells.
            Err(error) => collected.fail(stack, test, streams, &error),
        }
    }
    Ok(())
}

/// The figures that one server gives.
fn once(
    site: &Site,
    stack: Stack,
    name: &str,
    test: Test,
    streams: u32,
    effort: &Effort,
) -> anyhow::Result<Vec<(Stack, Figure)>> {
    let program = match test {
        Test::BulkSend | Test::BulkReceive | Test::Rr => Program::Peer,
        Test::RedisBenchmark => Program::Redis,
        Test::Connect => Program::Nginx,
    };
    let mut server = site.start(stack, name, program)?;
    let client = site.client()?;
    let figure = match test {
        Test::BulkSend | Test::BulkReceive => {
            let direction = if test == Test::BulkSend { Direction::Send } else { Direction::Receive };
            let bulk = Bulk::start(&client, server.address(), direction, streams)?;
            return bulk_figures(site, stack, &mut server, &bulk, effort);
        }
        Test::Rr => {
            let mut exchange = Exchange::open(&client, server.address())?;
            if stack.is_moved() {
                exchange.once()?;
                server.move_away()?;
            }
            let latency = exchange.measure(effort.interval)?;
            Figure { value: latency.median_us, p99: Some(latency.p99_us), ..Figure::default() }
        }
        Test::RedisBenchmark => {
            serve_and_move(site, stack, &mut server)?;
            let value = redis_benchmark(&client, server.address(), effort.requests)?;
            Figure { value, ..Figure::default() }
        }
        Test::Connect => {
            serve_and_move(site, stack, &mut server)?;
            let connects = wrk_connects(&client, server.address(), effort.connect_seconds)?;
            Figure { value: connects.per_s, errors: connects.errors, ..Figure::default() }
        }
    };
    Ok(vec![(stack, figure)])
}

fn serve_and_move(site: &Site, stack: Stack, server: &mut Server<'_>) -> anyhow::Result<()> {
    site.wait_until_it_serves(server.address())?;
    if stack.is_moved() {
        server.move_away()?;
        site.wait_until_it_serves(server.address())?;
    }
    Ok(())
}

/// The rates of streams that live through the move, where one makes the stack. Of a job that moves directly both are taken, before
/// and after: how fast streams of this kind are differs from one job to the next by more than a move could cost, and so only
/// the same streams show what it costs.
fn bulk_figures(
    site: &Site,
    stack: Stack,
    server: &mut Server<'_>,
    bulk: &Bulk,
    effort: &Effort,
) -> anyhow::Result<Vec<(Stack, Figure)>> {
    let mut figures = Vec::new();
    site.sleep(effort.warm_up)?;
    let (still, moved) = match stack {
        Stack::Migd | Stack::MigdMoved => (Some(Stack::Migd), Some(Stack::MigdMoved)),
        Stack::HomeRouted | Stack::Criu => (None, Some(stack)),
        Stack::Kernel | Stack::Smoltcp => (Some(stack), None),
    };
    if let Some(stack) = still {
        figures.push((stack, bulk_figure(site, stack, server, bulk, effort.interval)?));
    }
    if let Some(stack) = moved {
        server.move_away()?;
        bulk.wait_until_it_flows()?;
        site.sleep(effort.warm_up)?;
        figures.push((stack, bulk_figure(site, stack, server, bulk, effort.interval)?));
    }
    Ok(figures)
}

/// The rate, and what it cost. The counters are read just before and after, so the bytes are taken as the rate over the time
/// between the readings.
fn bulk_figure(
    site: &Site,
    stack: Stack,
    server: &Server<'_>,
    bulk: &Bulk,
    interval: Duration,
) -> anyhow::Result<Figure> {
    let home = site.node(HOME)?;
    let id = home.id()?;
    // After a direct move nothing of the job may pass its old node, so watching costs nothing; where all of it passes, the device's
    // own counters tell how much, and watching would disturb.
    let watch = (stack == Stack::MigdMoved).then(|| match server.address().ip() {
        std::net::IpAddr::V4(address) => Watch::start(&home, Sieve::Host(address)).map(Some),
        std::net::IpAddr::V6(_) => Ok(None),
    });
    let watch = watch.transpose()?.flatten();
    let (uplink, machine, processes) = (uplink_bytes(site)?, cpu::machine_s(), cpu::processes_s(id));
    let began = std::time::Instant::now();
    let value = bulk.measure(interval)?;
    let seconds = began.elapsed().as_secs_f64();
    let (machine_s, home_s) = (cpu::machine_s() - machine, cpu::processes_s(id) - processes);
    let home_bytes = match watch {
        Some(watch) => {
            let passed = watch.stop()?;
            passed.bytes + u64::from(passed.lost)
        }
        None => uplink_bytes(site)? - uplink,
    };
    let cost = Cost { bytes: value * 1e9 / 8.0 * seconds, machine_s, home_s, home_bytes };
    Ok(Figure { value, cost: Some(cost), ..Figure::default() })
}

/// Bytes over the home node's uplink so far, both ways.
fn uplink_bytes(site: &Site) -> std::io::Result<u64> {
    site.node(HOME)?.run(|| {
        let uplink = sys::netlink::Netlink::open()?.link("eth0")?;
        Ok(uplink.counters.received_bytes + uplink.counters.sent_bytes)
    })
}
