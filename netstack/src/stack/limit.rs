//! How many ICMP errors this host sends (RFC 1812, 4.3.2.8; RFC 4443, 2.4 f), with Linux's figures.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Instant;

/// To everybody together: one each millisecond, and at most so many at once (`icmp_msgs_per_sec`, `icmp_msgs_burst`).
const ALL: (Duration, u32) = (Duration::from_millis(1), 50);
/// To one host: one each second (`icmp_ratelimit`), and at most so many at once (`XRLIM_BURST_FACTOR`).
const ONE: (Duration, u32) = (Duration::from_secs(1), 6);
/// Hosts remembered. Whoever is forgotten may get a few more, which the limit for all still bounds.
const HOSTS_MAX: usize = 256;

/// Allowances that grow with time.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Limiter {
    all: Bucket,
    hosts: VecDeque<(IpAddr, Bucket)>,
}

/// One allowance: empty so far, and full again at this time if nothing is taken.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Bucket {
    full_at: Option<Instant>,
}

impl Bucket {
    fn take(&mut self, now: Instant, (interval, burst): (Duration, u32)) -> bool {
        let full_at = self.full_at.map_or(now, |full_at| full_at.max(now)) + interval;
        if full_at.since(now) > interval * burst {
            return false;
        }
        self.full_at = Some(full_at);
        true
    }
}

impl Limiter {
    /// Whether one more may be sent to `host`; if so it counts as sent.
    pub(crate) fn allows(&mut self, now: Instant, host: IpAddr) -> bool {
        let known = self.hosts.iter().position(|(known, _)| *known == host);
        let at = known.unwrap_or_else(|| {
            if self.hosts.len() >= HOSTS_MAX {
                self.hosts.pop_front();
            }
            self.hosts.push_back((host, Bucket::default()));
            self.hosts.len() - 1
        });
        self.hosts[at].1.take(now, ONE) && self.all.take(now, ALL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_one_a_second() {
        let mut limiter = Limiter::default();
        let (host, other): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let mut now = Instant::from_millis(1 << 30);
        assert_eq!((0..10).filter(|_| limiter.allows(now, host)).count(), 6);
        assert!(limiter.allows(now, other));
        now += Duration::from_secs(2);
        assert_eq!((0..10).filter(|_| limiter.allows(now, host)).count(), 2);
    }

    #[test]
    fn many_hosts_share_an_allowance_and_little_memory() {
        let mut limiter = Limiter::default();
        let now = Instant::from_millis(1 << 30);
        let hosts = (0..1000u32).map(|host| IpAddr::from(host.to_be_bytes()));
        assert_eq!(hosts.filter(|&host| limiter.allows(now, host)).count(), 50);
        assert_eq!(limiter.hosts.len(), HOSTS_MAX);
    }
}
