//! migd moves running, unmodified Linux servers from one machine to another in the middle of their TCP connections.
//!
//! | module | what |
//! | --- | --- |
//! | [`cli`] | the command line |
//! | [`api`] | what command line, daemon and shims say to each other |
//! | [`daemon`] | one per node: jobs, peers, directory, routes |
//! | [`shim`] | one per job: launch, output, move |
//! | [`net`] | a job's packet pump and bridge, inside its shim |
//! | [`lab`], [`demo`], [`mod@bench`] | a cluster of network namespaces, and what is shown and measured in it |

pub mod api;
pub mod bench;
pub mod cli;
pub mod daemon;
pub mod demo;
pub mod lab;
pub mod net;
pub mod shim;

/// What the kernel sends to a process that writes beyond its limit of file sizes (`ulimit -f`), and which ends one that has no handler. Daemon
/// and shims have one, so that the write fails and no job ends with its log. Programs that they start don't inherit it.
const FILE_TOO_LARGE: tokio::signal::unix::SignalKind = tokio::signal::unix::SignalKind::from_raw(nix::libc::SIGXFSZ);
