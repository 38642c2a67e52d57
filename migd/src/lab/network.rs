//! The lab's namespaces, links, addresses and settings of the kernel.

use std::os::fd::{AsFd, OwnedFd};
use std::{fs, io};

use anyhow::Context;
use sys::netlink::{Hop, Netlink, Route};
use sys::netns::NetNamespace;
use sys::tun::create_plain_tap;

use super::layout::{Kind, Layout, Member, Names};

const BRIDGE: &str = "br0";
const UPLINK: &str = "eth0";
/// What waits for an emulated link to be read: a whole window, since what is lost there is not the emulation's doing.
const TAP_QUEUE_PACKETS: u32 = 10_000;

/// Settings of a node, as a machine that forwards for its jobs needs them. `send_redirects` is off because a node that
/// relays a stray packet to the job's new node on the same link would otherwise tell the sender to change its route.
const NODE_SETTINGS: [(&str, &str); 6] = [
    ("ipv4/ip_forward", "1"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv6/conf/all/forwarding", "1"),
];

/// Settings of a node's uplink. Without a delay of zero the kernel waits up to 0.8 s before it answers for a proxy entry.
const UPLINK_SETTINGS: [(&str, &str); 5] = [
    ("ipv4/conf/eth0/send_redirects", "0"),
    ("ipv4/conf/eth0/rp_filter", "0"),
    ("ipv4/neigh/eth0/proxy_delay", "0"),
    ("ipv6/neigh/eth0/proxy_delay", "0"),
    ("ipv6/conf/eth0/proxy_ndp", "1"),
];

/// Makes all of the lab's namespaces and joins them.
pub(super) fn build(names: &Names, layout: &Layout) -> anyhow::Result<()> {
    let switch = NetNamespace::create_named(&layout.switch)
        .with_context(|| format!("can't make the namespace {} (this needs root)", layout.switch))?;
    switch.run(make_bridge).context("can't make the switch")?;
    for member in layout.members() {
        let namespace = NetNamespace::create_named(&names.namespace(&member.name))
            .with_context(|| format!("can't make the namespace {}", member.namespace))?;
        switch
            .run(|| plug_in(member, &namespace))
            .with_context(|| format!("can't join {} to the switch", member.name))?;
        namespace
            .run(|| configure(member, layout))
            .with_context(|| format!("can't set up the network of {}", member.name))?;
    }
    Ok(())
}

/// Inside the switch: the bridge.
fn make_bridge() -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    netlink.add_bridge(BRIDGE)?;
    let bridge = netlink.link(BRIDGE)?.index;
    netlink.set_up(bridge, None, None)
}

/// Inside the switch: a port on the bridge whose other end is the member's uplink.
fn plug_in(member: &Member, namespace: &NetNamespace) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    netlink.add_veth(&member.name, UPLINK, namespace.as_fd())?;
    let port = netlink.link(&member.name)?.index;
    let bridge = netlink.link(BRIDGE)?.index;
    netlink.set_master(port, bridge)?;
    netlink.set_up(port, None, None)
}

/// Puts a TAP device in the place of a member's uplink, and one in that of its port on the switch. Returns the member's
/// and the switch's.
pub(super) fn replace_uplink(names: &Names, layout: &Layout, member: &Member) -> anyhow::Result<(OwnedFd, OwnedFd)> {
    let switch = NetNamespace::open_named(&layout.switch)?;
    let far = switch.run(|| {
        let mut netlink = Netlink::open()?;
        let port = netlink.link(&member.name)?.index;
        netlink.delete_link(port)?;
        let far = create_plain_tap(&member.name)?;
        let port = netlink.link(&member.name)?.index;
        let bridge = netlink.link(BRIDGE)?.index;
        netlink.set_master(port, bridge)?;
        netlink.set_up(port, None, Some(TAP_QUEUE_PACKETS))?;
        Ok(far)
    })?;
    let namespace = NetNamespace::open_named(&names.namespace(&member.name))?;
    let near = namespace.run(|| {
        let near = create_plain_tap(UPLINK)?;
        let mut netlink = Netlink::open()?;
        let uplink = netlink.link(UPLINK)?.index;
        netlink.set_up(uplink, None, Some(TAP_QUEUE_PACKETS))?;
        configure(member, layout)?;
        Ok(near)
    })?;
    Ok((near, far))
}

/// Inside the member.
fn configure(member: &Member, layout: &Layout) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let loopback = netlink.link("lo")?.index;
    netlink.set_up(loopback, None, None)?;
    if member.kind == Kind::Node {
        // Before the uplink is up, so that no packet sees a half-configured node.
        set_all(&NODE_SETTINGS)?;
        set_all(&UPLINK_SETTINGS)?;
    }
    let uplink = netlink.link(UPLINK)?.index;
    // Addresses made by the kernel itself can be used at once, too.
    set_all(&[("ipv6/conf/eth0/accept_dad", "0")])?;
    netlink.add_address(uplink, member.address.into(), Layout::SUBNET_LENGTH)?;
    netlink.set_up(uplink, None, None)?;
    if member.kind == Kind::Client {
        // On-link: a client asks the wire who has a job's address, as a machine in the job's subnet would.
        let (destination, prefix_length) = layout.parsed_prefix().map_err(io::Error::other)?;
        let route = Route { destination: destination.into(), prefix_length, metric: 0 };
        netlink.replace_route(route, Hop::Device(uplink))?;
    }
    if fs::exists("/proc/sys/net/ipv6")? {
        netlink.add_address(uplink, member.address6.into(), Layout::SUBNET6_LENGTH)?;
        if member.kind == Kind::Client {
            let (destination, prefix_length) = (layout.prefix6.addr().into(), layout.prefix6.prefix_len());
            netlink.replace_route(Route { destination, prefix_length, metric: 0 }, Hop::Device(uplink))?;
        }
    }
    Ok(())
}

/// Writes settings of the calling thread's network namespace. A kernel without IPv6 lacks those of IPv6.
fn set_all(settings: &[(&str, &str)]) -> io::Result<()> {
    for (name, value) in settings {
        let path = format!("/proc/sys/net/{name}");
        match fs::write(&path, value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && name.starts_with("ipv6/") => {}
            Err(error) => return Err(io::Error::new(error.kind(), format!("{path}: {error}"))),
            Ok(()) => {}
        }
    }
    Ok(())
}
