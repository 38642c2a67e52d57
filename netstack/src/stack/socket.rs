//! A socket as the stack keeps it.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::tcp::connection::Connection;
use crate::tcp::listener::Listener;
use crate::{SocketError, SocketId, TcpOptions};

/// A socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Socket {
    pub(crate) id: SocketId,
    /// What it was bound to by name (or by listening); `None` for accepted connections and chosen ports.
    pub(crate) bound: Option<SocketAddr>,
    pub(crate) options: TcpOptions,
    pub(crate) error: Option<SocketError>,
    pub(crate) kind: Kind,
    /// It is in the queue of those to send.
    pub(crate) ready: bool,
    /// It is in the queue of those that changed.
    pub(crate) changed: bool,
    /// Slot of the listener in whose accept queue it waits.
    pub(crate) waits_at: Option<u32>,
    /// It counts as a connection on its local port.
    pub(crate) counted: bool,
}

/// What a socket is at the moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Neither listens nor is connected.
    Idle,
    Listener(Listener),
    Connection(Box<Connection>),
}

impl Socket {
    pub(crate) fn new(id: SocketId, options: TcpOptions) -> Self {
        Socket {
            id,
            bound: None,
            options,
            error: None,
            kind: Kind::Idle,
            ready: false,
            changed: false,
            waits_at: None,
            counted: false,
        }
    }

    pub(crate) fn connection(&self) -> Option<&Connection> {
        match &self.kind {
            Kind::Connection(connection) => Some(connection),
            _ => None,
        }
    }

    pub(crate) fn listener_mut(&mut self) -> Option<&mut Listener> {
        match &mut self.kind {
            Kind::Listener(listener) => Some(listener),
            _ => None,
        }
    }
}
