//! Processes under construction.
//!
//! A stub is a child of init or of another stub, made with the number it must have, with nothing mapped but the region
//! that tapes run in and nothing open but a descriptor for our own process, from which it fetches descriptors of ours.
//! All stubs are traced and stand still. Their session is decided at birth: a process is in the session of whoever made it
//! unless it makes its own, so each is made by somebody who is in the right one.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use sys::Pid;
use sys::clone::CloneArguments;
use sys::libc;
use sys::proc::Place;
use sys::ptrace::{Seized, Stopped};
use sys::tape::{Region, Results, Slot, Tape};

use crate::descriptors::Tapes;
use crate::error::{Error, Result};
use crate::memory::{self, Area, Argument, Backing, Batch, KernelArea, ProcessLayout};
use crate::robust;
use crate::sandbox::{INIT, Inside};
use crate::source::REGION_AT;

/// How long a new process may take to come to its first stop.
const BIRTH: Duration = Duration::from_secs(5);
/// One past the last address of a program.
const ADDRESSES_END: u64 = 0x7fff_ffff_f000;
const ARCH_MAP_VDSO_64: i32 = 0x2003;

/// A process under construction.
#[derive(Debug)]
pub(crate) struct Stub {
    pub process: u32,
    pub pid: Pid,
    pub session: u32,
    pub leader: Stopped,
    pub region: Region,
    /// The other threads, by the job's numbers.
    pub threads: BTreeMap<u32, Stopped>,
    /// Where the kernel's own areas are now.
    kernel: Vec<(u64, u64)>,
}

/// All of them, and init, which makes the first.
#[derive(Debug)]
pub(crate) struct Stubs {
    pub inside: Inside,
    init: Option<(Stopped, Region)>,
    stubs: BTreeMap<u32, Stub>,
}

fn step(process: u32, what: &'static str) -> impl Fn(io::Error) -> Error {
    move |error| Error::process(process, what, error)
}

impl Stubs {
    /// Stops init and prepares it to make processes.
    pub fn new(inside: Inside) -> Result<Stubs> {
        let failed = |error| Error::system("stopping init", error);
        let seized = Seized::new(inside.init).map_err(failed)?;
        seized.interrupt().map_err(failed)?;
        let mut init = seized.wait_stop(BIRTH).map_err(failed)?.ok_or(Error::Gone)?;
        let region = Region::install(&mut init, REGION_AT, false).map_err(failed)?;
        Ok(Stubs { inside, init: Some((init, region)), stubs: BTreeMap::new() })
    }

    pub fn get(&mut self, process: u32) -> Result<&mut Stub> {
        self.stubs.get_mut(&process).ok_or_else(|| Error::Image(format!("process {process} was never announced")))
    }

    pub fn contains(&self, process: u32) -> bool {
        self.stubs.contains_key(&process)
    }

    pub fn numbers(&self) -> Vec<u32> {
        self.stubs.keys().copied().collect()
    }

    pub fn remove(&mut self, process: u32) -> Option<Stub> {
        self.stubs.remove(&process)
    }

    /// Makes a process with this number, parent and session. A parent must be there already.
    pub fn create(&mut self, process: u32, parent: u32, session: u32, exit_signal: i32) -> Result<()> {
        let mut creator = parent;
        let mut helper = None;
        if session != process && self.session_of(parent) != Some(session) {
            // Somebody born in a session in which its parent isn't: its real parent has ended. A member of the session
            // takes that part, and leaves its child to init by ending.
            if parent != INIT {
                let what = format!("process {process} is in a session of neither its parent nor its own");
                return Err(Error::Image(what));
            }
            let member = match self.member_of(session) {
                Some(member) => member,
                None => {
                    self.create(session, INIT, session, 0)?;
                    session
                }
            };
            let number = self.unused();
            self.create(number, member, session, 0)?;
            helper = Some(number);
            creator = number;
        }
        let child = self.fork(process, creator, u64::from(exit_signal.unsigned_abs()))?;
        let mut stub = Stub {
            process,
            pid: child.thread(),
            session,
            leader: child,
            region: self.region_of(creator)?,
            threads: BTreeMap::new(),
            kernel: Vec::new(),
        };
        stub.empty(self.inside.owner, session == process)?;
        self.stubs.insert(process, stub);
        if let Some(helper) = helper {
            self.kill(helper);
        }
        Ok(())
    }

    /// A number for a process that is there for a moment only.
    fn unused(&self) -> u32 {
        (2..30_000).rev().find(|number| !self.contains(*number)).unwrap_or(30_000)
    }

    /// Any process of a session. As long as there is one, the number of a leader that has gone can't be given to another.
    pub fn member_of(&self, session: u32) -> Option<u32> {
        self.stubs.values().find(|stub| stub.session == session).map(|stub| stub.process)
    }

    fn session_of(&self, process: u32) -> Option<u32> {
        self.stubs.get(&process).map(|stub| stub.session)
    }

    fn region_of(&self, process: u32) -> Result<Region> {
        let init = self.init.as_ref().filter(|_| process == INIT).map(|(_, region)| *region);
        init.or_else(|| self.stubs.get(&process).map(|stub| stub.region))
            .ok_or_else(|| Error::Image(format!("process {process}, a parent, isn't there")))
    }

    fn fork(&mut self, process: u32, creator: u32, exit_signal: u64) -> Result<Stopped> {
        let region = self.region_of(creator)?;
        let thread = match (&mut self.init, creator) {
            (Some((init, _)), INIT) => init,
            _ => &mut self.get(creator)?.leader,
        };
        let mut tape = Tape::new();
        clone(&mut tape, CloneArguments { exit_signal, ..CloneArguments::default() }, process);
        tape.run(thread, region).map_err(|error| Error::process(process, "making the process", error))?;
        let child = thread.take_children().pop().ok_or(Error::Gone)?;
        Seized::born(child).wait_stop(BIRTH).map_err(step(process, "waiting for the new process"))?.ok_or(Error::Gone)
    }

    /// Kills a process under construction.
    pub fn kill(&mut self, process: u32) {
        let Some(stub) = self.stubs.remove(&process) else { return };
        let parent = self.inside.proc.stat(Place::Process(process)).map(|stat| stat.parent).unwrap_or(INIT);
        stub.kill();
        // At once, also if it is init's, which stands still: its number may be wanted again.
        let mut tape = Tape::new();
        let options = libc::WNOHANG | libc::__WALL;
        tape.syscall(libc::SYS_wait4, &[process.into(), 0.into(), options.into()]);
        match self.stubs.get_mut(&parent) {
            Some(parent) => drop(tape.run(&mut parent.leader, parent.region)),
            None => drop(self.run_on_init(&tape)),
        }
    }

    /// Makes room for the areas of a layout: what is ours moves out of the way.
    pub fn make_room(&mut self, next: &ProcessLayout) -> Result<()> {
        let stub = self.get(next.process)?;
        let wanted = kernel_areas(next);
        if stub.kernel != wanted {
            let mut tape = Tape::new();
            for (start, end) in std::mem::take(&mut stub.kernel) {
                tape.require(libc::SYS_munmap, &[start.into(), (end - start).into()]);
            }
            stub.run(&tape, "moving the vdso")?;
        }
        stub.leave(&next.areas)
    }

    /// Puts the kernel's areas where the layout has them.
    pub fn place_kernel_areas(&mut self, next: &ProcessLayout) -> Result<()> {
        let stub = self.get(next.process)?;
        let wanted = kernel_areas(next);
        let Some(&(start, _)) = wanted.first().filter(|_| stub.kernel != wanted) else { return Ok(()) };
        let mut tape = Tape::new();
        tape.require(libc::SYS_arch_prctl, &[ARCH_MAP_VDSO_64.into(), start.into()]);
        stub.run(&tape, "mapping the vdso")?;
        let placed: Vec<(u64, u64)> = sys::vm::maps(stub.pid)
            .map_err(step(next.process, "reading its mappings"))?
            .into_iter()
            .filter(|map| [b"[vdso]".as_slice(), b"[vvar]", b"[vvar_vclock]"].contains(&map.name.as_slice()))
            .map(|map| (map.start, map.end))
            .collect();
        if placed != wanted {
            return Err(Error::Refused("its kernel lays out the vdso differently".into()));
        }
        stub.kernel = wanted;
        Ok(())
    }

    /// Runs a tape in init.
    pub fn run_on_init(&mut self, tape: &Tape) -> Result<()> {
        let (init, region) = self.init.as_mut().ok_or(Error::Gone)?;
        tape.run(init, *region).map_err(|error| Error::process(INIT, "running calls", error))?;
        Ok(())
    }

    /// Lets init go on.
    pub fn release_init(&mut self) -> Result<()> {
        let Some((mut init, region)) = self.init.take() else { return Ok(()) };
        let failed = |error| Error::system("letting init run on", error);
        region.remove(&mut init).map_err(failed)?;
        init.release().map_err(failed)
    }
}

impl Drop for Stubs {
    fn drop(&mut self) {
        for (_, stub) in std::mem::take(&mut self.stubs) {
            stub.kill();
        }
        if let Err(error) = self.release_init() {
            tracing::warn!(%error, "init of a sandbox doesn't go on");
        }
    }
}

/// Adds a clone3 whose child gets this number.
pub(crate) fn clone(tape: &mut Tape, arguments: CloneArguments, number: u32) -> Slot {
    const SET_TID_AT: usize = 64;
    let tid = tape.data(&number.to_ne_bytes());
    let bytes = CloneArguments { set_tid_size: 1, ..arguments }.bytes();
    let place = tape.data(&bytes);
    tape.link(place.plus(SET_TID_AT), tid);
    tape.require(libc::SYS_clone3, &[place.into(), bytes.len().into()])
}

fn kernel_areas(layout: &ProcessLayout) -> Vec<(u64, u64)> {
    let is_kernels = |area: &&Area| {
        matches!(area.backing, Backing::Kernel(KernelArea::Vdso | KernelArea::Vvar | KernelArea::VvarClock))
    };
    layout.areas.iter().filter(is_kernels).map(|area| (area.start, area.end)).collect()
}

impl Stub {
    /// Runs a tape on the first thread.
    pub fn run(&mut self, tape: &Tape, what: &'static str) -> Result<Results> {
        if tape.is_empty() {
            return Ok(Results::default());
        }
        tape.run(&mut self.leader, self.region).map_err(|error| Error::process(self.process, what, error))
    }

    /// Runs a tape on one of its threads.
    pub fn run_on(&mut self, thread: u32, tape: &Tape, what: &'static str) -> Result<Results> {
        let stopped = self.threads.get_mut(&thread).unwrap_or(&mut self.leader);
        tape.run(stopped, self.region).map_err(|error| Error::process(self.process, what, error))
    }

    /// Takes leave of everything inherited.
    fn empty(&mut self, owner: RawFd, lead_session: bool) -> Result<()> {
        let process = self.process;
        let mut tape = Tape::new();
        // The kernel would write to the area of the program whose copy this is.
        if let Some(rseq) = self.leader.rseq().map_err(step(process, "reading restartable sequences"))? {
            const UNREGISTER: i32 = 1;
            let arguments = [rseq.address.into(), rseq.size.into(), UNREGISTER.into(), rseq.signature.into()];
            tape.require(libc::SYS_rseq, &arguments);
        }
        tape.require(libc::SYS_set_robust_list, &[0.into(), 24.into()]);
        tape.require(libc::SYS_set_tid_address, &[0.into()]);
        if lead_session {
            tape.require(libc::SYS_setsid, &[]);
        }
        if owner > 0 {
            tape.require(libc::SYS_close_range, &[0.into(), (owner - 1).into()]);
        }
        tape.require(libc::SYS_close_range, &[(owner + 1).into(), u32::MAX.into()]);
        tape.require(libc::SYS_munmap, &[0.into(), self.region.start.into()]);
        let end = self.region.end();
        tape.require(libc::SYS_munmap, &[end.into(), (ADDRESSES_END - end).into()]);
        self.run(&tape, "emptying a new process")?;
        Ok(())
    }

    /// Moves the region out of the way of areas.
    fn leave(&mut self, areas: &[Area]) -> Result<()> {
        let length = self.region.length;
        let free = |start: u64| !areas.iter().any(|area| area.start < start + length && start < area.end);
        if free(self.region.start) {
            return Ok(());
        }
        const STEP: u64 = 16 << 20;
        for at in (1..1 << 16).map(|index| REGION_AT + index * STEP).filter(|at| free(*at)) {
            match self.region.relocate(&mut self.leader, at) {
                Ok(region) => {
                    self.region = region;
                    return Ok(());
                }
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                Err(error) => return Err(Error::process(self.process, "moving our pages out of the way", error)),
            }
        }
        Err(Error::Refused(format!("process {} leaves no room for a page of ours", self.process)))
    }

    fn kill(mut self) {
        for thread in std::iter::once(&mut self.leader).chain(self.threads.values_mut()) {
            if let Err(error) = robust::forget(thread, self.region) {
                tracing::debug!(process = self.process, %error, "its robust mutexes lose their owner");
            }
        }
        // It can't be gone: it is ours and stands still.
        let _ = sys::process::kill(self.pid, libc::SIGKILL);
        for (_, thread) in self.threads {
            thread.bury();
        }
        self.leader.bury();
    }
}

impl memory::Stubs for Stubs {
    fn pid(&self, process: u32) -> Option<Pid> {
        self.stubs.get(&process).map(|stub| stub.pid)
    }

    fn run(&mut self, process: u32, batch: &Batch) -> io::Result<Vec<i64>> {
        let mut tape = Tape::new();
        let data = tape.data(&batch.data);
        let mut slots: Vec<Slot> = Vec::with_capacity(batch.calls.len());
        for call in &batch.calls {
            let mut arguments = [sys::tape::Argument::Value(0); 6];
            for (place, argument) in arguments.iter_mut().zip(call.arguments) {
                *place = match argument {
                    Argument::Value(value) => value.into(),
                    Argument::Data(offset) => data.plus(offset).into(),
                    Argument::Result(index) => slots.get(index).copied().ok_or(io::ErrorKind::InvalidInput)?.into(),
                };
            }
            slots.push(tape.syscall(call.number, &arguments));
        }
        Ok(Tapes::run(self, process, &tape)?.values().to_vec())
    }

    fn import(&mut self, process: u32, descriptor: BorrowedFd<'_>) -> io::Result<u64> {
        let number = Tapes::import(self, process, descriptor)?;
        u64::try_from(number).map_err(io::Error::other)
    }
}

impl Tapes for Stubs {
    fn run(&mut self, process: u32, tape: &Tape) -> io::Result<Results> {
        let stub = self.stubs.get_mut(&process).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        Ok(tape.run(&mut stub.leader, stub.region)?)
    }

    fn import(&mut self, process: u32, descriptor: BorrowedFd<'_>) -> io::Result<RawFd> {
        let mut tape = Tape::new();
        let arguments = [self.inside.owner.into(), descriptor.as_raw_fd().into(), 0.into()];
        let fetched = tape.require(libc::SYS_pidfd_getfd, &arguments);
        let results = Tapes::run(self, process, &tape)?;
        RawFd::try_from(results.get(fetched)?).map_err(io::Error::other)
    }
}
