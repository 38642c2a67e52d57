//! What crosses the border between a stack and its driver: IP packets with their offload marks.
//!
//! The marks mirror `struct virtio_net_hdr`, so that a TUN device opened with `IFF_VNET_HDR` maps onto them one to one.

/// What is known of the checksum of a packet that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Nothing: the stack verifies it.
    Verify,
    /// Verified already, or partial because the packet comes from the local kernel and never crossed a wire.
    Verified,
}

/// What became of a packet that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    /// The stack has taken it in, or dropped it.
    Taken,
    /// It is for this host and whole, but of a protocol that isn't spoken here: it is for the driver to pass on as it is.
    /// Only with [`crate::Config::foreign`].
    Foreign,
}

/// A packet that arrived.
#[derive(Clone, Copy, Debug)]
pub struct RxPacket<'a> {
    /// The whole IP packet, header first.
    pub data: &'a [u8],
    /// Whether the checksums in it must be verified.
    pub checksum: Checksum,
    /// If the packet stands for several that were coalesced: the payload size of each.
    pub gso_size: Option<u16>,
}

/// How a super-packet is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// Payload bytes of each segment (the last may be shorter).
    pub size: u16,
    /// Length of the IP and transport headers that each segment repeats.
    pub header_len: u16,
    /// IPv6 (`VIRTIO_NET_HDR_GSO_TCPV6`) rather than IPv4.
    pub v6: bool,
    /// CWR is set and must be kept on the first segment only (`VIRTIO_NET_HDR_GSO_ECN`).
    pub ecn: bool,
}

/// A checksum left for the device to finish: the checksum field holds the pseudo header's sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// Where the sum starts, from the start of the packet (`csum_start`).
    pub start: u16,
    /// Where the checksum field is, from `start` (`csum_offset`).
    pub offset: u16,
}

/// A packet to send: the header followed by both payload parts. The payload is borrowed from the socket's buffer.
#[derive(Clone, Copy, Debug)]
pub struct TxPacket<'a> {
    /// The IP header and what follows it up to the payload. For small control packets it is the whole packet.
    pub header: &'a [u8],
    /// The payload, in two parts because buffers are rings.
    pub payload: [&'a [u8]; 2],
    /// Set if the packet is to be cut into several.
    pub gso: Option<Gso>,
    /// Set if the transport checksum is left to the device.
    pub checksum: Option<PartialChecksum>,
}

impl TxPacket<'_> {
    /// Length of the whole packet in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.header.len() + self.payload[0].len() + self.payload[1].len()
    }

    /// Whether the packet has no byte at all (it never has none).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The packet as one vector, for tests and for packets that are looped.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut packet = Vec::with_capacity(self.len());
        packet.extend_from_slice(self.header);
        packet.extend_from_slice(self.payload[0]);
        packet.extend_from_slice(self.payload[1]);
        packet
    }
}
