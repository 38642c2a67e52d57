//! The devices that a job sees in its own namespace.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use sys::netlink::{Hop, Netlink, Route};
use sys::tun::Tap;

use super::plane::NetError;

/// Packets of the job that may wait for the net thread; so many datagrams may a program send in one go.
const QUEUE_PACKETS: u32 = 5000;
/// How long the kernel may take over an IPv6 address.
const PATIENCE: Duration = Duration::from_secs(10);

/// Furnishes a job's network namespace: `lo`, and an `eth0` with the job's addresses and the default routes. The net plane holds
/// its other end ([`super::NetConfig::eth0`]): everything but the job's TCP passes through it. It lives as long as the descriptor.
///
/// The interface looks the same wherever the job runs, down to its hardware address.
///
/// # Errors
/// When the kernel refuses a step, which is named.
pub fn furnish_namespace(namespace: BorrowedFd<'_>, addresses: &[(IpAddr, u8)], mtu: u32) -> Result<OwnedFd, NetError> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            sys::netns::enter(namespace).map_err(NetError::io("enter the job's network namespace"))?;
            furnish(addresses, mtu)
        });
        thread.join().expect("nothing in the thread panics")
    })
}

fn furnish(addresses: &[(IpAddr, u8)], mtu: u32) -> Result<OwnedFd, NetError> {
    let failed = NetError::io;
    let mut netlink = Netlink::open().map_err(failed("open an rtnetlink socket in the job"))?;
    let lo = netlink.link("lo").map_err(failed("find the job's lo"))?;
    netlink.set_up(lo.index, None, None).map_err(failed("bring the job's lo up"))?;
    let tap = Tap::create("eth0", hardware_address(addresses)).map_err(failed("make the job's eth0"))?;
    let eth0 = netlink.link("eth0").map_err(failed("find the job's eth0"))?;
    netlink.set_no_neighbours(eth0.index).map_err(failed("switch ARP off on the job's eth0"))?;
    let has_v6 = addresses.iter().any(|(address, _)| address.is_ipv6());
    if has_v6 {
        // The cluster's address and no other: nothing is announced, asked for or made up.
        for (name, value) in [("addr_gen_mode", "1"), ("accept_ra", "0"), ("router_solicitations", "0")] {
            set_ipv6(name, value).map_err(failed("set up IPv6 on the job's eth0"))?;
        }
    } else {
        // A kernel without IPv6 has nothing to switch off.
        let _ = set_ipv6("disable_ipv6", "1");
    }
    netlink.set_up(eth0.index, Some(mtu), Some(QUEUE_PACKETS)).map_err(failed("bring the job's eth0 up"))?;
    for &(address, prefix_length) in addresses {
        netlink.add_address(eth0.index, address, prefix_length).map_err(failed("give the job's eth0 its address"))?;
        let any = match address {
            IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        };
        let default = Route { destination: any, prefix_length: 0, metric: 0 };
        netlink.replace_route(default, Hop::Device(eth0.index)).map_err(failed("set the job's default route"))?;
        if address.is_ipv6() {
            wait_until_usable(address).map_err(failed("take the job's IPv6 address into use"))?;
        }
    }
    Ok(tap.into())
}

/// The kernel takes an IPv6 address into use in a worker of its own, also when it need not look for duplicates. The job's program
/// shall be able to bind it from the start.
fn wait_until_usable(address: IpAddr) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        match UdpSocket::bind((address, 0)) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::AddrNotAvailable || Instant::now() > until => {
                return Err(error);
            }
            Err(_) => std::thread::sleep(Duration::from_micros(100)),
        }
    }
}

fn set_ipv6(name: &str, value: &str) -> io::Result<()> {
    std::fs::write(Path::new("/proc/sys/net/ipv6/conf/eth0").join(name), value)
}

/// A locally administered address made of the job's own.
fn hardware_address(addresses: &[(IpAddr, u8)]) -> [u8; 6] {
    let octets = match addresses.first() {
        Some((IpAddr::V4(address), _)) => address.octets(),
        Some((IpAddr::V6(address), _)) => {
            let octets = address.octets();
            [octets[12], octets[13], octets[14], octets[15]]
        }
        None => [0; 4],
    };
    [0x02, 0x6d, octets[0], octets[1], octets[2], octets[3]]
}
