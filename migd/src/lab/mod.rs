//! A cluster of network namespaces on one machine, for trying things out and for every test.
//!
//! A lab is a switch, nodes and clients. Each is a named network namespace (`ip netns exec` works on them too), each
//! node runs a daemon of its own in its namespace with a state directory of its own. Nothing of a lab is in the
//! namespace of the machine itself, so several labs live side by side and none disturbs the machine's network.
//!
//! [`Lab`] is the lab as a value: the demo, the benchmarks and the whole-system tests bring one up with [`Lab::up`] and
//! take it down when it is dropped. `migd lab up` leaves it standing ([`Lab::keep`]) until `migd lab down`.

mod cleanup;
mod commands;
mod etcd;
mod jobs;
mod layout;
mod link;
mod network;
mod nodes;
mod processes;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::api::{Client, DaemonRequest};

pub use cleanup::{Leftovers, down, own_name, remove_abandoned};
pub use commands::{Args, Engine, main};
pub use jobs::{Moved, require};
pub use layout::{Kind, Layout, Member, Names, state_directory};
pub use link::{BadLink, BothWays, Bursts, Faults, Rate};

/// How to make a lab.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Its name; the default one is [`Names::DEFAULT`].
    pub name: String,
    /// How many nodes, called `A`, `B`...
    pub nodes: usize,
    /// How many clients, called `client1`, `client2`...
    pub clients: usize,
    /// Prefix out of which jobs get their addresses.
    pub prefix: String,
    /// Members of the etcd that the directory is in; 0 for the embedded one, served by the first node.
    pub etcd: usize,
    /// The `migd` to run as daemon.
    pub binary: PathBuf,
}

impl Spec {
    /// A lab of two nodes and one client that runs this very program.
    ///
    /// # Errors
    /// When the path of this program can't be found out.
    pub fn new(name: impl Into<String>) -> anyhow::Result<Spec> {
        let binary = std::env::current_exe().context("the path of this program")?;
        Ok(Spec { name: name.into(), nodes: 2, clients: 1, prefix: "10.77.0.0/16".to_owned(), etcd: 0, binary })
    }
}

/// A lab that is up. Dropping it takes it down, unless it was [kept](Lab::keep).
#[derive(Debug)]
pub struct Lab {
    layout: Layout,
    names: Names,
    daemons: Vec<nodes::Daemon>,
    etcd: Mutex<Vec<etcd::Process>>,
    binary: PathBuf,
    kept: bool,
}

impl Lab {
    /// Makes namespaces and links, starts the daemons, and returns when they all know each other.
    ///
    /// # Errors
    /// What went wrong, with the end of a daemon's log when it was a daemon; nothing of the lab is left then.
    pub fn up(spec: &Spec) -> anyhow::Result<Lab> {
        let names = Names::new(&spec.name)?;
        let layout = Layout::plan(&names, spec.nodes, spec.clients, &spec.prefix)?.with_etcd(&names, spec.etcd)?;
        let lock = lock(&names)?;
        if let Err(error) = std::fs::create_dir(names.root()) {
            if error.kind() != io::ErrorKind::AlreadyExists {
                return Err(error).with_context(|| format!("can't make {}", names.root().display()));
            }
            bail!(
                "a lab called {name} is up already; take it down first: migd lab down --lab {name}",
                name = spec.name
            );
        }
        // From here on a failure takes down what is there: dropping `lab` does, and needs the lock for it.
        let mut lab = Lab {
            layout,
            names,
            daemons: Vec::new(),
            etcd: Mutex::default(),
            binary: spec.binary.clone(),
            kept: false,
        };
        let built = lab.build();
        drop(lock);
        built.map(|()| lab)
    }

    fn build(&mut self) -> anyhow::Result<()> {
        self.layout.save(&self.names)?;
        network::build(&self.names, &self.layout).context("can't build the lab's network")?;
        self.start_etcd()?;
        for index in 0..self.layout.nodes.len() {
            self.start_daemon_of(index)?;
        }
        nodes::wait_until_all_known(self)
    }

    /// Lets the lab stand when this value goes.
    pub fn keep(mut self) {
        self.kept = true;
    }

    /// What the lab is made of.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The names of what it is made of.
    #[must_use]
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// The control socket of a node's daemon.
    #[must_use]
    pub fn control(&self, node: &str) -> PathBuf {
        self.names.state(node).join("control.sock")
    }

    /// The namespace of a node or client.
    ///
    /// # Errors
    /// `NotFound` when there is none of this name.
    pub fn namespace(&self, member: &str) -> io::Result<sys::netns::NetNamespace> {
        sys::netns::NetNamespace::open_named(&self.names.namespace(member))
    }

    /// Makes the link between a client and the switch a bad one, for as long as the returned value lives; after that the
    /// client is cut off. Equal seeds do the same to equal packets.
    ///
    /// # Errors
    /// When there is no such client, or the kernel refuses a device.
    pub fn degrade(&self, client: &str, faults: BothWays, seed: u64) -> anyhow::Result<BadLink> {
        let member = self.layout.member(client).filter(|member| member.kind == Kind::Client);
        let member = member.with_context(|| format!("the lab has no client {client}"))?;
        let (near, far) = network::replace_uplink(&self.names, &self.layout, member)
            .with_context(|| format!("can't put another link before {client}"))?;
        BadLink::start(near, far, faults, seed).context("can't start an emulated link")
    }

    /// Kills a node's daemon (SIGKILL) and waits until it is gone.
    ///
    /// # Errors
    /// When it isn't one that this value started.
    pub fn kill_daemon(&mut self, node: &str) -> anyhow::Result<()> {
        let position = self.daemons.iter().position(|daemon| daemon.node == node);
        let position = position.with_context(|| format!("no daemon of node {node} was started here"))?;
        self.daemons.swap_remove(position).kill();
        Ok(())
    }

    /// Starts the daemon of a node again and waits until it answers.
    ///
    /// # Errors
    /// When it does not start, with the end of its log.
    pub fn restart_daemon(&mut self, node: &str) -> anyhow::Result<()> {
        let index = self.layout.nodes.iter().position(|member| member.name == node);
        let index = index.with_context(|| format!("the lab has no node {node}"))?;
        self.start_daemon_of(index)
    }

    fn start_daemon_of(&mut self, index: usize) -> anyhow::Result<()> {
        let daemon = nodes::Daemon::start(&self.binary, &self.names, &self.layout, index)?;
        self.daemons.push(daemon);
        let daemon = self.daemons.last_mut().expect("it was just put there");
        nodes::wait_until_it_answers(daemon, &self.names)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        for daemon in self.daemons.drain(..) {
            daemon.kill();
        }
        for member in self.etcd_processes().drain(..) {
            member.kill();
        }
        match down(self.names.lab()) {
            Ok(leftovers) if leftovers.is_empty() => {}
            Ok(leftovers) => eprintln!("migd: lab {}: {leftovers}", self.names.lab()),
            Err(error) => eprintln!("migd: can't take down lab {}: {error:#}", self.names.lab()),
        }
    }
}

/// Asks the daemon at `control` one thing, from outside any async runtime.
///
/// # Errors
/// As [`Client::ask`].
pub fn ask<R: serde::de::DeserializeOwned>(control: &Path, request: &DaemonRequest) -> anyhow::Result<R> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(Client::new(control).ask(request))?)
}

/// Keeps `up` and `down` of one lab from running into each other.
fn lock(names: &Names) -> anyhow::Result<Flock<std::fs::File>> {
    let path = names.lock();
    let file = std::fs::File::create(&path).with_context(|| format!("can't make {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error).context("can't lock the lab")
}
