//! The content of files, without their holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde_bytes::ByteBuf;
use sys::memfd;

/// How much is read at once.
const PIECE_BYTES: u64 = 1 << 20;

/// Content by offset; what isn't there is zeros.
pub type Pieces = Vec<(u64, ByteBuf)>;

/// Reads the first `length` bytes of a file. Moves the offset of the open file, so it must be one that nobody else uses.
pub(crate) fn read(file: &File, length: u64) -> io::Result<Pieces> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while let Some((start, end)) = memfd::next_data(file, at)?.filter(|(start, _)| *start < length) {
        let end = end.min(start + PIECE_BYTES).min(length);
        let mut piece = vec![0; usize::try_from(end - start).map_err(io::Error::other)?];
        file.read_exact_at(&mut piece, start)?;
        pieces.push((start, ByteBuf::from(piece)));
        at = end;
    }
    Ok(pieces)
}

/// Writes them into an empty file of the right length.
pub(crate) fn write(file: &File, pieces: &Pieces) -> io::Result<()> {
    pieces.iter().try_for_each(|(offset, piece)| file.write_all_at(piece, *offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_stay_holes() {
        let make = || {
            let file = memfd::create(c"test").unwrap();
            file.set_len((4 << 20) + 5).unwrap();
            file
        };
        let (one, other) = (make(), make());
        one.write_all_at(&vec![7; 5 << 18], 1 << 20).unwrap();
        one.write_all_at(b"end", (4 << 20) + 2).unwrap();
        let pieces = read(&one, (4 << 20) + 5).unwrap();
        let places: Vec<(u64, usize)> = pieces.iter().map(|(at, piece)| (*at, piece.len())).collect();
        assert_eq!(places, [(1 << 20, 1 << 20), (2 << 20, 1 << 18), (4 << 20, 5)]);
        write(&other, &pieces).unwrap();
        assert_eq!(read(&other, (4 << 20) + 5).unwrap(), pieces);
        assert_eq!(read(&one, 1 << 20).unwrap(), Pieces::new());
    }
}
