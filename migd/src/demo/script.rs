//! The demonstration step by step.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};
use sys::capture::Sieve;
use sys::netns::NetNamespace;

use super::Interrupt;
use super::clients::{CHANNEL, COUNTER, Client, VALUE, count, download, subscribe};
use super::redis::{Connection, Reply, encode};
use super::report::{MoveReport, Report, longest, milliseconds, print_timeline};
use super::wire::{Passed, Watch};
use crate::lab::{Engine, Lab, Moved, Spec, own_name, remove_abandoned, require};

/// Size of the value that is downloaded.
const VALUE_SIZE: usize = 64 << 20;
/// What the lab and the job are called.
const NAME: &str = "demo";
const JOB: &str = "redis";
const PORT: u16 = 6379;
/// The nodes that the server visits.
const ROUTE: [&str; 4] = ["A", "B", "A", "B"];
/// How long redis may take until it serves.
const SERVING: Duration = Duration::from_secs(20);
/// Undisturbed work before the first move and after each move's settling.
const CALM: Duration = Duration::from_millis(1500);
/// From a move's end until the old node must be out of the path; the client's stall is looked for until then.
const SETTLE: Duration = Duration::from_millis(200);
/// Size of the entries of the data set.
const ENTRY: usize = 4096;
/// Entries sent before their answers are read.
const ENTRIES_AHEAD: usize = 256;
const MESSAGE: &[u8] = b"still there";

pub(super) struct Settings {
    pub(super) dataset_mb: usize,
    pub(super) quiet: bool,
    pub(super) directory: Engine,
}

impl Settings {
    fn say(&self, what: &str) {
        if !self.quiet {
            // Whoever closed the output does not want to read it.
            let _ = writeln!(std::io::stdout(), "{what}");
        }
    }
}

/// Carries the demonstration out in a lab of its own, which is gone when this returns.
pub(super) fn run(settings: &Settings, interrupt: &Interrupt) -> anyhow::Result<Report> {
    remove_abandoned(NAME);
    settings.say("making a lab: nodes A and B, a client, a switch");
    let spec = Spec { etcd: settings.directory.members(), ..Spec::new(own_name(NAME))? };
    let lab = Lab::up(&spec)?;
    let address = start_redis(&lab)?;
    let server = SocketAddr::new(IpAddr::V4(address), PORT);
    let client = || lab.namespace("client1");
    let mut control = wait_until_it_serves(&client()?, server, interrupt)?;
    settings.say(&format!("redis-server runs on node A at {server}"));

    let value = random_bytes(VALUE_SIZE, 1);
    let hash: [u8; 32] = Sha256::digest(&value).into();
    expect_ok(&control.command(&[b"SET", VALUE.as_bytes(), &value])?)?;
    drop(value);
    fill(&mut control, settings, interrupt)?;

    settings.say("clients: one counts, one downloads 64 MB again and again, one is subscribed and idle");
    let subscriber = subscribe(client()?, server, 1).context("the subscriber can't subscribe")?;
    let counter = count(client()?, server);
    let downloader = download(client()?, server, VALUE_SIZE, hash);
    interrupt.sleep(CALM)?;

    let mut moves = Vec::new();
    let mut counts = Vec::new();
    for (number, hop) in ROUTE.windows(2).enumerate() {
        let [from, to] = hop else { continue };
        // While the job moves, the directory loses a member, and gets it back while it moves the next time.
        let moved = std::thread::scope(|scope| {
            let member = scope.spawn(|| disturb(settings, &lab, number));
            let moved = lab.move_job(JOB, from, to);
            let disturbed = member.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            disturbed.and(moved)
        })?;
        settings.say(&format!(
            "moved from {from} to {to}: the server stood {:.1} ms, {:.0} ms in all",
            milliseconds(Duration::from_micros(moved.summary.downtime_us)),
            milliseconds(Duration::from_micros(moved.summary.total_us)),
        ));
        interrupt.sleep(SETTLE)?;
        let watch = Watch::start(&lab.namespace(from)?, Sieve::Host(address));
        let watch = watch.with_context(|| format!("can't watch the link of node {from}"))?;
        interrupt.sleep(CALM)?;
        counts.push(watch.stop().with_context(|| format!("can't watch the link of node {from}"))?);
        moves.push(moved);
    }

    let counted = counter.stop();
    let downloaded = downloader.stop();
    let exact = count_agrees(&mut control, counted.operations.len())? && counted.wrong_replies == 0;
    let published = control.command(&[b"PUBLISH", CHANNEL.as_bytes(), MESSAGE])?;
    let subscribed = wait_for(subscriber);
    let message_received = published == Reply::Integer(1) && subscribed.messages == [MESSAGE];

    if !settings.quiet {
        print_timeline(&counted, &downloaded, &moves);
    }
    let broken = [&counted.broken, &downloaded.broken, &subscribed.broken];
    for reason in broken.into_iter().flatten() {
        eprintln!("migd: a client's connection broke: {reason}");
    }
    let via_old = |passed: &Passed| passed.bytes.max(u64::from(passed.lost));
    let reports = moves
        .iter()
        .zip(&counts)
        .map(|(moved, passed)| MoveReport::new(moved, &counted.operations, SETTLE, via_old(passed)));
    let mut report = Report {
        moves: reports.collect(),
        connections_broken: broken.into_iter().flatten().count() as u64,
        ops: counted.operations.len() as u64,
        counter_exact: exact,
        downloads: downloaded.downloads,
        hash_mismatches: downloaded.hash_mismatches,
        message_received,
        bytes_via_old_node: counts.iter().map(via_old).sum(),
        undisturbed_stall_ms: milliseconds(undisturbed(&counted.operations, &moves)),
        ok: false,
    };
    report.ok = report.connections_broken == 0
        && report.counter_exact
        && report.downloads > 0
        && report.hash_mismatches == 0
        && report.message_received
        && report.bytes_via_old_node == 0
        && report.moves.len() == ROUTE.len() - 1;
    Ok(report)
}

/// What happens to the directory's etcd during the move of this number.
fn disturb(settings: &Settings, lab: &Lab, number: usize) -> anyhow::Result<()> {
    let Some(member) = lab.layout().etcd.first() else { return Ok(()) };
    match number {
        1 => {
            lab.kill_etcd(&member.name)?;
            settings.say(&format!("killed the etcd member {}", member.name));
        }
        2 => {
            lab.restart_etcd(&member.name)?;
            settings.say(&format!("started the etcd member {} again", member.name));
        }
        _ => {}
    }
    Ok(())
}

fn start_redis(lab: &Lab) -> anyhow::Result<std::net::Ipv4Addr> {
    require("redis-server", "redis-server")?;
    let port = PORT.to_string();
    let command = ["redis-server", "--port", &port, "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""];
    Ok(lab.run("A", JOB, &command)?.address)
}

fn wait_until_it_serves(
    client: &NetNamespace,
    server: SocketAddr,
    interrupt: &Interrupt,
) -> anyhow::Result<Connection> {
    let deadline = Instant::now() + SERVING;
    loop {
        let tried = client.run(|| {
            let mut connection = Connection::open(server)?;
            connection.command(&[b"PING"]).map(|reply| (connection, reply))
        });
        match tried {
            Ok((connection, Reply::Simple(text))) if text == "PONG" => return Ok(connection),
            Ok((_, other)) => bail!("redis answered PING by {other:?}"),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("redis does not serve {server} within {SERVING:?}"));
            }
            Err(_) => interrupt.sleep(Duration::from_millis(20))?,
        }
    }
}

/// Sets entries of random content until the data set is as large as was asked for.
fn fill(control: &mut Connection, settings: &Settings, interrupt: &Interrupt) -> anyhow::Result<()> {
    let entries = settings.dataset_mb * (1 << 20) / ENTRY;
    if entries == 0 {
        return Ok(());
    }
    settings.say(&format!("filling redis with {} MB", settings.dataset_mb));
    let random = random_bytes(ENTRY * 2, 2);
    let mut batch = Vec::new();
    let mut waiting = 0;
    for number in 0..entries {
        let key = format!("demo:entry:{number}");
        // Each entry another window of the same random bytes: no two neighbours alike, and cheap to make.
        batch.extend(encode(&[b"SET", key.as_bytes(), &random[number % ENTRY..][..ENTRY]]));
        waiting += 1;
        if waiting == ENTRIES_AHEAD || number + 1 == entries {
            interrupt.check()?;
            control.send(&batch)?;
            batch.clear();
            for _ in 0..std::mem::take(&mut waiting) {
                expect_ok(&control.reply()?)?;
            }
        }
    }
    Ok(())
}

fn expect_ok(reply: &Reply) -> anyhow::Result<()> {
    match reply {
        Reply::Simple(text) if text == "OK" => Ok(()),
        other => bail!("redis answered SET by {other:?}"),
    }
}

/// Whether the counter in redis is the number of acknowledged operations.
fn count_agrees(control: &mut Connection, acknowledged: usize) -> anyhow::Result<bool> {
    let reply = control.command(&[b"GET", COUNTER.as_bytes()])?;
    Ok(reply == Reply::Bulk(Some(acknowledged.to_string().into_bytes())))
}

/// Gives the subscriber time for its message, which is under way.
fn wait_for<T: Default + Send + 'static>(client: Client<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !client.has_ended() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    client.stop()
}

/// The longest operation in the calm before, between and after the moves.
fn undisturbed(operations: &[super::clients::Operation], moves: &[Moved]) -> Duration {
    let (Some(first), Some(last)) = (operations.first(), operations.last()) else { return Duration::ZERO };
    // An operation that reaches into a move is the move's.
    let margin = Duration::from_millis(100);
    let begins = std::iter::once(first.began).chain(moves.iter().map(|one| one.ended + SETTLE + margin));
    let ends = moves.iter().map(|one| one.began - margin).chain(std::iter::once(last.ended));
    begins.zip(ends).map(|(from, to)| longest(operations, from, to)).max().unwrap_or_default()
}

/// Bytes that don't compress and don't repeat (xorshift64*); the same for the same seed.
fn random_bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}
