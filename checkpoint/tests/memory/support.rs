//! Programs compiled for the tests, stubs, and the comparison of two processes' memory.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use checkpoint::memory::{Argument, Batch, Filler, Layout, MemoryChunk, MemorySink, Stubs};
use sys::Pid;
use sys::vm::{self, DetailedMapping, Memory, Remote};

/// A directory that goes away with the test.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("migd-memory-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Compiles a program of `fixtures/`.
    pub fn compile(&self, name: &str, options: &[&str]) -> PathBuf {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/memory/fixtures").join(format!("{name}.c"));
        let program = self.0.join(name);
        let status = Command::new("cc").arg("-O1").args(options).arg(&source).arg("-o").arg(&program).status().unwrap();
        assert!(status.success(), "{} doesn't compile", source.display());
        program
    }

    pub fn compile_stub(&self) -> PathBuf {
        let options =
            ["-nostdlib", "-static", "-ffreestanding", "-fno-pie", "-fno-stack-protector", "-mcmodel=large", "-no-pie"];
        let mut all = options.to_vec();
        all.push("-Wl,-Ttext-segment=0x600000000000");
        self.compile("stub", &all)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap())
}

/// A program in a PID namespace of its own, which dies whole when this is dropped.
pub struct Group {
    /// `unshare`, which isn't part of the group's work.
    wrapper: Child,
}

impl Group {
    pub fn start(program: &Path, arguments: &[&OsStr], output: Stdio) -> Group {
        let mut command = Command::new("unshare");
        // The first process of the namespace is a shell: a program there couldn't stop itself.
        command.args(["--pid", "--fork", "--kill-child=KILL", "sh", "-c", "nice -n 10 \"$0\" \"$@\"; exit $?"]);
        command.arg(program).args(arguments);
        let wrapper = command.stdin(Stdio::null()).stdout(output).process_group(0).spawn().unwrap();
        let group = Group { wrapper };
        let deadline = Instant::now() + PATIENCE;
        while group.members().is_empty() {
            assert!(Instant::now() < deadline, "the program doesn't start");
            std::thread::sleep(Duration::from_millis(1));
        }
        group
    }

    fn pid(&self) -> Pid {
        pid_of(&self.wrapper)
    }

    /// Every living process of the group with its parent, ancestors first.
    pub fn members(&self) -> Vec<(Pid, Pid)> {
        let group = self.pid();
        let mut members = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let Some(stat) = Stat::read(Pid::from_raw(pid)) else { continue };
            let helper = ["unshare", "sh", "nice"].contains(&stat.name.as_str());
            if stat.group == group.as_raw() && !helper && !matches!(stat.state, 'Z' | 'X') {
                members.push((Pid::from_raw(pid), Pid::from_raw(stat.parent)));
            }
        }
        members.sort();
        members
    }

    /// Stops every process, also those that are forked meanwhile.
    pub fn freeze(&self) -> Vec<(Pid, Pid)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            sys::process::kill(Pid::from_raw(-self.pid().as_raw()), sys::libc::SIGSTOP).unwrap();
            let members = self.members();
            let stopped = |pid: Pid| Stat::read(pid).is_none_or(|stat| matches!(stat.state, 'T' | 'Z' | 'X'));
            if members.iter().all(|(pid, _)| stopped(*pid)) && self.members() == members {
                return members;
            }
            assert!(Instant::now() < deadline, "processes don't stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Group {
    pub fn thaw(&self) {
        sys::process::kill(Pid::from_raw(-self.pid().as_raw()), sys::libc::SIGCONT).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = sys::process::kill(Pid::from_raw(-self.pid().as_raw()), sys::libc::SIGKILL);
        let _ = self.wrapper.wait();
    }
}

pub struct Stat {
    name: String,
    pub state: char,
    pub parent: i32,
    pub group: i32,
}

impl Stat {
    pub fn read(pid: Pid) -> Option<Stat> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (before, after) = text.rsplit_once(')')?;
        let mut fields = after.split_whitespace();
        Some(Stat {
            name: before.split_once('(')?.1.to_owned(),
            state: fields.next()?.chars().next()?,
            parent: fields.next()?.parse().ok()?,
            group: fields.next()?.parse().ok()?,
        })
    }
}

/// One process of `fixtures/stub.c`.
struct StubProcess {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
    data: u64,
    tester: i64,
}

impl StubProcess {
    fn start(program: &Path) -> StubProcess {
        let mut child = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut data = [0; 8];
        output.read_exact(&mut data).unwrap();
        let mut stub = StubProcess { child, input, output, data: u64::from_ne_bytes(data), tester: -1 };
        for mapping in vm::maps(pid_of(&stub.child)).unwrap() {
            let own = mapping.start >> 32 == 0x6000;
            if !own && mapping.name != b"[vsyscall]" {
                let length = mapping.end - mapping.start;
                assert_eq!(stub.call(sys::libc::SYS_munmap, [mapping.start, length, 0, 0, 0, 0]).unwrap(), 0);
            }
        }
        let own = u64::from(std::process::id());
        stub.tester = stub.call(sys::libc::SYS_pidfd_open, [own, 0, 0, 0, 0, 0]).unwrap();
        assert!(stub.tester >= 0);
        stub
    }

    fn call(&mut self, number: i64, arguments: [u64; 6]) -> io::Result<i64> {
        let mut request = number.to_ne_bytes().to_vec();
        arguments.iter().for_each(|argument| request.extend(argument.to_ne_bytes()));
        self.input.write_all(&request)?;
        let mut answer = [0; 8];
        self.output.read_exact(&mut answer)?;
        Ok(i64::from_ne_bytes(answer))
    }
}

impl Drop for StubProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Stubs made of `fixtures/stub.c`.
pub struct TestStubs {
    program: PathBuf,
    stubs: BTreeMap<u32, StubProcess>,
}

impl TestStubs {
    pub fn new(program: PathBuf) -> TestStubs {
        TestStubs { program, stubs: BTreeMap::new() }
    }

    fn ensure(&mut self, process: u32) {
        self.stubs.entry(process).or_insert_with(|| StubProcess::start(&self.program));
    }
}

impl Stubs for TestStubs {
    fn pid(&self, process: u32) -> Option<Pid> {
        self.stubs.get(&process).map(|stub| pid_of(&stub.child))
    }

    fn run(&mut self, process: u32, batch: &Batch) -> io::Result<Vec<i64>> {
        let stub = self.stubs.get_mut(&process).ok_or(io::ErrorKind::NotFound)?;
        if !batch.data.is_empty() {
            vm::write_vectored(pid_of(&stub.child), [(stub.data, batch.data.as_slice())].into_iter())?;
        }
        let mut results: Vec<i64> = Vec::new();
        for call in &batch.calls {
            let arguments = call.arguments.map(|argument| match argument {
                Argument::Value(value) => value,
                Argument::Result(index) => results[index] as u64,
                Argument::Data(offset) => stub.data + offset as u64,
            });
            results.push(stub.call(call.number, arguments)?);
        }
        Ok(results)
    }

    fn import(&mut self, process: u32, descriptor: BorrowedFd<'_>) -> io::Result<u64> {
        let stub = self.stubs.get_mut(&process).ok_or(io::ErrorKind::NotFound)?;
        let arguments = [stub.tester as u64, descriptor.as_raw_fd() as u64, 0, 0, 0, 0];
        let number = stub.call(sys::libc::SYS_pidfd_getfd, arguments)?;
        u64::try_from(number).map_err(|_| io::Error::from_raw_os_error(-number as i32))
    }
}

/// A target in this process: stubs and their filler.
pub struct Target {
    pub filler: Filler,
    pub stubs: TestStubs,
    /// The last layout.
    pub last: Option<Layout>,
}

impl Target {
    pub fn new(scratch: &Scratch) -> Target {
        Target { filler: Filler::default(), stubs: TestStubs::new(scratch.compile_stub()), last: None }
    }
}

impl MemorySink for Target {
    fn layout(&mut self, layout: Layout) -> io::Result<()> {
        layout.processes.iter().for_each(|process| self.stubs.ensure(process.process));
        self.last = Some(layout.clone());
        self.filler.layout(layout, &mut self.stubs)
    }

    fn pages(&mut self, chunk: MemoryChunk<'_>) -> io::Result<()> {
        self.batch(&[chunk])
    }

    fn batch(&mut self, chunks: &[MemoryChunk<'_>]) -> io::Result<()> {
        self.filler.batch(chunks)
    }
}

/// Every wait of the tests ends at the latest after this.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks a program that knows SIGUSR1 (see `fixtures/churn.c`) for a userfaultfd.
pub fn inject(pid: Pid, mailbox: &mut UnixStream) -> io::Result<OwnedFd> {
    let process = sys::process::pidfd_open(pid)?;
    mailbox.set_read_timeout(Some(PATIENCE))?;
    let deadline = Instant::now() + PATIENCE;
    // While it executes itself anew the signal is ignored, and no answer would come. So it is sent to a program that stands still and is
    // seen to handle it, which it then does before anything else.
    loop {
        sys::process::pidfd_send_signal(process.as_fd(), sys::libc::SIGSTOP)?;
        wait_stopped(pid, deadline)?;
        let catches = catches(pid)?;
        if catches {
            sys::process::pidfd_send_signal(process.as_fd(), sys::libc::SIGUSR1)?;
        }
        sys::process::pidfd_send_signal(process.as_fd(), sys::libc::SIGCONT)?;
        if catches {
            break;
        }
        assert!(Instant::now() < deadline, "process {pid} doesn't handle SIGUSR1");
        std::thread::sleep(Duration::from_micros(200));
    }
    let mut message = [0; 8];
    mailbox.read_exact(&mut message)?;
    let number = i32::from_ne_bytes(message[4..].try_into().unwrap());
    assert!(number >= 0);
    let fetched = sys::process::pidfd_getfd(process.as_fd(), number)?;
    wait_stopped(pid, deadline)?;
    sys::process::pidfd_send_signal(process.as_fd(), sys::libc::SIGCONT)?;
    Ok(fetched)
}

fn wait_stopped(pid: Pid, deadline: Instant) -> io::Result<()> {
    while Stat::read(pid).ok_or(io::ErrorKind::NotFound)?.state != 'T' {
        assert!(Instant::now() < deadline, "process {pid} doesn't stop");
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

fn catches(pid: Pid) -> io::Result<bool> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or("0").trim().to_owned();
    Ok(u64::from_str_radix(&caught, 16).is_ok_and(|mask| mask >> (sys::libc::SIGUSR1 - 1) & 1 == 1))
}

/// A mapping as both sides must have it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Comparable {
    start: u64,
    end: u64,
    permissions: [bool; 4],
    flags: Vec<[u8; 2]>,
    behind: Behind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Behind {
    Anonymous(Vec<u8>),
    Object(u64),
    File(Vec<u8>, u64),
}

fn comparable(mappings: &[DetailedMapping]) -> Vec<Comparable> {
    let mut result: Vec<Comparable> = Vec::new();
    for detailed in mappings {
        let mapping = &detailed.mapping;
        let name = mapping.name.as_slice();
        if mapping.start >> 32 == 0x6000 || [&b"[vdso]"[..], b"[vvar]", b"[vvar_vclock]", b"[vsyscall]"].contains(&name)
        {
            continue;
        }
        // Not compared: tracking, soft-dirty, "has had guard pages" and accounting, which stay or go by rules of
        // their own.
        let mut flags: Vec<[u8; 2]> =
            detailed.flags.iter().copied().filter(|code| ![*b"uw", *b"sd", *b"gu", *b"ac"].contains(code)).collect();
        flags.sort_unstable();
        let behind = if mapping.inode == 0 {
            Behind::Anonymous(if name.starts_with(b"[anon:") { name.to_vec() } else { Vec::new() })
        } else if name.ends_with(b" (deleted)") {
            Behind::Object(mapping.offset)
        } else {
            Behind::File(name.to_vec(), mapping.offset)
        };
        let next = Comparable {
            start: mapping.start,
            end: mapping.end,
            permissions: [mapping.read, mapping.write, mapping.execute, mapping.shared],
            flags,
            behind,
        };
        if let Some(last) = result.last_mut() {
            let length = last.end - last.start;
            let follows = match (&last.behind, &next.behind) {
                (Behind::Anonymous(a), Behind::Anonymous(b)) => a == b,
                (Behind::Object(a), Behind::Object(b)) => a + length == *b,
                (Behind::File(a, from), Behind::File(b, to)) => a == b && from + length == *to,
                _ => false,
            };
            if follows && last.end == next.start && last.permissions == next.permissions && last.flags == next.flags {
                last.end = next.end;
                continue;
            }
        }
        result.push(next);
    }
    result
}

/// Says how the two processes' memory differs.
pub fn difference(source: Pid, target: Pid) -> Option<String> {
    let (a, b) = (vm::detailed_maps(source).unwrap(), vm::detailed_maps(target).unwrap());
    let (a, b) = (comparable(&a), comparable(&b));
    for (a, b) in a.iter().zip(&b) {
        if a != b {
            return Some(format!("mappings differ:\n  source {a:x?}\n  target {b:x?}"));
        }
    }
    if a.len() != b.len() {
        return Some(format!("{} mappings instead of {}", b.len(), a.len()));
    }
    let (source_memory, target_memory) = (Memory::open(source).unwrap(), Memory::open(target).unwrap());
    let mut pages = (vec![0; 4096], vec![0; 4096]);
    let mut blocks = (vec![0; 256 << 10], vec![0; 256 << 10]);
    // A reservation of gigabytes has no content; looking at each of its pages would take minutes.
    for mapping in a.iter().filter(|mapping| mapping.end - mapping.start < 4 << 30) {
        let mut at = mapping.start;
        while at < mapping.end {
            let length = usize::try_from(mapping.end - at).unwrap().min(blocks.0.len());
            let remote = [Remote { address: at, length }];
            let both = (
                vm::read_vectored(source, &mut blocks.0[..length], &remote).unwrap(),
                vm::read_vectored(target, &mut blocks.1[..length], &remote).unwrap(),
            );
            if both == (length, length) && blocks.0[..length] == blocks.1[..length] {
                at += length as u64;
                continue;
            }
            for page in (at..at + length as u64).step_by(4096) {
                let (mine, theirs) =
                    (source_memory.read(page, &mut pages.0).is_ok(), target_memory.read(page, &mut pages.1).is_ok());
                if mine != theirs {
                    return Some(format!(
                        "{page:x} in {mapping:x?}: readable {mine} at the source, {theirs} at the target"
                    ));
                }
                if mine && pages.0 != pages.1 {
                    let zero = (pages.0.iter().all(|byte| *byte == 0), pages.1.iter().all(|byte| *byte == 0));
                    return Some(format!("content differs at {page:x} in {mapping:x?}; zeros: {zero:?}"));
                }
            }
            at += length as u64;
        }
    }
    None
}
