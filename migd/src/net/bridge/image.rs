//! Freeze and thaw of the programs' sockets.
//!
//! While the job stands still, what waits in the pairs is copied, in both directions, without being taken away. So a freeze
//! that leads to nothing needs no undoing, and a stack that is full stays within its limits however often the job moves. Held calls
//! are forgotten: they were cancelled when their threads were stopped, and come again.
//!
//! A socket whose program closed it with bytes still on their way to the stack has no program's end to go back to; the end
//! that its thaw makes is dropped, which closes it again behind those bytes.
//!
//! A thaw builds each pair anew with the same content and in the same state, so that a program that goes on sees what
//! it would have seen.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use netstack::{SocketId, TcpOptions};
use serde::{Deserialize, Serialize};
use sys::epoll::Epoll;
use sys::fds::{self, sockets};
use sys::seccomp::Listener;
use sys::unix::{self, Half, Receive};

use super::connect::fill_up;
use super::sockaddr::Family;
use super::socket::{
    BridgeOptions, Connected, Connecting, End, Ended, Listening, Phase, Socket, SocketKey, Undelivered,
};
use super::{Bridge, PAIR_BUFFER};
use crate::net::plane::NetError;
use crate::net::preview::NetPreview;
use crate::net::stack::Stack;
use crate::net::stock::Reserved;

/// What the bridge knows beside the stack.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BridgeImage {
    next_key: u64,
    sockets: Vec<SocketImage>,
    /// Sockets that are as they were told before, and are left out.
    #[serde(default)]
    told: Vec<SocketKey>,
}

/// What the bridge knows of one socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::net) struct SocketImage {
    key: SocketKey,
    family: Family,
    phase: PhaseImage,
    options: BridgeOptions,
    undelivered: Option<Undelivered>,
    error: Option<i32>,
    /// [`Socket::kept`]
    #[serde(default)]
    kept: Option<Box<TcpOptions>>,
    bound: bool,
    shut_write: bool,
    shut_read: bool,
    /// Handed over to the program's end and not read yet.
    #[serde(with = "serde_bytes")]
    unread: Vec<u8>,
    /// Written by the program and not for the stack to take yet.
    #[serde(with = "serde_bytes")]
    written: Vec<u8>,
    /// Which of the unread bytes is urgent.
    #[serde(default)]
    unread_mark: Option<usize>,
    /// Which of the written ones is.
    #[serde(default)]
    written_mark: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum PhaseImage {
    Idle { id: SocketId },
    Listening { id: SocketId, returned: Vec<SocketId> },
    Connecting { id: SocketId, filled: bool },
    Connected { id: SocketId, reported: bool, end_passed: bool, finished: bool },
    Gone { local: Option<SocketAddr>, ended: Ended, error_pending: bool },
}

/// Where sockets are open in the job's processes, looked up when first needed.
#[derive(Default)]
struct Places(OnceCell<HashMap<u64, (i32, i32)>>);

impl Bridge {
    /// Works off what has happened so far and takes the bridge's image. The job stands still.
    ///
    /// With `untold` those sockets are left out that are as they were told. Every event must have been noted.
    pub(in crate::net) fn freeze(&mut self, untold: bool) -> Result<BridgeImage, NetError> {
        let (told, keys): (Vec<_>, Vec<_>) =
            self.sockets.keys().copied().partition(|&key| untold && self.is_as_told(key));
        for &key in &keys {
            self.enqueue(key);
        }
        while self.has_work() {
            self.serve();
        }
        self.finish_resets();
        for &key in &keys {
            self.forget_calls(key);
        }
        self.deadlines.clear();
        let places = Places::default();
        self.drop_closed(&places);
        // Serving one may have touched another.
        let told: Vec<SocketKey> = told.into_iter().filter(|&key| self.is_untouched(key)).collect();
        let left_out: HashSet<SocketKey> = told.iter().copied().collect();
        let mut keys: Vec<SocketKey> = self.sockets.keys().copied().filter(|key| !left_out.contains(key)).collect();
        keys.sort_unstable();
        let sockets = keys.into_iter().map(|key| self.image(key, &places)).collect::<Result<Vec<_>, _>>()?;
        Ok(BridgeImage { next_key: self.next_key, sockets: sockets.into_iter().flatten().collect(), told })
    }

    /// Images of those among these sockets that hold nothing, in the stack and in the bridge; remembered as told.
    pub(in crate::net) fn tell(&mut self, keys: &[SocketKey]) -> NetPreview {
        let mut preview = NetPreview::default();
        for &key in keys {
            let Some(socket) = self.sockets.get(&key).filter(|socket| is_empty(socket)) else { continue };
            let Some(id) = socket.id().filter(|_| !self.queued.contains(&key)) else { continue };
            let Some(copy) = self.stack.tell(id) else { continue };
            let image = socket_image(key, socket, false, Waiting::default(), Waiting::default());
            preview.stack.push(copy);
            self.told.insert(key, image.clone());
            preview.sockets.push(image);
        }
        preview
    }

    /// What was told before doesn't count any more.
    pub(in crate::net) fn forget_told(&mut self) {
        self.told = HashMap::new();
        self.stack.forget_told();
    }

    /// Whether nothing has happened to a socket since it was told. No byte has come to the pair: its stack's socket was not
    /// touched. None has been written into it: that would be an event.
    fn is_as_told(&self, key: SocketKey) -> bool {
        let (Some(socket), Some(told)) = (self.sockets.get(&key), self.told.get(&key)) else { return false };
        self.is_untouched(key) && socket_image(key, socket, false, Waiting::default(), Waiting::default()) == *told
    }

    fn is_untouched(&self, key: SocketKey) -> bool {
        let Some(socket) = self.sockets.get(&key) else { return false };
        is_calm(socket)
            && socket.id().is_some_and(|id| self.stack.is_as_told(id))
            && (self.queued.is_empty() || !self.queued.contains(&key))
    }

    fn forget_calls(&mut self, key: SocketKey) {
        match self.sockets.get_mut(&key).map(|socket| &mut socket.phase) {
            Some(Phase::Listening { listener, .. }) => listener.waiters.clear(),
            Some(Phase::Connecting { connecting, .. }) => connecting.waiters.clear(),
            _ => {}
        }
    }

    /// Forgets the sockets that are over and that no process holds any more.
    fn drop_closed(&mut self, places: &Places) {
        let gone: Vec<SocketKey> = self.gone.drain(..).collect();
        for key in gone {
            let Some(Socket { phase: Phase::Gone { .. }, inode, .. }) = self.sockets.get(&key) else {
                continue;
            };
            if places.get(self, *inode).is_some() {
                self.gone.push_back(key);
            } else {
                self.remove(key);
            }
        }
    }

    fn image(&mut self, key: SocketKey, places: &Places) -> Result<Option<SocketImage>, NetError> {
        let Some(socket) = self.sockets.get(&key) else {
            return Ok(None);
        };
        let inode = socket.inode;
        // Only a socket with something unread is worth the search for its program's end.
        let waits = match &socket.phase {
            Phase::Connected { end, .. } => {
                sockets::memory_unread(end.fd.as_fd()).map_err(NetError::io("ask a socket pair for unread bytes"))? > 0
            }
            Phase::Gone { .. } => true,
            _ => false,
        };
        let mut unread = Waiting::default();
        let mut error_pending = false;
        if waits {
            let program_end = match self.seen(key) {
                Some(end) => Some(end),
                None => places.get(self, inode).and_then(|place| self.duplicate_checked(place, inode)),
            };
            let program_end = program_end.ok_or(NetError::Unreachable { key, inode })?;
            unread = peek(program_end.as_fd())?;
            error_pending = unix::has_error(program_end.as_fd());
        }
        let Some(socket) = self.sockets.get(&key) else {
            return Ok(None);
        };
        let written = match &socket.phase {
            Phase::Connecting { end, connecting, .. } if connecting.fill == 0 => peek(end.fd.as_fd())?,
            Phase::Connected { end, connected, .. } if !connected.finished => peek(end.fd.as_fd())?,
            _ => Waiting::default(),
        };
        Ok(Some(socket_image(key, socket, error_pending, unread, written)))
    }

    fn seen(&mut self, key: SocketKey) -> Option<OwnedFd> {
        let socket = self.sockets.get(&key)?;
        let (place, inode) = (socket.seen_at?, socket.inode);
        self.duplicate_checked(place, inode)
    }

    /// Builds the bridge of an image, with the pairs that were made before. Returns the programs' ends of all others with it.
    pub(in crate::net) fn thaw(
        stack: Stack,
        image: BridgeImage,
        listener: Listener,
        epoll: Rc<Epoll>,
        init_pid: Option<i32>,
        mut pairs: HashMap<SocketKey, Reserved>,
    ) -> Result<(Bridge, BTreeMap<SocketKey, OwnedFd>), NetError> {
        let mut bridge = Bridge::new(stack, listener, epoll, init_pid);
        let mut programs_ends = BTreeMap::new();
        bridge.next_key = image.next_key;
        bridge.reserve(image.sockets.len());
        if !image.told.is_empty() {
            return Err(NetError::Corrupt(format!("{} sockets are missing that were told before", image.told.len())));
        }
        let known: HashSet<SocketId> = bridge.stack.sockets().into_iter().collect();
        for socket in image.sockets {
            let key = socket.key;
            if key.0 >= image.next_key || bridge.sockets.contains_key(&key) {
                return Err(NetError::Corrupt(format!("socket {key} is named twice or out of range")));
            }
            if let Some(id) = socket.phase.ids().find(|id| !known.contains(id)) {
                return Err(NetError::Corrupt(format!("socket {key} stands for {id:?}, which the stack doesn't have")));
            }
            let end = bridge.thaw_socket(socket, pairs.remove(&key)).map_err(NetError::io("rebuild a socket pair"))?;
            if let Some(end) = end {
                programs_ends.insert(key, end);
            }
        }
        Ok((bridge, programs_ends))
    }

    /// Returns the program's end, unless that is in its process already: the other end of the `reserved` one.
    fn thaw_socket(&mut self, image: SocketImage, reserved: Option<Reserved>) -> std::io::Result<Option<OwnedFd>> {
        let reserved = reserved.filter(|_| self.needs_only_our_end(&image));
        let SocketImage {
            key,
            family,
            phase,
            options,
            undelivered,
            error,
            kept,
            bound,
            shut_write,
            shut_read,
            unread,
            written,
            unread_mark,
            written_mark,
        } = image;
        let unread = Waiting { bytes: unread, mark: unread_mark };
        let written = Waiting { bytes: written, mark: written_mark };
        if let Some(Reserved { ours, inode }) = reserved
            && let PhaseImage::Connected { id, reported, end_passed, finished } = phase
        {
            stuff(ours.as_fd(), &unread)?;
            if end_passed {
                unix::shutdown(ours.as_fd(), Half::Write)?;
            }
            let connected = Connected { reported, end_passed, finished };
            let mut socket = Socket::new(family, inode, Phase::Connected { id, end: End::new(ours), connected });
            socket.options = options;
            socket.undelivered = undelivered;
            socket.error = error;
            socket.bound = bound;
            self.insert(key, socket);
            return Ok(None);
        }
        let (ours, theirs, inode) = self.make_pair(false)?;
        options.apply(theirs.as_fd());
        self.watch(key, &ours)?;
        stuff(ours.as_fd(), &unread)?;
        stuff(theirs.as_fd(), &written)?;
        let phase = match phase {
            PhaseImage::Idle { id } => Phase::Idle { id, end: End::new(ours) },
            PhaseImage::Listening { id, returned } => {
                fill_up(theirs.as_fd());
                let listener = Listening { returned: returned.into(), ..Listening::default() };
                Phase::Listening { id, end: End::new(ours), listener }
            }
            PhaseImage::Connecting { id, filled } => {
                let fill = if filled { fill_up(theirs.as_fd()) } else { 0 };
                Phase::Connecting { id, end: End::new(ours), connecting: Connecting { fill, ..Connecting::default() } }
            }
            PhaseImage::Connected { id, reported, end_passed, finished } => {
                if end_passed {
                    unix::shutdown(ours.as_fd(), Half::Write)?;
                }
                if shut_write {
                    unix::shutdown(theirs.as_fd(), Half::Write)?;
                }
                if shut_read {
                    unix::shutdown(theirs.as_fd(), Half::Read)?;
                }
                let connected = Connected { reported, end_passed, finished };
                Phase::Connected { id, end: End::new(ours), connected }
            }
            PhaseImage::Gone { local, ended, error_pending } => {
                if error_pending {
                    // Unread on our side when it is closed: this makes the error.
                    unix::send(theirs.as_fd(), &[IoSlice::new(b"x")])?;
                }
                drop(ours);
                Phase::Gone { local, ended }
            }
        };
        let mut socket = Socket::new(family, inode, phase);
        if let Some(end) = socket.end_mut() {
            end.marks = written.mark.is_some();
        }
        socket.options = options;
        socket.undelivered = undelivered;
        socket.error = error;
        socket.kept = kept;
        socket.bound = bound;
        socket.shut_write = shut_write;
        socket.shut_read = shut_read;
        self.size_pair(&socket, theirs.as_fd());
        self.insert(key, socket);
        self.signal(key);
        Ok(Some(theirs))
    }

    /// Whether a socket can be thawed without its program's end, as most can that are connected.
    fn needs_only_our_end(&self, image: &SocketImage) -> bool {
        let PhaseImage::Connected { id, .. } = image.phase else { return false };
        let options = self.stack.tcp_options(id);
        let is_default = options.send_buffer.is_none() && options.receive_buffer.is_none();
        is_default
            && image.written.is_empty()
            && !image.shut_write
            && !image.shut_read
            && image.options.is_in_bridge_only()
    }

    /// Fits the pair's buffers to those the program asked for.
    pub(super) fn size_pair(&self, socket: &Socket, program_end: BorrowedFd<'_>) {
        let (Some(id), Some(end)) = (socket.id(), socket.end()) else {
            return;
        };
        let options = self.stack.tcp_options(id);
        if let Some(bytes) = options.send_buffer
            && !matches!(socket.phase, Phase::Connecting { .. } | Phase::Listening { .. })
        {
            drop(unix::set_send_buffer(program_end, bytes.min(PAIR_BUFFER / 2)));
        }
        if let Some(bytes) = options.receive_buffer {
            drop(unix::set_send_buffer(end.fd.as_fd(), bytes.min(PAIR_BUFFER / 2)));
        }
    }
}

impl BridgeImage {
    /// Puts the sockets in that were left out.
    pub(in crate::net) fn complete(
        &mut self,
        mut told: impl FnMut(SocketKey) -> Option<SocketImage>,
    ) -> Result<(), NetError> {
        self.sockets.reserve(self.told.len());
        for key in std::mem::take(&mut self.told) {
            let image = told(key).ok_or_else(|| NetError::Corrupt(format!("socket {key} was never told")))?;
            self.sockets.push(image);
        }
        Ok(())
    }
}

impl SocketImage {
    /// Which socket it is of.
    pub(in crate::net) fn key(&self) -> SocketKey {
        self.key
    }
}

/// Whether a socket is connected with nothing to be looked for at our end of its pair.
pub(super) fn is_calm(socket: &Socket) -> bool {
    let Phase::Connected { end, .. } = &socket.phase else { return false };
    end.writable && !end.readable && !end.read_hung_up && !end.hung_up
}

/// Whether moreover nothing waits in its pair. Only our end is asked: the program may be using its own.
fn is_empty(socket: &Socket) -> bool {
    is_calm(socket)
        && socket.end().is_some_and(|end| {
            let fd = end.fd.as_fd();
            matches!(sockets::memory_unread(fd), Ok(0)) && matches!(fds::bytes_waiting(fd), Ok(0))
        })
}

fn socket_image(
    key: SocketKey,
    socket: &Socket,
    error_pending: bool,
    unread: Waiting,
    written: Waiting,
) -> SocketImage {
    SocketImage {
        key,
        family: socket.family,
        phase: phase_image(&socket.phase, error_pending),
        options: socket.options.clone(),
        undelivered: socket.undelivered,
        error: socket.error,
        kept: socket.kept.clone(),
        bound: socket.bound,
        shut_write: socket.shut_write,
        shut_read: socket.shut_read,
        unread: unread.bytes,
        written: written.bytes,
        unread_mark: unread.mark,
        written_mark: written.mark,
    }
}

impl Places {
    fn get(&self, bridge: &Bridge, inode: u64) -> Option<(i32, i32)> {
        self.0.get_or_init(|| bridge.processes.scan()).get(&inode).copied()
    }
}

impl PhaseImage {
    /// The stack's sockets that it speaks of.
    fn ids(&self) -> impl Iterator<Item = SocketId> + '_ {
        let (id, returned) = match self {
            PhaseImage::Idle { id } | PhaseImage::Connecting { id, .. } | PhaseImage::Connected { id, .. } => {
                (Some(*id), &[][..])
            }
            PhaseImage::Listening { id, returned } => (Some(*id), &returned[..]),
            PhaseImage::Gone { .. } => (None, &[][..]),
        };
        id.into_iter().chain(returned.iter().copied())
    }
}

fn phase_image(phase: &Phase, error_pending: bool) -> PhaseImage {
    match phase {
        Phase::Idle { id, end: _ } => PhaseImage::Idle { id: *id },
        Phase::Listening { id, end: _, listener } => {
            // The bytes that stand for waiting connections follow from how many wait.
            let Listening { signalled: _, waiters: _, returned } = listener;
            PhaseImage::Listening { id: *id, returned: returned.iter().copied().collect() }
        }
        Phase::Connecting { id, end: _, connecting } => {
            let Connecting { fill, waiters: _ } = connecting;
            PhaseImage::Connecting { id: *id, filled: *fill > 0 }
        }
        Phase::Connected { id, end: _, connected } => {
            let Connected { reported, end_passed, finished } = connected;
            PhaseImage::Connected { id: *id, reported: *reported, end_passed: *end_passed, finished: *finished }
        }
        Phase::Gone { local, ended } => PhaseImage::Gone { local: *local, ended: *ended, error_pending },
    }
}

/// Bytes that wait to be read.
#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// Which of them is urgent.
    mark: Option<usize>,
}

/// What waits to be read, left where it is.
fn peek(end: BorrowedFd<'_>) -> Result<Waiting, NetError> {
    let failed = || NetError::io("copy the unread bytes of a socket");
    let length = fds::bytes_waiting(end).map_err(failed())?;
    let mut bytes = vec![0; length];
    if length == 0 {
        return Ok(Waiting::default());
    }
    if !unix::has_urgent(end) {
        let count = unix::receive(end, &mut [IoSliceMut::new(&mut bytes)], Receive::PEEK).map_err(failed())?;
        if count == length {
            return Ok(Waiting { bytes, mark: None });
        }
    }
    let mark = unix::peek_across_mark(end, &mut bytes).map_err(failed())?;
    Ok(Waiting { bytes, mark })
}

/// Writes all of it into an end, whatever the size of its buffer, which it has again afterwards.
fn stuff(end: BorrowedFd<'_>, waiting: &Waiting) -> std::io::Result<()> {
    let Waiting { bytes, mark } = waiting;
    match *mark {
        Some(at) if at < bytes.len() => {
            stuff_with(end, &bytes[..at], &|bytes| unix::send(end, &[IoSlice::new(bytes)]))?;
            stuff_with(end, &bytes[at..=at], &|bytes| unix::send_urgent(end, bytes[0]).map(|()| 1))?;
            stuff_with(end, &bytes[at + 1..], &|bytes| unix::send(end, &[IoSlice::new(bytes)]))
        }
        _ => stuff_with(end, bytes, &|bytes| unix::send(end, &[IoSlice::new(bytes)])),
    }
}

fn stuff_with(
    end: BorrowedFd<'_>,
    mut bytes: &[u8],
    send: &dyn Fn(&[u8]) -> std::io::Result<usize>,
) -> std::io::Result<()> {
    let mut room = PAIR_BUFFER / 2;
    let grown = !bytes.is_empty();
    while !bytes.is_empty() {
        match send(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == ErrorKind::WouldBlock && room < 1 << 29 => {
                room *= 2;
                unix::set_send_buffer(end, room)?;
            }
            Err(error) => return Err(error),
        }
    }
    if grown { unix::set_send_buffer(end, PAIR_BUFFER / 2) } else { Ok(()) }
}
