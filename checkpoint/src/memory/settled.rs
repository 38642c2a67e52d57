//! Which memory needs no second look in the freeze.
//!
//! The freeze has to know of every page whether it is still there, and asking the kernel for that costs 4 ms a gigabyte. Asking it for
//! the pages that aren't write-protected costs a tenth, and that is enough for private anonymous memory: what a round has protected
//! and what has gone since (MADV_DONTNEED) is no longer protected. Only where a whole page table has gone nothing is
//! reported; so one page is looked at for each table.

use std::io;

use sys::Pid;
use sys::pagemap::{self, Category, Pagemap, Query};

use super::PAGE;
use super::layout::{Area, Backing};
use super::ranges::{Span, SpanSet};

/// What one page table maps.
const TABLE: u64 = 2 << 20;
/// A smaller area is looked through as quickly.
const WORTH_IT: u64 = 16 * TABLE;

/// Parts of an area, whole page tables each, whose pages are all there and unchanged since the rounds that made them `known`. The
/// process stands still, and the area is tracked.
pub(super) fn settled(pagemap: &mut Pagemap, pid: Pid, area: &Area, known: &SpanSet) -> io::Result<SpanSet> {
    let mut settled = SpanSet::new();
    let is_eligible = matches!(area.backing, Backing::Anonymous) && !area.shared && area.end - area.start >= WORTH_IT;
    if !is_eligible || !pagemap::written_scan_reports_absent_pages() {
        return Ok(settled);
    }
    let mut changed = SpanSet::new();
    let written =
        Query { all_of: Category::WRITTEN, report: Category::WRITTEN, require_tracked: true, ..Query::default() };
    let visit = |run: pagemap::Region| changed.push(Span { start: run.start, end: run.end });
    if let Err(error) = pagemap.scan(area.start, area.end, &written, visit) {
        // Not tracked: every page counts as written.
        return if error.raw_os_error() == Some(super::space::NOT_TRACKED) { Ok(settled) } else { Err(error) };
    }
    // Of pages that were swapped out some kernels read the wrong bit. Looked at last, for the kernel swaps when it likes.
    if has_swapped(pid) {
        return Ok(settled);
    }
    let whole: SpanSet = [Span { start: area.start, end: area.end }].into_iter().collect();
    let untouched = whole.intersection(known).difference(&changed);
    for span in untouched.spans() {
        let mut table = span.start.next_multiple_of(TABLE);
        while table + TABLE <= span.end {
            let mut is_there = false;
            let there = Query { any_of: Category::PRESENT | Category::SWAPPED, ..Query::default() };
            pagemap.scan(table, table + PAGE, &there, |_| is_there = true)?;
            if is_there {
                settled.push(Span { start: table, end: table + TABLE });
            }
            table += TABLE;
        }
    }
    Ok(settled)
}

/// Whether anything of a process is swapped out, or that can't be told.
fn has_swapped(pid: Pid) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let swapped = status.lines().find_map(|line| line.strip_prefix("VmSwap:")?.split_ascii_whitespace().next());
    swapped != Some("0")
}
