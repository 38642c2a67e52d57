//! A running tree that is to move: pre-copy, freeze, dump.

use std::collections::BTreeMap;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sys::libc;
use sys::proc::Place;
use sys::ptrace::Stopped;
use sys::tape::{Region, Results, Tape};

use crate::descriptors::calm::Calm;
use crate::descriptors::{self, Preview, Tapes, TreeDescriptors};
use crate::dump;
use crate::error::{Error, Result};
use crate::external::External;
use crate::filters::Filters;
use crate::freeze::{self, Frozen};
use crate::image::{
    ProcessImage, ProcessState, TreeImage, VERSION, VERSION_FIRST, VERSION_FOURTH, VERSION_SECOND, VERSION_THIRD,
};
use crate::init::protocol::Root;
use crate::memory::{Layout, MemorySink, RoundStats, TrackedProcess, Tracker};
use crate::offer::Offer;
use crate::robust;
use crate::sandbox::{Control, Inside, Sandbox};
use crate::shm;
use crate::stay::StayReason;
use crate::survey;
use crate::sysv;

/// Where a region goes if nothing is there: below where programs are linked to.
pub(crate) const REGION_AT: u64 = 0x10_0000;

/// How often a running tree is looked at before what seems to keep it here is believed.
const LOOKS: u32 = 4;
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

/// How long to look for a calm moment to freeze the tree in, and how long it runs after each stop that wasn't one.
const FOR_CALM: Duration = Duration::from_millis(300);
const PAUSES: [Duration; 3] = [Duration::from_millis(1), Duration::from_millis(2), Duration::from_millis(4)];
const LONGEST_PAUSE: Duration = Duration::from_millis(8);

/// A running tree that is to move.
///
/// The order of calls is: `stay_reasons`, `offer`, then with pre-copy `copy_round` as often as it pays,
/// then `freeze`, `dump`, and at last `resume` or `discard`. Dropping it at any moment is `resume`.
#[derive(Debug)]
pub struct Source {
    inside: Inside,
    control: Arc<Control>,
    // Declared before the tracker: the tree runs on before the protection of its memory is lifted.
    frozen: Vec<Held>,
    tracker: Tracker,
    /// File locks that the frozen tree has let go of.
    locks: Vec<descriptors::HeldLock>,
    /// The epoll instances that the job had when it was last looked at.
    epolls: Vec<descriptors::EpollInfo>,
    /// How to find a calm moment, as of the last round.
    calm: Option<Calm>,
    // ptrace belongs to a thread, so a source does too.
    thread_bound: PhantomData<*const ()>,
}

fn calm_failed(error: io::Error) -> Error {
    Error::system("asking about unix sockets", error)
}

/// What is known of the memory of a tree that was dumped, see [`Source::dump_memory`].
#[derive(Debug)]
pub struct DumpedMemory {
    layout: Layout,
    living: Vec<TrackedProcess>,
}

/// A frozen process, with the region that has to go before it runs on.
#[derive(Debug)]
struct Held {
    frozen: Frozen,
    region: Option<Region>,
}

impl Held {
    /// See [`robust`]. It can only fail for threads that have been killed already.
    fn forget_robust(&mut self) {
        let Some(region) = self.region else { return };
        for (number, thread) in &mut self.frozen.threads {
            if let Err(error) = robust::forget(thread, region) {
                tracing::debug!(thread = number, %error, "its robust mutexes lose their owner");
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(region) = self.region.take()
            && let Ok(leader) = self.frozen.leader()
            && let Err(error) = region.remove(leader)
        {
            // Only a process that has been killed can't do it.
            tracing::debug!(process = self.frozen.process, %error, "a region stays behind");
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.take_locks();
    }
}

impl Source {
    /// Takes hold of the tree in a sandbox; stops nothing.
    pub fn attach(sandbox: &Sandbox) -> Result<Source> {
        let inside = sandbox.inside().clone();
        let tracker = Tracker::in_namespace_of(inside.init);
        let control = sandbox.control();
        Ok(Source {
            inside,
            control,
            frozen: Vec::new(),
            tracker,
            locks: Vec::new(),
            epolls: Vec::new(),
            calm: None,
            thread_bound: PhantomData,
        })
    }

    /// What keeps the tree here. Freezes nothing.
    ///
    /// What the tree opens and closes while it is looked at may seem to lead out of it: only what is seen each time counts. The dump
    /// looks once more, when all stands still.
    pub fn stay_reasons(&mut self, external: &dyn External) -> Result<Vec<StayReason>> {
        let look = || survey::stay_reasons(&self.inside, &self.inside.living()?, external);
        let mut seen = look();
        for _ in 1..LOOKS {
            if seen.as_ref().is_ok_and(Vec::is_empty) {
                break;
            }
            std::thread::sleep(BETWEEN_LOOKS);
            seen = match (seen, look()) {
                (Ok(mut reasons), Ok(again)) => {
                    reasons.retain(|reason| again.contains(reason));
                    Ok(reasons)
                }
                // A number may mean another file by the time that it is asked about.
                (Ok(reasons), Err(_)) => Ok(reasons),
                (Err(_), again) => again,
            };
        }
        seen
    }

    /// What the tree needs of a target.
    pub fn offer(&mut self) -> Result<Offer> {
        let processes = self.inside.living()?;
        if processes.is_empty() {
            return Err(Error::Gone);
        }
        survey::offer(&self.inside, &processes)
    }

    /// Sends what was written to since the last round (the first: everything), while the tree runs on. Each process stops for a
    /// moment at its first round, from which on its writes are tracked.
    pub fn copy_round(&mut self, sink: &mut dyn MemorySink) -> Result<RoundStats> {
        let processes = self.inside.living()?;
        if processes.is_empty() {
            return Err(Error::Gone);
        }
        self.calm = Some(self.look_for_calm()?);
        let inside = &self.inside;
        let mut inject = |process: TrackedProcess| inject(inside, process).map_err(io::Error::other);
        self.tracker
            .round(&processes, &mut inject, sink)
            .map_err(|error| Error::system("copying memory while the job runs", error))
    }

    fn look_for_calm(&self) -> Result<Calm> {
        Calm::new(self.inside.init).map_err(calm_failed)
    }

    /// Which of the caller's sockets the running tree has open, in parts of at most `most`, for [`crate::Target::place_early`].
    pub fn preview(&mut self, external: &dyn External, most: usize) -> Result<Vec<Preview>> {
        let processes: Vec<descriptors::Process> = self
            .inside
            .living()?
            .iter()
            .map(|process| descriptors::Process { process: process.process, pid: process.pid })
            .collect();
        let job = descriptors::Job { init: self.inside.init, processes: &processes };
        let (parts, epolls) = descriptors::preview(&job, external, most)?;
        self.epolls = epolls;
        Ok(parts)
    }

    /// Stops every thread, at a moment when nothing is on its way that can't be looked at: until it finds one it stops the tree and lets it
    /// run in turn, for [`FOR_CALM`] at most. The dump then tells what there is.
    pub fn freeze(&mut self) -> Result<()> {
        if !self.frozen.is_empty() {
            return Ok(());
        }
        let calm = match self.calm.take() {
            Some(calm) => calm,
            None => self.look_for_calm()?,
        };
        let start = Instant::now();
        let mut pauses = PAUSES.into_iter();
        let frozen = loop {
            let frozen = freeze::stop(&self.inside, None)?;
            if frozen.is_empty() {
                return Err(Error::Gone);
            }
            if start.elapsed() > FOR_CALM || calm.is_calm().map_err(calm_failed)? {
                break frozen;
            }
            drop(frozen);
            std::thread::sleep(pauses.next().unwrap_or(LONGEST_PAUSE));
        };
        self.frozen = frozen.into_iter().map(|frozen| Held { frozen, region: None }).collect();
        Ok(())
    }

    /// The first half of a dump: memory. The sink is not needed after it.
    pub fn dump_memory(&mut self, sink: &mut dyn MemorySink) -> Result<DumpedMemory> {
        if self.frozen.is_empty() {
            self.freeze()?;
        }
        let living = self.inside.living()?;
        // Memory first: the pages that tapes run in aren't the job's.
        let (layout, _) = self
            .tracker
            .finish(&living, sink)
            .map_err(|error| Error::system("copying the rest of the memory", error))?;
        Ok(DumpedMemory { layout, living })
    }

    /// The second half: all else.
    pub fn dump_rest(&mut self, external: &dyn External, memory: DumpedMemory) -> Result<TreeImage> {
        let DumpedMemory { layout, living } = memory;
        let mut image = self.dump_processes(external, &living, &layout)?;
        image.layout = layout;
        Ok(image)
    }

    fn dump_processes(
        &mut self,
        external: &dyn External,
        living: &[TrackedProcess],
        layout: &Layout,
    ) -> Result<TreeImage> {
        let mut by_number = BTreeMap::new();
        for held in &mut self.frozen {
            let number = held.frozen.process;
            let leader = held.frozen.leader()?;
            let region = match held.region {
                Some(region) => region,
                // All its threads stand still: none of them forks.
                None => Region::install(leader, REGION_AT, false)
                    .map_err(|error| Error::process(number, "mapping pages to run calls in", error))?,
            };
            held.region = Some(region);
            by_number.insert(number, held);
        }
        let processes: Vec<descriptors::Process> =
            living.iter().map(|p| descriptors::Process { process: p.process, pid: p.pid }).collect();
        let job = descriptors::Job { init: self.inside.init, processes: &processes };
        let descriptors =
            descriptors::dump(&job, external, layout, &mut self.epolls, &mut SourceTapes(&mut by_number))?;

        let system_v = sysv::dump(self.inside.init)?;
        let shm = shm::dump(self.inside.init, layout)?;
        let init = self.inside.proc.status(Place::Process(1));
        let init = init.map_err(|error| Error::system("reading the status of a job's init", error))?;
        let mut filters = Filters::new(init.seccomp_filters);
        let mut images = Vec::new();
        let mut last_pid = 1;
        for process in self.inside.processes()? {
            let image = match by_number.get_mut(&process) {
                Some(held) => {
                    let region = held.region.ok_or(Error::Gone)?;
                    dump::process(&self.inside, &mut held.frozen, region, &mut filters)?
                }
                None => {
                    let stat = match self.inside.proc.stat(Place::Process(process)) {
                        Ok(stat) => stat,
                        // Init isn't frozen, and has just collected it.
                        Err(error) if has_gone(&error) => continue,
                        Err(error) => return Err(Error::process(process, "reading its stat", error)),
                    };
                    if !stat.is_zombie() {
                        return Err(Error::Image(format!("process {process} appeared during the freeze")));
                    }
                    dump::zombie(process, &stat)
                }
            };
            if let ProcessState::Alive(live) = &image.state {
                last_pid = live.threads.iter().map(|thread| thread.thread).fold(last_pid, u32::max);
            }
            last_pid = last_pid.max(process);
            images.push(image);
        }
        ask_parents(&mut images, &mut SourceTapes(&mut by_number))?;
        check_terminals(&images, &descriptors)?;
        survey::sort_by_descent(&mut images, |image| (image.process, image.parent));
        // Asked last: what hasn't been collected by now is in the list for sure.
        let (root, root_exit) = match self.control.first()? {
            Root::Runs(root) => (u32::try_from(root).map_err(|_| Error::Gone)?, None),
            Root::Ended(status) => (0, Some(status)),
        };
        // Source and target can't both have them, and the target takes them before the source hears of that.
        self.locks = descriptors::held_locks(&descriptors);
        for lock in &self.locks {
            if let Err(error) = lock.release(&mut SourceTapes(&mut by_number)) {
                tracing::error!(%error, ?lock, "the job does not let go of a file lock");
            }
        }
        let filters = filters.found;
        let has_barriers = |image: &ProcessImage| match &image.state {
            ProcessState::Alive(live) => live.memory_barriers != 0,
            ProcessState::Zombie { .. } => false,
        };
        let version = if images.iter().any(has_barriers) {
            VERSION
        } else if !descriptors.terminals.is_empty() {
            VERSION_FOURTH
        } else if !filters.is_empty() {
            VERSION_THIRD
        } else if root_exit.is_some() || !shm.is_empty() {
            VERSION_SECOND
        } else {
            VERSION_FIRST
        };
        // Read last: time that is counted twice makes a timer late, which is allowed, and never early.
        Ok(TreeImage {
            version,
            clocks: self.inside.clocks(),
            root,
            root_exit,
            last_pid,
            layout: Layout::default(),
            processes: images,
            descriptors,
            system_v,
            shm,
            filters,
        })
    }

    /// Has the tree take again what it let go of for its copy.
    fn take_locks(&mut self) {
        let locks = std::mem::take(&mut self.locks);
        let mut by_number = self.frozen.iter_mut().map(|held| (held.frozen.process, held)).collect();
        for lock in locks {
            if let Err(error) = lock.take(&mut SourceTapes(&mut by_number)) {
                tracing::error!(%error, ?lock, "the job has lost a file lock: somebody took it while the job was to move");
            }
        }
    }

    /// Lets the tree run on as if nothing had been.
    pub fn resume(mut self) -> Result<()> {
        self.take_locks();
        for mut held in std::mem::take(&mut self.frozen) {
            let process = held.frozen.process;
            if let Some(region) = held.region.take() {
                region
                    .remove(held.frozen.leader()?)
                    .map_err(|error| Error::process(process, "taking our pages away", error))?;
            }
            for (_, thread) in std::mem::take(&mut held.frozen.threads) {
                thread.release().map_err(|error| Error::process(process, "letting a thread run on", error))?;
            }
        }
        Ok(())
    }

    /// Kills the tree without a trace, after it runs elsewhere.
    pub fn discard(mut self) {
        self.locks.clear();
        let mut frozen = std::mem::take(&mut self.frozen);
        for held in &mut frozen {
            held.forget_robust();
            // It can only be that it is dead already.
            let _ = sys::process::kill(held.frozen.pid, libc::SIGKILL);
        }
        for mut held in frozen {
            held.region = None;
            // The first thread can be collected only after the others.
            let process = held.frozen.process;
            let first = held.frozen.threads.remove(&process);
            for (_, thread) in std::mem::take(&mut held.frozen.threads) {
                thread.bury();
            }
            if let Some(first) = first {
                first.bury();
            }
        }
    }
}

/// Runs tapes for the dump of descriptors.
struct SourceTapes<'a, 'b>(&'a mut BTreeMap<u32, &'b mut Held>);

impl Tapes for SourceTapes<'_, '_> {
    fn run(&mut self, process: u32, tape: &Tape) -> io::Result<Results> {
        let gone = || io::Error::from_raw_os_error(libc::ESRCH);
        let held = self.0.get_mut(&process).ok_or_else(gone)?;
        let region = held.region.ok_or_else(gone)?;
        Ok(tape.run(held.frozen.leader().map_err(io::Error::other)?, region)?)
    }

    /// Nothing is put into a process at the source.
    fn import(&mut self, _: u32, _: BorrowedFd<'_>) -> io::Result<RawFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Notes of which processes that are stopped their parents have been told.
fn ask_parents(images: &mut [ProcessImage], tapes: &mut SourceTapes<'_, '_>) -> Result<()> {
    for image in images {
        let ProcessState::Alive(live) = &mut image.state else { continue };
        // That of a process which has no parent in the job nobody wants to know.
        if live.stopped_by.is_none() || !tapes.0.contains_key(&image.parent) {
            continue;
        }
        let mut tape = Tape::new();
        let told = tape.room(128);
        let options = libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT;
        let asked = [libc::P_PID.into(), image.process.into(), told.into(), options.into(), 0.into()];
        let asked = tape.syscall(libc::SYS_waitid, &asked);
        let failed = |error| Error::process(image.parent, "asking for a child that is stopped", error);
        let results = tapes.run(image.parent, &tape).map_err(failed)?;
        // siginfo_t: si_pid stays 0 when there is nothing to tell.
        live.stop_seen = results.get(asked).is_ok() && results.word(told.plus(16)) & 0xffff_ffff == 0;
    }
    Ok(())
}

/// Every controlling terminal must be one of the job's.
fn check_terminals(processes: &[ProcessImage], descriptors: &TreeDescriptors) -> Result<()> {
    let is_own = |process: &ProcessImage, number: u32| {
        descriptors.terminals.iter().any(|terminal| {
            let session = terminal.live.as_ref().and_then(|live| live.session);
            terminal.number == Some(number) && session == Some(process.session)
        })
    };
    let alive = processes.iter().filter(|process| matches!(process.state, ProcessState::Alive(_)));
    let astray = alive.filter(|process| process.terminal.is_some_and(|terminal| !is_own(process, terminal.number)));
    let reasons: Vec<StayReason> =
        astray.map(|process| StayReason::new(process.process, "process", descriptors::FOREIGN_TERMINAL)).collect();
    if reasons.is_empty() { Ok(()) } else { Err(Error::Stays(reasons)) }
}

/// Whether the process whose file was read isn't there any more.
fn has_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// Makes a userfaultfd in a process and fetches it, with the process standing still meanwhile. `None` when the process has no room
/// for another descriptor.
fn inject(inside: &Inside, process: TrackedProcess) -> Result<Option<OwnedFd>> {
    let number = process.process;
    let failed = |what: &'static str| move |error: io::Error| Error::process(number, what, error);
    // Everything that was stopped on the way is let go at the end.
    let mut all = freeze::stop(inside, Some(number))?;
    let frozen = all.iter_mut().find(|frozen| frozen.process == number).ok_or(Error::Gone)?;
    let leader = frozen.leader()?;
    let region = Region::install(leader, REGION_AT, true).map_err(failed("mapping pages to run calls in"))?;
    let made = (|| {
        let there = match userfaultfd(leader, region) {
            Ok(there) => there,
            Err(error) if error.raw_os_error() == Some(libc::EMFILE) => return Ok(None),
            Err(error) => return Err(error),
        };
        let handle = sys::process::pidfd_open(process.pid)?;
        let here = sys::process::pidfd_getfd(handle.as_fd(), there);
        let mut tape = Tape::new();
        tape.require(libc::SYS_close, &[there.into()]);
        tape.run(leader, region)?;
        here.map(Some)
    })();
    region.remove(leader).map_err(failed("taking our pages away"))?;
    made.map_err(failed("making a userfaultfd in it"))
}

/// Has a process make a userfaultfd; its number there. A process may have all the descriptors that its soft limit allows, which it
/// can raise for a moment.
fn userfaultfd(leader: &mut Stopped, region: Region) -> io::Result<i32> {
    let mut tape = Tape::new();
    let limits = tape.room(16);
    let resource = u64::from(libc::RLIMIT_NOFILE);
    tape.require(libc::SYS_prlimit64, &[0.into(), resource.into(), 0.into(), limits.into()]);
    let make = |tape: &mut Tape| tape.syscall(libc::SYS_userfaultfd, &[sys::uffd::CREATE_FLAGS.into()]);
    let made = make(&mut tape);
    let results = tape.run(leader, region)?;
    let (soft, hard) = (results.word(limits), results.word(limits.plus(8)));
    let made = match results.get(made) {
        Err(error) if error.raw_os_error() == Some(libc::EMFILE) && soft < hard => {
            let mut tape = Tape::new();
            let set = |tape: &mut Tape, soft: u64| {
                let limits = tape.data(&[soft, hard].map(u64::to_ne_bytes).concat());
                tape.require(libc::SYS_prlimit64, &[0.into(), resource.into(), limits.into(), 0.into()]);
            };
            set(&mut tape, hard);
            let made = make(&mut tape);
            set(&mut tape, soft);
            tape.run(leader, region)?.get(made)?
        }
        other => other?,
    };
    i32::try_from(made).map_err(io::Error::other)
}
