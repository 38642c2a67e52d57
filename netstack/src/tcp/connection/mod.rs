//! A connection from SYN-SENT or ESTABLISHED to its end.
//!
//! Half-open connections of a listener and connections in TIME-WAIT are small records of their own
//! ([`super::half_open`], [`super::time_wait`]); everything else is this.
//!
//! * [`parts`]: what it consists of beside its two streams.
//! * [`open`]: how it begins.
//! * [`program`]: what the program does with it.
//! * [`input`]: what a segment means, state by state.
//! * [`acknowledge`]: what an acknowledgment means for what is in flight.
//! * [`output`]: what to send next.
//! * [`timeout`]: what the timers do.
//! * [`mtu`]: how large its packets may be.
//! * [`look`]: what others ask of it.
//!
//! A connection is plain data and holds its whole state: serializing it is freezing it.

mod acknowledge;
mod input;
mod look;
mod mtu;
mod open;
mod output;
mod parts;
mod program;
mod timeout;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(crate) use self::input::Verdict;
pub(crate) use self::look::AfterThaw;
pub(crate) use self::open::{Beginning, mss_of, own_mss, path_mtu, receive_limit};
pub(crate) use self::output::Emission;
use self::parts::{Acknowledging, Ecn, ProbeKind, Probing, SegmentSize, SendWindow, Statistics, Timestamps, Usage};
use super::congestion::Controller;
use super::receive::Receiver;
use super::recovery::Recovery;
use super::rtt::RttEstimator;
use super::send::Sender;
use super::seq::Seq;
use super::timers::Timers;
use super::{Agreed, Tuple};
use crate::{Instant, SocketError, State};

/// Empty buffers up to this size are freed at once, larger ones when the connection has been idle for a while.
const KEEP_SMALL: usize = 16 << 10;
/// Idle time after which empty buffers are freed.
const RELEASE_AFTER: Duration = Duration::from_secs(2);
/// Acknowledgments sent at once at the start, so that the peer's window opens quickly (Linux: `TCP_MAX_QUICKACKS`).
const QUICK_ACKS: u8 = 16;
/// How long an acknowledgment waits for company (Linux: `TCP_DELACK_MIN`).
//= https://www.rfc-editor.org/rfc/rfc9293#section-3.8.6.3
//# A TCP endpoint SHOULD implement a delayed ACK (SHLD-18), but an ACK should not be excessively delayed; in
//# particular, the delay MUST be less than 0.5 seconds (MUST-40).
const DELAYED_ACK_MAX: Duration = Duration::from_millis(40);

/// A connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Connection {
    pub(crate) tuple: Tuple,
    pub(crate) state: State,
    /// This side opened it.
    active: bool,
    /// The program has closed it: nobody will read, and nobody cares how it ends.
    pub(crate) orphan: bool,
    /// `shutdown(SHUT_RD)`: what arrives is thrown away.
    read_shut: bool,
    /// The peer is this host.
    pub(crate) looped: bool,
    snd: Sender,
    rcv: Receiver,
    window: SendWindow,
    size: SegmentSize,
    agreed: Agreed,
    timestamps: Timestamps,
    rtt: RttEstimator,
    congestion: Controller,
    recovery: Recovery,
    usage: Usage,
    timers: Timers,
    acking: Acknowledging,
    ecn: Ecn,
    probing: Probing,
    /// The SYN or SYN-ACK is to leave now.
    syn_due: bool,
    /// How often it left again.
    syn_repeated: u8,
    syn_sent_at: Instant,
    #[serde(default)]
    opened_at: Instant,
    /// End of the last segment that wasn't full (Minshall's variant of Nagle's algorithm).
    small_end: Seq,
    /// What is corked leaves all the same up to here.
    uncorked: Seq,
    /// Error reported by ICMP, which matters only if the connection times out (RFC 1122, 4.2.3.9).
    soft_error: Option<SocketError>,
    last_data_sent: Instant,
    last_data_received: Instant,
    last_ack_received: Instant,
    last_received: Instant,
    flow_label: u32,
    identification: u16,
    statistics: Statistics,
}
