//! `migd bench throughput`.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;

use super::stream::{Direction, Stream};
use crate::demo::Interrupt;
use crate::lab::{Lab, Spec, own_name, remove_abandoned};

const NAME: &str = "bench";
const PORT: u16 = 5301;
/// Flow before each measurement, so that windows and buffers have grown.
const WARM_UP: Duration = Duration::from_millis(300);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Stack {
    Kernel,
    Migd,
    MigdMoved,
}

impl Stack {
    fn name(self) -> &'static str {
        match self {
            Stack::Kernel => "kernel",
            Stack::Migd => "migd",
            Stack::MigdMoved => "migd-moved",
        }
    }
}

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

/// A figure over the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    /// Of at least one figure.
    fn of(mut figures: Vec<f64>) -> Spread {
        figures.sort_by(f64::total_cmp);
        let middle = figures.len() / 2;
        let median =
            if figures.len() % 2 == 1 { figures[middle] } else { f64::midpoint(figures[middle - 1], figures[middle]) };
        let digits = |figure: f64| (figure * 1000.0).round() / 1000.0;
        Spread { median: digits(median), min: digits(figures[0]), max: digits(figures[figures.len() - 1]) }
    }
}

pub(super) fn main(json: bool, rounds: u32, interval: Duration) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(rounds > 0, "at least one round is needed");
    let interrupt = Interrupt::watch()?;
    remove_abandoned(NAME);
    let bench = Bench { lab: Lab::up(&Spec::new(own_name(NAME))?)?, interval, interrupt };
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
    lab: Lab,
    interval: Duration,
    interrupt: Interrupt,
}

impl Bench {
    /// The peer as a plain process on node A.
    fn kernel(&self, direction: Direction) -> anyhow::Result<f64> {
        let node = self.lab.layout().member("A").context("the lab has no node A")?;
        let server = SocketAddr::new(IpAddr::V4(node.address), PORT);
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "peer", "--port", &PORT.to_string()]).stdin(Stdio::null()).stdout(Stdio::null());
        let _peer = Killed(self.lab.namespace("A")?.run(|| command.spawn())?);
        let stream = Stream::start(&self.lab.namespace("client1")?, server, direction)?;
        self.measure(&stream)
    }

    /// The peer as a job: before and after a move that the stream lives through.
    fn migd(&self, direction: Direction, round: u32) -> anyhow::Result<(f64, f64)> {
        let program = std::env::current_exe()?.display().to_string();
        let name = format!("peer-{direction:?}-{round}").to_lowercase();
        let job = self.lab.run("A", &name, &[&program, "bench", "peer", "--port", &PORT.to_string()])?;
        let server = SocketAddr::new(IpAddr::V4(job.address), PORT);
        let stream = Stream::start(&self.lab.namespace("client1")?, server, direction)?;
        let before = self.measure(&stream)?;
        self.lab.move_job(&name, "A", "B")?;
        let after = self.measure(&stream)?;
        drop(stream);
        self.lab.kill("B", &name)?;
        Ok((before, after))
    }

    fn measure(&self, stream: &Stream) -> anyhow::Result<f64> {
        self.interrupt.sleep(WARM_UP)?;
        let figure = stream.measure(self.interval);
        self.interrupt.check()?;
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

/// A process that ends with this value.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Both fail only when it ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_are_of_the_sorted_figures() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]), Spread { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(Spread::of(vec![1.23456]), Spread { median: 1.235, min: 1.235, max: 1.235 });
    }

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
