//! The network around a job: its TUN device, the routes that lead to it, and the announcements on the wire.
//!
//! A node attracts a job's packets by two things: a route to the address out of the job's TUN device, and a proxy
//! neighbour entry on each uplink, by which the kernel answers ARP for the address. The TUN device and with it its route
//! vanish when the shim dies, however it dies; the proxy entries then answer nothing any more (the kernel answers only
//! for what it routes elsewhere than out of the uplink) until the daemon removes them ([`clean_up`]).
//!
//! Routes come in two metrics. The shim's own has [`OWN_METRIC`] and is preferred for as long as it exists; the route to
//! the owner's node, kept by the daemon as the directory says, has [`FOLLOW_METRIC`]. So neither overwrites the other's,
//! and in the moment of a commit there is always one that is right.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::path::Path;

use sys::netlink::{Hop, Link, Netlink, Route};
use sys::packet::PacketSocket;
use sys::tun::Tun;

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
    address: Ipv4Addr,
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
    pub fn create(address: Ipv4Addr, uplinks: &[String]) -> Result<(Links, OwnedFd), LinkError> {
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
        set_sysctl(&format!("ipv6/conf/{name}/disable_ipv6"), "1");
        let link = context(netlink.link(&name), || format!("can't find {name}"))?;
        context(netlink.set_up(link.index, Some(mtu), Some(QUEUE_PACKETS)), || format!("can't bring {name} up"))?;
        prepare_node(uplinks);
        Ok((Links { address, tun: link, mtu, uplinks: found, netlink, packets }, tun.into()))
    }

    /// The longest packet of the job, in bytes.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// The name of the TUN device.
    pub fn device(&self) -> &str {
        &self.tun.name
    }

    /// Routes the job's address to its TUN device.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attract(&mut self) -> Result<(), LinkError> {
        let route = Route::host(self.address.into(), OWN_METRIC);
        context(self.netlink.replace_route(route, Hop::Device(self.tun.index)), || {
            format!("can't route {} to {}", self.address, self.tun.name)
        })
    }

    /// Undoes [`Links::attract`].
    pub fn release(&mut self) {
        let route = Route::host(self.address.into(), OWN_METRIC);
        if let Err(error) = self.netlink.delete_route(route) {
            tracing::warn!(address = %self.address, %error, "can't remove the job's route");
        }
    }

    /// Tells the networks of the uplinks that the address is here, and answers for it from now on.
    ///
    /// Nothing here can fail the job: it runs already, or is about to. What the kernel refuses is logged.
    pub fn announce(&mut self) {
        for link in &self.uplinks {
            if let Err(error) = self.netlink.add_proxy(link.index, self.address.into()) {
                tracing::warn!(address = %self.address, uplink = link.name, %error, "can't answer ARP for the job");
            }
        }
        self.repeat_announcement();
    }

    /// Sends the announcement once more, for those that missed it.
    pub fn repeat_announcement(&self) {
        for link in &self.uplinks {
            let Some(mac) = link.ethernet else { continue };
            // Some systems heed requests only, some replies only (RFC 5227, section 3).
            for operation in [ARP_REQUEST, ARP_REPLY] {
                if let Err(error) = self.packets.send(link.index, &gratuitous_arp(mac, self.address, operation)) {
                    tracing::warn!(address = %self.address, uplink = link.name, %error, "can't announce the job");
                }
            }
        }
    }

    /// After the commit at the source: packets that still come here go on to the job's new node.
    pub fn hand_over(&mut self, via: IpAddr) {
        let address = IpAddr::from(self.address);
        // Before the own route goes, so that no packet finds neither.
        if let Err(error) = self.netlink.replace_route(Route::host(address, FOLLOW_METRIC), Hop::Gateway(via)) {
            tracing::warn!(%address, %via, %error, "can't forward to the job's new node");
        }
        self.release();
        self.stop_answering();
    }

    /// Ends what [`Links::attract`] and [`Links::announce`] did. The TUN device ends with its descriptor.
    pub fn withdraw(&mut self) {
        self.stop_answering();
        self.release();
    }

    fn stop_answering(&mut self) {
        for link in &self.uplinks {
            if let Err(error) = self.netlink.delete_proxy(link.index, self.address.into()) {
                tracing::warn!(address = %self.address, uplink = link.name, %error, "can't remove the proxy entry");
            }
        }
    }
}

/// For the daemon: removes what a shim that was killed left behind for `address`.
///
/// # Errors
/// When the kernel can't be asked.
pub fn clean_up(address: Ipv4Addr, uplinks: &[String]) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    for link in netlink.links()?.into_iter().filter(|link| uplinks.contains(&link.name)) {
        netlink.delete_proxy(link.index, address.into())?;
    }
    netlink.delete_route(Route::host(address.into(), OWN_METRIC))
}

/// For the daemon: routes a job that runs on another node via that node. Harmless while the job still runs here.
///
/// # Errors
/// When the kernel refuses; ENETUNREACH when `via` is no neighbour.
pub fn follow(address: Ipv4Addr, via: IpAddr) -> io::Result<()> {
    Netlink::open()?.replace_route(Route::host(address.into(), FOLLOW_METRIC), Hop::Gateway(via))
}

/// For the daemon: ends [`follow`].
///
/// # Errors
/// When the kernel can't be asked.
pub fn unfollow(address: Ipv4Addr) -> io::Result<()> {
    Netlink::open()?.delete_route(Route::host(address.into(), FOLLOW_METRIC))
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

/// RFC 5227: the sender's and the target's protocol address are both the address announced.
fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr, operation: u8) -> [u8; 42] {
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
}
