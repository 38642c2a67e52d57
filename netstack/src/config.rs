//! What a stack is told when it is made or thawed.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Seed of every secret of a stack: ISNs, timestamp offsets, ports, hash keys, SYN cookies. Must be unpredictable.
#[derive(Clone, Serialize, Deserialize)]
pub struct Secrets(pub [u8; 32]);

impl std::fmt::Debug for Secrets {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Secrets(..)")
    }
}

/// What the device below can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offload {
    /// It cuts super-packets, so the stack may emit them.
    pub tso: bool,
    /// It finishes partial checksums, so the stack may leave them.
    pub checksum: bool,
    /// Longest super-packet in bytes, IP header included; at most 65,535.
    pub max_size: usize,
}

impl Offload {
    /// A device that does everything, like a TUN with `TUNSETOFFLOAD`.
    pub const FULL: Offload = Offload { tso: true, checksum: true, max_size: 65_535 };
    /// A device that does nothing.
    pub const NONE: Offload = Offload { tso: false, checksum: false, max_size: 65_535 };
}

/// What a stack is and what it may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The host's own addresses, IPv4 and IPv6, the preferred one of each family first.
    pub addresses: Vec<IpAddr>,
    /// Largest packet the link carries, in bytes, IP header included.
    pub mtu: usize,
    /// What the device can do.
    pub offload: Offload,
    /// Most bytes of one connection's send buffer; it grows up to here by itself.
    pub send_buffer: usize,
    /// Most bytes of one connection's receive buffer; it grows up to here by itself.
    pub receive_buffer: usize,
    /// First and last port that `connect` and `bind` to port 0 choose from.
    pub ephemeral_ports: (u16, u16),
    /// Most connections in TIME-WAIT; beyond it the oldest ends early.
    pub time_wait_limit: usize,
    /// Half-open connections of a listener beyond its backlog are answered with SYN cookies rather than dropped.
    pub syn_cookies: bool,
    /// Something beside the stack speaks the host's other protocols: what isn't for TCP is passed on to it ([`crate::Handled`]), and
    /// it is for that to refuse what nobody wants. Otherwise the stack refuses it.
    pub foreign: bool,
    /// Ask for ECN on connections this host opens (it always agrees when asked).
    pub ecn: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            addresses: Vec::new(),
            mtu: 1500,
            offload: Offload::FULL,
            send_buffer: 4 << 20,
            receive_buffer: 6 << 20,
            ephemeral_ports: (32_768, 60_999),
            time_wait_limit: 32_768,
            syn_cookies: true,
            foreign: false,
            ecn: false,
        }
    }
}
