//! The process's end of a line: a stack that is on another node.
//!
//! What a program does not wait for goes out as it comes (bytes, closes); what has a result waits for the answer, which is one way
//! there and back. What received bytes there are is a copy: the home's stack holds them until they were handed to the
//! program, so nothing of them has to travel when the process moves on, and the peer's window is as the program reads.
//!
//! When the line is lost every connection is reset as far as the program can see, and calls fail with ENETUNREACH.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant as Time};

use netstack::{Reuse, Shutdown, SocketError, SocketId, State, Status, TcpInfo, TcpOption, TcpOptions};
use serde::{Deserialize, Serialize};
use sys::epoll::{Epoll, Interest};
use sys::tun;

use super::fetch::Guest;
use super::frame::{Answer, Call, DATA_MAX, Frame, Look, Report, SocketImage};
use super::line::{Line, PACKETS_MAX, Packet};
use super::state::LineBoard;
use crate::net::plane::NetError;

type Result<T> = std::result::Result<T, SocketError>;

/// How long an answer may take before the home is given up. A home whose machine died is noticed by this.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Bytes read from the line before sockets are served.
const READ_A_ROUND: usize = 4 << 20;

/// The sockets of a job whose stack is at its home: what its new node has to know of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AwayImage {
    sockets: Vec<SocketImage>,
    /// The number of the home's first packet that the job's kernel hasn't had.
    #[serde(default)]
    packet: u64,
}

impl AwayImage {
    /// The number of the home's first packet that the job's kernel hasn't had.
    #[must_use]
    pub fn packet(&self) -> u64 {
        self.packet
    }

    pub(in crate::net) fn of_stack(stack: &netstack::Stack, ids: impl Iterator<Item = SocketId>) -> AwayImage {
        AwayImage { sockets: ids.map(|id| super::socket_image(stack, id)).collect(), packet: 0 }
    }
}

/// See the module's documentation.
pub(in crate::net) struct Away {
    line: Line,
    board: LineBoard,
    /// The epoch under which the process is here.
    epoch: u64,
    active: bool,
    /// Why the line is of no use any more.
    lost: Option<String>,
    sockets: HashMap<SocketId, Socket>,
    /// Sockets that changed, each once.
    changed: VecDeque<SocketId>,
    queued: HashSet<SocketId>,
    /// Sockets of which bytes were taken since the last report.
    takers: Vec<SocketId>,
    /// Sockets that were asked for room when the line was full.
    blocked: RefCell<Vec<SocketId>>,
    /// Packets that are no TCP, for the job's kernel, with their numbers.
    packets: VecDeque<(u64, Packet)>,
    /// The number of the first that it hasn't had.
    packet: u64,
    /// What comes before an answer that is too long for one frame.
    pieces: Vec<u8>,
    next_call: u64,
    finished: bool,
    scratch: Box<[u8]>,
    default_options: TcpOptions,
}

struct Socket {
    local: Option<SocketAddr>,
    remote: Option<SocketAddr>,
    options: TcpOptions,
    look: Look,
    info: TcpInfo,
    /// The home has told everything of it since the line was activated.
    settled: bool,
    received: VecDeque<u8>,
    /// Bytes taken and not yet reported.
    taken: u64,
    /// Bytes sent, and how many may be sent in all.
    sent: u64,
    upto: u64,
}

impl Socket {
    fn new(image: SocketImage) -> Socket {
        let SocketImage { id: _, state, local, remote, options, acceptable } = image;
        let look = Look { state, peer_closed: false, acceptable, error: None, unsent: 0, unacked: 0 };
        Socket {
            local,
            remote,
            options,
            look,
            info: TcpInfo::default(),
            settled: false,
            received: VecDeque::new(),
            taken: 0,
            sent: 0,
            upto: 0,
        }
    }

    fn update(&mut self, image: SocketImage) {
        // How many wait is the home's to tell by looks, which it gives when they differ from the last.
        let SocketImage { id: _, state, local, remote, options, acceptable: _ } = image;
        self.local = local;
        self.remote = remote;
        self.options = options;
        // A connection's further states follow its bytes; until there is one, a call's answer is what counts.
        if self.look.state == State::Closed && self.look.error.is_none() {
            self.look.state = state;
        }
    }

    fn can_send(&self) -> bool {
        matches!(self.look.state, State::Established | State::CloseWait | State::SynSent | State::SynReceived)
    }

    fn room(&self) -> usize {
        if matches!(self.look.state, State::Established | State::CloseWait) {
            usize::try_from(self.upto.saturating_sub(self.sent)).unwrap_or(usize::MAX)
        } else {
            0
        }
    }
}

impl Away {
    /// A stack at the other end of the line, under this epoch. Nothing is said before [`Away::activate`].
    pub(in crate::net) fn new(guest: Guest, epoch: u64, image: AwayImage) -> Away {
        let (fd, board) = guest.into_parts();
        let sockets = image.sockets.into_iter().map(|socket| (socket.id, Socket::new(socket))).collect();
        Away {
            line: Line::new(fd),
            board,
            epoch,
            active: false,
            lost: None,
            sockets,
            changed: VecDeque::new(),
            queued: HashSet::new(),
            takers: Vec::new(),
            blocked: RefCell::default(),
            packets: VecDeque::new(),
            packet: image.packet,
            pieces: Vec::new(),
            next_call: 0,
            finished: false,
            scratch: vec![0; DATA_MAX].into_boxed_slice(),
            default_options: TcpOptions::default(),
        }
    }

    pub(in crate::net) fn watch(&self, epoll: &Epoll, token: u64) -> std::io::Result<()> {
        epoll.add(self.line.as_fd(), token, Interest::IN | Interest::OUT | Interest::READ_HANG_UP | Interest::EDGE)
    }

    /// The line may be read or written again.
    pub(in crate::net) fn note_ready(&mut self) {
        self.line.note_ready();
    }

    /// Tells the home that the process is here; once, after the change of owner.
    pub(in crate::net) fn activate(&mut self) {
        if !self.active {
            self.active = true;
            self.line.outgoing.push(&Frame::Activate { epoch: self.epoch, packet: self.packet });
        } else {
            // A move on from here was given up: should the home have stopped for it, it goes on.
            self.line.outgoing.push(&Frame::Resume);
        }
    }

    /// Why the home is lost.
    pub(in crate::net) fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    /// Whether there is something to read or to report without waiting.
    pub(in crate::net) fn has_work(&self) -> bool {
        self.active && self.lost.is_none() && (self.line.is_readable() || !self.takers.is_empty())
    }

    /// Takes in what has come.
    pub(in crate::net) fn receive(&mut self) {
        if !self.active {
            return;
        }
        let before = self.line.totals().1;
        while self.line.fill() {
            self.work_off(None);
            if self.line.totals().1 - before > READ_A_ROUND as u64 {
                break;
            }
        }
        self.note_end();
    }

    /// Sends what has gathered.
    pub(in crate::net) fn transmit(&mut self) {
        if !self.active {
            return;
        }
        self.report_taken();
        self.line.flush();
        self.board.note(self.line.totals(), None);
        if self.line.outgoing.has_room() {
            for id in self.blocked.take() {
                self.note_change(id);
            }
        }
        self.note_end();
    }

    fn report_taken(&mut self) {
        for id in self.takers.drain(..) {
            if let Some(socket) = self.sockets.get_mut(&id) {
                let count = std::mem::take(&mut socket.taken);
                self.line.outgoing.push(&Frame::Taken { id, count });
            }
        }
    }

    /// Handles the frames that are here; returns the answer that is waited for, if it is among them.
    fn work_off(&mut self, awaited: Option<u64>) -> Option<Answer> {
        let mut found = None;
        loop {
            match self.line.incoming.next() {
                None => return found,
                Some(Ok(frame)) => {
                    let changed = match frame {
                        Frame::Data { id, bytes } => self.sockets.get_mut(&id).map(|socket| {
                            socket.received.extend(bytes);
                            id
                        }),
                        Frame::Packet { number, header, packet } => {
                            if self.packets.len() < PACKETS_MAX {
                                self.packets.push_back((number, (header, packet.to_vec())));
                            }
                            None
                        }
                        Frame::Piece { bytes } => {
                            self.pieces.extend_from_slice(bytes);
                            None
                        }
                        Frame::Room { id, upto } => self.sockets.get_mut(&id).map(|socket| {
                            socket.upto = socket.upto.max(upto);
                            id
                        }),
                        Frame::Look { id, look } => self.sockets.get_mut(&id).map(|socket| {
                            socket.look = look;
                            socket.settled = true;
                            id
                        }),
                        Frame::Answer { number, mut answer } => {
                            if let Some(image) = answer.socket.clone() {
                                match self.sockets.get_mut(&image.id) {
                                    Some(socket) => socket.update(image),
                                    None => drop(self.sockets.insert(image.id, Socket::new(image))),
                                }
                            }
                            if awaited == Some(number) {
                                found = Some(std::mem::replace(&mut *answer, Answer::of(Ok(()))));
                            }
                            None
                        }
                        other => {
                            let reason = format!("the home sent what only goes to it: {other:?}");
                            self.line.end(reason);
                            return found;
                        }
                    };
                    if let Some(id) = changed {
                        self.note_change(id);
                    }
                }
                Some(Err(error)) => {
                    self.line.end(error.to_string());
                    return found;
                }
            }
        }
    }

    /// The next packet for the job's kernel.
    pub(in crate::net) fn poll_packet(&mut self) -> Option<Packet> {
        let (number, packet) = self.packets.pop_front()?;
        self.packet = number.saturating_add(1);
        Some(packet)
    }

    /// A packet of the job's kernel.
    pub(in crate::net) fn send_packet(&mut self, header: &[u8; tun::HEADER_LEN], packet: &[u8]) {
        self.line.outgoing.push_packet(0, header, packet);
    }

    fn note_change(&mut self, id: SocketId) {
        if self.queued.insert(id) {
            self.changed.push_back(id);
        }
    }

    /// After the end of the line: every connection is broken, everything else closed.
    fn note_end(&mut self) {
        let Some(reason) = self.line.ended() else {
            return;
        };
        if self.lost.is_some() || self.finished {
            return;
        }
        tracing::error!(reason, "the job's home is lost, and every connection with it");
        self.lost = Some(reason.to_owned());
        self.board.note(self.line.totals(), self.lost.as_deref());
        let ids: Vec<SocketId> = self.sockets.keys().copied().collect();
        for id in ids {
            if let Some(socket) = self.sockets.get_mut(&id) {
                let error = match socket.look.state {
                    State::SynSent | State::SynReceived => Some(SocketError::NetworkUnreachable),
                    State::Closed | State::Listen => None,
                    _ => Some(SocketError::ConnectionReset),
                };
                socket.look.error = socket.look.error.or(error);
                socket.look.state = State::Closed;
                socket.look.acceptable = 0;
                socket.settled = true;
            }
            self.note_change(id);
        }
    }

    fn call(&mut self, call: Call) -> Result<Answer> {
        self.ask(call).ok_or(SocketError::NetworkUnreachable)
    }

    /// Sends a call and waits for its answer; `None` when the home is lost.
    fn ask(&mut self, call: Call) -> Option<Answer> {
        if self.lost.is_some() {
            return None;
        }
        let number = self.next_call;
        self.next_call += 1;
        self.report_taken();
        self.line.outgoing.push(&Frame::Call { number, call });
        let deadline = Time::now() + ANSWER_LIMIT;
        loop {
            self.line.flush();
            while self.line.fill() {
                if let Some(answer) = self.work_off(Some(number)) {
                    return Some(answer);
                }
            }
            let left = deadline.saturating_duration_since(Time::now());
            if left.is_zero() {
                self.line.end(format!("no answer within {} s", ANSWER_LIMIT.as_secs()));
            }
            if self.line.ended().is_some() {
                self.note_end();
                return None;
            }
            if let Err(error) = self.line.wait(left) {
                self.line.end(error.to_string());
            }
        }
    }

    fn lost_error(&self) -> NetError {
        NetError::HomeLost(self.lost.clone().unwrap_or_default())
    }

    /// Makes sure that the home has everything, and tells what the next node must know.
    pub(in crate::net) fn freeze(&mut self) -> std::result::Result<AwayImage, NetError> {
        if self.ask(Call::Settle).is_none() {
            return Err(self.lost_error());
        }
        let image = |(id, socket): (&SocketId, &Socket)| SocketImage {
            id: *id,
            state: socket.look.state,
            local: socket.local,
            remote: socket.remote,
            options: socket.options.clone(),
            acceptable: socket.look.acceptable,
        };
        Ok(AwayImage { sockets: self.sockets.iter().map(image).collect(), packet: self.packet })
    }

    /// The job has ended: the home goes on alone with what is on its way. True when it has heard that.
    pub(in crate::net) fn finish(&mut self) -> bool {
        if !self.finished && self.active {
            let heard = self.ask(Call::Finish).is_some();
            self.finished = heard;
        }
        true
    }

    pub(in crate::net) fn is_settled(&self, id: SocketId) -> bool {
        self.sockets.get(&id).is_none_or(|socket| socket.settled)
    }

    pub(in crate::net) fn poll_changed(&mut self) -> Option<SocketId> {
        let id = self.changed.pop_front()?;
        self.queued.remove(&id);
        Some(id)
    }

    pub(in crate::net) fn sockets(&self) -> Vec<SocketId> {
        self.sockets.keys().copied().collect()
    }

    pub(in crate::net) fn status(&self, id: SocketId) -> Status {
        let Some(socket) = self.sockets.get(&id) else {
            return Status::CLOSED;
        };
        let Look { state, peer_closed, acceptable, error, unsent, unacked } = socket.look;
        let mut send_space = socket.room();
        if send_space > 0 && !self.line.outgoing.has_room() {
            self.blocked.borrow_mut().push(id);
            send_space = 0;
        }
        Status {
            state,
            readable: socket.received.len(),
            send_space,
            peer_closed,
            acceptable,
            error,
            unsent,
            unacked,
            urgent: None,
        }
    }

    pub(in crate::net) fn refresh(&mut self, id: SocketId) {
        if let Some(Answer { look: Some(look), info: Some(info), .. }) = self.ask(Call::Inform { id }) {
            self.note_report(Report { id, look, info });
        }
    }

    pub(in crate::net) fn refresh_all(&mut self) {
        self.pieces.clear();
        let answered = self.active && self.ask(Call::Report).is_some();
        let pieces = std::mem::take(&mut self.pieces);
        match rmp_serde::from_slice::<Vec<Report>>(&pieces) {
            Ok(reports) => reports.into_iter().for_each(|report| self.note_report(report)),
            Err(error) if answered => tracing::warn!(%error, "the home's report of its sockets can't be read"),
            Err(_) => {}
        }
    }

    fn note_report(&mut self, Report { id, look, info }: Report) {
        if let Some(socket) = self.sockets.get_mut(&id) {
            socket.look.unsent = look.unsent;
            socket.look.unacked = look.unacked;
            socket.info = info;
        }
    }

    pub(in crate::net) fn tcp_open(&mut self) -> Result<SocketId> {
        let answer = self.call(Call::Open)?;
        answer.result?;
        Ok(answer.socket.ok_or(SocketError::NoBuffers)?.id)
    }

    pub(in crate::net) fn tcp_bind(&mut self, id: SocketId, address: SocketAddr, reuse: Reuse) -> Result<()> {
        self.call(Call::Bind { id, address, reuse })?.result
    }

    pub(in crate::net) fn tcp_listen(&mut self, id: SocketId, backlog: u32) -> Result<()> {
        self.call(Call::Listen { id, backlog })?.result
    }

    pub(in crate::net) fn tcp_connect(&mut self, id: SocketId, remote: SocketAddr) -> Result<()> {
        self.call(Call::Connect { id, remote })?.result
    }

    pub(in crate::net) fn tcp_accept(&mut self, id: SocketId) -> Option<SocketId> {
        // What was told is never more than what there is: only this end takes connections out.
        if self.sockets.get(&id)?.look.acceptable == 0 {
            return None;
        }
        let accepted = self.call(Call::Accept { id }).ok()?.socket?;
        self.note_change(accepted.id);
        Some(accepted.id)
    }

    pub(in crate::net) fn tcp_send_with(
        &mut self,
        id: SocketId,
        fill: impl FnOnce([&mut [u8]; 2]) -> usize,
    ) -> Result<usize> {
        let socket = self.sockets.get_mut(&id).ok_or(SocketError::NoSuchSocket)?;
        if !socket.can_send() {
            return Err(socket.look.error.unwrap_or(SocketError::BrokenPipe));
        }
        let room = socket.room().min(self.scratch.len());
        let count = fill([&mut self.scratch[..room], &mut []]).min(room);
        if count > 0 {
            socket.sent += count as u64;
            self.line.outgoing.push_data(id, [&self.scratch[..count], &[]]);
            if !self.line.outgoing.has_room() {
                self.line.flush();
            }
        }
        Ok(count)
    }

    pub(in crate::net) fn tcp_recv_with(
        &mut self,
        id: SocketId,
        take: impl FnOnce([&[u8]; 2]) -> usize,
    ) -> Result<usize> {
        let socket = self.sockets.get_mut(&id).ok_or(SocketError::NoSuchSocket)?;
        let (first, second) = socket.received.as_slices();
        let count = take([first, second]).min(socket.received.len());
        if count > 0 {
            socket.received.drain(..count);
            if socket.taken == 0 {
                self.takers.push(id);
            }
            socket.taken += count as u64;
        }
        Ok(count)
    }

    pub(in crate::net) fn tcp_shutdown(&mut self, id: SocketId, how: Shutdown) -> Result<()> {
        self.line.outgoing.push(&Frame::Shutdown { id, how });
        Ok(())
    }

    pub(in crate::net) fn tcp_close(&mut self, id: SocketId) {
        if self.sockets.remove(&id).is_some() {
            self.line.outgoing.push(&Frame::Close { id });
        }
    }

    pub(in crate::net) fn tcp_abort(&mut self, id: SocketId) {
        if self.sockets.remove(&id).is_some() {
            self.line.outgoing.push(&Frame::Abort { id });
        }
    }

    pub(in crate::net) fn tcp_endpoints(&self, id: SocketId) -> (Option<SocketAddr>, Option<SocketAddr>) {
        self.sockets.get(&id).map_or((None, None), |socket| (socket.local, socket.remote))
    }

    pub(in crate::net) fn tcp_set(&mut self, id: SocketId, option: TcpOption) -> Result<()> {
        self.call(Call::Set { id, option })?.result
    }

    pub(in crate::net) fn tcp_options(&self, id: SocketId) -> &TcpOptions {
        self.sockets.get(&id).map_or(&self.default_options, |socket| &socket.options)
    }

    /// As of the last [`Away::refresh`].
    pub(in crate::net) fn tcp_info(&self, id: SocketId) -> TcpInfo {
        self.sockets.get(&id).map(|socket| socket.info.clone()).unwrap_or_default()
    }

    pub(in crate::net) fn take_error(&mut self, id: SocketId) -> Option<SocketError> {
        let error = self.sockets.get_mut(&id)?.look.error.take();
        if error.is_some() {
            self.line.outgoing.push(&Frame::ErrorTaken { id });
        }
        error
    }
}
