//! What a lab is made of and what its parts are called.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use ipnet::Ipv6Net;
use serde::{Deserialize, Serialize};

/// Port on which the lab's daemons listen for each other.
const PEER_PORT: u16 = 7700;
/// Most nodes of a lab: their names are the letters, and addresses up to .99 are theirs.
const NODES_MAX: usize = 26;
/// Most clients of a lab: addresses from .101 on are theirs.
const CLIENTS_MAX: usize = 100;
/// Most members of a lab's etcd: addresses from .241 on are theirs.
const ETCD_MAX: usize = 7;

/// The state directory of a node, given as `NODE` (of the default lab) or `LAB/NODE`. `None` when that can't be one.
#[must_use]
pub fn state_directory(node: &str) -> Option<PathBuf> {
    let (lab, node) = node.split_once('/').unwrap_or((Names::DEFAULT, node));
    let names = Names::new(lab).ok()?;
    is_member_name(node).then(|| names.state(node))
}

/// The names of a lab's parts. All of them carry the lab's name, so that labs don't meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    lab: String,
}

impl Names {
    /// The lab that commands mean when none is named.
    pub const DEFAULT: &'static str = "lab";
    /// Name of the member that joins the others.
    pub const SWITCH: &'static str = "switch";

    /// Names for the lab called `lab`.
    ///
    /// # Errors
    /// When that is no name for a lab: it becomes part of names of namespaces, which must not be mistaken for another
    /// lab's, so it is one to twenty letters and digits.
    pub fn new(lab: &str) -> anyhow::Result<Names> {
        if lab.is_empty() || lab.len() > 20 || !lab.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            bail!("{lab:?} is no name for a lab: use one to twenty letters and digits");
        }
        Ok(Names { lab: lab.to_owned() })
    }

    /// The lab's own name.
    #[must_use]
    pub fn lab(&self) -> &str {
        &self.lab
    }

    /// The directory of all that the lab keeps in files.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        PathBuf::from(format!("/run/migd-{}", self.lab))
    }

    /// The state directory of a node's daemon.
    #[must_use]
    pub fn state(&self, node: &str) -> PathBuf {
        self.root().join(node)
    }

    /// The namespace of a member.
    #[must_use]
    pub fn namespace(&self, member: &str) -> String {
        format!("migd-{}-{member}", self.lab)
    }

    /// Whether a namespace of this name can be one of the lab's.
    #[must_use]
    pub fn owns_namespace(&self, namespace: &str) -> bool {
        let rest = namespace.strip_prefix("migd-").and_then(|rest| rest.strip_prefix(&self.lab));
        rest.and_then(|rest| rest.strip_prefix('-')).is_some_and(is_member_name)
    }

    /// Locked while the lab is being made or taken down.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        PathBuf::from(format!("/run/migd-{}.lock", self.lab))
    }

    /// File with the [`Layout`].
    fn layout(&self) -> PathBuf {
        self.root().join("lab.json")
    }
}

/// Whether `name` can be that of a switch, a node or a client.
fn is_member_name(name: &str) -> bool {
    let client = name.strip_prefix("client").or_else(|| name.strip_prefix("etcd"));
    name == Names::SWITCH
        || (name.len() == 1 && name.bytes().all(|byte| byte.is_ascii_uppercase()))
        || client.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// What kind of thing a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Runs a daemon.
    Node,
    /// Runs nothing by itself.
    Client,
    /// Runs a member of an etcd.
    Etcd,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Node => "node",
            Kind::Client => "client",
            Kind::Etcd => "etcd",
        })
    }
}

/// A node or a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its name in the lab; also that of its port on the switch.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its network namespace.
    pub namespace: String,
    /// The address of its `eth0`.
    pub address: Ipv4Addr,
    /// Its IPv6 address.
    pub address6: Ipv6Addr,
}

/// What a lab is made of. Kept in a file so that `status`, `exec` and `down` need not guess.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The lab's name.
    pub lab: String,
    /// Prefix out of which jobs get their addresses.
    pub prefix: String,
    /// The same of IPv6.
    pub prefix6: Ipv6Net,
    /// The namespace with the bridge.
    pub switch: String,
    /// The nodes; the first serves the directory.
    pub nodes: Vec<Member>,
    /// The clients.
    pub clients: Vec<Member>,
    /// Members of the etcd that the directory is in; none when the first node serves it.
    #[serde(default)]
    pub etcd: Vec<Member>,
}

impl Layout {
    /// Length of the prefix of the switch's subnet.
    pub const SUBNET_LENGTH: u8 = 24;
    /// The same of IPv6.
    pub const SUBNET6_LENGTH: u8 = 64;

    /// Plans a lab.
    ///
    /// # Errors
    /// When it would be too large or the prefix is none.
    pub fn plan(names: &Names, nodes: usize, clients: usize, prefix: &str) -> anyhow::Result<Layout> {
        if nodes == 0 || nodes > NODES_MAX {
            bail!("a lab has 1 to {NODES_MAX} nodes, not {nodes}");
        }
        if clients > CLIENTS_MAX {
            bail!("a lab has at most {CLIENTS_MAX} clients, not {clients}");
        }
        let (address, length) = parse_prefix(prefix)?;
        if contains(address, length, host(0)) || contains(host(0), Layout::SUBNET_LENGTH, address) {
            bail!("the prefix {prefix} overlaps the lab's own subnet {}/{}", host(0), Layout::SUBNET_LENGTH);
        }
        let member = |name: String, kind, number| Member {
            namespace: names.namespace(&name),
            name,
            kind,
            address: host(number),
            address6: host6(number),
        };
        let letters = ('A'..='Z').map(String::from);
        let nodes = letters.zip(1..).take(nodes).map(|(name, number)| member(name, Kind::Node, number));
        let clients = (1..=clients).zip(101..).map(|(n, number)| member(format!("client{n}"), Kind::Client, number));
        Ok(Layout {
            lab: names.lab().to_owned(),
            prefix: prefix.to_owned(),
            prefix6: Ipv6Net::new_assert(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0), 64),
            switch: names.namespace(Names::SWITCH),
            nodes: nodes.collect(),
            clients: clients.collect(),
            etcd: Vec::new(),
        })
    }

    /// Puts the directory into an etcd of so many members.
    ///
    /// # Errors
    /// When those are too many.
    pub fn with_etcd(mut self, names: &Names, members: usize) -> anyhow::Result<Layout> {
        if members > ETCD_MAX {
            bail!("an etcd of a lab has at most {ETCD_MAX} members, not {members}");
        }
        let member = |(n, number): (usize, u8)| {
            let name = format!("etcd{n}");
            let namespace = names.namespace(&name);
            Member { namespace, name, kind: Kind::Etcd, address: host(number), address6: host6(number) }
        };
        self.etcd = (1..=members).zip(241..).map(member).collect();
        Ok(self)
    }

    /// The nodes, then the clients, then the members of the etcd.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.nodes.iter().chain(&self.clients).chain(&self.etcd)
    }

    /// The member called `name`.
    #[must_use]
    pub fn member(&self, name: &str) -> Option<&Member> {
        self.members().find(|member| member.name == name)
    }

    /// Where a node's daemon listens for the others.
    #[must_use]
    pub fn peer(member: &Member) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(member.address), PEER_PORT)
    }

    /// The prefix taken apart.
    ///
    /// # Errors
    /// When the file was tampered with.
    pub fn parsed_prefix(&self) -> anyhow::Result<(Ipv4Addr, u8)> {
        parse_prefix(&self.prefix)
    }

    /// Writes the layout into the lab's directory.
    ///
    /// # Errors
    /// What writing said.
    pub fn save(&self, names: &Names) -> anyhow::Result<()> {
        let path = names.layout();
        let text = serde_json::to_vec_pretty(self).context("a layout is plain data")?;
        std::fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))
    }

    /// Reads the layout of a lab.
    ///
    /// # Errors
    /// When the lab is not up.
    pub fn load(names: &Names) -> anyhow::Result<Layout> {
        let path = names.layout();
        let lab = names.lab();
        let text = read_layout(&path)
            .with_context(|| format!("no lab called {lab} is up; make one with: migd lab up --lab {lab}"))?;
        serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged; take the lab down: migd lab down --lab {lab}", path.display()))
    }
}

fn read_layout(path: &Path) -> std::io::Result<Vec<u8>> {
    std::fs::read(path)
}

/// An address in the switch's subnet.
fn host(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, 0, number)
}

/// The same of IPv6.
fn host6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, number.into())
}

fn parse_prefix(text: &str) -> anyhow::Result<(Ipv4Addr, u8)> {
    let parsed = text.split_once('/').and_then(|(address, length)| {
        let length = length.parse::<u8>().ok().filter(|length| (1..=32).contains(length))?;
        Some((address.parse::<Ipv4Addr>().ok()?, length))
    });
    let (address, length) = parsed.with_context(|| format!("{text:?} is no IPv4 prefix such as 10.77.0.0/16"))?;
    let network = address.to_bits() & mask(length);
    if network != address.to_bits() {
        bail!("{text} has bits set outside its length; did you mean {}/{length}?", Ipv4Addr::from_bits(network));
    }
    Ok((address, length))
}

fn mask(length: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0)
}

fn contains(network: Ipv4Addr, length: u8, address: Ipv4Addr) -> bool {
    (network.to_bits() ^ address.to_bits()) & mask(length) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_named_and_numbered() {
        let names = Names::new("lab").expect("a name");
        let layout = Layout::plan(&names, 2, 1, "10.77.0.0/16").expect("a plan");
        let seen: Vec<_> = layout.members().map(|member| format!("{} {}", member.namespace, member.address)).collect();
        assert_eq!(seen, ["migd-lab-A 10.99.0.1", "migd-lab-B 10.99.0.2", "migd-lab-client1 10.99.0.101"]);
        assert_eq!(layout.switch, "migd-lab-switch");
        assert_eq!(layout.parsed_prefix().expect("parses"), (Ipv4Addr::new(10, 77, 0, 0), 16));
    }

    #[test]
    fn plans_that_can_not_work_are_refused() {
        let names = Names::new("lab").expect("a name");
        for (nodes, clients, prefix) in [
            (0, 1, "10.77.0.0/16"),
            (27, 1, "10.77.0.0/16"),
            (2, 101, "10.77.0.0/16"),
            (2, 1, "10.77.0.1/16"),
            (2, 1, "10.0.0.0/8"),
            (2, 1, "10.99.0.128/25"),
            (2, 1, "10.77.0.0"),
            (2, 1, "10.77.0.0/33"),
            (2, 1, "0.0.0.0/0"),
            (2, 1, "fd00::/64"),
        ] {
            assert!(Layout::plan(&names, nodes, clients, prefix).is_err(), "{nodes} {clients} {prefix}");
        }
    }

    #[test]
    fn labs_do_not_take_each_others_namespaces() {
        let names = Names::new("lab").expect("a name");
        for own in ["migd-lab-A", "migd-lab-switch", "migd-lab-client12"] {
            assert!(names.owns_namespace(own), "{own}");
        }
        for foreign in ["migd-lab2-A", "migd-lab-A-B", "migd-labA", "lab-A", "migd-lab-", "migd-lab-client", "migd-B-t"]
        {
            assert!(!names.owns_namespace(foreign), "{foreign}");
        }
        for wrong in ["", "a-b", "a/b", "..", "a lab", "morethantwentyletterslong"] {
            assert!(Names::new(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn nodes_of_other_labs_are_found_by_lab_and_name() {
        assert_eq!(state_directory("A"), Some("/run/migd-lab/A".into()));
        assert_eq!(state_directory("demo/B"), Some("/run/migd-demo/B".into()));
        assert_eq!(state_directory("demo/../B"), None);
        assert_eq!(state_directory("node7"), None);
    }
}
