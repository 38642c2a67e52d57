//! The directory under moving jobs: its daemon or one of its members dies and comes back, it moves to another engine.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use migd::api::JobState;
use migd::lab::Spec;
use tests::Fixture;
use tests::counter::Counter;
use tests::programs::{REDIS, REDIS_PORT};

const PATIENCE: Duration = Duration::from_secs(60);
fn lab(nodes: usize, etcd: usize) -> Fixture {
    Fixture::of(Spec { nodes, etcd, ..Spec::new("unused").expect("this program has a path") })
}

/// Starts redis on a node and waits until it serves.
fn serve(fixture: &Fixture, node: &str) -> SocketAddr {
    let job = fixture.run(node, "server", &REDIS);
    let server = SocketAddr::new(job.address.into(), REDIS_PORT);
    fixture.wait_until_it_serves("server", server);
    server
}

/// Where the job runs and under which epoch, as a node sees it once it sees it running.
fn standing(fixture: &Fixture, asked: &str) -> (String, u64) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let jobs = fixture.lab.jobs(asked).expect("its daemon answers");
        let running: Vec<_> = jobs.into_iter().filter(|job| job.state == JobState::Running).collect();
        if let [job] = running.as_slice() {
            return (job.node.clone(), job.epoch);
        }
        assert!(Instant::now() < deadline, "no node has the job: {running:?}\n{}", fixture.state_logs());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Moves the job until that succeeds: while the directory is away a move is refused or given up, and nothing else happens.
fn move_until_done(fixture: &Fixture, from: &str, to: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let output = fixture.migd(from, &["move", "server", to]).output().expect("migd starts");
        if output.status.success() || standing(fixture, from).0 == to {
            return;
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(Instant::now() < deadline, "it does not move: {said}\n{}", fixture.state_logs());
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn assert_records_are_sound(fixture: &Fixture, node: &str) {
    let report = fixture.migd_output(node, &["addr", "check", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["findings"], serde_json::json!([]), "{report}");
    assert_eq!(report["jobs"], 1);
}

#[test]
fn a_member_of_three_dies_and_comes_back_while_jobs_move() {
    let fixture = lab(2, 3);
    let server = serve(&fixture, "A");
    let mut counter = Counter::new(&fixture, server);
    for member in ["etcd1", "etcd2", "etcd3"] {
        std::thread::scope(|scope| {
            let kill = scope.spawn(|| fixture.lab.kill_etcd(member).expect("it ran"));
            move_until_done(&fixture, "A", "B");
            kill.join().expect("killed");
        });
        counter.steps(50);
        std::thread::scope(|scope| {
            let restart = scope.spawn(|| fixture.lab.restart_etcd(member));
            move_until_done(&fixture, "B", "A");
            restart.join().expect("no panic").expect("it answers again");
        });
        counter.steps(50);
    }
    let (node, epoch) = standing(&fixture, "B");
    assert_eq!(node, "A");
    // Fences of moves that were given up count, too.
    assert!(epoch >= 7, "{epoch}");
    assert_records_are_sound(&fixture, "B");
}

#[test]
fn the_directorys_daemon_dies_and_comes_back_while_jobs_of_other_nodes_move() {
    let mut fixture = lab(3, 0);
    let server = serve(&fixture, "B");
    let mut counter = Counter::new(&fixture, server);
    let mut epoch = 1;
    // At different moments of a move: before it, early, late.
    for (pause_ms, route) in [(0, ["B", "C"]), (40, ["C", "B"]), (80, ["B", "C"]), (120, ["C", "B"])] {
        let [from, to] = route;
        let mut moving = begin_move(&fixture, from, to);
        std::thread::sleep(Duration::from_millis(pause_ms));
        fixture.lab.kill_daemon("A").expect("it ran");
        std::thread::sleep(Duration::from_millis(200));
        fixture.lab.restart_daemon("A").expect("it starts again");
        moving.wait().expect("it ends");
        if standing(&fixture, from).0 != to {
            move_until_done(&fixture, from, to);
        }
        counter.steps(50);
        let (node, now) = standing(&fixture, "A");
        assert_eq!(node, to);
        assert!(now > epoch, "epoch {now} after {epoch}");
        epoch = now;
    }
    assert_records_are_sound(&fixture, "C");
}

fn begin_move(fixture: &Fixture, from: &str, to: &str) -> Child {
    let mut command = fixture.migd(from, &["move", "server", to]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("migd starts")
}

/// An etcd of one member in the namespace of node A; it ends with this value.
struct Etcd(Child);

impl Etcd {
    const ENDPOINT: &str = "http://10.99.0.1:2379";

    fn start(fixture: &Fixture) -> Etcd {
        let mut command = Command::new("etcd");
        command.args(["--data-dir", &fixture.path("etcd"), "--listen-peer-urls", "http://127.0.0.1:2380"]);
        command.args(["--listen-client-urls", Etcd::ENDPOINT, "--advertise-client-urls", Etcd::ENDPOINT]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let namespace = fixture.lab.namespace("A").expect("node A's namespace");
        Etcd(namespace.run(|| command.spawn()).expect("etcd starts: is etcd-server installed?"))
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // Both fail only when it ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_directory_moves_to_etcd_while_a_job_runs_and_moves() {
    let mut fixture = lab(2, 0);
    let server = serve(&fixture, "A");
    let mut counter = Counter::new(&fixture, server);
    counter.steps(50);
    let _etcd = Etcd::start(&fixture);
    let place = format!("etcd:{}", Etcd::ENDPOINT);
    let deadline = Instant::now() + PATIENCE;
    // Asked at the node that does not serve it. Until the etcd has elected itself the directory stays where it is.
    let migrated = loop {
        let output =
            fixture.migd("B", &["cluster", "migrate-directory", &place, "--json"]).output().expect("migd starts");
        if output.status.success() {
            break output;
        }
        assert!(Instant::now() < deadline, "{}", String::from_utf8_lossy(&output.stderr));
        counter.steps(10);
    };
    let migrated: serde_json::Value = serde_json::from_slice(&migrated.stdout).expect("JSON");
    assert_eq!(migrated["to"], place.as_str());
    counter.steps(50);
    fixture.back_and_forth("server", 1, |_| counter.steps(50));
    assert_eq!(fixture.migd_output("B", &["run", "--", "echo", "here"]), "here\n");
    // Who starts again finds it: the node that made the cluster, and one that only ever knew the first.
    for node in ["A", "B"] {
        fixture.lab.kill_daemon(node).expect("it ran");
        fixture.lab.restart_daemon(node).expect("it starts again");
    }
    let deadline = Instant::now() + PATIENCE;
    while !fixture.migd("B", &["run", "--", "true"]).status().expect("migd starts").success() {
        assert!(Instant::now() < deadline, "B does not come back\n{}", fixture.state_logs());
        std::thread::sleep(Duration::from_millis(100));
    }
    fixture.back_and_forth("server", 1, |_| counter.steps(50));
    assert_records_are_sound(&fixture, "B");
    let again = fixture.migd("A", &["cluster", "migrate-directory", &place]).output().expect("migd starts");
    assert!(!again.status.success(), "it is there already");
}
