//! Both machines, a directory and a connection under a seeded scheduler that delivers, delays, loses, cuts and crashes.
//!
//! At every step at most one side runs the job; at the end, with the directory reachable again, nobody is left frozen:
//! the job runs where the directory says, unless that node died. A failure prints the seed that replays it.

use std::collections::VecDeque;

use handoff::frame::{HEADER_LEN, Header, encode};
use handoff::message::{Claim, Message, Offer};
use handoff::source::{self, Source};
use handoff::target::{self, Target};
use handoff::{Ownership, Timer};

const SOURCE: &str = "A";
const TARGET: &str = "B";
const EPOCH: u64 = 7;
/// A move that works takes about 60 steps; with every fault it must end long before this.
const STEP_LIMIT: usize = 20_000;

struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }

    fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Target,
}

impl Side {
    fn node(self) -> &'static str {
        match self {
            Side::Source => SOURCE,
            Side::Target => TARGET,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    Absent,
    Running,
    Frozen,
}

/// A swap on its way to the directory; `answered` when its asker was told "unknown" meanwhile.
struct Request {
    asker: Side,
    answered: bool,
}

/// A blocking step of a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Round(u32),
    Freeze,
    Residual,
    Judge,
    Prepare,
    Run,
}

struct Node {
    alive: bool,
    job: Job,
    inbox: VecDeque<Vec<u8>>,
    /// The connection ended and this side has not noticed.
    hangup: bool,
    work: Option<Work>,
    timer: Option<Timer>,
    finished: bool,
}

impl Node {
    fn new(job: Job) -> Node {
        Node { alive: true, job, inbox: VecDeque::new(), hangup: false, work: None, timer: None, finished: false }
    }
}

struct Faults {
    /// One in so many steps cuts the connection; 0 is never.
    cut: usize,
    crash: Option<(Side, usize)>,
    cancel: usize,
    fail: usize,
    unknown: usize,
    early_timeouts: bool,
}

struct World {
    random: Random,
    source: Source,
    target: Target,
    nodes: [Node; 2],
    connected: bool,
    directory: (&'static str, u64),
    requests: VecDeque<Request>,
    answers: Vec<(Side, Ownership)>,
    residual_received: bool,
    target_ran: bool,
    faults: Faults,
    refuse: bool,
    steps: usize,
}

impl World {
    fn new(seed: u64, faults: Faults) -> World {
        let claim = Claim { job: "j1".into(), epoch: EPOCH, source: SOURCE.into(), target: TARGET.into() };
        let mut random = Random::new(seed);
        let refuse = random.chance(40);
        World {
            random,
            source: Source::new(claim),
            target: Target::new(TARGET),
            nodes: [Node::new(Job::Running), Node::new(Job::Absent)],
            connected: true,
            directory: (SOURCE, EPOCH),
            requests: VecDeque::new(),
            answers: Vec::new(),
            residual_received: false,
            target_ran: false,
            faults,
            refuse,
            steps: 0,
        }
    }

    fn node(&mut self, side: Side) -> &mut Node {
        &mut self.nodes[side as usize]
    }

    fn tell_source(&mut self, event: source::Event<'_>) {
        for action in self.source.handle_event(event) {
            self.do_source(action);
        }
    }

    fn tell_target(&mut self, event: target::Event<'_>) {
        for action in self.target.handle_event(event) {
            self.do_target(action);
        }
    }

    fn send(&mut self, from: Side, message: &Message<'_>) {
        if !self.connected {
            return;
        }
        let mut bytes = Vec::new();
        encode(message, &mut bytes);
        let to = if from == Side::Source { Side::Target } else { Side::Source };
        self.node(to).inbox.push_back(bytes);
    }

    fn do_source(&mut self, action: source::Action) {
        use source::Action;
        match action {
            Action::Send(message) => self.send(Side::Source, &message),
            Action::SendOffer => {
                let offer =
                    Offer { claim: self.source.claim().clone(), spec: vec![1], process: vec![2; 40], net: Vec::new() };
                self.send(Side::Source, &Message::Offer(offer));
            }
            Action::Arm(timer) => self.node(Side::Source).timer = Some(timer),
            Action::CopyRound { number } => self.node(Side::Source).work = Some(Work::Round(number)),
            Action::Freeze => self.node(Side::Source).work = Some(Work::Freeze),
            Action::SendResidual => self.node(Side::Source).work = Some(Work::Residual),
            Action::Fence => self.requests.push_back(Request { asker: Side::Source, answered: false }),
            Action::Resume => {
                assert_ne!(self.nodes[0].job, Job::Absent, "resumed what was discarded");
                self.node(Side::Source).job = Job::Running;
                self.node(Side::Source).work = None;
            }
            Action::Discard => self.node(Side::Source).job = Job::Absent,
            Action::Finish(_) => self.finish(Side::Source),
        }
        self.check();
    }

    fn do_target(&mut self, action: target::Action) {
        use target::Action;
        match action {
            Action::Send(message) => self.send(Side::Target, &message),
            Action::Arm(timer) => self.node(Side::Target).timer = Some(timer),
            Action::Judge => self.node(Side::Target).work = Some(Work::Judge),
            Action::Apply => assert_eq!(self.nodes[1].job, Job::Frozen, "bulk for a job that is not being built"),
            Action::Prepare => {
                self.residual_received = true;
                self.node(Side::Target).work = Some(Work::Prepare);
            }
            Action::Transfer => self.requests.push_back(Request { asker: Side::Target, answered: false }),
            Action::Run { epoch } => {
                assert_eq!(epoch, EPOCH + 1);
                self.node(Side::Target).job = Job::Running;
                self.target_ran = true;
                self.node(Side::Target).work = Some(Work::Run);
            }
            Action::Discard => {
                assert!(!self.target_ran, "discarded a job that runs");
                self.node(Side::Target).job = Job::Absent;
                self.node(Side::Target).work = None;
            }
            Action::Finish(_) => self.finish(Side::Target),
        }
        self.check();
    }

    fn finish(&mut self, side: Side) {
        let node = self.node(side);
        assert!(!node.finished, "{side:?} finished twice");
        node.finished = true;
        node.timer = None;
        self.close();
    }

    /// The connection ends; what was sent may still arrive, then both sides see the end.
    fn close(&mut self) {
        if self.connected {
            self.connected = false;
            self.nodes[0].hangup = true;
            self.nodes[1].hangup = true;
        }
    }

    fn crash(&mut self, side: Side) {
        let node = self.node(side);
        node.alive = false;
        node.job = Job::Absent;
        node.work = None;
        node.timer = None;
        node.inbox.clear();
        self.close();
        self.answers.retain(|(asker, _)| *asker != side);
    }

    fn check(&self) {
        let running = self.nodes.iter().filter(|node| node.job == Job::Running).count();
        assert!(running <= 1, "two sides run the job");
        if self.nodes[1].job == Job::Running {
            assert_eq!(self.directory, (TARGET, EPOCH + 1), "the target runs what it does not own");
        }
        if self.nodes[0].job == Job::Running {
            assert_eq!(self.directory.0, SOURCE, "the source runs what it does not own");
        }
    }

    fn step(&mut self, faulty: bool) -> bool {
        self.steps += 1;
        if let Some((side, at)) = self.faults.crash
            && at == self.steps
        {
            self.crash(side);
            return true;
        }
        if faulty {
            if self.faults.cut > 0 && self.connected && self.random.chance(self.faults.cut) {
                let lose = self.random.below(3);
                self.close();
                for node in &mut self.nodes {
                    // A cut connection loses the end of what was sent.
                    let keep = node.inbox.len().saturating_sub(lose);
                    node.inbox.truncate(keep);
                }
            }
            if self.faults.cancel > 0 && self.nodes[0].alive && self.random.chance(self.faults.cancel) {
                self.tell_source(source::Event::Cancel("the user changed their mind".into()));
            }
            if self.faults.fail > 0 && self.nodes[1].alive && self.random.chance(self.faults.fail) {
                self.tell_target(target::Event::Failed("no memory".into()));
            }
        }
        let mut choices: Vec<usize> = Vec::new();
        for (index, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.alive) {
            if node.work.is_some() {
                choices.push(index);
            } else if !node.inbox.is_empty() || node.hangup {
                choices.push(2 + index);
            }
        }
        choices.extend((!self.requests.is_empty()).then_some(4));
        choices.extend((!self.answers.is_empty()).then_some(5));
        let timers: Vec<usize> =
            (0..2).filter(|&side| self.nodes[side].alive && self.nodes[side].timer.is_some()).map(|s| 6 + s).collect();
        // Time passes only when nothing else can happen, unless the schedule is one of slow peers.
        if choices.is_empty() || (faulty && self.faults.early_timeouts && self.random.chance(8)) {
            choices.extend(timers);
        }
        if choices.is_empty() {
            return false;
        }
        match choices[self.random.below(choices.len())] {
            0 => self.work_source(),
            1 => self.work_target(),
            2 => self.deliver(Side::Source),
            3 => self.deliver(Side::Target),
            4 => self.serve_directory(faulty),
            5 => self.deliver_answer(),
            6 => {
                let timer = self.nodes[0].timer.take().expect("armed");
                self.tell_source(source::Event::Timeout(timer));
            }
            _ => {
                let timer = self.nodes[1].timer.take().expect("armed");
                self.tell_target(target::Event::Timeout(timer));
            }
        }
        true
    }

    fn work_source(&mut self) {
        match self.node(Side::Source).work.take().expect("chosen") {
            Work::Round(number) => {
                if number == 1 {
                    self.send(Side::Source, &Message::Layout(b"layout"));
                }
                self.send(Side::Source, &Message::Pages { process: 0, address: 4096, data: &[0; 64] });
                self.tell_source(source::Event::RoundCopied { again: number < 3 });
            }
            Work::Freeze => {
                self.node(Side::Source).job = Job::Frozen;
                self.tell_source(source::Event::Frozen);
            }
            Work::Residual => {
                let kind = handoff::SectionKind::Tree;
                self.send(Side::Source, &Message::Section { kind, data: b"tree" });
                self.tell_source(source::Event::ResidualSent { sections: vec![(kind, 4)] });
            }
            work => panic!("{work:?} at the source"),
        }
    }

    fn work_target(&mut self) {
        match self.node(Side::Target).work.take().expect("chosen") {
            Work::Judge => {
                let verdict = if self.refuse { Err("this CPU lacks avx9".to_owned()) } else { Ok(()) };
                if verdict.is_ok() {
                    self.node(Side::Target).job = Job::Frozen;
                }
                self.tell_target(target::Event::Judged(verdict));
            }
            Work::Prepare => self.tell_target(target::Event::Prepared),
            Work::Run => self.tell_target(target::Event::Running { at_ns: 1, steps: Vec::new() }),
            work => panic!("{work:?} at the target"),
        }
    }

    fn deliver(&mut self, side: Side) {
        let Some(bytes) = self.node(side).inbox.pop_front() else {
            self.node(side).hangup = false;
            match side {
                Side::Source => self.tell_source(source::Event::Disconnected("cut".into())),
                Side::Target => self.tell_target(target::Event::Disconnected("cut".into())),
            }
            return;
        };
        let (header, payload) = bytes.split_first_chunk::<HEADER_LEN>().expect("a whole frame");
        let message = Header::decode(header).and_then(|header| header.open(payload)).expect("our own frame");
        match side {
            Side::Source => self.tell_source(source::Event::Message(&message)),
            Side::Target => self.tell_target(target::Event::Message(&message)),
        }
    }

    fn serve_directory(&mut self, faulty: bool) {
        // The asker's daemon is down: the question never leaves.
        let daemon_down = faulty && self.faults.unknown > 0 && self.random.chance(3 * self.faults.unknown);
        let index = self.random.below(self.requests.len());
        if daemon_down && !self.requests[index].answered {
            let asker = self.requests.remove(index).expect("in range").asker;
            if self.nodes[asker as usize].alive {
                self.answers.push((asker, Ownership::Unasked));
            }
            return;
        }
        let unreachable = faulty && self.faults.unknown > 0 && self.random.chance(self.faults.unknown);
        if unreachable && !self.requests[index].answered {
            // The asker gives up on the answer while the request is still under way.
            self.requests[index].answered = true;
            let asker = self.requests[index].asker;
            if self.nodes[asker as usize].alive {
                self.answers.push((asker, Ownership::Unknown));
            }
            return;
        }
        let request = self.requests.remove(index).expect("in range");
        let answer = if self.directory == (SOURCE, EPOCH) {
            self.directory = (request.asker.node(), EPOCH + 1);
            Ownership::Won { epoch: EPOCH + 1 }
        } else {
            Ownership::Lost { owner: self.directory.0.into(), epoch: self.directory.1 }
        };
        if !request.answered && self.nodes[request.asker as usize].alive {
            self.answers.push((request.asker, answer));
        }
    }

    fn deliver_answer(&mut self) {
        let index = self.random.below(self.answers.len());
        match self.answers.swap_remove(index) {
            (Side::Source, answer) => self.tell_source(source::Event::Fenced(answer)),
            (Side::Target, answer) => self.tell_target(target::Event::Transferred(answer)),
        }
    }

    /// Runs to the end and returns the number of steps; faults stop after 300 steps.
    fn run(mut self) -> World {
        self.tell_source(source::Event::Start);
        self.tell_target(target::Event::Start);
        while self.step(self.steps < 300) {
            assert!(self.steps < STEP_LIMIT, "the move never ends: {:?} {:?}", self.source, self.target);
        }
        self.check_end();
        self
    }

    fn check_end(&self) {
        let [source, target] = &self.nodes;
        for (node, side) in [(source, "source"), (target, "target")] {
            assert!(!node.alive || node.finished, "the {side} never finished: {:?} {:?}", self.source, self.target);
            assert_ne!(node.job, Job::Frozen, "the {side} is left frozen");
        }
        if self.directory.0 == SOURCE {
            assert_eq!(source.alive, source.job == Job::Running, "a source that survives and owns the job runs it");
            assert_eq!(target.job, Job::Absent, "nothing is left at the target");
        } else {
            assert_eq!(target.alive, target.job == Job::Running, "the owner runs the job");
            assert_eq!(source.job, Job::Absent);
        }
        if !source.alive && target.alive && self.residual_received && self.directory.0 == TARGET {
            assert_eq!(target.job, Job::Running);
        }
    }
}

fn calm() -> Faults {
    Faults { cut: 0, crash: None, cancel: 0, fail: 0, unknown: 0, early_timeouts: false }
}

/// Runs `make(seed)` for every seed and names the one that fails.
fn sweep(seeds: std::ops::Range<u64>, make: impl Fn(u64) -> Faults) {
    for seed in seeds {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| World::new(seed, make(seed)).run()));
        if let Err(panic) = result {
            eprintln!("the failing seed is {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn without_faults_the_job_moves_or_is_refused() {
    for seed in 0..500 {
        let world = World::new(seed, calm()).run();
        let expected = if world.refuse { SOURCE } else { TARGET };
        assert_eq!(world.directory.0, expected, "seed {seed}");
    }
}

#[test]
fn a_cut_connection_leaves_one_owner() {
    sweep(0..6_000, |_| Faults { cut: 25, ..calm() });
}

#[test]
fn a_directory_that_does_not_answer_only_delays() {
    sweep(0..4_000, |_| Faults { unknown: 2, ..calm() });
}

#[test]
fn every_fault_at_once_leaves_one_owner() {
    sweep(0..12_000, |seed| Faults {
        cut: 40,
        cancel: 60,
        fail: 60,
        unknown: 2,
        early_timeouts: seed % 2 == 0,
        crash: match seed % 3 {
            0 => None,
            1 => Some((Side::Source, (seed / 3 % 80) as usize)),
            _ => Some((Side::Target, (seed / 3 % 80) as usize)),
        },
    });
}

#[test]
fn a_crash_at_every_step_leaves_one_owner() {
    for seed in 0..40 {
        let length = World::new(seed, calm()).run().steps;
        for at in 1..=length {
            for side in [Side::Source, Side::Target] {
                for unknown in [0, 2] {
                    let faults = Faults { crash: Some((side, at)), unknown, ..calm() };
                    let result =
                        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| World::new(seed, faults).run()));
                    assert!(result.is_ok(), "seed {seed}: {side:?} crashed at step {at}, unknown {unknown}");
                }
            }
        }
    }
}
