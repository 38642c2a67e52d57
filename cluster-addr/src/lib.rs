//! Cluster-wide unique addresses and the one authority on who owns what.
//!
//! - [`directory`]: a small key-value interface with transactions and watches, and its engines: [`embedded`], a file that
//!   one node serves, and [`etcd`]. Ownership of a job changes by one transaction here and by nothing else.
//! - [`records`]: what is stored: the cluster, its nodes, blocks, addresses and jobs.
//! - [`allocator`]: which address a new job gets, decided from blocks this node holds, without I/O or a clock.
//! - [`cluster`]: the operations the daemon calls; each is one transaction.
//!
//! An address is handed out only by a transaction that finds it unused, so two nodes can't give out the same one even if
//! their allocators disagree about blocks.

pub mod allocator;
pub mod cluster;
pub mod directory;
pub mod embedded;
#[cfg(feature = "etcd")]
pub mod etcd;
pub mod records;

pub use cluster::{Cluster, ClusterError, NewJob, Transfer, Wanted};
pub use directory::{Directory, DirectoryError};
pub use embedded::Embedded;
#[cfg(feature = "etcd")]
pub use etcd::Etcd;
pub use records::{BlockRecord, ClusterRecord, JobId, JobRecord, NodeRecord, Owner, Prefix};
