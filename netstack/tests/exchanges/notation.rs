//! Packets as the tables write them: `SA 0+0 ack 1 win 65535 mss own,sack`.

use std::fmt::Write;

use crate::harness::Seen;
use crate::harness::wire::{Family, ISN};

/// Packets with all their fields, separated by semicolons.
pub fn packets(seen: &[Seen], family: Family) -> String {
    seen.iter().map(|one| packet(one, family)).collect::<Vec<_>>().join("; ")
}

fn packet(one: &Seen, family: Family) -> String {
    if one.protocol != 6 {
        return format!("protocol {} with {} bytes", one.protocol, one.payload);
    }
    let mut text: String = [(1, 'F'), (2, 'S'), (4, 'R'), (8, 'P'), (16, 'A'), (32, 'U'), (64, 'E'), (128, 'C')]
        .into_iter()
        .filter(|(bit, _)| one.flags & bit != 0)
        .map(|(_, letter)| letter)
        .collect();
    // A new connection's first number is nobody's to foretell.
    match one.seq.cast_signed() {
        seq if one.flags & 2 != 0 && !(0..1 << 20).contains(&seq) => text += " isn",
        seq => {
            let _ = write!(text, " {seq}");
        }
    }
    let _ = write!(text, "+{}", one.payload);
    if one.flags & 16 != 0 {
        let _ = write!(text, " ack {}", one.ack);
    }
    let _ = write!(text, " win {}", one.window);
    if one.urgent != 0 {
        let _ = write!(text, " urg {}", one.urgent);
    }
    let options = options(&one.options, family);
    if !options.is_empty() {
        let _ = write!(text, " {options}");
    }
    text
}

fn options(mut bytes: &[u8], family: Family) -> String {
    let mut named = Vec::new();
    let word = |at: &[u8]| u32::from_be_bytes(at[..4].try_into().expect("four bytes"));
    while let Some(&kind) = bytes.first() {
        if kind < 2 {
            bytes = &bytes[1..];
            continue;
        }
        let (body, rest) = bytes[2..].split_at(usize::from(bytes[1]) - 2);
        named.push(match kind {
            2 if usize::from(u16::from_be_bytes([body[0], body[1]])) == family.mss() => "mss own".to_owned(),
            2 => format!("mss {}", u16::from_be_bytes([body[0], body[1]])),
            3 => format!("scale {}", body[0]),
            4 => "sack".to_owned(),
            5 => {
                let blocks = body.chunks(8).map(|block| {
                    format!(
                        "{}-{}",
                        word(block).wrapping_sub(ISN).cast_signed(),
                        word(&block[4..]).wrapping_sub(ISN).cast_signed()
                    )
                });
                format!("sack {}", blocks.collect::<Vec<_>>().join(" "))
            }
            8 => "ts".to_owned(),
            other => format!("option {other}"),
        });
        bytes = rest;
    }
    named.join(",")
}
