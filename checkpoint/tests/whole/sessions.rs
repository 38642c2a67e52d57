//! Processes that make sessions of their own while the job's memory is copied.

use std::io::{BufRead, BufReader, Write};

use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{Job, Moment, Outcome, Precopy, trial};

pub fn trials() -> Vec<Trial> {
    vec![trial("sessions::those_made_during_the_copy_move", made_meanwhile)]
}

/// For each line: a child that is there already makes a session and a child in it, and a new child does the same.
const SERVER: &str = r#"
import os, signal, sys
def serve(telling):
    os.setsid()
    inner = os.fork()
    if inner == 0:
        telling.write("made\n")
        telling.flush()
        # Says on a signal whose session it is in, and its parent.
        while True:
            signal.sigwait([signal.SIGUSR1])
            os.write(1, f"{os.getsid(0) == os.getppid()}\n".encode())
    signal.pause()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
def prepare():
    asked, telling = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.read(asked[0], 1)
        serve(open(telling[1], "w"))
    return asked[1], open(telling[0])
waiting = prepare(), prepare()
print("ready", flush=True)
for line in sys.stdin:
    if line == "ask\n":
        for process in os.listdir("/proc"):
            if process.isdigit() and int(process) > 1 and os.getsid(int(process)) not in (os.getsid(0), int(process)):
                os.kill(int(process), signal.SIGUSR1)
        continue
    turn = int(line)
    fresh = prepare()
    for asked, told in (waiting[turn], fresh):
        os.write(asked, b"x")
        told.readline()
    print("made", flush=True)
"#;

fn made_meanwhile() -> Outcome {
    let mut job = Job::start(&["python3", "-S", "-c", SERVER])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    let mut input = job.input.try_clone()?;
    let mut output = BufReader::new(job.output.get_ref().try_clone()?);
    let mut turn = 0;
    // After the first round, which the second one sees, and after that, which only the freeze sees.
    job.hop_while(Precopy::Rounds(2), |moment, _| {
        if moment == Moment::Round {
            writeln!(input, "{turn}")?;
            turn += 1;
            let mut line = String::new();
            output.read_line(&mut line)?;
            ensure!(line == "made\n", "it makes no sessions: {line}");
        }
        Ok(())
    })?;
    job.hop(Precopy::None)?;
    job.say("ask")?;
    for _ in 0..4 {
        let line = job.line()?;
        ensure!(line == "True", "a process isn't in its parent's session any more: {line}");
    }
    Ok(())
}
