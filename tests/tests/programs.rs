//! Unmodified servers, each moved five times there and back under load from outside: nothing may break and every byte
//! must be right.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use migd::api::Exit;
use tests::fixture::text;
use tests::iperf::must_have_flowed;
use tests::load::{echo, http, memcached, redis};
use tests::programs::{nginx_configuration, python_echo, shells, static_go_echo, static_rust_echo, write_pattern};
use tests::{Fixture, Load};

const ROUND_TRIPS: usize = 5;
const PORT: u16 = 7000;

/// Moves a server there and back under load.
fn survives(fixture: &Fixture, name: &str, load: Load) {
    load.must_progress();
    let mut failed = None;
    for hop in 0..ROUND_TRIPS * 2 {
        let (from, to) = if hop % 2 == 0 { ("A", "B") } else { ("B", "A") };
        if let Err(error) = fixture.lab.move_job(name, from, to) {
            failed = Some(format!("move {}: {error:#}\n{}", hop + 1, fixture.state_logs()));
            break;
        }
        if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| load.must_progress())) {
            let reason = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            failed = Some(format!("after move {}: {reason}", hop + 1));
            break;
        }
    }
    let outcome = load.stop();
    assert!(failed.is_none(), "{}\n{outcome:?}\n{}", failed.unwrap_or_default(), fixture.state_logs());
    let steps = outcome.unwrap_or_else(|errors| panic!("{errors}\n{}", fixture.logs("A", name)));
    assert!(steps > 0);
}

fn echo_survives(fixture: &Fixture, name: &str, argv: &[&str]) {
    let server = fixture.serve(name, argv, PORT);
    let load = Load::start(|| fixture.client(), 4, move |number, shared| echo(server, number + 1, shared));
    survives(fixture, name, load);
}

fn http_load(fixture: &Fixture, server: SocketAddr) -> Load {
    Load::start(|| fixture.client(), 2, move |_, shared| http(server, "/file", 9, 3 << 20, shared))
}

#[test]
fn redis_server() {
    let fixture = Fixture::new();
    let server = fixture.serve_redis();
    let load = Load::start(|| fixture.client(), 4, move |number, shared| redis(server, number + 1, shared));
    survives(&fixture, "redis", load);
}

#[test]
fn memcached_with_its_threads() {
    let fixture = Fixture::new();
    let argv = ["memcached", "-u", "root", "-l", "0.0.0.0", "-p", &PORT.to_string(), "-U", "0"];
    let server = fixture.serve("memcached", &argv, PORT);
    let load = Load::start(|| fixture.client(), 4, move |number, shared| memcached(server, number + 1, shared));
    survives(&fixture, "memcached", load);
}

#[test]
fn python_http_server() {
    let fixture = Fixture::new();
    write_pattern(fixture.path("file"), 9, 3 << 20);
    let argv = ["python3", "-m", "http.server", &PORT.to_string(), "--directory", &fixture.path("")];
    let server = fixture.serve("http", &argv, PORT);
    let load = http_load(&fixture, server);
    survives(&fixture, "http", load);
}

#[test]
fn python_asyncio_echo() {
    let fixture = Fixture::new();
    let script = python_echo(&fixture);
    echo_survives(&fixture, "asyncio", &["python3", &script, &PORT.to_string()]);
}

#[test]
fn static_threaded_rust_echo() {
    let fixture = Fixture::new();
    let program = static_rust_echo(&fixture);
    echo_survives(&fixture, "rust", &[&program, &PORT.to_string()]);
}

#[test]
fn static_go_echo_server() {
    let fixture = Fixture::new();
    let Some(program) = static_go_echo(&fixture) else {
        eprintln!("no Go on this machine: nothing was tested");
        return;
    };
    echo_survives(&fixture, "go", &[&program, &PORT.to_string()]);
}

#[test]
fn nginx_in_a_single_process() {
    let fixture = Fixture::new();
    write_pattern(fixture.path("file"), 9, 3 << 20);
    let configuration = nginx_configuration(&fixture, PORT);
    let argv = ["nginx", "-c", &configuration, "-g", "daemon off; master_process off;"];
    let server = fixture.serve("nginx", &argv, PORT);
    let load = http_load(&fixture, server);
    survives(&fixture, "nginx", load);
}

#[test]
fn nginx_that_made_itself_a_daemon_and_is_told_to_end() {
    let fixture = Fixture::new();
    write_pattern(fixture.path("file"), 9, 3 << 20);
    let configuration = nginx_configuration(&fixture, PORT);
    let server = fixture.serve("nginx", &["nginx", "-c", &configuration], PORT);
    let load = http_load(&fixture, server);
    survives(&fixture, "nginx", load);
    let _ = fixture.migd_output("B", &["kill", "nginx"]);
    assert_eq!(fixture.wait_for_end("nginx"), Exit::Code(0));
}

#[test]
fn server_in_the_background_of_a_shell_that_ends_while_it_moves() {
    let fixture = Fixture::new();
    let script = python_echo(&fixture);
    let command = format!("python3 {script} {PORT} & read line < {}; exit 7", fixture.path("end"));
    let fifo = std::process::Command::new("mkfifo").arg(fixture.path("end")).status().expect("mkfifo");
    assert!(fifo.success());
    let server = fixture.serve("echo", &["sh", "-c", &command], PORT);
    let load = Load::start(|| fixture.client(), 4, move |number, shared| echo(server, number + 1, shared));
    let told = std::thread::spawn({
        let end = fixture.path("end");
        move || {
            // Somewhere among the moves.
            std::thread::sleep(Duration::from_millis(500));
            std::fs::write(end, "now")
        }
    });
    survives(&fixture, "echo", load);
    told.join().expect("no panic").expect("the shell reads");
    let deadline = Instant::now() + Duration::from_secs(30);
    while !fixture.migd_output("A", &["inspect", "echo"]).contains("its first process has ended") {
        assert!(Instant::now() < deadline, "the shell does not end\n{}", fixture.state_logs());
        std::thread::sleep(Duration::from_millis(50));
    }
    // All that is left is killed, wherever it is.
    let _ = fixture.migd_output("B", &["kill", "-s", "KILL", "echo"]);
    assert_eq!(fixture.wait_for_end("echo"), Exit::Code(7));
}

/// Reads until what was read ends so.
fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut seen = String::new();
    let mut buffer = [0; 4096];
    while !seen.ends_with(end) {
        let length = stream.read(&mut buffer).unwrap_or_else(|error| panic!("{error} after {seen:?}"));
        assert!(length > 0, "the end after {seen:?}");
        seen.push_str(&text(&buffer[..length]));
    }
    seen
}

#[test]
fn shell_on_a_terminal_with_its_jobs() {
    let fixture = Fixture::new();
    let script = shells(&fixture);
    let server = fixture.serve("shells", &["python3", &script, &PORT.to_string()], PORT);
    let mut stream = fixture.connect(server).expect("it serves");
    let mut say = |line: &str, end: &str| {
        stream.write_all(line.as_bytes()).unwrap_or_else(|error| panic!("{line:?}: {error}"));
        read_until(&mut stream, end)
    };
    say("", "$ ");
    let terminal = say("tty\n", "$ ");
    assert!(terminal.contains("/dev/pts/"), "{terminal:?}");
    say("stty rows 33 cols 77\n", "$ ");
    let mut hops = 0;
    fixture.back_and_forth("shells", 3, |_| {
        hops += 1;
        match hops % 2 {
            // It moves with a line half typed, and with a job that is stopped, once out of its parent's sight.
            1 => {
                say("cat\n", "cat\r\n");
                say("one\n", "one\r\none\r\n");
                let stopped = say("\x1a", "$ ");
                assert!(stopped.contains("Stopped"), "{stopped:?}");
                say("ec", "ec");
            }
            _ => {
                assert_eq!(say("ho $((6 * 7))\n", "$ "), "ho $((6 * 7))\r\n42\r\n$ ");
                assert_eq!(say("tty\n", "$ "), terminal);
                assert_eq!(say("stty size\n", "$ "), "stty size\r\n33 77\r\n$ ");
                say("fg\n", "fg\r\ncat\r\n");
                say("two\n", "two\r\ntwo\r\n");
                assert_eq!(say("\x03", "$ "), "^C\r\n$ ");
            }
        }
    });
}

#[test]
fn iperf3_server_in_the_middle_of_a_run_in_each_direction() {
    let fixture = Fixture::new();
    // A connection that only looks whether it serves would be taken for a test that fails.
    let job = fixture.run("A", "iperf", &["iperf3", "-s", "-p", &PORT.to_string(), "--forceflush"]);
    let server = SocketAddr::new(job.address.into(), PORT);
    for (reverse, ready) in [(false, "(test #1)"), (true, "(test #2)")] {
        // Between two tests it has no listener.
        fixture.wait_for_log("A", "iperf", ready);
        let (address, port) = (server.ip().to_string(), PORT.to_string());
        let mut argv = vec!["iperf3", "-c", &address, "-p", &port, "-t", "6", "-J"];
        argv.extend(reverse.then_some("-R"));
        let client = fixture.start_in_client(&argv);
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(400));
            fixture.move_job("iperf", "A", "B");
            std::thread::sleep(Duration::from_millis(400));
            fixture.move_job("iperf", "B", "A");
        }
        let output = client.output();
        must_have_flowed(&output, &fixture, reverse);
    }
}
