//! The namespaces a job lives in.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use sys::Pid;
use sys::clone::Launch;
use sys::proc::{Place, Proc};
use sys::process::PidNamespace;

use crate::calls::Calls;
use crate::error::{Error, Obstacle, Result};
use crate::init::protocol::{Begin, Notice, Reply, Request, Root, Setup, Spawn, receive, send};
use crate::offer::Clocks;

/// Init's number in the job.
pub(crate) const INIT: u32 = 1;

/// What is added to this machine's clocks inside the job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockOffsets {
    /// Added to CLOCK_MONOTONIC, in nanoseconds.
    pub monotonic_ns: i64,
    /// Added to CLOCK_BOOTTIME, in nanoseconds.
    pub boottime_ns: i64,
}

impl ClockOffsets {
    /// Offsets with which the job's clocks, read just now at another machine, continue here.
    ///
    /// Add to the readings the time they may have been under way: a clock that runs ahead is harmless, one that steps
    /// back is not.
    pub fn continuing(clocks: Clocks) -> ClockOffsets {
        ClockOffsets {
            monotonic_ns: clocks.monotonic_ns - sys::process::clock_ns(sys::libc::CLOCK_MONOTONIC),
            boottime_ns: clocks.boottime_ns - sys::process::clock_ns(sys::libc::CLOCK_BOOTTIME),
        }
    }
}

/// What a sandbox is made with.
#[derive(Clone, Debug, Default)]
pub struct SandboxSpec {
    /// The job's host name.
    pub hostname: String,
    /// What that name means inside the job.
    pub addresses: Vec<IpAddr>,
    /// System call filter for everything in the sandbox, installed with a listener.
    pub filter: Option<sys::seccomp::Program>,
    /// Offsets of its clocks; `None` leaves it in the caller's time namespace.
    pub clock_offsets: Option<ClockOffsets>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(i32),
    /// A signal killed it.
    Signal(i32),
}

/// What happened in a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The job's first process ended.
    RootExited {
        /// How.
        status: ExitStatus,
    },
    /// Nothing of the job is left.
    JobEmpty,
    /// Init itself is gone, and with it everything in the sandbox.
    Gone,
}

/// Namespaces (PID, mount with a /proc of their own, network, UTS, IPC, time) with our init in them.
///
/// Dropping it kills everything inside. A [`crate::Source`] or [`crate::Target`] on it must be gone first.
#[derive(Debug)]
pub struct Sandbox {
    listener: Option<OwnedFd>,
    net: OwnedFd,
    events: UnixStream,
    init: Pid,
    init_handle: OwnedFd,
    control: Arc<Control>,
    over: bool,
}

/// What a sandbox and a tree in it both need.
#[derive(Debug)]
pub(crate) struct Control {
    requests: File,
    /// The job's first process.
    root: Mutex<Option<(Pid, OwnedFd)>>,
    inside: Inside,
}

/// Ways to see what is inside a sandbox. They work on when the job unmounts its /proc.
#[derive(Debug, Clone)]
pub(crate) struct Inside {
    /// The job's own /proc: its numbers are the job's.
    pub proc: Arc<Proc>,
    /// Translates numbers.
    pub pids: Arc<PidNamespace>,
    /// Init, as the caller numbers it.
    pub init: Pid,
    /// Number of init's descriptor for our process, which every stub inherits.
    pub owner: i32,
    /// What its threads' calls are known to wait for.
    pub calls: Calls,
    /// What the clocks are off by, inside.
    pub clock_offsets: ClockOffsets,
}

impl Inside {
    /// Everything in the sandbox but init, ascending; ended ones that nobody has collected are there too.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let mut processes = self.proc.processes().map_err(|error| Error::system("listing the job", error))?;
        processes.retain(|process| *process != 1);
        Ok(processes)
    }

    /// The process that a thread belongs to.
    pub fn process_of(&self, thread: u32) -> Option<u32> {
        // A thread's directory is there too, though it isn't listed.
        let text = self.proc.read_text(Place::Process(thread), "status").ok()?;
        text.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok())
    }

    /// The job's clocks now.
    pub fn clocks(&self) -> Clocks {
        let read = sys::process::clock_ns;
        Clocks {
            monotonic_ns: read(sys::libc::CLOCK_MONOTONIC).saturating_add(self.clock_offsets.monotonic_ns),
            boottime_ns: read(sys::libc::CLOCK_BOOTTIME).saturating_add(self.clock_offsets.boottime_ns),
            realtime_ns: read(sys::libc::CLOCK_REALTIME),
        }
    }
}

impl Sandbox {
    /// Makes the namespaces and starts init in them.
    ///
    /// The calling program must call [`crate::init::main`] first thing when its first argument is `init`.
    pub fn create(spec: SandboxSpec) -> Result<Sandbox> {
        let pair = || UnixStream::pair().map_err(|error| Error::system("making a socket for init", error));
        let (requests, init_requests) = pair()?;
        let (events, init_events) = pair()?;
        events.set_nonblocking(true).map_err(|error| Error::system("preparing a socket for init", error))?;
        let requests = File::from(OwnedFd::from(requests));
        let mut preparer = Command::new("/proc/self/exe")
            .arg("init")
            .stdin(OwnedFd::from(init_requests))
            .stdout(OwnedFd::from(init_events))
            .spawn()
            .map_err(|error| Error::system("starting init", error))?;

        let begun = begin(&requests, spec.clone());
        let ended = preparer.wait().map_err(|error| Error::system("waiting for init's first half", error))?;
        let Begun { init, listener, owner } = begun?;
        if !ended.success() {
            return Err(Error::Init(format!("its first half ended with {ended}")));
        }
        let open = |place: &str| {
            File::open(format!("/proc/{init}/{place}"))
                .map(OwnedFd::from)
                .map_err(|error| Error::system(format!("opening {place} of init"), error))
        };
        let init_handle = sys::process::pidfd_open(init).map_err(|error| Error::system("opening init", error))?;
        let mut sandbox = Sandbox {
            listener: None,
            net: open("ns/net")?,
            events,
            init,
            init_handle,
            control: Arc::new(Control {
                requests,
                root: Mutex::new(None),
                inside: Inside {
                    proc: Arc::new(Proc::new(open("root/proc")?)),
                    pids: Arc::new(
                        PidNamespace::of(init).map_err(|error| Error::system("opening the PID namespace", error))?,
                    ),
                    init,
                    owner,
                    calls: Calls::default(),
                    clock_offsets: spec.clock_offsets.unwrap_or_default(),
                },
            }),
            over: false,
        };
        if let Some(number) = listener {
            let listener = sys::process::pidfd_getfd(sandbox.init_handle.as_fd(), number)
                .map_err(|error| Error::system("fetching the listener of the system call filter", error))?;
            sandbox.listener = Some(listener);
        }
        Ok(sandbox)
    }

    /// The listener of the system call filter; `None` the second time or when there is no filter.
    pub fn take_listener(&mut self) -> Option<OwnedFd> {
        self.listener.take()
    }

    /// Init's number, as the caller sees it.
    pub fn init_pid(&self) -> Pid {
        self.init
    }

    /// The job's network namespace.
    pub fn net_namespace(&self) -> BorrowedFd<'_> {
        self.net.as_fd()
    }

    /// Number of the job's first process as the caller sees it: started by [`Sandbox::spawn`] or restored. `None` when it has
    /// ended; others of the job may go on.
    pub fn root_pid(&self) -> Option<Pid> {
        self.control.living_root()
    }

    /// Sends a signal to the job's first process.
    pub fn signal_root(&self, signal: i32) -> Result<()> {
        let root = self.control.root();
        let (_, handle) = root.as_ref().ok_or(Error::Gone)?;
        sys::process::pidfd_send_signal(handle.as_fd(), signal).map_err(signal_error)
    }

    /// Sends a signal to the job: to its first process, or when that has ended to those that nobody of the job is the parent
    /// of, which is what became of a program that made itself a daemon. They pass it on as they see fit. Nobody can pass a
    /// SIGKILL on, so that goes to all.
    pub fn signal(&self, signal: i32) -> Result<()> {
        if signal == sys::libc::SIGKILL {
            return self.kill();
        }
        match self.signal_root(signal) {
            Err(Error::Gone) => self.signal_orphans(signal),
            result => result,
        }
    }

    fn signal_orphans(&self, signal: i32) -> Result<()> {
        let inside = self.inside();
        let mut result = Err(Error::Gone);
        for process in inside.processes()? {
            let Ok(stat) = inside.proc.stat(Place::Process(process)) else { continue };
            if stat.parent != INIT || stat.is_zombie() {
                continue;
            }
            let Ok(pid) = inside.pids.outside(process) else { continue };
            match sys::process::kill(pid, signal).map_err(signal_error) {
                // It has just ended.
                Err(Error::Gone) => {}
                other => result = other,
            }
        }
        result
    }

    /// Kills all processes of the job; init stays, and tells.
    fn kill(&self) -> Result<()> {
        // By init, since its kill(2) of everybody spares none that is being made.
        match self.control.ask(&Request::Kill)? {
            Reply::Killed => Ok(()),
            Reply::Failed { errno: Some(sys::libc::ESRCH), .. } => Err(Error::Gone),
            other => Err(unexpected(&other)),
        }
    }

    /// Starts a program as the job's first process. Returns its number as the caller sees it.
    pub fn spawn(&mut self, launch: Launch) -> Result<Pid> {
        let bytes = |text: OsString| serde_bytes::ByteBuf::from(text.into_vec());
        let program = PathBuf::from(launch.argv.first().cloned().unwrap_or_default());
        let directory = launch.cwd.clone();
        let request = Request::Spawn(Spawn {
            argv: launch.argv.into_iter().map(bytes).collect(),
            env: launch.env.into_iter().map(|(name, value)| (bytes(name), bytes(value))).collect(),
            cwd: bytes(launch.cwd.into_os_string()),
            stdio: launch.stdio.each_ref().map(AsRawFd::as_raw_fd),
        });
        match self.control.ask(&request)? {
            Reply::Spawned { pid } => self.control.know_root(pid),
            Reply::Failed { errno: Some(errno), .. } => {
                let obstacle = Obstacle::of(io::Error::from_raw_os_error(errno), &program, &directory);
                Err(Error::Program { program: program.display().to_string(), obstacle })
            }
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) fn inside(&self) -> &Inside {
        &self.control.inside
    }

    pub(crate) fn control(&self) -> Arc<Control> {
        Arc::clone(&self.control)
    }

    /// Readable when [`Sandbox::next_event`] has something.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// What happened, if anything did. Never blocks.
    pub fn next_event(&mut self) -> Result<Option<Event>> {
        if self.over {
            return Ok(None);
        }
        // Each notice is one write on init's side, so when its first byte is there, all of it is.
        match receive(&self.events) {
            Ok(Notice::RootExited { status }) => Ok(Some(Event::RootExited { status })),
            Ok(Notice::JobEmpty) => Ok(Some(Event::JobEmpty)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
                self.over = true;
                Ok(Some(Event::Gone))
            }
            Err(error) => Err(Error::system("reading an event of init's", error)),
        }
    }

    /// Kills init and with it everything in the sandbox, and waits until it is gone.
    pub fn destroy(self) {}
}

fn signal_error(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(sys::libc::ESRCH) => Error::Gone,
        _ => Error::system("sending a signal", error),
    }
}

impl Control {
    /// The job's first process, unless it has ended and init has collected it.
    pub(crate) fn living_root(&self) -> Option<Pid> {
        let root = self.root();
        let (pid, handle) = root.as_ref()?;
        // The number may be another's by now, which the handle never is.
        sys::process::pidfd_send_signal(handle.as_fd(), 0).is_ok().then_some(*pid)
    }

    fn root(&self) -> MutexGuard<'_, Option<(Pid, OwnedFd)>> {
        // Nothing that holds it can fail half-way.
        self.root.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells init, which need not run yet, that a restored job is there. Its processes stand still: the end of the first
    /// may be the first thing that init sees. To be followed by [`Control::adopted`].
    pub(crate) fn adopt(&self, root: Root) -> Result<()> {
        if let Root::Runs(root) = root {
            self.know_root(root)?;
        }
        send(&self.requests, &Request::Adopt(root)).map_err(|_| Error::Gone)
    }

    /// Hears that init knows the restored job.
    pub(crate) fn adopted(&self) -> Result<()> {
        match receive(&self.requests).map_err(|_| Error::Gone)? {
            Reply::Adopted => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The job's first process by the job's number, or how it ended.
    pub(crate) fn first(&self) -> Result<Root> {
        if let Some(root) = self.living_root().and_then(|root| self.inside.pids.inside(root).ok())
            && let Ok(root) = i32::try_from(root)
        {
            return Ok(Root::Runs(root));
        }
        match self.ask(&Request::Root)? {
            Reply::Root(Some(root)) => Ok(root),
            // Nothing is left.
            Reply::Root(None) => Err(Error::Gone),
            other => Err(unexpected(&other)),
        }
    }

    fn ask(&self, request: &Request) -> Result<Reply> {
        send(&self.requests, request).map_err(|_| Error::Gone)?;
        receive(&self.requests).map_err(|_| Error::Gone)
    }

    fn know_root(&self, inside: i32) -> Result<Pid> {
        let known = u32::try_from(inside)
            .map_err(io::Error::other)
            .and_then(|inside| self.inside.pids.outside(inside))
            .and_then(|pid| Ok((pid, sys::process::pidfd_open(pid)?)));
        match known {
            Ok((pid, handle)) => {
                *self.root() = Some((pid, handle));
                Ok(pid)
            }
            // It has ended already, and init has collected it.
            Err(error) if error.raw_os_error() == Some(sys::libc::ESRCH) => Ok(Pid::from_raw(0)),
            Err(error) => Err(Error::system("finding the job's first process", error)),
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Init may be gone already; either way it is a child that wants collecting, and the kernel lets PID 1 end only
        // after everything else in its namespace.
        let _ = sys::process::pidfd_send_signal(self.init_handle.as_fd(), sys::libc::SIGKILL);
        if let Err(error) = sys::process::reap(self.init) {
            tracing::warn!(init = self.init.as_raw(), %error, "can't wait for the end of a job's init");
        }
    }
}

/// PID 1, and numbers of descriptors there.
struct Begun {
    init: Pid,
    listener: Option<i32>,
    owner: i32,
}

/// Hands the settings to both halves of init.
fn begin(requests: &File, spec: SandboxSpec) -> Result<Begun> {
    let lost = |error: io::Error| Error::Init(format!("it ended before it was set up ({error})"));
    send(requests, &Setup { clock_offsets: spec.clock_offsets }).map_err(lost)?;
    send(requests, &Begin { hostname: spec.hostname, addresses: spec.addresses, filter: spec.filter }).map_err(lost)?;
    let mut init = None;
    let mut ready = None;
    let failure = loop {
        if let (Some(init), Some((listener, owner))) = (init, ready) {
            return Ok(Begun { init, listener, owner });
        }
        match receive(requests) {
            Ok(Reply::Started { pid }) => init = Some(Pid::from_raw(pid)),
            Ok(Reply::Ready { listener, owner }) => ready = Some((listener, owner)),
            Ok(other) => break unexpected(&other),
            Err(error) => break lost(error),
        }
    };
    if let Some(init) = init {
        let _ = sys::process::kill(init, sys::libc::SIGKILL);
        let _ = sys::process::reap(init);
    }
    Err(failure)
}

fn unexpected(reply: &Reply) -> Error {
    match reply {
        Reply::Failed { what, errno: Some(errno) } => {
            Error::Init(format!("{what}: {}", io::Error::from_raw_os_error(*errno)))
        }
        Reply::Failed { what, errno: None } => Error::Init(what.clone()),
        other => Error::Init(format!("it answered {other:?}")),
    }
}
