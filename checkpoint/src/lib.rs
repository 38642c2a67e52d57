//! A process tree to an image and back, with live pre-copy of its memory.
//!
//! | module | what |
//! | --- | --- |
//! | [`sandbox`], [`init`] | the namespaces a job lives in, and the PID 1 inside them |
//! | [`source`] | a running tree: pre-copy, freeze, dump, and either resume or discard |
//! | [`target`] | the tree built anew: stubs, memory, everything else, run |
//! | [`image`], [`offer`] | the plain data that travels, with [`memory::Layout`] |
//! | [`memory`] | address spaces: dirty tracking and filling |
//! | [`descriptors`] | open files to an image and back |
//! | [`shm`] | the job's `/dev/shm`: what is not mapped of it, and its names |
//! | [`sysv`] | System V shared memory that nobody has attached, semaphores, message queues |
//! | [`terminals`] | pseudo-terminals, and whom they control |
//! | [`sparse`] | content of files, without their holes |
//! | [`stay`], [`external`] | what can't move, and what belongs to the caller |
//!
//! The crate knows no TCP, no network and no protocol: descriptors of which the caller holds the other end are named by
//! [`External`] keys, and everything that travels is handed to a [`MemorySink`] or returned as a [`TreeImage`].
//!
//! ptrace belongs to a thread: every call on one [`Source`] or one [`Target`], including its drop, must come from the
//! thread that made it, and nothing else in the calling process may reap children with `waitpid(-1)`.

mod calls;
pub mod descriptors;
mod dump;
pub mod error;
pub mod external;
pub mod filters;
mod freeze;
pub mod image;
pub mod init;
pub mod memory;
pub mod offer;
mod partial;
mod restore;
mod robust;
pub mod sandbox;
pub mod shm;
pub mod source;
pub mod sparse;
pub mod stay;
mod stubs;
mod survey;
pub mod sysv;
pub mod target;
pub mod terminals;

pub use descriptors::Preview;
pub use error::{Error, Obstacle, Result};
pub use external::{External, ExternalKey, FdKind};
pub use image::TreeImage;
pub use memory::{Layout, MemoryChunk, MemorySink, RoundStats};
pub use offer::Offer;
pub use sandbox::{ClockOffsets, Event, ExitStatus, Sandbox, SandboxSpec};
pub use source::Source;
pub use stay::StayReason;
pub use sys::clone::Launch;
pub use target::Target;
