//! The handle to a job's net thread.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use serde::{Deserialize, Serialize};
use sys::epoll::EventFd;

use super::bridge::{BridgeImage, DescriptorKeys, SocketKey};
use super::capture::{PacketStream, RECORDINGS, RecordingImage};
use super::config::NetConfig;
use super::describe::SocketDescription;
use super::home::{AwayImage, Board, Guest, Packet, Visitor};
use super::preview::NetPreview;
use super::pump::{Pump, Start};
use super::stock::Stock;

/// Everything of a job's network that moves: the sockets and what the bridge knows beside them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NetImage {
    /// Every connection, in every state; none when the sockets stay at the job's home.
    #[serde(default)]
    pub stack: Option<Box<netstack::StackImage>>,
    /// What has to be known of sockets at home.
    #[serde(default)]
    pub away: Option<AwayImage>,
    /// The programs' sockets, and what waited between them and the stack.
    pub bridge: BridgeImage,
    /// Recordings of its packets.
    #[serde(default)]
    pub recordings: Vec<RecordingImage>,
    /// Of a home that is one no more: the last packets for the process's kernel, with their numbers.
    #[serde(skip)]
    pub packets: Vec<(u64, Packet)>,
}

/// Why the net plane can't do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The kernel refused something.
    #[error("net plane: {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// The stack's part of an image can't be used.
    #[error("the image of the job's connections can't be thawed")]
    Image(#[from] netstack::ImageError),
    /// The bridge's part of an image contradicts the stack's.
    #[error("the image of the job's sockets is corrupt: {0}")]
    Corrupt(String),
    /// Bytes wait for the program in a socket that no process of the job holds.
    #[error(
        "socket {key} (inode {inode}) holds unread bytes, but no process of the job has it open: it may be on its way between two \
         processes; try again"
    )]
    Unreachable {
        /// The socket.
        key: SocketKey,
        /// Inode of the program's end.
        inode: u64,
    },
    /// The sockets are at the job's home, and that can't be reached.
    #[error("the job's home is lost ({0}), and its sockets with it")]
    HomeLost(String),
    /// The image's sockets are at home, and there is no line to it.
    #[error("the image of the job's sockets needs a line to their home")]
    NoLine,
    /// So many recordings are made already.
    #[error(
        "its packets are recorded {RECORDINGS} times already, which is the most; end one of those `migd pcap` first"
    )]
    Recordings,
    /// The net thread is gone.
    #[error("the job's net thread has ended; see the shim's log for the reason")]
    Stopped,
}

impl NetError {
    pub(super) fn io(what: &'static str) -> impl FnOnce(io::Error) -> NetError {
        move |source| NetError::Io { what, source }
    }
}

/// What the net thread is asked.
pub(super) enum Command {
    Park(Sender<()>),
    /// Copies of these sockets; with `anew` what was told before doesn't count any more.
    Tell {
        keys: Vec<SocketKey>,
        anew: bool,
        answer: Sender<NetPreview>,
    },
    /// With `stays` a stack that is here is to become the job's home. With `untold` the sockets are left out that are as they
    /// were told.
    Freeze {
        stays: bool,
        untold: bool,
        answer: Sender<Result<NetImage, NetError>>,
    },
    /// The processes are elsewhere from now on, under this epoch.
    BecomeHome {
        epoch: u64,
        board: Board,
        answer: Sender<()>,
    },
    /// A node has connected to this home.
    AddLine {
        line: OwnedFd,
        visitor: Visitor,
        answer: Sender<()>,
    },
    /// The job is lost to this home, for this reason.
    Abandon(String),
    Resume(Sender<()>),
    Retire(Sender<OwnedFd>),
    Record {
        number: u64,
        snap_length: u32,
        answer: Sender<Option<PacketStream>>,
    },
    Describe(Sender<Vec<SocketDescription>>),
    Keys(Sender<DescriptorKeys>),
    IsQuiet(Sender<bool>),
    Stop,
}

/// The commands' way into the net thread.
pub(super) struct Mailbox {
    pub(super) commands: Receiver<Command>,
    pub(super) wake: Arc<EventFd>,
}

/// A running net plane. Dropping it ends the thread and, without a word to the peers, every connection.
#[derive(Debug)]
pub struct NetPlane {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// A freeze under way.
#[derive(Debug)]
pub struct Freezing {
    image: Receiver<Result<NetImage, NetError>>,
}

impl Freezing {
    /// Waits for the image.
    ///
    /// # Errors
    /// As [`NetPlane::freeze`].
    pub fn finish(self) -> Result<NetImage, NetError> {
        self.image.recv().map_err(|_| NetError::Stopped)?
    }
}

impl NetPlane {
    /// Starts a plane without sockets. `tun` is the job's TUN device (`sys::tun::Tun`), up; `listener` the seccomp listener of the job's
    /// init.
    pub fn start(config: NetConfig, tun: OwnedFd, listener: OwnedFd) -> io::Result<NetPlane> {
        let (plane, programs_ends) = NetPlane::launch(config, Start::Fresh, tun, listener).map_err(io::Error::other)?;
        debug_assert!(programs_ends.is_empty());
        Ok(plane)
    }

    /// Builds a plane from an image. It is parked: not a byte moves before [`NetPlane::resume`]. Returns the programs' ends of
    /// the sockets, which are to be placed into the restored processes; the rest is to be dropped before the resume. Those whose
    /// pair was taken from the stock are not among them: they are in their processes already.
    ///
    /// Sockets that stay at home need the line to it, and the epoch under which the process will be here; nothing is said over
    /// the line before the resume.
    pub fn thaw(
        config: NetConfig,
        image: NetImage,
        tun: OwnedFd,
        listener: OwnedFd,
        stock: Stock,
        home: Option<(Guest, u64)>,
    ) -> Result<(NetPlane, BTreeMap<SocketKey, OwnedFd>), NetError> {
        NetPlane::launch(config, Start::Thaw(Box::new(image), stock, home), tun, listener)
    }

    fn launch(
        config: NetConfig,
        start: Start,
        tun: OwnedFd,
        listener: OwnedFd,
    ) -> Result<(NetPlane, BTreeMap<SocketKey, OwnedFd>), NetError> {
        let (sender, commands) = unbounded();
        let wake = Arc::new(EventFd::new().map_err(NetError::io("make an eventfd"))?);
        let mailbox = Mailbox { commands, wake: Arc::clone(&wake) };
        let (ready, started) = bounded(1);
        // The pump is built in its own thread: it enters the job's network namespace first, and it alone.
        let thread = std::thread::Builder::new()
            .name("net".to_owned())
            .spawn(move || match Pump::new(config, start, tun, listener, mailbox) {
                Ok((pump, programs_ends)) => {
                    if ready.send(Ok(programs_ends)).is_ok() {
                        pump.run();
                    }
                }
                Err(error) => drop(ready.send(Err(error))),
            })
            .map_err(NetError::io("start the net thread"))?;
        let plane = NetPlane { commands: sender, wake, thread: Some(thread) };
        let programs_ends = started.recv().map_err(|_| NetError::Stopped)??;
        Ok((plane, programs_ends))
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, NetError> {
        let (sender, answer) = bounded(1);
        self.commands.send(command(sender)).map_err(|_| NetError::Stopped)?;
        self.wake.signal();
        answer.recv().map_err(|_| NetError::Stopped)
    }

    /// Parks the plane and takes its image. Every thread of the job must be stopped already. On an error the plane stays parked;
    /// [`NetPlane::resume`] undoes it in any case.
    pub fn freeze(&self) -> Result<NetImage, NetError> {
        self.begin_freeze(false, false)?.finish()
    }

    /// Images of those among the sockets that are idle, while all go on; with `anew` what was told before doesn't count any more.
    /// The net thread does nothing else meanwhile, so it should be asked for few at a time.
    ///
    /// # Errors
    /// [`NetError::Stopped`].
    pub fn preview(&self, keys: Vec<SocketKey>, anew: bool) -> Result<NetPreview, NetError> {
        self.ask(|answer| Command::Tell { keys, anew, answer })
    }

    /// Parks the plane and begins to take its image, so that the caller can do something else meanwhile: when this returns
    /// nothing moves any more. `stays` as [`NetPlane::freeze_without_sockets`]; with `untold` the sockets are left out that are
    /// as [`NetPlane::preview`] told them.
    pub fn begin_freeze(&self, stays: bool, untold: bool) -> Result<Freezing, NetError> {
        self.ask(Command::Park)?;
        let (answer, image) = bounded(1);
        self.commands.send(Command::Freeze { stays, untold, answer }).map_err(|_| NetError::Stopped)?;
        self.wake.signal();
        Ok(Freezing { image })
    }

    /// As [`NetPlane::freeze`] for a process whose sockets stay: here, if they are here, or at the home where they are already.
    pub fn freeze_without_sockets(&self) -> Result<NetImage, NetError> {
        self.begin_freeze(true, false)?.finish()
    }

    /// Makes this plane, which was frozen, the home of a job whose process is elsewhere from now on. The stack goes on at
    /// once. What happens to it is told on the board.
    pub fn become_home(&self, epoch: u64, board: Board) {
        if self.ask(|answer| Command::BecomeHome { epoch, board, answer }).is_err() {
            tracing::error!("the job's net thread has ended; its connections are lost");
        }
    }

    /// For a home: a node that may get the process has connected. When this returns the home waits for it, also should
    /// the line to the process's present node end.
    pub fn add_line(&self, line: OwnedFd, visitor: Visitor) {
        // A thread that has ended has said why, and the line ends with it.
        let _ = self.ask(|answer| Command::AddLine { line, visitor, answer });
    }

    /// For a home: the process is lost; its peers are to hear that.
    pub fn abandon(&self, reason: String) {
        self.tell(Command::Abandon(reason));
    }

    fn tell(&self, command: Command) {
        // A thread that has ended has said why.
        if self.commands.send(command).is_ok() {
            self.wake.signal();
        }
    }

    /// Lets a parked plane go on: after a freeze that led to nothing, or after a thaw, right before the job runs.
    pub fn resume(&self) {
        if self.ask(Command::Resume).is_err() {
            tracing::error!("the job's net thread has ended; its connections are lost");
        }
    }

    /// Of a parked plane that is to be dropped: the TUN device, in which packets may still wait. They shouldn't wait for all that
    /// the drop takes down, nor should those who record.
    pub fn retire(&self) -> Result<OwnedFd, NetError> {
        self.ask(Command::Retire)
    }

    /// Begins to record packets, of which the first `snap_length` bytes are kept, or goes on with the recording of that number
    /// that came with the job.
    ///
    /// # Errors
    /// [`NetError::Stopped`], [`NetError::Recordings`].
    pub fn record(&self, number: u64, snap_length: u32) -> Result<PacketStream, NetError> {
        self.ask(|answer| Command::Record { number, snap_length, answer })?.ok_or(NetError::Recordings)
    }

    /// All sockets of the job's programs.
    pub fn describe(&self) -> Vec<SocketDescription> {
        self.ask(Command::Describe).unwrap_or_default()
    }

    /// Inode of each program's end, to recognise it in `/proc/PID/fd`: a view that stays up to date.
    pub fn descriptor_keys(&self) -> DescriptorKeys {
        self.ask(Command::Keys).unwrap_or_default()
    }

    /// Whether no connection has anything left to send or to have acknowledged (TIME-WAIT doesn't count). Asked after the job
    /// has ended, so that its last bytes still arrive.
    pub fn is_quiet(&self) -> bool {
        self.ask(Command::IsQuiet).unwrap_or(true)
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the job's net thread panicked");
        }
    }
}

impl Drop for NetPlane {
    fn drop(&mut self) {
        if self.commands.send(Command::Stop).is_ok() {
            self.wake.signal();
        }
        self.join();
    }
}
