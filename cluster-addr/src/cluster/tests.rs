use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::Embedded;
use crate::allocator::{Family, REST};
use crate::directory::{Listing, Reply};
use crate::records::Owner;

fn directory() -> (tempfile::TempDir, Arc<dyn Directory>) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let engine = Embedded::open(&dir.path().join("directory.redb")).expect("a new file");
    (dir, Arc::new(engine))
}

fn node(name: &str) -> NodeRecord {
    NodeRecord { name: name.to_owned(), peer: "10.99.0.1:7070".parse().expect("an address"), hops: vec![] }
}

fn job(number: u8) -> NewJob {
    let mut entropy = [0; 12];
    entropy[0] = number;
    let id = JobId::from_entropy(entropy);
    NewJob { id, name: format!("job{number}"), command: vec!["true".into()], started_ms: 0, wanted: Wanted::Any }
}

fn wanting(number: u8, wanted: Wanted) -> NewJob {
    NewJob { wanted, ..job(number) }
}

fn nets(prefixes: &str) -> Vec<IpNet> {
    prefixes.split(' ').map(|prefix| prefix.parse().expect("a prefix")).collect()
}

async fn create(directory: &Arc<dyn Directory>, prefixes: &str, name: &str) -> Cluster {
    Cluster::create(directory.clone(), "test".into(), &nets(prefixes), node(name)).await.expect("a cluster")
}

/// A node whose clock stands at `now`, in seconds.
async fn node_at(directory: &Arc<dyn Directory>, name: &str, now: Arc<std::sync::atomic::AtomicU64>) -> Cluster {
    let clock: Clock = Arc::new(move || Duration::from_secs(now.load(std::sync::atomic::Ordering::Relaxed)));
    Cluster::open_with_clock(directory.clone(), node(name), clock).await.expect("joined")
}

async fn assert_sound(cluster: &Cluster) {
    assert_eq!(cluster.survey().await.expect("a survey").check(), []);
}

#[tokio::test]
async fn nodes_never_give_out_the_same_address() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/24 fd77::/64", "a").await;
    let b = Cluster::open(directory.clone(), node("b")).await.expect("joined");
    let mut seen = BTreeSet::new();
    for number in 0..60 {
        let cluster = if number % 2 == 0 { &a } else { &b };
        let record = cluster.create_job(job(number)).await.expect("an address");
        assert_eq!(record.addresses().count(), 2);
        for address in record.addresses() {
            assert!(seen.insert(address));
            assert!(!["10.77.0.0", "10.77.0.255", "fd77::"].map(|a| a.parse::<IpAddr>().unwrap()).contains(&address));
        }
    }
    assert_sound(&a).await;
}

#[tokio::test]
async fn a_full_prefix_says_so_and_a_restart_keeps_what_is_held_and_resting() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/30", "a").await;
    let first = a.create_job(job(1)).await.expect("one of two");
    a.create_job(job(2)).await.expect("two of two");
    assert!(matches!(a.create_job(job(3)).await, Err(ClusterError::Exhausted { .. })));
    assert!(a.release(&first).await.expect("released"));
    assert!(matches!(a.create_job(job(3)).await, Err(ClusterError::Exhausted { .. })), "a freed address rests");
    let again = Cluster::open(directory.clone(), node("a")).await.expect("restarted");
    assert!(matches!(again.create_job(job(3)).await, Err(ClusterError::Exhausted { .. })), "also over a restart");
}

#[tokio::test]
async fn an_address_is_used_again_after_its_rest_wherever_its_job_ended() {
    let (_dir, directory) = directory();
    create(&directory, "10.77.0.0/30", "x").await;
    let now = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let a = node_at(&directory, "a", now.clone()).await;
    let b = node_at(&directory, "b", now.clone()).await;
    let job1 = a.create_job(job(1)).await.expect("one of two");
    let job2 = a.create_job(job(2)).await.expect("two of two");
    b.transfer(&job1.id, &job1.owner, "b", None, Some(&job1)).await.expect("moved");
    let job1 = b.job(&job1.id).await.expect("an answer").expect("it runs");
    let (_, revision) = a.jobs().await.expect("listed");
    let mut watch = a.watch_jobs(revision).await.expect("watched");
    assert!(b.release(&job1).await.expect("ended there"));
    let change = watch.next().await.expect("it is told");
    a.note_released(&job1, change.revision);
    assert!(a.create_job(job(3)).await.is_err());
    now.store(REST.as_secs(), std::sync::atomic::Ordering::Relaxed);
    let job3 = a.create_job(job(3)).await.expect("it has rested");
    assert_eq!(job3.address, job1.address);
    assert_ne!(job3.address, job2.address);
    assert_sound(&a).await;
}

#[tokio::test]
async fn what_a_node_missed_it_learns_by_looking() {
    let (_dir, directory) = directory();
    create(&directory, "10.77.0.0/30", "x").await;
    let now = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let a = node_at(&directory, "a", now.clone()).await;
    let b = node_at(&directory, "b", now.clone()).await;
    let record = a.create_job(job(1)).await.expect("one of two");
    a.create_job(job(2)).await.expect("two of two");
    assert!(b.release(&record).await.expect("released by another, unseen"));
    a.reconcile().await.expect("looked");
    now.store(REST.as_secs(), std::sync::atomic::Ordering::Relaxed);
    a.maintain().await.expect("swept");
    assert_eq!(directory.list("address/").await.expect("listed").entries.len(), 1);
    assert_eq!(a.create_job(job(3)).await.expect("it has rested").address, record.address);
}

#[tokio::test]
async fn a_former_start_of_a_daemon_can_do_nothing_any_more() {
    let (_dir, directory) = directory();
    let old = create(&directory, "10.77.0.0/24", "a").await;
    old.create_job(job(1)).await.expect("an address");
    let new = Cluster::open(directory.clone(), node("a")).await.expect("restarted");
    let second = new.create_job(job(2)).await.expect("an address");
    // It believes the next address to be free, but its lease was renewed by another start: it has to take another block.
    let third = old.create_job(job(3)).await.expect("from a block of its own");
    assert_ne!(third.address, second.address);
    let of = |record: &JobRecord| u32::from(record.address) >> 6;
    assert_ne!(of(&third), of(&second));
}

#[tokio::test]
async fn of_two_transfers_from_one_epoch_one_wins() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/24", "a").await;
    let b = Cluster::open(directory.clone(), node("b")).await.expect("joined");
    let record = a.create_job(job(1)).await.expect("a job");
    let won = b.transfer(&record.id, &record.owner, "b", None, Some(&record)).await.expect("an answer");
    assert_eq!(won, Transfer::Won(Owner { node: "b".into(), epoch: 2 }));
    for known in [None, Some(&record)] {
        let fence = a.transfer(&record.id, &record.owner, "a", None, known).await.expect("an answer");
        assert_eq!(fence, Transfer::Lost(Some(Owner { node: "b".into(), epoch: 2 })));
    }
    assert!(!a.release(&record).await.expect("an answer"), "an old owner can't release");
    // What is known of the job may be old, or of another version of this program.
    let odd = JobRecord { started_ms: 7, ..record.clone() };
    let owner = Owner { node: "b".into(), epoch: 2 };
    let back = b.transfer(&record.id, &owner, "a", None, Some(&odd)).await.expect("an answer");
    assert_eq!(back, Transfer::Won(Owner { node: "a".into(), epoch: 3 }));
}

#[tokio::test]
async fn names_are_unique_and_free_again_after_the_job() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/24", "a").await;
    let first = a.create_job(job(1)).await.expect("a job");
    let same = NewJob { name: first.name.clone(), ..job(2) };
    assert!(matches!(a.create_job(same.clone()).await, Err(ClusterError::NameTaken { .. })));
    assert!(a.release(&first).await.expect("released"));
    assert!(a.create_job(same).await.is_ok());
    let bad = NewJob { name: "../x".into(), ..job(3) };
    assert!(matches!(a.create_job(bad).await, Err(ClusterError::BadName(_))));
}

#[tokio::test]
async fn prefixes_are_added_and_widened_but_not_mixed_up() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/30 fd77::/64", "a").await;
    let b = Cluster::open(directory.clone(), node("b")).await.expect("joined");
    for number in 0..2 {
        a.create_job(job(number)).await.expect("there are two");
    }
    assert!(matches!(b.create_job(job(2)).await, Err(ClusterError::Exhausted { .. })));
    let record = a.add_prefix("10.77.0.0/24".parse().expect("a net")).await.expect("widened");
    assert_eq!(record.prefixes_in_words(), "10.77.0.0/24, fd77::/64");
    assert_eq!(record.prefixes[0].block_length, 32, "blocks keep their size");
    let more = b.create_job(job(2)).await.expect("b learns of it when it needs it");
    assert_eq!(more.address.octets()[..3], [10, 77, 0]);
    a.add_prefix("10.88.0.0/16".parse().expect("a net")).await.expect("added");
    let special =
        ["0.0.0.0/0", "0.0.0.0/9", "126.0.0.0/7", "169.254.7.0/24", "224.1.0.0/16", "fe80::/64", "ff00::/7", "::/64"];
    let nodes = ["10.99.0.0/24"];
    let misfit = ["10.77.0.0/25", "10.88.0.1/16", "10.0.0.0/31", "10.0.0.0/8"];
    for bad in special.into_iter().chain(nodes).chain(misfit) {
        let refused = a.add_prefix(bad.parse().expect("a net")).await;
        assert!(matches!(refused, Err(ClusterError::BadPrefix { .. })), "{bad}");
    }
    let other = Cluster::create(directory.clone(), "x".into(), &nets("10.66.0.0/24"), node("c")).await;
    assert!(matches!(other, Err(ClusterError::OtherCluster(_))));
    assert!(Cluster::create(directory.clone(), "x".into(), &nets("10.77.0.0/30"), node("c")).await.is_ok());
    assert_sound(&a).await;
}

#[tokio::test]
async fn reserved_addresses_wait_for_their_job() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/24 fd77::/64", "a").await;
    let b = Cluster::open(directory.clone(), node("b")).await.expect("joined");
    let wanted: IpAddr = "10.77.0.200".parse().expect("an address");
    let reserved = a.reserve("web", &[wanted]).await.expect("reserved");
    assert!(reserved.addresses.contains(&wanted) && reserved.addresses.len() == 2);
    assert!(matches!(b.reserve("web", &[]).await, Err(ClusterError::ReservationTaken(_))));
    assert!(matches!(b.reserve("web2", &[wanted]).await, Err(ClusterError::AddressUnavailable { .. })));
    let of = |record: &JobRecord| record.addresses().collect::<BTreeSet<_>>();
    let kept: BTreeSet<_> = reserved.addresses.iter().copied().collect();
    // Twice on different nodes, by name and by address, without a rest between.
    let first = b.create_job(wanting(1, Wanted::Reservation("web".into()))).await.expect("its job");
    assert_eq!(of(&first), kept);
    let second = a.create_job(wanting(2, Wanted::Reservation("web".into()))).await;
    assert!(matches!(second, Err(ClusterError::AddressUnavailable { .. })), "one job at a time");
    assert_sound(&a).await;
    assert!(b.release(&first).await.expect("ended"));
    let second = a.create_job(wanting(2, Wanted::Address(wanted))).await.expect("the next job of it");
    assert_eq!(of(&second), kept);
    // Given up while in use: the job keeps its addresses, which rest afterwards.
    b.release_reservation("web").await.expect("given up");
    assert!(a.release(&second).await.expect("ended"));
    let third = a.create_job(wanting(3, Wanted::Address(wanted))).await;
    assert!(matches!(third, Err(ClusterError::AddressUnavailable { .. })), "it rests");
    assert!(matches!(
        a.create_job(wanting(3, Wanted::Reservation("web".into()))).await,
        Err(ClusterError::NoReservation(_))
    ));
    assert_sound(&a).await;
}

#[tokio::test]
async fn one_address_in_particular_whoever_has_its_block() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/24", "a").await;
    let b = Cluster::open(directory.clone(), node("b")).await.expect("joined");
    let of_a = a.create_job(job(1)).await.expect("an address");
    let next: IpAddr = std::net::Ipv4Addr::from(u32::from(of_a.address) + 1).into();
    let taken = b.create_job(wanting(2, Wanted::Address(next))).await.expect("of a block of a's");
    assert_eq!(IpAddr::V4(taken.address), next);
    let third = a.create_job(job(3)).await.expect("a finds it taken and gives out another");
    assert_ne!(third.address, taken.address);
    for bad in ["10.77.0.0", "10.77.0.255", "10.78.0.1", "fd77::1"] {
        let refused = b.create_job(wanting(4, Wanted::Address(bad.parse().expect("an address")))).await;
        assert!(matches!(refused, Err(ClusterError::AddressUnavailable { .. })), "{bad}");
    }
    let again = a.create_job(wanting(5, Wanted::Address(next))).await;
    assert!(matches!(again, Err(ClusterError::AddressUnavailable { .. })), "in use");
    assert_sound(&a).await;
}

#[tokio::test]
async fn blocks_of_a_node_without_jobs_are_taken_over_and_those_of_others_are_not() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/30", "a").await;
    let b = Cluster::open(directory.clone(), node("b")).await.expect("joined");
    let job1 = a.create_job(job(1)).await.expect("one of two");
    a.create_job(job(2)).await.expect("two of two");
    assert!(a.release(&job1).await.expect("released"));
    // a has a job still.
    assert!(matches!(b.create_job(job(3)).await, Err(ClusterError::Exhausted { .. })));
    assert!(matches!(b.forget_node("a", false).await, Err(ClusterError::NodeHasJobs { .. })));
    assert!(matches!(b.forget_node("b", true).await, Err(ClusterError::NotFound(_))));
    let forgotten = b.forget_node("a", true).await.expect("on the operator's word");
    assert_eq!((forgotten.jobs.as_slice(), forgotten.blocks.len()), (["job2".to_owned()].as_slice(), 2));
    assert!(matches!(b.create_job(job(3)).await, Err(ClusterError::Exhausted { .. })), "its addresses rest");
    // The one thought gone was alive: it can't give out an address of the blocks it lost.
    assert!(matches!(a.create_job(job(4)).await, Err(ClusterError::Exhausted { .. })));
    assert_eq!(directory.list("block/").await.expect("listed").entries.len(), 2);
}

#[tokio::test]
async fn idle_blocks_go_back_and_can_be_leased_by_others() {
    let (_dir, directory) = directory();
    create(&directory, "10.77.0.0/24", "x").await;
    let now = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let a = node_at(&directory, "a", now.clone()).await;
    let mut jobs = Vec::new();
    for number in 0..200 {
        jobs.push(a.create_job(job(number)).await.expect("an address"));
    }
    assert_eq!(directory.list(BLOCKS).await.expect("listed").entries.len(), 4);
    for job in jobs {
        assert!(a.release(&job).await.expect("released"));
    }
    now.store(REST.as_secs(), std::sync::atomic::Ordering::Relaxed);
    for _ in 0..6 {
        a.maintain().await.expect("swept and given back");
    }
    assert_eq!(directory.list("address/").await.expect("listed").entries, []);
    assert_eq!(directory.list(BLOCKS).await.expect("listed").entries.len(), 1);
    assert_eq!(a.state().allocator.available(Family::V4, a.now()), 63);
}

/// A directory that counts the requests it gets, loses the answers to some, and has one made late.
struct Counting {
    inner: Arc<dyn Directory>,
    requests: AtomicUsize,
    /// How many of the next changes are made and not answered.
    silent: AtomicUsize,
    /// What happens before the next change.
    first: std::sync::Mutex<Option<Reply<'static, bool>>>,
}

impl Counting {
    fn new(inner: &Arc<dyn Directory>) -> Arc<Self> {
        let (requests, silent) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Arc::new(Self { inner: inner.clone(), requests, silent, first: std::sync::Mutex::default() })
    }

    fn inner(&self) -> &Arc<dyn Directory> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        &self.inner
    }
}

impl Directory for Counting {
    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<Versioned>> {
        self.inner().get(key)
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, Listing> {
        self.inner().list(prefix)
    }

    fn transact<'a>(&'a self, transaction: &'a Transaction) -> Reply<'a, Outcome> {
        Box::pin(async move {
            let first = self.first.lock().expect("no panic").take();
            if let Some(first) = first {
                first.await?;
            }
            let outcome = self.inner().transact(transaction).await;
            let silent = self.silent.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            silent.map_or(outcome, |_| Err(DirectoryError::Unknown("the answer was lost".to_owned())))
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> Reply<'a, Watch> {
        self.inner().watch(prefix, after)
    }
}

#[tokio::test]
async fn a_node_whose_view_is_old_finds_a_fresh_block_all_the_same() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/16", "a").await;
    let line = Counting::new(&directory);
    let b = Cluster::open(line.clone(), node("b")).await.expect("joined");
    // One address of each of forty blocks.
    for third in 0..10 {
        for last in [1, 65, 129, 193] {
            let wanted = [IpAddr::from([10, 77, third, last])];
            a.reserve(&format!("r{third}-{last}"), &wanted).await.expect("reserved");
        }
    }
    let before = line.requests.load(Ordering::Relaxed);
    let record = b.create_job(job(1)).await.expect("an address");
    assert_eq!(record.address.octets()[..3], [10, 77, 10]);
    let requests = line.requests.load(Ordering::Relaxed) - before;
    assert!(requests <= 3, "a try, a look, a try; not {requests}");
    assert_sound(&b).await;
}

#[tokio::test]
async fn an_address_whose_job_ends_just_now_is_had_by_its_reservation() {
    let (_dir, directory) = directory();
    let a = Arc::new(create(&directory, "10.77.0.0/24", "a").await);
    let line = Counting::new(&directory);
    let b = Cluster::open(line.clone(), node("b")).await.expect("joined");
    let address = IpAddr::from([10, 77, 0, 9]);
    a.reserve("web", &[address]).await.expect("reserved");
    let former = a.create_job(wanting(1, Wanted::Reservation("web".into()))).await.expect("its address");
    let ending = Arc::clone(&a);
    *line.first.lock().unwrap() = Some(Box::pin(async move { Ok(ending.release(&former).await.expect("released")) }));
    let record = b.create_job(wanting(2, Wanted::Address(address))).await.expect("the address");
    assert_eq!((record.address.into(), record.reservation.as_deref()), (address, Some("web")));
    assert_sound(&b).await;
}

#[tokio::test]
async fn reserving_and_giving_up_bear_lost_answers() {
    let (_dir, directory) = directory();
    create(&directory, "10.77.0.0/24", "a").await;
    let line = Counting::new(&directory);
    let b = Cluster::open(line.clone(), node("b")).await.expect("joined");
    line.silent.store(2, Ordering::Relaxed);
    let reserved = b.reserve("web", &[]).await.expect("the third answer arrives");
    line.silent.store(1, Ordering::Relaxed);
    assert_eq!(b.release_reservation("web").await.expect("it is seen to be gone"), reserved);
    assert!(matches!(b.release_reservation("web").await, Err(ClusterError::NoReservation(_))));
    // Three lost answers are one too many.
    line.silent.store(3, Ordering::Relaxed);
    let lost = b.reserve("mail", &[]).await;
    assert!(matches!(lost, Err(ClusterError::Directory(DirectoryError::Unknown(_)))), "{lost:?}");
    assert_sound(&b).await;
}

#[tokio::test]
async fn a_survey_finds_what_is_wrong_and_repairs_leaks() {
    let (_dir, directory) = directory();
    let a = create(&directory, "10.77.0.0/24", "a").await;
    let record = a.create_job(job(1)).await.expect("a job");
    let held = encode(&crate::records::AddressRecord::Held { job: job(9).id });
    let plant = Transaction::default()
        .put("address/10.77.0.9", held.clone())
        .put("address/10.0.0.1", held)
        .put("name/ghost", encode(&job(9).id))
        .put("job/x", encode(&JobRecord { id: job(8).id, name: "twin".into(), ..record.clone() }));
    directory.transact(&plant).await.expect("planted");
    let survey = a.survey().await.expect("a survey");
    let findings = survey.check();
    for finding in &findings {
        println!("{finding}");
    }
    let shared = |finding: &&Finding| matches!(finding, Finding::Shared { .. } | Finding::Unrecorded { .. });
    assert_eq!(findings.iter().filter(shared).count(), 2);
    let mut repaired = 0;
    for finding in &findings {
        repaired += usize::from(a.repair(&survey, finding).await.expect("an answer"));
    }
    assert_eq!(repaired, 3, "two addresses and a name");
    let left = a.survey().await.expect("a survey").check();
    assert!(left.iter().all(|finding| !matches!(finding, Finding::Leaked { .. } | Finding::LeakedName { .. })));
    assert!(!a.repair(&survey, &findings[0]).await.expect("an answer"), "not on an old survey");
}
