//! The source's side: rounds while the job runs, and the rest in the freeze.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use sys::Pid;
use sys::vm::{self, DetailedMapping};

use super::layout::{Layout, ProcessLayout};
use super::objects::Objects;
use super::ranges::SpanSet;
use super::reader::Reader;
use super::space::{EXACT_DETAILS_BYTES, Space};
use super::{MemorySink, PAGE, RoundStats};
use crate::sandbox::INIT;
use crate::shm;

/// A round waits at most this long for a pause in writing.
const SETTLE_TIME: Duration = Duration::from_millis(40);
/// How often it looks.
const SETTLE_STEP: Duration = Duration::from_millis(2);
/// Writing less than this in one step is a pause.
const SETTLE_BYTES: u64 = 1 << 20;

/// A process with an address space of its own. Of processes that share one (vfork, CLONE_VM) only one is to be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrackedProcess {
    /// Its number in the job's image.
    pub process: u32,
    /// Its parent's; 1 is init.
    pub parent: u32,
    /// Its session.
    pub session: u32,
    /// Number of its controlling pseudo-terminal.
    pub terminal: Option<u32>,
    /// Its number for us.
    pub pid: Pid,
}

/// Makes a userfaultfd *inside* the process (flags [`sys::uffd::CREATE_FLAGS`]), fetches it, and closes it there: the process
/// must stand still meanwhile, so that no child inherits the number. `None` when it can't have one: then all its memory is sent in
/// the freeze.
pub type Inject<'a> = &'a mut dyn FnMut(TrackedProcess) -> io::Result<Option<OwnedFd>>;

/// Copies a job's memory while it runs.
///
/// Call [`round`](Tracker::round) as long as it pays (see [`super::Policy`]), freeze the job, call
/// [`finish`](Tracker::finish). Dropping the tracker ends all tracking; the job can't tell that there was any. When a move is
/// given up, let the job run first and drop then: lifting the protection of a gigabyte takes some 16 ms.
#[derive(Debug, Default)]
pub struct Tracker {
    spaces: BTreeMap<u32, Space>,
    objects: Objects,
    reader: Reader,
    /// The layout that the sink has.
    told: Option<Layout>,
}

impl Tracker {
    /// One that knows the job's own `/dev/shm`: that of this process.
    #[must_use]
    pub fn in_namespace_of(init: Pid) -> Tracker {
        let mut tracker = Tracker::default();
        tracker.objects.shm = shm::device(init);
        tracker
    }

    /// Sends what was written since the last round: in the first one, everything. New processes and new programs (execve) are
    /// tracked from here on; `inject` is called for them, parents first.
    ///
    /// # Errors
    /// The sink's errors; a mapping that can't move; anything the kernel says that isn't explained by a process that ends or
    /// changes its mappings at this moment.
    pub fn round(
        &mut self,
        processes: &[TrackedProcess],
        inject: Inject<'_>,
        sink: &mut dyn MemorySink,
    ) -> io::Result<RoundStats> {
        self.follow(processes, Some(inject))?;
        self.settle()?;
        let mut ended = Vec::new();
        for (number, space) in &mut self.spaces {
            let process = space.process();
            if unless_ended(process, "list its mappings", space.survey(&mut self.objects))?.is_none() {
                ended.push(*number);
            }
        }
        self.spaces.retain(|number, _| !ended.contains(number));
        self.forget_orphans();
        self.tell_layout(processes, sink, false)?;
        let mut bytes = self.objects.round(sink)?;
        for space in self.spaces.values_mut() {
            let process = space.process();
            let copied = space.copy(&mut self.reader, sink);
            bytes += unless_ended(process, "copy its memory", copied)?.unwrap_or_default().bytes;
        }
        let dirty_left = self.dirty()?;
        Ok(RoundStats { bytes, pages: bytes / PAGE, dirty_left })
    }

    /// Waits for a moment in which little is written, but not long: a round that starts right after a burst ends before the
    /// next one, and one that starts in its middle sends half of it twice.
    fn settle(&mut self) -> io::Result<()> {
        if self.told.is_none() {
            return Ok(());
        }
        let deadline = Instant::now() + SETTLE_TIME;
        let mut before = self.dirty()?;
        while before > SETTLE_BYTES && Instant::now() < deadline {
            thread::sleep(SETTLE_STEP);
            let now = self.dirty()?;
            if now.saturating_sub(before) < SETTLE_BYTES {
                break;
            }
            before = now;
        }
        Ok(())
    }

    /// Bytes that were written since the last round, as of now. Takes about half a millisecond a gigabyte, so it can be asked
    /// often to find a quiet moment.
    ///
    /// # Errors
    /// As [`round`](Tracker::round).
    pub fn dirty(&mut self) -> io::Result<u64> {
        let mut bytes = 0;
        for space in self.spaces.values_mut() {
            let process = space.process();
            bytes += unless_ended(process, "look for written pages", space.dirty())?.unwrap_or(0);
        }
        Ok(bytes)
    }

    /// Sends the rest. Every process stands still, and none is changed. The layout, which is told to the sink after the pages,
    /// is returned as well: it belongs into the image. After this the tracker is only good for being dropped.
    ///
    /// # Errors
    /// As [`round`](Tracker::round), with fewer excuses: nothing may change now.
    pub fn finish(
        &mut self,
        processes: &[TrackedProcess],
        sink: &mut dyn MemorySink,
    ) -> io::Result<(Layout, RoundStats)> {
        self.follow(processes, None)?;
        // Those whose mappings' properties are read in any case, and those of which they are if there is time.
        let (mut surely, mut perhaps) = (Vec::new(), Vec::new());
        for (number, space) in &mut self.spaces {
            let process = space.process();
            let surveyed = space.survey_frozen(&mut self.objects);
            match surveyed.map_err(|error| explain(process, "list its mappings", &error))? {
                0 => surely.push((*number, process.pid)),
                1..=EXACT_DETAILS_BYTES if surely.is_empty() => surely.push((*number, process.pid)),
                1..=EXACT_DETAILS_BYTES => perhaps.push((*number, process.pid)),
                _ => {}
            }
        }
        // They are slow to read, and needed last: a second thread does it meanwhile.
        let copied = Arc::new(AtomicBool::new(false));
        let details = (!surely.is_empty()).then(|| {
            let copied = Arc::clone(&copied);
            thread::spawn(move || {
                let others = perhaps.into_iter().take_while(|_| !copied.load(Ordering::Relaxed));
                read_details(surely.into_iter().chain(others))
            })
        });
        self.tell_layout(processes, sink, false)?;
        let mut bytes = self.objects.round(sink)?;
        for space in self.spaces.values_mut() {
            bytes += copy_rest(space, &mut self.reader, sink)?;
        }
        copied.store(true, Ordering::Relaxed);
        if let Some(details) = details {
            let details = details.join().map_err(|_| io::Error::other("the thread that reads mappings failed"))??;
            let mut again = Vec::new();
            for (number, details) in details {
                if let Some(space) = self.spaces.get_mut(&number)
                    && space.correct(details, &mut self.objects)?
                {
                    again.push(number);
                }
            }
            if !again.is_empty() {
                self.tell_layout(processes, sink, false)?;
                for number in again {
                    if let Some(space) = self.spaces.get_mut(&number) {
                        bytes += copy_rest(space, &mut self.reader, sink)?;
                    }
                }
            }
        }
        let layout = self.tell_layout(processes, sink, true)?;
        Ok((layout, RoundStats { bytes, pages: bytes / PAGE, dirty_left: 0 }))
    }

    /// Makes `spaces` hold exactly the processes named.
    fn follow(&mut self, processes: &[TrackedProcess], mut inject: Option<Inject<'_>>) -> io::Result<()> {
        self.spaces.retain(|number, _| processes.iter().any(|process| process.process == *number));
        for process in processes {
            let followed = match self.spaces.get_mut(&process.process) {
                Some(space) => space.follow(*process),
                None => Space::new(*process).map(|space| {
                    self.spaces.insert(process.process, space);
                    true
                }),
            };
            let Some(needs_tracker) = unless_ended(*process, "open its memory", followed)? else {
                self.spaces.remove(&process.process);
                continue;
            };
            let (true, Some(inject)) = (needs_tracker, inject.as_mut()) else { continue };
            let userfaultfd = unless_ended(*process, "make a userfaultfd in it", inject(*process))?;
            if let (Some(Some(userfaultfd)), Some(space)) = (userfaultfd, self.spaces.get_mut(&process.process)) {
                space.track(userfaultfd)?;
            }
        }
        Ok(())
    }

    /// Forgets those whose parent is ending: it has no memory any more, and they are nobody else's children yet. The next round,
    /// or the last, tells whose they are.
    fn forget_orphans(&mut self) {
        loop {
            let there: BTreeSet<u32> = self.spaces.keys().copied().collect();
            let has_parent = |parent| parent == INIT || there.contains(&parent);
            self.spaces.retain(|_, space| has_parent(space.layout().parent));
            if self.spaces.len() == there.len() {
                return;
            }
        }
    }

    fn tell_layout(
        &mut self,
        processes: &[TrackedProcess],
        sink: &mut dyn MemorySink,
        is_last: bool,
    ) -> io::Result<Layout> {
        let mapped = self.spaces.values().flat_map(|space| space.layout().objects()).collect();
        self.objects.note_mapped(&mapped);
        let layout = Layout {
            processes: processes
                .iter()
                .filter_map(|process| self.spaces.get(&process.process))
                .map(|space| match space.layout() {
                    layout if is_last => layout.clone(),
                    // Only now is it certain what has to be discarded.
                    layout => ProcessLayout { discards: SpanSet::new(), guards: SpanSet::new(), ..layout.clone() },
                })
                .collect(),
            objects: self.objects.describe(is_last)?,
        };
        if self.told.as_ref() != Some(&layout) {
            sink.layout(layout.clone())?;
            self.told = Some(layout.clone());
        }
        Ok(layout)
    }
}

fn copy_rest(space: &mut Space, reader: &mut Reader, sink: &mut dyn MemorySink) -> io::Result<u64> {
    let process = space.process();
    space.copy_rest(reader, sink).map(|pass| pass.bytes).map_err(|error| explain(process, "copy its memory", &error))
}

fn read_details(processes: impl Iterator<Item = (u32, Pid)>) -> io::Result<Vec<(u32, Vec<DetailedMapping>)>> {
    processes.map(|(number, pid)| Ok((number, vm::detailed_maps(pid)?))).collect()
}

/// `None` for an error that only says that the process has ended.
fn unless_ended<T>(process: TrackedProcess, what: &str, result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(_) if has_ended(process.pid) => Ok(None),
        Err(error) => Err(explain(process, what, &error)),
    }
}

fn explain(process: TrackedProcess, what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("process {}: {what}: {error}", process.process))
}

/// Whether the process has no address space any more: a zombie, or not even that.
fn has_ended(pid: Pid) -> bool {
    !std::fs::read(format!("/proc/{pid}/statm")).is_ok_and(|text| !text.starts_with(b"0 "))
}
