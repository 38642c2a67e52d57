//! Which sockets hold which ports.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use super::slab::Slab;
use super::socket::{Kind, Socket};
use crate::hash::Key;

/// Who is on a port.
#[derive(Clone, Debug, Default)]
struct Port {
    /// Sockets that were bound to it by name, or listen on it.
    owners: Vec<u32>,
    /// How many connections are on it that were accepted or chose it themselves, and what is left of such: one entry
    /// for each of this host's few addresses.
    connections: Vec<Connections>,
}

/// Connections on one address and port.
#[derive(Clone, Copy, Debug)]
struct Connections {
    address: IpAddr,
    /// With `SO_REUSEADDR`.
    shared: u32,
    /// Without it.
    exclusive: u32,
}

/// All ports in use.
#[derive(Debug)]
pub(crate) struct Ports {
    ports: HashMap<u16, Port, Key>,
}

/// What a socket asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) address: SocketAddr,
    pub(crate) v6only: bool,
    pub(crate) reuse_address: bool,
    pub(crate) reuse_port: bool,
    pub(crate) listening: bool,
}

impl Ports {
    pub(crate) fn new(key: Key) -> Self {
        Ports { ports: HashMap::with_hasher(key) }
    }

    pub(crate) fn add_owner(&mut self, port: u16, slot: u32) {
        self.ports.entry(port).or_default().owners.push(slot);
    }

    pub(crate) fn remove_owner(&mut self, port: u16, slot: u32) {
        if let Some(entry) = self.ports.get_mut(&port) {
            entry.owners.retain(|&owner| owner != slot);
            self.forget_if_free(port);
        }
    }

    pub(crate) fn add_connection(&mut self, local: SocketAddr, reuse_address: bool) {
        let entry = self.ports.entry(local.port()).or_default();
        let known = entry.connections.iter().position(|connections| connections.address == local.ip());
        let index = known.unwrap_or_else(|| {
            entry.connections.push(Connections { address: local.ip(), shared: 0, exclusive: 0 });
            entry.connections.len() - 1
        });
        let connections = &mut entry.connections[index];
        if reuse_address {
            connections.shared += 1;
        } else {
            connections.exclusive += 1;
        }
    }

    pub(crate) fn remove_connection(&mut self, local: SocketAddr, reuse_address: bool) {
        let Some(entry) = self.ports.get_mut(&local.port()) else { return };
        for connections in entry.connections.iter_mut().filter(|connections| connections.address == local.ip()) {
            let count = if reuse_address { &mut connections.shared } else { &mut connections.exclusive };
            *count = count.saturating_sub(1);
        }
        entry.connections.retain(|connections| connections.shared > 0 || connections.exclusive > 0);
        self.forget_if_free(local.port());
    }

    fn forget_if_free(&mut self, port: u16) {
        if self.ports.get(&port).is_some_and(|entry| entry.owners.is_empty() && entry.connections.is_empty()) {
            self.ports.remove(&port);
        }
    }

    /// Sockets bound to `port` by name.
    pub(crate) fn owners(&self, port: u16) -> &[u32] {
        self.ports.get(&port).map_or(&[], |entry| &entry.owners)
    }

    /// Whether anything at all is on `port`.
    pub(crate) fn is_used(&self, port: u16) -> bool {
        self.ports.contains_key(&port)
    }

    /// Linux's `inet_csk_bind_conflict`: whether `claim` collides with what is on the port, `except` itself.
    pub(crate) fn conflicts(&self, sockets: &Slab<Socket>, claim: &Claim, except: u32) -> bool {
        let Some(entry) = self.ports.get(&claim.address.port()) else {
            return false;
        };
        let taken = entry.connections.iter().any(|connections| {
            overlap(claim.address.ip(), claim.v6only, connections.address, false)
                && (connections.exclusive > 0 || !claim.reuse_address)
        });
        // A socket that is bound already and now listens has passed this.
        if taken && !claim.listening {
            return true;
        }
        entry.owners.iter().filter(|&&owner| owner != except).any(|&owner| {
            let Some(other) = sockets.get(owner) else {
                return false;
            };
            let Some(address) = other.bound else {
                return false;
            };
            if !overlap(claim.address.ip(), claim.v6only, address.ip(), other.options.v6only) {
                return false;
            }
            let other_listens = matches!(other.kind, Kind::Listener(_));
            let both_reuse = claim.reuse_address && other.options.reuse_address && !other_listens && !claim.listening;
            let both_share = claim.reuse_port && other.options.reuse_port;
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.1
            //# A TCP implementation that supports multiple concurrent connections MUST provide an OPEN call that will
            //# functionally allow an application to LISTEN on a port while a connection block with the same local port
            //# is in SYN-SENT or SYN-RECEIVED state (MUST-42).
            // Two sockets may be bound alike with SO_REUSEADDR, but only one of them may listen.
            let bound_alike = claim.reuse_address && other.options.reuse_address && claim.listening && !other_listens;
            !(both_reuse || both_share || bound_alike)
        })
    }
}

/// Whether two local addresses can receive the same packet.
fn overlap(one: IpAddr, one_v6only: bool, other: IpAddr, other_v6only: bool) -> bool {
    let covers = |wide: IpAddr, v6only: bool, narrow: IpAddr| {
        wide == narrow
            || match wide {
                IpAddr::V4(wide) => wide.is_unspecified() && narrow.is_ipv4(),
                IpAddr::V6(wide) => wide.is_unspecified() && (narrow.is_ipv6() || !v6only),
            }
    };
    covers(one, one_v6only, other) || covers(other, other_v6only, one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_overlap() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(overlap(ip("0.0.0.0"), false, ip("10.0.0.1"), false));
        assert!(overlap(ip("::"), false, ip("10.0.0.1"), false));
        assert!(overlap(ip("::"), false, ip("0.0.0.0"), false));
        assert!(!overlap(ip("::"), true, ip("0.0.0.0"), false));
        assert!(!overlap(ip("10.0.0.2"), false, ip("10.0.0.1"), false));
        assert!(!overlap(ip("0.0.0.0"), false, ip("fd00::1"), false));
    }
}
