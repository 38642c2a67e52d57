//! What a net plane is told.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use super::capture::Site;

/// Parameters of a job's net plane.
#[derive(Debug)]
pub struct NetConfig {
    /// The job's own addresses, the preferred one of each family first.
    pub addresses: Vec<IpAddr>,
    /// Largest packet of the TUN device, in bytes.
    pub mtu: usize,
    /// The job's network namespace. The programs' sockets are made there, so that what they ask of interfaces is
    /// answered from there. Without it they belong to the namespace of the thread that starts the plane.
    pub namespace: Option<OwnedFd>,
    /// A process in the job's PID namespace (its init), in the shim's numbering. With it the plane finds the program's end
    /// of a socket whose descriptor it has never seen in a call, which freezing needs once programs passed
    /// descriptors on or after a thaw.
    pub init_pid: Option<i32>,
    /// The device in the job's namespace through which everything but TCP goes ([`super::furnish_namespace`]). Without it datagrams reach
    /// nobody beyond the job.
    pub eth0: Option<OwnedFd>,
    /// What a recording of the job's packets says of where they were taken.
    pub site: Site,
}

impl Default for NetConfig {
    fn default() -> Self {
        NetConfig {
            addresses: Vec::new(),
            mtu: 1500,
            namespace: None,
            init_pid: None,
            eth0: None,
            site: Site::default(),
        }
    }
}

impl NetConfig {
    pub(super) fn stack_config(&self) -> netstack::Config {
        netstack::Config {
            addresses: self.addresses.clone(),
            mtu: self.mtu,
            offload: netstack::Offload::FULL,
            foreign: self.eth0.is_some(),
            ..netstack::Config::default()
        }
    }
}
