//! `migd bench flood`: what floods of forged segments leave of running transfers and of the service of new connections.
//!
//! A second client sends as fast as it can, through a raw socket: SYNs to the server's port or ACKs of connections that never
//! were, from addresses that nobody has, or resets and data with wrong numbers in the name of a running stream. Meanwhile the first client's
//! bulk stream is measured as it was before, and connects anew again and again. The flood takes processor time from the
//! stream however the server answers it, so the same is measured against a plain process, whose TCP is the kernel's.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;
use sys::netlink::{Hop, Netlink, Route};
use sys::netns::NetNamespace;
use sys::packet::PacketSocket;

use super::figures::{Spread, rounded};
use super::peer::ECHO;
use super::site::Killed;
use super::stack::Stack;
use super::stream::{Bulk, Direction};
use crate::demo::Interrupt;
use crate::lab::{Lab, Spec, own_name, remove_abandoned};

const NAME: &str = "bench";
const NODE: &str = "A";
const PORT: u16 = 5301;
const CLIENT: &str = "client1";
const ATTACKER: &str = "client2";
const UPLINK: &str = "eth0";
/// RFC 2544's addresses for benchmarks: nobody has them, and what is sent to them ends on the node, in a device that nobody
/// reads.
const FORGED: [u8; 2] = [198, 18];
const FORGED_PREFIX: u8 = 15;
const SINK: &str = "sink";
/// Flow, or flood, before each measurement.
const WARM_UP: Duration = Duration::from_millis(400);

/// Arguments of `migd bench flood`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// How often each flood is measured
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: u32,
    /// How long each measurement takes, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1500)]
    interval_ms: u64,
    /// Threads that send forged segments
    #[arg(long, value_name = "N", default_value_t = 1)]
    senders: usize,
    /// Only these floods
    #[arg(long = "flood", value_name = "NAME", value_delimiter = ',', default_values_t = FLOODS)]
    floods: Vec<Flood>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Flood {
    /// SYNs from addresses that nobody has.
    Syn,
    /// ACKs of connections that nobody has.
    Ack,
    /// Resets with wrong numbers in the name of a running stream.
    Rst,
    /// Data with wrong numbers in the name of a running stream.
    Data,
}

impl std::fmt::Display for Flood {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Flood::Syn => "syn",
            Flood::Ack => "ack",
            Flood::Rst => "rst",
            Flood::Data => "data",
        })
    }
}

const FLOODS: [Flood; 4] = [Flood::Syn, Flood::Ack, Flood::Rst, Flood::Data];

impl Flood {
    /// Which way the stream goes. Forged data may hit the window by chance, and what a stream that goes that way receives
    /// would then be the flood's, whatever the stack.
    fn directions(self) -> &'static [Direction] {
        if self == Flood::Data { &[Direction::Send] } else { &[Direction::Send, Direction::Receive] }
    }
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    senders: usize,
    runs: Vec<Run>,
}

#[derive(Debug, Serialize)]
struct Run {
    stack: Stack,
    flood: Flood,
    direction: Direction,
    /// Without the flood, just before it.
    quiet_gbit_s: Spread,
    flooded_gbit_s: Spread,
    /// Median of the rounds' shares.
    kept: f64,
    forged_per_s: f64,
    /// Connections made, used and ended during the flood, and those that failed.
    served: u64,
    failed: u64,
    /// Most resident memory of the shim before and during, in MiB; none when the kernel does it.
    shim_mib: Option<[f64; 2]>,
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
struct Figures {
    quiet: f64,
    flooded: f64,
    forged_per_s: f64,
    served: u64,
    failed: u64,
    shim: Option<[u64; 2]>,
}

pub(super) fn main(args: &Args) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.rounds > 0 && args.senders > 0, "at least one round and one sender are needed");
    let bench = Bench::new(args)?;
    let mut runs = Vec::new();
    for &flood in &args.floods {
        for &direction in flood.directions() {
            let mut figures = [Vec::new(), Vec::new()];
            for _ in 0..args.rounds {
                for (server, figures) in bench.servers.iter().zip(&mut figures) {
                    figures.push(bench.round(server, flood, direction)?);
                }
            }
            for (server, figures) in bench.servers.iter().zip(&figures) {
                let run = Run::of(server.stack, flood, direction, figures);
                if !args.json {
                    run.print();
                }
                runs.push(run);
            }
        }
    }
    if args.json {
        crate::cli::print_json(&Report { senders: args.senders, runs })?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Run {
    fn of(stack: Stack, flood: Flood, direction: Direction, rounds: &[Figures]) -> Run {
        let all = |figure: fn(&Figures) -> f64| Spread::of(rounds.iter().map(figure).collect());
        let shim_mib = rounds.iter().filter_map(|round| round.shim).fold(None, |most: Option<[f64; 2]>, bytes| {
            // Far below 2^52.
            let mib = bytes.map(|bytes| rounded(bytes as f64 / 1_048_576.0));
            Some(most.map_or(mib, |most| [most[0].max(mib[0]), most[1].max(mib[1])]))
        });
        Run {
            stack,
            flood,
            direction,
            quiet_gbit_s: all(|round| round.quiet),
            flooded_gbit_s: all(|round| round.flooded),
            kept: all(|round| round.flooded / round.quiet).median,
            forged_per_s: all(|round| round.forged_per_s).median.round(),
            served: rounds.iter().map(|round| round.served).sum(),
            failed: rounds.iter().map(|round| round.failed).sum(),
            shim_mib,
        }
    }

    fn print(&self) {
        let Run { stack, flood, direction, quiet_gbit_s, flooded_gbit_s, kept, forged_per_s, served, failed, shim_mib } =
            self;
        let direction = format!("{direction:?}").to_lowercase();
        let memory =
            shim_mib.map_or(String::new(), |[before, during]| format!("; shim {before:.1} MiB, then {during:.1}"));
        // Whoever closed the output does not want to read it.
        let _ = writeln!(
            std::io::stdout().lock(),
            "{}, {flood} flood, {forged_per_s} a second: {direction} {:.2} Gbit/s of {:.2} without it ({kept:.2}); {served} new \
             connections served, {failed} failed{memory}",
            stack.name(),
            flooded_gbit_s.median,
            quiet_gbit_s.median
        );
    }
}

/// A server under attack.
struct Target {
    stack: Stack,
    address: SocketAddr,
    /// Whose memory is looked at.
    shim: Option<u32>,
}

struct Bench<'a> {
    args: &'a Args,
    client: NetNamespace,
    attacker: NetNamespace,
    servers: Vec<Target>,
    /// Ethernet addresses of the attacker and of the node.
    ethernet: [[u8; 6]; 2],
    /// Index of the attacker's uplink.
    uplink: u32,
    // No process outlives its lab, no device either.
    _plain: Killed,
    _sink: OwnedFd,
    _lab: Lab,
    interrupt: Interrupt,
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args) -> anyhow::Result<Bench<'a>> {
        let interrupt = Interrupt::watch()?;
        remove_abandoned(NAME);
        let lab = Lab::up(&Spec { nodes: 1, clients: 2, ..Spec::new(own_name(NAME))? })?;
        let node = lab.namespace(NODE)?;
        let sink = node.run(make_sink).context("can't route the forged addresses away")?;

        let program = std::env::current_exe()?.display().to_string();
        let argv = [program.as_str(), "bench", "peer", "--port", &PORT.to_string()];
        let mut command = Command::new(argv[0]);
        command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::null());
        let plain = Killed(node.run(|| command.spawn())?);
        let host = lab.layout().member(NODE).context("the lab has no node A")?.address;
        let job = lab.run(NODE, "peer", &argv)?;
        let shim = job.pid.and_then(|pid| u32::try_from(pid).ok()).and_then(shim_of);
        let target = |stack, host, shim| Target { stack, address: SocketAddr::new(IpAddr::V4(host), PORT), shim };
        let servers = vec![target(Stack::Kernel, host, None), target(Stack::Migd, job.address, shim)];

        let attacker = lab.namespace(ATTACKER)?;
        let uplink_of = |namespace: &NetNamespace| namespace.run(|| Netlink::open()?.link(UPLINK));
        let (near, far) = (uplink_of(&attacker)?, uplink_of(&node)?);
        let (Some(from), Some(to)) = (near.ethernet, far.ethernet) else {
            anyhow::bail!("the lab's links have no Ethernet addresses")
        };
        let client = lab.namespace(CLIENT)?;
        Ok(Bench {
            args,
            client,
            attacker,
            servers,
            ethernet: [from, to],
            uplink: near.index,
            _plain: plain,
            _sink: sink,
            _lab: lab,
            interrupt,
        })
    }

    fn round(&self, target: &Target, flood: Flood, direction: Direction) -> anyhow::Result<Figures> {
        let interval = Duration::from_millis(self.args.interval_ms);
        let stream = Bulk::start(&self.client, target.address, direction, 1)
            .with_context(|| format!("no stream to {}", target.address))?;
        self.interrupt.sleep(WARM_UP)?;
        let quiet = stream.measure(interval)?;
        let before = target.shim.map(resident);
        let storm = self.storm(flood, stream.local_address()?, target.address)?;
        let visitor = Visitor::start(&self.client, target.address)?;
        self.interrupt.sleep(WARM_UP)?;
        let (began, sent) = (Instant::now(), storm.sent());
        let flooded = stream.measure(interval).context("during the flood")?;
        // Exact: far fewer than 2^53.
        let forged_per_s = (storm.sent() - sent) as f64 / began.elapsed().as_secs_f64();
        let during = target.shim.map(resident);
        let (served, failed) = visitor.end();
        drop(storm);
        self.interrupt.check()?;
        let shim = before.zip(during).map(|(before, during)| [before, during]);
        Ok(Figures { quiet, flooded, forged_per_s, served, failed, shim })
    }

    /// Starts a flood of `server`; `victim` is the client's end of the running stream.
    fn storm(&self, flood: Flood, victim: SocketAddr, server: SocketAddr) -> anyhow::Result<Storm> {
        let (IpAddr::V4(to), IpAddr::V4(client)) = (server.ip(), victim.ip()) else {
            anyhow::bail!("the lab's addresses are IPv4's")
        };
        let shared = Arc::new(Sending::default());
        let mut storm = Storm { shared: Arc::clone(&shared), threads: Vec::new() };
        for number in 0..self.args.senders {
            let mut forger = Forger::new(flood, (client, victim.port()), (to, server.port()), self.ethernet);
            forger.random ^= (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let socket = self.attacker.run(PacketSocket::open)?;
            let (shared, uplink) = (Arc::clone(&shared), self.uplink);
            storm.threads.push(std::thread::spawn(move || {
                while !shared.stop.load(Ordering::Relaxed) {
                    // A full queue is what a flood meets; what matters is what gets through.
                    if socket.send(uplink, forger.next()).is_ok() {
                        shared.sent.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }));
        }
        Ok(storm)
    }
}

/// Routes the forged addresses into a device that nobody reads, so that answers to them are really sent.
fn make_sink() -> std::io::Result<OwnedFd> {
    /// The device drops what is more.
    const QUEUE: u32 = 1;
    let device = sys::tun::create_plain(SINK)?;
    let mut netlink = Netlink::open()?;
    let index = netlink.link(SINK)?.index;
    netlink.set_up(index, None, Some(QUEUE))?;
    let destination = IpAddr::V4(Ipv4Addr::new(FORGED[0], FORGED[1], 0, 0));
    netlink.replace_route(Route { destination, prefix_length: FORGED_PREFIX, metric: 0 }, Hop::Device(index))?;
    Ok(device)
}

/// The shim above a job's first process.
fn shim_of(mut pid: u32) -> Option<u32> {
    // The job's init is between them.
    for _ in 0..3 {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        pid = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        if arguments.split(|&byte| byte == 0).nth(1) == Some(b"shim") {
            return Some(pid);
        }
    }
    None
}

/// Resident memory in bytes; zero when the process is gone.
fn resident(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kilobytes =
        text.lines().find_map(|line| line.strip_prefix("VmRSS:")).and_then(|rest| rest.split_whitespace().next());
    kilobytes.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0) * 1024
}

#[derive(Debug, Default)]
struct Sending {
    stop: AtomicBool,
    sent: AtomicU64,
}

/// A flood that lasts as long as this value.
struct Storm {
    shared: Arc<Sending>,
    threads: Vec<JoinHandle<()>>,
}

impl Storm {
    fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It can't panic.
            let _ = thread.join();
        }
    }
}

/// Makes forged segments, one after the other in the same buffer.
struct Forger {
    flood: Flood,
    victim: (Ipv4Addr, u16),
    frame: Vec<u8>,
    random: u64,
}

const ETHERNET: usize = 14;
const TCP: usize = ETHERNET + 20;
const HEADERS: usize = TCP + 20;
/// Payload of forged data, in bytes.
const PAYLOAD: usize = 100;

impl Forger {
    fn new(flood: Flood, victim: (Ipv4Addr, u16), server: (Ipv4Addr, u16), ethernet: [[u8; 6]; 2]) -> Forger {
        let mut frame = vec![0; HEADERS + if flood == Flood::Data { PAYLOAD } else { 0 }];
        let [from, to] = ethernet;
        frame[..6].copy_from_slice(&to);
        frame[6..12].copy_from_slice(&from);
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        // At most 140.
        let length = (frame.len() - ETHERNET) as u8;
        frame[ETHERNET..ETHERNET + 10].copy_from_slice(&[0x45, 0, 0, length, 0, 0, 0x40, 0, 64, 6]);
        frame[ETHERNET + 16..TCP].copy_from_slice(&server.0.octets());
        frame[TCP + 2..TCP + 4].copy_from_slice(&server.1.to_be_bytes());
        frame[TCP + 12] = 0x50;
        frame[TCP + 13] = match flood {
            Flood::Syn => 0x02,
            Flood::Ack => 0x10,
            Flood::Rst => 0x04,
            Flood::Data => 0x18,
        };
        frame[TCP + 14..TCP + 16].copy_from_slice(&0xffff_u16.to_be_bytes());
        Forger { flood, victim, frame, random: 1 }
    }

    fn next(&mut self) -> &[u8] {
        // xorshift64 (Marsaglia 2003)
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let bytes = self.random.to_be_bytes();
        let frame = &mut self.frame;
        if matches!(self.flood, Flood::Rst | Flood::Data) {
            frame[ETHERNET + 12..ETHERNET + 16].copy_from_slice(&self.victim.0.octets());
            frame[TCP..TCP + 2].copy_from_slice(&self.victim.1.to_be_bytes());
        } else {
            frame[ETHERNET + 12..ETHERNET + 16].copy_from_slice(&[FORGED[0], FORGED[1], bytes[0], bytes[1] | 1]);
            frame[TCP..TCP + 2].copy_from_slice(&[bytes[2] | 4, bytes[3]]);
        }
        frame[TCP + 4..TCP + 8].copy_from_slice(&bytes[4..]);
        if matches!(self.flood, Flood::Ack | Flood::Data) {
            frame[TCP + 8..TCP + 12].copy_from_slice(&bytes[2..6]);
        }
        frame[ETHERNET + 10..ETHERNET + 12].fill(0);
        let sum = checksum(0, &frame[ETHERNET..TCP]);
        frame[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum.to_be_bytes());
        frame[TCP + 16..TCP + 18].fill(0);
        // The pseudo header: addresses, protocol 6, length.
        let sum = checksum(6 + (frame.len() - TCP) as u32, &frame[ETHERNET + 12..]);
        frame[TCP + 16..TCP + 18].copy_from_slice(&sum.to_be_bytes());
        frame
    }
}

/// RFC 1071, of an even number of bytes.
fn checksum(start: u32, bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum = start + words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// Connects, has a few bytes sent back, and hangs up, again and again.
struct Visitor {
    shared: Arc<Visits>,
    thread: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Visits {
    stop: AtomicBool,
    served: AtomicU64,
    failed: AtomicU64,
}

impl Visitor {
    fn start(namespace: &NetNamespace, server: SocketAddr) -> std::io::Result<Visitor> {
        let shared = Arc::new(Visits::default());
        let visits = Arc::clone(&shared);
        // The thread that enters the namespace ends with `run`; the one it starts stays there.
        let thread = namespace.run(|| {
            Ok(std::thread::spawn(move || {
                while !visits.stop.load(Ordering::Relaxed) {
                    let count = if visit(server).is_ok() { &visits.served } else { &visits.failed };
                    count.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(5));
                }
            }))
        })?;
        Ok(Visitor { shared, thread })
    }

    /// Stops; returns how often it was served and how often not.
    fn end(self) -> (u64, u64) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // It can't panic.
        let _ = self.thread.join();
        (self.shared.served.load(Ordering::Relaxed), self.shared.failed.load(Ordering::Relaxed))
    }
}

fn visit(server: SocketAddr) -> std::io::Result<()> {
    /// A SYN may have to be sent three times.
    const PATIENCE: Duration = Duration::from_secs(8);
    let mut socket = TcpStream::connect_timeout(&server, PATIENCE)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.write_all(&[ECHO, 1, 2, 3])?;
    let mut answer = [0; 3];
    socket.read_exact(&mut answer)?;
    if answer == [1, 2, 3] { Ok(()) } else { Err(std::io::ErrorKind::InvalidData.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forged_segments_have_right_checksums() {
        let addresses = ((Ipv4Addr::new(10, 99, 0, 101), 40_000), (Ipv4Addr::new(10, 77, 0, 1), 5301));
        for flood in FLOODS {
            let mut forger = Forger::new(flood, addresses.0, addresses.1, [[2; 6], [4; 6]]);
            for _ in 0..100 {
                let frame = forger.next();
                let length = u16::from_be_bytes([frame[ETHERNET + 2], frame[ETHERNET + 3]]);
                assert_eq!(usize::from(length), frame.len() - ETHERNET);
                // A sum over data with its checksum is zero.
                assert_eq!(checksum(0, &frame[ETHERNET..TCP]), 0);
                assert_eq!(checksum(6 + (frame.len() - TCP) as u32, &frame[ETHERNET + 12..]), 0);
            }
        }
    }
}
