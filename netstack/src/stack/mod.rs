//! The host: everything between packets and sockets.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::{
    Config, Instant, Reuse, RxPacket, Secrets, Shutdown, SocketError, SocketId, State, Status,
    TcpInfo, TcpOption, TcpOptions, TxPacket,
};

/// A frozen stack: every socket in every state. Made by [`Stack::freeze`], continued by [`Stack::thaw`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StackImage {
    version: u32,
}

/// Why an image can't be thawed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// The image was made by a release whose format this one doesn't know.
    #[error(
        "stack image has format {found}, this release reads format {known}: update the node that is behind"
    )]
    Version {
        /// The image's format.
        found: u32,
        /// The format known here.
        known: u32,
    },
    /// The image contradicts itself.
    #[error("stack image is corrupt: {0}")]
    Corrupt(String),
    /// The new configuration doesn't fit the image.
    #[error("stack image doesn't fit the configuration: {0}")]
    Mismatch(String),
}

/// One host: addresses, sockets, connections.
pub struct Stack {
    options: TcpOptions,
}

impl Stack {
    /// A host without sockets.
    #[must_use]
    pub fn new(config: Config, secrets: Secrets, now: Instant) -> Stack {
        let _ = (config, secrets, now);
        Stack {
            options: TcpOptions::default(),
        }
    }

    /// Takes in a packet that arrived from the link.
    pub fn handle_packet(&mut self, now: Instant, packet: RxPacket<'_>) {
        let _ = (now, packet);
    }

    /// The next packet to send. Call until it returns `None`.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<TxPacket<'_>> {
        let _ = now;
        None
    }

    /// When [`Stack::handle_timeout`] is to be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        None
    }

    /// Does what was due by `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        let _ = now;
    }

    /// A socket whose status has changed since it was last returned here.
    pub fn poll_changed(&mut self) -> Option<SocketId> {
        None
    }

    /// What the socket looks like now. A socket that does not exist looks closed.
    #[must_use]
    pub fn status(&self, id: SocketId) -> Status {
        let _ = id;
        Status {
            state: State::Closed,
            readable: 0,
            send_space: 0,
            peer_closed: false,
            acceptable: 0,
            error: None,
            unsent: 0,
            unacked: 0,
        }
    }

    /// A new TCP socket, bound to nothing.
    pub fn tcp_open(&mut self) -> SocketId {
        SocketId::new(0, 0)
    }

    /// `bind(2)`: port 0 picks a free one. `[::]` takes IPv4 as well unless `IPV6_V6ONLY` is set.
    pub fn tcp_bind(
        &mut self,
        id: SocketId,
        address: SocketAddr,
        reuse: Reuse,
    ) -> Result<(), SocketError> {
        let _ = (id, address, reuse);
        Err(SocketError::NoSuchSocket)
    }

    /// `listen(2)`: an unbound socket gets a port first; on a listener it sets a new backlog.
    pub fn tcp_listen(
        &mut self,
        now: Instant,
        id: SocketId,
        backlog: u32,
    ) -> Result<(), SocketError> {
        let _ = (now, id, backlog);
        Err(SocketError::NoSuchSocket)
    }

    /// The longest established connection that waits at a listener.
    pub fn tcp_accept(&mut self, now: Instant, id: SocketId) -> Option<SocketId> {
        let _ = (now, id);
        None
    }

    /// `connect(2)`: starts the handshake; [`Stack::status`] tells how it goes.
    pub fn tcp_connect(
        &mut self,
        now: Instant,
        id: SocketId,
        remote: SocketAddr,
    ) -> Result<(), SocketError> {
        let _ = (now, id, remote);
        Err(SocketError::NoSuchSocket)
    }

    /// Lets `fill` write into the send buffer, at most [`Status::send_space`] bytes in two parts; it returns how many it
    /// wrote, from the start of the first part on. Returns that number.
    pub fn tcp_send_with(
        &mut self,
        now: Instant,
        id: SocketId,
        fill: impl FnOnce([&mut [u8]; 2]) -> usize,
    ) -> Result<usize, SocketError> {
        let _ = (now, id, fill([&mut [], &mut []]));
        Err(SocketError::NoSuchSocket)
    }

    /// Lets `take` read what was received, in two parts; it returns how many bytes it consumed. The window update follows
    /// by itself. Returns that number.
    pub fn tcp_recv_with(
        &mut self,
        now: Instant,
        id: SocketId,
        take: impl FnOnce([&[u8]; 2]) -> usize,
    ) -> Result<usize, SocketError> {
        let _ = (now, id, take([&[], &[]]));
        Err(SocketError::NoSuchSocket)
    }

    /// Queues bytes beyond [`Status::send_space`]: for a freeze, where what waited in the socketpair has to go along.
    pub fn tcp_send_over(
        &mut self,
        now: Instant,
        id: SocketId,
        data: &[u8],
    ) -> Result<(), SocketError> {
        let _ = (now, id, data);
        Err(SocketError::NoSuchSocket)
    }

    /// `shutdown(2)`.
    pub fn tcp_shutdown(
        &mut self,
        now: Instant,
        id: SocketId,
        how: Shutdown,
    ) -> Result<(), SocketError> {
        let _ = (now, id, how);
        Err(SocketError::NoSuchSocket)
    }

    /// The program closed its last descriptor: a FIN follows what is queued, and the stack keeps the orphan till it ends.
    /// The socket's name means nothing any more.
    pub fn tcp_close(&mut self, now: Instant, id: SocketId) {
        let _ = (now, id);
    }

    /// Ends the connection with an RST, like `close(2)` with `SO_LINGER` 0 or with unread data. The socket is gone.
    pub fn tcp_abort(&mut self, now: Instant, id: SocketId) {
        let _ = (now, id);
    }

    /// The socket's own and its peer's address. Addresses of IPv4 are never in their IPv6-mapped form.
    #[must_use]
    pub fn tcp_endpoints(&self, id: SocketId) -> (Option<SocketAddr>, Option<SocketAddr>) {
        let _ = id;
        (None, None)
    }

    /// Sets an option.
    pub fn tcp_set(
        &mut self,
        now: Instant,
        id: SocketId,
        option: TcpOption,
    ) -> Result<(), SocketError> {
        let _ = (now, id, option);
        Err(SocketError::NoSuchSocket)
    }

    /// All options of a socket; the defaults for one that does not exist.
    #[must_use]
    pub fn tcp_options(&self, id: SocketId) -> &TcpOptions {
        let _ = id;
        &self.options
    }

    /// `TCP_INFO`.
    #[must_use]
    pub fn tcp_info(&self, now: Instant, id: SocketId) -> TcpInfo {
        let _ = (now, id);
        TcpInfo::default()
    }

    /// `SO_ERROR`: the pending error, which is pending no more.
    pub fn take_error(&mut self, id: SocketId) -> Option<SocketError> {
        let _ = id;
        None
    }

    /// The whole stack as data. Changes nothing: a stack that is frozen in vain simply goes on.
    #[must_use]
    pub fn freeze(&self, now: Instant) -> StackImage {
        let _ = now;
        StackImage { version: 1 }
    }

    /// Continues a frozen stack. Every connection with something to say says it at the next [`Stack::poll_transmit`].
    pub fn thaw(image: StackImage, now: Instant, config: Config) -> Result<Stack, ImageError> {
        let _ = (now, config);
        Err(ImageError::Version {
            found: image.version,
            known: 1,
        })
    }

    /// Every socket, including those that wait to be accepted and orphans.
    pub fn sockets(&self) -> impl Iterator<Item = SocketId> + '_ {
        std::iter::empty()
    }
}
