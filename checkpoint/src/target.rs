//! A tree built anew from what a source sent.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use sys::libc;
use sys::proc::Place;
use sys::tape::Tape;

use crate::descriptors::{self, Early, Preview, Restorer};
use crate::error::{Error, Result};
use crate::external::ExternalKey;
use crate::image::{ProcessImage, ProcessState, TreeImage, VERSION, VERSION_FIRST};
use crate::init::protocol::Root;
use crate::memory::{Filler, Layout, ProcessLayout};
use crate::offer::Offer;
use crate::restore;
use crate::sandbox::{Control, Sandbox};
use crate::shm;
use crate::stubs::Stubs;
use crate::survey;
use crate::sysv;
use crate::terminals::Terminals;

/// A tree under construction.
///
/// While the job runs at the source, [`Target::layout`] and [`Target::pages`] build and fill its address spaces in the
/// order in which the source's [`crate::MemorySink`] was called. [`Target::restore`] adds the rest, and [`Target::run`]
/// lets it go. Dropping it before kills what was built; the sandbox is empty again.
#[derive(Debug)]
pub struct Target {
    control: Arc<Control>,
    stubs: Stubs,
    filler: Filler,
    /// Session of each process that the offer knew.
    sessions: BTreeMap<u32, u32>,
    /// Descriptors that were put into stubs before the freeze.
    early: Early,
    /// Terminals; taken by the restore.
    terminals: Option<Terminals>,
    ready: Option<Ready>,
    // ptrace belongs to a thread, so a target does too.
    thread_bound: PhantomData<*const ()>,
}

/// A tree that is complete.
#[derive(Debug)]
struct Ready {
    image: TreeImage,
    first: Root,
    restorer: Restorer,
}

fn memory_error(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |error| Error::system(what, error)
}

impl Target {
    /// Checks whether this machine can take the tree, and prepares to build it in an empty sandbox.
    pub fn create(sandbox: &mut Sandbox, offer: &Offer) -> Result<Target> {
        let inside = sandbox.inside().clone();
        survey::check(&inside, offer)?;
        if !inside.processes()?.is_empty() {
            return Err(Error::Refused("its sandbox isn't empty".into()));
        }
        Ok(Target {
            control: sandbox.control(),
            filler: Filler::in_namespace_of(inside.init),
            terminals: Some(Terminals::of(inside.init)),
            stubs: Stubs::new(inside)?,
            sessions: offer.processes.iter().map(|summary| (summary.process, summary.session)).collect(),
            early: Early::default(),
            ready: None,
            thread_bound: PhantomData,
        })
    }

    /// Makes the address spaces as they are at the source now.
    pub fn layout(&mut self, layout: Layout) -> Result<()> {
        for process in self.stubs.numbers() {
            // Only processes of a layout; leaders of sessions that were made for others stay.
            if self.sessions.contains_key(&process) && layout.process(process).is_none() {
                self.stubs.kill(process);
                self.early.forget(process);
                if let Some(terminals) = &mut self.terminals {
                    terminals.forget(process);
                }
            }
        }
        for next in &layout.processes {
            self.prepare(next)?;
        }
        let kernel_areas: Vec<ProcessLayout> = layout.processes.clone();
        self.filler.layout(layout, &mut self.stubs).map_err(memory_error("mapping the job's memory"))?;
        for next in &kernel_areas {
            self.stubs.place_kernel_areas(next)?;
        }
        Ok(())
    }

    fn prepare(&mut self, next: &ProcessLayout) -> Result<()> {
        // Everybody is born into the session of whoever made it, so a session has to be there before those who are in it. Who leads one has
        // made it after its birth, and perhaps after it was looked at: then a child of its shows that it has.
        if next.session == next.process || next.session == next.parent {
            self.lead_session(next.session)?;
        }
        if !self.stubs.contains(next.process) {
            let session = match next.session {
                // From a source that doesn't tell: as it was, or as its parent's, or the image will say otherwise.
                0 => {
                    let known = self.sessions.get(&next.process).or_else(|| self.sessions.get(&next.parent));
                    known.copied().unwrap_or(next.process)
                }
                // It may have made one since the offer.
                told => told,
            };
            self.sessions.insert(next.process, session);
            self.stubs.create(next.process, next.parent, session, libc::SIGCHLD)?;
        }
        if let Some(number) = next.terminal.filter(|_| next.session == next.process)
            && let Some(terminals) = &mut self.terminals
        {
            terminals.control(next.process, number, &mut self.stubs)?;
        }
        self.stubs.make_room(next)
    }

    /// Has a process, if it is there already, make a session of its own, unless it has.
    fn lead_session(&mut self, process: u32) -> Result<()> {
        if !self.stubs.contains(process) {
            return Ok(());
        }
        let stub = self.stubs.get(process)?;
        if stub.session != process {
            let mut tape = Tape::new();
            tape.require(libc::SYS_setsid, &[]);
            stub.run(&tape, "making its session")?;
            stub.session = process;
            self.sessions.insert(process, process);
        }
        Ok(())
    }

    /// Fills in memory.
    pub fn pages(&mut self, process: u32, address: u64, data: &[u8]) -> Result<()> {
        self.filler.pages(process, address, data).map_err(memory_error("filling in the job's memory"))
    }

    /// Puts the caller's descriptors for a preview's slots, in that order, where the preview saw them, and makes the epoll instances
    /// that watch them. The descriptors must be non-blocking. What can't go there is left out: see [`Target::early_keys`].
    pub fn place_early(&mut self, preview: &Preview, descriptors: &[OwnedFd]) -> Result<()> {
        let process = preview.process;
        if !self.stubs.contains(process) {
            return Ok(());
        }
        let us = (self.stubs.get(process)?.pid, self.stubs.inside.owner);
        descriptors::place_early(&mut self.early, preview, descriptors, us, &mut self.stubs)
            .map_err(|error| Error::process(process, "placing descriptors in it", error))
    }

    /// What is placed already and need not be given to [`Target::restore`].
    pub fn early_keys(&self) -> HashSet<ExternalKey> {
        self.early.slots.values().copied().collect()
    }

    /// Of what was placed early, keeps only the sockets that the caller still has in mind.
    pub fn keep_early(&mut self, is_kept: impl Fn(ExternalKey) -> bool) {
        self.early.slots.retain(|_, key| is_kept(*key));
    }

    /// Everything else; after it the tree is complete and stands still.
    pub fn restore(
        &mut self,
        mut image: TreeImage,
        externals: &mut dyn FnMut(ExternalKey) -> io::Result<OwnedFd>,
    ) -> Result<()> {
        if !(VERSION_FIRST..=VERSION).contains(&image.version) {
            return Err(Error::Image(format!(
                "it has version {}, this release reads {VERSION_FIRST} to {VERSION}: run the same release on both nodes",
                image.version
            )));
        }
        let first = image.first()?;
        self.filler.finish(&mut self.stubs).map_err(memory_error("finishing the job's memory"))?;
        sysv::restore(self.stubs.inside.init, &image.system_v)?;
        shm::restore(self.stubs.inside.init, &image.shm, &self.filler.shm())?;
        self.make_ended(&image)?;
        self.set_sessions_and_groups(&image)?;

        let descriptors = std::mem::take(&mut image.descriptors);
        let listed: Vec<descriptors::Process> = alive(&image)
            .map(|(process, _)| {
                Ok(descriptors::Process { process: process.process, pid: self.stubs.get(process.process)?.pid })
            })
            .collect::<Result<_>>()?;
        let job = descriptors::Job { init: self.stubs.inside.init, processes: &listed };
        let opened = match self.terminals.take() {
            Some(terminals) => terminals.restore(&image.processes, &descriptors, &mut self.stubs)?,
            None => return Err(Error::Image("it was restored before".into())),
        };
        let restorer = Restorer::new(descriptors, &job)?.with_terminals(opened);
        let mut restorer = restorer.with_early(std::mem::take(&mut self.early));
        let filler = &self.filler;
        let mut objects = |device: (u32, u32), inode: u64| {
            filler.object(device, inode).and_then(|object| object.try_clone_to_owned().ok())
        };
        restorer.place(&mut self.stubs, externals, &mut objects)?;

        for (process, live) in alive(&image) {
            restore::process(&mut self.stubs, process, live, image.clocks, &image.filters)?;
        }
        self.end_ended(&image)?;
        self.set_last_pid(image.last_pid)?;
        self.ready = Some(Ready { image, first, restorer });
        Ok(())
    }

    /// Processes that ended before the dump have to be there for their parents, and for sessions and groups.
    fn make_ended(&mut self, image: &TreeImage) -> Result<()> {
        for process in &image.processes {
            if self.stubs.contains(process.process) {
                continue;
            }
            if matches!(process.state, ProcessState::Alive(_)) {
                return Err(Error::Image(format!("process {} has no memory", process.process)));
            }
            self.stubs.create(process.process, process.parent, process.session, process.exit_signal)?;
        }
        // A group outlives its leader; it is made anew by somebody with the leader's number. That of a session's leader, in
        // which everybody is born, need not be.
        for process in &image.processes {
            // A terminal's foreground may have ended as a whole.
            let foreground = process.terminal.map_or(0, |terminal| terminal.foreground);
            if foreground > 1 && !self.stubs.contains(foreground) && self.stubs.member_of(foreground).is_none() {
                self.stubs.create(foreground, 1, process.session, 0)?;
            }
            if !self.stubs.contains(process.group) && self.stubs.member_of(process.group).is_none() {
                self.stubs.create(process.group, 1, process.session, 0)?;
            }
        }
        Ok(())
    }

    fn set_sessions_and_groups(&mut self, image: &TreeImage) -> Result<()> {
        for process in &image.processes {
            let stub = self.stubs.get(process.process)?;
            if stub.session == process.session {
                continue;
            }
            if process.session != process.process {
                return Err(Error::Image(format!("process {} changed its session; try again", process.process)));
            }
            self.lead_session(process.process)?;
        }
        // Leaders first: a group has to be there to be joined.
        let foreground = |process: &ProcessImage| process.terminal.map_or(0, |terminal| terminal.foreground);
        let is_leader = |number: &u32| {
            let mut processes = image.processes.iter();
            let is_made = !processes.clone().any(|process| process.process == *number);
            processes.any(|process| process.group == *number || is_made && foreground(process) == *number)
        };
        let leaders = self.stubs.numbers().into_iter().filter(is_leader);
        for leader in leaders.collect::<Vec<_>>() {
            self.join(leader, leader)?;
        }
        for process in &image.processes {
            self.join(process.process, process.group)?;
        }
        Ok(())
    }

    fn join(&mut self, process: u32, group: u32) -> Result<()> {
        let stat = self
            .stubs
            .inside
            .proc
            .stat(Place::Process(process))
            .map_err(|error| Error::process(process, "reading its stat", error))?;
        if stat.group == group {
            return Ok(());
        }
        let mut tape = Tape::new();
        tape.require(libc::SYS_setpgid, &[0.into(), group.into()]);
        self.stubs.get(process)?.run(&tape, "joining its process group")?;
        Ok(())
    }

    /// Ends what had ended, and what was made for sessions and groups only.
    fn end_ended(&mut self, image: &TreeImage) -> Result<()> {
        // Children first, or they would be handed to another parent.
        for process in image.processes.iter().rev() {
            if let ProcessState::Zombie { status } = process.state
                && let Some(stub) = self.stubs.remove(process.process)
            {
                restore::end(stub, &process.name, status)?;
            }
        }
        for process in self.stubs.numbers() {
            if !image.processes.iter().any(|wanted| wanted.process == process) {
                self.stubs.kill(process);
            }
        }
        Ok(())
    }

    /// The next number given to a process is the one that would have been next at the source.
    fn set_last_pid(&mut self, last: u32) -> Result<()> {
        let mut tape = Tape::new();
        let path = tape.string(b"/proc/sys/kernel/ns_last_pid");
        let flags = libc::O_WRONLY | libc::O_CLOEXEC;
        let file = tape.syscall(libc::SYS_openat, &[libc::AT_FDCWD.into(), path.into(), flags.into()]);
        let text = last.to_string();
        let place = tape.data(text.as_bytes());
        tape.syscall(libc::SYS_write, &[file.into(), place.into(), text.len().into()]);
        tape.syscall(libc::SYS_close, &[file.into()]);
        self.stubs.run_on_init(&tape)
    }

    /// Lets the tree run. From here on its instructions execute.
    pub fn run(mut self) -> Result<()> {
        let Some(Ready { image, first, mut restorer }) = self.ready.take() else {
            return Err(Error::Image("it wasn't restored".into()));
        };
        restorer.finish(&mut self.stubs)?;
        let now = self.stubs.inside.clocks();
        // Children first: that they stop may be what their parents have been told before.
        for process in image.processes.iter().rev() {
            let ProcessState::Alive(live) = &process.state else { continue };
            let stub = self.stubs.get(process.process)?;
            restore::start_clocks(stub, live, image.clocks, now)?;
            let failed = |error| Error::process(process.process, "taking our pages away", error);
            stub.region.remove(&mut stub.leader).map_err(failed)?;
            stub.leader.settle().map_err(failed)?;
            let failed = |error| Error::process(process.process, "stopping it again", error);
            match live.stopped_by {
                Some(_) if live.stop_seen => self.stop_unnoticed(process)?,
                Some(signal) => sys::process::kill(stub.pid, signal).map_err(failed)?,
                None => {}
            }
        }
        self.control.adopt(first)?;
        for (process, _) in alive(&image) {
            let Some(stub) = self.stubs.remove(process.process) else { continue };
            // Others of the job run already: what they did may have been to end this one, or a thread did so that was let go before.
            let released = |result: io::Result<()>| match result {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
                result => result.map_err(|error| Error::process(process.process, "letting it run", error)),
            };
            for (_, thread) in stub.threads {
                released(thread.release())?;
            }
            released(stub.leader.release())?;
        }
        self.stubs.release_init()?;
        self.control.adopted()
    }
}

impl Target {
    /// Stops a process, of which its parent, which stands still, isn't told.
    fn stop_unnoticed(&mut self, image: &ProcessImage) -> Result<()> {
        let stub = self.stubs.get(image.process)?;
        let failed = |error| Error::process(image.process, "stopping it again", error);
        let mut threads: Vec<_> = std::iter::once(&mut stub.leader).chain(stub.threads.values_mut()).collect();
        threads.iter_mut().try_for_each(|thread| thread.settle()).map_err(failed)?;
        sys::process::kill(stub.pid, libc::SIGSTOP).map_err(failed)?;
        threads.iter_mut().try_for_each(|thread| thread.stop_with_process()).map_err(failed)?;
        if self.stubs.contains(image.parent) {
            let mut tape = Tape::new();
            let options = libc::WSTOPPED | libc::WNOHANG;
            tape.syscall(
                libc::SYS_waitid,
                &[libc::P_PID.into(), image.process.into(), 0.into(), options.into(), 0.into()],
            );
            // The SIGCHLD goes with those that the restore has left.
            self.stubs.get(image.parent)?.run(&tape, "collecting the stop of a child")?;
        }
        Ok(())
    }
}

fn alive(image: &TreeImage) -> impl Iterator<Item = (&ProcessImage, &crate::image::LiveProcess)> {
    image.processes.iter().filter_map(|process| match &process.state {
        ProcessState::Alive(live) => Some((process, &**live)),
        ProcessState::Zombie { .. } => None,
    })
}
