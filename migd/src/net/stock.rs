//! Socket pairs made before they are needed.
//!
//! Making a pair, and watching it, costs many times what the rest of a socket's thaw costs. So the target of a move makes the
//! pairs of the sockets that the source sees while the job still runs there, and the thaw takes those that it finds.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use sys::epoll::Epoll;

use super::bridge::{Pair, SocketKey, watch};

/// Descriptors left for everything else, of those that the process may have.
const DESCRIPTORS_FOR_OTHERS: usize = 1024;

/// Pairs by the socket that they are for, watched already.
#[derive(Debug)]
pub struct Stock {
    pub(super) epoll: Epoll,
    pub(super) pairs: HashMap<SocketKey, Reserved>,
    namespace: Option<OwnedFd>,
    room: usize,
}

/// Our end of a pair whose other end is in a process already.
#[derive(Debug)]
pub(super) struct Reserved {
    pub(super) ours: OwnedFd,
    /// Inode of the program's end.
    pub(super) inode: u64,
}

impl Stock {
    /// An empty stock, whose pairs will be made in this network namespace.
    ///
    /// # Errors
    /// As epoll_create1(2).
    pub fn new(namespace: Option<OwnedFd>) -> io::Result<Stock> {
        let most = match sys::process::raise_descriptor_limit() {
            Ok(most) => usize::try_from(most).unwrap_or(usize::MAX),
            Err(error) => {
                tracing::warn!(%error, "can't raise the limit of open descriptors; the job gets fewer connections");
                DESCRIPTORS_FOR_OTHERS
            }
        };
        let room = most.saturating_sub(DESCRIPTORS_FOR_OTHERS);
        Ok(Stock { epoll: Epoll::new()?, pairs: HashMap::new(), namespace, room })
    }

    pub(super) fn into_parts(self) -> (Epoll, HashMap<SocketKey, Reserved>) {
        (self.epoll, self.pairs)
    }

    /// Forgets the pairs of other sockets than these.
    pub fn keep(&mut self, is_kept: impl Fn(SocketKey) -> bool) {
        self.pairs.retain(|key, _| is_kept(*key));
    }

    /// Makes pairs and returns the programs' ends, non-blocking, in the order of the keys; fewer when there is no room for all.
    ///
    /// # Errors
    /// The kernel refused to make one, or a key is there already.
    pub fn make(&mut self, keys: &[SocketKey]) -> io::Result<Vec<OwnedFd>> {
        let keys = &keys[..keys.len().min(self.room.saturating_sub(self.pairs.len()))];
        let namespace = self.namespace.as_ref();
        // A thread of its own, since the namespace is a thread's.
        let made = std::thread::scope(|scope| {
            let making = scope.spawn(|| {
                if let Some(namespace) = namespace {
                    sys::netns::enter(namespace.as_fd())?;
                }
                keys.iter().map(|_| Pair::new(true)).collect::<io::Result<Vec<Pair>>>()
            });
            making.join().unwrap_or_else(|_| Err(io::Error::other("the thread that makes socket pairs panicked")))
        })?;
        let mut programs_ends = Vec::with_capacity(made.len());
        for (&key, Pair { ours, theirs, inode }) in keys.iter().zip(made) {
            watch(&self.epoll, key, &ours)?;
            if self.pairs.insert(key, Reserved { ours, inode }).is_some() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("socket {key} is named twice")));
            }
            programs_ends.push(theirs);
        }
        Ok(programs_ends)
    }
}
