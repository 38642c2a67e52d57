//! Files, directories and devices that have a path.
//!
//! The target opens the same path in the job's mount namespace. So the path must lead to the very file that is open, here
//! and there: here it is compared by inode, there by size (and before the freeze by time, see `required_files`).

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use serde_bytes::ByteBuf;
use sys::fds::{self, Status};
use sys::libc;

use super::super::image::{Kind, PathImage, PathKind};
use super::super::scan::Seen;
use super::{Dumping, Handler, Problem, View, locks};

/// An O_PATH descriptor.
pub(in super::super) struct Named;

impl Handler for Named {
    fn recognises(&self, seen: &Seen) -> bool {
        // A socket opened with O_PATH has a path, an open one never has.
        seen.link.starts_with(b"/") && seen.info().is_ok_and(|info| info.flags & libc::O_PATH != 0)
    }

    fn obstacle(&self, seen: &Seen, view: &View<'_>) -> io::Result<Option<String>> {
        moved_away(seen, view)
    }

    fn dump(&self, seen: &Seen, _: usize, dump: &mut Dumping<'_>) -> Result<Kind, Problem> {
        if let Some(reason) = moved_away(seen, dump.view)? {
            return Err(Problem::Stays(reason));
        }
        Ok(Kind::Path(PathImage {
            path: ByteBuf::from(seen.link.clone()),
            what: PathKind::Name,
            offset: 0,
            locks: Vec::new(),
        }))
    }
}

/// Anything with a path that handlers before it didn't want.
pub(in super::super) struct Path;

/// Devices that are the same everywhere and keep no state: null, zero, full, random, urandom.
const STATELESS: [(u32, u32); 5] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];

/// Whether it is a terminal: /dev/tty, consoles, both ends of pseudo-terminals.
pub(in super::super) fn is_terminal(status: &Status) -> bool {
    let (major, _) = fds::device_numbers(status.special);
    status.file_type() == libc::S_IFCHR && matches!(major, 2..=5 | 136..=143)
}

/// Whether the kernel makes the file's content when it is read.
fn is_generated(seen: &Seen) -> io::Result<bool> {
    const PROC: i64 = 0x9fa0;
    const SYSFS: i64 = 0x6265_6572;
    const CGROUP: i64 = 0x0027_e0eb;
    const CGROUP2: i64 = 0x6367_7270;
    // Only these directories can be on such file systems: asking would cost a duplicate of every descriptor.
    if !seen.link.starts_with(b"/proc/") && !seen.link.starts_with(b"/sys/") && seen.link != b"/proc" {
        return Ok(false);
    }
    Ok(matches!(fds::file_system(seen.file()?.as_fd())?, PROC | SYSFS | CGROUP | CGROUP2))
}

fn moved_away(seen: &Seen, view: &View<'_>) -> io::Result<Option<String>> {
    let Some(status) = seen.status else { return Ok(None) };
    let there = match view.status_of(&seen.link) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Some(format!("{} is not there any more under this path", seen.shown())));
        }
        Err(error) => return Err(error),
    };
    if (there.device, there.inode) == (status.device, status.inode) {
        return Ok(None);
    }
    Ok(Some(format!("its path {} leads to another file by now; let the program open it again", seen.shown())))
}

fn obstacle(seen: &Seen, view: &View<'_>) -> io::Result<Option<String>> {
    let Some(status) = seen.status else { return Ok(None) };
    match status.file_type() {
        libc::S_IFCHR if is_terminal(&status) => {
            return Ok(Some(format!("terminal {}; run the program without one", seen.shown())));
        }
        libc::S_IFCHR if !STATELESS.contains(&fds::device_numbers(status.special)) => {
            return Ok(Some(format!("device {}; it belongs to this machine", seen.shown())));
        }
        libc::S_IFBLK => return Ok(Some(format!("disk {}; it belongs to this machine", seen.shown()))),
        libc::S_IFREG | libc::S_IFDIR | libc::S_IFCHR => {}
        _ => return Ok(Some(format!("{}; this kind can't be moved", seen.shown()))),
    }
    if is_generated(seen)? {
        return Ok(None);
    }
    if locks::locks(seen.info()?).lease {
        return Ok(Some(format!("{} has a lease (F_SETLEASE)", seen.shown())));
    }
    moved_away(seen, view)
}

impl Handler for Path {
    fn recognises(&self, seen: &Seen) -> bool {
        seen.link.starts_with(b"/") && seen.status.is_some()
    }

    fn obstacle(&self, seen: &Seen, view: &View<'_>) -> io::Result<Option<String>> {
        obstacle(seen, view)
    }

    fn dump(&self, seen: &Seen, _: usize, dump: &mut Dumping<'_>) -> Result<Kind, Problem> {
        if let Some(reason) = obstacle(seen, dump.view)? {
            return Err(Problem::Stays(reason));
        }
        let status = seen.status.ok_or_else(|| Problem::Stays("a file without status".into()))?;
        let what = match status.file_type() {
            _ if is_generated(seen)? => PathKind::Generated,
            libc::S_IFREG => PathKind::Regular { size: status.size },
            libc::S_IFDIR => PathKind::Directory,
            _ => {
                let (major, minor) = fds::device_numbers(status.special);
                PathKind::Device { major, minor }
            }
        };
        let info = seen.info()?;
        Ok(Kind::Path(PathImage {
            path: ByteBuf::from(seen.link.clone()),
            what,
            offset: info.position,
            locks: locks::locks(info).own,
        }))
    }
}

/// Flags that open(2) takes and that stay with an open file.
const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_DIRECT
    | libc::O_DIRECTORY
    | libc::O_DSYNC
    | libc::O_LARGEFILE
    | libc::O_NOATIME
    | libc::O_NOFOLLOW
    | libc::O_NONBLOCK
    | libc::O_PATH
    | libc::O_SYNC;

/// Flags for opening again what had these flags.
pub(in super::super) fn open_flags(flags: i32) -> i32 {
    flags & OPEN_FLAGS
}

/// Opens it; to be called inside the job's mount namespace.
pub(in super::super) fn open(image: &PathImage, flags: i32) -> io::Result<OwnedFd> {
    let path = OsStr::from_bytes(&image.path);
    // An O_PATH descriptor of a symbolic link has O_NOFOLLOW among its flags, or it would be one of the link's target.
    let flags = open_flags(flags) | libc::O_NOCTTY;
    let fd = fds::open_at(None, path, flags, 0)?;
    let status = fds::status(fd.as_fd())?;
    let differs = match image.what {
        PathKind::Regular { size } if status.file_type() == libc::S_IFREG && status.size == size => None,
        PathKind::Regular { size } if status.file_type() == libc::S_IFREG => {
            Some(format!("has {} bytes here and {size} at the source; is it on a shared file system?", status.size))
        }
        PathKind::Regular { .. } => Some("is no regular file here".to_owned()),
        PathKind::Device { major, minor } if fds::device_numbers(status.special) != (major, minor) => {
            Some("is another device here".to_owned())
        }
        PathKind::Directory if status.file_type() != libc::S_IFDIR => Some("is no directory here".to_owned()),
        _ => None,
    };
    if let Some(differs) = differs {
        return Err(io::Error::other(format!("{} {differs}", path.to_string_lossy())));
    }
    if image.offset != 0 && !matches!(image.what, PathKind::Name | PathKind::Device { .. }) {
        fds::seek(fd.as_fd(), image.offset)?;
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_the_descriptor_do_not_get_into_the_file() {
        let flags = libc::O_RDWR | libc::O_APPEND | libc::O_CLOEXEC | libc::O_CREAT | libc::O_TRUNC;
        assert_eq!(open_flags(flags), libc::O_RDWR | libc::O_APPEND);
    }
}
