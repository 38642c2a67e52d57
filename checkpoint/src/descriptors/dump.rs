//! Asks the handlers, before the freeze for what keeps the job here and what it needs, and in the freeze for its image.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, RawFd};

use sys::fds::{self, Owner};
use sys::tape::Tape;
use sys::{Pid, libc};

use super::image::{Kind, OpenFile, ProcessLock, SignalTarget, Slot, Table, TargetKind, TreeDescriptors};
use super::kinds::{self, Dumping, Problem, View, index32, locks};
use super::scan::{self, Scan, Seen, is_gone};
use super::{Job, Process, Tapes};
use crate::error::{Error, Result};
use crate::external::{External, ExternalKey};
use crate::memory::Layout;
use crate::offer::RequiredFile;
use crate::stay::StayReason;

fn stay_reason(seen: &Seen, why: impl Into<String>) -> StayReason {
    StayReason::new(seen.process, format!("fd {}", seen.number), why)
}

fn look(job: &Job<'_>) -> Result<Scan> {
    scan::scan(job).map_err(|error| Error::system("reading the job's descriptors", error))
}

/// What among the descriptors keeps the job here. The job runs on; descriptors that it closes meanwhile are left out.
///
/// # Errors
/// /proc can't be read.
pub fn stay_reasons(job: &Job<'_>, external: &dyn External) -> Result<Vec<StayReason>> {
    let scan = look(job)?;
    let view = View::new(job, external, &scan);
    let mut reasons = Vec::new();
    for seen in &scan.files {
        if view.key(seen).is_some() {
            continue;
        }
        match kinds::handler(seen).obstacle(seen, &view) {
            Ok(Some(why)) => reasons.push(stay_reason(seen, why)),
            Ok(None) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(failure(seen, error)),
        }
    }
    Ok(reasons)
}

fn failure(seen: &Seen, error: io::Error) -> Error {
    Error::process(seen.process, format!("fd {} ({})", seen.number, seen.shown()), error)
}

/// Files that the job has open and that must be at the target. Those open for writing may change until the freeze.
///
/// # Errors
/// /proc can't be read.
pub fn required_files(job: &Job<'_>) -> Result<Vec<RequiredFile>> {
    let scan = look(job)?;
    let mut files = BTreeSet::new();
    for seen in &scan.files {
        let Some(status) = seen.status.filter(|status| status.file_type() == libc::S_IFREG) else { continue };
        let is_generated = seen.link.starts_with(b"/proc/") || seen.link.starts_with(b"/sys/");
        if status.links == 0 || is_generated || !seen.link.starts_with(b"/") {
            continue;
        }
        let flags = match seen.info() {
            Ok(info) => info.flags,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(failure(seen, error)),
        };
        if flags & libc::O_ACCMODE != libc::O_RDONLY {
            continue;
        }
        files.insert(RequiredFile { path: seen.shown(), size: status.size, modified_ns: status.modified_ns });
    }
    Ok(files.into_iter().collect())
}

/// The image of all descriptors of a frozen job. Changes nothing that the job could notice.
///
/// # Errors
/// [`Error::Stays`] when something can't move after all; the job may simply go on.
pub fn dump(job: &Job<'_>, external: &dyn External, layout: &Layout, tapes: &mut dyn Tapes) -> Result<TreeDescriptors> {
    let (scan, flags) = look_into(job, tapes)?;
    let view = View::new(job, external, &scan);
    let mut dump = Dumping {
        view: &view,
        layout,
        image: TreeDescriptors::default(),
        pipes: HashMap::new(),
        contents: HashMap::new(),
        sockets: HashMap::new(),
    };
    let mut reasons = Vec::new();
    let mut files = Vec::with_capacity(scan.files.len());
    for (index, seen) in scan.files.iter().enumerate() {
        let key = view.key(seen);
        let kind = match key {
            Some(key) => Kind::External(key),
            None => match kinds::handler(seen).dump(seen, index, &mut dump) {
                Ok(kind) => kind,
                Err(Problem::Stays(why)) => {
                    reasons.push(stay_reason(seen, why));
                    continue;
                }
                Err(Problem::System(error)) => return Err(failure(seen, error)),
            },
        };
        let flags = flags.get(index).copied().unwrap_or_default();
        let owner = owner(seen, key, flags, job).map_err(|error| failure(seen, error))?;
        files.push(OpenFile { flags, kind, owner });
    }
    if !reasons.is_empty() {
        return Err(Error::Stays(reasons));
    }
    let mut image = dump.image;
    image.files = files;
    for table in &scan.tables {
        let slots = table.entries.iter().map(|entry| Slot {
            number: entry.number,
            file: index32(entry.file),
            close_on_exec: entry.flags.is_some_and(|flags| flags & libc::O_CLOEXEC != 0),
        });
        let processes = table.processes.iter().map(|process| process.process).collect();
        image.tables.push(Table { processes, slots: slots.collect() });
    }
    image.process_locks = process_locks(&scan)?;
    drop_foreign_names(&mut image);
    Ok(image)
}

/// Looks at a frozen job: what there is, and the flags of each open file.
///
/// Links are read by a thread of ours while the processes themselves tell their flags: reading fdinfo, which has both, costs
/// ten times as much.
fn look_into(job: &Job<'_>, tapes: &mut dyn Tapes) -> Result<(Scan, Vec<i32>)> {
    let unreadable = |error| Error::system("reading the job's descriptors", error);
    let listed = scan::list(job).map_err(unreadable)?;
    let (observed, flags) = std::thread::scope(|scope| {
        let observer = scope.spawn(|| scan::observe(&listed));
        let flags: Result<Vec<Vec<Flags>>> =
            listed.iter().map(|table| read_flags(table.processes.first(), &table.numbers, tapes)).collect();
        let broken = |_| Err(io::Error::other("a thread that reads descriptors ended early"));
        (observer.join().unwrap_or_else(broken), flags)
    });
    let mut scan = observed.and_then(|observed| scan::group(listed, observed)).map_err(unreadable)?;
    let mut of_files = vec![0; scan.files.len()];
    for (table, flags) in scan.tables.iter_mut().zip(flags?) {
        if table.entries.len() != flags.len() {
            return Err(unreadable(io::Error::other("descriptors came and went in a process that stands still")));
        }
        for (entry, flags) in table.entries.iter_mut().zip(flags) {
            entry.flags = Some(if flags.close_on_exec { libc::O_CLOEXEC } else { 0 });
            of_files[entry.file] = flags.of_file;
        }
    }
    Ok((scan, of_files))
}

/// What fcntl(2) says of a number.
struct Flags {
    close_on_exec: bool,
    of_file: i32,
}

fn read_flags(process: Option<&Process>, numbers: &[RawFd], tapes: &mut dyn Tapes) -> Result<Vec<Flags>> {
    let Some(&Process { process, .. }) = process else { return Ok(Vec::new()) };
    let mut tape = Tape::new();
    for number in numbers {
        tape.syscall(libc::SYS_fcntl, &[(*number).into(), libc::F_GETFD.into()]);
        tape.syscall(libc::SYS_fcntl, &[(*number).into(), libc::F_GETFL.into()]);
    }
    let what = "reading the flags of its descriptors";
    let results = tapes.run(process, &tape).map_err(|error| Error::process(process, what, error))?;
    let value = |value: i64| {
        let number = i32::try_from(value).ok().filter(|value| *value >= 0);
        number.ok_or_else(|| Error::process(process, what, io::Error::from_raw_os_error(libc::EBADF)))
    };
    let pair =
        |pair: &[i64]| Ok(Flags { close_on_exec: value(pair[0])? & libc::FD_CLOEXEC != 0, of_file: value(pair[1])? });
    results.values().chunks_exact(2).map(pair).collect()
}

/// Who is signalled for I/O on a file.
fn owner(seen: &Seen, key: Option<ExternalKey>, flags: i32, job: &Job<'_>) -> io::Result<Option<SignalTarget>> {
    // For the many sockets of the caller's, which never have one in practice, the flag that makes it work must do.
    if flags & libc::O_PATH != 0 || (key.is_some() && flags & libc::O_ASYNC == 0) {
        return Ok(None);
    }
    let fd = seen.file()?.as_fd();
    let signal = fds::io_signal(fd)?;
    let to = match fds::io_owner(fd) {
        Ok(Some(Owner::Thread(thread))) => inner_number(thread, job)?.map(|number| (TargetKind::Thread, number)),
        Ok(Some(Owner::Process(process))) => inner_number(process, job)?.map(|number| (TargetKind::Process, number)),
        Ok(Some(Owner::Group(group))) => inner_number(group, job)?.map(|number| (TargetKind::Group, number)),
        Ok(None) => None,
        Err(error) => return Err(error),
    };
    Ok((to.is_some() || signal != 0).then_some(SignalTarget { to, signal }))
}

/// The job's number for a thread, process or group; `None` when it is gone.
fn inner_number(pid: Pid, job: &Job<'_>) -> io::Result<Option<u32>> {
    if let Some(number) = job.number_of(pid) {
        return Ok(Some(number));
    }
    let status = match std::fs::read_to_string(format!("/proc/{pid}/status")) {
        Ok(status) => status,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    Ok(numbers.and_then(|numbers| numbers.split_whitespace().next_back()?.parse().ok()))
}

/// POSIX locks, once for each table and file.
fn process_locks(scan: &Scan) -> Result<Vec<ProcessLock>> {
    let mut found = Vec::new();
    for (index, table) in scan.tables.iter().enumerate() {
        let mut seen_files: BTreeSet<(u64, u64)> = BTreeSet::new();
        for entry in &table.entries {
            let file = &scan.files[entry.file];
            let Some(status) = file.status.filter(|status| status.file_type() == libc::S_IFREG) else { continue };
            if !seen_files.insert((status.device, status.inode)) {
                continue;
            }
            let Some(process) = table.processes.first() else { continue };
            let info = scan::FdInfo::read(process.pid, entry.number).map_err(|error| failure(file, error))?;
            for lock in locks::locks(&info).process {
                let number: RawFd =
                    writable_number(scan, index, (status.device, status.inode), lock.write, entry.number);
                found.push(ProcessLock { table: index32(index), number, lock });
            }
        }
    }
    Ok(found)
}

/// A descriptor with which such a lock can be taken: a lock for writing needs one that is open for writing.
fn writable_number(scan: &Scan, table: usize, identity: (u64, u64), write: bool, otherwise: RawFd) -> RawFd {
    let suits = |file: &Seen| {
        let is_same = file.status.is_some_and(|status| (status.device, status.inode) == identity);
        let mode = file.info().map_or(libc::O_RDONLY, |info| info.flags & libc::O_ACCMODE);
        is_same && (mode == libc::O_RDWR || mode == if write { libc::O_WRONLY } else { libc::O_RDONLY })
    };
    let entries = &scan.tables[table].entries;
    entries.iter().find(|entry| suits(&scan.files[entry.file])).map_or(otherwise, |entry| entry.number)
}

/// Accepted sockets show the file of their listener. Only the socket that owns it brings it along: the listener, or when that
/// is gone the first one.
fn drop_foreign_names(image: &mut TreeDescriptors) {
    use super::image::UnixState;
    let mut owners: HashMap<Vec<u8>, usize> = HashMap::new();
    for (index, socket) in image.sockets.iter().enumerate() {
        let Some(file) = socket.name.as_ref().and_then(|name| name.file.as_ref()) else { continue };
        let owns = !matches!(socket.state, UnixState::Connected(_) | UnixState::Orphaned);
        let owner = owners.entry(file.path.to_vec()).or_insert(index);
        if owns {
            *owner = index;
        }
    }
    for (index, socket) in image.sockets.iter_mut().enumerate() {
        let Some(name) = socket.name.as_mut() else { continue };
        let is_owner = name.file.as_ref().is_some_and(|file| owners.get(file.path.as_slice()) == Some(&index));
        if !is_owner {
            name.file = None;
        }
    }
}
