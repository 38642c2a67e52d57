//! Packets in: checked, told apart, and given to who they are for.

use std::net::IpAddr;

use super::reply::{Looks, reset_for};
use super::socket::{Kind, Socket};
use super::{Flow, Stack};
use crate::fragments::Added;
use crate::hash::Keys;
use crate::icmp::{self, Failure, Message, Reason};
use crate::ip::{self, Datagram, Fragment, protocol};
use crate::packet::{Checksum, Handled, RxPacket};
use crate::tcp::connection::{Connection, Verdict, own_mss, receive_limit};
use crate::tcp::cookie;
use crate::tcp::half_open::{self, HalfOpen, Offer};
use crate::tcp::receive::{INITIAL_LIMIT, Receiver};
use crate::tcp::segment::{Flags, Segment};
use crate::tcp::time_wait;
use crate::tcp::{Agreed, Env, Tuple, default_mss};
use crate::{Instant, SocketError, SocketId, State};

/// A packet with what is known of it beside its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival<'a> {
    pub(super) data: &'a [u8],
    pub(super) verify: bool,
    pub(super) gso_size: Option<u16>,
    pub(super) looped: bool,
}

/// Packets for the driver that may wait; it takes them after each one that it hands in.
const FOREIGN_MAX: usize = 64;

/// Takes bytes that are next in a connection's stream, see [`Stack::handle_packet_with`].
type Deliver<'a> = dyn FnMut(SocketId, [&[u8]; 3]) -> usize + 'a;

/// What of a connection a driver can see; a change of it is reported.
type Visible = (State, usize, bool, bool, Option<(usize, bool)>);

//= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.5
//# A TCP implementation MUST (MUST-32) inform the application layer asynchronously whenever it receives an urgent
//# pointer and there was previously no pending urgent data, or whenever the urgent pointer advances in the data stream.
fn visible(connection: &Connection) -> Visible {
    (connection.state, connection.readable(), connection.peer_closed(), connection.unacked() == 0, connection.urgent())
}

impl Stack {
    /// Takes in a packet that arrived from the link.
    pub fn handle_packet(&mut self, now: Instant, packet: RxPacket<'_>) -> Handled {
        self.handle_packet_with(now, packet, &mut |_, _| 0)
    }

    /// Takes in a packet that arrived from the link, and offers bytes that are next in a connection's stream to `deliver`,
    /// which returns how many it took. They come in three parts: what could be read before, and the packet's payload.
    /// What isn't taken is kept for [`Stack::tcp_recv_with`]; not all bytes are offered. So the bulk of a stream
    /// needs no copy here.
    pub fn handle_packet_with(&mut self, now: Instant, packet: RxPacket<'_>, deliver: &mut Deliver<'_>) -> Handled {
        let now = self.clock.enter(now);
        let verify = packet.checksum == Checksum::Verify;
        self.receive(now, Arrival { data: packet.data, verify, gso_size: packet.gso_size, looped: false }, deliver)
    }

    /// A packet that came in fragments and isn't for the stack, like those that [`Handled::Foreign`] speaks of. Its checksums
    /// haven't been looked at.
    pub fn poll_foreign(&mut self) -> Option<Vec<u8>> {
        self.foreign.pop_front()
    }

    pub(super) fn receive(&mut self, now: Instant, arrival: Arrival<'_>, deliver: &mut Deliver<'_>) -> Handled {
        let Some(datagram) = ip::parse(arrival.data, arrival.verify) else {
            return Handled::Taken;
        };
        if !arrival.looped {
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2.3
            //# A TCP implementation MUST silently discard an incoming SYN segment that is addressed to a broadcast or
            //# multicast address [(MUST-57)].
            //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2.3
            //# An incoming SYN with an invalid source address MUST be ignored either by TCP or by the IP layer
            //# [(MUST-63)] (see Section 3.2.1.3).
            // Martians: nobody outside has this host's addresses, and loopback addresses stay inside.
            let foreign = !self.is_looped(datagram.source) && ip::is_unicast(datagram.source);
            if !self.is_own(datagram.destination) || !foreign {
                return Handled::Taken;
            }
        }
        if let Some(fragment) = datagram.fragment {
            self.collect(now, &arrival, &datagram, &fragment);
            return Handled::Taken;
        }
        self.receive_whole(now, &arrival, &datagram, deliver)
    }

    fn receive_whole(
        &mut self,
        now: Instant,
        arrival: &Arrival<'_>,
        datagram: &Datagram<'_>,
        deliver: &mut Deliver<'_>,
    ) -> Handled {
        match datagram.protocol {
            protocol::TCP => self.receive_tcp(now, arrival, datagram, deliver),
            protocol::ICMP if datagram.destination.is_ipv4() => return self.receive_icmp(now, arrival, datagram),
            protocol::ICMPV6 if datagram.destination.is_ipv6() => return self.receive_icmp(now, arrival, datagram),
            _ if self.config.foreign => return Handled::Foreign,
            other => self.refuse(now, arrival, datagram, other == protocol::UDP),
        }
        Handled::Taken
    }

    /// Takes in a piece of a datagram, and the datagram with its last piece.
    fn collect(&mut self, now: Instant, arrival: &Arrival<'_>, datagram: &Datagram<'_>, fragment: &Fragment) {
        match self.fragments.add(now, datagram, fragment, arrival.data) {
            Added::Pending => {}
            Added::Malformed { pointer } => {
                if self.limiter.allows(now, datagram.source) {
                    let (local, remote) = (datagram.destination, datagram.source);
                    let error = icmp::parameter_problem(local, remote, arrival.data, pointer);
                    self.replies.push(error, arrival.looped);
                }
            }
            Added::Whole(packet) => {
                // Whoever checked the fragments can't have checked what is in them.
                let arrival = Arrival { data: &packet, verify: true, gso_size: None, looped: arrival.looped };
                let Some(datagram) = ip::parse(arrival.data, arrival.verify) else {
                    return;
                };
                // A fragment of fragments is nobody's honest work.
                if datagram.fragment.is_none()
                    && self.receive_whole(now, &arrival, &datagram, &mut |_, _| 0) == Handled::Foreign
                    && self.foreign.len() < FOREIGN_MAX
                {
                    self.foreign.push_back(packet);
                }
            }
        }
    }

    /// Ends datagrams that don't become whole, and tells those who sent their start.
    pub(super) fn expire_fragments(&mut self, now: Instant) {
        while let Some((source, destination, head)) = self.fragments.expire(now) {
            if !head.is_empty() && self.limiter.allows(now, source) {
                let looped = self.is_looped(source);
                self.replies.push(icmp::reassembly_time_exceeded(destination, source, &head), looped);
            }
        }
    }

    /// RFC 1122 (3.2.2.1): nobody here understands the packet.
    fn refuse(&mut self, now: Instant, arrival: &Arrival<'_>, datagram: &Datagram<'_>, port: bool) {
        if self.limiter.allows(now, datagram.source) {
            let packet = icmp::unreachable(datagram.destination, datagram.source, arrival.data, port);
            self.replies.push(packet, arrival.looped);
        }
    }

    fn receive_icmp(&mut self, now: Instant, arrival: &Arrival<'_>, datagram: &Datagram<'_>) -> Handled {
        let foreign = if self.config.foreign { Handled::Foreign } else { Handled::Taken };
        match icmp::parse(datagram, arrival.verify) {
            // What is said of packets that aren't the stack's is for whoever sent them.
            Some(Message::Failed(failure)) if original_segment(failure.original).is_none() => return foreign,
            None => return foreign,
            Some(Message::Echo(request)) => {
                let traffic_class = datagram.traffic_class & !3;
                let reply = icmp::echo_reply(datagram.destination, datagram.source, request, traffic_class);
                self.replies.push(reply, arrival.looped);
            }
            Some(Message::Failed(failure)) => self.handle_failure(now, &failure),
        }
        Handled::Taken
    }

    /// A packet of this host didn't arrive, somebody says.
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2.2
    //# TCP implementations MUST act on an ICMP error message passed up from the IP layer, directing it to the
    //# connection that created the error (MUST-54).
    fn handle_failure(&mut self, now: Instant, failure: &Failure<'_>) {
        let Some((tuple, seq)) = original_segment(failure.original) else {
            return;
        };
        let slot = match self.flows.get(&tuple) {
            Some(&Flow::Socket(slot)) => slot,
            Some(&Flow::HalfOpen(index)) => return self.half_open_failed(index, failure.reason, seq),
            _ => return,
        };
        let ended = self.with_connection(now, slot, |connection, env| match failure.reason {
            Reason::TooBig(mtu) => {
                connection.handle_packet_too_big(env, mtu, seq);
                None
            }
            Reason::Host => connection.handle_unreachable(SocketError::HostUnreachable, seq),
            Reason::Network => connection.handle_unreachable(SocketError::NetworkUnreachable, seq),
            Reason::Protocol => connection.handle_unreachable(SocketError::ProtocolNotAvailable, seq),
            Reason::Port => connection.handle_unreachable(SocketError::ConnectionRefused, seq),
            Reason::Prohibited => connection.handle_unreachable(SocketError::HostUnreachable, seq),
            Reason::Parameter => connection.handle_unreachable(SocketError::Protocol, seq),
        });
        match ended.flatten() {
            Some(error) => self.finish(now, slot, Verdict::Closed(Some(error))),
            None => self.touch(slot),
        }
    }

    /// A SYN-ACK didn't arrive (Linux: `tcp_req_err`): if there is no way to the peer, so many SYNs are a flood with faked
    /// addresses.
    fn half_open_failed(&mut self, index: u32, reason: Reason, seq: u32) {
        let genuine = self.half_open.get(index).is_some_and(|entry| entry.iss == seq);
        if genuine && matches!(reason, Reason::Host | Reason::Network | Reason::Parameter) {
            self.drop_half_open(index);
        }
    }

    fn receive_tcp(&mut self, now: Instant, arrival: &Arrival<'_>, datagram: &Datagram<'_>, deliver: &mut Deliver<'_>) {
        let congested = datagram.traffic_class & 3 == ip::ECN_CE;
        let parsed = Segment::parse(
            datagram.source,
            datagram.destination,
            datagram.payload,
            arrival.verify,
            arrival.gso_size,
            congested,
        );
        let Some(segment) = parsed else { return };
        let tuple = Tuple {
            local: datagram.destination,
            local_port: segment.destination_port,
            remote: datagram.source,
            remote_port: segment.source_port,
        };
        match self.flows.get(&tuple).copied() {
            Some(Flow::Socket(slot)) => self.segment_for_socket(now, slot, &tuple, &segment, deliver),
            Some(Flow::HalfOpen(index)) => self.segment_for_half_open(now, index, arrival, &tuple, &segment),
            Some(Flow::TimeWait(index)) => self.segment_for_time_wait(now, index, arrival, &tuple, &segment),
            None => self.segment_for_nobody(now, arrival, &tuple, &segment),
        }
    }

    fn segment_for_socket(
        &mut self,
        now: Instant,
        slot: u32,
        tuple: &Tuple,
        segment: &Segment<'_>,
        deliver: &mut Deliver<'_>,
    ) {
        let Some(id) = self.sockets.get(slot).map(|socket| socket.id) else {
            return;
        };
        let outcome = self.with_connection(now, slot, |connection, env| {
            let (before, queued) = (visible(connection), connection.unacked() + connection.unsent());
            let verdict = connection.handle_segment(env, segment, &mut |parts| deliver(id, parts));
            let freed = connection.unacked() + connection.unsent() < queued;
            (verdict, visible(connection) != before || freed, connection.looped)
        });
        let Some((verdict, changed, looped)) = outcome else {
            return;
        };
        if matches!(verdict, Verdict::Reject | Verdict::Refuse) {
            self.reject(tuple, segment, looped);
        }
        if changed {
            self.note_change(slot);
        }
        self.finish(now, slot, verdict);
    }

    /// Answers with an RST.
    fn reject(&mut self, tuple: &Tuple, segment: &Segment<'_>, looped: bool) {
        if let Some(header) = reset_for(tuple, segment) {
            let looks = Looks { flow_label: self.keys.flow_label(tuple), ..Looks::default() };
            self.replies.push_segment(tuple, &header, &looks, looped);
        }
    }

    fn segment_for_time_wait(
        &mut self,
        now: Instant,
        index: u32,
        arrival: &Arrival<'_>,
        tuple: &Tuple,
        segment: &Segment<'_>,
    ) {
        let Some(entry) = self.time_wait.get_mut(index) else {
            return;
        };
        match entry.judge(now, segment) {
            time_wait::Disposition::Drop => {}
            time_wait::Disposition::Acknowledge { restart } => {
                if restart {
                    entry.ends_at = now + time_wait::DURATION;
                }
                let header = entry.ack(now);
                let looks = Looks { flow_label: self.keys.flow_label(tuple), ..Looks::default() };
                self.replies.push_segment(tuple, &header, &looks, arrival.looped);
            }
            time_wait::Disposition::Reopen => {
                let isn = entry.successor_isn();
                let Some(listener) = self.listener_for(tuple) else {
                    return self.reject(tuple, segment, arrival.looped);
                };
                self.drop_time_wait(index);
                self.handle_syn(now, listener, arrival, tuple, segment, Some(isn));
            }
        }
    }

    fn segment_for_nobody(&mut self, now: Instant, arrival: &Arrival<'_>, tuple: &Tuple, segment: &Segment<'_>) {
        // RFC 9293 (3.10.7.1), (3.10.7.2)
        let is_syn = segment.has(Flags::SYN) && !segment.has(Flags::ACK) && !segment.has(Flags::RST);
        match self.listener_for(tuple) {
            Some(listener) if is_syn => {
                // A SYN with FIN comes from scanners only.
                if !segment.has(Flags::FIN) {
                    self.handle_syn(now, listener, arrival, tuple, segment, None);
                }
            }
            Some(_) if !segment.has(Flags::ACK) => {}
            Some(listener) if self.accept_cookie(now, listener, arrival, tuple, segment) => {}
            _ => self.reject(tuple, segment, arrival.looped),
        }
    }

    /// The listener for a connection: one bound to the address rather than to all, and one of those that share.
    fn listener_for(&self, tuple: &Tuple) -> Option<u32> {
        let mut best = 0;
        let mut found: Vec<u32> = Vec::new();
        for &slot in self.ports.owners(tuple.local_port) {
            let Some(Socket { kind: Kind::Listener(_), bound: Some(bound), options, .. }) = self.sockets.get(slot)
            else {
                continue;
            };
            let score = match (bound.ip(), tuple.local) {
                (bound, local) if bound == local => 3,
                (IpAddr::V4(any), IpAddr::V4(_)) if any.is_unspecified() => 2,
                (IpAddr::V6(any), IpAddr::V6(_)) if any.is_unspecified() => 2,
                (IpAddr::V6(any), IpAddr::V4(_)) if any.is_unspecified() && !options.v6only => 1,
                _ => continue,
            };
            if score > best {
                best = score;
                found.clear();
            }
            if score == best {
                found.push(slot);
            }
        }
        match found.len() {
            0 => None,
            1 => Some(found[0]),
            count => Some(found[(self.keys.spread(tuple) % count as u64) as usize]),
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn handle_syn(
        &mut self,
        now: Instant,
        listener: u32,
        arrival: &Arrival<'_>,
        tuple: &Tuple,
        segment: &Segment<'_>,
        isn: Option<u32>,
    ) {
        let Some(Socket { kind: Kind::Listener(queue), options, .. }) = self.sockets.get_mut(listener) else { return };
        // Linux: a SYN that takes the place of a connection in TIME-WAIT needs no cookie, whose ISN wouldn't do.
        let full = isn.is_none() && queue.syn_queue_is_full();
        if queue.accept_queue_is_full() || (full && !self.config.syn_cookies) {
            queue.overflows += 1;
            return;
        }
        let env = Env { now, config: &self.config, options };
        let mss = segment.options.mss.unwrap_or(default_mss(tuple.local));
        let iss = match isn {
            //= https://www.rfc-editor.org/rfc/rfc4987#section-3.6
            //# Beyond the bound a SYN is answered with a cookie that keeps no state.
            _ if full => cookie::make(&self.keys, tuple, segment.seq, mss, now),
            Some(isn) => isn,
            None => self.keys.initial_sequence(tuple, now),
        };
        let offer = offer(&env, &self.keys, tuple, arrival.looped, iss);
        // RFC 3168 (6.1.1): agree if asked, and if the SYN itself isn't marked, which only a broken path would do.
        let ecn = segment.has(Flags::ECE.with(Flags::CWR)) && !segment.congestion_experienced;
        //= https://www.rfc-editor.org/rfc/rfc7413#section-4.2
        //# Data in a SYN without a valid cookie isn't acknowledged by the SYN-ACK, and comes again.
        let mut entry = HalfOpen::new(*tuple, listener, now, segment, offer, ecn);
        if full {
            queue.overflows += 1;
            queue.cookie_sent_at = Some(now);
            if !entry.agreed.timestamps {
                //= https://www.rfc-editor.org/rfc/rfc4987#section-3.6
                //# The options agreed on travel in the timestamp of the cookie.
                entry.agreed = Agreed::default();
            }
            let mut header = entry.syn_ack(now);
            if let Some((value, _)) = &mut header.timestamps {
                *value = cookie::encode_options(*value, entry.agreed, entry.snd_scale);
            }
            let looks = self.looks_of(listener, tuple);
            return self.replies.push_segment(tuple, &header, &looks, arrival.looped);
        }
        queue.half_open += 1;
        let index = self.half_open.insert(|_, _| entry);
        self.flows.insert(*tuple, Flow::HalfOpen(index));
        self.send_syn_ack(now, index);
    }

    /// An ACK for a connection nobody knows: does it bring back a cookie? Returns whether it did.
    fn accept_cookie(
        &mut self,
        now: Instant,
        listener: u32,
        arrival: &Arrival<'_>,
        tuple: &Tuple,
        segment: &Segment<'_>,
    ) -> bool {
        let Some(Socket { kind: Kind::Listener(queue), options, .. }) = self.sockets.get_mut(listener) else {
            return false;
        };
        if !queue.expects_cookies(now) || segment.has(Flags::RST) || segment.has(Flags::SYN) {
            return false;
        }
        let (irs, iss) = (segment.seq.wrapping_sub(1), segment.ack.wrapping_sub(1));
        let Some(mss) = cookie::check(&self.keys, tuple, irs, iss, now) else { return false };
        queue.half_open += 1;
        let env = Env { now, config: &self.config, options };
        let offer = offer(&env, &self.keys, tuple, arrival.looped, iss);
        let entry = HalfOpen::from_cookie(*tuple, listener, now, segment, offer, mss);
        let index = self.half_open.insert(|_, _| entry);
        self.flows.insert(*tuple, Flow::HalfOpen(index));
        self.complete_half_open(now, index, arrival, tuple, segment);
        // With no room to accept it, it is forgotten again, and the peer's next segment brings the cookie back.
        if self.flows.get(tuple) == Some(&Flow::HalfOpen(index)) {
            self.drop_half_open(index);
        }
        true
    }

    fn segment_for_half_open(
        &mut self,
        now: Instant,
        index: u32,
        arrival: &Arrival<'_>,
        tuple: &Tuple,
        segment: &Segment<'_>,
    ) {
        let Some(entry) = self.half_open.get_mut(index) else {
            return;
        };
        let disposition = entry.judge(now, segment);
        let answers = matches!(disposition, half_open::Disposition::SendSynAck | half_open::Disposition::SendAck);
        if answers && !entry.may_answer(now, segment) {
            return;
        }
        match disposition {
            half_open::Disposition::Drop => {}
            half_open::Disposition::SendSynAck => {
                if let Some(entry) = self.half_open.get_mut(index) {
                    if let Some((value, _)) = segment.options.timestamps {
                        entry.timestamp_recent = value;
                        entry.timestamp_recent_at = now;
                    }
                    let header = entry.syn_ack(now);
                    let looks = self.looks_of_half_open(index);
                    self.replies.push_segment(tuple, &header, &looks, arrival.looped);
                }
            }
            half_open::Disposition::SendAck => {
                let header = entry.ack(now);
                let looks = self.looks_of_half_open(index);
                self.replies.push_segment(tuple, &header, &looks, arrival.looped);
            }
            half_open::Disposition::Reject => self.reject(tuple, segment, arrival.looped),
            half_open::Disposition::Remove => {
                self.drop_half_open(index);
            }
            half_open::Disposition::Complete => self.complete_half_open(now, index, arrival, tuple, segment),
        }
    }

    fn looks_of_half_open(&self, index: u32) -> Looks {
        self.half_open.get(index).map_or(Looks::default(), |entry| self.looks_of(entry.listener, &entry.tuple))
    }

    /// The final ACK of a handshake: a connection is made and waits to be accepted.
    fn complete_half_open(
        &mut self,
        now: Instant,
        index: u32,
        arrival: &Arrival<'_>,
        tuple: &Tuple,
        segment: &Segment<'_>,
    ) {
        let Some(entry) = self.half_open.get_mut(index) else {
            return;
        };
        let Some(Socket { kind: Kind::Listener(queue), options, .. }) = self.sockets.get_mut(entry.listener) else {
            self.drop_half_open(index);
            return self.reject(tuple, segment, arrival.looped);
        };
        // TCP_DEFER_ACCEPT: wait for data, as long as the option says.
        let defer = options.defer_accept;
        if segment.len() == 0 && entry.waits_for_data(defer) {
            entry.acked = true;
            return;
        }
        if queue.accept_queue_is_full() {
            queue.overflows += 1;
            entry.acked = true;
            return;
        }
        let listener = entry.listener;
        let options = options.clone();
        let Some(entry) = self.drop_half_open(index) else {
            return;
        };
        let flow_label = self.keys.flow_label(tuple);
        let slot = self.insert_socket(options);
        let Some(socket) = self.sockets.get_mut(slot) else {
            return;
        };
        let env = Env { now, config: &self.config, options: &socket.options };
        let connection = Connection::accept(&env, &entry, flow_label, arrival.looped);
        socket.kind = Kind::Connection(Box::new(connection));
        socket.waits_at = Some(listener);
        socket.counted = true;
        self.ports.add_connection(
            tuple.local_address(),
            self.sockets.get(slot).is_some_and(|socket| socket.options.reuse_address),
        );
        self.flows.insert(*tuple, Flow::Socket(slot));
        if let Some(queue) = self.sockets.get_mut(listener).and_then(Socket::listener_mut) {
            queue.queue.push_back(slot);
        }
        // Nobody can read it before it is accepted.
        self.segment_for_socket(now, slot, tuple, segment, &mut |_, _| 0);
        self.note_change(listener);
    }
}

/// What this side's SYN-ACK says.
fn offer(env: &Env<'_>, keys: &Keys, tuple: &Tuple, looped: bool, iss: u32) -> Offer {
    let limit = receive_limit(env);
    Offer {
        iss,
        mss: own_mss(env, tuple, looped),
        scale: Receiver::scale_to_offer(limit.max(env.config.receive_buffer)),
        window: limit.min(INITIAL_LIMIT).min(usize::from(u16::MAX)),
        timestamp_offset: keys.timestamp_offset(tuple),
    }
}

/// The connection and sequence number of the segment that an ICMP error quotes.
fn original_segment(original: &[u8]) -> Option<(Tuple, u32)> {
    // Only the first eight bytes of the segment are sure to be there, so no packet view will do.
    let (source, destination, tcp): (IpAddr, IpAddr, &[u8]) = match original.first()? >> 4 {
        4 => {
            let header_len = usize::from(original[0] & 15) * 4;
            if *original.get(9)? != protocol::TCP {
                return None;
            }
            let source: [u8; 4] = original.get(12..16)?.try_into().ok()?;
            let destination: [u8; 4] = original.get(16..20)?.try_into().ok()?;
            (source.into(), destination.into(), original.get(header_len..)?)
        }
        6 => {
            if *original.get(6)? != protocol::TCP {
                return None;
            }
            let source: [u8; 16] = original.get(8..24)?.try_into().ok()?;
            let destination: [u8; 16] = original.get(24..40)?.try_into().ok()?;
            (source.into(), destination.into(), original.get(40..)?)
        }
        _ => return None,
    };
    let tuple = Tuple {
        local: source,
        local_port: u16::from_be_bytes(tcp.get(0..2)?.try_into().ok()?),
        remote: destination,
        remote_port: u16::from_be_bytes(tcp.get(2..4)?.try_into().ok()?),
    };
    Some((tuple, u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?)))
}
