//! Raw frames out of a network device, for what no routing table sends: gratuitous ARP and neighbour advertisements.
//!
//! man 7 packet. The socket receives nothing (protocol 0), so it costs nothing while it is open.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::outcome::{counted, owned};

/// A packet socket that only sends, in the network namespace in which it was opened.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Opens the socket.
    ///
    /// # Errors
    /// As socket(2); EPERM without CAP_NET_RAW.
    pub fn open() -> io::Result<PacketSocket> {
        // SAFETY: no pointer is passed.
        owned(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) }).map(PacketSocket)
    }

    /// Sends one whole Ethernet frame out of the device with index `link`.
    ///
    /// # Errors
    /// As sendto(2); ENETDOWN when the device is down.
    pub fn send(&self, link: u32, frame: &[u8]) -> io::Result<()> {
        // SAFETY: an all-zero `sockaddr_ll` is a valid one.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = i32::try_from(link).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // sizeof(sockaddr_ll) is 20.
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: both buffers are readable for the lengths given and outlive the call.
        let sent = unsafe {
            libc::sendto(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, (&raw const address).cast(), length)
        };
        counted(sent).map(drop)
    }
}
