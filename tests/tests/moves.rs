//! What a move must never do: be seen as a reset, or lose the job when the target dies.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use migd::api::MoveOutcome;
use migd::demo::redis::{Connection, Reply, encode};
use migd::demo::wire::Watch;
use sys::capture::Sieve;
use tests::load::{echo, http, redis};
use tests::processes::kill;
use tests::programs::{python_echo, write_pattern};
use tests::{Fixture, Load};

const PORT: u16 = 7000;

/// Puts a number of megabytes into redis, so that a move takes its time.
fn fill(fixture: &Fixture, server: SocketAddr, megabytes: usize) {
    let mut connection = fixture.client().run(|| Connection::open(server)).expect("it serves");
    let value = tests::pattern::Pattern::new(77).take(1 << 20);
    for number in 0..megabytes {
        connection.send(&encode(&[b"SET", format!("entry:{number}").as_bytes(), &value])).expect("it serves");
        assert_eq!(connection.reply().expect("it serves"), Reply::Simple("OK".into()));
    }
}

#[test]
fn ten_moves_under_load_show_no_reset_and_nothing_unreachable() {
    let fixture = Fixture::new();
    write_pattern(fixture.path("file"), 9, 1 << 20);
    let script = python_echo(&fixture);
    let server = fixture.serve("echo", &["python3", &script, &PORT.to_string()], PORT);
    let argv = ["python3", "-m", "http.server", &PORT.to_string(), "--directory", &fixture.path("")];
    let web = fixture.serve("web", &argv, PORT);
    let watch = Watch::start(&fixture.client(), Sieve::Refusals).expect("a capture");
    let load = Load::start(|| fixture.client(), 2, move |number, shared| echo(server, number + 1, shared));
    let load = load.and(Load::start(|| fixture.client(), 1, move |_, shared| http(web, "/file", 9, 1 << 20, shared)));
    for _ in 0..5 {
        for (from, to) in [("A", "B"), ("B", "A")] {
            fixture.move_job("echo", from, to);
            fixture.move_job("web", from, to);
            load.must_progress();
        }
    }
    load.stop().unwrap_or_else(|errors| panic!("{errors}"));
    let seen = watch.stop().expect("a capture");
    assert_eq!((seen.frames, seen.lost), (0, 0), "{:x?}", seen.samples);
}

#[test]
fn a_target_killed_in_mid_move_leaves_the_job_on_the_source() {
    let mut fixture = Fixture::new();
    let server = fixture.serve_redis();
    fill(&fixture, server, 300);
    let load = Load::start(|| fixture.client(), 2, move |number, shared| redis(server, number + 1, shared));
    load.must_progress();
    let outcome = std::thread::scope(|scope| {
        let moving = scope.spawn(|| fixture.lab.try_move("redis", "A", "B"));
        kill_when_it_appears(&fixture);
        moving.join().expect("no panic")
    });
    assert!(!matches!(outcome, Ok(MoveOutcome::Moved(_))), "{outcome:?}");
    load.must_progress();
    let jobs = fixture.lab.jobs("A").expect("the daemon answers");
    assert_eq!(jobs.iter().map(|job| job.node.as_str()).collect::<Vec<_>>(), ["A"], "{jobs:?}");
    // And with the daemon of the target as well.
    fixture.lab.kill_daemon("B").expect("it was running");
    assert!(!matches!(fixture.lab.try_move("redis", "A", "B"), Ok(MoveOutcome::Moved(_))));
    load.must_progress();
    // The next try succeeds.
    fixture.lab.restart_daemon("B").unwrap_or_else(|error| panic!("{error:#}"));
    move_when_the_node_is_known(&fixture);
    load.must_progress();
    load.stop().unwrap_or_else(|errors| panic!("{errors}"));
}

/// Kills the receiving shim on B as soon as it is there.
fn kill_when_it_appears(fixture: &Fixture) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(&pid) = fixture.shims("B").first() {
            // In the middle of what it is doing, not at its first instruction.
            std::thread::sleep(Duration::from_millis(30));
            kill(pid);
            return;
        }
        assert!(Instant::now() < deadline, "no shim appeared on B\n{}", fixture.state_logs());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A restarted node is seen by the others after a moment.
fn move_when_the_node_is_known(fixture: &Fixture) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let outcome = fixture.lab.move_job("redis", "A", "B");
        match outcome {
            Ok(_) => return,
            Err(error) => assert!(Instant::now() < deadline, "{error:#}\n{}", fixture.state_logs()),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
