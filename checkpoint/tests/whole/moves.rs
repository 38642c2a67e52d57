//! Trees dumped in one sandbox and restored in another.

use checkpoint::{Event, ExitStatus};
use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{COUNTER, Job, Outcome, Precopy, trial, wait_event};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("moves::sleep_goes_on_and_exits", sleep),
        trial("moves::counter_in_threads_goes_on", threads),
        trial("moves::python_threads_twenty_times_with_precopy", python_twenty),
        trial("moves::everything_the_kernel_keeps_is_the_same", || keeper(Precopy::None)),
        trial("moves::everything_the_kernel_keeps_is_the_same_with_precopy", || keeper(Precopy::Rounds(2))),
        trial("moves::memory_barriers_stay_registered", barriers),
        trial("moves::signal_stack_that_disarms_itself_does_so_still", disarming),
        trial("moves::memory_that_may_not_become_executable_moves", denied),
        trial("moves::tree_with_sessions_groups_and_zombies", tree),
        trial("moves::blocking_calls_end_as_they_would", blocking),
    ]
}

fn sleep() -> Outcome {
    // Ends the sleeper when it is told to, and as that one does.
    let mut job = Job::start(&["sh", "-c", "sleep 1000 & echo up; read line; kill $!; wait $!; exit $?"])?;
    ensure!(job.line()? == "up", "it doesn't start");
    job.hop(Precopy::None)?;
    job.say("go")?;
    let event = wait_event(&mut job.sandbox, |event| matches!(event, Event::RootExited { .. }))?;
    ensure!(event == Event::RootExited { status: ExitStatus::Code(128 + sys::libc::SIGTERM) }, "ended with {event:?}");
    Ok(())
}

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
before_set = time.monotonic()
signal.setitimer(signal.ITIMER_REAL, 1.5, 1000)
after_set = time.monotonic()
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
# However late it is: the timer expires when it was to, or 1,000 seconds after.
before_get = time.monotonic()
left = signal.getitimer(signal.ITIMER_REAL)[0]
after_get = time.monotonic()
due = 1.5 if left < 500 else 1001.5
print(before_get + left < after_set + due + 0.1 and before_set + due - 0.1 < after_get + left, flush=True)
while signal.SIGALRM not in got:
    time.sleep(0.01)
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

/// Says for each line which memory barriers (expedited, of the core, of restartable sequences) it may make, and so does its child,
/// which has registered for the first only.
const BARRIERS: &str = r#"
import ctypes, os, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def membarrier(command):
    return libc.syscall(324, command, 0, 0) and ctypes.get_errno()
asked, telling = os.pipe(), os.pipe()
child = os.fork()
for register in (1 << 4,) if child == 0 else (1 << 2, 1 << 4, 1 << 6, 1 << 8):
    assert membarrier(register) == 0
def allowed():
    return [membarrier(command) for command in (1 << 3, 1 << 5, 1 << 7)]
if child == 0:
    os.close(asked[1])
    while os.read(asked[0], 1):
        os.write(telling[1], str(allowed()).encode())
    os._exit(0)
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    os.write(asked[1], b"x")
    print(allowed(), os.read(telling[0], 100).decode(), libc.syscall(324, 1 << 9, 0, 0), flush=True)
"#;

fn barriers() -> Outcome {
    let mut job = Job::start(&["python3", "-S", "-c", BARRIERS])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    for precopy in [Precopy::None, Precopy::Rounds(1)] {
        job.hop(precopy)?;
        job.say("on")?;
        let line = job.line()?;
        ensure!(line == format!("[0, 0, 0] [0, {0}, {0}] {1}", sys::libc::EPERM, 0b1_0101_0100), "{line}");
    }
    Ok(())
}

/// Has a signal stack with SS_AUTODISARM, whose flags it says for each line.
const DISARMING: &str = r#"
import ctypes, sys
libc = ctypes.CDLL(None)
class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_uint), ("size", ctypes.c_size_t)]
room = ctypes.create_string_buffer(1 << 16)
assert libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 1 << 31, 1 << 16)), None) == 0
print("ready", flush=True)
for line in sys.stdin:
    stack = Stack()
    assert libc.sigaltstack(None, ctypes.byref(stack)) == 0
    print(stack.address == ctypes.addressof(room), hex(stack.flags), stack.size, flush=True)
"#;

fn disarming() -> Outcome {
    let mut job = Job::start(&["python3", "-S", "-c", DISARMING])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    for precopy in [Precopy::None, Precopy::Rounds(1)] {
        job.hop(precopy)?;
        job.say("on")?;
        let line = job.line()?;
        ensure!(line == "True 0x80000000 65536", "{line}");
    }
    Ok(())
}

/// Says for each line, for itself and for a child, whether memory that was writable may become executable (PR_SET_MDWE), and changes
/// its memory.
const DENIED: &str = r#"
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(65, 1, 0, 0, 0) == 0
page = mmap.mmap(-1, 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
asked, telling = os.pipe(), os.pipe()
child = os.fork()
def answer(turn):
    page[0] = turn
    denied = libc.mprotect(ctypes.c_void_p(address), 4096, 5) and ctypes.get_errno()
    return f"{libc.prctl(66, 0, 0, 0, 0)} {denied} {page[0]}"
turn = 0
if child == 0:
    os.close(asked[1])
    while os.read(asked[0], 1):
        turn += 1
        os.write(telling[1], answer(turn).encode())
    os._exit(0)
print("ready", flush=True)
for line in sys.stdin:
    turn += 1
    os.write(asked[1], b"x")
    print(answer(turn), os.read(telling[0], 100).decode(), flush=True)
"#;

fn denied() -> Outcome {
    let mut job = Job::start(&["python3", "-S", "-c", DENIED])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    for (turn, precopy) in (1..).zip([Precopy::Rounds(1), Precopy::None, Precopy::Rounds(2)]) {
        job.hop(precopy)?;
        job.say("on")?;
        let (line, denied) = (job.line()?, sys::libc::EACCES);
        ensure!(line == format!("1 {denied} {turn} 1 {denied} {turn}"), "{line}");
    }
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
        parent = os.getpid()
        def orphan():
            while os.getppid() == parent:
                time.sleep(0.001)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            line = lambda: b"%d %d %d %d\n" % (os.getpid(), os.getppid(), os.getpgrp(), os.getsid(0))
            os.write(facts[1], line())
            while True:
                signal.sigwait([signal.SIGUSR1])
                os.write(facts[1], line())
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
    fine = took > 1.95 or name == "reader"
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
