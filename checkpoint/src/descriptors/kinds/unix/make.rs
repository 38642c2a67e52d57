//! Unix sockets made anew.
//!
//! A socket's name is the string it was bound with, and binding makes a file. The file of the source may be the target's as
//! well (a shared file system) and belongs to the source until the owner changes. So a socket is bound in a *scratch
//! directory* beside the place of its file, with that directory as root: the string is right, and [`Scratches::publish`]
//! renames the file to its place in one step when the time has come.
//!
//! Connected pairs come from socketpair(2) when neither end has a name, and otherwise from a listener that exists for that
//! moment: an accepted socket has its listener's name.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sys::fds::{self, sockets};
use sys::unix::Half;
use sys::{libc, namespaces};

use super::super::super::image::{SocketFile, UnixImage, UnixMessage, UnixState};
use super::super::sockets::set_options;

/// A directory in which sockets were bound, with directories of its own. It goes with the last of them.
///
/// Everything in it is reached from the descriptor of its parent, which means the same in every mount namespace.
#[derive(Debug)]
struct Root {
    /// The directory that the sockets' files belong into.
    parent: OwnedFd,
    /// The scratch directory in it.
    name: String,
    inside: Mutex<Inside>,
}

#[derive(Debug, Default)]
struct Inside {
    /// From the parent, in the order in which they were made.
    directories: Vec<PathBuf>,
    /// Where sockets are, below the scratch directory.
    files: HashSet<PathBuf>,
}

impl Root {
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing in it is in the way of a socket that is called `below`: one of that name, a socket where it needs a directory, or
    /// the other way round.
    fn has_room(&self, below: &Path) -> bool {
        let inside = self.inside();
        !inside.files.iter().any(|file| below.starts_with(file))
            && !inside.directories.contains(&Path::new(&self.name).join(below))
    }

    fn directory(&self) -> io::Result<OwnedFd> {
        fds::open_at(Some(self.parent.as_fd()), self.name.as_ref(), libc::O_PATH | libc::O_DIRECTORY, 0)
    }

    /// Makes the directories above a file.
    fn make_room(&self, below: &Path) -> io::Result<()> {
        let file = Path::new(&self.name).join(below);
        let mut wanted: Vec<&Path> = file.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty()).collect();
        wanted.reverse();
        let mut inside = self.inside();
        for directory in wanted {
            if !inside.directories.iter().any(|made| made == directory) {
                fds::make_directory_at(self.parent.as_fd(), directory.as_os_str(), 0o755)?;
                inside.directories.push(directory.to_path_buf());
            }
        }
        Ok(())
    }

    fn remove(&self, path: &Path, is_directory: bool) {
        match fds::remove_at(self.parent.as_fd(), path.as_os_str(), is_directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, path = %path.display(), "left over from making a unix socket");
            }
            _ => {}
        }
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let directories = std::mem::take(&mut self.inside().directories);
        directories.iter().rev().for_each(|directory| self.remove(directory, true));
    }
}

/// The scratch directories, by the directory that they are in (none: a temporary one).
///
/// One serves all sockets whose files belong into the same directory: to remove one takes some file systems milliseconds, and a server may
/// listen at dozens of names.
#[derive(Debug, Default)]
struct Roots(RefCell<Vec<(Option<PathBuf>, Arc<Root>)>>);

impl Roots {
    /// A place for a socket that is called `below`.
    fn place(&self, directory: Option<&Path>, below: PathBuf) -> io::Result<Scratch> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut roots = self.0.borrow_mut();
        let found = roots
            .iter()
            .find(|(place, root)| place.as_deref() == directory && root.has_room(&below))
            .map(|(_, root)| Arc::clone(root));
        let root = match found {
            Some(root) => root,
            None => {
                let parent = match directory {
                    Some(directory) => fds::open_at(None, directory.as_os_str(), libc::O_PATH | libc::O_DIRECTORY, 0)
                        .map_err(|error| {
                        io::Error::new(error.kind(), format!("{}: {error}", directory.display()))
                    })?,
                    None => temporary_directory()?,
                };
                let name = format!(".migd-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
                let root = Arc::new(Root { parent, name, inside: Mutex::default() });
                roots.push((directory.map(Path::to_path_buf), Arc::clone(&root)));
                root
            }
        };
        root.inside().files.insert(below.clone());
        let scratch = Scratch { root, below, place: None };
        scratch.root.make_room(&scratch.below)?;
        Ok(scratch)
    }
}

/// A socket's file in a scratch directory.
#[derive(Debug)]
struct Scratch {
    root: Arc<Root>,
    /// The socket's file, below the scratch directory.
    below: PathBuf,
    /// The name that the file gets in the parent.
    place: Option<Vec<u8>>,
}

impl Scratch {
    fn file(&self) -> PathBuf {
        Path::new(&self.root.name).join(&self.below)
    }

    /// Puts the socket's file where it belongs.
    fn publish(&mut self) -> io::Result<()> {
        let Some(place) = self.place.take() else { return Ok(()) };
        fds::rename_at(self.root.parent.as_fd(), self.file().as_os_str(), OsStr::from_bytes(&place))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.root.remove(&self.file(), false);
        self.root.inside().files.remove(&self.below);
    }
}

/// All Unix sockets of an image.
#[derive(Debug)]
pub(in super::super::super) struct Made {
    /// By index.
    pub sockets: Vec<OwnedFd>,
    /// Where those with files are.
    pub scratches: Scratches,
}

/// The scratch directories and the sockets' files in them.
#[derive(Debug, Default)]
pub(in super::super::super) struct Scratches {
    files: Vec<Scratch>,
    /// Kept, also if nothing is in them any more: they are not to be removed while the job stands still.
    #[expect(dead_code, reason = "it is dropped")]
    roots: Roots,
}

impl Scratches {
    /// Puts the sockets' files where they belong. The directories go when this is dropped.
    pub fn publish(&mut self) {
        for scratch in &mut self.files {
            if let Err(error) = scratch.publish() {
                tracing::error!(%error, "a unix socket of the job doesn't have its name in the file system");
            }
        }
    }
}

/// Makes them; to be called inside the job's namespaces. `pid_of` gives our number of a process of the job.
pub(in super::super::super) fn make(
    images: &[UnixImage],
    pid_of: &(dyn Fn(u32) -> Option<i32> + Sync),
) -> io::Result<Made> {
    let mut maker = Maker {
        images,
        pid_of,
        made: BTreeMap::new(),
        bound: HashMap::new(),
        scratches: Vec::new(),
        roots: Roots::default(),
    };
    for index in 0..images.len() {
        maker.check(index)?;
    }
    // Listeners first: an abstract name that a listener has can't be bound a second time afterwards, so pairs with
    // the name of a listener are made before it.
    for index in 0..images.len() {
        maker.connected(index)?;
    }
    for index in 0..images.len() {
        maker.listening(index)?;
    }
    for index in 0..images.len() {
        maker.single(index)?;
    }
    for index in 0..images.len() {
        maker.fill_datagrams(index)?;
    }
    for index in 0..images.len() {
        maker.connect_datagrams(index)?;
    }
    for index in 0..images.len() {
        maker.finish(index)?;
    }
    let Maker { made, scratches: files, roots, .. } = maker;
    Ok(Made { sockets: made.into_values().collect(), scratches: Scratches { files, roots } })
}

struct Maker<'a> {
    images: &'a [UnixImage],
    pid_of: &'a (dyn Fn(u32) -> Option<i32> + Sync),
    made: BTreeMap<usize, OwnedFd>,
    /// Where named sockets were bound: index of their scratch.
    bound: HashMap<usize, usize>,
    scratches: Vec<Scratch>,
    roots: Roots,
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("unix sockets of the image: {what}"))
}

impl Maker<'_> {
    /// References between sockets stay inside the image.
    fn check(&self, index: usize) -> io::Result<()> {
        let inside = |other: u32| (other as usize) < self.images.len();
        let fine = match &self.images[index].state {
            UnixState::Connected(peer) => inside(*peer),
            UnixState::Listening { waiting, .. } => waiting.iter().all(|client| inside(*client)),
            _ => true,
        };
        if fine { Ok(()) } else { Err(broken("a peer that isn't there")) }
    }

    fn is_datagram(&self, index: usize) -> bool {
        self.images[index].kind == libc::SOCK_DGRAM
    }

    fn address(&self, index: usize) -> Option<&[u8]> {
        self.images[index].name.as_ref().map(|name| name.address.as_slice())
    }

    fn fd(&self, index: usize) -> io::Result<BorrowedFd<'_>> {
        self.made.get(&index).map(AsFd::as_fd).ok_or_else(|| broken("one that was needed early"))
    }

    /// Pairs of streams, streams whose peer is gone, and pairs of datagram sockets without names.
    fn connected(&mut self, index: usize) -> io::Result<()> {
        if self.made.contains_key(&index) {
            return Ok(());
        }
        let image = &self.images[index];
        let peer = match image.state {
            UnixState::Connected(peer) => Some(peer as usize),
            UnixState::Orphaned => None,
            _ => return Ok(()),
        };
        if self.is_datagram(index) && (image.name.is_some() || peer.is_some_and(|peer| self.address(peer).is_some())) {
            return Ok(());
        }
        let (own, other) = self.pair(index, peer)?;
        large_send_buffer(own.as_fd())?;
        large_send_buffer(other.as_fd())?;
        self.fill(other.as_fd(), &image.queue)?;
        match peer {
            Some(peer) if peer != index => {
                self.fill(own.as_fd(), &self.images[peer].queue)?;
                shut(own.as_fd(), image.shutdown)?;
                shut(other.as_fd(), self.images[peer].shutdown)?;
                self.made.insert(peer, other);
            }
            _ => {
                if image.reset {
                    // Unread data in a socket that is closed makes ECONNRESET at its peer.
                    fds::write(own.as_fd(), b"x")?;
                }
                drop(other);
            }
        }
        self.made.insert(index, own);
        Ok(())
    }

    /// A connected pair: the socket, its peer.
    fn pair(&mut self, index: usize, peer: Option<usize>) -> io::Result<(OwnedFd, OwnedFd)> {
        let image = &self.images[index];
        let credentials = |index: usize| self.images[index].peer_credentials.map(|(uid, gid, _)| (uid, gid));
        let (own_name, peer_name) = (self.address(index), peer.and_then(|peer| self.address(peer)));
        match (own_name, peer_name) {
            (None, None) => as_user(credentials(index), || sockets::socket_pair(image.kind)),
            // The named one was accepted. Where both have names either may have been; the one that shares its name with
            // others certainly was.
            (None, Some(name)) => {
                let (server, client) = (credentials(index), peer.and_then(credentials));
                let (client, server) = connect_to(&self.roots, image.kind, name, None, server, client)?;
                Ok((client, server))
            }
            (Some(name), other) => {
                let (client_of, server_of) = (credentials(index), peer.and_then(credentials));
                let first = connect_to(&self.roots, image.kind, name, other, server_of, client_of);
                match (first, other) {
                    (Ok((client, server)), _) => Ok((server, client)),
                    (Err(error), Some(other)) if error.kind() == io::ErrorKind::AddrInUse => {
                        connect_to(&self.roots, image.kind, other, Some(name), client_of, server_of)
                    }
                    (Err(error), _) => Err(error),
                }
            }
        }
    }

    fn listening(&mut self, index: usize) -> io::Result<()> {
        let image = &self.images[index];
        let UnixState::Listening { backlog, waiting } = &image.state else { return Ok(()) };
        let fd = sockets::socket(libc::AF_UNIX, image.kind, 0)?;
        self.bind(index, fd.as_fd())?;
        let user = image.peer_credentials.map(|(uid, gid, _)| (uid, gid));
        let backlog = i32::try_from(*backlog).unwrap_or(i32::MAX);
        as_user(user, || sockets::listen(fd.as_fd(), backlog.max(i32::try_from(waiting.len()).unwrap_or(0))))?;
        for &client in waiting {
            let client = client as usize;
            let socket = sockets::socket(libc::AF_UNIX, self.images[client].kind | libc::SOCK_NONBLOCK, 0)?;
            if self.address(client).is_some() {
                self.bind(client, socket.as_fd())?;
            }
            let address = self.address(index).ok_or_else(|| broken("a listener without a name"))?;
            self.at_name_of(index, || sockets::connect(socket.as_fd(), address))?;
            self.made.insert(client, socket);
        }
        sockets::listen(fd.as_fd(), backlog)?;
        self.made.insert(index, fd);
        Ok(())
    }

    /// What is left: sockets that stand alone, and datagram sockets with names.
    fn single(&mut self, index: usize) -> io::Result<()> {
        if self.made.contains_key(&index) {
            return Ok(());
        }
        let image = &self.images[index];
        if image.state == UnixState::Waiting {
            return Err(broken("a client that waits for no listener"));
        }
        let fd = sockets::socket(libc::AF_UNIX, image.kind, 0)?;
        if image.name.is_some() {
            self.bind(index, fd.as_fd())?;
        }
        self.made.insert(index, fd);
        Ok(())
    }

    fn fill_datagrams(&mut self, index: usize) -> io::Result<()> {
        let image = &self.images[index];
        // Pairs without names are filled already.
        let Some(address) = self.address(index) else { return Ok(()) };
        if !self.is_datagram(index) {
            return Ok(());
        }
        for message in &image.queue {
            let sender = (0..self.images.len())
                .find(|other| !message.sender.is_empty() && self.address(*other) == Some(message.sender.as_slice()));
            let credentials = self.credentials(message);
            let temporary;
            let mut borrowed = None;
            let from = match sender {
                Some(sender) => self.fd(sender)?,
                None => {
                    temporary = sockets::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0)?;
                    if !message.sender.is_empty() {
                        // The sender is gone; its name is needed for this moment.
                        borrowed = bind_in_scratch(&self.roots, temporary.as_fd(), &message.sender, None)?;
                    }
                    temporary.as_fd()
                }
            };
            large_send_buffer(from)?;
            self.at_name_of(index, || sockets::send_as(from, &message.data, address, credentials))?;
            drop(borrowed);
        }
        Ok(())
    }

    fn connect_datagrams(&mut self, index: usize) -> io::Result<()> {
        let UnixState::Connected(peer) = self.images[index].state else { return Ok(()) };
        let peer = peer as usize;
        if !self.is_datagram(index) {
            return Ok(());
        }
        // A pair without names is connected already.
        let Some(address) = self.address(peer) else { return Ok(()) };
        let fd = self.fd(index)?;
        self.at_name_of(peer, || sockets::connect(fd, address))
    }

    fn finish(&mut self, index: usize) -> io::Result<()> {
        let image = &self.images[index];
        let fd = self.fd(index)?;
        if !matches!(image.state, UnixState::Connected(_) | UnixState::Orphaned) || self.is_datagram(index) {
            shut(fd, image.shutdown)?;
        }
        set_options(fd, &image.options)
    }

    fn credentials(&self, message: &UnixMessage) -> Option<(i32, u32, u32)> {
        let (process, uid, gid) = message.credentials?;
        // A process that isn't in the job shows as 0 there, and so do we.
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        Some((process.and_then(self.pid_of).unwrap_or(own), uid, gid))
    }

    fn fill(&self, from: BorrowedFd<'_>, queue: &[UnixMessage]) -> io::Result<()> {
        for message in queue {
            let mut rest: &[u8] = &message.data;
            loop {
                let sent = sockets::send_as(from, rest, &[], self.credentials(message))?;
                rest = &rest[sent.min(rest.len())..];
                if rest.is_empty() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Binds a socket to its name.
    fn bind(&mut self, index: usize, fd: BorrowedFd<'_>) -> io::Result<()> {
        let name = self.images[index].name.as_ref().ok_or_else(|| broken("a listener without a name"))?;
        // Accepted sockets show the file of their listener; only one socket may bring it.
        let is_taken = name.file.as_ref().is_some_and(|file| {
            self.bound.keys().any(|other| {
                self.images[*other].name.as_ref().and_then(|other| other.file.as_ref()).map(|other| &other.path)
                    == Some(&file.path)
            })
        });
        let file = name.file.as_ref().filter(|_| !is_taken);
        if let Some(scratch) = bind_in_scratch(&self.roots, fd, &name.address, file)? {
            self.bound.insert(index, self.scratches.len());
            self.scratches.push(scratch);
        }
        Ok(())
    }

    /// Runs something where this socket's name leads to it.
    fn at_name_of<T: Send>(&self, index: usize, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        match self.bound.get(&index) {
            Some(&scratch) => with_root(&self.scratches[scratch], work),
            None => work(),
        }
    }
}

/// A client and its server, through a listener of that name that ends at once.
fn connect_to(
    roots: &Roots,
    kind: i32,
    name: &[u8],
    client_name: Option<&[u8]>,
    listener_user: Option<(u32, u32)>,
    client_user: Option<(u32, u32)>,
) -> io::Result<(OwnedFd, OwnedFd)> {
    let listener = sockets::socket(libc::AF_UNIX, kind, 0)?;
    let client = sockets::socket(libc::AF_UNIX, kind, 0)?;
    let scratch = bind_in_scratch(roots, listener.as_fd(), name, None)?;
    let client_scratch = match client_name {
        Some(name) => bind_in_scratch(roots, client.as_fd(), name, None)?,
        None => None,
    };
    as_user(listener_user, || sockets::listen(listener.as_fd(), 1))?;
    let connect = || as_user(client_user, || sockets::connect(client.as_fd(), name));
    match &scratch {
        Some(scratch) => with_root(scratch, connect)?,
        None => connect()?,
    }
    let server = sockets::accept(listener.as_fd())?;
    drop((scratch, client_scratch));
    Ok((client, server))
}

/// Runs something in a thread whose root and working directory are this directory.
fn with_root<T: Send>(scratch: &Scratch, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("in a scratch".into()).spawn_scoped(scope, move || {
            namespaces::leave_shared_directory()?;
            namespaces::change_root(scratch.root.directory()?.as_fd())?;
            work()
        })?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread in a scratch directory ended early")))
    })
}

/// Binds a socket. A name that is a path is bound in a scratch directory, which comes back; the file in it gets its place
/// when there is one for it.
fn bind_in_scratch(
    roots: &Roots,
    fd: BorrowedFd<'_>,
    address: &[u8],
    file: Option<&SocketFile>,
) -> io::Result<Option<Scratch>> {
    let path = match address.get(2..) {
        Some([0, ..]) | None => return sockets::bind(fd, address).map(|()| None),
        Some(path) => path.split(|byte| *byte == 0).next().unwrap_or_default(),
    };
    let directory = file.map(|file| Path::new(OsStr::from_bytes(&file.path)).parent().unwrap_or(Path::new("/")));
    // Absolute or not, it is the same place when root and working directory are one.
    let components = Path::new(OsStr::from_bytes(path)).components();
    let below: PathBuf = components.filter(|part| matches!(part, std::path::Component::Normal(_))).collect();
    let mut scratch = roots.place(directory, below)?;
    with_root(&scratch, || sockets::bind(fd, address))?;
    let node = fds::open_at(Some(scratch.root.parent.as_fd()), scratch.file().as_os_str(), libc::O_PATH, 0)?;
    let Some(file) = file else {
        fds::change_node(node.as_fd(), None, 0o777)?;
        return Ok(Some(scratch));
    };
    fds::change_node(node.as_fd(), Some(file.owner), file.mode)?;
    let last = Path::new(OsStr::from_bytes(&file.path)).file_name().ok_or_else(|| broken("a file without a name"))?;
    scratch.place = Some(last.as_bytes().to_vec());
    Ok(Some(scratch))
}

/// A directory of the job in which files can be made.
fn temporary_directory() -> io::Result<OwnedFd> {
    let writable = |path: &&str| {
        let path = std::ffi::CString::new(*path).unwrap_or_default();
        fds::is_writable(&path)
    };
    let path = ["/tmp", "/run", "/dev/shm", "/"].into_iter().find(writable).ok_or_else(|| {
        io::Error::other("no directory of /tmp, /run, /dev/shm and / is writable for restoring a unix socket")
    })?;
    fds::open_at(None, path.as_ref(), libc::O_PATH | libc::O_DIRECTORY, 0)
}

/// Runs something as another user, for the sake of SO_PEERCRED.
fn as_user<T>(user: Option<(u32, u32)>, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let Some((uid, gid)) = user.filter(|user| *user != (0, 0) && user.0 != u32::MAX) else { return work() };
    fds::set_thread_identity(uid, gid)?;
    let result = work();
    fds::set_thread_identity(0, 0)?;
    result
}

/// Makes room for whatever was in the queue; the size that belongs there is set last.
fn large_send_buffer(fd: BorrowedFd<'_>) -> io::Result<()> {
    sockets::set_int_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 256i32 << 20)
}

fn shut(fd: BorrowedFd<'_>, shutdown: u8) -> io::Result<()> {
    match shutdown & 3 {
        0 => Ok(()),
        1 => sys::unix::shutdown(fd, Half::Read),
        2 => sys::unix::shutdown(fd, Half::Write),
        _ => sys::unix::shutdown(fd, Half::Both),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::super::image::UnixName;
    use super::*;

    fn listener(directory: &Path, name: &str) -> UnixImage {
        let path = directory.join(name).as_os_str().as_bytes().to_vec();
        let family = u16::try_from(libc::AF_UNIX).expect("it is small").to_ne_bytes();
        let file = SocketFile { path: path.clone().into(), owner: (0, 0), mode: 0o600 };
        UnixImage {
            inode: 0,
            kind: libc::SOCK_STREAM,
            name: Some(UnixName { address: [&family[..], &path].concat().into(), file: Some(file) }),
            state: UnixState::Listening { backlog: 1, waiting: Vec::new() },
            shutdown: 0,
            reset: false,
            queue: Vec::new(),
            peer_credentials: None,
            options: Vec::new(),
        }
    }

    fn names_in(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).expect("it is there");
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn sockets_of_one_directory_share_a_scratch_directory() {
        let directory = tempfile::tempdir().expect("a directory");
        let images: Vec<UnixImage> = ["a", "b", "c"].map(|name| listener(directory.path(), name)).into();
        let mut made = make(&images, &|_| None).expect("they are made");
        let scratch = names_in(directory.path());
        assert!(matches!(&scratch[..], [one] if one.starts_with(".migd-")), "{scratch:?}");
        made.scratches.publish();
        drop(made);
        assert_eq!(names_in(directory.path()), ["a", "b", "c"]);
    }

    #[test]
    fn a_deleted_socket_may_be_called_as_the_directory_of_another() {
        let directory = tempfile::tempdir().expect("a directory");
        for names in [["a", "a/b"], ["a/b", "a"]] {
            let mut images: Vec<UnixImage> = names.map(|name| listener(directory.path(), name)).into();
            images.iter_mut().filter_map(|image| image.name.as_mut()).for_each(|name| name.file = None);
            assert_eq!(make(&images, &|_| None).expect("they are made").sockets.len(), 2);
        }
    }

    #[test]
    fn what_was_not_published_leaves_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let images: Vec<UnixImage> = ["a", "b"].map(|name| listener(directory.path(), name)).into();
        drop(make(&images, &|_| None).expect("they are made"));
        assert_eq!(names_in(directory.path()), [""; 0]);
    }
}
