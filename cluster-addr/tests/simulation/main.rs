//! Many nodes take, move and release addresses over a directory that loses, delays and repeats nothing but answers too late or
//! not at all, while daemons and machines crash, nodes are cut off and the directory goes away for a while. Time is virtual,
//! one seed makes one run. What the nodes were told and what the directory recorded are both held against the rules
//! ([`history`]), and at the end the records against each other.
//!
//! `make soak-addresses` runs 200 nodes and 60,000 addresses over 1,000 seeds; here it is less.

mod history;
mod node;
mod world;

use std::time::{Duration, Instant};

use cluster_addr::allocator::REST;

use world::{Faults, World};

/// A number from the environment.
fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

#[test]
fn no_address_is_given_out_twice_whatever_fails() {
    let seeds = setting("SIM_SEEDS", 6);
    let first = setting("SIM_FIRST", 1);
    let nodes = usize::try_from(setting("SIM_NODES", 25)).expect("few");
    let takes = setting("SIM_TAKES", 3000);
    let began = Instant::now();
    let mut told = Instant::now();
    for seed in first..first + seeds {
        let report = world::run(seed, nodes, takes, Faults::ALL);
        assert_eq!(report.violations, Vec::<String>::new(), "seed {seed}");
        assert!(report.taken >= takes, "seed {seed}: {report:?}");
        assert!(report.crashes > 0 && report.unanswered > 0 && report.moved > 0 && report.reused > 0, "{report:?}");
        if told.elapsed() > Duration::from_secs(10) || seed == first {
            println!("seed {seed}: {report:?}, {:?} so far", began.elapsed());
            told = Instant::now();
        }
    }
    println!("{seeds} seeds from {first} in {:?}", began.elapsed());
}

#[test]
fn one_seed_is_one_run() {
    let [one, other] = [world::run(7, 5, 300, Faults::ALL), world::run(7, 5, 300, Faults::ALL)];
    assert_eq!(format!("{one:?}"), format!("{other:?}"));
}

#[test]
fn a_directory_that_does_not_check_conditions_is_found_out() {
    let found = (1..20).any(|seed| {
        let faults = Faults { unchecked: true, ..Faults::ALL };
        !world::run(seed, 10, 1000, faults).violations.is_empty()
    });
    assert!(found);
}

#[test]
fn a_rest_that_is_cut_short_is_found_out() {
    let world = World::play(3, 5, 500, Faults::ALL);
    assert_eq!(world.told.check(REST), []);
    assert!(!world.told.check(REST * 20).is_empty(), "as if the addresses had to rest longer than they did");
}
