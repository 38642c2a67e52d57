//! One TCP connection, from its sequence numbers up. Nothing here knows packets' way in or out, or other connections.

pub(crate) mod congestion;
pub(crate) mod connection;
pub(crate) mod cookie;
pub(crate) mod half_open;
pub(crate) mod listener;
pub(crate) mod receive;
pub(crate) mod recovery;
pub(crate) mod ring;
pub(crate) mod rtt;
pub(crate) mod segment;
pub(crate) mod send;
pub(crate) mod seq;
pub(crate) mod time_wait;
pub(crate) mod timers;
pub(crate) mod urgent;

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{Config, Instant, TcpOptions};

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Tuple {
    pub(crate) local: IpAddr,
    pub(crate) local_port: u16,
    pub(crate) remote: IpAddr,
    pub(crate) remote_port: u16,
}

impl Tuple {
    pub(crate) const fn local_address(&self) -> SocketAddr {
        SocketAddr::new(self.local, self.local_port)
    }

    pub(crate) const fn remote_address(&self) -> SocketAddr {
        SocketAddr::new(self.remote, self.remote_port)
    }
}

/// What surrounds a connection while something happens to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Env<'a> {
    pub(crate) now: Instant,
    pub(crate) config: &'a Config,
    pub(crate) options: &'a TcpOptions,
}

/// The timestamp clock: milliseconds, moved by a secret that differs from peer to peer.
pub(crate) const fn timestamp(now: Instant, offset: u32) -> u32 {
    ((now.as_millis() & 0xffff_ffff) as u32).wrapping_add(offset)
}

/// Age at which a timestamp of the peer means nothing any more (RFC 7323, 5.5).
pub(crate) const TIMESTAMP_AGE_MAX: std::time::Duration = std::time::Duration::from_secs(24 * 24 * 3600);

/// What both sides agreed on in their SYNs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Agreed {
    pub(crate) timestamps: bool,
    pub(crate) sack: bool,
    pub(crate) scaling: bool,
    pub(crate) ecn: bool,
}

/// Assumed when the peer's SYN has no MSS option (RFC 9293, 3.7.1).
//= https://www.rfc-editor.org/rfc/rfc9293#section-3.7.1
//# If an MSS Option is not received at connection setup, TCP implementations MUST assume a default send MSS of 536 (576
//# - 40) for IPv4 or 1220 (1280 - 60) for IPv6 (MUST-15).
pub(crate) const fn default_mss(local: IpAddr) -> u16 {
    match local {
        IpAddr::V4(_) => 536,
        IpAddr::V6(_) => 1220,
    }
}

/// Least segment size accepted from a peer; smaller ones are attacks on the sender (Linux: `tcp_min_snd_mss`).
pub(crate) const MSS_MIN: u16 = 48;
