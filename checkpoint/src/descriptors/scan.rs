//! Which descriptors there are, and which of them are the same open file.
//!
//! Only links are read for every descriptor (`/proc/PID/fd/N`); everything else costs several times as much and is asked for
//! where it is needed. In a freeze the processes tell themselves which of their numbers are sockets ([`Listed::told`]), which
//! costs a fraction even of a link. A socket's inode belongs to one open file description and no other, so sockets are told apart by that
//! alone; other files are compared with kcmp(2), and only those whose links agree.

use std::cell::OnceCell;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use sys::Pid;
use sys::fds::{self, Compare, Status};

use super::{Job, Process};

/// A descriptor as it was seen, not yet interpreted. One for each open file description.
#[derive(Debug)]
pub(super) struct Seen {
    /// A process that has it, as we see it.
    pub pid: Pid,
    /// That process as the job numbers it.
    pub process: u32,
    /// Its number there.
    pub number: RawFd,
    /// What `/proc/PID/fd/N` points to; empty for sockets.
    pub link: Vec<u8>,
    /// What stat(2) says; `None` for sockets.
    pub status: Option<Status>,
    socket: Option<u64>,
    info: OnceCell<FdInfo>,
    file: OnceCell<OwnedFd>,
}

impl Seen {
    /// The inode of a socket.
    pub fn socket(&self) -> Option<u64> {
        self.socket
    }

    /// Whether it is an anonymous inode of this sort.
    pub fn is_anonymous(&self, name: &str) -> bool {
        let Some(kind) = self.link.strip_prefix(b"anon_inode:") else { return false };
        let kind = kind.strip_prefix(b"[").and_then(|kind| kind.strip_suffix(b"]")).unwrap_or(kind);
        kind == name.as_bytes()
    }

    /// The bits of the file type; that of a socket for sockets.
    pub fn file_type(&self) -> u32 {
        self.status.map_or(sys::libc::S_IFSOCK, |status| status.file_type())
    }

    /// The link as text for people.
    pub fn shown(&self) -> String {
        match self.socket {
            Some(inode) => format!("socket:[{inode}]"),
            None => String::from_utf8_lossy(&self.link).into_owned(),
        }
    }

    /// What fdinfo says, read once.
    pub fn info(&self) -> io::Result<&FdInfo> {
        if let Some(info) = self.info.get() {
            return Ok(info);
        }
        let info = FdInfo::read(self.pid, self.number)?;
        Ok(self.info.get_or_init(|| info))
    }

    /// Takes what somebody else has read of it.
    pub fn know(&self, info: FdInfo) {
        // Read already, it says the same.
        let _ = self.info.set(info);
    }

    /// A duplicate of the descriptor of ours.
    pub fn file(&self) -> io::Result<&OwnedFd> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let process = sys::process::pidfd_open(self.pid)?;
        let file = sys::process::pidfd_getfd(process.as_fd(), self.number)?;
        Ok(self.file.get_or_init(|| file))
    }
}

fn bracketed(link: &[u8], before: &[u8]) -> Option<u64> {
    let digits = link.strip_prefix(before)?.strip_suffix(b"]")?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// `/proc/PID/fdinfo/N`.
#[derive(Clone, Debug, Default)]
pub(super) struct FdInfo {
    /// Offset.
    pub position: i64,
    /// Flags, O_CLOEXEC among them.
    pub flags: i32,
    text: String,
}

impl FdInfo {
    /// Reads it.
    pub fn read(pid: Pid, number: RawFd) -> io::Result<FdInfo> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
        FdInfo::parse(text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "fdinfo without flags"))
    }

    /// Understands its text.
    pub fn parse(text: String) -> Option<FdInfo> {
        let info = FdInfo { position: 0, flags: 0, text };
        let position = info.value("pos:").and_then(|text| text.parse().ok()).unwrap_or(0);
        let flags = i32::from_str_radix(info.value("flags:")?, 8).ok()?;
        Some(FdInfo { position, flags, ..info })
    }

    /// What follows this at the start of a line.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
    }

    /// What follows this at the start of each line that has it.
    pub fn values<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.text.lines().filter_map(move |line| line.strip_prefix(key)).map(str::trim)
    }
}

/// A number in a table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// The number.
    pub number: RawFd,
    /// Index of the open file in [`Scan::files`].
    pub file: usize,
    /// Flags of fdinfo for this number, if they were read.
    pub flags: Option<i32>,
}

/// One descriptor table.
#[derive(Debug)]
pub(super) struct TableSeen {
    /// The processes that share it, the first one asked.
    pub processes: Vec<Process>,
    /// What is in it, ascending.
    pub entries: Vec<Entry>,
}

/// All descriptors of a job.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Tables.
    pub tables: Vec<TableSeen>,
    /// Open files.
    pub files: Vec<Seen>,
}

/// A table with its numbers.
#[derive(Debug)]
pub(super) struct Listed {
    /// The processes that share it, the first one asked.
    pub processes: Vec<Process>,
    /// Its numbers, ascending.
    pub numbers: Vec<RawFd>,
    /// `/proc/PID/fd` of the first process.
    directory: OwnedFd,
}

impl Listed {
    /// A table whose numbers are known.
    pub fn told(processes: Vec<Process>, pid: Pid, numbers: Vec<RawFd>) -> io::Result<Listed> {
        let directory = fds::open_at(None, format!("/proc/{pid}/fd").as_ref(), DIRECTORY, 0)?;
        Ok(Listed { processes, numbers, directory })
    }
}

/// What a link says.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Link {
    Socket(u64),
    Other { link: Vec<u8>, device: u64, inode: u64 },
}

/// A descriptor that was read.
#[derive(Debug)]
pub(super) struct Observed {
    number: RawFd,
    link: Link,
    status: Option<Status>,
}

impl Observed {
    /// A descriptor that is known to be the socket with this inode.
    pub fn socket(number: RawFd, inode: u64) -> Observed {
        Observed { number, link: Link::Socket(inode), status: None }
    }

    /// Reads the link of a number and what it leads to.
    pub fn read(table: &Listed, number: RawFd) -> io::Result<Observed> {
        observe_one(table, number, &mut [0; 4097])
    }
}

/// Looks at the descriptors of all processes. Those that come and go meanwhile may be missing.
pub(super) fn scan(job: &Job<'_>) -> io::Result<Scan> {
    let listed = list(job)?;
    let observed = observe(&listed)?;
    group(listed, observed)
}

/// The tables and their numbers.
fn list(job: &Job<'_>) -> io::Result<Vec<Listed>> {
    let mut listed = Vec::new();
    for processes in tables(job.processes)? {
        let Some(&Process { pid, .. }) = processes.first() else { continue };
        let directory = match fds::open_at(None, format!("/proc/{pid}/fd").as_ref(), DIRECTORY, 0) {
            Ok(directory) => directory,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(error),
        };
        let Some(numbers) = numbers(&directory)? else { continue };
        listed.push(Listed { processes, numbers, directory });
    }
    Ok(listed)
}

/// What is in a process's `/proc/PID/fd`; `None` when it has ended.
fn numbers(directory: &OwnedFd) -> io::Result<Option<Vec<RawFd>>> {
    match fds::numbers_in(directory.as_fd()) {
        Ok(mut numbers) => {
            numbers.sort_unstable();
            Ok(Some(numbers))
        }
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads the link of each number, and asks for the status of what isn't a socket.
fn observe(listed: &[Listed]) -> io::Result<Vec<Vec<Observed>>> {
    listed.iter().map(observe_table).collect()
}

fn observe_table(table: &Listed) -> io::Result<Vec<Observed>> {
    let mut observed = Vec::with_capacity(table.numbers.len());
    let mut buffer = vec![0; 4097];
    for &number in &table.numbers {
        match observe_one(table, number, &mut buffer) {
            Ok(one) => observed.push(one),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(observed)
}

fn observe_one(table: &Listed, number: RawFd, buffer: &mut [u8]) -> io::Result<Observed> {
    let name = name_of(number)?;
    let link = fds::read_link_at(table.directory.as_fd(), &name, buffer)?;
    if let Some(inode) = bracketed(link, b"socket:[") {
        return Ok(Observed { number, link: Link::Socket(inode), status: None });
    }
    let link = link.to_vec();
    let status = fds::status_at(table.directory.as_fd(), &name, true)?;
    let link = Link::Other { link, device: status.device, inode: status.inode };
    Ok(Observed { number, link, status: Some(status) })
}

/// Finds out which of them are the same open file.
pub(super) fn group(listed: Vec<Listed>, observed: Vec<Vec<Observed>>) -> io::Result<Scan> {
    let mut scan = Scan::default();
    let mut sockets: HashMap<u64, usize> = HashMap::new();
    // Files that may be the same: in the order of kcmp, for a search in logarithmic time.
    let mut alike: HashMap<Link, Vec<usize>> = HashMap::new();
    for (table, observed) in listed.into_iter().zip(observed) {
        let Some(&Process { process, pid }) = table.processes.first() else { continue };
        let mut entries = Vec::with_capacity(observed.len());
        for Observed { number, link, status } in observed {
            let next = scan.files.len();
            let seen = |socket: Option<u64>, link: Vec<u8>| Seen {
                pid,
                process,
                number,
                link,
                status,
                socket,
                info: OnceCell::new(),
                file: OnceCell::new(),
            };
            let file = match link {
                Link::Socket(inode) => *sockets.entry(inode).or_insert_with(|| {
                    scan.files.push(seen(Some(inode), Vec::new()));
                    next
                }),
                Link::Other { link: ref text, .. } => {
                    let new = seen(None, text.clone());
                    let known = alike.entry(link).or_default();
                    match search(known, &scan.files, pid, number)? {
                        Ok(place) => known[place],
                        Err(place) => {
                            known.insert(place, next);
                            scan.files.push(new);
                            next
                        }
                    }
                }
            };
            entries.push(Entry { number, file, flags: None });
        }
        scan.tables.push(TableSeen { processes: table.processes, entries });
    }
    Ok(scan)
}

const DIRECTORY: i32 = sys::libc::O_RDONLY | sys::libc::O_DIRECTORY;

/// Whether an error of /proc says that the process or descriptor went away.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(sys::libc::ENOENT | sys::libc::ESRCH | sys::libc::EBADF))
}

fn name_of(number: RawFd) -> io::Result<CString> {
    CString::new(number.to_string()).map_err(io::Error::other)
}

/// Where in the kcmp-ordered list a descriptor's open file is, or belongs.
fn search(known: &[usize], files: &[Seen], pid: Pid, number: RawFd) -> io::Result<Result<usize, usize>> {
    let (mut low, mut high) = (0, known.len());
    while low < high {
        let middle = low.midpoint(high);
        let other = &files[known[middle]];
        match fds::kcmp(Compare::File, (other.pid, other.number), (pid, number)) {
            Ok(Ordering::Equal) => return Ok(Ok(middle)),
            Ok(Ordering::Less) => low = middle + 1,
            Ok(Ordering::Greater) => high = middle,
            // One of the two was closed meanwhile, which happens only while the job runs: then this is for a listing of
            // reasons, where one file too many does no harm.
            Err(error) if is_gone(&error) => return Ok(Err(low)),
            Err(error) => return Err(error),
        }
    }
    Ok(Err(low))
}

/// Processes by the table they use.
pub(super) fn tables(processes: &[Process]) -> io::Result<Vec<Vec<Process>>> {
    let mut tables: Vec<Vec<Process>> = Vec::new();
    // Indexes of `tables` in the order of kcmp.
    let mut order: Vec<usize> = Vec::new();
    'processes: for &process in processes {
        let (mut low, mut high) = (0, order.len());
        while low < high {
            let middle = low.midpoint(high);
            let table = &mut tables[order[middle]];
            match fds::kcmp(Compare::Table, (table[0].pid, 0), (process.pid, 0)) {
                Ok(Ordering::Equal) => {
                    table.push(process);
                    continue 'processes;
                }
                Ok(Ordering::Less) => low = middle + 1,
                Ok(Ordering::Greater) => high = middle,
                Err(error) if is_gone(&error) => continue 'processes,
                Err(error) => return Err(error),
            }
        }
        order.insert(low, tables.len());
        tables.push(vec![process]);
    }
    Ok(tables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_is_understood() {
        let text = "pos:\t17\nflags:\t02004002\nmnt_id:\t15\nino:\t1066\neventfd-count:               2a\n";
        let info = FdInfo::parse(text.to_owned()).unwrap();
        assert_eq!(info.position, 17);
        assert_eq!(info.flags, 0o2_004_002);
        assert_eq!(info.value("eventfd-count:"), Some("2a"));
        assert_eq!(info.value("clockid:"), None);
    }

    #[test]
    fn duplicates_are_one_file() {
        let (read, write) = fds::pipe(0).unwrap();
        let copy = read.try_clone().unwrap();
        let again = fds::reopen(read.as_fd(), sys::libc::O_RDONLY | sys::libc::O_NONBLOCK).unwrap();
        let own = Process { process: 7, pid: Pid::this() };
        let scan = scan(&Job { init: Pid::this(), processes: &[own] }).unwrap();
        let file = |fd: &OwnedFd| {
            let number = std::os::fd::AsRawFd::as_raw_fd(fd);
            scan.tables[0].entries.iter().find(|entry| entry.number == number).unwrap().file
        };
        assert_eq!(file(&read), file(&copy));
        assert_ne!(file(&read), file(&again));
        assert_ne!(file(&read), file(&write));
    }

    #[test]
    fn one_that_ends_while_it_is_looked_at_is_left_out() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let path = format!("/proc/{}/fd", child.id());
        let directory = fds::open_at(None, path.as_ref(), DIRECTORY, 0).unwrap();
        assert!(numbers(&directory).unwrap().is_some());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(numbers(&directory).unwrap(), None);
    }

    #[test]
    fn processes_of_one_table_are_found() {
        let own = |process| Process { process, pid: Pid::this() };
        let parent = Process { process: 9, pid: sys::Pid::parent() };
        let tables = tables(&[own(1), parent, own(2)]).unwrap();
        let mut sizes: Vec<_> = tables.iter().map(Vec::len).collect();
        sizes.sort_unstable();
        assert_eq!(sizes, [1, 2]);
    }
}
