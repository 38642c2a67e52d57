//! One handler for each kind of open file.
//!
//! A handler [recognises](Handler::recognises) its kind by what a scan saw, tells [what keeps it here](Handler::obstacle)
//! while the job runs and without touching it, and [dumps](Handler::dump) it when the job stands still. Making it anew is in
//! the same file, as a function of the image.

pub(super) mod content;
mod datagrams;
pub(super) mod epoll;
pub(super) mod events;
pub(super) mod inotify;
pub(super) mod locks;
mod others;
pub(super) mod paths;
pub(super) mod pidfd;
pub(super) mod pipes;
pub(super) mod sockets;
pub(super) mod terminals;
pub(super) mod unix;

use std::cell::OnceCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;

use sys::fds::diag::{self, UnixSocket};
use sys::libc;

use super::image::{Kind, TreeDescriptors};
use super::scan::{Scan, Seen};
use super::{Job, namespace};
use crate::external::{External, ExternalKey, FdKind};
use crate::memory::Layout;

/// Why something wasn't dumped.
#[derive(Debug)]
pub(super) enum Problem {
    /// It can't move.
    Stays(String),
    /// The kernel refused something.
    System(io::Error),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Problem {
        Problem::System(error)
    }
}

/// Knows one kind of open file.
pub(super) trait Handler: Sync {
    /// Whether this is of its kind.
    fn recognises(&self, seen: &Seen) -> bool;

    /// Why this can't move, in words that also say what would help.
    fn obstacle(&self, seen: &Seen, view: &View<'_>) -> io::Result<Option<String>>;

    /// Its image. `index` is its place in the scan's files, and in the image's.
    fn dump(&self, seen: &Seen, index: usize, dump: &mut Dumping<'_>) -> Result<Kind, Problem>;
}

/// All handlers; the first that recognises a file has it.
static HANDLERS: &[&dyn Handler] = &[
    &paths::Named,
    &events::Event,
    &events::Timer,
    &events::Signal,
    &epoll::Epoll,
    &pipes::Pipe,
    &unix::Unix,
    &sockets::Native,
    &content::Nameless,
    &terminals::Terminal,
    &paths::Path,
    &inotify::Inotify,
    &pidfd::Process,
    &others::Other,
];

/// The handler for a file.
pub(super) fn handler(seen: &Seen) -> &'static dyn Handler {
    HANDLERS.iter().copied().find(|handler| handler.recognises(seen)).unwrap_or(&others::Other)
}

/// The kernel looks through all sockets to find one: so many are asked for one by one, more with all others in one go.
const ASKED_FOR_SINGLY: usize = 8;

/// What handlers look at.
pub(super) struct View<'a> {
    /// The processes.
    pub job: &'a Job<'a>,
    /// The caller's descriptors.
    pub external: &'a dyn External,
    /// All open files.
    pub scan: &'a Scan,
    /// The job stands still.
    pub is_frozen: bool,
    unix: OnceCell<HashMap<u64, UnixSocket>>,
    terminals: OnceCell<Option<u64>>,
}

impl<'a> View<'a> {
    pub fn new(job: &'a Job<'a>, external: &'a dyn External, scan: &'a Scan, is_frozen: bool) -> View<'a> {
        View { job, external, scan, is_frozen, unix: OnceCell::new(), terminals: OnceCell::new() }
    }

    /// The caller's key for an open file, when it is one of the caller's.
    pub fn key(&self, seen: &Seen) -> Option<ExternalKey> {
        if let Some(inode) = seen.socket() {
            return self.external.key(FdKind::Socket, inode);
        }
        let status = seen.status?;
        let kind = match status.file_type() {
            libc::S_IFIFO => FdKind::Pipe,
            libc::S_IFCHR if paths::is_terminal(&status) => FdKind::Terminal,
            // Inode numbers of other files mean something on their file system only.
            _ => return None,
        };
        self.external.key(kind, status.inode)
    }

    /// The Unix sockets of the job's network namespace, by inode: those that listen, those of the job that aren't the caller's, and
    /// their peers; perhaps others.
    pub fn unix_sockets(&self) -> io::Result<&HashMap<u64, UnixSocket>> {
        if let Some(known) = self.unix.get() {
            return Ok(known);
        }
        let diag = namespace::enter(self.job.init, diag::open)?;
        let own: Vec<u64> =
            self.scan.files.iter().filter(|seen| self.key(seen).is_none()).filter_map(Seen::socket).collect();
        let known = if own.len() > ASKED_FOR_SINGLY {
            diag::unix_sockets(&diag)?
        } else {
            // The caller has thousands of them in the namespace.
            let mut known = diag::unix_listeners(&diag)?;
            for inode in own {
                if known.contains_key(&inode) {
                    continue;
                }
                let Some(socket) = diag::unix_socket(&diag, inode)? else { continue };
                if let Some(peer) = socket.peer
                    && !known.contains_key(&peer)
                    && let Some(peer) = diag::unix_socket(&diag, peer)?
                {
                    known.insert(peer.inode, peer);
                }
                known.insert(inode, socket);
            }
            known
        };
        Ok(self.unix.get_or_init(|| known))
    }

    /// The device of the job's own `/dev/pts`.
    pub fn terminals(&self) -> Option<u64> {
        *self.terminals.get_or_init(|| crate::terminals::device(self.job.init))
    }

    /// What the path leads to in the job's mount namespace.
    pub fn status_of(&self, path: &[u8]) -> io::Result<sys::fds::Status> {
        let relative = path.strip_prefix(b"/").unwrap_or(path);
        let root = format!("/proc/{}/root", self.job.init);
        let root = sys::fds::open_at(None, root.as_ref(), libc::O_PATH | libc::O_DIRECTORY, 0)?;
        let name = std::ffi::CString::new(relative).map_err(io::Error::other)?;
        sys::fds::status_at(root.as_fd(), &name, false)
    }
}

/// A dump under way.
pub(super) struct Dumping<'a> {
    /// What there is.
    pub view: &'a View<'a>,
    /// What the memory part carries.
    pub layout: &'a Layout,
    /// What was dumped so far.
    pub image: TreeDescriptors,
    /// Indexes of pipes by inode (and device, for named ones).
    pub pipes: HashMap<(u64, u64), u32>,
    /// Indexes of nameless files by device and inode.
    pub contents: HashMap<(u64, u64), u32>,
    /// Indexes of Unix sockets by inode.
    pub sockets: HashMap<u64, u32>,
}

/// An index as it is in an image.
pub(super) fn index32(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}
