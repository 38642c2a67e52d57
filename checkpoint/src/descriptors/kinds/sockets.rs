//! Sockets that aren't Unix sockets and aren't the caller's: netlink, and UDP in the job's own network namespace. They are made
//! anew with their addresses and options, and UDP sockets with what waits in their queues ([`super::datagrams`]); a netlink answer
//! that waits to be read keeps the job here for the moment. Memberships of multicast groups end with a move.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde_bytes::ByteBuf;
use sys::fds::{self, sockets};
use sys::libc;

use super::super::image::{Kind, SocketImage, SocketOption};
use super::super::scan::Seen;
use super::{Dumping, Handler, Problem, View, datagrams};

/// A netlink or datagram socket.
pub(in super::super) struct Native;

/// Integer options of any socket that can be read and set.
const INTEGERS: &[i32] = &[
    libc::SO_BROADCAST,
    libc::SO_KEEPALIVE,
    libc::SO_OOBINLINE,
    libc::SO_PASSCRED,
    libc::SO_PASSSEC,
    libc::SO_PRIORITY,
    libc::SO_RCVLOWAT,
    libc::SO_REUSEADDR,
    libc::SO_REUSEPORT,
    libc::SO_TIMESTAMP,
    libc::SO_TIMESTAMPNS,
    libc::SO_MARK,
    libc::SO_PEEK_OFF,
    libc::SO_DONTROUTE,
    libc::SO_NO_CHECK,
    libc::SO_RXQ_OVFL,
    libc::SO_BUSY_POLL,
];

/// Options that aren't integers, or have a meaning of their own.
const RECORDS: &[i32] = &[libc::SO_LINGER, libc::SO_RCVTIMEO, libc::SO_SNDTIMEO, libc::SO_BINDTODEVICE];

/// Options of netlink sockets.
const NETLINK: &[i32] = &[
    libc::NETLINK_PKTINFO,
    libc::NETLINK_BROADCAST_ERROR,
    libc::NETLINK_NO_ENOBUFS,
    libc::NETLINK_LISTEN_ALL_NSID,
    libc::NETLINK_CAP_ACK,
    libc::NETLINK_EXT_ACK,
    // NETLINK_GET_STRICT_CHK
    12,
];

/// Options of IP sockets.
const IP: &[i32] = &[
    libc::IP_TOS,
    libc::IP_TTL,
    libc::IP_PKTINFO,
    libc::IP_RECVERR,
    libc::IP_MTU_DISCOVER,
    libc::IP_RECVTTL,
    libc::IP_RECVTOS,
    libc::IP_RECVOPTS,
    libc::IP_RETOPTS,
    libc::IP_RECVORIGDSTADDR,
    libc::IP_MULTICAST_TTL,
    libc::IP_MULTICAST_LOOP,
    libc::IP_MULTICAST_ALL,
    libc::IP_FREEBIND,
    libc::IP_TRANSPARENT,
    libc::IP_BIND_ADDRESS_NO_PORT,
    // IP_CHECKSUM, IP_RECVFRAGSIZE, IP_RECVERR_RFC4884, IP_LOCAL_PORT_RANGE
    23,
    25,
    26,
    51,
];

/// Options of IPv6 sockets.
const IPV6: &[i32] = &[
    libc::IPV6_V6ONLY,
    libc::IPV6_RECVPKTINFO,
    libc::IPV6_UNICAST_HOPS,
    libc::IPV6_RECVERR,
    libc::IPV6_RECVHOPLIMIT,
    libc::IPV6_RECVTCLASS,
    libc::IPV6_TCLASS,
    libc::IPV6_MTU_DISCOVER,
    libc::IPV6_DONTFRAG,
    libc::IPV6_MULTICAST_HOPS,
    libc::IPV6_MULTICAST_LOOP,
    libc::IPV6_FREEBIND,
    libc::IPV6_TRANSPARENT,
    libc::IPV6_RECVORIGDSTADDR,
    libc::IPV6_ADDR_PREFERENCES,
    // IPV6_RECVPATHMTU, IPV6_AUTOFLOWLABEL, IPV6_RECVFRAGSIZE, IPV6_MULTICAST_ALL
    60,
    70,
    77,
    29,
];

/// Options of UDP sockets (linux/udp.h): UDP_CORK, UDP_NO_CHECK6_TX and _RX, UDP_SEGMENT, UDP_GRO.
const UDP: &[i32] = &[1, 101, 102, 103, 104];

/// Buffer sizes: the kernel reports twice what is asked for.
const BUFFERS: [(i32, i32); 2] = [(libc::SO_SNDBUF, libc::SO_SNDBUFFORCE), (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE)];

/// The options of a socket, as far as it has them.
pub(in super::super) fn options(fd: BorrowedFd<'_>, domain: i32) -> Vec<SocketOption> {
    // An IPv6 socket that takes IPv4 as well has the options of both.
    let of_family: &[(i32, &[i32])] = match domain {
        libc::AF_NETLINK => &[(libc::SOL_NETLINK, NETLINK)],
        libc::AF_INET => &[(libc::IPPROTO_IP, IP), (libc::IPPROTO_UDP, UDP)],
        libc::AF_INET6 => &[(libc::IPPROTO_IPV6, IPV6), (libc::IPPROTO_IP, IP), (libc::IPPROTO_UDP, UDP)],
        _ => &[],
    };
    let buffers = BUFFERS.map(|(name, _)| name);
    let general = [INTEGERS, RECORDS, &buffers].concat();
    let names = general.into_iter().map(|name| (libc::SOL_SOCKET, name));
    let names = names.chain(of_family.iter().flat_map(|(level, names)| names.iter().map(|name| (*level, *name))));
    names
        .filter_map(|(level, name)| {
            let value = sockets::option(fd, level, name).ok()?;
            Some(SocketOption { level, name, value: ByteBuf::from(value) })
        })
        .collect()
}

/// Gives a new socket these options, where it doesn't have them anyway.
pub(in super::super) fn set_options(fd: BorrowedFd<'_>, options: &[SocketOption]) -> io::Result<()> {
    for SocketOption { level, name, value } in options {
        if sockets::option(fd, *level, *name).is_ok_and(|now| now == value.as_slice()) {
            continue;
        }
        let forced = BUFFERS.iter().find(|(buffer, _)| *level == libc::SOL_SOCKET && buffer == name);
        match (forced, <[u8; 4]>::try_from(value.as_slice())) {
            (Some((_, force)), Ok(bytes)) => {
                let half = i32::from_ne_bytes(bytes) / 2;
                sockets::set_int_option(fd, *level, *force, half)?;
            }
            _ => sockets::set_option(fd, *level, *name, value)
                .map_err(|error| io::Error::other(format!("socket option {level}/{name}: {error}")))?,
        }
    }
    Ok(())
}

fn domain(seen: &Seen) -> io::Result<i32> {
    sockets::int_option(seen.file()?.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN)
}

fn kind(seen: &Seen) -> io::Result<i32> {
    sockets::int_option(seen.file()?.as_fd(), libc::SOL_SOCKET, libc::SO_TYPE)
}

/// What a family and type are called, and whether a socket of it can be made anew.
fn judge(domain: i32, kind: i32) -> Result<(), String> {
    match (domain, kind) {
        (libc::AF_NETLINK, _) | (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM) => Ok(()),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM) => {
            Err("TCP socket that isn't the shim's; it was made before the job started".into())
        }
        (libc::AF_INET | libc::AF_INET6 | libc::AF_PACKET, _) => {
            Err("raw socket; it sees this machine's packets".into())
        }
        (libc::AF_ALG, _) => Err("AF_ALG socket; let the program do its cryptography itself".into()),
        (libc::AF_VSOCK, _) => Err("AF_VSOCK socket; it belongs to this machine's hypervisor".into()),
        _ => Err(format!("socket of family {domain}; this kind can't be moved")),
    }
}

impl Handler for Native {
    fn recognises(&self, seen: &Seen) -> bool {
        seen.socket().is_some()
    }

    fn obstacle(&self, seen: &Seen, _: &View<'_>) -> io::Result<Option<String>> {
        Ok(judge(domain(seen)?, kind(seen)?).err())
    }

    fn dump(&self, seen: &Seen, _: usize, _: &mut Dumping<'_>) -> Result<Kind, Problem> {
        let (domain, kind) = (domain(seen)?, kind(seen)?);
        judge(domain, kind).map_err(Problem::Stays)?;
        let fd = seen.file()?.as_fd();
        if domain == libc::AF_NETLINK && fds::readiness(fd, libc::POLLIN)? & libc::POLLIN != 0 {
            return Err(Problem::Stays("netlink answer that the program hasn't read yet; try again".into()));
        }
        let local = sockets::local_address(fd)?;
        let protocol = sockets::int_option(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL)?;
        Ok(Kind::Socket(SocketImage {
            domain,
            kind,
            protocol,
            local: is_bound(domain, &local).then(|| ByteBuf::from(local)),
            remote: sockets::peer_address(fd).ok().filter(|peer| is_bound(domain, peer)).map(ByteBuf::from),
            options: options(fd, domain),
            queue: if domain != libc::AF_NETLINK && protocol == libc::IPPROTO_UDP {
                datagrams::queue(fd, domain)?
            } else {
                Vec::new()
            },
        }))
    }
}

/// Whether an address says anything: a port, or for netlink a port number or groups.
fn is_bound(domain: i32, address: &[u8]) -> bool {
    let from = if domain == libc::AF_NETLINK { 4 } else { 2 };
    let length = if domain == libc::AF_NETLINK { 8 } else { 2 };
    address.get(from..from + length).is_some_and(|bytes| bytes.iter().any(|byte| *byte != 0))
}

/// Makes it; to be called inside the job's network namespace.
pub(in super::super) fn make(image: &SocketImage) -> io::Result<OwnedFd> {
    let fd = sockets::socket(image.domain, image.kind, image.protocol)?;
    set_options(fd.as_fd(), &image.options)?;
    if let Some(local) = &image.local {
        sockets::bind(fd.as_fd(), local)?;
    }
    // Before it is connected: what waits may come from others than its peer of now.
    datagrams::fill(fd.as_fd(), image.domain, &image.queue)?;
    if let Some(remote) = &image.remote {
        sockets::connect(fd.as_fd(), remote)?;
    }
    Ok(fd)
}
