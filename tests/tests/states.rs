//! A connection in each TCP state is moved and ends as it would have ended without the move. The peer is always the
//! kernel's TCP in the client's namespace.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use migd::demo::wire::Watch;
use socket2::{Domain, Socket, Type};
use sys::capture::Sieve;
use tests::Fixture;
use tests::pattern::Pattern;
use tests::remote::Remote;
use tests::wire::{self, Wire};

/// A fixture with the server listening.
fn listening(backlog: u32) -> (Fixture, Remote) {
    let fixture = Fixture::new();
    let mut remote = Remote::start(&fixture);
    remote.listen(backlog);
    (fixture, remote)
}

/// A fixture with an established connection that the server has accepted.
fn established() -> (Fixture, Remote, TcpStream, String) {
    let (fixture, mut remote) = listening(8);
    let stream = fixture.connect(remote.server).expect("it listens");
    let number = remote.accept();
    (fixture, remote, stream, number)
}

/// Moves the server from A to B with a watch on the client's link that must not see a reset: its process first alone and back, then
/// with its sockets.
fn move_without_reset(fixture: &Fixture) {
    let watch = watch(fixture);
    fixture.move_process(Remote::JOB, "A", "B");
    fixture.move_process(Remote::JOB, "B", "A");
    fixture.move_job(Remote::JOB, "A", "B");
    no_reset(watch);
}

fn watch(fixture: &Fixture) -> Watch {
    Watch::start(&fixture.client(), Sieve::Refusals).expect("a capture")
}

fn no_reset(watch: Watch) {
    let seen = watch.stop().expect("a capture");
    assert_eq!((seen.frames, seen.lost), (0, 0), "{:x?}", seen.samples);
}

/// Bytes both ways and an orderly end: what any healthy connection can do.
fn talk_and_end(remote: &mut Remote, stream: &mut TcpStream, number: &str) {
    stream.write_all(&Pattern::new(21).take(100_000)).expect("the connection takes bytes");
    remote.must_receive(number, &mut Pattern::new(21), 100_000);
    remote.begin(&format!("send {number} 100000 22"));
    Pattern::new(22).check_from(stream, 100_000).expect("the connection brings bytes");
    remote.answer("send");
    stream.shutdown(Shutdown::Write).expect("it is connected");
    remote.must_be_at_the_end(number);
    remote.ask(&format!("close {number}"));
    assert_eq!(stream.read(&mut [0]).expect("an orderly end"), 0);
}

#[test]
fn established_and_idle() {
    let (fixture, mut remote, mut stream, number) = established();
    move_without_reset(&fixture);
    talk_and_end(&mut remote, &mut stream, &number);
}

#[test]
fn in_the_accept_queue_with_data() {
    let (fixture, mut remote) = listening(8);
    let mut first = fixture.connect(remote.server).expect("it listens");
    let mut second = fixture.connect(remote.server).expect("it listens");
    first.write_all(&Pattern::new(1).take(50_000)).expect("the connection takes bytes");
    second.write_all(&Pattern::new(2).take(10)).expect("the connection takes bytes");
    move_without_reset(&fixture);
    let number = remote.accept();
    assert_eq!(remote.ask(&format!("name {number}")), first.local_addr().expect("bound").to_string());
    remote.must_receive(&number, &mut Pattern::new(1), 50_000);
    talk_and_end(&mut remote, &mut first, &number);
    let number = remote.accept();
    remote.must_receive(&number, &mut Pattern::new(2), 10);
    talk_and_end(&mut remote, &mut second, &number);
}

#[test]
fn in_the_syn_queue() {
    let (fixture, mut remote) = listening(8);
    // Node A sends what is for the client to nobody: the SYN arrives, the SYN-ACK does not.
    let client = fixture.client_address().to_string();
    let nobody = ["neigh", "replace", &client, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent"];
    in_node(&fixture, "A", &nobody);
    let server = remote.server;
    let namespace = fixture.client();
    let connecting =
        std::thread::spawn(move || namespace.run(|| TcpStream::connect_timeout(&server, Duration::from_secs(15))));
    // The request waits on A when its SYN-ACK was seen going nowhere.
    let before = syn_ack(&fixture, "A", server);
    assert!(!connecting.is_finished());
    let (outcome, after) = std::thread::scope(|scope| {
        let seen = scope.spawn(|| syn_ack(&fixture, "B", server));
        // The control connection is deaf on A as well, so the move is all that helps.
        let outcome = fixture.lab.move_job(Remote::JOB, "A", "B");
        (outcome, seen.join().expect("the capture"))
    });
    outcome.unwrap_or_else(|error| panic!("{error:#}\n{}", fixture.state_logs()));
    assert_eq!(before, after, "the initial sequence number of the answer: the request was not moved but made anew");
    let mut stream = connecting.join().expect("no panic").expect("the connection is made after the move");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket");
    let number = remote.accept();
    talk_and_end(&mut remote, &mut stream, &number);
}

/// Runs `ip` in a node.
fn in_node(fixture: &Fixture, node: &str, arguments: &[&str]) {
    let namespace = fixture.lab.namespace(node).expect("the node");
    let output = namespace.run(|| std::process::Command::new("ip").args(arguments).output()).expect("ip runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Waits for a SYN-ACK of the server's on a node's uplink and returns its sequence number.
fn syn_ack(fixture: &Fixture, node: &str, server: SocketAddr) -> u32 {
    let std::net::IpAddr::V4(address) = server.ip() else { unreachable!("the lab's jobs have IPv4 addresses") };
    let namespace = fixture.lab.namespace(node).expect("the node");
    let open = || {
        let link = sys::netlink::Netlink::open()?.link("eth0")?.index;
        sys::capture::Capture::open(link, Sieve::Host(address))
    };
    let capture = namespace.run(open).expect("a capture");
    let deadline = Instant::now() + Duration::from_secs(15);
    let mut frame = [0; 128];
    while Instant::now() < deadline {
        match capture.next(&mut frame).expect("a capture") {
            Some(length) => {
                // Ethernet, then IPv4 without options, then TCP.
                let tcp = &frame[34..length.min(frame.len())];
                let from_server = frame[26..30] == address.octets();
                let port = u16::from_be_bytes([tcp[0], tcp[1]]);
                if frame[23] == 6 && from_server && port == server.port() && tcp[13] & 0x12 == 0x12 {
                    return u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
                }
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    panic!("no SYN-ACK on node {node}");
}

#[test]
fn established_with_full_buffers_both_ways_and_stopped_readers() {
    let (fixture, mut remote, mut stream, number) = established();
    let to_client: usize = remote.ask(&format!("fill {number} 31")).parse().expect("a number");
    let to_server = fill(&mut stream, 32);
    assert!(to_client > 64 << 10 && to_server > 64 << 10, "{to_client} {to_server}");
    move_without_reset(&fixture);
    // Both read on: every byte has to be there, once, in order.
    Pattern::new(31).check_from(&mut stream, to_client).expect("what the server wrote");
    remote.must_receive(&number, &mut Pattern::new(32), to_server);
    talk_and_end(&mut remote, &mut stream, &number);
}

/// Writes the pattern until the socket takes no more for a second; returns how many bytes it took.
fn fill(stream: &mut TcpStream, seed: u64) -> usize {
    stream.set_write_timeout(Some(Duration::from_secs(1))).expect("a socket");
    let mut pattern = Pattern::new(seed);
    let mut pending = Vec::new();
    let mut taken = 0;
    loop {
        if pending.is_empty() {
            pending = pattern.take(4096);
        }
        match stream.write(&pending) {
            Ok(count) => {
                taken += count;
                pending.drain(..count);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
            Err(error) => panic!("{error}"),
        }
    }
    stream.set_write_timeout(Some(Duration::from_secs(20))).expect("a socket");
    taken
}

#[test]
fn half_closed_by_the_client() {
    let (fixture, mut remote, mut stream, number) = established();
    stream.write_all(&Pattern::new(41).take(1000)).expect("the connection takes bytes");
    stream.shutdown(Shutdown::Write).expect("it is connected");
    wait_until_the_peer_has_all(&stream);
    move_without_reset(&fixture);
    remote.must_receive(&number, &mut Pattern::new(41), 1000);
    remote.must_be_at_the_end(&number);
    remote.begin(&format!("send {number} 200000 42"));
    Pattern::new(42).check_from(&mut stream, 200_000).expect("the other direction is open");
    remote.answer("send");
    remote.ask(&format!("close {number}"));
    assert_eq!(stream.read(&mut [0]).expect("an orderly end"), 0);
}

#[test]
fn half_closed_by_the_server() {
    let (fixture, mut remote, mut stream, number) = established();
    remote.ask(&format!("send {number} 1000 43"));
    remote.ask(&format!("shutdown {number}"));
    Pattern::new(43).check_from(&mut stream, 1000).expect("sent before the end");
    assert_eq!(stream.read(&mut [0]).expect("an orderly end"), 0);
    move_without_reset(&fixture);
    stream.write_all(&Pattern::new(44).take(200_000)).expect("this direction is open");
    stream.shutdown(Shutdown::Write).expect("it is connected");
    remote.must_receive(&number, &mut Pattern::new(44), 200_000);
    remote.must_be_at_the_end(&number);
}

#[test]
fn fin_wait_2_without_a_program() {
    let (fixture, mut remote, mut stream, number) = established();
    let watch = watch(&fixture);
    remote.ask(&format!("close {number}"));
    assert_eq!(stream.read(&mut [0]).expect("an orderly end"), 0);
    fixture.move_job(Remote::JOB, "A", "B");
    // The peer ends its direction: the FIN has to be acknowledged by the node where the connection is now.
    stream.shutdown(Shutdown::Write).expect("it is connected");
    wait_until_the_peer_has_all(&stream);
    no_reset(watch);
}

/// A connection that the server has closed first and that has ended both ways; returns the client's end.
fn in_time_wait(fixture: &Fixture, remote: &mut Remote, mut stream: TcpStream, number: &str) -> SocketAddr {
    let own = stream.local_addr().expect("bound");
    remote.ask(&format!("close {number}"));
    assert_eq!(stream.read(&mut [0]).expect("an orderly end"), 0);
    stream.shutdown(Shutdown::Write).expect("it is connected");
    wait_until_the_peer_has_all(&stream);
    drop(stream);
    fixture.move_job(Remote::JOB, "A", "B");
    own
}

#[test]
fn time_wait_answers_a_late_fin() {
    let (fixture, mut remote, stream, number) = established();
    let own = stream.local_addr().expect("bound");
    let link = Wire::open(&fixture, own.port(), remote.server);
    in_time_wait(&fixture, &mut remote, stream, &number);
    let fin = link.last_with(wire::FIN, own).expect("the client's FIN passed its link");
    // As if the acknowledgement had been lost: the FIN comes once more. Who knows the connection acknowledges it, who
    // does not sends a reset.
    link.send_again(&fixture, &fin, "B");
    let answer = link.next_from(remote.server).expect("an answer to the late FIN");
    assert_eq!(wire::flags(&answer) & (wire::ACK | wire::RST), wire::ACK, "{answer:x?}");
}

#[test]
fn time_wait_gives_way_to_a_new_connection_from_the_same_port() {
    let (fixture, mut remote, stream, number) = established();
    let watch = watch(&fixture);
    let own = in_time_wait(&fixture, &mut remote, stream, &number);
    // As Linux lets it (RFC 6191).
    let mut stream = connect_from(&fixture, own, remote.server);
    let number = remote.accept();
    talk_and_end(&mut remote, &mut stream, &number);
    no_reset(watch);
}

/// Connects from a certain port.
fn connect_from(fixture: &Fixture, own: SocketAddr, server: SocketAddr) -> TcpStream {
    let connect = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&own.into())?;
        socket.connect_timeout(&server.into(), Duration::from_secs(10))?;
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(socket.into())
    };
    fixture.client().run(connect).unwrap_or_else(|error| panic!("no connection from {own}: {error}"))
}

/// Waits until the kernel's socket has nothing unacknowledged, its FIN included.
fn wait_until_the_peer_has_all(stream: &TcpStream) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let unsent = sys::fds::sockets::memory_unread(stream.as_fd()).expect("a socket");
        if unsent == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "{unsent} bytes are not acknowledged");
        std::thread::sleep(Duration::from_millis(2));
    }
}
