//! The last packets for the process's kernel.
//!
//! Those that come while the process is on its way between two nodes are lost to the node that it leaves, if there is one. So the
//! home keeps the last ones for the node that it comes to.

use std::collections::VecDeque;

use sys::tun;

use super::line::{PACKETS_MAX, Packet};

/// Bytes kept, in packets of at most 64 KiB.
const BYTES_MAX: usize = 4 << 20;

/// Packets, numbered as they came.
#[derive(Default)]
pub(super) struct Kept {
    packets: VecDeque<Packet>,
    /// Number of the first one.
    first: u64,
    bytes: usize,
}

impl Kept {
    /// Keeps a packet instead of older ones; returns its number.
    pub(super) fn keep(&mut self, header: &[u8; tun::HEADER_LEN], packet: &[u8]) -> u64 {
        let number = self.first + self.packets.len() as u64;
        self.packets.push_back((*header, packet.to_vec()));
        self.bytes += packet.len();
        while self.packets.len() > PACKETS_MAX || self.bytes > BYTES_MAX {
            let Some((_, oldest)) = self.packets.pop_front() else { break };
            self.bytes -= oldest.len();
            self.first += 1;
        }
        number
    }

    /// Those from this number on, with their numbers.
    pub(super) fn since(&self, number: u64) -> impl Iterator<Item = (u64, &Packet)> {
        (self.first..).zip(&self.packets).filter(move |(kept, _)| *kept >= number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_are_kept_within_bounds() {
        let mut kept = Kept::default();
        for (length, most) in [(1, PACKETS_MAX), (60_000, BYTES_MAX / 60_000)] {
            let numbers: Vec<u64> = (0..2000).map(|_| kept.keep(&[0; tun::HEADER_LEN], &vec![7; length])).collect();
            let last: Vec<u64> = kept.since(0).map(|(number, _)| number).collect();
            assert_eq!(last, numbers[2000 - most..]);
            assert_eq!(kept.since(numbers[1998]).map(|(number, _)| number).collect::<Vec<_>>(), numbers[1998..]);
            assert_eq!(kept.since(numbers[1999] + 1).count(), 0);
        }
    }
}
