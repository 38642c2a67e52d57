//! The net plane: one thread per job that owns the job's TCP stack and joins it to the world on both sides.
//!
//! ```text
//!    TUN  <->  pump  <->  netstack::Stack  <->  bridge  <->  socket pairs  <->  program
//!                                                  ^
//!                                                  +---- seccomp notifications
//! ```
//!
//! * [`mod@filter`] is the seccomp filter under which a job runs. It decides which system calls the bridge hears of.
//! * `bridge` answers those calls as Linux would, and moves bytes between socket pairs and the stack.
//! * `pump` is the thread: it waits for packets, bytes, calls, timers and commands.
//! * [`NetPlane`] is the handle that the rest of the shim holds.
//!
//! Invariants: only the pump's thread touches the stack and the pairs. A program's end of a pair is never kept open here
//! longer than one call takes, else its close would go unseen. While the plane is parked not one byte or packet moves.

mod bridge;
mod capture;
mod config;
mod datagrams;
mod describe;
mod door;
mod filter;
mod home;
mod interface;
mod lending;
mod numbers;
mod pcapng;
mod plane;
mod preview;
mod pump;
mod siege;
mod spin;
mod spread;
mod stack;
mod stay;
mod stock;
mod wire;

pub use bridge::{BridgeImage, DescriptorKeys, SocketKey};
pub use capture::{PacketStream, RecordingImage, Site};
pub use config::NetConfig;
pub use datagrams::datagram_sockets;
pub use describe::{Protocol, SocketDescription, TcpDetail};
pub use filter::filter;
pub use home::{AwayImage, Board, Guest, HomeState, LineBoard, Visitor};
pub use interface::furnish_namespace;
pub use pcapng::{ENHANCED_PACKET, header as packet_block_header};
pub use plane::{Freezing, NetError, NetImage, NetPlane};
pub use preview::{NetPreview, Told};
pub use stock::Stock;
