//! `migd bench throughput`.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;

use super::figures::Spread;
use super::programs::Program;
use super::site::Site;
use super::stack::Stack;
use super::stream::{Bulk, Direction};

/// Flow before each measurement, so that windows and buffers have grown.
const WARM_UP: Duration = Duration::from_millis(300);
const STACKS: [Stack; 4] = [Stack::Kernel, Stack::Migd, Stack::MigdMoved, Stack::Smoltcp];

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    runs: Vec<Run>,
}

#[derive(Debug, Serialize)]
struct Run {
    stack: Stack,
    direction: Direction,
    streams: u32,
    gbit_s: Spread,
}

/// What was measured of one combination.
struct Series {
    stack: Stack,
    direction: Direction,
    streams: u32,
    gbit_s: Vec<f64>,
}

pub(super) fn main(json: bool, rounds: u32, streams: &[u32], interval: Duration) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(rounds > 0 && !streams.is_empty(), "at least one round of one stream is needed");
    let bench = Bench { site: Site::make()?, interval };
    let combinations: Vec<_> = streams.iter().flat_map(|&n| [(n, Direction::Send), (n, Direction::Receive)]).collect();
    let mut all: Vec<Series> = Vec::new();
    for &(streams, direction) in &combinations {
        all.extend(STACKS.map(|stack| Series { stack, direction, streams, gbit_s: Vec::new() }));
    }
    for round in 1..=rounds {
        for &(streams, direction) in &combinations {
            let [kernel, before, after, smoltcp] = bench.round(direction, streams, round)?;
            let of_these = all.iter_mut().filter(|series| (series.streams, series.direction) == (streams, direction));
            for (series, figure) in of_these.zip([kernel, before, after, smoltcp]) {
                series.gbit_s.push(figure);
            }
            if !json {
                eprintln!(
                    "round {round}, {direction:?}, {streams} at once: kernel {kernel:.2}, migd {before:.2}, \
                     after the move {after:.2}, smoltcp {smoltcp:.2} Gbit/s",
                );
            }
        }
    }
    let run =
        |Series { stack, direction, streams, gbit_s }| Run { stack, direction, streams, gbit_s: Spread::of(gbit_s) };
    let report = Report { runs: all.into_iter().map(run).collect() };
    if json {
        crate::cli::print_json(&report)?;
    } else {
        report.print();
    }
    Ok(ExitCode::SUCCESS)
}

struct Bench {
    site: Site,
    interval: Duration,
}

impl Bench {
    /// Each stack once, in the order of [`STACKS`].
    fn round(&self, direction: Direction, streams: u32, round: u32) -> anyhow::Result<[f64; 4]> {
        let kernel = self.resting(Stack::Kernel, direction, streams).context("kernel TCP")?;
        let (before, after) = self.moving(direction, streams, round).context("migd")?;
        let smoltcp = self.resting(Stack::Smoltcp, direction, streams).context("smoltcp")?;
        Ok([kernel, before, after, smoltcp])
    }

    /// The peer on a stack that stays where it is.
    fn resting(&self, stack: Stack, direction: Direction, streams: u32) -> anyhow::Result<f64> {
        let server = self.site.start(stack, "", Program::Peer)?;
        self.measure(&Bulk::start(&self.site.client()?, server.address(), direction, streams)?)
    }

    /// The peer as a job: before and after a move that the streams live through.
    fn moving(&self, direction: Direction, streams: u32, round: u32) -> anyhow::Result<(f64, f64)> {
        let name = format!("peer-{direction:?}-{streams}-{round}").to_lowercase();
        let mut server = self.site.start(Stack::Migd, &name, Program::Peer)?;
        let bulk = Bulk::start(&self.site.client()?, server.address(), direction, streams)?;
        let before = self.measure(&bulk)?;
        server.move_away()?;
        let after = self.measure(&bulk)?;
        Ok((before, after))
    }

    fn measure(&self, bulk: &Bulk) -> anyhow::Result<f64> {
        self.site.sleep(WARM_UP)?;
        let figure = bulk.measure(self.interval);
        self.site.check()?;
        figure
    }
}

impl Report {
    fn print(&self) {
        let mut out = std::io::stdout().lock();
        // Whoever closed the output does not want to read it.
        let _ = writeln!(
            out,
            "\n{:<12} {:<9} {:>7} {:>8} {:>8} {:>8}  Gbit/s",
            "STACK", "DIRECTION", "STREAMS", "MEDIAN", "MIN", "MAX"
        );
        for Run { stack, direction, streams, gbit_s: Spread { median, min, max } } in &self.runs {
            let (stack, direction) = (stack.name(), format!("{direction:?}").to_lowercase());
            let _ = writeln!(out, "{stack:<12} {direction:<9} {streams:>7} {median:>8.2} {min:>8.2} {max:>8.2}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_form_is_the_promised_one() {
        let gbit_s = Spread { median: 1.0, min: 1.0, max: 1.0 };
        let run = Run { stack: Stack::MigdMoved, direction: Direction::Receive, streams: 1, gbit_s };
        let text = serde_json::to_string(&Report { runs: vec![run] }).expect("plain data");
        let expected = r#"{"runs":[{"stack":"migd-moved","direction":"receive","streams":1,"#.to_owned()
            + r#""gbit_s":{"median":1.0,"min":1.0,"max":1.0}}]}"#;
        assert_eq!(text, expected);
    }
}
