//! Unmodified servers that speak UDP over IPv4 and IPv6, moved there and back under load: no datagram that reached the job is lost, none
//! comes twice.

use std::net::{Ipv4Addr, SocketAddr};

use tests::programs::{python_udp, static_go_udp};
use tests::{Fixture, Load, datagrams};

const ROUND_TRIPS: usize = 3;
const PORT: u16 = 7000;
const CLIENTS: u64 = 4;

/// Moves a server there and back under load.
fn survives(fixture: &Fixture, name: &str, load: Load) {
    load.must_progress();
    fixture.back_and_forth(name, ROUND_TRIPS, |_| load.must_progress());
    let steps = load.stop().unwrap_or_else(|errors| panic!("{errors}\n{}", fixture.state_logs()));
    assert!(steps > 0);
}

/// Clients take turns between the job's IPv4 and its IPv6 address.
fn one_of(servers: &[SocketAddr], number: u64) -> SocketAddr {
    assert_eq!(servers.len(), 2, "a job of the lab has an address of each family: {servers:?}");
    servers[usize::from(!number.is_multiple_of(2))]
}

fn echo_survives(fixture: &Fixture, name: &str, argv: &[&str]) {
    let servers = datagrams::serve(fixture, name, argv, PORT, b"anybody there?");
    let load = Load::start(
        || fixture.client(),
        CLIENTS,
        move |number, shared| datagrams::echo(one_of(&servers, number), number + 1, shared),
    );
    survives(fixture, name, load);
    let listing = fixture.migd_output("A", &["inspect", "--sockets", "--json", name]);
    let listing: serde_json::Value = serde_json::from_str(&listing).expect("JSON");
    let port = format!(":{PORT}");
    let is_bound = |socket: &serde_json::Value| {
        socket["protocol"] == "udp" && socket["local"].as_str().is_some_and(|local| local.ends_with(&port))
    };
    assert!(listing["sockets"].as_array().is_some_and(|sockets| sockets.iter().any(is_bound)), "{listing}");
}

#[test]
fn an_asyncio_echo_server() {
    let fixture = Fixture::new();
    let script = python_udp(&fixture);
    echo_survives(&fixture, "python", &["python3", &script, "::", &PORT.to_string()]);
}

#[test]
fn a_static_echo_server_in_go() {
    let fixture = Fixture::new();
    match static_go_udp(&fixture) {
        Some(program) => echo_survives(&fixture, "go", &[&program, &format!(":{PORT}")]),
        None => eprintln!("there is no Go here"),
    }
}

/// It looks at the interface that each question came through (IP_PKTINFO), and answers from the address that was asked.
#[test]
fn dnsmasq() {
    const ANSWER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
    let fixture = Fixture::new();
    let argv = [
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--user=root",
        "--no-resolv",
        "--no-hosts",
        "--interface=eth0",
        "--pid-file",
        &format!("--port={PORT}"),
        &format!("--address=/test/{ANSWER}"),
    ];
    let servers = datagrams::serve(&fixture, "dnsmasq", &argv, PORT, &datagrams::dns_probe());
    let load = Load::start(
        || fixture.client(),
        CLIENTS,
        move |number, shared| datagrams::dns(one_of(&servers, number), number + 1, ANSWER, shared),
    );
    survives(&fixture, "dnsmasq", load);
}
