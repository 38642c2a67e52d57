//! The wire between the job's `eth0` and the TUN device: what isn't TCP.
//!
//! A job's TCP sockets are the stack's. Its datagram sockets are the kernel's, in the job's own namespace, and so behave in every
//! respect as Linux's do, with no call of theirs trapped. Their packets, and those of whatever else the job's kernel has to
//! say (ICMP errors), leave through `eth0` and go out as they are; those that arrive and aren't the stack's go the other way.
//! The kernel that answers here is the one of the job's namespace: it sees a packet only while the plane runs, and moves with
//! nothing but the sockets, which travel with their queues (`checkpoint`).
//!
//! Only packets from the job's own addresses to one host pass. Multicast and broadcast stay within the job: the cluster's addresses are routed,
//! and no node forwards those.

use std::io::{self, ErrorKind, IoSlice};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use sys::tun::{self, ETHERNET_LEN, HEADER_LEN, Tap};

use super::capture::{Direction, Recorder};

/// Packets passed on in one go.
const PACKETS_A_ROUND: usize = 64;
/// Longest frame with the header before it.
const BUFFER_LEN: usize = HEADER_LEN + ETHERNET_LEN + 65_536;

const ETHERTYPE_V4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_V6: [u8; 2] = [0x86, 0xdd];
const TCP: u8 = 6;

/// The header of a packet with nothing left to be done to it.
pub(super) const WHOLE: [u8; HEADER_LEN] = [0; HEADER_LEN];

/// How much to pass on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Amount {
    /// As much as one round allows.
    ARound,
    /// Everything that is there.
    Everything,
}

/// Where the job's packets go.
pub(super) type Outlet<'a> = dyn FnMut(&[u8; HEADER_LEN], &[u8]) -> io::Result<()> + 'a;

/// The plane's end of the job's `eth0`.
pub(super) struct Wire {
    device: Tap,
    addresses: Vec<IpAddr>,
    hardware_address: [u8; 6],
    buffer: Box<[u8]>,
    /// Frames may wait.
    pub(super) readable: bool,
    refused: u64,
    stray: u64,
}

impl Wire {
    pub(super) fn new(device: OwnedFd, addresses: Vec<IpAddr>) -> io::Result<Wire> {
        let device = Tap::from(device);
        let hardware_address = device.hardware_address()?;
        let buffer = vec![0; BUFFER_LEN].into_boxed_slice();
        Ok(Wire { device, addresses, hardware_address, buffer, readable: true, refused: 0, stray: 0 })
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Passes on what the job has sent, each packet with the header of a TUN device before it.
    pub(super) fn send_outward(&mut self, amount: Amount, recorder: &mut Recorder, send: &mut Outlet<'_>) {
        match amount {
            Amount::ARound => {
                for _ in 0..PACKETS_A_ROUND {
                    if !self.readable {
                        return;
                    }
                    self.send_next(recorder, send);
                }
            }
            Amount::Everything => {
                self.readable = true;
                while self.readable {
                    self.send_next(recorder, send);
                }
            }
        }
    }

    fn send_next(&mut self, recorder: &mut Recorder, send: &mut Outlet<'_>) {
        let length = match self.device.receive(&mut self.buffer) {
            Ok(length) => length,
            Err(error) => {
                self.readable = false;
                if error.kind() != ErrorKind::WouldBlock {
                    tracing::warn!(%error, "can't read the job's eth0");
                }
                return;
            }
        };
        let Some(frame) = self.buffer.get(..length) else { return };
        let Some((header, frame)) = frame.split_first_chunk::<HEADER_LEN>() else { return };
        let Some(packet) = frame.get(ETHERNET_LEN..) else { return };
        if !may_leave(packet, &self.addresses) {
            self.stray += 1;
            tracing::debug!(count = self.stray, "a packet that only the job's own host could take stays in the job");
            return;
        }
        if recorder.is_on() {
            recorder.packet(Direction::Out, &[packet]);
        }
        let mut header = *header;
        tun::shift(&mut header, -(ETHERNET_LEN as isize));
        let sent = send(&header, packet);
        self.note(sent);
    }

    /// Hands the job a packet that arrived, with the header that the TUN device put before it.
    pub(super) fn receive(&mut self, header: &[u8; HEADER_LEN], packet: &[u8]) {
        let kind = match packet.first().map(|first| first >> 4) {
            Some(4) => ETHERTYPE_V4,
            Some(6) => ETHERTYPE_V6,
            _ => return,
        };
        let mut header = *header;
        tun::shift(&mut header, ETHERNET_LEN as isize);
        let mut ethernet = [0; ETHERNET_LEN];
        ethernet[..6].copy_from_slice(&self.hardware_address);
        // Some neighbour; nobody ever sends to it by name.
        ethernet[6] = 0x02;
        ethernet[12..].copy_from_slice(&kind);
        let sent = self.device.send(&[IoSlice::new(&header), IoSlice::new(&ethernet), IoSlice::new(packet)]);
        self.note(sent);
    }

    /// A packet that the kernel refuses is a lost packet; it must only not go unnoticed.
    fn note(&mut self, sent: io::Result<()>) {
        if let Err(error) = sent {
            self.refused += 1;
            if self.refused.is_power_of_two() {
                tracing::warn!(%error, count = self.refused, "the kernel refuses packets to or from the job's eth0");
            }
        }
    }
}

/// Whether a packet comes from the job and goes to one host. TCP never comes from the job's kernel, which has no such sockets.
fn may_leave(packet: &[u8], addresses: &[IpAddr]) -> bool {
    let address = |at: usize, v6: bool| -> Option<IpAddr> {
        Some(if v6 {
            <[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into()
        } else {
            <[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into()
        })
    };
    let (protocol, source, destination) = match packet.first().map(|first| first >> 4) {
        Some(4) => (packet.get(9), address(12, false), address(16, false)),
        Some(6) => (packet.get(6), address(8, true), address(24, true)),
        _ => return false,
    };
    let (Some(&protocol), Some(source), Some(destination)) = (protocol, source, destination) else {
        return false;
    };
    let to_one = match destination {
        IpAddr::V4(to) => !to.is_multicast() && !to.is_broadcast() && !to.is_unspecified(),
        IpAddr::V6(to) => !to.is_multicast() && !to.is_unicast_link_local() && !to.is_unspecified(),
    };
    protocol != TCP && addresses.contains(&source) && to_one && !destination.is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(source: [u8; 4], destination: [u8; 4], protocol: u8) -> Vec<u8> {
        let mut packet = vec![0; 28];
        packet[0] = 0x45;
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&source);
        packet[16..20].copy_from_slice(&destination);
        packet
    }

    #[test]
    fn only_the_jobs_own_packets_to_one_host_leave() {
        let own: Vec<IpAddr> = vec!["10.77.0.5".parse().unwrap(), "fd77::5".parse().unwrap()];
        let (mine, other) = ([10, 77, 0, 5], [10, 77, 0, 6]);
        for (packet, leaves) in [
            (v4(mine, other, 17), true),
            (v4(mine, other, 1), true),
            (v4(mine, other, TCP), false),
            (v4(other, mine, 17), false),
            (v4(mine, [224, 0, 0, 1], 17), false),
            (v4(mine, [255; 4], 17), false),
            (v4(mine, [127, 0, 0, 1], 17), false),
            (v4(mine, other, 17)[..15].to_vec(), false),
            (Vec::new(), false),
        ] {
            assert_eq!(may_leave(&packet, &own), leaves, "{packet:?}");
        }
        let mut v6 = vec![0; 48];
        v6[0] = 0x60;
        v6[6] = 17;
        v6[8] = 0xfd;
        v6[9] = 0x77;
        v6[23] = 5;
        v6[24] = 0xfd;
        assert!(may_leave(&v6, &own));
        v6[24] = 0xff;
        assert!(!may_leave(&v6, &own));
    }
}
