//! From `/proc/PID/smaps` to areas: what is behind each mapping, and which mappings can't move.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

use sys::Pid;
use sys::vm::{self, DetailedMapping, Mapping};

use super::PAGE;
use super::layout::{Area, AreaFlags, Backing, KernelArea, ObjectKind, Protection};

/// A mapping that can't move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// The mapping: its addresses, and its name if it has one.
    pub what: String,
    /// Why it can't move.
    pub why: &'static str,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

/// Lists the mappings of a process that can't move. An empty list means that its memory can.
///
/// # Errors
/// `/proc/PID/smaps` can't be read.
pub fn obstacles(pid: Pid) -> io::Result<Vec<Obstacle>> {
    let mut files = Files::new(pid, None, KnownFiles::new());
    let mut obstacles = Vec::new();
    for detailed in vm::detailed_maps(pid)? {
        if let Err(Unmovable::Obstacle(why)) = classify(&detailed, &mut files) {
            obstacles.push(Obstacle { what: describe(&detailed.mapping), why });
        }
    }
    Ok(obstacles)
}

pub(super) fn describe(mapping: &Mapping) -> String {
    let mut what = format!("mapping {:x}-{:x}", mapping.start, mapping.end);
    if !mapping.name.is_empty() {
        what.push(' ');
        what.push_str(&String::from_utf8_lossy(&mapping.name));
    }
    what
}

/// Why a mapping isn't an area.
#[derive(Debug)]
pub(super) enum Unmovable {
    /// Nothing that belongs to the process (`[vsyscall]`).
    Nothing,
    /// It can't move.
    Obstacle(&'static str),
    /// It went away while we looked.
    Vanished,
}

/// What is behind a mapping; a shared object is still without its number.
pub(super) struct Classified {
    pub area: Area,
    pub object: Option<FoundObject>,
}

/// A mapping of memory that becomes a [`super::SharedObject`].
#[derive(Debug, Clone)]
pub(super) struct FoundObject {
    pub kind: ObjectKind,
    pub device: (u32, u32),
    pub inode: u64,
    /// A process that maps it.
    pub pid: Pid,
    /// `/proc/PID/map_files/START-END`: opens the object itself.
    pub opener: PathBuf,
}

/// Looks files up, each once.
pub(super) struct Files {
    pid: Pid,
    /// The device of the job's own `/dev/shm`.
    shm: Option<u64>,
    known: KnownFiles,
}

/// What is known of files that processes map. When one of them is deleted, or its path leads elsewhere, its name among the mappings
/// is another.
pub(super) type KnownFiles = HashMap<FileIdentity, FileState>;

const NO_DEVICE: (u32, u32) = (0, 0);

/// Device, inode, name.
pub(super) type FileIdentity = ((u32, u32), u64, Vec<u8>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileState {
    /// The path leads to the mapped file.
    Present,
    /// The path leads elsewhere or nowhere.
    Deleted,
    /// Not a regular file.
    Device,
    /// It is in the job's own `/dev/shm`, or was.
    Shm,
}

impl Files {
    pub fn new(pid: Pid, shm: Option<u64>, known: KnownFiles) -> Files {
        Files { pid, shm, known }
    }

    /// What was known, and was found.
    pub fn into_known(self) -> KnownFiles {
        self.known
    }

    fn state(&mut self, mapping: &Mapping) -> io::Result<FileState> {
        let key = (mapping.device, mapping.inode, mapping.name.clone());
        if let Some(state) = self.known.get(&key) {
            return Ok(*state);
        }
        // The link leads to the mapped file itself, whatever has become of its path. Device numbers in maps aren't
        // comparable with stat's on every file system, so both sides come from stat.
        let mapped = fs::metadata(self.opener(mapping))?;
        let state = if mapped.file_type().is_char_device() || mapped.file_type().is_block_device() {
            FileState::Device
        } else if self.shm == Some(mapped.dev()) {
            FileState::Shm
        } else if mapped.nlink() > 0 && self.at_path(&mapping.name).is_ok_and(|found| is_same(&found, &mapped)) {
            FileState::Present
        } else {
            FileState::Deleted
        };
        self.known.insert(key, state);
        Ok(state)
    }

    fn at_path(&self, path: &[u8]) -> io::Result<Metadata> {
        let mut full = format!("/proc/{}/root", self.pid).into_bytes();
        full.extend_from_slice(path);
        fs::metadata(OsStr::from_bytes(&full))
    }

    fn opener(&self, mapping: &Mapping) -> PathBuf {
        PathBuf::from(format!("/proc/{}/map_files/{:x}-{:x}", self.pid, mapping.start, mapping.end))
    }
}

fn is_same(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

pub(super) fn classify(detailed: &DetailedMapping, files: &mut Files) -> Result<Classified, Unmovable> {
    let mapping = &detailed.mapping;
    let name = mapping.name.as_slice();
    let mut protection = Protection::empty();
    protection.set(Protection::READ, mapping.read);
    protection.set(Protection::WRITE, mapping.write);
    protection.set(Protection::EXECUTE, mapping.execute);
    let mut area = Area {
        start: mapping.start,
        end: mapping.end,
        protection,
        shared: mapping.shared,
        backing: Backing::Anonymous,
        flags: area_flags(detailed),
        name: anonymous_name(name).to_vec(),
    };
    let kernel = match name {
        b"[vsyscall]" => return Err(Unmovable::Nothing),
        b"[vdso]" => Some(KernelArea::Vdso),
        b"[vvar]" => Some(KernelArea::Vvar),
        b"[vvar_vclock]" => Some(KernelArea::VvarClock),
        _ => None,
    };
    if let Some(kernel) = kernel {
        area.backing = Backing::Kernel(kernel);
        return Ok(Classified { area, object: None });
    }
    if let Some(why) = obstacle(detailed) {
        return Err(Unmovable::Obstacle(why));
    }
    if detailed.has(b"ht") {
        area.backing = Backing::HugePages { page_size: detailed.page_size };
        return Ok(Classified { area, object: None });
    }
    // The inode of System V shared memory is its identifier, and the first one is 0.
    let segment_key = segment_key(mapping);
    if segment_key.is_none() && (mapping.inode == 0 || (!mapping.shared && name == b"/dev/zero")) {
        return Ok(Classified { area, object: None });
    }
    let writable = mapping.shared && detailed.has(b"mw");
    let mut device = mapping.device;
    let kind = if let Some(key) = segment_key {
        let bytes = fs::metadata(files.opener(mapping)).map_err(|_| Unmovable::Vanished)?.len();
        if mapping.offset != 0 || mapping.end - mapping.start != bytes.next_multiple_of(PAGE) {
            return Err(Unmovable::Obstacle(
                "a part of the System V shared memory was unmapped or protected otherwise",
            ));
        }
        let id = i32::try_from(mapping.inode).map_err(|_| Unmovable::Vanished)?;
        // Its device has files as well, whose inodes are counted apart. No descriptor can be of a segment.
        device = NO_DEVICE;
        ObjectKind::SystemV { id, key }
    } else if name == b"/dev/zero (deleted)" || name.starts_with(b"[anon_shmem:") {
        ObjectKind::Anonymous
    } else if let Some(rest) = name.strip_prefix(b"/memfd:") {
        ObjectKind::Memfd(rest.strip_suffix(b" (deleted)").unwrap_or(rest).to_vec())
    } else {
        match files.state(mapping).map_err(|_| Unmovable::Vanished)? {
            FileState::Device => return Err(Unmovable::Obstacle("a device's memory exists on this machine only")),
            FileState::Shm => ObjectKind::Shm,
            FileState::Deleted => ObjectKind::Deleted(name.strip_suffix(b" (deleted)").unwrap_or(name).to_vec()),
            FileState::Present => {
                area.backing = Backing::File {
                    path: name.to_vec(),
                    offset: mapping.offset,
                    device: mapping.device,
                    inode: mapping.inode,
                    writable,
                };
                return Ok(Classified { area, object: None });
            }
        }
    };
    // The number is the tracker's to give.
    area.backing = Backing::Object { id: 0, offset: mapping.offset, writable };
    let opener = files.opener(mapping);
    let object = FoundObject { kind, device, inode: mapping.inode, pid: files.pid, opener };
    Ok(Classified { area, object: Some(object) })
}

/// What can be told from the line alone.
fn obstacle(detailed: &DetailedMapping) -> Option<&'static str> {
    let mapping = &detailed.mapping;
    let name = mapping.name.as_slice();
    if detailed.has(b"io") || detailed.has(b"pf") {
        return Some("a device's memory exists on this machine only");
    }
    if detailed.has(b"um") || detailed.has(b"ui") {
        return Some("the program handles page faults of it itself (userfaultfd)");
    }
    if detailed.has(b"ss") {
        return Some("shadow stacks can't be rebuilt");
    }
    // An execute-only mapping has a key by itself, and gets one again.
    if detailed.protection_key != 0 && (mapping.read || mapping.write) {
        return Some("memory protection keys can't be rebuilt");
    }
    if name.starts_with(b"/secretmem") {
        return Some("secret memory (memfd_secret) can't be read from outside the process");
    }
    if name.starts_with(b"/[aio]") {
        return Some("asynchronous I/O (io_setup) keeps requests in the kernel that can't be moved");
    }
    if name.starts_with(b"anon_inode:[io_uring]") {
        return Some("io_uring keeps requests in the kernel that can't be moved");
    }
    if name == b"[uprobes]" {
        return Some("a uprobe is set in the program");
    }
    if mapping.inode != 0 && !name.starts_with(b"/") && !name.starts_with(b"[anon_shmem:") {
        return Some("memory of a kernel object that can't be rebuilt");
    }
    if detailed.has(b"ht") && (mapping.shared || !name.starts_with(b"/anon_hugepage")) {
        return Some("shared huge pages (hugetlbfs) aren't supported");
    }
    None
}

/// The key that System V shared memory was made with, when the mapping is of such.
fn segment_key(mapping: &Mapping) -> Option<i32> {
    let key = mapping.name.strip_prefix(b"/SYSV")?.strip_suffix(b" (deleted)").filter(|_| mapping.shared)?;
    let key = std::str::from_utf8(key).ok().filter(|key| key.len() == 8)?;
    u32::from_str_radix(key, 16).ok().map(u32::cast_signed)
}

fn anonymous_name(name: &[u8]) -> &[u8] {
    name.strip_prefix(b"[anon:")
        .or_else(|| name.strip_prefix(b"[anon_shmem:"))
        .and_then(|rest| rest.strip_suffix(b"]"))
        .unwrap_or_default()
}

const FLAG_CODES: [(&[u8; 2], AreaFlags); 15] = [
    (b"gd", AreaFlags::GROWS_DOWN),
    (b"nr", AreaFlags::NO_RESERVE),
    (b"ac", AreaFlags::ACCOUNTED),
    (b"dp", AreaFlags::DROPPABLE),
    (b"lo", AreaFlags::LOCKED),
    (b"lf", AreaFlags::LOCKED_ON_FAULT),
    (b"dc", AreaFlags::DONT_FORK),
    (b"wf", AreaFlags::WIPE_ON_FORK),
    (b"dd", AreaFlags::DONT_DUMP),
    (b"hg", AreaFlags::HUGE_PAGE),
    (b"nh", AreaFlags::NO_HUGE_PAGE),
    (b"mg", AreaFlags::MERGEABLE),
    (b"sr", AreaFlags::SEQUENTIAL),
    (b"rr", AreaFlags::RANDOM),
    (b"sl", AreaFlags::SEALED),
];

pub(super) fn area_flags(detailed: &DetailedMapping) -> AreaFlags {
    FLAG_CODES.iter().filter(|(code, _)| detailed.has(code)).map(|(_, flag)| *flag).collect()
}

/// Appends an area, as part of the last one where the kernel would have them as one mapping: tracking splits mappings, and the
/// target shouldn't see that.
pub(super) fn push_merged(areas: &mut Vec<Area>, area: Area) {
    if let Some(last) = areas.last_mut()
        && last.end == area.start
        && last.protection == area.protection
        && last.flags == area.flags
        && last.name == area.name
        && !area.flags.contains(AreaFlags::GROWS_DOWN)
        && last.continues_as(&area)
    {
        last.end = area.end;
        return;
    }
    areas.push(area);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detailed(name: &str, flags: &str, shared: bool, inode: u64) -> DetailedMapping {
        DetailedMapping {
            mapping: Mapping {
                start: 0x1000,
                end: 0x3000,
                read: true,
                write: true,
                execute: false,
                shared,
                offset: 0,
                device: (0, 1),
                inode,
                name: name.as_bytes().to_vec(),
            },
            page_size: 4096,
            protection_key: 0,
            flags: flags.split(' ').filter_map(|code| code.as_bytes().try_into().ok()).collect(),
        }
    }

    fn own() -> Pid {
        Pid::from_raw(i32::try_from(std::process::id()).unwrap())
    }

    fn backing(detailed: &DetailedMapping) -> Result<Backing, &'static str> {
        match classify(detailed, &mut Files::new(own(), None, KnownFiles::new())) {
            Ok(classified) => Ok(classified.area.backing),
            Err(Unmovable::Obstacle(why)) => Err(why),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn names_and_flags_tell_what_is_behind() {
        assert_eq!(backing(&detailed("[heap]", "rd wr", false, 0)), Ok(Backing::Anonymous));
        assert_eq!(backing(&detailed("/dev/zero", "rd wr", false, 5)), Ok(Backing::Anonymous));
        assert_eq!(backing(&detailed("[vdso]", "rd ex", false, 0)), Ok(Backing::Kernel(KernelArea::Vdso)));
        assert_eq!(
            backing(&detailed("/memfd:x (deleted)", "rd wr sh mw", true, 7)),
            Ok(Backing::Object { id: 0, offset: 0, writable: true })
        );
        assert_eq!(
            backing(&detailed("/memfd:x (deleted)", "rd wr", false, 7)),
            Ok(Backing::Object { id: 0, offset: 0, writable: false })
        );
    }

    #[test]
    fn what_cannot_move_is_named() {
        for (name, flags, shared) in [
            ("/dev/fb0", "rd wr io pf", true),
            ("", "rd wr um", false),
            ("", "rd wr ss", false),
            ("/secretmem (deleted)", "rd wr sh lo", true),
            ("/[aio] (deleted)", "rd wr sh", true),
            ("anon_inode:[io_uring]", "rd wr sh", true),
            ("socket:[17]", "rd wr sh", true),
            ("/anon_hugepage (deleted)", "rd wr ht", true),
        ] {
            assert!(backing(&detailed(name, flags, shared, 9)).is_err(), "{name} {flags}");
        }
    }

    #[test]
    fn segments_are_known_by_their_name() {
        let key = |name, shared| segment_key(&detailed(name, "rd wr sh", shared, 9).mapping);
        assert_eq!(key("/SYSV0098c44c (deleted)", true), Some(0x0098_c44c));
        assert_eq!(key("/SYSVffffffff (deleted)", true), Some(-1));
        assert_eq!(key("/SYSV0098c44c (deleted)", false), None);
        assert_eq!(key("/SYSV0098c44c", true), None);
        assert_eq!(key("/SYSVINIT (deleted)", true), None);
    }

    #[test]
    fn flags_become_area_flags() {
        let flags = area_flags(&detailed("", "rd wr mr mw me ac dc lo gd", false, 0));
        let expected = AreaFlags::ACCOUNTED | AreaFlags::DONT_FORK | AreaFlags::LOCKED | AreaFlags::GROWS_DOWN;
        assert_eq!(flags, expected);
    }

    #[test]
    fn own_mappings_can_be_classified() {
        assert_eq!(obstacles(own()).unwrap(), []);
    }
}
