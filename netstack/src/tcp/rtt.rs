//! Round-trip time and the retransmission time-out (RFC 6298), with the floor and ceiling Linux uses.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Instant;
use crate::time::is_measurable;

/// RFC 6298 asks for 1 s; Linux, and with it everyone's expectations, uses 200 ms (`TCP_RTO_MIN`).
pub(crate) const RTO_MIN: Duration = Duration::from_millis(200);
/// `TCP_RTO_MAX`; RFC 6298 allows any ceiling of 60 s or more.
//= https://www.rfc-editor.org/rfc/rfc6298#section-2.5
//# There is a ceiling of 60 seconds or more.
pub(crate) const RTO_MAX: Duration = Duration::from_secs(120);
/// RFC 6298 (2.1): before any measurement.
//= https://www.rfc-editor.org/rfc/rfc6298#section-2.1
//# Before any measurement the time-out is one second.
pub(crate) const RTO_INITIAL: Duration = Duration::from_secs(1);
/// RFC 6298 (5.7): before any measurement, when the SYN itself had to be repeated.
//= https://www.rfc-editor.org/rfc/rfc6298#section-5.7
//# If the SYN had to be repeated, data starts with a time-out of three seconds.
const RTO_FALLBACK: Duration = Duration::from_secs(3);
/// How long a minimum stands for the path (Linux: `tcp_min_rtt_wlen`).
const MIN_RTT_WINDOW: Duration = Duration::from_secs(300);

/// The estimator of one connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RttEstimator {
    smoothed: Option<Duration>,
    variance: Duration,

    minimum: Duration,
    minimum_since: Instant,
    backoff: u8,
    /// The path seems to be slower than the first time-out allowed for.
    #[serde(default)]
    slow: bool,
}

impl Default for RttEstimator {
    fn default() -> Self {
        RttEstimator {
            smoothed: None,
            variance: Duration::ZERO,

            minimum: Duration::MAX,
            minimum_since: Instant::ZERO,
            backoff: 0,
            slow: false,
        }
    }
}

impl RttEstimator {
    /// Whether the times can be calculated with; for images.
    pub(crate) fn is_consistent(&self) -> bool {
        let measured = self.smoothed.is_none_or(|smoothed| is_measurable(smoothed) && is_measurable(self.minimum));
        measured && is_measurable(self.variance)
    }

    /// Takes a measurement of a segment that was sent once (Karn), or one told by timestamps.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.1
    //# The RTO MUST be computed according to the algorithm in [10], including Karn's algorithm for taking RTT samples
    //# (MUST-18).
    //= https://www.rfc-editor.org/rfc/rfc6298#section-3
    //# No measurement is taken from a segment that was sent again, unless timestamps tell the copies apart.
    pub(crate) fn sample(&mut self, now: Instant, rtt: Duration) {
        let rtt = rtt.max(Duration::from_micros(1));

        if rtt <= self.minimum || now.since(self.minimum_since) > MIN_RTT_WINDOW {
            self.minimum = rtt;
            self.minimum_since = now;
        }
        match self.smoothed {
            //= https://www.rfc-editor.org/rfc/rfc6298#section-2.2
            //# The first measurement R sets SRTT to R and RTTVAR to R/2.
            // RFC 6298 (2.2)
            None => {
                self.smoothed = Some(rtt);
                self.variance = rtt / 2;
            }
            //= https://www.rfc-editor.org/rfc/rfc6298#section-2.3
            //# Later ones move RTTVAR by a quarter and SRTT by an eighth.
            // RFC 6298 (2.3)
            Some(smoothed) => {
                self.variance = (self.variance * 3 + smoothed.abs_diff(rtt)) / 4;
                self.smoothed = Some((smoothed * 7 + rtt) / 8);
            }
        }
    }

    /// The smoothed time, if anything was measured.
    pub(crate) const fn smoothed(&self) -> Option<Duration> {
        self.smoothed
    }

    pub(crate) const fn variance(&self) -> Duration {
        self.variance
    }

    /// The smallest time seen lately, if anything was measured.
    pub(crate) fn minimum(&self) -> Option<Duration> {
        self.smoothed.map(|_| self.minimum)
    }

    /// The time-out without backoff.
    pub(crate) fn base_rto(&self) -> Duration {
        match self.smoothed {
            None if self.slow => RTO_FALLBACK,
            None => RTO_INITIAL,
            // Linux keeps the variance term itself above the floor, so that a steady path isn't timed out at SRTT + 0.
            Some(smoothed) => (smoothed + (self.variance * 4).max(RTO_MIN)).min(RTO_MAX),
        }
    }

    /// The time-out now.
    pub(crate) fn rto(&self) -> Duration {
        self.base_rto().saturating_mul(1 << self.backoff.min(16)).min(RTO_MAX)
    }

    pub(crate) const fn backoff(&self) -> u8 {
        self.backoff
    }

    /// RFC 6298 (5.5): the timer expired.
    //= https://www.rfc-editor.org/rfc/rfc6298#section-5.5
    //# Each time it expires the time-out doubles.
    pub(crate) fn back_off(&mut self) {
        self.backoff = self.backoff.saturating_add(1).min(32);
    }

    /// The handshake is over; `repeated` if it took more than one SYN.
    pub(crate) fn on_established(&mut self, repeated: bool) {
        self.backoff = 0;
        self.slow = repeated;
    }

    /// New data was acknowledged.
    pub(crate) fn reset_backoff(&mut self) {
        self.backoff = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_sample_and_floor() {
        //= https://www.rfc-editor.org/rfc/rfc6298#section-2.1
        //= type=test
        //# Before any measurement the time-out is one second.
        //= https://www.rfc-editor.org/rfc/rfc6298#section-2.2
        //= type=test
        //# The first measurement R sets SRTT to R and RTTVAR to R/2.
        let mut rtt = RttEstimator::default();
        assert_eq!(rtt.rto(), RTO_INITIAL);
        rtt.sample(Instant::ZERO, Duration::from_millis(100));
        assert_eq!(rtt.smoothed(), Some(Duration::from_millis(100)));
        assert_eq!(rtt.rto(), Duration::from_millis(300));
        for _ in 0..100 {
            rtt.sample(Instant::ZERO, Duration::from_millis(100));
        }
        assert_eq!(rtt.rto().as_millis(), 300, "the floor holds on a steady path");
    }

    #[test]
    fn backs_off_to_the_ceiling() {
        //= https://www.rfc-editor.org/rfc/rfc6298#section-2.5
        //= type=test
        //# There is a ceiling of 60 seconds or more.
        let mut rtt = RttEstimator::default();
        rtt.sample(Instant::ZERO, Duration::from_millis(100));
        let mut last = rtt.rto();
        for _ in 0..20 {
            rtt.back_off();
            assert!(rtt.rto() >= last);
            last = rtt.rto();
        }
        assert_eq!(last, RTO_MAX);
        rtt.reset_backoff();
        assert_eq!(rtt.rto(), Duration::from_millis(300));
    }

    #[test]
    fn later_samples_move_it_slowly() {
        //= https://www.rfc-editor.org/rfc/rfc6298#section-2.3
        //= type=test
        //# Later ones move RTTVAR by a quarter and SRTT by an eighth.
        let mut rtt = RttEstimator::default();
        rtt.sample(Instant::ZERO, Duration::from_millis(100));
        rtt.sample(Instant::ZERO, Duration::from_millis(180));
        assert_eq!(rtt.smoothed(), Some(Duration::from_millis(110)));
        // 3/4 * 50 + 1/4 * |100 - 180|
        assert_eq!(rtt.variance(), Duration::from_micros(57_500));
    }
}
