//! What the control thread asks of the main thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel as queue};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::{mpsc, oneshot};

use crate::api::{MoveEvent, NodeAddress, SocketPlace};
use crate::net::{NetError, PacketStream, SocketDescription, Visitor};

/// A request for the main thread.
#[derive(Debug)]
pub enum Command {
    /// Describe the job.
    Inspect(oneshot::Sender<serde_json::Value>),
    /// List its sockets.
    Sockets(oneshot::Sender<Vec<SocketDescription>>),
    /// Record its packets.
    Record {
        /// The recording's number.
        number: u64,
        /// Bytes kept of each packet.
        snap_length: u32,
        /// Gets the packets.
        reply: oneshot::Sender<Result<PacketStream, NetError>>,
    },
    /// Send the job a signal.
    Signal {
        /// Its number.
        signal: i32,
        /// Gets what became of it.
        reply: oneshot::Sender<checkpoint::Result<()>>,
    },
    /// Take the job to `target` over this connection.
    MoveOut {
        /// Where to.
        target: NodeAddress,
        /// The epoch under which the daemon believes the job to be here.
        epoch: u64,
        /// Where its sockets are to be.
        sockets: SocketPlace,
        /// The connection to the target's shim.
        stream: OwnedFd,
        /// Who watches.
        progress: mpsc::UnboundedSender<MoveEvent>,
    },
    /// Receive the job over this connection.
    Receive {
        /// Where from.
        source: NodeAddress,
        /// The connection to the source's shim.
        stream: OwnedFd,
        /// The line to the node with its sockets, if those are or stay elsewhere.
        line: Option<OwnedFd>,
    },
    /// Wait for another node, which may get the process.
    Line {
        /// The line to it.
        line: OwnedFd,
        /// Who it is.
        visitor: Visitor,
        /// Gets an answer when the node is waited for.
        reply: oneshot::Sender<()>,
    },
    /// Give up waiting for the job.
    Cancel,
    /// End the job and with it the shim.
    Shutdown,
}

/// The asking end.
#[derive(Debug, Clone)]
pub struct Asker {
    sender: Sender<Command>,
    wake: Arc<EventFd>,
}

impl Asker {
    /// Asks. `false` when the main thread takes no more requests.
    pub fn ask(&self, command: Command) -> bool {
        let sent = self.sender.send(command).is_ok();
        // A counter that is full is readable already.
        let _ = self.wake.write(1);
        sent
    }
}

/// The main thread's end.
#[derive(Debug)]
pub struct Commands {
    receiver: Receiver<Command>,
    wake: Arc<EventFd>,
}

impl Commands {
    /// The next request, if one waits.
    pub fn take(&mut self) -> Option<Command> {
        // Cleared before looking: what comes after the look makes it readable again.
        let _ = self.wake.read();
        let command = self.receiver.try_recv().ok();
        if command.is_some() {
            let _ = self.wake.write(1);
        }
        command
    }
}

impl AsFd for Commands {
    /// Readable when a request may wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Both ends.
///
/// # Errors
/// As eventfd(2).
pub fn channel() -> io::Result<(Asker, Commands)> {
    let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let (sender, receiver) = queue();
    Ok((Asker { sender, wake: Arc::clone(&wake) }, Commands { receiver, wake }))
}
