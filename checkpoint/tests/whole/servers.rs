//! Servers as they come, moved several times while somebody asks them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use checkpoint::{Event, ExitStatus};
use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{Hop, Job, Outcome, Precopy, trial, wait_event};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("servers::redis_twenty_times_with_precopy", redis),
        trial("servers::memcached_several_times", memcached),
        trial("servers::nginx_with_workers_several_times", nginx),
        trial("servers::go_program_several_times", go),
    ]
}

fn redis() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("redis.sock");
    let socket = socket.to_str().ok_or("a path that isn't UTF-8")?;
    let directory = scratch.path().to_str().ok_or("a path that isn't UTF-8")?;
    let arguments = [
        "redis-server",
        "--port",
        "0",
        "--unixsocket",
        socket,
        "--save",
        "",
        "--dir",
        directory,
        "--enable-debug-command",
        "yes",
    ];
    let mut job = Job::start(&arguments)?;
    let ask = |arguments: &[&str]| -> Result<String, Box<dyn std::error::Error>> {
        let output = std::process::Command::new("redis-cli").args(["-s", socket]).args(arguments).output()?;
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let start = Instant::now();
    while ask(&["ping"])? != "PONG" {
        ensure!(start.elapsed() < Duration::from_secs(30), "redis doesn't answer");
        std::thread::sleep(Duration::from_millis(20));
    }
    let size = std::env::var("CHECKPOINT_REDIS_KEYS").unwrap_or_else(|_| "200000".into());
    ask(&["debug", "populate", &size, "key", "100"])?;
    let digest = ask(&["debug", "digest"])?;
    for round in 1..=20 {
        let hop = hop_when_alone(&mut job, Precopy::Rounds(2))?;
        println!("redis hop {round}: {hop:?}");
        ensure!(ask(&["incr", "hops"])? == round.to_string(), "a hop was lost");
        ask(&["del", "other"])?;
    }
    ask(&["del", "hops"])?;
    ensure!(ask(&["debug", "digest"])? == digest, "the data changed");
    Ok(())
}

/// The end of the last question's connection, which reaches out of the job, may not have come to the server's notice yet.
fn hop_when_alone(job: &mut Job, precopy: Precopy) -> Result<Hop, Box<dyn std::error::Error>> {
    let start = Instant::now();
    loop {
        match job.hop(precopy) {
            Err(error) if error.to_string().contains("unix socket") && start.elapsed() < Duration::from_secs(60) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// Hops a server, asking it something over its Unix socket before and after each hop.
fn serve(job: &mut Job, hops: u32, ask: impl Fn() -> Result<(), Box<dyn std::error::Error>>) -> Outcome {
    let start = Instant::now();
    while let Err(error) = ask() {
        ensure!(start.elapsed() < Duration::from_secs(30), "it doesn't answer: {error}");
        std::thread::sleep(Duration::from_millis(20));
    }
    for hop in 1..=hops {
        hop_when_alone(job, Precopy::Rounds(hop % 3))?;
        ask().map_err(|error| format!("after hop {hop}: {error}"))?;
    }
    Ok(())
}

fn exchange(socket: &Path, request: &str, wanted: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    while !String::from_utf8_lossy(&answer).contains(wanted) {
        let mut some = [0; 4096];
        let count = stream.read(&mut some)?;
        ensure!(count > 0, "it answered {}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&some[..count]);
    }
    Ok(())
}

fn memcached() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("socket");
    let path = socket.to_str().ok_or("a path that isn't UTF-8")?;
    let mut job = Job::start(&["memcached", "-u", "root", "-s", path, "-t", "4"])?;
    serve(&mut job, 5, || exchange(&socket, "set a 0 0 5\r\nhello\r\nget a\r\n", "hello\r\nEND"))
}

fn nginx() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("socket");
    let configuration = scratch.path().join("nginx.conf");
    let root = scratch.path().display();
    let text = format!(
        "daemon off; worker_processes 2; pid {root}/pid; error_log {root}/error.log; user root;\n\
         events {{ }}\nhttp {{ access_log off; server {{ listen unix:{root}/socket; location / {{ return 200 \"worker $pid\"; }} }} }}\n"
    );
    std::fs::write(&configuration, text)?;
    let path = configuration.to_str().ok_or("a path that isn't UTF-8")?;
    let mut job = Job::start(&["nginx", "-c", path])?;
    serve(&mut job, 5, || exchange(&socket, "GET / HTTP/1.0\r\n\r\n", "worker "))?;
    job.sandbox.signal_root(sys::libc::SIGQUIT)?;
    let event = wait_event(&mut job.sandbox, |event| matches!(event, Event::RootExited { .. }))?;
    ensure!(event == Event::RootExited { status: ExitStatus::Code(0) }, "ended with {event:?}");
    Ok(())
}

const GO: &str = r#"
package main

import ("fmt"; "os"; "runtime"; "sync/atomic"; "time")

func main() {
	var count int64
	for i := 0; i < 8; i++ {
		go func() {
			for {
				_ = make([]byte, 100000)
				atomic.AddInt64(&count, 1)
				time.Sleep(time.Millisecond)
			}
		}()
	}
	ticker := time.NewTicker(10 * time.Millisecond)
	last := int64(0)
	for line := 1; ; line++ {
		<-ticker.C
		now := atomic.LoadInt64(&count)
		if now < last {
			os.Exit(9)
		}
		last = now
		if line%20 == 0 {
			runtime.GC()
		}
		fmt.Println(line, now)
	}
}
"#;

fn go() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let source = scratch.path().join("main.go");
    std::fs::write(&source, GO)?;
    let program = scratch.path().join("program");
    let built = std::process::Command::new("go")
        .args(["build", "-o"])
        .args([&program, &source])
        .env("CGO_ENABLED", "0")
        .env("HOME", scratch.path())
        .status();
    if !built.is_ok_and(|status| status.success()) {
        println!("no go compiler: skipped");
        return Ok(());
    }
    let mut job = Job::start(&[program.to_str().ok_or("a path that isn't UTF-8")?])?;
    let mut expected = 1;
    for hop in 0..10 {
        for _ in 0..10 {
            let line = job.line()?;
            ensure!(line.starts_with(&format!("{expected} ")), "line {expected} is {line:?}");
            expected += 1;
        }
        job.hop(Precopy::Rounds(hop % 3))?;
    }
    ensure!(job.line()?.starts_with(&format!("{expected} ")), "it doesn't go on");
    Ok(())
}
