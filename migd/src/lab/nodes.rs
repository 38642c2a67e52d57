//! The daemons of a lab's nodes: starting them and waiting for them.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use sys::netns::NetNamespace;

use super::layout::{Layout, Names};
use super::{Lab, ask};
use crate::api::{DaemonRequest, DaemonStatus, NodeList};

/// Environment variable by which `lab down` finds what a daemon started, wherever it is: its value is the lab's name.
pub(super) const MARK: &str = "MIGD_LAB";

/// How long daemons may take to be ready. They need some tens of milliseconds; a busy machine may need more.
const READY: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
/// How much of a daemon's log an error shows.
const LOG_LINES: usize = 20;

/// A daemon that this process started.
#[derive(Debug)]
pub(super) struct Daemon {
    pub(super) node: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts the daemon of the node with this number; the first makes the cluster and the others join it there.
    pub(super) fn start(binary: &Path, names: &Names, layout: &Layout, index: usize) -> anyhow::Result<Daemon> {
        let member = &layout.nodes[index];
        let state = names.state(&member.name);
        std::fs::create_dir_all(&state).with_context(|| format!("can't make {}", state.display()))?;
        let log = state.join("daemon.log");
        let output = File::options().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("can't write {}", log.display()))?;
        let mut command = Command::new(binary);
        command.arg("daemon").arg("--name").arg(&member.name).arg("--state").arg(&state);
        command.arg("--listen").arg(Layout::peer(member).to_string()).arg("--uplink").arg("eth0");
        match layout.nodes.first() {
            Some(first) if index > 0 => command.arg("--join").arg(Layout::peer(first).to_string()),
            _ => command
                .arg("--create")
                .arg("--prefix")
                .arg(&layout.prefix)
                .arg("--prefix")
                .arg(layout.prefix6.to_string()),
        };
        if let Some(place) = super::etcd::place(layout) {
            command.arg("--directory").arg(place);
        }
        command.env(MARK, names.lab()).env_remove("MIGD_SOCKET").current_dir("/").process_group(0);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = NetNamespace::open_named(&member.namespace)
            .and_then(|namespace| namespace.run(|| command.spawn()))
            .with_context(|| format!("can't start {} in {}", binary.display(), member.namespace))?;
        Ok(Daemon { node: member.name.clone(), child, log })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and its zombie reaped.
    pub(super) fn kill(mut self) {
        // Both fail only when it ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// An error with what the daemon wrote last.
    fn failure(&self, what: &str) -> anyhow::Error {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n  ");
        anyhow::anyhow!("the daemon of node {} {what}; the end of {}:\n  {end}", self.node, self.log.display())
    }
}

/// Waits until a daemon serves its control socket.
pub(super) fn wait_until_it_answers(daemon: &mut Daemon, names: &Names) -> anyhow::Result<()> {
    let control = names.state(&daemon.node).join("control.sock");
    let deadline = Instant::now() + READY;
    loop {
        if let Ok(status) = ask::<DaemonStatus>(&control, &DaemonRequest::Status)
            && status.pid == daemon.pid()
        {
            return Ok(());
        }
        if let Some(status) = daemon.child.try_wait()? {
            return Err(daemon.failure(&format!("ended ({status})")));
        }
        if Instant::now() > deadline {
            return Err(daemon.failure(&format!("does not answer within {} s", READY.as_secs())));
        }
        std::thread::sleep(POLL);
    }
}

/// Waits until every daemon lists every node as alive.
pub(super) fn wait_until_all_known(lab: &Lab) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY;
    for member in &lab.layout.nodes {
        let control = lab.control(&member.name);
        loop {
            let list = ask::<NodeList>(&control, &DaemonRequest::Nodes);
            let known = |list: &NodeList| {
                lab.layout.nodes.iter().all(|node| list.nodes.iter().any(|seen| seen.name == node.name && seen.alive))
            };
            if list.as_ref().is_ok_and(known) {
                break;
            }
            if Instant::now() > deadline {
                bail!("node {} does not see all the others alive within {} s: {list:?}", member.name, READY.as_secs());
            }
            std::thread::sleep(POLL);
        }
    }
    Ok(())
}
