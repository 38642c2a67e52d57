//! `migd bench timeline`: what clients see while the server moves: the throughput of a bulk stream in steps of 10 ms, and
//! the latency of every single request over one connection; with migd and with CRIU.

mod show;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::downtime::Engine;
use super::figures::{quantile, rounded};
use super::latency::Exchange;
use super::machine::Machine;
use super::output::Output;
use super::programs::Program;
use super::site::Site;
use super::stream::{Bulk, Direction};

/// Length of a step.
const STEP: Duration = Duration::from_millis(10);
/// Flow before anything is recorded.
const WARM_UP: Duration = Duration::from_millis(500);

/// Arguments of `migd bench timeline`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How long is recorded before the move and after it, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 700)]
    margin_ms: u64,
    /// Memory of the server
    #[arg(long, value_name = "MB", default_value_t = 64)]
    resident_mb: u32,
    /// Leave CRIU out
    #[arg(long)]
    without_criu: bool,
    #[command(flatten)]
    output: Output,
}

/// What `--json` prints. Times are in milliseconds since the recording began.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Timeline {
    pub(super) bulk: Vec<BulkLine>,
    pub(super) rr: Vec<RequestLine>,
    /// What could not be recorded, and why.
    pub(super) unavailable: Vec<String>,
    /// Recordings that failed, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) failed: Vec<String>,
    pub(super) machine: Machine,
}

/// A bulk stream over a move.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct BulkLine {
    pub(super) engine: Engine,
    pub(super) direction: Direction,
    pub(super) step_ms: u64,
    /// The rate in each step.
    pub(super) gbit_s: Vec<f64>,
    /// From the request to move to its end.
    pub(super) move_ms: [f64; 2],
}

/// Requests over a move.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct RequestLine {
    pub(super) engine: Engine,
    /// Memory of the server.
    pub(super) resident_mb: u32,
    /// When each request was made, and how long its answer took, in microseconds.
    pub(super) requests: Vec<(f64, f64)>,
    /// From the request to move to its end.
    pub(super) move_ms: [f64; 2],
}

pub(super) fn main(args: &Args) -> anyhow::Result<ExitCode> {
    let engines: &[Engine] = if args.without_criu { &[Engine::Migd] } else { &Engine::ALL };
    let site = Site::make()?;
    let timeline = run(&site, engines, Duration::from_millis(args.margin_ms), args.resident_mb)?;
    drop(site);
    args.output.give(&timeline)?;
    Ok(if timeline.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(super) fn run(site: &Site, engines: &[Engine], margin: Duration, resident_mb: u32) -> anyhow::Result<Timeline> {
    let mut timeline =
        Timeline { bulk: vec![], rr: vec![], unavailable: vec![], failed: vec![], machine: Machine::look(site) };
    for &engine in engines {
        if let Some(reason) = site.unavailable(engine.stack()) {
            timeline.unavailable.push(format!("{}: {reason}", engine.name()));
            continue;
        }
        let recorded = record(site, engine, margin, resident_mb, &mut timeline);
        site.check()?;
        // One that fails must not take all the others with it; it is shown, and the status tells.
        if let Err(error) = recorded {
            let failure = format!("a timeline of {}: {error:#}", engine.name());
            eprintln!("{failure}");
            timeline.failed.push(failure);
        }
    }
    Ok(timeline)
}

fn record(
    site: &Site,
    engine: Engine,
    margin: Duration,
    resident_mb: u32,
    timeline: &mut Timeline,
) -> anyhow::Result<()> {
    eprintln!("{}: requests over a move", engine.name());
    timeline.rr.push(requests(site, engine, margin, resident_mb)?);
    for direction in [Direction::Send, Direction::Receive] {
        eprintln!("{}: a bulk stream over a move, {direction:?}", engine.name());
        timeline.bulk.push(bulk(site, engine, direction, margin)?);
    }
    Ok(())
}

fn requests(site: &Site, engine: Engine, margin: Duration, resident_mb: u32) -> anyhow::Result<RequestLine> {
    let program = Program::Resident { resident_mb, dirty_mb_s: 0 };
    let mut server = site.start(engine.stack(), "timeline-rr", program)?;
    site.wait_until_it_serves(server.address())?;
    let socket = site.client()?.run(|| super::stream::connect(server.address()))?;
    let recording = Exchange::over(socket)?.record();
    site.sleep(WARM_UP + margin)?;
    let moved = server.move_away()?;
    site.sleep(margin)?;
    let operations = recording.stop().context("the client's connection broke")?;
    let origin = moved.began - margin;
    let requests = operations
        .iter()
        .filter(|operation| operation.began >= origin)
        .map(|operation| {
            let latency_us = operation.duration().as_secs_f64() * 1e6;
            (ms(operation.began - origin), rounded(latency_us))
        })
        .collect();
    let move_ms = [ms(moved.began - origin), ms(moved.ended - origin)];
    Ok(RequestLine { engine, resident_mb, requests, move_ms })
}

fn bulk(site: &Site, engine: Engine, direction: Direction, margin: Duration) -> anyhow::Result<BulkLine> {
    let name = format!("timeline-{direction:?}").to_lowercase();
    let mut server = site.start(engine.stack(), &name, Program::Peer)?;
    let bulk = Bulk::start_closely(&site.client()?, server.address(), direction)?;
    site.sleep(WARM_UP)?;
    let origin = Instant::now();
    let done = std::sync::atomic::AtomicBool::new(false);
    let (moved, gbit_s) = std::thread::scope(|scope| {
        let sampler = scope.spawn(|| sample(&bulk, origin, &done));
        let moved = site.sleep(margin).and_then(|()| server.move_away());
        let slept = site.sleep(margin);
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        let gbit_s = sampler.join().unwrap_or_default();
        slept.and(moved).map(|moved| (moved, gbit_s))
    })?;
    let move_ms = [ms(moved.began - origin), ms(moved.ended - origin)];
    let step_ms = u64::try_from(STEP.as_millis()).unwrap_or(u64::MAX);
    Ok(BulkLine { engine, direction, step_ms, gbit_s, move_ms })
}

/// The rate in each step until `done`.
fn sample(bulk: &Bulk, origin: Instant, done: &std::sync::atomic::AtomicBool) -> Vec<f64> {
    let mut rates = Vec::new();
    let mut before = (origin, bulk.bytes());
    let mut next = origin;
    while !done.load(std::sync::atomic::Ordering::Relaxed) {
        next += STEP;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        let now = (Instant::now(), bulk.bytes());
        // Exact up to 2^53 bytes.
        #[allow(clippy::cast_precision_loss)]
        let bits = (now.1 - before.1) as f64 * 8.0;
        rates.push(rounded(bits / (now.0 - before.0).as_secs_f64() / 1e9));
        before = now;
    }
    rates
}

fn ms(duration: Duration) -> f64 {
    rounded(duration.as_secs_f64() * 1e3)
}

impl RequestLine {
    /// Median of the latencies outside of the move, and the longest of all, in microseconds.
    pub(super) fn summary(&self) -> (f64, f64) {
        let calm = self.requests.iter().filter(|(at, _)| *at < self.move_ms[0]);
        // Microseconds, far below 2^32.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let mut calm: Vec<u32> = calm.map(|(_, us)| (us * 1000.0) as u32).collect();
        calm.sort_unstable();
        let longest = self.requests.iter().map(|(_, us)| *us).fold(0.0, f64::max);
        (f64::from(quantile(&calm, 0.5)) / 1000.0, longest)
    }
}

impl BulkLine {
    /// Steps in which nothing at all arrived, from the move's beginning on.
    pub(super) fn silent_ms(&self) -> u64 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let first = (self.move_ms[0] / self.step_ms as f64) as usize;
        let silent = self.gbit_s.iter().skip(first).filter(|rate| **rate == 0.0).count();
        silent as u64 * self.step_ms
    }
}
