//! Trees dumped in one sandbox and restored in another.

use std::io::{BufRead, BufReader};

use checkpoint::{Event, ExitStatus, Sandbox, SandboxSpec};
use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{Job, Outcome, Precopy, trial, wait_event};

pub fn trials() -> Vec<Trial> {
    vec![trial("moves::sleep_goes_on_and_exits", sleep), trial("moves::counter_in_threads_goes_on", threads)]
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
    let mut output = BufReader::new(job.output.try_clone()?);
    let mut line = String::new();
    let mut expected = 1;
    for precopy in [Precopy::None, Precopy::Rounds(2), Precopy::None, Precopy::Rounds(3)] {
        for _ in 0..10 {
            line.clear();
            output.read_line(&mut line)?;
            let words: Vec<i64> = line.split_whitespace().map(|word| word.parse().unwrap_or(-1)).collect();
            ensure!(words.len() == 4, "line {line:?}");
            ensure!(words[0] == expected, "line {expected} is {line:?}");
            ensure!(words[2] == 5, "threads: {line:?}");
            expected += 1;
        }
        job.hop(precopy)?;
    }
    for _ in 0..10 {
        line.clear();
        output.read_line(&mut line)?;
        ensure!(line.starts_with(&format!("{expected} ")), "line {expected} is {line:?}");
        expected += 1;
    }
    Ok(())
}

#[allow(dead_code)]
fn fresh() -> checkpoint::Result<Sandbox> {
    Sandbox::create(SandboxSpec::default())
}
