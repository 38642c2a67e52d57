//! The lab in which is measured, and the servers started in it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use sys::netns::NetNamespace;

use super::criu::{Criu, CriuMove, Ends, Ward};
use super::programs::Program;
use super::stack::Stack;
use super::stream::connect_within;
use crate::api::{MovePhase, SocketPlace};
use crate::demo::Interrupt;
use crate::lab::{Lab, Moved, Spec, own_name, remove_abandoned};

/// What the labs of benchmarks are called, with the process's number.
const NAME: &str = "bench";
/// The node on which every server starts.
pub(super) const HOME: &str = "A";
/// The node to which they move.
pub(super) const AWAY: &str = "B";
/// How long a server may take until it serves: one that fills gigabytes of memory first takes some seconds.
const SERVING: Duration = Duration::from_secs(60);
/// Last byte of the address that smoltcp's server has on the lab's subnet; members of labs have smaller ones.
const SMOLTCP_HOST: u8 = 250;

/// A lab of two nodes and a client that stands as long as this value.
pub(super) struct Site {
    lab: Lab,
    interrupt: Interrupt,
    /// The CRIU of this machine, or why there is none.
    criu: Result<Criu, String>,
}

impl Site {
    /// Makes the lab.
    pub(super) fn make() -> anyhow::Result<Site> {
        let interrupt = Interrupt::watch()?;
        remove_abandoned(NAME);
        let site = Site { lab: Lab::up(&Spec::new(own_name(NAME))?)?, interrupt, criu: Criu::find() };
        std::fs::create_dir_all(site.files()).context("can't make a directory for the servers' files")?;
        Ok(site)
    }

    /// The client's namespace.
    pub(super) fn client(&self) -> std::io::Result<NetNamespace> {
        self.lab.namespace("client1")
    }

    /// The namespace of a node.
    pub(super) fn node(&self, name: &str) -> std::io::Result<NetNamespace> {
        self.lab.namespace(name)
    }

    /// Why this stack can't be measured here at all, for people.
    pub(super) fn unavailable(&self, stack: Stack) -> Option<String> {
        match stack {
            Stack::Criu => self.criu.as_ref().err().cloned(),
            Stack::Kernel | Stack::Migd | Stack::MigdMoved | Stack::HomeRouted | Stack::Smoltcp => None,
        }
    }

    /// The version of CRIU, when there is one that works.
    pub(super) fn criu_version(&self) -> Option<&str> {
        self.criu.as_ref().ok().map(|criu| criu.version.as_str())
    }

    /// A directory for files of the servers; goes with the lab.
    pub(super) fn files(&self) -> PathBuf {
        self.lab.names().root().join("bench")
    }

    /// Sleeps; an error when a signal came meanwhile.
    pub(super) fn sleep(&self, duration: Duration) -> anyhow::Result<()> {
        self.interrupt.sleep(duration)
    }

    /// An error once a signal came.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        self.interrupt.check()
    }

    /// Starts a program on node A: as a plain process or as a job called `name`, as the stack wants it. Where it is the move
    /// that makes the stack ([`Server::move_away`]), the program has not moved yet.
    pub(super) fn start(&self, stack: Stack, name: &str, program: Program) -> anyhow::Result<Server<'_>> {
        match stack {
            Stack::Kernel => self.start_plain(program),
            Stack::Smoltcp => self.start_smoltcp(program),
            Stack::Migd | Stack::MigdMoved => self.start_job(name, program, false),
            Stack::HomeRouted => self.start_job(name, program, true),
            Stack::Criu => self.start_ward(program),
        }
    }

    /// As a plain process on node A: the kernel does its TCP.
    fn start_plain(&self, program: Program) -> anyhow::Result<Server<'_>> {
        let node = self.lab.layout().member(HOME).context("the lab has no node A")?;
        let child = self.spawn(&program.argv(&self.files())?)?;
        Ok(Server { address: address(node.address, program), runs: Runs::Plain { _process: Killed(child) } })
    }

    /// smoltcp's server on node A, at an address of its own.
    fn start_smoltcp(&self, program: Program) -> anyhow::Result<Server<'_>> {
        if program == Program::Redis {
            bail!("redis can't run on smoltcp, which has no sockets that a program could use");
        }
        let node = self.lab.layout().member(HOME).context("the lab has no node A")?;
        let [a, b, c, _] = node.address.octets();
        let host = Ipv4Addr::new(a, b, c, SMOLTCP_HOST);
        let own = std::env::current_exe().context("the path of this program")?.display().to_string();
        let child = self.spawn(&[own, "bench".into(), "smoltcp".into(), "--address".into(), host.to_string()])?;
        Ok(Server { address: address(host, program), runs: Runs::Plain { _process: Killed(child) } })
    }

    /// As a process that CRIU can move, on node A.
    fn start_ward(&self, program: Program) -> anyhow::Result<Server<'_>> {
        let criu = self.criu.as_ref().map_err(|reason| anyhow::anyhow!("{reason}"))?;
        let node = self.lab.layout().member(HOME).context("the lab has no node A")?;
        let host = super::criu::address(node.address);
        let ends = Ends { source: self.node(HOME)?, target: self.node(AWAY)? };
        let ward = Ward::start(criu, ends, host, &program.argv(&self.files())?)?;
        Ok(Server { address: address(host, program), runs: Runs::Ward(Box::new(ward)) })
    }

    fn spawn(&self, argv: &[String]) -> anyhow::Result<Child> {
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let child = self.lab.namespace(HOME)?.run(|| command.spawn());
        child.with_context(|| format!("can't start {}", argv[0]))
    }

    /// As a job on node A.
    fn start_job(&self, name: &str, program: Program, sockets_stay: bool) -> anyhow::Result<Server<'_>> {
        let argv = program.argv(&self.files())?;
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let view = self.lab.run(HOME, name, &argv)?;
        let runs = Runs::Job { lab: &self.lab, name: name.to_owned(), node: HOME, sockets_stay };
        Ok(Server { address: address(view.address, program), runs })
    }

    /// Returns when a client can connect.
    pub(super) fn wait_until_it_serves(&self, server: SocketAddr) -> anyhow::Result<()> {
        let connected = self.client()?.run(|| connect_within(server, SERVING));
        connected.map(drop).with_context(|| format!("{server} does not serve"))
    }
}

fn address(host: Ipv4Addr, program: Program) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(host), program.port())
}

/// A server that runs as long as this value lives.
pub(super) struct Server<'site> {
    address: SocketAddr,
    runs: Runs<'site>,
}

enum Runs<'site> {
    Plain { _process: Killed },
    Job { lab: &'site Lab, name: String, node: &'static str, sockets_stay: bool },
    Ward(Box<Ward>),
}

/// A move and what it was made of.
#[derive(Debug, Clone)]
pub(super) struct Movement {
    /// Just before its first step.
    pub(super) began: Instant,
    /// When it was known to be done.
    pub(super) ended: Instant,
    /// For how long the server stood by the mover's own account, in milliseconds.
    pub(super) stood_ms: f64,
    /// Names and lengths of its parts, in milliseconds.
    pub(super) phases: Vec<(String, f64)>,
}

impl Server<'_> {
    /// Where it serves, wherever it runs.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Moves it to node B.
    ///
    /// # Errors
    /// When it does not move, or is on a stack that can't.
    pub(super) fn move_away(&mut self) -> anyhow::Result<Movement> {
        match &mut self.runs {
            Runs::Plain { .. } => bail!("a plain process can't be moved"),
            Runs::Job { lab, name, node, sockets_stay } => {
                let sockets = if *sockets_stay { SocketPlace::Home } else { SocketPlace::Along };
                let Moved { summary, began, ended } = lab.move_job_with(name, node, AWAY, sockets)?;
                *node = AWAY;
                let phase = |phase: MovePhase| (phase.name, milliseconds(phase.duration_us));
                Ok(Movement {
                    began,
                    ended,
                    stood_ms: milliseconds(summary.downtime_us),
                    phases: summary.phases.into_iter().map(phase).collect(),
                })
            }
            Runs::Ward(ward) => {
                let CriuMove { began, ended, phases } = ward.move_away()?;
                Ok(Movement { began, ended, stood_ms: (ended - began).as_secs_f64() * 1e3, phases })
            }
        }
    }
}

/// A process that ends with this value.
pub(super) struct Killed(pub(super) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Both fail only when it ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn milliseconds(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64() * 1e3
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        // All fail only when it ended by itself; the lab's end takes whatever is left.
        match &mut self.runs {
            Runs::Job { lab, name, node, .. } => {
                let _ = lab.kill(node, name);
            }
            // These end with their values.
            Runs::Plain { .. } | Runs::Ward(_) => {}
        }
    }
}
