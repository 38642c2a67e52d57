//! The side that has the job.

use crate::message::{Claim, Committed, Hello, Message, PROTOCOL_MAX, PROTOCOL_MIN, ResidualEnd, Round, SectionKind};
use crate::phase::{Ownership, Timer};

/// Where the source stands. The order is the order of a move that succeeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Nothing was said yet.
    Idle,
    /// Waiting for the target's greeting.
    Greeting,
    /// Waiting for the target's answer to the offer.
    Offered,
    /// The driver is copying memory; the job runs.
    Copying,
    /// Waiting until the target has the round; the job runs.
    RoundSent,
    /// The job is being stopped.
    Freezing,
    /// The residual is being sent; the job is frozen.
    Residual,
    /// The image is out: the target may take the job at any moment; the job is frozen.
    Committing,
    /// Asking the directory to keep the job here; the job is frozen.
    Fencing,
    /// The move is over, one way or the other.
    Done,
}

/// What happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// The connection to the target is there.
    Start,
    /// The target said something.
    Message(&'a Message<'a>),
    /// The connection is gone, in words.
    Disconnected(String),
    /// The armed timer ran out.
    Timeout(Timer),
    /// [`Action::CopyRound`] is done: the round is written.
    RoundCopied {
        /// Whether another round is worth while.
        again: bool,
    },
    /// [`Action::Freeze`] is done.
    Frozen,
    /// [`Action::SendResidual`] is done.
    ResidualSent {
        /// The sections of the whole move with their lengths.
        sections: Vec<(SectionKind, u64)>,
    },
    /// The answer to [`Action::Fence`].
    Fenced(Ownership),
    /// The person who asked for the move takes it back, or a step failed here.
    Cancel(String),
}

/// What is to be done, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send this.
    Send(Message<'static>),
    /// Send the offer (the driver holds its content).
    SendOffer,
    /// Start the timer, instead of any other.
    Arm(Timer),
    /// Send a round of memory while the job runs (track its writes from the first round on); then
    /// [`Event::RoundCopied`].
    CopyRound {
        /// Counted from 1.
        number: u32,
    },
    /// Stop every thread of the job and its sockets; then [`Event::Frozen`].
    Freeze,
    /// Send what is left; then [`Event::ResidualSent`].
    SendResidual,
    /// Ask the directory for `(epoch, source) -> (epoch + 1, source)`; then [`Event::Fenced`].
    Fence,
    /// The job runs on here, as if nothing had been.
    Resume,
    /// The job runs at the target: end what is here without a trace.
    Discard,
    /// The move is over.
    Finish(Outcome),
}

/// How the move ended for the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The job runs at the target.
    Moved {
        /// The target's epoch.
        epoch: u64,
        /// What the target said of it, when it could.
        committed: Option<Committed>,
    },
    /// The target did not want the job; it never stopped.
    Refused {
        /// In words.
        reason: String,
    },
    /// The move was given up; the job runs here.
    Aborted {
        /// In words.
        reason: String,
        /// The epoch the job has now.
        epoch: u64,
    },
}

/// The source's machine.
#[derive(Debug)]
pub struct Source {
    claim: Claim,
    phase: Phase,
    round: u32,
    again: bool,
    /// What both sides speak, once the target has greeted.
    protocol: u16,
    /// Why the move is being given up, while that is not certain yet.
    reason: String,
}

impl Source {
    /// A move of `claim` that has not begun.
    pub fn new(claim: Claim) -> Source {
        Source { claim, phase: Phase::Idle, round: 0, again: false, protocol: PROTOCOL_MIN, reason: String::new() }
    }

    /// The newest protocol that both sides speak; before the target's greeting the oldest.
    pub fn protocol(&self) -> u16 {
        self.protocol
    }

    /// What is being moved.
    pub fn claim(&self) -> &Claim {
        &self.claim
    }

    /// Tells what happened and asks what is to be done.
    pub fn handle_event(&mut self, event: Event<'_>) -> Vec<Action> {
        if self.phase == Phase::Done {
            return Vec::new();
        }
        match event {
            Event::Start => self.handle_start(),
            Event::Message(message) => self.handle_message(message),
            Event::Disconnected(reason) | Event::Cancel(reason) => self.give_up(reason),
            Event::Timeout(Timer::Retry) if self.phase == Phase::Fencing => vec![Action::Fence],
            Event::Timeout(timer) => self.handle_timeout(timer),
            Event::RoundCopied { again } => self.handle_round_copied(again),
            Event::Frozen => self.handle_frozen(),
            Event::ResidualSent { sections } => self.handle_residual_sent(sections),
            Event::Fenced(answer) => self.handle_fenced(answer),
        }
    }

    fn handle_start(&mut self) -> Vec<Action> {
        if self.phase != Phase::Idle {
            return Vec::new();
        }
        self.phase = Phase::Greeting;
        vec![Action::Send(Message::Hello(Hello::new(&self.claim.source))), Action::Arm(Timer::Hello)]
    }

    fn handle_message(&mut self, message: &Message<'_>) -> Vec<Action> {
        match (message, self.phase) {
            (Message::Hello(hello), Phase::Greeting) => self.handle_hello(hello),
            (Message::Accept, Phase::Offered) => self.start_round(),
            (Message::Refuse(refusal), Phase::Greeting | Phase::Offered) => {
                self.phase = Phase::Done;
                vec![Action::Resume, Action::Finish(Outcome::Refused { reason: refusal.reason.clone() })]
            }
            (Message::RoundAck(Round { number }), Phase::RoundSent) if *number == self.round => {
                if self.again {
                    self.start_round()
                } else {
                    self.phase = Phase::Freezing;
                    vec![Action::Arm(Timer::Residual), Action::Send(Message::Freezing), Action::Freeze]
                }
            }
            (Message::Prepared, Phase::Committing) => vec![Action::Arm(Timer::Commit)],
            (Message::Prepared, Phase::Fencing) => Vec::new(),
            (Message::Committed(committed), Phase::Committing | Phase::Fencing) => {
                self.discarded(committed.epoch, Some(committed.clone()))
            }
            // The target's promise that it never runs this epoch. A fence that is under way is waited for all the
            // same, because its answer says which epoch the job has now.
            (Message::Abort(_), Phase::Fencing) => Vec::new(),
            (Message::Abort(abort), _) => self.abort(format!("the target gave up: {}", abort.reason), false),
            (message, phase) => self.give_up(format!("the target said {:?} in phase {phase:?}", message.kind())),
        }
    }

    fn handle_hello(&mut self, hello: &Hello) -> Vec<Action> {
        let Some(protocol) = hello.common_protocol() else {
            return self.give_up(format!(
                "{} speaks the move protocol {} to {}, this node {} to {}: run releases that share one",
                hello.node, hello.protocol_min, hello.protocol_max, PROTOCOL_MIN, PROTOCOL_MAX
            ));
        };
        self.protocol = protocol;
        if hello.node != self.claim.target {
            return self.give_up(format!("reached node {} instead of {}", hello.node, self.claim.target));
        }
        self.phase = Phase::Offered;
        vec![Action::SendOffer, Action::Arm(Timer::Offer)]
    }

    fn start_round(&mut self) -> Vec<Action> {
        self.phase = Phase::Copying;
        self.round += 1;
        vec![Action::Arm(Timer::Precopy), Action::CopyRound { number: self.round }]
    }

    fn handle_round_copied(&mut self, again: bool) -> Vec<Action> {
        if self.phase != Phase::Copying {
            return Vec::new();
        }
        self.phase = Phase::RoundSent;
        self.again = again;
        vec![Action::Send(Message::RoundEnd(Round { number: self.round })), Action::Arm(Timer::Precopy)]
    }

    fn handle_frozen(&mut self) -> Vec<Action> {
        if self.phase != Phase::Freezing {
            return Vec::new();
        }
        self.phase = Phase::Residual;
        vec![Action::SendResidual]
    }

    fn handle_residual_sent(&mut self, sections: Vec<(SectionKind, u64)>) -> Vec<Action> {
        if self.phase != Phase::Residual {
            return Vec::new();
        }
        // Before the first byte of the frame leaves: from here on the target may know everything.
        self.phase = Phase::Committing;
        vec![Action::Send(Message::ResidualEnd(ResidualEnd { sections })), Action::Arm(Timer::Commit)]
    }

    fn handle_timeout(&mut self, timer: Timer) -> Vec<Action> {
        let waited_for = match timer {
            Timer::Hello => "the target's greeting",
            Timer::Offer => "the target's answer to the offer",
            Timer::Precopy => "progress of the copy",
            Timer::Residual => "progress of the residual",
            Timer::Commit => "the target's commit",
            // The retry timer belongs to the fence alone; elsewhere it is a stale one.
            Timer::Retry => return Vec::new(),
        };
        self.give_up(format!("timed out waiting for {waited_for}"))
    }

    /// Gives up as far as this phase allows.
    fn give_up(&mut self, reason: String) -> Vec<Action> {
        match self.phase {
            Phase::Committing => {
                self.phase = Phase::Fencing;
                self.reason = reason;
                vec![Action::Fence]
            }
            // The fence decides; nothing that happens meanwhile changes that.
            Phase::Fencing => Vec::new(),
            _ => self.abort(reason, true),
        }
    }

    fn abort(&mut self, reason: String, tell: bool) -> Vec<Action> {
        let epoch = self.claim.epoch;
        self.aborted(reason, epoch, tell)
    }

    fn aborted(&mut self, reason: String, epoch: u64, tell: bool) -> Vec<Action> {
        self.phase = Phase::Done;
        let mut actions = vec![Action::Resume];
        if tell {
            actions.push(Action::Send(Message::abort(reason.clone())));
        }
        actions.push(Action::Finish(Outcome::Aborted { reason, epoch }));
        actions
    }

    fn discarded(&mut self, epoch: u64, committed: Option<Committed>) -> Vec<Action> {
        self.phase = Phase::Done;
        vec![Action::Discard, Action::Finish(Outcome::Moved { epoch, committed })]
    }

    fn handle_fenced(&mut self, answer: Ownership) -> Vec<Action> {
        if self.phase != Phase::Fencing {
            return Vec::new();
        }
        match answer.judged_by(&self.claim.source, self.claim.epoch) {
            Ownership::Won { epoch } => {
                let reason = std::mem::take(&mut self.reason);
                self.aborted(reason, epoch, true)
            }
            Ownership::Lost { epoch, .. } => self.discarded(epoch, None),
            Ownership::Unknown | Ownership::Unasked => vec![Action::Arm(Timer::Retry)],
        }
    }
}
