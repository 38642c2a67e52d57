//! TCP segments, read and written through smoltcp's packet view.
//!
//! Options are walked here, since smoltcp's walker knows three SACK blocks only, and one malformed option must not hide
//! those before it (Linux stops at it and keeps what it has).

use std::net::IpAddr;

use smoltcp::wire::{TcpPacket, TcpSeqNumber};

use crate::ip;

/// Longest TCP header: 15 words.
pub(crate) const HEADER_MAX: usize = 60;

/// The control bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags(u8);

impl Flags {
    pub(crate) const NONE: Flags = Flags(0);
    pub(crate) const FIN: Flags = Flags(0x01);
    pub(crate) const SYN: Flags = Flags(0x02);
    pub(crate) const RST: Flags = Flags(0x04);
    pub(crate) const PSH: Flags = Flags(0x08);
    pub(crate) const ACK: Flags = Flags(0x10);
    pub(crate) const URG: Flags = Flags(0x20);
    pub(crate) const ECE: Flags = Flags(0x40);
    pub(crate) const CWR: Flags = Flags(0x80);

    pub(crate) const fn has(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    pub(crate) const fn with(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }

    /// `other` added if `condition` holds.
    pub(crate) const fn with_if(self, condition: bool, other: Flags) -> Flags {
        if condition { self.with(other) } else { self }
    }
}

/// Up to four SACK blocks, as on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SackBlocks {
    blocks: [(u32, u32); 4],
    len: u8,
}

impl SackBlocks {
    /// Adds a block; beyond four it is ignored.
    pub(crate) fn push(&mut self, left: u32, right: u32) {
        if let Some(slot) = self.blocks.get_mut(usize::from(self.len)) {
            *slot = (left, right);
            self.len += 1;
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.blocks.iter().take(usize::from(self.len)).copied()
    }

    pub(crate) const fn len(&self) -> usize {
        self.len as usize
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// The options of a segment that arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) mss: Option<u16>,
    pub(crate) window_scale: Option<u8>,
    pub(crate) sack_permitted: bool,
    /// Value and echo.
    pub(crate) timestamps: Option<(u32, u32)>,
    pub(crate) sack: SackBlocks,
}

impl Options {
    fn parse(mut bytes: &[u8]) -> Options {
        let mut options = Options::default();
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
        //# A given TCP implementation can support any currently defined options, but the following options MUST be
        //# supported (MUST-4 --note Maximum Segment Size Option support is also part of MUST-14 in Section 3.7.1):
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
        //# A TCP implementation MUST be able to receive a TCP Option in any segment (MUST-5).
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.2
        //# There is no guarantee that senders will use this option, so receivers MUST be prepared to process options
        //# even if they do not begin on a word boundary (MUST-64).
        while let Some((&kind, rest)) = bytes.split_first() {
            match kind {
                0 => break,
                1 => {
                    bytes = rest;
                    continue;
                }
                _ => {}
            }
            let Some(len) = rest.first().map(|&len| usize::from(len)) else {
                break;
            };
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
            //# TCP implementations MUST be prepared to handle an illegal option length (e.g., zero); a suggested
            //# procedure is to reset the connection and log the error cause (MUST-7).
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
            //# All TCP Options except End of Option List Option (EOL) and No-Operation (NOP) MUST have length fields,
            //# including all future options (MUST-68).
            let Some(body) = bytes.get(2..len) else { break };
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
            //# A TCP implementation MUST (MUST-6) ignore without error any TCP Option it does not implement, assuming
            //# that the option has a length field.
            match (kind, body.len()) {
                // As Linux has it, a segment size of nothing is none at all.
                (2, 2) => options.mss = Some(u16::from_be_bytes([body[0], body[1]])).filter(|&mss| mss > 0),
                (3, 1) => options.window_scale = Some(body[0]),
                (4, 0) => options.sack_permitted = true,
                (5, 8 | 16 | 24 | 32) => {
                    for block in body.chunks_exact(8) {
                        options.sack.push(word(block, 0), word(block, 4));
                    }
                }
                (8, 8) => options.timestamps = Some((word(body, 0), word(body, 4))),
                _ => {}
            }
            bytes = &bytes[len..];
        }
        options
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// A segment that arrived and was checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'a> {
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: Flags,
    pub(crate) window: u16,
    pub(crate) urgent: u16,
    pub(crate) options: Options,
    pub(crate) payload: &'a [u8],
    /// Payload of each wire segment this one stands for; the payload's length if it wasn't coalesced.
    pub(crate) segment_size: usize,
    /// The IP header said congestion was experienced.
    pub(crate) congestion_experienced: bool,
}

impl<'a> Segment<'a> {
    /// Reads the TCP part of a packet. `None` for a malformed one or one with a wrong checksum.
    pub(crate) fn parse(
        source: IpAddr,
        destination: IpAddr,
        bytes: &'a [u8],
        verify: bool,
        gso_size: Option<u16>,
        congestion_experienced: bool,
    ) -> Option<Segment<'a>> {
        let packet = TcpPacket::new_checked(bytes).ok()?;
        if packet.src_port() == 0 || packet.dst_port() == 0 {
            return None;
        }
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
        //# The sender MUST generate it (MUST-2) and the receiver MUST check it (MUST-3).
        if verify {
            let pseudo = ip::pseudo_header_sum(source, destination, ip::protocol::TCP, bytes.len());
            if ip::internet_checksum(pseudo, &[bytes]) != 0 {
                return None;
            }
        }
        let payload = packet.payload();
        let flags = bytes.get(13).copied().map_or(Flags::NONE, Flags);
        let segment_size = gso_size.map_or(payload.len(), usize::from).clamp(1, payload.len().max(1));
        Some(Segment {
            source_port: packet.src_port(),
            destination_port: packet.dst_port(),
            seq: packet.seq_number().0.cast_unsigned(),
            ack: packet.ack_number().0.cast_unsigned(),
            flags,
            window: packet.window_len(),
            urgent: packet.urgent_at(),
            options: Options::parse(packet.options()),
            payload,
            segment_size,
            congestion_experienced,
        })
    }

    pub(crate) const fn has(&self, flags: Flags) -> bool {
        self.flags.has(flags)
    }

    /// Sequence space the segment takes.
    pub(crate) const fn len(&self) -> usize {
        self.payload.len() + self.has(Flags::SYN) as usize + self.has(Flags::FIN) as usize
    }

    /// Wire segments it stands for.
    pub(crate) const fn count(&self) -> usize {
        if self.payload.is_empty() { 1 } else { self.payload.len().div_ceil(self.segment_size) }
    }
}

/// A segment's header to write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: Flags,
    pub(crate) window: u16,
    pub(crate) urgent: u16,
    pub(crate) mss: Option<u16>,
    pub(crate) window_scale: Option<u8>,
    pub(crate) sack_permitted: bool,
    pub(crate) timestamps: Option<(u32, u32)>,
    pub(crate) sack: SackBlocks,
}

impl Header {
    /// Writes header and options into the start of `buffer`, with a checksum of zero. Returns their length.
    pub(crate) fn write(&self, buffer: &mut [u8]) -> usize {
        let mut options = OptionWriter { buffer: &mut buffer[20..HEADER_MAX], len: 0 };
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
        //# The content of the header beyond the End of Option List Option MUST be header padding of zeros (MUST-69).
        // The order is Linux's, which peers' fast paths (header prediction, GRO) expect.
        if let Some(mss) = self.mss {
            options.put(&[2, 4]);
            options.put(&mss.to_be_bytes());
        }
        match (self.timestamps, self.sack_permitted) {
            (Some(_), true) => options.put(&[4, 2]),
            (Some(_), false) => options.put(&[1, 1]),
            (None, true) => options.put(&[1, 1, 4, 2]),
            (None, false) => {}
        }
        if let Some((value, echo)) = self.timestamps {
            options.put(&[8, 10]);
            options.put(&value.to_be_bytes());
            options.put(&echo.to_be_bytes());
        }
        if let Some(scale) = self.window_scale {
            options.put(&[1, 3, 3, scale]);
        }
        if !self.sack.is_empty() {
            options.put(&[1, 1, 5, u8::try_from(2 + 8 * self.sack.len()).unwrap_or(34)]);
            for (left, right) in self.sack.iter() {
                options.put(&left.to_be_bytes());
                options.put(&right.to_be_bytes());
            }
        }
        let len = 20 + options.len;
        let mut packet = TcpPacket::new_unchecked(&mut buffer[..len]);
        packet.set_src_port(self.source_port);
        packet.set_dst_port(self.destination_port);
        packet.set_seq_number(TcpSeqNumber(self.seq.cast_signed()));
        packet.set_ack_number(TcpSeqNumber(self.ack.cast_signed()));
        packet.clear_flags();
        packet.set_header_len(u8::try_from(len).unwrap_or(60));
        packet.set_window_len(self.window);
        packet.set_checksum(0);
        packet.set_urgent_at(self.urgent);
        buffer[13] = self.flags.0;
        len
    }

    /// Length of the options that `write` will emit.
    pub(crate) const fn options_len(timestamps: bool, sack_blocks: usize) -> usize {
        let timestamps = if timestamps { 12 } else { 0 };
        let sack = if sack_blocks == 0 { 0 } else { 4 + 8 * sack_blocks };
        timestamps + sack
    }
}

struct OptionWriter<'a> {
    buffer: &'a mut [u8],
    len: usize,
}

impl OptionWriter<'_> {
    fn put(&mut self, bytes: &[u8]) {
        if let Some(room) = self.buffer.get_mut(self.len..self.len + bytes.len()) {
            room.copy_from_slice(bytes);
            self.len += bytes.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    fn blocks() -> impl Strategy<Value = SackBlocks> {
        proptest::collection::vec(any::<(u32, u32)>(), 0..=3).prop_map(|blocks| {
            let mut sack = SackBlocks::default();
            for (left, right) in blocks {
                sack.push(left, right);
            }
            sack
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            seq in any::<u32>(), ack in any::<u32>(), flags in any::<u8>(), window in any::<u16>(), urgent in any::<u16>(),
            mss in any::<Option<u16>>(), scale in proptest::option::of(0u8..15), permitted in any::<bool>(),
            timestamps in any::<Option<(u32, u32)>>(), sack in blocks(), payload in proptest::collection::vec(any::<u8>(), 0..50),
            syn in any::<bool>(),
        ) {
            // A SYN carries no SACK blocks and other segments carry no SYN options: together they needn't fit.
            let header = Header {
                source_port: 1, destination_port: 2, seq, ack, flags: Flags(flags), window, urgent,
                mss: mss.filter(|&mss| syn && mss > 0), window_scale: scale.filter(|_| syn), sack_permitted: permitted && syn,
                timestamps, sack: if syn { SackBlocks::default() } else { sack },
            };
            let mut buffer = [0xee; HEADER_MAX];
            let len = header.write(&mut buffer);
            let mut bytes = buffer[..len].to_vec();
            bytes.extend_from_slice(&payload);
            let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
            let segment = Segment::parse(address, address, &bytes, false, None, false).expect("parses");
            prop_assert_eq!((segment.seq, segment.ack, segment.flags, segment.window, segment.urgent), (seq, ack, Flags(flags), window, urgent));
            let expected = Options {
                mss: header.mss, window_scale: header.window_scale, sack_permitted: header.sack_permitted,
                timestamps: header.timestamps, sack: header.sack,
            };
            prop_assert_eq!(segment.options, expected);
            prop_assert_eq!(segment.payload, &payload[..]);
        }

        #[test]
        fn options_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..41)) {
            let _ = Options::parse(&bytes);
        }
    }
}
