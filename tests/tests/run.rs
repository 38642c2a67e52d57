//! `migd run` in the foreground: output, exit status and Ctrl-C, also when the job has moved meanwhile.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use tests::Fixture;
use tests::fixture::text;
use tests::processes::interrupt;

/// A script that writes a line for each tenth of a second.
const COUNT: &str = "i=0; while [ $i -lt 60 ]; do echo line $i; echo error $i >&2; i=$((i+1)); sleep 0.1; done; exit 5";

fn start(fixture: &Fixture, arguments: &[&str]) -> Child {
    let mut command = fixture.migd("A", arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("migd starts")
}

/// Waits for the end, but not for ever.
fn wait(child: &mut Child) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        if let Some(status) = child.try_wait().expect("our child") {
            return status.code();
        }
        if Instant::now() > deadline {
            child.kill().expect("our child");
            child.wait().expect("our child");
            panic!("migd run does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn output_and_status_are_passed_on() {
    let fixture = Fixture::new();
    let run = |script: &str| {
        let output = fixture.migd("A", &["run", "--", "sh", "-c", script]).output().expect("migd starts");
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    assert_eq!(run("echo out; echo err >&2; exit 3"), (Some(3), "out\n".into(), "err\n".into()));
    assert_eq!(run("kill -TERM $$").0, Some(128 + 15));
    let (code, out, _) = run("seq 1 20000");
    let expected: String = (1..=20000).map(|number| format!("{number}\n")).collect();
    assert_eq!(code, Some(0));
    assert!(out == expected, "{} bytes instead of {}", out.len(), expected.len());
    let output = fixture.migd("A", &["run", "--", "/no/such/program"]).output().expect("migd starts");
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("/no/such/program"), "{}", text(&output.stderr));
}

#[test]
fn output_and_status_arrive_whole_when_the_job_moves_meanwhile() {
    let fixture = Fixture::new();
    let child = start(&fixture, &["run", "--name", "counter", "--", "sh", "-c", COUNT]);
    std::thread::sleep(Duration::from_millis(800));
    fixture.move_job("counter", "A", "B");
    std::thread::sleep(Duration::from_millis(800));
    fixture.move_job("counter", "B", "A");
    let output = child.wait_with_output().expect("our child");
    let expected = |word: &str| (0..60).map(|number| format!("{word} {number}\n")).collect::<String>();
    assert_eq!(text(&output.stdout), expected("line"));
    assert_eq!(text(&output.stderr), expected("error"));
    assert_eq!(output.status.code(), Some(5));
}

#[test]
fn ctrl_c_reaches_the_job_where_it_is() {
    let fixture = Fixture::new();
    let script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.05; done";
    for moved in [false, true] {
        let name = if moved { "moved" } else { "stayed" };
        let mut child = start(&fixture, &["run", "--name", name, "--", "sh", "-c", script]);
        let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut line = String::new();
        output.read_line(&mut line).expect("a pipe");
        assert_eq!(line, "ready\n");
        if moved {
            fixture.move_job(name, "A", "B");
        }
        interrupt(child.id());
        let code = wait(&mut child);
        let mut rest = String::new();
        output.read_to_string(&mut rest).expect("a pipe");
        assert_eq!((code, rest.as_str()), (Some(9), "caught\n"), "moved: {moved}");
    }
}
