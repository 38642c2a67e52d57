//! Memory lent to a socket: the pages themselves are queued, and nothing is copied until the peer reads them.
//!
//! vmsplice(2) puts references to pages into a pipe, splice(2) moves them on into the socket, which since Linux 6.5 queues them as
//! they are (`MSG_SPLICE_PAGES`). Whoever lends pages mustn't write to them before the peer has read them, or it reads
//! something else; [`crate::fds::sockets::memory_unread`] says how much it hasn't read at most.

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use crate::fds;
use crate::outcome::{check, counted};

/// Size of a page, in bytes.
pub const PAGE: usize = 4096;

/// Anonymous memory at a page's border, zero at first. Not inherited by a fork, which would make each page of it a copy
/// on the next write.
#[derive(Debug)]
pub struct Pages {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its mapping, like a boxed slice does its bytes.
unsafe impl Send for Pages {}

impl Pages {
    /// `count` pages; memory is taken when they are first written.
    pub fn new(count: usize) -> io::Result<Pages> {
        let len = count.checked_mul(PAGE).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let pages = Pages { start: NonNull::new(start.cast()).ok_or_else(io::Error::last_os_error)?, len };
        pages.advise(0..count, libc::MADV_DONTFORK)?;
        Ok(pages)
    }

    /// The bytes of these pages.
    pub fn bytes(&self, pages: Range<usize>) -> &[u8] {
        let (offset, len) = self.place(&pages);
        // SAFETY: `place` has checked that the range is within the mapping.
        let start = unsafe { self.start.add(offset) };
        // SAFETY: initialised memory (zero pages at least) that nobody writes to while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), len) }
    }

    /// The bytes of these pages, to be written.
    pub fn bytes_mut(&mut self, pages: Range<usize>) -> &mut [u8] {
        let (offset, len) = self.place(&pages);
        // SAFETY: `place` has checked that the range is within the mapping.
        let start = unsafe { self.start.add(offset) };
        // SAFETY: initialised memory that only `self` refers to. The kernel may read what is lent, at any time.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) }
    }

    /// Parts with the pages in this range, whoever has borrowed them, and puts new ones in their place, of zeros.
    pub fn renew(&mut self, pages: Range<usize>) -> io::Result<()> {
        self.advise(pages, libc::MADV_DONTNEED)
    }

    fn advise(&self, pages: Range<usize>, advice: i32) -> io::Result<()> {
        let (offset, len) = self.place(&pages);
        // SAFETY: `place` has checked that the range is within the mapping.
        let start = unsafe { self.start.add(offset) };
        // SAFETY: what `renew` discards is bytes, which are valid whatever they are, and no reference to them is alive.
        check(unsafe { libc::madvise(start.as_ptr().cast(), len, advice) }).map(drop)
    }

    fn place(&self, pages: &Range<usize>) -> (usize, usize) {
        assert!(pages.start <= pages.end && pages.end <= self.len / PAGE, "pages outside of the mapping");
        (pages.start * PAGE, (pages.end - pages.start) * PAGE)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more; pages that are lent live on until they are read.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// The pipe that pages pass on their way. Empty between calls.
#[derive(Debug)]
pub struct Lane {
    read: OwnedFd,
    write: OwnedFd,
    /// Takes what a socket has no room for.
    null: OwnedFd,
    /// Bytes were left in the pipe, which would go to whoever is lent something next.
    blocked: Cell<bool>,
}

impl Lane {
    /// A lane for up to `pages` pages a call, or fewer when the system limits pipes (`pipe-user-pages-soft` of pipe(7)).
    pub fn new(pages: usize) -> io::Result<Lane> {
        let (read, write) = fds::pipe(libc::O_NONBLOCK)?;
        drop(fds::set_pipe_capacity(write.as_fd(), pages * PAGE));
        let null = std::fs::OpenOptions::new().write(true).open("/dev/null")?;
        Ok(Lane { read, write, null: null.into(), blocked: Cell::new(false) })
    }

    /// Has `socket`, which must be non-blocking, queue the pages that hold `bytes`. Returns how many of the bytes it took.
    ///
    /// Fails with EIO on a lane that [is blocked](Lane::is_blocked). Raises SIGPIPE, which the caller must have ignored (as every Rust program has), when the peer is gone.
    pub fn lend(&self, socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
        if self.is_blocked() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: the kernel takes references to the pages of `bytes`, and doesn't write to them.
        let put = unsafe { libc::vmsplice(self.write.as_raw_fd(), &raw const part, 1, libc::SPLICE_F_NONBLOCK) };
        let put = counted(put)?;
        let mut taken = 0;
        let mut outcome = Ok(());
        while taken < put {
            match self.splice(socket, put - taken) {
                Ok(0) => break,
                Ok(count) => taken += count,
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        let mut left = put - taken;
        while left > 0 {
            match self.splice(self.null.as_fd(), left) {
                Ok(count @ 1..) => left = left.saturating_sub(count),
                _ => {
                    self.blocked.set(true);
                    break;
                }
            }
        }
        if taken > 0 { Ok(taken) } else { outcome.map(|()| 0) }
    }

    /// Whether it can't be used any more.
    pub fn is_blocked(&self) -> bool {
        self.blocked.get()
    }

    fn splice(&self, to: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
        let none = std::ptr::null_mut();
        let (from, to, flags) = (self.read.as_raw_fd(), to.as_raw_fd(), libc::SPLICE_F_NONBLOCK);
        // SAFETY: no offsets are given, so that the kernel takes integers only.
        let count = unsafe { libc::splice(from, none, to, none, len, flags) };
        counted(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;

    use super::*;
    use crate::unix::{self, Receive};

    fn receive(from: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        unix::receive(from, &mut [IoSliceMut::new(buffer)], Receive::empty())
    }

    #[test]
    fn what_is_written_after_lending_is_read_and_renewing_parts_from_it() {
        let (ours, theirs) = unix::pair(true).expect("pair");
        let lane = Lane::new(32).expect("lane");
        let mut pages = Pages::new(2).expect("pages");
        pages.bytes_mut(0..2).fill(b'a');
        assert_eq!(lane.lend(ours.as_fd(), pages.bytes(0..2)).expect("lend"), 2 * PAGE);
        // The pages were not copied.
        pages.bytes_mut(0..1)[0] = b'b';
        pages.renew(1..2).expect("renew");
        assert_eq!(pages.bytes(1..2)[0], 0);
        pages.bytes_mut(1..2).fill(b'c');
        let mut buffer = [0; 2 * PAGE];
        assert_eq!(receive(theirs.as_fd(), &mut buffer).expect("receive"), 2 * PAGE);
        assert_eq!((buffer[0], buffer[1], buffer[PAGE], buffer[2 * PAGE - 1]), (b'b', b'a', b'a', b'a'));
    }

    #[test]
    fn what_is_unread_is_never_more_than_the_kernel_counts() {
        let (ours, theirs) = unix::pair(true).expect("pair");
        let lane = Lane::new(32).expect("lane");
        let pages = Pages::new(17).expect("pages");
        let unread = || fds::sockets::memory_unread(ours.as_fd()).expect("SIOCOUTQ");
        let bytes = &pages.bytes(0..17)[100..100 + 65_483];
        assert_eq!(lane.lend(ours.as_fd(), bytes).expect("lend"), bytes.len());
        assert!(unread() >= bytes.len());
        let mut buffer = vec![0; bytes.len() - 1];
        assert_eq!(receive(theirs.as_fd(), &mut buffer).expect("all but a byte"), buffer.len());
        assert!(unread() >= 1);
        assert_eq!(receive(theirs.as_fd(), &mut buffer).expect("the last byte"), 1);
        assert_eq!(unread(), 0);
    }

    #[test]
    fn a_full_socket_takes_a_part_and_a_closed_one_nothing() {
        let (ours, theirs) = unix::pair(true).expect("pair");
        let lane = Lane::new(32).expect("lane");
        let pages = Pages::new(16).expect("pages");
        let mut sent = 0;
        let full = loop {
            match lane.lend(ours.as_fd(), pages.bytes(0..16)) {
                Ok(count) => sent += count,
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let mut buffer = vec![0; sent + 1];
        let mut read = 0;
        while let Ok(count) = receive(theirs.as_fd(), &mut buffer[read..]) {
            read += count;
        }
        assert_eq!(read, sent);
        drop(theirs);
        let closed = lane.lend(ours.as_fd(), pages.bytes(0..16)).expect_err("nobody is there");
        assert_eq!(closed.raw_os_error(), Some(libc::EPIPE));
    }
}
