//! Congestion control: how much may be in flight.
//!
//! [`Controller`] holds what all algorithms share (window, threshold, slow start with HyStart++) and asks the algorithm
//! only how to grow in congestion avoidance and where to fall back to. Everything is in bytes.

mod cubic;
mod hystart;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::cubic::Cubic;
use self::hystart::HyStart;
use super::seq::Seq;
use crate::{Congestion, Instant};

/// RFC 6928: the initial window, in segments.
//= https://www.rfc-editor.org/rfc/rfc6928#section-2
//# The first flight has up to ten segments.
pub(crate) const INITIAL_WINDOW_SEGMENTS: usize = 10;
/// Beyond any window that can be told.
const WINDOW_MAX: usize = 1 << 30;

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Algorithm {
    Cubic(Cubic),
    Reno(Reno),
}

/// RFC 5681: one segment more per window acknowledged.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Reno {
    acked: usize,
}

/// What an acknowledgment of new data tells a controller.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acked {
    pub(crate) now: Instant,
    /// Bytes acknowledged.
    pub(crate) bytes: usize,
    /// Up to where, and up to where data has been sent: for counting rounds.
    pub(crate) una: Seq,
    pub(crate) nxt: Seq,
    /// The round-trip time this acknowledgment measured.
    pub(crate) rtt: Option<Duration>,
    /// The smoothed one.
    pub(crate) smoothed_rtt: Duration,
    pub(crate) mss: usize,
}

/// What an undone reduction goes back to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Saved {
    cwnd: usize,
    ssthresh: usize,
    algorithm: Algorithm,
}

/// The congestion state of a connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Controller {
    cwnd: usize,
    ssthresh: usize,
    algorithm: Algorithm,
    hystart: HyStart,
}

impl Controller {
    pub(crate) fn new(kind: Congestion, mss: usize) -> Self {
        Controller {
            cwnd: INITIAL_WINDOW_SEGMENTS * mss,
            ssthresh: WINDOW_MAX,
            algorithm: Algorithm::new(kind),
            hystart: HyStart::default(),
        }
    }

    /// Another algorithm takes over where this one stands.
    pub(crate) fn switch(&mut self, kind: Congestion) {
        if kind != self.kind() {
            self.algorithm = Algorithm::new(kind);
        }
    }

    pub(crate) const fn kind(&self) -> Congestion {
        match self.algorithm {
            Algorithm::Cubic(_) => Congestion::Cubic,
            Algorithm::Reno(_) => Congestion::Reno,
        }
    }

    /// Whether it can be calculated with; for images.
    pub(crate) fn is_consistent(&self) -> bool {
        self.cwnd > 0 && self.hystart.is_consistent()
    }

    /// The congestion window.
    pub(crate) const fn cwnd(&self) -> usize {
        self.cwnd
    }

    /// The slow start threshold.
    pub(crate) const fn ssthresh(&self) -> usize {
        self.ssthresh
    }

    pub(crate) const fn in_slow_start(&self) -> bool {
        self.cwnd < self.ssthresh
    }

    /// Sets the window, as recovery does from packet to packet.
    pub(crate) fn set_cwnd(&mut self, cwnd: usize, mss: usize) {
        self.cwnd = cwnd.clamp(mss, WINDOW_MAX);
    }

    /// The handshake is done and the segment size known. `lossy` if the SYN had to be repeated (RFC 6298, 5.7).
    pub(crate) fn start(&mut self, mss: usize, lossy: bool) {
        self.cwnd = if lossy { mss } else { INITIAL_WINDOW_SEGMENTS * mss };
    }

    /// The segment size has changed: the window keeps its count of segments.
    pub(crate) fn rescale(&mut self, before: usize, after: usize) {
        if after < before {
            self.cwnd = (self.cwnd / before.max(1)).max(1) * after;
        }
    }

    /// New data was acknowledged and the window was what limited sending.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.2
    //# A TCP endpoint MUST implement the basic congestion control algorithms slow start, congestion avoidance, and
    //# exponential backoff of RTO to avoid creating congestion collapse conditions (MUST-19).
    pub(crate) fn on_ack(&mut self, acked: &Acked) {
        let mut bytes = acked.bytes;
        if self.in_slow_start() {
            let exited = self.hystart.on_ack(acked, self.cwnd);
            if exited {
                self.ssthresh = self.cwnd;
            } else {
                let growth = self.hystart.growth(bytes);
                let grown = (self.cwnd + growth).min(self.ssthresh);
                bytes -= bytes.min((grown - self.cwnd) * bytes / growth.max(1));
                self.cwnd = grown;
            }
        }
        if bytes > 0 && !self.in_slow_start() {
            let Acked { now, mss, smoothed_rtt, .. } = *acked;
            self.cwnd = match &mut self.algorithm {
                Algorithm::Cubic(cubic) => cubic.on_ack(now, self.cwnd, bytes, smoothed_rtt, mss),
                Algorithm::Reno(reno) => reno.on_ack(self.cwnd, bytes, mss),
            };
        }
        self.cwnd = self.cwnd.min(WINDOW_MAX);
    }

    /// A loss was detected or an ECN mark came back: the threshold falls. The caller brings the window there (PRR).
    pub(crate) fn on_congestion(&mut self, flight: usize, mss: usize) {
        self.hystart = HyStart::default();
        self.ssthresh = match &mut self.algorithm {
            Algorithm::Cubic(cubic) => cubic.on_congestion(self.cwnd, mss),
            Algorithm::Reno(_) => flight.min(self.cwnd) / 2,
        }
        .max(2 * mss);
    }

    /// What [`Controller::restore`] goes back to.
    pub(crate) fn save(&self) -> Saved {
        Saved { cwnd: self.cwnd, ssthresh: self.ssthresh, algorithm: self.algorithm.clone() }
    }

    /// The reduction since `saved` was a mistake (RFC 3522, RFC 2883).
    //= https://www.rfc-editor.org/rfc/rfc9438#section-4.9
    //# A reduction that turns out to be spurious is undone with the function's state.
    pub(crate) fn restore(&mut self, saved: Saved) {
        let Saved { cwnd, ssthresh, algorithm } = saved;
        self.cwnd = self.cwnd.max(cwnd);
        self.ssthresh = self.ssthresh.max(ssthresh);
        self.algorithm = algorithm;
    }

    /// Sending starts again after an idle time of `idle` with a time-out of `rto` (RFC 5681, 4.1; RFC 9438, 5.8).
    pub(crate) fn on_idle(&mut self, idle: Duration, rto: Duration, mss: usize) {
        if let Algorithm::Cubic(cubic) = &mut self.algorithm {
            cubic.on_idle(idle);
        }
        //= https://www.rfc-editor.org/rfc/rfc5681#section-4.1
        //# After an idle time the window restarts from no more than the initial one.
        let restart = (INITIAL_WINDOW_SEGMENTS * mss).min(self.cwnd);
        if idle > rto {
            // RFC 2861: what the window knew ages by half each time-out.
            self.ssthresh = self.ssthresh.max(self.cwnd / 4 * 3);
            let halvings = u32::try_from(idle.as_nanos() / rto.as_nanos().max(1)).unwrap_or(u32::MAX);
            self.cwnd = self.cwnd.checked_shr(halvings).unwrap_or(0).max(restart);
        }
    }
}

impl Algorithm {
    fn new(kind: Congestion) -> Self {
        match kind {
            Congestion::Cubic => Algorithm::Cubic(Cubic::default()),
            Congestion::Reno => Algorithm::Reno(Reno::default()),
        }
    }
}

impl Reno {
    fn on_ack(&mut self, cwnd: usize, bytes: usize, mss: usize) -> usize {
        //= https://www.rfc-editor.org/rfc/rfc5681#section-3.1
        //# In congestion avoidance the window grows by one segment in a round trip.
        self.acked += bytes;
        if self.acked < cwnd {
            return cwnd;
        }
        let windows = self.acked / cwnd.max(1);
        self.acked -= windows * cwnd;
        cwnd + windows * mss
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MSS: usize = 1000;

    fn acked(bytes: usize, at_ms: u64) -> Acked {
        Acked {
            now: Instant::from_millis(at_ms),
            bytes,
            una: Seq::initial(0),
            nxt: Seq::initial(0),
            rtt: None,
            smoothed_rtt: Duration::from_millis(100),
            mss: MSS,
        }
    }

    #[test]
    fn slow_start_doubles_and_avoidance_adds_one() {
        //= https://www.rfc-editor.org/rfc/rfc5681#section-3.1
        //= type=test
        //# In congestion avoidance the window grows by one segment in a round trip.
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.2
        //= type=test
        //# A TCP endpoint MUST implement the basic congestion control algorithms slow start, congestion avoidance, and
        //# exponential backoff of RTO to avoid creating congestion collapse conditions (MUST-19).
        let mut controller = Controller::new(Congestion::Reno, MSS);
        assert_eq!(controller.cwnd(), 10_000);
        controller.on_ack(&acked(10_000, 0));
        assert_eq!(controller.cwnd(), 20_000);
        controller.on_congestion(20_000, MSS);
        controller.set_cwnd(controller.ssthresh(), MSS);
        assert_eq!(controller.cwnd(), 10_000);
        controller.on_ack(&acked(10_000, 0));
        assert_eq!(controller.cwnd(), 11_000);
    }

    #[test]
    fn cubic_returns_to_where_it_was_and_beyond() {
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.2
        //= type=test
        //# An endpoint MAY implement such alternative algorithms provided that the algorithms are conformant with the
        //# TCP specifications from the IETF Standards Track as described in RFC 2914, RFC 5033 [7], and RFC 8961 [15]
        //# (MAY-18).
        //= https://www.rfc-editor.org/rfc/rfc9438#section-4.2
        //= type=test
        //# In congestion avoidance the window follows C(t-K)^3 + W_max, one round trip ahead.
        //= https://www.rfc-editor.org/rfc/rfc9438#section-4.6
        //= type=test
        //# A reduction is to 0.7 of the window.
        let mut controller = Controller::new(Congestion::Cubic, MSS);
        controller.set_cwnd(500_000, MSS);
        controller.on_congestion(500_000, MSS);
        assert_eq!(controller.ssthresh(), 350_000);
        controller.set_cwnd(controller.ssthresh(), MSS);
        // K = cbrt(150 / 0.4) = 7.2 s
        let mut now = 0;
        while now < 7_200 {
            controller.on_ack(&acked(controller.cwnd(), now));
            now += 100;
        }
        let at_k = controller.cwnd();
        assert!((480_000..=520_000).contains(&at_k), "{at_k}");
        while now < 10_000 {
            controller.on_ack(&acked(controller.cwnd(), now));
            now += 100;
        }
        assert!(controller.cwnd() > at_k + 5_000, "{}", controller.cwnd());
    }

    #[test]
    fn undo_restores() {
        //= https://www.rfc-editor.org/rfc/rfc9438#section-4.9
        //= type=test
        //# A reduction that turns out to be spurious is undone with the function's state.
        let mut controller = Controller::new(Congestion::Cubic, MSS);
        controller.set_cwnd(80_000, MSS);
        let saved = controller.save();
        controller.on_congestion(80_000, MSS);
        controller.set_cwnd(MSS, MSS);
        controller.restore(saved);
        assert_eq!(controller.cwnd(), 80_000);
        assert!(controller.in_slow_start());
    }

    #[test]
    fn a_flow_that_fell_back_leaves_room() {
        //= https://www.rfc-editor.org/rfc/rfc9438#section-4.7
        //= type=test
        //# A flow that didn't get back to its former maximum leaves room by remembering less.
        let recovered = |reductions: &[usize]| {
            let mut controller = Controller::new(Congestion::Cubic, MSS);
            for &window in reductions {
                controller.set_cwnd(window, MSS);
                controller.on_congestion(window, MSS);
                controller.set_cwnd(controller.ssthresh(), MSS);
            }
            // Up to the plateau, which is what the flow remembers.
            (0..60).for_each(|step| controller.on_ack(&acked(controller.cwnd(), step * 100)));
            controller.cwnd()
        };
        assert!(recovered(&[500_000, 300_000]) < recovered(&[300_000]) - 20_000);
    }

    #[test]
    fn idle_time_does_not_count() {
        //= https://www.rfc-editor.org/rfc/rfc9438#section-5.8
        //= type=test
        //# Time without data doesn't count.
        let grown = |idle: Duration| {
            let mut controller = Controller::new(Congestion::Cubic, MSS);
            controller.set_cwnd(500_000, MSS);
            controller.on_congestion(500_000, MSS);
            controller.set_cwnd(controller.ssthresh(), MSS);
            controller.on_ack(&acked(10_000, 0));
            let before = controller.cwnd();
            controller.on_idle(idle, Duration::MAX, MSS);
            let ms = u64::try_from(idle.as_millis()).unwrap_or(0);
            controller.on_ack(&acked(100_000, ms + 100));
            controller.cwnd() - before
        };
        assert_eq!(grown(Duration::from_secs(100)), grown(Duration::ZERO));
    }

    #[test]
    fn growth_is_reno_s_at_least_and_half_again_at_most() {
        //= https://www.rfc-editor.org/rfc/rfc9438#section-4.3
        //= type=test
        //# The window is at least what Reno's would be on average.
        //= https://www.rfc-editor.org/rfc/rfc9438#section-4.2
        //= type=test
        //# The target is at least the window and at most one and a half times it.
        let mut controller = Controller::new(Congestion::Cubic, MSS);
        controller.set_cwnd(20_000, MSS);
        controller.on_congestion(20_000, MSS);
        controller.set_cwnd(controller.ssthresh(), MSS);
        // A short path: the cubic term is still flat, Reno has gained half a segment in each round.
        for round in 0..40 {
            let mut one = acked(controller.cwnd(), round);
            one.smoothed_rtt = Duration::from_millis(1);
            controller.on_ack(&one);
        }
        assert!(controller.cwnd() >= 14_000 + 15_000, "{}", controller.cwnd());
        // An hour later the term is beyond all bounds, and yet:
        let before = controller.cwnd();
        controller.on_ack(&acked(before, 3_600_000));
        assert!(controller.cwnd() <= before + before / 2, "{} {before}", controller.cwnd());
    }
}
