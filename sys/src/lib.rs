//! The kernel interfaces migd needs, behind safe wrappers. The only crate of the workspace with `unsafe`.

pub mod netlink;
pub mod packet;
pub mod pagemap;
pub mod uffd;
pub mod vm;

pub use nix::unistd::Pid;
