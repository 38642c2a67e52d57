//! With much to send, other processors carry on what the net thread sends.
//!
//! A packet that is written to the TUN device is routed, filtered and given to the next device within the write: that is most of
//! what a packet costs the net thread, of which a job has only one. The kernel can hand it to other processors, flow by flow
//! ([`sys::steering`]), for an interrupt from one to the other. Bulk and many new connections gain by that; a request's answer
//! only leaves a little later. So it's done while one of the two goes on.
//!
//! Measured on two processors, one job with it and one without in turn (medians of nine and ten runs): 8 and 9% more new connections
//! (wrk, one for each request), and up to 10% more sent in bulk (iperf3). To redis-benchmark with its 50 connections it would
//! cost 3%, which this leaves alone.

use std::time::Duration;

use netstack::Instant;
use sys::steering::Steering;
use sys::tun::Tun;

/// What happens is counted by so much time.
const WINDOW: Duration = Duration::from_millis(50);
/// Bulk packets, and twice the new sockets, in a window with much to send.
const MUCH: u64 = 50;
const WEIGHT_OF_SOCKET: u64 = 2;
/// It begins after so many such windows in a row: many programs open all their connections at once, and then no more.
const BEGINS_AFTER: u8 = 3;
/// It ends after so many others.
const ENDS_AFTER: u8 = 10;

/// Decides, and has the kernel do it.
#[derive(Debug)]
pub(super) struct Spread {
    state: State,
    until: Instant,
    count: u64,
    /// Sockets the job has had so far.
    sockets: u64,
    /// Windows in a row that speak for a change.
    streak: u8,
}

#[derive(Debug)]
enum State {
    /// Nobody has asked the kernel yet.
    Unknown,
    Off(Steering),
    On(Steering),
    /// There is one processor, or the kernel doesn't do it.
    Never,
}

impl Spread {
    pub(super) fn new(now: Instant, sockets: u64) -> Spread {
        let is_single = std::thread::available_parallelism().is_ok_and(|count| count.get() == 1);
        let state = if is_single { State::Never } else { State::Unknown };
        Spread { state, until: now + WINDOW, count: 0, sockets, streak: 0 }
    }

    /// Much was sent in one packet.
    pub(super) fn note_bulk(&mut self) {
        self.count += 1;
    }

    /// So many sockets has the job had by now.
    pub(super) fn note_sockets(&mut self, sockets: u64) {
        self.count += WEIGHT_OF_SOCKET * (sockets - self.sockets);
        self.sockets = sockets;
    }

    /// To be called now and then.
    pub(super) fn turn(&mut self, now: Instant, tun: &Tun) {
        if self.judge(now) {
            self.change(tun);
        }
    }

    /// Whether it is time for a change.
    fn judge(&mut self, now: Instant) -> bool {
        if now < self.until || matches!(self.state, State::Never) {
            return false;
        }
        // Windows in which nothing woke the net thread count as one: then there was little.
        let much = std::mem::take(&mut self.count) >= MUCH && now.since(self.until) < WINDOW;
        self.until = now + WINDOW;
        let is_on = matches!(self.state, State::On(_));
        self.streak = if much == is_on { 0 } else { self.streak + 1 };
        let changes = self.streak == if is_on { ENDS_AFTER } else { BEGINS_AFTER };
        if changes {
            self.streak = 0;
        }
        changes
    }

    fn change(&mut self, tun: &Tun) {
        let changed = match std::mem::replace(&mut self.state, State::Never) {
            State::Unknown => Steering::of(tun).and_then(|steering| steering.set(true).map(|()| State::On(steering))),
            State::Off(steering) => steering.set(true).map(|()| State::On(steering)),
            State::On(steering) => steering.set(false).map(|()| State::Off(steering)),
            State::Never => Ok(State::Never),
        };
        match changed {
            Ok(state) => self.state = state,
            Err(error) => tracing::info!(%error, "the kernel can't spread what the job sends over processors"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> (Spread, Instant) {
        let now = Instant::from_millis(1000);
        (Spread { state: State::Unknown, until: now + WINDOW, count: 0, sockets: 7, streak: 0 }, now)
    }

    /// Windows until a change, at most ten.
    fn windows(spread: &mut Spread, now: &mut Instant, mut happens: impl FnMut(&mut Spread)) -> Option<u32> {
        (1..=10).find(|_| {
            happens(spread);
            *now += WINDOW;
            spread.judge(*now)
        })
    }

    #[test]
    fn much_begins_it_when_it_goes_on() {
        let (mut spread, mut now) = fresh();
        let bulk = |spread: &mut Spread| (0..MUCH).for_each(|_| spread.note_bulk());
        assert_eq!(windows(&mut spread, &mut now, bulk), Some(3));
        let open = |count| move |spread: &mut Spread| spread.note_sockets(spread.sockets + count);
        assert_eq!(windows(&mut spread, &mut now, open(MUCH / 2)), Some(3));
        assert_eq!(windows(&mut spread, &mut now, open(MUCH / 2 - 1)), None);
        assert_eq!(windows(&mut spread, &mut now, |spread| spread.note_sockets(1000)), None);
    }

    #[test]
    fn one_processor_has_nobody_to_spread_to() {
        let (spread, mut now) = fresh();
        let mut spread = Spread { state: State::Never, ..spread };
        let bulk = |spread: &mut Spread| (0..MUCH).for_each(|_| spread.note_bulk());
        assert_eq!(windows(&mut spread, &mut now, bulk), None);
    }
}
