//! What /proc tells of processes and threads.
//!
//! Everything is read through a [`Proc`]: a directory descriptor of some proc mount, whose PID namespace decides how
//! processes are numbered in what is read.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A proc mount.
#[derive(Debug)]
pub struct Proc {
    root: PathBuf,
    // The path above goes through this descriptor.
    _directory: Option<OwnedFd>,
}

/// A process or one of its threads, as a place in a [`Proc`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A process.
    Process(u32),
    /// A thread: process, thread.
    Thread(u32, u32),
}

/// Content of a file of /proc. Nobody tells how long such a file is, and `std::fs::read` feels its way with small reads.
pub(crate) fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    /// More than most of them have; of the others the kernel gives no more than a page at a time.
    const ROOM: usize = 8 << 10;
    let mut file = File::open(path)?;
    let (mut content, mut length) = (vec![0; ROOM], 0);
    loop {
        if content.len() - length < ROOM / 2 {
            content.resize(2 * content.len(), 0);
        }
        match file.read(&mut content[length..]) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    content.truncate(length);
    Ok(content)
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("/proc/PID/{what} is not as expected"))
}

impl Proc {
    /// The proc mount that a descriptor is the root of.
    pub fn new(directory: OwnedFd) -> Proc {
        Proc { root: format!("/proc/self/fd/{}", directory.as_raw_fd()).into(), _directory: Some(directory) }
    }

    /// The caller's own.
    pub fn own() -> Proc {
        Proc { root: "/proc".into(), _directory: None }
    }

    /// Path of a file of a process or thread; for use by this process only.
    pub fn path(&self, place: Place, file: &str) -> PathBuf {
        match place {
            Place::Process(process) => self.root.join(format!("{process}/{file}")),
            Place::Thread(process, thread) => self.root.join(format!("{process}/task/{thread}/{file}")),
        }
    }

    /// Content of a file.
    pub fn read(&self, place: Place, file: &str) -> io::Result<Vec<u8>> {
        read_file(&self.path(place, file))
    }

    /// Content of a file that is text.
    pub fn read_text(&self, place: Place, file: &str) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&self.read(place, file)?).into_owned())
    }

    /// Where a link points.
    pub fn link(&self, place: Place, file: &str) -> io::Result<PathBuf> {
        std::fs::read_link(self.path(place, file))
    }

    /// Writes a file.
    pub fn write(&self, place: Place, file: &str, content: &[u8]) -> io::Result<()> {
        std::fs::write(self.path(place, file), content)
    }

    /// All processes, ascending.
    pub fn processes(&self) -> io::Result<Vec<u32>> {
        numbers(&self.root)
    }

    /// All threads of a process, ascending.
    pub fn threads(&self, process: u32) -> io::Result<Vec<u32>> {
        numbers(&self.path(Place::Process(process), "task"))
    }

    /// `stat`.
    pub fn stat(&self, place: Place) -> io::Result<Stat> {
        Stat::parse(&self.read(place, "stat")?).ok_or_else(|| malformed("stat"))
    }

    /// `status`.
    pub fn status(&self, place: Place) -> io::Result<Status> {
        Status::parse(&self.read_text(place, "status")?).ok_or_else(|| malformed("status"))
    }

    /// `timers`.
    pub fn timers(&self, process: u32) -> io::Result<Vec<Timer>> {
        parse_timers(&self.read_text(Place::Process(process), "timers")?).ok_or_else(|| malformed("timers"))
    }

    /// `limits`: soft and hard by number of the resource. prlimit(2) would ask for a capability when the process has changed its
    /// user or group.
    pub fn limits(&self, process: u32) -> io::Result<Vec<(u64, u64)>> {
        parse_limits(&self.read_text(Place::Process(process), "limits")?).ok_or_else(|| malformed("limits"))
    }
}

/// The kernel prints a line a resource, in the order of their numbers, with columns of fixed width (fs/proc/base.c).
fn parse_limits(text: &str) -> Option<Vec<(u64, u64)>> {
    let value = |line: &str, from: usize| match line.get(from..from + 20)?.trim() {
        // RLIM64_INFINITY
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    };
    text.lines().skip(1).map(|line| Some((value(line, 26)?, value(line, 47)?))).collect()
}

fn numbers(directory: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name().into_vec();
        if let Some(number) = std::str::from_utf8(&name).ok().and_then(|name| name.parse().ok()) {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// `/proc/PID/stat` (proc_pid_stat(5)), the fields that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Stat {
    pub comm: Vec<u8>,
    pub state: u8,
    pub parent: u32,
    pub group: u32,
    pub session: u32,
    pub terminal: i32,
    /// Foreground process group of the terminal; -1 without one.
    pub foreground: i32,
    /// Ticks since boot.
    pub start_time: u64,
    pub threads: u32,
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    pub exit_signal: i32,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    /// As wait(2) reports it.
    pub exit_status: i32,
}

impl Stat {
    fn parse(text: &[u8]) -> Option<Stat> {
        // The name may hold anything, also parentheses.
        let open = text.iter().position(|byte| *byte == b'(')?;
        let close = text.iter().rposition(|byte| *byte == b')')?;
        let comm = text.get(open + 1..close)?.to_vec();
        let rest = std::str::from_utf8(text.get(close + 1..)?).ok()?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // Numbered as in the manual page, where the state is field 3.
        let field = |number: usize| fields.get(number - 3).copied();
        fn number<T: std::str::FromStr>(field: Option<&str>) -> Option<T> {
            field?.parse().ok()
        }
        // Process numbers are 0 for what lies outside the mount's namespace, and negative never.
        Some(Stat {
            comm,
            state: *field(3)?.as_bytes().first()?,
            parent: number(field(4))?,
            group: number(field(5))?,
            session: number(field(6))?,
            terminal: number(field(7))?,
            foreground: number(field(8))?,
            threads: number(field(20))?,
            start_time: number(field(22))?,
            start_code: number(field(26))?,
            end_code: number(field(27))?,
            start_stack: number(field(28))?,
            exit_signal: number(field(38))?,
            start_data: number(field(45))?,
            end_data: number(field(46))?,
            start_brk: number(field(47))?,
            arg_start: number(field(48))?,
            arg_end: number(field(49))?,
            env_start: number(field(50))?,
            env_end: number(field(51))?,
            exit_status: number(field(52))?,
        })
    }

    /// Whether it has ended and waits to be collected.
    pub fn is_zombie(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }
}

/// `/proc/PID/status` (proc_pid_status(5)), the fields that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Status {
    pub umask: u32,
    pub tracer: u32,
    /// Real, effective, saved, file system.
    pub uids: [u32; 4],
    /// Real, effective, saved, file system.
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
    pub no_new_privileges: bool,
    /// 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    pub seccomp_filters: u32,
    /// Resident memory in bytes.
    pub resident: u64,
    /// Which bits of an address the processor looks at.
    pub untag_mask: u64,
    /// Hardware features in use for threads ("shstk").
    pub thread_features: String,
    pub voluntary_switches: u64,
}

impl Status {
    fn parse(text: &str) -> Option<Status> {
        let mut status = Status { untag_mask: u64::MAX, ..Status::default() };
        let hexadecimal = |value: &str| u64::from_str_radix(value.trim_start_matches("0x"), 16).ok();
        let four = |value: &str| -> Option<[u32; 4]> {
            let numbers: Vec<u32> = value.split_whitespace().map(|n| n.parse().ok()).collect::<Option<_>>()?;
            numbers.try_into().ok()
        };
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            match key {
                "Umask" => status.umask = u32::from_str_radix(value, 8).ok()?,
                "TracerPid" => status.tracer = value.parse().ok()?,
                "Uid" => status.uids = four(value)?,
                "Gid" => status.gids = four(value)?,
                "Groups" => {
                    status.groups = value.split_whitespace().map(|n| n.parse().ok()).collect::<Option<_>>()?;
                }
                "CapInh" => status.inheritable = hexadecimal(value)?,
                "CapPrm" => status.permitted = hexadecimal(value)?,
                "CapEff" => status.effective = hexadecimal(value)?,
                "CapBnd" => status.bounding = hexadecimal(value)?,
                "CapAmb" => status.ambient = hexadecimal(value)?,
                "NoNewPrivs" => status.no_new_privileges = value != "0",
                "Seccomp" => status.seccomp = value.parse().ok()?,
                "Seccomp_filters" => status.seccomp_filters = value.parse().ok()?,
                "VmRSS" => status.resident = value.split(' ').next()?.parse::<u64>().ok()? << 10,
                "untag_mask" => status.untag_mask = hexadecimal(value)?,
                "x86_Thread_features" => status.thread_features = value.to_owned(),
                "voluntary_ctxt_switches" => status.voluntary_switches = value.parse().ok()?,
                _ => {}
            }
        }
        Some(status)
    }
}

/// A timer of `/proc/PID/timers` (proc_pid_timers(5)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timer {
    /// The program's number for it.
    pub id: i32,
    /// Signal number.
    pub signal: i32,
    /// `sigev_value`.
    pub value: u64,
    /// SIGEV_SIGNAL (0), SIGEV_NONE (1) or SIGEV_THREAD (2), with SIGEV_THREAD_ID (4) added for one thread.
    pub notify: i32,
    /// The process or thread that is notified.
    pub target: u32,
    /// The clock.
    pub clock: i32,
}

fn parse_timers(text: &str) -> Option<Vec<Timer>> {
    let mut timers: Vec<Timer> = Vec::new();
    for line in text.lines() {
        let (key, value) = line.split_once(':')?;
        let value = value.trim();
        if key == "ID" {
            timers.push(Timer { id: value.parse().ok()?, ..Timer::default() });
            continue;
        }
        let timer = timers.last_mut()?;
        match key {
            "signal" => {
                let (signal, pointer) = value.split_once('/')?;
                timer.signal = signal.parse().ok()?;
                timer.value = u64::from_str_radix(pointer.trim_start_matches("0x"), 16).unwrap_or_default();
            }
            "notify" => {
                let (how, whom) = value.split_once('/')?;
                let (kind, number) = whom.split_once('.')?;
                timer.notify = match how {
                    "signal" => 0,
                    "none" => 1,
                    "thread" => 2,
                    _ => return None,
                };
                if kind == "tid" {
                    timer.notify |= 4;
                }
                timer.target = number.parse().ok()?;
            }
            "ClockID" => timer.clock = value.parse().ok()?,
            _ => {}
        }
    }
    Some(timers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_a_name_of_parentheses() {
        let mut text = b"7 (a) (b) S 1 7 7 0 -1 ".to_vec();
        let rest: Vec<String> = (9..=52).map(|number: u32| number.to_string()).collect();
        text.extend_from_slice(rest.join(" ").as_bytes());
        let stat = Stat::parse(&text).expect("it is well-formed");
        assert_eq!(stat.comm, b"a) (b");
        assert_eq!((stat.state, stat.parent, stat.start_time, stat.exit_status), (b'S', 1, 22, 52));
    }

    #[test]
    fn limits_are_those_the_kernel_says() {
        let own = std::process::id();
        let limits = Proc::own().limits(own).expect("they can be read");
        assert!(limits.len() >= 16);
        let pid = crate::Pid::from_raw(own.cast_signed());
        for (resource, limit) in (0..).zip(&limits) {
            assert_eq!(*limit, crate::process::limit(pid, resource).expect("one's own are no secret"), "{resource}");
        }
    }

    #[test]
    fn own_files_can_be_read() {
        let proc = Proc::own();
        let place = Place::Process(std::process::id());
        assert!(!proc.stat(place).expect("it is there").is_zombie());
        assert!(proc.status(place).expect("it is there").bounding != 0);
        assert!(proc.threads(std::process::id()).expect("it is there").contains(&std::process::id()));
    }

    #[test]
    fn timers_are_understood() {
        let text = "ID: 3\nsignal: 34/0000000000001234\nnotify: signal/tid.77\nClockID: 1\n\
                    ID: 4\nsignal: 14/0000000000000000\nnotify: none/pid.70\nClockID: 0\n";
        let timers = parse_timers(text).expect("it is well-formed");
        assert_eq!(timers[0], Timer { id: 3, signal: 34, value: 0x1234, notify: 4, target: 77, clock: 1 });
        assert_eq!(timers[1], Timer { id: 4, signal: 14, value: 0, notify: 1, target: 70, clock: 0 });
    }
}
