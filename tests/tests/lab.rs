//! The lab itself, and what is left of it when anything in it was killed.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use migd::lab::{Names, down};
use tests::Fixture;
use tests::fixture::{binary, text};
use tests::processes::{kill, with_argument, with_variable};

/// What of a lab is on the machine: namespaces, files, mounts, and processes that its daemons marked.
fn traces(names: &Names) -> Vec<String> {
    let mut found: Vec<String> = sys::netns::named_with_prefix(&names.namespace("")).expect("/run/netns");
    for path in [names.root(), names.lock()] {
        if path.exists() {
            found.push(path.display().to_string());
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("the mounts");
    let own = format!("migd-{}", names.lab());
    found.extend(mounts.lines().filter(|line| line.contains(&own)).map(str::to_owned));
    let mark = format!("MIGD_LAB={}", names.lab());
    let marked = with_variable(|variable| variable == mark.as_bytes());
    found.extend(marked.into_iter().map(|pid| format!("process {pid}")));
    found
}

/// The job's processes, by an argument that only they have.
fn processes_with(argument: &str) -> Vec<u32> {
    with_argument(|found| found == argument.as_bytes())
}

fn wait_until_gone(argument: &str) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !processes_with(argument).is_empty() {
        assert!(Instant::now() < deadline, "{argument} still runs: {:?}", processes_with(argument));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The shim of the only job of a node.
fn shim(fixture: &Fixture, node: &str) -> u32 {
    let shims = fixture.shims(node);
    assert_eq!(shims.len(), 1, "{shims:?}");
    shims[0]
}

#[test]
fn commands_make_use_and_remove_a_lab() {
    let lab = migd::lab::own_name("test");
    // Takes the lab down when an assertion below fails.
    struct Down(String);
    impl Drop for Down {
        fn drop(&mut self) {
            let _ = down(&self.0);
        }
    }
    let _down = Down(lab.clone());
    let run = |arguments: &[&str]| {
        let output = Command::new(binary()).args(arguments).output().expect("migd starts");
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, table, errors) =
        run(&["lab", "up", "--lab", &lab, "--nodes", "3", "--clients", "2", "--prefix", "10.78.0.0/16"]);
    assert_eq!(code, Some(0), "{errors}");
    assert!(table.contains("client2") && table.contains("10.78.0.0/16"), "{table}");
    let (code, _, errors) = run(&["lab", "up", "--lab", &lab]);
    assert_eq!(code, Some(1));
    assert!(errors.contains("is up already"), "{errors}");
    let (code, status, _) = run(&["lab", "status", "--json", "--lab", &lab]);
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    assert_eq!((code, status["nodes"].as_array().map(Vec::len)), (Some(0), Some(3)));
    let (code, _, errors) = run(&["lab", "exec", "--lab", &lab, "client1", "--", "ping", "-c1", "-W2", "10.99.0.3"]);
    assert!(code == Some(0) || errors.contains("can't run ping"), "{errors}");
    assert_eq!(run(&["lab", "exec", "--lab", &lab, "B", "--", "sh", "-c", "exit 7"]).0, Some(7));
    assert_eq!(run(&["lab", "exec", "--lab", &lab, "B", "--", "/no/such/program"]).0, Some(127));
    let (code, _, errors) = run(&["lab", "exec", "--lab", &lab, "Z", "--", "true"]);
    assert_eq!(code, Some(1));
    assert!(errors.contains("has no Z"), "{errors}");
    let (code, nodes, errors) = run(&["--node", &format!("{lab}/B"), "nodes", "--json"]);
    assert_eq!(code, Some(0), "{errors}");
    assert!(nodes.contains("\"C\""), "{nodes}");
    let names = Names::new(&lab).expect("a name");
    assert!(Path::new("/run/netns").join(names.namespace("A")).exists());
    assert_eq!(run(&["lab", "down", "--lab", &lab]).0, Some(0));
    assert_eq!(traces(&names), Vec::<String>::new());
    assert_eq!(run(&["lab", "down", "--lab", &lab]).0, Some(0));
    assert_eq!(run(&["lab", "status", "--lab", &lab]).0, Some(1));
}

#[test]
fn nothing_is_left_after_a_daemon_was_killed() {
    let mut fixture = Fixture::new();
    let names = fixture.lab.names().clone();
    let _ = fixture.run("A", "sleeper", &["sleep", "987601"]);
    fixture.lab.kill_daemon("A").expect("it was running");
    assert!(!processes_with("987601").is_empty(), "the job does not depend on the daemon");
    drop(fixture);
    assert_eq!(traces(&names), Vec::<String>::new());
    wait_until_gone("987601");
}

#[test]
fn nothing_is_left_after_a_shim_was_killed() {
    let fixture = Fixture::new();
    let names = fixture.lab.names().clone();
    let _ = fixture.run("A", "sleeper", &["sh", "-c", "sleep 987602 & sleep 987602; :"]);
    kill(shim(&fixture, "A"));
    // Its job dies with it, whatever the job is doing.
    wait_until_gone("987602");
    drop(fixture);
    assert_eq!(traces(&names), Vec::<String>::new());
}

#[test]
fn nothing_is_left_after_everything_was_killed_at_once() {
    let mut fixture = Fixture::new();
    let names = fixture.lab.names().clone();
    let _ = fixture.run("B", "sleeper", &["sleep", "987603"]);
    let shim = shim(&fixture, "B");
    fixture.lab.kill_daemon("A").expect("it was running");
    fixture.lab.kill_daemon("B").expect("it was running");
    kill(shim);
    drop(fixture);
    assert_eq!(traces(&names), Vec::<String>::new());
    wait_until_gone("987603");
}

#[test]
fn a_daemon_that_was_killed_finds_its_jobs_again() {
    let mut fixture = Fixture::new();
    let before = fixture.run("A", "sleeper", &["sleep", "987604"]);
    fixture.lab.kill_daemon("A").expect("it was running");
    fixture.lab.restart_daemon("A").unwrap_or_else(|error| panic!("{error:#}"));
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let jobs = fixture.lab.jobs("A").unwrap_or_else(|error| panic!("{error:#}"));
        if let [job] = jobs.as_slice()
            && job.pid == before.pid
            && job.address == before.address
            && job.state == migd::api::JobState::Running
        {
            break;
        }
        assert!(Instant::now() < deadline, "{jobs:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    fixture.lab.kill("A", "sleeper").unwrap_or_else(|error| panic!("{error:#}"));
    wait_until_gone("987604");
}
