//! A job that stays: launch, streams, exit, and the shim's own end.

use std::time::{Duration, Instant};

use migd::api::{AttachEvent, ErrorKind, Exit, ShimEvent, ShimRequest};

use crate::harness::{Cluster, PATIENCE};

fn assert_clean(cluster: &Cluster) {
    let devices = cluster.a.devices();
    assert!(!devices.iter().any(|name| name.starts_with("mig")), "{devices:?}");
    assert!(!cluster.a.routes().contains("05004D0A"), "{}", cluster.a.routes());
}

fn exists(pid: i32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

fn wait_gone(pid: i32) {
    let until = Instant::now() + PATIENCE;
    while exists(pid) {
        assert!(Instant::now() < until, "process {pid} lives on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn output_input_and_status_pass_through() {
    let cluster = Cluster::new();
    let script = "echo out; echo err >&2; read line; echo got $line; cat; exit 3";
    let mut shim = cluster.a.shim(&["sh", "-c", script], 1, false);
    assert_eq!(shim.wait_running(), 1);
    assert!(cluster.a.devices().iter().any(|name| name == "mig0"));
    assert!(cluster.a.routes().contains("05004D0A"));
    let mut attached = shim.attach(0, true, true);
    attached.read_until("err");
    attached.input(0, "a line\nmore");
    // Sent again, as after a connection that broke: what was accepted is skipped.
    attached.input(0, "a line\nmore and more");
    attached.end_input();
    assert_eq!(attached.read_to_event(), AttachEvent::Exited(Exit::Code(3)));
    assert_eq!(attached.text.replace("err\n", ""), "out\ngot a line\nmore and more");
    let end = attached.offset;
    drop(attached);
    assert_eq!(shim.exit_file(), Exit::Code(3));
    shim.wait_end();
    assert_eq!(cluster.directory.exits(), [Exit::Code(3)]);
    let mut log = migd::shim::output::Reader::new(&shim.paths.output(), 0);
    let mut bytes = 0;
    while let Some(frame) = log.next_frame().unwrap() {
        bytes += frame.bytes.len() as u64;
    }
    assert_eq!(bytes, end);
    assert_clean(&cluster);
}

#[test]
fn a_program_that_does_not_exist_is_said_to() {
    let cluster = Cluster::new();
    let mut shim = cluster.a.shim(&["no-such-program"], 1, false);
    match shim.wait_event(|event| matches!(event, ShimEvent::Failed(_))) {
        ShimEvent::Failed(error) => assert_eq!(error.kind, ErrorKind::NoSuchProgram, "{error}"),
        other => panic!("{other:?}"),
    }
    shim.wait_end();
    assert_clean(&cluster);
}

#[test]
fn a_signal_reaches_the_job_and_ends_it() {
    let cluster = Cluster::new();
    let mut shim = cluster.a.shim(&["sleep", "1000"], 1, false);
    shim.wait_running();
    shim.ask::<()>(&ShimRequest::Kill { signal: 15 }).unwrap();
    let exited = shim.wait_event(|event| matches!(event, ShimEvent::Exited(_)));
    assert_eq!(exited, ShimEvent::Exited(Exit::Signal(15)));
    shim.wait_end();
    assert_clean(&cluster);
}

#[test]
fn a_shim_that_is_killed_takes_everything_with_it() {
    let cluster = Cluster::new();
    let mut shim = cluster.a.shim(&["sh", "-c", "sleep 1000 & sleep 1000"], 1, false);
    shim.wait_running();
    let root = shim.status().pid.unwrap();
    shim.child.kill().unwrap();
    shim.wait_end();
    wait_gone(root);
    let until = Instant::now() + PATIENCE;
    while cluster.a.devices().iter().any(|name| name.starts_with("mig")) {
        assert!(Instant::now() < until, "the TUN device stays");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_clean(&cluster);
}

#[test]
fn a_shim_that_is_terminated_ends_the_job() {
    let cluster = Cluster::new();
    let mut shim = cluster.a.shim(&["sleep", "1000"], 1, false);
    shim.wait_running();
    let root = shim.status().pid.unwrap();
    let shim_pid = i32::try_from(shim.child.id()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim_pid), nix::sys::signal::Signal::SIGTERM).unwrap();
    shim.wait_end();
    assert!(!exists(root));
    assert_eq!(shim.exit_file(), Exit::Signal(15));
    assert_clean(&cluster);
}
