//! The job's own `/dev/shm`, where shm_open(3) and sem_open(3) keep their files: a tmpfs that is mounted in its sandbox, and moves.
//!
//! The content of files that are mapped travels with the memory of the processes ([`crate::memory::ObjectKind::Shm`]) into files that
//! are made, under names of ours, when the first layout tells of them. Everything else is in the [`Entry`]s: names, rights,
//! and what nobody has mapped.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use sys::{Pid, fds, libc, vm};

use crate::descriptors::namespace::enter_kinds;
use crate::error::{Error, Result};
use crate::memory::{Layout, TrackedProcess};
use crate::sparse::{self, Pieces};
use crate::stay::StayReason;

/// Where it is.
pub(crate) const PLACE: &str = "/dev/shm";
/// Mode of the directory itself.
const MODE: u32 = 0o1777;
/// The most that nobody has mapped, in bytes: it is read while the job stands still, and is held in memory.
const UNMAPPED_BYTES: u64 = 64 << 20;

/// Something in `/dev/shm`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its path, from `/dev/shm`; empty for that itself.
    pub path: ByteBuf,
    /// Mode, without the type.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Time of the last change, nanoseconds since 1970.
    pub modified_ns: i64,
    /// What it is.
    pub what: What,
}

/// What an [`Entry`] is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A directory, before what is in it.
    Directory,
    /// A symbolic link to this.
    Link(ByteBuf),
    /// A named pipe.
    Fifo,
    /// A file. Several entries with the same device and inode are names of one.
    File {
        /// `(major, minor)` of its device at the source.
        device: (u32, u32),
        /// Inode at the source.
        inode: u64,
        /// Size in bytes.
        size: u64,
        /// `None` when it travels with the memory, or an earlier entry has it.
        content: Option<Pieces>,
    },
}

/// The directory of the job whose init this is, as we can reach it.
fn directory(init: Pid) -> PathBuf {
    PathBuf::from(format!("/proc/{init}/root{PLACE}"))
}

/// The device of the job's own `/dev/shm`; `None` when it has none of its own.
pub(crate) fn device(init: Pid) -> Option<u64> {
    let own = fs::metadata(directory(init)).ok()?.dev();
    let nodes = fs::metadata(PLACE).ok().map(|metadata| metadata.dev());
    (nodes != Some(own)).then_some(own)
}

/// Makes a file for mapped content, to be named by [`restore`]. `id` is the shared object's.
pub(crate) fn make(init: Pid, id: u32) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).open(directory(init).join(provisional(id)))
}

fn provisional(id: u32) -> String {
    format!(".migd-object-{id}")
}

/// Calls `visit` for everything below a directory, with the path from there; directories come before what is in them.
fn walk(top: &Path, below: &Path, visit: &mut dyn FnMut(&Path, &Path, &Metadata) -> io::Result<()>) -> io::Result<()> {
    let mut names: Vec<_> =
        fs::read_dir(top.join(below))?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
    names.sort_unstable();
    for name in names {
        let path = below.join(name);
        let full = top.join(&path);
        let metadata = match full.symlink_metadata() {
            // A running job may have removed it; one that stands still hasn't.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        visit(&path, &full, &metadata)?;
        if metadata.is_dir() {
            walk(top, &path, visit)?;
        }
    }
    Ok(())
}

fn identity(metadata: &Metadata) -> ((u32, u32), u64) {
    (fds::device_numbers(metadata.dev()), metadata.ino())
}

/// What keeps the job here.
pub(crate) fn stay_reasons(init: Pid, processes: &[TrackedProcess]) -> Result<Vec<StayReason>> {
    let mut reasons = Vec::new();
    if device(init).is_none() {
        return Ok(reasons);
    }
    let mut files = HashMap::new();
    let looked = walk(&directory(init), Path::new(""), &mut |path, _, metadata| {
        let kind = metadata.file_type();
        if kind.is_char_device() || kind.is_block_device() {
            let what = format!("{PLACE}/{}", path.display());
            reasons.push(StayReason::new(1, what, "a device node in memory can't be moved"));
        } else if kind.is_file() {
            files.insert(identity(metadata), metadata.blocks() * 512);
        }
        Ok(())
    });
    looked.map_err(|error| Error::system("looking through /dev/shm", error))?;
    let is_large = |files: &HashMap<_, u64>| files.values().sum::<u64>() > UNMAPPED_BYTES;
    if is_large(&files) {
        for mapping in processes.iter().flat_map(|process| vm::maps(process.pid).unwrap_or_default()) {
            files.remove(&(mapping.device, mapping.inode));
        }
    }
    if is_large(&files) {
        let most = UNMAPPED_BYTES >> 20;
        let why = format!("more than {most} MB are in files there that no process has mapped; fewer can be moved");
        reasons.push(StayReason::new(1, PLACE, why));
    }
    Ok(reasons)
}

/// What there is. The job stands still.
pub(crate) fn dump(init: Pid, layout: &Layout) -> Result<Vec<Entry>> {
    dump_directory(init, layout).map_err(|error| Error::system("reading /dev/shm", error))
}

fn dump_directory(init: Pid, layout: &Layout) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    if device(init).is_none() {
        return Ok(entries);
    }
    let top = directory(init);
    let metadata = fs::metadata(&top)?;
    if (metadata.mode() & 0o7777, metadata.uid(), metadata.gid()) != (MODE, 0, 0) {
        entries.push(entry(Path::new(""), &metadata, What::Directory));
    }
    let mut known: HashSet<_> = layout.objects.iter().map(|object| (object.device, object.inode)).collect();
    walk(&top, Path::new(""), &mut |path, full, metadata| {
        let kind = metadata.file_type();
        let what = if kind.is_dir() {
            What::Directory
        } else if kind.is_symlink() {
            What::Link(ByteBuf::from(fs::read_link(full)?.into_os_string().into_vec()))
        } else if kind.is_fifo() {
            What::Fifo
        } else if kind.is_file() {
            let (device, inode) = identity(metadata);
            let content = if known.insert((device, inode)) {
                Some(sparse::read(&File::open(full)?, metadata.len())?)
            } else {
                None
            };
            What::File { device, inode, size: metadata.len(), content }
        } else if kind.is_socket() {
            // Made by whoever binds it.
            return Ok(());
        } else {
            return Err(io::Error::other(format!("{} is a device node", path.display())));
        };
        entries.push(entry(path, metadata, what));
        Ok(())
    })?;
    Ok(entries)
}

fn entry(path: &Path, metadata: &Metadata, what: What) -> Entry {
    Entry {
        path: ByteBuf::from(path.as_os_str().as_bytes()),
        mode: metadata.mode() & 0o7777,
        owner: (metadata.uid(), metadata.gid()),
        modified_ns: metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()),
        what,
    }
}

/// Names what [`make`] made, makes the rest, and removes what was made for files that are gone. `objects` are the shared objects
/// that were made here: number, device and inode.
pub(crate) fn restore(init: Pid, entries: &[Entry], objects: &[(u32, (u32, u32), u64)]) -> Result<()> {
    if entries.is_empty() && objects.is_empty() {
        return Ok(());
    }
    enter_kinds(init, libc::CLONE_NEWNS, || restore_here(Path::new(PLACE), entries, objects))
        .map_err(|error| Error::system("making /dev/shm anew", error))
}

fn restore_here(top: &Path, entries: &[Entry], objects: &[(u32, (u32, u32), u64)]) -> io::Result<()> {
    let mut provisional: HashMap<_, _> =
        objects.iter().map(|&(id, device, inode)| ((device, inode), top.join(provisional(id)))).collect();
    let mut directories: HashSet<PathBuf> = HashSet::from([PathBuf::new()]);
    let mut files: HashMap<((u32, u32), u64), PathBuf> = HashMap::new();
    for entry in entries {
        let path = Path::new(OsStr::from_bytes(&entry.path));
        let full = top.join(path);
        let is_below = path.components().all(|part| matches!(part, Component::Normal(_)));
        // Below a directory that was made here, so that no link leads elsewhere.
        if !is_below || path.parent().is_some_and(|parent| !directories.contains(parent)) {
            return Err(invalid(path, "isn't in a directory of the image"));
        }
        match &entry.what {
            What::Directory => {
                if directories.insert(path.to_owned()) {
                    fs::create_dir(&full)?;
                }
            }
            What::Link(target) => symlink(OsStr::from_bytes(target), &full)?,
            What::Fifo => fds::make_fifo(&full)?,
            What::File { device, inode, size, content } => match (content, files.get(&(*device, *inode))) {
                (None, Some(other)) => fs::hard_link(other, &full)?,
                (None, None) => {
                    let made = provisional.remove(&(*device, *inode));
                    let made = made.ok_or_else(|| invalid(path, "has content that isn't in the image"))?;
                    fs::rename(made, &full)?;
                    files.insert((*device, *inode), full.clone());
                }
                (Some(content), _) => {
                    let file = File::options().write(true).create_new(true).open(&full)?;
                    fds::set_size(file.as_fd(), *size)?;
                    sparse::write(&file, content)?;
                    files.insert((*device, *inode), full.clone());
                }
            },
        }
        lchown(&full, Some(entry.owner.0), Some(entry.owner.1))?;
        if !matches!(entry.what, What::Link(_)) {
            fs::set_permissions(&full, Permissions::from_mode(entry.mode & 0o7777))?;
        }
    }
    for gone in provisional.into_values() {
        fs::remove_file(gone)?;
    }
    // Last, since what is made in a directory changes its time.
    for entry in entries.iter().filter(|entry| matches!(entry.what, What::Directory | What::File { .. })) {
        let modified = SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(entry.modified_ns).unwrap_or(0));
        File::open(top.join(OsStr::from_bytes(&entry.path)))?.set_modified(modified)?;
    }
    Ok(())
}

fn invalid(path: &Path, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, inode: u64, content: Option<&str>) -> Entry {
        let content = content.map(|content| vec![(0, ByteBuf::from(content))]);
        let size = content.as_ref().map_or(0, |content| content[0].1.len() as u64);
        let what = What::File { device: (0, 9), inode, size, content };
        Entry { path: ByteBuf::from(path), mode: 0o640, owner: (0, 0), modified_ns: 1_000_000_007, what }
    }

    fn other(path: &str, what: What) -> Entry {
        Entry { what, ..file(path, 0, None) }
    }

    #[test]
    fn entries_get_what_was_made_for_them() {
        let place = tempfile::tempdir().unwrap();
        let top = place.path();
        for id in [3, 4] {
            fs::write(top.join(provisional(id)), format!("object {id}")).unwrap();
        }
        let entries = [
            other("queue", What::Directory),
            file("queue/one", 7, Some("content")),
            file("two", 8, None),
            file("zwei", 8, None),
            file("uno", 7, None),
            other("link", What::Link(ByteBuf::from("two"))),
            other("pipe", What::Fifo),
        ];
        restore_here(top, &entries, &[(3, (0, 9), 8), (4, (0, 9), 9)]).unwrap();
        let content = |name: &str| fs::read_to_string(top.join(name)).unwrap();
        assert_eq!(["queue/one", "uno"].map(content), ["content"; 2]);
        assert_eq!(["two", "zwei", "link"].map(content), ["object 3"; 3]);
        assert!(top.join("pipe").symlink_metadata().unwrap().file_type().is_fifo());
        let metadata = fs::metadata(top.join("queue/one")).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.nlink(), metadata.mtime_nsec()), (0o640, 2, 7));
        assert_eq!(fs::read_dir(top).unwrap().count(), 6, "nothing is left of object 4");
    }

    #[test]
    fn an_image_reaches_nothing_else() {
        let place = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let leads_out = other("out", What::Link(ByteBuf::from(elsewhere.path().as_os_str().as_bytes())));
        for path in ["/etc/x", "../x", "a/../../x", "none/x", "out/x"] {
            let top = place.path().join(path.replace('/', "-"));
            fs::create_dir(&top).unwrap();
            let refused = restore_here(&top, &[leads_out.clone(), file(path, 1, Some("x"))], &[]);
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidData, "{path}");
        }
        assert!(restore_here(place.path(), &[file("x", 1, None)], &[]).is_err(), "no content");
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    }
}
