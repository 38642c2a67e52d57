//! Thousands of connections over bad links, each step judged by what must hold of every TCP (`harness/audit.rs`).
//!
//! A failure prints the plan of its world; `SIMULATOR_SEED=n` runs that one alone, `SIMULATOR_WORLDS=n` (as `make soak`
//! does) sets how many are run.

mod harness;

use harness::world::{Plan, Tally, World};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn simulate(seeds: impl Iterator<Item = u64>, change: impl Fn(&mut Plan)) -> Tally {
    let mut all = Tally::default();
    for seed in seeds {
        let mut plan = Plan::random(seed);
        change(&mut plan);
        let outcome = std::panic::catch_unwind(|| World::new(plan).run());
        let tally = match outcome {
            Ok(Ok(tally)) => tally,
            Ok(Err(what)) => panic!("seed {seed}: {what}"),
            Err(_) => panic!("seed {seed} panicked, see above"),
        };
        assert!(tally.whole + tally.aborted + tally.gave_up >= tally.connections, "seed {seed}: {tally:?}");
        all.connections += tally.connections;
        all.whole += tally.whole;
        all.aborted += tally.aborted;
        all.gave_up += tally.gave_up;
        all.segments += tally.segments;
        all.bytes += tally.bytes;
    }
    println!("{all:?}");
    all
}

#[test]
fn connections_over_bad_links() {
    let seeds = match number("SIMULATOR_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SIMULATOR_WORLDS").unwrap_or(150),
    };
    let tally = simulate(seeds, |_| {});
    // Each that was broken off breaks for the other side too.
    let broken = tally.gave_up.saturating_sub(tally.aborted);
    assert!(broken * 20 <= tally.connections.max(20), "too many connections broke: {tally:?}");
}

/// On a link without faults every connection is whole, whatever else happens.
#[test]
fn connections_over_a_good_link() {
    let tally = simulate(1_000_000..1_000_030, |plan| {
        plan.faults = harness::world::Faults::default();
        plan.mtu_change = None;
        plan.rate = None;
    });
    assert!(tally.gave_up <= 2 * tally.aborted, "{tally:?}");
}
