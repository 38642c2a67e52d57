//! Holding what happened against the rules.
//!
//! A [`History`] is what somebody saw: addresses taken and freed, owners of jobs, each with its time. Tests record it at the
//! nodes (what they were told) and from the directory's changes ([`History::note_change`]), and [`History::check`] replays it:
//!
//! - no address is held by two jobs at once;
//! - none is taken again before it has rested, but for the next job of its reservation;
//! - a job has one owner per epoch, and its epochs grow by one.

use std::{collections::HashMap, fmt, net::IpAddr, time::Duration};

use cluster_addr::{
    directory::{Change, DirectoryError},
    records::{JOBS, JobId, JobRecord, Owner, decode},
};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A job has an address from now on.
    Taken {
        /// The address.
        address: IpAddr,
        /// The job.
        job: JobId,
        /// The reservation it is of.
        reservation: Option<String>,
    },
    /// The job no longer has it.
    Freed {
        /// The address.
        address: IpAddr,
        /// The job.
        job: JobId,
    },
    /// A job belongs to a node from now on.
    Owned {
        /// The job.
        job: JobId,
        /// To whom, since which epoch.
        owner: Owner,
    },
}

/// A rule that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// An address was given to a job while another had it.
    HeldTwice {
        /// The address.
        address: IpAddr,
        /// Who had it.
        holder: JobId,
        /// Who got it.
        taker: JobId,
    },
    /// An address was given out before it had rested.
    ReusedTooSoon {
        /// The address.
        address: IpAddr,
        /// Who got it.
        taker: JobId,
        /// How long it had rested.
        rested: Duration,
    },
    /// An address was freed by a job that did not have it.
    FreedByStranger {
        /// The address.
        address: IpAddr,
        /// The job.
        job: JobId,
    },
    /// Two owners under one epoch.
    TwoOwners {
        /// The job.
        job: JobId,
        /// One.
        first: Owner,
        /// The other.
        second: Owner,
    },
    /// An epoch that is not the next one.
    EpochOutOfOrder {
        /// The job.
        job: JobId,
        /// The epoch before.
        before: u64,
        /// The one that came.
        came: u64,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HeldTwice { address, holder, taker } => {
                write!(f, "{address} was given to job {taker} while job {holder} had it")
            }
            Self::ReusedTooSoon { address, taker, rested } => {
                write!(f, "{address} was given to job {taker} after a rest of only {rested:?}")
            }
            Self::FreedByStranger { address, job } => {
                write!(f, "{address} was freed by job {job}, which did not have it")
            }
            Self::TwoOwners { job, first, second } => {
                write!(f, "job {job} had two owners under epoch {}: {} and {}", first.epoch, first.node, second.node)
            }
            Self::EpochOutOfOrder { job, before, came } => {
                write!(f, "epoch {came} of job {job} followed epoch {before}")
            }
        }
    }
}

/// What happened, in order.
#[derive(Debug, Clone, Default)]
pub struct History {
    events: Vec<(Duration, Event)>,
    /// Jobs as the directory's changes told them last, by key.
    jobs: HashMap<String, JobRecord>,
}

impl History {
    /// Adds what happened at a time, which must not be before that of the event added last.
    pub fn note(&mut self, at: Duration, event: Event) {
        self.events.push((at, event));
    }

    /// Adds what a change of the directory means; changes of other records than jobs' mean nothing.
    ///
    /// # Errors
    /// When a job's record can't be read.
    pub fn note_change(&mut self, at: Duration, change: &Change) -> Result<(), DirectoryError> {
        if !change.key.starts_with(JOBS) {
            return Ok(());
        }
        let after: Option<JobRecord> = change.value.as_ref().map(|value| decode(&change.key, value)).transpose()?;
        let before = self.jobs.remove(&change.key);
        if before.is_none()
            && let Some(job) = &after
        {
            for address in job.addresses() {
                let (job, reservation) = (job.id.clone(), job.reservation.clone());
                self.note(at, Event::Taken { address, job, reservation });
            }
        }
        match after {
            Some(job) => {
                if before.is_none_or(|before| before.owner != job.owner) {
                    self.note(at, Event::Owned { job: job.id.clone(), owner: job.owner.clone() });
                }
                self.jobs.insert(change.key.clone(), job);
            }
            None => {
                for job in before.into_iter() {
                    for address in job.addresses() {
                        self.note(at, Event::Freed { address, job: job.id.clone() });
                    }
                }
            }
        }
        Ok(())
    }

    /// How many addresses were taken more than once.
    #[must_use]
    pub fn reused(&self) -> usize {
        let mut taken: HashMap<IpAddr, usize> = HashMap::new();
        for (_, event) in &self.events {
            if let Event::Taken { address, .. } = event {
                *taken.entry(*address).or_default() += 1;
            }
        }
        taken.into_values().filter(|count| *count > 1).count()
    }

    /// Replays all events; `rest` is how long an address must rest.
    #[must_use]
    pub fn check(&self, rest: Duration) -> Vec<Violation> {
        let mut held: HashMap<IpAddr, (JobId, Option<String>)> = HashMap::new();
        let mut freed: HashMap<IpAddr, (Duration, Option<String>)> = HashMap::new();
        let mut owners: HashMap<JobId, Owner> = HashMap::new();
        let mut violations = Vec::new();
        for (at, event) in &self.events {
            match event {
                Event::Taken { address, job, reservation } => {
                    if let Some((holder, _)) = held.get(address) {
                        let (holder, taker) = (holder.clone(), job.clone());
                        violations.push(Violation::HeldTwice { address: *address, holder, taker });
                    }
                    if let Some((since, of)) = freed.get(address) {
                        let rested = at.saturating_sub(*since);
                        if rested < rest && (of.is_none() || of != reservation) {
                            let taker = job.clone();
                            violations.push(Violation::ReusedTooSoon { address: *address, taker, rested });
                        }
                    }
                    held.insert(*address, (job.clone(), reservation.clone()));
                }
                Event::Freed { address, job } => match held.remove(address) {
                    Some((holder, reservation)) if holder == *job => {
                        freed.insert(*address, (*at, reservation));
                    }
                    other => {
                        held.extend(other.map(|holder| (*address, holder)));
                        violations.push(Violation::FreedByStranger { address: *address, job: job.clone() });
                    }
                },
                Event::Owned { job, owner } => {
                    if let Some(before) = owners.get(job) {
                        if before.epoch == owner.epoch && before.node != owner.node {
                            let (first, second) = (before.clone(), owner.clone());
                            violations.push(Violation::TwoOwners { job: job.clone(), first, second });
                        } else if before.epoch + 1 != owner.epoch {
                            let (before, came) = (before.epoch, owner.epoch);
                            violations.push(Violation::EpochOutOfOrder { job: job.clone(), before, came });
                        }
                    }
                    owners.insert(job.clone(), owner.clone());
                }
            }
        }
        violations
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REST: Duration = Duration::from_secs(300);

    fn id(number: u8) -> JobId {
        JobId::from_entropy([number; 12])
    }

    fn address() -> IpAddr {
        IpAddr::from([10, 77, 0, 1])
    }

    fn taken(number: u8, reservation: Option<&str>) -> Event {
        Event::Taken { address: address(), job: id(number), reservation: reservation.map(str::to_owned) }
    }

    fn freed(number: u8) -> Event {
        Event::Freed { address: address(), job: id(number) }
    }

    fn owned(node: &str, epoch: u64) -> Event {
        Event::Owned { job: id(1), owner: Owner { node: node.to_owned(), epoch } }
    }

    /// Each event with its second.
    fn check(events: &[(u64, Event)]) -> Vec<Violation> {
        let mut history = History::default();
        for (second, event) in events {
            history.note(Duration::from_secs(*second), event.clone());
        }
        history.check(REST)
    }

    #[test]
    fn a_proper_history_is_found_proper() {
        let events =
            [(0, taken(1, None)), (10, freed(1)), (310, taken(2, None)), (400, freed(2)), (800, taken(3, Some("web")))];
        assert_eq!(check(&events), []);
        assert_eq!(check(&[(0, owned("a", 1)), (1, owned("b", 2)), (2, owned("b", 3))]), []);
        // A reservation's next job comes at once.
        assert_eq!(check(&[(0, taken(1, Some("web"))), (1, freed(1)), (2, taken(2, Some("web")))]), []);
    }

    #[test]
    fn planted_violations_are_found() {
        let (holder, taker) = (id(1), id(2));
        let twice = Violation::HeldTwice { address: address(), holder, taker: taker.clone() };
        assert_eq!(check(&[(0, taken(1, None)), (9, taken(2, None))]), [twice]);
        let rested = Duration::from_secs(299);
        let soon = Violation::ReusedTooSoon { address: address(), taker, rested };
        assert_eq!(check(&[(0, taken(1, None)), (1, freed(1)), (300, taken(2, None))]), std::slice::from_ref(&soon));
        for other in [None, Some("mail")] {
            let events = [(0, taken(1, Some("web"))), (1, freed(1)), (300, taken(2, other))];
            assert_eq!(check(&events), std::slice::from_ref(&soon), "{other:?}");
        }
        let stranger = Violation::FreedByStranger { address: address(), job: id(2) };
        assert_eq!(check(&[(0, taken(1, None)), (1, freed(2))]), [stranger]);
        let [first, second] = ["a", "b"].map(|node| Owner { node: node.to_owned(), epoch: 1 });
        assert_eq!(
            check(&[(0, owned("a", 1)), (1, owned("b", 1))]),
            [Violation::TwoOwners { job: id(1), first, second }]
        );
        for (before, came) in [(2, 1), (2, 4), (2, 2)] {
            let found = check(&[(0, owned("a", before)), (1, owned("a", came))]);
            assert_eq!(found, [Violation::EpochOutOfOrder { job: id(1), before, came }]);
        }
    }
}
