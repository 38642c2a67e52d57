//! The lab in which is measured, and the servers started in it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use sys::netns::NetNamespace;

use super::programs::Program;
use super::stack::Stack;
use super::stream::connect;
use crate::demo::Interrupt;
use crate::lab::{Lab, Moved, Spec, own_name, remove_abandoned};

/// What the labs of benchmarks are called, with the process's number.
const NAME: &str = "bench";
/// The node on which every server starts.
pub(super) const HOME: &str = "A";
/// The node to which they move.
pub(super) const AWAY: &str = "B";
/// Last byte of the address that smoltcp's server has on the lab's subnet; members of labs have smaller ones.
const SMOLTCP_HOST: u8 = 250;

/// A lab of two nodes and a client that stands as long as this value.
pub(super) struct Site {
    lab: Lab,
    interrupt: Interrupt,
}

impl Site {
    /// Makes the lab.
    pub(super) fn make() -> anyhow::Result<Site> {
        let interrupt = Interrupt::watch()?;
        remove_abandoned(NAME);
        let site = Site { lab: Lab::up(&Spec::new(own_name(NAME))?)?, interrupt };
        std::fs::create_dir_all(site.files()).context("can't make a directory for the servers' files")?;
        Ok(site)
    }

    /// The client's namespace.
    pub(super) fn client(&self) -> std::io::Result<NetNamespace> {
        self.lab.namespace("client1")
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

    /// Starts a program: as a plain process or as a job called `name`, as the stack wants it.
    pub(super) fn start(&self, stack: Stack, name: &str, program: Program) -> anyhow::Result<Server<'_>> {
        match stack {
            Stack::Kernel => self.start_plain(program),
            Stack::Smoltcp => self.start_smoltcp(program),
            Stack::Migd => self.start_job(name, program),
            Stack::MigdMoved => {
                let mut server = self.start_job(name, program)?;
                self.wait_until_it_serves(server.address())?;
                server.move_away()?;
                Ok(server)
            }
        }
    }

    /// As a plain process on node A: the kernel does its TCP.
    fn start_plain(&self, program: Program) -> anyhow::Result<Server<'_>> {
        let node = self.lab.layout().member(HOME).context("the lab has no node A")?;
        let child = self.spawn(&program.argv(&self.files())?)?;
        Ok(Server { address: address(node.address, program), runs: Runs::Plain(child) })
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
        Ok(Server { address: address(host, program), runs: Runs::Plain(child) })
    }

    fn spawn(&self, argv: &[String]) -> anyhow::Result<Child> {
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let child = self.lab.namespace(HOME)?.run(|| command.spawn());
        child.with_context(|| format!("can't start {}", argv[0]))
    }

    /// As a job on node A.
    fn start_job(&self, name: &str, program: Program) -> anyhow::Result<Server<'_>> {
        let argv = program.argv(&self.files())?;
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let view = self.lab.run(HOME, name, &argv)?;
        let runs = Runs::Job { lab: &self.lab, name: name.to_owned(), node: HOME };
        Ok(Server { address: address(view.address, program), runs })
    }

    /// Returns when a client can connect.
    pub(super) fn wait_until_it_serves(&self, server: SocketAddr) -> anyhow::Result<()> {
        let connected = self.client()?.run(|| connect(server));
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
    Plain(Child),
    Job { lab: &'site Lab, name: String, node: &'static str },
}

impl Server<'_> {
    /// Where it serves, wherever it runs.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Moves a job to node B.
    ///
    /// # Errors
    /// When it does not move, or is no job.
    pub(super) fn move_away(&mut self) -> anyhow::Result<Moved> {
        match &mut self.runs {
            Runs::Plain(_) => bail!("a plain process can't be moved"),
            Runs::Job { lab, name, node } => {
                let moved = lab.move_job(name, node, AWAY)?;
                *node = AWAY;
                Ok(moved)
            }
        }
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        // All fail only when it ended by itself; the lab's end takes whatever is left.
        match &mut self.runs {
            Runs::Plain(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Runs::Job { lab, name, node } => {
                let _ = lab.kill(node, name);
            }
        }
    }
}
