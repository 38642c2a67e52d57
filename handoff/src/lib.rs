//! The move of a job between two nodes as two state machines without I/O.
//!
//! [`Source`] and [`Target`] are told what happened ([`source::Event`], [`target::Event`]) and answer with what is to be
//! done ([`source::Action`], [`target::Action`]). They know no clock, no descriptor and no directory: a time-out is an
//! event, "transfer the ownership" is an action whose answer is an event. [`frame`] and [`message`] are what travels
//! between them.
//!
//! # The rule that everything here serves
//!
//! The ownership of a job changes by one compare-and-swap in the directory and by nothing else, and that swap is the
//! point of no return.
//!
//! * The **target** asks for the swap `(n, source) -> (n+1, target)` once it holds the whole image and has everything
//!   prepared. It runs the job only after it was told that it won.
//! * The **source** aborts freely until it begins to send [`message::ResidualEnd`]: without that frame the target never
//!   asks. Afterwards the source aborts only by winning a swap of its own, `(n, source) -> (n+1, source)`, which makes
//!   the target's impossible (the *fence*); when it loses the fence the job runs at the target and the source discards
//!   it.
//! * While an answer is unknown the job stays frozen on both sides, and both ask again.
//! * A [`Message::Abort`] is a promise: the target sends it only when it has not asked for the swap or has lost it, the
//!   source only while it is free to abort or after it won the fence. Whoever receives one may act on it at once.

pub mod frame;
pub mod message;
pub mod source;
pub mod target;

mod phase;

pub use frame::{DecodeError, Header, encode, pages_prefix};
pub use message::{Message, SectionKind};
pub use phase::{Limits, Ownership, Timer};
pub use source::Source;
pub use target::Target;
