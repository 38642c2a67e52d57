//! Processes that have no room left within their limits hop from sandbox to sandbox.

use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{Job, Outcome, Precopy, trial};

pub fn trials() -> Vec<Trial> {
    vec![trial("limits::a_process_with_all_its_descriptors_open_moves", descriptors)]
}

/// The first process has as many descriptors as its soft limit allows; its child, as many as its hard limit does. Both go on
/// changing their memory.
const FULL: &str = r#"
import os, resource, sys
asked, telling = os.pipe(), os.pipe()
child = os.fork()
def fill():
    while True:
        try:
            os.dup(0)
        except OSError:
            return
memory = bytearray(1 << 20)
def change(turn):
    memory[turn * 4096:(turn + 1) * 4096] = bytes([turn]) * 4096
    return sum(memory), resource.getrlimit(resource.RLIMIT_NOFILE)
turn = 0
if child == 0:
    os.close(asked[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    fill()
    while os.read(asked[0], 1):
        turn += 1
        os.write(telling[1], f"{change(turn)}".encode())
    os._exit(0)
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 60))
fill()
print("ready", flush=True)
for line in sys.stdin:
    turn += 1
    os.write(asked[1], b"x")
    print(change(turn), os.read(telling[0], 100).decode(), flush=True)
"#;

fn descriptors() -> Outcome {
    let mut job = Job::start(&["python3", "-S", "-c", FULL])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    let mut sum = 0;
    for (turn, precopy) in [Precopy::Rounds(1), Precopy::None, Precopy::Rounds(2)].into_iter().enumerate() {
        job.hop(precopy)?;
        job.say("on")?;
        sum += 4096 * (turn + 1);
        let line = job.line()?;
        ensure!(line == format!("({sum}, (50, 60)) ({sum}, (40, 40))"), "after hop {turn}: {line}");
    }
    Ok(())
}
