//! `struct sockaddr_in` and `sockaddr_in6` as bytes in a program's memory, and the address rules of the two families.
//!
//! The stack knows IPv4 addresses only as such. A socket of the IPv6 family sees them in their mapped form (RFC 4291, 2.5.5.2).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use serde::{Deserialize, Serialize};

/// Family of a program's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Family {
    V4,
    V6,
}

/// `sizeof(struct sockaddr_in)`
const LEN_V4: usize = 16;
/// `sizeof(struct sockaddr_in6)`
const LEN_V6: usize = 28;
/// The kernel also takes the shorter `sockaddr_in6` of RFC 2133, without the scope.
const LEN_V6_MIN: usize = 24;
/// `sizeof(struct sockaddr_storage)`: no address is longer.
pub(super) const LEN_MAX: usize = 128;

/// What a program gave as an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Given {
    /// `AF_UNSPEC`, with the IPv4 address that bind(2) looks at in that case.
    Unspecified,
    /// An address, IPv4-mapped ones as IPv4.
    Address(SocketAddr),
}

/// What the address is for; the families' rules differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Bind,
    Connect,
}

impl Family {
    pub(super) fn number(self) -> i32 {
        match self {
            Family::V4 => libc::AF_INET,
            Family::V6 => libc::AF_INET6,
        }
    }

    /// The address that stands for all of the host's.
    pub(super) fn wildcard(self) -> SocketAddr {
        match self {
            Family::V4 => SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
            Family::V6 => SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0),
        }
    }

    /// Reads an address as Linux does; an error is an errno.
    pub(super) fn decode(self, bytes: &[u8], purpose: Purpose) -> Result<Given, i32> {
        let Some(given) = bytes.get(..2).map(|family| i32::from(u16::from_ne_bytes([family[0], family[1]]))) else {
            return Err(libc::EINVAL);
        };
        if given == libc::AF_UNSPEC && purpose == Purpose::Connect {
            return Ok(Given::Unspecified);
        }
        let length = match self {
            Family::V4 => LEN_V4,
            Family::V6 => LEN_V6_MIN,
        };
        if bytes.len() < length {
            return Err(libc::EINVAL);
        }
        let port = u16::from_be_bytes([bytes[2], bytes[3]]);
        match self {
            Family::V4 => {
                let address = Ipv4Addr::new(bytes[4], bytes[5], bytes[6], bytes[7]);
                // "Compatibility games: accept AF_UNSPEC only with INADDR_ANY" (net/ipv4/af_inet.c).
                let compatible = given == libc::AF_UNSPEC && address.is_unspecified();
                if given != libc::AF_INET && !compatible {
                    return Err(libc::EAFNOSUPPORT);
                }
                Ok(Given::Address(SocketAddr::new(IpAddr::V4(address), port)))
            }
            Family::V6 => {
                if given != libc::AF_INET6 {
                    return Err(libc::EAFNOSUPPORT);
                }
                let octets: [u8; 16] = bytes[8..24].try_into().expect("the length was checked");
                let address = Ipv6Addr::from(octets);
                // RFC 2133's address has no scope, which counts as none given.
                let scope =
                    bytes.get(24..28).map_or(0, |bytes| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
                if address.is_unicast_link_local() && scope == 0 {
                    return Err(libc::EINVAL);
                }
                // Only streams come this way, which no group can be an end of.
                if address.is_multicast() && purpose == Purpose::Bind {
                    return Err(libc::EINVAL);
                }
                let address = address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4);
                Ok(Given::Address(SocketAddr::new(address, port)))
            }
        }
    }

    /// The bytes of an address as a program with a socket of this family sees it.
    pub(super) fn encode(self, address: SocketAddr) -> Vec<u8> {
        let port = address.port().to_be_bytes();
        match (self, address.ip()) {
            (Family::V4, IpAddr::V4(ip)) => {
                let mut bytes = vec![0u8; LEN_V4];
                bytes[..2].copy_from_slice(&number(libc::AF_INET));
                bytes[2..4].copy_from_slice(&port);
                bytes[4..8].copy_from_slice(&ip.octets());
                bytes
            }
            (_, ip) => {
                let octets = match ip {
                    // The IPv4 wildcard stands for "any", not for the mapped address of all zeros.
                    IpAddr::V4(ip) if ip.is_unspecified() => [0; 16],
                    IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                    IpAddr::V6(ip) => ip.octets(),
                };
                let scope = match address {
                    SocketAddr::V6(v6) => SocketAddrV6::scope_id(&v6),
                    SocketAddr::V4(_) => 0,
                };
                let mut bytes = vec![0u8; LEN_V6];
                bytes[..2].copy_from_slice(&number(libc::AF_INET6));
                bytes[2..4].copy_from_slice(&port);
                bytes[8..24].copy_from_slice(&octets);
                bytes[24..28].copy_from_slice(&scope.to_ne_bytes());
                bytes
            }
        }
    }
}

fn number(family: i32) -> [u8; 2] {
    u16::try_from(family).expect("address families are small").to_ne_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("address")
    }

    #[test]
    fn addresses_survive_encoding() {
        for (family, text) in
            [(Family::V4, "10.77.0.5:6379"), (Family::V6, "10.77.0.5:6379"), (Family::V6, "[fd00::5]:80")]
        {
            let address = address(text);
            assert_eq!(family.decode(&family.encode(address), Purpose::Connect), Ok(Given::Address(address)));
        }
    }

    #[test]
    fn ipv4_is_mapped_for_ipv6_sockets() {
        let bytes = Family::V6.encode(address("1.2.3.4:80"));
        assert_eq!(bytes.len(), 28);
        assert_eq!(&bytes[8..24], &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 1, 2, 3, 4]);
    }

    #[test]
    fn errors_are_those_of_linux() {
        let v4 = Family::V4.encode(address("1.2.3.4:80"));
        let v6 = Family::V6.encode(address("[::1]:80"));
        assert_eq!(Family::V4.decode(&v4[..8], Purpose::Bind), Err(libc::EINVAL));
        assert_eq!(Family::V4.decode(&[], Purpose::Bind), Err(libc::EINVAL));
        assert_eq!(Family::V4.decode(&v6, Purpose::Connect), Err(libc::EAFNOSUPPORT));
        assert_eq!(Family::V6.decode(&v4, Purpose::Bind), Err(libc::EINVAL));
        let link_local = Family::V6.encode(address("[fe80::1]:80"));
        assert_eq!(Family::V6.decode(&link_local, Purpose::Connect), Err(libc::EINVAL));
        let group = Family::V6.encode(address("[ff02::1]:80"));
        assert_eq!(Family::V6.decode(&group, Purpose::Bind), Err(libc::EINVAL));
        let mut unspecified = [0u8; 16];
        assert_eq!(Family::V4.decode(&unspecified, Purpose::Connect), Ok(Given::Unspecified));
        assert_eq!(Family::V4.decode(&unspecified, Purpose::Bind), Ok(Given::Address(address("0.0.0.0:0"))));
        unspecified[4] = 1;
        assert_eq!(Family::V4.decode(&unspecified, Purpose::Bind), Err(libc::EAFNOSUPPORT));
    }
}
