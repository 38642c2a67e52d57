//! Pauses of the whole machine: what stops a virtual machine stops the clients in it as well, and looks like a wait for the server.
//!
//! A thread on each processor, before all others by its priority, notes when it was run late. Where all were late at once, nothing ran.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sys::process::{MYSELF, SchedulingAttributes};

/// How often each thread is to run.
const BEAT: Duration = Duration::from_millis(1);
/// From this on it was late.
const LATE: Duration = Duration::from_millis(3);
/// Of real-time priorities the lowest.
const PRIORITY: u32 = 1;

/// Looks for pauses until it is asked for them.
pub(super) struct Watch {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<io::Result<Vec<Range<Instant>>>>>,
}

impl Watch {
    pub(super) fn start() -> io::Result<Watch> {
        let stop = Arc::new(AtomicBool::new(false));
        let processors = sys::process::affinity(MYSELF)?;
        let spawn = |processor: u32| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || late_on(processor, &stop))
        };
        let threads = processors.into_iter().map(spawn).collect();
        Ok(Watch { stop, threads })
    }

    /// The pauses since then, in order.
    ///
    /// # Errors
    /// When the threads couldn't be given a processor or a priority, without which nothing is known.
    pub(super) fn stop(mut self) -> io::Result<Vec<Range<Instant>>> {
        self.stop.store(true, Ordering::Relaxed);
        let late = std::mem::take(&mut self.threads).into_iter().map(|thread| match thread.join() {
            Ok(late) => late,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        let late: Vec<Vec<_>> = late.collect::<io::Result<_>>()?;
        Ok(late.into_iter().reduce(|one, other| common(&one, &other)).unwrap_or_default())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// When the thread that calls this should have run on a processor and didn't.
fn late_on(processor: u32, stop: &AtomicBool) -> io::Result<Vec<Range<Instant>>> {
    sys::process::set_affinity(MYSELF, &[processor])?;
    let policy = u32::try_from(nix::libc::SCHED_FIFO).unwrap_or_default();
    let first = SchedulingAttributes { policy, priority: PRIORITY, ..SchedulingAttributes::default() };
    sys::process::set_scheduling(MYSELF, &first)?;
    let mut late = Vec::new();
    let mut last = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(BEAT);
        let now = Instant::now();
        if now - last >= LATE {
            late.push(last + BEAT..now);
        }
        last = now;
    }
    Ok(late)
}

/// What is in a range of both, each in order and without overlaps.
fn common(one: &[Range<Instant>], other: &[Range<Instant>]) -> Vec<Range<Instant>> {
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    let mut both = Vec::new();
    while let (Some(a), Some(b)) = (one.peek(), other.peek()) {
        let range = a.start.max(b.start)..a.end.min(b.end);
        let next = if a.end < b.end { &mut one } else { &mut other };
        next.next();
        if !range.is_empty() {
            both.push(range);
        }
    }
    both
}

/// How much of `span` was pauses.
pub(super) fn within(pauses: &[Range<Instant>], span: Range<Instant>) -> Duration {
    common(pauses, &[span]).iter().map(|pause| pause.end - pause.start).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_where_all_were_late() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let range = |(from, to)| at(from)..at(to);
        let one = [(0, 5), (10, 20), (30, 40)].map(range);
        let other = [(4, 12), (15, 32), (50, 60)].map(range);
        let both = common(&one, &other);
        assert_eq!(both, [(4, 5), (10, 12), (15, 20), (30, 32)].map(range));
        assert_eq!(common(&other, &one), both);
        assert_eq!(within(&both, range((11, 31))), Duration::from_millis(1 + 5 + 1));
        assert_eq!(within(&both, range((5, 10))), Duration::ZERO);
    }
}
