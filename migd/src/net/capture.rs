//! Recording of packets where the stack meets the TUN device, as `migd pcap` shows them.
//!
//! The net thread encodes each packet as a pcapng block (draft-ietf-opsawg-pcapng, 4.3) and hands a round's blocks over
//! together. It never waits: what its reader is too slow for is dropped and counted in the next block.
//!
//! A recording belongs to the job's network and moves with it. After a thaw its packets are kept, within the same bound,
//! until its reader comes again under the recording's number, so that the file has no gap where the job moved. If the job
//! moves on before that, those packets stay behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Bytes that wait for a reader at most, for each recording.
const BACKLOG: usize = 32 << 20;
/// Recordings at a time; one more ends the oldest.
const RECORDINGS: usize = 8;
/// How long a recording waits for its reader after a move.
const PATIENCE: Duration = Duration::from_secs(60);

/// What moves of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordingImage {
    number: u64,
    snap_length: u32,
}

/// Which way a packet went, as the job sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    In,
    Out,
}

/// All recordings of a job.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    recordings: Vec<Recording>,
}

#[derive(Debug)]
struct Recording {
    image: RecordingImage,
    /// Blocks of this round.
    batch: Vec<u8>,
    dropped: u64,
    waiting: Arc<AtomicUsize>,
    sender: UnboundedSender<Vec<u8>>,
    /// The reader's end while there is none, and until when it is kept.
    unclaimed: Option<(PacketStream, Instant)>,
}

/// The reader's end: pieces of whole pcapng blocks.
#[derive(Debug)]
pub struct PacketStream {
    waiting: Arc<AtomicUsize>,
    receiver: UnboundedReceiver<Vec<u8>>,
}

impl PacketStream {
    /// The next blocks; `None` when the job's network is gone from here: it ended or moved. Cancel-safe.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        let blocks = self.receiver.recv().await?;
        self.waiting.fetch_sub(blocks.len(), Ordering::Relaxed);
        Some(blocks)
    }
}

impl Recording {
    fn new(image: RecordingImage) -> (Recording, PacketStream) {
        let (sender, receiver) = unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let stream = PacketStream { waiting: Arc::clone(&waiting), receiver };
        (Recording { image, batch: Vec::new(), dropped: 0, waiting, sender, unclaimed: None }, stream)
    }

    /// Passes the round's blocks on; `false` when nobody wants them any more.
    fn flush(&mut self) -> bool {
        if self.unclaimed.as_ref().is_some_and(|(_, until)| Instant::now() > *until) {
            return false;
        }
        if self.batch.is_empty() {
            return !self.sender.is_closed();
        }
        let batch = std::mem::take(&mut self.batch);
        self.waiting.fetch_add(batch.len(), Ordering::Relaxed);
        self.sender.send(batch).is_ok()
    }
}

impl Recorder {
    pub(super) fn thaw(images: Vec<RecordingImage>) -> Recorder {
        let until = Instant::now() + PATIENCE;
        let recordings = images.into_iter().take(RECORDINGS).map(|image| {
            let (mut recording, stream) = Recording::new(image);
            recording.unclaimed = Some((stream, until));
            recording
        });
        Recorder { recordings: recordings.collect() }
    }

    pub(super) fn freeze(&self) -> Vec<RecordingImage> {
        self.recordings.iter().map(|recording| recording.image).collect()
    }

    /// Begins a recording, or takes the reader's end of one that came with the job.
    pub(super) fn claim(&mut self, number: u64, snap_length: u32) -> PacketStream {
        let known = self.recordings.iter_mut().find(|recording| recording.image.number == number);
        if let Some((stream, _)) = known.and_then(|recording| recording.unclaimed.take()) {
            return stream;
        }
        self.recordings.retain(|recording| recording.image.number != number);
        if self.recordings.len() >= RECORDINGS {
            self.recordings.remove(0);
        }
        let (recording, stream) = Recording::new(RecordingImage { number, snap_length });
        self.recordings.push(recording);
        stream
    }

    pub(super) fn is_on(&self) -> bool {
        !self.recordings.is_empty()
    }

    /// Notes a packet given in parts.
    pub(super) fn packet(&mut self, direction: Direction, parts: &[&[u8]]) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for recording in &mut self.recordings {
            if recording.waiting.load(Ordering::Relaxed) + recording.batch.len() > BACKLOG {
                recording.dropped += 1;
                continue;
            }
            let dropped = std::mem::take(&mut recording.dropped);
            packet_block(&mut recording.batch, recording.image.snap_length, time, direction, dropped, parts);
        }
    }

    /// Passes on what this round recorded.
    pub(super) fn flush(&mut self) {
        self.recordings.retain_mut(Recording::flush);
    }
}

// pcapng: block types, options and their values.
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const BYTE_ORDER: u32 = 0x1a2b_3c4d;
const INTERFACE: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const OPTION_END: u16 = 0;
const SECTION_APPLICATION: u16 = 4;
const INTERFACE_NAME: u16 = 2;
const INTERFACE_DESCRIPTION: u16 = 3;
const INTERFACE_TIME_RESOLUTION: u16 = 9;
const PACKET_FLAGS: u16 = 2;
const PACKET_DROPPED: u16 = 4;
/// LINKTYPE_RAW: the packet begins with its IP header.
const LINK_TYPE_RAW: u16 = 101;
/// Ten to the minus ninth of a second.
const NANOSECONDS: u8 = 9;

/// The beginning of a section: what follows was recorded at the device `name` of the node `node`.
pub fn section(node: &str, name: &str, snap_length: u32) -> Vec<u8> {
    let mut out = Vec::new();
    block(&mut out, SECTION_HEADER, |out| {
        word(out, BYTE_ORDER);
        // Version 1.0; the section's length is not known.
        half(out, 1);
        half(out, 0);
        out.extend_from_slice(&u64::MAX.to_ne_bytes());
        option(out, SECTION_APPLICATION, concat!("migd ", env!("CARGO_PKG_VERSION")).as_bytes());
        option(out, OPTION_END, &[]);
    });
    block(&mut out, INTERFACE, |out| {
        half(out, LINK_TYPE_RAW);
        half(out, 0);
        word(out, snap_length);
        option(out, INTERFACE_NAME, name.as_bytes());
        option(out, INTERFACE_DESCRIPTION, format!("on node {node}").as_bytes());
        option(out, INTERFACE_TIME_RESOLUTION, &[NANOSECONDS]);
        option(out, OPTION_END, &[]);
    });
    out
}

fn packet_block(
    out: &mut Vec<u8>,
    snap_length: u32,
    time: Duration,
    direction: Direction,
    dropped: u64,
    parts: &[&[u8]],
) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let kept = length.min(usize::try_from(snap_length).unwrap_or(usize::MAX));
    let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    block(out, ENHANCED_PACKET, |out| {
        word(out, 0);
        word(out, u32::try_from(nanos >> 32).unwrap_or(u32::MAX));
        word(out, u32::try_from(nanos & 0xffff_ffff).unwrap_or(u32::MAX));
        word(out, u32::try_from(kept).unwrap_or(u32::MAX));
        word(out, u32::try_from(length).unwrap_or(u32::MAX));
        let mut left = kept;
        for part in parts {
            let part = &part[..part.len().min(left)];
            out.extend_from_slice(part);
            left -= part.len();
        }
        pad(out, kept);
        let flags: u32 = match direction {
            Direction::In => 1,
            Direction::Out => 2,
        };
        option(out, PACKET_FLAGS, &flags.to_ne_bytes());
        if dropped > 0 {
            option(out, PACKET_DROPPED, &dropped.to_ne_bytes());
        }
        option(out, OPTION_END, &[]);
    });
}

/// Type, length, body, length.
fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    word(out, kind);
    word(out, 0);
    body(out);
    let length = u32::try_from(out.len() - start + 4).unwrap_or(u32::MAX);
    out[start + 4..start + 8].copy_from_slice(&length.to_ne_bytes());
    word(out, length);
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    half(out, code);
    half(out, u16::try_from(value.len()).unwrap_or(u16::MAX));
    out.extend_from_slice(value);
    pad(out, value.len());
}

fn pad(out: &mut Vec<u8>, length: usize) {
    out.resize(out.len() + length.wrapping_neg() % 4, 0);
}

fn word(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_ne_bytes());
}

fn half(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The blocks of a pcapng text: type and body, with both lengths checked.
    fn blocks(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let word = |bytes: &[u8]| u32::from_ne_bytes(bytes[..4].try_into().unwrap());
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let length = word(&bytes[4..]) as usize;
            assert_eq!(length % 4, 0);
            assert_eq!(word(&bytes[length - 4..]) as usize, length);
            all.push((word(bytes), bytes[8..length - 4].to_vec()));
            bytes = &bytes[length..];
        }
        all
    }

    fn drain(stream: &mut PacketStream) -> Vec<u8> {
        let mut all = Vec::new();
        while let Ok(blocks) = stream.receiver.try_recv() {
            stream.waiting.fetch_sub(blocks.len(), Ordering::Relaxed);
            all.extend(blocks);
        }
        all
    }

    #[test]
    fn packets_are_cut_at_the_snap_length_and_padded() {
        let mut recorder = Recorder::default();
        let mut stream = recorder.claim(1, 5);
        recorder.packet(Direction::In, &[b"abc", b"", b"defg"]);
        recorder.flush();
        let [(kind, body)] = &blocks(&drain(&mut stream))[..] else { panic!("one block") };
        assert_eq!(*kind, ENHANCED_PACKET);
        assert_eq!(body[12..20], [5u32.to_ne_bytes(), 7u32.to_ne_bytes()].concat());
        assert_eq!(&body[20..28], b"abcde\0\0\0");
        assert_eq!(body[28..36], [&PACKET_FLAGS.to_ne_bytes()[..], &4u16.to_ne_bytes(), &1u32.to_ne_bytes()].concat());
    }

    #[test]
    fn a_section_names_the_node() {
        let section = section("a", "mig1", 96);
        let kinds: Vec<u32> = blocks(&section).iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [SECTION_HEADER, INTERFACE]);
        assert!(section.windows(9).any(|text| text == b"on node a"));
    }

    #[test]
    fn a_slow_reader_loses_packets_and_learns_how_many() {
        let mut recorder = Recorder::default();
        let mut stream = recorder.claim(1, u32::MAX);
        let packet = vec![7; 1 << 20];
        for _ in 0..40 {
            recorder.packet(Direction::Out, &[&packet]);
            recorder.flush();
        }
        let kept = blocks(&drain(&mut stream)).len();
        assert!((31..40).contains(&kept), "{kept}");
        recorder.packet(Direction::Out, &[b"next"]);
        recorder.flush();
        let next = blocks(&drain(&mut stream));
        let count = &next[0].1[20 + 4 + 8 + 4..][..8];
        assert_eq!(u64::from_ne_bytes(count.try_into().unwrap()), 40 - kept as u64);
    }

    #[test]
    fn a_recording_waits_for_its_reader_after_a_move() {
        let mut before = Recorder::default();
        let _stream = before.claim(9, 100);
        let mut after = Recorder::thaw(before.freeze());
        after.packet(Direction::In, &[b"first"]);
        after.flush();
        let mut stream = after.claim(9, 100);
        after.packet(Direction::In, &[b"second"]);
        after.flush();
        assert_eq!(blocks(&drain(&mut stream)).len(), 2);
        drop(stream);
        after.flush();
        assert!(!after.is_on(), "without a reader it ends");
    }
}
