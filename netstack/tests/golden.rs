//! Images made by older releases still thaw and go on.
//!
//! The files in `tests/images` are named after the format that wrote them and are never written anew (the first are plain
//! MessagePack, later ones packed by the crate `codec`); a new format adds files of its own
//! (`NETSTACK_WRITE_IMAGES=v3 cargo test -p netstack --test golden write_images`).

mod harness;

use std::path::PathBuf;
use std::time::Duration;

use harness::zoo::zoo;
use harness::{Side, config};
use netstack::{Config, Instant, Stack, StackImage, State};

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/images")
}

/// What the images were taken of, as the zoo was then.
const KEPT: [(&str, State); 17] = [
    ("listener", State::Listen),
    ("unread", State::Established),
    ("corked", State::Established),
    ("window closed", State::Established),
    ("holes", State::Established),
    ("timed out once", State::Established),
    ("reads no more", State::Established),
    ("close-wait", State::CloseWait),
    ("last-ack", State::LastAck),
    ("fin-wait-2", State::FinWait2),
    ("fin-wait-1", State::FinWait1),
    ("closing", State::Closing),
    ("reset", State::Closed),
    ("idle", State::Closed),
    ("syn-sent", State::SynSent),
    ("full listener", State::Listen),
    ("to itself", State::Established),
];

#[test]
fn the_zoo_has_every_state() {
    for v6 in [false, true] {
        let mut zoo = zoo(v6);
        for (name, state) in KEPT {
            let id = zoo.kept.iter().find(|(kept, _)| *kept == name).expect("it is in the zoo").1;
            assert_eq!(zoo.pair.status(Side::B, id).state, state, "{name}");
        }
        let (half_open, time_wait) = zoo.pair.b.connections_without_socket();
        assert!(half_open >= 3 && time_wait >= 1, "{half_open} half open, {time_wait} in TIME-WAIT");
    }
}

/// Writes the image of today's zoo, when asked to.
#[test]
fn write_images() {
    let Ok(version) = std::env::var("NETSTACK_WRITE_IMAGES") else {
        return;
    };
    for v6 in [false, true] {
        let zoo = zoo(v6);
        let image = zoo.pair.b.freeze(zoo.pair.now);
        let bytes = codec::to_vec(&image).expect("encodes");
        let family = if v6 { "ipv6" } else { "ipv4" };
        std::fs::write(directory().join(format!("{version}-{family}.image")), bytes).expect("it can be written");
    }
}

#[test]
fn images_of_every_format_thaw_and_go_on() {
    let mut count = 0;
    for entry in std::fs::read_dir(directory()).expect("the images are there") {
        let path = entry.expect("it can be read").path();
        if path.extension().is_none_or(|extension| extension != "image") {
            continue;
        }
        count += 1;
        let name = path.display();
        let bytes = std::fs::read(&path).expect("it can be read");
        let image: Result<StackImage, String> = if codec::is_packed(&bytes) {
            codec::from_slice(&bytes).map_err(|error| error.to_string())
        } else {
            rmp_serde::from_slice(&bytes).map_err(|error| error.to_string())
        };
        let image = image.unwrap_or_else(|error| panic!("{name}: {error}; a new field needs #[serde(default)]"));
        let (sockets, half_open, time_wait) = image.counts();
        assert!(sockets >= KEPT.len() && half_open >= 3 && time_wait >= 1, "{name}");
        let address = if name.to_string().contains("ipv6") { "fd00::2" } else { "10.0.0.2" };
        let now = Instant::from_millis(77);
        let config = Config { ecn: true, ..config(address) };
        let mut stack = Stack::thaw(image, now, config).unwrap_or_else(|error| panic!("{name}: {error}"));
        let states: Vec<State> = stack.sockets().collect::<Vec<_>>().iter().map(|&id| stack.status(id).state).collect();
        for (kept, state) in KEPT {
            assert!(states.contains(&state), "{name}: nothing is like \"{kept}\" ({state:?})");
        }
        // Each speaks, repeats what is unacknowledged, and in the end gives up on a peer that never answers.
        let mut now = now;
        let mut packets = 0;
        for _ in 0..3_000 {
            while stack.poll_transmit(now).is_some() {
                packets += 1;
            }
            let Some(next) = stack.poll_timeout() else { break };
            now = next;
            stack.handle_timeout(now);
        }
        assert!(packets > 50, "{name}: {packets} packets");
        assert!(now.since(Instant::from_millis(77)) > Duration::from_secs(60), "{name}");
        assert_eq!(stack.connections_without_socket(), (0, 0), "{name}: half-open ones and TIME-WAIT end");
    }
    assert!(count >= 2, "the images of the first format are missing");
}
