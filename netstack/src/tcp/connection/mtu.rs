//! How large a packet the path carries: told by ICMP (RFC 1191, RFC 8201), and found out where nobody tells (RFC 4821).
//!
//! A path is taken for what the link carries until something says otherwise. Then the size falls to what certainly passes,
//! and a *search* looks for the largest that does, by probes: single segments of stream data larger than the others. A
//! probe that is acknowledged raises the size; one that is lost, while what was sent after it arrives, lowers the search's
//! upper end and says nothing about congestion (RFC 4821, 7.5). Both ways of learning feed the same search: when what ICMP
//! said has aged, the path is probed rather than flooded with large packets.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::Env;
use super::super::recovery::Phase;
use super::super::seq::Seq;
use super::{Connection, Emission, path_mtu};
use crate::{Instant, ip};

/// How long the path is believed to be narrow before it is probed again (RFC 1191, 6.3; Linux: `tcp_probe_interval`).
const AGE: Duration = Duration::from_secs(600);
/// After a black hole: it may have been an outage, so that a first look is worth the loss of one segment.
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// A search ends when its bounds are this close (Linux: `tcp_probe_threshold`).
const CLOSE_ENOUGH: u32 = 8;
/// Segments that must be there to follow a probe, so that its loss shows at once and not by a time-out.
const FOLLOWERS: usize = 4;

/// What is known of the path while it is being searched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Search {
    /// The largest packet known to pass; what is being sent.
    low: u32,
    /// The largest that may pass.
    high: u32,
    /// No probe before this.
    not_before: Instant,
    /// The probe that is out.
    probe: Option<Probe>,
    /// `high` has not been tried yet.
    whole: bool,
}

/// A probe: a packet of `size` bytes that carries `start..end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Probe {
    size: u32,
    start: Seq,
    end: Seq,
}

impl Search {
    /// What to try next. First the upper end itself: as a rule it is the link's own size, and all is well again.
    const fn candidate(&self) -> u32 {
        //= https://www.rfc-editor.org/rfc/rfc4821#section-7.2
        //# The largest size that passes is searched between the bounds, upwards from the one that works.
        if self.whole { self.high } else { self.low.midpoint(self.high) }
    }

    const fn is_over(&self) -> bool {
        self.low >= self.high || (!self.whole && self.high - self.low < CLOSE_ENOUGH)
    }

    /// Packets of `size` don't pass.
    fn failed(&mut self, size: u32) {
        self.high = self.high.min(size.saturating_sub(1)).max(self.low);
        self.whole = false;
        self.probe = None;
    }
}

impl Connection {
    /// The least size of a path: below it a message is more likely an attack (Linux: `ip_rt_min_pmtu`; RFC 8200, 5).
    const fn least_mtu(&self) -> u32 {
        if self.tuple.remote.is_ipv4() { 552 } else { 1280 }
    }

    fn link_mtu(&self, env: &Env<'_>) -> u32 {
        u32::try_from(path_mtu(env.config, self.looped)).unwrap_or(65_535)
    }

    /// ICMP says that a packet was too big (RFC 1191, RFC 8201).
    pub(crate) fn handle_packet_too_big(&mut self, env: &Env<'_>, mtu: usize, seq: u32) {
        let seq = self.snd.una().expand(seq);
        //= https://www.rfc-editor.org/rfc/rfc1191#section-3
        //# What an ICMP message claims is checked against what is in flight, and never raises the size.
        //= https://www.rfc-editor.org/rfc/rfc8201#section-4
        //# The packet that a message quotes must have been sent.
        if !(self.snd.una() <= seq && seq < self.snd.nxt()) {
            return;
        }
        //= https://www.rfc-editor.org/rfc/rfc1191#section-3
        //# Sizes below a least one are not believed.
        //= https://www.rfc-editor.org/rfc/rfc8201#section-4
        //# The size never falls below 1280 bytes.
        let mtu = u32::try_from(mtu).unwrap_or(u32::MAX).max(self.least_mtu());
        // A probe that was too big is what was looked for, and no reason to send anything else smaller.
        if let Some(search) = &mut self.size.search
            && let Some(probe) = search.probe
            && (probe.start..probe.end).contains(&seq)
            && mtu < probe.size
        {
            search.failed(probe.size.min(mtu + 1));
            self.snd.mark_lost(|chunk| probe.start <= chunk.start && chunk.end <= probe.end);
            self.finish_search(env.now);
            return;
        }
        if mtu >= self.size.path_mtu {
            return;
        }
        //= https://www.rfc-editor.org/rfc/rfc1191#section-3
        //# A next-hop MTU told by ICMP lowers the size of segments, and what was too big is sent again at once.
        //= https://www.rfc-editor.org/rfc/rfc8201#section-4
        //# A packet-too-big message lowers the size of segments.
        self.lower_path_mtu(mtu);
        self.size.search = None;
        self.size.raise_at = Some(env.now + AGE);
    }

    /// Packets of the path's former size are gone: send what they carried again, smaller, at once.
    fn lower_path_mtu(&mut self, mtu: u32) {
        let before = self.mss();
        self.size.path_mtu = mtu;
        let after = self.mss();
        self.congestion.rescale(before, after);
        self.snd.mark_lost(|chunk| chunk.len() > after);
    }

    /// Full-sized packets vanish and no ICMP says why (RFC 4821, 7.7): fall back to a size that passes nearly anywhere, the
    /// next time to the least, and search from there.
    pub(super) fn suspect_black_hole(&mut self, env: &Env<'_>) {
        /// Linux: `tcp_base_mss`, with headers; RFC 4821 (7.2).
        const BASE: u32 = 1024 + 40;
        let least = self.least_mtu();
        let fallback = if self.size.path_mtu > BASE.max(least) { BASE.max(least) } else { least };
        // Not only full ones: what is sent again shares its packet with SACK blocks, and may be the rest of a chunk.
        let headers = (self.size.path_mtu as usize).saturating_sub(self.mss());
        let large = self.snd.first_chunk().is_some_and(|chunk| chunk.len() + headers > fallback as usize);
        if self.looped || !large || self.size.path_mtu <= fallback {
            return;
        }
        let high = self.link_mtu(env);
        // Each time longer: a path that swallows large packets only now and then isn't worth probing.
        let patience = FIRST_LOOK * (1 << self.size.black_holes.min(10));
        self.size.black_holes = self.size.black_holes.saturating_add(1);
        //= https://www.rfc-editor.org/rfc/rfc4821#section-7.7
        //# Repeated loss of full-sized segments without an ICMP message lowers the size to one that passes nearly
        //# anywhere.
        self.lower_path_mtu(fallback);
        self.size.raise_at = None;
        self.size.search =
            Some(Search { low: fallback, high, not_before: env.now + patience, probe: None, whole: true });
    }

    /// Looks after the search when an acknowledgment advanced.
    pub(super) fn update_path_mtu(&mut self, env: &Env<'_>) {
        if self.size.raise_at.is_some_and(|at| at <= env.now) {
            self.size.raise_at = None;
            //= https://www.rfc-editor.org/rfc/rfc1191#section-6.3
            //# After ten minutes a larger size is tried.
            //= https://www.rfc-editor.org/rfc/rfc4821#section-7.3
            //# After ten minutes the search looks for a path that has become wider.
            let (low, high) = (self.size.path_mtu, self.link_mtu(env));
            if low < high {
                self.size.search = Some(Search { low, high, not_before: env.now, probe: None, whole: true });
            }
        }
        let una = self.snd.una();
        let Some(search) = &mut self.size.search else { return };
        // A probe that was sent again in pieces has been declared lost before.
        if let Some(probe) = search.probe.filter(|probe| probe.end <= una) {
            search.probe = None;
            search.low = search.low.max(probe.size);
            search.whole &= search.low < search.high;
            self.size.path_mtu = self.size.path_mtu.max(probe.size);
            self.finish_search(env.now);
        }
    }

    /// Ends a search that has found what there is to find.
    fn finish_search(&mut self, now: Instant) {
        if self.size.search.as_ref().is_some_and(Search::is_over) {
            self.size.search = None;
            self.size.black_holes = 0;
            self.size.raise_at = Some(now + AGE);
        }
    }

    /// Whether all that was just found lost is the probe, which says nothing about congestion. The search takes note.
    pub(super) fn only_the_probe_is_lost(&mut self, now: Instant) -> bool {
        let Some(search) = &mut self.size.search else { return false };
        let Some(probe) = search.probe else { return false };
        let lost = self.snd.lost_in(probe.start, probe.end);
        if lost == 0 {
            return false;
        }
        //= https://www.rfc-editor.org/rfc/rfc4821#section-7.5
        //# The loss of a probe alone is no sign of congestion.
        let alone = lost == self.snd.lost();
        search.failed(probe.size);
        self.finish_search(now);
        alone
    }

    /// A time-out says nothing about the probe, but it will be sent again in pieces.
    pub(super) fn give_up_probe(&mut self) {
        if let Some(search) = &mut self.size.search {
            search.probe = None;
        }
    }

    /// The next probe, if one is due and there is enough to send after it.
    pub(super) fn poll_mtu_probe(&mut self, env: &Env<'_>) -> Option<Emission> {
        let search = self.size.search.as_ref()?;
        if search.probe.is_some() || search.not_before > env.now || search.is_over() {
            return None;
        }
        // Without SACK a lost probe couldn't be told from other losses.
        let quiet =
            self.agreed.sack && self.recovery.phase == Phase::Open && self.snd.sacked() == 0 && self.snd.lost() == 0;
        let size = search.candidate();
        let segment = self.segment_size();
        let options = self.mss_without_options().saturating_sub(segment);
        let headers = ip::header_len(self.tuple.remote) + 20 + options;
        // What the peer takes counts options, too (RFC 6691).
        let most = usize::from(self.size.peer).saturating_sub(options);
        let len = (size as usize).checked_sub(headers)?.min(most);
        //= https://www.rfc-editor.org/rfc/rfc4821#section-7.4
        //# A probe leaves only if enough follows it to show its loss without a time-out.
        let whole = len + FOLLOWERS * segment;
        let window = (self.snd.una() + self.window.size).since(self.snd.nxt());
        let congestion = self.congestion.cwnd().saturating_sub(self.snd.pipe());
        if !quiet || len <= segment || self.snd.unsent_payload() < whole || window.min(congestion) < whole {
            return None;
        }
        let start = self.snd.nxt();
        let end = start + len;
        if let Some(search) = &mut self.size.search {
            search.probe = Some(Probe { size, start, end });
        }
        self.snd.transmitted(env.now, len);
        self.note_usage();
        // One segment, however long.
        Some(self.emit_stream(env, start, end, len, true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Finds what a path carries; returns that and the probes it took.
    fn find(link: u32, path: u32, base: u32) -> (u32, usize) {
        let mut search = Search { low: base, high: link, not_before: Instant::ZERO, probe: None, whole: true };
        let mut probes = 0;
        while !search.is_over() {
            probes += 1;
            let size = search.candidate();
            assert!(size > search.low && size <= search.high, "{search:?}");
            if size <= path {
                search.low = size;
                search.whole &= search.low < search.high;
            } else {
                search.failed(size);
            }
        }
        (search.low, probes)
    }

    #[test]
    fn finds_every_path_in_few_probes() {
        assert_eq!(find(1500, 1500, 1064), (1500, 1), "only an outage");
        for path in 1064..1500 {
            let (found, probes) = find(1500, path, 1064);
            assert!(found <= path && path - found < 2 * CLOSE_ENOUGH, "{path}: {found}");
            assert!(probes <= 8, "{path}: {probes} probes");
        }
        for path in [1280, 4352, 8940, 9000] {
            let (found, probes) = find(9000, path, 1280);
            assert!(found <= path && path - found < 2 * CLOSE_ENOUGH && probes <= 12, "{path}: {found} in {probes}");
        }
    }
}
