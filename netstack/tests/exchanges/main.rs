//! What a stack answers to every event in every state: raw packets in, the whole output out.
//!
//! For each state there is a table in `tables/`, one line per event: what happens, every packet that comes back (with all
//! its fields), and how the connection stands afterwards. Every cell starts from a fresh connection brought into the state,
//! and both families must give the same table. A difference fails; after a change on purpose,
//! `UPDATE_TABLES=1 cargo test -p netstack --test exchanges` writes the tables anew, to be read before they are committed.

#[path = "../harness/mod.rs"]
mod harness;

mod events;
mod notation;
mod states;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use events::EVENTS;
use harness::wire::Family;
use states::{Fixture, STATES};

fn table(state: &str, make: fn(Family) -> Fixture, family: Family, moved: bool) -> String {
    let mut text = String::new();
    for event in EVENTS {
        let mut fixture = make(family);
        if moved {
            fixture.move_stack();
        }
        let seen = (event.happen)(&mut fixture);
        let output = if seen.is_empty() { "-".to_owned() } else { notation::packets(&seen, family) };
        let _ = writeln!(text, "{:<44} | {output} | {}", event.name, fixture.stands());
    }
    assert!(!text.is_empty(), "{state} has no events");
    text
}

fn path(state: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/exchanges/tables").join(state).with_extension("txt")
}

/// The lines that differ.
fn difference(expected: &str, found: &str) -> String {
    let mut text = String::new();
    for (expected, found) in expected.lines().zip(found.lines()).filter(|(expected, found)| expected != found) {
        let _ = writeln!(text, "- {expected}\n+ {found}");
    }
    if expected.lines().count() != found.lines().count() {
        let _ = writeln!(text, "{} lines expected, {} found", expected.lines().count(), found.lines().count());
    }
    text
}

#[test]
fn every_state_answers_every_event_as_written() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# The sender MUST generate it (MUST-2) and the receiver MUST check it (MUST-3).
    //= https://www.rfc-editor.org/rfc/rfc7413#section-4.2
    //= type=test
    //# Data in a SYN without a valid cookie isn't acknowledged by the SYN-ACK, and comes again.
    let update = std::env::var_os("UPDATE_TABLES").is_some();
    let mut faults = String::new();
    for (state, make) in STATES {
        let tables = Family::BOTH.map(|family| table(state, *make, family, false));
        let families = difference(&tables[0], &tables[1]);
        if !families.is_empty() {
            let _ = writeln!(faults, "{state}: IPv4 (-) and IPv6 (+) differ:\n{families}");
        }
        let expected = std::fs::read_to_string(path(state)).unwrap_or_default();
        if expected != tables[0] {
            if update {
                std::fs::write(path(state), &tables[0]).expect("the table can be written");
            }
            let _ = writeln!(faults, "{state}:\n{}", difference(&expected, &tables[0]));
        }
    }
    assert!(faults.is_empty(), "{faults}");
}

/// A stack that was moved just before an event answers it like one that stayed.
#[test]
fn a_move_changes_no_answer() {
    for (state, make) in STATES {
        for family in Family::BOTH {
            let (stayed, moved) = (table(state, *make, family, false), table(state, *make, family, true));
            assert!(stayed == moved, "{state}, {family:?}:\n{}", difference(&stayed, &moved));
        }
    }
}
