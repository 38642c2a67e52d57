//! The blocks of a pcapng file (draft-ietf-opsawg-pcapng), as far as a recording of packets needs them.
//!
//! A recording is a row of sections, one for each node that the job was on. Every section has one interface, the job's device
//! there, so that a packet's interface number is always 0 and packets may be written under any section.

use std::time::Duration;

use super::capture::Direction;

// Block types, options and their values.
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const BYTE_ORDER: u32 = 0x1a2b_3c4d;
const INTERFACE: u32 = 1;
/// Type of the blocks that hold packets (4.3).
pub const ENHANCED_PACKET: u32 = 6;
const OPTION_END: u16 = 0;
const SECTION_APPLICATION: u16 = 4;
const INTERFACE_NAME: u16 = 2;
const INTERFACE_DESCRIPTION: u16 = 3;
const INTERFACE_TIME_RESOLUTION: u16 = 9;
const PACKET_FLAGS: u16 = 2;
const PACKET_DROPPED: u16 = 4;
/// LINKTYPE_RAW: the packet begins with its IP header.
const LINK_TYPE_RAW: u16 = 101;
/// Ten to the minus ninth of a second.
const NANOSECONDS: u8 = 9;

/// The beginning of a section: what follows was recorded at the device `name` of the node `node`.
pub(super) fn section(out: &mut Vec<u8>, node: &str, name: &str, snap_length: u32) {
    block(out, SECTION_HEADER, |out| {
        word(out, BYTE_ORDER);
        // Version 1.0; the section's length is not known.
        half(out, 1);
        half(out, 0);
        out.extend_from_slice(&u64::MAX.to_ne_bytes());
        option(out, SECTION_APPLICATION, concat!("migd ", env!("CARGO_PKG_VERSION")).as_bytes());
        option(out, OPTION_END, &[]);
    });
    block(out, INTERFACE, |out| {
        half(out, LINK_TYPE_RAW);
        half(out, 0);
        word(out, snap_length);
        option(out, INTERFACE_NAME, name.as_bytes());
        option(out, INTERFACE_DESCRIPTION, format!("on node {node}").as_bytes());
        option(out, INTERFACE_TIME_RESOLUTION, &[NANOSECONDS]);
        option(out, OPTION_END, &[]);
    });
}

/// Appends a packet given in parts, with the number of those that were dropped before it.
pub(super) fn packet(
    out: &mut Vec<u8>,
    snap_length: u32,
    time: Duration,
    direction: Direction,
    dropped: u64,
    parts: &[&[u8]],
) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let kept = length.min(usize::try_from(snap_length).unwrap_or(usize::MAX));
    let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    block(out, ENHANCED_PACKET, |out| {
        word(out, 0);
        word(out, u32::try_from(nanos >> 32).unwrap_or(u32::MAX));
        word(out, u32::try_from(nanos & 0xffff_ffff).unwrap_or(u32::MAX));
        word(out, u32::try_from(kept).unwrap_or(u32::MAX));
        word(out, u32::try_from(length).unwrap_or(u32::MAX));
        let mut left = kept;
        for part in parts {
            let part = &part[..part.len().min(left)];
            out.extend_from_slice(part);
            left -= part.len();
        }
        pad(out, kept);
        let flags: u32 = match direction {
            Direction::In => 1,
            Direction::Out => 2,
        };
        option(out, PACKET_FLAGS, &flags.to_ne_bytes());
        if dropped > 0 {
            option(out, PACKET_DROPPED, &dropped.to_ne_bytes());
        }
        option(out, OPTION_END, &[]);
    });
}

/// Type and length of the block at the beginning of `blocks`, whose end may be missing.
#[must_use]
pub fn header(blocks: &[u8]) -> Option<(u32, usize)> {
    let (kind, rest) = blocks.split_first_chunk()?;
    let length = u32::from_ne_bytes(*rest.first_chunk()?);
    // The two lengths and the type are part of it; less would never end.
    (length >= 12).then_some((u32::from_ne_bytes(*kind), usize::try_from(length).ok()?))
}

/// The whole blocks of `blocks`, with their types.
pub(super) fn whole(mut blocks: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    std::iter::from_fn(move || {
        let (kind, length) = header(blocks)?;
        let (block, rest) = blocks.split_at_checked(length)?;
        blocks = rest;
        Some((kind, block))
    })
}

/// Type, length, body, length.
fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    word(out, kind);
    word(out, 0);
    body(out);
    let length = u32::try_from(out.len() - start + 4).unwrap_or(u32::MAX);
    out[start + 4..start + 8].copy_from_slice(&length.to_ne_bytes());
    word(out, length);
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    half(out, code);
    half(out, u16::try_from(value.len()).unwrap_or(u16::MAX));
    out.extend_from_slice(value);
    pad(out, value.len());
}

fn pad(out: &mut Vec<u8>, length: usize) {
    out.resize(out.len() + length.wrapping_neg() % 4, 0);
}

fn word(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_ne_bytes());
}

fn half(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_ne_bytes());
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What an interface block says of its node, or a packet block's bytes, with its count of dropped packets.
    pub(crate) fn in_words(block: &[u8]) -> Option<String> {
        let word = |at: usize| u32::from_ne_bytes(block[at..at + 4].try_into().unwrap());
        let (kind, length) = header(block)?;
        assert_eq!((block.len(), length % 4), (length, 0));
        assert_eq!(word(length - 4) as usize, length);
        match kind {
            INTERFACE => {
                let text = String::from_utf8_lossy(block);
                let node = text[text.find("on node ")?..].split('\0').next()?;
                Some(node.to_owned())
            }
            ENHANCED_PACKET => {
                let kept = word(20) as usize;
                let bytes = String::from_utf8_lossy(&block[28..28 + kept]).into_owned();
                // After the flags, an option of eight bytes.
                let count = &block[28 + kept.next_multiple_of(4) + 8..length - 4];
                let dropped = count.get(4..12).map(|count| u64::from_ne_bytes(count.try_into().unwrap()));
                Some(dropped.map_or(bytes.clone(), |dropped| format!("{bytes}, {dropped} dropped before")))
            }
            _ => None,
        }
    }

    #[test]
    fn packets_are_cut_at_the_snap_length_and_padded() {
        let mut block = Vec::new();
        packet(&mut block, 5, Duration::from_nanos(1), Direction::In, 0, &[b"abc", b"", b"defg"]);
        let body = &block[8..];
        assert_eq!(header(&block), Some((ENHANCED_PACKET, block.len())));
        assert_eq!(body[12..20], [5u32.to_ne_bytes(), 7u32.to_ne_bytes()].concat());
        assert_eq!(&body[20..28], b"abcde\0\0\0");
        assert_eq!(body[28..36], [&PACKET_FLAGS.to_ne_bytes()[..], &4u16.to_ne_bytes(), &1u32.to_ne_bytes()].concat());
    }

    #[test]
    fn a_section_names_the_node() {
        let mut bytes = Vec::new();
        section(&mut bytes, "a", "mig1", 96);
        let kinds: Vec<u32> = whole(&bytes).map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [SECTION_HEADER, INTERFACE]);
        assert_eq!(whole(&bytes).find_map(|(_, block)| in_words(block)).as_deref(), Some("on node a"));
    }

    #[test]
    fn what_is_no_block_ends_the_walk() {
        for bytes in [&b""[..], b"1234567", &[0; 64], &[0xff; 64]] {
            assert_eq!(whole(bytes).count(), 0);
        }
    }
}
