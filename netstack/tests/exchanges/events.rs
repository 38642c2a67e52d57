//! What can happen to a connection: a segment of every kind, an error told by ICMP, a timer, a call.

use std::time::Duration;

use netstack::{Instant, Shutdown, SocketId};

use crate::harness::wire::{Raw, raw};
use crate::harness::{ACK, FIN, RST, SYN, Seen};
use crate::states::Fixture;

/// One event; `happen` makes it happen and returns what the stack sends.
pub struct Event {
    pub name: &'static str,
    pub happen: fn(&mut Fixture) -> Vec<Seen>,
}

/// An event that is a segment of the peer.
macro_rules! segment {
    ($name:literal, $make:expr) => {
        Event {
            name: $name,
            happen: |fixture| {
                let make: fn(&Fixture) -> Raw = $make;
                let raw = make(fixture);
                fixture.wire.send(raw)
            },
        }
    };
}

/// An event that is a call of the program.
macro_rules! call {
    ($name:literal, $act:expr) => {
        Event {
            name: $name,
            happen: |fixture| {
                let act: fn(&mut netstack::Stack, Instant, SocketId) = $act;
                let now = fixture.wire.now;
                if let Some(id) = fixture.socket.or(fixture.listener) {
                    act(&mut fixture.wire.stack, now, id);
                }
                fixture.wire.take()
            },
        }
    };
}

/// More than any window here.
const FAR: i64 = 200_000;

pub const EVENTS: &[Event] = &[
    segment!("SYN as at the start", |_| raw(SYN, 0, 0)),
    segment!("SYN in the window", |at| raw(SYN, at.seq + 10, 0)),
    segment!("SYN beyond the window", |at| raw(SYN, at.seq + FAR, 0)),
    segment!("SYN with data", |_| raw(SYN, 0, 0).data(b"early")),
    segment!("SYN with FIN", |_| raw(SYN | FIN, 0, 0)),
    segment!("SYN-ACK as at the start", |_| raw(SYN | ACK, 0, 1)),
    segment!("SYN-ACK of what wasn't sent", |_| raw(SYN | ACK, 0, 900)),
    segment!("SYN-ACK with data", |_| raw(SYN | ACK, 0, 1).data(b"hello")),
    segment!("ACK old", |at| raw(ACK, at.seq, at.una - 1)),
    segment!("ACK far too old", |at| raw(ACK, at.seq, at.una - FAR)),
    segment!("ACK the same", |at| raw(ACK, at.seq, at.una)),
    segment!("ACK of all", |at| raw(ACK, at.seq, at.nxt)),
    segment!("ACK of what wasn't sent", |at| raw(ACK, at.seq, at.nxt + 1000)),
    segment!("ACK left of the window (keepalive)", |at| raw(ACK, at.seq - 1, at.una)),
    segment!("ACK beyond the window", |at| raw(ACK, at.seq + FAR, at.una)),
    segment!("ACK that closes the window", |at| raw(ACK, at.seq, at.nxt).window(0)),
    segment!("data in order", |at| raw(ACK, at.seq, at.nxt).data(b"0123456789")),
    segment!("data after a gap", |at| raw(ACK, at.seq + 10, at.nxt).data(b"0123456789")),
    segment!("data already received", |at| raw(ACK, at.seq - 11, at.nxt).data(b"0123456789")),
    segment!("data partly received", |at| raw(ACK, at.seq - 5, at.nxt).data(b"0123456789")),
    segment!("data beyond the window", |at| raw(ACK, at.seq + FAR, at.nxt).data(b"0123456789")),
    segment!("data across the window's end", |at| raw(ACK, at.seq + 65_530, at.nxt).data(b"0123456789")),
    segment!("data without ACK", |at| raw(0, at.seq, 0).data(b"0123456789")),
    segment!("data with a wrong checksum", |at| Raw {
        bad_checksum: true,
        ..raw(ACK, at.seq, at.nxt).data(b"0123456789")
    }),
    segment!("urgent data in order", |at| raw(ACK, at.seq, at.nxt).data(b"0123456789").urgent(5)),
    segment!("FIN in order", |at| raw(FIN | ACK, at.seq, at.nxt)),
    segment!("FIN with data", |at| raw(FIN | ACK, at.seq, at.nxt).data(b"0123456789")),
    segment!("FIN that acknowledges nothing new", |at| raw(FIN | ACK, at.seq, at.una)),
    segment!("FIN after a gap", |at| raw(FIN | ACK, at.seq + 10, at.nxt)),
    segment!("FIN already received", |at| raw(FIN | ACK, at.seq - 1, at.nxt)),
    segment!("FIN beyond the window", |at| raw(FIN | ACK, at.seq + FAR, at.nxt)),
    segment!("RST exact", |at| raw(RST, at.seq, 0)),
    segment!("RST exact with ACK", |at| raw(RST | ACK, at.seq, at.nxt)),
    segment!("RST exact with data", |at| raw(RST | ACK, at.seq, at.nxt).data(b"why")),
    segment!("RST in the window", |at| raw(RST, at.seq + 10, 0)),
    segment!("RST left of the window", |at| raw(RST, at.seq - 10, 0)),
    segment!("RST beyond the window", |at| raw(RST, at.seq + FAR, 0)),
    segment!("RST with a wrong ACK", |at| raw(RST | ACK, 0, at.nxt + 1000)),
    Event { name: "ICMP: host unreachable", happen: |at| at.wire.send_unreachable(false, at.una as u32 - 1) },
    Event { name: "ICMP: host unreachable, plausible", happen: |at| at.wire.send_unreachable(false, at.una as u32) },
    Event { name: "ICMP: port unreachable", happen: |at| at.wire.send_unreachable(true, at.una as u32 - 1) },
    Event { name: "ICMP: port unreachable, plausible", happen: |at| at.wire.send_unreachable(true, at.una as u32) },
    Event { name: "ICMP: port unreachable, of what wasn't sent", happen: |at| at.wire.send_unreachable(true, 90_000) },
    Event {
        name: "ICMP: packet too big",
        happen: |at| {
            let error = at.wire.too_big(1300, at.una as u32);
            at.wire.send_bytes(&error, None)
        },
    },
    Event {
        name: "ACK of what wasn't sent, and 10 ms",
        happen: |at| {
            let mut seen = at.wire.send(raw(ACK, at.seq, at.nxt + 1000));
            seen.extend(at.wire.wait(Duration::from_millis(10)));
            seen
        },
    },
    Event { name: "time: 300 ms", happen: |at| at.wire.wait(Duration::from_millis(300)) },
    Event { name: "time: 5 s", happen: |at| at.wire.wait(Duration::from_secs(5)) },
    Event {
        name: "time: 20 minutes",
        happen: |at| {
            let seen = at.wire.wait(Duration::from_secs(1200));
            // The last of many is as good as all.
            seen.into_iter().rev().take(1).collect()
        },
    },
    call!("call: send", |stack, now, id| {
        let _ = stack.tcp_send_with(now, id, |[room, _]| {
            let len = room.len().min(3);
            room[..len].copy_from_slice(&b"abc"[..len]);
            len
        });
    }),
    call!("call: send urgent", |stack, now, id| {
        let _ = stack.tcp_send_urgent(now, id, b"abc");
    }),
    call!("call: shutdown for writing", |stack, now, id| {
        let _ = stack.tcp_shutdown(now, id, Shutdown::Write);
    }),
    call!("call: shutdown for reading", |stack, now, id| {
        let _ = stack.tcp_shutdown(now, id, Shutdown::Read);
    }),
    call!("call: close", |stack, now, id| stack.tcp_close(now, id)),
    call!("call: abort", |stack, now, id| stack.tcp_abort(now, id)),
];
