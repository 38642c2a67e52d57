//! The side that gets the job.

use crate::message::{Claim, Committed, Hello, Message, Reason, Round};
use crate::phase::{Ownership, Timer};

/// Where the target stands. The order is the order of a move that succeeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Nothing was said yet.
    Idle,
    /// Waiting for the source's greeting.
    Greeting,
    /// Waiting for the offer.
    Greeted,
    /// The driver looks at the offer.
    Judging,
    /// Memory arrives while the job runs at the source.
    Receiving,
    /// The job is frozen at the source; the residual arrives.
    Residual,
    /// Everything is here; the driver restores it.
    Preparing,
    /// The swap was asked for; its answer decides.
    Committing,
    /// The move is over, one way or the other.
    Done,
}

/// What happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// The connection to the source is there.
    Start,
    /// The source said something.
    Message(&'a Message<'a>),
    /// The connection is gone, in words.
    Disconnected(String),
    /// The armed timer ran out.
    Timeout(Timer),
    /// The answer to [`Action::Judge`]: what was made ready for the job, or why it can't run here.
    Judged(Result<(), String>),
    /// [`Action::Prepare`] is done: only the swap is missing.
    Prepared,
    /// The answer to [`Action::Transfer`].
    Transferred(Ownership),
    /// [`Action::Run`] is done.
    Running {
        /// When the job's first instruction ran, CLOCK_REALTIME in nanoseconds.
        at_ns: u64,
        /// What was done since the end of the residual, with durations in microseconds.
        steps: Vec<(String, u64)>,
    },
    /// A step failed here, or someone takes the move back.
    Failed(String),
}

/// What is to be done, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send this.
    Send(Message<'static>),
    /// Start the timer, instead of any other.
    Arm(Timer),
    /// Look at the offer just received and build what the job needs; then [`Event::Judged`].
    Judge,
    /// Put the layout, pages or section just received in place.
    Apply,
    /// Everything has arrived: restore all but the running; then [`Event::Prepared`].
    Prepare,
    /// Ask the directory for `(epoch, source) -> (epoch + 1, target)`; then [`Event::Transferred`].
    Transfer,
    /// The job is this node's: let it run; then [`Event::Running`].
    Run {
        /// Its epoch.
        epoch: u64,
    },
    /// Leave nothing of the job here.
    Discard,
    /// The move is over.
    Finish(Outcome),
}

/// How the move ended for the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The job runs here.
    Running {
        /// Its epoch.
        epoch: u64,
    },
    /// The job was not wanted here.
    Refused {
        /// In words.
        reason: String,
    },
    /// The job does not run here.
    Aborted {
        /// In words.
        reason: String,
    },
}

/// The target's machine.
#[derive(Debug)]
pub struct Target {
    node: String,
    claim: Option<Claim>,
    phase: Phase,
    epoch: u64,
    /// The swap was asked for without an answer: it may have been made.
    asked: bool,
}

impl Target {
    /// A target on `node` that has heard nothing yet.
    pub fn new(node: &str) -> Target {
        Target { node: node.to_owned(), claim: None, phase: Phase::Idle, epoch: 0, asked: false }
    }

    /// What is being moved, once the offer is here.
    pub fn claim(&self) -> Option<&Claim> {
        self.claim.as_ref()
    }

    /// Tells what happened and asks what is to be done.
    pub fn handle_event(&mut self, event: Event<'_>) -> Vec<Action> {
        if self.phase == Phase::Done && !matches!(event, Event::Running { .. }) {
            return Vec::new();
        }
        match event {
            Event::Start if self.phase == Phase::Idle => {
                self.phase = Phase::Greeting;
                vec![Action::Arm(Timer::Hello)]
            }
            Event::Start => Vec::new(),
            Event::Message(message) => self.handle_message(message),
            Event::Disconnected(reason) => self.handle_disconnected(reason),
            Event::Timeout(timer) => self.handle_timeout(timer),
            Event::Judged(verdict) => self.handle_judged(verdict),
            Event::Prepared => self.handle_prepared(),
            Event::Transferred(answer) => self.handle_transferred(answer),
            Event::Running { at_ns, steps } => self.handle_running(at_ns, steps),
            Event::Failed(reason) => self.give_up(reason),
        }
    }

    fn handle_message(&mut self, message: &Message<'_>) -> Vec<Action> {
        match (message, self.phase) {
            (Message::Hello(hello), Phase::Greeting) => self.handle_hello(hello),
            (Message::Offer(offer), Phase::Greeted) => self.handle_offer(&offer.claim),
            (
                Message::Layout(_) | Message::Pages { .. } | Message::Section { .. },
                Phase::Receiving | Phase::Residual,
            ) => vec![Action::Apply],
            (Message::RoundEnd(Round { number }), Phase::Receiving) => {
                vec![Action::Send(Message::RoundAck(Round { number: *number })), Action::Arm(Timer::Precopy)]
            }
            (Message::Freezing, Phase::Receiving) => {
                self.phase = Phase::Residual;
                vec![Action::Arm(Timer::Residual)]
            }
            (Message::ResidualEnd(_), Phase::Residual) => {
                self.phase = Phase::Preparing;
                vec![Action::Prepare]
            }
            // The source's promise that it keeps the job, see the crate's documentation: valid even while the swap's
            // answer is out, which can only be that it was lost.
            (Message::Abort(abort), _) => self.end(format!("the source gave up: {}", abort.reason), false),
            (message, phase) => self.give_up(format!("the source said {:?} in phase {phase:?}", message.kind())),
        }
    }

    fn handle_hello(&mut self, hello: &Hello) -> Vec<Action> {
        if hello.common_protocol().is_none() {
            return self.refuse(format!(
                "node {} speaks the move protocol {} to {}, {} speaks {} to {}: run releases that share one",
                hello.node,
                hello.protocol_min,
                hello.protocol_max,
                self.node,
                crate::message::PROTOCOL_MIN,
                crate::message::PROTOCOL_MAX
            ));
        }
        self.phase = Phase::Greeted;
        vec![Action::Send(Message::Hello(Hello::new(&self.node))), Action::Arm(Timer::Offer)]
    }

    fn handle_offer(&mut self, claim: &Claim) -> Vec<Action> {
        if claim.target != self.node {
            return self.refuse(format!("the offer is for node {}, this is {}", claim.target, self.node));
        }
        if claim.source == self.node {
            return self.refuse("the job is on this node already".to_owned());
        }
        let Some(epoch) = claim.epoch.checked_add(1) else {
            return self.refuse("the job's epoch is exhausted".to_owned());
        };
        self.epoch = epoch;
        self.claim = Some(claim.clone());
        self.phase = Phase::Judging;
        vec![Action::Judge]
    }

    fn handle_judged(&mut self, verdict: Result<(), String>) -> Vec<Action> {
        if self.phase != Phase::Judging {
            return Vec::new();
        }
        match verdict {
            Ok(()) => {
                self.phase = Phase::Receiving;
                vec![Action::Send(Message::Accept), Action::Arm(Timer::Precopy)]
            }
            Err(reason) => self.refuse(reason),
        }
    }

    fn refuse(&mut self, reason: String) -> Vec<Action> {
        self.phase = Phase::Done;
        vec![
            Action::Discard,
            Action::Send(Message::Refuse(Reason { reason: reason.clone() })),
            Action::Finish(Outcome::Refused { reason }),
        ]
    }

    fn handle_prepared(&mut self) -> Vec<Action> {
        if self.phase != Phase::Preparing {
            return Vec::new();
        }
        self.phase = Phase::Committing;
        vec![Action::Send(Message::Prepared), Action::Transfer]
    }

    fn handle_transferred(&mut self, answer: Ownership) -> Vec<Action> {
        if self.phase != Phase::Committing {
            return Vec::new();
        }
        // `epoch` is the claim's plus one.
        match answer.judged_by(&self.node, self.epoch - 1) {
            Ownership::Won { epoch } => {
                self.phase = Phase::Done;
                self.epoch = epoch;
                vec![Action::Run { epoch }]
            }
            Ownership::Lost { owner, epoch } => {
                self.end(format!("the directory gives the job to {owner} with epoch {epoch}"), true)
            }
            // Nobody has asked for this side yet, so it may still promise never to run.
            Ownership::Unasked if !self.asked => self
                .end("the directory can't be asked for the job: is the daemon of this node running?".to_owned(), true),
            Ownership::Unasked => vec![Action::Arm(Timer::Retry)],
            Ownership::Unknown => {
                self.asked = true;
                vec![Action::Arm(Timer::Retry)]
            }
        }
    }

    fn handle_running(&mut self, at_ns: u64, steps: Vec<(String, u64)>) -> Vec<Action> {
        if self.phase != Phase::Done {
            return Vec::new();
        }
        vec![
            Action::Send(Message::Committed(Committed { epoch: self.epoch, running_at_ns: at_ns, steps })),
            Action::Finish(Outcome::Running { epoch: self.epoch }),
        ]
    }

    fn handle_disconnected(&mut self, reason: String) -> Vec<Action> {
        match self.phase {
            // The image is complete. Should the source be dead, this is the job's only chance to live on; should it
            // be alive, the directory decides between us.
            Phase::Preparing | Phase::Committing => Vec::new(),
            _ => self.end(format!("lost the connection to the source: {reason}"), false),
        }
    }

    fn handle_timeout(&mut self, timer: Timer) -> Vec<Action> {
        let waited_for = match timer {
            Timer::Retry if self.phase == Phase::Committing => return vec![Action::Transfer],
            // The driver is at work, or the directory decides: stale timers mean nothing.
            _ if matches!(self.phase, Phase::Judging | Phase::Preparing | Phase::Committing) => {
                return Vec::new();
            }
            Timer::Retry => return Vec::new(),
            Timer::Hello => "the source's greeting",
            Timer::Offer => "the offer",
            Timer::Precopy => "memory from the source",
            Timer::Residual | Timer::Commit => "the residual from the source",
        };
        self.give_up(format!("timed out waiting for {waited_for}"))
    }

    /// Gives up, unless the swap was asked for: then only its answer, or the source's abort, ends the move.
    fn give_up(&mut self, reason: String) -> Vec<Action> {
        match self.phase {
            Phase::Committing => Vec::new(),
            _ => self.end(reason, true),
        }
    }

    fn end(&mut self, reason: String, tell: bool) -> Vec<Action> {
        self.phase = Phase::Done;
        let mut actions = vec![Action::Discard];
        if tell {
            actions.push(Action::Send(Message::abort(reason.clone())));
        }
        actions.push(Action::Finish(Outcome::Aborted { reason }));
        actions
    }
}
