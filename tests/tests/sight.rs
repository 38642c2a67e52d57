//! What people see of a job's network: `migd inspect --sockets` and `migd pcap`, also while the job moves.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tests::Fixture;
use tests::processes::interrupt;
use tests::programs::python_echo;

const PORT: u16 = 7000;
/// Round trips between two looks.
const EXCHANGES: u32 = 50;

/// An 8-byte word that says its number.
fn word(number: u32) -> [u8; 8] {
    let mut word = *b"word\0\0\0\0";
    word[4..].copy_from_slice(&number.to_be_bytes());
    word
}

#[test]
fn a_recording_has_every_packet_over_moves_and_the_sockets_are_listed() {
    let fixture = Fixture::new();
    let script = python_echo(&fixture);
    let server = fixture.serve("echo", &["python3", &script, &PORT.to_string()], PORT);
    let file = fixture.path("echo.pcapng");
    let mut recorder = fixture.migd("A", &["pcap", "echo", "-w", &file]);
    let mut recorder = recorder.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("migd starts");
    wait_for_file(&file);

    let mut stream = fixture.connect(server).expect("it serves");
    let mut sent = 0;
    let mut exchange = |stream: &mut std::net::TcpStream| {
        for _ in 0..EXCHANGES {
            stream.write_all(&word(sent)).expect("the connection lives");
            let mut echo = [0; 8];
            stream.read_exact(&mut echo).expect("the connection lives");
            assert_eq!(echo, word(sent));
            sent += 1;
        }
    };
    exchange(&mut stream);
    // The recorder follows in its own time. The job doesn't wait for it, and takes along what it has not got yet.
    for (from, to) in [("A", "B"), ("B", "A"), ("A", "B")] {
        fixture.move_job("echo", from, to);
        exchange(&mut stream);
    }

    let listing: serde_json::Value =
        serde_json::from_str(&fixture.migd_output("B", &["inspect", "--sockets", "--json", "echo"])).expect("JSON");
    let sockets = listing["sockets"].as_array().expect("a list");
    let listener = sockets.iter().find(|socket| socket["state"] == "LISTEN").expect("the listener");
    assert_eq!(listener["local"], format!("0.0.0.0:{PORT}"));
    let peer = stream.local_addr().expect("it is connected").to_string();
    let connection = sockets.iter().find(|socket| socket["remote"] == *peer).expect("the connection");
    assert_eq!(connection["state"], "ESTAB");
    assert_eq!(connection["tcp"]["bytes_received"], u64::from(sent) * 8);
    assert!(connection["tcp"]["rtt_ms"].as_f64().expect("a number") > 0.0);
    let table = fixture.migd_output("B", &["inspect", "--sockets", "echo"]);
    assert!(table.contains(&peer) && table.contains("cwnd:"), "{table}");

    let times = |number| read(&file).windows(8).filter(|part| *part == word(number)).count();
    let deadline = Instant::now() + Duration::from_secs(30);
    while times(sent - 1) < 2 {
        assert!(Instant::now() < deadline, "the last word isn't recorded");
        std::thread::sleep(Duration::from_millis(50));
    }
    interrupt(recorder.id());
    assert!(recorder.wait().expect("our child").success());

    // Every word passed in both directions, before, between and after the moves.
    let missing: Vec<u32> = (0..sent).filter(|number| times(*number) < 2).collect();
    assert!(missing.is_empty(), "of {sent} words, these were not recorded in both directions: {missing:?}");
    let recording = read(&file);
    let first = |number| recording.windows(8).position(|part| part == word(number));
    assert!((1..sent).all(|number| first(number - 1) < first(number)), "the order of the words");
    let blocks = blocks(&recording);
    let nodes: Vec<char> = blocks.iter().filter_map(|block| section_node(block)).collect();
    assert_eq!(nodes, ['A', 'B', 'A', 'B'], "a section for each node, in order");
    // A packet's time, in nanoseconds, is part of its block.
    let packets = blocks.iter().filter(|block| block[..4] == 6u32.to_ne_bytes());
    assert_eq!(packets.clone().count(), packets.collect::<HashSet<_>>().len(), "a packet is there twice");
}

fn read(file: &str) -> Vec<u8> {
    std::fs::read(file).expect("the recording")
}

/// The blocks of a pcapng file.
fn blocks(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut all = Vec::new();
    while let Some(length) = bytes.get(4..8) {
        let length = u32::from_ne_bytes(length.try_into().expect("four bytes"));
        let (block, rest) = bytes.split_at(usize::try_from(length).expect("a length"));
        all.push(block);
        bytes = rest;
    }
    assert!(bytes.is_empty(), "{} bytes behind the last block", bytes.len());
    all
}

/// The node that an interface block names.
fn section_node(block: &[u8]) -> Option<char> {
    let name = b"on node ";
    let at = block.windows(name.len()).position(|part| part == name)?;
    Some(block[at + name.len()].into())
}

/// The recorder writes the section's beginning once it records.
fn wait_for_file(path: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while std::fs::metadata(path).map_or(0, |meta| meta.len()) == 0 {
        assert!(Instant::now() < deadline, "migd pcap records nothing");
        std::thread::sleep(Duration::from_millis(10));
    }
}
