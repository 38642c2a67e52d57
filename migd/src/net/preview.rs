//! Sockets' images that leave before the freeze.
//!
//! An idle connection's image is the same whenever it is made (see [`netstack::Stack::tell`]), and of ten thousand nearly all are
//! idle. So the source of a move tells the target of them while the job still runs; in the freeze it names those that
//! nothing has happened to since, and sends the others.

use std::collections::HashMap;

use netstack::{SocketCopy, ToldSockets};
use serde::{Deserialize, Serialize};

use super::bridge::{SocketImage, SocketKey};
use super::plane::{NetError, NetImage};

/// Images of some sockets of a job that runs on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NetPreview {
    pub(super) stack: Vec<SocketCopy>,
    pub(super) sockets: Vec<SocketImage>,
}

impl NetPreview {
    /// Whether nothing is told.
    pub fn is_empty(&self) -> bool {
        self.stack.is_empty()
    }
}

/// What the target of a move was told.
#[derive(Debug, Default)]
pub struct Told {
    stack: ToldSockets,
    sockets: HashMap<SocketKey, SocketImage>,
}

impl Told {
    /// Keeps what a preview tells; of a socket that was told twice, the later.
    pub fn add(&mut self, preview: NetPreview) {
        let NetPreview { stack, sockets } = preview;
        stack.into_iter().for_each(|copy| self.stack.add(copy));
        self.sockets.extend(sockets.into_iter().map(|image| (image.key(), image)));
    }

    /// Puts into an image what was left out of it.
    ///
    /// # Errors
    /// Something is named that was never told.
    pub fn complete(mut self, image: &mut NetImage) -> Result<(), NetError> {
        if let Some(stack) = &mut image.stack {
            stack.complete(self.stack)?;
        }
        image.bridge.complete(|key| self.sockets.remove(&key))
    }
}
