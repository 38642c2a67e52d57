//! Programs that have given up system calls hop from sandbox to sandbox.

use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{Job, Outcome, Precopy, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("filters::what_a_program_has_forbidden_itself_stays_forbidden", forbidden),
        trial("filters::one_that_forbids_to_continue_a_call_is_not_asked_to", sleeper),
    ]
}

/// Has filters in two threads and in a child without rights, each a different number of them, and tells what they forbid. A
/// filter answers a call that is forbidden with an error number of its own.
const FILTERED: &str = r#"
import ctypes, os, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
GETPGID, GETPRIORITY, GETSID, MEMBARRIER = 121, 140, 124, 324
TSYNC = 1
def forbid(number, error, flags=0):
    # Load the call's number; if it is the one, return the error, otherwise allow.
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | error), (0x06, 0, 0, 0x7FFF0000)]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(packed))
    if libc.syscall(317, 1, flags, program) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")
def errors():
    found = []
    for number in (GETPGID, GETPRIORITY, GETSID, MEMBARRIER):
        ctypes.set_errno(0)
        libc.syscall(number, 0, 0, 0)
        found.append(ctypes.get_errno())
    return found
def status(path="/proc/thread-self/status"):
    lines = dict(line.split(":", 1) for line in open(path))
    return [lines[key].strip() for key in ("Uid", "NoNewPrivs", "Seccomp_filters")]
class Worker:
    def __init__(self, *calls):
        self.calls, self.ask, self.told = calls, threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self.work, daemon=True).start()
        self.told.acquire()
    def work(self):
        for call in self.calls:
            forbid(*call)
        while True:
            self.told.release()
            self.ask.acquire()
            self.answer = errors(), status()
    def tell(self):
        self.ask.release()
        self.told.acquire()
        return self.answer
forbid(GETPGID, 70)
worker = Worker((GETPRIORITY, 71), (GETPRIORITY, 72))
asked, telling = os.pipe(), os.pipe()
if os.fork() == 0:
    os.close(asked[1])
    os.setresgid(1000, 1000, 1000)
    os.setresuid(1000, 1000, 1000)
    libc.prctl(38, 1, 0, 0, 0)
    forbid(GETSID, 73)
    twin = Worker()
    while word := os.read(asked[0], 1):
        if word == b"l":
            forbid(MEMBARRIER, 74, TSYNC)
        os.write(telling[1], f"{errors()} {status()} {twin.tell()}".encode())
    os._exit(0)
print("ready", flush=True)
for line in sys.stdin:
    print("first", errors(), status(), flush=True)
    print("worker", worker.tell(), flush=True)
    os.write(asked[1], line[:1].encode())
    print("child", os.read(telling[0], 1000).decode(), flush=True)
"#;

fn forbidden() -> Outcome {
    let mut job = Job::start(&["python3", "-S", "-c", FILTERED])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    let root = r"'0\t0\t0\t0'";
    let user = r"'1000\t1000\t1000\t1000'";
    let child = |fourth: i32, filters: usize| {
        let one = format!("[70, 0, 73, {fourth}] [{user}, '1', '{filters}']");
        format!("child {one} ({})", one.replacen("] [", "], [", 1))
    };
    for (precopy, word) in [(Precopy::None, "more"), (Precopy::Rounds(2), "more"), (Precopy::Rounds(1), "last")] {
        job.hop(precopy)?;
        job.say(word)?;
        let lines = [job.line()?, job.line()?, job.line()?];
        let of_child = if word == "last" { child(74, 3) } else { child(0, 2) };
        let expected = [
            format!("first [70, 0, 0, 0] [{root}, '0', '1']"),
            format!("worker ([70, 72, 0, 0], [{root}, '0', '3'])"),
            of_child,
        ];
        ensure!(lines == expected, "{lines:#?} instead of {expected:#?}");
    }
    Ok(())
}

/// Sleeps for each line, and tells what its filter would: it answers restart_syscall(2) with an error number of its own.
const SLEEPER: &str = r#"
import ctypes, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 219), (0x06, 0, 0, 0x50000 | 75), (0x06, 0, 0, 0x7FFF0000)]
packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(packed))
if libc.syscall(317, 1, 0, program) != 0:
    raise OSError(ctypes.get_errno(), "seccomp")
for line in sys.stdin:
    begun = time.monotonic()
    print("sleeps", flush=True)
    ctypes.set_errno(0)
    if line == "poll\n":
        result = libc.poll(None, 0, 500)
    else:
        result = libc.nanosleep(struct.pack("QQ", 0, 500_000_000), None)
    print(result, ctypes.get_errno(), time.monotonic() - begun >= 0.5, flush=True)
"#;

fn sleeper() -> Outcome {
    let mut job = Job::start(&["python3", "-S", "-c", SLEEPER])?;
    for how in ["poll", "sleep"] {
        job.say(how)?;
        ensure!(job.line()? == "sleeps", "it doesn't start");
        job.hop_in_vain(Precopy::Rounds(1))?;
        job.hop(Precopy::Rounds(1))?;
        let line = job.line()?;
        ensure!(line == "0 0 True", "{how}: {line}");
    }
    Ok(())
}
