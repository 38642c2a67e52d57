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
