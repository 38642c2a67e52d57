//! Files without a name: memfds and files that were deleted while open. Their content travels.
//!
//! Several open files of one inode refer to one [`ContentImage`]; what the job also maps is carried by the memory part, and
//! the target opens the very object that is mapped.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use serde_bytes::ByteBuf;
use sys::{fds, libc, memfd};

use super::super::image::{ContentFile, ContentImage, Kind, Origin};
use super::super::scan::Seen;
use super::{Dumping, Handler, Problem, View, index32, locks};
use crate::sparse::{self, Pieces};

/// A file without a name.
pub(in super::super) struct Nameless;

/// The most that is carried with the descriptors, which all travel while the job stands still.
const MOST_BYTES: u64 = 256 << 20;

const DELETED: &[u8] = b" (deleted)";

fn memfd_name(link: &[u8]) -> Option<&[u8]> {
    link.strip_prefix(b"/memfd:")?.strip_suffix(DELETED)
}

fn obstacle(seen: &Seen) -> Option<String> {
    let status = seen.status?;
    if status.file_type() != libc::S_IFREG {
        return Some(format!("{}: only regular files can be moved when deleted", seen.shown()));
    }
    if status.links > 0 {
        return Some(format!("{}: it was deleted but has another name; let the program open that", seen.shown()));
    }
    if status.size > MOST_BYTES {
        return Some(format!("{}: {} MB in a file without a name", seen.shown(), status.size >> 20));
    }
    None
}

impl Handler for Nameless {
    fn recognises(&self, seen: &Seen) -> bool {
        // A file may really be called so; then it has links.
        let is_regular = seen.status.is_some_and(|status| matches!(status.file_type(), libc::S_IFREG | libc::S_IFDIR));
        is_regular
            && seen.link.ends_with(DELETED)
            && (seen.status.is_some_and(|status| status.links == 0) || !has_this_path(seen))
    }

    fn obstacle(&self, seen: &Seen, _: &View<'_>) -> io::Result<Option<String>> {
        Ok(obstacle(seen))
    }

    fn dump(&self, seen: &Seen, _: usize, dump: &mut Dumping<'_>) -> Result<Kind, Problem> {
        let status = seen.status.ok_or_else(|| Problem::Stays("a file without status".into()))?;
        let identity = (status.device, status.inode);
        let content = match dump.contents.get(&identity) {
            Some(&content) => content,
            None => {
                let image = content(seen, dump)?;
                let index = index32(dump.image.contents.len());
                dump.image.contents.push(image);
                dump.contents.insert(identity, index);
                index
            }
        };
        let info = seen.info()?;
        Ok(Kind::Content(ContentFile { content, offset: info.position, locks: locks::locks(info).own }))
    }
}

fn has_this_path(seen: &Seen) -> bool {
    let path = [format!("/proc/{}/root", seen.pid).as_bytes(), &seen.link].concat();
    let found = fds::open_at(None, std::ffi::OsStr::from_bytes(&path), libc::O_PATH | libc::O_NOFOLLOW, 0)
        .and_then(|fd| fds::status(fd.as_fd()));
    found.is_ok_and(|found| seen.status.is_some_and(|own| (own.device, own.inode) == (found.device, found.inode)))
}

fn content(seen: &Seen, dump: &Dumping<'_>) -> Result<ContentImage, Problem> {
    let status = fds::status(seen.file()?.as_fd())?;
    let device = fds::device_numbers(status.device);
    let carried = |object: &&crate::memory::SharedObject| (object.device, object.inode) == (device, status.inode);
    let in_memory_image = dump.layout.objects.iter().any(|object| carried(&object));
    if !in_memory_image && let Some(reason) = obstacle(seen) {
        return Err(Problem::Stays(reason));
    }
    let origin = match memfd_name(&seen.link) {
        Some(name) => Origin::Memfd(ByteBuf::from(name)),
        None => {
            let path = seen.link.strip_suffix(DELETED).unwrap_or(&seen.link);
            let end = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0).max(1);
            Origin::Deleted(ByteBuf::from(&path[..end]))
        }
    };
    let seals = match origin {
        Origin::Memfd(_) => memfd::seals(seen.file()?)?,
        Origin::Deleted(_) => 0,
    };
    Ok(ContentImage {
        device,
        inode: status.inode,
        origin,
        mode: status.mode & 0o7777,
        owner: (status.uid, status.gid),
        size: status.size,
        data: if in_memory_image { Vec::new() } else { read(seen, status.size)? },
        in_memory_image,
        seals,
    })
}

/// The data of a file, through an open file of our own.
fn read(seen: &Seen, size: u64) -> io::Result<Pieces> {
    sparse::read(&fds::reopen(seen.file()?.as_fd(), libc::O_RDONLY)?.into(), size)
}

/// Makes the file anew, with its content; to be called inside the job's mount namespace. Seals come later: they would keep
/// others from opening it for writing.
pub(in super::super) fn make(image: &ContentImage) -> io::Result<OwnedFd> {
    let fd = match &image.origin {
        Origin::Memfd(name) => {
            // Made so that it can be sealed: else the kernel starts with F_SEAL_SEAL, which the image then has as well.
            memfd::create(&CString::new(name.as_slice())?)?.into()
        }
        Origin::Deleted(directory) => {
            let directory = std::ffi::OsStr::from_bytes(directory);
            fds::open_at(None, directory, libc::O_TMPFILE | libc::O_RDWR, image.mode & 0o777)?
        }
    };
    let file = File::from(fd);
    fds::set_size(file.as_fd(), image.size)?;
    sparse::write(&file, &image.data)?;
    fds::set_owner(file.as_fd(), image.owner.0, image.owner.1)?;
    fds::set_mode(file.as_fd(), image.mode)?;
    Ok(file.into())
}

/// Opens a nameless file once more, as one of the job's open files.
pub(in super::super) fn open(content: &OwnedFd, image: &ContentFile, flags: i32) -> io::Result<OwnedFd> {
    let fd = fds::reopen(content.as_fd(), super::paths::open_flags(flags) & !libc::O_NOFOLLOW)?;
    if image.offset != 0 {
        fds::seek(fd.as_fd(), image.offset)?;
    }
    Ok(fd)
}

/// Seals it as it was.
pub(in super::super) fn seal(content: &OwnedFd, image: &ContentImage) -> io::Result<()> {
    let missing = image.seals & !memfd::seals(content).unwrap_or(image.seals);
    if missing == 0 { Ok(()) } else { memfd::add_seals(content, missing) }
}
