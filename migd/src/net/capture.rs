//! Recording of packets where the stack meets the TUN device, as `migd pcap` shows them.
//!
//! The net thread encodes each packet as a pcapng block ([`super::pcapng`]) and hands a round's blocks over together. It never
//! waits: what its reader is too slow for is dropped and counted in the next block.
//!
//! A recording belongs to the job's network and moves with it. Its reader has to follow; until it comes, under the recording's
//! number, the packets are kept here, and they go along if the job moves on before that. So the file has no gap and nothing
//! twice, in the order of the nodes: what a reader was given is never in an image.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::pcapng;

/// Bytes that wait for a reader at most, for each recording.
const BACKLOG: usize = 32 << 20;
/// Bytes of kept packets that an image holds at most, of all recordings together: the job stands still while they travel.
const LUGGAGE: usize = 8 << 20;
/// About how many bytes a reader gets at a time of what was kept.
const PIECE: usize = 1 << 20;
/// Recordings at a time.
pub const RECORDINGS: usize = 8;
/// How long a recording waits for its reader after a move.
const PATIENCE: Duration = Duration::from_secs(60);

/// What moves of a recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordingImage {
    number: u64,
    snap_length: u32,
    /// Whole pcapng blocks that wait for the reader, sections of earlier nodes among them.
    #[serde(default, with = "serde_bytes")]
    kept: Vec<u8>,
    /// Packets that were dropped behind those.
    #[serde(default)]
    dropped: u64,
}

/// Where a recording is made: each node's packets are a section of the file that says this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// The node's name.
    pub node: String,
    /// The job's device there.
    pub device: String,
}

/// Which way a packet went, as the job sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    In,
    Out,
}

/// All recordings of a job.
#[derive(Debug)]
pub(super) struct Recorder {
    site: Site,
    recordings: Vec<Recording>,
}

#[derive(Debug)]
struct Recording {
    number: u64,
    snap_length: u32,
    /// Blocks of this round.
    batch: Vec<u8>,
    /// Packets dropped since the last block.
    dropped: u64,
    outlet: Outlet,
}

/// Where a round's blocks go.
#[derive(Debug)]
enum Outlet {
    /// To the reader. Counted is what it has not taken yet, in bytes.
    Reader { waiting: Arc<AtomicUsize>, sender: UnboundedSender<Vec<u8>> },
    /// The reader has yet to come, until this time.
    Kept { blocks: Vec<u8>, until: Instant },
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

impl Outlet {
    fn reader() -> (Outlet, PacketStream) {
        let (sender, receiver) = unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        (Outlet::Reader { waiting: Arc::clone(&waiting), sender }, PacketStream { waiting, receiver })
    }

    fn backlog(&self) -> usize {
        match self {
            Outlet::Reader { waiting, .. } => waiting.load(Ordering::Relaxed),
            Outlet::Kept { blocks, .. } => blocks.len(),
        }
    }

    /// `false` when nobody wants it any more.
    fn put(&mut self, batch: &mut Vec<u8>) -> bool {
        match self {
            Outlet::Reader { sender, .. } if batch.is_empty() => !sender.is_closed(),
            Outlet::Reader { waiting, sender } => {
                let batch = std::mem::take(batch);
                waiting.fetch_add(batch.len(), Ordering::Relaxed);
                sender.send(batch).is_ok()
            }
            Outlet::Kept { blocks, until } => {
                blocks.append(batch);
                Instant::now() <= *until
            }
        }
    }
}

impl Recording {
    /// Passes the round's blocks on; `false` when nobody wants them any more.
    fn flush(&mut self) -> bool {
        self.outlet.put(&mut self.batch)
    }

    /// What moves of it, with at most `room` bytes of packets.
    fn freeze(&self, room: usize) -> RecordingImage {
        let Recording { number, snap_length, batch, dropped, outlet } = self;
        let (kept, cut) = match outlet {
            // They are on their way to the reader.
            Outlet::Reader { .. } => (Vec::new(), 0),
            Outlet::Kept { blocks, .. } => {
                debug_assert!(batch.is_empty(), "flushed before");
                cut(blocks, room)
            }
        };
        RecordingImage { number: *number, snap_length: *snap_length, kept, dropped: *dropped + cut }
    }
}

/// The blocks at the beginning of `blocks` that have room in so many bytes, and how many packets are behind them.
fn cut(blocks: &[u8], room: usize) -> (Vec<u8>, u64) {
    let (mut end, mut lost) = (0, 0);
    let mut full = false;
    for (kind, block) in pcapng::whole(blocks) {
        full |= end + block.len() > room;
        if !full {
            end += block.len();
        } else if kind == pcapng::ENHANCED_PACKET {
            lost += 1;
        }
    }
    (blocks[..end].to_vec(), lost)
}

impl Recorder {
    pub(super) fn new(site: Site) -> Recorder {
        Recorder { site, recordings: Vec::new() }
    }

    /// Takes in the recordings that came with the job, whose readers have yet to come.
    pub(super) fn thaw(&mut self, images: Vec<RecordingImage>) {
        let until = Instant::now() + PATIENCE;
        let Site { node, device } = &self.site;
        let recordings = images.into_iter().take(RECORDINGS).map(|image| {
            let RecordingImage { number, snap_length, kept, dropped } = image;
            // Another node's word: what isn't whole blocks would spoil the file.
            let (mut blocks, cut) = cut(&kept, BACKLOG);
            pcapng::section(&mut blocks, node, device, snap_length);
            let outlet = Outlet::Kept { blocks, until };
            Recording { number, snap_length, batch: Vec::new(), dropped: dropped.saturating_add(cut), outlet }
        });
        self.recordings.extend(recordings);
    }

    /// What moves. Changes nothing but that the round's blocks are passed on: a reader that was given them by a plane that doesn't go
    /// on must not miss any.
    pub(super) fn freeze(&mut self) -> Vec<RecordingImage> {
        self.flush();
        let readerless = self.recordings.iter().filter(|recording| matches!(recording.outlet, Outlet::Kept { .. }));
        let room = LUGGAGE / readerless.count().max(1);
        self.recordings.iter().map(|recording| recording.freeze(room)).collect()
    }

    /// Begins a recording, or gives its reader what was kept of one that came with the job. `None` when there are too many.
    pub(super) fn claim(&mut self, number: u64, snap_length: u32) -> Option<PacketStream> {
        let (mut outlet, stream) = Outlet::reader();
        // The stream is here, so that nothing put into it fails.
        let known = self.recordings.iter_mut().find(|recording| recording.number == number);
        if let Some(recording) = known
            && let Outlet::Kept { blocks, .. } = &recording.outlet
        {
            let mut piece = Vec::new();
            for (_, block) in pcapng::whole(blocks) {
                piece.extend_from_slice(block);
                if piece.len() >= PIECE {
                    outlet.put(&mut piece);
                }
            }
            outlet.put(&mut piece);
            recording.outlet = outlet;
            return Some(stream);
        }
        self.recordings.retain(|recording| recording.number != number);
        // Notices those whose readers have gone.
        self.flush();
        if self.recordings.len() >= RECORDINGS {
            return None;
        }
        let mut section = Vec::new();
        pcapng::section(&mut section, &self.site.node, &self.site.device, snap_length);
        outlet.put(&mut section);
        self.recordings.push(Recording { number, snap_length, batch: Vec::new(), dropped: 0, outlet });
        Some(stream)
    }

    /// Ends them all here. Their readers get what waits for them, and hear the end.
    pub(super) fn end(&mut self) {
        self.recordings.clear();
    }

    pub(super) fn is_on(&self) -> bool {
        !self.recordings.is_empty()
    }

    /// Notes a packet given in parts.
    pub(super) fn packet(&mut self, direction: Direction, parts: &[&[u8]]) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for recording in &mut self.recordings {
            if recording.outlet.backlog() + recording.batch.len() > BACKLOG {
                recording.dropped = recording.dropped.saturating_add(1);
                continue;
            }
            let dropped = std::mem::take(&mut recording.dropped);
            pcapng::packet(&mut recording.batch, recording.snap_length, time, direction, dropped, parts);
        }
    }

    /// Passes on what this round recorded.
    pub(super) fn flush(&mut self) {
        self.recordings.retain_mut(Recording::flush);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorder(node: &str) -> Recorder {
        Recorder::new(Site { node: node.to_owned(), device: "mig1".to_owned() })
    }

    /// The job moves on.
    fn moved(from: &mut Recorder, to: &str) -> Recorder {
        let mut after = recorder(to);
        let image = codec::to_vec(&from.freeze()).unwrap();
        after.thaw(codec::from_slice(&image).unwrap());
        after
    }

    fn note(recorder: &mut Recorder, packet: &[u8]) {
        recorder.packet(Direction::In, &[packet]);
        recorder.flush();
    }

    fn drain(stream: &mut PacketStream) -> Vec<u8> {
        let mut all = Vec::new();
        while let Ok(blocks) = stream.receiver.try_recv() {
            stream.waiting.fetch_sub(blocks.len(), Ordering::Relaxed);
            all.extend(blocks);
        }
        all
    }

    /// What a reader has got: the nodes of the sections and the packets, with the numbers of those dropped before them.
    fn contents(stream: &mut PacketStream) -> Vec<String> {
        let bytes = drain(stream);
        assert_eq!(pcapng::whole(&bytes).map(|(_, block)| block.len()).sum::<usize>(), bytes.len(), "whole blocks");
        pcapng::whole(&bytes).filter_map(|(_, block)| pcapng::tests::in_words(block)).collect()
    }

    #[test]
    fn a_reader_gets_the_section_of_the_node_first() {
        let mut recorder = recorder("a");
        let mut stream = recorder.claim(1, 96).unwrap();
        note(&mut recorder, b"one");
        assert_eq!(contents(&mut stream), ["on node a", "one"]);
    }

    #[test]
    fn a_slow_reader_loses_packets_and_learns_how_many() {
        let mut recorder = recorder("a");
        let mut stream = recorder.claim(1, u32::MAX).unwrap();
        let packet = vec![7; 1 << 20];
        for _ in 0..40 {
            note(&mut recorder, &packet);
        }
        let kept = contents(&mut stream).len() - 1;
        assert!((31..40).contains(&kept), "{kept}");
        note(&mut recorder, b"next");
        assert_eq!(contents(&mut stream), [format!("next, {} dropped before", 40 - kept)]);
    }

    #[test]
    fn a_recording_waits_for_its_reader_after_a_move() {
        let mut before = recorder("a");
        let mut stream = before.claim(9, 100).unwrap();
        note(&mut before, b"zero");
        let mut after = moved(&mut before, "b");
        note(&mut after, b"first");
        assert_eq!(contents(&mut stream), ["on node a", "zero"]);
        let mut stream = after.claim(9, 100).unwrap();
        note(&mut after, b"second");
        assert_eq!(contents(&mut stream), ["on node b", "first", "second"]);
        drop(stream);
        after.flush();
        assert!(!after.is_on(), "without a reader it ends");
    }

    #[test]
    fn what_was_kept_goes_along_when_the_job_moves_on() {
        let mut a = recorder("a");
        let _stream = a.claim(9, 100).unwrap();
        let mut b = moved(&mut a, "b");
        note(&mut b, b"first");
        b.packet(Direction::In, &[b"second"]);
        // A move that came to nothing.
        let _ = moved(&mut b, "elsewhere");
        note(&mut b, b"third");
        let mut c = moved(&mut b, "c");
        let mut d = moved(&mut c, "d");
        note(&mut d, b"fourth");
        let expected = ["on node b", "first", "second", "third", "on node c", "on node d", "fourth"];
        assert_eq!(contents(&mut d.claim(9, 100).unwrap()), expected);
    }

    #[test]
    fn what_goes_along_is_bounded_and_the_rest_is_counted() {
        let mut a = recorder("a");
        let streams = [a.claim(1, u32::MAX).unwrap(), a.claim(2, u32::MAX).unwrap()];
        let mut b = moved(&mut a, "b");
        for _ in 0..10 {
            note(&mut b, &vec![7; 1 << 20]);
        }
        let image = codec::to_vec(&b.freeze()).unwrap();
        assert!(image.len() < LUGGAGE + 1000, "{}", image.len());
        let mut c = moved(&mut b, "c");
        note(&mut c, b"next");
        for number in [1, 2] {
            let contents = contents(&mut c.claim(number, u32::MAX).unwrap());
            let [first, .., section, last] = &contents[..] else { panic!("{contents:?}") };
            assert_eq!([first, section], ["on node b", "on node c"]);
            assert_eq!(*last, format!("next, {} dropped before", 10 - (contents.len() - 3)));
            assert!(contents.len() > 5, "{}", contents.len());
        }
        drop(streams);
    }

    #[test]
    fn one_too_many_disturbs_no_other() {
        let mut recorder = recorder("a");
        let mut streams: Vec<_> = (0..8).map(|number| recorder.claim(number, 100).unwrap()).collect();
        assert!(recorder.claim(8, 100).is_none());
        note(&mut recorder, b"one");
        assert!(streams.iter_mut().all(|stream| contents(stream) == ["on node a", "one"]));
        streams.pop();
        assert!(recorder.claim(8, 100).is_some(), "one that ended makes room");
    }

    #[test]
    fn images_of_before_and_damaged_ones_thaw() {
        #[derive(Serialize)]
        struct Before {
            number: u64,
            snap_length: u32,
        }
        let image = codec::to_vec(&[Before { number: 1, snap_length: 5 }]).unwrap();
        let mut after = recorder("b");
        after.thaw(codec::from_slice(&image).unwrap());
        let kept = [&[0; 3][..], &[255; 300], &[0; 300]].into_iter().zip(2..);
        let damaged =
            kept.map(|(kept, number)| RecordingImage { number, snap_length: 5, kept: kept.to_vec(), dropped: 0 });
        after.thaw(damaged.collect());
        note(&mut after, b"packet");
        for number in 1..=4 {
            assert_eq!(contents(&mut after.claim(number, 5).unwrap()), ["on node b", "packe"]);
        }
    }
}
