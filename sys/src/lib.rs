//! The kernel interfaces migd needs, behind safe wrappers. The only crate of the workspace with `unsafe`.
//!
//! | of | modules |
//! | --- | --- |
//! | processes | [`process`], [`clone`], [`proc`]; [`ptrace`] and, on it, [`tape`]; [`seccomp`] |
//! | memory | [`vm`], [`pagemap`], [`uffd`], [`memfd`], [`sysv`] |
//! | descriptors | [`fds`], [`tty`]; what the net plane's fast path takes: [`epoll`], [`unix`], [`lend`] |
//! | networks | [`netlink`], [`tun`], [`packet`], [`capture`], [`ebpf`], [`steering`] |
//! | namespaces | [`namespaces`], [`netns`] |

pub mod capture;
pub mod clone;
pub mod ebpf;
pub mod epoll;
pub mod fds;
pub mod lend;
pub mod memfd;
pub mod namespaces;
pub mod netlink;
pub mod netns;
mod outcome;
pub mod packet;
pub mod pagemap;
pub mod proc;
pub mod process;
pub mod ptrace;
pub mod seccomp;
pub mod steering;
pub mod sysv;
pub mod tape;
pub mod tty;
pub mod tun;
pub mod uffd;
pub mod unix;
pub mod vm;

pub use libc;
pub use nix::unistd::Pid;
