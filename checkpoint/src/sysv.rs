//! System V IPC: shared memory, semaphores and message queues of the job's IPC namespace.
//!
//! The content of attached shared memory travels with the memory of the processes ([`crate::memory::ObjectKind::SystemV`]), and its
//! segment is made at the target when the first layout names it. Everything else is in [`SystemV`]: rights, segments that
//! nobody has attached, the values of semaphores, messages. All keep their identifiers.
//!
//! Left out, because the kernel tells nobody: what semaphores are to be given back when a process ends (`SEM_UNDO`), and which process
//! used an object last, and when.

use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use sys::sysv::{self, Permissions};
use sys::{Pid, libc};

use crate::descriptors::namespace::enter_kinds;
use crate::error::{Error, Result};
use crate::sparse::{self, Pieces};
use crate::stay::StayReason;

/// The most of a segment that nobody has attached, in bytes: it is read while the job stands still, and is held in memory.
const UNATTACHED_BYTES: u64 = 64 << 20;

/// What the kernel keeps for the job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemV {
    /// Shared memory.
    pub segments: Vec<Segment>,
    /// Semaphores.
    pub semaphores: Vec<Semaphores>,
    /// Message queues.
    pub queues: Vec<Queue>,
}

/// Identity and rights of an object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rights {
    /// Its identifier.
    pub id: i32,
    /// Its key; 0 when it has none.
    pub key: i32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Mode, with SHM_DEST and SHM_LOCKED.
    pub mode: u32,
}

/// A shared memory segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Its identity and rights.
    pub rights: Rights,
    /// Its size.
    pub bytes: u64,
    /// Content, when nobody has it attached.
    pub content: Option<Pieces>,
}

/// A set of semaphores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Semaphores {
    /// Its identity and rights.
    pub rights: Rights,
    /// The value of each.
    pub values: Vec<u16>,
}

/// A message queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    /// Its identity and rights.
    pub rights: Rights,
    /// How many bytes of messages it takes.
    pub capacity: u64,
    /// Type and content of each message, the oldest first.
    pub messages: Vec<(i64, ByteBuf)>,
}

impl Rights {
    fn new(id: i32, permissions: Permissions) -> Rights {
        let Permissions { key, uid, gid, mode } = permissions;
        Rights { id, key, uid, gid, mode }
    }

    fn permissions(self) -> Permissions {
        let Rights { id: _, key, uid, gid, mode } = self;
        Permissions { key, uid, gid, mode }
    }
}

fn enter<T: Send>(process: Pid, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    enter_kinds(process, libc::CLONE_NEWIPC, work)
}

/// The key that a segment has in the IPC namespace of a process; `None` when there is no such segment.
pub(crate) fn key(process: Pid, id: i32) -> io::Result<Option<i32>> {
    let segments = enter(process, sysv::segments)?;
    Ok(segments.iter().find(|segment| segment.id == id).map(|segment| segment.permissions.key))
}

/// Makes an empty segment in the IPC namespace of a process, and opens its memory.
pub(crate) fn make_segment(process: Pid, id: i32, key: i32, bytes: u64) -> io::Result<File> {
    let explained = |error: io::Error| io::Error::new(error.kind(), format!("System V shared memory {id}: {error}"));
    enter(process, || {
        // Whatever has the key or the identifier here has lost them at the source.
        for other in sysv::segments()? {
            if other.id == id || (key != 0 && other.permissions.key == key) {
                sysv::remove_segment(other.id)?;
            }
        }
        sysv::make_segment(id, Permissions { key, mode: 0o600, ..Permissions::default() }, bytes)?;
        sysv::open_segment(id, bytes)
    })
    .map_err(explained)
}

/// What keeps the job here.
pub(crate) fn stay_reasons(init: Pid) -> Result<Vec<StayReason>> {
    let segments =
        enter(init, sysv::segments).map_err(|error| Error::system("listing System V shared memory", error))?;
    let is_large = |segment: &&sysv::Segment| segment.attached == 0 && segment.bytes > UNATTACHED_BYTES;
    let reason = |segment: &sysv::Segment| {
        let what = format!("System V shared memory {} ({} bytes)", segment.id, segment.bytes);
        StayReason::new(1, what, "no process has it attached, and it is too large to be moved so; ipcrm removes it")
    };
    Ok(segments.iter().filter(is_large).map(reason).collect())
}

/// The job's objects. It stands still, and nothing is changed.
pub(crate) fn dump(init: Pid) -> Result<SystemV> {
    enter(init, dump_here).map_err(|error| Error::system("reading System V IPC", error))
}

fn dump_here() -> io::Result<SystemV> {
    let segment = |segment: sysv::Segment| {
        let content = if segment.attached == 0 {
            Some(sparse::read(&sysv::open_segment(segment.id, segment.bytes)?, segment.bytes)?)
        } else {
            None
        };
        Ok(Segment { rights: Rights::new(segment.id, segment.permissions), bytes: segment.bytes, content })
    };
    let semaphores = |set: sysv::SemaphoreSet| {
        Ok(Semaphores { rights: Rights::new(set.id, set.permissions), values: sysv::semaphore_values(&set)? })
    };
    let queue = |queue: sysv::Queue| {
        let messages = sysv::messages(&queue)?.into_iter().map(|(kind, content)| (kind, ByteBuf::from(content)));
        Ok(Queue {
            rights: Rights::new(queue.id, queue.permissions),
            capacity: sysv::queue_capacity(queue.id)?,
            messages: messages.collect(),
        })
    };
    Ok(SystemV {
        segments: sysv::segments()?.into_iter().map(segment).collect::<io::Result<_>>()?,
        semaphores: sysv::semaphore_sets()?.into_iter().map(semaphores).collect::<io::Result<_>>()?,
        queues: sysv::queues()?.into_iter().map(queue).collect::<io::Result<_>>()?,
    })
}

/// Completes what [`make_segment`] began, when all that attach segments have done so, and makes the rest.
pub(crate) fn restore(init: Pid, image: &SystemV) -> Result<()> {
    enter(init, || restore_here(image)).map_err(|error| Error::system("making System V IPC anew", error))
}

fn restore_here(image: &SystemV) -> io::Result<()> {
    let SystemV { segments, semaphores, queues } = image;
    let mut there = sysv::segments()?;
    for other in &there {
        // One that the source has no more. While it is attached to something that was already told to let it go, it is only marked.
        if !segments.iter().any(|segment| segment.rights.id == other.id) {
            sysv::remove_segment(other.id)?;
        }
    }
    there.retain(|other| segments.iter().any(|segment| segment.rights.id == other.id));
    for Segment { rights, bytes, content } in segments {
        if let Some(content) = content {
            // What is there was attached before, and has old content.
            if there.iter().any(|other| other.id == rights.id) {
                sysv::remove_segment(rights.id)?;
            }
            sysv::make_segment(rights.id, rights.permissions(), *bytes)?;
            sparse::write(&sysv::open_segment(rights.id, *bytes)?, content)?;
        }
        sysv::set_segment(rights.id, rights.permissions())?;
    }
    for Semaphores { rights, values } in semaphores {
        sysv::make_semaphores(rights.id, rights.permissions(), values)?;
    }
    for Queue { rights, capacity, messages } in queues {
        let messages: Vec<sysv::Message> = messages.iter().map(|(kind, content)| (*kind, content.to_vec())).collect();
        sysv::make_queue(rights.id, rights.permissions(), *capacity, &messages)?;
    }
    Ok(())
}
