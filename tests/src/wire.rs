//! One connection's frames on the client's link, and sending one of them again.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use sys::capture::{Capture, Sieve};
use sys::netlink::Netlink;
use sys::packet::PacketSocket;

use crate::fixture::Fixture;

/// No more data from the sender.
pub const FIN: u8 = 0x01;
/// The sender knows no such connection.
pub const RST: u8 = 0x04;
/// The acknowledgement number counts.
pub const ACK: u8 = 0x10;

/// Ethernet header and an IPv4 header without options: what the kernel and the stack send.
const IP: usize = 14;
const TCP: usize = IP + 20;
/// Longest time an answer may take.
const ANSWER: Duration = Duration::from_secs(5);

/// A view of a connection's frames from here on.
#[derive(Debug)]
pub struct Wire {
    capture: Capture,
    client_port: u16,
    server_port: u16,
}

impl Wire {
    /// Starts looking at the connection between the client's port and the server.
    ///
    /// # Panics
    /// When the link can't be watched.
    #[must_use]
    pub fn open(fixture: &Fixture, client_port: u16, server: SocketAddr) -> Wire {
        let IpAddr::V4(address) = server.ip() else { panic!("{server} is no IPv4 address") };
        let open = || Capture::open(Netlink::open()?.link("eth0")?.index, Sieve::Host(address));
        let capture = fixture.client().run(open).expect("a capture on the client's link");
        Wire { capture, client_port, server_port: server.port() }
    }

    /// The last of the frames that passed so far that `from` sent with this flag.
    #[must_use]
    pub fn last_with(&self, flag: u8, from: SocketAddr) -> Option<Vec<u8>> {
        std::iter::from_fn(|| self.next())
            .filter(|frame| flags(frame) & flag != 0 && port(frame, 0) == from.port())
            .last()
    }

    /// The next frame that `from` sends, waited for.
    #[must_use]
    pub fn next_from(&self, from: SocketAddr) -> Option<Vec<u8>> {
        let deadline = Instant::now() + ANSWER;
        while Instant::now() < deadline {
            match self.next() {
                Some(frame) if port(&frame, 0) == from.port() => return Some(frame),
                Some(_) => {}
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        None
    }

    /// Sends a frame of the client's once more, to the node where the server is now.
    ///
    /// # Panics
    /// When the frame is too short or can't be sent.
    pub fn send_again(&self, fixture: &Fixture, frame: &[u8], node: &str) {
        let node = fixture.lab.namespace(node).expect("the node");
        let address = node.run(|| Ok(Netlink::open()?.link("eth0")?.ethernet)).expect("the node's link");
        let mut frame = frame.to_vec();
        frame[..6].copy_from_slice(&address.expect("an Ethernet address"));
        // The link's offloading left the checksum to be made later, so what was seen has none.
        set_checksum(&mut frame);
        let send = || PacketSocket::open()?.send(Netlink::open()?.link("eth0")?.index, &frame);
        fixture.client().run(send).expect("the frame is sent");
    }

    /// The next frame of the connection that passed already.
    fn next(&self) -> Option<Vec<u8>> {
        let mut buffer = [0; 256];
        loop {
            let length = self.capture.next(&mut buffer).expect("the capture goes on")?;
            let frame = &buffer[..length.min(buffer.len())];
            let ours = [self.client_port, self.server_port];
            if frame.len() >= TCP + 20 && frame[IP + 9] == 6 {
                let ports = [port(frame, 0), port(frame, 2)];
                if ports == ours || ports == [ours[1], ours[0]] {
                    return Some(frame.to_vec());
                }
            }
        }
    }
}

/// The flags of a frame with TCP in it.
#[must_use]
pub fn flags(frame: &[u8]) -> u8 {
    frame[TCP + 13]
}

fn port(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[TCP + at], frame[TCP + at + 1]])
}

/// Writes the right TCP checksum into a frame (RFC 9293, section 3.1).
fn set_checksum(frame: &mut [u8]) {
    let end = IP + usize::from(u16::from_be_bytes([frame[IP + 2], frame[IP + 3]]));
    frame[TCP + 16..TCP + 18].fill(0);
    let length = u16::try_from(end - TCP).expect("an IPv4 packet");
    let mut bytes = frame[IP + 12..IP + 20].to_vec();
    bytes.extend([0, 6]);
    bytes.extend(length.to_be_bytes());
    bytes.extend(&frame[TCP..end]);
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    let mut sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let checksum = !u16::try_from(sum).expect("folded");
    frame[TCP + 16..TCP + 18].copy_from_slice(&checksum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_segment_gets_its_known_checksum() {
        // A SYN of 10.0.0.1:1000 to 10.0.0.2:2000, sequence number 1, window 1024, without options.
        let mut frame = vec![0; IP];
        frame.extend([0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x03, 0xe8, 0x07, 0xd0, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0x04, 0x00, 0xff, 0xff, 0, 0]);
        set_checksum(&mut frame);
        // 0x0a00+0x0001+0x0a00+0x0002+6+20 + 0x03e8+0x07d0+1+0x5002+0x0400, complemented.
        let sum = 0x0a00_u32 + 1 + 0x0a00 + 2 + 6 + 20 + 0x03e8 + 0x07d0 + 1 + 0x5002 + 0x0400;
        let expected = !u16::try_from((sum & 0xffff) + (sum >> 16)).expect("folded");
        assert_eq!(u16::from_be_bytes([frame[TCP + 16], frame[TCP + 17]]), expected);
    }
}
