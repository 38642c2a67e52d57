//! A traced thread that runs.

use std::io;
use std::time::{Duration, Instant};

use super::{Cause, FOLLOW, PTRACE_EVENT_STOP, Report, Stopped, event_message, request, resume, wait};
use crate::Pid;

/// What [`Seized::poll_stop`] found.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "it is taken apart where it is returned")]
pub enum Progress {
    /// It still runs.
    Running(Seized),
    /// It stands still.
    Stopped(Stopped),
    /// It has ended.
    Ended,
}

/// A thread that is traced and runs.
#[derive(Debug)]
pub struct Seized {
    thread: Pid,
    children: Vec<Pid>,
    ended: bool,
}

impl Seized {
    /// Starts to trace a running thread without stopping it. `ESRCH`: it has ended. `EPERM`: it is ending, or traced.
    pub fn new(thread: Pid) -> io::Result<Seized> {
        request(libc::PTRACE_SEIZE, thread, 0, FOLLOW as usize)?;
        Ok(Seized { thread, children: Vec::new(), ended: false })
    }

    /// A thread or process that a tracee has made, which is traced from its birth and stops by itself.
    pub fn born(thread: Pid) -> Seized {
        Seized { thread, children: Vec::new(), ended: false }
    }

    /// The thread.
    pub fn thread(&self) -> Pid {
        self.thread
    }

    /// Threads and processes made by it since the last call. They are traced as well: pass them to [`Seized::born`].
    pub fn take_children(&mut self) -> Vec<Pid> {
        std::mem::take(&mut self.children)
    }

    /// Asks it to stop.
    pub fn interrupt(&self) -> io::Result<()> {
        match request(libc::PTRACE_INTERRUPT, self.thread, 0, 0) {
            // Ended in the meantime: waiting tells.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Whether it has stopped. Signals and events that come first take their course.
    pub fn poll_stop(mut self) -> io::Result<Progress> {
        loop {
            match wait(self.thread, libc::WNOHANG)? {
                None => return Ok(Progress::Running(self)),
                Some(Report::Ended) => {
                    self.ended = true;
                    return Ok(Progress::Ended);
                }
                Some(Report::Stopped { signal, event: PTRACE_EVENT_STOP }) => {
                    let cause = match signal {
                        libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU => Cause::Group(signal),
                        _ => Cause::Interrupted,
                    };
                    let children = self.take_children();
                    // From here on the Stopped lets the thread go.
                    self.ended = true;
                    return Ok(Progress::Stopped(Stopped::new(self.thread, cause, children)));
                }
                Some(Report::Stopped { signal, event }) => {
                    // Any stop clears a pending interrupt, so ask again before going on.
                    let signal = if event == 0 { signal } else { 0 };
                    if matches!(event, libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE) {
                        self.children.push(event_message(self.thread)?);
                    }
                    self.interrupt()?;
                    resume(libc::PTRACE_CONT, self.thread, signal)?;
                }
            }
        }
    }

    /// Waits for it to stop, at most so long. `None` when it has ended; `TimedOut` when it runs on.
    pub fn wait_stop(mut self, patience: Duration) -> io::Result<Option<Stopped>> {
        let start = Instant::now();
        loop {
            self = match self.poll_stop()? {
                Progress::Stopped(stopped) => return Ok(Some(stopped)),
                Progress::Ended => return Ok(None),
                Progress::Running(seized) => seized,
            };
            let waited = start.elapsed();
            if waited > patience {
                return Err(io::ErrorKind::TimedOut.into());
            }
            pause(waited);
        }
    }
}

/// Gives the processor away for a moment: first to whoever waits for it, later for longer.
pub fn pause(waited: Duration) {
    if waited < Duration::from_millis(1) {
        std::thread::yield_now();
    } else {
        std::thread::sleep(Duration::from_micros(100));
    }
}

impl Drop for Seized {
    /// A running tracee can't be let go: it is stopped first.
    fn drop(&mut self) {
        if self.ended {
            for child in self.take_children() {
                drop(Seized::born(child));
            }
            return;
        }
        let seized = Seized { thread: self.thread, children: std::mem::take(&mut self.children), ended: false };
        // Moving out of a drop needs a value of its own, which must not come back here.
        self.ended = true;
        if seized.interrupt().is_ok() {
            drop(stop_for_good(seized));
        }
    }
}

/// Stops a thread however long it takes to come out of the kernel, but not for ever.
fn stop_for_good(mut seized: Seized) -> Option<Stopped> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        seized = match seized.poll_stop() {
            Ok(Progress::Stopped(stopped)) => return Some(stopped),
            Ok(Progress::Running(seized)) => seized,
            Ok(Progress::Ended) | Err(_) => return None,
        };
        pause(start.elapsed());
    }
    // It waits in the kernel and can't be interrupted: the tracer's end lets it go.
    seized.ended = true;
    None
}
