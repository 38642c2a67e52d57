//! The comparison's results and how they are shown.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::measure::{Cost, Figure};
use super::{Collected, STACKS, TESTS, Test};
use crate::bench::figures::{Spread, rounded};
use crate::bench::machine::Machine;
use crate::bench::output::{Results, csv_line};
use crate::bench::report::Section;
use crate::bench::site::Site;
use crate::bench::stack::Stack;

/// What `--json` prints.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::bench) struct Compare {
    pub(in crate::bench) runs: Vec<Run>,
    /// Bytes of bulk streams' measurements that passed the home node's uplink, both ways, over all rounds.
    pub(in crate::bench) home_bytes: BTreeMap<String, u64>,
    /// Bytes that these measurements delivered.
    pub(in crate::bench) delivered_bytes: BTreeMap<String, u64>,
    /// Processor time of the home node's processes in them, in seconds per gigabyte delivered.
    pub(in crate::bench) home_cpu_s_per_gb: BTreeMap<String, f64>,
    /// What could not be measured, and why.
    pub(in crate::bench) unavailable: Vec<Unavailable>,
    /// Measurements that failed, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(in crate::bench) failed: Vec<String>,
    pub(in crate::bench) seconds: f64,
    pub(in crate::bench) machine: Machine,
}

/// A test on a stack, in `unit`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::bench) struct Run {
    pub(in crate::bench) stack: Stack,
    pub(in crate::bench) test: Test,
    pub(in crate::bench) streams: u32,
    pub(in crate::bench) unit: String,
    #[serde(flatten)]
    pub(in crate::bench) spread: Spread,
    /// How many times it was measured: once a round, or twice.
    pub(in crate::bench) rounds: usize,
    /// Of `rr`: the median of the rounds' 99th percentiles.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::bench) p99: Option<f64>,
    /// Of streams: processor time of the whole machine (both ends, the switch, softirqs) in seconds per gigabyte delivered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::bench) cpu_s_per_gb: Option<Spread>,
    /// Connections that failed, over all rounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::bench) errors: Option<u64>,
}

/// A stack, or one test on it, that could not be measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::bench) struct Unavailable {
    pub(in crate::bench) stack: Stack,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::bench) test: Option<Test>,
    pub(in crate::bench) reason: String,
}

impl Compare {
    pub(super) fn new(site: &Site, collected: Collected, took: Duration) -> Compare {
        let Collected { figures, missing, failed } = collected;
        let mut runs = Vec::new();
        for (test, streams) in TESTS {
            for stack in STACKS {
                let of_these: Vec<Figure> = figures
                    .iter()
                    .filter(|entry| (entry.0, entry.1, entry.2) == (stack, test, streams))
                    .map(|entry| entry.3)
                    .collect();
                runs.extend(Run::of(stack, test, streams, &of_these));
            }
        }
        let mut compare = Compare {
            runs,
            home_bytes: BTreeMap::new(),
            delivered_bytes: BTreeMap::new(),
            home_cpu_s_per_gb: BTreeMap::new(),
            unavailable: missing.into_iter().map(|(stack, test, reason)| Unavailable { stack, test, reason }).collect(),
            failed,
            seconds: rounded(took.as_secs_f64()),
            machine: Machine::look(site),
        };
        for stack in [Stack::MigdMoved, Stack::HomeRouted] {
            let costs: Vec<Cost> =
                figures.iter().filter(|entry| entry.0 == stack).filter_map(|entry| entry.3.cost).collect();
            if costs.is_empty() {
                continue;
            }
            let name = || stack.name().to_owned();
            let delivered: f64 = costs.iter().map(|cost| cost.bytes).sum();
            compare.home_bytes.insert(name(), costs.iter().map(|cost| cost.home_bytes).sum());
            // Far below 2^63.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            compare.delivered_bytes.insert(name(), delivered as u64);
            let home_s: f64 = costs.iter().map(|cost| cost.home_s).sum();
            compare.home_cpu_s_per_gb.insert(name(), rounded(home_s / (delivered / 1e9)));
        }
        compare
    }

    /// The run of these, if it was measured.
    pub(in crate::bench) fn run(&self, stack: Stack, test: Test, streams: u32) -> Option<&Run> {
        self.runs.iter().find(|run| (run.stack, run.test, run.streams) == (stack, test, streams))
    }
}

impl Run {
    fn of(stack: Stack, test: Test, streams: u32, figures: &[Figure]) -> Option<Run> {
        if figures.is_empty() {
            return None;
        }
        let spread_of = |values: Vec<f64>| (!values.is_empty()).then(|| Spread::of(values));
        let cost = |cost: Cost| cost.machine_s / (cost.bytes / 1e9);
        let errors: u64 = figures.iter().map(|figure| figure.errors).sum();
        Some(Run {
            stack,
            test,
            streams,
            unit: test.unit().to_owned(),
            spread: Spread::of(figures.iter().map(|figure| figure.value).collect()),
            rounds: figures.len(),
            p99: spread_of(figures.iter().filter_map(|figure| figure.p99).collect()).map(|spread| spread.median),
            cpu_s_per_gb: spread_of(figures.iter().filter_map(|figure| figure.cost).map(cost).collect()),
            errors: (errors > 0).then_some(errors),
        })
    }
}

impl Results for Compare {
    fn sections(&self) -> Vec<Section> {
        vec![self.section()]
    }

    fn machine(&self) -> &Machine {
        &self.machine
    }

    fn text(&self) -> String {
        let mut out = String::new();
        for (test, streams) in TESTS {
            let runs: Vec<&Run> = self.runs.iter().filter(|run| (run.test, run.streams) == (test, streams)).collect();
            if runs.is_empty() {
                continue;
            }
            let _ = writeln!(
                out,
                "\n{:<22} {:>10} {:>10} {:>10}  {}",
                format!("{} x{streams}", test.name()),
                "MEDIAN",
                "MIN",
                "MAX",
                test.unit()
            );
            for run in runs {
                let Spread { median, min, max } = run.spread;
                let _ = write!(out, "  {:<20} {median:>10.2} {min:>10.2} {max:>10.2}", run.stack.name());
                if let Some(p99) = run.p99 {
                    let _ = write!(out, "  p99 {p99:.1} us");
                }
                if let Some(cost) = run.cpu_s_per_gb {
                    let _ = write!(out, "  {:.2} CPU s/GB", cost.median);
                }
                if let Some(errors) = run.errors {
                    let _ = write!(out, "  {errors} connections FAILED");
                }
                let _ = writeln!(out);
            }
        }
        let _ = writeln!(out);
        for (stack, bytes) in &self.home_bytes {
            let delivered = self.delivered_bytes.get(stack).copied().unwrap_or_default();
            let cpu = self.home_cpu_s_per_gb.get(stack).copied().unwrap_or_default();
            let _ = writeln!(
                out,
                "{stack}: {bytes} bytes on the home node's link for {delivered} delivered; {cpu} CPU s/GB of its processes"
            );
        }
        for Unavailable { stack, test, reason } in &self.unavailable {
            let test = test.map_or(String::new(), |test| format!(", {}", test.name()));
            let _ = writeln!(out, "not available: {}{test}: {reason}", stack.name());
        }
        for failure in &self.failed {
            let _ = writeln!(out, "FAILED: {failure}");
        }
        let most = self.runs.iter().map(|run| run.rounds).max().unwrap_or(0);
        let _ = writeln!(out, "up to {most} measurements of each in {:.0} s on {}", self.seconds, self.machine.line());
        out
    }

    fn csv(&self) -> String {
        let header = "stack,test,streams,unit,median,min,max,rounds,p99,cpu_s_per_gb\n".to_owned();
        let line = |run: &Run| {
            let optional = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
            csv_line(&[
                run.stack.name().to_owned(),
                run.test.name().to_owned(),
                run.streams.to_string(),
                run.unit.clone(),
                run.spread.median.to_string(),
                run.spread.min.to_string(),
                run.spread.max.to_string(),
                run.rounds.to_string(),
                optional(run.p99),
                optional(run.cpu_s_per_gb.map(|spread| spread.median)),
            ])
        };
        header + &self.runs.iter().map(line).collect::<String>()
    }
}
