//! What a process's address space looks like, apart from its content.

use std::fmt;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

use super::ranges::{Span, SpanSet};

/// The address spaces of a job, and the shared memory that they map. Sent whole whenever it has changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// One per process that has an address space of its own.
    pub processes: Vec<ProcessLayout>,
    /// Shared memory whose content travels: once each, however many processes map it.
    pub objects: Vec<SharedObject>,
}

/// One process's address space.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLayout {
    /// Number of the process in the job's image.
    pub process: u32,
    /// Number of its parent; 1 is init. Parents come before their children in [`Layout::processes`].
    pub parent: u32,
    /// Its session; 0 when it isn't told, which is then known from the offer or inherited.
    #[serde(default)]
    pub session: u32,
    /// Number of the pseudo-terminal that controls it.
    #[serde(default)]
    pub terminal: Option<u32>,
    /// Its mappings, ascending.
    pub areas: Vec<Area>,
    /// Pages sent earlier that are back to what the mapping has by itself (zeros, or the file's bytes). Only the layout of
    /// the freeze lists them.
    pub discards: SpanSet,
    /// Guard pages (`MADV_GUARD_INSTALL`). Only the layout of the freeze lists them.
    pub guards: SpanSet,
}

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// What the process may do with it.
    pub protection: Protection,
    /// MAP_SHARED, as opposed to MAP_PRIVATE.
    pub shared: bool,
    /// Where its content comes from.
    pub backing: Backing,
    /// Properties set by mmap, madvise, mlock or mseal.
    pub flags: AreaFlags,
    /// Name given by `PR_SET_VMA_ANON_NAME`.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
}

/// Where the content of a mapping comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Zeros.
    Anonymous,
    /// Zeros, in huge pages of this many bytes.
    HugePages {
        /// Bytes in a page.
        page_size: u64,
    },
    /// A file that the target has as well.
    File {
        /// Path in the process's mount namespace.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Offset in the file of the first byte.
        offset: u64,
        /// `(major, minor)` of the file's device at the source: an identity, not a place at the target.
        device: (u32, u32),
        /// Inode at the source.
        inode: u64,
        /// The mapping may become writable to the file (shared, and the file was opened for writing).
        writable: bool,
    },
    /// Memory in a [`SharedObject`].
    Object {
        /// [`SharedObject::id`].
        id: u32,
        /// Offset in the object of the first byte.
        offset: u64,
        /// The mapping may become writable.
        writable: bool,
    },
    /// The kernel's own: vdso and its data. Nothing of it is sent; whoever restores the process puts it there.
    Kernel(KernelArea),
}

/// Mappings that the kernel makes at execve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum KernelArea {
    /// `[vdso]`: code.
    Vdso,
    /// `[vvar]`: data of the vdso.
    Vvar,
    /// `[vvar_vclock]`: the hypervisor's clock page.
    VvarClock,
}

bitflags! {
    /// PROT_READ, PROT_WRITE, PROT_EXEC, with the kernel's values.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
    pub struct Protection: u8 {
        /// PROT_READ.
        const READ = 1;
        /// PROT_WRITE.
        const WRITE = 2;
        /// PROT_EXEC.
        const EXECUTE = 4;
    }

    /// Properties of a mapping besides its protection.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
    pub struct AreaFlags: u32 {
        /// MAP_GROWSDOWN (the main stack).
        const GROWS_DOWN = 1 << 0;
        /// MAP_NORESERVE.
        const NO_RESERVE = 1 << 1;
        /// Counted against the overcommit limit (it is or once was writable).
        const ACCOUNTED = 1 << 2;
        /// MAP_DROPPABLE: the kernel may drop its content at any time, so none is sent.
        const DROPPABLE = 1 << 3;
        /// mlock.
        const LOCKED = 1 << 4;
        /// mlock2(MLOCK_ONFAULT).
        const LOCKED_ON_FAULT = 1 << 5;
        /// MADV_DONTFORK.
        const DONT_FORK = 1 << 6;
        /// MADV_WIPEONFORK.
        const WIPE_ON_FORK = 1 << 7;
        /// MADV_DONTDUMP.
        const DONT_DUMP = 1 << 8;
        /// MADV_HUGEPAGE.
        const HUGE_PAGE = 1 << 9;
        /// MADV_NOHUGEPAGE.
        const NO_HUGE_PAGE = 1 << 10;
        /// MADV_MERGEABLE.
        const MERGEABLE = 1 << 11;
        /// MADV_SEQUENTIAL.
        const SEQUENTIAL = 1 << 12;
        /// MADV_RANDOM.
        const RANDOM = 1 << 13;
        /// mseal.
        const SEALED = 1 << 14;
    }
}

/// Advice that can be exchanged for its opposite, but not taken back.
const HUGE_ADVICE: AreaFlags = AreaFlags::HUGE_PAGE.union(AreaFlags::NO_HUGE_PAGE);

impl AreaFlags {
    /// Flags that only mmap can give: a mapping with others is another mapping.
    pub const FIXED_AT_CREATION: AreaFlags =
        AreaFlags::GROWS_DOWN.union(AreaFlags::NO_RESERVE).union(AreaFlags::DROPPABLE);
}

/// Memory that several mappings or descriptors share and that is no file the target has: shared anonymous memory, memfd,
/// files that were deleted, files of the job's own `/dev/shm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedObject {
    /// Its number in the image. Its pages are sent as those of the "process" [`SharedObject::sink_process`].
    pub id: u32,
    /// What it was at the source.
    pub kind: ObjectKind,
    /// `(major, minor)` of its device at the source: with the inode its identity there. System V shared memory has none.
    pub device: (u32, u32),
    /// Inode at the source; the identifier of System V shared memory.
    pub inode: u64,
    /// Size in bytes.
    pub size: u64,
    /// `F_GET_SEALS` of a memfd.
    pub seals: u32,
    /// Offsets sent earlier that are holes now. Only the layout of the freeze lists them.
    pub discards: SpanSet,
}

/// The first "process number" that means a shared object.
pub const OBJECT_BASE: u32 = 1 << 31;

impl SharedObject {
    /// The number that [`super::MemoryChunk::process`] has for this object's content; the address is an offset then.
    #[must_use]
    pub fn sink_process(&self) -> u32 {
        OBJECT_BASE | self.id
    }
}

/// What a [`SharedObject`] was at the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ObjectKind {
    /// mmap(MAP_SHARED | MAP_ANONYMOUS).
    Anonymous,
    /// memfd_create with this name.
    Memfd(#[serde(with = "serde_bytes")] Vec<u8>),
    /// A file, deleted or replaced since, that had this path.
    Deleted(#[serde(with = "serde_bytes")] Vec<u8>),
    /// A file in the job's own `/dev/shm`, with a name or without.
    Shm,
    /// System V shared memory.
    SystemV {
        /// Its identifier.
        id: i32,
        /// Its key; 0 when it can't be found by one, or not any more.
        key: i32,
    },
}

impl Area {
    /// The area's addresses.
    #[must_use]
    pub fn span(&self) -> Span {
        Span { start: self.start, end: self.end }
    }

    /// Whether the mapping is the kernel's own (vdso and its data).
    #[must_use]
    pub fn is_kernels(&self) -> bool {
        matches!(self.backing, Backing::Kernel(_))
    }

    /// Whether the process's own pages of this mapping have to be sent.
    #[must_use]
    pub fn has_own_pages(&self) -> bool {
        !self.shared && !self.is_kernels() && !self.flags.contains(AreaFlags::DROPPABLE)
    }

    /// Whether a page that isn't there reads as zeros (rather than as a file's bytes).
    #[must_use]
    pub fn is_zero_when_absent(&self) -> bool {
        matches!(self.backing, Backing::Anonymous | Backing::HugePages { .. })
    }

    /// Whether content written into `self` stays right when the mapping becomes `other`: the same backing at the same place,
    /// so that mprotect and madvise are enough.
    ///
    /// What no call can take back ends it as well. Accounting, which the kernel takes back only sometimes, isn't worth that: a
    /// mapping may stay counted against the overcommit limit at the target that isn't at the source.
    #[must_use]
    pub fn continues_as(&self, other: &Area) -> bool {
        if self.shared != other.shared
            || (self.flags ^ other.flags).intersects(AreaFlags::FIXED_AT_CREATION)
            || (self.flags.intersects(HUGE_ADVICE) && !other.flags.intersects(HUGE_ADVICE))
            || self.flags.contains(AreaFlags::SEALED)
        {
            return false;
        }
        match (&self.backing, &other.backing) {
            (Backing::Anonymous, Backing::Anonymous) => true,
            (Backing::HugePages { page_size: a }, Backing::HugePages { page_size: b }) => a == b,
            (Backing::Kernel(a), Backing::Kernel(b)) => a == b && self.start == other.start,
            (
                Backing::File { path, offset, device, inode, writable },
                Backing::File { path: path2, offset: offset2, device: device2, inode: inode2, writable: writable2 },
            ) => {
                (path, device, inode, writable) == (path2, device2, inode2, writable2)
                    && offset.wrapping_sub(self.start) == offset2.wrapping_sub(other.start)
            }
            (
                Backing::Object { id, offset, writable },
                Backing::Object { id: id2, offset: offset2, writable: writable2 },
            ) => {
                (id, writable) == (id2, writable2)
                    && offset.wrapping_sub(self.start) == offset2.wrapping_sub(other.start)
            }
            _ => false,
        }
    }

    /// The part of the area in `span`, which must overlap it.
    #[must_use]
    pub fn part(&self, span: Span) -> Area {
        let mut part = self.clone();
        part.start = self.start.max(span.start);
        part.end = self.end.min(span.end);
        if let Backing::File { offset, .. } | Backing::Object { offset, .. } = &mut part.backing {
            *offset = offset.wrapping_add(part.start - self.start);
        }
        part
    }
}

impl Layout {
    /// The address space of a process.
    #[must_use]
    pub fn process(&self, process: u32) -> Option<&ProcessLayout> {
        self.processes.iter().find(|layout| layout.process == process)
    }
}

impl ProcessLayout {
    /// The addresses whose content survives the change from `self` to `next`. Source and target both compute this, the one
    /// to know what it has to send again, the other to know what to map anew.
    #[must_use]
    pub fn kept(&self, next: &ProcessLayout) -> SpanSet {
        let mut kept = SpanSet::new();
        let (mut i, mut j) = (0, 0);
        while let (Some(old), Some(new)) = (self.areas.get(i), next.areas.get(j)) {
            if let Some(both) = old.span().overlap(new.span()).filter(|_| old.continues_as(new)) {
                kept.push(both);
            }
            if old.end < new.end {
                i += 1;
            } else {
                j += 1;
            }
        }
        kept
    }

    /// The shared objects that are mapped.
    pub(super) fn objects(&self) -> impl Iterator<Item = u32> {
        self.areas.iter().filter_map(|area| match area.backing {
            Backing::Object { id, .. } => Some(id),
            _ => None,
        })
    }

    /// The area that has the address.
    #[must_use]
    pub fn area_at(&self, address: u64) -> Option<&Area> {
        let after = self.areas.partition_point(|area| area.end <= address);
        self.areas.get(after).filter(|area| area.start <= address)
    }

    /// Whether areas are page-aligned, ascending and disjoint below the end of user space: what a layout from a peer must be.
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        const USER_END: u64 = 1 << 56;
        let mut previous_end = 0;
        self.areas.iter().all(|area| {
            let fine = area.start < area.end
                && area.start >= previous_end
                && area.end <= USER_END
                && area.start % 4096 == 0
                && area.end % 4096 == 0;
            previous_end = area.end;
            fine
        })
    }
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |flag, letter| if self.protection.contains(flag) { letter } else { '-' };
        write!(
            f,
            "{:x}-{:x} {}{}{}{}",
            self.start,
            self.end,
            letter(Protection::READ, 'r'),
            letter(Protection::WRITE, 'w'),
            letter(Protection::EXECUTE, 'x'),
            if self.shared { 's' } else { 'p' },
        )?;
        match &self.backing {
            Backing::Anonymous => Ok(()),
            Backing::HugePages { page_size } => write!(f, " (pages of {} kB)", page_size >> 10),
            Backing::File { path, offset, .. } => write!(f, " {}+{offset:x}", String::from_utf8_lossy(path)),
            Backing::Object { id, offset, .. } => write!(f, " (shared memory {id}+{offset:x})"),
            Backing::Kernel(area) => write!(f, " ({area:?})"),
        }
    }
}
