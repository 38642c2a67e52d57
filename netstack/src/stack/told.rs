//! Copies of sockets that leave before the freeze.
//!
//! The image of ten thousand connections takes longer to make, to write and to read than the rest of a move takes, and
//! nearly all of them are idle. All times in an image are told by the stack's own clock, so an idle connection's part of it is the
//! same whenever it is made: it can be made and sent while the stack runs. The stack remembers which of its sockets have not been touched
//! since, and leaves them out of its image.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::slab::Slab;
use super::socket::{Kind, Socket};
use super::{ImageError, Stack, StackImage};
use crate::SocketId;

/// A socket as it was when [`Stack::tell`] was called. To be treated like a [`StackImage`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SocketCopy(Box<Socket>);

impl SocketCopy {
    /// Its name.
    #[must_use]
    pub fn id(&self) -> SocketId {
        self.0.id
    }
}

impl Stack {
    /// A copy of a socket, which from now on is remembered as told until something touches it. Only a connection that holds
    /// nothing is worth that.
    pub fn tell(&mut self, id: SocketId) -> Option<SocketCopy> {
        let socket = self.socket(id)?;
        let Kind::Connection(connection) = &socket.kind else { return None };
        if !connection.is_idle() {
            return None;
        }
        let copy = SocketCopy(Box::new(socket.clone()));
        self.sockets.mark_told(id.index());
        Some(copy)
    }

    /// Whether a socket is an established connection that holds nothing, neither for its peer nor for its program.
    #[must_use]
    pub fn is_idle(&self, id: SocketId) -> bool {
        self.socket(id).and_then(Socket::connection).is_some_and(|connection| connection.is_idle())
    }

    /// Whether a socket is as it was when it was last told.
    #[must_use]
    pub fn is_as_told(&self, id: SocketId) -> bool {
        self.socket(id).is_some() && self.sockets.is_told(id.index())
    }

    /// What was told before doesn't count any more.
    pub fn forget_told(&mut self) {
        self.sockets.forget_told();
    }
}

/// Sockets that were told, gathered for the image that will lack them.
///
/// By place, not in a slab: a copy's place is a number that somebody sent, and nothing yet says how many there are.
#[derive(Clone, Debug, Default)]
pub struct ToldSockets(HashMap<u32, SocketCopy>);

impl ToldSockets {
    /// Takes one in. Of those that had a place one after the other the last counts.
    pub fn add(&mut self, copy: SocketCopy) {
        self.0.insert(copy.id().index(), copy);
    }
}

impl StackImage {
    /// Puts the sockets in that were left out of an image that [`Stack::freeze_untold`] made. Copies that are out of date by now
    /// are ignored. Nothing happens to an image that is complete.
    ///
    /// # Errors
    /// One is missing.
    pub fn complete(&mut self, mut told: ToldSockets) -> Result<(), ImageError> {
        let Some(rest) = self.rest.take() else { return Ok(()) };
        let incomplete = |slot| ImageError::Corrupt(format!("the socket at place {slot} was never told"));
        let take = |slot| told.0.remove(&slot).map(|SocketCopy(socket)| (socket.id.generation(), *socket));
        self.sockets = Slab::complete(rest, take).map_err(incomplete)?;
        Ok(())
    }
}
