//! Requirements of the documents that no other test shows: each test cites what it is there for. All run over both
//! families.

#[path = "../harness/mod.rs"]
mod harness;

mod acknowledging;
mod closing;
mod failures;
mod headers;
mod opening;
mod recovery;
mod timestamps;
mod urgent;
mod windows;

use std::time::Duration;

use harness::ACK;
use harness::wire::{Family, Wire, raw};
use netstack::Config;

const SECOND: Duration = Duration::from_secs(1);

/// A peer of each family, the stack with this configuration.
fn both_with(config: &Config) -> impl Iterator<Item = Wire> + '_ {
    Family::BOTH.into_iter().map(|family| Wire::with(family, config.clone()))
}

/// Acknowledges everything up to `ack` with a large window.
fn open_window(wire: &mut Wire, ack: i64) {
    wire.send(raw(ACK, 1, ack).window(60_000));
}
