//! Timers go on from sandbox to sandbox.

use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{Job, Moment, Outcome, Precopy, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("timers::periodic_timers_that_nobody_has_read_go_on", unread),
        trial("timers::an_alarm_that_came_due_in_the_freeze_goes_on", due),
    ]
}

/// Has periodic timers that have expired 40 times or more and weren't read, whenever it is ready.
const UNREAD: &str = r#"
import ctypes, os, select, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
MONOTONIC, REALTIME, BOOTTIME, ABSTIME = 1, 0, 7, 1
timers = []
for clock, flags in (MONOTONIC, 0), (REALTIME, ABSTIME), (BOOTTIME, 0):
    timer = libc.timerfd_create(clock, 0)
    start = int(time.time()) if flags else 0
    assert libc.timerfd_settime(timer, flags, struct.pack("qqqq", 0, 5000000, start, 5000000), None) == 0
    timers.append(timer)
def count(timer):
    return struct.unpack("Q", os.read(timer, 8))[0]
for timer in timers:
    count(timer)
print("ready", flush=True)
for line in sys.stdin:
    print([count(timer) >= 40 for timer in timers], flush=True)
    print([bool(select.select([timer], [], [], 30)[0]) for timer in timers], flush=True)
    time.sleep(0.2)
    print("ready", flush=True)
"#;

fn unread() -> Outcome {
    let mut job = Job::start(&["python3", "-S", "-c", UNREAD])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    std::thread::sleep(std::time::Duration::from_millis(200));
    for precopy in [Precopy::None, Precopy::Rounds(1), Precopy::None] {
        job.hop(precopy)?;
        job.say("on")?;
        let line = job.line()?;
        ensure!(line == "[True, True, True]", "expiries before the hop are lost: {line}");
        let line = job.line()?;
        ensure!(line == "[True, True, True]", "a timer doesn't expire any more: {line}");
        ensure!(job.line()? == "ready", "it doesn't go on");
    }
    Ok(())
}

/// Has an alarm every few milliseconds. For each line it waits for some more.
const ALARMED: &str = r#"
import signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
print("ready", flush=True)
for line in sys.stdin:
    seen = [bool(signal.sigtimedwait([signal.SIGALRM], 30)) for _ in range(3)]
    print(seen, signal.getitimer(signal.ITIMER_REAL)[1], flush=True)
"#;

fn due() -> Outcome {
    let mut job = Job::start(&["python3", "-S", "-c", ALARMED])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    for precopy in [Precopy::None, Precopy::Rounds(1)] {
        job.hop_in_vain(precopy)?;
        job.hop_while(precopy, |moment, _| {
            if moment == Moment::Frozen {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            Ok(())
        })?;
        job.say("on")?;
        let line = job.line()?;
        ensure!(line == "[True, True, True] 0.005", "{line}");
    }
    Ok(())
}
