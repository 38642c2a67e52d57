//! What the demonstration found out, as data and as text.

use std::io::Write;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::clients::{Counted, Downloaded, Operation};
use crate::api::MovePhase;
use crate::lab::Moved;

/// Length of one line of the timeline.
const SLOT: Duration = Duration::from_millis(250);
/// Width of the bar that shows operations per second.
const BAR: usize = 30;

/// The result of a demonstration.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The moves in order.
    pub moves: Vec<MoveReport>,
    /// Client connections that broke.
    pub connections_broken: u64,
    /// Acknowledged INCRs.
    pub ops: u64,
    /// Whether the counter in redis and every single reply agree with the number of acknowledged INCRs.
    pub counter_exact: bool,
    /// Whole downloads of the value.
    pub downloads: u64,
    /// Those with a wrong hash.
    pub hash_mismatches: u64,
    /// Whether the idle subscriber got the message published at the end.
    pub message_received: bool,
    /// Bytes from or to the job's address on the links of nodes that it had left, each from 200 ms after the move on.
    pub bytes_via_old_node: u64,
    /// The longest operation while nothing moved, for comparison.
    pub undisturbed_stall_ms: f64,
    /// The verdict.
    pub ok: bool,
}

/// One move.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MoveReport {
    /// Source node.
    pub from: String,
    /// Target node.
    pub to: String,
    /// From the last instruction on the source to the first on the target.
    pub downtime_ms: f64,
    /// The longest a client's operation took around the move.
    pub client_stall_ms: f64,
    /// From the request to its end.
    pub total_ms: f64,
    /// Bytes sent while the job ran.
    pub precopy_bytes: u64,
    /// Bytes sent while it stood.
    pub freeze_bytes: u64,
    /// Bytes through the old node from 200 ms after the move on.
    pub bytes_via_old_node: u64,
    /// The parts of the move.
    pub phases: Vec<PhaseReport>,
}

/// One part of a move.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PhaseReport {
    /// Its name.
    pub name: String,
    /// Its length.
    pub ms: f64,
    /// Bytes sent in it.
    pub bytes: u64,
}

impl MoveReport {
    /// Puts together what the shims and the client measured.
    pub(super) fn new(
        moved: &Moved,
        operations: &[Operation],
        settle: Duration,
        bytes_via_old_node: u64,
    ) -> MoveReport {
        let summary = &moved.summary;
        let phase = |phase: &MovePhase| PhaseReport {
            name: phase.name.clone(),
            ms: milliseconds(Duration::from_micros(phase.duration_us)),
            bytes: phase.bytes,
        };
        MoveReport {
            from: summary.from.clone(),
            to: summary.to.clone(),
            downtime_ms: milliseconds(Duration::from_micros(summary.downtime_us)),
            client_stall_ms: milliseconds(longest(operations, moved.began, moved.ended + settle)),
            total_ms: milliseconds(Duration::from_micros(summary.total_us)),
            precopy_bytes: summary.precopy_bytes,
            freeze_bytes: summary.freeze_bytes,
            bytes_via_old_node,
            phases: summary.phases.iter().map(phase).collect(),
        }
    }
}

/// How long the longest operation took that was under way at any time between `from` and `to`.
pub(super) fn longest(operations: &[Operation], from: Instant, to: Instant) -> Duration {
    longest_operation(operations, from, to).map(Operation::duration).unwrap_or_default()
}

/// The longest operation that was under way at any time between `from` and `to`.
pub(crate) fn longest_operation(operations: &[Operation], from: Instant, to: Instant) -> Option<&Operation> {
    let first = operations.partition_point(|operation| operation.ended < from);
    let within = operations[first..].iter().take_while(|operation| operation.began <= to);
    within.max_by_key(|operation| operation.duration())
}

pub(super) fn milliseconds(duration: Duration) -> f64 {
    // Three digits after the point: more would be noise.
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

impl Report {
    /// Prints the moves and the verdict.
    pub fn print_verdict(&self) {
        // Whoever closed the output does not want to read it.
        let _ = self.write_verdict(&mut std::io::stdout().lock());
    }

    fn write_verdict(&self, out: &mut impl Write) -> std::io::Result<()> {
        for (number, one) in (1..).zip(&self.moves) {
            writeln!(
                out,
                "\nmove {number}, {} -> {}: clients waited {:.1} ms at most, the server stood {:.1} ms, {:.0} ms in all; \
                 {} through {} from 200 ms after it on",
                one.from,
                one.to,
                one.client_stall_ms,
                one.downtime_ms,
                one.total_ms,
                bytes(one.bytes_via_old_node),
                one.from
            )?;
            for phase in &one.phases {
                writeln!(out, "    {:<12} {:>9.2} ms {:>12}", phase.name, phase.ms, bytes(phase.bytes))?;
            }
        }
        let verdict = |well: bool| if well { "ok  " } else { "FAIL" };
        let Report { connections_broken, ops, downloads, hash_mismatches, .. } = self;
        writeln!(out)?;
        writeln!(out, "{} connections broken: {connections_broken}", verdict(*connections_broken == 0))?;
        let exact = if self.counter_exact { "exact" } else { "NOT exact" };
        writeln!(out, "{} counter after {ops} acknowledged INCRs: {exact}", verdict(self.counter_exact))?;
        let hashes_well = *hash_mismatches == 0 && *downloads > 0;
        writeln!(out, "{} {downloads} downloads, {hash_mismatches} with a wrong SHA-256", verdict(hashes_well))?;
        let received = if self.message_received { "got" } else { "did NOT get" };
        writeln!(out, "{} the idle subscriber {received} its message", verdict(self.message_received))?;
        let via = bytes(self.bytes_via_old_node);
        writeln!(out, "{} through nodes that the server had left: {via}", verdict(self.bytes_via_old_node == 0))?;
        let quiet = self.undisturbed_stall_ms;
        writeln!(out, "     (longest operation while nothing moved: {quiet:.1} ms)")?;
        writeln!(out, "\n{}", if self.ok { "The demonstration succeeded." } else { "The demonstration FAILED." })
    }
}

/// A count of bytes for people.
fn bytes(count: u64) -> String {
    // Shown with one digit; the loss does not matter.
    #[allow(clippy::cast_precision_loss)]
    let value = count as f64;
    match count {
        0..1_000 => format!("{count} B"),
        1_000..1_000_000 => format!("{:.1} kB", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", value / 1e6),
        _ => format!("{:.2} GB", value / 1e9),
    }
}

/// Prints what the clients saw, a line for each quarter of a second, with the moves marked.
pub(super) fn print_timeline(counted: &Counted, downloaded: &Downloaded, moves: &[Moved]) {
    // Whoever closed the output does not want to read it.
    let _ = write_timeline(&mut std::io::stdout().lock(), counted, downloaded, moves);
}

fn write_timeline(
    out: &mut impl Write,
    counted: &Counted,
    downloaded: &Downloaded,
    moves: &[Moved],
) -> std::io::Result<()> {
    let (Some(first), Some(last)) = (counted.operations.first(), counted.operations.last()) else { return Ok(()) };
    let origin = first.began;
    let mut slots = Vec::new();
    let mut begin = origin;
    while begin < last.ended {
        slots.push(Slot::of(counted, downloaded, begin, begin + SLOT));
        begin += SLOT;
    }
    let most = slots.iter().map(|slot| slot.operations).max().unwrap_or(1).max(1);
    writeln!(out, "\n    time    ops/s  longest    download")?;
    for slot in &slots {
        let end = slot.begin + SLOT;
        let seconds = (slot.begin - origin).as_secs_f64();
        let rate = slot.operations * 1000 / usize::try_from(SLOT.as_millis()).unwrap_or(1);
        let bar = "#".repeat(slot.operations * BAR / most);
        let stall = milliseconds(slot.longest);
        #[allow(clippy::cast_precision_loss)]
        let megabytes = slot.downloaded as f64 / 1e6 / SLOT.as_secs_f64();
        write!(out, "{seconds:>7.2}s {rate:>8} {stall:>6.1}ms {megabytes:>6.0}MB/s |{bar:<BAR$}|")?;
        for one in moves {
            let (from, to) = (&one.summary.from, &one.summary.to);
            if (slot.begin..end).contains(&one.began) {
                write!(out, " {from} -> {to} begins")?;
            }
            if (slot.begin..end).contains(&one.ended) {
                write!(out, " {from} -> {to} done")?;
            }
        }
        writeln!(out)?;
    }
    Ok(())
}

/// What happened in one line's time.
struct Slot {
    begin: Instant,
    operations: usize,
    longest: Duration,
    downloaded: usize,
}

impl Slot {
    fn of(counted: &Counted, downloaded: &Downloaded, begin: Instant, end: Instant) -> Slot {
        let all = &counted.operations;
        let first = all.partition_point(|operation| operation.ended < begin);
        let after = all.partition_point(|operation| operation.ended < end);
        let parts = &downloaded.parts;
        let from = parts.partition_point(|&(time, _)| time < begin);
        let to = parts.partition_point(|&(time, _)| time < end);
        Slot {
            begin,
            operations: after - first,
            longest: longest(all, begin, end),
            downloaded: parts[from..to].iter().map(|&(_, size)| size).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operations(origin: Instant, times_ms: &[(u64, u64)]) -> Vec<Operation> {
        let at = |ms| origin + Duration::from_millis(ms);
        times_ms.iter().map(|&(began, ended)| Operation { began: at(began), ended: at(ended) }).collect()
    }

    #[test]
    fn the_longest_operation_counts_when_it_reaches_into_the_window() {
        let origin = Instant::now();
        let at = |ms| origin + Duration::from_millis(ms);
        let all = operations(origin, &[(0, 90), (90, 91), (91, 120), (120, 121), (121, 190), (200, 500)]);
        assert_eq!(longest(&all, at(91), at(119)), Duration::from_millis(29));
        assert_eq!(longest(&all, at(95), at(125)), Duration::from_millis(69));
        assert_eq!(longest(&all, at(600), at(700)), Duration::ZERO);
        assert_eq!(longest(&[], at(0), at(700)), Duration::ZERO);
    }

    #[test]
    fn counts_of_bytes_read_well() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_500), "1.5 kB");
        assert_eq!(bytes(2_000_000), "2.0 MB");
        assert_eq!(bytes(1_234_000_000), "1.23 GB");
    }

    #[test]
    fn the_timeline_has_a_line_for_each_quarter_of_a_second() {
        let origin = Instant::now();
        let counted =
            Counted { operations: operations(origin, &[(0, 10), (10, 300), (300, 510)]), ..Counted::default() };
        let mut out = Vec::new();
        write_timeline(&mut out, &counted, &Downloaded::default(), &[]).expect("a vector takes all");
        let text = String::from_utf8(out).expect("text");
        let lines: Vec<_> = text.lines().skip(2).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[1].contains(" 290.0ms"), "{text}");
    }
}
