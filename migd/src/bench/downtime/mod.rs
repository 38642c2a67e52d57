//! `migd bench downtime`: how long a client waits over a move, against the server's memory, how fast it is written, and the number
//! of connections; by migd and by CRIU, the same server, in turn.
//!
//! One client exchanges a byte without pause over one of the connections; its wait is the longest exchange that the move
//! touched. After the move every other connection must still echo.

mod show;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::chart::colour;
use super::figures::{Spread, rounded};
use super::latency::Exchange;
use super::machine::Machine;
use super::output::Output;
use super::pauses::{Watch, within};
use super::programs::Program;
use super::site::{Movement, Site};
use super::stack::Stack;
use super::stream::connect;
use crate::demo::longest_operation;

/// After a move's end an exchange that began in it may still be under way.
const SETTLE: Duration = Duration::from_millis(300);
/// Parts of a move in which the server runs.
const BEFORE: [&str; 3] = ["connect", "offer", "precopy"];
/// How many threads open connections.
const OPENERS: u32 = 8;

/// Arguments of `migd bench downtime`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Most rounds
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: u32,
    /// Stop adding rounds after about so many minutes
    #[arg(long, value_name = "N", default_value_t = 20.0)]
    minutes: f64,
    /// Few points, one round: under two minutes
    #[arg(long)]
    quick: bool,
    /// Only these points: memory in MB, MB/s written, connections
    #[arg(long = "point", value_name = "MB,MB/S,N", value_parser = parse_point)]
    points: Vec<Point>,
    /// Leave CRIU out
    #[arg(long)]
    without_criu: bool,
    #[command(flatten)]
    output: Output,
}

/// What moves the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Engine {
    Migd,
    Criu,
}

impl Engine {
    pub(super) const ALL: [Engine; 2] = [Engine::Migd, Engine::Criu];

    pub(super) fn name(self) -> &'static str {
        match self {
            Engine::Migd => "migd",
            Engine::Criu => "criu",
        }
    }

    /// That of its stack, and of migd's two the darker, as there is only one here.
    pub(super) fn colour(self) -> &'static str {
        colour(match self {
            Engine::Migd => Stack::Migd,
            Engine::Criu => Stack::Criu,
        })
    }

    pub(super) fn stack(self) -> Stack {
        match self {
            Engine::Migd => Stack::MigdMoved,
            Engine::Criu => Stack::Criu,
        }
    }
}

/// A server to be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Point {
    resident_mb: u32,
    dirty_mb_s: u32,
    connections: u32,
}

const fn point(resident_mb: u32, dirty_mb_s: u32, connections: u32) -> Point {
    Point { resident_mb, dirty_mb_s, connections }
}

fn parse_point(text: &str) -> Result<Point, String> {
    let numbers: Vec<u32> = text.split(',').filter_map(|number| number.trim().parse().ok()).collect();
    match numbers[..] {
        [resident_mb, dirty_mb_s, connections] if connections > 0 => Ok(point(resident_mb, dirty_mb_s, connections)),
        _ => Err("three numbers are wanted: memory in MB, MB/s written, connections (at least one)".to_owned()),
    }
}

/// Memory at rest, memory being written, connections.
const FULL: [Point; 12] = [
    point(1, 0, 1),
    point(64, 0, 1),
    point(256, 0, 1),
    point(1024, 0, 1),
    point(4096, 0, 1),
    point(1024, 100, 1),
    point(1024, 500, 1),
    point(64, 100, 1),
    point(64, 500, 1),
    point(1, 0, 100),
    point(1, 0, 1000),
    point(1, 0, 10_000),
];
const QUICK: [Point; 4] = [point(1, 0, 1), point(256, 0, 1), point(256, 100, 1), point(1, 0, 1000)];

/// What `--json` prints.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Downtime {
    pub(super) runs: Vec<Run>,
    /// What could not be measured, and why.
    pub(super) unavailable: Vec<String>,
    /// Moves that failed, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) failed: Vec<String>,
    pub(super) seconds: f64,
    pub(super) machine: Machine,
}

/// A point by an engine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Run {
    pub(super) engine: Engine,
    pub(super) resident_mb: u32,
    pub(super) dirty_mb_s: u32,
    pub(super) connections: u32,
    /// The longest wait of the client.
    pub(super) stall_ms: Spread,
    /// The medians of its parts. CRIU's own statistics, inside of its `dump` and `restore`, begin with "criu".
    #[serde(serialize_with = "as_map")]
    pub(super) phases_ms: Vec<(String, f64)>,
    /// From the request to move to its end.
    pub(super) total_ms: Spread,
    pub(super) rounds: usize,
}

/// One move.
struct Timed {
    stall_ms: f64,
    total_ms: f64,
    phases: Vec<(String, f64)>,
}

pub(super) fn main(args: &Args) -> anyhow::Result<ExitCode> {
    let points = if args.points.is_empty() { points(args.quick) } else { &args.points };
    let rounds = if args.quick { 1 } else { args.rounds };
    let engines: &[Engine] = if args.without_criu { &[Engine::Migd] } else { &Engine::ALL };
    let site = Site::make()?;
    let time = Duration::from_secs_f64(args.minutes.max(0.0) * 60.0);
    let downtime = run(&site, engines, points, 1..=rounds, time)?;
    drop(site);
    args.output.give(&downtime)?;
    Ok(if downtime.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The points of a full or a quick run.
pub(super) fn points(quick: bool) -> &'static [Point] {
    if quick { &QUICK } else { &FULL }
}

/// Rounds until there are enough or the time is over, but not fewer than the least.
pub(super) fn run(
    site: &Site,
    engines: &[Engine],
    points: &[Point],
    rounds: RangeInclusive<u32>,
    time: Duration,
) -> anyhow::Result<Downtime> {
    let (least, rounds) = rounds.into_inner();
    anyhow::ensure!(rounds > 0, "at least one round is needed");
    let mut unavailable = Vec::new();
    let mut usable = Vec::new();
    for &engine in engines {
        match site.unavailable(engine.stack()) {
            None => usable.push(engine),
            Some(reason) => unavailable.push(format!("{}: {reason}", engine.name())),
        }
    }
    if let Err(error) = Watch::start().and_then(Watch::stop) {
        unavailable.push(format!("how long the machine was stopped: no real-time priority: {error}"));
    }
    let mut failed = Vec::new();
    let mut timed: BTreeMap<(Point, Engine), Vec<Timed>> = BTreeMap::new();
    let began = Instant::now();
    for round in 1..=rounds {
        for &point in points {
            for &engine in &usable {
                let Point { resident_mb, dirty_mb_s, connections } = point;
                let what = format!(
                    "{}: {resident_mb} MB, {dirty_mb_s} MB/s written, {connections} connections",
                    engine.name()
                );
                match once(site, engine, point, round) {
                    Ok(one) => {
                        eprintln!("round {round} of {rounds}, {what}: {:.1} ms", one.stall_ms);
                        timed.entry((point, engine)).or_default().push(one);
                    }
                    Err(error) => {
                        site.check()?;
                        // One that fails must not take all the others with it; it is shown, and the status tells.
                        let failure = format!("{what}: {error:#}");
                        eprintln!("{failure}");
                        if !failed.contains(&failure) {
                            failed.push(failure);
                        }
                    }
                }
                site.check()?;
            }
        }
        // Another round like those before must fit.
        let spent = began.elapsed();
        if spent + spent / round > time && (least..rounds).contains(&round) {
            eprintln!("{round} rounds took {:.0} s: no time for another", spent.as_secs_f64());
            break;
        }
    }
    let mut runs = Vec::new();
    for &point in points {
        let of = |engine: &Engine| timed.get(&(point, *engine)).map(|timed| Run::of(*engine, point, timed));
        runs.extend(usable.iter().filter_map(of));
    }
    let seconds = rounded(began.elapsed().as_secs_f64());
    Ok(Downtime { runs, unavailable, failed, seconds, machine: Machine::look(site) })
}

fn once(site: &Site, engine: Engine, point: Point, round: u32) -> anyhow::Result<Timed> {
    let Point { resident_mb, dirty_mb_s, connections } = point;
    let name = format!("resident-{resident_mb}-{dirty_mb_s}-{connections}-{round}");
    let mut server = site.start(engine.stack(), &name, Program::Resident { resident_mb, dirty_mb_s })?;
    // It listens when its memory is filled.
    site.wait_until_it_serves(server.address())?;
    let mut idle = open(site, server.address(), connections - 1).context("can't open the connections")?;
    let socket = site.client()?.run(|| connect(server.address()))?;
    let recording = Exchange::over(socket)?.record();
    let watch = Watch::start();
    site.sleep(Duration::from_millis(300))?;
    let moved = server.move_away();
    site.sleep(SETTLE)?;
    let operations = recording.stop().context("the client's connection broke");
    let pauses = watch.and_then(Watch::stop);
    let moved = moved?;
    let operations = operations?;
    for socket in &mut idle {
        echoes(socket).context("an idle connection broke over the move")?;
    }
    let Movement { began, ended, stood_ms, mut phases } = moved;
    let stall = longest_operation(&operations, began, ended + SETTLE).context("the client exchanged nothing")?;
    let stall_ms = stall.duration().as_secs_f64() * 1e3;
    // What went before the freeze is no part of the wait.
    phases.retain(|(name, _)| !BEFORE.contains(&name.as_str()));
    phases.push(("first byte".to_owned(), (stall_ms - stood_ms).max(0.0)));
    if let Ok(pauses) = pauses {
        phases.push(("machine stopped".to_owned(), within(&pauses, stall.began..stall.ended).as_secs_f64() * 1e3));
    }
    Ok(Timed { stall_ms, total_ms: (ended - began).as_secs_f64() * 1e3, phases })
}

/// Opens connections, on several threads as one alone waits for each handshake, and has each echo once.
fn open(site: &Site, server: SocketAddr, count: u32) -> anyhow::Result<Vec<TcpStream>> {
    let client = site.client()?;
    let share = |opener: u32| (0..count).skip(opener as usize).step_by(OPENERS as usize).count();
    let opened: Vec<std::io::Result<Vec<TcpStream>>> = std::thread::scope(|scope| {
        let openers: Vec<_> = (0..OPENERS)
            .map(|opener| {
                let client = &client;
                scope.spawn(move || {
                    client.run(|| {
                        let mut sockets = Vec::new();
                        for _ in 0..share(opener) {
                            let mut socket = connect(server)?;
                            socket.set_read_timeout(Some(Duration::from_secs(60)))?;
                            echoes(&mut socket)?;
                            sockets.push(socket);
                        }
                        Ok(sockets)
                    })
                })
            })
            .collect();
        let panicked = |_| Err(std::io::Error::other("a thread that opens connections panicked"));
        openers.into_iter().map(|opener| opener.join().unwrap_or_else(panicked)).collect()
    });
    let mut all = Vec::new();
    for sockets in opened {
        all.extend(sockets?);
    }
    Ok(all)
}

fn echoes(socket: &mut TcpStream) -> std::io::Result<()> {
    let mut byte = [0x42];
    socket.write_all(&byte)?;
    socket.read_exact(&mut byte)
}

fn as_map<S: serde::Serializer>(pairs: &[(String, f64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().map(|(name, ms)| (name, ms)))
}

impl Run {
    fn of(engine: Engine, point: Point, timed: &[Timed]) -> Run {
        // In the order in which they happen.
        let mut by_phase: Vec<(String, Vec<f64>)> = Vec::new();
        for (name, ms) in timed.iter().flat_map(|one| &one.phases) {
            match by_phase.iter_mut().find(|(known, _)| known == name) {
                Some((_, all)) => all.push(*ms),
                None => by_phase.push((name.clone(), vec![*ms])),
            }
        }
        Run {
            engine,
            resident_mb: point.resident_mb,
            dirty_mb_s: point.dirty_mb_s,
            connections: point.connections,
            stall_ms: Spread::of(timed.iter().map(|one| one.stall_ms).collect()),
            phases_ms: by_phase.into_iter().map(|(name, ms)| (name, Spread::of(ms).median)).collect(),
            total_ms: Spread::of(timed.iter().map(|one| one.total_ms).collect()),
            rounds: timed.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_form_is_the_promised_one() {
        let timed = Timed { stall_ms: 12.5, total_ms: 80.0, phases: vec![("freeze".into(), 2.0)] };
        let run = Run::of(Engine::Migd, point(1, 0, 1), &[timed]);
        let expected = r#"{"engine":"migd","resident_mb":1,"dirty_mb_s":0,"connections":1,"#.to_owned()
            + r#""stall_ms":{"median":12.5,"min":12.5,"max":12.5},"phases_ms":{"freeze":2.0},"#
            + r#""total_ms":{"median":80.0,"min":80.0,"max":80.0},"rounds":1}"#;
        assert_eq!(serde_json::to_string(&run).expect("plain data"), expected);
    }
}
