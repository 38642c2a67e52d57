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
        let mut controller = Controller::new(Congestion::Cubic, MSS);
        controller.set_cwnd(80_000, MSS);
        let saved = controller.save();
        controller.on_congestion(80_000, MSS);
        controller.set_cwnd(MSS, MSS);
        controller.restore(saved);
        assert_eq!(controller.cwnd(), 80_000);
        assert!(controller.in_slow_start());
    }
}
