//! The net thread: waits for packets, bytes, calls, timers and commands, and moves what can be moved.
//!
//! A round takes in what has arrived (packets in a batch, then events of socket pairs, then calls), lets the bridge serve
//! every socket that changed, and last hands out packets until the stack has none, so that one acknowledgement and one
//! segment answer for a whole batch.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use netstack::{Checksum, Handled, Instant, RxPacket, Secrets};
use sys::epoll::{Epoll, Events, Interest};
use sys::seccomp::Listener;
use sys::tun::{self, Tun};

use super::bridge::{Bridge, SERVED_A_ROUND, SocketKey};
use super::capture::{Direction, Recorder};
use super::config::NetConfig;
use super::door::Door;
use super::home::{Away, Deputy, Guest, Packet};
use super::lending::{BATCH, Slots};
use super::plane::{Command, Mailbox, NetError, NetImage};
use super::siege::Siege;
use super::spin::{Spin, WINDOW};
use super::spread::Spread;
use super::stack::Stack;
use super::stay::Stay;
use super::stock::Stock;
use super::wire::{Amount, WHOLE, Wire};

const TOKEN_TUN: u64 = u64::MAX;
const TOKEN_LISTENER: u64 = u64::MAX - 1;
const TOKEN_COMMAND: u64 = u64::MAX - 2;
const TOKEN_WIRE: u64 = u64::MAX - 3;
const TOKEN_AWAY: u64 = u64::MAX - 4;
/// Lines to a home have the tokens from here on; there are fewer sockets and lines than numbers between.
const TOKEN_LINES: u64 = 1 << 62;

/// Bytes of packets read in one round before sockets are served: enough to batch, few enough to keep the answer prompt and in
/// the processor's cache.
const BYTES_A_ROUND: usize = 512 << 10;
/// Rounds that may follow one another, while packets wait, before what came in order is acknowledged.
const ROUNDS_A_SERIES: u32 = 4;
/// What a packet counts at least. A round has to take in more acknowledgements than it sends packets, or else they pile up.
const PACKET_WEIGHT: usize = 2 << 10;
/// Packets from this length on are bulk rather than requests and answers.
const BULK_LEN: usize = 8 << 10;

/// Events taken in at once.
const EVENTS_A_ROUND: usize = 256;

/// How the plane begins.
pub(super) enum Start {
    Fresh,
    Thaw(Box<NetImage>, Stock, Option<(Guest, u64)>),
}

/// The state of the net thread.
pub(super) struct Pump {
    bridge: Bridge,
    /// There when the process is elsewhere and only its sockets are here.
    home: Option<Deputy>,
    tun: Tun,
    wire: Option<Wire>,
    epoll: Rc<Epoll>,
    mailbox: Mailbox,
    clock: Clock,
    slots: Slots,
    recorder: Recorder,
    /// Packets for the process's kernel that came to a former home while the process was on its way.
    late_packets: Vec<Packet>,
    spin: Spin,
    spread: Spread,
    stay: Stay,
    door: Door,
    siege: Siege,
    /// A flood was noticed in this round.
    besieged: bool,
    parked: bool,
    tun_readable: bool,
    calls_waiting: bool,
    /// Rounds since acknowledgments of data in order were last sent.
    rounds_held: u32,
    refused_packets: u64,
}

/// The stack's clock: CLOCK_MONOTONIC since the start of the thread.
pub(super) struct Clock(std::time::Instant);

impl Clock {
    fn now(&self) -> Instant {
        Instant::from_nanos(u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

impl Pump {
    pub(super) fn new(
        config: NetConfig,
        start: Start,
        tun: OwnedFd,
        listener: OwnedFd,
        mailbox: Mailbox,
    ) -> Result<(Pump, BTreeMap<SocketKey, OwnedFd>), NetError> {
        if let Err(error) = sys::process::raise_descriptor_limit() {
            tracing::warn!(%error, "can't raise the limit of open descriptors; the job gets fewer connections");
        }
        if let Some(namespace) = &config.namespace {
            sys::netns::enter(namespace.as_fd()).map_err(NetError::io("enter the job's network namespace"))?;
        }
        let slots = Slots::new().map_err(NetError::io("get memory for packets"))?;
        let clock = Clock(std::time::Instant::now());
        let parked = matches!(start, Start::Thaw(..));
        let (epoll, pairs, start) = match start {
            Start::Fresh => (Epoll::new().map_err(NetError::io("make an epoll instance"))?, HashMap::new(), None),
            Start::Thaw(image, stock, home) => {
                let (epoll, pairs) = stock.into_parts();
                (epoll, pairs, Some((image, home)))
            }
        };
        let epoll = Rc::new(epoll);
        let tun = Tun::from(tun);
        let listener = Listener::from(listener);
        if let Err(error) = listener.set_synchronous_wake_up(true) {
            tracing::debug!(%error, "the kernel has no synchronous wake-up for notifications (it came with Linux 6.6)");
        }
        let watch = NetError::io;
        epoll.add(tun.as_fd(), TOKEN_TUN, Interest::IN | Interest::EDGE).map_err(watch("watch the TUN device"))?;
        epoll.add(listener.as_fd(), TOKEN_LISTENER, Interest::IN).map_err(watch("watch the seccomp listener"))?;
        epoll.add(mailbox.wake.as_fd(), TOKEN_COMMAND, Interest::IN).map_err(watch("watch the mailbox"))?;

        let stack_config = config.stack_config();
        let wire = match config.eth0 {
            Some(eth0) => {
                let wire =
                    Wire::new(eth0, config.addresses.clone()).map_err(watch("ask the job's eth0 for its address"))?;
                epoll
                    .add(wire.as_fd(), TOKEN_WIRE, Interest::IN | Interest::EDGE)
                    .map_err(watch("watch the job's eth0"))?;
                Some(wire)
            }
            None => None,
        };

        let mut recorder = Recorder::new(config.site);
        let mut late_packets = Vec::new();
        let (bridge, programs_ends) = match start {
            None => {
                let stack = netstack::Stack::new(stack_config, Secrets(random()?), clock.now());
                (Bridge::new(Stack::here(stack), listener, Rc::clone(&epoll), config.init_pid), BTreeMap::new())
            }
            Some((image, home)) => {
                let NetImage { stack, away, bridge, recordings, packets } = *image;
                if let Some(away) = &away {
                    let lacking = packets.into_iter().filter(|(number, _)| *number >= away.packet());
                    late_packets = lacking.map(|(_, packet)| packet).collect();
                }
                recorder.thaw(recordings);
                let stack = match (stack, away, home) {
                    (Some(stack), ..) => Stack::here(netstack::Stack::thaw(*stack, clock.now(), stack_config)?),
                    (None, Some(image), Some((guest, epoch))) => {
                        let away = Away::new(guest, epoch, image);
                        away.watch(&epoll, TOKEN_AWAY).map_err(watch("watch the line to the job's home"))?;
                        Stack::Away(Box::new(away))
                    }
                    _ => return Err(NetError::NoLine),
                };
                Bridge::thaw(stack, bridge, listener, Rc::clone(&epoll), config.init_pid, pairs)?
            }
        };
        let door = Door::new(clock.now());
        let siege = Siege::new(u64::from_ne_bytes(random()?), clock.now(), &tun);
        let spread = Spread::new(clock.now(), bridge.sockets_made());
        let pump = Pump {
            bridge,
            home: None,
            tun,
            wire,
            epoll,
            mailbox,
            clock,
            slots,
            recorder,
            late_packets,
            spin: Spin::new(),
            spread,
            stay: Stay::default(),
            door,
            siege,
            besieged: false,
            parked,
            tun_readable: true,
            calls_waiting: false,
            rounds_held: 0,
            refused_packets: 0,
        };
        Ok((pump, programs_ends))
    }

    /// Runs until told to stop.
    pub(super) fn run(mut self) {
        let mut events = Events::with_capacity(EVENTS_A_ROUND);
        loop {
            let timeout = self.timeout();
            if let Err(error) = self.wait(&mut events, timeout) {
                tracing::error!(%error, "the net thread can't wait for events any more and ends");
                return;
            }
            let mut commanded = false;
            for event in events.iter() {
                commanded |= event.token == TOKEN_COMMAND;
                self.note(event.token, event.ready);
            }
            // A command acts on a settled state: what has arrived before it is worked off first.
            if !self.parked {
                self.round();
            }
            if commanded && self.handle_commands().is_break() {
                return;
            }
        }
    }

    /// Waits for events, at most for `timeout`.
    fn wait(&mut self, events: &mut Events, timeout: Option<Duration>) -> io::Result<()> {
        if timeout == Some(Duration::ZERO) {
            return self.epoll.wait(events, timeout);
        }
        let begun = std::time::Instant::now();
        if !self.spin.pays() {
            self.epoll.wait(events, timeout)?;
            if !events.is_empty() {
                self.spin.slept(begun.elapsed());
            }
            return Ok(());
        }
        let window = timeout.map_or(WINDOW, |timeout| timeout.min(WINDOW));
        while begun.elapsed() < window {
            self.epoll.wait(events, Some(Duration::ZERO))?;
            if !events.is_empty() {
                self.spin.hit();
                return Ok(());
            }
            std::hint::spin_loop();
        }
        self.spin.missed();
        self.epoll.wait(events, timeout.map(|timeout| timeout.saturating_sub(begun.elapsed())))
    }

    /// Notes what an event says.
    fn note(&mut self, token: u64, ready: Interest) {
        match token {
            TOKEN_TUN => self.tun_readable = true,
            TOKEN_WIRE => self.wire.iter_mut().for_each(|wire| wire.readable = true),
            TOKEN_LISTENER => self.note_listener(ready),
            TOKEN_COMMAND => {}
            TOKEN_AWAY => {
                if let Some(away) = self.bridge.stack.as_away() {
                    away.note_ready();
                }
            }
            line if line >= TOKEN_LINES => {
                if let Some(home) = &mut self.home {
                    home.note_ready(line - TOKEN_LINES);
                }
            }
            key => self.bridge.handle_event(SocketKey(key), ready),
        }
    }

    /// Notes waiting calls; the end of the last process under the filter shows as a hang-up, after which there is nothing
    /// to wait for.
    fn note_listener(&mut self, ready: Interest) {
        if ready.contains(Interest::IN) {
            self.calls_waiting = true;
        } else {
            drop(self.epoll.remove(self.bridge.listener().as_fd()));
        }
    }

    fn round(&mut self) {
        let now = self.clock.now();
        self.bridge.set_now(now);
        if let Some(away) = self.bridge.stack.as_away() {
            away.receive();
            while let Some((header, packet)) = away.poll_packet() {
                self.wire.iter_mut().for_each(|wire| wire.receive(&header, &packet));
            }
        }
        if let (Some(home), Some(stack)) = (&mut self.home, self.bridge.stack.as_here()) {
            home.receive(stack, now);
            while let Some((header, packet)) = home.poll_packet() {
                // A packet that the kernel refuses is a lost packet.
                let _ = self.tun.send(&[IoSlice::new(&header), IoSlice::new(&packet)]);
            }
            if home.is_frozen() {
                home.flush();
                return;
            }
        }
        if self.calls_waiting {
            // Before the packets, since somebody stands still until it is answered. One at a time: what its caller did before,
            // closing a socket say, is among the events that came with it or before it. That need not be so for the next call.
            self.calls_waiting = false;
            self.serve(now);
            self.bridge.handle_next_call();
        }
        if self.tun_readable {
            self.receive_packets();
            self.note_more_packets();
        }
        self.send_from_job(Amount::ARound);
        if self.bridge.stack.poll_timeout().is_some_and(|due| due <= now) {
            self.bridge.stack.handle_timeout(now);
        }
        self.bridge.handle_deadlines();
        self.serve(now);
        loop {
            self.transmit(now);
            // What waited for the last bytes to leave may now be reset; that makes packets again.
            if !self.finish_resets(now) {
                break;
            }
        }
        if self.recorder.is_on() {
            self.recorder.flush();
        }
        // Sending over loopback inside the stack changes sockets without a packet.
        self.serve(now);
        if let Some(away) = self.bridge.stack.as_away() {
            away.transmit();
        }
        self.mind_siege(now);
        self.spread.note_sockets(self.bridge.sockets_made());
        self.spread.turn(now, &self.tun);
        self.stay.turn(now);
    }

    /// Has the kernel keep a flood out, or looks whether it still has to.
    fn mind_siege(&mut self, now: Instant) {
        let Pump { bridge, siege, besieged, tun, .. } = self;
        let due = siege.due().is_some_and(|due| due <= now);
        if !due && !*besieged {
            return;
        }
        let stack = bridge.stack.as_here();
        let flows = stack.as_deref().into_iter().flat_map(|stack| {
            stack.sockets().filter_map(|id| {
                let (local, remote) = stack.tcp_endpoints(id);
                local.zip(remote)
            })
        });
        *besieged = false;
        if due {
            siege.turn(now, tun, flows);
        } else {
            siege.begin(now, tun, flows);
        }
    }

    /// Passes on what the job's kernel has sent, out of the TUN device or to the job's home.
    fn send_from_job(&mut self, amount: Amount) {
        let Pump { bridge, wire, tun, recorder, .. } = self;
        let Some(wire) = wire else { return };
        match bridge.stack.as_away() {
            Some(away) => wire.send_outward(amount, recorder, &mut |header, packet| {
                away.send_packet(header, packet);
                Ok(())
            }),
            None => wire.send_outward(amount, recorder, &mut |header, packet| {
                tun.send(&[IoSlice::new(header), IoSlice::new(packet)])
            }),
        }
    }

    /// Serves the sockets that changed. Much that a program wrote is sent before the next socket is served: it is copied twice,
    /// and the second time it comes out of the processor's cache.
    fn serve(&mut self, now: Instant) {
        if let (Some(home), Some(stack)) = (&mut self.home, self.bridge.stack.as_here()) {
            return home.serve(stack, now);
        }
        for _ in 0..SERVED_A_ROUND {
            let Some(key) = self.bridge.serve_next() else { return };
            self.spin.note_socket(key.0);
            if self.bridge.take_pulled() >= BULK_LEN {
                self.transmit(now);
            }
        }
    }

    fn finish_resets(&mut self, now: Instant) -> bool {
        match (&mut self.home, self.bridge.stack.as_here()) {
            (Some(home), Some(stack)) => home.finish_resets(stack, now),
            _ => self.bridge.finish_resets(),
        }
    }

    fn receive_packets(&mut self) {
        if self.slots.is_short() {
            self.bridge.settle_loans();
        }
        let mut budget = BYTES_A_ROUND;
        while budget > 0 && self.tun_readable {
            let count = self.read_batch(&mut budget);
            (0..count).for_each(|place| self.handle_packet(place));
        }
    }

    /// Reads packets until there is none or the batch is full; returns how many.
    fn read_batch(&mut self, budget: &mut usize) -> usize {
        for place in 0..BATCH {
            match self.tun.receive(self.slots.buffer(place)) {
                Ok(length) => {
                    self.slots.set_length(place, length);
                    *budget = budget.saturating_sub(length.max(PACKET_WEIGHT));
                }
                Err(error) => {
                    self.tun_readable = false;
                    if error.kind() != io::ErrorKind::WouldBlock {
                        tracing::warn!(%error, "can't read the TUN device");
                    }
                    return place;
                }
            }
        }
        BATCH
    }

    /// Takes in one packet of the batch.
    fn handle_packet(&mut self, place: usize) {
        let Pump { bridge, home, wire, slots, recorder, spin, spread, stay, door, besieged, clock, .. } = self;
        let (whole, desk) = slots.packet(place);
        let Some((header_bytes, data)) = whole.split_first_chunk() else {
            return;
        };
        let header = tun::Header::decode(header_bytes);
        let checksum = match header.checksum {
            tun::Checksum::Full => Checksum::Verify,
            tun::Checksum::Partial { .. } | tun::Checksum::Verified => Checksum::Verified,
        };
        let is_bulk = whole.len() >= BULK_LEN;
        if is_bulk {
            spin.note_bulk();
            stay.note_bulk();
        }
        let gso_size = header.segmentation.map(|segmentation| segmentation.size);
        if recorder.is_on() {
            recorder.packet(Direction::In, &[data]);
        }
        if !door.admits(data, || clock.now()) {
            *besieged = true;
            return;
        }
        let handled = bridge.handle_packet(RxPacket { data, checksum, gso_size }, desk);
        if is_bulk && bridge.lends_to_several() {
            spread.note_bulk();
        }
        if handled == Handled::Foreign {
            match (&mut *wire, &mut *home) {
                (Some(wire), _) => wire.receive(header_bytes, data),
                (None, Some(home)) => home.send_packet(header_bytes, data),
                (None, None) => {}
            }
        }
        while let Some(packet) = bridge.stack.poll_foreign() {
            match (&mut *wire, &mut *home) {
                (Some(wire), _) => wire.receive(&WHOLE, &packet),
                (None, Some(home)) => home.send_packet(&WHOLE, &packet),
                (None, None) => {}
            }
        }
        slots.advance(place);
    }

    /// Tells the stack whether there are more packets to take in, which is the next thing to happen then. After some rounds
    /// it is told that there are none, so that a sender among many isn't kept waiting by the others.
    fn note_more_packets(&mut self) {
        self.rounds_held = if self.tun_readable { (self.rounds_held + 1) % ROUNDS_A_SERIES } else { 0 };
        if let Some(stack) = self.bridge.stack.as_here() {
            stack.set_more_queued(self.rounds_held > 0);
        }
    }

    fn transmit(&mut self, now: Instant) {
        while let Some(packet) = self.bridge.stack.poll_transmit(now) {
            if self.recorder.is_on() {
                self.recorder.packet(Direction::Out, &[packet.header, packet.payload[0], packet.payload[1]]);
            }
            if packet.payload[0].len() >= BULK_LEN {
                self.spin.note_bulk();
                self.spread.note_bulk();
            }
            self.besieged |= self.siege.note_sent(now, packet.header);
            let header = tun::Header {
                checksum: packet.checksum.map_or(tun::Checksum::Full, |checksum| tun::Checksum::Partial {
                    start: checksum.start,
                    offset: checksum.offset,
                }),
                segmentation: packet.gso.map(|gso| tun::Segmentation {
                    size: gso.size,
                    header_len: gso.header_len,
                    v6: gso.v6,
                    ecn: gso.ecn,
                }),
            }
            .encode();
            let slices = [
                IoSlice::new(&header),
                IoSlice::new(packet.header),
                IoSlice::new(packet.payload[0]),
                IoSlice::new(packet.payload[1]),
            ];
            // A packet that the kernel refuses is a lost packet, and TCP copes; it must only not go unnoticed.
            if let Err(error) = self.tun.send(&slices) {
                if self.refused_packets.is_power_of_two() || self.refused_packets == 0 {
                    tracing::warn!(%error, count = self.refused_packets + 1, "the TUN device refuses packets");
                }
                self.refused_packets += 1;
            }
        }
    }

    /// How long to sleep; `None` is until something happens.
    fn timeout(&mut self) -> Option<Duration> {
        if self.parked {
            return None;
        }
        let home_works = match &self.home {
            Some(home) if home.is_frozen() => return if home.has_work() { Some(Duration::ZERO) } else { None },
            Some(home) => home.has_work(),
            None => self.bridge.stack.as_away().is_some_and(|away| away.has_work()),
        };
        let from_job = self.wire.as_ref().is_some_and(|wire| wire.readable);
        if self.tun_readable || from_job || self.bridge.has_work() || home_works {
            return Some(Duration::ZERO);
        }
        let due = [self.bridge.stack.poll_timeout(), self.bridge.next_deadline(), self.siege.due()];
        let due = due.into_iter().flatten().min()?;
        Some(due.since(self.clock.now()))
    }

    fn handle_commands(&mut self) -> std::ops::ControlFlow<()> {
        self.mailbox.wake.clear();
        while let Ok(command) = self.mailbox.commands.try_recv() {
            match command {
                Command::Park(answer) => {
                    self.park();
                    let _ = answer.send(());
                }
                Command::Tell { keys, anew, answer } => {
                    if anew {
                        self.bridge.forget_told();
                    }
                    let _ = answer.send(self.bridge.tell(&keys));
                }
                Command::Freeze { stays, untold, answer } => {
                    self.park();
                    drop(answer.send(self.freeze(stays, untold)));
                }
                Command::BecomeHome { epoch, board, answer } => {
                    let ids = self.bridge.ids();
                    self.bridge.leave();
                    // The calls of the process are heard where it is.
                    drop(self.epoll.remove(self.bridge.listener().as_fd()));
                    self.wire = None;
                    self.home = Some(Deputy::new(epoch, ids.into_iter(), Rc::clone(&self.epoll), board));
                    self.unpark();
                    let _ = answer.send(());
                }
                Command::AddLine { line, visitor, answer } => {
                    if let Some(home) = &mut self.home {
                        home.add_line(line, visitor, |line| TOKEN_LINES + line);
                    }
                    let _ = answer.send(());
                }
                Command::Abandon(reason) => {
                    let now = self.clock.now();
                    if let (Some(home), Some(stack)) = (&mut self.home, self.bridge.stack.as_here()) {
                        home.abandon(reason, stack, now);
                        self.round();
                    }
                }
                Command::Resume(answer) => {
                    self.unpark();
                    let _ = answer.send(());
                }
                Command::Retire(answer) => {
                    self.park();
                    // The device outlives the thread, which from here on only waits for its end.
                    match self.tun.as_fd().try_clone_to_owned() {
                        Ok(tun) => drop(answer.send(tun)),
                        Err(error) => tracing::error!(%error, "can't hand the TUN device over"),
                    }
                    self.recorder.end();
                }
                Command::Record { number, snap_length, answer } => {
                    drop(answer.send(self.recorder.claim(number, snap_length)));
                }
                Command::Describe(answer) => drop(answer.send(self.bridge.describe())),
                Command::Keys(answer) => drop(answer.send(self.bridge.descriptor_keys())),
                Command::IsQuiet(answer) => {
                    let quiet = self.home.as_ref().is_none_or(|home| !home.has_work()) && self.bridge.is_quiet();
                    let _ = answer.send(quiet);
                }
                Command::Stop => return std::ops::ControlFlow::Break(()),
            }
        }
        std::ops::ControlFlow::Continue(())
    }

    fn freeze(&mut self, stays: bool, untold: bool) -> Result<NetImage, NetError> {
        let now = self.clock.now();
        self.bridge.set_now(now);
        self.note_all().map_err(NetError::io("ask for what happened to the sockets"))?;
        let untold = untold && !stays;
        let bridge = self.bridge.freeze(untold)?;
        let stack = match (stays, untold) {
            (true, _) => None,
            (false, true) => self.bridge.stack.freeze_untold(now),
            (false, false) => self.bridge.stack.freeze(now),
        };
        let away = if stack.is_none() { Some(self.bridge.stack.away_image(&self.bridge.ids())?) } else { None };
        let packets = self.home.as_ref().map(Deputy::kept_packets).unwrap_or_default();
        Ok(NetImage { stack, away, bridge, recordings: self.recorder.freeze(), packets })
    }

    /// Notes all that has happened so far.
    fn note_all(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS_A_ROUND);
        loop {
            self.epoll.wait(&mut events, Some(Duration::ZERO))?;
            for event in events.iter() {
                self.note(event.token, event.ready);
            }
            // What is reported again and again, as a command is, must not keep us here.
            if events.iter().count() < EVENTS_A_ROUND {
                return Ok(());
            }
        }
    }

    /// Stops listening to everything but commands. Level-triggered events would otherwise spin.
    fn park(&mut self) {
        if !self.parked {
            self.parked = true;
            // It is on its way already.
            self.send_from_job(Amount::Everything);
            drop(self.epoll.modify(self.bridge.listener().as_fd(), TOKEN_LISTENER, Interest::empty()));
        }
    }

    fn unpark(&mut self) {
        if self.parked {
            self.parked = false;
            self.tun_readable = true;
            if let Some(wire) = &mut self.wire {
                wire.readable = true;
                self.late_packets.drain(..).for_each(|(header, packet)| wire.receive(&header, &packet));
            }
            drop(self.epoll.modify(self.bridge.listener().as_fd(), TOKEN_LISTENER, Interest::IN));
            let now = self.clock.now();
            self.bridge.set_now(now);
            if let Some(away) = self.bridge.stack.as_away() {
                away.activate();
            }
            if let Some(home) = &mut self.home {
                home.thaw();
            }
            // What happened to the pairs meanwhile was noted; the first round, in a moment, serves it.
            self.bridge.enqueue_busy();
        }
    }
}

fn random<const LEN: usize>() -> Result<[u8; LEN], NetError> {
    use std::io::Read;
    let mut bytes = [0; LEN];
    let fill = |bytes: &mut [u8]| std::fs::File::open("/dev/urandom")?.read_exact(bytes);
    fill(&mut bytes).map_err(NetError::io("read /dev/urandom"))?;
    Ok(bytes)
}
