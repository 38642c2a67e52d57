//! Jobs that end, stop, or go on without their first process, on their way or after it; and a move that is given up.

use std::time::{Duration, Instant};

use checkpoint::{Event, ExitStatus, Sandbox};
use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{COUNTER, Job, Moment, Outcome, Precopy, trial, wait_event};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("ends::daemon_goes_on_without_its_first_process", daemon),
        trial("ends::kill_ends_all_of_a_job", killed),
        trial("ends::stopped_job_stays_stopped", stopped),
        trial("ends::abort_leaves_the_job_running", abort),
        trial("ends::a_thread_that_runs_first_may_end_its_process", first_thread_ends),
    ]
}

/// Processes of several threads, each of which ends its process when a file is there.
const ENDERS: &str = r#"
import os, sys, threading, time
def end():
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    os._exit(3)
for _ in range(6):
    if os.fork() == 0:
        for _ in range(8):
            threading.Thread(target=end).start()
        end()
print("ready", flush=True)
print(*(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(6)), flush=True)
sys.stdin.readline()
"#;

/// The file appears while all stand still: whichever thread is let run first ends those of its process that aren't yet.
fn first_thread_ends() -> Outcome {
    let directory = tempfile::tempdir()?;
    let flag = directory.path().join("flag");
    let mut job = Job::start(&["python3", "-S", "-c", ENDERS, &flag.to_string_lossy()])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    job.hop_while(Precopy::None, |moment, _| match moment {
        Moment::Frozen => Ok(std::fs::write(&flag, "")?),
        Moment::Round => Ok(()),
    })?;
    let line = job.line()?;
    ensure!(line == "3 3 3 3 3 3", "{line}");
    job.hop(Precopy::None)?;
    job.say("end")?;
    Ok(())
}

/// The first process starts another, in its own session, in a new one, or in one whose leader ends, and ends when it is told to.
const DAEMON: &str = r#"
import os, select, signal, sys
signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(3))
if os.fork():
    while True:
        select.select([], [], [], 0.1)
if sys.argv[1] != "background":
    os.setsid()
if sys.argv[1] == "daemon" and os.fork():
    os._exit(0)
def end(number, frame):
    os.write(1, b"term\n")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
while True:
    # Python handles a signal between two of its own instructions; one that comes when it is about to read would wait for a line.
    while not select.select([0], [], [], 0.1)[0]:
        pass
    if not (line := sys.stdin.readline()):
        break
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
        while state(job) != Some(b'T') && start.elapsed() < Duration::from_secs(30) {
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
