//! Which socket a descriptor of the job is, for whoever looks through the job's descriptors.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::socket::SocketKey;
use crate::net::numbers::NumberMap;

/// Closed sockets that are still recognised.
const CLOSED_MAX: usize = 4096;

/// The programs' ends by their inodes, as they are at every moment: a running job opens sockets while its descriptors are looked
/// through. A socket that has just been closed is recognised for a while, since who looked before the close may ask after it.
#[derive(Clone, Debug, Default)]
pub struct DescriptorKeys(Arc<RwLock<Inodes>>);

#[derive(Debug, Default)]
struct Inodes {
    open: NumberMap<u64, SocketKey>,
    closed: VecDeque<(u64, SocketKey)>,
}

impl DescriptorKeys {
    /// The socket whose program's end has this inode.
    pub fn get(&self, inode: &u64) -> Option<SocketKey> {
        let inodes = self.read();
        let closed = || inodes.closed.iter().rev().find(|(closed, _)| closed == inode).map(|(_, key)| *key);
        inodes.open.get(inode).copied().or_else(closed)
    }

    /// The open socket with this inode.
    pub(super) fn open(&self, inode: u64) -> Option<SocketKey> {
        self.read().open.get(&inode).copied()
    }

    /// Makes room for so many.
    pub(super) fn reserve(&self, count: usize) {
        self.write().open.reserve(count);
    }

    pub(super) fn insert(&self, inode: u64, key: SocketKey) {
        self.write().open.insert(inode, key);
    }

    pub(super) fn remove(&self, inode: u64, key: SocketKey) {
        let mut inodes = self.write();
        if inodes.open.get(&inode) == Some(&key) {
            inodes.open.remove(&inode);
            inodes.closed.push_back((inode, key));
            if inodes.closed.len() > CLOSED_MAX {
                inodes.closed.pop_front();
            }
        }
    }

    // A panic elsewhere can't leave the tables half changed: every change above is a single step.
    fn read(&self) -> RwLockReadGuard<'_, Inodes> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inodes> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_socket_is_recognised_and_an_inode_is_given_to_its_new_owner() {
        let keys = DescriptorKeys::default();
        keys.insert(7, SocketKey(1));
        keys.remove(7, SocketKey(1));
        assert_eq!((keys.get(&7), keys.open(7)), (Some(SocketKey(1)), None));
        keys.insert(7, SocketKey(2));
        keys.remove(7, SocketKey(1));
        assert_eq!((keys.get(&7), keys.open(7)), (Some(SocketKey(2)), Some(SocketKey(2))));
        for inode in 100..100 + CLOSED_MAX as u64 + 1 {
            keys.insert(inode, SocketKey(inode));
            keys.remove(inode, SocketKey(inode));
        }
        assert_eq!(keys.get(&100), None);
    }
}
