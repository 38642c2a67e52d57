//! Urgent data (RFC 9293, 3.8.5; RFC 6093): a mark in the stream, and the byte before it.
//!
//! The pointer says where urgent data ends, for a sequence of any length. What programs make of it is the sockets'
//! interface: the last urgent byte is out of band, taken by `recv(MSG_OOB)` and left out of the stream, unless
//! `SO_OOBINLINE` keeps it there; a read stops at the mark, so that `SIOCATMARK` can tell of it. All as in Linux
//! (`tcp_check_urg`, `tcp_recv_urg`), whose oddities programs know.

use serde::{Deserialize, Serialize};

use super::seq::Seq;

/// What is known of the last urgent byte that the peer pointed behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Urgent {
    /// Where the byte is.
    pub(crate) at: Seq,
    pub(crate) byte: UrgentByte,
}

/// The byte before the mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum UrgentByte {
    /// Only the pointer has come.
    Awaited,
    /// It is here.
    Held(u8),
    /// The program has taken it.
    Taken,
}

/// Why there is no urgent byte to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoUrgent {
    /// None was announced, or it was taken, or it is in the stream.
    Never,
    /// It is announced and has not come.
    NotYet,
}

impl Urgent {
    /// Takes the byte out of a segment's payload if it is in there.
    pub(crate) fn look_into(&mut self, seq: Seq, payload: &[u8]) {
        if self.byte == UrgentByte::Awaited
            && self.at >= seq
            && let Some(&byte) = payload.get(self.at.since(seq))
        {
            self.byte = UrgentByte::Held(byte);
        }
    }
}
