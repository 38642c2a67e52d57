//! Bytes that tell where in which stream they belong, so that a lost, doubled, swapped or foreign byte is found.

use std::io::{self, Read};

/// An endless stream of bytes, the same for the same seed (xorshift64*).
#[derive(Debug, Clone)]
pub struct Pattern {
    state: u64,
    word: [u8; 8],
    used: usize,
    position: u64,
}

impl Pattern {
    /// The stream of this seed from its start.
    #[must_use]
    pub fn new(seed: u64) -> Pattern {
        Pattern { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, word: [0; 8], used: 8, position: 0 }
    }

    /// Puts the next bytes into `buffer`.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for byte in buffer.iter_mut() {
            *byte = self.next();
        }
    }

    /// The next `count` bytes.
    #[must_use]
    pub fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.fill(&mut bytes);
        bytes
    }

    /// Compares received bytes with the next ones.
    ///
    /// # Errors
    /// `InvalidData` that tells the first position that differs.
    pub fn check(&mut self, received: &[u8]) -> io::Result<()> {
        for &byte in received {
            let position = self.position;
            let expected = self.next();
            if byte != expected {
                let message = format!("byte {position} of the stream is {byte:#04x} instead of {expected:#04x}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
        }
        Ok(())
    }

    /// Reads exactly `count` bytes and compares them with the next ones.
    ///
    /// # Errors
    /// What reading said, or as [`Pattern::check`].
    pub fn check_from(&mut self, reader: &mut impl Read, count: usize) -> io::Result<()> {
        let mut buffer = vec![0; count.min(64 << 10)];
        let mut left = count;
        while left > 0 {
            let wanted = left.min(buffer.len());
            let received = reader.read(&mut buffer[..wanted])?;
            if received == 0 {
                let message = format!("the stream ended at byte {}", self.position);
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
            }
            self.check(&buffer[..received])?;
            left -= received;
        }
        Ok(())
    }

    fn next(&mut self) -> u8 {
        if self.used == 8 {
            self.state ^= self.state >> 12;
            self.state ^= self.state << 25;
            self.state ^= self.state >> 27;
            self.word = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
            self.used = 0;
        }
        let byte = self.word[self.used];
        self.used += 1;
        self.position += 1;
        byte
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_byte_is_found() {
        let bytes = Pattern::new(7).take(1000);
        Pattern::new(7).check(&bytes).expect("all there");
        let mut lost = bytes.clone();
        lost.remove(500);
        let error = Pattern::new(7).check(&lost).expect_err("one is missing");
        assert!(error.to_string().contains("byte 50"), "{error}");
        assert!(Pattern::new(8).check(&bytes).is_err());
        assert!(Pattern::new(7).check_from(&mut &bytes[..999], 1000).is_err());
    }
}
