//! CRIU's own statistics of a dump and a restore: `stats-dump` and `stats-restore`, two magic numbers, a length and one
//! protocol buffer (CRIU's `images/stats.proto`), of which only a few integers are wanted.

use std::path::Path;

/// Parts of a dump by their field number: the time to stop the processes, and the time in which they stood.
const DUMP: [(u64, &str); 3] = [(1, "criu freezing"), (2, "criu frozen"), (3, "criu memory dump")];
const RESTORE: [(u64, &str); 1] = [(4, "criu restore")];

/// The times, in milliseconds. Nothing when the files are not there or not understood.
pub(super) fn read(images: &Path) -> Vec<(String, f64)> {
    let mut found = Vec::new();
    for (file, field, wanted) in [("stats-dump", 1, &DUMP[..]), ("stats-restore", 2, &RESTORE[..])] {
        let bytes = std::fs::read(images.join(file)).unwrap_or_default();
        let entry = bytes.get(12..).and_then(|message| submessage(message, field)).unwrap_or_default();
        for (number, value) in integers(entry) {
            if let Some((_, name)) = wanted.iter().find(|(wanted, _)| *wanted == number) {
                // Microseconds, far below 2^52.
                #[allow(clippy::cast_precision_loss)]
                found.push(((*name).to_owned(), value as f64 / 1e3));
            }
        }
    }
    found
}

/// The bytes of the field with this number, when it is the first and has a length (wire type 2).
fn submessage(message: &[u8], field: u64) -> Option<&[u8]> {
    let (tag, rest) = varint(message)?;
    let (length, rest) = varint(rest)?;
    if tag != field << 3 | 2 {
        return None;
    }
    rest.get(..usize::try_from(length).ok()?)
}

/// The integer fields (wire type 0), until there is another one.
fn integers(mut message: &[u8]) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    while let Some((tag, rest)) = varint(message) {
        if tag & 7 != 0 {
            break;
        }
        let Some((value, rest)) = varint(rest) else { break };
        found.push((tag >> 3, value));
        message = rest;
    }
    found
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (index, byte) in bytes.iter().enumerate().take(9) {
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[index + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_of_a_real_dump_and_restore_are_read() {
        let directory = tempfile::tempdir().expect("a directory");
        // Written by CRIU 4.2.1.
        let dump =
            b"\x40\x59\x10\x55\x06\x33\x09\x57\x25\0\0\0\x0a\x23\x08\xce\x20\x10\x99\xb9\x02\x18\xd7\x46\x20\xbb\
            \x0c\x28\xae\x06\x30\0\x38\xb2\x05\x40\0\x48\0\x50\x08\x58\x08\x60\0\x68\0\x70\0";
        let restore = b"\x40\x59\x10\x55\x06\x33\x09\x57\x0e\0\0\0\x12\x0c\x08\0\x10\0\x18\0\x20\xa9\x41\x28\xb2\x05";
        std::fs::write(directory.path().join("stats-dump"), dump).expect("written");
        std::fs::write(directory.path().join("stats-restore"), restore).expect("written");
        let expected =
            [("criu freezing", 4.174), ("criu frozen", 40.089), ("criu memory dump", 9.047), ("criu restore", 8.361)];
        assert_eq!(read(directory.path()), expected.map(|(name, ms)| (name.to_owned(), ms)));
    }

    #[test]
    fn what_is_not_understood_gives_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(read(directory.path()), []);
        std::fs::write(directory.path().join("stats-dump"), [0xff; 40]).expect("written");
        assert_eq!(read(directory.path()), []);
    }
}
