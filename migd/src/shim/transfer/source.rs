//! The source's side of a move.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use std::time::{Duration, Instant};

use checkpoint::memory::{Budget, Next, Policy};
use checkpoint::{ExternalKey, MemoryChunk, MemorySink};
use handoff::message::{Claim, Message, Offer, SectionKind};
use handoff::source::{Action, Event, Outcome as Ended};
use handoff::{Limits, Source};
use sys::tun::Tun;
use tokio::sync::mpsc::UnboundedSender;

use super::peer::{Arrival, Peer};
use super::stats::Stats;
use super::{NetOffer, in_words, pack, pack_section};
use crate::api::{ApiError, ErrorKind, MoveEvent, MoveOutcome, NodeAddress, ShimEvent, ShimState, SocketPlace};
use crate::net::{Freezing, NetPlane, SocketKey};
use crate::shim::daemon;
use crate::shim::home::Home;
use crate::shim::job::{Announced, Externals, Job, Left, Remains, Stopped};
use crate::shim::output::Reader;
use crate::shim::stdio::StdioImage;

/// The largest packet that a TUN hands out: header and 64 KiB.
const PACKET_BYTES: usize = 80 << 10;
/// Packets that are written back after a commit; the queue holds fewer.
const MAX_STRAYS: usize = 20_000;
/// How long after a commit the packets that waited are worth sending on. Later their senders have repeated them (RFC 6298, 2.1:
/// after a second at first), and a connection that has ended since would be disturbed by them.
const STRAYS_LAST: Duration = Duration::from_secs(1);
/// Sockets in one part of a preview: so many are in both the target's shim and the process at a time.
const PREVIEW_SLOTS: usize = 256;
/// Sockets that take longer to make than a round of pre-copy should.
const MANY_SOCKETS: usize = 500;
/// How often progress is told within a round.
const PROGRESS: Duration = Duration::from_millis(100);

/// How a move ended for the source.
#[derive(Debug)]
pub enum Outcome {
    /// The job runs on here.
    Stayed(Box<Job>),
    /// It runs at the target.
    Left(Left),
}

/// Moves the job to `target`.
pub fn move_out(
    job: Job,
    target: NodeAddress,
    epoch: u64,
    sockets: SocketPlace,
    stream: OwnedFd,
    progress: UnboundedSender<MoveEvent>,
) -> anyhow::Result<Outcome> {
    match Driver::new(job, target, epoch, sockets, stream, progress.clone()) {
        Ok(driver) => driver.run(),
        Err((job, event)) => {
            // Whoever asked may be gone.
            let _ = progress.send(event);
            Ok(Outcome::Stayed(job))
        }
    }
}

struct Driver {
    job: Job,
    target: NodeAddress,
    sockets: SocketPlace,
    tree: Option<checkpoint::Source>,
    machine: Source,
    peer: Peer,
    progress: UnboundedSender<MoveEvent>,
    stats: Stats,
    output: Reader,
    output_bytes: u64,
    policy: Policy,
    frozen: Option<(Freezing, StdioImage, Externals)>,
    /// The target was told of sockets before the freeze.
    told: bool,
    memory_bytes: u64,
    outcome: Option<Ended>,
    over: Option<Instant>,
}

/// What came of an action.
enum Done {
    Quietly,
    With(Event<'static>),
    /// The connection did not carry it.
    Broken(io::Error),
}

/// Why the sockets' image was not sent.
enum Unsent {
    Unmade(String),
    /// The connection did not carry it.
    Broken(io::Error),
}

impl Driver {
    fn new(
        job: Job,
        target: NodeAddress,
        epoch: u64,
        sockets: SocketPlace,
        stream: OwnedFd,
        progress: UnboundedSender<MoveEvent>,
    ) -> Result<Driver, (Box<Job>, MoveEvent)> {
        let name = job.shared.file.spec.name.clone();
        let fail = |job: Job, kind, message: String| {
            Err((Box::new(job), MoveEvent::Failed(ApiError::new(kind, format!("job {name} does not move: {message}")))))
        };
        if epoch != job.epoch {
            let message = format!("its epoch is {}, the daemon believes {epoch}", job.epoch);
            return fail(job, ErrorKind::Conflict, message);
        }
        let mut tree = match checkpoint::Source::attach(&job.sandbox) {
            Ok(tree) => tree,
            Err(error) => return fail(job, ErrorKind::Internal, in_words(&error)),
        };
        let reasons = match tree.stay_reasons(&job.externals()) {
            Ok(reasons) => reasons,
            Err(error) => return fail(job, ErrorKind::Internal, in_words(&error)),
        };
        if !reasons.is_empty() {
            let reasons = reasons.iter().map(ToString::to_string).collect();
            return Err((Box::new(job), MoveEvent::Done(MoveOutcome::Refused { reasons })));
        }
        let peer = match Peer::new(stream, Limits::default()) {
            Ok(peer) => peer,
            Err(error) => return fail(job, ErrorKind::Internal, in_words(&error)),
        };
        let claim = Claim {
            job: job.shared.file.spec.id.clone(),
            epoch,
            source: job.shared.file.node.name.clone(),
            target: target.name.clone(),
        };
        let output = Reader::new(job.stdio.log_path(), 0);
        Ok(Driver {
            job,
            target,
            sockets,
            tree: Some(tree),
            machine: Source::new(claim),
            peer,
            progress,
            stats: Stats::new(),
            output,
            output_bytes: 0,
            policy: Policy::new(Budget::default()),
            frozen: None,
            told: false,
            memory_bytes: 0,
            outcome: None,
            over: None,
        })
    }

    fn run(mut self) -> anyhow::Result<Outcome> {
        let to = self.target.name.clone();
        tracing::info!(to, "the job is to move");
        self.job.shared.set_status(|status| status.state = ShimState::Moving { to: to.clone() });
        self.job.shared.tell(ShimEvent::Moving { to });
        self.stats.enter("offer", 0);
        let mut actions = self.machine.handle_event(Event::Start);
        loop {
            self.perform_all(actions);
            if self.outcome.is_some() {
                break;
            }
            actions = match self.peer.next() {
                Arrival::Frame(frame) => {
                    let actions = match frame.message() {
                        Ok(message) => self.machine.handle_event(Event::Message(&message)),
                        Err(error) => self.machine.handle_event(Event::Disconnected(in_words(&error))),
                    };
                    self.peer.recycle(frame);
                    actions
                }
                Arrival::Timeout(timer) => self.machine.handle_event(Event::Timeout(timer)),
                Arrival::End(reason) => self.machine.handle_event(Event::Disconnected(reason)),
            };
        }
        self.finish()
    }

    /// Performs actions and those that follow from them. What an event asks for replaces what was still to be done.
    fn perform_all(&mut self, actions: Vec<Action>) {
        let mut actions = actions.into_iter();
        while let Some(action) = actions.next() {
            let more = match self.perform(action) {
                Done::Quietly => continue,
                Done::With(event) => self.machine.handle_event(event),
                Done::Broken(error) => self.handle_broken(&error),
            };
            if !more.is_empty() {
                actions = more.into_iter();
            }
        }
        if let Err(error) = self.peer.flush() {
            let more = self.handle_broken(&error);
            if !more.is_empty() {
                self.perform_all(more);
            }
        }
    }

    /// The connection broke; the target may have said why.
    fn handle_broken(&mut self, error: &io::Error) -> Vec<Action> {
        if let Some(frame) = self.peer.last_words()
            && let Ok(message) = frame.message()
        {
            let actions = self.machine.handle_event(Event::Message(&message));
            if !actions.is_empty() {
                return actions;
            }
        }
        self.machine.handle_event(Event::Disconnected(error.to_string()))
    }

    fn perform(&mut self, action: Action) -> Done {
        match action {
            Action::Send(message) => sent(self.peer.send(&message)),
            Action::SendOffer => self.send_offer(),
            Action::Arm(timer) => match self.peer.flush().and_then(|()| self.peer.arm(timer)) {
                Ok(()) => Done::Quietly,
                Err(error) => Done::Broken(error),
            },
            Action::CopyRound { number } => self.copy_round(number),
            Action::Freeze => self.freeze(),
            Action::SendResidual => self.send_residual(),
            Action::Fence => {
                tracing::warn!(
                    "the move is given up after the residual was sent: asking the directory who owns the job"
                );
                let claim = self.machine.claim();
                let home = self.job.home.as_deref();
                Done::With(Event::Fenced(daemon::transfer(&self.job.shared.file.control, claim, &claim.source, home)))
            }
            Action::Resume => {
                self.resume();
                Done::Quietly
            }
            Action::Discard => {
                self.over = Some(Instant::now());
                self.stats.leave(self.peer.sent_bytes());
                Done::Quietly
            }
            Action::Finish(outcome) => {
                self.outcome = Some(outcome);
                Done::Quietly
            }
        }
    }

    fn send_offer(&mut self) -> Done {
        let Some(tree) = &mut self.tree else { return gone() };
        let offer = match tree.offer() {
            Ok(offer) => offer,
            Err(error) => return Done::With(Event::Cancel(in_words(&error))),
        };
        self.memory_bytes = offer.memory_bytes;
        let packed = pack(&offer).and_then(|process| {
            let spec = serde_json::to_vec(&self.job.shared.file.spec)?;
            let net = pack(&self.net_offer())?;
            Ok(Offer { claim: self.machine.claim().clone(), spec, process, net })
        });
        match packed {
            Ok(offer) => sent(self.peer.send(&Message::Offer(offer))),
            Err(error) => Done::With(Event::Cancel(error.to_string())),
        }
    }

    fn net_offer(&self) -> NetOffer {
        let node = self.job.home.as_ref().unwrap_or(&self.job.shared.file.node.name);
        NetOffer { at: node.clone(), stay: self.sockets == SocketPlace::Home }
    }

    fn copy_round(&mut self, number: u32) -> Done {
        let Some(mut tree) = self.tree.take() else { return gone() };
        if number == 1 {
            self.stats.enter("precopy", self.peer.sent_bytes());
        }
        let done = self.copy_round_of(&mut tree, number);
        self.tree = Some(tree);
        done
    }

    fn copy_round_of(&mut self, tree: &mut checkpoint::Source, number: u32) -> Done {
        if number == 1
            && let Err(error) = self.send_output()
        {
            return Done::Broken(error);
        }
        let begun = Instant::now();
        let mut sink = self.sink(Some(number));
        let result = tree.copy_round(&mut sink);
        if let Some(error) = sink.broken.take() {
            return Done::Broken(error);
        }
        let stats = match result {
            Ok(stats) => stats,
            Err(error) => return Done::With(Event::Cancel(in_words(&error))),
        };
        if let Err(error) = self.peer.flush() {
            return Done::Broken(error);
        }
        let next = self.policy.after_round(stats, begun.elapsed());
        tracing::info!(round = number, bytes = stats.bytes, left = stats.dirty_left, ?next, "round copied");
        let sockets = match (number == 1).then(|| self.send_preview(tree)).transpose() {
            Ok(sockets) => sockets.unwrap_or(0),
            Err(done) => return done,
        };
        // While the target makes many sockets the job writes on.
        let again = matches!(next, Next::Round) || sockets > MANY_SOCKETS;
        Done::With(Event::RoundCopied { again })
    }

    /// Tells the target which sockets there are. Returns how many.
    fn send_preview(&mut self, tree: &mut checkpoint::Source) -> Result<usize, Done> {
        let cancel = |reason| Done::With(Event::Cancel(reason));
        if self.machine.protocol() < 2 {
            return Ok(0);
        }
        let parts = tree.preview(&self.job.externals(), PREVIEW_SLOTS).map_err(|error| cancel(in_words(&error)))?;
        let protocol = self.machine.protocol();
        for part in parts.iter().filter(|part| protocol >= 3 || !part.slots.is_empty()) {
            let data = pack(part).map_err(|error| cancel(error.to_string()))?;
            let message = Message::Section { kind: SectionKind::Preview, data: &data };
            self.peer.send(&message).map_err(Done::Broken)?;
            self.tell(part)?;
        }
        self.peer.flush().map_err(Done::Broken)?;
        Ok(parts.iter().map(|part| part.slots.len()).sum())
    }

    /// Whether the target is told of the sockets ahead: they are here and go along, and it understands.
    fn tells_sockets(&self) -> bool {
        self.machine.protocol() >= 3 && self.sockets == SocketPlace::Along && self.job.home.is_none()
    }

    /// Sends images of these sockets.
    fn tell(&mut self, part: &checkpoint::Preview) -> Result<(), Done> {
        let cancel = |reason| Done::With(Event::Cancel(reason));
        if !self.tells_sockets() {
            return Ok(());
        }
        let key = |&(_, key): &(_, ExternalKey)| match key {
            ExternalKey::Socket(number) => Some(SocketKey(number)),
            ExternalKey::Stdio(_) => None,
        };
        let keys = part.slots.iter().filter_map(key).collect();
        let told = self.job.plane.preview(keys, !self.told).map_err(|error| cancel(in_words(&error)))?;
        self.told = true;
        if told.is_empty() {
            return Ok(());
        }
        let data = codec::to_vec(&told).map_err(|error| cancel(error.to_string()))?;
        let message = Message::Section { kind: SectionKind::NetPreview, data: &data };
        self.peer.send(&message).map_err(Done::Broken)
    }

    fn freeze(&mut self) -> Done {
        if let Err(reason) = daemon::check(&self.job.shared.file.control) {
            return Done::With(Event::Cancel(reason));
        }
        if let Err(error) = self.peer.flush() {
            return Done::Broken(error);
        }
        self.stats.enter("freeze", self.peer.sent_bytes());
        self.stats.stop(self.peer.sent_bytes());
        let Some(tree) = &mut self.tree else { return gone() };
        if let Err(error) = tree.freeze() {
            return Done::With(Event::Cancel(in_words(&error)));
        }
        // Asked for first: the net thread is about to be busy, freezing the sockets while this one dumps the processes.
        let externals = self.job.externals();
        let net = match self.job.plane.begin_freeze(self.sockets == SocketPlace::Home, self.told) {
            Ok(net) => net,
            Err(error) => return Done::With(Event::Cancel(in_words(&error))),
        };
        let stdio = match self.job.stdio.freeze() {
            Ok(stdio) => stdio,
            Err(error) => return Done::With(Event::Cancel(format!("the job's standard input: {error}"))),
        };
        self.frozen = Some((net, stdio, externals));
        Done::With(Event::Frozen)
    }

    fn send_residual(&mut self) -> Done {
        self.stats.enter("dump", self.peer.sent_bytes());
        let (Some(mut tree), Some((net, stdio, externals))) = (self.tree.take(), self.frozen.take()) else {
            return gone();
        };
        let done = self.send_residual_of(&mut tree, net, &stdio, &externals);
        self.tree = Some(tree);
        done
    }

    fn send_residual_of(
        &mut self,
        tree: &mut checkpoint::Source,
        net: Freezing,
        stdio: &StdioImage,
        externals: &Externals,
    ) -> Done {
        let protocol = self.machine.protocol();
        let mut sink = self.sink(None);
        let memory = tree.dump_memory(&mut sink);
        if let Some(error) = sink.broken.take() {
            return Done::Broken(error);
        }
        let memory = match memory {
            Ok(memory) => memory,
            Err(error) => return Done::With(Event::Cancel(in_words(&error))),
        };
        // All of it before the streams' image, with which the target goes on.
        if let Err(error) = self.send_output() {
            return Done::Broken(error);
        }
        // The sockets are ready first: the target makes use of them while the processes are dumped.
        let is_telling = self.tells_sockets();
        let peer = &mut self.peer;
        let (image, sent) = std::thread::scope(|scope| {
            let sent = scope.spawn(|| {
                let net = net.finish().map_err(|error| Unsent::Unmade(in_words(&error)))?;
                let in_words = |error: io::Error| Unsent::Unmade(error.to_string());
                let stdio = pack_section(protocol, stdio).map_err(in_words)?;
                let net = pack_section(protocol, &net).map_err(in_words)?;
                peer.send_section(SectionKind::Shim, &stdio).map_err(Unsent::Broken)?;
                peer.send_section(SectionKind::Net, &net).map_err(Unsent::Broken)?;
                if is_telling {
                    let whole = Message::Section { kind: SectionKind::Net, data: &[] };
                    peer.send(&whole).and_then(|()| peer.flush()).map_err(Unsent::Broken)?;
                }
                Ok([(SectionKind::Shim, stdio.len() as u64), (SectionKind::Net, net.len() as u64)])
            });
            let image = tree.dump_rest(externals, memory);
            let panicked = |_| Err(Unsent::Unmade("the thread that packs the sockets panicked".to_owned()));
            (image, sent.join().unwrap_or_else(panicked))
        });
        self.stats.enter("residual", self.peer.sent_bytes());
        let mut sections = match sent {
            Ok(sections) => sections.to_vec(),
            Err(Unsent::Broken(error)) => return Done::Broken(error),
            Err(Unsent::Unmade(reason)) => return Done::With(Event::Cancel(reason)),
        };
        let image = image.map_err(|error| in_words(&error));
        let image = match image.and_then(|image| pack_section(protocol, &image).map_err(|error| error.to_string())) {
            Ok(image) => image,
            Err(reason) => return Done::With(Event::Cancel(reason)),
        };
        let sent = self.peer.send_section(SectionKind::Tree, &image);
        if let Err(error) = sent.and_then(|()| self.peer.flush()) {
            return Done::Broken(error);
        }
        sections.extend([(SectionKind::Tree, image.len() as u64), (SectionKind::Output, self.output_bytes)]);
        self.stats.enter("commit", self.peer.sent_bytes());
        Done::With(Event::ResidualSent { sections })
    }

    /// Sends what the output log holds beyond what was sent.
    fn send_output(&mut self) -> io::Result<()> {
        // A log that can't be read costs its readers the past, not the job its move.
        let next = |driver: &mut Driver| match driver.output.next_frame() {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(%error, "a part of the job's output stays behind");
                None
            }
        };
        while let Some(frame) = next(self) {
            let data = frame.encode();
            self.output_bytes += data.len() as u64;
            self.peer.send(&Message::Section { kind: SectionKind::Output, data: &data })?;
        }
        Ok(())
    }

    fn sink(&mut self, round: Option<u32>) -> PeerSink<'_> {
        PeerSink {
            peer: &mut self.peer,
            broken: None,
            progress: &self.progress,
            phase: self.stats.phase(),
            round,
            total: self.memory_bytes,
            told: Instant::now(),
        }
    }

    /// The job runs on here.
    fn resume(&mut self) {
        self.job.plane.resume();
        if let Some(tree) = self.tree.take()
            && let Err(error) = tree.resume()
        {
            tracing::error!(error = in_words(&error), "the job did not resume cleanly after a move that was given up");
        }
        self.job.stdio.resume();
    }

    fn finish(mut self) -> anyhow::Result<Outcome> {
        let phase = self.stats.phase();
        let outcome = self.outcome.take().expect("the loop ends with an outcome");
        let done = match outcome {
            Ended::Moved { epoch, committed } => {
                if let Some(committed) = committed {
                    for (name, duration_us) in committed.steps {
                        self.stats.target_step(&name, duration_us);
                    }
                }
                return self.depart(epoch).map(Outcome::Left);
            }
            Ended::Refused { reason } => MoveOutcome::Refused { reasons: vec![reason] },
            Ended::Aborted { reason, epoch } => {
                self.job.epoch = epoch;
                MoveOutcome::Aborted { phase: phase.to_owned(), reason }
            }
        };
        tracing::warn!(?done, "the job stays");
        self.job.shared.tell_running(self.job.epoch, self.job.sandbox.root_pid());
        self.job.announced = Announced::now();
        // Whoever asked may be gone.
        let _ = self.progress.send(match self.job.sandbox.signal(0) {
            Err(checkpoint::Error::Gone) => {
                let message = format!("job {} ended before it could move", self.job.shared.file.spec.name);
                MoveEvent::Failed(ApiError::new(ErrorKind::Conflict, message))
            }
            _ => MoveEvent::Done(done),
        });
        Ok(Outcome::Stayed(Box::new(self.job)))
    }

    /// The job runs at the target: end what is here of it, after what stays was seen to.
    fn depart(self, epoch: u64) -> anyhow::Result<Left> {
        let Job { shared, sandbox, mut links, plane, stdio, home, lines, .. } = self.job;
        let target = self.target;
        let tree = self.tree.map(Stopped::new);
        let over = self.over.unwrap_or_else(Instant::now);
        let (left, stopped) = match (home, self.sockets) {
            // The sockets went along: send the job's packets after it.
            (None, SocketPlace::Along) => {
                links.hand_over(&target);
                forward_strays(&plane, over);
                links.stop_answering();
                (Left::Gone(Some(Box::new(Remains { tree, sandbox, plane, links }))), None)
            }
            (None, SocketPlace::Home) => {
                let home = Home::new(Arc::clone(&shared), links, plane, target.clone(), epoch)?;
                for (line, visitor) in lines {
                    home.add_line(line, visitor);
                }
                // In this order: the tree is in the sandbox.
                (Left::Home(Box::new(home)), Some((tree, sandbox)))
            }
            // They are elsewhere, and that node sees to them.
            (Some(_), _) => {
                if let Err(error) = plane.retire() {
                    tracing::warn!(error = in_words(&error), "the job's net thread has ended before the job left");
                }
                (Left::Gone(Some(Box::new(Remains { tree, sandbox, plane, links }))), None)
            }
        };
        let sent = self.peer.sent_bytes();
        let summary = self.stats.summary(&shared.file.node.name, &target.name, epoch, over, sent);
        tracing::info!(?summary, "the job has moved");
        // Whoever asked may be gone.
        let _ = self.progress.send(MoveEvent::Done(MoveOutcome::Moved(summary)));
        shared.set_home(None);
        stdio.finish();
        if matches!(left, Left::Gone(_)) {
            shared.set_status(|status| status.root = None);
            shared.tell(ShimEvent::Moved { to: target.name, epoch });
        }
        drop(stopped);
        Ok(left)
    }
}

fn sent(result: io::Result<()>) -> Done {
    match result {
        Ok(()) => Done::Quietly,
        Err(error) => Done::Broken(error),
    }
}

fn gone() -> Done {
    Done::With(Event::Cancel("the job is no longer held".to_owned()))
}

/// Ends the net thread of a job that left at `left`, and writes the packets that waited in its TUN back into it: the kernel routes
/// them as new ones, to the job's new node. What has waited for too long is dropped.
pub fn forward_strays(plane: &NetPlane, left: Instant) {
    let tun = match plane.retire() {
        Ok(tun) => Tun::from(tun),
        Err(error) => return tracing::warn!(error = in_words(&error), "packets in the old TUN are lost"),
    };
    let waited = left.elapsed();
    if waited >= STRAYS_LAST {
        return tracing::warn!(?waited, "packets in the old TUN are too old to be sent after the job");
    }
    let mut packets = Vec::new();
    let mut buffer = vec![0; PACKET_BYTES];
    while packets.len() < MAX_STRAYS
        && let Ok(count) = tun.receive(&mut buffer)
    {
        packets.push(buffer[..count].to_vec());
    }
    let total = packets.len();
    let lost = packets.iter().filter(|packet| tun.send(&[io::IoSlice::new(packet)]).is_err()).count();
    tracing::info!(total, lost, "packets that waited were sent after the job");
}

/// Sends memory to the peer.
struct PeerSink<'a> {
    peer: &'a mut Peer,
    /// Kept here, because the tree's errors don't tell the connection's from the job's.
    broken: Option<io::Error>,
    progress: &'a UnboundedSender<MoveEvent>,
    phase: &'static str,
    round: Option<u32>,
    total: u64,
    told: Instant,
}

impl PeerSink<'_> {
    fn keep(&mut self, result: io::Result<()>) -> io::Result<()> {
        result.map_err(|error| {
            let kind = error.kind();
            self.broken = Some(error);
            io::Error::new(kind, "the connection to the target broke")
        })
    }
}

impl MemorySink for PeerSink<'_> {
    fn layout(&mut self, layout: checkpoint::Layout) -> io::Result<()> {
        let data = pack(&layout)?;
        let result = self.peer.send(&Message::Layout(&data));
        self.keep(result)
    }

    fn pages(&mut self, chunk: MemoryChunk<'_>) -> io::Result<()> {
        let MemoryChunk { process, address, data } = chunk;
        if self.round.is_some() && self.told.elapsed() >= PROGRESS {
            self.told = Instant::now();
            let event = MoveEvent::Progress {
                phase: self.phase.to_owned(),
                round: self.round,
                bytes: self.peer.sent_bytes(),
                total_bytes: Some(self.total),
            };
            // Whoever asked may be gone.
            let _ = self.progress.send(event);
        }
        let result = self.peer.send_pages(process, address, data);
        self.keep(result)
    }
}
