//! The comparison's part of a report.

use super::report::{Compare, Run, Unavailable};
use super::{STACKS, TESTS, Test};
use crate::bench::chart::{Bar, Chart, Panel, colour, figure, panels};
use crate::bench::figures::Spread;
use crate::bench::report::{Section, Table};
use crate::bench::stack::Stack;

/// The tests of bulk streams, in the order of the panels.
const BULK: [(Test, u32); 4] =
    [(Test::BulkSend, 1), (Test::BulkReceive, 1), (Test::BulkSend, 8), (Test::BulkReceive, 8)];

impl Compare {
    /// As a section.
    pub(in crate::bench) fn section(&self) -> Section {
        let small =
            TESTS.iter().copied().filter(|(test, _)| matches!(test, Test::Rr | Test::RedisBenchmark | Test::Connect));
        let throughput: Vec<Panel> = BULK.iter().filter_map(|&(test, n)| self.panel(test, n)).collect();
        let mut requests: Vec<Panel> = small.filter_map(|(test, n)| self.panel(test, n)).collect();
        requests.extend(self.p99_panel());
        let cost: Vec<Panel> = BULK.iter().filter_map(|&(test, n)| self.cost_panel(test, n)).collect();
        let chart = |name, caption: &str, title: &str, of: &[Panel]| Chart {
            name,
            caption: caption.to_owned(),
            svg: panels(title, of),
        };
        Section {
            title: "Handing the sockets off, routing them home, or never moving".to_owned(),
            intro: "The same programs on every stack, in one lab of network namespaces, in rounds that go over all stacks one right \
                    after the other. migd: a job before any move. migd-moved: after a direct move that the connections lived \
                    through. home-routed: after a move that left the sockets on the first node. smoltcp: its own TCP over a \
                    TUN device. criu: a plain process after dump and restore, which is the kernel's TCP on the other node. Bulk streams of migd \
                    are measured before and after the move of the same job, two jobs a round. Whiskers are the least and the most of \
                    the measurements."
                .to_owned(),
            charts: vec![
                chart("throughput", "Bulk streams in both directions.", "Bulk throughput", &throughput),
                chart("requests", "Requests, responses and new connections.", "Requests and connections", &requests),
                chart("cost", "What a delivered gigabyte costs the whole machine.", "Processor time of a gigabyte", &cost),
            ],
            tables: vec![self.table(), self.home_table()],
            notes: self.notes(),
        }
    }

    fn bars(&self, test: Test, streams: u32, of: impl Fn(&Run) -> Option<Spread>) -> Vec<Bar> {
        let bar = |stack: Stack| {
            let Spread { median, min, max } = of(self.run(stack, test, streams)?)?;
            Some(Bar { label: stack.name().to_owned(), colour: colour(stack), value: median, min, max })
        };
        STACKS.into_iter().filter_map(bar).collect()
    }

    fn panel(&self, test: Test, streams: u32) -> Option<Panel> {
        let bars = self.bars(test, streams, |run| Some(run.spread));
        let better = if test == Test::Rr { "less is better" } else { "more is better" };
        let unit = if test == Test::Rr { "microseconds, median" } else { test.unit() };
        let subtitle = format!("{unit}; {better}");
        (!bars.is_empty()).then(|| Panel { title: title(test, streams), subtitle, bars, note: self.missing(test) })
    }

    fn p99_panel(&self) -> Option<Panel> {
        let single = |value: f64| Spread { median: value, min: value, max: value };
        let bars = self.bars(Test::Rr, 1, |run| run.p99.map(single));
        (!bars.is_empty()).then(|| Panel {
            title: "Request and response, the slowest hundredth".to_owned(),
            subtitle: "microseconds, 99th percentile; less is better".to_owned(),
            bars,
            note: self.missing(Test::Rr),
        })
    }

    fn cost_panel(&self, test: Test, streams: u32) -> Option<Panel> {
        let bars = self.bars(test, streams, |run| run.cpu_s_per_gb);
        (!bars.is_empty()).then(|| Panel {
            title: title(test, streams),
            subtitle: "processor seconds a gigabyte; less is better".to_owned(),
            bars,
            note: self.missing(test),
        })
    }

    fn missing(&self, test: Test) -> String {
        let of_this = |one: &&Unavailable| one.test.is_none_or(|which| which == test);
        let mut names: Vec<_> = self.unavailable.iter().filter(of_this).map(|one| one.stack).collect();
        names.retain(|&stack| !self.runs.iter().any(|run| (run.stack, run.test) == (stack, test)));
        names.sort();
        names.dedup();
        let names: Vec<_> = names.into_iter().map(Stack::name).collect();
        if names.is_empty() { String::new() } else { format!("not available: {}", names.join(", ")) }
    }

    fn table(&self) -> Table {
        let row = |run: &Run| {
            let Spread { median, min, max } = run.spread;
            let kernel = self.run(Stack::Kernel, run.test, run.streams).map(|kernel| kernel.spread.median);
            let optional = |value: Option<f64>| value.map_or(String::new(), figure);
            vec![
                title(run.test, run.streams),
                run.stack.name().to_owned(),
                run.unit.clone(),
                figure(median),
                format!("{} to {}", figure(min), figure(max)),
                optional(kernel.map(|kernel| median / kernel)),
                optional(run.p99),
                optional(run.cpu_s_per_gb.map(|cost| cost.median)),
                run.rounds.to_string(),
            ]
        };
        let header = ["test", "stack", "unit", "median", "spread", "of the kernel's", "p99, us", "CPU s/GB", "times"];
        Table {
            title: "All figures".to_owned(),
            header: header.map(str::to_owned).into(),
            rows: self.runs.iter().map(row).collect(),
            words: 3,
        }
    }

    fn home_table(&self) -> Table {
        let row = |(stack, bytes): (&String, &u64)| {
            let delivered = self.delivered_bytes.get(stack).copied().unwrap_or_default();
            let cpu = self.home_cpu_s_per_gb.get(stack).copied().unwrap_or_default();
            vec![stack.clone(), delivered.to_string(), bytes.to_string(), figure(cpu)]
        };
        let header = ["stack", "bytes delivered", "bytes on the home node's link", "its processes' CPU s/GB"];
        Table {
            title: "What the home node still has to do after the move (bulk streams, all rounds)".to_owned(),
            header: header.map(str::to_owned).into(),
            rows: self.home_bytes.iter().map(row).collect(),
            words: 1,
        }
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = vec![
            "CPU s/GB is the busy time of all processors of the machine (user, system, interrupts, softirqs in /proc/stat), so both \
             ends, the switch and the client are in it, for each delivered gigabyte."
                .to_owned(),
            "Bytes on the home node's link: after a direct move the frames that carry the job's address (captured); home-routed, \
             all that the link's counters count, both ways."
                .to_owned(),
            "smoltcp serves the same protocol by its own sockets (4 MiB buffers, batches, no congestion control, no allocation per \
             packet). It knows no segmentation offload, so that each of its packets is of the link's 1500 bytes; its \
             connections per second are those of a fixed HTTP answer in the place of nginx."
                .to_owned(),
            "criu: images in memory seen by both nodes, the address moved by the benchmark, no packet filter while it is between."
                .to_owned(),
        ];
        notes.extend(self.note_on_relaying());
        for Unavailable { stack, test, reason } in &self.unavailable {
            let test = test.map_or(String::new(), |test| format!(", {}", test.name()));
            notes.push(format!("Not available: {}{test}: {reason}.", stack.name()));
        }
        notes.extend(self.failed.iter().map(|failure| format!("Failed: {failure}.")));
        notes
    }

    /// Why relaying costs what it costs here.
    fn note_on_relaying(&self) -> Option<String> {
        let ratios = |(test, streams): (Test, u32)| {
            let moved = self.run(Stack::MigdMoved, test, streams)?;
            let relayed = self.run(Stack::HomeRouted, test, streams)?;
            let cost = relayed.cpu_s_per_gb?.median / moved.cpu_s_per_gb?.median;
            let (rate, cost) = (figure(moved.spread.median / relayed.spread.median), figure(cost));
            Some(format!(
                "{}: {rate} times the rate, and relaying takes {cost} times the processor time",
                title(test, streams).to_lowercase()
            ))
        };
        let ratios: Vec<_> = BULK.into_iter().filter_map(ratios).collect();
        (!ratios.is_empty()).then(|| {
            format!(
                "A direct move against home-routed. {}. All nodes share one machine's processors, and the link between the \
                 nodes that relayed bytes take besides is a copy in its memory: it has no limit of its own, so that relaying shows mostly \
                 as the processor time that it takes.",
                ratios.join("; ")
            )
        })
    }
}

fn title(test: Test, streams: u32) -> String {
    match test {
        Test::BulkSend => format!("Sending, {}", counted(streams, "stream")),
        Test::BulkReceive => format!("Receiving, {}", counted(streams, "stream")),
        Test::Rr => "Request and response, one connection".to_owned(),
        Test::RedisBenchmark => format!("redis-benchmark, {}", counted(streams, "connection")),
        Test::Connect => format!("New connections (wrk, {streams} at a time)"),
    }
}

fn counted(count: u32, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}
