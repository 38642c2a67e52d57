//! Memory of a job: tracked and copied while it runs, written into the stubs that wait at the target.
//!
//! The source has a [`Tracker`], the target a [`Filler`]. Between them travel [`Layout`]s (which mappings there are) and
//! [`MemoryChunk`]s (what is in them), through a [`MemorySink`] that knows nothing of either.
//!
//! Invariants:
//! - A page that isn't sent reads at the target as the mapping gives it: zeros, or the file's bytes.
//! - The target's content depends on nothing but the sequence of layouts and chunks; the source knows that content at any
//!   time without asking ([`ProcessLayout::kept`] is computed on both sides).
//! - Tracking changes nothing that the job can see, and ends without a trace.
//!
//! What it leaves out on purpose, and where its limits are:
//! - Shared mappings of files that have a path: their content is the file's, and the file is at the target already.
//! - NUMA policies, and accounting against the overcommit limit of mappings that aren't writable any more.
//! - Programs that read with `O_DIRECT` are copied in the freeze as a whole: a device's writes into memory cause no faults.
//! - Pages that a forked process still shares with its parent are sent once for each, and aren't shared at the target.
//! - While tracked, mappings that the kernel would join stay apart; mremap of a range that spans two of them fails.

mod areas;
mod direct;
mod filler;
mod layout;
mod mapping;
mod objects;
mod policy;
mod ranges;
mod reader;
mod settled;
mod space;
mod stubs;
mod tracker;

use std::io;

pub use areas::{Obstacle, obstacles};
pub use filler::Filler;
pub use layout::{
    Area, AreaFlags, Backing, KernelArea, Layout, OBJECT_BASE, ObjectKind, ProcessLayout, Protection, SharedObject,
};
pub use policy::{Budget, Next, Policy, Reason};
pub use ranges::{Span, SpanSet};
pub use stubs::{Argument, Batch, Call, MAX_CALLS, MAX_DATA, Stubs};
pub use tracker::{Inject, TrackedProcess, Tracker};

/// Bytes in a page.
const PAGE: u64 = 4096;

/// Some of a process's memory, or of a shared object's ([`SharedObject::sink_process`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryChunk<'a> {
    /// Number of the process in the job's image, or [`OBJECT_BASE`] + number of the object.
    pub process: u32,
    /// Where the bytes belong. Page-aligned.
    pub address: u64,
    /// Whole pages.
    pub data: &'a [u8],
}

/// Takes what the source reads; it ends in a [`Filler`] at the target in the same order.
pub trait MemorySink {
    /// The mappings have changed. Chunks that follow are to be understood by this layout.
    ///
    /// # Errors
    /// The move can't go on.
    fn layout(&mut self, layout: Layout) -> io::Result<()>;

    /// Content.
    ///
    /// # Errors
    /// The move can't go on.
    fn pages(&mut self, chunk: MemoryChunk<'_>) -> io::Result<()>;

    /// Several chunks at once, ascending and none overlapping: scattered pages of one reading. Worth overriding (one
    /// `writev` with all headers).
    ///
    /// # Errors
    /// The move can't go on.
    fn batch(&mut self, chunks: &[MemoryChunk<'_>]) -> io::Result<()> {
        chunks.iter().try_for_each(|chunk| self.pages(*chunk))
    }
}

/// What a copying round did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoundStats {
    /// Bytes handed to the sink.
    pub bytes: u64,
    /// Pages handed to the sink.
    pub pages: u64,
    /// Bytes that are dirty again, as of the end of the round.
    pub dirty_left: u64,
}
