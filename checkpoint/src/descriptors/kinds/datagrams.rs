//! What waits in UDP sockets.
//!
//! A queue is read without being taken away. At the target each datagram is sent once more, as a whole IP packet over the loopback device
//! of the job's namespace, by which the kernel neither asks where its source lies nor changes it: so it waits again with its sender, its destination,
//! its hop limit, its traffic class, and the interface it came through, and every option that tells of those goes on working.
//!
//! Left out: time stamps (they tell when it was sent again), a pending error, and the queue of errors.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use serde_bytes::ByteBuf;
use sys::fds::sockets::{self, PeekedDatagram};
use sys::libc;

use super::super::image::DatagramImage;

/// The options that make the kernel tell what an image has to know.
const TELLING: [(i32, i32); 6] = [
    (libc::IPPROTO_IP, libc::IP_PKTINFO),
    (libc::IPPROTO_IP, libc::IP_RECVTTL),
    (libc::IPPROTO_IP, libc::IP_RECVTOS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
];

/// The interface through which everything that isn't looped comes, as far as a job sees.
const INTERFACE: &[u8] = b"eth0\0";
/// The loopback device is the first of every namespace (LOOPBACK_IFINDEX).
const LOOPBACK_INDEX: u32 = 1;
const UDP: u8 = 17;
const UDP_HEADER_LEN: usize = 8;
/// `UDP_GRO` (linux/udp.h): the control message that tells where several datagrams that wait as one are to be parted.
const UDP_GRO: i32 = 104;
const SOL_UDP: i32 = 17;
/// Receive buffer of a socket that is being filled: its own limit comes back afterwards.
const ROOM: i32 = 256 << 20;
/// The kernel delivers at once; this is for a machine that is very busy.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long to wait at most for an address to be taken into use.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(10);
/// `RTF_LOCAL` (linux/ipv6_route.h)
const LOCAL_ROUTE: u32 = 0x8000_0000;

/// Reads the queue of a socket and leaves it, and the socket's options, as they are.
pub(super) fn queue(fd: BorrowedFd<'_>, domain: i32) -> io::Result<Vec<DatagramImage>> {
    let levels: &[i32] =
        if domain == libc::AF_INET6 { &[libc::IPPROTO_IP, libc::IPPROTO_IPV6] } else { &[libc::IPPROTO_IP] };
    let telling = TELLING.iter().filter(|(level, _)| levels.contains(level));
    let mut before = Vec::new();
    for &(level, name) in telling {
        let value = sockets::int_option(fd, level, name)?;
        if value == 0 {
            before.push((level, name));
            sockets::set_int_option(fd, level, name, 1i32)?;
        }
    }
    let peeked = sockets::peek_datagrams(fd);
    for (level, name) in before {
        sockets::set_int_option(fd, level, name, 0i32)?;
    }
    Ok(peeked?.iter().flat_map(images).collect())
}

/// A datagram, or the several that wait as one.
fn images(peeked: &PeekedDatagram) -> Vec<DatagramImage> {
    let Some(source) = read_address(&peeked.sender) else {
        return Vec::new();
    };
    let unspecified = match source {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let mut image = DatagramImage {
        data: ByteBuf::new(),
        source,
        destination: unspecified,
        hop_limit: 64,
        traffic_class: 0,
        looped: false,
    };
    let mut piece = peeked.data.len().max(1);
    for (level, kind, body) in &peeked.control {
        let word = body.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        let byte = u8::try_from(word & 0xff).unwrap_or(0);
        match (*level, *kind) {
            // struct in_pktinfo { int index; struct in_addr spec_dst, addr; }
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                if let Some(octets) = body.get(8..12).and_then(|octets| <[u8; 4]>::try_from(octets).ok()) {
                    image.destination = octets.into();
                }
                image.looped |= word == LOOPBACK_INDEX;
            }
            // struct in6_pktinfo { struct in6_addr addr; unsigned index; }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                if let Some((octets, rest)) = body.split_first_chunk::<16>() {
                    image.destination = IpAddr::from(*octets).to_canonical();
                    let index = rest.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
                    image.looped |= index == LOOPBACK_INDEX;
                }
            }
            (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => image.hop_limit = byte,
            (libc::IPPROTO_IP, libc::IP_TOS) => image.traffic_class = body.first().copied().unwrap_or(0),
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => image.traffic_class = byte,
            (SOL_UDP, UDP_GRO) => piece = usize::try_from(word).unwrap_or(0).max(1),
            _ => {}
        }
    }
    image.looped |= source.ip().is_loopback();
    if peeked.data.is_empty() {
        return vec![image];
    }
    let parted = peeked.data.chunks(piece);
    parted.map(|data| DatagramImage { data: ByteBuf::from(data), ..image.clone() }).collect()
}

/// Reads a `struct sockaddr_in` or `sockaddr_in6`, IPv4 freed from its mapped form.
fn read_address(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(*bytes.first_chunk()?));
    let port = u16::from_be_bytes([*bytes.get(2)?, *bytes.get(3)?]);
    let ip: IpAddr = match family {
        libc::AF_INET => <[u8; 4]>::try_from(bytes.get(4..8)?).ok()?.into(),
        libc::AF_INET6 => <[u8; 16]>::try_from(bytes.get(8..24)?).ok()?.into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip.to_canonical(), port))
}

/// Writes a `struct sockaddr_in`, or a `sockaddr_in6` for a socket of that family.
fn write_address(address: SocketAddr, domain: i32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(28);
    bytes.extend_from_slice(&u16::try_from(domain).unwrap_or(0).to_ne_bytes());
    bytes.extend_from_slice(&address.port().to_be_bytes());
    match (domain, address.ip()) {
        (libc::AF_INET6, ip) => {
            let octets = match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&octets);
            bytes.extend_from_slice(&[0; 4]);
        }
        (_, IpAddr::V4(ip)) => {
            bytes.extend_from_slice(&ip.octets());
            bytes.extend_from_slice(&[0; 8]);
        }
        (_, IpAddr::V6(_)) => bytes.extend_from_slice(&[0; 12]),
    }
    bytes
}

/// Fills the queue of a socket that is bound but not connected yet. To be called inside the job's network namespace.
pub(super) fn fill(fd: BorrowedFd<'_>, domain: i32, queue: &[DatagramImage]) -> io::Result<()> {
    if queue.is_empty() {
        return Ok(());
    }
    let local = sockets::local_address(fd)?;
    let Some(local) = read_address(&local) else {
        return Ok(());
    };
    let before = sockets::int_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF)?;
    sockets::set_int_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, ROOM)?;
    let shared = [libc::SO_REUSEADDR, libc::SO_REUSEPORT]
        .iter()
        .any(|name| sockets::int_option(fd, libc::SOL_SOCKET, *name).is_ok_and(|value| value != 0));
    let mut senders = Senders::default();
    for datagram in queue {
        // Others may be bound alike. The kernel gives a packet to the one of them that is connected to its sender.
        let connected = shared
            && datagram.source.port() != 0
            && sockets::connect(fd, &write_address(datagram.source, domain)).is_ok();
        let sent = deliver(fd, local, datagram, &mut senders);
        if connected {
            let nobody = [0u8; 16];
            sockets::connect(fd, &nobody)?;
        }
        sent?;
    }
    // The kernel doubles what it is given.
    sockets::set_int_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, before / 2)
}

fn deliver(fd: BorrowedFd<'_>, local: SocketAddr, datagram: &DatagramImage, senders: &mut Senders) -> io::Result<()> {
    let to_one = |ip: IpAddr| !ip.is_multicast() && !ip.is_unspecified() && ip != IpAddr::V4(Ipv4Addr::BROADCAST);
    let source = datagram.source.ip();
    let destination = match datagram.destination {
        ip if to_one(ip) => ip,
        // What came to a group can only be given back to its one member here.
        _ if to_one(local.ip()) => local.ip(),
        _ if source.is_ipv4() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        _ => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    let looped = datagram.looped || destination.is_loopback();
    if let IpAddr::V6(address) = destination {
        senders.await_use(address)?;
    }
    let sender = senders.get(destination.is_ipv6(), looped)?;
    let before = sockets::receive_memory(fd)?;
    let address = write_address(
        SocketAddr::new(destination, 0),
        if destination.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET },
    );
    for packet in packets(datagram, destination, local.port()) {
        sockets::send_as(sender, &packet, &address, None)?;
    }
    let until = Instant::now() + PATIENCE;
    while sockets::receive_memory(fd)? <= before {
        if Instant::now() > until {
            let (from, bytes) = (datagram.source, datagram.data.len());
            tracing::error!(%from, to = %local, bytes, "a datagram that waited in a socket of the job can't be given back to it");
            return Ok(());
        }
        std::thread::sleep(Duration::from_micros(20));
    }
    Ok(())
}

/// Raw sockets, made when first needed.
#[derive(Default)]
struct Senders {
    sockets: [Option<OwnedFd>; 4],
    /// Addresses that the kernel uses.
    used: Vec<Ipv6Addr>,
}

impl Senders {
    fn get(&mut self, v6: bool, looped: bool) -> io::Result<BorrowedFd<'_>> {
        let place = &mut self.sockets[usize::from(v6) * 2 + usize::from(looped)];
        if place.is_none() {
            let domain = if v6 { libc::AF_INET6 } else { libc::AF_INET };
            let fd = sockets::socket(domain, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
            if !looped {
                // Sent through it to the job itself, a packet counts as one that came in through it.
                sockets::set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, INTERFACE)?;
            }
            *place = Some(fd);
        }
        place.as_ref().map(AsFd::as_fd).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Waits until the kernel uses an address that an interface has. It does so some time after the address was added, by a thread of its
    /// own; a packet to it that comes before that isn't taken for one to the job, and leaves the namespace.
    fn await_use(&mut self, address: Ipv6Addr) -> io::Result<()> {
        if self.used.contains(&address) {
            return Ok(());
        }
        let digits: String = address.octets().iter().map(|octet| format!("{octet:02x}")).collect();
        // Of the namespace that this thread is in.
        let has = |table: &str, fits: fn(&str) -> bool| -> io::Result<bool> {
            let of = |thread: &str| std::fs::read_to_string(format!("/proc/{thread}/net/{table}"));
            let text = match of("thread-self") {
                // This /proc is the job's, in which we aren't, but its first process, which is in that namespace.
                Err(error) if error.kind() == io::ErrorKind::NotFound => of("1"),
                text => text,
            };
            Ok(text?.lines().any(|line| line.strip_prefix(&digits).is_some_and(fits)))
        };
        let until = Instant::now() + ADDRESS_PATIENCE;
        while has("if_inet6", |_| true)? && !has("ipv6_route", is_local_route)? && Instant::now() < until {
            std::thread::sleep(Duration::from_micros(100));
        }
        self.used.push(address);
        Ok(())
    }
}

/// Whether a line of `/proc/net/ipv6_route` says, behind its address, that packets to that are taken in.
fn is_local_route(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let is_host = words.next() == Some("80");
    // Source, its length, next hop, metric, references and uses come in between.
    let flags = words.nth(6).and_then(|word| u32::from_str_radix(word, 16).ok());
    is_host && flags.is_some_and(|flags| flags & LOCAL_ROUTE != 0)
}

/// The datagram as the IP packet it came in; two if it is longer than the loopback device takes at once.
fn packets(datagram: &DatagramImage, destination: IpAddr, port: u16) -> Vec<Vec<u8>> {
    let mut udp = Vec::with_capacity(UDP_HEADER_LEN + datagram.data.len());
    let length = u16::try_from(UDP_HEADER_LEN + datagram.data.len()).unwrap_or(u16::MAX);
    udp.extend_from_slice(&datagram.source.port().to_be_bytes());
    udp.extend_from_slice(&port.to_be_bytes());
    udp.extend_from_slice(&length.to_be_bytes());
    udp.extend_from_slice(&[0, 0]);
    udp.extend_from_slice(&datagram.data);
    let (class, hops) = (datagram.traffic_class, datagram.hop_limit.max(1));
    match (datagram.source.ip(), destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let pseudo = [&source.octets()[..], &destination.octets(), &[0, UDP], &length.to_be_bytes()].concat();
            set_checksum(&mut udp, &pseudo);
            let mut packet = vec![0x45, class, 0, 0, 0, 0, 0, 0, hops, UDP, 0, 0];
            packet.extend_from_slice(&source.octets());
            packet.extend_from_slice(&destination.octets());
            packet.extend_from_slice(&udp);
            // The kernel fills in length, identification and checksum (raw(7)).
            vec![packet]
        }
        (source, destination) => {
            let [source, destination] = [source, destination].map(|ip| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            });
            let pseudo = [&source[..], &destination, &u32::from(length).to_be_bytes(), &[0, 0, 0, UDP]].concat();
            set_checksum(&mut udp, &pseudo);
            let header = |next: u8, length: usize| {
                let length = u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes();
                let mut header = vec![0x60 | class >> 4, class << 4, 0, 0, length[0], length[1], next, hops];
                header.extend_from_slice(&source);
                header.extend_from_slice(&destination);
                header
            };
            if udp.len() <= LOOPBACK_PAYLOAD_MAX {
                return vec![[header(UDP, udp.len()), udp].concat()];
            }
            let (first, second) = udp.split_at(FRAGMENT_LEN);
            [(first, 0u16, 1u16), (second, FRAGMENT_LEN as u16, 0)]
                .map(|(piece, offset, more)| {
                    let mut packet = header(FRAGMENT, FRAGMENT_HEADER_LEN + piece.len());
                    packet.extend_from_slice(&[UDP, 0]);
                    packet.extend_from_slice(&(offset | more).to_be_bytes());
                    packet.extend_from_slice(&u32::from(port).to_be_bytes());
                    packet.extend_from_slice(piece);
                    packet
                })
                .into()
        }
    }
}

/// The loopback device's packets have 65,536 bytes.
const LOOPBACK_PAYLOAD_MAX: usize = 65_536 - 40;
/// RFC 8200 (4.5)
const FRAGMENT: u8 = 44;
const FRAGMENT_HEADER_LEN: usize = 8;
/// Where a datagram is cut that is too long: at a multiple of eight.
const FRAGMENT_LEN: usize = 32_768;

/// RFC 768: an all-zero checksum would say that there is none.
fn set_checksum(udp: &mut [u8], pseudo: &[u8]) {
    let words = pseudo.chunks(2).chain(udp.chunks(2));
    let mut sum: u64 = words.map(|pair| u64::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u64::from)).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let checksum = match !(sum as u16) {
        0 => 0xffff,
        checksum => checksum,
    };
    udp[6..8].copy_from_slice(&checksum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive() {
        for (text, domain) in
            [("10.0.0.1:53", libc::AF_INET), ("10.0.0.1:53", libc::AF_INET6), ("[fd00::1]:53", libc::AF_INET6)]
        {
            let address: SocketAddr = text.parse().expect("an address");
            assert_eq!(read_address(&write_address(address, domain)), Some(address));
        }
        assert_eq!(read_address(&[]), None);
        assert_eq!(read_address(&[1, 0, 2]), None);
    }

    /// RFC 768's sum over a known packet: a query of 2 bytes from 10.0.0.1:1 to 10.0.0.2:2.
    #[test]
    fn a_checksum_over_all_comes_out_as_zero() {
        let image = DatagramImage {
            data: ByteBuf::from(b"odd".to_vec()),
            source: "10.0.0.1:1".parse().expect("an address"),
            destination: "10.0.0.2".parse().expect("an address"),
            hop_limit: 9,
            traffic_class: 8,
            looped: false,
        };
        let packets = packets(&image, image.destination, 2);
        let packet = &packets[0];
        assert_eq!((packet[0], packet[1], packet[8], packet[9]), (0x45, 8, 9, UDP));
        let pseudo = [&packet[12..20], &[0, UDP, 0, 11]].concat();
        let mut udp = packet[20..].to_vec();
        let stored = [udp[6], udp[7]];
        udp[6..8].fill(0);
        set_checksum(&mut udp, &pseudo);
        assert_eq!([udp[6], udp[7]], stored);
    }

    #[test]
    fn routes_to_the_job_itself_are_known() {
        let rest = "00000000000000000000000000000000 00 00000000000000000000000000000000";
        assert!(is_local_route(&format!(" 80 {rest} 00000000 00000003 00000000 80200001     eth0")));
        assert!(!is_local_route(&format!(" 80 {rest} 00000100 00000001 00000000 00000001     eth0")));
        assert!(!is_local_route(&format!(" 40 {rest} 00000000 00000003 00000000 80200001     eth0")));
        assert!(!is_local_route(""));
    }

    #[test]
    fn what_waits_as_one_is_parted() {
        let peeked = PeekedDatagram {
            data: vec![7; 2500],
            sender: write_address("10.0.0.1:53".parse().expect("an address"), libc::AF_INET),
            control: vec![(SOL_UDP, UDP_GRO, 1000i32.to_ne_bytes().to_vec())],
        };
        let lengths: Vec<usize> = images(&peeked).iter().map(|image| image.data.len()).collect();
        assert_eq!(lengths, [1000, 1000, 500]);
        let empty = PeekedDatagram { data: Vec::new(), ..peeked };
        assert_eq!(images(&empty).len(), 1);
    }

    #[test]
    fn the_longest_is_cut() {
        let image = DatagramImage {
            data: ByteBuf::from(vec![1; 65_527]),
            source: "[fd00::1]:1".parse().expect("an address"),
            destination: "fd00::2".parse().expect("an address"),
            hop_limit: 9,
            traffic_class: 0xab,
            looped: false,
        };
        let packets = packets(&image, image.destination, 2);
        assert_eq!(packets.len(), 2);
        assert_eq!(packets[0][..2], [0x6a, 0xb0]);
        assert!(packets.iter().all(|packet| packet.len() <= 65_536 && packet[6] == FRAGMENT));
        assert_eq!(packets.iter().map(|packet| packet.len() - 48).sum::<usize>(), 65_535);
    }
}
