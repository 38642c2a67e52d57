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

/// Asks about one job. Made before the freeze: it takes a thread of its own, and a look at all Unix sockets of the job.
#[derive(Debug)]
pub(crate) struct Calm {
    /// `None` when no Unix socket listened: then there is nothing to ask for, which with many sockets takes milliseconds.
    diag: Option<OwnedFd>,
}

impl Calm {
    /// For the job of this init.
    ///
    /// # Errors
    /// Those of entering its namespaces, and of sock_diag(7).
    pub fn new(init: Pid) -> io::Result<Calm> {
        let diag = namespace::enter(init, diag::open)?;
        let listens = !diag::unix_listeners(&diag)?.is_empty();
        Ok(Calm { diag: listens.then_some(diag) })
    }

    /// Whether nothing is on its way where it can't be looked at.
    ///
    /// # Errors
    /// Those of sock_diag(7).
    pub fn is_calm(&self) -> io::Result<bool> {
        let unaccepted = self.diag.as_ref().map(unix::is_unaccepted).transpose()?;
        Ok(unaccepted != Some(true))
    }
}
