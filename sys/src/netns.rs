//! Named network namespaces, kept as files under `/run/netns` as `ip netns` keeps them.
//!
//! A namespace lives as long as its file, a descriptor or a process refers to it. Threads of one process may be in
//! different namespaces, so work inside a namespace is done on a thread of its own ([`NetNamespace::run`]).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::namespaces;

/// Where the files of named namespaces live.
pub const NETNS_DIRECTORY: &str = "/run/netns";

/// A network namespace, held open.
#[derive(Debug)]
pub struct NetNamespace {
    file: File,
}

/// What tells one namespace from every other one on this machine: device and inode of its file in nsfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

/// The path of the namespace file called `name`.
#[must_use]
pub fn named_path(name: &str) -> PathBuf {
    Path::new(NETNS_DIRECTORY).join(name)
}

impl NetNamespace {
    /// Makes a new namespace and gives it a file `/run/netns/NAME`.
    ///
    /// # Errors
    /// `AlreadyExists` when the name is taken; otherwise what the kernel said (it needs `CAP_SYS_ADMIN`).
    pub fn create_named(name: &str) -> io::Result<NetNamespace> {
        fs::create_dir_all(NETNS_DIRECTORY)?;
        let path = named_path(name);
        fs::OpenOptions::new().write(true).create_new(true).open(&path)?;
        let bound = on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        });
        let opened = bound.and_then(|()| NetNamespace::open(&path));
        if opened.is_err() {
            // A half-made name would stand in the way of the next attempt; the first error is the one that counts.
            let _ = remove_named(name);
        }
        opened
    }

    /// Opens the namespace whose file is `/run/netns/NAME`.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn open_named(name: &str) -> io::Result<NetNamespace> {
        NetNamespace::open(&named_path(name))
    }

    /// Opens a namespace by the path of its file, for example `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// What opening the file said.
    pub fn open(path: &Path) -> io::Result<NetNamespace> {
        Ok(NetNamespace { file: File::open(path)? })
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn current() -> io::Result<NetNamespace> {
        NetNamespace::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// What tells this namespace from others.
    ///
    /// # Errors
    /// What `fstat` said.
    pub fn id(&self) -> io::Result<NamespaceId> {
        let metadata = self.file.metadata()?;
        Ok(NamespaceId { device: metadata.dev(), inode: metadata.ino() })
    }

    /// Takes the calling thread, and what it starts from now on, into the namespace.
    ///
    /// # Errors
    /// What `setns` said.
    pub fn enter(&self) -> io::Result<()> {
        enter(self.as_fd())
    }

    /// Runs `work` inside the namespace, on a thread made for it; the caller's thread stays where it is.
    ///
    /// # Errors
    /// When the namespace can't be entered, or what `work` returned.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_own_thread(|| {
            self.enter()?;
            work()
        })
    }
}

impl From<OwnedFd> for NetNamespace {
    fn from(fd: OwnedFd) -> NetNamespace {
        NetNamespace { file: fd.into() }
    }
}

impl AsFd for NetNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The network namespace a process is in.
///
/// # Errors
/// `NotFound` when the process is gone (or a zombie, which is in none).
pub fn of_process(pid: u32) -> io::Result<NamespaceId> {
    let metadata = fs::metadata(format!("/proc/{pid}/ns/net"))?;
    Ok(NamespaceId { device: metadata.dev(), inode: metadata.ino() })
}

/// Takes the calling thread, and what it starts from now on, into a network namespace. Sockets it makes belong there.
///
/// # Errors
/// As setns(2).
pub fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    namespaces::enter_namespaces(namespace, libc::CLONE_NEWNET)
}

/// Takes the name of a namespace away; the namespace itself ends with its last process. A name that is not there
/// is no error.
///
/// # Errors
/// What unmounting or removing the file said.
pub fn remove_named(name: &str) -> io::Result<()> {
    let path = named_path(name);
    // Somebody may have mounted twice on the file; EINVAL says that nothing is mounted any more.
    loop {
        match umount2(&path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The names under `/run/netns` that start with `prefix`, sorted.
///
/// # Errors
/// What reading the directory said; a missing directory holds no names.
pub fn named_with_prefix(prefix: &str) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(NETNS_DIRECTORY) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(name) = entry?.file_name().into_string()
            && name.starts_with(prefix)
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Runs `work` on a thread that ends with it, so that a change of namespace stays there.
fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_namespace_is_another_one_and_leaves_nothing_behind() {
        let name = format!("migd-unit-{}", std::process::id());
        let namespace = match NetNamespace::create_named(&name) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return,
            namespace => namespace.expect("a namespace can be made"),
        };
        let here = NetNamespace::current().and_then(|namespace| namespace.id()).expect("the current namespace");
        let there = namespace.run(|| NetNamespace::current()?.id());
        let again = NetNamespace::create_named(&name).map_err(|error| error.kind());
        let listed = named_with_prefix(&name);
        remove_named(&name).expect("the name goes away");
        remove_named(&name).expect("and again is no error");
        assert_eq!(there.expect("runs inside"), namespace.id().expect("has an id"));
        assert_ne!(here, namespace.id().expect("has an id"));
        assert_eq!(again.map(|_| ()), Err(io::ErrorKind::AlreadyExists));
        assert_eq!(listed.expect("can be listed"), std::slice::from_ref(&name));
        assert!(!named_path(&name).exists());
    }
}
