//! The TCP/IP stack as the bridge sees it.
//!
//! A method here has the name, the arguments and the meaning of the one of [`netstack::Stack`], wherever the stack runs.

use std::net::SocketAddr;

use netstack::{
    Handled, Instant, Reuse, RxPacket, Shutdown, SocketCopy, SocketError, SocketId, StackImage, Status, TcpInfo,
    TcpOption, TcpOptions, TxPacket,
};

use super::home::{Away, AwayImage};
use super::plane::NetError;

type Result<T> = std::result::Result<T, SocketError>;

/// A job's stack.
pub(super) enum Stack {
    /// It runs in this thread.
    Here(Box<netstack::Stack>),
    /// It runs at the job's home.
    Away(Box<Away>),
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
            Stack::Away(_) => Handled::Taken,
        }
    }

    pub(super) fn poll_foreign(&mut self) -> Option<Vec<u8>> {
        match self {
            Stack::Here(stack) => stack.poll_foreign(),
            Stack::Away(_) => None,
        }
    }

    pub(super) fn poll_transmit(&mut self, now: Instant) -> Option<TxPacket<'_>> {
        match self {
            Stack::Here(stack) => stack.poll_transmit(now),
            Stack::Away(_) => None,
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        match self {
            Stack::Here(stack) => stack.poll_timeout(),
            Stack::Away(_) => None,
        }
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        match self {
            Stack::Here(stack) => stack.handle_timeout(now),
            Stack::Away(_) => {}
        }
    }

    pub(super) fn poll_changed(&mut self) -> Option<SocketId> {
        match self {
            Stack::Here(stack) => stack.poll_changed(),
            Stack::Away(away) => away.poll_changed(),
        }
    }

    /// A stack that is here as an image.
    pub(super) fn freeze(&self, now: Instant) -> Option<Box<StackImage>> {
        match self {
            Stack::Here(stack) => Some(Box::new(stack.freeze(now))),
            Stack::Away(_) => None,
        }
    }

    /// The same without the sockets that were told before and have not been touched since.
    pub(super) fn freeze_untold(&self, now: Instant) -> Option<Box<StackImage>> {
        match self {
            Stack::Here(stack) => Some(Box::new(stack.freeze_untold(now))),
            Stack::Away(_) => None,
        }
    }

    pub(super) fn tell(&mut self, id: SocketId) -> Option<SocketCopy> {
        match self {
            Stack::Here(stack) => stack.tell(id),
            Stack::Away(_) => None,
        }
    }

    pub(super) fn is_idle(&self, id: SocketId) -> bool {
        match self {
            Stack::Here(stack) => stack.is_idle(id),
            Stack::Away(_) => false,
        }
    }

    pub(super) fn is_as_told(&self, id: SocketId) -> bool {
        match self {
            Stack::Here(stack) => stack.is_as_told(id),
            Stack::Away(_) => false,
        }
    }

    pub(super) fn forget_told(&mut self) {
        match self {
            Stack::Here(stack) => stack.forget_told(),
            Stack::Away(_) => {}
        }
    }

    /// What another node must know to serve the sockets `ids` while the stack stays where it is.
    pub(super) fn away_image(&mut self, ids: &[SocketId]) -> std::result::Result<AwayImage, NetError> {
        match self {
            Stack::Here(stack) => Ok(AwayImage::of_stack(stack, ids.iter().copied())),
            Stack::Away(away) => away.freeze(),
        }
    }

    /// The stack, if it runs here.
    pub(super) fn as_here(&mut self) -> Option<&mut netstack::Stack> {
        match self {
            Stack::Here(stack) => Some(stack),
            Stack::Away(_) => None,
        }
    }

    /// The speaker for the stack, if that is at home.
    pub(super) fn as_away(&mut self) -> Option<&mut Away> {
        match self {
            Stack::Here(_) => None,
            Stack::Away(away) => Some(away),
        }
    }

    /// Whether everything is known of a socket; before, it is not to be judged.
    pub(super) fn is_settled(&self, id: SocketId) -> bool {
        match self {
            Stack::Here(_) => true,
            Stack::Away(away) => away.is_settled(id),
        }
    }

    /// Whether the stack can't be reached any more, nor ever again.
    pub(super) fn is_lost(&self) -> bool {
        match self {
            Stack::Here(_) => false,
            Stack::Away(away) => away.lost().is_some(),
        }
    }

    /// Brings what [`Stack::tcp_info`] tells of a socket up to date, and how much of it is on its way out.
    pub(super) fn refresh(&mut self, id: SocketId) {
        match self {
            Stack::Here(_) => {}
            Stack::Away(away) => away.refresh(id),
        }
    }

    /// As [`Stack::refresh`] for every socket.
    pub(super) fn refresh_all(&mut self) {
        match self {
            Stack::Here(_) => {}
            Stack::Away(away) => away.refresh_all(),
        }
    }

    pub(super) fn sockets(&self) -> Vec<SocketId> {
        match self {
            Stack::Here(stack) => stack.sockets().collect(),
            Stack::Away(away) => away.sockets(),
        }
    }

    pub(super) fn status(&self, id: SocketId) -> Status {
        match self {
            Stack::Here(stack) => stack.status(id),
            Stack::Away(away) => away.status(id),
        }
    }

    /// Fails only when the home is lost.
    pub(super) fn tcp_open(&mut self) -> Result<SocketId> {
        match self {
            Stack::Here(stack) => Ok(stack.tcp_open()),
            Stack::Away(away) => away.tcp_open(),
        }
    }

    pub(super) fn tcp_bind(&mut self, id: SocketId, address: SocketAddr, reuse: Reuse) -> Result<()> {
        match self {
            Stack::Here(stack) => stack.tcp_bind(id, address, reuse),
            Stack::Away(away) => away.tcp_bind(id, address, reuse),
        }
    }

    pub(super) fn tcp_listen(&mut self, now: Instant, id: SocketId, backlog: u32) -> Result<()> {
        match self {
            Stack::Here(stack) => stack.tcp_listen(now, id, backlog),
            Stack::Away(away) => away.tcp_listen(id, backlog),
        }
    }

    pub(super) fn tcp_accept(&mut self, now: Instant, id: SocketId) -> Option<SocketId> {
        match self {
            Stack::Here(stack) => stack.tcp_accept(now, id),
            Stack::Away(away) => away.tcp_accept(id),
        }
    }

    pub(super) fn tcp_connect(&mut self, now: Instant, id: SocketId, remote: SocketAddr) -> Result<()> {
        match self {
            Stack::Here(stack) => stack.tcp_connect(now, id, remote),
            Stack::Away(away) => away.tcp_connect(id, remote),
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
            Stack::Away(away) => away.tcp_send_with(id, fill),
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
            Stack::Away(away) => away.tcp_recv_with(id, take),
        }
    }

    /// One byte that the program marked as urgent; a home far away gets it as any other.
    pub(super) fn tcp_send_urgent(&mut self, now: Instant, id: SocketId, byte: u8) -> Result<usize> {
        match self {
            Stack::Here(stack) => stack.tcp_send_urgent(now, id, &[byte]),
            Stack::Away(away) => away.tcp_send_with(id, |[first, second]| {
                let room = if first.is_empty() { second } else { first };
                room.first_mut().map_or(0, |place| {
                    *place = byte;
                    1
                })
            }),
        }
    }

    /// The urgent byte, if it is here; with `peek` it stays.
    pub(super) fn tcp_recv_urgent(&mut self, id: SocketId, peek: bool) -> Option<u8> {
        match self {
            Stack::Here(stack) => stack.tcp_recv_urgent(id, peek).ok().flatten(),
            Stack::Away(_) => None,
        }
    }

    pub(super) fn tcp_shutdown(&mut self, now: Instant, id: SocketId, how: Shutdown) -> Result<()> {
        match self {
            Stack::Here(stack) => stack.tcp_shutdown(now, id, how),
            Stack::Away(away) => away.tcp_shutdown(id, how),
        }
    }

    pub(super) fn tcp_close(&mut self, now: Instant, id: SocketId) {
        match self {
            Stack::Here(stack) => stack.tcp_close(now, id),
            Stack::Away(away) => away.tcp_close(id),
        }
    }

    pub(super) fn tcp_abort(&mut self, now: Instant, id: SocketId) {
        match self {
            Stack::Here(stack) => stack.tcp_abort(now, id),
            Stack::Away(away) => away.tcp_abort(id),
        }
    }

    pub(super) fn tcp_endpoints(&self, id: SocketId) -> (Option<SocketAddr>, Option<SocketAddr>) {
        match self {
            Stack::Here(stack) => stack.tcp_endpoints(id),
            Stack::Away(away) => away.tcp_endpoints(id),
        }
    }

    pub(super) fn tcp_set(&mut self, now: Instant, id: SocketId, option: TcpOption) -> Result<()> {
        match self {
            Stack::Here(stack) => stack.tcp_set(now, id, option),
            Stack::Away(away) => away.tcp_set(id, option),
        }
    }

    pub(super) fn tcp_options(&self, id: SocketId) -> &TcpOptions {
        match self {
            Stack::Here(stack) => stack.tcp_options(id),
            Stack::Away(away) => away.tcp_options(id),
        }
    }

    pub(super) fn tcp_info(&self, now: Instant, id: SocketId) -> TcpInfo {
        match self {
            Stack::Here(stack) => stack.tcp_info(now, id),
            Stack::Away(away) => away.tcp_info(id),
        }
    }

    pub(super) fn take_error(&mut self, id: SocketId) -> Option<SocketError> {
        match self {
            Stack::Here(stack) => stack.take_error(id),
            Stack::Away(away) => away.take_error(id),
        }
    }
}
