//! Urgent data, sent and received.

use netstack::{Config, SocketError, Stack, TcpOption};

use crate::harness::ACK;
use crate::harness::wire::{URG, Wire, plain, raw};
use crate::{SECOND, both_with, open_window};

#[test]
fn urgent_data_is_sent() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
    //= type=test
    //# However, TCP implementations MUST still include support for the urgent mechanism (MUST-30).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
    //= type=test
    //# The urgent pointer MUST point to the sequence number of the octet following the urgent data (MUST-62).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
    //= type=test
    //# A TCP implementation MUST support a sequence of urgent data of any length (MUST-31) [19].
    for mut wire in both_with(&plain()) {
        let id = wire.established();
        open_window(&mut wire, 1);
        let mss = wire.family.mss();
        // Whatever its length: the pointer counts to the octet behind it from every segment before it.
        let len = 3 * mss + 10;
        assert_eq!(wire.stack.tcp_send_urgent(wire.now, id, &vec![b'u'; len]), Ok(len));
        let seen = wire.take();
        let pointers: Vec<_> =
            seen.iter().map(|one| (one.flags & URG, usize::from(one.urgent), one.seq as usize)).collect();
        assert_eq!(pointers, (0..4).map(|i| (URG, len - i * mss, 1 + i * mss)).collect::<Vec<_>>());
        // What follows the mark doesn't.
        let seen = wire.send(raw(ACK, 11, 1).data(b"?"));
        assert_eq!((seen[0].flags & URG, seen[0].urgent), (0, 0));
        wire.send(raw(ACK, 1, len as i64 + 1).window(60_000));
        assert_eq!(wire.write(id, b"calm")[0].flags & URG, 0);
    }
}

#[test]
fn a_pointer_too_far_for_its_field_says_what_it_can() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
    //= type=test
    //# A TCP implementation MUST support a sequence of urgent data of any length (MUST-31) [19].
    let config = Config { send_buffer: 1 << 20, ..plain() };
    for mut wire in both_with(&config) {
        let id = wire.established_with(&[2, 4, 5, 180, 1, 3, 3, 7], raw(ACK, 1, 1).window(10));
        let len = 100_000;
        let mut queued = 0;
        while queued < len {
            queued += wire.stack.tcp_send_urgent(wire.now, id, &vec![b'u'; len - queued]).unwrap();
        }
        let seen = wire.take();
        assert_eq!((seen[0].flags & URG, seen[0].urgent), (URG, 0xffff));
        let ack = i64::from(seen.last().unwrap().seq) + seen.last().unwrap().payload as i64;
        let seen = wire.send(raw(ACK, 1, ack).window(10));
        assert_eq!(seen[0].flags & URG, URG);
        assert_eq!(usize::from(seen[0].urgent), (len + 1 - ack as usize).min(0xffff));
    }
}

#[test]
fn urgent_data_passes_a_closed_window() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
    //= type=test
    //# However, TCP implementations MUST still include support for the urgent mechanism (MUST-30).
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.send(raw(ACK, 1, 1).window(0));
        wire.stack.tcp_send_urgent(wire.now, id, b"stop").unwrap();
        let seen = wire.wait(SECOND);
        let first: Vec<_> = seen.iter().map(|one| (one.flags, one.seq, one.payload, one.urgent)).take(2).collect();
        assert_eq!(first, [(ACK | URG, 1, 0, 4), (ACK | URG, 0, 0, 5)], "a pointer, and a probe");
    }
}

#[test]
fn urgent_data_is_received_out_of_band() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
    //= type=test
    //# However, TCP implementations MUST still include support for the urgent mechanism (MUST-30).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
    //= type=test
    //# The urgent pointer MUST point to the sequence number of the octet following the urgent data (MUST-62).
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
    //= type=test
    //# A TCP implementation MUST (MUST-32) inform the application layer asynchronously whenever it receives an urgent
    //# pointer and there was previously no pending urgent data, or whenever the urgent pointer advances in the data
    //# stream.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
    //= type=test
    //# The TCP implementation MUST (MUST-33) provide a way for the application to learn how much urgent data remains to
    //# be read from the connection, or at least to determine whether more urgent data remains to be read [19].
    for mut wire in Wire::both() {
        let id = wire.established();
        while wire.stack.poll_changed().is_some() {}
        assert_eq!(wire.stack.tcp_recv_urgent(id, false), Err(SocketError::InvalidArgument));
        // Only the pointer: the byte before it comes later.
        wire.send(raw(ACK, 1, 1).data(b"ab").urgent(5));
        assert_eq!(wire.stack.poll_changed(), Some(id), "the program is told");
        let urgent = wire.stack.status(id).urgent.unwrap();
        assert_eq!((urgent.ahead, urgent.available), (4, false));
        assert_eq!(wire.stack.tcp_recv_urgent(id, false), Ok(None), "it has not come");
        wire.send(raw(ACK, 3, 1).data(b"cd!ef").urgent(3));
        assert_eq!(wire.stack.poll_changed(), Some(id));
        assert!(wire.stack.status(id).urgent.unwrap().available);
        assert_eq!(wire.stack.tcp_recv_urgent(id, true), Ok(Some(b'!')), "a look");
        assert_eq!(wire.stack.tcp_recv_urgent(id, false), Ok(Some(b'!')));
        assert_eq!(wire.stack.tcp_recv_urgent(id, false), Err(SocketError::InvalidArgument), "taken");
        // A read ends at the mark; the byte isn't in the stream.
        assert_eq!(wire.read(id), b"abcd");
        assert_eq!(wire.stack.status(id).urgent.map(|urgent| urgent.ahead), Some(0), "at the mark");
        assert_eq!(wire.stack.status(id).readable, 2);
        assert_eq!(wire.read(id), b"ef");
        assert_eq!(wire.stack.status(id).urgent, None);
        // A pointer that goes back, or to what was read, is no news.
        wire.send(raw(ACK, 8, 1).data(b"g!").urgent(2));
        while wire.stack.poll_changed().is_some() {}
        wire.send(raw(ACK, 8, 1).data(b"g!").urgent(2));
        assert_eq!(wire.stack.poll_changed(), None);
        assert_eq!(wire.read(id), b"g");
        assert!(wire.read(id).is_empty());
    }
}

#[test]
fn urgent_data_moves_on_and_stays_inline_if_asked() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
    //= type=test
    //# A TCP implementation MUST (MUST-32) inform the application layer asynchronously whenever it receives an urgent
    //# pointer and there was previously no pending urgent data, or whenever the urgent pointer advances in the data
    //# stream.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
    //= type=test
    //# The TCP implementation MUST (MUST-33) provide a way for the application to learn how much urgent data remains to
    //# be read from the connection, or at least to determine whether more urgent data remains to be read [19].
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.send(raw(ACK, 1, 1).data(b"a!").urgent(2));
        assert_eq!(wire.read(id), b"a");
        // A newer mark, before the older was read past: the older byte is gone.
        wire.send(raw(ACK, 3, 1).data(b"b?c").urgent(2));
        let urgent = wire.stack.status(id).urgent.unwrap();
        assert_eq!((urgent.ahead, urgent.available), (1, true));
        assert_eq!(wire.stack.tcp_recv_urgent(id, false), Ok(Some(b'?')));
        assert_eq!([wire.read(id), wire.read(id)], [b"b".to_vec(), b"c".to_vec()]);
        wire.stack.tcp_set(wire.now, id, TcpOption::OobInline(true)).unwrap();
        wire.send(raw(ACK, 6, 1).data(b"de!f").urgent(3));
        assert_eq!(wire.stack.tcp_recv_urgent(id, false), Err(SocketError::InvalidArgument), "it is in the stream");
        assert_eq!([wire.read(id), wire.read(id)], [b"de".to_vec(), b"!f".to_vec()], "a read still ends at the mark");
    }
}

#[test]
fn urgent_data_moves_with_the_stack() {
    for mut wire in Wire::both() {
        let id = wire.established();
        wire.send(raw(ACK, 1, 1).data(b"ab!cd").urgent(3));
        wire.send(raw(ACK, 6, 1).window(0));
        wire.stack.tcp_send_urgent(wire.now, id, b"stop").unwrap();
        let image = rmp_serde::to_vec_named(&wire.stack.freeze(wire.now)).unwrap();
        let config = wire.stack.config().clone();
        wire.stack = Stack::thaw(rmp_serde::from_slice(&image).unwrap(), wire.now, config).unwrap();
        assert_eq!(wire.stack.tcp_recv_urgent(id, false), Ok(Some(b'!')));
        assert_eq!([wire.read(id), wire.read(id)], [b"ab".to_vec(), b"cd".to_vec()]);
        let seen = wire.wait(SECOND);
        assert!(seen.iter().any(|one| (one.seq, one.flags & URG, one.urgent) == (1, URG, 4)), "{seen:?}");
    }
}
