//! Open files as data.
//!
//! Three levels, as the kernel has them: a *table* maps numbers to *open files* (open file descriptions: offset, status
//! flags), and several open files may refer to one *object* (a pipe, a deleted file). Each level refers to the next by index,
//! so whatever was shared at the source is shared at the target.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::external::ExternalKey;
use crate::sparse::Pieces;
use crate::terminals::{TerminalEnd, TerminalImage};

/// All open files of a tree.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TreeDescriptors {
    /// Descriptor tables; a process has exactly one.
    pub tables: Vec<Table>,
    /// Open file descriptions.
    pub files: Vec<OpenFile>,
    /// Pipes that have an end in the job.
    pub pipes: Vec<PipeImage>,
    /// Files that have no name: deleted ones and memfds.
    pub contents: Vec<ContentImage>,
    /// Unix sockets whose peers are all in the job.
    pub sockets: Vec<UnixImage>,
    /// Locks on ranges that belong to a process.
    pub process_locks: Vec<ProcessLock>,
    /// Pseudo-terminals.
    #[serde(default)]
    pub terminals: Vec<TerminalImage>,
}

/// A descriptor table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// The processes that share it (CLONE_FILES), as the job numbers them.
    pub processes: Vec<u32>,
    /// Its descriptors, ascending by number.
    pub slots: Vec<Slot>,
}

/// One descriptor. There may be tens of thousands, so it travels as a tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(i32, u32, bool)", into = "(i32, u32, bool)")]
pub struct Slot {
    /// The number that the program knows.
    pub number: i32,
    /// Index in [`TreeDescriptors::files`].
    pub file: u32,
    /// FD_CLOEXEC.
    pub close_on_exec: bool,
}

impl From<(i32, u32, bool)> for Slot {
    fn from((number, file, close_on_exec): (i32, u32, bool)) -> Slot {
        Slot { number, file, close_on_exec }
    }
}

impl From<Slot> for (i32, u32, bool) {
    fn from(slot: Slot) -> (i32, u32, bool) {
        (slot.number, slot.file, slot.close_on_exec)
    }
}

/// An open file description. It travels as a tuple.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "(i32, Kind, Option<SignalTarget>)", into = "(i32, Kind, Option<SignalTarget>)")]
pub struct OpenFile {
    /// Access mode and status flags as F_GETFL gives them.
    pub flags: i32,
    /// What it refers to.
    pub kind: Kind,
    /// Who is signalled for I/O.
    pub owner: Option<SignalTarget>,
}

impl From<(i32, Kind, Option<SignalTarget>)> for OpenFile {
    fn from((flags, kind, owner): (i32, Kind, Option<SignalTarget>)) -> OpenFile {
        OpenFile { flags, kind, owner }
    }
}

impl From<OpenFile> for (i32, Kind, Option<SignalTarget>) {
    fn from(file: OpenFile) -> (i32, Kind, Option<SignalTarget>) {
        (file.flags, file.kind, file.owner)
    }
}

/// F_SETOWN_EX and F_SETSIG.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalTarget {
    /// Thread, process or group; `None` when only the signal is set.
    pub to: Option<(TargetKind, u32)>,
    /// The signal; 0 is SIGIO without information.
    pub signal: i32,
}

/// What a [`SignalTarget`]'s number means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetKind {
    /// A thread.
    Thread,
    /// A process.
    Process,
    /// A process group.
    Group,
}

/// What an open file refers to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Kind {
    /// The caller's.
    External(ExternalKey),
    /// A file, directory or device with a path.
    Path(PathImage),
    /// A file without a name.
    Content(ContentFile),
    /// One end of a pipe, or both (a pipe opened again for reading and writing).
    Pipe(PipeEnd),
    /// eventfd.
    Event {
        /// Its count.
        count: u64,
        /// EFD_SEMAPHORE.
        semaphore: bool,
    },
    /// timerfd.
    Timer(TimerImage),
    /// signalfd.
    Signal {
        /// Bit 0 is signal 1.
        mask: u64,
    },
    /// epoll.
    Epoll {
        /// What it watches.
        watches: Vec<EpollWatch>,
    },
    /// inotify.
    Inotify {
        /// What it watches.
        watches: Vec<InotifyWatch>,
    },
    /// pidfd of a process of the job.
    Process {
        /// Its number in the job.
        process: u32,
    },
    /// A Unix socket: index in [`TreeDescriptors::sockets`].
    Unix(u32),
    /// A socket of another family in the job's own network namespace.
    Socket(SocketImage),
    /// An end of a pseudo-terminal.
    Terminal(TerminalFile),
}

/// An end of a pseudo-terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalFile {
    /// Index in [`TreeDescriptors::terminals`].
    pub terminal: u32,
    /// Which.
    pub end: TerminalEnd,
}

/// A file that has a path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PathImage {
    /// Path in the job's mount namespace.
    pub path: ByteBuf,
    /// What there must be at the path.
    pub what: PathKind,
    /// Offset.
    pub offset: i64,
    /// Locks that belong to the open file description.
    pub locks: Vec<LockImage>,
}

/// What there is at a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathKind {
    /// A regular file of this size.
    Regular {
        /// Size in bytes.
        size: u64,
    },
    /// A directory.
    Directory,
    /// A character device with this number.
    Device {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Anything; only the name is held (O_PATH).
    Name,
    /// A file that the kernel generates.
    Generated,
}

/// A lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockImage {
    /// flock(2) on the whole, as opposed to a range.
    pub whole: bool,
    /// Exclusive.
    pub write: bool,
    /// First byte.
    pub start: i64,
    /// Number of bytes; 0 reaches to the end.
    pub length: i64,
}

/// A lock on a range that belongs to a process (fcntl F_SETLK).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLock {
    /// Index of the table: the kernel's owner is the table.
    pub table: u32,
    /// A descriptor of the file.
    pub number: i32,
    /// The lock.
    pub lock: LockImage,
}

/// An open file without a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentFile {
    /// Index in [`TreeDescriptors::contents`].
    pub content: u32,
    /// Offset.
    pub offset: i64,
    /// Locks that belong to the open file description.
    pub locks: Vec<LockImage>,
}

/// A file without a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContentImage {
    /// Device at the source (major, minor): with the inode what ties it to a mapping.
    pub device: (u32, u32),
    /// Inode at the source.
    pub inode: u64,
    /// Where it comes from.
    pub origin: Origin,
    /// Permissions.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Size in bytes.
    pub size: u64,
    /// Its data. Empty when it travels as shared memory.
    pub data: Pieces,
    /// It travels as shared memory of the layout.
    pub in_memory_image: bool,
    /// F_GET_SEALS.
    pub seals: u32,
}

/// Where a file without a name comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// memfd_create(2) with this name.
    Memfd(ByteBuf),
    /// Deleted, or made with O_TMPFILE, in this directory.
    Deleted(ByteBuf),
}

/// An open end of a pipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeEnd {
    /// Index in [`TreeDescriptors::pipes`].
    pub pipe: u32,
}

/// A pipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PipeImage {
    /// Inode at the source.
    pub inode: u64,
    /// Path of a named one (FIFO).
    pub path: Option<ByteBuf>,
    /// Capacity in bytes.
    pub capacity: u64,
    /// What waits in it.
    pub data: Vec<ByteBuf>,
    /// `data` are packets (O_DIRECT), one each.
    pub packets: bool,
}

/// timerfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerImage {
    /// CLOCK_*.
    pub clock: i32,
    /// TFD_TIMER_* of the last timerfd_settime.
    pub settime_flags: i32,
    /// Expiries that were not read.
    pub ticks: u64,
    /// Time left in nanoseconds; 0 is off.
    pub left_ns: u64,
    /// For absolute times on a settable clock: when, in nanoseconds since 1970.
    pub expires_at_ns: Option<u64>,
    /// Period in nanoseconds; 0 is once.
    pub interval_ns: u64,
}

/// One thing an epoll watches. It travels as a tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(i32, u32, u32, u64)", into = "(i32, u32, u32, u64)")]
pub struct EpollWatch {
    /// The number it was added with.
    pub number: i32,
    /// Index in [`TreeDescriptors::files`].
    pub file: u32,
    /// EPOLL*.
    pub events: u32,
    /// The program's word.
    pub data: u64,
}

impl From<(i32, u32, u32, u64)> for EpollWatch {
    fn from((number, file, events, data): (i32, u32, u32, u64)) -> EpollWatch {
        EpollWatch { number, file, events, data }
    }
}

impl From<EpollWatch> for (i32, u32, u32, u64) {
    fn from(watch: EpollWatch) -> (i32, u32, u32, u64) {
        (watch.number, watch.file, watch.events, watch.data)
    }
}

/// One thing an inotify watches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InotifyWatch {
    /// The program's number for it.
    pub number: i32,
    /// Path in the job's mount namespace.
    pub path: ByteBuf,
    /// IN_*.
    pub mask: u32,
}

/// One option of a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// SOL_*.
    pub level: i32,
    /// Its number.
    pub name: i32,
    /// Its bytes.
    pub value: ByteBuf,
}

/// A socket that is made anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketImage {
    /// AF_*.
    pub domain: i32,
    /// SOCK_*.
    pub kind: i32,
    /// Protocol.
    pub protocol: i32,
    /// Address it is bound to (`struct sockaddr`).
    pub local: Option<ByteBuf>,
    /// Address it is connected to.
    pub remote: Option<ByteBuf>,
    /// Options.
    pub options: Vec<SocketOption>,
    /// What waits to be received, oldest first; UDP only.
    #[serde(default)]
    pub queue: Vec<DatagramImage>,
}

/// A datagram that waits to be received, with what a program can learn of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatagramImage {
    /// Its data.
    pub data: ByteBuf,
    /// Who sent it.
    pub source: SocketAddr,
    /// The address it was sent to.
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// TOS or traffic class.
    pub traffic_class: u8,
    /// It came through the loopback device.
    pub looped: bool,
}

/// A Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixImage {
    /// Inode at the source.
    pub inode: u64,
    /// SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
    pub kind: i32,
    /// Its name.
    pub name: Option<UnixName>,
    /// Its state.
    pub state: UnixState,
    /// RCV_SHUTDOWN (1) and SEND_SHUTDOWN (2).
    pub shutdown: u8,
    /// There is a pending ECONNRESET.
    pub reset: bool,
    /// What waits to be read.
    pub queue: Vec<UnixMessage>,
    /// User and group of SO_PEERCRED, and the process when it is one of the job.
    pub peer_credentials: Option<(u32, u32, Option<u32>)>,
    /// Options.
    pub options: Vec<SocketOption>,
}

/// The name of a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixName {
    /// `struct sockaddr_un` as it was given.
    pub address: ByteBuf,
    /// The file it is bound to, when it still has one under a path.
    pub file: Option<SocketFile>,
}

/// The file that a Unix socket is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketFile {
    /// Path in the job's mount namespace.
    pub path: ByteBuf,
    /// Permissions.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
}

/// What a Unix socket is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnixState {
    /// Neither of the others.
    Idle,
    /// listen(2) was called.
    Listening {
        /// Backlog.
        backlog: u32,
        /// Sockets (indexes) that are connected to it and not yet accepted, oldest first.
        waiting: Vec<u32>,
    },
    /// Connected to this socket (index).
    Connected(u32),
    /// Connected to a listener (its `waiting` says which) and not yet accepted.
    Waiting,
    /// The peer is gone.
    Orphaned,
}

/// What waits in a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixMessage {
    /// Its bytes.
    pub data: ByteBuf,
    /// Address of the sender, when it has one.
    pub sender: ByteBuf,
    /// The sender's process (when in the job), user, group; when the receiver asks for them.
    pub credentials: Option<(Option<u32>, u32, u32)>,
}
