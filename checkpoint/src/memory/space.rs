//! One process's address space at the source: its mappings as last seen, which of their pages the target has, and which were
//! written since.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use sys::pagemap::{Category, Pagemap, Query, Region};
use sys::uffd::WriteTracker;
use sys::vm::{self, DetailedMapping, Mapping, Memory};

use super::areas::{Files, KnownFiles, Unmovable, classify, describe, push_merged};
use super::direct;
use super::layout::{Area, Backing, ProcessLayout, Protection};
use super::objects::Objects;
use super::ranges::{Span, SpanSet};
use super::reader::{Reader, RunTraits};
use super::settled;
use super::{MemorySink, PAGE, TrackedProcess};

/// The properties of mappings (`VmFlags`: what madvise and mlock have set) are found in smaps only, for which the kernel looks
/// at every page: 20 ms a gigabyte, and 10 us a mapping. While a process runs they are read once in [`DETAILS_AGE`]; if it is larger
/// than this, only when it has new mappings. In the freeze they are read of those no larger, while there is other work to do
/// ([`super::Tracker::finish`]). Of the rest what was set in between on a mapping whose bounds have stayed is missed, and a mapping
/// that is newer is taken to have none.
pub(super) const EXACT_DETAILS_BYTES: u64 = 128 << 20;
const DETAILS_AGE: Duration = Duration::from_millis(500);

/// What is known of one process.
#[derive(Debug)]
pub(super) struct Space {
    process: TrackedProcess,
    /// Absent while the process (or its new program) has none yet; then nothing of it is tracked.
    tracker: Option<WriteTracker>,
    pagemap: Pagemap,
    knows_guards: bool,
    memory: Memory,
    /// Details of mappings as last read from smaps.
    details: HashMap<Mapping, DetailedMapping>,
    /// When they were read.
    details_read: Option<Instant>,
    /// The files that the process maps, as last looked up.
    files: KnownFiles,
    /// The kernel's mappings, one area each: tracking is by mapping.
    mappings: Vec<Area>,
    /// The same as the target sees them.
    layout: ProcessLayout,
    /// It reads with `O_DIRECT`: see [`super::direct`].
    bypasses_faults: bool,
    /// Pages of which the target has content from here.
    sent: SpanSet,
    /// Pages that were zeros when last looked at. Of those that are in `sent` as well the target learns at the end.
    zeros: SpanSet,
}

/// What one pass over a process did.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Pass {
    pub bytes: u64,
}

impl Space {
    pub fn new(process: TrackedProcess) -> io::Result<Space> {
        let mut pagemap = Pagemap::open(process.pid)?;
        Ok(Space {
            process,
            tracker: None,
            knows_guards: pagemap.knows_guard_pages(),
            pagemap,
            memory: Memory::open(process.pid)?,
            details: HashMap::new(),
            details_read: None,
            files: KnownFiles::new(),
            mappings: Vec::new(),
            layout: ProcessLayout {
                process: process.process,
                parent: process.parent,
                session: process.session,
                terminal: process.terminal,
                ..ProcessLayout::default()
            },
            bypasses_faults: false,
            sent: SpanSet::new(),
            zeros: SpanSet::new(),
        })
    }

    pub fn process(&self) -> TrackedProcess {
        self.process
    }

    pub fn layout(&self) -> &ProcessLayout {
        &self.layout
    }

    /// Makes sure that what we hold belongs to the program that the process runs now. Returns whether it needs a userfaultfd.
    pub fn follow(&mut self, process: TrackedProcess) -> io::Result<bool> {
        let same = self.process.pid == process.pid
            && self.tracker.as_ref().is_some_and(|tracker| tracker.is_alive().unwrap_or(false));
        self.process = process;
        self.layout.parent = process.parent;
        self.layout.session = process.session;
        self.layout.terminal = process.terminal;
        if !same {
            // Another program (execve), or nothing held yet. What was sent stays in the books: the target has it.
            self.tracker = None;
            self.details_read = None;
            self.pagemap = Pagemap::open(process.pid)?;
            self.memory = Memory::open(process.pid)?;
        }
        Ok(!same)
    }

    /// Takes the userfaultfd that was made in the process.
    pub fn track(&mut self, userfaultfd: OwnedFd) -> io::Result<()> {
        self.tracker = Some(WriteTracker::new(userfaultfd)?);
        Ok(())
    }

    /// Reads the mappings while the process runs.
    pub fn survey(&mut self, objects: &mut Objects) -> io::Result<()> {
        let mut mappings = vm::maps(self.process.pid)?;
        let is_new = mappings.iter().any(|mapping| !self.details.contains_key(mapping));
        let is_recent = self.details_read.is_some_and(|read| read.elapsed() < DETAILS_AGE);
        let reads = match (is_recent, is_new) {
            (true, false) => false,
            (false, true) => true,
            _ => self.resident_bytes() <= EXACT_DETAILS_BYTES,
        };
        if reads {
            // From here on it's this reading that counts: a mapping that has grown since the first one must not be missing.
            let details = vm::detailed_maps(self.process.pid)?;
            mappings = details.iter().map(|detailed| detailed.mapping.clone()).collect();
            self.use_details(details);
        } else {
            self.assume_details(&mappings);
        }
        self.take_mappings(mappings, objects, false).map(|_| ())
    }

    /// Reads the mappings of a process that stands still, without the properties that are slow to read: those are as last
    /// read, or assumed for new mappings, until [`Space::correct`]. Returns what reading them would cost, in bytes that the
    /// kernel looks at: 0 when it has to be done.
    pub fn survey_frozen(&mut self, objects: &mut Objects) -> io::Result<u64> {
        let mappings = vm::maps(self.process.pid)?;
        self.assume_details(&mappings);
        self.take_mappings(mappings, objects, true)?;
        Ok(if self.details_read.is_none() { 0 } else { self.resident_bytes().max(1) })
    }

    fn assume_details(&mut self, mappings: &[Mapping]) {
        let unknown = mappings.iter().filter(|mapping| !self.details.contains_key(mapping));
        let assumptions: Vec<DetailedMapping> = unknown.map(|mapping| assume(mapping, &self.details)).collect();
        self.details.extend(assumptions.into_iter().map(|detailed| (detailed.mapping.clone(), detailed)));
    }

    fn resident_bytes(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/statm", self.process.pid)).unwrap_or_default();
        text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * PAGE
    }

    /// Corrects what was assumed. Returns whether the target loses content by it, so that
    /// [`Space::copy_rest`] is needed again.
    pub fn correct(&mut self, details: Vec<DetailedMapping>, objects: &mut Objects) -> io::Result<bool> {
        let mappings = details.iter().map(|detailed| detailed.mapping.clone()).collect();
        self.use_details(details);
        self.take_mappings(mappings, objects, true)
    }

    fn use_details(&mut self, details: Vec<DetailedMapping>) {
        self.details = details.into_iter().map(|detailed| (detailed.mapping.clone(), detailed)).collect();
        self.details_read = Some(Instant::now());
    }

    /// Makes areas of the mappings. What the target loses by the change is no longer counted as sent; returns whether there
    /// was any.
    fn take_mappings(&mut self, mappings: Vec<Mapping>, objects: &mut Objects, frozen: bool) -> io::Result<bool> {
        // In the freeze what the last look at the running process found still holds.
        let known = if frozen { std::mem::take(&mut self.files) } else { KnownFiles::new() };
        let mut files = Files::new(self.process.pid, objects.shm, known);
        let mut areas = Vec::with_capacity(mappings.len());
        let mut merged: Vec<Area> = Vec::with_capacity(mappings.len());
        for mapping in mappings {
            let Some(detailed) = self.details.get(&mapping) else { continue };
            let vanished = || io::Error::other(format!("{} can't be looked at", describe(&mapping)));
            let mut classified = match classify(detailed, &mut files) {
                Ok(classified) => classified,
                Err(Unmovable::Nothing) => continue,
                Err(Unmovable::Vanished) if frozen => return Err(vanished()),
                Err(Unmovable::Vanished) => continue,
                Err(Unmovable::Obstacle(why)) => {
                    return Err(io::Error::other(format!("{} can't move: {why}", describe(&mapping))));
                }
            };
            if let (Some(found), Backing::Object { id, .. }) = (&classified.object, &mut classified.area.backing) {
                match objects.number(found) {
                    Ok(number) => *id = number,
                    Err(error) if frozen => return Err(error),
                    Err(_) => continue,
                }
            }
            // While the process runs the list isn't of one instant, and the next round reads it anew.
            if areas.last().is_some_and(|last: &Area| last.end > mapping.start) {
                continue;
            }
            push_merged(&mut merged, classified.area.clone());
            areas.push(classified.area);
        }
        self.files = files.into_known();
        let next = ProcessLayout { areas: merged, ..self.layout.clone() };
        let kept = self.layout.kept(&next);
        let (sent, zeros) = (self.sent.intersection(&kept), self.zeros.intersection(&kept));
        let loses = sent != self.sent;
        (self.sent, self.zeros) = (sent, zeros);
        self.mappings = areas;
        self.layout = next;
        Ok(loses)
    }

    /// Whether it can be seen what the process writes to.
    fn is_followed(&self) -> bool {
        self.tracker.is_some() && !self.bypasses_faults
    }

    /// Sends every page that was written since the last pass, while the process may go on writing. Nothing when it can't be
    /// seen what it writes to: all of that is for the freeze.
    pub fn copy(&mut self, reader: &mut Reader, sink: &mut dyn MemorySink) -> io::Result<Pass> {
        if !self.is_followed() {
            return Ok(Pass::default());
        }
        let mut reading = reader.start(sink, self.process.process, self.process.pid, &self.memory, false);
        let mut runs: Vec<Region> = Vec::new();
        for area in self.mappings.iter().filter(|area| area.has_own_pages()) {
            runs.clear();
            match collect_written(&mut self.pagemap, self.tracker.as_ref(), self.knows_guards, area, &mut runs) {
                // It has just executed another program: the next round will see.
                Err(error) if error.raw_os_error() == Some(NO_ADDRESS_SPACE) => break,
                other => other?,
            }
            for run in &runs {
                reading.add(Span { start: run.start, end: run.end }, traits(area))?;
            }
        }
        let (sent, zeros) = reading.finish()?;
        self.zeros = self.zeros.union(&zeros).difference(&sent);
        self.sent = self.sent.union(&sent);
        // Looked at after the scan: a read that was in flight then had its descriptor open.
        self.bypasses_faults = direct::is_used_by(self.process.pid);
        Ok(Pass { bytes: sent.length() })
    }

    /// Sends every page that the target doesn't have as it is. The process stands still, and isn't touched.
    pub fn copy_rest(&mut self, reader: &mut Reader, sink: &mut dyn MemorySink) -> io::Result<Pass> {
        let known = self.sent.union(&self.zeros);
        let mut reading = reader.start(sink, self.process.process, self.process.pid, &self.memory, true);
        let mut populated = SpanSet::new();
        let mut guards = SpanSet::new();
        let guard = if self.knows_guards { Category::GUARD } else { Category::empty() };
        for area in self.mappings.iter().filter(|area| area.has_own_pages()) {
            let content = content_query(area, self.knows_guards);
            let query = Query {
                report: Category::WRITTEN | Category::SWAPPED | guard,
                // Guard pages are to be seen here, in the same walk.
                inverted: content.inverted - guard,
                all_of: content.all_of - guard,
                ..content
            };
            let mut runs: Vec<Region> = Vec::new();
            let tracked = Query { require_tracked: true, ..query };
            let is_followed = self.is_followed();
            let mut settled = SpanSet::new();
            if is_followed {
                settled = settled::settled(&mut self.pagemap, self.process.pid, area, &known)?;
            }
            let whole: SpanSet = [Span { start: area.start, end: area.end }].into_iter().collect();
            let scanned = whole
                .difference(&settled)
                .spans()
                .iter()
                .try_for_each(|span| self.pagemap.scan(span.start, span.end, &tracked, |run| runs.push(run)));
            let is_fresh = match scanned {
                Ok(()) => !is_followed,
                Err(error) if error.raw_os_error() == Some(NOT_TRACKED) => {
                    runs.clear();
                    settled = SpanSet::new();
                    self.pagemap.scan(area.start, area.end, &query, |run| runs.push(run))?;
                    true
                }
                Err(error) => return Err(error),
            };
            let (mut content, mut wanted) = (SpanSet::new(), SpanSet::new());
            for run in &runs {
                let span = Span { start: run.start, end: run.end };
                if run.categories().intersects(guard) {
                    guards.push(span);
                    continue;
                }
                content.push(span);
                // In a file's mapping a protected page that was dropped (MADV_DONTNEED) leaves a marker behind, which looks
                // like one that was swapped out. Reading it gives what belongs there in either case.
                let is_marker = run.categories().contains(Category::SWAPPED) && !area.is_zero_when_absent();
                if is_fresh || is_marker || run.categories().contains(Category::WRITTEN) {
                    wanted.push(span);
                }
            }
            // A page may be protected although the target doesn't have it: when the mapping was replaced by one of another
            // kind between the reading of the mappings and the scan, and the target has dropped what it got then.
            wanted = wanted.union(&content.difference(&known));
            for span in wanted.spans() {
                reading.add(*span, traits(area))?;
            }
            content.union(&settled).spans().iter().for_each(|span| populated.push(*span));
        }
        let (sent, zeros) = reading.finish()?;
        self.sent = self.sent.union(&sent);
        self.zeros = self.zeros.union(&zeros).difference(&sent);
        // Shared mappings can have guard pages as well.
        let others = self.mappings.iter().filter(|area| !area.has_own_pages() && !area.is_kernels());
        for area in others.filter(|_| self.knows_guards) {
            let query = Query { all_of: Category::GUARD, ..Query::default() };
            let visit = |run: Region| guards.push(Span { start: run.start, end: run.end });
            self.pagemap.scan(area.start, area.end, &query, visit)?;
        }
        let gone = self.sent.difference(&populated);
        self.layout.discards = gone.union(&self.zeros.intersection(&self.sent));
        self.layout.guards = guards;
        Ok(Pass { bytes: sent.length() })
    }

    /// Bytes written since the last pass, as of now, of what a further pass would send.
    pub fn dirty(&mut self) -> io::Result<u64> {
        let mut bytes = 0;
        if !self.is_followed() {
            return Ok(0);
        }
        for area in self.mappings.iter().filter(|area| area.has_own_pages()) {
            let mut query = content_query(area, self.knows_guards);
            query.all_of |= Category::WRITTEN;
            match self.pagemap.scan(area.start, area.end, &query, |run| bytes += run.end - run.start) {
                Err(error) if error.raw_os_error() == Some(NO_ADDRESS_SPACE) => break,
                other => other?,
            }
        }
        Ok(bytes)
    }
}

/// What can be said of a mapping by its line alone, and by what was in its place before: as a rule it's the same with other
/// bounds.
fn assume(mapping: &Mapping, known: &HashMap<Mapping, DetailedMapping>) -> DetailedMapping {
    let before = known.values().find(|before| {
        let old = &before.mapping;
        old.start < mapping.end
            && mapping.start < old.end
            && (old.device, old.inode, old.shared) == (mapping.device, mapping.inode, mapping.shared)
    });
    let mut assumed =
        DetailedMapping { mapping: mapping.clone(), page_size: PAGE, protection_key: 0, flags: Vec::new() };
    if let Some(before) = before {
        assumed.page_size = before.page_size;
        assumed.flags.clone_from(&before.flags);
    } else if mapping.name == b"[stack]" {
        assumed.flags.push(*b"gd");
    } else if mapping.name.starts_with(b"/anon_hugepage") {
        assumed.flags.push(*b"ht");
        assumed.page_size = 2 << 20;
    }
    if mapping.write {
        assumed.flags.extend([*b"ac", *b"mw"]);
    }
    assumed
}

/// EPERM: `PM_SCAN_CHECK_WPASYNC` met a mapping that isn't registered.
pub(super) const NOT_TRACKED: i32 = 1;
/// ESRCH: the address space that was opened is gone.
const NO_ADDRESS_SPACE: i32 = 3;

/// Protects and collects the written pages of one mapping.
fn collect_written(
    pagemap: &mut Pagemap,
    tracker: Option<&WriteTracker>,
    knows_guards: bool,
    area: &Area,
    runs: &mut Vec<Region>,
) -> io::Result<()> {
    let Some(tracker) = tracker else { return Ok(()) };
    let content = Query { protect: true, require_tracked: true, ..content_query(area, knows_guards) };
    let written = Query { all_of: content.all_of | Category::WRITTEN, ..content };
    match pagemap.scan(area.start, area.end, &written, |run| runs.push(run)) {
        Ok(()) => return Ok(()),
        Err(error) if error.raw_os_error() == Some(NOT_TRACKED) => {}
        Err(error) => return Err(error),
    }
    // The mapping is new, or was made anew at the same place. Whatever its pages say about protection stems from elsewhere
    // (a mapping moved by mremap brings its old bits along on some kernels), so all of them count as written.
    //
    // What can't be registered (it has just gone away or changed) waits for the next round, at the latest for the freeze,
    // where an untracked mapping is sent whole.
    if tracker.register(area.start, area.end).is_err() {
        return Ok(());
    }
    let mut all = Vec::new();
    match pagemap.scan(area.start, area.end, &content, |run| all.push(run)) {
        Err(error) if error.raw_os_error() != Some(NOT_TRACKED) => return Err(error),
        // What was protected before the process changed the mapping once more has to be sent like the rest.
        _ => {}
    }
    // Pages that the first scan protected below the unregistered mapping appear in both.
    let both: SpanSet = runs.iter().chain(&all).map(|run| Span { start: run.start, end: run.end }).collect();
    runs.clear();
    runs.extend(both.spans().iter().map(|span| Region::new(span.start, span.end)));
    Ok(())
}

/// Matches the pages that are the process's own: not those that read as the mapping's backing without being sent.
fn content_query(area: &Area, knows_guards: bool) -> Query {
    let mut absent = Category::ZERO;
    if knows_guards {
        absent |= Category::GUARD;
    }
    if !area.is_zero_when_absent() {
        // A clean page of a private file mapping is the file's.
        absent |= Category::FILE;
    }
    // Huge pages of hugetlbfs are never swapped out: what looks like it is a marker of a page that was dropped.
    let is_hugetlb = matches!(area.backing, Backing::HugePages { .. });
    Query {
        inverted: absent,
        all_of: absent,
        any_of: if is_hugetlb { Category::PRESENT } else { Category::PRESENT | Category::SWAPPED },
        report: Category::empty(),
        protect: false,
        require_tracked: false,
    }
}

fn traits(area: &Area) -> RunTraits {
    RunTraits { readable: area.protection.contains(Protection::READ), zero_when_absent: area.is_zero_when_absent() }
}
