//! With much to do, other processors carry on what the net thread sends.
//!
//! A packet that is written to the TUN device is routed, filtered and given to the next device within the write: that is most of
//! what a packet costs the net thread, of which a job has only one. The kernel can hand it to other processors, flow by flow
//! ([`sys::steering`]), for an interrupt from one to the other. Bulk and many new connections gain by that; a request's answer
//! only leaves a little later. So it's done while one of the two goes on. Bulk that is received counts when it comes over several
//! connections: their acknowledgments make the senders' kernel send, within the write if that is on the same machine.
//!
//! Measured on two processors, one job with it and one without in turn (medians of eight to twenty-five runs): 8 and 9% more new connections
//! (wrk, one for each request), up to 10% more sent in bulk (iperf3), 5 to 11% more received over eight connections. It would cost
//! redis-benchmark with its 50 connections 3%, and one received stream 8%, which this leaves alone.

use std::time::Duration;

use netstack::Instant;
use sys::steering::Steering;
use sys::tun::Tun;

/// What happens is counted by so much time.
const WINDOW: Duration = Duration::from_millis(50);
/// Bulk packets, and twice the new sockets, in a window with much to do.
const MUCH: u64 = 50;
const WEIGHT_OF_SOCKET: u64 = 2;
/// It begins after so many such windows in a row: many programs open all their connections at once, and then no more.
const BEGINS_AFTER: u8 = 3;
/// It ends after so many others.
const ENDS_AFTER: u8 = 10;

/// Decides, and has the kernel do it.
#[derive(Debug)]
pub(super) struct Spread {
    /// Opened when first needed.
    steering: Option<Steering>,
    /// There is more than one processor, and the kernel has not refused.
    is_possible: bool,
    is_on: bool,
    /// End of the present window.
    until: Instant,
    count: u64,
    /// Sockets the job has had so far.
    sockets: u64,
    /// Windows in a row that speak for a change.
    streak: u8,
}

impl Spread {
    pub(super) fn new(now: Instant, sockets: u64) -> Spread {
        let is_possible = std::thread::available_parallelism().is_ok_and(|count| count.get() > 1);
        Spread { steering: None, is_possible, is_on: false, until: now + WINDOW, count: 0, sockets, streak: 0 }
    }

    /// Much was sent, or received over one of several connections, in one packet.
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
        if self.judge(now)
            && let Err(error) = self.tell(tun)
        {
            self.is_possible = false;
            tracing::info!(%error, "the kernel can't spread what the job sends over processors");
        }
    }

    /// Decides anew; whether that is a change.
    fn judge(&mut self, now: Instant) -> bool {
        if now < self.until || !self.is_possible {
            return false;
        }
        // Windows in which nothing woke the net thread count as one: then there was little.
        let much = std::mem::take(&mut self.count) >= MUCH && now.since(self.until) < WINDOW;
        self.until = now + WINDOW;
        self.streak = if much == self.is_on { 0 } else { self.streak + 1 };
        let changes = self.streak == if self.is_on { ENDS_AFTER } else { BEGINS_AFTER };
        if changes {
            self.streak = 0;
            self.is_on = !self.is_on;
        }
        changes
    }

    fn tell(&mut self, tun: &Tun) -> std::io::Result<()> {
        let steering = match &mut self.steering {
            Some(steering) => steering,
            empty => empty.insert(Steering::of(tun)?),
        };
        steering.set(self.is_on)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> (Spread, Instant) {
        let now = Instant::from_millis(1000);
        (Spread { is_possible: true, ..Spread::new(now, 7) }, now)
    }

    fn bulk(spread: &mut Spread) {
        (0..MUCH).for_each(|_| spread.note_bulk());
    }

    fn open(count: u64) -> impl Fn(&mut Spread) {
        move |spread| spread.note_sockets(spread.sockets + count)
    }

    /// Windows until a change, at most twenty.
    fn windows(spread: &mut Spread, now: &mut Instant, happens: impl Fn(&mut Spread)) -> Option<u32> {
        (1..=20).find(|_| {
            happens(spread);
            *now += WINDOW;
            spread.judge(*now)
        })
    }

    #[test]
    fn much_that_goes_on_begins_it_and_little_ends_it() {
        for much in [&bulk as &dyn Fn(&mut Spread), &open(MUCH / 2)] {
            let (mut spread, mut now) = fresh();
            assert_eq!(windows(&mut spread, &mut now, much), Some(3));
            assert!(spread.is_on);
            assert_eq!(windows(&mut spread, &mut now, much), None, "it goes on");
            assert_eq!(windows(&mut spread, &mut now, open(MUCH / 2 - 1)), Some(10));
            assert!(!spread.is_on);
        }
    }

    #[test]
    fn neither_a_burst_nor_little_begins_it() {
        let (mut spread, mut now) = fresh();
        assert_eq!(windows(&mut spread, &mut now, |spread| spread.note_sockets(1000)), None);
        assert_eq!(windows(&mut spread, &mut now, open(MUCH / 2 - 1)), None);
        // Much, but with pauses.
        for _ in 0..20 {
            bulk(&mut spread);
            now += 2 * WINDOW;
            assert!(!spread.judge(now));
        }
    }

    #[test]
    fn one_processor_has_nobody_to_spread_to() {
        let (spread, mut now) = fresh();
        let mut spread = Spread { is_possible: false, ..spread };
        assert_eq!(windows(&mut spread, &mut now, bulk), None);
    }
}
