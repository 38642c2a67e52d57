//! Stopping every thread of a tree, or of one process.
//!
//! Threads and processes appear while others are being stopped. What a traced thread makes is traced from its birth, and
//! the lists are read again until nothing is new, so when this is done nothing runs. A thread that waits in the kernel
//! without heeding signals (a parent in vfork, a slow disk) can't be stopped: everything is let go for a moment, so that
//! whatever it waits for can happen, and tried again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

use sys::Pid;
use sys::proc::Place;
use sys::ptrace::{Progress, Seized, Stopped, pause};

use crate::error::{Error, Result};
use crate::partial;
use crate::sandbox::Inside;

/// A process none of whose threads runs.
#[derive(Debug)]
pub(crate) struct Frozen {
    /// As the job numbers it.
    pub process: u32,
    /// As we number it.
    pub pid: Pid,
    /// Its threads by the job's numbers. The first is the one with the process's number.
    pub threads: BTreeMap<u32, Stopped>,
}

impl Frozen {
    /// The thread that has the process's number, or any when that one has ended.
    pub fn leader(&mut self) -> Result<&mut Stopped> {
        self.threads.values_mut().next().ok_or(Error::Gone)
    }
}

/// A round of stopping that doesn't get on for so long is broken off.
const ROUND: Duration = Duration::from_millis(60);
/// How long to try in all.
const PATIENCE: Duration = Duration::from_secs(3);

/// Stops the given processes, or all of the sandbox.
pub(crate) fn stop(inside: &Inside, only: Option<u32>) -> Result<Vec<Frozen>> {
    let start = Instant::now();
    loop {
        match try_stop(inside, only) {
            Err(Error::Stuck { .. }) if start.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(5)),
            result => return result,
        }
    }
}

fn try_stop(inside: &Inside, only: Option<u32>) -> Result<Vec<Frozen>> {
    // Declared in this order so that on an early return those that stand still go first: the others may wait for them.
    let mut running: Vec<Seized> = Vec::new();
    let mut stopped: Vec<Stopped> = Vec::new();
    let mut known: BTreeSet<Pid> = BTreeSet::new();
    loop {
        let found = seize_new(inside, only, &mut known, &mut running)?;
        wait_all(inside, &mut running, &mut stopped, &mut known)?;
        if !found {
            break;
        }
    }
    collect(inside, stopped)
}

/// Traces what isn't traced yet. Says whether there was anything.
fn seize_new(inside: &Inside, only: Option<u32>, known: &mut BTreeSet<Pid>, running: &mut Vec<Seized>) -> Result<bool> {
    let mut found = false;
    let processes = match only {
        Some(process) => vec![process],
        None => inside.processes()?,
    };
    for process in processes {
        let Ok(threads) = inside.proc.threads(process) else { continue };
        for thread in threads {
            let Ok(tid) = inside.pids.outside(thread) else { continue };
            if known.contains(&tid) {
                continue;
            }
            match Seized::new(tid) {
                Ok(seized) => {
                    seized.interrupt().map_err(|error| Error::process(process, "stopping a thread", error))?;
                    known.insert(tid);
                    running.push(seized);
                    found = true;
                }
                Err(error) if has_ended(inside, process, thread, &error) => {}
                Err(error) => return Err(Error::process(process, "tracing a thread", error)),
            }
        }
    }
    Ok(found)
}

fn has_ended(inside: &Inside, process: u32, thread: u32, error: &io::Error) -> bool {
    error.raw_os_error() == Some(sys::libc::ESRCH)
        || inside.proc.stat(Place::Thread(process, thread)).map_or(true, |stat| stat.is_zombie())
}

/// Waits until all that are traced stand still or have ended.
fn wait_all(
    inside: &Inside,
    running: &mut Vec<Seized>,
    stopped: &mut Vec<Stopped>,
    known: &mut BTreeSet<Pid>,
) -> Result<()> {
    let mut progress = Instant::now();
    while !running.is_empty() {
        let before = running.len();
        for mut seized in std::mem::take(running) {
            let born = seized.take_children();
            let mut born_later = Vec::new();
            match seized.poll_stop().map_err(|error| Error::system("waiting for a thread to stop", error))? {
                Progress::Running(seized) => running.push(seized),
                Progress::Stopped(mut thread) => {
                    born_later = thread.take_children();
                    stopped.push(thread);
                }
                Progress::Ended => {}
            }
            for child in born.into_iter().chain(born_later) {
                if known.insert(child) {
                    running.push(Seized::born(child));
                }
            }
        }
        if running.len() < before {
            progress = Instant::now();
        } else if progress.elapsed() > ROUND {
            let error = stuck(inside, &running[0]);
            // Those that stand still must go first: the others may wait for them.
            stopped.clear();
            return Err(error);
        } else {
            pause(progress.elapsed());
        }
    }
    Ok(())
}

fn stuck(inside: &Inside, seized: &Seized) -> Error {
    let thread = inside.pids.inside(seized.thread()).unwrap_or_default();
    let process = inside.process_of(thread).unwrap_or(thread);
    let place = inside.proc.read_text(Place::Thread(process, thread), "wchan").unwrap_or_default();
    Error::Stuck { process, thread, place }
}

/// Sorts threads into their processes.
fn collect(inside: &Inside, stopped: Vec<Stopped>) -> Result<Vec<Frozen>> {
    let mut by_thread: BTreeMap<Pid, Stopped> = stopped.into_iter().map(|thread| (thread.thread(), thread)).collect();
    let now_ns = inside.clocks().monotonic_ns;
    // Every thread has those of init; asked for once, if at all.
    let mut known = None;
    let mut filters = || match known {
        Some(count) => Ok(count),
        None => {
            let count = inside.proc.status(Place::Process(1))?.seccomp_filters as usize;
            known = Some(count);
            Ok(count)
        }
    };
    let mut all = Vec::new();
    for process in inside.processes()? {
        let Ok(numbers) = inside.proc.threads(process) else { continue };
        let mut threads = BTreeMap::new();
        for number in numbers {
            let tid = inside.pids.outside(number).ok();
            if let Some(mut thread) = tid.and_then(|tid| by_thread.remove(&tid)) {
                inside
                    .calls
                    .note(number, &mut thread, now_ns, &mut filters)
                    .map_err(|error| Error::process(process, "reading registers", error))?;
                threads.insert(number, thread);
            }
        }
        if threads.is_empty() {
            continue;
        }
        // The one with the process's number comes first even when numbers have wrapped around.
        let pid = inside.pids.outside(process).map_err(|error| Error::process(process, "finding it", error))?;
        for (number, thread) in &mut threads {
            if let Err(error) = partial::finish_later(pid, thread) {
                // Then its call ends early, as if a signal had interrupted it.
                tracing::debug!(process, thread = number, %error, "a call that was interrupted half-way isn't finished");
            }
        }
        all.push(Frozen { process, pid, threads });
    }
    Ok(all)
}
