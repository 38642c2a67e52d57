//! HyStart++, RFC 9406: leaving slow start when the round-trip time rises, before anything is lost.
//!
//! Left out on purpose: the limit L on growth per acknowledgment. It guards against bursts when one acknowledgment
//! covers much; here one acknowledgment stands for a super-packet of up to 45 segments as a rule, and with the limit
//! slow start would crawl.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Acked;
use crate::tcp::seq::Seq;
use crate::time::is_measurable;

const MIN_RTT_THRESH: Duration = Duration::from_millis(4);
const MAX_RTT_THRESH: Duration = Duration::from_millis(16);
const MIN_RTT_DIVISOR: u32 = 8;
const N_RTT_SAMPLE: u32 = 8;
const CSS_GROWTH_DIVISOR: usize = 4;
const CSS_ROUNDS: u32 = 5;
/// Below this many segments slow start is never left early (Linux: `hystart_low_window`).
const LOW_WINDOW_SEGMENTS: usize = 16;

/// The round counter and its round-trip times.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct HyStart {
    round_end: Option<Seq>,
    last_min: Option<Duration>,
    current_min: Option<Duration>,
    samples: u32,
    /// In conservative slow start: the baseline and the rounds spent in it.
    conservative: Option<(Duration, u32)>,
}

impl HyStart {
    /// Whether the times can be calculated with; for images.
    pub(super) fn is_consistent(&self) -> bool {
        let baseline = self.conservative.map(|(baseline, _)| baseline);
        [self.last_min, self.current_min, baseline].into_iter().flatten().all(is_measurable)
    }

    /// Whether slow start is over.
    pub(super) fn on_ack(&mut self, acked: &Acked, cwnd: usize) -> bool {
        if self.round_end.is_none_or(|end| acked.una >= end) {
            self.round_end = Some(acked.nxt);
            if self.current_min.is_some() {
                self.last_min = self.current_min.take();
            }
            self.samples = 0;
            if let Some((_, rounds)) = &mut self.conservative {
                *rounds = rounds.saturating_add(1);
                //= https://www.rfc-editor.org/rfc/rfc9406#section-4.2
                //# After five rounds slow start ends where it stands.
                if *rounds >= CSS_ROUNDS {
                    return true;
                }
            }
        }
        let Some(rtt) = acked.rtt else { return false };
        self.samples = self.samples.saturating_add(1);
        let current = self.current_min.map_or(rtt, |min| min.min(rtt));
        self.current_min = Some(current);
        //= https://www.rfc-editor.org/rfc/rfc9406#section-4.2
        //# Only after eight samples in a round.
        if self.samples < N_RTT_SAMPLE {
            return false;
        }
        match self.conservative {
            None => {
                let Some(last) = self.last_min else {
                    return false;
                };
                //= https://www.rfc-editor.org/rfc/rfc9406#section-4.2
                //# Conservative slow start begins when the least round-trip time of a round exceeds the last round's by
                //# an eighth, between 4 and 16 ms.
                let threshold = (last / MIN_RTT_DIVISOR).clamp(MIN_RTT_THRESH, MAX_RTT_THRESH);
                if current >= last + threshold && cwnd >= LOW_WINDOW_SEGMENTS * acked.mss {
                    self.conservative = Some((current, 0));
                }
            }
            //= https://www.rfc-editor.org/rfc/rfc9406#section-4.2
            //# If the round-trip time falls again slow start resumes.
            // The rise was a false alarm.
            Some((baseline, _)) if current < baseline => self.conservative = None,
            Some(_) => {}
        }
        false
    }

    /// By how much the window grows for `bytes` acknowledged.
    pub(super) const fn growth(&self, bytes: usize) -> usize {
        //= https://www.rfc-editor.org/rfc/rfc9406#section-4.2
        //# In conservative slow start the window grows at a quarter of the pace.
        if self.conservative.is_some() { bytes / CSS_GROWTH_DIVISOR } else { bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Instant;

    fn round(hystart: &mut HyStart, una: usize, rtt_ms: u64) -> bool {
        let start = Seq::initial(0);
        (0..10).any(|_| {
            let acked = Acked {
                now: Instant::ZERO,
                bytes: 1000,
                una: start + una,
                nxt: start + una + 1000,
                rtt: Some(Duration::from_millis(rtt_ms)),
                smoothed_rtt: Duration::from_millis(rtt_ms),
                mss: 1000,
            };
            hystart.on_ack(&acked, 100_000)
        })
    }

    #[test]
    fn leaves_after_five_rounds_of_raised_rtt() {
        //= https://www.rfc-editor.org/rfc/rfc9406#section-4.2
        //= type=test
        //# Conservative slow start begins when the least round-trip time of a round exceeds the last round's by an
        //# eighth, between 4 and 16 ms.
        //= https://www.rfc-editor.org/rfc/rfc9406#section-4.2
        //= type=test
        //# After five rounds slow start ends where it stands.
        let mut hystart = HyStart::default();
        let mut una = 0;
        let mut rounds = 0;
        for rtt_ms in [50, 50, 60, 60, 60, 60, 60, 60, 60, 60] {
            una += 1000;
            rounds += 1;
            if round(&mut hystart, una, rtt_ms) {
                break;
            }
        }
        assert_eq!(rounds, 8);
    }

    #[test]
    fn a_false_alarm_goes_back() {
        //= https://www.rfc-editor.org/rfc/rfc9406#section-4.2
        //= type=test
        //# If the round-trip time falls again slow start resumes.
        let mut hystart = HyStart::default();
        for (index, rtt_ms) in [50, 50, 60, 60, 50, 50, 50, 50, 50, 50, 50, 50].into_iter().enumerate() {
            assert!(!round(&mut hystart, 1000 * (index + 1), rtt_ms), "left in round {index}");
        }
        assert_eq!(hystart.growth(100), 100);
    }

    #[test]
    fn eight_samples_and_a_slower_pace_come_first() {
        //= https://www.rfc-editor.org/rfc/rfc9406#section-4.2
        //= type=test
        //# Only after eight samples in a round.
        //= https://www.rfc-editor.org/rfc/rfc9406#section-4.2
        //= type=test
        //# In conservative slow start the window grows at a quarter of the pace.
        let mut hystart = HyStart::default();
        let start = Seq::initial(0);
        let mut acked = Acked {
            now: Instant::ZERO,
            bytes: 1000,
            una: start + 1000,
            nxt: start + 2000,
            rtt: Some(Duration::from_millis(50)),
            smoothed_rtt: Duration::from_millis(50),
            mss: 1000,
        };
        for _ in 0..8 {
            hystart.on_ack(&acked, 100_000);
        }
        acked.una = start + 2000;
        acked.nxt = start + 3000;
        acked.rtt = Some(Duration::from_millis(90));
        for _ in 0..7 {
            hystart.on_ack(&acked, 100_000);
            assert_eq!(hystart.growth(1000), 1000);
        }
        assert!(!hystart.on_ack(&acked, 100_000));
        assert_eq!(hystart.growth(1000), 250);
    }
}
