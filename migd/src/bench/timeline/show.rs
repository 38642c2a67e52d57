//! How the timelines are shown.

use std::fmt::Write as _;

use super::{BulkLine, RequestLine, Timeline};
use crate::bench::chart::{Axis, Chart, Lines, Point, Series, Style, figure};
use crate::bench::machine::Machine;
use crate::bench::output::{Results, csv_line};
use crate::bench::report::{Section, Table};
use crate::bench::stream::Direction;

/// Width of the bars on a terminal.
const BAR: usize = 50;
/// Requests are drawn as the longest in so many milliseconds: a picture has no room for each.
const BUCKET_MS: f64 = 2.0;

impl Results for Timeline {
    fn sections(&self) -> Vec<Section> {
        vec![self.section()]
    }

    fn machine(&self) -> &Machine {
        &self.machine
    }

    fn text(&self) -> String {
        let mut out = String::new();
        for line in &self.rr {
            let (median, longest) = line.summary();
            let _ = writeln!(
                out,
                "\n{}: {} requests, median {median:.1} us before the move; the longest took {:.1} ms; the move took {:.0} ms",
                line.engine.name(),
                line.requests.len(),
                longest / 1e3,
                line.move_ms[1] - line.move_ms[0]
            );
        }
        for line in &self.bulk {
            let direction = format!("{:?}", line.direction).to_lowercase();
            let _ = writeln!(
                out,
                "\n{}, bulk {direction}: nothing arrived in steps of {} ms together",
                line.engine.name(),
                line.silent_ms()
            );
            let most = line.gbit_s.iter().copied().fold(0.001, f64::max);
            for (index, rate) in line.gbit_s.iter().enumerate() {
                let at = index as u64 * line.step_ms;
                let during = line.move_ms[0] <= (at + line.step_ms) as f64 && at as f64 <= line.move_ms[1];
                // Far from the move nothing happens.
                if !(line.move_ms[0] - 100.0..line.move_ms[1] + 100.0).contains(&(at as f64)) {
                    continue;
                }
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                let bar = "#".repeat((rate / most * BAR as f64) as usize);
                let _ = writeln!(out, "{at:>6} ms {rate:>7.2} Gbit/s {} {bar}", if during { '>' } else { ' ' });
            }
        }
        for failure in &self.failed {
            let _ = writeln!(out, "FAILED: {failure}");
        }
        for reason in &self.unavailable {
            let _ = writeln!(out, "not available: {reason}");
        }
        let _ = writeln!(out, "on {}", self.machine.line());
        out
    }

    fn csv(&self) -> String {
        let mut out = "kind,engine,direction,at_ms,value,unit\n".to_owned();
        for line in &self.bulk {
            let direction = format!("{:?}", line.direction).to_lowercase();
            for (index, rate) in line.gbit_s.iter().enumerate() {
                let at = (index as u64 * line.step_ms).to_string();
                let engine = line.engine.name().to_owned();
                let fields = ["bulk".to_owned(), engine, direction.clone(), at, rate.to_string(), "Gbit/s".to_owned()];
                out += &csv_line(&fields);
            }
        }
        for line in &self.rr {
            for (at, us) in &line.requests {
                let engine = line.engine.name().to_owned();
                out += &csv_line(&[
                    "rr".to_owned(),
                    engine,
                    String::new(),
                    at.to_string(),
                    us.to_string(),
                    "us".to_owned(),
                ]);
            }
        }
        out
    }
}

impl Timeline {
    fn section(&self) -> Section {
        let memory = self.rr.first().map_or(0, |line| line.resident_mb);
        let mut charts = Vec::new();
        if !self.rr.is_empty() {
            let series: Vec<Series> = self.rr.iter().map(requests_of).collect();
            let title = format!("Latency over the move of a server of {memory} MB");
            charts.push(chart("timeline-requests", &title, "longest request, ms", true, series, self.shade()));
        }
        for (name, direction, verb) in
            [("timeline-send", Direction::Send, "sends"), ("timeline-receive", Direction::Receive, "receives")]
        {
            let lines = self.bulk.iter().filter(|line| line.direction == direction);
            let series: Vec<Series> = lines.map(rates_of).collect();
            if !series.is_empty() {
                let title = format!("Throughput over the move of a server that {verb}, in steps of 10 ms");
                charts.push(chart(name, &title, "Gbit/s", false, series, self.shade()));
            }
        }
        Section {
            title: "What clients see while it happens".to_owned(),
            intro:
                "One recording of each, with the request to move at zero; single steps depend on the machine's mood."
                    .to_owned(),
            charts,
            tables: vec![self.table()],
            notes: self
                .unavailable
                .iter()
                .map(|reason| format!("Not available: {reason}."))
                .chain(self.failed.iter().map(|failure| format!("Failed: {failure}.")))
                .collect(),
        }
    }

    /// The span of migd's own move, from its request to its end.
    fn shade(&self) -> Option<(f64, f64, String)> {
        let line = self.rr.iter().find(|line| line.engine == super::Engine::Migd)?;
        Some((0.0, line.move_ms[1] - line.move_ms[0], "migd: the whole move".to_owned()))
    }

    fn table(&self) -> Table {
        let request = |line: &RequestLine| {
            let (median, longest) = line.summary();
            let move_ms = line.move_ms[1] - line.move_ms[0];
            let what = format!("request and response, {} MB", line.resident_mb);
            let seen = format!("median {} us before; longest {} ms", figure(median), figure(longest / 1e3));
            vec![what, line.engine.name().to_owned(), seen, figure(move_ms)]
        };
        let bulk = |line: &BulkLine| {
            let what = format!("bulk, {}", format!("{:?}", line.direction).to_lowercase());
            let seen = format!("nothing arrived for {} ms in all", line.silent_ms());
            vec![what, line.engine.name().to_owned(), seen, figure(line.move_ms[1] - line.move_ms[0])]
        };
        Table {
            title: "The recordings".to_owned(),
            header: ["what", "engine", "seen", "whole move, ms"].map(str::to_owned).into(),
            rows: self.rr.iter().map(request).chain(self.bulk.iter().map(bulk)).collect(),
            words: 3,
        }
    }
}

fn chart(
    name: &'static str,
    title: &str,
    unit: &str,
    logarithmic: bool,
    series: Vec<Series>,
    shade: Option<(f64, f64, String)>,
) -> Chart {
    let lines = Lines {
        title: title.to_owned(),
        x: Axis { name: "milliseconds since the request to move".to_owned(), logarithmic: false, ticks: Vec::new() },
        y: Axis { name: unit.to_owned(), logarithmic, ticks: Vec::new() },
        series,
        shade,
    };
    Chart { name, caption: format!("{title}."), svg: lines.draw() }
}

/// The longest request of each bucket, at its middle; a request counts where it began.
fn requests_of(line: &RequestLine) -> Series {
    let mut points: Vec<Point> = Vec::new();
    let mut bucket = f64::NEG_INFINITY;
    for &(at, us) in &line.requests {
        let number = (at / BUCKET_MS).floor();
        match points.last_mut() {
            Some(last) if number <= bucket => last.y = last.y.max(us / 1e3),
            _ => {
                points.push(Point::single((number + 0.5) * BUCKET_MS - line.move_ms[0], us / 1e3));
                bucket = number;
            }
        }
    }
    let (name, colour) = (line.engine.name().to_owned(), line.engine.colour());
    Series { name, colour, style: Style::Dots, points }
}

fn rates_of(line: &BulkLine) -> Series {
    // A step's figure stands at its middle.
    let at = |index: usize| (index as f64 + 0.5) * line.step_ms as f64 - line.move_ms[0];
    let points = line.gbit_s.iter().enumerate().map(|(index, rate)| Point::single(at(index), *rate)).collect();
    let (name, colour) = (line.engine.name().to_owned(), line.engine.colour());
    Series { name, colour, style: Style::Line, points }
}
