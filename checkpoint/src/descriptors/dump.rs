//! Asks the handlers, before the freeze for what keeps the job here and what it needs, and in the freeze for its image.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, RawFd};

use sys::fds::{self, Owner};
use sys::proc::{Place, Proc};
use sys::tape::Tape;
use sys::{Pid, libc, tty};

use super::ahead::{Ahead, EpollInfo};
use super::image::{Kind, OpenFile, ProcessLock, SignalTarget, Slot, Table, TargetKind, TreeDescriptors};
use super::kinds::{self, Dumping, Problem, View, index32, locks};
use super::scan::{self, Listed, Observed, Scan, Seen, is_gone};
use super::{Job, Process, Tapes};
use crate::error::{Error, Result};
use crate::external::{External, ExternalKey};
use crate::memory::Layout;
use crate::offer::RequiredFile;
use crate::shm;
use crate::stay::StayReason;
use crate::terminals;

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
    let view = View::new(job, external, &scan, false);
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
    reasons.extend(foreign_terminals(&view)?);
    Ok(reasons)
}

/// Why a process with a controlling terminal stays here.
pub(crate) const FOREIGN_TERMINAL: &str = "it has a controlling terminal that isn't the job's own";

/// Processes with a controlling terminal whose master isn't in the job.
fn foreign_terminals(view: &View<'_>) -> Result<Vec<StayReason>> {
    let mut reasons = Vec::new();
    let proc = Proc::own();
    for process in view.job.processes {
        // One that has ended has none.
        let Some(stat) = process.pid.as_raw().try_into().ok().and_then(|pid| proc.stat(Place::Process(pid)).ok())
        else {
            continue;
        };
        if stat.terminal == 0 {
            continue;
        }
        let master = terminals::number(&stat).map_or(Ok(None), |number| kinds::terminals::master(number, view));
        let session = match master.and_then(|master| master.map(Seen::file).transpose()) {
            Ok(master) => master.and_then(|master| tty::session(master.as_fd()).ok()),
            Err(error) if is_gone(&error) => None,
            Err(error) => return Err(Error::process(process.process, "looking at its terminal", error)),
        };
        if session.and_then(|session| u32::try_from(session).ok()) != Some(stat.session) {
            reasons.push(StayReason::new(process.process, "process", FOREIGN_TERMINAL));
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
    let shm = shm::device(job.init);
    let mut files = BTreeSet::new();
    for seen in &scan.files {
        let Some(status) = seen.status.filter(|status| status.file_type() == libc::S_IFREG) else { continue };
        let is_generated = seen.link.starts_with(b"/proc/") || seen.link.starts_with(b"/sys/");
        if status.links == 0 || is_generated || !seen.link.starts_with(b"/") || Some(status.device) == shm {
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

/// The image of all descriptors of a frozen job. Changes nothing that the job could notice. `epolls` are the epoll instances that it
/// had when it was last looked at.
///
/// # Errors
/// [`Error::Stays`] when something can't move after all; the job may simply go on.
pub fn dump(
    job: &Job<'_>,
    external: &dyn External,
    layout: &Layout,
    epolls: &mut [EpollInfo],
    tapes: &mut dyn Tapes,
) -> Result<TreeDescriptors> {
    let (looked, ahead) = std::thread::scope(|scope| {
        let ahead = scope.spawn(|| Ahead::read(epolls));
        (look_into(job, tapes), ahead.join())
    });
    let (scan, flags) = looked?;
    let view = View::new(job, external, &scan, true);
    // One that panicked leaves everything to be read by who needs it.
    if let Ok(ahead) = ahead {
        ahead.tell(&view);
    }
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
        let flags = to_open_again(flags.get(index).copied().unwrap_or_default());
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

/// An open file's flags without what the kernel keeps of how it was made: O_TMPFILE, which contains O_DIRECTORY.
fn to_open_again(flags: i32) -> i32 {
    if flags & libc::O_TMPFILE == libc::O_TMPFILE { flags & !libc::O_TMPFILE } else { flags }
}

/// Looks at a frozen job: what there is, and the flags of each open file.
///
/// The processes themselves tell which numbers they have, the flags of each, and which are sockets: asked from outside, a
/// descriptor costs five times as much for its link, and ten times for its flags.
fn look_into(job: &Job<'_>, tapes: &mut dyn Tapes) -> Result<(Scan, Vec<i32>)> {
    let unreadable = |error| Error::system("reading the job's descriptors", error);
    let (mut listed, mut observed, mut told) = (Vec::new(), Vec::new(), Vec::new());
    for processes in scan::tables(job.processes).map_err(unreadable)? {
        let Some(&first) = processes.first() else { continue };
        let failed = |error| Error::process(first.process, "reading its descriptors", error);
        let numbers = ask(first, tapes).map_err(failed)?;
        let table = Listed::told(processes, first.pid, numbers.iter().map(|told| told.number).collect());
        let table = table.map_err(failed)?;
        let observe = |told: &Told| match told.socket {
            Some(inode) => Ok(Observed::socket(told.number, inode)),
            None => Observed::read(&table, told.number),
        };
        observed.push(numbers.iter().map(observe).collect::<io::Result<Vec<_>>>().map_err(failed)?);
        listed.push(table);
        told.push(numbers);
    }
    let mut scan = scan::group(listed, observed).map_err(unreadable)?;
    let mut of_files = vec![0; scan.files.len()];
    for (table, told) in scan.tables.iter_mut().zip(told) {
        for (entry, told) in table.entries.iter_mut().zip(told) {
            entry.flags = Some(if told.close_on_exec { libc::O_CLOEXEC } else { 0 });
            of_files[entry.file] = told.flags;
        }
    }
    Ok((scan, of_files))
}

/// What a process tells of one of its descriptors.
struct Told {
    number: RawFd,
    close_on_exec: bool,
    /// F_GETFL.
    flags: i32,
    /// Inode of a socket.
    socket: Option<u64>,
}

/// Asks a process for its descriptors.
fn ask(process: Process, tapes: &mut dyn Tapes) -> io::Result<Vec<Told>> {
    let mut tape = Tape::new();
    for number in 0..table_size(process.pid)? {
        tape.syscall(libc::SYS_fcntl, &[number.into(), libc::F_GETFD.into()]);
    }
    let results = tapes.run(process.process, &tape)?;
    let open: Vec<(RawFd, bool)> = (0..)
        .zip(results.values())
        .filter(|(_, value)| **value >= 0)
        .map(|(number, value)| (number, value & i64::from(libc::FD_CLOEXEC) != 0))
        .collect();

    let mut told = Vec::with_capacity(open.len());
    // As many as one region holds with a struct stat each.
    for open in open.chunks(700) {
        let mut tape = Tape::new();
        let asked: Vec<_> = open
            .iter()
            .map(|&(number, close_on_exec)| {
                let status = tape.room(fds::STATUS_BYTES);
                let flags = tape.require(libc::SYS_fcntl, &[number.into(), libc::F_GETFL.into()]);
                tape.require(libc::SYS_fstat, &[number.into(), status.into()]);
                (number, close_on_exec, status, flags)
            })
            .collect();
        let results = tapes.run(process.process, &tape)?;
        for (number, close_on_exec, status, flags) in asked {
            let flags = i32::try_from(results.get(flags)?).map_err(io::Error::other)?;
            let (mode, inode) = fds::mode_and_inode(results.data(status, fds::STATUS_BYTES));
            // A socket in the file system that was opened with O_PATH is a file.
            let is_socket = mode & libc::S_IFMT == libc::S_IFSOCK && flags & libc::O_PATH == 0;
            told.push(Told { number, close_on_exec, flags, socket: is_socket.then_some(inode) });
        }
    }
    Ok(told)
}

/// How many numbers a table has room for.
fn table_size(pid: Pid) -> io::Result<RawFd> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")?.trim().parse().ok());
    size.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel doesn't tell the size of the table"))
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

/// POSIX locks, once for each table and open file.
fn process_locks(scan: &Scan) -> Result<Vec<ProcessLock>> {
    let mut found = Vec::new();
    for (index, table) in scan.tables.iter().enumerate() {
        let mut seen_files: BTreeSet<usize> = BTreeSet::new();
        for entry in &table.entries {
            let file = &scan.files[entry.file];
            let Some(status) = file.status.filter(|status| status.file_type() == libc::S_IFREG) else { continue };
            if !seen_files.insert(entry.file) {
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
