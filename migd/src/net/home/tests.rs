use std::net::SocketAddr;
use std::rc::Rc;
use std::thread::JoinHandle;

use netstack::{Config, Instant, Secrets, Shutdown, SocketError, SocketId, Stack, State};
use proptest::prelude::*;

use super::frame::{Answer, Call, Frame, HEADER_LEN, Header, Look, PAYLOAD_MAX};
use super::line::Line;
use super::{Away, AwayImage, Board, Deputy, Guest, Visitor};

fn look() -> Look {
    Look { state: State::CloseWait, peer_closed: true, acceptable: 3, error: None, unsent: 1, unacked: 2 }
}

fn frames() -> Vec<Frame<'static>> {
    let id = SocketId::from_u64(7 << 32 | 1);
    vec![
        Frame::Data { id, bytes: b"hello" },
        Frame::Data { id, bytes: b"" },
        Frame::Taken { id, count: 5 },
        Frame::Room { id, upto: u64::MAX },
        Frame::Look { id, look: look() },
        Frame::Shutdown { id, how: Shutdown::Both },
        Frame::Close { id },
        Frame::Abort { id },
        Frame::ErrorTaken { id },
        Frame::Call {
            number: 9,
            call: Call::Bind { id, address: ([10, 77, 0, 5], 80).into(), reuse: Default::default() },
        },
        Frame::Answer { number: 9, answer: Box::new(Answer::of(Err(SocketError::AddressInUse))) },
        Frame::Piece { bytes: b"image" },
        Frame::Activate { epoch: 2, packet: 8 },
        Frame::Inherit { epoch: 3 },
        Frame::Resume,
        Frame::Packet { number: 4, header: [3; sys::tun::HEADER_LEN], packet: b"datagram" },
    ]
}

#[test]
fn frames_arrive_in_order_as_they_were_sent() {
    let (one, other) = sys::unix::pair(true).expect("a pair");
    let (mut one, mut other) = (Line::new(one), Line::new(other));
    for frame in frames() {
        one.outgoing.push(&frame);
    }
    one.flush();
    assert!(other.fill());
    let mut arrived = Vec::new();
    while let Some(frame) = other.incoming.next() {
        arrived.push(format!("{:?}", frame.expect("a frame")));
    }
    assert_eq!(arrived, frames().iter().map(|frame| format!("{frame:?}")).collect::<Vec<_>>());
    drop(one);
    assert!(!other.fill());
    assert_eq!(other.ended(), Some("the other side closed it"));
}

#[test]
fn a_frame_comes_in_any_pieces() {
    let mut bytes = Vec::new();
    frames().iter().for_each(|frame| frame.encode(&mut bytes));
    let (one, other) = sys::unix::pair(true).expect("a pair");
    let mut line = Line::new(other);
    let mut arrived = 0;
    for byte in &bytes {
        let sent = sys::unix::send(std::os::fd::AsFd::as_fd(&one), &[std::io::IoSlice::new(&[*byte])]);
        assert_eq!(sent.expect("room for a byte"), 1);
        line.note_ready();
        assert!(line.fill());
        while line.incoming.next().is_some() {
            arrived += 1;
        }
    }
    assert_eq!(arrived, frames().len());
}

#[test]
fn a_line_that_has_ended_takes_nothing() {
    let (one, other) = sys::unix::pair(true).expect("a pair");
    drop(other);
    let mut line = Line::new(one);
    line.outgoing.push(&Frame::Resume);
    line.flush();
    assert!(!line.fill());
    assert!(line.ended().is_some());
    line.outgoing.push(&Frame::Resume);
    assert_eq!(line.outgoing.backlog(), 0);
}

#[test]
fn what_a_program_can_tell_apart_is_told() {
    assert!(look().same_to_program(&Look { unsent: 9, unacked: 9, ..look() }));
    assert!(!look().same_to_program(&Look { acceptable: 4, ..look() }));
    assert!(!look().same_to_program(&Look { error: Some(SocketError::TimedOut), ..look() }));
}

const NOW: Instant = Instant::from_millis(1000);

/// Connects to a port of the same stack.
fn connect(stack: &mut Stack, address: SocketAddr) {
    let client = stack.tcp_open();
    stack.tcp_connect(NOW, client, address).expect("can connect");
    while stack.poll_transmit(NOW).is_some() {}
}

/// Has one end accept a connection and the other take the call in; its answer waits to be sent.
fn accept(
    mut away: Away,
    deputy: &mut Deputy,
    stack: &mut Stack,
    listener: SocketId,
) -> JoinHandle<(Option<SocketId>, Away)> {
    let accepting = std::thread::spawn(move || (away.tcp_accept(listener), away));
    while stack.status(listener).acceptable == 1 {
        deputy.note_ready(1);
        deputy.receive(stack, NOW);
        std::thread::yield_now();
    }
    accepting
}

#[test]
fn a_connection_that_comes_during_an_accept_is_known_to_wait() {
    let address: SocketAddr = ([127, 0, 0, 1], 80).into();
    let mut stack = Stack::new(Config::default(), Secrets([7; 32]), NOW);
    let listener = stack.tcp_open();
    stack.tcp_bind(listener, address, Default::default()).expect("free");
    stack.tcp_listen(NOW, listener, 5).expect("can listen");
    let (ours, theirs) = sys::unix::pair(true).expect("a pair");
    let epoll = Rc::new(sys::epoll::Epoll::new().expect("an epoll"));
    let mut deputy = Deputy::new(1, [listener].into_iter(), epoll, Board::new().expect("a board"));
    let node = crate::api::NodeAddress { name: "B".into(), peer: ([127, 0, 0, 1], 1).into(), hops: Vec::new() };
    deputy.add_line(ours, Visitor { node, epoch: 1 }, |line| line);
    let mut away = Away::new(Guest::new(theirs), 2, AwayImage::of_stack(&stack, [listener].into_iter()));
    away.activate();
    away.transmit();
    connect(&mut stack, address);
    deputy.receive(&mut stack, NOW);
    deputy.serve(&mut stack, NOW);
    away.note_ready();
    away.receive();
    assert_eq!(away.status(listener).acceptable, 1);

    let accepting = accept(away, &mut deputy, &mut stack, listener);
    // Its news leave with the answer.
    connect(&mut stack, address);
    deputy.serve(&mut stack, NOW);
    let (accepted, away) = accepting.join().expect("accepted");
    assert!(accepted.is_some());
    assert_eq!(away.status(listener).acceptable, 1);

    let accepting = accept(away, &mut deputy, &mut stack, listener);
    deputy.serve(&mut stack, NOW);
    let (accepted, mut away) = accepting.join().expect("accepted");
    assert!(accepted.is_some());
    assert_eq!((away.status(listener).acceptable, away.tcp_accept(listener)), (0, None));
}

/// The packets that have arrived, each one byte long.
fn packets(away: &mut Away) -> Vec<u8> {
    away.note_ready();
    away.receive();
    std::iter::from_fn(|| away.poll_packet()).map(|(_, packet)| packet[0]).collect()
}

#[test]
fn packets_that_come_while_the_process_moves_reach_it() {
    let mut stack = Stack::new(Config::default(), Secrets([7; 32]), NOW);
    let epoll = Rc::new(sys::epoll::Epoll::new().expect("an epoll"));
    let mut deputy = Deputy::new(1, std::iter::empty(), epoll, Board::new().expect("a board"));
    let mut image = AwayImage::of_stack(&stack, std::iter::empty());
    let mut sent = 0..;
    let mut send = |deputy: &mut Deputy, stack: &mut Stack, count: usize| {
        for byte in sent.by_ref().take(count) {
            deputy.send_packet(&[0; sys::tun::HEADER_LEN], &[byte]);
        }
        deputy.serve(stack, NOW);
    };
    let mut arrived = Vec::new();
    for (line, epoch) in [(1, 2), (2, 3), (3, 4)] {
        let (ours, theirs) = sys::unix::pair(true).expect("a pair");
        let node = crate::api::NodeAddress { name: "B".into(), peer: ([127, 0, 0, 1], 1).into(), hops: Vec::new() };
        deputy.add_line(ours, Visitor { node, epoch }, |line| line);
        // To nobody, or to a node where the process stands still already.
        send(&mut deputy, &mut stack, 3);
        let mut away = Away::new(Guest::new(theirs), epoch, image);
        away.activate();
        away.transmit();
        deputy.note_ready(line);
        deputy.receive(&mut stack, NOW);
        send(&mut deputy, &mut stack, 2);
        arrived.extend(packets(&mut away));
        send(&mut deputy, &mut stack, 2);
        let freezing = std::thread::spawn(move || away.freeze());
        while !freezing.is_finished() {
            deputy.note_ready(line);
            deputy.receive(&mut stack, NOW);
            deputy.serve(&mut stack, NOW);
        }
        image = freezing.join().expect("no panic").expect("an image");
    }
    assert_eq!(arrived, (0..19).collect::<Vec<u8>>());
}

proptest! {
    #[test]
    fn nothing_that_arrives_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0..20u8) {
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(&u32::try_from(bytes.len()).expect("short").to_be_bytes());
        header[4] = kind;
        let header = Header::decode(&header).expect("short enough");
        drop(header.open(&bytes));
    }
}

#[test]
fn a_frame_that_is_too_long_is_refused_by_its_header() {
    let mut header = [0; HEADER_LEN];
    header[..4].copy_from_slice(&u32::try_from(PAYLOAD_MAX + 1).expect("a megabyte").to_be_bytes());
    assert!(Header::decode(&header).is_err());
}
