//! `migd bench rr`: request and response, many small requests, new connections; kernel TCP and migd in turn.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;

use super::figures::Spread;
use super::latency::{Exchange, Latency};
use super::programs::Program;
use super::site::Site;
use super::stack::Stack;
use super::tools::{redis_benchmark, wrk_connects};

/// Requests of each kind in a run of redis-benchmark.
const REQUESTS: u32 = 50_000;
/// How long wrk runs.
const CONNECT_SECONDS: u64 = 1;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Test {
    Rr,
    RedisBenchmark,
    Connect,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    runs: Vec<Run>,
}

/// A test on a stack: `median_us` and `p99_us` of `rr`, `per_s` of the others; with the least and the most of the rounds.
#[derive(Debug, Serialize)]
struct Run {
    stack: Stack,
    test: Test,
    #[serde(skip_serializing_if = "Option::is_none")]
    median_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    p99_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    per_s: Option<f64>,
    min: f64,
    max: f64,
    rounds: usize,
    /// Connections that failed, over all rounds.
    #[serde(skip_serializing_if = "is_zero")]
    errors: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde wants it so
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// What was measured on one stack.
#[derive(Debug, Default)]
struct Series {
    median_us: Vec<f64>,
    p99_us: Vec<f64>,
    redis_per_s: Vec<f64>,
    connects_per_s: Vec<f64>,
    connect_errors: u64,
}

pub(super) fn main(json: bool, rounds: u32, interval: Duration) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(rounds > 0, "at least one round is needed");
    let site = Site::make()?;
    let mut kernel = Series::default();
    let mut migd = Series::default();
    for round in 1..=rounds {
        for (stack, series) in [(Stack::Kernel, &mut kernel), (Stack::Migd, &mut migd)] {
            series.add(&site, stack, round, interval).with_context(|| format!("{}, round {round}", stack.name()))?;
            if !json {
                eprintln!("round {round}, {}: {}", stack.name(), series.latest());
            }
        }
    }
    let report = Report { runs: kernel.runs(Stack::Kernel).into_iter().chain(migd.runs(Stack::Migd)).collect() };
    if json {
        crate::cli::print_json(&report)?;
    } else {
        report.print();
    }
    Ok(ExitCode::SUCCESS)
}

impl Series {
    /// One round: each test with a server started for it.
    fn add(&mut self, site: &Site, stack: Stack, round: u32, interval: Duration) -> anyhow::Result<()> {
        let client = site.client()?;
        let server = site.start(stack, &format!("rr-{round}"), Program::Peer)?;
        let Latency { median_us, p99_us } = Exchange::open(&client, server.address())?.measure(interval)?;
        self.median_us.push(median_us);
        self.p99_us.push(p99_us);
        drop(server);
        site.check()?;

        let server = site.start(stack, &format!("redis-{round}"), Program::Redis)?;
        site.wait_until_it_serves(server.address())?;
        self.redis_per_s.push(redis_benchmark(&client, server.address(), REQUESTS)?);
        drop(server);
        site.check()?;

        let server = site.start(stack, &format!("nginx-{round}"), Program::Nginx)?;
        site.wait_until_it_serves(server.address())?;
        let connects = wrk_connects(&client, server.address(), CONNECT_SECONDS)?;
        self.connects_per_s.push(connects.per_s);
        self.connect_errors += connects.errors;
        drop(server);
        site.check()
    }

    fn latest(&self) -> String {
        let last = |figures: &[f64]| figures.last().copied().unwrap_or_default();
        format!(
            "rr {:.1} us (p99 {:.1}), redis-benchmark {:.0}/s, connect {:.0}/s",
            last(&self.median_us),
            last(&self.p99_us),
            last(&self.redis_per_s),
            last(&self.connects_per_s)
        )
    }

    fn runs(self, stack: Stack) -> [Run; 3] {
        let rounds = self.median_us.len();
        let rate = |test, per_s: Vec<f64>, errors| {
            let Spread { median, min, max } = Spread::of(per_s);
            Run { stack, test, median_us: None, p99_us: None, per_s: Some(median), min, max, rounds, errors }
        };
        let Spread { median, min, max } = Spread::of(self.median_us);
        let p99_us = Some(Spread::of(self.p99_us).median);
        [
            Run { stack, test: Test::Rr, median_us: Some(median), p99_us, per_s: None, min, max, rounds, errors: 0 },
            rate(Test::RedisBenchmark, self.redis_per_s, 0),
            rate(Test::Connect, self.connects_per_s, self.connect_errors),
        ]
    }
}

impl Report {
    fn print(&self) {
        // Whoever closed the output does not want to read it.
        let _ = self.write(&mut std::io::stdout().lock());
    }

    fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(out, "\n{:<16} {:<8} {:>10} {:>10} {:>10}", "TEST", "STACK", "MEDIAN", "MIN", "MAX")?;
        for test in [Test::Rr, Test::RedisBenchmark, Test::Connect] {
            for run in self.runs.iter().filter(|run| run.test == test) {
                let (name, unit) = match test {
                    Test::Rr => ("rr", "us"),
                    Test::RedisBenchmark => ("redis-benchmark", "requests/s"),
                    Test::Connect => ("connect", "connections/s"),
                };
                let median = run.median_us.or(run.per_s).unwrap_or_default();
                let Run { min, max, .. } = run;
                write!(out, "{name:<16} {:<8} {median:>10.1} {min:>10.1} {max:>10.1}  {unit}", run.stack.name())?;
                if let Some(p99) = run.p99_us {
                    write!(out, " (p99 {p99:.1})")?;
                }
                if run.errors > 0 {
                    write!(out, " ({} connections FAILED)", run.errors)?;
                }
                writeln!(out)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_form_is_the_promised_one() {
        let series = Series {
            median_us: vec![20.0],
            p99_us: vec![30.0],
            redis_per_s: vec![50_000.0],
            connects_per_s: vec![9_000.0],
            connect_errors: 0,
        };
        let text = serde_json::to_string(&Report { runs: series.runs(Stack::Migd).into() }).expect("plain data");
        let expected =
            r#"{"runs":[{"stack":"migd","test":"rr","median_us":20.0,"p99_us":30.0,"min":20.0,"max":20.0,"rounds":1},"#
                .to_owned()
                + r#"{"stack":"migd","test":"redis-benchmark","per_s":50000.0,"min":50000.0,"max":50000.0,"rounds":1},"#
                + r#"{"stack":"migd","test":"connect","per_s":9000.0,"min":9000.0,"max":9000.0,"rounds":1}]}"#;
        assert_eq!(text, expected);
    }
}
