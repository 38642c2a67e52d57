//! What a move took.

use std::time::{Duration, Instant};

use crate::api::{MovePhase, MoveSummary};

/// Times and bytes of a move, as the source sees them.
#[derive(Debug)]
pub struct Stats {
    started: Instant,
    phases: Vec<MovePhase>,
    current: Option<(&'static str, Instant, u64)>,
    stopped_at: Option<Instant>,
    bytes_at_stop: u64,
}

impl Stats {
    /// The move begins now.
    pub fn new() -> Stats {
        Stats { started: Instant::now(), phases: Vec::new(), current: None, stopped_at: None, bytes_at_stop: 0 }
    }

    /// The next phase begins, after `sent` bytes in all.
    pub fn enter(&mut self, name: &'static str, sent: u64) {
        self.leave(sent);
        self.current = Some((name, Instant::now(), sent));
    }

    /// The phase now.
    pub fn phase(&self) -> &'static str {
        self.current.map_or("connect", |(name, _, _)| name)
    }

    /// The first thread of the job is about to be stopped.
    pub fn stop(&mut self, sent: u64) {
        self.stopped_at = Some(Instant::now());
        self.bytes_at_stop = sent;
    }

    /// Adds what the target did within the phase that just ended.
    pub fn target_step(&mut self, name: &str, duration_us: u64) {
        self.phases.push(MovePhase { name: format!("target {name}"), duration_us, bytes: 0 });
    }

    /// The current phase ends.
    pub fn leave(&mut self, sent: u64) {
        if let Some((name, since, before)) = self.current.take() {
            let duration_us = micros(since.elapsed());
            self.phases.push(MovePhase { name: name.to_owned(), duration_us, bytes: sent.saturating_sub(before) });
        }
    }

    /// The whole. The job runs at the target since `running`, as seen here: the instant at which the target's word of
    /// it arrived. So the downtime given is never less than the true one, whatever the two machines' clocks say; it is
    /// more by the word's way.
    pub fn summary(self, from: &str, to: &str, epoch: u64, running: Instant, sent: u64) -> MoveSummary {
        let stopped = self.stopped_at.unwrap_or(running);
        MoveSummary {
            from: from.to_owned(),
            to: to.to_owned(),
            epoch,
            downtime_us: micros(running.saturating_duration_since(stopped)),
            total_us: micros(self.started.elapsed()),
            precopy_bytes: self.bytes_at_stop,
            freeze_bytes: sent.saturating_sub(self.bytes_at_stop),
            phases: self.phases,
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
