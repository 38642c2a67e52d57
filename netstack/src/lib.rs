//! TCP/IP as a pure state machine: packets, time and entropy go in, packets and socket changes come out.
//!
//! The crate does no I/O and knows no process, descriptor, clock or thread. Every socket is plain data: a whole
//! [`StackImage`] can be taken at any moment ([`Stack::freeze`]) and continued elsewhere ([`Stack::thaw`]).
//!
//! # Driving a stack
//!
//! One [`Stack`] serves one host. Its driver
//!
//! 1. gives every packet that arrives to [`Stack::handle_packet`],
//! 2. calls [`Stack::handle_timeout`] when [`Stack::poll_timeout`] has come,
//! 3. passes on what is not for the stack ([`Handled::Foreign`], [`Stack::poll_foreign`]) if something beside it speaks other protocols,
//! 4. after either of those, and after any socket call, calls [`Stack::poll_transmit`] until it returns `None`, sending each
//!    packet, and [`Stack::poll_changed`] until it returns `None`, looking at each socket's [`Stack::status`].
//!
//! # Map
//!
//! * [`stack`](Stack): the host: demultiplexing, timers, control replies, loopback, images.
//! * `tcp`: one connection: sequence space, buffers, loss recovery, congestion control, states.
//! * `ip`, `icmp`, `fragments`: the layers below, parsed and emitted with smoltcp's wire types.

mod config;
mod fragments;
mod hash;
mod icmp;
mod info;
mod ip;
mod options;
mod packet;
mod socket;
mod stack;
mod tcp;
mod time;

pub use config::{Config, Offload, Secrets};
pub use info::TcpInfo;
pub use options::{Congestion, TcpOption, TcpOptions};
pub use packet::{Checksum, Gso, Handled, PartialChecksum, RxPacket, TxPacket};
pub use socket::{Reuse, Shutdown, SocketError, SocketId, State, Status, Urgent};
pub use stack::{ImageError, SocketCopy, Stack, StackImage, ToldSockets};
pub use time::Instant;
