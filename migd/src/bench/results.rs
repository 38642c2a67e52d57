//! `migd bench results`: the comparison, the downtimes and the timelines in one run and one lab, and from them the page
//! `results.md` with its pictures, the same as one HTML page, and the figures as JSON. `make results` calls it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::chart::Painter;
use super::compare::{self, Compare};
use super::downtime::{self, Downtime, Engine};
use super::output::Results;
use super::report;
use super::site::Site;
use super::timeline::{self, Timeline};

const TITLE: &str = "Results";
/// Share of the time for the comparison; what is left after it is for the downtimes.
const COMPARE_SHARE: f64 = 0.55;
const ROUNDS: u32 = 9;
/// Each move is made at least so many times, if it takes longer or not: a single one says nothing about spread.
const LEAST_MOVES: u32 = 3;
/// What is recorded before and after a timeline's move, and the memory of its server.
const MARGIN: Duration = Duration::from_millis(700);
const TIMELINE_MB: u32 = 64;

/// Arguments of `migd bench results`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where results.md, results.html, results.json and the folder of pictures go
    #[arg(long, value_name = "DIR", default_value = "docs")]
    out: PathBuf,
    /// Stop adding rounds after about so many minutes
    #[arg(long, value_name = "N", default_value_t = 20.0)]
    minutes: f64,
    /// One short round of few points: to see whether it works
    #[arg(long)]
    quick: bool,
}

/// All figures of a run.
#[derive(Debug, Serialize)]
struct All<'a> {
    compare: &'a Compare,
    downtime: &'a Downtime,
}

pub(super) fn main(args: &Args) -> anyhow::Result<ExitCode> {
    // What can't be drawn is better known before the measuring than after it.
    Painter::new()?;
    std::fs::create_dir_all(&args.out)?;
    let site = Site::make()?;
    let time = Duration::from_secs_f64(args.minutes.max(0.0) * 60.0);
    let rounds = if args.quick { 1 } else { ROUNDS };
    let began = Instant::now();
    let timeline = timeline::run(&site, &Engine::ALL, MARGIN, TIMELINE_MB)?;
    let compare = compare::run(&site, rounds, time.mul_f64(COMPARE_SHARE), args.quick)?;
    let points = downtime::points(args.quick);
    let least = if args.quick { 1 } else { LEAST_MOVES };
    let downtime = downtime::run(&site, &Engine::ALL, points, least..=rounds, time.saturating_sub(began.elapsed()))?;
    drop(site);
    crate::cli::print(&format!("{}\n{}\n{}\n", compare.text(), downtime.text(), timeline.text()))?;
    write(&args.out, &compare, &downtime, &timeline)?;
    eprintln!("wrote {}", args.out.join("results.md").display());
    let failed = [&timeline.failed, &compare.failed, &downtime.failed];
    let failed: Vec<&String> = failed.into_iter().flatten().collect();
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("the page lacks what failed:");
    failed.iter().for_each(|failure| eprintln!("  {failure}"));
    Ok(ExitCode::FAILURE)
}

fn write(out: &Path, compare: &Compare, downtime: &Downtime, timeline: &Timeline) -> anyhow::Result<()> {
    let sections: Vec<_> =
        [compare.sections(), downtime.sections(), timeline.sections()].into_iter().flatten().collect();
    let machine = compare.machine.line();
    let head = format!(
        "Every figure on this page comes from one run of `make results` ({:.1} minutes), which rewrites it.\n\n\
         Measured on one machine: {machine}. Nodes, client and switch are network namespaces of it and share its processors, so \
         ratios say more than sizes. The same with its pictures in one file: [results.html](results.html); the figures: \
         [results.json](results.json).",
        (compare.seconds + downtime.seconds) / 60.0
    );
    report::write_markdown(&out.join("results.md"), "pictures", TITLE, &head, &sections)?;
    report::save(&out.join("results.html"), report::page(TITLE, &machine, &sections).as_bytes())?;
    let json = serde_json::to_string_pretty(&All { compare, downtime })? + "\n";
    report::save(&out.join("results.json"), json.as_bytes())
}
