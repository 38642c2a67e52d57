//! smoltcp's own TCP as a contender: a server on its sockets over a TUN device, started by the benchmarks.
//!
//! What is done to let it show what it can: buffers of 4 MiB each way for streams, no congestion control (the lab loses
//! nothing), the largest assembler it offers, no allocation per packet (its own `TunTapInterface` makes a vector for each),
//! packets taken and sent in batches, the received bytes looked at in place, an optimised build. What it can't have: it knows no
//! segmentation offload, so each packet through the TUN is one of the link's MTU, and it does the checksums itself.

mod device;
mod server;

use std::net::{IpAddr, Ipv4Addr};
use std::process::ExitCode;

use anyhow::Context;
use sys::netlink::{Hop, Netlink, Route};

use device::Device;

/// Name of the TUN device.
const DEVICE: &str = "smoltcp0";
/// Uplink on which the address is answered for.
const UPLINK: &str = "eth0";
/// Packets that wait in the TUN; as many as with migd's.
const QUEUE_PACKETS: u32 = 5000;

/// Serves on `address` until it is killed: the peer's protocol on its port, and HTTP on the web server's.
pub(super) fn main(address: Ipv4Addr) -> anyhow::Result<ExitCode> {
    let device = make_device(address).with_context(|| format!("can't make a TUN device for {address}"))?;
    server::serve(device, address)?;
    Ok(ExitCode::SUCCESS)
}

fn make_device(address: Ipv4Addr) -> std::io::Result<Device> {
    let mut netlink = Netlink::open()?;
    let uplink = netlink.link(UPLINK)?;
    let tun = sys::tun::create_plain(DEVICE)?;
    let index = netlink.link(DEVICE)?.index;
    netlink.set_up(index, Some(uplink.mtu), Some(QUEUE_PACKETS))?;
    let address = IpAddr::V4(address);
    netlink.replace_route(Route::host(address, 0), Hop::Device(index))?;
    netlink.add_proxy(uplink.index, address)?;
    Ok(Device::new(tun, usize::try_from(uplink.mtu).unwrap_or(1500)))
}
