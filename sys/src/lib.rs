//! The kernel interfaces migd needs, behind safe wrappers. The only crate of the workspace with `unsafe`.

pub mod epoll;
pub mod netlink;
pub mod packet;
pub mod pagemap;
pub mod seccomp;
pub mod tun;
pub mod uffd;
pub mod unix;
pub mod vm;
pub use nix::unistd::Pid;
