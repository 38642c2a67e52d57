use std::collections::BTreeSet;

use super::*;
use crate::Embedded;

fn directory() -> (tempfile::TempDir, Arc<dyn Directory>) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let engine = Embedded::open(&dir.path().join("directory.redb")).expect("a new file");
    (dir, Arc::new(engine))
}

fn node(name: &str) -> NodeRecord {
    NodeRecord { name: name.to_owned(), peer: "10.99.0.1:7070".parse().expect("an address") }
}

fn job(number: u8) -> NewJob {
    let mut entropy = [0; 12];
    entropy[0] = number;
    let id = JobId::from_entropy(entropy);
    NewJob { id, name: format!("job{number}"), command: vec!["true".into()], started_ms: 0 }
}

async fn create(directory: &Arc<dyn Directory>, prefix: &str, name: &str) -> Cluster {
    let prefix = prefix.parse().expect("a prefix");
    Cluster::create(directory.clone(), "test".into(), prefix, node(name)).await.expect("a cluster")
}

#[tokio::test]
async fn nodes_never_give_out_the_same_address() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/24", "a").await;
    let b = Cluster::open(directory.clone(), node("b")).await.expect("joined");
    let mut seen = BTreeSet::new();
    for number in 0..60 {
        let cluster = if number % 2 == 0 { &a } else { &b };
        let record = cluster.create_job(job(number)).await.expect("an address");
        assert!(seen.insert(record.address));
        assert!(record.address != Ipv4Addr::new(10, 77, 0, 0) && record.address != Ipv4Addr::new(10, 77, 0, 255));
    }
}

#[tokio::test]
async fn a_full_prefix_says_so_and_a_restart_keeps_what_is_held_and_resting() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/30", "a").await;
    let first = a.create_job(job(1)).await.expect("one of two");
    a.create_job(job(2)).await.expect("two of two");
    assert!(matches!(a.create_job(job(3)).await, Err(ClusterError::Exhausted(_))));
    assert!(a.release(&first.id, &first.owner).await.expect("released"));
    assert!(matches!(a.create_job(job(3)).await, Err(ClusterError::Exhausted(_))), "a freed address rests");
    let again = Cluster::open(directory.clone(), node("a")).await.expect("restarted");
    assert!(matches!(again.create_job(job(3)).await, Err(ClusterError::Exhausted(_))), "also over a restart");
}

#[tokio::test]
async fn of_two_transfers_from_one_epoch_one_wins() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/24", "a").await;
    let b = Cluster::open(directory.clone(), node("b")).await.expect("joined");
    let record = a.create_job(job(1)).await.expect("a job");
    let won = b.transfer(&record.id, &record.owner, "b").await.expect("an answer");
    assert_eq!(won, Transfer::Won(Owner { node: "b".into(), epoch: 2 }));
    let fence = a.transfer(&record.id, &record.owner, "a").await.expect("an answer");
    assert_eq!(fence, Transfer::Lost(Some(Owner { node: "b".into(), epoch: 2 })));
    assert!(!a.release(&record.id, &record.owner).await.expect("an answer"), "an old owner can't release");
}

#[tokio::test]
async fn names_are_unique_and_free_again_after_the_job() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/24", "a").await;
    let first = a.create_job(job(1)).await.expect("a job");
    let same = NewJob { name: first.name.clone(), ..job(2) };
    assert!(matches!(a.create_job(same.clone()).await, Err(ClusterError::NameTaken { .. })));
    assert!(a.release(&first.id, &first.owner).await.expect("released"));
    assert!(a.create_job(same).await.is_ok());
    let bad = NewJob { name: "../x".into(), ..job(3) };
    assert!(matches!(a.create_job(bad).await, Err(ClusterError::BadName(_))));
}

#[tokio::test]
async fn another_prefix_is_refused() {
    let (_dir, directory) = directory();
    create(&directory, "10.77.0.0/24", "a").await;
    let other =
        Cluster::create(directory.clone(), "x".into(), "10.78.0.0/24".parse().expect("a prefix"), node("b")).await;
    assert!(matches!(other, Err(ClusterError::OtherCluster(_))));
}
