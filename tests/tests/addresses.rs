//! Every job has an address of each family, and both go with it wherever it moves; `migd addr` shows and keeps them.

use std::net::{IpAddr, SocketAddr};

use tests::Fixture;
use tests::counter::Counter;
use tests::programs::{REDIS, REDIS_PORT};

#[test]
fn a_server_keeps_its_connections_of_both_families() {
    let fixture = Fixture::new();
    let job = fixture.run("A", "server", &REDIS);
    let address6 = job.address6.expect("the lab has an IPv6 prefix");
    let servers = [IpAddr::V4(job.address), IpAddr::V6(address6)].map(|address| SocketAddr::new(address, REDIS_PORT));
    for server in servers {
        fixture.wait_until_it_serves("server", server);
    }
    let mut counters = servers.map(|server| Counter::new(&fixture, server));
    fixture.back_and_forth("server", 3, |_| {
        for counter in &mut counters {
            counter.steps(100);
        }
        // New connections find it, too, where it is now.
        for server in servers {
            Counter::new(&fixture, server).steps(1);
        }
    });
}

/// `migd addr` as JSON.
fn addr(fixture: &Fixture, arguments: &[&str]) -> serde_json::Value {
    let arguments = [&["addr"], arguments, &["--json"]].concat();
    serde_json::from_str(&fixture.migd_output("B", &arguments)).expect("JSON")
}

#[test]
fn addresses_are_reserved_listed_given_back_and_checked() {
    let fixture = Fixture::new();
    let reserved = addr(&fixture, &["reserve", "web", "10.77.9.9"]);
    assert_eq!(reserved["name"], "web");
    assert_eq!(reserved["addresses"][0], "10.77.9.9");
    assert_eq!(reserved["addresses"].as_array().map(Vec::len), Some(2), "one of each family");
    // The same address on whichever node, and again at once after the job has ended.
    let show = ["run", "--address", "web", "--", "sh", "-c", "ip -br address show eth0 || cat /proc/net/fib_trie"];
    for node in ["A", "B"] {
        let shown = fixture.migd_output(node, &show);
        assert!(shown.contains("10.77.9.9"), "{shown}");
    }
    let job =
        fixture.migd_output("A", &["run", "-d", "--name", "sleeper", "--address", "10.77.9.9", "--", "sleep", "1000"]);
    assert!(!job.trim().is_empty());
    let twice = fixture.migd("B", &["run", "--address", "web", "--", "true"]).output().expect("migd starts");
    assert!(String::from_utf8_lossy(&twice.stderr).contains("10.77.9.9"), "{twice:?}");
    assert!(!twice.status.success());
    let list = addr(&fixture, &["ls"]);
    let used = list["addresses"].as_array().expect("a list");
    let mine = used.iter().find(|used| used["address"] == "10.77.9.9").expect("it is listed");
    assert_eq!((mine["state"].as_str(), mine["name"].as_str()), (Some("held"), Some("sleeper")));
    assert_eq!(list["reservations"][0]["job"], "sleeper");
    let blocks = addr(&fixture, &["blocks"]);
    assert!(
        blocks["blocks"].as_array().is_some_and(|blocks| blocks.iter().any(|block| block["net"] == "10.77.9.0/26"))
    );
    let prefixes = addr(&fixture, &["add", "10.78.0.0/16"]);
    assert_eq!(prefixes.as_array().map(Vec::len), Some(3));
    addr(&fixture, &["release", "web"]);
    let missing = fixture.migd("A", &["run", "--address", "web", "--", "true"]).output().expect("migd starts");
    assert!(String::from_utf8_lossy(&missing.stderr).contains("no reservation"), "{missing:?}");
    let check = addr(&fixture, &["check"]);
    assert_eq!((&check["findings"], &check["jobs"]), (&serde_json::json!([]), &serde_json::json!(1)));
}
