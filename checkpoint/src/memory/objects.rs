//! Shared memory at the source.
//!
//! A page of shared memory can be written through any mapping in any process, by processes that live only between two
//! rounds, and by write(2): no page table tells. So what was sent is remembered as one hash a page, and a round reads the
//! object and sends what differs. That costs a reading of the whole object in the freeze (about 0.2 ms a megabyte), which is
//! fine for the few megabytes that most servers share.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sys::memfd;
use xxhash_rust::xxh3::xxh3_64;

use super::areas::FoundObject;
use super::layout::{ObjectKind, SharedObject};
use super::ranges::{Span, SpanSet};
use super::reader::is_zero;
use super::{MemoryChunk, MemorySink, PAGE};

const READ_BYTES: usize = 256 << 10;
/// Pages in a block of hashes.
const BLOCK_PAGES: u64 = 512;

/// All shared objects of the job, numbered in the order in which they were found.
#[derive(Debug, Default)]
pub(super) struct Objects {
    objects: Vec<Object>,
    buffer: Vec<u8>,
    /// The device of the job's own `/dev/shm`.
    pub shm: Option<u64>,
}

#[derive(Debug)]
struct Object {
    description: SharedObject,
    file: File,
    /// Some process maps it now. One that nobody maps stays in the books, because the target keeps what it got.
    is_mapped: bool,
    /// Hashes of the pages that the target has, 0 for none, by block of [`BLOCK_PAGES`] pages.
    hashes: HashMap<u64, Vec<u64>>,
    sent: SpanSet,
}

impl Objects {
    /// The number of an object, which is opened when it's new.
    pub fn number(&mut self, found: &FoundObject) -> io::Result<u32> {
        let known = self
            .objects
            .iter()
            .find(|object| (object.description.device, object.description.inode) == (found.device, found.inode));
        if let Some(object) = known {
            return Ok(object.description.id);
        }
        let file = File::open(&found.opener)?;
        let mut kind = found.kind.clone();
        if let ObjectKind::SystemV { id, key } = &mut kind {
            // The mapping's name tells the first key, which may belong to another by now.
            *key = crate::sysv::key(found.pid, *id)?.unwrap_or_default();
        }
        let id = u32::try_from(self.objects.len()).map_err(|_| io::Error::other("too many shared objects"))?;
        let description = SharedObject {
            id,
            kind,
            device: found.device,
            inode: found.inode,
            size: file.metadata()?.len(),
            seals: memfd::seals(&file)?,
            discards: SpanSet::new(),
        };
        self.objects.push(Object { description, file, is_mapped: true, hashes: HashMap::new(), sent: SpanSet::new() });
        Ok(id)
    }

    /// Takes note of which objects are mapped.
    pub fn note_mapped(&mut self, ids: &HashSet<u32>) {
        for object in &mut self.objects {
            object.is_mapped = ids.contains(&object.description.id);
        }
    }

    /// What the layout says about the mapped objects, as of now. The discards are those of the last round.
    pub fn describe(&mut self, with_discards: bool) -> io::Result<Vec<SharedObject>> {
        let mut descriptions = Vec::with_capacity(self.objects.len());
        for object in self.objects.iter_mut().filter(|object| object.is_mapped) {
            object.description.size = object.file.metadata()?.len();
            object.description.seals = memfd::seals(&object.file)?;
            let mut description = object.description.clone();
            if !with_discards {
                description.discards = SpanSet::new();
            }
            descriptions.push(description);
        }
        Ok(descriptions)
    }

    /// Sends what differs from what was sent; returns the bytes.
    pub fn round(&mut self, sink: &mut dyn MemorySink) -> io::Result<u64> {
        self.buffer.resize(READ_BYTES, 0);
        let mut bytes = 0;
        for object in self.objects.iter_mut().filter(|object| object.is_mapped) {
            bytes += object.round(&mut self.buffer, sink)?;
        }
        Ok(bytes)
    }
}

impl Object {
    fn round(&mut self, buffer: &mut [u8], sink: &mut dyn MemorySink) -> io::Result<u64> {
        let mut bytes = 0;
        let mut content = SpanSet::new();
        let mut at = 0;
        while let Some((start, end)) = memfd::next_data(&self.file, at)? {
            let (mut from, end) = (start - start % PAGE, end.next_multiple_of(PAGE));
            while from < end {
                let length = usize::try_from(end - from).unwrap_or(usize::MAX).min(buffer.len());
                let piece = &mut buffer[..length];
                read_padded(&self.file, piece, from)?;
                bytes += self.send_changes(piece, from, &mut content, sink)?;
                from += length as u64;
            }
            at = end;
        }
        // A hole where there was content: the target is told with the last layout.
        self.description.discards = self.sent.difference(&content);
        Ok(bytes)
    }

    fn send_changes(
        &mut self,
        piece: &[u8],
        from: u64,
        content: &mut SpanSet,
        sink: &mut dyn MemorySink,
    ) -> io::Result<u64> {
        let process = self.description.sink_process();
        let mut changed = SpanSet::new();
        for (page, address) in piece.chunks(PAGE as usize).zip((from..).step_by(PAGE as usize)) {
            let span = Span { start: address, end: address + PAGE };
            let hash = if is_zero(page) { 0 } else { xxh3_64(page).max(1) };
            if hash != 0 {
                content.push(span);
            }
            if std::mem::replace(self.hash_mut(address / PAGE), hash) != hash && hash != 0 {
                changed.push(span);
            }
        }
        let chunks: Vec<MemoryChunk<'_>> = changed
            .spans()
            .iter()
            .map(|span| {
                let data = &piece[(span.start - from) as usize..(span.end - from) as usize];
                MemoryChunk { process, address: span.start, data }
            })
            .collect();
        if !chunks.is_empty() {
            sink.batch(&chunks)?;
        }
        self.sent = self.sent.union(&changed);
        Ok(changed.length())
    }

    fn hash_mut(&mut self, page: u64) -> &mut u64 {
        let block = self.hashes.entry(page / BLOCK_PAGES).or_insert_with(|| vec![0; BLOCK_PAGES as usize]);
        &mut block[(page % BLOCK_PAGES) as usize]
    }
}

/// Reads at `offset`; what lies beyond the end of the file is zeros, as it is in a mapping.
fn read_padded(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer[done..].fill(0);
    Ok(())
}
