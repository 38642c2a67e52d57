//! What a daemon does to its machine: starting shims and setting routes. Behind a trait, so that tests can run several
//! daemons in one process without touching the machine.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::process::Stdio;

use tokio::process::Command;

use crate::api::JobPaths;
use crate::shim::links;

/// Completes when a shim has ended.
pub type ShimEnd = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The machine under a daemon.
pub trait Machine: Send + Sync + 'static {
    /// Starts a shim for the job in this directory, which serves `listener`.
    ///
    /// # Errors
    /// When it can't be executed.
    fn start_shim(&self, job: &JobPaths, listener: UnixListener) -> io::Result<ShimEnd>;

    /// Routes an address via another node, unless the job is here.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn follow(&self, address: IpAddr, via: IpAddr) -> io::Result<()>;

    /// Ends [`Machine::follow`].
    ///
    /// # Errors
    /// When the kernel refuses.
    fn unfollow(&self, address: IpAddr) -> io::Result<()>;

    /// The addresses that are followed at present, also by a former daemon.
    fn followed(&self) -> Vec<IpAddr>;

    /// Removes what a shim that died left behind.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn clean_up(&self, addresses: &[IpAddr], uplinks: &[String]) -> io::Result<()>;
}

/// This machine.
#[derive(Debug, Clone, Copy)]
pub struct Linux;

impl Machine for Linux {
    /// The shim gets its listening socket as standard input, makes a session of its own, and outlives the daemon.
    fn start_shim(&self, job: &JobPaths, listener: UnixListener) -> io::Result<ShimEnd> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(job.shim_log())?;
        // The very program that runs here, even if the file was replaced since: both must speak the same protocol.
        let mut shim = Command::new("/proc/self/exe")
            .arg0("migd")
            .arg("shim")
            .arg("--dir")
            .arg(job.root())
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .kill_on_drop(false)
            .spawn()?;
        Ok(Box::pin(async move {
            // Takes the exit status, so that no zombie stays.
            match shim.wait().await {
                Ok(status) => tracing::debug!(%status, "a shim ended"),
                Err(error) => tracing::warn!(%error, "can't wait for a shim"),
            }
        }))
    }

    fn follow(&self, address: IpAddr, via: IpAddr) -> io::Result<()> {
        links::follow(address, via)
    }

    fn unfollow(&self, address: IpAddr) -> io::Result<()> {
        links::unfollow(address)
    }

    fn followed(&self) -> Vec<IpAddr> {
        let v4 = std::fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
        let v6 = std::fs::read_to_string("/proc/thread-self/net/ipv6_route").unwrap_or_default();
        let v4 = followed_in(&v4).map(IpAddr::V4);
        v4.chain(followed6_in(&v6).map(IpAddr::V6)).collect()
    }

    fn clean_up(&self, addresses: &[IpAddr], uplinks: &[String]) -> io::Result<()> {
        links::clean_up(addresses, uplinks)
    }
}

/// Addresses with host routes at our metric in the format of proc_net_route: numbers in hexadecimal, addresses as the
/// machine's words.
fn followed_in(table: &str) -> impl Iterator<Item = Ipv4Addr> {
    table.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let destination = u32::from_str_radix(fields.get(1)?, 16).ok()?;
        let metric: u32 = fields.get(6)?.parse().ok()?;
        let mask = *fields.get(7)?;
        let ours = mask.eq_ignore_ascii_case("FFFFFFFF") && metric == links::FOLLOW_METRIC;
        ours.then(|| Ipv4Addr::from(destination.to_ne_bytes()))
    })
}

/// The same in the format of ipv6_route: destination and its length, source and its length, next hop, metric, all in
/// hexadecimal.
fn followed6_in(table: &str) -> impl Iterator<Item = Ipv6Addr> {
    table.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let destination = u128::from_str_radix(fields.first()?, 16).ok()?;
        let length = u8::from_str_radix(fields.get(1)?, 16).ok()?;
        let metric = u32::from_str_radix(fields.get(5)?, 16).ok()?;
        (length == 128 && metric == links::FOLLOW_METRIC).then(|| Ipv6Addr::from(destination))
    })
}

/// Whether there is a network device of this name.
///
/// # Errors
/// As rtnetlink's.
pub fn has_device(name: &str) -> io::Result<bool> {
    Ok(sys::netlink::Netlink::open()?.links()?.iter().any(|link| link.name == name))
}

/// The addresses by which others on the network of these devices reach this machine, as the kernel lists them: of the IPv6
/// ones, those that are global and stay.
pub fn global_addresses6(uplinks: &[String]) -> Vec<Ipv6Addr> {
    let table = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    global_in(&table, uplinks)
}

/// Out of the format of if_inet6: address, index, length, scope, flags (all hexadecimal) and device.
fn global_in(table: &str, uplinks: &[String]) -> Vec<Ipv6Addr> {
    /// linux/if_addr.h: IFA_F_TEMPORARY, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE.
    const PASSING: u8 = 0x01 | 0x08 | 0x20 | 0x40;
    let address = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let bits = u128::from_str_radix(fields.first()?, 16).ok()?;
        let scope = u8::from_str_radix(fields.get(3)?, 16).ok()?;
        let flags = u8::from_str_radix(fields.get(4)?, 16).ok()?;
        let here = uplinks.iter().any(|uplink| Some(&uplink.as_str()) == fields.get(5));
        (here && scope == 0 && flags & PASSING == 0).then(|| Ipv6Addr::from(bits))
    };
    table.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_host_routes_of_our_metric_are_ours() {
        let [a, b, c] = [[10, 77, 0, 5], [10, 77, 0, 6], [10, 77, 0, 0]].map(u32::from_ne_bytes);
        let table = format!(
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
             eth0\t{a:08X}\t0263630A\t0007\t0\t0\t100\tFFFFFFFF\t0\t0\t0\n\
             mig0\t{b:08X}\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n\
             eth0\t{c:08X}\t00000000\t0001\t0\t0\t100\t0000FFFF\t0\t0\t0\nnonsense\n"
        );
        assert_eq!(followed_in(&table).collect::<Vec<_>>(), [Ipv4Addr::new(10, 77, 0, 5)]);
    }

    #[test]
    fn the_same_of_ipv6() {
        let table = "\
fd770000000000000000000000000005 80 00000000000000000000000000000000 00 fd990000000000000000000000000002 00000064 0 0 3 eth0
fd770000000000000000000000000006 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000032 0 0 1 mig0
fd770000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000064 0 0 1 eth0
nonsense";
        assert_eq!(followed6_in(table).collect::<Vec<_>>(), ["fd77::5".parse::<Ipv6Addr>().unwrap()]);
    }

    #[test]
    fn a_nodes_lasting_global_addresses_are_found() {
        let table = "\
00000000000000000000000000000001 01 80 10 80       lo
fd990000000000000000000000000001 02 40 00 80     eth0
fd990000000000000000000000000007 02 40 00 01     eth0
fd980000000000000000000000000001 03 40 00 80     eth1
fe80000000000000c0ffeefffe000001 02 40 20 80     eth0";
        assert_eq!(global_in(table, &["eth0".into()]), ["fd99::1".parse::<Ipv6Addr>().unwrap()]);
    }
}
