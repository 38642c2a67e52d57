//! The byte ring behind both buffers of a connection.
//!
//! It grows on demand by doubling, hands out its content and its room as at most two slices, and takes bytes beyond its
//! end (segments that arrived out of order) without counting them as content. An empty ring can be released, so that an
//! idle connection holds no memory.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Smallest allocation.
const MINIMUM: usize = 4096;

/// A growable byte ring. Content is `0..len`; bytes up to `extent` may have been written ahead of it.
#[derive(Clone, Default)]
pub(crate) struct Ring {
    data: Box<[u8]>,
    head: usize,
    len: usize,
    extent: usize,
}

impl Ring {
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) const fn capacity(&self) -> usize {
        self.data.len()
    }

    /// End of what was written, in order or ahead.
    pub(crate) const fn extent(&self) -> usize {
        self.extent
    }

    /// Makes room for `bytes` in all.
    pub(crate) fn reserve(&mut self, bytes: usize) {
        if bytes <= self.data.len() {
            return;
        }
        let capacity = bytes.max(MINIMUM).next_power_of_two();
        let mut grown = vec![0; capacity].into_boxed_slice();
        let [first, second] = self.span(0, self.extent);
        grown[..first.len()].copy_from_slice(first);
        grown[first.len()..first.len() + second.len()].copy_from_slice(second);
        self.data = grown;
        self.head = 0;
    }

    /// Gives the memory back if nothing is in it. Returns whether the ring holds none now.
    pub(crate) fn release(&mut self) -> bool {
        if self.extent == 0 {
            self.data = Box::default();
            self.head = 0;
        }
        self.data.is_empty()
    }

    fn wrap(&self, position: usize) -> usize {
        position & (self.data.len().wrapping_sub(1))
    }

    fn span(&self, offset: usize, len: usize) -> [&[u8]; 2] {
        if len == 0 {
            return [&[], &[]];
        }
        let start = self.wrap(self.head + offset);
        let first = len.min(self.data.len() - start);
        [&self.data[start..start + first], &self.data[..len - first]]
    }

    /// Content from `offset` on, `len` bytes.
    pub(crate) fn parts(&self, offset: usize, len: usize) -> [&[u8]; 2] {
        debug_assert!(offset + len <= self.len);
        self.span(offset, len)
    }

    /// Room behind the content, at most `len` bytes of it; follow with [`Ring::commit`].
    pub(crate) fn room(&mut self, len: usize) -> [&mut [u8]; 2] {
        let len = len.min(self.data.len() - self.len);
        if len == 0 {
            return [&mut [], &mut []];
        }
        let start = self.wrap(self.head + self.len);
        let first = len.min(self.data.len() - start);
        let (low, high) = self.data.split_at_mut(start);
        [&mut high[..first], &mut low[..len - first]]
    }

    /// Counts `bytes` that are in place behind the content as content.
    pub(crate) fn commit(&mut self, bytes: usize) {
        debug_assert!(self.len + bytes <= self.data.len());
        self.len += bytes;
        self.extent = self.extent.max(self.len);
    }

    /// Writes `bytes` at `offset` from the start of the content, possibly ahead of its end, growing as needed.
    pub(crate) fn write_at(&mut self, offset: usize, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let end = offset + bytes.len();
        self.reserve(end);
        let start = self.wrap(self.head + offset);
        let first = bytes.len().min(self.data.len() - start);
        self.data[start..start + first].copy_from_slice(&bytes[..first]);
        self.data[..bytes.len() - first].copy_from_slice(&bytes[first..]);
        self.extent = self.extent.max(end);
    }

    /// Appends to the content, growing as needed.
    pub(crate) fn append(&mut self, bytes: &[u8]) {
        self.write_at(self.len, bytes);
        self.commit(bytes.len());
    }

    /// Drops `bytes` from the front of the content.
    pub(crate) fn consume(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.len);
        self.len -= bytes;
        self.extent -= bytes;
        self.head = if self.extent == 0 { 0 } else { self.wrap(self.head + bytes) };
    }

    /// Forgets what was written ahead of the content.
    pub(crate) fn forget_ahead(&mut self) {
        self.extent = self.len;
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Ring({}/{} of {})", self.len, self.extent, self.data.len())
    }
}

impl Serialize for Ring {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let [first, second] = self.span(0, self.extent);
        let bytes = serde_bytes::ByteBuf::from([first, second].concat());
        (self.len as u64, bytes).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Ring {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (len, bytes) = <(u64, serde_bytes::ByteBuf)>::deserialize(deserializer)?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > bytes.len() {
            return Err(serde::de::Error::custom("ring claims more content than it has bytes"));
        }
        let mut ring = Ring::default();
        ring.write_at(0, &bytes);
        ring.commit(len);
        Ok(ring)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Append(Vec<u8>),
        Ahead(usize, Vec<u8>),
        Consume(usize),
        Release,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..9000).prop_map(Step::Append),
            (0usize..6000, proptest::collection::vec(any::<u8>(), 0..3000))
                .prop_map(|(gap, bytes)| Step::Ahead(gap, bytes)),
            (0usize..12_000).prop_map(Step::Consume),
            Just(Step::Release),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_a_vector(steps in proptest::collection::vec(step(), 1..40)) {
            let mut ring = Ring::default();
            let mut model: Vec<u8> = Vec::new();
            for step in steps {
                match step {
                    Step::Append(bytes) => {
                        ring.forget_ahead();
                        ring.append(&bytes);
                        model.extend_from_slice(&bytes);
                    }
                    Step::Ahead(gap, bytes) => {
                        // What is written ahead becomes content only when it is committed.
                        let offset = ring.len() + gap;
                        ring.write_at(offset, &bytes);
                        prop_assert_eq!(ring.len(), model.len());
                        if gap == 0 {
                            ring.commit(bytes.len());
                            model.extend_from_slice(&bytes);
                        }
                    }
                    Step::Consume(bytes) => {
                        let bytes = bytes.min(model.len());
                        ring.consume(bytes);
                        model.drain(..bytes);
                    }
                    Step::Release => {
                        ring.forget_ahead();
                        prop_assert_eq!(ring.release(), model.is_empty());
                    }
                }
                prop_assert_eq!(ring.parts(0, ring.len()).concat(), model.clone());
            }
        }
    }
}
