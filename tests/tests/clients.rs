//! Unmodified clients under migd that connect out to a server in the client's namespace and are moved in mid-transfer.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::Duration;

use migd::api::Exit;
use sha2::{Digest, Sha256};
use tests::Fixture;
use tests::pattern::Pattern;
use tests::programs::{REDIS, REDIS_PORT};

fn must_have_ended_well(fixture: &Fixture, name: &str, node: &str) {
    let exit = fixture.wait_for_end(name);
    assert_eq!(exit, Exit::Code(0), "{}\n{}", fixture.logs(node, name), fixture.state_logs());
}

#[test]
fn curl_in_the_middle_of_a_download() {
    const SIZE: usize = 48 << 20;
    let fixture = Fixture::new();
    let server = SocketAddr::new(IpAddr::V4(fixture.client_address()), 8080);
    let listener = fixture.client().run(|| TcpListener::bind(server)).expect("a free port");
    // At a pace that leaves time for the moves; the last piece waits for them.
    let (moved, all_moved) = std::sync::mpsc::channel::<()>();
    let serving = std::thread::spawn(move || -> std::io::Result<[u8; 32]> {
        let (stream, _) = listener.accept()?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        while {
            line.clear();
            stream.read_line(&mut line)?
        } > 2
        {}
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\nConnection: close\r\n\r\n");
        stream.get_mut().write_all(head.as_bytes())?;
        let (mut pattern, mut hasher) = (Pattern::new(5), Sha256::new());
        for left in (0..SIZE / (256 << 10)).rev() {
            if left == 0 {
                // The other end goes when all are done, or when the test has failed.
                let _ = all_moved.recv();
            }
            let piece = pattern.take(256 << 10);
            hasher.update(&piece);
            stream.get_mut().write_all(&piece)?;
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(hasher.finalize().into())
    });
    let file = fixture.path("downloaded");
    let _ = fixture.run("A", "curl", &["curl", "--silent", "--show-error", "-o", &file, &format!("http://{server}/")]);
    for (from, to) in [("A", "B"), ("B", "A"), ("A", "B")] {
        std::thread::sleep(Duration::from_millis(500));
        fixture.move_job("curl", from, to);
    }
    drop(moved);
    must_have_ended_well(&fixture, "curl", "B");
    let sent = serving.join().expect("no panic").expect("the whole file was sent");
    let received: [u8; 32] = Sha256::digest(std::fs::read(&file).expect("the file")).into();
    assert_eq!(sent, received);
}

#[test]
fn redis_cli_in_the_middle_of_its_work() {
    const COUNT: usize = 40_000;
    let fixture = Fixture::new();
    let _server = fixture.start_in_client(&REDIS);
    let address = fixture.client_address().to_string();
    fixture.wait_until_it_serves("redis", SocketAddr::new(IpAddr::V4(fixture.client_address()), REDIS_PORT));
    let count = COUNT.to_string();
    let _ = fixture.run("A", "cli", &["redis-cli", "-h", &address, "-r", &count, "INCR", "counter"]);
    for (from, to) in [("A", "B"), ("B", "A")] {
        std::thread::sleep(Duration::from_millis(200));
        fixture.move_job("cli", from, to);
    }
    must_have_ended_well(&fixture, "cli", "A");
    let output = fixture.migd_output("A", &["logs", "cli"]);
    let expected: String = (1..=COUNT).map(|number| format!("{number}\n")).collect();
    assert!(output == expected, "{} bytes instead of {}", output.len(), expected.len());
}

#[test]
fn iperf3_in_the_middle_of_a_run_in_each_direction() {
    let fixture = Fixture::new();
    let address = fixture.client_address().to_string();
    let _server = fixture.start_in_client(&["iperf3", "-s"]);
    std::thread::sleep(Duration::from_millis(300));
    for (name, reverse) in [("iperf-send", None), ("iperf-receive", Some("-R"))] {
        // Several times what the moves take, since nothing but its time ends it well.
        let mut argv = vec!["iperf3", "-c", &address, "-t", "5", "-J"];
        argv.extend(reverse);
        let _ = fixture.run("A", name, &argv);
        for (from, to) in [("A", "B"), ("B", "A"), ("A", "B")] {
            std::thread::sleep(Duration::from_millis(200));
            fixture.move_job(name, from, to);
        }
        must_have_ended_well(&fixture, name, "B");
        let text = fixture.migd_output("B", &["logs", name]);
        let result: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let received = result["end"]["sum_received"]["bytes"].as_f64().unwrap_or(0.0);
        assert!(result["error"].is_null() && received > 1e6, "{name}: {received} bytes: {}", result["error"]);
    }
}
