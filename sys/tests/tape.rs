//! Tapes run by real programs. Needs root (or the right to trace).

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sys::Pid;
use sys::ptrace::{Seized, Stopped};
use sys::tape::{Error, Region, Tape};

/// A program that is killed at the end of a test, however it ends.
struct Victim(Child);

impl Victim {
    fn start(program: &str, arguments: &[&str]) -> Victim {
        Victim(Command::new(program).args(arguments).stdout(Stdio::piped()).spawn().expect("the program starts"))
    }

    fn python(script: &str) -> (Victim, BufReader<std::process::ChildStdout>) {
        let mut victim = Victim::start("python3", &["-c", script]);
        let output = BufReader::new(victim.0.stdout.take().expect("it was piped"));
        (victim, output)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).expect("a pid is an i32"))
    }

    fn stop(&self) -> Stopped {
        let seized = Seized::new(self.pid()).expect("it can be traced");
        seized.interrupt().expect("it is traced");
        seized.wait_stop(Duration::from_secs(5)).expect("it stops").expect("it is alive")
    }

    fn status(&self, key: &str) -> String {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it is alive");
        text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().trim().to_owned()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn line(output: &mut impl BufRead) -> String {
    let mut line = String::new();
    output.read_line(&mut line).expect("it is readable");
    line.trim().to_owned()
}

#[test]
fn results_and_data_come_back_and_results_can_be_arguments() {
    let victim = Victim::start("sleep", &["1000"]);
    let mut stopped = victim.stop();
    let region = Region::install(&mut stopped, 0x10_0000, true).expect("there is room");
    assert_eq!(region.start, 0x10_0000);

    let mut tape = Tape::new();
    let pid = tape.syscall(libc::SYS_getpid, &[]);
    let name = tape.string(b"tape-test");
    let memfd = tape.require(libc::SYS_memfd_create, &[name.into(), 0.into()]);
    let words = tape.data(b"hello, tape");
    tape.require(libc::SYS_pwrite64, &[memfd.into(), words.into(), 11.into(), 0.into()]);
    let back = tape.room(32);
    let count = tape.require(libc::SYS_pread64, &[memfd.into(), back.into(), 32.into(), 0.into()]);
    let closed = tape.require(libc::SYS_close, &[memfd.into()]);
    let again = tape.syscall(libc::SYS_close, &[memfd.into()]);
    let results = tape.run(&mut stopped, region).expect("it runs");
    assert_eq!(results.raw(pid), i64::from(victim.pid().as_raw()));
    assert_eq!(results.raw(count), 11);
    assert_eq!(results.data(back, 11), b"hello, tape");
    assert_eq!(results.raw(closed), 0);
    assert_eq!(results.get(again).expect_err("it is closed").raw_os_error(), Some(libc::EBADF));

    region.remove(&mut stopped).expect("it is mapped");
    stopped.release().expect("it is stopped");
    assert_eq!(victim.status("TracerPid:"), "0");
}

#[test]
fn required_call_that_fails_ends_the_run() {
    let victim = Victim::start("sleep", &["1000"]);
    let mut stopped = victim.stop();
    let region = Region::install(&mut stopped, 0x10_0000, true).expect("there is room");
    let mut tape = Tape::new();
    tape.syscall(libc::SYS_umask, &[0o27.into()]);
    tape.require(libc::SYS_dup, &[(-1).into()]);
    tape.syscall(libc::SYS_umask, &[0o77.into()]);
    match tape.run(&mut stopped, region) {
        Err(Error::Call { number, source, .. }) => {
            assert_eq!((number, source.raw_os_error()), (libc::SYS_dup, Some(libc::EBADF)));
        }
        other => panic!("{other:?}"),
    }
    drop(stopped);
    assert_eq!(victim.status("Umask:"), "0027");
}

#[test]
fn tape_longer_than_its_region_runs_in_parts() {
    let victim = Victim::start("sleep", &["1000"]);
    let mut stopped = victim.stop();
    let region = Region::install(&mut stopped, 0x10_0000, true).expect("there is room");
    let mut tape = Tape::new();
    let first = tape.require(libc::SYS_dup, &[1.into()]);
    for _ in 0..10_000 {
        tape.require(libc::SYS_getppid, &[]);
    }
    let last = tape.require(libc::SYS_close, &[first.into()]);
    let results = tape.run(&mut stopped, region).expect("it runs");
    assert_eq!(results.raw(last), 0);
}

/// A sleep goes on with the time that is left, a blocking read goes on, signal handlers and even an ignored SIGTRAP stay.
#[test]
fn program_notices_nothing() {
    let script = "
import signal, sys, time
signal.signal(signal.SIGTRAP, signal.SIG_IGN)
print('up', flush=True)
start = time.monotonic()
time.sleep(1)
print(round(time.monotonic() - start, 1), flush=True)
";
    let (victim, mut output) = Victim::python(script);
    assert_eq!(line(&mut output), "up");
    let ignored = victim.status("SigIgn:");
    assert_eq!(u64::from_str_radix(&ignored, 16).expect("a mask") >> (libc::SIGTRAP - 1) & 1, 1);
    for _ in 0..50 {
        let mut stopped = victim.stop();
        let region = Region::install(&mut stopped, 0x10_0000, true).expect("there is room");
        let mut tape = Tape::new();
        let pid = tape.syscall(libc::SYS_getpid, &[]);
        let results = tape.run(&mut stopped, region).expect("it runs");
        assert_eq!(results.raw(pid), i64::from(victim.pid().as_raw()));
        region.remove(&mut stopped).expect("it is mapped");
    }
    assert_eq!(victim.status("SigIgn:"), ignored);
    assert_eq!(line(&mut output), "1.0");
}

#[test]
fn child_of_a_tape_is_traced_and_let_go() {
    let victim = Victim::start("sleep", &["1000"]);
    let mut stopped = victim.stop();
    let region = Region::install(&mut stopped, 0x10_0000, false).expect("there is room");
    let mut tape = Tape::new();
    let fork = tape.require(libc::SYS_fork, &[]);
    let results = tape.run(&mut stopped, region).expect("it runs");
    let children = stopped.take_children();
    assert_eq!(children.len(), 1);
    assert_eq!(i64::from(children[0].as_raw()), results.raw(fork));
    let mut child =
        Seized::born(children[0]).wait_stop(Duration::from_secs(5)).expect("it stops").expect("it is alive");
    let mut tape = Tape::new();
    let pid = tape.syscall(libc::SYS_getpid, &[]);
    let results = tape.run(&mut child, region).expect("the child has the region");
    assert_eq!(results.raw(pid), i64::from(children[0].as_raw()));
    sys::process::kill(children[0], libc::SIGKILL).expect("it is alive");
    child.bury();
}
