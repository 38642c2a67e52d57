//! A job that moves, and moves that are given up.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use migd::api::{AttachEvent, Exit, MoveOutcome, ShimEvent, ShimRequest};

use crate::harness::{Cluster, Node, PATIENCE, Shim, connected_pair, start_move};

/// Counts aloud, a line every few milliseconds; ends with its input.
const COUNTER: &[&str] = &[
    "python3",
    "-uc",
    "
import select, sys, time
count = 0
last = time.monotonic()
while True:
    now = time.monotonic()
    if now < last: print('time went back', last - now)
    last = now
    print(count, end=';')
    count += 1
    if select.select([sys.stdin], [], [], 0.002)[0]:
        print('end', sys.stdin.readline())
        sys.exit(9)
",
];

fn assert_counts(text: &str) {
    let numbers: Vec<&str> = text.split_terminator(';').collect();
    // The last may be cut in the middle.
    for (expected, number) in numbers[..numbers.len() - 1].iter().enumerate() {
        assert_eq!(*number, expected.to_string(), "in {text:.2000}");
    }
}

fn assert_nothing_left(node: &Node) {
    let until = Instant::now() + PATIENCE;
    while node.devices().iter().any(|name| name.starts_with("mig")) {
        assert!(Instant::now() < until, "the TUN device stays");
        std::thread::sleep(Duration::from_millis(10));
    }
    let own = |line: &&str| line.contains("05004D0A") && line.starts_with("mig");
    assert_eq!(node.routes().lines().find(own), None);
}

/// Whether the job goes on counting here.
fn assert_runs(shim: &Shim) {
    let mut attached = shim.attach(u64::MAX, true, false);
    attached.offset = shim.status().output_bytes;
    drop(attached);
    let from = shim.status().output_bytes;
    let until = Instant::now() + PATIENCE;
    while shim.status().output_bytes < from + 20 {
        assert!(Instant::now() < until, "the job does not run");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_job_moves_there_and_back_and_loses_no_output() {
    let cluster = Cluster::new();
    let mut shims = vec![cluster.a.shim(COUNTER, 1, false)];
    shims[0].wait_running();
    let mut text = String::new();
    let mut offset = 0;
    for epoch in 1..=6 {
        let (from, to) = if epoch % 2 == 1 { (&cluster.a, &cluster.b) } else { (&cluster.b, &cluster.a) };
        let source = shims.pop().unwrap();
        let mut attached = source.attach(offset, true, true);
        attached.read_until(&format!("{};", epoch * 50));
        let target = to.shim(COUNTER, epoch, true);
        let moving = start_move((&source, from), (&target, to), epoch, connected_pair());
        match moving.outcome() {
            MoveOutcome::Moved(summary) => {
                eprintln!("{summary:?}");
                assert_eq!((summary.from, summary.to, summary.epoch), (from.name.clone(), to.name.clone(), epoch + 1));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(attached.read_to_event(), AttachEvent::Moved { node: to.name.clone() });
        assert_eq!(target.wait_running(), epoch + 1);
        text.push_str(&attached.text);
        offset = attached.offset;
        drop(attached);
        let mut source = source;
        source.wait_end();
        assert_nothing_left(from);
        shims.push(target);
    }
    let mut last = shims.pop().unwrap();
    let mut attached = last.attach(offset, true, true);
    attached.input(0, "enough\n");
    assert_eq!(attached.read_to_event(), AttachEvent::Exited(Exit::Code(9)));
    text.push_str(&attached.text);
    drop(attached);
    assert_counts(text.split("end").next().unwrap());
    assert!(text.ends_with("end enough\n\n"), "{text}");
    last.wait_end();
    assert_eq!(cluster.directory.owner(), ("A".to_owned(), 7));
}

#[test]
fn a_target_that_dies_leaves_the_job_where_it_was() {
    for wait_ms in [0, 5, 20, 40, 80] {
        let cluster = Cluster::new();
        let source = cluster.a.shim(COUNTER, 1, false);
        source.wait_running();
        let mut target = cluster.b.shim(COUNTER, 1, true);
        target.wait_event(|event| matches!(event, ShimEvent::Receiving));
        let moving = start_move((&source, &cluster.a), (&target, &cluster.b), 1, connected_pair());
        std::thread::sleep(Duration::from_millis(wait_ms));
        target.child.kill().unwrap();
        let outcome = moving.outcome();
        eprintln!("killed after {wait_ms} ms: {outcome:?}");
        assert_nothing_left(&cluster.b);
        if cluster.directory.owner().0 == "A" {
            assert!(matches!(outcome, MoveOutcome::Aborted { .. }), "{outcome:?}");
            assert_runs(&source);
            let mut attached = source.attach(0, true, false);
            attached.read_until("100;");
            assert_counts(&attached.text);
            // And a retry succeeds.
            let epoch = source.status().epoch;
            let again = cluster.b.shim(COUNTER, epoch + 100, true);
            drop(again);
        }
    }
}

/// Passes on what one side sends until `limit` bytes are through, then cuts both connections.
fn cut_after(limit: usize) -> (TcpStream, TcpStream) {
    let (source, mut near) = connected_pair();
    let (mut far, target) = connected_pair();
    let (mut near_back, mut far_back) = (near.try_clone().unwrap(), far.try_clone().unwrap());
    std::thread::spawn(move || {
        let mut left = limit;
        let mut buffer = vec![0; 64 << 10];
        while left > 0 {
            let Ok(count) = near.read(&mut buffer[..left.min(64 << 10)]) else { break };
            if count == 0 || far.write_all(&buffer[..count]).is_err() {
                break;
            }
            left -= count;
        }
        let _ = near.shutdown(std::net::Shutdown::Both);
        let _ = far.shutdown(std::net::Shutdown::Both);
    });
    std::thread::spawn(move || std::io::copy(&mut far_back, &mut near_back));
    (source, target)
}

#[test]
fn a_connection_cut_anywhere_leaves_one_owner_that_runs() {
    // A whole move first, to know how many bytes there are.
    let whole = moved_bytes();
    let mut limits = vec![0, 1, 20, 100, 5_000, 100_000, whole / 2];
    limits.extend((0..8).map(|step| whole.saturating_sub(1 << (2 * step))));
    for limit in limits {
        let cluster = Cluster::new();
        let source = cluster.a.shim(COUNTER, 1, false);
        source.wait_running();
        let target = cluster.b.shim(COUNTER, 1, true);
        let moving = start_move((&source, &cluster.a), (&target, &cluster.b), 1, cut_after(limit));
        let outcome = moving.outcome();
        let (owner, epoch) = cluster.directory.owner();
        eprintln!("cut after {limit} of {whole} bytes: {owner} owns epoch {epoch}, {outcome:?}");
        if owner == "A" {
            assert!(matches!(outcome, MoveOutcome::Aborted { .. }), "{outcome:?}");
            assert_eq!(source.status().epoch, epoch);
            assert_runs(&source);
            assert_nothing_left(&cluster.b);
        } else {
            assert!(matches!(outcome, MoveOutcome::Moved(_)), "{outcome:?}");
            assert_eq!(target.wait_running(), epoch);
            assert_runs(&target);
            assert_nothing_left(&cluster.a);
        }
    }
}

fn moved_bytes() -> usize {
    let cluster = Cluster::new();
    let source = cluster.a.shim(COUNTER, 1, false);
    source.wait_running();
    let target = cluster.b.shim(COUNTER, 1, true);
    let moving = start_move((&source, &cluster.a), (&target, &cluster.b), 1, connected_pair());
    match moving.outcome() {
        MoveOutcome::Moved(summary) => usize::try_from(summary.precopy_bytes + summary.freeze_bytes).unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_directory_that_is_silent_at_the_commit_only_delays() {
    let cluster = Cluster::new();
    let source = cluster.a.shim(COUNTER, 1, false);
    source.wait_running();
    let target = cluster.b.shim(COUNTER, 1, true);
    cluster.directory.silent.store(true, std::sync::atomic::Ordering::SeqCst);
    let moving = start_move((&source, &cluster.a), (&target, &cluster.b), 1, connected_pair());
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(cluster.directory.owner(), ("A".to_owned(), 1));
    cluster.directory.silent.store(false, std::sync::atomic::Ordering::SeqCst);
    let outcome = moving.outcome();
    let (owner, epoch) = cluster.directory.owner();
    assert_eq!(epoch, 2);
    let winner = if owner == "A" { &source } else { &target };
    eprintln!("{owner} has it: {outcome:?}");
    assert_runs(winner);
    winner.ask::<()>(&ShimRequest::Kill { signal: 9 }).unwrap();
}

#[test]
fn a_job_is_not_frozen_while_the_directory_does_not_answer() {
    let cluster = Cluster::new();
    let source = cluster.a.shim(COUNTER, 1, false);
    source.wait_running();
    let target = cluster.b.shim(COUNTER, 1, true);
    cluster.directory.dead.store(true, std::sync::atomic::Ordering::SeqCst);
    let moving = start_move((&source, &cluster.a), (&target, &cluster.b), 1, connected_pair());
    match moving.outcome() {
        MoveOutcome::Aborted { phase, .. } => assert_eq!(phase, "precopy"),
        other => panic!("{other:?}"),
    }
    assert_runs(&source);
    assert_nothing_left(&cluster.b);
}
