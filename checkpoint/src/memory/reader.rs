//! Reads runs of pages of one process in large batches, leaves zeros out, and hands the rest to the sink.

use std::io;

use sys::Pid;
use sys::vm::{self, MAX_SEGMENTS, Memory, Remote};

use super::ranges::{Span, SpanSet};
use super::{MemoryChunk, MemorySink, PAGE};

/// Bytes read at once. Small enough to stay in the second-level cache between reading and sending.
const BATCH_BYTES: usize = 512 << 10;

/// The reading buffer, kept over all rounds.
#[derive(Debug)]
pub(super) struct Reader {
    buffer: Vec<u8>,
}

/// One process to read, and what came of it.
pub(super) struct Reading<'a> {
    reader: &'a mut Reader,
    sink: &'a mut dyn MemorySink,
    process: u32,
    pid: Pid,
    memory: &'a Memory,
    /// A page that can't be read is an error only when the process stands still; otherwise it has just gone away.
    frozen: bool,
    queue: Vec<Run>,
    queued: usize,
    /// Pages handed to the sink.
    pub sent: SpanSet,
    /// Pages that are all zeros and read as zeros where they are absent, so that they weren't handed on.
    pub zeros: SpanSet,
}

#[derive(Debug, Clone, Copy)]
struct Run {
    remote: Remote,
    traits: RunTraits,
}

/// What a run's mapping says about its pages.
#[derive(Debug, Clone, Copy)]
pub(super) struct RunTraits {
    /// The process itself may read them.
    pub readable: bool,
    /// An absent page reads as zeros.
    pub zero_when_absent: bool,
}

impl Default for Reader {
    fn default() -> Reader {
        Reader { buffer: vec![0; BATCH_BYTES] }
    }
}

impl Reader {
    pub fn start<'a>(
        &'a mut self,
        sink: &'a mut dyn MemorySink,
        process: u32,
        pid: Pid,
        memory: &'a Memory,
        frozen: bool,
    ) -> Reading<'a> {
        Reading {
            reader: self,
            sink,
            process,
            pid,
            memory,
            frozen,
            queue: Vec::with_capacity(MAX_SEGMENTS),
            queued: 0,
            sent: SpanSet::new(),
            zeros: SpanSet::new(),
        }
    }
}

impl Reading<'_> {
    /// Takes a run of pages. Runs come in ascending order.
    pub fn add(&mut self, span: Span, traits: RunTraits) -> io::Result<()> {
        let mut at = span.start;
        while at < span.end {
            if self.queued == BATCH_BYTES || self.queue.len() == MAX_SEGMENTS {
                self.flush()?;
            }
            let room = BATCH_BYTES - self.queued;
            let length = usize::try_from(span.end - at).unwrap_or(usize::MAX).min(room);
            self.queue.push(Run { remote: Remote { address: at, length }, traits });
            self.queued += length;
            at += length as u64;
        }
        Ok(())
    }

    /// Reads and hands on what is still queued.
    pub fn finish(mut self) -> io::Result<(SpanSet, SpanSet)> {
        self.flush()?;
        Ok((self.sent, self.zeros))
    }

    fn flush(&mut self) -> io::Result<()> {
        let queue = std::mem::take(&mut self.queue);
        let mut at = 0;
        let mut rest = queue.as_slice();
        while let Some(first) = rest.first() {
            // Runs of one kind are read together: as a rule that is the whole batch.
            let count = rest.iter().take_while(|run| run.traits.readable == first.traits.readable).count();
            let (group, tail) = rest.split_at(count);
            let length = group.iter().map(|run| run.remote.length).sum();
            self.read_group(group, at, length)?;
            at += length;
            rest = tail;
        }
        self.queue = queue;
        self.queue.clear();
        self.queued = 0;
        Ok(())
    }

    fn read_group(&mut self, group: &[Run], at: usize, length: usize) -> io::Result<()> {
        let mut done = 0;
        let mut pending: Vec<Run> = group.to_vec();
        while !pending.is_empty() {
            let start = at + done;
            let read = if pending[0].traits.readable {
                let remotes: Vec<Remote> = pending.iter().map(|run| run.remote).collect();
                vm::read_vectored(self.pid, &mut self.reader.buffer[start..at + length], &remotes)?
            } else {
                0
            };
            let read = read - read % PAGE as usize;
            let rest = self.hand_on(&pending, start, read)?;
            done += read;
            pending = rest;
            if let Some(first) = pending.first_mut() {
                // The first page that's left is protected, or has just gone away.
                let span = Span { start: first.remote.address, end: first.remote.address + PAGE };
                let traits = first.traits;
                let page = at + done..at + done + PAGE as usize;
                match self.memory.read(span.start, &mut self.reader.buffer[page]) {
                    Ok(()) => {
                        let run = Run { remote: Remote { address: span.start, length: PAGE as usize }, traits };
                        self.hand_on(&[run], at + done, PAGE as usize)?;
                    }
                    Err(error) if self.frozen => {
                        return Err(io::Error::new(
                            error.kind(),
                            format!("page {:x} can't be read ({error}): is its memory faulty?", span.start),
                        ));
                    }
                    Err(_) => {}
                }
                done += PAGE as usize;
                first.remote.address += PAGE;
                first.remote.length -= PAGE as usize;
                if first.remote.length == 0 {
                    pending.remove(0);
                }
            }
        }
        Ok(())
    }

    /// Hands on the first `length` bytes of the runs, which lie in the buffer from `at` on; returns the runs that are left.
    fn hand_on(&mut self, runs: &[Run], at: usize, length: usize) -> io::Result<Vec<Run>> {
        let mut chunks: Vec<MemoryChunk<'_>> = Vec::new();
        let mut rest = Vec::new();
        let mut at = at;
        let mut left = length;
        for run in runs {
            let take = run.remote.length.min(left);
            if take < run.remote.length {
                let remote = Remote { address: run.remote.address + take as u64, length: run.remote.length - take };
                rest.push(Run { remote, traits: run.traits });
            }
            if take == 0 {
                continue;
            }
            let data = &self.reader.buffer[at..at + take];
            split_zeros(data, run.traits.zero_when_absent, |offset, piece, is_zero| {
                let address = run.remote.address + offset as u64;
                let span = Span { start: address, end: address + piece.len() as u64 };
                if is_zero {
                    self.zeros.push(span);
                } else {
                    self.sent.push(span);
                    chunks.push(MemoryChunk { process: self.process, address, data: piece });
                }
            });
            at += take;
            left -= take;
        }
        match chunks.as_slice() {
            [] => {}
            [chunk] => self.sink.pages(*chunk)?,
            chunks => self.sink.batch(chunks)?,
        }
        Ok(rest)
    }
}

/// Calls `visit(offset, bytes, is_zero)` for each maximal run of zero and of other pages.
pub(super) fn split_zeros<'a>(data: &'a [u8], look: bool, mut visit: impl FnMut(usize, &'a [u8], bool)) {
    let page = PAGE as usize;
    if !look {
        return visit(0, data, false);
    }
    let mut start = 0;
    let mut kind = None;
    for at in (0..data.len()).step_by(page) {
        let is_zero = is_zero(&data[at..(at + page).min(data.len())]);
        match kind {
            Some(kind) if kind == is_zero => {}
            Some(kind) => {
                visit(start, &data[start..at], kind);
                start = at;
            }
            None => {}
        }
        kind = Some(is_zero);
    }
    if let Some(kind) = kind {
        visit(start, &data[start..], kind);
    }
}

/// Pages with content almost always show it in their first bytes, so this costs a cache line for those.
pub(super) fn is_zero(page: &[u8]) -> bool {
    page.chunks(64).all(|line| line.iter().fold(0, |bits, byte| bits | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_pages_are_told_apart() {
        let page = PAGE as usize;
        let mut data = vec![0; 5 * page];
        data[page] = 1;
        data[3 * page - 1] = 1;
        let mut seen = Vec::new();
        split_zeros(&data, true, |offset, piece, zero| seen.push((offset / page, piece.len() / page, zero)));
        assert_eq!(seen, [(0, 1, true), (1, 2, false), (3, 2, true)]);
        seen.clear();
        split_zeros(&data, false, |offset, piece, zero| seen.push((offset / page, piece.len() / page, zero)));
        assert_eq!(seen, [(0, 5, false)]);
    }
}
