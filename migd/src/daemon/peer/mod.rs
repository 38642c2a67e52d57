//! Daemons talking to each other over TCP.
//!
//! Both sides send a hello ([`protocol::Hello`], [`protocol::Welcome`]); then the side that connected asks, one request at a time
//! ([`protocol::PeerRequest`]). Most requests have one answer and leave the connection ready for the next; some turn it
//! into a stream of one kind, and [`protocol::PeerRequest::MoveOffer`] gives it away to the shims, which is why nothing here ever reads
//! a byte ahead.

pub mod client;
pub mod protocol;
pub mod server;

pub use client::{PeerError, Peers};
