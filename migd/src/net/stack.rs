//! The TCP/IP stack as the bridge sees it.
//!
//! A method here has the name, the arguments and the meaning of the one of [`netstack::Stack`].

use std::net::SocketAddr;

use netstack::{
    Handled, Instant, Reuse, RxPacket, Shutdown, SocketError, SocketId, StackImage, Status, TcpInfo, TcpOption,
    TcpOptions, TxPacket,
};

type Result<T> = std::result::Result<T, SocketError>;

/// A stack that runs in this thread.
pub(super) enum Stack {
    /// In this process.
    Here(Box<netstack::Stack>),
}

impl Stack {
    pub(super) fn here(stack: netstack::Stack) -> Stack {
        Stack::Here(Box::new(stack))
    }

    pub(super) fn handle_packet_with(
        &mut self,
        now: Instant,
        packet: RxPacket<'_>,
        deliver: &mut dyn FnMut(SocketId, [&[u8]; 3]) -> usize,
    ) -> Handled {
        match self {
            Stack::Here(stack) => stack.handle_packet_with(now, packet, deliver),
        }
    }

    pub(super) fn poll_foreign(&mut self) -> Option<Vec<u8>> {
        match self {
            Stack::Here(stack) => stack.poll_foreign(),
        }
    }

    pub(super) fn poll_transmit(&mut self, now: Instant) -> Option<TxPacket<'_>> {
        match self {
            Stack::Here(stack) => stack.poll_transmit(now),
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        match self {
            Stack::Here(stack) => stack.poll_timeout(),
        }
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        match self {
            Stack::Here(stack) => stack.handle_timeout(now),
        }
    }

    pub(super) fn poll_changed(&mut self) -> Option<SocketId> {
        match self {
            Stack::Here(stack) => stack.poll_changed(),
        }
    }

    pub(super) fn freeze(&self, now: Instant) -> StackImage {
        match self {
            Stack::Here(stack) => stack.freeze(now),
        }
    }

    pub(super) fn sockets(&self) -> Vec<SocketId> {
        match self {
            Stack::Here(stack) => stack.sockets().collect(),
        }
    }

    pub(super) fn status(&self, id: SocketId) -> Status {
        match self {
            Stack::Here(stack) => stack.status(id),
        }
    }

    pub(super) fn tcp_open(&mut self) -> SocketId {
        match self {
            Stack::Here(stack) => stack.tcp_open(),
        }
    }

    pub(super) fn tcp_bind(&mut self, id: SocketId, address: SocketAddr, reuse: Reuse) -> Result<()> {
        match self {
            Stack::Here(stack) => stack.tcp_bind(id, address, reuse),
        }
    }

    pub(super) fn tcp_listen(&mut self, now: Instant, id: SocketId, backlog: u32) -> Result<()> {
        match self {
            Stack::Here(stack) => stack.tcp_listen(now, id, backlog),
        }
    }

    pub(super) fn tcp_accept(&mut self, now: Instant, id: SocketId) -> Option<SocketId> {
        match self {
            Stack::Here(stack) => stack.tcp_accept(now, id),
        }
    }

    pub(super) fn tcp_connect(&mut self, now: Instant, id: SocketId, remote: SocketAddr) -> Result<()> {
        match self {
            Stack::Here(stack) => stack.tcp_connect(now, id, remote),
        }
    }

    pub(super) fn tcp_send_with(
        &mut self,
        now: Instant,
        id: SocketId,
        fill: impl FnOnce([&mut [u8]; 2]) -> usize,
    ) -> Result<usize> {
        match self {
            Stack::Here(stack) => stack.tcp_send_with(now, id, fill),
        }
    }

    pub(super) fn tcp_recv_with(
        &mut self,
        now: Instant,
        id: SocketId,
        take: impl FnOnce([&[u8]; 2]) -> usize,
    ) -> Result<usize> {
        match self {
            Stack::Here(stack) => stack.tcp_recv_with(now, id, take),
        }
    }

    pub(super) fn tcp_shutdown(&mut self, now: Instant, id: SocketId, how: Shutdown) -> Result<()> {
        match self {
            Stack::Here(stack) => stack.tcp_shutdown(now, id, how),
        }
    }

    pub(super) fn tcp_close(&mut self, now: Instant, id: SocketId) {
        match self {
            Stack::Here(stack) => stack.tcp_close(now, id),
        }
    }

    pub(super) fn tcp_abort(&mut self, now: Instant, id: SocketId) {
        match self {
            Stack::Here(stack) => stack.tcp_abort(now, id),
        }
    }

    pub(super) fn tcp_endpoints(&self, id: SocketId) -> (Option<SocketAddr>, Option<SocketAddr>) {
        match self {
            Stack::Here(stack) => stack.tcp_endpoints(id),
        }
    }

    pub(super) fn tcp_set(&mut self, now: Instant, id: SocketId, option: TcpOption) -> Result<()> {
        match self {
            Stack::Here(stack) => stack.tcp_set(now, id, option),
        }
    }

    pub(super) fn tcp_options(&self, id: SocketId) -> &TcpOptions {
        match self {
            Stack::Here(stack) => stack.tcp_options(id),
        }
    }

    pub(super) fn tcp_info(&self, now: Instant, id: SocketId) -> TcpInfo {
        match self {
            Stack::Here(stack) => stack.tcp_info(now, id),
        }
    }

    pub(super) fn take_error(&mut self, id: SocketId) -> Option<SocketError> {
        match self {
            Stack::Here(stack) => stack.take_error(id),
        }
    }
}
