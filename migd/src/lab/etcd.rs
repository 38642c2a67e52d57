//! The members of the etcd that a lab's directory is in, if it is not a node's: Debian's etcd-server, each in a namespace of
//! its own on the switch, its data in the lab's directory.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use sys::netns::NetNamespace;

use super::Lab;
use super::layout::{Layout, Member, Names};
use super::nodes::MARK;

const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;
/// How long members may take to be ready: an election takes a second or two, more on a busy machine.
const READY: Duration = Duration::from_secs(60);
/// How long one may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// A member that this process started.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// SIGKILL, and its zombie reaped.
    pub(super) fn kill(mut self) {
        // Both fail only when it ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The place of the directory, as the daemons are told it.
pub(super) fn place(layout: &Layout) -> Option<String> {
    let endpoint = |member: &Member| format!("http://{}:{CLIENT_PORT}", member.address);
    let endpoints: Vec<_> = layout.etcd.iter().map(endpoint).collect();
    (!endpoints.is_empty()).then(|| format!("etcd:{}", endpoints.join(",")))
}

fn start(names: &Names, layout: &Layout, member: &Member) -> anyhow::Result<Process> {
    let state = names.state(&member.name);
    std::fs::create_dir_all(&state).with_context(|| format!("can't make {}", state.display()))?;
    let log = state.join("etcd.log");
    let output = File::options().create(true).append(true).open(&log);
    let output = output.with_context(|| format!("can't write {}", log.display()))?;
    let url = |member: &Member, port| format!("http://{}:{port}", member.address);
    let all: Vec<_> = layout.etcd.iter().map(|other| format!("{}={}", other.name, url(other, PEER_PORT))).collect();
    let (client, peer) = (url(member, CLIENT_PORT), url(member, PEER_PORT));
    let mut command = Command::new("etcd");
    command
        .args(["--name", &member.name, "--initial-cluster", &all.join(",")])
        .arg("--data-dir")
        .arg(state.join("data"));
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    // A busy machine must not look like a dead leader.
    command.args(["--heartbeat-interval", "200", "--election-timeout", "2000"]);
    command.env(MARK, names.lab()).current_dir("/").process_group(0);
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    let child = NetNamespace::open_named(&member.namespace).and_then(|namespace| namespace.run(|| command.spawn()));
    let child = child.with_context(|| {
        format!("can't start etcd in {}; install it with: apt-get install etcd-server", member.namespace)
    })?;
    Ok(Process { name: member.name.clone(), child })
}

/// Whether a member answers and has a leader.
fn is_healthy(member: &Member) -> bool {
    let address = SocketAddr::from((member.address, CLIENT_PORT));
    let ask = || {
        let namespace = NetNamespace::open_named(&member.namespace)?;
        let mut stream = namespace.run(|| TcpStream::connect_timeout(&address, ANSWER))?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok::<_, std::io::Error>(answer.contains("\"health\":\"true\""))
    };
    ask().unwrap_or(false)
}

impl Lab {
    pub(super) fn etcd_processes(&self) -> MutexGuard<'_, Vec<Process>> {
        // A list of processes, sound at every moment.
        self.etcd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts all members and waits until they answer.
    pub(super) fn start_etcd(&self) -> anyhow::Result<()> {
        for member in &self.layout.etcd {
            let process = start(&self.names, &self.layout, member)?;
            self.etcd_processes().push(process);
        }
        for member in &self.layout.etcd {
            self.wait_for_member(member)?;
        }
        Ok(())
    }

    fn wait_for_member(&self, member: &Member) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY;
        while !is_healthy(member) {
            let ended = {
                let mut processes = self.etcd_processes();
                let process = processes.iter_mut().find(|process| process.name == member.name);
                process.is_none_or(|process| !matches!(process.child.try_wait(), Ok(None)))
            };
            if ended || Instant::now() > deadline {
                let log = self.names.state(&member.name).join("etcd.log");
                bail!("the etcd member {} is not ready; see {}", member.name, log.display());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Kills a member of the etcd (SIGKILL) and waits until it is gone.
    ///
    /// # Errors
    /// When it isn't one that this value started.
    pub fn kill_etcd(&self, member: &str) -> anyhow::Result<()> {
        let process = {
            let mut processes = self.etcd_processes();
            let position = processes.iter().position(|process| process.name == member);
            processes.swap_remove(position.with_context(|| format!("no etcd member {member} was started here"))?)
        };
        process.kill();
        Ok(())
    }

    /// Starts a member again and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn restart_etcd(&self, member: &str) -> anyhow::Result<()> {
        let member = self.layout.etcd.iter().find(|known| known.name == member);
        let member = member.context("the lab has no such etcd member")?;
        let process = start(&self.names, &self.layout, member)?;
        self.etcd_processes().push(process);
        self.wait_for_member(member)
    }
}
