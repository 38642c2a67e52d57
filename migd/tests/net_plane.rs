//! The net plane with real programs, without the rest of migd: `examples/netplane.rs` runs each program in a network namespace made
//! for the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Two namespaces joined by a link, taken down on drop: a node, in which jobs run, and a client beside it.
struct Lab {
    node: String,
    client: String,
}

impl Lab {
    fn new(test: &str) -> Lab {
        let lab = Lab {
            node: format!("migd-net-{test}-{}-n", std::process::id()),
            client: format!("migd-net-{test}-{}-c", std::process::id()),
        };
        let (node, client) = (lab.node.as_str(), lab.client.as_str());
        for name in [node, client] {
            ip(&["netns", "add", name]);
            ip(&["-n", name, "link", "set", "lo", "up"]);
        }
        ip(&["link", "add", "veth0", "netns", node, "type", "veth", "peer", "name", "veth0", "netns", client]);
        for (name, address) in [(node, "10.99.0.1/24"), (client, "10.99.0.2/24")] {
            ip(&["-n", name, "addr", "add", address, "dev", "veth0"]);
            ip(&["-n", name, "link", "set", "veth0", "up"]);
        }
        ip(&["-n", client, "route", "add", "10.77.0.0/16", "via", "10.99.0.1"]);
        // For errors of a router, which the node is to the client and to its jobs: all but 10.98.3.0/24, of which it knows nothing.
        ip(&["-n", client, "route", "add", "10.98.0.0/16", "via", "10.99.0.1"]);
        ip(&["-n", node, "route", "add", "unreachable", "10.98.1.0/24"]);
        ip(&["-n", node, "route", "add", "blackhole", "10.98.4.0/24"]);
        // The second: a router that says of each packet what is wrong with it, not only once a second.
        let settings = ["-qw", "net.ipv4.ip_forward=1", "net.ipv4.icmp_ratelimit=0"];
        let status = lab.command(node, Path::new("sysctl"), &settings).status();
        assert!(status.expect("sysctl").success());
        lab
    }

    fn command(&self, namespace: &str, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(program).args(arguments).stdin(Stdio::null());
        command
    }

    /// A program under the plane, with the addresses 10.77.0.5 and fd77::5.
    fn job(&self, program: &[&str]) -> Command {
        self.command(&self.node, &netplane(), &[&["10.77.0.5,fd77::5", "mig5"], program].concat())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in [&self.node, &self.client] {
            // Nothing is to be done about a failure here, and a panic would hide the one that led here.
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().expect("run ip");
    assert!(status.success(), "ip {arguments:?}: {status}");
}

/// Cargo builds examples next to the tests.
fn netplane() -> PathBuf {
    let test = std::env::current_exe().expect("own path");
    let path = test.parent().and_then(Path::parent).expect("target directory").join("examples/netplane");
    assert!(path.exists(), "{} is missing: cargo build -p migd --examples", path.display());
    path
}

fn program(name: &str) -> String {
    format!("{}/tests/programs/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Runs to the end, or fails the test.
fn finish(mut command: Command, patience: Duration) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    let pid = child.id();
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(patience) {
        Ok(output) => output.expect("wait"),
        Err(_) => {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
            let _ = thread.join();
            panic!("{command:?} took longer than {patience:?}");
        }
    }
}

fn text(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What programs can see of sockets is what they see of the kernel's, also when all sockets are frozen and thawed between
/// any two steps.
#[test]
fn sockets_behave_like_the_kernels() {
    let lab = Lab::new("semantics");
    let script = program("semantics.py");
    let arguments = [script.as_str(), "127.0.0.1"];
    let patience = Duration::from_secs(400);
    let native = text(&finish(lab.command(&lab.client, Path::new("python3"), &arguments), patience));
    let job = ["python3", &script, "127.0.0.1"];
    let plane = text(&finish(lab.job(&job), patience));
    assert_same(&native, &plane, "under the net plane");
    let mut swapped = lab.job(&job);
    swapped.env("NETPLANE_SWAP", "1");
    let swapped = text(&finish(swapped, patience));
    assert_same(&native, &swapped, "with every socket frozen and thawed at each step");
    let mut routed = lab.job(&job);
    routed.env("NETPLANE_SWAP", "1").env("NETPLANE_HOME", "1");
    let routed = text(&finish(routed, patience));
    let native = without_urgent(&native);
    assert_same(&native, &routed, "with the sockets left at home, taken on from there and brought along in turn");
}

/// The lines of all cases but those about urgent data, which doesn't reach a job whose sockets are at home.
fn without_urgent(lines: &str) -> String {
    let mut skipped = false;
    let kept = lines.lines().filter(|line| {
        if !line.starts_with(' ') {
            skipped = line.contains("urgent");
        }
        !skipped
    });
    kept.map(|line| format!("{line}\n")).collect()
}

fn assert_same(expected: &str, found: &str, how: &str) {
    let mut case = "";
    for (expected, found) in expected.lines().zip(found.lines()) {
        if !expected.starts_with(' ') {
            case = expected;
        }
        assert_eq!(found, expected, "case {case}, {how}");
    }
    assert_eq!(found.lines().count(), expected.lines().count(), "{how}: as many lines");
}

/// Memory that is lent to a program's socket isn't written again before the program has read it.
#[test]
fn readers_get_what_was_sent() {
    read_in_all_ways("readers", &["all", "odd", "peek", "slow", "late"]);
}

/// Nor while it is in a pipe that a program spliced it into.
#[test]
fn readers_that_splice_get_what_was_sent() {
    read_in_all_ways("splice", &["all", "splice", "slow"]);
    read_in_all_ways("sendfile", &["all", "sendfile", "late"]);
}

fn read_in_all_ways(test: &str, kinds: &[&str]) {
    const BYTES: &str = "40000000";
    let lab = Lab::new(test);
    let script = program("readers.py");
    let mut command = lab.job(&[&["python3", &script, "serve", "7100"], kinds].concat());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("spawn");
    let mut output = std::io::BufReader::new(child.stdout.take().expect("piped"));
    let _server = Running(child);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut output, &mut line).expect("a line");
    assert_eq!(line.trim(), "serving");
    let feed = [&[script.as_str(), "feed", "10.77.0.5", "7100", BYTES], kinds].concat();
    text(&finish(lab.command(&lab.client, Path::new("python3"), &feed), Duration::from_secs(120)));
    let mut said = String::new();
    std::io::Read::read_to_string(&mut output, &mut said).expect("what the readers say");
    let expected: String = kinds.iter().map(|kind| format!("{kind} {BYTES} bytes\n")).collect();
    assert_eq!(said, expected);
}

/// Every byte comes back, whatever connections do, with kernel TCP on the other side.
#[test]
fn every_byte_comes_back() {
    let lab = Lab::new("stress");
    let script = program("stress.py");
    let patience = Duration::from_secs(120);
    {
        let mut job = lab.job(&["python3", &script, "serve", "7777"]);
        job.env("NETPLANE_PREVIEW", "1");
        let _server = serving(job);
        let drive = [script.as_str(), "drive", "10.77.0.5", "7777", "1", "200"];
        let driven = finish(lab.command(&lab.client, Path::new("python3"), &drive), patience);
        assert!(driven.status.success(), "{}", String::from_utf8_lossy(&driven.stdout));
    }
    let serve = [script.as_str(), "serve", "7777"];
    let _server = serving(lab.command(&lab.client, Path::new("python3"), &serve));
    // The first job's device goes with its process, a moment later.
    let until = Instant::now() + Duration::from_secs(10);
    while lab_has_device(&lab) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    let driven = finish(lab.job(&["python3", &script, "drive", "10.99.0.2", "7777", "2", "200"]), patience);
    assert!(driven.status.success(), "{}", String::from_utf8_lossy(&driven.stdout));
}

/// What a move tells of the sockets before its freeze doesn't depend on their programs' ends, which the programs go on using: with
/// unread bytes in it, one may be read the next moment, or be on its way from process to process as here.
#[test]
fn sockets_in_use_are_told() {
    const PASS_ON: &str = "
import select, socket, time
listener = socket.create_server(('', 7300))
print('serving', flush=True)
connection = listener.accept()[0]
select.select([connection], [], [])
here, there = socket.socketpair()
socket.send_fds(here, [b'-'], [connection.fileno()])
connection.close()
time.sleep(0.3)
connection = socket.socket(fileno=socket.recv_fds(there, 1, 1)[1][0])
connection.sendall(connection.recv(100))
";
    let lab = Lab::new("told");
    let mut job = lab.job(&["python3", "-c", PASS_ON]);
    job.env("NETPLANE_PREVIEW", "1");
    let _server = serving(job);
    let client = sys::netns::NetNamespace::open_named(&lab.client).expect("the client's namespace");
    let connect = || connect_patiently("10.77.0.5:7300".parse().expect("an address"));
    echo(&mut client.run(connect).expect("connect"));
}

/// Who is connected is served on in a flood of segments from nowhere, and who comes anew gets in.
#[test]
fn a_flood_keeps_nobody_out() {
    const ECHO: &str = "
import socket, threading
def serve(connection):
    while data := connection.recv(100):
        connection.sendall(data)
listener = socket.create_server(('', 7200))
print('serving', flush=True)
while True:
    threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()
";
    let lab = Lab::new("flood");
    ip(&["-n", &lab.node, "route", "add", "198.18.0.0/15", "via", "10.99.0.2"]);
    let _server = serving(lab.job(&["python3", "-c", ECHO]));

    let client = sys::netns::NetNamespace::open_named(&lab.client).expect("the client's namespace");
    let connect = || client.run(|| connect_patiently("10.77.0.5:7200".parse().expect("an address")));
    let mut before = connect().expect("connect without a flood");
    echo(&mut before);
    let script = program("flood.py");
    let flood = lab.command(&lab.client, Path::new("python3"), &[&script, "10.77.0.5", "7200"]).spawn().expect("spawn");
    let flood = Running(flood);
    let until = Instant::now() + Duration::from_secs(60);
    while packets_to_job(&lab) < 20_000 {
        assert!(Instant::now() < until, "the flood doesn't reach the job");
        std::thread::sleep(Duration::from_millis(20));
    }
    for _ in 0..5 {
        echo(&mut before);
        echo(&mut connect().expect("connect in a flood"));
    }
    drop(flood);
    echo(&mut before);
    echo(&mut connect().expect("connect after the flood"));
}

/// Starts a server and waits until it says that it serves.
fn serving(mut command: Command) -> Running {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("spawn");
    let output = child.stdout.take().expect("piped");
    let running = Running(child);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).expect("a line");
    assert_eq!(line.trim(), "serving");
    running
}

fn connect_patiently(address: std::net::SocketAddr) -> std::io::Result<std::net::TcpStream> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let stream = std::net::TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn echo(stream: &mut std::net::TcpStream) {
    use std::io::{Read, Write};
    let mut answer = [0; 5];
    stream.write_all(b"hello").expect("send");
    stream.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"hello");
}

/// Packets that went into the job's device or were kept out of it.
fn packets_to_job(lab: &Lab) -> u64 {
    let script = "cat /sys/class/net/mig5/statistics/tx_packets /sys/class/net/mig5/statistics/tx_dropped";
    let output = lab.command(&lab.node, Path::new("sh"), &["-c", script]).output().expect("run sh");
    String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| line.parse::<u64>().ok()).sum()
}

fn lab_has_device(lab: &Lab) -> bool {
    let shown = Command::new("ip").args(["-n", &lab.node, "link", "show", "mig5"]).output().expect("run ip");
    shown.status.success()
}
