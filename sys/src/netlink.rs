//! Links, addresses, routes and proxy neighbours over rtnetlink.
//!
//! A socket belongs to the network namespace in which its thread was when it was opened, and stays with it. Requests are
//! acknowledged one by one: each method returns when the kernel has done (or refused) what was asked.
//! man 7 rtnetlink; linux/rtnetlink.h.

mod messages;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
    sockopt::ReceiveTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};

use messages::{
    Request, encode_attribute, family, new_link, octets, parse_link, proxy_request, route_request, split_message,
    terminated, word,
};

const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// linux/if_addr.h
const IFA_F_NODAD: u8 = 0x02;
/// linux/veth.h
const VETH_INFO_PEER: u16 = 1;
/// How long the kernel may take to answer; it answers at once unless something is badly wrong.
const ANSWER_S: i64 = 5;

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address, when it is an Ethernet device.
    pub ethernet: Option<[u8; 6]>,
    /// Whether it is up.
    pub up: bool,
    /// The longest packet it takes, in bytes.
    pub mtu: u32,
    /// What has passed it since it was made.
    pub counters: Counters,
}

/// What has passed a device, link headers included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets received.
    pub received_packets: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
}

/// Where a route leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hop {
    /// Out of the device with this index.
    Device(u32),
    /// To this neighbour.
    Gateway(IpAddr),
}

/// A route to `destination/prefix_length`; two routes to the same destination with different metrics exist side by side
/// and the lower metric is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Network address.
    pub destination: IpAddr,
    /// Length of the prefix in bits.
    pub prefix_length: u8,
    /// Lower wins.
    pub metric: u32,
}

impl Route {
    /// The route to `address` alone.
    pub fn host(address: IpAddr, metric: u32) -> Route {
        Route { destination: address, prefix_length: if address.is_ipv4() { 32 } else { 128 }, metric }
    }
}

/// An rtnetlink socket.
#[derive(Debug)]
pub struct Netlink {
    fd: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket for the calling thread's network namespace.
    ///
    /// # Errors
    /// As socket(2) and bind(2).
    pub fn open() -> io::Result<Netlink> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&fd, ReceiveTimeout, &TimeVal::seconds(ANSWER_S))?;
        Ok(Netlink { fd, sequence: 0 })
    }

    /// Every device of the namespace.
    ///
    /// # Errors
    /// As the kernel's.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let mut links = Vec::new();
        let request = Request::new(libc::RTM_GETLINK, NLM_F_DUMP, &[0; 16]);
        self.exchange(request, |kind, body| {
            if kind == libc::RTM_NEWLINK {
                links.extend(parse_link(body));
            }
        })?;
        Ok(links)
    }

    /// The device called `name`.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when there is none.
    pub fn link(&mut self, name: &str) -> io::Result<Link> {
        let found = self.links()?.into_iter().find(|link| link.name == name);
        found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no network device {name}")))
    }

    /// Makes a bridge.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] when the name is taken; otherwise as the kernel's.
    pub fn add_bridge(&mut self, name: &str) -> io::Result<()> {
        let kind = encode_attribute(libc::IFLA_INFO_KIND, b"bridge\0");
        self.exchange(new_link(name, &kind), |_, _| {})
    }

    /// Makes a veth pair: `name` in this namespace, `peer_name` in `peer_namespace`.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] when a name is taken; otherwise as the kernel's.
    pub fn add_veth(&mut self, name: &str, peer_name: &str, peer_namespace: BorrowedFd<'_>) -> io::Result<()> {
        let mut peer = vec![0; 16];
        peer.extend(encode_attribute(libc::IFLA_IFNAME, &terminated(peer_name)));
        peer.extend(encode_attribute(libc::IFLA_NET_NS_FD, &peer_namespace.as_raw_fd().to_ne_bytes()));
        let mut info = encode_attribute(libc::IFLA_INFO_KIND, b"veth\0");
        info.extend(encode_attribute(libc::IFLA_INFO_DATA, &encode_attribute(VETH_INFO_PEER, &peer)));
        self.exchange(new_link(name, &info), |_, _| {})
    }

    /// Removes a device; of a veth pair both ends go.
    ///
    /// # Errors
    /// As the kernel's.
    pub fn delete_link(&mut self, index: u32) -> io::Result<()> {
        let mut body = [0; 16];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        self.exchange(Request::new(libc::RTM_DELLINK, NLM_F_ACK, &body), |_, _| {})
    }

    /// Makes the device a port of a bridge.
    ///
    /// # Errors
    /// As the kernel's.
    pub fn set_master(&mut self, index: u32, bridge: u32) -> io::Result<()> {
        let mut body = [0; 16];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        let mut request = Request::new(libc::RTM_NEWLINK, NLM_F_ACK, &body);
        request.attribute(libc::IFLA_MASTER, &bridge.to_ne_bytes());
        self.exchange(request, |_, _| {})
    }

    /// Brings the device up, with this MTU and length of its transmit queue (in packets) when given.
    ///
    /// # Errors
    /// As the kernel's.
    pub fn set_up(&mut self, index: u32, mtu: Option<u32>, queue_packets: Option<u32>) -> io::Result<()> {
        let up = (libc::IFF_UP as u32).to_ne_bytes();
        let mut body = [0; 16];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        body[8..12].copy_from_slice(&up);
        body[12..16].copy_from_slice(&up);
        let mut request = Request::new(libc::RTM_NEWLINK, NLM_F_ACK, &body);
        if let Some(mtu) = mtu {
            request.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes());
        }
        if let Some(packets) = queue_packets {
            request.attribute(libc::IFLA_TXQLEN, &packets.to_ne_bytes());
        }
        self.exchange(request, |_, _| {})
    }

    /// Makes the device one on which no neighbour is looked for: what the kernel sends through it goes to whoever has the other end.
    ///
    /// # Errors
    /// As the kernel's.
    pub fn set_no_neighbours(&mut self, index: u32) -> io::Result<()> {
        let flag = (libc::IFF_NOARP as u32).to_ne_bytes();
        let mut body = [0; 16];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        body[8..12].copy_from_slice(&flag);
        body[12..16].copy_from_slice(&flag);
        self.exchange(Request::new(libc::RTM_NEWLINK, NLM_F_ACK, &body), |_, _| {})
    }

    /// Gives the device an address; one that it has already is no error. An IPv6 address can be used at once: that it is
    /// nobody else's is the caller's to know (no duplicate address detection, RFC 4862 section 5.4).
    ///
    /// # Errors
    /// As the kernel's.
    pub fn add_address(&mut self, index: u32, address: IpAddr, prefix_length: u8) -> io::Result<()> {
        let mut body = [0; 8];
        body[0] = family(address);
        body[1] = prefix_length;
        if address.is_ipv6() {
            body[2] = IFA_F_NODAD;
        }
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        let mut request = Request::new(libc::RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &body);
        let octets = octets(address);
        request.attribute(libc::IFA_LOCAL, &octets);
        request.attribute(libc::IFA_ADDRESS, &octets);
        self.exchange(request, |_, _| {})
    }

    /// Takes an address from the device; one that it does not have is no error.
    ///
    /// # Errors
    /// As the kernel's.
    pub fn delete_address(&mut self, index: u32, address: IpAddr, prefix_length: u8) -> io::Result<()> {
        let mut body = [0; 8];
        body[0] = family(address);
        body[1] = prefix_length;
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        let mut request = Request::new(libc::RTM_DELADDR, NLM_F_ACK, &body);
        request.attribute(libc::IFA_LOCAL, &octets(address));
        match self.exchange(request, |_, _| {}) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            other => other,
        }
    }

    /// Adds a route, or replaces the one of the same destination and metric in one step.
    ///
    /// # Errors
    /// As the kernel's.
    pub fn replace_route(&mut self, route: Route, hop: Hop) -> io::Result<()> {
        let mut request = route_request(libc::RTM_NEWROUTE, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, route, Some(hop));
        match hop {
            Hop::Device(index) => request.attribute(libc::RTA_OIF, &index.to_ne_bytes()),
            Hop::Gateway(gateway) => request.attribute(libc::RTA_GATEWAY, &octets(gateway)),
        }
        self.exchange(request, |_, _| {})
    }

    /// Removes a route; one that does not exist is no error.
    ///
    /// # Errors
    /// As the kernel's.
    pub fn delete_route(&mut self, route: Route) -> io::Result<()> {
        let request = route_request(libc::RTM_DELROUTE, NLM_F_ACK, route, None);
        absent_is_fine(self.exchange(request, |_, _| {}))
    }

    /// Has the kernel answer for `address` when a neighbour on the device asks who has it.
    ///
    /// # Errors
    /// As the kernel's.
    pub fn add_proxy(&mut self, index: u32, address: IpAddr) -> io::Result<()> {
        let request = proxy_request(libc::RTM_NEWNEIGH, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, index, address);
        self.exchange(request, |_, _| {})
    }

    /// Ends [`Netlink::add_proxy`]; an entry that does not exist is no error.
    ///
    /// # Errors
    /// As the kernel's.
    pub fn delete_proxy(&mut self, index: u32, address: IpAddr) -> io::Result<()> {
        let request = proxy_request(libc::RTM_DELNEIGH, NLM_F_ACK, index, address);
        absent_is_fine(self.exchange(request, |_, _| {}))
    }

    /// Sends one request and reads until its acknowledgement or the end of its dump.
    fn exchange(&mut self, request: Request, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = request.finish(self.sequence);
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            let mut rest = &buffer[..count];
            while let Some((header, body, next)) = split_message(rest) {
                rest = next;
                // The answer to a request that timed out earlier.
                if header.sequence != self.sequence {
                    continue;
                }
                match header.kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = word(body, 0).map_or(0, u32::cast_signed);
                        return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    kind => each(kind, body),
                }
            }
        }
    }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT | libc::ENODEV)) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `test` in a network namespace of its own, which ends with the thread.
    fn in_new_namespace(test: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests need root");
                test();
            });
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        });
    }

    fn routes() -> String {
        let path = format!("/proc/{}/task/{}/net/route", std::process::id(), nix::unistd::gettid());
        std::fs::read_to_string(path).expect("the routing table")
    }

    #[test]
    fn routes_of_two_metrics_live_side_by_side() {
        in_new_namespace(|| {
            let mut netlink = Netlink::open().unwrap();
            let lo = netlink.link("lo").unwrap();
            assert!(!lo.up);
            assert_eq!(lo.ethernet, None);
            netlink.set_up(lo.index, Some(9000), Some(77)).unwrap();
            let lo = netlink.link("lo").unwrap();
            assert!(lo.up);
            assert_eq!(lo.mtu, 9000);
            netlink.add_address(lo.index, "10.1.2.3".parse().unwrap(), 24).unwrap();
            netlink.add_address(lo.index, "10.1.2.3".parse().unwrap(), 24).unwrap();
            let address = "10.77.0.5".parse().unwrap();
            let (own, other) = (Route::host(address, 0), Route::host(address, 100));
            netlink.replace_route(own, Hop::Device(lo.index)).unwrap();
            netlink.replace_route(own, Hop::Device(lo.index)).unwrap();
            netlink.replace_route(other, Hop::Device(lo.index)).unwrap();
            assert_eq!(routes().matches("05004D0A").count(), 2, "{}", routes());
            netlink.delete_route(own).unwrap();
            assert_eq!(routes().matches("05004D0A").count(), 1, "{}", routes());
            netlink.delete_route(other).unwrap();
            assert_eq!(routes().matches("05004D0A").count(), 0, "{}", routes());
            netlink.delete_route(other).unwrap();
            netlink.add_proxy(lo.index, address).unwrap();
            netlink.add_proxy(lo.index, address).unwrap();
            netlink.delete_proxy(lo.index, address).unwrap();
            netlink.delete_proxy(lo.index, address).unwrap();
        });
    }

    #[test]
    fn a_veth_pair_joins_two_namespaces_to_a_bridge() {
        use std::os::fd::AsFd;
        in_new_namespace(|| {
            let switch = crate::netns::NetNamespace::current().unwrap();
            in_new_namespace(|| {
                let node = crate::netns::NetNamespace::current().unwrap();
                let mut here = Netlink::open().unwrap();
                switch
                    .run(|| {
                        let mut there = Netlink::open()?;
                        there.add_bridge("br0")?;
                        there.add_veth("port", "eth0", node.as_fd())?;
                        assert_eq!(there.add_bridge("br0").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
                        let bridge = there.link("br0")?.index;
                        let port = there.link("port")?.index;
                        there.set_master(port, bridge)?;
                        there.set_up(port, None, None)?;
                        there.set_up(bridge, None, None)
                    })
                    .unwrap();
                let eth0 = here.link("eth0").unwrap();
                assert!(eth0.ethernet.is_some());
                assert_eq!(eth0.counters, Counters::default());
                here.set_up(eth0.index, None, None).unwrap();
                here.add_address(eth0.index, "10.99.0.1".parse().unwrap(), 24).unwrap();
                // Nobody answers, but the question for the neighbour's address goes out and is counted.
                let probe = std::net::UdpSocket::bind("10.99.0.1:0").unwrap();
                probe.send_to(&[0], "10.99.0.2:9").unwrap();
                let sent = here.link("eth0").unwrap().counters;
                assert!(sent.sent_packets >= 1 && sent.sent_bytes >= 28, "{sent:?}");
            });
        });
    }

    #[test]
    fn what_the_kernel_refuses_is_an_error() {
        in_new_namespace(|| {
            let mut netlink = Netlink::open().unwrap();
            let gateway = Hop::Gateway("192.0.2.1".parse().unwrap());
            let route = Route::host("10.77.0.5".parse().unwrap(), 0);
            let error = netlink.replace_route(route, gateway).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENETUNREACH));
            assert_eq!(netlink.link("nosuch").unwrap_err().kind(), io::ErrorKind::NotFound);
        });
    }
}
