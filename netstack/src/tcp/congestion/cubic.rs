//! CUBIC, RFC 9438: the window as a cubic function of the time since the last reduction.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Instant;

/// RFC 9438 (4.1), windows in segments and time in seconds.
const C: f64 = 0.4;
/// RFC 9438 (4.6).
const BETA: f64 = 0.7;
/// RFC 9438 (4.3): the growth of a Reno that reduces by beta and is fair to one that halves.
const ALPHA: f64 = 3.0 * (1.0 - BETA) / (1.0 + BETA);

/// The state of the function. Windows are in segments, as in the RFC.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Cubic {
    /// The window before the last reduction.
    w_max: f64,
    /// The window before that one, for fast convergence.
    cwnd_prior: f64,
    /// The Reno-friendly estimate.
    w_est: f64,
    /// Seconds from the epoch to `w_max`.
    k: f64,
    epoch: Option<Instant>,
    /// Growth smaller than a byte.
    fraction: f64,
}

impl Cubic {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.2
    //# An endpoint MAY implement such alternative algorithms provided that the algorithms are conformant with the TCP
    //# specifications from the IETF Standards Track as described in RFC 2914, RFC 5033 [7], and RFC 8961 [15] (MAY-18).
    pub(super) fn on_ack(&mut self, now: Instant, cwnd: usize, bytes: usize, rtt: Duration, mss: usize) -> usize {
        let mss = mss as f64;
        let window = cwnd as f64 / mss;
        let acked = bytes as f64 / mss;
        let epoch = match self.epoch {
            Some(epoch) => epoch,
            None => {
                if self.w_max < window {
                    self.w_max = window;
                    self.k = 0.0;
                } else {
                    self.k = ((self.w_max - window) / C).cbrt();
                }
                self.w_est = window;
                self.epoch = Some(now);
                now
            }
        };
        //= https://www.rfc-editor.org/rfc/rfc9438#section-4.2
        //# In congestion avoidance the window follows C(t-K)^3 + W_max, one round trip ahead.
        //= https://www.rfc-editor.org/rfc/rfc9438#section-4.2
        //# The target is at least the window and at most one and a half times it.
        // RFC 9438 (4.2): where the function will be one round trip from now.
        let t = (now.since(epoch) + rtt).as_secs_f64() - self.k;
        let target = (C * t * t * t + self.w_max).clamp(window, window * 1.5);
        // RFC 9438 (4.3)
        //= https://www.rfc-editor.org/rfc/rfc9438#section-4.3
        //# The window is at least what Reno's would be on average.
        let alpha = if self.w_est < self.cwnd_prior { ALPHA } else { 1.0 };
        self.w_est += alpha * acked / window;
        let mut growth = (target - window) / window * acked;
        if window + growth < self.w_est {
            growth = self.w_est - window;
        }
        let growth_bytes = growth.max(0.0) * mss + self.fraction;
        self.fraction = growth_bytes.fract();
        cwnd + growth_bytes as usize
    }

    /// Returns the new threshold in bytes.
    pub(super) fn on_congestion(&mut self, cwnd: usize, mss: usize) -> usize {
        let window = cwnd as f64 / mss as f64;
        self.epoch = None;
        self.fraction = 0.0;
        //= https://www.rfc-editor.org/rfc/rfc9438#section-4.7
        //# A flow that didn't get back to its former maximum leaves room by remembering less.
        // RFC 9438 (4.7), fast convergence: a flow that didn't get back to where it was leaves room to newcomers.
        self.w_max = if window < self.w_max { window * (1.0 + BETA) / 2.0 } else { window };
        self.cwnd_prior = window;
        //= https://www.rfc-editor.org/rfc/rfc9438#section-4.6
        //# A reduction is to 0.7 of the window.
        (cwnd as f64 * BETA) as usize
    }

    /// RFC 9438 (5.8): time without data doesn't count.
    pub(super) fn on_idle(&mut self, idle: Duration) {
        if let Some(epoch) = &mut self.epoch {
            //= https://www.rfc-editor.org/rfc/rfc9438#section-5.8
            //# Time without data doesn't count.
            *epoch += idle;
        }
    }
}
