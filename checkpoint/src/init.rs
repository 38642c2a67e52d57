//! PID 1 of a job.
//!
//! `/proc/self/exe init` runs twice. The first process makes the namespaces, starts the second as its sibling and ends:
//! clock offsets can be set only from outside of a time namespace that nobody is in yet, and PID 1 shall be the child of
//! the sandbox's owner. The second is PID 1: it mounts `/proc`, installs the system call filter, and then starts programs
//! and collects the dead until its owner is gone.
//!
//! Standard input is the socket for requests, standard output the one for events. Init is never part of an image.

mod hosts;
pub(crate) mod protocol;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::ExitCode;

use sys::Pid;
use sys::epoll::{Epoll, Events, Interest};
use sys::namespaces::{self, Namespaces};
use sys::process;
use sys::seccomp::Listener;

use self::protocol::{Begin, Notice, Reply, Request, Root, Setup, Spawn, receive, send};
use crate::sandbox::ExitStatus;
use crate::{shm, terminals};

/// What `/proc/self/exe init` does. Must be called before the process has a second thread. Returns when the sandbox is over.
pub fn main() -> ExitCode {
    if std::process::id() != 1
        && let Err(error) = process::close_inherited()
    {
        eprintln!("init: closing inherited descriptors: {error}");
        return ExitCode::FAILURE;
    }
    let result = match Channels::take() {
        Ok(channels) => {
            let result = if std::process::id() == 1 { run(&channels) } else { prepare(&channels) };
            if let Err(Failure { what, source }) = &result {
                let reply = Reply::Failed { what: what.clone(), errno: source.raw_os_error() };
                // The owner may be gone already; then there is nobody to tell.
                let _ = send(&channels.requests, &reply);
            }
            result
        }
        Err(source) => Err(Failure { what: "taking over standard input and output".into(), source }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { what, source }) => {
            eprintln!("init: {what}: {source}");
            ExitCode::FAILURE
        }
    }
}

struct Failure {
    what: String,
    source: io::Error,
}

fn during(what: &str) -> impl Fn(io::Error) -> Failure + '_ {
    move |source| Failure { what: what.to_owned(), source }
}

struct Channels {
    requests: File,
    events: File,
}

impl Channels {
    /// Duplicates the two sockets to descriptors that no program inherits.
    fn take() -> io::Result<Channels> {
        Ok(Channels {
            requests: File::from(io::stdin().as_fd().try_clone_to_owned()?),
            events: File::from(io::stdout().as_fd().try_clone_to_owned()?),
        })
    }
}

/// The first process: makes the namespaces and starts PID 1 in them.
fn prepare(channels: &Channels) -> Result<(), Failure> {
    let setup: Setup = receive(&channels.requests).map_err(during("reading the setup"))?;
    let owner = process::pidfd_open(process::parent()).map_err(during("opening the owner"))?;
    let mut kinds = Namespaces::MOUNT | Namespaces::NETWORK | Namespaces::HOSTNAME | Namespaces::IPC | Namespaces::PID;
    if setup.clock_offsets.is_some() {
        kinds |= Namespaces::TIME;
    }
    namespaces::unshare(kinds).map_err(during("making namespaces"))?;
    if let Some(offsets) = setup.clock_offsets {
        namespaces::set_clock_offsets(offsets.monotonic_ns, offsets.boottime_ns)
            .map_err(during("setting the clock offsets"))?;
    }
    process::keep_on_exec(owner.as_fd()).map_err(during("handing the owner on"))?;
    let arguments = ["init".to_owned(), "init".to_owned(), owner.as_raw_fd().to_string()];
    let pid = sys::clone::start_sibling("/proc/self/exe", &arguments).map_err(during("starting PID 1"))?;
    send(&channels.requests, &Reply::Started { pid: pid.as_raw() }).map_err(during("reporting PID 1"))
}

/// PID 1.
fn run(channels: &Channels) -> Result<(), Failure> {
    let begin: Begin = receive(&channels.requests).map_err(during("reading the settings"))?;
    let owner = std::env::args()
        .nth(2)
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| Failure { what: "finding the owner".into(), source: io::ErrorKind::InvalidInput.into() })?;
    let owner = process::take_inherited(owner).map_err(during("taking over the owner"))?;

    namespaces::detach_mounts().map_err(during("detaching mounts"))?;
    namespaces::mount_virtual("proc", Path::new("/proc"), "").map_err(during("mounting /proc"))?;
    if let Err(error) = hosts::mount(&begin.hostname, &begin.addresses, Path::new(shm::PLACE)) {
        // The job does without, as programs do on many machines.
        eprintln!("init: the job's name is not in its /etc/hosts: {error}");
    }
    if Path::new(shm::PLACE).is_dir() {
        namespaces::mount_memory(Path::new(shm::PLACE)).map_err(during("mounting /dev/shm"))?;
    }
    if let Err(error) = terminals::mount() {
        // Without, the job has the machine's, with which it can't move.
        eprintln!("init: the job has no terminals of its own: {error}");
    }
    if !begin.hostname.is_empty() {
        namespaces::set_hostname(&begin.hostname).map_err(during("setting the host name"))?;
    }
    // Programs are looked for and run from where they say, not from where the owner happened to be.
    std::env::set_current_dir("/").map_err(during("changing to /"))?;
    let ended = process::child_signals().map_err(during("opening a signalfd"))?;
    let epoll = Epoll::new().map_err(during("opening an epoll"))?;
    epoll.add(channels.requests.as_fd(), REQUESTS, Interest::IN).map_err(during("watching requests"))?;
    epoll.add(ended.as_fd(), ENDED, Interest::IN).map_err(during("watching children"))?;

    let listener = match &begin.filter {
        // From here on calls that the filter hands over wait for a supervisor: none may be made.
        Some(filter) => Some(filter.install().map_err(during("installing the system call filter"))?),
        None => None,
    };
    let number = listener.as_ref().map(|listener| listener.as_fd().as_raw_fd());
    send(&channels.requests, &Reply::Ready { listener: number, owner: owner.as_raw_fd() })
        .map_err(during("reporting ready"))?;
    Init { channels, owner, ended: ended.into(), listener, root: None }.serve(&epoll)
}

const REQUESTS: u64 = 0;
const ENDED: u64 = 1;
/// For kill(2): every process of the namespace but init.
const EVERYBODY: Pid = Pid::from_raw(-1);

struct Init<'a> {
    channels: &'a Channels,
    /// The owner's process, from which standard streams are fetched.
    owner: OwnedFd,
    ended: File,
    /// Kept until the owner has fetched it, which it has when it makes its first request.
    listener: Option<Listener>,
    /// `None` while there is no job, and when nothing of it is left.
    root: Option<Root>,
}

impl Init<'_> {
    fn serve(mut self, epoll: &Epoll) -> Result<(), Failure> {
        let mut events = Events::with_capacity(2);
        loop {
            epoll.wait(&mut events, None).map_err(during("waiting"))?;
            // Requests first: one of them may say whose end is to be told of.
            if events.iter().any(|event| event.token == REQUESTS) && !self.handle_request()? {
                // The owner is gone. With PID 1 the kernel ends everything in the namespace.
                return Ok(());
            }
            self.collect()?;
        }
    }

    /// Handles one request; false when there will be no more.
    fn handle_request(&mut self) -> Result<bool, Failure> {
        let request: Request = match receive(&self.channels.requests) {
            Ok(request) => request,
            Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
                return Ok(false);
            }
            Err(source) => return Err(Failure { what: "reading a request".into(), source }),
        };
        self.listener = None;
        let reply = match request {
            Request::Spawn(spawn) => match start(self.owner.as_fd(), spawn) {
                Ok(pid) => {
                    self.root = Some(Root::Runs(pid.as_raw()));
                    Reply::Spawned { pid: pid.as_raw() }
                }
                Err(source) => Reply::Failed { what: "starting the program".into(), errno: source.raw_os_error() },
            },
            Request::Adopt(root) => {
                self.root = Some(root);
                if let Root::Ended(status) = root {
                    self.notify(Notice::RootExited { status })?;
                }
                Reply::Adopted
            }
            Request::Root => {
                // Who asks knows that it has ended, and wants to know how.
                self.collect()?;
                Reply::Root(self.root)
            }
            Request::Kill => match process::kill(EVERYBODY, sys::libc::SIGKILL) {
                Ok(()) => Reply::Killed,
                Err(source) => Reply::Failed { what: "killing the job".into(), errno: source.raw_os_error() },
            },
        };
        send(&self.channels.requests, &reply).map_err(during("answering"))?;
        Ok(true)
    }

    /// Collects everything that has ended.
    fn collect(&mut self) -> Result<(), Failure> {
        let mut discarded = [0; 4096];
        while (&self.ended).read(&mut discarded).is_ok_and(|length| length > 0) {}
        loop {
            let notice = match process::reap_any() {
                Ok(Some((pid, status))) if self.root == Some(Root::Runs(pid.as_raw())) => {
                    let status = status
                        .signal()
                        .map_or_else(|| ExitStatus::Code(status.code().unwrap_or_default()), ExitStatus::Signal);
                    // Its number may be given to another.
                    self.root = Some(Root::Ended(status));
                    Notice::RootExited { status }
                }
                Ok(Some(_)) => continue,
                Ok(None) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(sys::libc::ECHILD) => {
                    if self.root.take().is_some() {
                        self.notify(Notice::JobEmpty)?;
                    }
                    return Ok(());
                }
                Err(source) => return Err(Failure { what: "collecting children".into(), source }),
            };
            self.notify(notice)?;
        }
    }

    fn notify(&self, notice: Notice) -> Result<(), Failure> {
        send(&self.channels.events, &notice).map_err(during("reporting an event"))
    }
}

fn start(owner: BorrowedFd<'_>, spawn: Spawn) -> io::Result<Pid> {
    let stdio = spawn.stdio;
    let [input, output, error] = stdio.map(|number| process::pidfd_getfd(owner, number));
    let text = |bytes: serde_bytes::ByteBuf| OsString::from_vec(bytes.into_vec());
    sys::clone::Launch {
        argv: spawn.argv.into_iter().map(text).collect(),
        env: spawn.env.into_iter().map(|(name, value)| (text(name), text(value))).collect(),
        cwd: text(spawn.cwd).into(),
        stdio: [input?, output?, error?],
    }
    .start()
}
