//! What processes of a job share beside memory and descriptors: System V IPC, `/dev/shm`, file locks.

use std::io::{Read, Write};

use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{Job, Moment, Outcome, Precopy, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("shared::system_v_ipc_goes_along", system_v),
        trial("shared::files_in_dev_shm_go_along", shm),
        trial("shared::much_that_nobody_maps_keeps_the_job", hoard),
        trial("shared::file_locks_are_held_by_one_at_a_time", file_locks),
        trial("shared::what_a_server_has_yet_to_accept_is_waited_for", unaccepted),
        trial("shared::robust_mutexes_in_files_stay_with_their_owner", robust_mutexes),
    ]
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
spares = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]  # With these nothing is locked.
fds = [os.open(path, os.O_RDWR) for path in paths]
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
    let scratch = tempfile::tempdir()?;
    let directory = scratch.path().to_str().ok_or("a path that isn't UTF-8")?;
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

/// Two threads hold a mutex each in a mapped file. A child looks whether they are held still, then they are given back and taken again.
const ROBUST: &str = r#"
import ctypes, mmap, os, sys, threading
libc = ctypes.CDLL(None)
SIZE, SHARED, ROBUST = 64, 1, 1
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.truncate(file, 4096)
memory = mmap.mmap(file, 4096)
mutexes = [ctypes.addressof(ctypes.c_char.from_buffer(memory, SIZE * place)) for place in range(2)]
mutexes = [ctypes.c_void_p(address) for address in mutexes]
attributes = ctypes.create_string_buffer(SIZE)
libc.pthread_mutexattr_init(attributes)
libc.pthread_mutexattr_setpshared(attributes, SHARED)
libc.pthread_mutexattr_setrobust(attributes, ROBUST)
for mutex in mutexes:
    libc.pthread_mutex_init(mutex, attributes)
begin, end = threading.Barrier(2), threading.Barrier(2)
again = []
def hold(mutex):
    libc.pthread_mutex_lock(mutex)
    begin.wait()
    while True:
        begin.wait()
        again.append(libc.pthread_mutex_unlock(mutex))
        again.append(libc.pthread_mutex_lock(mutex))
        end.wait()
libc.pthread_mutex_lock(mutexes[0])
threading.Thread(target=hold, args=(mutexes[1],), daemon=True).start()
begin.wait()
print("ready", flush=True)
for line in sys.stdin:
    found, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(told, repr([libc.pthread_mutex_trylock(mutex) for mutex in mutexes]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    again.clear()
    again.append(libc.pthread_mutex_unlock(mutexes[0]))
    again.append(libc.pthread_mutex_lock(mutexes[0]))
    begin.wait()
    end.wait()
    print(os.read(found, 100).decode(), again, flush=True)
    os.close(found)
    os.close(told)
"#;

fn robust_mutexes() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let path = scratch.path().join("mutexes");
    let mut job = Job::start(&["python3", "-c", ROBUST, path.to_str().ok_or("a path that isn't UTF-8")?])?;
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
        const BUSY: i32 = sys::libc::EBUSY;
        ensure!(line == format!("[{BUSY}, {BUSY}] [0, 0, 0, 0]"), "after hop {hop}: {line}");
    }
    Ok(())
}

/// A client sends to a server that accepts it 60 ms later, and answers.
const UNACCEPTED: &str = r#"
import os, socket, sys, threading, time
path = os.path.join(sys.argv[1], "socket")
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
sent = threading.Event()
def serve():
    while True:
        sent.wait()
        sent.clear()
        time.sleep(0.06)
        client, _ = listener.accept()
        client.sendall(client.recv(10))
threading.Thread(target=serve, daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(line.strip().encode())
        sent.set()
        print("sent", flush=True)
        print(client.recv(10).decode(), flush=True)
"#;

fn unaccepted() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let mut job =
        Job::start(&["python3", "-c", UNACCEPTED, scratch.path().to_str().ok_or("a path that isn't UTF-8")?])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    for hop in 0..3 {
        let mut input = job.input.try_clone()?;
        let mut output = job.output.get_ref().try_clone()?;
        job.hop_while(Precopy::Rounds(1), |moment, _| {
            if moment == Moment::Round {
                writeln!(input, "hop {hop}")?;
                let mut line = [0; 5];
                output.read_exact(&mut line)?;
                ensure!(line == *b"sent\n", "it said {line:?}");
            }
            Ok(())
        })?;
        let line = job.line()?;
        ensure!(line == format!("hop {hop}"), "{line} after hop {hop}");
    }
    Ok(())
}
