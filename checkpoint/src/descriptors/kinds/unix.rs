//! Unix sockets whose peers are in the job.
//!
//! `sock_diag(7)` tells who is connected to whom; what waits in a socket is peeked. A socket whose peer is outside the job
//! stays, and the reason names whom it talks to. How they are made anew is in [`make`].

pub(in super::super) mod make;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde_bytes::ByteBuf;
use sys::Pid;
use sys::fds::diag::{self, Name, UnixSocket};
use sys::fds::{self, sockets};
use sys::libc;

use super::super::image::{Kind, SocketFile, UnixImage, UnixMessage, UnixName, UnixState};
use super::super::scan::{Scan, Seen};
use super::{Dumping, Handler, Problem, View, sockets as native};

/// States as sock_diag shows them.
const LISTENING: u8 = 10;
const ESTABLISHED: u8 = 1;
/// How many names of a directory are looked at for one of a socket's file. The job stands still meanwhile.
const NAMES_LOOKED_AT: usize = 4096;

/// A Unix socket.
pub(in super::super) struct Unix;

impl Handler for Unix {
    fn recognises(&self, seen: &Seen) -> bool {
        is_unix(seen).unwrap_or(false)
    }

    fn obstacle(&self, seen: &Seen, view: &View<'_>) -> io::Result<Option<String>> {
        let Some(inode) = seen.socket() else { return Ok(None) };
        let known = view.unix_sockets()?;
        let Some(socket) = known.get(&inode) else {
            return stranger(seen, view);
        };
        let own = own_sockets(view.scan);
        if socket.state == LISTENING {
            let stranger = socket.waiting.iter().any(|client| *client != 0 && !own.contains_key(client));
            return Ok(stranger.then(|| {
                format!("unix socket {} to which somebody outside the job is connecting", shown(socket.name.as_ref()))
            }));
        }
        match socket.peer {
            None | Some(0) => Ok(None),
            Some(peer) if own.contains_key(&peer) => Ok(None),
            Some(peer) => {
                let named = known.get(&peer).and_then(|peer| peer.name.clone());
                let name = match named {
                    Some(name) => shown(Some(&name)),
                    None => address_shown(&sockets::peer_address(seen.file()?.as_fd()).unwrap_or_default()),
                };
                // A server's socket has the name of its listener, its client usually none.
                let end = match (&socket.name, name.as_str()) {
                    (Some(_), "(unnamed)") => {
                        format!("unix socket {} connected to a client outside the job", shown(socket.name.as_ref()))
                    }
                    _ => format!("unix socket connected to {name} outside the job"),
                };
                Ok(Some(end))
            }
        }
    }

    fn dump(&self, seen: &Seen, _: usize, dump: &mut Dumping<'_>) -> Result<Kind, Problem> {
        if dump.sockets.is_empty() {
            number_sockets(dump)?;
        }
        if let Some(reason) = self.obstacle(seen, dump.view)? {
            return Err(Problem::Stays(reason));
        }
        let inode = seen.socket().unwrap_or_default();
        let index = dump.sockets.get(&inode).copied().ok_or_else(|| Problem::Stays("a new unix socket".into()))?;
        let image = image(seen, inode, dump)?;
        if let Some(place) = dump.image.sockets.get_mut(index as usize) {
            *place = image;
        }
        Ok(Kind::Unix(index))
    }
}

/// Judges a socket of another network namespace that the caller doesn't claim.
fn stranger(seen: &Seen, view: &View<'_>) -> io::Result<Option<String>> {
    // One whose peer is gone says all about itself: what is left of a connection that the caller has closed.
    if has_lost_its_peer(seen)? {
        return Ok(None);
    }
    // The caller gave its keys before we looked: what came since is most likely the caller's too. In the freeze there is
    // nothing newer than the keys. Standard streams are as old as the job.
    if !view.is_frozen && seen.number > libc::STDERR_FILENO {
        return Ok(None);
    }
    Ok(Some("unix socket that was made outside the job".into()))
}

fn has_lost_its_peer(seen: &Seen) -> io::Result<bool> {
    Ok(fds::readiness(seen.file()?.as_fd(), libc::POLLIN)? & libc::POLLHUP != 0)
}

fn is_unix(seen: &Seen) -> io::Result<bool> {
    if seen.socket().is_none() {
        return Ok(false);
    }
    let domain = sockets::int_option(seen.file()?.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN)?;
    Ok(domain == libc::AF_UNIX)
}

/// The job's sockets (of any family) by inode.
fn own_sockets(scan: &Scan) -> HashMap<u64, usize> {
    scan.files.iter().enumerate().filter_map(|(index, file)| Some((file.socket()?, index))).collect()
}

/// Whether a client has sent something to a server that hasn't accepted it yet: nobody can look at that (see [`image`]).
///
/// # Errors
/// Those of asking `diag`.
pub(in super::super) fn is_unaccepted(diag: &OwnedFd) -> io::Result<bool> {
    for listener in diag::unix_listeners(diag)?.values() {
        for client in &listener.waiting {
            if diag::unix_socket(diag, *client)?.is_some_and(|client| client.backlog > 0) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Gives each Unix socket of the job its index, so that sockets can refer to those dumped later.
fn number_sockets(dump: &mut Dumping<'_>) -> Result<(), Problem> {
    let known = dump.view.unix_sockets()?;
    for file in &dump.view.scan.files {
        let Some(inode) = file.socket() else { continue };
        if dump.view.key(file).is_some() || !(known.contains_key(&inode) || is_unix(file)?) {
            continue;
        }
        dump.sockets.insert(inode, super::index32(dump.image.sockets.len()));
        dump.image.sockets.push(UnixImage {
            inode,
            kind: 0,
            name: None,
            state: UnixState::Idle,
            shutdown: 0,
            reset: false,
            queue: Vec::new(),
            peer_credentials: None,
            options: Vec::new(),
        });
    }
    Ok(())
}

fn image(seen: &Seen, inode: u64, dump: &Dumping<'_>) -> Result<UnixImage, Problem> {
    let known = dump.view.unix_sockets()?;
    let fd = seen.file()?.as_fd();
    let orphan;
    let socket = match known.get(&inode) {
        Some(socket) => socket,
        None if has_lost_its_peer(seen)? => {
            let kind = sockets::int_option(fd, libc::SOL_SOCKET, libc::SO_TYPE)?;
            orphan =
                UnixSocket { inode, kind, state: ESTABLISHED, peer: Some(0), shutdown: 3, ..UnixSocket::default() };
            &orphan
        }
        None => return Err(Problem::Stays("a new unix socket".into())),
    };
    let state = state(socket, inode, dump)?;
    if state == UnixState::Waiting && sockets::memory_unread(fd)? > 0 {
        return Err(Problem::Stays("unix socket with data for a server that hasn't accepted it yet; try again".into()));
    }
    let reset = state == UnixState::Orphaned && fds::readiness(fd, 0)? & libc::POLLERR != 0;
    let queue = match state {
        UnixState::Listening { .. } => Vec::new(),
        UnixState::Idle if socket.kind == libc::SOCK_STREAM => Vec::new(),
        _ => queue(seen, socket, dump)?,
    };
    let peer_credentials = match state {
        UnixState::Idle => None,
        _ => sockets::peer_credentials(fd).ok().map(|(pid, uid, gid)| {
            let process = (pid > 0).then(|| dump.view.job.number_of(Pid::from_raw(pid))).flatten();
            (uid, gid, process)
        }),
    };
    Ok(UnixImage {
        inode,
        kind: socket.kind,
        name: name(seen, dump.view)?,
        state,
        shutdown: socket.shutdown,
        reset,
        queue,
        peer_credentials,
        options: native::options(fd, libc::AF_UNIX),
    })
}

fn state(socket: &UnixSocket, inode: u64, dump: &Dumping<'_>) -> Result<UnixState, Problem> {
    if socket.state == LISTENING {
        let index = |client: &u64| dump.sockets.get(client).copied();
        // A client that is gone left nothing but its place in the queue.
        let waiting = socket.waiting.iter().filter(|client| **client != 0).map(index).collect::<Option<Vec<u32>>>();
        let waiting =
            waiting.ok_or_else(|| Problem::Stays("unix socket with a connecting client outside the job".into()))?;
        return Ok(UnixState::Listening { backlog: socket.backlog, waiting });
    }
    match socket.peer {
        None => Ok(UnixState::Idle),
        Some(0) => {
            let known = dump.view.unix_sockets()?;
            let waits = known.values().any(|listener| listener.waiting.contains(&inode));
            Ok(if waits { UnixState::Waiting } else { UnixState::Orphaned })
        }
        Some(peer) => {
            let peer = dump.sockets.get(&peer).copied();
            peer.map(UnixState::Connected).ok_or_else(|| Problem::Stays("unix socket connected outside the job".into()))
        }
    }
}

fn queue(seen: &Seen, socket: &UnixSocket, dump: &Dumping<'_>) -> Result<Vec<UnixMessage>, Problem> {
    let queue = sockets::peek_queue(seen.file()?.as_fd(), socket.kind == libc::SOCK_STREAM)?;
    let mut messages = Vec::with_capacity(queue.len());
    for message in queue {
        if message.carries_descriptors {
            return Err(Problem::Stays(
                "unix socket with descriptors on their way through it (SCM_RIGHTS); try again".into(),
            ));
        }
        let credentials = message.credentials.map(|(pid, uid, gid)| {
            let process = (pid > 0).then(|| dump.view.job.number_of(Pid::from_raw(pid))).flatten();
            (process, uid, gid)
        });
        messages.push(UnixMessage {
            data: ByteBuf::from(message.data),
            sender: ByteBuf::from(message.sender),
            credentials,
        });
    }
    Ok(messages)
}

fn name(seen: &Seen, view: &View<'_>) -> Result<Option<UnixName>, Problem> {
    let fd = seen.file()?.as_fd();
    let address = sockets::local_address(fd)?;
    // The family alone: it has no name.
    if address.len() <= 2 {
        return Ok(None);
    }
    let file = if address[2] == 0 { None } else { file(seen, view)? };
    Ok(Some(UnixName { address: ByteBuf::from(address), file }))
}

/// The file a socket is bound to, when its path still leads to it.
fn file(seen: &Seen, view: &View<'_>) -> io::Result<Option<SocketFile>> {
    let file = match sockets::bound_file(seen.file()?.as_fd()) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let path = fds::link_of(file.as_fd())?;
    let status = fds::status(file.as_fd())?;
    let path = if leads_to(path.as_bytes(), &status, view) {
        path.into_vec()
    } else {
        match other_name(path.as_bytes(), &status, view) {
            Some(path) => path,
            None => return Ok(None),
        }
    };
    Ok(Some(SocketFile { path: ByteBuf::from(path), mode: status.mode & 0o7777, owner: (status.uid, status.gid) }))
}

fn leads_to(path: &[u8], status: &fds::Status, view: &View<'_>) -> bool {
    view.status_of(path).is_ok_and(|there| (there.device, there.inode) == (status.device, status.inode))
}

/// Another name that a socket's file has in the same directory. Who wants a socket to appear in one step binds it under a name of no
/// matter, makes a link under the one that clients know, and removes the first.
fn other_name(path: &[u8], status: &fds::Status, view: &View<'_>) -> Option<Vec<u8>> {
    if status.links == 0 {
        return None;
    }
    let directory = &path[..path.iter().rposition(|&byte| byte == b'/')? + 1];
    let root = format!("/proc/{}/root", view.job.init);
    let listed = std::fs::read_dir(OsStr::from_bytes(&[root.as_bytes(), directory].concat())).ok()?;
    let paths = listed.take(NAMES_LOOKED_AT).flatten().map(|entry| [directory, entry.file_name().as_bytes()].concat());
    paths.into_iter().find(|path| leads_to(path, status, view))
}

fn shown(name: Option<&Name>) -> String {
    match name {
        Some(Name::Path(path)) => String::from_utf8_lossy(path).into_owned(),
        Some(Name::Abstract(name)) => format!("@{}", String::from_utf8_lossy(name)),
        None => "(unnamed)".into(),
    }
}

fn address_shown(address: &[u8]) -> String {
    match address.get(2..) {
        Some([0, name @ ..]) => shown(Some(&Name::Abstract(name.to_vec()))),
        Some(path @ [_, ..]) => shown(Some(&Name::Path(path.strip_suffix(&[0]).unwrap_or(path).to_vec()))),
        _ => shown(None),
    }
}
