//! Home-routed sockets: the stack stays at the job's home, the process runs elsewhere, and a line joins the two.
//!
//! ```text
//!    home:   TUN <-> Stack <-> Deputy  <== line ==>  Away <-> bridge <-> socket pairs <-> program   :elsewhere
//! ```
//!
//! The bridge is the same; its stack ([`crate::net::stack::Stack`]) is an [`away::Away`], which speaks for the stack at home. The home's
//! end is [`deputy::Deputy`], driven by the same pump that drove the bridge before. [`frame`] is what passes between them.

mod away;
mod deputy;
mod fetch;
mod frame;
mod kept;
mod line;
mod state;

#[cfg(test)]
mod tests;

use netstack::{SocketId, Stack};

pub(super) use away::Away;
pub use away::AwayImage;
pub(super) use deputy::Deputy;
pub use fetch::Guest;
pub use line::Packet;
pub use state::{Board, HomeState, LineBoard, Visitor};

fn socket_image(stack: &Stack, id: SocketId) -> frame::SocketImage {
    let (local, remote) = stack.tcp_endpoints(id);
    let status = stack.status(id);
    frame::SocketImage {
        id,
        state: status.state,
        local,
        remote,
        options: stack.tcp_options(id).clone(),
        acceptable: status.acceptable,
    }
}
