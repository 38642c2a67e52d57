//! Memory of real processes, copied while they run into stubs, and compared. Needs root and a C compiler.

mod support;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use checkpoint::memory::{TrackedProcess, Tracker};
use support::{Group, Scratch, Target, difference, inject};

fn processes(group: &Group) -> Vec<TrackedProcess> {
    let tracked = |(pid, parent): (sys::Pid, sys::Pid)| TrackedProcess {
        process: pid.as_raw() as u32,
        parent: parent.as_raw() as u32,
        pid,
    };
    group.members().into_iter().map(tracked).collect()
}

fn churn(seed: u64, rounds: u32) {
    let scratch = Scratch::new();
    let program = scratch.compile("churn", &[]);
    let file = scratch.path().join("file");
    fs::write(&file, (0..4_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect::<Vec<u8>>())
        .unwrap();
    let (mut mailbox, theirs) = UnixStream::pair().unwrap();
    let seed_text = seed.to_string();
    let arguments = [seed_text.as_ref(), file.as_os_str(), "3".as_ref()];
    let group = Group::start(&program, &arguments, Stdio::from(OwnedFd::from(theirs)));
    let mut target = Target::new(&scratch);
    let mut tracker = Tracker::new();
    for round in 0..rounds {
        std::thread::sleep(Duration::from_millis(20 + u64::from(round) * 7 % 30));
        let stats = tracker.round(&processes(&group), &mut |process| inject(process.pid, &mut mailbox), &mut target);
        let stats = stats.unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error}"));
        eprintln!("seed {seed} round {round}: {stats:?}");
    }
    group.freeze();
    let frozen = processes(&group);
    assert!(!frozen.is_empty(), "seed {seed}: the program has ended");
    let (_, stats) =
        tracker.finish(&frozen, &mut target).unwrap_or_else(|error| panic!("seed {seed}, freeze: {error}"));
    eprintln!("seed {seed} freeze: {} processes, {stats:?}", frozen.len());
    target.filler.finish(&mut target.stubs).unwrap();
    for process in &frozen {
        let stub = checkpoint::memory::Stubs::pid(&target.stubs, process.process).unwrap();
        if let Some(difference) = difference(process.pid, stub) {
            panic!("seed {seed}, process {}: {difference}", process.process);
        }
    }
}

#[test]
fn memory_that_changes_in_every_way_arrives() {
    let seeds = std::env::var("MIGD_CHURN_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(4);
    let first = std::env::var("MIGD_CHURN_FIRST").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    for seed in first..first + seeds {
        churn(seed, 6);
    }
}
