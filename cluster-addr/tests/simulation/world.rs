//! The directory and the network in virtual time, and who runs what.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use cluster_addr::allocator::REST;
use cluster_addr::cluster::Survey;
use cluster_addr::directory::{
    Change, Directory, DirectoryError, Entry, Listing, Outcome, Reply, Revision, Transaction, Versioned, Watch,
};
use cluster_addr::history::{Event, History};
use cluster_addr::records::{CLUSTER_KEY, encode};
use cluster_addr::{ClusterRecord, JobId, JobRecord, Prefix};

use crate::node;

/// How long a node waits for an answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// What can go wrong.
#[derive(Debug, Clone, Copy)]
pub struct Faults {
    /// Crashes, partitions, lost answers.
    pub any: bool,
    /// The directory makes changes whose conditions do not hold: a planted fault.
    pub unchecked: bool,
}

impl Faults {
    pub const ALL: Faults = Faults { any: true, unchecked: false };
}

/// Numbers from a seed (splitmix64).
pub struct Dice(u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(from * 1000 + self.below((to - from) * 1000))
    }
}

/// What a node asks the directory.
pub enum Call {
    Get(String),
    List(String),
    Transact(Transaction),
}

pub enum Answer {
    Got(Option<Versioned>),
    Listed(Listing),
    Transacted(Outcome),
    Slept,
}

type Result<T> = std::result::Result<T, DirectoryError>;

enum Step {
    /// A request reaches the directory.
    Arrive { node: usize, id: u64, call: Call },
    /// An answer, or the end of patience, reaches a node.
    Answer { node: usize, id: u64, answer: Result<Answer> },
    /// A node's daemon dies, perhaps with its machine.
    Crash { node: usize },
    /// It is started again.
    Start { node: usize },
    /// A node is cut off from the directory until then.
    CutOff { node: usize },
    /// The directory does not answer for a while.
    Away,
}

struct Scheduled {
    at: Duration,
    number: u64,
    step: Step,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// Everything.
pub struct World {
    pub now: Duration,
    pub dice: Dice,
    faults: Faults,
    queue: BinaryHeap<Reverse<Scheduled>>,
    count: u64,
    data: BTreeMap<String, Versioned>,
    revision: Revision,
    answers: HashMap<u64, Result<Answer>>,
    cut_off: Vec<Duration>,
    away: Duration,
    /// What runs, and where.
    pub running: BTreeMap<JobId, (usize, JobRecord)>,
    /// What the nodes were told.
    pub told: History,
    /// What the directory recorded.
    pub recorded: History,
    pub taken: u64,
    pub takes: u64,
    moved: u64,
    crashes: u64,
    unanswered: u64,
    ended: bool,
}

pub type Shared = Arc<Mutex<World>>;

/// How a run went.
#[derive(Debug)]
#[allow(dead_code)]
pub struct Report {
    pub violations: Vec<String>,
    pub taken: u64,
    pub moved: u64,
    pub crashes: u64,
    pub unanswered: u64,
    /// Addresses that were had by more than one job, one after the other.
    pub reused: usize,
    revision: Revision,
    time: Duration,
}

/// Plays one seed and judges it.
pub fn run(seed: u64, nodes: usize, takes: u64, faults: Faults) -> Report {
    let world = World::play(seed, nodes, takes, faults);
    let mut violations: Vec<String> = Vec::new();
    for history in [&world.told, &world.recorded] {
        violations.extend(history.check(REST).iter().map(ToString::to_string));
    }
    let listing = world.list("");
    match Survey::of(&listing) {
        Ok(survey) => violations.extend(survey.check().iter().map(ToString::to_string)),
        Err(error) => violations.push(error.to_string()),
    }
    violations.truncate(5);
    let World { taken, moved, crashes, unanswered, revision, now, .. } = world;
    Report { violations, taken, moved, crashes, unanswered, reused: world.recorded.reused(), revision, time: now }
}

pub fn lock(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().expect("nothing panics while it is held")
}

impl World {
    /// Plays one seed to its end: all faults over, everything settled.
    pub fn play(seed: u64, nodes: usize, takes: u64, faults: Faults) -> World {
        let prefixes = [("10.77.0.0/16", 26), ("fd77::/64", 122)]
            .map(|(net, block_length)| Prefix { net: net.parse().expect("a net"), block_length });
        let record = ClusterRecord { id: "sim".into(), prefixes: prefixes.to_vec() };
        let mut world = World {
            now: Duration::ZERO,
            dice: Dice(seed),
            faults,
            queue: BinaryHeap::new(),
            count: 0,
            data: BTreeMap::new(),
            revision: 0,
            answers: HashMap::new(),
            cut_off: vec![Duration::ZERO; nodes],
            away: Duration::ZERO,
            running: BTreeMap::new(),
            told: History::default(),
            recorded: History::default(),
            taken: 0,
            takes,
            moved: 0,
            crashes: 0,
            unanswered: 0,
            ended: false,
        };
        let made = world.transact(&Transaction::default().put(CLUSTER_KEY, encode(&record)));
        assert!(matches!(made, Ok(Outcome::Done(1))));
        for node in 0..nodes {
            world.schedule(Duration::ZERO, Step::Start { node });
        }
        world.disturb();
        let shared = Arc::new(Mutex::new(world));
        let mut tasks: Vec<Option<Pin<Box<dyn Future<Output = ()>>>>> = (0..nodes).map(|_| None).collect();
        let mut context = Context::from_waker(Waker::noop());
        loop {
            let Some(step) = lock(&shared).next_step() else { break };
            let node = match step {
                Step::Start { node } => {
                    tasks[node] = Some(Box::pin(node::live(Arc::clone(&shared), node)));
                    Some(node)
                }
                Step::Crash { node } => {
                    tasks[node] = None;
                    lock(&shared).crashed(node);
                    None
                }
                Step::Answer { node, id, answer } => {
                    lock(&shared).answers.insert(id, answer);
                    Some(node)
                }
                Step::Arrive { node, id, call } => {
                    lock(&shared).arrived(node, id, call);
                    None
                }
                Step::CutOff { node } => {
                    lock(&shared).cut(node);
                    None
                }
                Step::Away => {
                    lock(&shared).go_away();
                    None
                }
            };
            if let Some(node) = node
                && let Some(task) = &mut tasks[node]
                && task.as_mut().poll(&mut context).is_ready()
            {
                tasks[node] = None;
            }
        }
        drop(tasks);
        let Ok(world) = Arc::try_unwrap(shared) else { panic!("all nodes have ended") };
        world.into_inner().expect("nothing panicked")
    }

    fn schedule(&mut self, after: Duration, step: Step) {
        self.count += 1;
        self.queue.push(Reverse(Scheduled { at: self.now + after, number: self.count, step }));
    }

    fn next_step(&mut self) -> Option<Step> {
        let Reverse(Scheduled { at, step, .. }) = self.queue.pop()?;
        self.now = at;
        Some(step)
    }

    /// Whether all that was to be taken was taken, so that everything settles now.
    pub fn is_over(&mut self) -> bool {
        if self.taken >= self.takes {
            self.ended = true;
        }
        self.ended
    }

    /// Schedules the next misfortunes.
    fn disturb(&mut self) {
        if !self.faults.any || self.ended {
            return;
        }
        let nodes = self.cut_off.len() as u64;
        let node = usize::try_from(self.dice.below(nodes)).expect("few");
        // Often enough for each node to have some, whatever their number.
        let after = self.dice.millis(1000, 1000 + 200_000 / nodes);
        let step = match self.dice.below(10) {
            0..5 => Step::Crash { node },
            5..9 => Step::CutOff { node },
            _ => Step::Away,
        };
        self.schedule(after, step);
    }

    fn crashed(&mut self, node: usize) {
        self.crashes += 1;
        if self.dice.one_in(3) {
            // The machine, and all that ran there.
            let lost: Vec<_> =
                self.running.iter().filter(|(_, (at, _))| *at == node).map(|(id, _)| id.clone()).collect();
            for id in lost {
                self.end(&id);
            }
        }
        let after = self.dice.millis(100, 60_000);
        self.schedule(after, Step::Start { node });
        self.disturb();
    }

    fn cut(&mut self, node: usize) {
        self.cut_off[node] = self.now + self.dice.millis(1000, 90_000);
        self.disturb();
    }

    fn go_away(&mut self) {
        self.away = self.now + self.dice.millis(500, 15_000);
        self.disturb();
    }

    /// A job has ended: whoever looks from outside sees its addresses free.
    pub fn end(&mut self, id: &JobId) -> Option<JobRecord> {
        let (_, record) = self.running.remove(id)?;
        for address in record.addresses() {
            self.told.note(self.now, Event::Freed { address, job: id.clone() });
        }
        Some(record)
    }

    /// A job has begun.
    pub fn begin(&mut self, node: usize, record: JobRecord) {
        self.taken += 1;
        for address in record.addresses() {
            let event = Event::Taken { address, job: record.id.clone(), reservation: record.reservation.clone() };
            self.told.note(self.now, event);
        }
        self.told.note(self.now, Event::Owned { job: record.id.clone(), owner: record.owner.clone() });
        self.running.insert(record.id.clone(), (node, record));
    }

    /// A job runs at another node now.
    pub fn move_to(&mut self, node: usize, record: JobRecord) {
        self.moved += 1;
        self.told.note(self.now, Event::Owned { job: record.id.clone(), owner: record.owner.clone() });
        self.running.insert(record.id.clone(), (node, record));
    }

    fn arrived(&mut self, node: usize, id: u64, call: Call) {
        let faults = self.faults.any && !self.ended;
        let unreachable = faults && (self.cut_off[node] > self.now || self.away > self.now);
        if unreachable || (faults && self.dice.one_in(400)) {
            // Nothing arrived; the node can't tell unless it was refused a connection.
            self.unanswered += 1;
            let lost = match self.dice.one_in(2) {
                true => DirectoryError::Unreachable("refused".into()),
                false => DirectoryError::Unknown("no answer".into()),
            };
            return self.schedule(PATIENCE, Step::Answer { node, id, answer: Err(lost) });
        }
        let answer = match call {
            Call::Get(key) => Ok(Answer::Got(self.data.get(&key).cloned())),
            Call::List(prefix) => Ok(Answer::Listed(self.list(&prefix))),
            Call::Transact(transaction) => self.transact(&transaction).map(Answer::Transacted),
        };
        let after = self.dice.millis(1, 5);
        if faults && self.dice.one_in(300) {
            self.unanswered += 1;
            let lost = Err(DirectoryError::Unknown("the answer was lost".into()));
            return self.schedule(PATIENCE, Step::Answer { node, id, answer: lost });
        }
        self.schedule(after, Step::Answer { node, id, answer });
    }

    fn transact(&mut self, transaction: &Transaction) -> Result<Outcome> {
        transaction.check()?;
        for (key, expect) in &transaction.conditions {
            let found = self.data.get(key);
            let overlooked = self.faults.unchecked && self.dice.one_in(3);
            if !expect.holds(found) && !overlooked {
                return Ok(Outcome::Conflict { key: key.clone(), found: found.cloned() });
            }
        }
        if transaction.writes.is_empty() {
            return Ok(Outcome::Done(self.revision));
        }
        self.revision += 1;
        let revision = self.revision;
        for (key, value) in &transaction.writes {
            match value {
                Some(value) => drop(self.data.insert(key.clone(), Versioned { value: value.to_vec(), revision })),
                None => drop(self.data.remove(key)),
            }
            let change = Change { revision, key: key.clone(), value: value.clone() };
            self.recorded.note_change(self.now, &change)?;
        }
        Ok(Outcome::Done(revision))
    }

    pub fn list(&self, prefix: &str) -> Listing {
        let under = self.data.range(prefix.to_owned()..).take_while(|(key, _)| key.starts_with(prefix));
        let entries = under.map(|(key, versioned)| Entry { key: key.clone(), versioned: versioned.clone() });
        Listing { entries: entries.collect(), revision: self.revision }
    }
}

/// A node's connection to the directory; requests sent by one that has crashed since still arrive.
pub struct Line {
    pub world: Shared,
    pub node: usize,
}

/// A request that waits for its answer.
struct Waiting {
    world: Shared,
    node: usize,
    id: u64,
}

impl Future for Waiting {
    type Output = Result<Answer>;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        lock(&self.world).answers.remove(&self.id).map_or(Poll::Pending, Poll::Ready)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // The node crashed; its answer goes nowhere. (A test that panics has the lock poisoned.)
        if let Ok(mut world) = self.world.lock() {
            world.answers.remove(&self.id);
        }
    }
}

impl Line {
    async fn ask(&self, call: Call) -> Result<Answer> {
        let waiting = {
            let mut world = lock(&self.world);
            world.count += 1;
            let id = world.count;
            // Now and then a request is under way for longer than its sender waits.
            let slow = world.faults.any && !world.ended && world.dice.one_in(500);
            let after = if slow { world.dice.millis(10, 20_000) } else { world.dice.millis(1, 5) };
            let node = self.node;
            if after > PATIENCE {
                world.unanswered += 1;
                let late = Err(DirectoryError::Unknown("no answer yet".into()));
                world.schedule(PATIENCE, Step::Answer { node, id, answer: late });
                let id = 0;
                world.schedule(after, Step::Arrive { node, id, call });
            } else {
                world.schedule(after, Step::Arrive { node, id, call });
            }
            Waiting { world: Arc::clone(&self.world), node, id }
        };
        waiting.await
    }
}

/// Waits in virtual time.
pub async fn sleep(world: &Shared, node: usize, time: Duration) {
    let waiting = {
        let mut locked = lock(world);
        locked.count += 1;
        let id = locked.count;
        locked.schedule(time, Step::Answer { node, id, answer: Ok(Answer::Slept) });
        Waiting { world: Arc::clone(world), node, id }
    };
    debug_assert_eq!(waiting.node, node);
    // It can't fail.
    let _ = waiting.await;
}

fn odd<T>() -> Result<T> {
    Err(DirectoryError::Storage("an answer to another question".into()))
}

impl Directory for Line {
    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<Versioned>> {
        Box::pin(async move {
            match self.ask(Call::Get(key.to_owned())).await? {
                Answer::Got(found) => Ok(found),
                _ => odd(),
            }
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, Listing> {
        Box::pin(async move {
            match self.ask(Call::List(prefix.to_owned())).await? {
                Answer::Listed(listing) => Ok(listing),
                _ => odd(),
            }
        })
    }

    fn transact<'a>(&'a self, transaction: &'a Transaction) -> Reply<'a, Outcome> {
        Box::pin(async move {
            match self.ask(Call::Transact(transaction.clone())).await? {
                Answer::Transacted(outcome) => Ok(outcome),
                _ => odd(),
            }
        })
    }

    fn watch<'a>(&'a self, _: &'a str, _: Revision) -> Reply<'a, Watch> {
        // Nodes here learn by looking, which is the harder way.
        Box::pin(async { Err(DirectoryError::Unreachable("not here".into())) })
    }
}
