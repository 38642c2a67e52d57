//! What the command line, the daemon and the shims say to each other.
//!
//! Three conversations use the same framing ([`frame`]: a 32-bit big-endian length, then JSON):
//!
//! * the command line and the shims talk to the daemon over `STATE/control.sock` ([`DaemonRequest`]),
//! * the daemon talks to a job's shim over `STATE/jobs/ID/shim.sock` ([`ShimRequest`]),
//! * daemons talk to each other over TCP (`daemon::peer`, private to the daemon).
//!
//! One connection carries one request. A request is answered by one reply frame ([`Reply`]), and where the table at the
//! request says so by a stream of event frames after an accepting reply. Closing the connection cancels a stream and
//! nothing else: it never cancels a move and never stops a job.

mod client;
mod connection;
mod daemon_types;
pub mod frame;
mod paths;
mod shim_types;
mod types;

pub use client::{Client, ClientError};
pub use connection::{Connection, Receiver, Sender};
pub use daemon_types::*;
pub use paths::{DEFAULT_STATE, JobPaths, LAB_STATE, StatePaths};
pub use shim_types::*;
pub use types::*;
