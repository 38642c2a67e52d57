//! Memory of real processes, copied while they run into stubs, and compared. Needs root and a C compiler.

mod support;

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use checkpoint::memory::{Budget, Layout, MemoryChunk, MemorySink, Next, Policy, TrackedProcess, Tracker};
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

/// Takes everything and keeps nothing.
struct Nowhere;

impl MemorySink for Nowhere {
    fn layout(&mut self, _: Layout) -> io::Result<()> {
        Ok(())
    }

    fn pages(&mut self, _: MemoryChunk<'_>) -> io::Result<()> {
        Ok(())
    }
}

struct Hoard {
    group: Group,
    mailbox: UnixStream,
}

impl Hoard {
    fn start(scratch: &Scratch, arguments: [&str; 3]) -> Hoard {
        let program = scratch.compile("hoard", &[]);
        let (mut mailbox, theirs) = UnixStream::pair().unwrap();
        let group = Group::start(&program, &arguments.map(AsRef::as_ref), Stdio::from(OwnedFd::from(theirs)));
        mailbox.read_exact(&mut [0]).unwrap();
        Hoard { group, mailbox }
    }

    fn round(&mut self, tracker: &mut Tracker, sink: &mut dyn MemorySink) -> checkpoint::RoundStats {
        let processes = processes(&self.group);
        tracker.round(&processes, &mut |process| inject(process.pid, &mut self.mailbox), sink).unwrap()
    }
}

/// Megabytes per second.
fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}

#[test]
#[ignore = "a measurement, to be run with --release"]
fn speed() {
    let scratch = Scratch::new();
    for megabytes in ["1024"] {
        let mut hoard = Hoard::start(&scratch, [megabytes, "64", "100000"]);
        let mut tracker = Tracker::new();
        let started = Instant::now();
        let stats = hoard.round(&mut tracker, &mut Nowhere);
        println!("source, first round of {megabytes} MiB: {:.0} MB/s", rate(stats.bytes, started.elapsed()));
        for _ in 0..3 {
            let started = Instant::now();
            tracker.dirty().unwrap();
            println!("looking for dirty pages: {:?}", started.elapsed());
        }
        let started = Instant::now();
        let stats = hoard.round(&mut tracker, &mut Nowhere);
        println!("round with {} bytes: {:?}", stats.bytes, started.elapsed());
        hoard.group.freeze();
        for _ in 0..3 {
            let started = Instant::now();
            let count = sys::vm::detailed_maps(processes(&hoard.group)[0].pid).unwrap().len();
            println!("properties of {count} mappings: {:?}", started.elapsed());
        }
        let started = Instant::now();
        let (_, stats) = tracker.finish(&processes(&hoard.group), &mut Nowhere).unwrap();
        println!("freeze with {} bytes: {:?}", stats.bytes, started.elapsed());
        let started = Instant::now();
        drop(tracker);
        println!("end of tracking: {:?}", started.elapsed());

        let mut target = Target::new(&scratch);
        let mut tracker = Tracker::new();
        let started = Instant::now();
        let (_, stats) = tracker.finish(&processes(&hoard.group), &mut target).unwrap();
        println!("source and target, {} bytes: {:.0} MB/s", stats.bytes, rate(stats.bytes, started.elapsed()));
        let block = vec![7; 512 << 10];
        let area = largest_area(&target);
        let started = Instant::now();
        for at in (area.0..area.1).step_by(block.len()) {
            target.filler.pages(area.2, at, &block[..block.len().min((area.1 - at) as usize)]).unwrap();
        }
        println!("target, pages that are there: {:.0} MB/s", rate(area.1 - area.0, started.elapsed()));
    }
}

fn largest_area(target: &Target) -> (u64, u64, u32) {
    let layout = target.last.as_ref().unwrap();
    let areas = layout
        .processes
        .iter()
        .flat_map(|process| process.areas.iter().map(|area| (area.start, area.end, process.process)));
    areas.max_by_key(|area| area.1 - area.0).unwrap()
}

#[test]
fn a_bursty_writer_is_frozen_in_a_pause() {
    let scratch = Scratch::new();
    let mut hoard = Hoard::start(&scratch, ["128", "32", "150"]);
    let mut tracker = Tracker::new();
    let mut policy = Policy::new(Budget::default());
    let started = Instant::now();
    let left = loop {
        let stats = hoard.round(&mut tracker, &mut Nowhere);
        if let Next::Freeze(reason) = policy.after_round(stats, started.elapsed()) {
            break (stats.dirty_left, reason);
        }
    };
    // Most moments of this program have 32 MiB dirty.
    assert!(left.0 <= 8 << 20, "{left:?} after {:?}", started.elapsed());
}
