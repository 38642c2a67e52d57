//! A TUN device as smoltcp wants it, with one buffer each way that is used again and again.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

/// The device.
#[derive(Debug)]
pub(super) struct Device {
    tun: File,
    mtu: usize,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Device {
    /// Over a TUN device whose packets have no header.
    pub(super) fn new(tun: OwnedFd, mtu: usize) -> Device {
        Device { tun: File::from(tun), mtu, incoming: vec![0; mtu], outgoing: vec![0; mtu] }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tun.as_fd()
    }
}

impl phy::Device for Device {
    type RxToken<'a> = Incoming<'a>;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        // An error other than that nothing waits means that the device is going away, and the process with it.
        let length = self.tun.read(&mut self.incoming).ok()?;
        let outgoing = Outgoing { tun: &mut self.tun, buffer: &mut self.outgoing };
        Some((Incoming(&self.incoming[..length]), outgoing))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        Some(Outgoing { tun: &mut self.tun, buffer: &mut self.outgoing })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities
    }
}

/// A packet that came.
#[derive(Debug)]
pub(super) struct Incoming<'a>(&'a [u8]);

impl phy::RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, work: F) -> R {
        work(self.0)
    }
}

/// Room for a packet to send.
#[derive(Debug)]
pub(super) struct Outgoing<'a> {
    tun: &'a mut File,
    buffer: &'a mut Vec<u8>,
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, work: F) -> R {
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
        let packet = &mut self.buffer[..length];
        let result = work(packet);
        // A packet that the kernel does not take is lost, as on any link; TCP sends it again.
        let _ = self.tun.write(packet);
        result
    }
}
