//! Whether a frozen job holds what is there for a moment only and can't be looked at.
//!
//! What a client has sent to a Unix socket whose server hasn't accepted it yet is such a thing. A server with many
//! clients has that so often that a freeze which hits upon it is better repeated than given up.

use std::io;
use std::os::fd::OwnedFd;

use sys::Pid;
use sys::fds::diag;

use super::kinds::unix;
use super::namespace;

/// Asks about one job. Made before the freeze, since it takes a thread of its own.
#[derive(Debug)]
pub(crate) struct Calm(OwnedFd);

impl Calm {
    /// For the job of this init.
    ///
    /// # Errors
    /// Those of entering its namespaces.
    pub fn new(init: Pid) -> io::Result<Calm> {
        namespace::enter(init, diag::open).map(Calm)
    }

    /// Whether nothing is on its way where it can't be looked at.
    ///
    /// # Errors
    /// Those of sock_diag(7).
    pub fn is_calm(&self) -> io::Result<bool> {
        unix::is_unaccepted(&self.0).map(|unaccepted| !unaccepted)
    }
}
