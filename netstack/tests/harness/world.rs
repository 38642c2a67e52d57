//! Two hosts with programs on a link with faults, in virtual time. A seed decides everything.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use netstack::{Config, Instant, Offload, Secrets, Shutdown, SocketId, Stack, StackImage, State, TcpOption};

use super::actor::{Actor, Answer, Done, Op, Packet};
use super::audit::{Audit, Verdict};
use super::{Random, Side, cut, stream};

/// What is wrong with the link. Chances are per packet.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    pub loss: f64,
    pub duplicate: f64,
    pub reorder: f64,
    pub corrupt: f64,
    pub jitter: Duration,
    /// Chance that a host moves (is frozen, encoded, thawed) after an event.
    pub moves: f64,
}

/// A world to be.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub v6: bool,
    pub connections: usize,
    pub faults: Faults,
    pub delay: Duration,
    /// Bits per second.
    pub rate: Option<u64>,
    /// Bytes that wait for the link before more are lost.
    pub queue: usize,
    /// The link's MTU from a time on, and whether a router says so.
    pub mtu_change: Option<(Duration, usize, bool)>,
    pub offload: Offload,
    /// Super-packets are cut before they reach the other side.
    pub cut: bool,
    pub ecn: bool,
    /// Chance that a packet with ECT is marked.
    pub mark: f64,
    pub backlog: u32,
    pub bytes_max: u64,
    pub record: bool,
}

impl Plan {
    /// A world of moderate size with faults of every kind, now and then.
    pub fn random(seed: u64) -> Plan {
        let mut random = Random::new(seed ^ 0x51ed_270b);
        let mut some = |most: f64| if random.chance(0.5) { most * (random.below(1000) as f64 / 1000.0) } else { 0.0 };
        let faults = Faults {
            loss: some(0.12),
            duplicate: some(0.08),
            reorder: some(0.2),
            corrupt: some(0.03),
            jitter: Duration::from_micros(some(4000.0) as u64),
            moves: some(0.02),
        };
        let v6 = random.chance(0.4);
        let offload = if random.chance(0.5) { Offload::FULL } else { Offload::NONE };
        let rate = random.chance(0.3).then(|| 200_000 + random.below(50_000_000));
        let smallest: u64 = if v6 { 1280 } else { 600 };
        Plan {
            seed,
            v6,
            connections: 1 + random.below(6) as usize,
            // Damage is told from checksums only.
            faults: Faults { corrupt: if offload == Offload::NONE { faults.corrupt } else { 0.0 }, ..faults },
            delay: Duration::from_micros(50 + random.below(60_000)),
            rate,
            queue: 20_000 + random.below(200_000) as usize,
            mtu_change: random.chance(0.25).then(|| {
                let at = Duration::from_millis(random.below(500));
                (at, (smallest + random.below(1500 - smallest)) as usize, random.chance(0.7))
            }),
            offload,
            cut: offload == Offload::NONE || random.chance(0.7),
            ecn: random.chance(0.3),
            mark: if random.chance(0.5) { 0.02 } else { 0.0 },
            backlog: 1 + random.below(8) as u32,
            bytes_max: [2_000, 20_000, 120_000][random.below(3) as usize],
            record: false,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Flying {
    at: Instant,
    order: u64,
    to: usize,
    gso: Option<u16>,
    intact: bool,
    bytes: Rc<[u8]>,
}

/// What the program at one end of a connection does.
#[derive(Clone)]
struct Program {
    side: Side,
    id: SocketId,
    ports: (u16, u16),
    /// What it sends, and what it will have received.
    data: Rc<[u8]>,
    awaited: Rc<[u8]>,
    sent: usize,
    received: usize,
    /// Most it writes and reads at a time.
    gulp: usize,
    /// Time between reads; zero reads whatever is there.
    pause: Duration,
    wake: Instant,
    /// Gives up in the middle.
    aborts_at: Option<usize>,
    /// Closes only when the other has.
    patient: bool,
    /// It has just read something, and looks again.
    again: bool,
    finished: bool,
    closed: bool,
}

/// How a world ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub connections: usize,
    pub whole: usize,
    pub aborted: usize,
    pub gave_up: usize,
    pub segments: u64,
    pub bytes: u64,
}

/// What a stack is made from.
pub type Beginning = (Config, Secrets, Instant);

/// The world.
pub struct World {
    pub plan: Plan,
    pub now: Instant,
    pub actors: [Actor; 2],
    beginnings: Vec<Beginning>,
    start: Instant,
    steps: usize,
    random: Random,
    audit: Audit,
    flying: BinaryHeap<Reverse<Flying>>,
    order: u64,
    busy_until: [Instant; 2],
    listener: SocketId,
    programs: Vec<Program>,
    /// Connections still to be opened, and when.
    openings: Vec<Instant>,
    /// Servers' parts by the client's port.
    servers: HashMap<u16, Program>,
    tally: Tally,
}

const PORT: u16 = 80;
const SIDES: [Side; 2] = [Side::A, Side::B];
/// Longest life of a world.
const END: Duration = Duration::from_secs(4 * 3600);
/// Most that may happen in it.
const STEPS_MAX: usize = 300_000;

impl World {
    pub fn new(plan: Plan) -> World {
        let now = Instant::from_millis(1000);
        let mut random = Random::new(plan.seed);
        let addresses = if plan.v6 { ["fd00::1", "fd00::2"] } else { ["10.0.0.1", "10.0.0.2"] };
        let mut beginnings = Vec::new();
        let actors = [0, 1].map(|index| {
            let config = Config {
                offload: plan.offload,
                ecn: plan.ecn,
                receive_buffer: 1 << 20,
                send_buffer: 1 << 20,
                ..super::config(addresses[index])
            };
            let mut secret = [index as u8 + 1; 32];
            secret[..8].copy_from_slice(&random.next().to_be_bytes());
            beginnings.push((config.clone(), Secrets(secret), now));
            Actor::new(Stack::new(config, Secrets(secret), now), plan.record)
        });
        let openings = (0..plan.connections).map(|_| now + Duration::from_micros(random.below(400_000))).collect();
        let mut world = World {
            beginnings,
            start: now,
            steps: 0,
            now,
            actors,
            random,
            audit: Audit::default(),
            flying: BinaryHeap::new(),
            order: 0,
            busy_until: [now; 2],
            // Replaced below.
            listener: Stack::new(super::config("10.0.0.9"), Secrets([0; 32]), now).tcp_open(),
            programs: Vec::new(),
            openings,
            servers: HashMap::new(),
            tally: Tally { connections: plan.connections, ..Tally::default() },
            plan,
        };
        world.listener = world.open(Side::B);
        let any: IpAddr = if world.plan.v6 { "::" } else { "0.0.0.0" }.parse().expect("an address");
        let (listener, backlog) = (world.listener, world.plan.backlog);
        world.act(Side::B, Op::Bind(listener, SocketAddr::new(any, PORT))).expect("it binds");
        world.act(Side::B, Op::Listen(listener, backlog)).expect("it listens");
        world
    }

    /// What each host's stack was made from.
    pub fn beginnings(&self) -> Vec<Beginning> {
        self.beginnings.clone()
    }

    /// Runs to the end. An error tells what rule was broken, and where.
    pub fn run(&mut self) -> Result<Tally, String> {
        self.run_inner().map_err(|what| format!("{what}\nat {:?}, {:#?}", self.now.since(self.start), self.plan))
    }

    fn run_inner(&mut self) -> Result<Tally, String> {
        while self.step()? {}
        self.check_end()?;
        self.tally.segments = self.audit.segments;
        Ok(self.tally)
    }

    fn open(&mut self, side: Side) -> SocketId {
        match self.act(side, Op::Open) {
            Ok(Answer::Socket(Some(id))) => id,
            other => panic!("no socket: {other:?}"),
        }
    }

    /// Does something to a host, and sends what comes of it.
    fn act(&mut self, side: Side, op: Op) -> Result<Answer, String> {
        let Done { answer, packets, changed: _ } = self.actors[side as usize].apply(self.now, op);
        for packet in packets {
            self.leave(side, packet)?;
        }
        Ok(answer)
    }

    fn leave(&mut self, from: Side, packet: Packet) -> Verdict {
        let mtu = self.actors[from as usize].stack.config().mtu;
        if std::env::var_os("SIMULATOR_LOG").is_some() {
            println!("{:?}", super::describe(self.now, from, &packet.bytes));
        }
        let judged = self.audit.leaves(from, &packet.bytes, packet.gso, mtu);
        judged.map_err(|what| format!("{from:?}: {what}\n{:?}", super::describe(self.now, from, &packet.bytes)))?;
        match packet.gso {
            Some(size) if self.plan.cut => {
                for piece in cut(&packet.bytes, usize::from(size)) {
                    self.fly(from, piece, None)?;
                }
                Ok(())
            }
            gso => self.fly(from, packet.bytes, gso),
        }
    }

    fn link_mtu(&self) -> Option<(usize, bool)> {
        let (at, mtu, told) = self.plan.mtu_change?;
        (self.now.since(self.start) >= at).then_some((mtu, told))
    }

    fn fly(&mut self, from: Side, mut bytes: Vec<u8>, gso: Option<u16>) -> Verdict {
        let wire = gso.map_or(bytes.len(), |size| bytes.len().min(usize::from(size) + 120));
        if let Some((mtu, told)) = self.link_mtu()
            && wire > mtu
        {
            if told {
                let error = too_big(&bytes, mtu);
                self.push(self.now + self.plan.delay / 2, from, None, true, error);
            }
            return Ok(());
        }
        if self.random.chance(self.plan.faults.loss) {
            return Ok(());
        }
        let mut at = self.now;
        if let Some(rate) = self.plan.rate {
            let busy = &mut self.busy_until[from as usize];
            let waiting = busy.since(self.now).as_secs_f64() * rate as f64 / 8.0;
            if waiting as usize > self.plan.queue {
                return Ok(());
            }
            *busy = (*busy).max(self.now) + Duration::from_nanos(bytes.len() as u64 * 8 * 1_000_000_000 / rate);
            at = *busy;
        }
        if self.plan.mark > 0.0 && self.random.chance(self.plan.mark) {
            mark(&mut bytes);
        }
        let mut intact = true;
        if self.random.chance(self.plan.faults.corrupt) {
            // One bit, which every checksum notices; in an IPv6 header nothing would.
            let first = if bytes[0] >> 4 == 4 { 0 } else { 40 };
            let at = first + self.random.below((bytes.len() - first) as u64) as usize;
            bytes[at] ^= 1 << self.random.below(8);
            intact = false;
        }
        let copies = 1 + u32::from(self.random.chance(self.plan.faults.duplicate));
        for _ in 0..copies {
            let jitter = Duration::from_nanos(self.random.below(self.plan.faults.jitter.as_nanos() as u64 + 1));
            let late = if self.random.chance(self.plan.faults.reorder) { self.plan.delay } else { Duration::ZERO };
            self.push(at + self.plan.delay + jitter + late, from.other(), gso, intact, bytes.clone());
        }
        Ok(())
    }

    fn push(&mut self, at: Instant, to: Side, gso: Option<u16>, intact: bool, bytes: Vec<u8>) {
        self.order += 1;
        let flying = Flying { at, order: self.order, to: to as usize, gso, intact, bytes: bytes.into() };
        self.flying.push(Reverse(flying));
    }

    /// Lets one thing happen. False when nothing is left to happen.
    fn step(&mut self) -> Result<bool, String> {
        let arrival = self.flying.peek().map(|Reverse(flying)| flying.at);
        let timers = self.actors.each_ref().map(|actor| actor.stack.poll_timeout());
        let opening = self.openings.iter().min().copied();
        let waking = self.programs.iter().filter(|program| program.waits()).map(|program| program.wake).min();
        let Some(next) = [arrival, timers[0], timers[1], opening, waking].into_iter().flatten().min() else {
            return Ok(false);
        };
        self.now = self.now.max(next);
        self.steps += 1;
        if self.now.since(self.start) > END || self.steps > STEPS_MAX {
            return Err(format!("it never ends: {:?}", self.programs));
        }
        if arrival.is_some_and(|at| at <= self.now)
            && let Some(Reverse(flying)) = self.flying.pop()
        {
            let side = SIDES[flying.to];
            if flying.intact {
                self.audit.arrives(side, &flying.bytes);
            }
            let verify = self.plan.offload == Offload::NONE;
            self.act(side, Op::Packet { bytes: flying.bytes, verify, gso: flying.gso })?;
        }
        for side in SIDES {
            if self.actors[side as usize].stack.poll_timeout().is_some_and(|at| at <= self.now) {
                self.act(side, Op::Timeout)?;
                let next = self.actors[side as usize].stack.poll_timeout();
                if next.is_some_and(|at| at <= self.now) {
                    return Err(format!("{side:?}: a timer that is due stays due"));
                }
            }
        }
        if self.random.chance(self.plan.faults.moves) {
            let side = SIDES[self.random.below(2) as usize];
            self.move_host(side)?;
        }
        self.run_programs()?;
        Ok(true)
    }

    fn move_host(&mut self, side: Side) -> Verdict {
        let stack = &mut self.actors[side as usize].stack;
        let image = codec::to_vec(&stack.freeze(self.now)).map_err(|error| error.to_string())?;
        let image: StackImage = codec::from_slice(&image).map_err(|error| error.to_string())?;
        let config = stack.config().clone();
        *stack = Stack::thaw(image, self.now, config).map_err(|error| format!("{side:?} doesn't thaw: {error}"))?;
        self.act(side, Op::Look).map(|_| ())
    }

    fn run_programs(&mut self) -> Verdict {
        let due: Vec<Instant> = self.openings.extract_if(.., |at| *at <= self.now).collect();
        for _ in due {
            self.open_connection()?;
        }
        while let Answer::Socket(Some(id)) = self.act(Side::B, Op::Accept(self.listener))? {
            let remote = self.actors[1].stack.tcp_endpoints(id).1;
            let Some(mut server) = remote.and_then(|remote| self.servers.remove(&remote.port())) else {
                // A segment that was late brought back a cookie for the second time.
                if self.plan.connections <= self.plan.backlog as usize {
                    return Err(format!("a connection from {remote:?} that nobody opened"));
                }
                self.act(Side::B, Op::Abort(id))?;
                continue;
            };
            server.id = id;
            for option in keep_alive(60) {
                self.act(Side::B, Op::Set(id, option))?;
            }
            self.programs.push(server);
        }
        for index in 0..self.programs.len() {
            if !self.programs[index].closed {
                self.run_program(index)?;
                let program = &mut self.programs[index];
                if program.waits() && program.wake <= self.now {
                    let readable = self.actors[program.side as usize].stack.status(program.id).readable;
                    let least = Duration::from_millis(if readable > 0 { 1 } else { 100 });
                    program.wake = self.now + program.pause.max(least);
                }
            }
        }
        self.programs.retain(|program| !program.closed);
        Ok(())
    }

    fn open_connection(&mut self) -> Verdict {
        let id = self.open(Side::A);
        let random = &mut self.random;
        let lens = [random.below(self.plan.bytes_max), random.below(self.plan.bytes_max)];
        let salts = [random.next(), random.next()];
        let streams = [0, 1].map(|index| stream(lens[index] as usize, salts[index]));
        let mut options = Vec::new();
        if random.chance(0.3) {
            options.push(TcpOption::NoDelay(true));
        }
        if random.chance(0.1) {
            options.push(TcpOption::Cork(true));
        }
        if random.chance(0.2) {
            options.push(TcpOption::ReceiveBuffer(2048 + random.below(60_000) as usize));
        }
        // Otherwise one whose peer's reset is lost would wait for ever, as it should.
        let idle = if random.chance(0.1) { 2 } else { 50 };
        options.extend(keep_alive(idle));
        if random.chance(0.15) {
            options.push(TcpOption::Congestion(netstack::Congestion::Reno));
        }
        if random.chance(0.1) {
            // A cookie has no room for less than these, here as with Linux.
            let cookies = self.plan.connections > self.plan.backlog as usize;
            let least = if !cookies {
                100
            } else if self.plan.v6 {
                1220
            } else {
                536
            };
            options.push(TcpOption::MaxSegment(least + random.below(1400 - u64::from(least)) as u16));
        }
        for option in options {
            self.act(Side::A, Op::Set(id, option))?;
        }
        let remote = SocketAddr::new(self.actors[1].stack.config().addresses[0], PORT);
        // The port is chosen in the call, and the SYN is out when it returns: expect both of it first.
        let done = self.actors[0].apply(self.now, Op::Connect(id, remote));
        let port = self.actors[0].stack.tcp_endpoints(id).0.ok_or("a connection without a port")?.port();
        self.audit.expect(port, PORT, streams.clone());
        for packet in done.packets {
            self.leave(Side::A, packet)?;
        }
        let [a, b] = streams.map(Rc::<[u8]>::from);
        let client = self.program(Side::A, id, (port, PORT), Rc::clone(&a), Rc::clone(&b));
        let server = self.program(Side::B, id, (port, PORT), b, a);
        self.programs.push(client);
        self.servers.insert(port, server);
        Ok(())
    }

    fn program(&mut self, side: Side, id: SocketId, ports: (u16, u16), data: Rc<[u8]>, awaited: Rc<[u8]>) -> Program {
        let random = &mut self.random;
        let most = if random.chance(0.5) { 50 } else { 6000 };
        let gulp = random.below(most) as usize;
        Program {
            side,
            id,
            ports,
            sent: 0,
            received: 0,
            gulp: if random.chance(0.5) { usize::MAX } else { 1 + (data.len() + awaited.len()) / 100 + gulp },
            pause: if random.chance(0.3) { Duration::from_micros(random.below(300_000)) } else { Duration::ZERO },
            wake: self.now,
            aborts_at: random.chance(0.06).then(|| random.below(1 + data.len() as u64) as usize),
            patient: random.chance(0.4),
            again: false,
            finished: false,
            closed: false,
            data,
            awaited,
        }
    }

    fn run_program(&mut self, index: usize) -> Verdict {
        let mut program = self.programs[index].clone();
        let (side, id) = (program.side, program.id);
        let status = self.actors[side as usize].stack.status(id);
        self.check_info(side, id)?;
        if let Some(error) = status.error
            && status.readable == 0
        {
            return self.give_up(index, &format!("{error}"));
        }
        if status.state == State::SynSent {
            return Ok(());
        }
        if program.aborts_at.is_some_and(|at| program.sent >= at && program.received > 0) {
            self.act(side, Op::Abort(id))?;
            self.programs[index].closed = true;
            self.tally.aborted += 1;
            return Ok(());
        }
        let awake = program.wake <= self.now;
        if awake {
            program.again = status.readable > 0;
        }
        if awake && program.again {
            let Answer::Received(Ok(bytes)) = self.act(side, Op::Receive(id, program.gulp))? else {
                return Err(format!("{side:?} can't read the {} bytes it has", status.readable));
            };
            let expected = program.awaited.get(program.received..program.received + bytes.len());
            if expected != Some(&bytes[..]) {
                return Err(format!("{side:?} {:?}: wrong bytes at {}", program.ports, program.received));
            }
            program.received += bytes.len();
            self.tally.bytes += bytes.len() as u64;
        }
        if program.sent < program.data.len() {
            let end = program.data.len().min(program.sent.saturating_add(program.gulp).min(program.sent + 65_536));
            let piece: Rc<[u8]> = program.data[program.sent..end].into();
            if let Answer::Sent(Ok(sent)) = self.act(side, Op::Send(id, piece))? {
                program.sent += sent;
            }
        }
        let status = self.actors[side as usize].stack.status(id);
        let heard_all = status.peer_closed && status.readable == 0;
        if program.sent == program.data.len() && !program.finished && (!program.patient || heard_all) {
            program.finished = true;
            let _ = self.act(side, Op::Shutdown(id, Shutdown::Write))?;
        }
        // Two that wait for each other's end would wait for ever.
        if program.patient && program.sent == program.data.len() && program.received == program.awaited.len() {
            program.patient = false;
            program.wake = self.now + Duration::from_millis(1);
        }
        if program.finished && heard_all {
            if program.received != program.awaited.len() {
                return Err(format!("{side:?}: the stream ended at {} of {}", program.received, program.awaited.len()));
            }
            self.act(side, Op::Close(id))?;
            program.closed = true;
            self.tally.whole += usize::from(side == Side::A);
        }
        self.programs[index] = program;
        Ok(())
    }

    /// The connection broke: allowed if one side broke it off, or if the link is bad enough.
    fn give_up(&mut self, index: usize, why: &str) -> Verdict {
        let program = &self.programs[index];
        let (side, id, ports) = (program.side, program.id, program.ports);
        let aborted = self.tally.aborted > 0;
        let faults = &self.plan.faults;
        let bad = faults.loss + faults.corrupt > 0.04 || self.plan.mtu_change.is_some() || self.plan.rate.is_some();
        // Segments that overtake the last one of a handshake with cookies are taken for forged ones.
        let cookies = self.plan.connections > self.plan.backlog as usize;
        if !aborted && !bad && !cookies {
            return Err(format!("{side:?} {ports:?}: {why}, on a link that isn't so bad"));
        }
        self.act(side, Op::Close(id))?;
        self.programs[index].closed = true;
        self.tally.gave_up += 1;
        Ok(())
    }

    /// What `TCP_INFO` says must be possible.
    fn check_info(&self, side: Side, id: SocketId) -> Verdict {
        let stack = &self.actors[side as usize].stack;
        let Some(info) = Some(stack.tcp_info(self.now, id)) else {
            return Ok(());
        };
        if info.state.is_none_or(|state| state == State::Closed || state == State::Listen) {
            return Ok(());
        }
        let rule = |holds: bool, what: String| if holds { Ok(()) } else { Err(format!("{side:?}: {what}: {info:?}")) };
        let second = Duration::from_secs(1);
        rule(info.rto >= second / 5 && info.rto <= 120 * second, format!("an RTO of {:?}", info.rto))?;
        rule(info.snd_cwnd >= 1 && info.snd_cwnd < 1 << 20, format!("a window of {} segments", info.snd_cwnd))?;
        rule(info.snd_ssthresh >= 2, format!("a threshold of {} segments", info.snd_ssthresh))?;
        rule(info.sacked <= info.unacked && info.lost <= info.unacked, "more sacked or lost than sent".into())?;
        rule(info.min_rtt <= info.rtt.max(info.min_rtt), "a least RTT above the mean".into())?;
        rule(info.snd_mss >= 16 && info.snd_mss <= 65_535, format!("segments of {} bytes", info.snd_mss))
    }

    /// Nothing is left of anything.
    fn check_end(&mut self) -> Verdict {
        self.act(Side::B, Op::Close(self.listener))?;
        while self.step()? {}
        for (side, actor) in SIDES.into_iter().zip(&self.actors) {
            let left: Vec<_> = actor.stack.sockets().map(|id| actor.stack.status(id)).collect();
            if !left.is_empty() {
                return Err(format!("{side:?}: sockets are left: {left:?}"));
            }
            let rest = actor.stack.connections_without_socket();
            if rest != (0, 0) {
                return Err(format!("{side:?}: {rest:?} half open and in TIME-WAIT are left"));
            }
        }
        // The server's part of a connection that the client gave up on may never have come to be.
        if self.programs.is_empty() { Ok(()) } else { Err(format!("programs wait for ever: {:?}", self.programs)) }
    }
}

impl std::fmt::Debug for Program {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Program { side, ports, data, awaited, sent, received, gulp, pause, finished, .. } = self;
        let (all, whole) = (data.len(), awaited.len());
        write!(
            formatter,
            "{side:?} {ports:?}: sent {sent} of {all}, received {received} of {whole}, {gulp} at a time every {pause:?}, \
             finished: {finished}"
        )
    }
}

impl Program {
    fn waits(&self) -> bool {
        let slow = !self.pause.is_zero() || self.gulp < usize::MAX;
        let more = self.received < self.awaited.len() || self.sent < self.data.len();
        !self.closed && (self.again || (slow && more))
    }
}

fn keep_alive(idle_s: u64) -> [TcpOption; 3] {
    let (idle, interval) = (Duration::from_secs(idle_s), Duration::from_secs(5));
    [TcpOption::KeepAlive(true), TcpOption::KeepIdle(idle), TcpOption::KeepInterval(interval)]
}

/// Marks a packet: congestion experienced, if its sender can bear that.
fn mark(bytes: &mut [u8]) {
    if bytes[0] >> 4 == 4 {
        if bytes[1] & 3 != 0 {
            let old = u16::from_be_bytes([bytes[0], bytes[1]]);
            bytes[1] |= 3;
            let new = u16::from_be_bytes([bytes[0], bytes[1]]);
            // RFC 1624
            let sum = u16::from_be_bytes([bytes[10], bytes[11]]);
            let mut fresh = u32::from(!sum) + u32::from(!old) + u32::from(new);
            fresh = (fresh & 0xffff) + (fresh >> 16);
            fresh = (fresh & 0xffff) + (fresh >> 16);
            bytes[10..12].copy_from_slice(&(!(fresh as u16)).to_be_bytes());
        }
    } else if bytes[1] & 0x30 != 0 {
        bytes[1] |= 0x30;
    }
}

/// What a router says to a packet that is too big for the next link (RFC 1191, RFC 4443).
pub fn too_big(packet: &[u8], mtu: usize) -> Vec<u8> {
    let sum = |start: u32, bytes: &[u8]| {
        let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
        let mut sum = words.fold(start, u32::wrapping_add);
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    };
    if packet[0] >> 4 == 4 {
        let quoted = &packet[..28];
        let mut out = vec![0x45, 0, 0, (28 + quoted.len()) as u8, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 254];
        out.extend_from_slice(&packet[12..16]);
        let header = sum(0, &out);
        out[10..12].copy_from_slice(&header.to_be_bytes());
        out.extend_from_slice(&[3, 4, 0, 0, 0, 0]);
        out.extend_from_slice(&(mtu as u16).to_be_bytes());
        out.extend_from_slice(quoted);
        let body = sum(0, &out[20..]);
        out[22..24].copy_from_slice(&body.to_be_bytes());
        out
    } else {
        let quoted = &packet[..packet.len().min(1232)];
        let len = 8 + quoted.len();
        let mut out = vec![0x60, 0, 0, 0, (len >> 8) as u8, len as u8, 58, 64];
        out.extend_from_slice(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfe]);
        out.extend_from_slice(&packet[8..24]);
        out.extend_from_slice(&[2, 0, 0, 0]);
        out.extend_from_slice(&(mtu as u32).to_be_bytes());
        out.extend_from_slice(quoted);
        let pseudo = out[8..40].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum::<u32>();
        let body = sum(pseudo + len as u32 + 58, &out[40..]);
        out[42..44].copy_from_slice(&body.to_be_bytes());
        out
    }
}
