//! The target's side: builds the mappings in the stubs and fills them, while the job still runs at the source.
//!
//! Areas get their final protection at once; what the process itself couldn't write goes through `/proc/PID/mem`. What comes
//! from the source is checked as far as it decides where we write: a chunk outside the layout is an error, never a write
//! elsewhere.

use std::collections::{BTreeMap, HashSet};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use sys::Pid;
use sys::memfd;
use sys::vm::{self, MAX_SEGMENTS, Memory};

use super::layout::{Area, Layout, OBJECT_BASE, ObjectKind, ProcessLayout, Protection, SharedObject};
use super::mapping::{self, ObjectFiles};
use super::ranges::{Span, SpanSet};
use super::stubs::{Script, Stubs};
use super::{MemoryChunk, PAGE};

/// Fills the stubs of a job.
#[derive(Debug, Default)]
pub struct Filler {
    layout: Layout,
    stubs: BTreeMap<u32, Stub>,
    objects: BTreeMap<u32, Object>,
    /// A process whose IPC and mount namespaces are the job's.
    init: Option<Pid>,
}

#[derive(Debug)]
struct Stub {
    pid: Pid,
    memory: Memory,
    /// Pages that couldn't be written. While the job runs that may happen: the source reads a page of a mapping that has just
    /// taken another's place, and the target still has the old one, where nothing can be written (a file's end). The layout
    /// that follows settles it; what is left at the end is an error.
    failed: SpanSet,
}

#[derive(Debug)]
struct Object {
    description: SharedObject,
    file: File,
    /// The same file, opened for reading only: for mappings that may never become writable.
    read_only: File,
}

impl Filler {
    /// One that can make System V shared memory and files in `/dev/shm`, in the namespaces of this process.
    #[must_use]
    pub fn in_namespace_of(init: Pid) -> Filler {
        Filler { init: Some(init), ..Filler::default() }
    }

    /// Gives the stubs the mappings of this layout; content stays where the mapping stays. Every process of it has a stub by
    /// now, and nothing is mapped in a stub where the layout has an area but what this filler put there.
    ///
    /// # Errors
    /// The layout contradicts itself, or a mapping can't be made (which says why).
    pub fn layout(&mut self, layout: Layout, stubs: &mut dyn Stubs) -> io::Result<()> {
        check(&layout)?;
        self.take_objects(&layout)?;
        let nothing = ProcessLayout::default();
        for next in &layout.processes {
            let pid = stubs
                .pid(next.process)
                .ok_or_else(|| invalid(format!("process {} of the layout has no stub", next.process)))?;
            let is_same = self.stubs.get(&next.process).is_some_and(|stub| stub.pid == pid);
            if !is_same {
                let stub = Stub { pid, memory: Memory::open(pid)?, failed: SpanSet::new() };
                self.stubs.insert(next.process, stub);
            }
            let before = self.layout.process(next.process).filter(|_| is_same).unwrap_or(&nothing);
            let mut script = Script::new(stubs, next.process);
            mapping::change(before, next, &self.objects, &mut script)?;
            script.run()?;
            if let Some(stub) = self.stubs.get_mut(&next.process) {
                stub.failed = stub.failed.intersection(&before.kept(next));
            }
        }
        self.stubs.retain(|process, _| layout.process(*process).is_some());
        self.layout = layout;
        Ok(())
    }

    /// Writes pages.
    ///
    /// # Errors
    /// The chunk lies outside the layout, or the stub is gone.
    pub fn pages(&mut self, process: u32, address: u64, data: &[u8]) -> io::Result<()> {
        self.batch(&[MemoryChunk { process, address, data }])
    }

    /// Writes several chunks.
    ///
    /// # Errors
    /// As [`Filler::pages`].
    pub fn batch(&mut self, chunks: &[MemoryChunk<'_>]) -> io::Result<()> {
        let mut rest = chunks;
        while let Some(first) = rest.first() {
            if first.process >= OBJECT_BASE {
                self.write_object(*first)?;
                rest = &rest[1..];
                continue;
            }
            let own = rest.iter().take(MAX_SEGMENTS).take_while(|chunk| chunk.process == first.process).count();
            let (own, others) = rest.split_at(own);
            self.write_process(first.process, own)?;
            rest = others;
        }
        Ok(())
    }

    /// The shared object that was this inode at the source, for descriptors that refer to it.
    #[must_use]
    pub fn object(&self, device: (u32, u32), inode: u64) -> Option<BorrowedFd<'_>> {
        let known = |object: &&Object| (object.description.device, object.description.inode) == (device, inode);
        self.objects.values().find(known).map(|object| object.file.as_fd())
    }

    /// The files that were made in the job's `/dev/shm`: their objects' numbers, and device and inode at the source.
    #[must_use]
    pub fn shm(&self) -> Vec<(u32, (u32, u32), u64)> {
        let own = self.objects.values().map(|object| &object.description);
        own.filter(|own| own.kind == ObjectKind::Shm).map(|own| (own.id, own.device, own.inode)).collect()
    }

    /// Does what comes after the last page: drops what the source dropped, installs guard pages, locks and seals.
    ///
    /// # Errors
    /// A stub can't do it.
    pub fn finish(&mut self, stubs: &mut dyn Stubs) -> io::Result<()> {
        for process in &self.layout.processes {
            let failed = self.stubs.get(&process.process).map(|stub| stub.failed.difference(&process.discards));
            if let Some(span) = failed.as_ref().and_then(|failed| failed.spans().first()) {
                let area = process.area_at(span.start).map(ToString::to_string).unwrap_or_default();
                let what = format!("page {:x} of process {}, in {area}, can't be written", span.start, process.process);
                return Err(io::Error::other(what));
            }
        }
        for object in self.objects.values() {
            for hole in object.description.discards.spans() {
                memfd::punch_hole(&object.file, hole.start, hole.end)?;
            }
            // These say that they can't be sealed, by a seal.
            let is_unsealable = matches!(object.description.kind, ObjectKind::SystemV { .. } | ObjectKind::Shm);
            if object.description.seals != 0 && !is_unsealable {
                memfd::add_seals(&object.file, object.description.seals)?;
            }
        }
        for process in &self.layout.processes {
            let mut script = Script::new(stubs, process.process);
            mapping::finish(process, &mut script)?;
            script.run()?;
        }
        Ok(())
    }

    fn take_objects(&mut self, layout: &Layout) -> io::Result<()> {
        for description in &layout.objects {
            if let Some(object) = self.objects.get_mut(&description.id) {
                if object.description.inode != description.inode || object.description.device != description.device {
                    return Err(invalid(format!("shared memory {} became another", description.id)));
                }
                if object.description.size != description.size {
                    object.file.set_len(description.size)?;
                }
                object.description = description.clone();
                continue;
            }
            let file = self.make(description)?;
            let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            let object = Object { description: description.clone(), file, read_only };
            self.objects.insert(description.id, object);
        }
        Ok(())
    }

    fn init(&self) -> io::Result<Pid> {
        self.init.ok_or_else(|| invalid("shared memory of a namespace that nobody told of".to_owned()))
    }

    fn make(&self, description: &SharedObject) -> io::Result<File> {
        let name = match &description.kind {
            ObjectKind::SystemV { id, key } => {
                return crate::sysv::make_segment(self.init()?, *id, *key, description.size);
            }
            ObjectKind::Shm => {
                let file = crate::shm::make(self.init()?, description.id)?;
                file.set_len(description.size)?;
                return Ok(file);
            }
            ObjectKind::Anonymous => b"shared".as_slice(),
            ObjectKind::Memfd(name) => name,
            ObjectKind::Deleted(path) => path.rsplit(|byte| *byte == b'/').next().unwrap_or_default(),
        };
        let file = memfd::create(&object_name(name))?;
        file.set_len(description.size)?;
        Ok(file)
    }

    fn write_object(&self, chunk: MemoryChunk<'_>) -> io::Result<()> {
        let object = self
            .objects
            .get(&(chunk.process - OBJECT_BASE))
            .filter(|object| chunk.address < object.description.size)
            .ok_or_else(|| invalid(format!("pages of shared memory that the layout hasn't: {:x}", chunk.address)))?;
        // The last page may reach beyond the end of the file.
        let room = usize::try_from(object.description.size - chunk.address).unwrap_or(usize::MAX);
        object.file.write_all_at(&chunk.data[..chunk.data.len().min(room)], chunk.address)
    }

    fn write_process(&mut self, process: u32, chunks: &[MemoryChunk<'_>]) -> io::Result<()> {
        let (Some(stub), Some(layout)) = (self.stubs.get_mut(&process), self.layout.process(process)) else {
            return Err(invalid(format!("pages of process {process}, which the layout hasn't")));
        };
        for chunk in chunks {
            area_of(layout, chunk)?;
        }
        if !stub.failed.is_empty() {
            stub.failed = stub.failed.difference(&chunks.iter().map(span_of).collect());
        }
        let writable = |chunk: &&MemoryChunk<'_>| {
            area_of(layout, chunk).is_ok_and(|area| area.protection.contains(Protection::WRITE))
        };
        let mut rest = chunks;
        while !rest.is_empty() {
            let (direct, others) = rest.split_at(rest.iter().take_while(writable).count());
            stub.write_direct(direct)?;
            let (protected, others) = others.split_at(others.iter().take_while(|chunk| !writable(chunk)).count());
            for chunk in protected {
                stub.write_protected(chunk, 0)?;
            }
            rest = others;
        }
        Ok(())
    }
}

impl Stub {
    fn write_direct(&mut self, chunks: &[MemoryChunk<'_>]) -> io::Result<()> {
        let mut rest = chunks;
        while !rest.is_empty() {
            let mut left = vm::write_vectored(self.pid, rest.iter().map(|chunk| (chunk.address, chunk.data)))?;
            let whole = rest.iter().take_while(|chunk| {
                let fits = left >= chunk.data.len();
                left -= if fits { chunk.data.len() } else { 0 };
                fits
            });
            rest = &rest[whole.count()..];
            if let Some((first, others)) = rest.split_first() {
                // It met a page that only the tracer's way can write, if at all.
                self.write_protected(first, left - left % PAGE as usize)?;
                rest = others;
            }
        }
        Ok(())
    }

    /// Writes what follows the first `done` bytes of a chunk in the tracer's way.
    fn write_protected(&mut self, chunk: &MemoryChunk<'_>, done: usize) -> io::Result<()> {
        if self.memory.write(chunk.address + done as u64, &chunk.data[done..]).is_ok() {
            return Ok(());
        }
        for (page, address) in
            chunk.data[done..].chunks(PAGE as usize).zip((chunk.address + done as u64..).step_by(PAGE as usize))
        {
            match self.memory.write(address, page) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(sys::libc::EIO) => {
                    self.failed.push(Span { start: address, end: address + PAGE });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn span_of(chunk: &MemoryChunk<'_>) -> Span {
    Span { start: chunk.address, end: chunk.address + chunk.data.len() as u64 }
}

impl ObjectFiles for BTreeMap<u32, Object> {
    fn file(&self, id: u32, writable: bool) -> Option<BorrowedFd<'_>> {
        let object = self.get(&id)?;
        Some(if writable { object.file.as_fd() } else { object.read_only.as_fd() })
    }

    fn segment(&self, id: u32) -> Option<i32> {
        match self.get(&id)?.description.kind {
            ObjectKind::SystemV { id, .. } => Some(id),
            _ => None,
        }
    }
}

/// The area that a chunk belongs to: all of it to one.
fn area_of<'a>(layout: &'a ProcessLayout, chunk: &MemoryChunk<'_>) -> io::Result<&'a Area> {
    let end = chunk.address.checked_add(chunk.data.len() as u64);
    layout
        .area_at(chunk.address)
        .filter(|area| area.has_own_pages() && end.is_some_and(|end| end <= area.end))
        .filter(|_| chunk.address.is_multiple_of(PAGE))
        .ok_or_else(|| {
            invalid(format!(
                "pages at {:x} of process {}, where the layout has no memory",
                chunk.address, chunk.process
            ))
        })
}

fn check(layout: &Layout) -> io::Result<()> {
    let mut seen = HashSet::new();
    for process in &layout.processes {
        if process.process >= OBJECT_BASE || !seen.insert(process.process) || !process.is_well_formed() {
            return Err(invalid(format!("the layout of process {} contradicts itself", process.process)));
        }
    }
    let mut seen = HashSet::new();
    if !layout.objects.iter().all(|object| object.id < OBJECT_BASE && seen.insert(object.id)) {
        return Err(invalid("the layout has shared memory twice".to_owned()));
    }
    Ok(())
}

fn object_name(bytes: &[u8]) -> CString {
    // memfd_create takes at most 249 bytes.
    let name: Vec<u8> = bytes.iter().copied().filter(|byte| *byte != 0).take(200).collect();
    CString::new(name).unwrap_or_default()
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
