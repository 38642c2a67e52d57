//! What every engine of the directory promises, tested on each of them: see `cluster_addr::directory`.
//!
//! `promises` holds the tests, `hosts` the engines with their ways to be restarted and killed, `members` the etcd processes
//! (Debian's etcd-server), on ports of the loopback device that were free.

mod hosts;
mod members;
mod promises;

use std::time::Duration;

use hosts::{EmbeddedHost, EtcdHost, Host};

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    // Far beyond what any of them needs: so that a hang is seen as one.
    runtime.expect("a runtime").block_on(async {
        tokio::time::timeout(Duration::from_secs(240), test).await.expect("it does not hang");
    });
}

/// On one engine, since they only differ in the keys they use.
async fn all_promises(host: &mut dyn Host) {
    promises::conditions(host).await;
    promises::bounds(host).await;
    promises::listings(host).await;
    promises::swaps_are_linearizable(host).await;
    promises::watches_have_no_gap(host).await;
    promises::compaction_is_told(host).await;
    promises::a_restart_loses_nothing(host).await;
    promises::epochs_never_go_back(host).await;
}

#[test]
fn the_embedded_engine_keeps_the_promises() {
    run(async { all_promises(&mut EmbeddedHost::new()).await });
}

#[test]
fn the_etcd_engine_keeps_the_promises() {
    run(async { all_promises(&mut EtcdHost::new(1)).await });
}

#[test]
fn the_embedded_engine_killed_in_the_middle_of_writes() {
    if let Some(path) = std::env::var_os(hosts::WRITER) {
        return hosts::write_until_killed(path.as_ref());
    }
    run(async { promises::what_was_acknowledged_survives_kills(&mut EmbeddedHost::new()).await });
}

#[test]
fn the_etcd_engine_killed_in_the_middle_of_writes() {
    run(async { promises::what_was_acknowledged_survives_kills(&mut EtcdHost::new(1)).await });
}

#[test]
fn the_embedded_engine_on_a_full_disk() {
    if let Some(path) = std::env::var_os(hosts::FULL) {
        return run(hosts::fill_disk(path.into()));
    }
    hosts::on_small_disk();
}

#[test]
fn the_etcd_engine_on_a_full_disk() {
    run(hosts::fill_etcd());
}

#[test]
fn of_three_members_one_may_go_at_any_time() {
    run(async { promises::members_may_go(&mut EtcdHost::new(3)).await });
}

/// Not run by `make test`, since a loaded machine would decide; see `make measure-allocation`.
#[test]
#[ignore = "a measurement"]
fn how_long_an_allocation_takes_that_needs_a_new_block() {
    run(promises::time_new_blocks(&mut EtcdHost::new(3)));
}
