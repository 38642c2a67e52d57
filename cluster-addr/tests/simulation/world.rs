//! The directory and the network in virtual time, and who runs what.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::future::Future;
use std::ops::Bound;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use cluster_addr::allocator::REST;
use cluster_addr::cluster::Survey;
use cluster_addr::directory::{
    Change, Directory, DirectoryError, Entry, Listing, Outcome, Reply, Revision, Transaction, Versioned, Watch,
};
use cluster_addr::records::{CLUSTER_KEY, JOBS, decode, encode};
use cluster_addr::{ClusterRecord, JobId, JobRecord, Prefix};

use crate::history::{Event, History};
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
    /// The jobs of a node: what a daemon picks out of a listing of all jobs, done where it costs least.
    Owned(String),
}

pub enum Answer {
    Got(Option<Versioned>),
    Listed(Listing),
    Transacted(Outcome),
    Owned(Vec<JobRecord>),
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
    /// In a box, so that the queue has little to move.
    step: Box<Step>,
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
    data: Data,
    revision: Revision,
    /// The jobs' records by owner and key, and whose each key is.
    owned: HashMap<String, BTreeMap<String, JobRecord>>,
    owners: HashMap<String, String>,
    answers: HashMap<u64, Result<Answer>>,
    cut_off: Vec<Duration>,
    away: Duration,
    pub running: Running,
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

/// What the directory holds, in parts that are small, so that looking up and listing are cheap: all keys that are the same up
/// to the last mark in them.
#[derive(Default)]
struct Data(HashMap<String, BTreeMap<String, Versioned>>);

impl Data {
    fn part(key: &str) -> &str {
        &key[..key.rfind(['/', '.', ':']).map_or(0, |at| at + 1)]
    }

    fn get(&self, key: &str) -> Option<&Versioned> {
        self.0.get(Self::part(key))?.get(key)
    }

    fn set(&mut self, key: &str, versioned: Versioned) {
        let part = match self.0.get_mut(Self::part(key)) {
            Some(part) => part,
            None => self.0.entry(Self::part(key).to_owned()).or_default(),
        };
        part.insert(key.to_owned(), versioned);
    }

    fn remove(&mut self, key: &str) {
        if let Some(part) = self.0.get_mut(Self::part(key)) {
            part.remove(key);
        }
    }

    fn list(&self, prefix: &str) -> Vec<Entry> {
        let own = Self::part(prefix);
        let mut entries = Vec::new();
        for (_, part) in self.0.iter().filter(|(name, _)| *name == own || name.starts_with(prefix)) {
            let under = part.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
            let under = under.take_while(|(key, _)| key.starts_with(prefix));
            entries.extend(under.map(|(key, versioned)| Entry { key: key.clone(), versioned: versioned.clone() }));
        }
        // Of one part they come in order.
        if !entries.is_sorted_by(|one, other| one.key < other.key) {
            entries.sort_by(|one, other| one.key.cmp(&other.key));
        }
        entries
    }
}

/// What runs, and where.
#[derive(Default)]
pub struct Running {
    /// With the node, and the job's place in that node's list.
    jobs: HashMap<JobId, (usize, usize, Arc<JobRecord>)>,
    nodes: Vec<Vec<JobId>>,
}

impl Running {
    /// The node that runs a job, and the job's record as it had it.
    pub fn get(&self, id: &JobId) -> Option<(usize, &Arc<JobRecord>)> {
        self.jobs.get(id).map(|(node, _, record)| (*node, record))
    }

    /// How many jobs a node runs.
    pub fn count(&self, node: usize) -> usize {
        self.nodes[node].len()
    }

    /// Any job of a node.
    pub fn any_of(&self, node: usize, dice: &mut Dice) -> Option<Arc<JobRecord>> {
        let chosen = usize::try_from(dice.below(self.count(node) as u64)).expect("few");
        self.nodes[node].get(chosen).map(|id| Arc::clone(&self.jobs[id].2))
    }

    /// Any job of the other nodes, each as likely as the next.
    pub fn any_of_others(&self, node: usize, dice: &mut Dice) -> Option<Arc<JobRecord>> {
        let mut chosen = usize::try_from(dice.below((self.jobs.len() - self.count(node)) as u64)).expect("few");
        for (_, jobs) in self.nodes.iter().enumerate().filter(|(other, _)| *other != node) {
            match jobs.get(chosen) {
                Some(id) => return Some(Arc::clone(&self.jobs[id].2)),
                None => chosen -= jobs.len(),
            }
        }
        None
    }

    fn insert(&mut self, node: usize, record: JobRecord) {
        self.remove(&record.id);
        self.nodes[node].push(record.id.clone());
        self.jobs.insert(record.id.clone(), (node, self.nodes[node].len() - 1, Arc::new(record)));
    }

    fn remove(&mut self, id: &JobId) -> Option<Arc<JobRecord>> {
        let (node, place, record) = self.jobs.remove(id)?;
        self.nodes[node].swap_remove(place);
        if let Some(other) = self.nodes[node].get(place) {
            self.jobs.get_mut(other).expect("it is listed").1 = place;
        }
        Some(record)
    }
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
            data: Data::default(),
            revision: 0,
            owned: HashMap::new(),
            owners: HashMap::new(),
            answers: HashMap::new(),
            cut_off: vec![Duration::ZERO; nodes],
            away: Duration::ZERO,
            running: Running { jobs: HashMap::new(), nodes: vec![Vec::new(); nodes] },
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
        self.queue.push(Reverse(Scheduled { at: self.now + after, number: self.count, step: Box::new(step) }));
    }

    fn next_step(&mut self) -> Option<Step> {
        let Reverse(Scheduled { at, step, .. }) = self.queue.pop()?;
        self.now = at;
        Some(*step)
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
            while let Some(id) = self.running.nodes[node].last().cloned() {
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
    pub fn end(&mut self, id: &JobId) {
        for address in self.running.remove(id).iter().flat_map(|record| record.addresses()) {
            self.told.note(self.now, Event::Freed { address, job: id.clone() });
        }
    }

    /// A job has begun.
    pub fn begin(&mut self, node: usize, record: JobRecord) {
        self.taken += 1;
        for address in record.addresses() {
            let event = Event::Taken { address, job: record.id.clone(), reservation: record.reservation.clone() };
            self.told.note(self.now, event);
        }
        self.told.note(self.now, Event::Owned { job: record.id.clone(), owner: record.owner.clone() });
        self.running.insert(node, record);
    }

    /// A job runs at another node now.
    pub fn move_to(&mut self, node: usize, record: JobRecord) {
        self.moved += 1;
        self.told.note(self.now, Event::Owned { job: record.id.clone(), owner: record.owner.clone() });
        self.running.insert(node, record);
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
            Call::Owned(node) => {
                let owned = self.owned.get(&node).into_iter().flat_map(BTreeMap::values);
                Ok(Answer::Owned(owned.cloned().collect()))
            }
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
                Some(value) => self.data.set(key, Versioned { value: value.to_vec(), revision }),
                None => self.data.remove(key),
            }
            let change = Change { revision, key: key.clone(), value: value.clone() };
            self.recorded.note_change(self.now, &change)?;
            self.note_owner(&change)?;
        }
        Ok(Outcome::Done(revision))
    }

    fn note_owner(&mut self, change: &Change) -> Result<()> {
        if !change.key.starts_with(JOBS) {
            return Ok(());
        }
        if let Some(before) = self.owners.remove(&change.key).and_then(|node| self.owned.get_mut(&node)) {
            before.remove(&change.key);
        }
        if let Some(value) = &change.value {
            let record: JobRecord = decode(&change.key, value)?;
            self.owners.insert(change.key.clone(), record.owner.node.clone());
            self.owned.entry(record.owner.node.clone()).or_default().insert(change.key.clone(), record);
        }
        Ok(())
    }

    pub fn list(&self, prefix: &str) -> Listing {
        Listing { entries: self.data.list(prefix), revision: self.revision }
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

    /// The records of this node's jobs.
    pub async fn owned(&self, name: &str) -> Result<Vec<JobRecord>> {
        match self.ask(Call::Owned(name.to_owned())).await? {
            Answer::Owned(records) => Ok(records),
            _ => odd(),
        }
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
