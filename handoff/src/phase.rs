//! What both machines share: time limits and the directory's answers.

use std::time::Duration;

/// How long each wait may take before it becomes a time-out event.
///
/// The machines only name the duration; whoever drives them keeps the clock. A limit bounds the time without progress:
/// the driver starts it anew when bytes of the phase arrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// For the peer's greeting.
    pub hello: Duration,
    /// For the offer, and for its answer.
    pub offer: Duration,
    /// For progress while memory is copied and the job runs on.
    pub precopy: Duration,
    /// For progress of the residual while the job is frozen.
    pub residual: Duration,
    /// For the target's answer after the residual, while the job is frozen.
    pub commit: Duration,
    /// Between two questions to a directory that does not answer.
    pub retry: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            hello: Duration::from_secs(5),
            offer: Duration::from_secs(15),
            precopy: Duration::from_secs(20),
            residual: Duration::from_secs(10),
            commit: Duration::from_secs(5),
            retry: Duration::from_millis(200),
        }
    }
}

/// Which wait a timer bounds; one timer runs at a time, arming another replaces it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Timer {
    /// The peer's greeting.
    Hello,
    /// The offer or its answer.
    Offer,
    /// Progress of the pre-copy.
    Precopy,
    /// Progress of the residual.
    Residual,
    /// The target's answer to the residual.
    Commit,
    /// The pause before the directory is asked again.
    Retry,
}

impl Limits {
    /// The duration of `timer`.
    pub fn duration(&self, timer: Timer) -> Duration {
        match timer {
            Timer::Hello => self.hello,
            Timer::Offer => self.offer,
            Timer::Precopy => self.precopy,
            Timer::Residual => self.residual,
            Timer::Commit => self.commit,
            Timer::Retry => self.retry,
        }
    }
}

/// The directory's answer to a compare-and-swap of the ownership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ownership {
    /// The swap was made.
    Won {
        /// The new epoch.
        epoch: u64,
    },
    /// The record holds something else than was expected.
    Lost {
        /// The node it names.
        owner: String,
        /// Its epoch.
        epoch: u64,
    },
    /// No answer came: the swap may or may not have been made.
    Unknown,
    /// The question never left this machine: the swap was not made by it.
    Unasked,
}

impl Ownership {
    /// Reads the answer as `node`, which asked for `(before, _) -> (before + 1, node)`: a question asked twice finds
    /// its own first success as the record's content, which is a win.
    pub(crate) fn judged_by(self, node: &str, before: u64) -> Ownership {
        match self {
            Ownership::Lost { owner, epoch } if owner == node && epoch == before + 1 => Ownership::Won { epoch },
            other => other,
        }
    }
}
