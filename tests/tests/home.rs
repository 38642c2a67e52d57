//! Jobs whose sockets stay at home while their process is elsewhere: the same servers, the same loads and the same demands as on any
//! other move, on every way such a job can go.

use std::net::SocketAddr;

use migd::demo::wire::Watch;
use sys::capture::Sieve;
use tests::load::{echo, redis};
use tests::programs::python_echo;
use tests::{Fixture, Load};

const PORT: u16 = 7000;

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

fn start_redis(fixture: &Fixture) -> SocketAddr {
    let port = PORT.to_string();
    let argv = ["redis-server", "--port", &port, "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""];
    fixture.serve("redis", &argv, PORT)
}

#[test]
fn redis_goes_every_way() {
    let fixture = Fixture::with_nodes(3);
    let server = start_redis(&fixture);
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
