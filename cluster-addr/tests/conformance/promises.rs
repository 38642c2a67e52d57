//! The tests, each on any engine. Each uses keys of its own.

use std::collections::BTreeMap;
use std::sync::Arc;

use cluster_addr::directory::{
    Change, DirectoryError, Expect, KEY_MAX, Outcome, Revision, TRANSACTION_MAX, Transaction, VALUE_MAX, Watch,
};
use cluster_addr::{Cluster, NewJob, NodeRecord, Transfer, Wanted};

use crate::hosts::{EtcdHost, Handle, Host};

fn put(key: &str, value: &str) -> Transaction {
    Transaction::default().put(key, value.as_bytes().to_vec())
}

async fn done(handle: &Handle, transaction: &Transaction) -> Revision {
    match handle.transact(transaction).await.expect("an answer") {
        Outcome::Done(revision) => revision,
        Outcome::Conflict { key, found } => panic!("conflict on {key}: {found:?}"),
    }
}

async fn conflict(handle: &Handle, transaction: &Transaction) -> (String, Option<Revision>) {
    match handle.transact(transaction).await.expect("an answer") {
        Outcome::Conflict { key, found } => (key, found.map(|found| found.revision)),
        Outcome::Done(revision) => panic!("done at {revision}"),
    }
}

async fn value(handle: &Handle, key: &str) -> Option<String> {
    let found = handle.get(key).await.expect("read");
    found.map(|found| String::from_utf8(found.value).expect("text"))
}

pub async fn conditions(host: &mut dyn Host) {
    let handle = host.handle().await;
    let first = done(&handle, &put("c/a", "1").expect("c/a", Expect::Absent)).await;
    let second = done(&handle, &put("c/b", "2")).await;
    assert!(second > first);
    let value_is = |text: &str| Expect::value(text.as_bytes().to_vec());
    for (condition, holds) in [
        (Expect::Absent, false),
        (Expect::Revision(first), true),
        (Expect::Revision(second), false),
        (value_is("1"), true),
        (value_is("2"), false),
        (value_is(""), false),
    ] {
        let question = Transaction::default().expect("c/a", condition.clone());
        if holds {
            done(&handle, &question).await;
        } else {
            assert_eq!(conflict(&handle, &question).await, ("c/a".into(), Some(first)), "{condition:?}");
        }
    }
    // The first that does not hold is named, and nothing is written.
    let mixed = put("c/x", "1")
        .expect("c/b", Expect::Revision(second))
        .expect("c/none", value_is(""))
        .expect("c/a", Expect::Absent);
    assert_eq!(conflict(&handle, &mixed).await, ("c/none".into(), None));
    assert_eq!(value(&handle, "c/x").await, None);
    // Several writes are one change.
    let both = done(&handle, &put("c/a", "3").delete("c/b").put("c/empty", vec![])).await;
    assert_eq!(conflict(&handle, &put("c/a", "").expect("c/a", Expect::Revision(first))).await.1, Some(both));
    assert_eq!((value(&handle, "c/a").await, value(&handle, "c/b").await), (Some("3".into()), None));
    assert_eq!(value(&handle, "c/empty").await.as_deref(), Some(""));
    // Deleted and written again is another revision than before.
    done(&handle, &put("c/b", "2").expect("c/b", Expect::Absent)).await;
    assert!(conflict(&handle, &put("c/b", "").expect("c/b", Expect::Revision(second))).await.1 > Some(both));
}

pub async fn bounds(host: &mut dyn Host) {
    let handle = host.handle().await;
    let longest = "k".repeat(KEY_MAX);
    done(&handle, &put(&longest, "1")).await;
    assert_eq!(value(&handle, &longest).await.as_deref(), Some("1"));
    done(&handle, &Transaction::default().put("b/v", vec![255; VALUE_MAX])).await;
    let most = (0..TRANSACTION_MAX).fold(Transaction::default(), |all, n| all.put(format!("b/{n}"), vec![1]));
    let most = (0..TRANSACTION_MAX).fold(most, |all, n| all.expect(format!("b/{n}"), Expect::Absent));
    done(&handle, &most).await;
    for bad in [
        put("", ""),
        put(&"k".repeat(KEY_MAX + 1), ""),
        Transaction::default().put("k", vec![0; VALUE_MAX + 1]),
        put("k", "1").put("k", vec![2]),
        most.put("b/more", vec![1]),
        (0..20).fold(Transaction::default(), |all, n| all.put(format!("b/{n}"), vec![1; VALUE_MAX])),
    ] {
        assert!(matches!(handle.transact(&bad).await, Err(DirectoryError::Invalid(_))));
    }
}

/// More than a page, in order, of one moment.
pub async fn listings(host: &mut dyn Host) {
    const COUNT: usize = 1300;
    let handle = host.handle().await;
    let keys: Vec<_> = (0..COUNT).map(|n| format!("l/{n:05}")).collect();
    let mut newest = 0;
    for chunk in keys.chunks(TRANSACTION_MAX) {
        let all = chunk.iter().fold(Transaction::default(), |all, key| all.put(key, key.as_bytes().to_vec()));
        newest = done(&handle, &all).await;
    }
    done(&handle, &put("l0", "not under the prefix")).await;
    let listing = handle.list("l/").await.expect("listed");
    assert_eq!(listing.entries.iter().map(|entry| &entry.key).collect::<Vec<_>>(), keys.iter().collect::<Vec<_>>());
    assert!(listing.entries.iter().all(|entry| entry.versioned.value == entry.key.as_bytes()));
    assert!(listing.revision > newest);
    assert_eq!(handle.list("l/none").await.expect("listed").entries, []);
    assert!(handle.list("").await.expect("listed").entries.len() > COUNT);
}

/// Many swap the same values at the same time: each swap that was done saw the one before it.
pub async fn swaps_are_linearizable(host: &mut dyn Host) {
    const TASKS: usize = 8;
    const SWAPS: usize = 20;
    let first = host.handle().await;
    done(&first, &put("s/n", "0").put("s/m", b"0".to_vec())).await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..TASKS {
        let handle = host.handle().await;
        tasks.spawn(async move {
            let mut history = Vec::new();
            while history.len() < SWAPS {
                let found = handle.get("s/n").await.expect("read").expect("there");
                let number: u64 = String::from_utf8(found.value).expect("text").parse().expect("a number");
                let next = (number + 1).to_string();
                let swap = put("s/n", &next).expect("s/n", Expect::Revision(found.revision));
                // By its value as well: neither of the two can be done on an old state.
                let swap =
                    swap.expect("s/m", Expect::value(number.to_string().into_bytes())).put("s/m", next.into_bytes());
                if let Outcome::Done(revision) = handle.transact(&swap).await.expect("an answer") {
                    history.push((revision, number + 1));
                }
            }
            history
        });
    }
    let all: BTreeMap<_, _> = tasks.join_all().await.into_iter().flatten().collect();
    let numbers: Vec<_> = all.into_values().collect();
    assert_eq!(numbers, (1..=(TASKS * SWAPS) as u64).collect::<Vec<_>>(), "in the order of their revisions");
    assert_eq!(value(&first, "s/n").await, Some((TASKS * SWAPS).to_string()));
}

/// Changes until the one of this revision has come.
async fn until(watch: &mut Watch, last: Revision) -> Vec<Change> {
    let mut changes = Vec::new();
    while changes.last().is_none_or(|change: &Change| change.revision < last) {
        changes.push(watch.next().await.expect("the watch goes on"));
    }
    changes
}

pub async fn watches_have_no_gap(host: &mut dyn Host) {
    let handle = host.handle().await;
    let start = done(&handle, &put("w/start", "")).await;
    let mut from_start = handle.watch("w/", start).await.expect("watched");
    let mut expected = Vec::new();
    let mut middle = 0;
    for number in 0..50u8 {
        // Two of one revision, one that is not watched, a deletion now and then.
        let mut change = put("w/n", &number.to_string()).put("other", vec![number]);
        if number % 5 == 0 && number > 0 {
            change = change.delete("w/m");
        } else {
            change = change.put("w/m", vec![number]);
        }
        let revision = done(&handle, &change).await;
        expected.push((revision, "w/m".to_owned(), (number % 5 != 0 || number == 0).then(|| vec![number])));
        expected.push((revision, "w/n".to_owned(), Some(number.to_string().into_bytes())));
        if number == 25 {
            middle = revision;
        }
    }
    let last = expected.last().expect("some").0;
    let plain = |changes: Vec<Change>| {
        let mut all: Vec<_> = changes
            .into_iter()
            .map(|change| (change.revision, change.key, change.value.map(serde_bytes::ByteBuf::into_vec)))
            .collect();
        all.sort();
        all
    };
    // The order of those of one revision is the engine's; the last may come in two parts.
    let mut seen = until(&mut from_start, last).await;
    if seen.iter().filter(|change| change.revision == last).count() == 1 {
        seen.push(from_start.next().await.expect("its other part"));
    }
    assert!(seen.windows(2).all(|pair| pair[0].revision <= pair[1].revision), "in order");
    expected.sort();
    assert_eq!(plain(seen), expected);
    // From the past, and over a restart of the engine.
    let mut from_middle = handle.watch("w/n", middle).await.expect("watched");
    let after: Vec<_> =
        expected.iter().filter(|(revision, key, _)| *revision > middle && key == "w/n").cloned().collect();
    assert_eq!(plain(until(&mut from_middle, last).await), after);
    drop((from_start, from_middle, handle));
    host.restart();
    let handle = host.handle().await;
    let mut again = handle.watch("w/n", middle).await.expect("watched");
    assert_eq!(plain(until(&mut again, last).await), after);
    let next = done(&handle, &put("w/n", "next")).await;
    assert_eq!(until(&mut again, next).await.len(), 1);
}

pub async fn compaction_is_told(host: &mut dyn Host) {
    let handle = host.handle().await;
    let old = done(&handle, &put("k/a", "1")).await;
    let mut running = handle.watch("k/", old).await.expect("watched");
    host.compact().await;
    let newest = done(&handle, &put("k/a", "2")).await;
    assert!(matches!(handle.watch("k/", 0).await, Err(DirectoryError::Compacted(_))));
    assert!(matches!(handle.watch("k/", old - 1).await, Err(DirectoryError::Compacted(_))));
    assert_eq!(until(&mut running, newest).await.len(), 1, "a watch that kept up goes on");
    let listing = handle.list("k/").await.expect("listed");
    assert_eq!(listing.entries.len(), 1);
    let mut fresh = handle.watch("k/", listing.revision).await.expect("from a listing");
    let next = done(&handle, &put("k/a", "3")).await;
    assert_eq!(until(&mut fresh, next).await.len(), 1);
}

pub async fn a_restart_loses_nothing(host: &mut dyn Host) {
    let handle = host.handle().await;
    let before = handle.list("").await.expect("listed");
    drop(handle);
    host.restart();
    let handle = host.handle().await;
    assert_eq!(handle.list("").await.expect("listed").entries, before.entries);
    assert!(done(&handle, &put("r/a", "1")).await > before.revision, "revisions never go back");
}

/// Two nodes push a job to and fro while the engine is restarted; its record's changes tell one owner per epoch.
pub async fn epochs_never_go_back(host: &mut dyn Host) {
    let node =
        |name: &str| NodeRecord { name: name.into(), peer: "10.99.0.1:1".parse().expect("an address"), hops: vec![] };
    let prefix = ["10.77.0.0/24".parse().expect("a prefix")];
    let handle = host.handle().await;
    let cluster = Cluster::create(Arc::clone(&handle), "test".into(), &prefix, node("a")).await.expect("a cluster");
    let id = cluster_addr::JobId::from_entropy([7; 12]);
    let job = NewJob { id: id.clone(), name: "job".into(), command: vec![], started_ms: 0, wanted: Wanted::Any };
    let record = cluster.create_job(job).await.expect("created");
    drop((cluster, handle));
    let (mut won, mut owner) = (0, record.owner.clone());
    let mut seen = vec![owner.clone()];
    for _ in 0..3 {
        host.restart();
        let mut tasks = tokio::task::JoinSet::new();
        for name in ["a", "b"] {
            let cluster = Cluster::open(host.handle().await, node(name)).await.expect("joined");
            let (id, known) = (id.clone(), record.clone());
            tasks.spawn(async move {
                let mut wins = Vec::new();
                for _ in 0..20 {
                    let now = cluster.job(&id).await.expect("read").expect("there").owner;
                    let to = if now.node == "a" { "b" } else { "a" };
                    if let Transfer::Won(owner) =
                        cluster.transfer(&id, &now, to, None, Some(&known)).await.expect("an answer")
                    {
                        wins.push(owner);
                    }
                }
                wins
            });
        }
        seen.extend(tasks.join_all().await.into_iter().flatten());
        let cluster = Cluster::open(host.handle().await, node("a")).await.expect("joined");
        let now = cluster.job(&id).await.expect("read").expect("there").owner;
        assert!(now.epoch > owner.epoch);
        owner = now;
        won += 1;
    }
    assert_eq!(won, 3);
    seen.sort_by_key(|owner| owner.epoch);
    let epochs: Vec<_> = seen.iter().map(|owner| owner.epoch).collect();
    assert_eq!(epochs, (1..=owner.epoch).collect::<Vec<_>>(), "each epoch was won once");
}

pub async fn what_was_acknowledged_survives_kills(host: &mut dyn Host) {
    let mut first = 0;
    let mut revision = 0;
    for _ in 0..3 {
        let newest = host.kill_while_writing(first).await;
        let handle = host.handle().await;
        let listing = handle.list("count/").await.expect("listed");
        let numbers: Vec<u64> = listing
            .entries
            .iter()
            .map(|entry| entry.key.trim_start_matches("count/").parse().expect("a number"))
            .collect();
        let last = *numbers.last().expect("something");
        assert_eq!(numbers, (0..=last).collect::<Vec<_>>(), "no hole");
        // The one under way may have been made.
        assert!(last == newest || last == newest + 1, "{last} stored, {newest} acknowledged");
        let sides = (value(&handle, "left").await, value(&handle, "right").await);
        assert_eq!(sides, (Some(last.to_string()), Some(last.to_string())), "all of a change or nothing");
        assert!(listing.revision > revision);
        revision = listing.revision;
        first = last + 1;
    }
}

/// Each of three members is killed in turn: changes go on, a watch misses nothing, and nothing is done twice.
pub async fn members_may_go(host: &mut EtcdHost) {
    let handle = host.handle().await;
    let start = done(&handle, &put("m/n", "0")).await;
    let mut watch = handle.watch("m/", start).await.expect("watched");
    let mut number = 0u64;
    let mut doubts = 0;
    for member in 0..3 {
        host.members.kill(member);
        for _ in 0..20 {
            let swap =
                put("m/n", &(number + 1).to_string()).expect("m/n", Expect::value(number.to_string().into_bytes()));
            loop {
                match handle.transact(&swap).await {
                    Ok(Outcome::Done(_)) => break,
                    // An earlier try, of which it was not known, had been made.
                    Ok(Outcome::Conflict { found, .. }) => {
                        let there = found.map(|found| String::from_utf8(found.value).expect("text"));
                        assert_eq!(there, Some((number + 1).to_string()));
                        break;
                    }
                    Err(DirectoryError::Unknown(_) | DirectoryError::Unreachable(_)) => doubts += 1,
                    Err(error) => panic!("{error:?}"),
                }
                assert!(doubts < 200, "two members are enough");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
            number += 1;
        }
        host.members.restart(member);
    }
    let mut next = 0;
    while next < number {
        let change = watch.next().await.expect("the watch goes on");
        next += 1;
        let text = change.value.map(|value| String::from_utf8(value.into_vec()).expect("text"));
        assert_eq!(text, Some(next.to_string()), "each change once, in order");
    }
}

/// Jobs each of which is the first of its node, so that its addresses need new blocks.
pub async fn time_new_blocks(host: &mut EtcdHost) {
    const JOBS: usize = 300;
    let prefixes = ["10.77.0.0/16", "fd77::/64"].map(|net| net.parse().expect("a prefix"));
    let node =
        |n: usize| NodeRecord { name: format!("n{n}"), peer: "10.99.0.1:1".parse().expect("an address"), hops: vec![] };
    Cluster::create(host.handle().await, "test".into(), &prefixes, node(0)).await.expect("a cluster");
    let mut times = Vec::new();
    for n in 1..=JOBS {
        let cluster = Cluster::open(host.handle().await, node(n)).await.expect("joined");
        let mut entropy = [0; 12];
        entropy[..8].copy_from_slice(&n.to_le_bytes());
        let id = cluster_addr::JobId::from_entropy(entropy);
        let job = NewJob { id, name: format!("j{n}"), command: vec![], started_ms: 0, wanted: Wanted::Any };
        let began = std::time::Instant::now();
        cluster.create_job(job).await.expect("created");
        times.push(began.elapsed());
    }
    times.sort();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
    println!("{JOBS} jobs that each needed a new block: median {:?}, p99 {:?}, longest {:?}", at(50), at(99), at(100));
}
