//! Memory of real processes, copied while they run into stubs, and compared. Needs root and a C compiler.

mod support;

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use checkpoint::memory::{
    Budget, Layout, MemoryChunk, MemorySink, Next, ObjectKind, Policy, Stubs, TrackedProcess, Tracker, obstacles,
};
use support::{Group, Scratch, Target, difference, inject};

fn processes(group: &Group) -> Vec<TrackedProcess> {
    let members = group.members();
    let tracked = |&(pid, parent): &(sys::Pid, sys::Pid)| TrackedProcess {
        process: pid.as_raw() as u32,
        parent: if members.iter().any(|(member, _)| *member == parent) { parent.as_raw() as u32 } else { 1 },
        session: 0,
        terminal: None,
        pid,
    };
    members.iter().map(tracked).collect()
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
    let mut tracker = Tracker::default();
    for round in 0..rounds {
        std::thread::sleep(Duration::from_millis(20 + u64::from(round) * 7 % 30));
        let stats =
            tracker.round(&processes(&group), &mut |process| inject(process.pid, &mut mailbox).map(Some), &mut target);
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
        let stub = Stubs::pid(&target.stubs, process.process).unwrap();
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

/// Keeps only who was told of, with their parents.
#[derive(Default)]
struct Told(Vec<(u32, u32)>);

impl MemorySink for Told {
    fn layout(&mut self, layout: Layout) -> io::Result<()> {
        self.0 = layout.processes.iter().map(|process| (process.process, process.parent)).collect();
        Ok(())
    }

    fn pages(&mut self, _: MemoryChunk<'_>) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_process_whose_parent_is_ending_is_told_of_once_it_has_another() {
    let mut parent = std::process::Command::new("true").spawn().unwrap();
    let parent_pid = support::pid_of(&parent);
    let zombie = || fs::read_to_string(format!("/proc/{parent_pid}/stat")).unwrap().contains(") Z ");
    while !zombie() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let child_pid = support::pid_of(&child);
    let process = |process, parent, pid| TrackedProcess { process, parent, session: 2, terminal: None, pid };
    let mut tracker = Tracker::default();
    let mut round = |listed: &[TrackedProcess]| {
        let mut told = Told::default();
        tracker.round(listed, &mut |_| Ok(None), &mut told).map(|_| told.0)
    };
    // As they were listed: the parent was there, and its children had it.
    let early = round(&[process(2, 1, parent_pid), process(3, 2, child_pid), process(4, 3, child_pid)]);
    let late = round(&[process(3, 1, child_pid), process(4, 3, child_pid)]);
    child.kill().unwrap();
    child.wait().unwrap();
    parent.wait().unwrap();
    assert_eq!(early.unwrap(), []);
    assert_eq!(late.unwrap(), [(3, 1), (4, 3)]);
}

#[test]
fn a_mapped_file_that_is_replaced_just_before_the_freeze_is_not_taken_for_the_new_one() {
    let scratch = Scratch::new();
    let (program, other) = (scratch.path().join("program"), scratch.path().join("other"));
    for path in [&program, &other] {
        fs::copy("/bin/sleep", path).unwrap();
    }
    let mut child = std::process::Command::new(&program).arg("1000").spawn().unwrap();
    let pid = support::pid_of(&child);
    // Until it sleeps, in clock_nanosleep(2), its loader changes its mappings.
    while !fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap().starts_with("230 ") {
        std::thread::sleep(Duration::from_millis(1));
    }
    let process = [TrackedProcess { process: 2, parent: 1, session: 2, terminal: None, pid }];
    let mut tracker = Tracker::default();
    let round = tracker.round(&process, &mut |_| Ok(None), &mut Nowhere);
    fs::rename(&other, &program).unwrap();
    let finished = tracker.finish(&process, &mut Nowhere);
    child.kill().unwrap();
    child.wait().unwrap();
    round.unwrap();
    let (layout, _) = finished.unwrap();
    let is_gone = |kind: &ObjectKind| matches!(kind, ObjectKind::Deleted(path) if path.ends_with(b"/program"));
    assert!(layout.objects.iter().any(|object| is_gone(&object.kind)), "{layout:?}");
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

/// A program that has written a newline when it was ready.
struct Source {
    group: Group,
    mailbox: UnixStream,
    /// What it wrote before the newline.
    said: Vec<u8>,
}

impl Source {
    fn start(scratch: &Scratch, name: &str, arguments: &[&str]) -> Source {
        let program = scratch.compile(name, &[]);
        let (mut mailbox, theirs) = UnixStream::pair().unwrap();
        let arguments: Vec<_> = arguments.iter().map(AsRef::as_ref).collect();
        let group = Group::start(&program, &arguments, Stdio::from(OwnedFd::from(theirs)));
        let mut said = Vec::new();
        while said.last() != Some(&b'\n') {
            let mut byte = [0];
            mailbox.read_exact(&mut byte).unwrap();
            said.push(byte[0]);
        }
        Source { group, mailbox, said }
    }

    fn round(&mut self, tracker: &mut Tracker, sink: &mut dyn MemorySink) -> checkpoint::RoundStats {
        let processes = processes(&self.group);
        tracker.round(&processes, &mut |process| inject(process.pid, &mut self.mailbox).map(Some), sink).unwrap()
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
        let mut hoard = Source::start(&scratch, "hoard", &[megabytes, "64", "100000"]);
        let mut tracker = Tracker::default();
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
        let mut tracker = Tracker::default();
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
    let mut hoard = Source::start(&scratch, "hoard", &["128", "32", "150"]);
    let mut tracker = Tracker::default();
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

/// Compares every process of a stopped program with its stub.
fn assert_same(source: &Source, target: &Target) {
    for process in processes(&source.group) {
        let stub = Stubs::pid(&target.stubs, process.process).unwrap();
        if let Some(difference) = difference(process.pid, stub) {
            panic!("process {}: {difference}", process.process);
        }
    }
}

#[test]
fn special_mappings_arrive() {
    let scratch = Scratch::new();
    let _pages = HugePages::reserve(8);
    let mut source = Source::start(&scratch, "special", &[scratch.path().to_str().unwrap()]);
    // At once, and after a round.
    for rounds in 0..2 {
        let (mut target, mut tracker) = (Target::new(&scratch), Tracker::default());
        for _ in 0..rounds {
            source.round(&mut tracker, &mut target);
        }
        source.group.freeze();
        let (layout, _) = tracker.finish(&processes(&source.group), &mut target).unwrap();
        target.filler.finish(&mut target.stubs).unwrap();
        assert_same(&source, &target);
        let objects: Vec<_> = layout.objects.iter().map(|object| &object.kind).collect();
        assert_eq!(objects.len(), 4, "{objects:?}");
        let memfd = layout.objects.iter().find(|object| object.kind == ObjectKind::Memfd(b"special".to_vec())).unwrap();
        assert_eq!((memfd.seals, memfd.size), (6, (2 << 20) + 50));
        assert!(target.filler.object(memfd.device, memfd.inode).is_some());
        source.group.thaw();
    }
}

#[test]
fn tracking_leaves_no_trace() {
    let scratch = Scratch::new();
    let mut source = Source::start(&scratch, "special", &[scratch.path().to_str().unwrap()]);
    let pid = processes(&source.group)[0].pid;
    let state = || {
        let mappings: Vec<_> = sys::vm::detailed_maps(pid).unwrap();
        let lines: Vec<_> =
            mappings.iter().map(|detailed| (detailed.mapping.clone(), detailed.flags.clone())).collect();
        let mut descriptors: Vec<_> =
            fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        descriptors.sort();
        (lines, descriptors)
    };
    let before = state();
    let mut tracker = Tracker::default();
    for _ in 0..3 {
        source.round(&mut tracker, &mut Nowhere);
    }
    let during = state();
    assert!(during.0.iter().any(|(_, flags)| flags.contains(b"uw")));
    assert_eq!(before.1, during.1, "descriptors of the program while it is tracked");
    source.group.freeze();
    tracker.finish(&processes(&source.group), &mut Nowhere).unwrap();
    source.group.thaw();
    drop(tracker);
    assert_eq!(before, state());
}

#[test]
fn memory_that_cannot_move_is_named() {
    let scratch = Scratch::new();
    let path = scratch.path().to_str().unwrap();
    for (what, expected) in [("", None), ("secret", Some("secret memory")), ("own-userfaultfd", Some("userfaultfd"))] {
        let source = Source::start(&scratch, "special", &[path, what]);
        if source.said != b"\n" {
            eprintln!("this kernel has no {what}: not tested");
            continue;
        }
        let obstacles = obstacles(processes(&source.group)[0].pid).unwrap();
        match expected {
            None => assert_eq!(obstacles, []),
            Some(expected) => {
                assert!(obstacles.len() == 1 && obstacles[0].why.contains(expected), "{what}: {obstacles:?}")
            }
        }
    }
}

/// Huge pages that the kernel keeps ready for the time of a test.
struct HugePages {
    before: String,
}

impl HugePages {
    const FILE: &str = "/proc/sys/vm/nr_hugepages";

    fn reserve(pages: u32) -> HugePages {
        let before = fs::read_to_string(HugePages::FILE).unwrap_or_default();
        // Without them the program simply has none.
        let _ = fs::write(HugePages::FILE, pages.to_string());
        HugePages { before }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(HugePages::FILE, self.before.trim());
    }
}
