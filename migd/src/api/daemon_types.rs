//! Command line (and shims) to daemon.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::types::{ApiError, Exit, HomeView, JobSpec, SocketPlace};

/// What a daemon is asked. The first frame on each connection to `control.sock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DaemonRequest {
    /// `Reply<DaemonStatus>`.
    Status,
    /// `Reply<JobView>`: the job runs (its program was executed).
    Run(RunRequest),
    /// `Reply<JobList>`.
    Jobs {
        /// Also those that ended.
        all: bool,
    },
    /// `Reply<NodeList>`.
    Nodes,
    /// `Reply<JobInspection>`.
    Inspect {
        /// Name, id or unique prefix of an id.
        job: String,
    },
    /// `Reply<SocketListing>`.
    Sockets {
        /// Name, id or unique prefix of an id.
        job: String,
    },
    /// `Reply<JobView>`, then a stream of [`super::CaptureEvent`] until the job ends: moves are followed.
    Capture {
        /// Name, id or unique prefix of an id.
        job: String,
        /// Chosen by the asker, unique.
        number: u64,
        /// Bytes kept of each packet.
        snap_length: u32,
    },
    /// `Reply<JobView>`, then a stream of [`super::AttachEvent`] until the job ends: moves are followed, so
    /// [`super::AttachEvent::Moved`] is only a notice here and the stream goes on. Takes [`super::AttachInput`] frames.
    Attach {
        /// Name, id or unique prefix of an id.
        job: String,
        /// Where in the output to begin.
        from_offset: u64,
        /// Whether input frames will be sent.
        input: bool,
    },
    /// `Reply<JobView>`, then a stream of [`super::AttachEvent`] as with `Attach`.
    Logs {
        /// Name, id or unique prefix of an id.
        job: String,
        /// Go on until the job ends.
        follow: bool,
        /// Only the last so many lines.
        tail: Option<u64>,
    },
    /// `Reply<()>`.
    Kill {
        /// Name, id or unique prefix of an id.
        job: String,
        /// Signal number.
        signal: i32,
    },
    /// `Reply<()>`: forgets a job that ended.
    Remove {
        /// Name, id or unique prefix of an id.
        job: String,
    },
    /// `Reply<JobView>`, then a stream of [`super::MoveEvent`].
    Move {
        /// Name, id or unique prefix of an id.
        job: String,
        /// Target node.
        node: String,
        /// Where its sockets are to be.
        #[serde(default)]
        sockets: SocketPlace,
    },
    /// From a shim. `Reply<Option<JobOwner>>`: who the directory says has the job.
    Owner {
        /// Job id.
        job: String,
    },
    /// From a shim. `Reply<TransferReply>`: the compare-and-swap of the job's owner from (`from_node`, `from_epoch`) to
    /// (`to_node`, `from_epoch + 1`). May be asked again after [`TransferReply::Unknown`]: if that very transfer was already made, the
    /// answer is `Won`.
    Transfer {
        /// Job id.
        job: String,
        /// Epoch at which the source owns it.
        from_epoch: u64,
        /// The source.
        from_node: String,
        /// The new owner; `from_node` itself to fence the target off after an abort.
        to_node: String,
        /// The node with the job's sockets afterwards, when that is another than `to_node`.
        #[serde(default)]
        home: Option<String>,
    },
    /// About the cluster's addresses; the answer is told at each request.
    Addresses(AddressRequest),
    /// `Reply<Migrated>`: moves the directory from the node that serves it to an etcd.
    MigrateDirectory {
        /// As [`cluster_addr::etcd::Place`] reads it.
        to: String,
    },
    /// From a shim, after `exit.json` was written. `Reply<()>`. Only speeds up what the daemon finds out by itself.
    JobExited {
        /// Job id.
        job: String,
        /// How it ended.
        exit: Exit,
    },
}

/// A job to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRequest {
    /// Name; made from the program's name when missing.
    pub name: Option<String>,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Absolute working directory.
    pub cwd: String,
    /// Where to start it; this node when missing.
    pub node: Option<String>,
    /// The name of a reservation, or an address of the cluster; any address when missing.
    #[serde(default)]
    pub address: Option<String>,
}

/// What can be asked about the cluster's addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AddressRequest {
    /// `Reply<AddressList>`.
    List,
    /// `Reply<BlockList>`.
    Blocks,
    /// `Reply<ReservationView>`.
    Reserve {
        /// Under which name.
        name: String,
        /// Which, at most one of each family; others are picked.
        addresses: Vec<IpAddr>,
    },
    /// `Reply<ReservationView>`: what was given up.
    ReleaseReservation {
        /// Its name.
        name: String,
    },
    /// `Reply<BlockView>`: as it was.
    ReleaseBlock {
        /// Which.
        block: IpNet,
    },
    /// `Reply<cluster_addr::cluster::Forgotten>`.
    ForgetNode {
        /// Its name.
        node: String,
        /// The operator's word that nothing of it runs any more.
        gone: bool,
    },
    /// `Reply<Vec<PrefixView>>`: all there are now.
    AddPrefix {
        /// Which.
        net: IpNet,
    },
    /// `Reply<CheckReport>`.
    Check {
        /// Undo leaks.
        repair: bool,
    },
}

/// A range of addresses of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixView {
    /// The range.
    pub net: IpNet,
    /// Length of its blocks.
    pub block_length: u8,
    /// Addresses that jobs can have in all; the largest number there is when there are more.
    pub size: u64,
    /// Addresses of it that jobs have.
    pub held: usize,
    /// That are reserved and not in use.
    pub reserved: usize,
    /// That rest after their use.
    pub resting: usize,
    /// Blocks of it that are leased.
    pub leased_blocks: usize,
}

/// A reservation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReservationView {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The name of the job that uses them.
    pub job: Option<String>,
}

/// Answer to [`AddressRequest::List`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressList {
    /// Where addresses come from.
    pub prefixes: Vec<PrefixView>,
    /// Every address that is not simply free.
    pub addresses: Vec<cluster_addr::cluster::UsedAddress>,
    /// The reservations.
    pub reservations: Vec<ReservationView>,
}

/// A leased block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockView {
    /// Its addresses.
    pub net: IpNet,
    /// The node that may give them out.
    pub node: String,
    /// Whether that node answered lately.
    pub alive: bool,
    /// Addresses of it that jobs have, or that are reserved.
    pub held: usize,
    /// That rest.
    pub resting: usize,
    /// That can be given out.
    pub free: usize,
}

/// Answer to [`AddressRequest::Blocks`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockList {
    /// Where they come from.
    pub prefixes: Vec<PrefixView>,
    /// The leased ones.
    pub blocks: Vec<BlockView>,
}

/// Answer to [`AddressRequest::Check`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// Of which revision of the directory.
    pub revision: u64,
    /// Jobs looked at.
    pub jobs: usize,
    /// Addresses looked at.
    pub addresses: usize,
    /// What contradicts the rules.
    pub findings: Vec<CheckFinding>,
}

/// One thing that contradicts the rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckFinding {
    /// In one sentence.
    pub text: String,
    /// For programs.
    pub finding: cluster_addr::cluster::Finding,
    /// Whether it was undone.
    pub repaired: bool,
}

/// Answer to [`DaemonRequest::MigrateDirectory`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migrated {
    /// Where it is now.
    pub to: String,
    /// Records that were moved.
    pub records: usize,
    /// For how long no change could be made, milliseconds.
    pub held_ms: u64,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply<T> {
    /// Well.
    Ok(T),
    /// Not.
    Error(ApiError),
}

impl<T> From<Result<T, ApiError>> for Reply<T> {
    fn from(result: Result<T, ApiError>) -> Self {
        match result {
            Ok(value) => Reply::Ok(value),
            Err(error) => Reply::Error(error),
        }
    }
}

impl<T> From<Reply<T>> for Result<T, ApiError> {
    fn from(reply: Reply<T>) -> Self {
        match reply {
            Reply::Ok(value) => Ok(value),
            Reply::Error(error) => Err(error),
        }
    }
}

/// A daemon about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its node's name.
    pub node: String,
    /// Its version.
    pub version: String,
    /// The cluster's id, once it was joined.
    pub cluster: Option<String>,
    /// The cluster's prefixes with commas between, once it was joined.
    pub prefix: Option<String>,
    /// Where it listens for peers.
    pub peer: SocketAddr,
    /// Process id.
    pub pid: u32,
    /// Whether the directory answers.
    pub directory: DirectoryHealth,
}

/// Whether the directory answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DirectoryHealth {
    /// Served by this very daemon.
    Local,
    /// Served by another node that answers.
    Remote {
        /// Where.
        peer: SocketAddr,
    },
    /// An etcd that answers.
    Etcd {
        /// Where.
        place: String,
    },
    /// An etcd of which no member answers.
    EtcdUnreachable {
        /// Where.
        place: String,
        /// What was seen.
        reason: String,
    },
    /// Served by another node that does not answer.
    Unreachable {
        /// Where.
        peer: SocketAddr,
        /// What was seen.
        reason: String,
    },
}

/// State of a job for listings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Being launched.
    Starting,
    /// Runs.
    Running,
    /// On its way from its node to another.
    Moving,
    /// Ended.
    Exited,
    /// Its node does not answer.
    Unreachable,
}

/// A job in listings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobView {
    /// Unique for ever.
    pub id: String,
    /// Unique among the jobs that run.
    pub name: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// When it was started, milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Its cluster address (the last one, when it ended).
    pub address: Ipv4Addr,
    /// The same of IPv6, in a cluster that has such.
    #[serde(default)]
    pub address6: Option<Ipv6Addr>,
    /// Where it is.
    pub node: String,
    /// Its epoch.
    pub epoch: u64,
    /// Its state.
    pub state: JobState,
    /// Where its addresses and sockets are, when that is not its node.
    #[serde(default)]
    pub home: Option<HomeView>,
    /// The target, while it moves.
    pub moving_to: Option<String>,
    /// How it ended, when it did.
    pub exit: Option<Exit>,
    /// When it ended, milliseconds since the Unix epoch.
    pub finished_ms: Option<u64>,
    /// Process id of its first process on its node, when it runs.
    pub pid: Option<i32>,
}

/// Answer to [`DaemonRequest::Jobs`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobList {
    /// The jobs of the cluster.
    pub jobs: Vec<JobView>,
    /// What could not be found out (a node or the directory does not answer), one sentence each.
    pub warnings: Vec<String>,
}

/// A node in listings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Where its daemon listens.
    pub peer: SocketAddr,
    /// Whether it answers.
    pub alive: bool,
    /// Milliseconds since it was last heard, when it ever was.
    pub last_seen_ms: Option<u64>,
    /// Whether it serves the directory.
    pub directory: bool,
    /// Jobs it owns.
    pub jobs: usize,
    /// Its version, when it answers.
    pub version: Option<String>,
}

/// Answer to [`DaemonRequest::Nodes`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeList {
    /// The nodes.
    pub nodes: Vec<NodeView>,
    /// What could not be found out, one sentence each.
    pub warnings: Vec<String>,
}

/// Answer to [`DaemonRequest::Inspect`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobInspection {
    /// As in the listing.
    #[serde(flatten)]
    pub job: JobView,
    /// What it was started with, when its node answers.
    pub spec: Option<JobSpec>,
    /// What the shim tells: processes, sockets, memory, stay reasons.
    pub detail: Option<serde_json::Value>,
}

/// Answer to [`DaemonRequest::Sockets`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SocketListing {
    /// Name of the job.
    pub job: String,
    /// The node where its sockets are.
    pub node: String,
    /// Its sockets.
    pub sockets: Vec<crate::net::SocketDescription>,
}

/// Answer to [`DaemonRequest::Owner`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobOwner {
    /// Where it runs.
    pub node: String,
    /// Since which change of owner.
    pub epoch: u64,
}

/// Answer to [`DaemonRequest::Transfer`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransferReply {
    /// The transfer asked for was made, now or by an earlier try.
    Won {
        /// The epoch now.
        epoch: u64,
    },
    /// It was not made and never will be: the job has this owner.
    Lost {
        /// Owner; none when the job is gone from the directory.
        owner: Option<String>,
        /// The epoch now; 0 when gone.
        epoch: u64,
    },
    /// It may or may not have been made. Stay frozen, ask again.
    Unknown {
        /// Why.
        reason: String,
    },
}
