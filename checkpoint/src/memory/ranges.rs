//! Sets of addresses as sorted, disjoint, non-adjacent spans.
//!
//! Every operation on two sets is one merge over both lists, so a round costs what its runs cost, however many pages they hold.

use serde::{Deserialize, Serialize};

/// A half-open run of addresses, `start < end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl Span {
    /// Bytes in the span.
    #[must_use]
    pub fn length(self) -> u64 {
        self.end - self.start
    }

    /// What both spans have, if anything.
    #[must_use]
    pub fn overlap(self, other: Span) -> Option<Span> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Span { start, end })
    }
}

/// A set of addresses. One that comes from a peer is checked when it's decoded.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Span>", into = "Vec<Span>")]
pub struct SpanSet {
    spans: Vec<Span>,
}

impl SpanSet {
    /// The empty set.
    #[must_use]
    pub fn new() -> SpanSet {
        SpanSet::default()
    }

    /// The spans, ascending.
    #[must_use]
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Bytes in the set.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.spans.iter().map(|span| span.length()).sum()
    }

    /// Whether nothing is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Adds a span. Cheap when spans come in ascending order; anything else costs a merge.
    pub fn push(&mut self, span: Span) {
        if span.start >= span.end {
            return;
        }
        match self.spans.last_mut() {
            Some(last) if span.start < last.start => *self = self.union(&SpanSet { spans: vec![span] }),
            Some(last) if span.start <= last.end => last.end = last.end.max(span.end),
            _ => self.spans.push(span),
        }
    }

    /// What is in either set.
    #[must_use]
    pub fn union(&self, other: &SpanSet) -> SpanSet {
        let (mut left, mut right) = (self.spans.iter().peekable(), other.spans.iter().peekable());
        let mut result = SpanSet { spans: Vec::with_capacity(self.spans.len().max(other.spans.len())) };
        loop {
            let next = match (left.peek(), right.peek()) {
                (Some(a), Some(b)) if a.start <= b.start => left.next(),
                (_, Some(_)) => right.next(),
                (Some(_), None) => left.next(),
                (None, None) => return result,
            };
            if let Some(span) = next {
                result.push(*span);
            }
        }
    }

    /// What is in both sets.
    #[must_use]
    pub fn intersection(&self, other: &SpanSet) -> SpanSet {
        let mut result = SpanSet::new();
        let (mut i, mut j) = (0, 0);
        while let (Some(a), Some(b)) = (self.spans.get(i), other.spans.get(j)) {
            if let Some(both) = a.overlap(*b) {
                result.push(both);
            }
            if a.end < b.end {
                i += 1;
            } else {
                j += 1;
            }
        }
        result
    }

    /// What is in this set and not in the other.
    #[must_use]
    pub fn difference(&self, other: &SpanSet) -> SpanSet {
        let mut result = SpanSet::new();
        let mut j = 0;
        for span in &self.spans {
            let mut start = span.start;
            while other.spans.get(j).is_some_and(|cut| cut.end <= start) {
                j += 1;
            }
            let mut k = j;
            while let Some(cut) = other.spans.get(k).filter(|cut| cut.start < span.end) {
                result.push(Span { start, end: cut.start.max(start) });
                start = cut.end;
                k += 1;
            }
            result.push(Span { start, end: span.end.max(start) });
        }
        result
    }

    /// Whether the address is in the set.
    #[must_use]
    pub fn contains(&self, address: u64) -> bool {
        let after = self.spans.partition_point(|span| span.end <= address);
        self.spans.get(after).is_some_and(|span| span.start <= address)
    }

    /// Whether every byte of the span is in the set.
    #[must_use]
    pub fn covers(&self, span: Span) -> bool {
        let after = self.spans.partition_point(|own| own.end <= span.start);
        self.spans.get(after).is_some_and(|own| own.start <= span.start && span.end <= own.end)
    }
}

impl From<SpanSet> for Vec<Span> {
    fn from(set: SpanSet) -> Vec<Span> {
        set.spans
    }
}

impl TryFrom<Vec<Span>> for SpanSet {
    type Error = &'static str;

    fn try_from(spans: Vec<Span>) -> Result<SpanSet, &'static str> {
        let ordered = spans.windows(2).all(|pair| pair[0].end < pair[1].start);
        let sound = spans.iter().all(|span| span.start < span.end);
        if ordered && sound { Ok(SpanSet { spans }) } else { Err("spans that aren't sorted and apart") }
    }
}

impl FromIterator<Span> for SpanSet {
    fn from_iter<I: IntoIterator<Item = Span>>(spans: I) -> SpanSet {
        let mut spans: Vec<Span> = spans.into_iter().collect();
        spans.sort_unstable();
        let mut result = SpanSet::new();
        for span in spans {
            result.push(span);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(bits: u64) -> SpanSet {
        (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| Span { start: bit, end: bit + 1 }).collect()
    }

    fn bits(set: &SpanSet) -> u64 {
        let mut previous_end = None;
        let mut result = 0;
        for span in set.spans() {
            assert!(span.start < span.end, "empty span in {set:?}");
            assert!(previous_end.is_none_or(|end| end < span.start), "not sorted, disjoint and merged: {set:?}");
            previous_end = Some(span.end);
            for bit in span.start..span.end {
                result |= 1 << bit;
            }
        }
        result
    }

    #[test]
    fn only_sound_lists_become_sets() {
        let span = |start, end| Span { start, end };
        assert!(SpanSet::try_from(vec![span(0, 1), span(2, 5)]).is_ok());
        for bad in [vec![span(1, 1)], vec![span(2, 1)], vec![span(0, 2), span(2, 3)], vec![span(4, 5), span(0, 1)]] {
            assert!(SpanSet::try_from(bad).is_err());
        }
    }

    proptest! {
        #[test]
        fn operations_agree_with_bit_sets(a: u64, b: u64) {
            prop_assert_eq!(bits(&set(a)), a);
            prop_assert_eq!(bits(&set(a).union(&set(b))), a | b);
            prop_assert_eq!(bits(&set(a).intersection(&set(b))), a & b);
            prop_assert_eq!(bits(&set(a).difference(&set(b))), a & !b);
            prop_assert_eq!(set(a).length(), u64::from(a.count_ones()));
            for bit in 0..64 {
                prop_assert_eq!(set(a).contains(bit), a >> bit & 1 == 1);
            }
        }

        #[test]
        fn spans_may_be_pushed_in_any_order(spans in proptest::collection::vec((0_u64..60, 0_u64..5), 0..20)) {
            let mut pushed = SpanSet::new();
            let mut expected = 0;
            for (start, length) in spans {
                pushed.push(Span { start, end: start + length });
                for bit in start..start + length {
                    expected |= 1_u64 << bit;
                }
            }
            prop_assert_eq!(bits(&pushed), expected);
        }
    }
}
