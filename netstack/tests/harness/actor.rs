//! A stack that is driven by data: what is done to it can be recorded and done again to another.

use std::net::SocketAddr;
use std::rc::Rc;

use netstack::{Checksum, Instant, Reuse, RxPacket, Shutdown, SocketError, SocketId, Stack, Status, TcpOption};

/// Something that happens to a stack.
#[derive(Clone, Debug)]
pub enum Op {
    Packet {
        bytes: Rc<[u8]>,
        verify: bool,
        gso: Option<u16>,
    },
    Timeout,
    Open,
    Bind(SocketId, SocketAddr),
    Listen(SocketId, u32),
    Connect(SocketId, SocketAddr),
    Accept(SocketId),
    Send(SocketId, Rc<[u8]>),
    Receive(SocketId, usize),
    Shutdown(SocketId, Shutdown),
    Close(SocketId),
    Abort(SocketId),
    Set(SocketId, TcpOption),
    /// Nothing but a look: whether it has something to send all the same.
    Look,
}

/// What a call gave back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Nothing,
    Socket(Option<SocketId>),
    Sent(Result<usize, SocketError>),
    Received(Result<Vec<u8>, SocketError>),
    Result(Result<(), SocketError>),
}

/// A packet that came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub bytes: Vec<u8>,
    pub gso: Option<u16>,
}

/// All that came of an [`Op`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    pub answer: Answer,
    pub packets: Vec<Packet>,
    pub changed: Vec<(SocketId, Status)>,
}

/// More packets than these at once are a stack that doesn't stop.
const PACKETS_MAX: usize = 200_000;

/// Does it, and takes out everything that follows from it.
pub fn apply(stack: &mut Stack, now: Instant, op: &Op) -> Done {
    let answer = perform(stack, now, op);
    let mut packets = Vec::new();
    while let Some(packet) = stack.poll_transmit(now) {
        packets.push(Packet { bytes: packet.to_vec(), gso: packet.gso.map(|gso| gso.size) });
        assert!(packets.len() < PACKETS_MAX, "it never stops sending");
    }
    let mut changed = Vec::new();
    while let Some(id) = stack.poll_changed() {
        changed.push((id, stack.status(id)));
    }
    Done { answer, packets, changed }
}

fn perform(stack: &mut Stack, now: Instant, op: &Op) -> Answer {
    match op {
        Op::Packet { bytes, verify, gso } => {
            let checksum = if *verify { Checksum::Verify } else { Checksum::Verified };
            stack.handle_packet(now, RxPacket { data: bytes, checksum, gso_size: *gso });
            Answer::Nothing
        }
        Op::Timeout => {
            stack.handle_timeout(now);
            Answer::Nothing
        }
        Op::Open => Answer::Socket(Some(stack.tcp_open())),
        Op::Bind(id, address) => Answer::Result(stack.tcp_bind(*id, *address, Reuse { address: true, port: false })),
        Op::Listen(id, backlog) => Answer::Result(stack.tcp_listen(now, *id, *backlog)),
        Op::Connect(id, remote) => Answer::Result(stack.tcp_connect(now, *id, *remote)),
        Op::Accept(id) => Answer::Socket(stack.tcp_accept(now, *id)),
        Op::Send(id, data) => Answer::Sent(stack.tcp_send_with(now, *id, |[first, second]| {
            let head = data.len().min(first.len());
            first[..head].copy_from_slice(&data[..head]);
            let tail = (data.len() - head).min(second.len());
            second[..tail].copy_from_slice(&data[head..head + tail]);
            head + tail
        })),
        Op::Receive(id, most) => {
            let mut bytes = Vec::new();
            let result = stack.tcp_recv_with(now, *id, |[first, second]| {
                let head = first.len().min(*most);
                bytes.extend_from_slice(&first[..head]);
                bytes.extend_from_slice(&second[..second.len().min(*most - head)]);
                bytes.len()
            });
            Answer::Received(result.map(|_| bytes))
        }
        Op::Shutdown(id, how) => Answer::Result(stack.tcp_shutdown(now, *id, *how)),
        Op::Close(id) => {
            stack.tcp_close(now, *id);
            Answer::Nothing
        }
        Op::Abort(id) => {
            stack.tcp_abort(now, *id);
            Answer::Nothing
        }
        Op::Set(id, option) => Answer::Result(stack.tcp_set(now, *id, *option)),
        Op::Look => Answer::Nothing,
    }
}

/// A trace: everything that happened to one stack, and what came of it.
pub type Trace = Vec<(Instant, Op, Done)>;

/// A stack with its trace.
pub struct Actor {
    pub stack: Stack,
    pub trace: Option<Trace>,
}

impl Actor {
    pub fn new(stack: Stack, record: bool) -> Actor {
        Actor { stack, trace: record.then(Vec::new) }
    }

    pub fn apply(&mut self, now: Instant, op: Op) -> Done {
        let done = apply(&mut self.stack, now, &op);
        if let Some(trace) = &mut self.trace {
            trace.push((now, op, done.clone()));
        }
        done
    }
}
