use super::*;
use crate::directory::{Expect, KEY_MAX, VALUE_MAX};

fn engine() -> (tempfile::TempDir, Embedded) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let engine = Embedded::open(&dir.path().join("directory.redb")).expect("a new file");
    (dir, engine)
}

fn put(key: &str, value: &[u8]) -> Transaction {
    Transaction::default().put(key, value.to_vec())
}

#[test]
fn a_condition_that_fails_writes_nothing_and_shows_what_is_there() {
    let (_dir, engine) = engine();
    assert_eq!(engine.write(&put("a", b"1").expect("a", Expect::Absent)), Ok(Outcome::Done(1)));
    let second = engine.write(&put("b", b"2").expect("a", Expect::Absent));
    let found = Some(Versioned { value: b"1".to_vec(), revision: 1 });
    assert_eq!(second, Ok(Outcome::Conflict { key: "a".into(), found }));
    assert_eq!(engine.read("b"), Ok(None));
    assert_eq!(engine.write(&put("a", b"2").expect("a", Expect::Revision(1))), Ok(Outcome::Done(2)));
    assert!(matches!(engine.write(&put("a", b"3").expect("a", Expect::Revision(1))), Ok(Outcome::Conflict { .. })));
}

#[test]
fn all_is_there_after_a_restart() {
    let (dir, engine) = engine();
    engine.write(&put("a/1", b"x").put("a/2", b"y".to_vec()).put("b", b"z".to_vec())).expect("written");
    drop(engine);
    let engine = Embedded::open(&dir.path().join("directory.redb")).expect("opened again");
    let listing = engine.read_all("a/").expect("listed");
    assert_eq!(listing.revision, 1);
    assert_eq!(listing.entries.iter().map(|e| e.key.as_str()).collect::<Vec<_>>(), ["a/1", "a/2"]);
    assert_eq!(engine.write(&Transaction::default().delete("a/1")), Ok(Outcome::Done(2)));
}

#[test]
fn a_watch_replays_what_came_before_and_follows_without_a_gap() {
    let (_dir, engine) = engine();
    for round in 0..5u8 {
        engine.write(&put("job/x", &[round]).put("other", vec![round])).expect("written");
    }
    let mut watch = engine.subscribe("job/", 2).expect("watched");
    engine.write(&Transaction::default().delete("job/x")).expect("deleted");
    let mut seen = Vec::new();
    while let Ok(change) = watch.0.try_recv() {
        seen.push((change.revision, change.value.map(|v| v[0])));
    }
    assert_eq!(seen, [(3, Some(2)), (4, Some(3)), (5, Some(4)), (6, None)]);
}

#[test]
fn history_is_bounded_and_says_when_it_is_too_short() {
    let (dir, engine) = engine();
    drop(engine);
    let engine = Embedded::open_keeping(&dir.path().join("directory.redb"), 5).expect("opened again");
    for _ in 0..11 {
        engine.write(&put("a", b"1")).expect("written");
    }
    assert_eq!(engine.subscribe("", 0).expect_err("too old"), DirectoryError::Compacted(6));
    assert!(engine.subscribe("", 6).is_ok());
}

#[test]
fn bad_requests_are_refused() {
    let (_dir, engine) = engine();
    for bad in [
        put("", b""),
        put(&"k".repeat(KEY_MAX + 1), b""),
        put("k", &vec![0; VALUE_MAX + 1]),
        put("k", b"1").put("k", vec![2]),
    ] {
        assert!(matches!(engine.write(&bad), Err(DirectoryError::Invalid(_))));
    }
}

#[test]
fn held_it_refuses_changes_and_sealed_everything() {
    let (dir, engine) = engine();
    engine.write(&put("a", b"1")).expect("written");
    let mut watch = engine.subscribe("", 1).expect("watched");
    assert_eq!(engine.hold("just now").expect("held").entries.len(), 1);
    assert!(matches!(engine.write(&put("b", b"1")), Err(DirectoryError::Unreachable(_))));
    engine.resume();
    engine.write(&put("b", b"1")).expect("written");
    engine.hold("just now").expect("held");
    engine.seal("elsewhere").expect("sealed");
    assert!(watch.0.blocking_recv().is_some() && watch.0.blocking_recv().is_none(), "watches end");
    drop(engine);
    let engine = Embedded::open(&dir.path().join("directory.redb")).expect("opened again");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let moved = DirectoryError::Moved("elsewhere".into());
    assert_eq!(runtime.block_on(engine.get("a")), Err(moved.clone()));
    assert_eq!(runtime.block_on(engine.transact(&put("a", b"2"))), Err(moved.clone()));
    assert_eq!(runtime.block_on(engine.watch("", 0)).map(|_| ()), Err(moved));
}
