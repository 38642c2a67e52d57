//! How the downtimes are shown.

use std::fmt::Write as _;

use super::{Downtime, Engine, Run};
use crate::bench::chart::{Axis, Chart, Lines, Point, Series, Style, figure};
use crate::bench::figures::Spread;
use crate::bench::machine::Machine;
use crate::bench::output::{Results, csv_line};
use crate::bench::report::{Section, Table};

impl Results for Downtime {
    fn sections(&self) -> Vec<Section> {
        vec![self.section()]
    }

    fn machine(&self) -> &Machine {
        &self.machine
    }

    fn text(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(
            out,
            "\n{:<7} {:>9} {:>10} {:>12} {:>10} {:>10} {:>10}  STALL, ms; parts",
            "ENGINE", "MEMORY MB", "WRITE MB/S", "CONNECTIONS", "MEDIAN", "MIN", "MAX"
        );
        for run in &self.runs {
            let Spread { median, min, max } = run.stall_ms;
            let parts = run.phases_ms.iter().filter(|(_, ms)| *ms >= 0.05);
            let parts: Vec<_> = parts.map(|(name, ms)| format!("{name} {ms:.1}")).collect();
            let _ = writeln!(
                out,
                "{:<7} {:>9} {:>10} {:>12} {median:>10.1} {min:>10.1} {max:>10.1}  {}",
                run.engine.name(),
                run.resident_mb,
                run.dirty_mb_s,
                run.connections,
                parts.join(", ")
            );
        }
        for reason in &self.unavailable {
            let _ = writeln!(out, "not available: {reason}");
        }
        for failure in &self.failed {
            let _ = writeln!(out, "FAILED: {failure}");
        }
        let rounds = self.runs.iter().map(|run| run.rounds).max().unwrap_or(0);
        let _ = writeln!(out, "{rounds} rounds in {:.0} s on {}", self.seconds, self.machine.line());
        out
    }

    fn csv(&self) -> String {
        let header = "engine,resident_mb,dirty_mb_s,connections,median_ms,min_ms,max_ms,rounds,phases\n".to_owned();
        let line = |run: &Run| {
            let phases: Vec<_> = run.phases_ms.iter().map(|(name, ms)| format!("{name}={ms}")).collect();
            csv_line(&[
                run.engine.name().to_owned(),
                run.resident_mb.to_string(),
                run.dirty_mb_s.to_string(),
                run.connections.to_string(),
                run.stall_ms.median.to_string(),
                run.stall_ms.min.to_string(),
                run.stall_ms.max.to_string(),
                run.rounds.to_string(),
                phases.join(";"),
            ])
        };
        header + &self.runs.iter().map(line).collect::<String>()
    }
}

impl Downtime {
    fn section(&self) -> Section {
        let idle = |run: &Run| run.dirty_mb_s == 0 && run.connections == 1;
        let crowd = |run: &Run| run.resident_mb == 1 && run.dirty_mb_s == 0;
        let memory = self.runs.iter().filter(|run| run.dirty_mb_s > 0).map(|run| run.resident_mb).max().unwrap_or(0);
        let written = |run: &Run| run.resident_mb == memory && run.connections == 1;
        let charts = [
            self.chart(
                "downtime-memory",
                "How long a client waits over a move, against the server's memory at rest",
                ("memory of the server, MB", true),
                idle,
                |run| run.resident_mb,
            ),
            self.chart(
                "downtime-written",
                &format!("How long a client waits over a move of {memory} MB, against how fast it is written"),
                ("memory written, MB/s", false),
                written,
                |run| run.dirty_mb_s,
            ),
            self.chart(
                "downtime-connections",
                "How long a client waits over a move, against established connections",
                ("connections", true),
                crowd,
                |run| run.connections,
            ),
        ];
        Section {
            title: "How long a move is felt".to_owned(),
            intro: "A server with so much memory, of which it writes so much each second, and so many connections moves while a client \
                    exchanges a byte without pause over one of them. The stall is that client's longest exchange. Afterwards \
                    every other connection must still echo. The same server is moved by migd and by CRIU in turn."
                .to_owned(),
            charts: charts.into_iter().flatten().collect(),
            tables: vec![self.table()],
            notes: self.notes(),
        }
    }

    fn chart(
        &self,
        name: &'static str,
        title: &str,
        (axis, logarithmic): (&str, bool),
        wanted: impl Fn(&Run) -> bool,
        x: impl Fn(&Run) -> u32,
    ) -> Option<Chart> {
        let mut ticks: Vec<f64> = self.runs.iter().filter(|run| wanted(run)).map(|run| f64::from(x(run))).collect();
        ticks.sort_by(f64::total_cmp);
        ticks.dedup();
        let series = Engine::ALL.into_iter().map(|engine| {
            let of_this = self.runs.iter().filter(|run| run.engine == engine && wanted(run));
            let point = |run: &Run| {
                let Spread { median, min, max } = run.stall_ms;
                Point { x: f64::from(x(run)), y: median, min, max }
            };
            let mut points: Vec<Point> = of_this.map(point).collect();
            points.sort_by(|one, other| one.x.total_cmp(&other.x));
            Series { name: engine.name().to_owned(), colour: engine.colour(), style: Style::Marked, points }
        });
        let series: Vec<Series> = series.filter(|series| !series.points.is_empty()).collect();
        // One point is no line.
        if ticks.len() < 2 {
            return None;
        }
        let lines = Lines {
            title: title.to_owned(),
            x: Axis { name: axis.to_owned(), logarithmic, ticks },
            y: Axis { name: "longest wait, ms".to_owned(), logarithmic: true, ticks: Vec::new() },
            series,
            shade: None,
        };
        Some(Chart { name, caption: format!("{title}. The axis of the wait is logarithmic."), svg: lines.draw() })
    }

    fn table(&self) -> Table {
        let row = |run: &Run| {
            let Spread { median, min, max } = run.stall_ms;
            let parts = run.phases_ms.iter().filter(|(_, ms)| *ms >= 0.05);
            let parts: Vec<_> = parts.map(|(name, ms)| format!("{name} {}", figure(*ms))).collect();
            vec![
                run.engine.name().to_owned(),
                parts.join(", "),
                run.resident_mb.to_string(),
                run.dirty_mb_s.to_string(),
                run.connections.to_string(),
                figure(median),
                format!("{} to {}", figure(min), figure(max)),
                figure(run.total_ms.median),
                run.rounds.to_string(),
            ]
        };
        let header = [
            "engine",
            "parts, ms (medians)",
            "memory, MB",
            "written, MB/s",
            "connections",
            "stall, ms",
            "spread",
            "whole move, ms",
            "rounds",
        ];
        Table {
            title: "All moves".to_owned(),
            header: header.map(str::to_owned).into(),
            rows: self.runs.iter().map(row).collect(),
            words: 2,
        }
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = vec![
            "Parts that begin with \"target\" are what the target did meanwhile, with the sockets while the source dumped; those that begin with \"criu\" are CRIU's \
             own statistics, inside of its dump and restore. \"first byte\" is what is left of the client's wait. \"machine stopped\" is how much of that \
             wait, whatever the part, no processor of the machine ran anything: a virtual machine's host did that."
                .to_owned(),
            "CRIU's image is written to memory that both nodes see, so nothing is transported; migd sends every byte over a TCP \
             connection between the nodes. CRIU copies nothing beforehand: the kernel lacks soft-dirty tracking."
                .to_owned(),
        ];
        notes.extend(self.unavailable.iter().map(|reason| format!("Not available: {reason}.")));
        notes.extend(self.failed.iter().map(|failure| format!("Failed: {failure}.")));
        notes
    }
}
