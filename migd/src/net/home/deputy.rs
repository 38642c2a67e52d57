//! The home's end of the lines: the stack goes on here for a process that is elsewhere.
//!
//! At most one line is *active*: the one to the node that the directory's owner is on. Others are there while a move is under way,
//! and wait until their node has become the owner or has gone. Received bytes are only copied to the active line; they
//! stay in the stack until the other end has handed them over, so that another line can take its place at any moment.
//!
//! A move that brings the sockets along stops the stack here. It goes on when that move came to nothing, which only the process's
//! present node, or the directory, can know.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use netstack::{Instant, SocketId, Stack, State};
use sys::epoll::{Epoll, Interest};
use sys::tun;

use super::frame::{Answer, Call, DATA_MAX, Frame, Look, PAYLOAD_MAX, Report};
use super::kept::Kept;
use super::line::{Line, PACKETS_MAX, Packet};
use super::socket_image;
use super::state::{Board, HomeState, LineId, Visitor};

/// Bytes read from a line in one round.
const READ_A_ROUND: u64 = 4 << 20;
/// Room is told in such steps, in bytes, unless there is none left.
const ROOM_STEP: u64 = 32 << 10;
const ROOM_STEP_LAST: u64 = 8 << 10;
/// Tokens of lines begin here.
const FIRST_TOKEN: u64 = 1;

/// See the module's documentation.
pub(in crate::net) struct Deputy {
    seats: HashMap<SocketId, Seat>,
    stations: BTreeMap<LineId, Station>,
    active: Option<LineId>,
    /// The owner's epoch, as far as it is known here.
    epoch: u64,
    /// Who has the stack's image, and under which epoch it may go on there.
    frozen: Option<(LineId, Visitor)>,
    next_line: LineId,
    /// Sockets of which something may have to be told, each once.
    queue: VecDeque<SocketId>,
    queued: HashSet<SocketId>,
    /// Sockets with bytes that the active line had no room for.
    crowded: Vec<SocketId>,
    resets: Vec<SocketId>,
    /// Packets of the process's kernel, to leave.
    packets: VecDeque<Packet>,
    /// Those for it.
    kept: Kept,
    epoll: Rc<Epoll>,
    board: Board,
    /// Bytes of programs that passed, to the process and from it.
    relayed: (u64, u64),
}

/// A socket that the process has.
#[derive(Default)]
struct Seat {
    /// How many of the readable bytes the active line has been given.
    given: usize,
    received: u64,
    upto: u64,
    told: Option<Look>,
}

struct Station {
    line: Line,
    visitor: Visitor,
}

impl Deputy {
    /// A deputy for the sockets `ids` of a process that is leaving under `epoch`.
    pub(in crate::net) fn new(
        epoch: u64,
        ids: impl Iterator<Item = SocketId>,
        epoll: Rc<Epoll>,
        board: Board,
    ) -> Deputy {
        Deputy {
            seats: ids.map(|id| (id, Seat::default())).collect(),
            stations: BTreeMap::new(),
            active: None,
            epoch,
            frozen: None,
            next_line: FIRST_TOKEN,
            queue: VecDeque::new(),
            queued: HashSet::new(),
            crowded: Vec::new(),
            resets: Vec::new(),
            packets: VecDeque::new(),
            kept: Kept::default(),
            epoll,
            board,
            relayed: (0, 0),
        }
    }

    /// A node that wants to have the process has connected. `token` makes the line's events known by its number.
    pub(in crate::net) fn add_line(&mut self, fd: OwnedFd, visitor: Visitor, token: impl Fn(LineId) -> u64) {
        let id = self.next_line;
        self.next_line += 1;
        let line = Line::new(fd);
        let interest = Interest::IN | Interest::OUT | Interest::READ_HANG_UP | Interest::EDGE;
        if let Err(error) = self.epoll.add(line.as_fd(), token(id), interest) {
            tracing::error!(%error, node = visitor.node.name, "can't watch the line to a node");
            return;
        }
        tracing::info!(node = visitor.node.name, epoch = visitor.epoch, "a line from a node");
        self.stations.insert(id, Station { line, visitor });
        self.report();
    }

    pub(in crate::net) fn note_ready(&mut self, line: LineId) {
        if let Some(station) = self.stations.get_mut(&line) {
            station.line.note_ready();
        }
    }

    /// Whether the stack stands still for a move.
    pub(in crate::net) fn is_frozen(&self) -> bool {
        self.frozen.is_some()
    }

    /// Whether there is something to do without waiting.
    pub(in crate::net) fn has_work(&self) -> bool {
        let readable = self.stations.values().any(|station| station.line.is_readable());
        readable || self.frozen.is_none() && (!self.queue.is_empty() || !self.resets.is_empty())
    }

    /// Takes in what the lines brought.
    pub(in crate::net) fn receive(&mut self, stack: &mut Stack, now: Instant) {
        let ids: Vec<LineId> = self.stations.keys().copied().collect();
        for id in ids {
            self.receive_from(id, stack, now);
        }
    }

    fn receive_from(&mut self, id: LineId, stack: &mut Stack, now: Instant) {
        // Out of the table, so that its frames can be handled while the rest of us changes.
        let Some(mut station) = self.stations.remove(&id) else {
            return;
        };
        let before = station.line.totals().1;
        let mut keep = true;
        while keep && station.line.fill() {
            keep = self.work_off(id, &mut station, stack, now);
            if station.line.totals().1 - before > READ_A_ROUND {
                break;
            }
        }
        match station.line.ended() {
            Some(reason) if keep => {
                let reason = reason.to_owned();
                self.lose(id, &station.visitor, &reason, stack, now);
            }
            None if keep => drop(self.stations.insert(id, station)),
            _ => {}
        }
        self.report();
    }

    /// Handles the frames that are here. False when the line has served its purpose.
    fn work_off(&mut self, id: LineId, station: &mut Station, stack: &mut Stack, now: Instant) -> bool {
        let Station { line, visitor } = station;
        loop {
            let frame = match line.incoming.next() {
                None => return true,
                Some(Ok(frame)) => frame,
                Some(Err(error)) => {
                    line.end(error.to_string());
                    return true;
                }
            };
            let active = self.active == Some(id);
            match frame {
                Frame::Activate { epoch, packet } => {
                    if self.activate(id, epoch, visitor) {
                        for (number, (header, packet)) in self.kept.since(packet) {
                            line.outgoing.push_packet(number, header, packet);
                        }
                    }
                }
                Frame::Inherit { epoch } => {
                    tracing::info!(node = visitor.node.name, epoch, "the sockets have followed the process");
                    self.board.set(HomeState::Inherited { node: visitor.node.clone(), epoch });
                    return false;
                }
                Frame::Resume if active => self.thaw(),
                Frame::Call { number, call: Call::Image { epoch, packet } } => {
                    let guest = (id, Visitor { node: visitor.node.clone(), epoch });
                    let answer = self.freeze(guest, packet, stack, now, line);
                    line.outgoing.push(&Frame::Answer { number, answer: Box::new(answer) });
                }
                Frame::Call { number, call: Call::Finish } if active => {
                    line.outgoing.push(&Frame::Answer { number, answer: Box::new(Answer::of(Ok(()))) });
                    self.finish(stack, now);
                }
                Frame::Call { number, call: Call::Report } if active => {
                    let report = |&id: &SocketId| Report {
                        id,
                        look: Look::of(&stack.status(id)),
                        info: stack.tcp_info(now, id),
                    };
                    let reports: Vec<Report> = self.seats.keys().map(report).collect();
                    let reports = rmp_serde::to_vec_named(&reports).unwrap_or_default();
                    reports.chunks(PAYLOAD_MAX).for_each(|bytes| line.outgoing.push(&Frame::Piece { bytes }));
                    line.outgoing.push(&Frame::Answer { number, answer: Box::new(Answer::of(Ok(()))) });
                }
                Frame::Call { number, call: Call::Accept { id } } if active => {
                    let answer = self.accept(id, stack, now, line);
                    line.outgoing.push(&Frame::Answer { number, answer: Box::new(answer) });
                }
                // A line that isn't active any more says nothing that counts.
                _ if !active => {}
                Frame::Call { number, call } => {
                    let answer = self.answer(call, stack, now);
                    line.outgoing.push(&Frame::Answer { number, answer: Box::new(answer) });
                }
                Frame::Data { id, bytes } => self.take_data(id, bytes, stack, now),
                Frame::Packet { number: _, header, packet } if self.packets.len() < PACKETS_MAX => {
                    self.relayed.1 += packet.len() as u64;
                    self.packets.push_back((header, packet.to_vec()));
                }
                Frame::Packet { .. } => {}
                Frame::Taken { id, count } => self.note_taken(id, count, stack, now),
                Frame::Shutdown { id, how } if self.seats.contains_key(&id) => {
                    let _ = stack.tcp_shutdown(now, id, how);
                }
                Frame::Close { id } if self.seats.remove(&id).is_some() => stack.tcp_close(now, id),
                Frame::Abort { id } if self.seats.remove(&id).is_some() => self.resets.push(id),
                Frame::ErrorTaken { id } if self.seats.contains_key(&id) => {
                    stack.take_error(id);
                    if let Some(told) = self.seats.get_mut(&id).and_then(|seat| seat.told.as_mut()) {
                        told.error = None;
                    }
                }
                // About a socket that is gone.
                Frame::Shutdown { .. } | Frame::Close { .. } | Frame::Abort { .. } | Frame::ErrorTaken { .. } => {}
                Frame::Room { .. }
                | Frame::Look { .. }
                | Frame::Answer { .. }
                | Frame::Piece { .. }
                | Frame::Resume => {
                    line.end("it said what only a home says");
                    return true;
                }
            }
        }
    }

    /// The process is at the other end of this line now, unless that is not so any more.
    fn activate(&mut self, id: LineId, epoch: u64, visitor: &Visitor) -> bool {
        if epoch <= self.epoch && self.active.is_some() {
            tracing::warn!(epoch, node = visitor.node.name, "a line of a former owner says it is active");
            return false;
        }
        tracing::info!(epoch, node = visitor.node.name, "the process runs there");
        if let Some(former) = self.active.replace(id).filter(|former| *former != id) {
            self.stations.remove(&former);
        }
        self.epoch = epoch;
        self.frozen = None;
        self.crowded.clear();
        for seat in self.seats.values_mut() {
            *seat = Seat::default();
        }
        let ids: Vec<SocketId> = self.seats.keys().copied().collect();
        for id in ids {
            self.note_change(id);
        }
        self.board.set(HomeState::Serving { node: visitor.node.clone(), epoch });
        true
    }

    /// The last packets for the process's kernel, with their numbers.
    pub(in crate::net) fn kept_packets(&self) -> Vec<(u64, Packet)> {
        self.kept.since(0).map(|(number, packet)| (number, packet.clone())).collect()
    }

    fn freeze(
        &mut self,
        guest: (LineId, Visitor),
        packet: u64,
        stack: &Stack,
        now: Instant,
        line: &mut Line,
    ) -> Answer {
        let epoch = guest.1.epoch;
        if epoch <= self.epoch {
            let refusal = format!("epoch {epoch} is not after {}", self.epoch);
            return Answer { refusal: Some(refusal), ..Answer::of(Ok(())) };
        }
        match codec::to_vec(&stack.freeze(now)) {
            Ok(image) => {
                self.frozen = Some(guest);
                for (number, (header, packet)) in self.kept.since(packet) {
                    line.outgoing.push(&Frame::Packet { number, header: *header, packet });
                }
                image.chunks(PAYLOAD_MAX).for_each(|bytes| line.outgoing.push(&Frame::Piece { bytes }));
                Answer::of(Ok(()))
            }
            Err(error) => Answer { refusal: Some(error.to_string()), ..Answer::of(Ok(())) },
        }
    }

    /// The move that stopped the stack came to nothing.
    pub(in crate::net) fn thaw(&mut self) {
        if let Some((_, guest)) = self.frozen.take() {
            tracing::info!(node = guest.node.name, "the move that was to bring the sockets along was given up");
            self.report();
        }
    }

    fn finish(&mut self, stack: &mut Stack, now: Instant) {
        tracing::info!("the job has ended");
        for (id, _) in self.seats.drain() {
            stack.tcp_close(now, id);
        }
        self.board.set(HomeState::Finished);
    }

    /// A line is gone without having said that it served its purpose.
    fn lose(&mut self, id: LineId, visitor: &Visitor, reason: &str, stack: &mut Stack, now: Instant) {
        if self.board.is_over() {
            return;
        }
        tracing::warn!(node = visitor.node.name, reason, "the line to a node ended");
        if self.active == Some(id) {
            self.active = None;
        }
        if self.active.is_some() || !self.stations.is_empty() || self.frozen.is_some() {
            // Somebody is there who has the process, or may yet.
            return;
        }
        let reason = format!("the line to node {} ended: {reason}", visitor.node.name);
        self.abandon(reason, stack, now);
    }

    /// Nobody has the process any more, or it can't be reached: its peers are told.
    pub(in crate::net) fn abandon(&mut self, reason: String, stack: &mut Stack, now: Instant) {
        tracing::error!(reason, "the process is lost to its home; its connections are reset");
        self.frozen = None;
        for (id, _) in self.seats.drain() {
            stack.tcp_abort(now, id);
        }
        self.board.set(HomeState::Lost { reason });
    }

    /// The next packet to leave.
    pub(in crate::net) fn poll_packet(&mut self) -> Option<Packet> {
        self.packets.pop_front()
    }

    /// A packet for the process's kernel.
    pub(in crate::net) fn send_packet(&mut self, header: &[u8; tun::HEADER_LEN], packet: &[u8]) {
        let number = self.kept.keep(header, packet);
        if let Some(station) = self.active.and_then(|active| self.stations.get_mut(&active)) {
            self.relayed.0 += packet.len() as u64;
            station.line.outgoing.push_packet(number, header, packet);
        }
    }

    fn report(&self) {
        let gone = self.frozen.as_ref().filter(|(id, _)| !self.stations.contains_key(id));
        self.board.note(gone.map(|(_, guest)| guest), self.active.is_some(), self.relayed);
    }

    fn answer(&mut self, call: Call, stack: &mut Stack, now: Instant) -> Answer {
        let about = |id: SocketId, result, stack: &Stack| Answer {
            socket: Some(socket_image(stack, id)),
            ..Answer::of(result)
        };
        match call {
            Call::Open => {
                let id = stack.tcp_open();
                self.seats.insert(id, Seat::default());
                self.note_change(id);
                about(id, Ok(()), stack)
            }
            Call::Bind { id, address, reuse } => about(id, stack.tcp_bind(id, address, reuse), stack),
            Call::Listen { id, backlog } => about(id, stack.tcp_listen(now, id, backlog), stack),
            Call::Connect { id, remote } => about(id, stack.tcp_connect(now, id, remote), stack),
            Call::Set { id, option } => about(id, stack.tcp_set(now, id, option), stack),
            Call::Inform { id } => Answer {
                look: Some(Look::of(&stack.status(id))),
                info: Some(stack.tcp_info(now, id)),
                ..Answer::of(Ok(()))
            },
            Call::Accept { .. } | Call::Settle | Call::Report | Call::Finish | Call::Image { .. } => Answer::of(Ok(())),
        }
    }

    /// How many more wait is told ahead of the answer and not in it: the line's order then says which of two such words is the later.
    fn accept(&mut self, id: SocketId, stack: &mut Stack, now: Instant, line: &mut Line) -> Answer {
        let accepted = stack.tcp_accept(now, id);
        if let Some(accepted) = accepted {
            self.seats.insert(accepted, Seat::default());
            self.note_change(accepted);
        }
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.look(id, Look::of(&stack.status(id)), line);
        }
        Answer { socket: accepted.map(|accepted| socket_image(stack, accepted)), ..Answer::of(Ok(())) }
    }

    fn take_data(&mut self, id: SocketId, bytes: &[u8], stack: &mut Stack, now: Instant) {
        let Some(seat) = self.seats.get_mut(&id) else {
            return;
        };
        seat.received += bytes.len() as u64;
        self.relayed.1 += bytes.len() as u64;
        let mut rest = bytes;
        while !rest.is_empty() {
            let sent = stack.tcp_send_with(now, id, |parts| {
                let mut done = 0;
                for part in parts {
                    let count = part.len().min(rest.len() - done);
                    part[..count].copy_from_slice(&rest[done..done + count]);
                    done += count;
                }
                done
            });
            match sent {
                Ok(0) => {
                    // The room was given before it shrank.
                    let _ = stack.tcp_send_over(now, id, rest);
                    break;
                }
                Ok(count) => rest = &rest[count..],
                // The connection takes nothing any more; how it stands is told.
                Err(_) => break,
            }
        }
        self.note_change(id);
    }

    fn note_taken(&mut self, id: SocketId, count: u64, stack: &mut Stack, now: Instant) {
        let Some(seat) = self.seats.get_mut(&id) else {
            return;
        };
        let count = usize::try_from(count).unwrap_or(usize::MAX).min(seat.given);
        let taken = stack.tcp_recv_with(now, id, |_| count).unwrap_or(0);
        seat.given -= taken;
    }

    pub(in crate::net) fn note_change(&mut self, id: SocketId) {
        if self.queued.insert(id) {
            self.queue.push_back(id);
        }
    }

    /// Tells the process's node what changed.
    pub(in crate::net) fn serve(&mut self, stack: &mut Stack, now: Instant) {
        while let Some(id) = stack.poll_changed() {
            self.note_change(id);
        }
        let Some(station) = self.active.and_then(|active| self.stations.get_mut(&active)) else {
            // Whoever comes next is told everything.
            self.queue.clear();
            self.queued.clear();
            return;
        };
        let line = &mut station.line;
        while let Some(id) = self.queue.pop_front() {
            self.queued.remove(&id);
            if let Some(seat) = self.seats.get_mut(&id)
                && !seat.tell(id, stack, now, line, &mut self.relayed.0)
            {
                self.crowded.push(id);
            }
        }
        line.flush();
        if line.outgoing.has_room() {
            for id in std::mem::take(&mut self.crowded) {
                self.note_change(id);
            }
        }
    }

    /// Writes what waits for the other lines; the active one's is written in [`Deputy::serve`].
    pub(in crate::net) fn flush(&mut self) {
        for station in self.stations.values_mut() {
            station.line.flush();
        }
    }

    /// Resets the connections whose last bytes are out; true when there were any.
    pub(in crate::net) fn finish_resets(&mut self, stack: &mut Stack, now: Instant) -> bool {
        let any = !self.resets.is_empty();
        for id in self.resets.drain(..) {
            stack.tcp_abort(now, id);
        }
        any
    }
}

impl Seat {
    /// Says what there is to say of the socket; bytes first, so that what follows them is never known before. False when the
    /// line is full.
    fn tell(&mut self, id: SocketId, stack: &mut Stack, now: Instant, line: &mut Line, relayed: &mut u64) -> bool {
        let status = stack.status(id);
        while self.given < status.readable {
            if !line.outgoing.has_room() {
                line.flush();
                if !line.outgoing.has_room() {
                    return false;
                }
            }
            let given = self.given;
            let mut count = 0;
            // Looked at, not taken.
            let _ = stack.tcp_recv_with(now, id, |[first, second]| {
                let (first, second) = if given < first.len() {
                    (&first[given..], second)
                } else {
                    (&second[given - first.len()..], &[][..])
                };
                let first = &first[..first.len().min(DATA_MAX)];
                let second = &second[..second.len().min(DATA_MAX - first.len())];
                line.outgoing.push_data(id, [first, second]);
                count = first.len() + second.len();
                0
            });
            if count == 0 {
                break;
            }
            self.given += count;
            *relayed += count as u64;
        }
        self.look(id, Look::of(&status), line);
        if matches!(status.state, State::Established | State::CloseWait) {
            let upto = self.received + status.send_space as u64;
            let left = self.upto.saturating_sub(self.received);
            let idle = status.unsent + status.unacked == 0;
            let grown = upto.saturating_sub(self.upto);
            if grown >= ROOM_STEP || grown > 0 && left == 0 && (grown >= ROOM_STEP_LAST || idle) {
                self.upto = upto;
                line.outgoing.push(&Frame::Room { id, upto });
            }
        }
        true
    }

    /// Tells how the socket stands, unless that was told.
    fn look(&mut self, id: SocketId, look: Look, line: &mut Line) {
        if self.told.is_none_or(|told| !told.same_to_program(&look)) {
            self.told = Some(look);
            line.outgoing.push(&Frame::Look { id, look });
        }
    }
}
