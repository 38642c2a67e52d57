//! The network around a job: its TUN device, the routes that lead to it, and the announcements on the wire.
//!
//! A node attracts a job's packets by two things: a route to the address out of the job's TUN device, and a proxy
//! neighbour entry on each uplink, by which the kernel answers ARP, or neighbour solicitations, for the address. The TUN
//! device and with it its routes vanish when the shim dies, however it dies. What proxy entries remain then answer no ARP any
//! more (the kernel answers only for what it routes elsewhere than out of the uplink), though still solicitations, until
//! the daemon removes them ([`clean_up`]).
//!
//! Routes come in two metrics. The shim's own has [`OWN_METRIC`] and is preferred for as long as it exists; the route to
//! the owner's node, kept by the daemon as the directory says, has [`FOLLOW_METRIC`]. So neither overwrites the other's,
//! and in the moment of a commit there is always one that is right.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::Path;

use sys::netlink::{Hop, Link, Netlink, Route};
use sys::packet::PacketSocket;
use sys::tun::Tun;

use crate::api::NodeAddress;

/// Metric of the route out of a job's TUN device on the node where it runs. Not 0: to the kernel a deletion with metric 0 means
/// a route of any metric, and so would take the one that follows the job.
pub const OWN_METRIC: u32 = 50;
/// Metric of the route via the owner's node, kept by every node's daemon.
pub const FOLLOW_METRIC: u32 = 100;

/// Packets that wait in the TUN while the job is frozen; what does not fit is for the peers to send again.
const QUEUE_PACKETS: u32 = 5000;
/// More TUN devices than any node has jobs.
const MAX_DEVICES: u32 = 100_000;
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const ARP_REQUEST: u8 = 1;
const ARP_REPLY: u8 = 2;

/// A failure with what was being done.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct LinkError {
    what: String,
    #[source]
    source: io::Error,
}

fn context<T>(result: io::Result<T>, what: impl FnOnce() -> String) -> Result<T, LinkError> {
    result.map_err(|source| LinkError { what: what(), source })
}

/// The network of one job on this node.
#[derive(Debug)]
pub struct Links {
    addresses: Vec<IpAddr>,
    tun: Link,
    mtu: u32,
    uplinks: Vec<Link>,
    netlink: Netlink,
    packets: PacketSocket,
}

impl Links {
    /// Makes the job's TUN device and brings it up. No packet comes yet.
    ///
    /// # Errors
    /// When the kernel refuses a step, which is named.
    pub fn create(addresses: &[IpAddr], uplinks: &[String]) -> Result<(Links, OwnedFd), LinkError> {
        let mut netlink = context(Netlink::open(), || "can't open an rtnetlink socket".into())?;
        let packets = context(PacketSocket::open(), || "can't open a packet socket".into())?;
        let all = context(netlink.links(), || "can't list the network devices".into())?;
        let mut found = Vec::new();
        for name in uplinks {
            let link = all.iter().find(|link| link.name == *name).cloned();
            found.push(context(link.ok_or(io::ErrorKind::NotFound.into()), || format!("there is no uplink {name}"))?);
        }
        let mtu = found.iter().map(|link| link.mtu).min().unwrap_or(1500);
        let (tun, name) = context(create_tun(&all), || "can't make a TUN device".into())?;
        set_sysctl(&format!("ipv4/conf/{name}/rp_filter"), "0");
        prepare_tun6(&name, addresses.iter().any(IpAddr::is_ipv6))?;
        let link = context(netlink.link(&name), || format!("can't find {name}"))?;
        context(netlink.set_up(link.index, Some(mtu), Some(QUEUE_PACKETS)), || format!("can't bring {name} up"))?;
        prepare_node(uplinks);
        if addresses.iter().any(IpAddr::is_ipv6) {
            prepare_node6(uplinks);
        }
        Ok((Links { addresses: addresses.to_vec(), tun: link, mtu, uplinks: found, netlink, packets }, tun.into()))
    }

    /// The longest packet of the job, in bytes.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// The name of the TUN device.
    pub fn device(&self) -> &str {
        &self.tun.name
    }

    /// Routes the job's addresses to its TUN device.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attract(&mut self) -> Result<(), LinkError> {
        for address in &self.addresses {
            let route = Route::host(*address, OWN_METRIC);
            context(self.netlink.replace_route(route, Hop::Device(self.tun.index)), || {
                format!("can't route {address} to {}", self.tun.name)
            })?;
        }
        Ok(())
    }

    /// Undoes [`Links::attract`].
    pub fn release(&mut self) {
        for address in &self.addresses {
            if let Err(error) = self.netlink.delete_route(Route::host(*address, OWN_METRIC)) {
                tracing::warn!(%address, %error, "can't remove the job's route");
            }
        }
    }

    /// Tells the networks of the uplinks that the addresses are here, and answers for them from now on.
    ///
    /// Nothing here can fail the job: it runs already, or is about to. What the kernel refuses is logged.
    pub fn announce(&mut self) {
        for address in &self.addresses {
            for link in &self.uplinks {
                if let Err(error) = self.netlink.add_proxy(link.index, *address) {
                    tracing::warn!(%address, uplink = link.name, %error, "can't answer for the job's address");
                }
            }
        }
        self.repeat_announcement();
    }

    /// Sends the announcement once more, for those that missed it.
    pub fn repeat_announcement(&self) {
        for link in &self.uplinks {
            let Some(mac) = link.ethernet else { continue };
            for address in &self.addresses {
                for frame in announcements(mac, *address) {
                    if let Err(error) = self.packets.send(link.index, &frame) {
                        tracing::warn!(%address, uplink = link.name, %error, "can't announce the job");
                    }
                }
            }
        }
    }

    /// After the commit at the source: packets that still come here go on to the job's new node. [`Links::stop_answering`] is
    /// less urgent: for addresses that are routed out of the uplink the kernel answers no ARP.
    pub fn hand_over(&mut self, target: &NodeAddress) {
        // Before the own routes go, so that no packet finds neither.
        for address in &self.addresses {
            let Some(via) = target.hop_for(*address) else {
                tracing::warn!(%address, node = target.name, "that node has no address of this kind, see its --hop");
                continue;
            };
            if let Err(error) = self.netlink.replace_route(Route::host(*address, FOLLOW_METRIC), Hop::Gateway(via)) {
                tracing::warn!(%address, %via, %error, "can't forward to the job's new node");
            }
        }
        self.release();
    }

    /// Ends what [`Links::attract`] and [`Links::announce`] did. The TUN device ends with its descriptor.
    pub fn withdraw(&mut self) {
        self.stop_answering();
        self.release();
    }

    /// Answers for the addresses no more.
    pub fn stop_answering(&mut self) {
        for address in &self.addresses {
            for link in &self.uplinks {
                if let Err(error) = self.netlink.delete_proxy(link.index, *address) {
                    tracing::warn!(%address, uplink = link.name, %error, "can't remove the proxy entry");
                }
            }
        }
    }
}

/// For the daemon: removes what a shim that was killed left behind for `addresses`.
///
/// # Errors
/// When the kernel can't be asked.
pub fn clean_up(addresses: &[IpAddr], uplinks: &[String]) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    for address in addresses {
        for link in links.iter().filter(|link| uplinks.contains(&link.name)) {
            netlink.delete_proxy(link.index, *address)?;
        }
        netlink.delete_route(Route::host(*address, OWN_METRIC))?;
    }
    Ok(())
}

/// For the daemon: routes a job that runs on another node via that node. Harmless while the job still runs here.
///
/// # Errors
/// When the kernel refuses; ENETUNREACH or EHOSTUNREACH when `via` is no neighbour.
pub fn follow(address: IpAddr, via: IpAddr) -> io::Result<()> {
    Netlink::open()?.replace_route(Route::host(address, FOLLOW_METRIC), Hop::Gateway(via))
}

/// For the daemon: ends [`follow`].
///
/// # Errors
/// When the kernel can't be asked.
pub fn unfollow(address: IpAddr) -> io::Result<()> {
    Netlink::open()?.delete_route(Route::host(address, FOLLOW_METRIC))
}

/// What a node needs that forwards for jobs; done again it changes nothing.
fn prepare_node(uplinks: &[String]) {
    set_sysctl("ipv4/ip_forward", "1");
    // A redirect would tell peers to go round this node to one that the job may leave again.
    set_sysctl("ipv4/conf/all/send_redirects", "0");
    for uplink in uplinks {
        set_sysctl(&format!("ipv4/conf/{uplink}/send_redirects"), "0");
        // A proxied answer waits up to this long otherwise (0.8 s).
        set_sysctl(&format!("ipv4/neigh/{uplink}/proxy_delay"), "0");
    }
}

/// The same for IPv6. There is no switch for redirects: the kernel sends none for routes whose next hop is a global address, as
/// those between nodes are.
fn prepare_node6(uplinks: &[String]) {
    for uplink in uplinks {
        // A machine that forwards heeds no router advertisements unless told to; who lives by them should go on to.
        let accepts = format!("ipv6/conf/{uplink}/accept_ra");
        if std::fs::read_to_string(Path::new("/proc/sys/net").join(&accepts)).is_ok_and(|value| value.trim() == "1") {
            set_sysctl(&accepts, "2");
        }
        set_sysctl(&format!("ipv6/conf/{uplink}/proxy_ndp"), "1");
        set_sysctl(&format!("ipv6/neigh/{uplink}/proxy_delay"), "0");
    }
    set_sysctl("ipv6/conf/all/forwarding", "1");
}

/// The TUN device carries a job's IPv6 packets and none of the kernel's own: no address is made for it, so that the kernel
/// neither solicits routers nor joins groups there.
fn prepare_tun6(name: &str, carries: bool) -> Result<(), LinkError> {
    let directory = format!("ipv6/conf/{name}");
    if !Path::new("/proc/sys/net").join(&directory).exists() {
        let missing = if carries { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) };
        return context(missing, || {
            "this node's kernel has no IPv6, but the jobs of this cluster have IPv6 addresses".into()
        });
    }
    if carries {
        // linux/if_link.h: IN6_ADDR_GEN_MODE_NONE.
        set_sysctl(&format!("{directory}/addr_gen_mode"), "1");
        set_sysctl(&format!("{directory}/accept_ra"), "0");
        set_sysctl(&format!("{directory}/router_solicitations"), "0");
    }
    set_sysctl(&format!("{directory}/disable_ipv6"), if carries { "0" } else { "1" });
    Ok(())
}

fn set_sysctl(name: &str, value: &str) {
    let path = Path::new("/proc/sys/net").join(name);
    let current = std::fs::read_to_string(&path).unwrap_or_default();
    if current.trim() == value {
        return;
    }
    if let Err(error) = std::fs::write(&path, value) {
        tracing::warn!(path = %path.display(), value, %error, "can't set a sysctl");
    }
}

fn create_tun(existing: &[Link]) -> io::Result<(Tun, String)> {
    for number in 0..MAX_DEVICES {
        let name = format!("mig{number}");
        if existing.iter().any(|link| link.name == name) {
            continue;
        }
        match Tun::create(&name) {
            // Another shim was faster.
            Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {}
            other => return other.map(|tun| (tun, name)),
        }
    }
    Err(io::Error::other(format!("all of mig0 to mig{MAX_DEVICES} are taken")))
}

/// The frames that tell a network who has an address now.
fn announcements(mac: [u8; 6], address: IpAddr) -> Vec<Vec<u8>> {
    match address {
        // Some systems heed requests only, some replies only (RFC 5227, section 3).
        IpAddr::V4(address) => {
            [ARP_REQUEST, ARP_REPLY].map(|operation| gratuitous_arp(mac, address, operation).to_vec()).into()
        }
        IpAddr::V6(address) => vec![unsolicited_advertisement(mac, address).to_vec()],
    }
}

/// RFC 4861 sections 4.4 and 7.2.6: a neighbour advertisement to all nodes, not solicited, to override what they have cached.
fn unsolicited_advertisement(mac: [u8; 6], address: Ipv6Addr) -> [u8; 86] {
    /// ff02::1, and the Ethernet address of that group (RFC 2464 section 7).
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
    const NEXT_HEADER_ICMPV6: u8 = 58;
    const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    const OVERRIDE: u8 = 0x20;
    const TARGET_LINK_ADDRESS: u8 = 2;
    const LENGTH: u8 = 32;
    let mut frame = [0; 86];
    frame[..6].copy_from_slice(&ALL_NODES_MAC);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&ETHERTYPE_IPV6);
    frame[14] = 6 << 4;
    frame[19] = LENGTH;
    frame[20] = NEXT_HEADER_ICMPV6;
    // Receivers drop it if it passed a router.
    frame[21] = 255;
    frame[22..38].copy_from_slice(&address.octets());
    frame[38..54].copy_from_slice(&ALL_NODES.octets());
    frame[54] = NEIGHBOUR_ADVERTISEMENT;
    frame[58] = OVERRIDE;
    frame[62..78].copy_from_slice(&address.octets());
    // The option's length is in units of 8 bytes.
    frame[78..80].copy_from_slice(&[TARGET_LINK_ADDRESS, 1]);
    frame[80..86].copy_from_slice(&mac);
    // RFC 4443 section 2.3: over a pseudo-header of both addresses, length and next header, and the message.
    let mut sum: u32 = u32::from(LENGTH) + u32::from(NEXT_HEADER_ICMPV6);
    for pair in frame[22..].chunks_exact(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [_, _, high, low] = (!sum).to_be_bytes();
    frame[56..58].copy_from_slice(&[high, low]);
    frame
}

/// RFC 5227: the sender's and the target's protocol address are both the address announced.
pub(crate) fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr, operation: u8) -> [u8; 42] {
    let mut frame = [0; 42];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&ETHERTYPE_ARP);
    // Ethernet, IPv4, their address lengths.
    frame[14..20].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame[21] = operation;
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&address.octets());
    // Linux takes a reply as gratuitous only when both hardware addresses are the same.
    frame[32..38].copy_from_slice(&mac);
    frame[38..42].copy_from_slice(&address.octets());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gratuitous_arp_names_the_address_twice() {
        let frame = gratuitous_arp([2, 0, 0, 0, 0, 9], Ipv4Addr::new(10, 77, 0, 5), ARP_REQUEST);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[12..22], [0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(frame[28..32], [10, 77, 0, 5]);
        assert_eq!(frame[38..42], frame[28..32]);
        assert_eq!(frame[22..28], frame[6..12]);
    }

    #[test]
    fn an_unsolicited_advertisement_overrides_and_adds_up() {
        let address = "fd77::5".parse::<Ipv6Addr>().unwrap();
        let mac = [2, 0, 0, 0, 0, 9];
        let frame = unsolicited_advertisement(mac, address);
        assert_eq!(frame[..14], [0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9, 0x86, 0xdd]);
        assert_eq!(frame[14..22], [0x60, 0, 0, 0, 0, 32, 58, 255]);
        assert_eq!(frame[54..56], [136, 0]);
        assert_eq!(frame[58..62], [0x20, 0, 0, 0]);
        assert_eq!((&frame[22..38], &frame[62..78]), (&address.octets()[..], &address.octets()[..]));
        assert_eq!(frame[78..], [2, 1, 2, 0, 0, 0, 0, 9]);
        let words = frame[22..].chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
        let sum = words.sum::<u32>() + 32 + 58;
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }
}
