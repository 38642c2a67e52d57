//! CRIU as a contender: the same server as a plain process, dumped on one node and restored on the other with
//! `--tcp-established`.
//!
//! CRIU leaves to its user what migd does itself: the address, the network's knowledge of where it is, and the transport of the
//! image. Each is done here in the way that costs CRIU least: the image lies in memory (`/dev/shm`) that both nodes see, so
//! nothing is transported; the address is taken from the first node before the dump and its packets led to where nobody
//! answers, so that no packet filter is needed (`--network-lock skip`; CRIU's own lock by iptables costs about a millisecond a
//! connection); it is put on the second node before the restore and announced right after it. There is no pre-copy:
//! that needs the soft-dirty bits, which many kernels (this one among them, if `criu check --feature mem_dirty_track` says so)
//! are built without.

mod mounts;
mod stats;

use std::io;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use sys::netlink::{Hop, Netlink, Route};
use sys::netns::NetNamespace;
use sys::packet::PacketSocket;

use crate::shim::links::gratuitous_arp;
use mounts::Mounts;

/// Names the program to use instead of the `criu` on the path.
const VARIABLE: &str = "MIGD_CRIU";
const UPLINK: &str = "eth0";
/// A device whose packets nobody reads.
const NOWHERE: &str = "nowhere0";
/// Last bytes of the addresses that servers have on the lab's subnet, one after the other: more than start in the minutes for which
/// one must not be used again.
const HOSTS: RangeInclusive<u8> = 150..=249;
/// How long a dump or restore may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// A CRIU that works on this machine.
#[derive(Debug, Clone)]
pub(super) struct Criu {
    program: PathBuf,
    /// As `criu --version` has it.
    pub(super) version: String,
}

impl Criu {
    /// Looks for it and asks it whether it can do its work here; the reason otherwise, for people.
    pub(super) fn find() -> Result<Criu, String> {
        let program = std::env::var_os(VARIABLE).map_or_else(|| PathBuf::from("criu"), PathBuf::from);
        let said = |arguments: &[&str]| {
            let output = Command::new(&program).args(arguments).stdin(Stdio::null()).output().map_err(|error| {
                format!("can't run {}: {error} (`make criu` builds one; {VARIABLE} names it)", program.display())
            })?;
            let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
            Ok::<_, String>((output.status.success(), text))
        };
        let (_, version) = said(&["--version"])?;
        let version = version.lines().find_map(|line| line.strip_prefix("Version: ")).unwrap_or("?").trim().to_owned();
        let (works, text) = said(&["check"])?;
        if !works {
            let reason = text.lines().rev().find(|line| line.contains("Error")).unwrap_or("no reason given");
            return Err(format!("CRIU {version} does not work on this kernel: {}", reason.trim()));
        }
        Ok(Criu { program, version })
    }
}

/// The two ends of a move.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) source: NetNamespace,
    pub(super) target: NetNamespace,
}

/// A server that CRIU moves. It and its images end with this value.
#[derive(Debug)]
pub(super) struct Ward {
    criu: Criu,
    ends: Ends,
    mounts: Mounts,
    address: Ipv4Addr,
    prefix_length: u8,
    images: PathBuf,
    pid: u32,
    /// Until the dump, which ends the process.
    child: Option<Child>,
}

/// A move by CRIU, with the times between its steps.
#[derive(Debug, Clone)]
pub(super) struct CriuMove {
    /// Just before the first step.
    pub(super) began: Instant,
    /// When the address was announced on the target.
    pub(super) ended: Instant,
    /// Names and lengths of the parts, in milliseconds: by the clock, and of those marked by CRIU's own statistics.
    pub(super) phases: Vec<(String, f64)>,
}

impl Ward {
    /// Starts the program on the source, which gets one more address for it.
    pub(super) fn start(criu: &Criu, ends: Ends, address: Ipv4Addr, argv: &[String]) -> anyhow::Result<Ward> {
        sys::process::bequeath_nothing().context("can't keep descriptors from the server")?;
        let mounts = Mounts::new().context("can't make a mount namespace")?;
        let images = PathBuf::from(format!("/dev/shm/migd-bench-{}", std::process::id()));
        let prefix_length = crate::lab::Layout::SUBNET_LENGTH;
        ends.source.run(|| {
            let mut netlink = Netlink::open()?;
            let uplink = netlink.link(UPLINK)?.index;
            netlink.delete_route(Route::host(address.into(), 0))?;
            netlink.add_address(uplink, address.into(), prefix_length)
        })?;
        ends.target.run(|| without(address, prefix_length))?;
        ends.source.run(|| announce(address))?;
        // In a session of its own, as CRIU wants the tree that it dumps.
        let mut command = Command::new("setsid");
        command.args(argv).current_dir("/");
        let child = mounts.run(&ends.source, || {
            let null = || std::fs::File::options().read(true).write(true).open("/dev/null");
            command.stdin(null()?).stdout(null()?).stderr(null()?).spawn()
        });
        let child = child.with_context(|| format!("can't start {}", argv[0]))?;
        Ok(Ward {
            criu: criu.clone(),
            ends,
            mounts,
            address,
            prefix_length,
            images,
            pid: child.id(),
            child: Some(child),
        })
    }

    /// Moves it.
    ///
    /// # Errors
    /// What CRIU said.
    pub(super) fn move_away(&mut self) -> anyhow::Result<CriuMove> {
        let mut child = self.child.take().context("it was moved already")?;
        // What an earlier server left.
        let _ = std::fs::remove_dir_all(&self.images);
        std::fs::create_dir(&self.images).with_context(|| format!("can't make {}", self.images.display()))?;
        let (address, prefix_length) = (self.address, self.prefix_length);
        let began = Instant::now();
        // As long as this is there, packets for the address are led to it.
        let nowhere = self.ends.source.run(|| {
            let nowhere = sys::tun::create_plain(NOWHERE)?;
            let mut netlink = Netlink::open()?;
            let index = netlink.link(NOWHERE)?.index;
            netlink.set_up(index, None, None)?;
            netlink.replace_route(Route::host(address.into(), 0), Hop::Device(index))?;
            without(address, prefix_length)?;
            Ok(nowhere)
        })?;
        let locked = Instant::now();
        let pid = self.pid.to_string();
        let dumped = self.run(&self.ends.source, "dump", &["-t", &pid]);
        if dumped.is_err() {
            // CRIU lets it run on; it ends with this value.
            self.child = Some(child);
            return Err(dumped.expect_err("just seen"));
        }
        // Its number must be free for the restore.
        child.wait().context("can't reap the dumped server")?;
        let dump_done = Instant::now();
        self.ends.target.run(|| {
            // Nobody is to be told of the address before its connections are there.
            std::fs::write("/proc/sys/net/ipv4/conf/eth0/arp_ignore", "8")?;
            let mut netlink = Netlink::open()?;
            let uplink = netlink.link(UPLINK)?.index;
            netlink.add_address(uplink, address.into(), prefix_length)
        })?;
        let restored = self.run(&self.ends.target, "restore", &["-d"]);
        let restore_done = Instant::now();
        self.ends.target.run(|| {
            std::fs::write("/proc/sys/net/ipv4/conf/eth0/arp_ignore", "0")?;
            announce(address)
        })?;
        let ended = Instant::now();
        restored?;
        drop(nowhere);
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        let mut phases = vec![
            ("lock".to_owned(), ms(began, locked)),
            ("dump".to_owned(), ms(locked, dump_done)),
            ("restore".to_owned(), ms(dump_done, restore_done)),
            ("announce".to_owned(), ms(restore_done, ended)),
        ];
        phases.extend(stats::read(&self.images));
        Ok(CriuMove { began, ended, phases })
    }

    fn run(&self, namespace: &NetNamespace, verb: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let mut command = Command::new(&self.criu.program);
        command.arg(verb).args(arguments).arg("-D").arg(&self.images).arg("--tcp-established");
        command.args(["--network-lock", "skip", "-v1", "-o"]).arg(format!("{verb}.log"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut running = self.mounts.run(namespace, || command.spawn()).context("can't start criu")?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = running.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                // Fails only when it just ended.
                let _ = running.kill();
                let _ = running.wait();
                bail!("criu {verb} did not end within {} s", PATIENCE.as_secs());
            }
            // Short against what is measured.
            std::thread::sleep(Duration::from_micros(200));
        };
        if status.success() {
            return Ok(());
        }
        let log = std::fs::read_to_string(self.images.join(format!("{verb}.log"))).unwrap_or_default();
        // The last says what could not be done, and the one before it why.
        let errors: Vec<_> = log.lines().filter(|line| line.contains("Error") && !line.contains("FAILED")).collect();
        let error = match &errors[errors.len().saturating_sub(2)..] {
            [] => "no reason".to_owned(),
            last => last.join("; "),
        };
        bail!("criu {verb} failed ({status}): {error}")
    }
}

impl Drop for Ward {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only when it ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        } else {
            end(self.pid, &self.images);
        }
        let (address, prefix_length) = (self.address, self.prefix_length);
        for namespace in [&self.ends.source, &self.ends.target] {
            // The lab goes soon anyway, and with it what could not be removed.
            let _ = namespace.run(|| without(address, prefix_length));
        }
        let _ = std::fs::remove_dir_all(&self.images);
    }
}

/// Ends a restored process, which is nobody's child here, unless the number is somebody else's by now: its parent is the
/// system's first process and it was restored from these images only if they hold it.
fn end(pid: u32, images: &Path) {
    if !images.join(format!("core-{pid}.img")).exists() {
        return;
    }
    let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    let Ok(descriptor) = pidfd_open(number, PidfdFlags::empty()) else { return };
    // Fails only when it is gone already.
    let _ = pidfd_send_signal(&descriptor, Signal::KILL);
    let deadline = Instant::now() + Duration::from_secs(10);
    while Path::new(&format!("/proc/{pid}/exe")).exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Takes the address from the uplink of the calling thread's namespace.
fn without(address: Ipv4Addr, prefix_length: u8) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let uplink = netlink.link(UPLINK)?.index;
    netlink.delete_address(uplink, address.into(), prefix_length)
}

/// Tells the neighbours of the calling thread's namespace that the address is here.
fn announce(address: Ipv4Addr) -> io::Result<()> {
    let uplink = Netlink::open()?.link(UPLINK)?;
    let Some(mac) = uplink.ethernet else { return Err(io::Error::other("the uplink is no Ethernet")) };
    let packets = PacketSocket::open()?;
    for operation in [1, 2] {
        packets.send(uplink.index, &gratuitous_arp(mac, address, operation))?;
    }
    Ok(())
}

/// An address for a server that CRIU moves: on the lab's subnet, where no member is, and another one each time. Connections of an
/// earlier server that were open when it was killed stay in its node's kernel for minutes, since the address that their last segments
/// would leave from is gone; a connection of the next one with the same four numbers could not be restored beside it.
pub(super) fn address(node: Ipv4Addr) -> Ipv4Addr {
    static STARTED: AtomicU8 = AtomicU8::new(0);
    let [a, b, c, _] = node.octets();
    let number = STARTED.fetch_add(1, Ordering::Relaxed) % (HOSTS.end() - HOSTS.start() + 1);
    Ipv4Addr::new(a, b, c, HOSTS.start() + number)
}
