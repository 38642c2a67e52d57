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
use super::stream::{Direction, Stream};

/// Flow before each measurement, so that windows and buffers have grown.
const WARM_UP: Duration = Duration::from_millis(300);

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

pub(super) fn main(json: bool, rounds: u32, interval: Duration) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(rounds > 0, "at least one round is needed");
    let bench = Bench { site: Site::make()?, interval };
    let mut figures: Vec<(Stack, Direction, Vec<f64>)> = Vec::new();
    for stack in [Stack::Kernel, Stack::Migd, Stack::MigdMoved] {
        for direction in [Direction::Send, Direction::Receive] {
            figures.push((stack, direction, Vec::new()));
        }
    }
    for round in 0..rounds {
        for direction in [Direction::Send, Direction::Receive] {
            let kernel = bench.kernel(direction).context("kernel TCP")?;
            let (before, after) = bench.migd(direction, round).context("migd")?;
            for (stack, figure) in [(Stack::Kernel, kernel), (Stack::Migd, before), (Stack::MigdMoved, after)] {
                let of_both = |entry: &&mut (Stack, Direction, Vec<f64>)| entry.0 == stack && entry.1 == direction;
                if let Some(entry) = figures.iter_mut().find(of_both) {
                    entry.2.push(figure);
                }
            }
            if !json {
                eprintln!(
                    "round {}, {direction:?}: kernel {kernel:.2}, migd {before:.2}, after the move {after:.2} Gbit/s",
                    round + 1
                );
            }
        }
    }
    let run = |(stack, direction, figures)| Run { stack, direction, streams: 1, gbit_s: Spread::of(figures) };
    let report = Report { runs: figures.into_iter().map(run).collect() };
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
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
    /// The peer as a plain process on node A.
    fn kernel(&self, direction: Direction) -> anyhow::Result<f64> {
        let server = self.site.start(Stack::Kernel, "", Program::Peer)?;
        let stream = Stream::start(&self.site.client()?, server.address(), direction)?;
        self.measure(&stream)
    }

    /// The peer as a job: before and after a move that the stream lives through.
    fn migd(&self, direction: Direction, round: u32) -> anyhow::Result<(f64, f64)> {
        let name = format!("peer-{direction:?}-{round}").to_lowercase();
        let mut server = self.site.start(Stack::Migd, &name, Program::Peer)?;
        let stream = Stream::start(&self.site.client()?, server.address(), direction)?;
        let before = self.measure(&stream)?;
        server.move_away()?;
        let after = self.measure(&stream)?;
        Ok((before, after))
    }

    fn measure(&self, stream: &Stream) -> anyhow::Result<f64> {
        self.site.sleep(WARM_UP)?;
        let figure = stream.measure(self.interval);
        self.site.check()?;
        figure
    }
}

impl Report {
    fn print(&self) {
        let mut out = std::io::stdout().lock();
        // Whoever closed the output does not want to read it.
        let _ = writeln!(out, "\n{:<12} {:<9} {:>8} {:>8} {:>8}  Gbit/s", "STACK", "DIRECTION", "MEDIAN", "MIN", "MAX");
        for Run { stack, direction, gbit_s: Spread { median, min, max }, .. } in &self.runs {
            let (stack, direction) = (stack.name(), format!("{direction:?}").to_lowercase());
            let _ = writeln!(out, "{stack:<12} {direction:<9} {median:>8.2} {min:>8.2} {max:>8.2}");
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
