//! Jobs whose sockets stay at home while their process is elsewhere: the same servers, the same loads and the same demands as on any
//! other move, on every way such a job can go.

use std::io::{ErrorKind, Read};
use std::time::{Duration, Instant};

use migd::api::{JobState, JobView, MoveOutcome, SocketPlace};
use migd::demo::wire::Watch;
use sys::capture::Sieve;
use tests::iperf::must_have_flowed;
use tests::load::{echo, redis};
use tests::processes::kill;
use tests::programs::{python_echo, python_udp};
use tests::{Fixture, Load, datagrams};

const PORT: u16 = 7000;
/// Far longer than anything awaited here takes.
const PATIENCE: Duration = Duration::from_secs(40);

/// Where the sockets go with a move.
#[derive(Clone, Copy, Debug)]
enum Sockets {
    Home,
    Along,
}

/// Every way from every place: the process leaves its sockets, goes on without them, comes back to them, leaves them again and
/// is followed by them.
const WAYS: [(&str, &str, Sockets, Option<&str>); 6] = [
    ("A", "B", Sockets::Home, Some("A")),
    ("B", "C", Sockets::Home, Some("A")),
    ("C", "A", Sockets::Home, None),
    ("A", "B", Sockets::Home, Some("A")),
    ("B", "C", Sockets::Along, None),
    ("C", "A", Sockets::Along, None),
];

/// The node with the job's sockets, if that is another than the job's own, as `migd ps` shows it; and where the job is.
fn places(fixture: &Fixture, name: &str) -> (String, Option<String>) {
    let jobs = fixture.lab.jobs("A").expect("the daemon answers");
    let job = jobs.into_iter().find(|job| job.name == name).expect("the job runs");
    (job.node, job.home.map(|home| home.node))
}

fn goes_every_way(fixture: &Fixture, name: &str, load: Load) {
    load.must_progress();
    let watch = Watch::start(&fixture.client(), Sieve::Refusals).expect("a capture");
    for (from, to, sockets, home) in WAYS {
        match sockets {
            Sockets::Home => fixture.move_process(name, from, to),
            Sockets::Along => fixture.move_job(name, from, to),
        };
        if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| load.must_progress())) {
            let reason = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            panic!(
                "from {from} to {to} with sockets {sockets:?}: {reason}\n{:?}\n{}",
                load.stop(),
                fixture.state_logs()
            );
        }
        assert_eq!(places(fixture, name), (to.to_owned(), home.map(str::to_owned)));
    }
    load.stop().unwrap_or_else(|errors| panic!("{errors}\n{}", fixture.state_logs()));
    let seen = watch.stop().expect("a capture");
    assert_eq!((seen.frames, seen.lost), (0, 0), "{:x?}", seen.samples);
}

#[test]
fn redis_goes_every_way() {
    let fixture = Fixture::with_nodes(3);
    let server = fixture.serve_redis();
    let load = Load::start(|| fixture.client(), 3, move |number, shared| redis(server, number + 1, shared));
    goes_every_way(&fixture, "redis", load);
}

#[test]
fn python_echo_goes_every_way() {
    let fixture = Fixture::with_nodes(3);
    let script = python_echo(&fixture);
    let server = fixture.serve("echo", &["python3", &script, &PORT.to_string()], PORT);
    let load = Load::start(|| fixture.client(), 3, move |number, shared| echo(server, number + 1, shared));
    goes_every_way(&fixture, "echo", load);
}

/// No datagram is lost, and none comes twice.
#[test]
fn datagrams_go_every_way() {
    let fixture = Fixture::with_nodes(3);
    let script = python_udp(&fixture);
    let argv = ["python3", &script, "::", &PORT.to_string()];
    let servers = datagrams::serve(&fixture, "udp", &argv, PORT, b"anybody there?");
    let echo = move |number, shared: &_| datagrams::echo(servers[usize::from(number % 2 == 1)], number + 1, shared);
    goes_every_way(&fixture, "udp", Load::start(|| fixture.client(), 4, echo));
}

/// Waits until the listing of a node's daemon satisfies a condition.
fn wait_for(fixture: &Fixture, node: &str, mut until: impl FnMut(&[JobView]) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let jobs = fixture.lab.jobs(node);
        if jobs.as_ref().is_ok_and(|jobs| until(jobs)) {
            return;
        }
        assert!(Instant::now() < deadline, "{jobs:?}\n{}", fixture.state_logs());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn wait_until_home_has_ended(fixture: &Fixture) {
    wait_for(fixture, "A", |jobs| jobs.iter().all(|job| job.state == JobState::Exited));
    let deadline = Instant::now() + PATIENCE;
    while !fixture.shims("A").is_empty() {
        assert!(Instant::now() < deadline, "the home stays\n{}", fixture.state_logs());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn iperf3_server_leaves_its_sockets_and_is_followed_in_each_direction() {
    let fixture = Fixture::new();
    let port = PORT.to_string();
    let job = fixture.run("A", "iperf", &["iperf3", "-s", "-p", &port, "--forceflush"]);
    let address = job.address.to_string();
    for (reverse, ready) in [(false, "(test #1)"), (true, "(test #2)")] {
        // Between two tests it has no listener.
        fixture.wait_for_log("A", "iperf", ready);
        let mut argv = vec!["iperf3", "-c", &address, "-p", &port, "-t", "6", "-J"];
        argv.extend(reverse.then_some("-R"));
        let client = fixture.start_in_client(&argv);
        let pause = || std::thread::sleep(Duration::from_millis(400));
        pause();
        fixture.move_process("iperf", "A", "B");
        pause();
        fixture.move_process("iperf", "B", "A");
        pause();
        fixture.move_process("iperf", "A", "B");
        pause();
        fixture.move_job("iperf", "B", "A");
        must_have_flowed(&client.output(), &fixture, reverse);
    }
}

#[test]
fn a_lost_home_is_seen_and_the_job_runs_on() {
    let fixture = Fixture::new();
    let server = fixture.serve_redis();
    fixture.move_process("redis", "A", "B");
    let _stream = fixture.connect(server).expect("it serves");
    for pid in fixture.shims("A") {
        kill(pid);
    }
    wait_for(&fixture, "B", |jobs| {
        jobs.iter().any(|job| {
            let lost = job.home.as_ref().is_some_and(|home| home.node == "A" && home.lost.is_some());
            job.name == "redis" && job.state == JobState::Running && lost
        })
    });
    assert!(fixture.migd_output("B", &["ps"]).contains("home A lost"));
    let _ = fixture.migd_output("B", &["kill", "redis"]);
    wait_for(&fixture, "B", |jobs| jobs.iter().all(|job| job.state == JobState::Exited));
}

#[test]
fn a_lost_process_is_told_to_its_peers_and_leaves_no_home() {
    let fixture = Fixture::new();
    let server = fixture.serve_redis();
    fixture.move_process("redis", "A", "B");
    let mut stream = fixture.connect(server).expect("it serves");
    std::io::Write::write_all(&mut stream, b"PING\r\n").expect("it is connected");
    assert_eq!(stream.read(&mut [0; 16]).expect("an answer"), 7);
    for pid in fixture.shims("B") {
        kill(pid);
    }
    assert_eq!(stream.read(&mut [0]).expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    wait_until_home_has_ended(&fixture);
}

#[test]
fn a_job_that_ends_away_from_home_ends_its_connections_in_order() {
    let fixture = Fixture::new();
    let server = fixture.serve_redis();
    fixture.move_process("redis", "A", "B");
    let mut stream = fixture.connect(server).expect("it serves");
    std::io::Write::write_all(&mut stream, b"PING\r\n").expect("it is connected");
    assert_eq!(stream.read(&mut [0; 16]).expect("an answer"), 7);
    std::io::Write::write_all(&mut stream, b"SHUTDOWN NOSAVE\r\n").expect("it is connected");
    assert_eq!(stream.read(&mut [0]).expect("an orderly end"), 0);
    wait_until_home_has_ended(&fixture);
}

#[test]
fn a_move_that_fails_leaves_all_as_it_was() {
    let mut fixture = Fixture::with_nodes(3);
    let server = fixture.serve_redis();
    let load = Load::start(|| fixture.client(), 2, move |number, shared| redis(server, number + 1, shared));
    load.must_progress();
    fixture.move_process("redis", "A", "B");
    load.must_progress();
    // The target is not there, whether the sockets are to come along or not.
    fixture.lab.kill_daemon("C").expect("it was running");
    for sockets in [SocketPlace::Home, SocketPlace::Along] {
        let outcome = fixture.lab.try_move_with("redis", "B", "C", sockets);
        assert!(!matches!(outcome, Ok(MoveOutcome::Moved(_))), "{outcome:?}");
        load.must_progress();
        assert_eq!(places(&fixture, "redis"), ("B".to_owned(), Some("A".to_owned())));
    }
    load.stop().unwrap_or_else(|errors| panic!("{errors}\n{}", fixture.state_logs()));
}
