//! The job on its node: how it is launched, what it consists of, how it ends.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use checkpoint::{Event, ExitStatus, External, ExternalKey, FdKind, Launch, Sandbox, SandboxSpec};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::commands::{Command, Commands};
use super::home::Home;
use super::links::Links;
use super::stdio::{ProgramEnds, Stdio};
use super::transfer::Outcome;
use super::{Shared, daemon, transfer};
use crate::api::{DaemonRequest, Exit, ExitFile, ShimEvent, unix_ms};
use crate::net::{NetConfig, NetPlane, Site, Visitor, furnish_namespace};

/// The announcements after the first, counted from it: a neighbour may have missed one.
const REPEAT_ANNOUNCEMENT: [Duration; 3] =
    [Duration::from_millis(30), Duration::from_millis(300), Duration::from_millis(2000)];
/// How long a job that is to end may take after SIGTERM.
const TERMINATION: Duration = Duration::from_secs(10);
/// How long the stack may go on, after the job's end, with what its peers have not acknowledged.
pub(super) const LINGER: Duration = Duration::from_secs(20);
/// How often the stack is asked whether it is done.
pub(super) const LINGER_STEP: Duration = Duration::from_millis(50);

/// A job that runs here.
#[derive(Debug)]
pub struct Job {
    pub(super) shared: Arc<Shared>,
    pub(super) sandbox: Sandbox,
    pub(super) links: Links,
    pub(super) plane: NetPlane,
    pub(super) stdio: Arc<Stdio>,
    pub(super) epoch: u64,
    pub(super) announced: Announced,
    /// The node with its sockets, when they are not here.
    pub(super) home: Option<String>,
    /// Lines from nodes that may get the process while the sockets stay here.
    pub(super) lines: Vec<(OwnedFd, Visitor)>,
}

/// What became of a job that does not run here any more.
#[derive(Debug)]
pub enum Left {
    /// It is not here; when it left, what it was is still to be taken down.
    Gone(Option<Box<Remains>>),
    /// Its sockets are here.
    Home(Box<Home>),
}

/// What a job that has moved away leaves behind: stopped processes, namespaces, devices. Nothing leads to it and nothing of it
/// runs.
#[derive(Debug)]
pub struct Remains {
    pub(super) tree: Option<Stopped>,
    pub(super) sandbox: Sandbox,
    pub(super) plane: NetPlane,
    pub(super) links: Links,
}

impl Remains {
    /// Takes it down. The kernel waits for several grace periods of RCU for that, which are seconds on a busy machine.
    pub fn take_down(self) {
        let Remains { tree, sandbox, plane, links } = self;
        // In this order: the tree is in the sandbox.
        drop(tree);
        sandbox.destroy();
        drop((plane, links));
    }
}

/// Processes that are stopped and run no more.
#[derive(Debug)]
pub struct Stopped(Option<checkpoint::Source>);

impl Stopped {
    /// All of them.
    pub fn new(tree: checkpoint::Source) -> Stopped {
        Stopped(Some(tree))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Some(tree) = self.0.take() {
            tree.discard();
        }
    }
}

/// What a job needs around it, before there is a process.
#[derive(Debug)]
pub struct Surroundings {
    pub(super) sandbox: Sandbox,
    pub(super) links: Links,
    pub(super) tun: OwnedFd,
    pub(super) listener: OwnedFd,
    pub(super) eth0: OwnedFd,
}

impl Surroundings {
    /// Makes the namespaces, the TUN device and the job's own devices; nothing is visible outside yet.
    pub fn create(shared: &Shared, clocks: Option<checkpoint::ClockOffsets>) -> anyhow::Result<Surroundings> {
        let file = &shared.file;
        let spec = SandboxSpec {
            hostname: file.spec.name.clone(),
            addresses: file.addresses(),
            clock_offsets: clocks,
            filter: Some(crate::net::filter()),
        };
        let mut sandbox = Sandbox::create(spec).context("can't make the job's namespaces")?;
        let listener = sandbox.take_listener().context("the job's system call filter has no listener")?;
        let (links, tun) = Links::create(&file.addresses(), &file.uplinks)?;
        let eth0 = furnish_namespace(sandbox.net_namespace(), &file.networks(), links.mtu())?;
        Ok(Surroundings { sandbox, links, tun, listener, eth0 })
    }

    /// How the net plane is to be made.
    pub fn net_config(&self, shared: &Shared) -> anyhow::Result<NetConfig> {
        Ok(NetConfig {
            addresses: shared.file.addresses(),
            mtu: usize::try_from(self.links.mtu())?,
            namespace: Some(self.sandbox.net_namespace().try_clone_to_owned()?),
            init_pid: Some(self.sandbox.init_pid().as_raw()),
            eth0: Some(self.eth0.try_clone()?),
            site: Site { node: shared.file.node.name.clone(), device: self.links.device().to_string() },
        })
    }
}

/// When the address was announced, and how often since.
#[derive(Debug)]
pub struct Announced {
    at: Instant,
    repeated: usize,
}

impl Announced {
    /// Just now.
    pub fn now() -> Announced {
        Announced { at: Instant::now(), repeated: 0 }
    }

    fn next(&self) -> Option<Instant> {
        REPEAT_ANNOUNCEMENT.get(self.repeated).map(|after| self.at + *after)
    }
}

/// Starts the job's program.
pub fn launch(shared: &Arc<Shared>) -> anyhow::Result<Job> {
    let around = Surroundings::create(shared, None)?;
    let config = around.net_config(shared)?;
    let Surroundings { mut sandbox, mut links, tun, listener, eth0: _ } = around;
    let (stdio, ends) = Stdio::create(&shared.paths.output()).context("can't make the job's standard streams")?;
    shared.stdio.send_replace(Some(Arc::clone(&stdio)));
    let plane = NetPlane::start(config, tun, listener).context("can't start the job's network")?;
    links.attract()?;
    links.announce();
    let root = match sandbox.spawn(command(shared, ends)) {
        Ok(root) => root,
        Err(error) => {
            links.withdraw();
            return Err(error.into());
        }
    };
    let epoch = shared.file.epoch;
    shared.tell_running(epoch, sandbox.root_pid());
    tracing::info!(root = root.as_raw(), device = links.device(), "the job runs");
    let shared = Arc::clone(shared);
    Ok(Job { shared, sandbox, links, plane, stdio, epoch, announced: Announced::now(), home: None, lines: Vec::new() })
}

fn command(shared: &Shared, stdio: ProgramEnds) -> Launch {
    let spec = &shared.file.spec;
    Launch {
        argv: spec.argv.iter().map(Into::into).collect(),
        env: spec.env.iter().map(|(name, value)| (name.into(), value.into())).collect(),
        cwd: spec.cwd.clone().into(),
        stdio,
    }
}

impl Job {
    /// Lives with the job until it ends or moves away.
    pub fn serve(mut self, queue: &mut Commands) -> anyhow::Result<Left> {
        let mut status = None;
        let mut kill_at: Option<Instant> = None;
        loop {
            while let Some(event) = self.sandbox.next_event()? {
                match event {
                    Event::RootExited { status: how } => {
                        status = Some(how);
                        // Its number may be given to another.
                        self.shared.set_status(|status| status.root = None);
                    }
                    Event::JobEmpty => return self.end(status).map(|()| Left::Gone(None)),
                    // Somebody killed init.
                    Event::Gone => {
                        let status = status.unwrap_or(ExitStatus::Signal(nix::libc::SIGKILL));
                        return self.end(Some(status)).map(|()| Left::Gone(None));
                    }
                }
            }
            while let Some(command) = queue.take() {
                match command {
                    Command::Inspect(reply) => {
                        // The asker may be gone.
                        let _ = reply.send(self.describe());
                    }
                    Command::Sockets(reply) => {
                        let mut sockets = self.plane.describe();
                        sockets.extend(crate::net::datagram_sockets(self.sandbox.init_pid().as_raw()));
                        let _ = reply.send(sockets);
                    }
                    Command::Record { number, snap_length, reply } => {
                        let _ = reply.send(self.plane.record(number, snap_length));
                    }
                    Command::MoveOut { target, epoch, sockets, stream, progress } => {
                        match transfer::move_out(self, target, epoch, sockets, stream, progress)? {
                            Outcome::Stayed(job) => self = *job,
                            Outcome::Left(left) => return Ok(left),
                        }
                        self.lines.clear();
                    }
                    Command::Line { line, visitor, reply } if self.home.is_none() => {
                        self.lines.push((line, visitor));
                        let _ = reply.send(());
                    }
                    Command::Shutdown => {
                        tracing::info!("the shim was told to end");
                        kill_at = Some(Instant::now() + TERMINATION);
                        // It may be gone already; then its end is about to be heard of.
                        let _ = self.sandbox.signal(nix::libc::SIGTERM);
                    }
                    Command::Signal { signal, reply } => {
                        let _ = reply.send(self.sandbox.signal(signal));
                    }
                    // For a shim that receives; here they come too late.
                    Command::Line { .. } | Command::Receive { .. } | Command::Cancel => {}
                }
            }
            if kill_at.is_some_and(|at| at <= Instant::now()) {
                return self.end(status).map(|()| Left::Gone(None));
            }
            self.repeat_announcement();
            let wake_at = [self.announced.next().filter(|_| self.home.is_none()), kill_at].into_iter().flatten().min();
            wait_for(&[self.sandbox.events(), queue.as_fd()], wake_at)?;
        }
    }

    fn repeat_announcement(&mut self) {
        while self.home.is_none() && self.announced.next().is_some_and(|at| at <= Instant::now()) {
            self.announced.repeated += 1;
            self.links.repeat_announcement();
        }
    }

    /// The job is over: tell everybody, let its connections end, leave nothing.
    fn end(mut self, status: Option<ExitStatus>) -> anyhow::Result<()> {
        self.sandbox.destroy();
        self.stdio.finish();
        let exit = match status {
            Some(ExitStatus::Code(code)) => Exit::Code(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
            Some(ExitStatus::Signal(signal)) => Exit::Signal(signal),
            None => Exit::Signal(nix::libc::SIGKILL),
        };
        tracing::info!(%exit, "the job has ended");
        if let Err(error) = write_exit(&self.shared, exit) {
            // Those who listen hear it all the same, and the job's last bytes must arrive in any case.
            tracing::error!(%error, "can't record how the job ended; is the file system full?");
        }
        self.shared.set_status(|status| {
            status.state = crate::api::ShimState::Exited(exit);
            status.root = None;
        });
        self.shared.tell(ShimEvent::Exited(exit));
        // What the job sent before its end still has to arrive, as it would from a kernel.
        let until = Instant::now() + LINGER;
        while Instant::now() < until && !self.plane.is_quiet() {
            std::thread::sleep(LINGER_STEP);
        }
        if self.home.is_none() {
            self.links.withdraw();
        }
        let request = DaemonRequest::JobExited { job: self.shared.file.spec.id.clone(), exit };
        if let Err(error) = daemon::ask::<()>(&self.shared.file.control, &request) {
            // It finds the file when it is back.
            tracing::info!(%error, "the daemon was not told of the job's end");
        }
        Ok(())
    }

    /// For `migd inspect`.
    fn describe(&self) -> serde_json::Value {
        let stay = checkpoint::Source::attach(&self.sandbox)
            .and_then(|mut source| source.stay_reasons(&self.externals()))
            .map(|reasons| reasons.iter().map(ToString::to_string).collect::<Vec<_>>());
        let (stay, error) = match stay {
            Ok(reasons) => (reasons, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        let home = self.shared.home();
        let home_bytes = home.as_ref().map_or(0, |home| home.sent_bytes + home.received_bytes);
        serde_json::json!({
            "device": self.links.device(),
            "home": home,
            "home_bytes": home_bytes,
            "sockets": socket_counts(&self.plane.describe()),
            "stay_reasons": stay,
            "stay_reasons_error": error,
        })
    }

    /// The descriptors of the job whose other end is here.
    pub(super) fn externals(&self) -> Externals {
        Externals { sockets: self.plane.descriptor_keys(), stdio: Arc::clone(&self.stdio) }
    }
}

/// How many sockets are in which state; each of them is shown by `migd inspect --sockets`.
fn socket_counts(sockets: &[crate::net::SocketDescription]) -> std::collections::BTreeMap<&str, usize> {
    let mut counts = std::collections::BTreeMap::new();
    for socket in sockets {
        *counts.entry(socket.state.as_str()).or_insert(0) += 1;
    }
    counts
}

/// See [`Job::externals`].
#[derive(Debug)]
pub struct Externals {
    sockets: crate::net::DescriptorKeys,
    stdio: Arc<Stdio>,
}

impl External for Externals {
    fn key(&self, kind: FdKind, inode: u64) -> Option<ExternalKey> {
        match kind {
            FdKind::Socket => self.sockets.get(&inode).map(|key| ExternalKey::Socket(key.0)),
            FdKind::Pipe => self.stdio.stream_of(inode).map(ExternalKey::Stdio),
            FdKind::Terminal | FdKind::Other => None,
        }
    }
}

fn write_exit(shared: &Shared, exit: Exit) -> io::Result<()> {
    let path = shared.paths.exit();
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, serde_json::to_vec(&ExitFile { exit, finished_ms: unix_ms() })?)?;
    std::fs::rename(temporary, path)
}

/// Waits until one of the descriptors is readable or the time has come.
pub(super) fn wait_for(fds: &[std::os::fd::BorrowedFd<'_>], until: Option<Instant>) -> io::Result<()> {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    let timeout = match until {
        None => PollTimeout::NONE,
        Some(until) => {
            // Rounded up, so that the time has come when this returns.
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        }
    };
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
