//! epoll(7) and eventfd(2).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bitflags::bitflags;

use crate::fds;
use crate::outcome::{check, owned};

bitflags! {
    /// What to wait for, or what has happened.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Interest: u32 {
        /// Something can be read.
        const IN = libc::EPOLLIN as u32;
        /// Something can be written.
        const OUT = libc::EPOLLOUT as u32;
        /// The peer shut its writing half.
        const READ_HANG_UP = libc::EPOLLRDHUP as u32;
        /// Both halves are shut, or the peer is gone.
        const HANG_UP = libc::EPOLLHUP as u32;
        /// An error is pending.
        const ERROR = libc::EPOLLERR as u32;
        /// Report changes instead of states.
        const EDGE = libc::EPOLLET as u32;
    }
}

/// One event of an [`Epoll`].
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// The token that the descriptor was added with.
    pub token: u64,
    /// What has happened.
    pub ready: Interest,
}

/// Room for the events of one wait.
pub struct Events {
    raw: Vec<libc::epoll_event>,
    count: usize,
}

impl Events {
    /// Room for that many events.
    pub fn with_capacity(capacity: usize) -> Events {
        Events { raw: vec![libc::epoll_event { events: 0, u64: 0 }; capacity.max(1)], count: 0 }
    }

    /// Whether the last wait brought none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The events of the last wait.
    pub fn iter(&self) -> impl Iterator<Item = Event> + '_ {
        self.raw[..self.count]
            .iter()
            .map(|raw| Event { token: raw.u64, ready: Interest::from_bits_truncate(raw.events) })
    }
}

/// An epoll instance.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Epoll {
    /// A new instance.
    pub fn new() -> io::Result<Epoll> {
        fds::events::epoll().map(Epoll)
    }

    /// Watches a descriptor. Closing its last duplicate ends the watch.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, token, interest)
    }

    /// Changes what is waited for; edges that stand are reported anew.
    pub fn modify(&self, fd: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, token, interest)
    }

    /// Ends the watch of a descriptor.
    pub fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, fd, 0, Interest::empty())
    }

    fn control(&self, operation: i32, fd: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest.bits(), u64: token };
        // SAFETY: `event` is valid for the call, which copies it.
        let result = unsafe { libc::epoll_ctl(self.0.as_raw_fd(), operation, fd.as_raw_fd(), &raw mut event) };
        check(result).map(drop)
    }

    /// Waits for events, at most as long as given (`None`: for ever). A signal ends the wait with no events.
    pub fn wait(&self, events: &mut Events, timeout: Option<Duration>) -> io::Result<()> {
        let timespec = timeout.map(|timeout| libc::timespec {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(timeout.subsec_nanos().cast_signed()),
        });
        let pointer = timespec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let capacity = i32::try_from(events.raw.len()).unwrap_or(i32::MAX);
        events.count = 0;
        // SAFETY: the buffer has room for `capacity` events, and `pointer` is null or points to a live timespec. The
        // glibc wrapper of epoll_pwait2 is younger than the call itself.
        let count = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                self.0.as_raw_fd(),
                events.raw.as_mut_ptr(),
                capacity,
                pointer,
                std::ptr::null::<libc::sigset_t>(),
                0usize,
            )
        };
        match usize::try_from(count) {
            Ok(count) => events.count = count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

/// A counter that wakes whoever polls it.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl EventFd {
    /// A new, non-blocking counter at zero.
    pub fn new() -> io::Result<EventFd> {
        // SAFETY: takes integers only.
        owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }).map(EventFd)
    }

    /// Makes the counter readable.
    pub fn signal(&self) {
        let one = 1u64;
        // SAFETY: writes the eight bytes of `one`. A full counter is readable already, so a failure loses nothing.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Sets the counter back to zero.
    pub fn clear(&self) {
        let mut value = 0u64;
        // SAFETY: reads at most eight bytes into `value`. An empty counter is clear already.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut value).cast(), 8) };
    }
}
