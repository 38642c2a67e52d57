//! A program with sockets behind a TUN device on which every packet to it is written by hand, and every packet of it read:
//! once with the kernel's TCP, once with ours.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use sys::epoll::{Epoll, Events, Interest};
use sys::netns::{NetNamespace, remove_named};

use super::packet::{Answer, Kind, echo};

/// How long anything may take on a busy machine before it counts as not happening.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stack {
    Kernel,
    Ours,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    fn pick(self, v4: &str, v6: &str) -> IpAddr {
        match self {
            Family::V4 => v4.parse().expect("an address"),
            Family::V6 => v6.parse().expect("an address"),
        }
    }
}

pub struct Rig {
    pub stack: Stack,
    pub family: Family,
    /// Where the program is.
    pub server: IpAddr,
    /// Where injected packets come from.
    pub client: IpAddr,
    fence: IpAddr,
    fences: u16,
    namespace: String,
    tun: File,
    epoll: Epoll,
    actor: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Rig {
    pub fn new(stack: Stack, family: Family) -> Rig {
        let namespace = format!("migd-diff-{}-{stack:?}{family:?}", std::process::id()).to_lowercase();
        let server = family.pick("10.77.0.5", "fd77::5");
        let tun = NetNamespace::create_named(&namespace)
            .expect("a namespace (this needs root)")
            .run(|| sys::tun::create_plain("inject"))
            .expect("a TUN device");
        let ip = |arguments: &str| {
            let done = Command::new("ip").args(["-n", &namespace]).args(arguments.split(' ')).status().expect("run ip");
            assert!(done.success(), "ip {arguments}: {done}");
        };
        ip("link set lo up");
        ip("link set inject up txqueuelen 5000");
        ip("route add 10.88.0.0/16 dev inject");
        ip("-6 route add fd88::/64 dev inject");
        let set = |name: &str, value: &str| {
            let arguments = ["netns", "exec", &namespace, "sysctl", "-qw", &format!("net.{name}={value}")];
            let done = Command::new("ip").args(arguments).status().expect("run sysctl");
            assert!(done.success(), "{name}: {done}");
        };
        set("ipv4.ip_forward", "1");
        set("ipv6.conf.all.forwarding", "1");
        set("ipv4.conf.all.rp_filter", "0");
        set("ipv4.conf.inject.rp_filter", "0");
        set("ipv4.tcp_no_metrics_save", "1");
        // Without it the kernel gathers acknowledgments of what is out of order for a millisecond.
        set("ipv4.tcp_comp_sack_nr", "0");
        // Fences would run into the limit of answers.
        set("ipv4.icmp_ratelimit", "0");
        set("ipv6.icmp.ratelimit", "0");
        let script = format!("{}/tests/programs/actor.py", env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &namespace]);
        match stack {
            Stack::Kernel => {
                ip(match family {
                    Family::V4 => "addr add 10.77.0.5/32 dev lo",
                    Family::V6 => "addr add fd77::5/128 dev lo nodad",
                });
            }
            Stack::Ours => {
                command.arg(netplane()).args([&server.to_string(), "mig5"]);
            }
        }
        // What the kernel does it has done when the command comes; ours gets as long as a busy machine may take.
        let patience = if stack == Stack::Kernel { "2" } else { "30" };
        command.args(["python3", &script, patience]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut actor = command.spawn().expect("the program starts");
        let commands = actor.stdin.take().expect("piped");
        let answers = BufReader::new(actor.stdout.take().expect("piped"));
        let epoll = Epoll::new().expect("epoll");
        epoll.add(tun.as_fd(), 0, Interest::IN).expect("epoll");
        let mut rig = Rig {
            stack,
            family,
            server,
            client: family.pick("10.88.0.2", "fd88::2"),
            fence: family.pick("10.88.0.9", "fd88::9"),
            fences: 0,
            namespace,
            tun: File::from(tun),
            epoll,
            actor,
            commands,
            answers,
        };
        // The first answer says that the program and everything under it is there.
        let family = rig.family_name();
        assert_eq!(rig.call(&format!("open first {family}")), "ok");
        rig
    }

    pub fn family_name(&self) -> &'static str {
        match self.family {
            Family::V4 => "4",
            Family::V6 => "6",
        }
    }

    /// Each case has a client of its own, since the kernel remembers what it learned of a path.
    pub fn choose_client(&mut self, number: u16) {
        self.client = match self.family {
            Family::V4 => format!("10.88.{}.{}", 1 + number / 200, 1 + number % 200).parse().expect("an address"),
            Family::V6 => format!("fd88::1:{number:x}").parse().expect("an address"),
        };
    }

    /// Has the program carry out a command.
    pub fn call(&mut self, command: &str) -> String {
        self.commands.write_all(format!("{command}\n").as_bytes()).expect("the program lives");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the program answers");
        assert!(!line.is_empty(), "{:?}: the program ended at {command}", self.stack);
        line.trim_end().to_owned()
    }

    pub fn inject(&mut self, packet: &[u8]) {
        let written = self.tun.write(packet).expect("the device takes packets");
        assert_eq!(written, packet.len());
    }

    /// What has come back, when nothing more will: the program's host has answered everything that came before. Of
    /// answers that `counts` says matter, at least `least` are waited for, so long.
    pub fn collect(&mut self, least: usize, patience: Duration, counts: impl Fn(&Answer) -> bool) -> Vec<Answer> {
        let mut found: Vec<Answer> = Vec::new();
        let deadline = Instant::now() + patience;
        let enough = |found: &[Answer]| found.iter().filter(|answer| counts(answer)).count() >= least;
        while !enough(&found) && Instant::now() < deadline {
            found.extend(self.next(Duration::from_millis(20)));
        }
        // Twice: what a packet causes may leave after the answer to the next one, but not after that to the one beyond.
        for _ in 0..2 {
            self.fences += 1;
            self.inject(&echo(self.fence, self.server, self.fences));
            loop {
                match self.next(Duration::from_millis(20)) {
                    Some(Answer { kind: Kind::EchoReply(number), .. }) if number == self.fences => break,
                    Some(answer) => found.push(answer),
                    None => assert!(Instant::now() < deadline + PATIENCE, "{:?} does not answer", self.stack),
                }
            }
        }
        found
    }

    fn next(&mut self, patience: Duration) -> Option<Answer> {
        let mut buffer = [0; 65_536];
        let deadline = Instant::now() + patience;
        loop {
            match self.tun.read(&mut buffer) {
                Ok(length) => {
                    let answer = Answer::parse(&buffer[..length]);
                    // The kernel's own business on the device, such as looking for routers, is none of ours.
                    if let Some(answer) = answer.filter(|answer| answer.source == self.server) {
                        return Some(answer);
                    }
                }
                Err(_) if Instant::now() >= deadline => return None,
                Err(_) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    self.epoll.wait(&mut Events::with_capacity(1), Some(left)).expect("epoll");
                }
            }
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // All fail only when it is gone already.
        let _ = self.actor.kill();
        let _ = self.actor.wait();
        let _ = remove_named(&self.namespace);
    }
}

/// Cargo builds examples next to the tests.
fn netplane() -> PathBuf {
    let test = std::env::current_exe().expect("own path");
    let path = test.parent().and_then(Path::parent).expect("target directory").join("examples/netplane");
    assert!(path.exists(), "{} is missing: cargo build -p migd --examples", path.display());
    path
}
