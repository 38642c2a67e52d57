//! Packets out: control replies first, then each connection in turn, one packet at a time. Packets of this host to itself
//! are taken in again at once and never leave.

use super::Stack;
use super::receive::Arrival;
use super::socket::{Kind, Socket};
use crate::ip;
use crate::packet::{Gso, PartialChecksum, TxPacket};
use crate::tcp::Env;
use crate::tcp::connection::{Connection, Emission};
use crate::tcp::segment::HEADER_MAX;
use crate::{Config, Instant, TcpOptions};

/// Where the packet being sent is put together.
#[derive(Debug)]
pub(super) struct Scratch {
    /// Headers of a segment.
    headers: [u8; 40 + HEADER_MAX],
    /// A reply.
    reply: Vec<u8>,
    /// Vectors for looped packets, to be used again.
    spare: Vec<Vec<u8>>,
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch { headers: [0; 40 + HEADER_MAX], reply: Vec::new(), spare: Vec::new() }
    }
}

/// What the next packet is made of.
enum Plan {
    /// The packet in `scratch.reply`.
    Reply,
    /// The headers in `scratch.headers` and a stretch of a socket's send buffer.
    Segment {
        slot: u32,
        header_len: usize,
        payload: (usize, usize),
        gso: Option<Gso>,
        checksum: Option<PartialChecksum>,
    },
}

/// Vectors kept for looped packets.
const SPARE_MAX: usize = 8;

impl Stack {
    /// Says whether packets have arrived that [`Stack::handle_packet`] hasn't been given yet. While that is so, data that came in
    /// order is acknowledged only when a good part of the window is used up, so that one acknowledgment answers for many
    /// packets (RFC 9293, 3.10.7.4).
    pub fn set_more_queued(&mut self, more: bool) {
        self.more_queued = more;
        if !more {
            while let Some(slot) = self.held.pop() {
                self.touch(slot);
            }
        }
    }

    /// The next packet to send. Call until it returns `None`.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<TxPacket<'_>> {
        let now = self.clock.enter(now);
        let plan = self.next_plan(now)?;
        Some(match plan {
            Plan::Reply => TxPacket { header: &self.scratch.reply, payload: [&[], &[]], gso: None, checksum: None },
            Plan::Segment { slot, header_len, payload: (offset, len), gso, checksum } => {
                let connection = self.sockets.get(slot).and_then(Socket::connection);
                let payload = connection.map_or([&[][..], &[][..]], |connection| connection.payload(offset, len));
                TxPacket { header: &self.scratch.headers[..header_len], payload, gso, checksum }
            }
        })
    }

    fn next_plan(&mut self, now: Instant) -> Option<Plan> {
        loop {
            if let Some(packet) = self.looped.pop_front() {
                let arrival = Arrival { data: &packet, verify: false, gso_size: None, looped: true };
                self.receive(now, arrival, &mut |_, _| 0);
                if self.scratch.spare.len() < SPARE_MAX {
                    self.scratch.spare.push(packet);
                }
                continue;
            }
            if let Some(reply) = self.replies.pop() {
                if reply.looped {
                    self.looped.push_back(reply.packet);
                    continue;
                }
                if reply.packet.len() > self.config.mtu {
                    // Only echo replies get this long, and only when their requests came in fragments themselves.
                    let identification = (self.keys.random() & u64::from(u32::MAX)) as u32;
                    let fragments = crate::fragments::split(&reply.packet, self.config.mtu, identification);
                    self.replies.push_first(fragments);
                    continue;
                }
                self.scratch.reply = reply.packet;
                return Some(Plan::Reply);
            }
            let slot = self.ready.pop_front()?;
            let Some(socket) = self.sockets.get_mut(slot) else {
                continue;
            };
            socket.ready = false;
            let Socket { options, kind: Kind::Connection(connection), .. } = socket else {
                continue;
            };
            let env = Env { now, config: &self.config, options };
            connection.settle_acknowledgment(self.more_queued);
            let Some(emission) = connection.poll_output(&env) else {
                if connection.owes_acknowledgment() {
                    self.held.push(slot);
                }
                self.watch_timers(slot);
                continue;
            };
            let looped = connection.looped;
            let plan = write_headers(&mut self.scratch.headers, &self.config, options, slot, connection, &emission);
            // It may have more; others come first.
            socket.ready = true;
            self.ready.push_back(slot);
            if !looped {
                return Some(plan);
            }
            self.loop_back(plan);
        }
    }

    /// Puts a packet of this host to itself into the queue of those that arrive.
    fn loop_back(&mut self, plan: Plan) {
        let Plan::Segment { slot, header_len, payload: (offset, len), .. } = plan else {
            return;
        };
        let Some(connection) = self.sockets.get(slot).and_then(Socket::connection) else {
            return;
        };
        let mut packet = self.scratch.spare.pop().unwrap_or_default();
        packet.clear();
        packet.extend_from_slice(&self.scratch.headers[..header_len]);
        for part in connection.payload(offset, len) {
            packet.extend_from_slice(part);
        }
        self.looped.push_back(packet);
    }
}

/// Writes IP and TCP header of a segment.
fn write_headers(
    buffer: &mut [u8],
    config: &Config,
    options: &TcpOptions,
    slot: u32,
    connection: &Connection,
    emission: &Emission,
) -> Plan {
    let tuple = &connection.tuple;
    let ip_header = ip::Header {
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.1
        //# At all other times, a previous segment has either been sent or received on this connection, and TCP
        //# implementations MUST use the same local address that was used in those previous segments (MUST-45).
        source: tuple.local,
        destination: tuple.remote,
        protocol: ip::protocol::TCP,
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.2
        //# The TTL value used to send TCP segments MUST be configurable (MUST-49).
        hop_limit: options.ttl,
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.9
        //# The application layer MUST be able to specify the Differentiated Services field for segments that are sent
        //# on a connection (MUST-48).
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.9
        //# It is not required, but the application SHOULD be able to change the Differentiated Services field during
        //# the connection lifetime (SHLD-21).
        //= https://www.rfc-editor.org/rfc/rfc9293#section-3.9.1.9
        //# TCP implementations SHOULD pass the current Differentiated Services field value without change to the IP
        //# layer, when it sends segments on the connection (SHLD-22).
        traffic_class: (options.tos & !3) | emission.ecn,
        identification: emission.identification,
        flow_label: connection.flow_label(),
    };
    let start = ip_header.len();
    let tcp_len = emission.header.write(&mut buffer[start..]);
    let (offset, payload_len) = emission.payload;
    ip_header.write(buffer, tcp_len + payload_len);
    let header_len = start + tcp_len;
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //# The sender MUST generate it (MUST-2) and the receiver MUST check it (MUST-3).
    let pseudo = ip::pseudo_header_sum(tuple.local, tuple.remote, ip::protocol::TCP, tcp_len + payload_len);
    let mut checksum = None;
    if config.offload.checksum {
        buffer[start + 16..start + 18].copy_from_slice(&pseudo.to_be_bytes());
        checksum = Some(PartialChecksum { start: u16::try_from(start).unwrap_or(0), offset: 16 });
    } else if !connection.looped {
        let [first, second] = connection.payload(offset, payload_len);
        let sum = ip::internet_checksum(pseudo, &[&buffer[start..header_len], first, second]);
        buffer[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
    }
    let gso = emission.segment_size.map(|size| Gso {
        size,
        header_len: u16::try_from(header_len).unwrap_or(0),
        v6: tuple.remote.is_ipv6(),
        ecn: emission.header.flags.has(crate::tcp::segment::Flags::CWR),
    });
    Plan::Segment { slot, header_len, payload: emission.payload, gso, checksum }
}
