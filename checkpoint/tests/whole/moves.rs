//! Trees dumped in one sandbox and restored in another.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use checkpoint::{Event, ExitStatus, Sandbox};
use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{Job, Moment, Outcome, Precopy, trial, wait_event};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("moves::sleep_goes_on_and_exits", sleep),
        trial("moves::counter_in_threads_goes_on", threads),
        trial("moves::redis_twenty_times_with_precopy", redis),
        trial("moves::memcached_several_times", memcached),
        trial("moves::nginx_with_workers_several_times", nginx),
        trial("moves::go_program_several_times", go),
        trial("moves::python_threads_twenty_times_with_precopy", python_twenty),
        trial("moves::everything_the_kernel_keeps_is_the_same", || keeper(Precopy::None)),
        trial("moves::everything_the_kernel_keeps_is_the_same_with_precopy", || keeper(Precopy::Rounds(2))),
        trial("moves::tree_with_sessions_groups_and_zombies", tree),
        trial("moves::blocking_calls_end_as_they_would", blocking),
        trial("moves::system_v_ipc_goes_along", system_v),
        trial("moves::files_in_dev_shm_go_along", shm),
        trial("moves::much_that_nobody_maps_keeps_the_job", hoard),
        trial("moves::file_locks_are_held_by_one_at_a_time", file_locks),
        trial("moves::daemon_goes_on_without_its_first_process", daemon),
        trial("moves::kill_ends_all_of_a_job", killed),
        trial("moves::stopped_job_stays_stopped", stopped),
        trial("moves::abort_leaves_the_job_running", abort),
    ]
}

fn sleep() -> Outcome {
    let mut job = Job::start(&["sh", "-c", "sleep 1; exit 5"])?;
    std::thread::sleep(std::time::Duration::from_millis(100));
    job.hop(Precopy::None)?;
    let event = wait_event(&mut job.sandbox, |event| matches!(event, Event::RootExited { .. }))?;
    ensure!(event == Event::RootExited { status: ExitStatus::Code(5) }, "ended with {event:?}");
    Ok(())
}

const COUNTER: &str = "
import threading, time, sys, os
lock = threading.Lock()
count = 0
def work():
    global count
    while True:
        with lock:
            count += 1
        time.sleep(0.001)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
last = 0
line = 0
while True:
    time.sleep(0.02)
    with lock:
        now = count
    assert now >= last
    line += 1
    print(line, now - last, threading.active_count(), os.getpid(), flush=True)
    last = now
";

fn threads() -> Outcome {
    let mut job = Job::start(&["python3", "-c", COUNTER])?;
    let mut expected = 1;
    for precopy in [Precopy::None, Precopy::Rounds(2), Precopy::None, Precopy::Rounds(3)] {
        for _ in 0..10 {
            let line = job.line()?;
            let words: Vec<i64> = line.split_whitespace().map(|word| word.parse().unwrap_or(-1)).collect();
            ensure!(words.len() == 4, "line {line:?}");
            ensure!(words[0] == expected, "line {expected} is {line:?}");
            ensure!(words[2] == 5, "threads: {line:?}");
            expected += 1;
        }
        job.hop(precopy)?;
    }
    for _ in 0..10 {
        let line = job.line()?;
        ensure!(line.starts_with(&format!("{expected} ")), "line {expected} is {line:?}");
        expected += 1;
    }
    Ok(())
}

/// A directory that is gone at the end of a trial.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> std::io::Result<Scratch> {
        let path = std::env::temp_dir().join(format!("checkpoint-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn redis() -> Outcome {
    let scratch = Scratch::new("redis")?;
    let socket = scratch.0.join("redis.sock");
    let socket = socket.to_str().ok_or("a path that isn't UTF-8")?;
    let directory = scratch.0.to_str().ok_or("a path that isn't UTF-8")?;
    let arguments = [
        "redis-server",
        "--port",
        "0",
        "--unixsocket",
        socket,
        "--save",
        "",
        "--dir",
        directory,
        "--enable-debug-command",
        "yes",
    ];
    let mut job = Job::start(&arguments)?;
    let ask = |arguments: &[&str]| -> Result<String, Box<dyn std::error::Error>> {
        let output = std::process::Command::new("redis-cli").args(["-s", socket]).args(arguments).output()?;
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let start = Instant::now();
    while ask(&["ping"])? != "PONG" {
        ensure!(start.elapsed() < Duration::from_secs(10), "redis doesn't answer");
        std::thread::sleep(Duration::from_millis(20));
    }
    let size = std::env::var("CHECKPOINT_REDIS_KEYS").unwrap_or_else(|_| "200000".into());
    ask(&["debug", "populate", &size, "key", "100"])?;
    let digest = ask(&["debug", "digest"])?;
    for round in 1..=20 {
        // redis may not have closed its end of the last client's connection yet, which reaches out of the job.
        let hop = loop {
            match job.hop(Precopy::Rounds(2)) {
                Err(error)
                    if error.to_string().contains("unix socket") && start.elapsed() < Duration::from_secs(60) =>
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                result => break result?,
            }
        };
        println!("redis hop {round}: {hop:?}");
        ensure!(ask(&["incr", "hops"])? == round.to_string(), "a hop was lost");
        ask(&["del", "other"])?;
    }
    ask(&["del", "hops"])?;
    ensure!(ask(&["debug", "digest"])? == digest, "the data changed");
    Ok(())
}

fn python_twenty() -> Outcome {
    let mut job = Job::start(&["python3", "-c", COUNTER])?;
    let mut expected = 1;
    for round in 1..=20 {
        for _ in 0..5 {
            let line = job.line()?;
            ensure!(line.starts_with(&format!("{expected} ")), "line {expected} is {line:?}");
            expected += 1;
        }
        let hop = job.hop(Precopy::Rounds(2))?;
        println!("python hop {round}: {hop:?}");
    }
    Ok(())
}

/// What one process has of everything the kernel keeps for it; it says so before and after a hop.
const KEEPER: &str = r#"
import ctypes, os, resource, signal, sys, time, threading
libc = ctypes.CDLL(None, use_errno=True)
got = []
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN + 3, signal.SIGALRM):
    signal.signal(number, lambda number, frame: got.append(number))
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGRTMIN + 3])
os.kill(os.getpid(), signal.SIGUSR1)
signal.pthread_kill(threading.get_ident(), signal.SIGRTMIN + 3)
signal.pthread_kill(threading.get_ident(), signal.SIGRTMIN + 3)
blocked, asked, other_got = threading.Event(), threading.Event(), []
def other():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN + 4])
    blocked.set()
    asked.wait()
    other_got.append(signal.sigtimedwait([signal.SIGRTMIN + 4], 0))
other = threading.Thread(target=other)
other.start()
blocked.wait()
signal.pthread_kill(other.ident, signal.SIGRTMIN + 4)
libc.prctl(15, b"keeper", 0, 0, 0)
libc.prctl(36, 1, 0, 0, 0)
libc.prctl(29, 77777, 0, 0, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (123, 456))
os.umask(0o31)
os.chdir("/usr")
os.nice(3)
read, write = os.pipe()
os.write(write, b"still in the pipe")
signal.setitimer(signal.ITIMER_REAL, 1.5, 10)
start = time.monotonic()
def state():
    names = ("Umask", "Uid", "Gid", "Groups", "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "CapInh", "CapPrm", "CapEff",
             "CapBnd", "CapAmb", "NoNewPrivs", "Threads", "Name", "Pid", "PPid", "NSpgid", "NSsid")
    lines = [line for line in open("/proc/self/status") if line.split(":")[0] in names]
    stat = open("/proc/self/stat").read().rsplit(")", 1)[1].split()
    lines += [str(stat[number - 3]) for number in (26, 27, 28, 38, 45, 46, 47, 48, 49, 50, 51)]
    lines += [os.getcwd(), str(resource.getrlimit(resource.RLIMIT_NOFILE)), str(os.nice(0)), os.readlink("/proc/self/exe")]
    lines += [open("/proc/self/cmdline").read(), open("/proc/self/timerslack_ns").read(), open("/proc/self/auxv", "rb").read().hex()]
    lines += [str(libc.prctl(30, 0, 0, 0, 0)), str(os.getppid()), str(os.getsid(0)), str(os.getpgrp())]
    return "".join(str(line).strip() + "\n" for line in lines)
before = state()
print("ready", flush=True)
sys.stdin.readline()
after = state()
if before != after:
    for old, new in zip(before.split("\n"), after.split("\n")):
        if old != new:
            print("differs:", old, "|", new, flush=True)
print("same" if before == after else "different", flush=True)
print(os.read(read, 100).decode(), flush=True)
while signal.SIGALRM not in got:
    signal.pause()
print(1.4 < time.monotonic() - start < 3.0, flush=True)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1, signal.SIGRTMIN + 3])
got = sorted(set(got))
asked.set()
other.join()
print([int(number) for number in got], other_got[0].si_signo if other_got[0] else None, flush=True)
"#;

fn keeper(precopy: Precopy) -> Outcome {
    let mut job = Job::start(&["python3", "-c", KEEPER])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    job.hop(precopy)?;
    job.say("go")?;
    let mut lines = Vec::new();
    for _ in 0..4 {
        lines.push(job.line()?);
    }
    ensure!(lines == ["same", "still in the pipe", "True", "[10, 14, 37] 38"], "{lines:?}");
    let event = wait_event(&mut job.sandbox, |event| matches!(event, Event::RootExited { .. }))?;
    ensure!(event == Event::RootExited { status: ExitStatus::Code(0) }, "ended with {event:?}");
    Ok(())
}

/// A tree: workers, a daemon with a session of its own, an orphan in a group without a leader, and zombies.
const TREE: &str = r#"
import os, signal, sys, time
def fork(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid
requests, replies = os.pipe(), os.pipe()
def worker():
    while True:
        word = os.read(requests[0], 1)
        os.write(replies[1], b"%s from %d child of %d\n" % (word, os.getpid(), os.getppid()))
workers = [fork(worker) for _ in range(3)]
exited = fork(lambda: os._exit(7))
killed = fork(signal.pause)
os.kill(killed, signal.SIGKILL)
facts = os.pipe()
def leave():
    # Its own session, then an orphan in it, in a group whose leader is gone.
    os.setsid()
    def leader():
        os.setpgid(0, 0)
        def orphan():
            time.sleep(0.05)
            line = lambda: b"%d %d %d %d\n" % (os.getpid(), os.getppid(), os.getpgrp(), os.getsid(0))
            os.write(facts[1], line())
            signal.signal(signal.SIGUSR1, lambda *_: os.write(facts[1], line()))
            while True:
                signal.pause()
        os.write(facts[1], b"%d\n" % fork(orphan))
    os.waitpid(fork(leader), 0)
    while True:
        signal.pause()
daemon = fork(leave)
stream = os.fdopen(facts[0])
orphan = int(stream.readline())
before = stream.readline()
time.sleep(0.1)
answers = os.fdopen(replies[0])
print("ready", flush=True)
sys.stdin.readline()
os.kill(orphan, signal.SIGUSR1)
print(before == stream.readline(), before.strip(), flush=True)
os.write(requests[1], b"abc")
seen = sorted(answers.readline().split()[0] for _ in range(3))
print(seen, flush=True)
print(os.waitstatus_to_exitcode(os.waitpid(exited, 0)[1]), os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]), flush=True)
print(os.getsid(daemon) == daemon, os.getpgid(workers[0]) == os.getpgrp(), flush=True)
for pid in workers + [daemon]:
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
os.kill(orphan, signal.SIGTERM)
try:
    os.waitpid(-1, 0)
    print("a child too many")
except ChildProcessError:
    print("done", flush=True)
"#;

fn tree() -> Outcome {
    for precopy in [Precopy::None, Precopy::Rounds(2)] {
        let mut job = Job::start(&["python3", "-c", TREE])?;
        ensure!(job.line()? == "ready", "it doesn't start");
        job.hop(precopy)?;
        job.hop(precopy)?;
        job.say("go")?;
        let facts = job.line()?;
        ensure!(facts.starts_with("True "), "the orphan's numbers changed: {facts}");
        let mut lines = Vec::new();
        for _ in 0..4 {
            lines.push(job.line()?);
        }
        ensure!(lines == ["['a', 'b', 'c']", "7 -9", "True True", "done"], "{lines:?}");
        wait_event(&mut job.sandbox, |event| *event == Event::JobEmpty)?;
    }
    Ok(())
}

/// Each call waits in a thread of its own while the job hops.
const BLOCKING: &str = r#"
import ctypes, os, select, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
class Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]
results = {}
word = ctypes.c_int(5)
empty = os.pipe()
later = os.pipe()
def nanosleep():
    return libc.syscall(35, ctypes.byref(Timespec(2, 0)), None)
def nanosleep_with_rest():
    return libc.syscall(35, ctypes.byref(Timespec(2, 0)), ctypes.byref(Timespec()))
def futex():
    libc.syscall(202, ctypes.byref(word), 128, 5, ctypes.byref(Timespec(2, 0)), None, 0)
    return ctypes.get_errno()
def poll():
    return len(select.poll().poll(2000)), 0
def select_():
    return len(select.select([empty[0]], [], [], 2)[0])
def epoll():
    libc.epoll_create1(0)
    events = ctypes.create_string_buffer(64)
    result = libc.epoll_wait(libc.epoll_create1(0), events, 1, 2000)
    return result if result >= 0 else -ctypes.get_errno()
def event():
    return threading.Event().wait(2)
def reader():
    return os.read(later[0], 10)
def signal_wait():
    return signal.sigtimedwait([signal.SIGUSR2], 2)
def work(call):
    start = time.monotonic()
    result = call()
    results[call.__name__] = (result, time.monotonic() - start)
calls = [nanosleep, nanosleep_with_rest, futex, poll, select_, epoll, event, reader, signal_wait]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
threads = [threading.Thread(target=work, args=(call,)) for call in calls]
for thread in threads:
    thread.start()
time.sleep(0.2)
print("ready", flush=True)
sys.stdin.readline()
os.write(later[1], b"here")
for thread in threads:
    thread.join()
for name, (result, took) in results.items():
    fine = 1.95 < took < 4.5 or name == "reader"
    print(name, result, "fine" if fine else took, flush=True)
print("end", flush=True)
"#;

fn blocking() -> Outcome {
    let mut job = Job::start(&["python3", "-c", BLOCKING])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    job.hop(Precopy::Rounds(1))?;
    job.hop(Precopy::None)?;
    job.say("go")?;
    let mut lines = Vec::new();
    loop {
        let line = job.line()?;
        if line == "end" || line.is_empty() {
            break;
        }
        lines.push(line);
    }
    lines.sort();
    let expected = [
        "epoll 0 fine",
        "event False fine",
        "futex 110 fine",
        "nanosleep 0 fine",
        "nanosleep_with_rest 0 fine",
        "poll (0, 0) fine",
        "reader b'here' fine",
        "select_ 0 fine",
        "signal_wait None fine",
    ];
    ensure!(lines == expected, "{lines:#?}");
    Ok(())
}

/// Prints what it finds after each line of input, having been told to change it.
const SYSTEM_V: &str = r#"
import ctypes, os, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.shmdt.argtypes = [ctypes.c_void_p]
def good(result):
    if result in (None, -1, 2**64 - 1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
CREATE, REMOVE, STAT = 0o1000, 0, 2
for other in range(int(sys.argv[1])):  # So that numbers aren't the first ones.
    good(libc.shmctl(good(libc.shmget(0, 4096, 0o600)), REMOVE, None))
kept = good(libc.shmget(0x1234, 10000, CREATE | 0o640))
address = good(libc.shmat(kept, None, 0))
reader = good(libc.shmat(kept, None, 0o10000))
gone = good(libc.shmget(0, 4096, CREATE | 0o600))
gone_address = good(libc.shmat(gone, None, 0))
good(libc.shmctl(gone, REMOVE, None))
idle = good(libc.shmget(0x77, 3 << 20, CREATE | 0o600))
there = good(libc.shmat(idle, None, 0))
ctypes.memmove(there + (2 << 20), b"idle", 4)
good(libc.shmdt(there))
sems = good(libc.semget(0x55, 2, CREATE | 0o600))
good(libc.semctl(sems, 0, 16, 3))
queue = good(libc.msgget(0x66, CREATE | 0o600))
for kind, text in ((5, b"five"), (3, b"three")):
    good(libc.msgsnd(queue, struct.pack("l", kind) + text, len(text), 0))
child = os.fork()
if child == 0:
    # Waits until the second semaphore is raised, across hops, and tells in shared memory.
    good(libc.semop(sems, struct.pack("Hhh", 1, -1, 0), 1))
    ctypes.memmove(address + 9990, b"child", 5)
    os._exit(0)
print("ready", flush=True)
for turn in (line.strip() for line in sys.stdin):
    there = good(libc.shmat(good(libc.shmget(0x77, 0, 0)), None, 0))
    facts = [
        libc.shmget(0x1234, 0, 0) == kept,
        libc.shmget(0x77, 0, 0) == idle,
        ctypes.string_at(there + (2 << 20), 4),
        ctypes.string_at(reader, 8),
        ctypes.string_at(gone_address, 8),
        libc.semctl(sems, 0, 12),
    ]
    good(libc.shmdt(there))
    buffer = ctypes.create_string_buffer(64)
    length = libc.msgrcv(queue, buffer, 50, 0, 0o4000)
    facts.append(buffer.raw[8:8 + length] if length >= 0 else None)
    print(facts, flush=True)
    ctypes.memmove(address, b"turn " + turn.encode(), 5 + len(turn))
    ctypes.memmove(gone_address, b"gone " + turn.encode(), 5 + len(turn))
    if turn == "2":
        good(libc.semop(sems, struct.pack("Hhh", 1, 1, 0), 1))
        os.waitpid(child, 0)
        print(ctypes.string_at(reader + 9990, 5), flush=True)
        with open("/proc/sysvipc/shm") as table:
            print(sorted(line.split()[2] for line in table.readlines()[1:]), flush=True)
"#;

fn system_v() -> Outcome {
    for (precopy, others) in [(Precopy::None, "3"), (Precopy::Rounds(2), "3"), (Precopy::Rounds(1), "0")] {
        let mut job = Job::start(&["python3", "-c", SYSTEM_V, others])?;
        ensure!(job.line()? == "ready", "it doesn't start");
        let zeros = r"b'\x00\x00\x00\x00\x00\x00\x00\x00'";
        let expected = [
            format!("[True, True, b'idle', {zeros}, {zeros}, 3, b'five']"),
            r"[True, True, b'idle', b'turn 0\x00\x00', b'gone 0\x00\x00', 3, b'three']".to_owned(),
            r"[True, True, b'idle', b'turn 1\x00\x00', b'gone 1\x00\x00', 3, None]".to_owned(),
        ];
        for (turn, expected) in expected.iter().enumerate() {
            job.hop(precopy)?;
            job.say(&turn.to_string())?;
            let line = job.line()?;
            ensure!(line == *expected, "after hop {turn}: {line}");
        }
        let child = job.line()?;
        ensure!(child == "b'child'", "the child that waited for a semaphore wrote {child}");
        let rights = job.line()?;
        ensure!(rights == "['1600', '600', '640']", "rights: {rights}");
    }
    Ok(())
}

/// Files in /dev/shm: mapped, mapped for oneself, mapped without a name, open, and there only; POSIX semaphores and shared memory.
const SHM: &str = r#"
import mmap, multiprocessing, os, stat, sys
from multiprocessing import shared_memory
os.chdir("/dev/shm")
there = os.listdir(".")
def mapped(name, text, flags=mmap.MAP_SHARED):
    with open(name, "w+b") as file:
        file.write(text.ljust(3 << 20, b"\0"))
        file.flush()
        return mmap.mmap(file.fileno(), 3 << 20, flags)
named = mapped("named", b"named")
own = mapped("own", b"own", mmap.MAP_PRIVATE)
own[0:3] = b"OWN"
nameless = mapped("nameless", b"nameless")
os.unlink("nameless")
os.link("named", "also named")
os.mkdir("queue", 0o750)
with open("queue/message", "w") as file:
    file.write("unmapped")
os.truncate("queue/message", 200000)
os.chmod("queue/message", 0o604)
os.utime("queue/message", ns=(1, 1234567891))
os.symlink("queue/message", "link")
os.mkfifo("pipe", 0o622)
opened = open("log", "a+")
opened.write("start ")
opened.flush()
segment = shared_memory.SharedMemory("segment", create=True, size=100)
lock = multiprocessing.Semaphore(0)
turn = 0
if os.fork() == 0:
    while lock.acquire():
        segment.buf[0] += 1
        named[100:105] = b"child"
        os.write(1, f"child {segment.buf[0]}\n".encode())
print("ready", there, flush=True)
for line in sys.stdin:
    turn += 1
    opened.write(f"{turn} ")
    opened.flush()
    with open("also named", "r+b") as file:
        file.seek(5)
        file.write(f" {turn}".encode())
    status = os.stat("link")
    print(named[:7], own[:3], nameless[:8], open("own", "rb").read(3), open("log").read(), open("link").read(8), status.st_size,
        oct(status.st_mode), status.st_mtime_ns, oct(os.stat("queue").st_mode), stat.S_ISFIFO(os.stat("pipe").st_mode),
        os.stat("named").st_nlink, sorted(os.listdir(".")), flush=True)
    nameless[:8] = b"NAMELESS"
    mapped("new", b"new").close()
    lock.release()
"#;

fn shm() -> Outcome {
    for precopy in [Precopy::None, Precopy::Rounds(2)] {
        let mut job = Job::start(&["python3", "-c", SHM])?;
        let line = job.line()?;
        ensure!(line == "ready []", "it sees what isn't its own: {line}");
        for turn in 1..4 {
            job.hop(precopy)?;
            job.say("go")?;
            let (name, new) = if turn == 1 { ("nameless", "") } else { ("NAMELESS", "'new', ") };
            let turns: String = (1..=turn).map(|turn| format!("{turn} ")).collect();
            let expected = format!(
                "b'named {turn}' b'OWN' b'{name}' b'own' start {turns} unmapped 200000 0o100604 1234567891 0o40750 True 2 \
                 ['also named', 'link', 'log', 'named', {new}'own', 'pipe', 'queue', 'segment']"
            );
            let line = job.line()?;
            ensure!(
                line == expected,
                "after hop {turn}:
{line}
{expected}"
            );
            let line = job.line()?;
            ensure!(line == format!("child {turn}"), "after hop {turn}: {line}");
        }
    }
    Ok(())
}

/// What is in /dev/shm and mapped by nobody moves in the freeze, so there must not be much of it.
const HOARD: &str = r#"
import mmap, sys
file = open("/dev/shm/hoard", "w+b")
file.write(b"x" * (70 << 20))
file.flush()
print("ready", flush=True)
sys.stdin.readline()
memory = mmap.mmap(file.fileno(), 70 << 20)
print("mapped", flush=True)
sys.stdin.readline()
print(memory[-5:], flush=True)
"#;

fn hoard() -> Outcome {
    let mut job = Job::start(&["python3", "-c", HOARD])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    let reasons = job.reasons()?;
    ensure!(reasons.len() == 1 && reasons[0].what == "/dev/shm", "{reasons:?}");
    job.say("")?;
    ensure!(job.line()? == "mapped", "it doesn't go on");
    let reasons = job.reasons()?;
    ensure!(reasons.is_empty(), "{reasons:?}");
    job.hop(Precopy::Rounds(1))?;
    job.say("")?;
    let line = job.line()?;
    ensure!(line == "b'xxxxx'", "{line}");
    Ok(())
}

/// A child looks whether others hold what its parent has locked: by flock(2), by fcntl(2), and for an open file description.
const LOCKS: &str = r#"
import fcntl, os, struct, sys
paths = [os.path.join(sys.argv[1], name) for name in ("whole", "range", "description")]
OFD_SETLK = 37
def record(start, length):
    return struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, start, length, 0)
def attempts(fds, start, length):
    yield lambda: fcntl.flock(fds[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield lambda: fcntl.lockf(fds[1], fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    yield lambda: fcntl.fcntl(fds[2], OFD_SETLK, record(start, length))
fds = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
for attempt in attempts(fds, 10, 5):
    attempt()
if os.fork():
    os.wait()
for fd in fds:
    os.close(fd)
print("ready", flush=True)
for line in sys.stdin:
    fds = [os.open(path, os.O_RDWR) for path in paths]
    held = []
    for attempt in attempts(fds, 12, 1):
        try:
            attempt()
            held.append(False)
        except OSError:
            held.append(True)
    for fd in fds:
        os.close(fd)
    print(held, flush=True)
"#;

fn file_locks() -> Outcome {
    let scratch = Scratch::new("locks")?;
    let directory = scratch.0.to_str().ok_or("a path that isn't UTF-8")?;
    let mut job = Job::start(&["python3", "-c", LOCKS, directory])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    for hop in 0..4 {
        match hop {
            0 => {}
            1 => job.hop_in_vain(Precopy::None)?,
            2 => drop(job.hop(Precopy::None)?),
            _ => drop(job.hop(Precopy::Rounds(2))?),
        }
        job.say("look")?;
        let line = job.line()?;
        ensure!(line == "[True, True, True]", "after hop {hop}: {line}");
    }
    Ok(())
}

/// The first process starts another, in its own session, in a new one, or in one whose leader ends, and ends when it is told to.
const DAEMON: &str = r#"
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(3))
if os.fork():
    while True:
        signal.pause()
if sys.argv[1] != "background":
    os.setsid()
if sys.argv[1] == "daemon" and os.fork():
    os._exit(0)
def end(number, frame):
    os.write(1, b"term\n")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
while line := sys.stdin.readline():
    print(line.strip(), os.getpid(), os.getpgid(0), os.getsid(0), flush=True)
"#;

/// When the first process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Before,
    During(Moment),
}

fn daemon() -> Outcome {
    let ends = [End::Before, End::During(Moment::Round), End::During(Moment::Frozen)];
    for kind in ["background", "session", "daemon"] {
        for end in ends {
            without_first_process(kind, end).map_err(|error| format!("{kind}, {end:?}: {error}"))?;
        }
    }
    Ok(())
}

fn without_first_process(kind: &str, end: End) -> Outcome {
    let root_exit = Event::RootExited { status: ExitStatus::Code(3) };
    let mut job = Job::start(&["python3", "-c", DAEMON, kind])?;
    job.say("at")?;
    let before = job.line()?;
    ensure!(before.starts_with("at "), "before the first hop: {before}");
    if end == End::Before {
        end_root(&job.sandbox)?;
        wait_event(&mut job.sandbox, |event| *event == root_exit)?;
        job.hop_in_vain(Precopy::Rounds(1))?;
    }
    job.hop_while(Precopy::Rounds(2), |moment, sandbox| match end {
        End::During(when) if when == moment && moment == Moment::Round => end_root(sandbox),
        // It finds the signal when it runs again.
        End::During(when) if when == moment => Ok(sandbox.signal_root(sys::libc::SIGUSR1)?),
        _ => Ok(()),
    })?;
    for precopy in [Precopy::None, Precopy::Rounds(2)] {
        // How the first process ended is known everywhere.
        wait_event(&mut job.sandbox, |event| *event == root_exit)?;
        ensure!(job.sandbox.root_pid().is_none(), "a first process came from nowhere");
        job.say("at")?;
        let line = job.line()?;
        ensure!(line == before, "{line} after a hop, {before} before");
        job.hop(precopy)?;
    }
    wait_event(&mut job.sandbox, |event| *event == root_exit)?;
    // There is nobody else to ask.
    job.sandbox.signal(sys::libc::SIGTERM)?;
    let line = job.line()?;
    ensure!(line == "term", "after the signal: {line}");
    wait_event(&mut job.sandbox, |event| *event == Event::JobEmpty)?;
    ensure!(job.sandbox.signal(sys::libc::SIGTERM).is_err(), "an empty job took a signal");
    Ok(())
}

/// Has the first process end, and waits until it has.
fn end_root(sandbox: &Sandbox) -> Outcome {
    let deadline = Instant::now() + Duration::from_secs(30);
    // There is none any more when another round has seen to it.
    let Ok(()) = sandbox.signal_root(sys::libc::SIGUSR1) else { return Ok(()) };
    while sandbox.root_pid().is_some() {
        ensure!(Instant::now() < deadline, "the first process doesn't end");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn killed() -> Outcome {
    let mut job = Job::start(&["sh", "-c", "sh -c 'sleep 1000; true' & echo up; sleep 1000; true"])?;
    ensure!(job.line()? == "up", "it doesn't start");
    job.hop(Precopy::None)?;
    job.sandbox.signal(sys::libc::SIGKILL)?;
    let status = ExitStatus::Signal(sys::libc::SIGKILL);
    wait_event(&mut job.sandbox, |event| *event == Event::RootExited { status })?;
    wait_event(&mut job.sandbox, |event| *event == Event::JobEmpty)?;
    Ok(())
}

fn stopped() -> Outcome {
    let mut job = Job::start(&["sh", "-c", "echo ready; read line; echo got $line; read line"])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    job.sandbox.signal_root(sys::libc::SIGSTOP)?;
    let state = |job: &Job| -> Option<u8> {
        let pid = job.sandbox.root_pid()?.as_raw().unsigned_abs();
        Some(sys::proc::Proc::own().stat(sys::proc::Place::Process(pid)).ok()?.state)
    };
    let wait_stopped = |job: &Job| {
        let start = Instant::now();
        while state(job) != Some(b'T') && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(1));
        }
        state(job)
    };
    ensure!(wait_stopped(&job) == Some(b'T'), "it doesn't stop");
    job.hop(Precopy::None)?;
    job.say("word")?;
    ensure!(wait_stopped(&job) == Some(b'T'), "it isn't stopped any more: {:?}", state(&job));
    job.sandbox.signal_root(sys::libc::SIGCONT)?;
    ensure!(job.line()? == "got word", "it doesn't go on");
    Ok(())
}

fn abort() -> Outcome {
    let mut job = Job::start(&["python3", "-c", COUNTER])?;
    let mut expected = 1;
    for precopy in [Precopy::None, Precopy::Rounds(2), Precopy::None, Precopy::Rounds(1)] {
        for _ in 0..5 {
            let line = job.line()?;
            ensure!(line.starts_with(&format!("{expected} ")), "line {expected} is {line:?}");
            expected += 1;
        }
        job.hop_in_vain(precopy)?;
    }
    // Nothing of ours is left in it.
    let root = job.sandbox.root_pid().ok_or("it has no root")?;
    let maps = std::fs::read_to_string(format!("/proc/{root}/maps"))?;
    ensure!(!maps.starts_with("00100000-"), "pages of ours are left:\n{maps}");
    let status = std::fs::read_to_string(format!("/proc/{root}/status"))?;
    ensure!(status.contains("TracerPid:\t0\n"), "it is still traced");
    for _ in 0..5 {
        let line = job.line()?;
        ensure!(line.starts_with(&format!("{expected} ")), "line {expected} is {line:?}");
        expected += 1;
    }
    job.hop(Precopy::Rounds(2))?;
    ensure!(job.line()?.starts_with(&format!("{expected} ")), "it doesn't go on");
    Ok(())
}

/// Hops a server, asking it something over its Unix socket before and after each hop.
fn serve(job: &mut Job, hops: u32, ask: impl Fn() -> Result<(), Box<dyn std::error::Error>>) -> Outcome {
    let start = Instant::now();
    while let Err(error) = ask() {
        ensure!(start.elapsed() < Duration::from_secs(10), "it doesn't answer: {error}");
        std::thread::sleep(Duration::from_millis(20));
    }
    for hop in 1..=hops {
        loop {
            // The end of the last question's connection may not have come to the server's notice yet.
            match job.hop(Precopy::Rounds(hop % 3)) {
                Err(error)
                    if error.to_string().contains("unix socket") && start.elapsed() < Duration::from_secs(60) =>
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                result => {
                    result?;
                    break;
                }
            }
        }
        ask().map_err(|error| format!("after hop {hop}: {error}"))?;
    }
    Ok(())
}

fn exchange(socket: &Path, request: &str, wanted: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    while !String::from_utf8_lossy(&answer).contains(wanted) {
        let mut some = [0; 4096];
        let count = stream.read(&mut some)?;
        ensure!(count > 0, "it answered {}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&some[..count]);
    }
    Ok(())
}

fn memcached() -> Outcome {
    let scratch = Scratch::new("memcached")?;
    let socket = scratch.0.join("socket");
    let path = socket.to_str().ok_or("a path that isn't UTF-8")?;
    let mut job = Job::start(&["memcached", "-u", "root", "-s", path, "-t", "4"])?;
    serve(&mut job, 5, || exchange(&socket, "set a 0 0 5\r\nhello\r\nget a\r\n", "hello\r\nEND"))
}

fn nginx() -> Outcome {
    let scratch = Scratch::new("nginx")?;
    let socket = scratch.0.join("socket");
    let configuration = scratch.0.join("nginx.conf");
    let root = scratch.0.display();
    let text = format!(
        "daemon off; worker_processes 2; pid {root}/pid; error_log {root}/error.log; user root;\n\
         events {{ }}\nhttp {{ access_log off; server {{ listen unix:{root}/socket; location / {{ return 200 \"worker $pid\"; }} }} }}\n"
    );
    std::fs::write(&configuration, text)?;
    let path = configuration.to_str().ok_or("a path that isn't UTF-8")?;
    let mut job = Job::start(&["nginx", "-c", path])?;
    serve(&mut job, 5, || exchange(&socket, "GET / HTTP/1.0\r\n\r\n", "worker "))?;
    job.sandbox.signal_root(sys::libc::SIGQUIT)?;
    let event = wait_event(&mut job.sandbox, |event| matches!(event, Event::RootExited { .. }))?;
    ensure!(event == Event::RootExited { status: ExitStatus::Code(0) }, "ended with {event:?}");
    Ok(())
}

const GO: &str = r#"
package main

import ("fmt"; "os"; "runtime"; "sync/atomic"; "time")

func main() {
	var count int64
	for i := 0; i < 8; i++ {
		go func() {
			for {
				_ = make([]byte, 100000)
				atomic.AddInt64(&count, 1)
				time.Sleep(time.Millisecond)
			}
		}()
	}
	ticker := time.NewTicker(10 * time.Millisecond)
	last := int64(0)
	for line := 1; ; line++ {
		<-ticker.C
		now := atomic.LoadInt64(&count)
		if now < last {
			os.Exit(9)
		}
		last = now
		if line%20 == 0 {
			runtime.GC()
		}
		fmt.Println(line, now)
	}
}
"#;

fn go() -> Outcome {
    let scratch = Scratch::new("go")?;
    let source = scratch.0.join("main.go");
    std::fs::write(&source, GO)?;
    let program = scratch.0.join("program");
    let built = std::process::Command::new("go")
        .args(["build", "-o"])
        .args([&program, &source])
        .env("CGO_ENABLED", "0")
        .env("HOME", &scratch.0)
        .status();
    if !built.is_ok_and(|status| status.success()) {
        println!("no go compiler: skipped");
        return Ok(());
    }
    let mut job = Job::start(&[program.to_str().ok_or("a path that isn't UTF-8")?])?;
    let mut expected = 1;
    for hop in 0..10 {
        for _ in 0..10 {
            let line = job.line()?;
            ensure!(line.starts_with(&format!("{expected} ")), "line {expected} is {line:?}");
            expected += 1;
        }
        job.hop(Precopy::Rounds(hop % 3))?;
    }
    ensure!(job.line()?.starts_with(&format!("{expected} ")), "it doesn't go on");
    Ok(())
}
