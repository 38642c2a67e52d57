//! The job's output on disk.
//!
//! `output.log` is a sequence of frames, each a header and the bytes of one write:
//!
//! ```text
//!  0        1   4        8        16        24
//!  | stream | 0 | length | offset | time_ms | bytes ... |
//! ```
//!
//! Numbers are big-endian. `offset` counts the bytes of both streams together since the job was started, wherever it ran:
//! it goes on over rotations and over moves, so that whoever reads knows what it has and what it lacks. When the
//! file is full it becomes `output.log.1`, and the one before that is dropped.
//!
//! A frame is appended by one write and never changed, so a reader needs no lock; a frame cut off at the end of the file
//! (the shim was killed, or the disk is full) is as if it were not there.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::api::Stream;

/// Bytes of a frame's header.
const HEADER: usize = 24;
/// A file of the log is full at so many bytes.
pub const SEGMENT_BYTES: u64 = 16 << 20;
/// The longest piece of output in one frame.
pub const MAX_PIECE: usize = 64 << 10;

/// A piece of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Where it was written.
    pub stream: Stream,
    /// Bytes of both streams before it.
    pub offset: u64,
    /// When it was read from the job, milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// The frame as it lies in the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.bytes.len());
        let length = u32::try_from(self.bytes.len()).expect("pieces are at most MAX_PIECE");
        out.extend_from_slice(&[stream_number(self.stream), 0, 0, 0]);
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        out.extend_from_slice(&self.time_ms.to_be_bytes());
        out.extend_from_slice(&self.bytes);
        out
    }

    /// The first frame of `bytes` and its length there; `None` while it is not complete.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] when these bytes are no frame.
    pub fn decode(bytes: &[u8]) -> io::Result<Option<(Frame, usize)>> {
        let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
        let (mut frame, length) = decode_header(header)?;
        let Some(body) = bytes.get(HEADER..HEADER + length) else { return Ok(None) };
        frame.bytes = body.to_vec();
        Ok(Some((frame, HEADER + length)))
    }
}

fn decode_header(header: &[u8; HEADER]) -> io::Result<(Frame, usize)> {
    let [kind, 0, 0, 0, l0, l1, l2, l3, rest @ ..] = *header else { return Err(corrupt()) };
    let stream = match kind {
        1 => Stream::Out,
        2 => Stream::Err,
        _ => return Err(corrupt()),
    };
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    if length == 0 || length > MAX_PIECE {
        return Err(corrupt());
    }
    let [o0, o1, o2, o3, o4, o5, o6, o7, time @ ..] = rest;
    let offset = u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]);
    if offset.checked_add(length as u64).is_none() {
        return Err(corrupt());
    }
    Ok((Frame { stream, offset, time_ms: u64::from_be_bytes(time), bytes: Vec::new() }, length))
}

fn corrupt() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the output log is damaged")
}

fn stream_number(stream: Stream) -> u8 {
    match stream {
        Stream::Out => 1,
        Stream::Err => 2,
    }
}

fn rotated(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// The writing end: one in the world, in the job's shim.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
    file_bytes: u64,
    /// Offset of the first byte in the current file.
    file_start: u64,
    next: u64,
}

impl Log {
    /// A new log at `path` that begins at `offset`.
    ///
    /// # Errors
    /// As open(2).
    pub fn create(path: &Path, offset: u64) -> io::Result<Log> {
        match std::fs::remove_file(rotated(path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = create_segment(path)?;
        Ok(Log { path: path.to_owned(), file, file_bytes: 0, file_start: offset, next: offset })
    }

    /// Bytes of output so far.
    pub fn next_offset(&self) -> u64 {
        self.next
    }

    /// The oldest offset that the next rotation keeps: a reader behind it would lose output.
    pub fn kept_by_rotation(&self) -> u64 {
        self.file_start
    }

    /// Whether the next piece of this many bytes rotates the files.
    pub fn would_rotate(&self, length: usize) -> bool {
        self.file_bytes > 0 && self.file_bytes + (HEADER + length) as u64 > SEGMENT_BYTES
    }

    /// Appends output. When it can't be written, the offset advances all the same, so that readers see the gap.
    ///
    /// # Errors
    /// As write(2).
    pub fn append(&mut self, stream: Stream, time_ms: u64, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(MAX_PIECE) {
            let frame = Frame { stream, offset: self.next, time_ms, bytes: piece.to_vec() };
            self.append_frame(&frame)?;
        }
        Ok(())
    }

    /// Appends a frame that comes from the job's log on another node.
    ///
    /// # Errors
    /// As write(2); [`io::ErrorKind::InvalidData`] when it lies before what is here already.
    pub fn append_frame(&mut self, frame: &Frame) -> io::Result<()> {
        if frame.offset < self.next {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "output that is here already"));
        }
        if self.would_rotate(frame.bytes.len()) {
            std::fs::rename(&self.path, rotated(&self.path))?;
            self.file = create_segment(&self.path)?;
            self.file_bytes = 0;
            self.file_start = frame.offset;
        }
        self.next = frame.offset + frame.bytes.len() as u64;
        let encoded = frame.encode();
        match self.file.write_all(&encoded) {
            Ok(()) => {
                self.file_bytes += encoded.len() as u64;
                Ok(())
            }
            Err(error) => {
                // What was written in part must not stand before the next frame.
                self.file.set_len(self.file_bytes)?;
                Err(error)
            }
        }
    }

    /// The log goes on at `offset`, with a gap when that is further than here.
    pub fn skip_to(&mut self, offset: u64) {
        self.next = self.next.max(offset);
    }
}

fn create_segment(path: &Path) -> io::Result<File> {
    // The old file, if any, stays what it is for those who read it.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().append(true).create_new(true).open(path)
}

/// A reading end; reads along while the log is written.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: Option<File>,
    position: u64,
    next: u64,
}

impl Reader {
    /// Reads the log at `path` from `offset` on, or from the oldest output there is after it.
    pub fn new(path: &Path, offset: u64) -> Reader {
        let file = File::open(rotated(path)).or_else(|_| File::open(path)).ok();
        Reader { path: path.to_owned(), file, position: 0, next: offset }
    }

    /// Where the next byte comes from.
    pub fn offset(&self) -> u64 {
        self.next
    }

    /// The next piece; `None` at the end for now. A piece that begins after [`Reader::offset`] follows a gap.
    ///
    /// # Errors
    /// As read(2), or [`io::ErrorKind::InvalidData`] when the log is damaged.
    pub fn next_frame(&mut self) -> io::Result<Option<Frame>> {
        loop {
            // Asked before reading: what is rotated by now gets no further frames, so its end is final.
            let current = match std::fs::metadata(&self.path) {
                Ok(metadata) => Some((metadata.dev(), metadata.ino())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
            let Some(file) = &self.file else {
                if current.is_none() {
                    return Ok(None);
                }
                self.file = Some(File::open(&self.path)?);
                self.position = 0;
                continue;
            };
            let mut header = [0; HEADER];
            if read_full(file, &mut header, self.position)? {
                let (mut frame, length) = decode_header(&header)?;
                let end = frame.offset + length as u64;
                let skipped = usize::try_from(self.next.saturating_sub(frame.offset)).unwrap_or(usize::MAX);
                if skipped >= length {
                    self.position += (HEADER + length) as u64;
                    continue;
                }
                frame.bytes = vec![0; length];
                if read_full(file, &mut frame.bytes, self.position + HEADER as u64)? {
                    self.position += (HEADER + length) as u64;
                    frame.bytes.drain(..skipped);
                    frame.offset += skipped as u64;
                    self.next = end;
                    return Ok(Some(frame));
                }
            }
            let metadata = file.metadata()?;
            let mine = (metadata.dev(), metadata.ino());
            if current.is_none_or(|current| current == mine) {
                return Ok(None);
            }
            self.file = Some(self.successor(mine)?);
            self.position = 0;
        }
    }

    /// The file that follows the one of identity `mine`, which is not the current one.
    fn successor(&self, mine: (u64, u64)) -> io::Result<File> {
        let previous = File::open(rotated(&self.path));
        match previous {
            Ok(file) => {
                let metadata = file.metadata()?;
                if (metadata.dev(), metadata.ino()) == mine { File::open(&self.path) } else { Ok(file) }
            }
            Err(_) => File::open(&self.path),
        }
    }
}

fn read_full(file: &File, buffer: &mut [u8], position: u64) -> io::Result<bool> {
    match file.read_exact_at(buffer, position) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let path = std::env::temp_dir().join(format!("migd-output-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir_all(&path).unwrap();
            Directory(path)
        }

        fn log(&self) -> PathBuf {
            self.0.join("output.log")
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn read_all(reader: &mut Reader) -> Vec<(u64, Vec<u8>)> {
        std::iter::from_fn(|| reader.next_frame().unwrap()).map(|frame| (frame.offset, frame.bytes)).collect()
    }

    #[test]
    fn a_reader_begins_anywhere_and_reads_along() {
        let directory = Directory::new("along");
        let mut early = Reader::new(&directory.log(), 0);
        assert_eq!(early.next_frame().unwrap(), None);
        let mut log = Log::create(&directory.log(), 0).unwrap();
        log.append(Stream::Out, 1, b"hello ").unwrap();
        log.append(Stream::Err, 2, b"world").unwrap();
        assert_eq!(read_all(&mut early), [(0, b"hello ".to_vec()), (6, b"world".to_vec())]);
        assert_eq!(early.next_frame().unwrap(), None);
        log.append(Stream::Out, 3, b"!").unwrap();
        assert_eq!(read_all(&mut early), [(11, b"!".to_vec())]);
        let mut late = Reader::new(&directory.log(), 8);
        assert_eq!(read_all(&mut late), [(8, b"rld".to_vec()), (11, b"!".to_vec())]);
        assert_eq!(late.offset(), 12);
    }

    #[test]
    fn a_rotation_loses_nothing_of_two_files_and_shows_the_gap_of_more() {
        let directory = Directory::new("rotation");
        let mut log = Log::create(&directory.log(), 100).unwrap();
        let mut along = Reader::new(&directory.log(), 100);
        let mut stalled = Reader::new(&directory.log(), 100);
        let piece = vec![7; MAX_PIECE];
        log.append(Stream::Out, 0, &piece).unwrap();
        assert_eq!(read_all(&mut stalled).len(), 1);
        let total = 100 + 3 * SEGMENT_BYTES;
        let mut read = 0;
        while log.next_offset() < total {
            log.append(Stream::Out, 0, &piece).unwrap();
            read += read_all(&mut along).iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
        }
        assert_eq!(read, log.next_offset() - 100);
        let rest = read_all(&mut stalled);
        // Its own file was still open; then it found itself two rotations behind.
        assert!(rest.windows(2).any(|pair| pair[0].0 + pair[0].1.len() as u64 != pair[1].0));
        assert_eq!(stalled.offset(), log.next_offset());
        let files = [directory.log(), rotated(&directory.log())].map(|path| std::fs::metadata(path).unwrap().len());
        assert!(files.iter().all(|bytes| *bytes <= SEGMENT_BYTES));
    }

    #[test]
    fn a_frame_cut_off_is_not_there() {
        let directory = Directory::new("cut");
        let mut log = Log::create(&directory.log(), 0).unwrap();
        log.append(Stream::Out, 0, b"whole").unwrap();
        let whole = std::fs::metadata(directory.log()).unwrap().len();
        log.append(Stream::Out, 0, b"cut").unwrap();
        let file = OpenOptions::new().write(true).open(directory.log()).unwrap();
        for length in (whole..whole + 27).rev() {
            file.set_len(length).unwrap();
            assert_eq!(read_all(&mut Reader::new(&directory.log(), 0)).len(), 1);
        }
    }

    #[test]
    fn frames_of_another_node_go_on_where_they_were() {
        let (source, target) = (Directory::new("source"), Directory::new("target"));
        let mut log = Log::create(&source.log(), 0).unwrap();
        log.append(Stream::Out, 5, b"one").unwrap();
        log.append(Stream::Err, 6, b"two").unwrap();
        let mut moved = Log::create(&target.log(), 0).unwrap();
        let mut reader = Reader::new(&source.log(), 0);
        while let Some(frame) = reader.next_frame().unwrap() {
            let bytes = frame.encode();
            let (decoded, length) = Frame::decode(&bytes).unwrap().unwrap();
            assert_eq!((&decoded, length), (&frame, bytes.len()));
            moved.append_frame(&decoded).unwrap();
        }
        assert!(moved.append_frame(&Frame { stream: Stream::Out, offset: 2, time_ms: 0, bytes: vec![1] }).is_err());
        moved.append(Stream::Out, 7, b"three").unwrap();
        let pieces = read_all(&mut Reader::new(&target.log(), 0));
        assert_eq!(pieces, [(0, b"one".to_vec()), (3, b"two".to_vec()), (6, b"three".to_vec())]);
    }

    #[test]
    fn bytes_that_are_no_frame_are_refused() {
        assert!(Frame::decode(&[9; HEADER]).is_err());
        assert!(Frame::decode(&[0; HEADER]).is_err());
        assert!(Frame::decode(&[1; 3]).unwrap().is_none());
    }
}
