//! The target's side of a move.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use checkpoint::{ClockOffsets, ExternalKey, TreeImage};
use handoff::message::{Message, Offer, SectionKind};
use handoff::target::{Action, Event, Outcome};
use handoff::{Limits, Target};

use super::peer::{Arrival, Peer};
use super::{NetOffer, in_words, unpack};
use crate::api::{ApiError, ErrorKind, NodeAddress};
use crate::net::{AwayImage, Guest, LineBoard, NetImage, NetPlane, SocketKey, Stock, Told};
use crate::shim::job::{Announced, Job, Surroundings};
use crate::shim::links::Links;
use crate::shim::output::{Frame, Log};
use crate::shim::stdio::{Stdio, StdioImage};
use crate::shim::{Shared, daemon};

/// The programs' ends of sockets.
type Sockets = BTreeMap<SocketKey, OwnedFd>;

/// How long a home may take to give the sockets' image, while the job stands still.
const FETCH: Duration = Duration::from_secs(8);
/// The largest section that is taken, in bytes: more than the buffers of every connection a job can have.
const MAX_SECTION: usize = 4 << 30;

/// Receives the job. Whatever goes wrong before the commit leaves nothing here and is the error.
pub fn receive(
    shared: &Arc<Shared>,
    source: &NodeAddress,
    stream: OwnedFd,
    line: Option<OwnedFd>,
) -> anyhow::Result<Job> {
    take(shared, source, stream, line, None)
}

/// The home that takes a process back: its plane has the sockets.
#[derive(Debug)]
pub struct Back<'a> {
    /// The home's plane. It stands still when the process has come.
    pub plane: &'a NetPlane,
    /// The epoch under which the process was elsewhere.
    pub epoch: u64,
}

/// Takes the process of a job back whose sockets are here.
pub fn take_back(shared: &Arc<Shared>, source: &NodeAddress, stream: OwnedFd, back: &Back<'_>) -> anyhow::Result<Job> {
    take(shared, source, stream, None, Some(back))
}

fn take(
    shared: &Arc<Shared>,
    source: &NodeAddress,
    stream: OwnedFd,
    line: Option<OwnedFd>,
    back: Option<&Back<'_>>,
) -> anyhow::Result<Job> {
    tracing::info!(from = source.name, "the job is to come here");
    let peer = Peer::new(stream, Limits::default())?;
    let log = Log::create(&shared.paths.output(), 0)?;
    let driver = Driver {
        shared: Arc::clone(shared),
        machine: Target::new(&shared.file.node.name),
        peer,
        greeted: Instant::now(),
        back,
        line: line.map(Guest::new),
        net: NetOffer { at: source.name.clone(), stay: false },
        home: None,
        inherited: None,
        attracts: false,
        offer: None,
        around: None,
        tree: None,
        stock: None,
        told: Told::default(),
        output: Vec::new(),
        sections: BTreeMap::new(),
        output_bytes: 0,
        expected: Vec::new(),
        taken: Vec::new(),
        ends: None,
        log: Some(log),
        prepared: None,
        steps: Steps::new(),
        outcome: None,
    };
    driver.run()
}

struct Driver<'a> {
    shared: Arc<Shared>,
    back: Option<&'a Back<'a>>,
    /// To the node with the job's sockets, if that is another.
    line: Option<Guest>,
    /// What the source says of the sockets.
    net: NetOffer,
    /// The node where the sockets stay, and the line there.
    home: Option<(String, LineBoard)>,
    /// The line to the node that the sockets come from, when that is not the source.
    inherited: Option<Guest>,
    /// The job's address leads here already.
    attracts: bool,
    machine: Target,
    peer: Peer,
    /// When the source was greeted: it read the job's clocks after that.
    greeted: Instant,
    offer: Option<Offer>,
    around: Option<Surroundings>,
    tree: Option<checkpoint::Target>,
    /// Sockets made before the freeze.
    stock: Option<Stock>,
    /// What was told of sockets before the freeze.
    told: Told,
    /// The piece of the output log that is not yet a whole frame.
    output: Vec<u8>,
    output_bytes: u64,
    sections: BTreeMap<SectionKind, Vec<u8>>,
    expected: Vec<(SectionKind, u64)>,
    /// Sections that were used, with their lengths.
    taken: Vec<(SectionKind, u64)>,
    /// The programs' ends of standard streams and of sockets, once the job's network is made.
    ends: Option<([OwnedFd; 3], Sockets)>,
    log: Option<Log>,
    prepared: Option<Prepared>,
    steps: Steps,
    outcome: Option<Outcome>,
}

/// All but running.
struct Prepared {
    sandbox: checkpoint::Sandbox,
    links: Links,
    plane: NetPlane,
    stdio: Arc<Stdio>,
}

/// Names and durations of what is done while the job stands still.
struct Steps {
    since: Instant,
    done: Vec<(String, u64)>,
}

impl Steps {
    fn new() -> Steps {
        Steps { since: Instant::now(), done: Vec::new() }
    }

    fn begin(&mut self) {
        self.since = Instant::now();
    }

    fn end(&mut self, name: &str) {
        let took = u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.done.push((name.to_owned(), took));
        self.since = Instant::now();
    }
}

impl Driver<'_> {
    fn run(mut self) -> anyhow::Result<Job> {
        let actions = self.machine.handle_event(Event::Start);
        self.perform_all(actions, None);
        while self.outcome.is_none() {
            match self.peer.next() {
                Arrival::Frame(frame) => {
                    match frame.message() {
                        Ok(message) => {
                            self.note(&message);
                            let actions = self.machine.handle_event(Event::Message(&message));
                            self.perform_all(actions, Some(&message));
                        }
                        Err(error) => {
                            let actions = self.machine.handle_event(Event::Failed(in_words(&error)));
                            self.perform_all(actions, None);
                        }
                    }
                    self.peer.recycle(frame);
                }
                Arrival::Timeout(timer) => {
                    let actions = self.machine.handle_event(Event::Timeout(timer));
                    self.perform_all(actions, None);
                }
                Arrival::End(reason) => {
                    let actions = self.machine.handle_event(Event::Disconnected(reason));
                    self.perform_all(actions, None);
                }
            }
        }
        self.finish()
    }

    /// Keeps what an action will need of a message.
    fn note(&mut self, message: &Message<'_>) {
        match message {
            Message::Hello(_) => self.greeted = Instant::now(),
            Message::Offer(offer) => self.offer = Some(offer.clone()),
            Message::ResidualEnd(end) => self.expected.clone_from(&end.sections),
            _ => {}
        }
    }

    /// Performs actions and those that follow from them. What an event asks for replaces what was still to be done.
    fn perform_all(&mut self, actions: Vec<Action>, message: Option<&Message<'_>>) {
        let mut actions = actions.into_iter();
        while let Some(action) = actions.next() {
            let Some(event) = self.perform(action, message) else { continue };
            let more = self.machine.handle_event(event);
            if !more.is_empty() {
                actions = more.into_iter();
            }
        }
        if let Err(error) = self.peer.flush() {
            let more = self.machine.handle_event(Event::Disconnected(error.to_string()));
            if !more.is_empty() {
                self.perform_all(more, None);
            }
        }
    }

    fn perform(&mut self, action: Action, message: Option<&Message<'_>>) -> Option<Event<'static>> {
        let broken = |error: io::Error| Some(Event::Disconnected(error.to_string()));
        match action {
            Action::Send(message) => self.peer.send(&message).err().and_then(broken),
            Action::Arm(timer) => self.peer.flush().and_then(|()| self.peer.arm(timer)).err().and_then(broken),
            Action::Judge => Some(Event::Judged(self.judge().map_err(|error| in_words(error.as_ref())))),
            Action::Apply => {
                let message = message?;
                self.apply(message).err().map(|error| Event::Failed(in_words(error.as_ref())))
            }
            Action::Prepare => match self.prepare() {
                Ok(()) => Some(Event::Prepared),
                Err(error) => Some(Event::Failed(in_words(error.as_ref()))),
            },
            Action::Transfer => {
                // The announcement that everything is ready must not wait for the answer.
                let flushed = self.peer.flush();
                if let Err(error) = flushed {
                    tracing::warn!(%error, "the source did not hear that everything is ready");
                }
                self.steps.begin();
                let claim = self.machine.claim()?;
                let home = self.home.as_ref().map(|(home, _)| home.as_str());
                let answer = daemon::transfer(&self.shared.file.control, claim, &claim.target, home);
                self.steps.end("transfer");
                Some(Event::Transferred(answer))
            }
            Action::Run { epoch } => self.start(epoch),
            Action::Discard => {
                self.discard();
                None
            }
            Action::Finish(outcome) => {
                self.outcome = Some(outcome);
                None
            }
        }
    }

    fn judge(&mut self) -> anyhow::Result<()> {
        let offer = self.offer.as_ref().ok_or_else(|| anyhow::anyhow!("there is no offer"))?;
        let file = &self.shared.file;
        let epoch = self.back.map_or(file.epoch, |back| back.epoch);
        if offer.claim.job != file.spec.id || offer.claim.epoch != epoch {
            anyhow::bail!(
                "job {} of epoch {} was announced, job {} of epoch {} came",
                file.spec.id,
                epoch,
                offer.claim.job,
                offer.claim.epoch
            );
        }
        let net = match offer.net.as_slice() {
            [] => NetOffer { at: offer.claim.source.clone(), stay: false },
            net => unpack("what is said of the sockets", net)?,
        };
        self.net = net;
        let net = &self.net;
        let elsewhere = net.at != file.node.name && (net.stay || net.at != offer.claim.source);
        if elsewhere && self.line.is_none() {
            anyhow::bail!("there is no line to node {}, where the job's sockets are", net.at);
        }
        let mut process: checkpoint::Offer = unpack("the offer", &offer.process)?;
        // The clocks were read after we greeted: adding all the time since then they may run ahead by the way there
        // and back, and never step back.
        let way = i64::try_from(self.greeted.elapsed().as_nanos())?;
        process.clocks.monotonic_ns = process.clocks.monotonic_ns.saturating_add(way);
        process.clocks.boottime_ns = process.clocks.boottime_ns.saturating_add(way);
        let mut around = Surroundings::create(&self.shared, Some(ClockOffsets::continuing(process.clocks)))?;
        let tree = checkpoint::Target::create(&mut around.sandbox, &process);
        self.stock = Some(Stock::new(around.net_config(&self.shared)?.namespace)?);
        self.around = Some(around);
        self.tree = Some(tree?);
        Ok(())
    }

    fn apply(&mut self, message: &Message<'_>) -> anyhow::Result<()> {
        let tree = self.tree.as_mut().ok_or_else(|| anyhow::anyhow!("memory came before the offer"))?;
        match message {
            Message::Layout(data) => tree.layout(unpack("the layout", data)?)?,
            Message::Pages { process, address, data } => tree.pages(*process, *address, data)?,
            Message::Section { kind: SectionKind::Output, data } => self.append_output(data)?,
            Message::Section { kind: SectionKind::Preview, data } => {
                self.prepare_sockets(&unpack("a preview", data)?)?
            }
            Message::Section { kind: SectionKind::NetPreview, data } => {
                self.told.add(unpack("a preview of the sockets", data)?);
            }
            // It is whole, and so are the streams' image and their output before it.
            Message::Section { kind: SectionKind::Net, data: [] } => self.prepare_net_early()?,
            Message::Section { kind, data } => {
                let section = self.sections.entry(*kind).or_default();
                if section.len() + data.len() > MAX_SECTION {
                    anyhow::bail!("the {kind:?} section is larger than {MAX_SECTION} bytes");
                }
                section.extend_from_slice(data);
            }
            other => anyhow::bail!("a {:?} message carries nothing to be put in place", other.kind()),
        }
        Ok(())
    }

    /// Makes sockets and puts them into the processes, so that it need not be done while the job stands still.
    fn prepare_sockets(&mut self, preview: &checkpoint::Preview) -> anyhow::Result<()> {
        let (Some(stock), Some(tree)) = (&mut self.stock, &mut self.tree) else { return Ok(()) };
        let key = |&(_, key): &(_, ExternalKey)| match key {
            ExternalKey::Socket(number) => Ok(SocketKey(number)),
            ExternalKey::Stdio(_) => Err(anyhow::anyhow!("a preview names a standard stream")),
        };
        let keys = preview.slots.iter().map(key).collect::<anyhow::Result<Vec<_>>>()?;
        let ends = stock.make(&keys)?;
        tree.place_early(preview, &ends)?;
        Ok(())
    }

    fn append_output(&mut self, data: &[u8]) -> io::Result<()> {
        let Some(log) = &mut self.log else { return Ok(()) };
        self.output_bytes += data.len() as u64;
        self.output.extend_from_slice(data);
        let mut taken = 0;
        while let Some((frame, length)) = Frame::decode(&self.output[taken..])? {
            log.append_frame(&frame)?;
            taken += length;
        }
        self.output.drain(..taken);
        Ok(())
    }

    fn section(&mut self, kind: SectionKind) -> anyhow::Result<Vec<u8>> {
        let section = self.sections.remove(&kind).ok_or_else(|| anyhow::anyhow!("the {kind:?} section is missing"))?;
        self.taken.push((kind, section.len() as u64));
        Ok(section)
    }

    fn prepare(&mut self) -> anyhow::Result<()> {
        self.steps.begin();
        for (kind, length) in &self.expected {
            let here = match kind {
                SectionKind::Output => self.output_bytes,
                _ => match self.taken.iter().find(|(taken, _)| taken == kind) {
                    Some((_, length)) => *length,
                    None => self.sections.get(kind).map_or(0, Vec::len) as u64,
                },
            };
            if here != *length {
                anyhow::bail!("{here} of {length} bytes of the {kind:?} section came");
            }
        }
        if self.ends.is_none() {
            self.prepare_net_early()?;
        }
        let (ends, sockets) = self.ends.take().ok_or_else(|| anyhow::anyhow!("there are no sockets"))?;
        let image: TreeImage = unpack("the processes' image", &self.section(SectionKind::Tree)?)?;
        self.steps.end("decode");
        let tree = self.tree.as_mut().ok_or_else(|| anyhow::anyhow!("there is no tree"))?;
        restore(tree, image, sockets, ends)?;
        self.steps.end("restore");
        Ok(())
    }
    /// Makes the job's network: while the source still dumps the processes, if it says that the image of the network is whole.
    fn prepare_net_early(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(self.ends.is_none(), "the sockets' image came twice");
        self.steps.begin();
        let net = self.section(SectionKind::Net)?;
        let stdio: StdioImage = unpack("the streams' image", &self.section(SectionKind::Shim)?)?;
        self.ends = Some(self.prepare_net(&net, &stdio)?);
        self.steps.begin();
        Ok(())
    }

    /// Makes the job's network of its image. Returns the programs' ends of standard streams and of sockets.
    fn prepare_net(&mut self, image: &[u8], stdio: &StdioImage) -> anyhow::Result<([OwnedFd; 3], Sockets)> {
        let mut net: NetImage = unpack("the sockets' image", image)?;
        std::mem::take(&mut self.told).complete(&mut net)?;
        self.steps.end("sockets");
        let around = self.around.take().ok_or_else(|| anyhow::anyhow!("there is no sandbox"))?;
        let log = self.log.take().ok_or_else(|| anyhow::anyhow!("there is no log"))?;
        let config = around.net_config(&self.shared)?;
        let Surroundings { sandbox, mut links, tun, listener, eth0: _ } = around;
        let (stdio, ends) = Stdio::restore(log, &self.shared.paths.output(), stdio)?;
        let mut stock = self.stock.take().ok_or_else(|| anyhow::anyhow!("there is no stock of sockets"))?;
        let placed = self.tree.as_ref().map(checkpoint::Target::early_keys).unwrap_or_default();
        stock.keep(|key| placed.contains(&ExternalKey::Socket(key.0)));
        let line = self.find_sockets(&mut net)?;
        let (plane, sockets) = NetPlane::thaw(config, net, tun, listener, stock, line)?;
        self.steps.end("thaw");
        if self.home.is_none() && self.back.is_none() {
            links.attract()?;
            self.attracts = true;
        }
        // From here on there is something to discard.
        self.prepared = Some(Prepared { sandbox, links, plane, stdio });
        Ok((ends, sockets))
    }

    /// Completes the image with sockets that are neither in it nor to stay where they are; returns the line to them if they stay.
    fn find_sockets(&mut self, net: &mut NetImage) -> anyhow::Result<Option<(Guest, u64)>> {
        if net.stack.is_some() {
            return Ok(None);
        }
        if let Some(back) = self.back {
            let home = back.plane.freeze()?;
            (net.stack, net.packets) = (home.stack, home.packets);
            return Ok(None);
        }
        let epoch = self.shared.file.epoch + 1;
        let line = self.line.take().ok_or_else(|| anyhow::anyhow!("there is no line to the job's sockets"))?;
        if self.net.stay {
            self.home = Some((self.net.at.clone(), line.board()));
            return Ok(Some((line, epoch)));
        }
        let packet = net.away.as_ref().map_or(0, AwayImage::packet);
        let fetched = line.fetch(epoch, packet, FETCH);
        let (stack, packets) =
            fetched.with_context(|| format!("node {} does not give the job's sockets away", self.net.at))?;
        (net.stack, net.packets) = (Some(Box::new(stack)), packets);
        self.inherited = Some(line);
        self.steps.end("fetch");
        Ok(None)
    }

    /// The job is ours: nothing may stand between this and its first instruction.
    fn start(&mut self, epoch: u64) -> Option<Event<'static>> {
        let prepared = self.prepared.as_mut()?;
        let tree = self.tree.take()?;
        self.steps.begin();
        if !self.attracts && self.home.is_none() {
            self.attracts = true;
            if let Err(error) = prepared.links.attract() {
                tracing::error!(error = in_words(&error), "the job's address does not lead to its new device");
            }
        }
        prepared.plane.resume();
        let result = tree.run();
        let at_ns = realtime_ns();
        if self.home.is_none() {
            prepared.links.announce();
        }
        if let Some(line) = self.inherited.take() {
            line.inherit(epoch);
        }
        prepared.stdio.resume();
        self.steps.end("run");
        if let Err(error) = result {
            // Past the point of no return there is nobody to tell: the job is lost, as if this node had died.
            tracing::error!(error = in_words(&error), "the job does not run though this node owns it");
            self.discard();
            self.outcome = Some(Outcome::Aborted { reason: format!("the job did not start: {}", in_words(&error)) });
            return None;
        }
        let steps = std::mem::take(&mut self.steps.done);
        tracing::info!(?steps, "the job runs here");
        Some(Event::Running { at_ns, steps })
    }

    /// Leaves nothing of the job here.
    fn discard(&mut self) {
        // The stubs die with the tree, before their namespaces.
        self.tree = None;
        if let Some(Prepared { sandbox, mut links, plane, stdio, .. }) = self.prepared.take() {
            if self.attracts {
                links.withdraw();
            }
            drop(plane);
            sandbox.destroy();
            stdio.finish();
        }
        if let Some(Surroundings { sandbox, .. }) = self.around.take() {
            sandbox.destroy();
        }
    }

    fn finish(mut self) -> anyhow::Result<Job> {
        let reason = match self.outcome.take() {
            Some(Outcome::Running { epoch }) => {
                let prepared = self.prepared.take();
                let Prepared { sandbox, links, plane, stdio } =
                    prepared.ok_or_else(|| anyhow::anyhow!("the job runs without its surroundings"))?;
                let root = sandbox.root_pid();
                let shared = self.shared;
                shared.stdio.send_replace(Some(Arc::clone(&stdio)));
                shared.set_home(self.home.clone());
                shared.tell_running(epoch, root);
                return Ok(Job {
                    shared,
                    sandbox,
                    links,
                    plane,
                    stdio,
                    epoch,
                    announced: Announced::now(),
                    home: self.home.map(|(home, _)| home),
                    lines: Vec::new(),
                });
            }
            Some(Outcome::Refused { reason } | Outcome::Aborted { reason }) => reason,
            None => "the move ended without an outcome".to_owned(),
        };
        tracing::warn!(reason, "the job does not come");
        let name = &self.shared.file.spec.name;
        Err(ApiError::new(ErrorKind::Unavailable, format!("job {name} did not come here: {reason}")).into())
    }
}

fn restore(
    tree: &mut checkpoint::Target,
    image: TreeImage,
    mut sockets: Sockets,
    ends: [OwnedFd; 3],
) -> checkpoint::Result<()> {
    let mut ends = ends.map(Some);
    tree.keep_early(|key| !matches!(key, ExternalKey::Socket(number) if sockets.contains_key(&SocketKey(number))));
    tree.restore(image, &mut |key| {
        let end = match key {
            ExternalKey::Socket(number) => sockets.remove(&SocketKey(number)),
            ExternalKey::Stdio(number) => ends.get_mut(usize::from(number)).and_then(Option::take),
        };
        end.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{key:?} is not in the image, or was asked for twice"))
        })
    })
}

fn realtime_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
