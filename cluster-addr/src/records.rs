//! What the directory stores, and under which keys.
//!
//! | key | value |
//! | --- | --- |
//! | `cluster` | [`ClusterRecord`] |
//! | `node/NAME` | [`NodeRecord`] |
//! | `block/NET` | [`BlockRecord`] |
//! | `address/IP` | [`AddressRecord`] |
//! | `job/ID` | [`JobRecord`] |
//! | `name/NAME` | the id of the job that has the name |

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::directory::DirectoryError;

/// Key of the [`ClusterRecord`].
pub const CLUSTER_KEY: &str = "cluster";

/// Prefix of all [`JobRecord`] keys, for listings and watches.
pub const JOBS: &str = "job/";

/// Prefix of all [`NodeRecord`] keys.
pub const NODES: &str = "node/";

/// Prefix of all [`BlockRecord`] keys.
pub const BLOCKS: &str = "block/";

/// Prefix of all [`AddressRecord`] keys.
pub const ADDRESSES: &str = "address/";

/// A job's name for machines: 96 random bits as 24 hexadecimal digits, unique for ever.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(String);

impl JobId {
    /// From entropy that the caller took from the system.
    #[must_use]
    pub fn from_entropy(bytes: [u8; 12]) -> Self {
        use fmt::Write;
        let mut text = String::with_capacity(24);
        for byte in bytes {
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    /// The digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first digits, as listings show them.
    #[must_use]
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for JobId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if text.len() == 24 && digits { Ok(Self(text)) } else { Err(format!("{text:?} is not a job id")) }
    }
}

impl FromStr for JobId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::try_from(text.to_owned())
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> Self {
        id.0
    }
}

/// Facts of the whole cluster, written once when it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Random, so that nodes of another cluster are told apart.
    pub id: String,
    /// Where jobs' addresses come from.
    pub prefix: Ipv4Net,
    /// Length of the blocks that nodes lease, in bits of prefix.
    pub block_length: u8,
}

/// A node, as the others reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name, unique in the cluster.
    pub name: String,
    /// Where its daemon listens for the other daemons. Its IP is also the next hop of routes to the node's jobs.
    pub peer: SocketAddr,
}

/// A block of addresses and the node that may hand them out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRecord {
    /// The addresses.
    pub net: IpNet,
    /// The holder.
    pub node: String,
}

/// One address that is, or lately was, in use. An address without a record is free.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressRecord {
    /// A job has it.
    Held {
        /// Which.
        job: JobId,
    },
    /// No job has it; it must not be given to another yet, since old segments may be about.
    Resting {
        /// The job that had it.
        last: JobId,
    },
}

/// Who may run a job: a node, and the fencing number that grows with every change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The node.
    pub node: String,
    /// Grows by one with every change of owner; 1 at the start.
    pub epoch: u64,
}

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Unique for ever.
    pub id: JobId,
    /// Unique among the jobs there are.
    pub name: String,
    /// The job's own for its whole life.
    pub address: Ipv4Addr,
    /// Where it runs.
    pub owner: Owner,
    /// The command, for listings.
    pub command: Vec<String>,
    /// When it was started, milliseconds since 1970 by the clock of the node that started it. For people only.
    pub started_ms: u64,
}

/// Key of a node's record.
#[must_use]
pub fn node_key(name: &str) -> String {
    format!("{NODES}{name}")
}

/// Key of a block's record.
#[must_use]
pub fn block_key(net: IpNet) -> String {
    format!("{BLOCKS}{net}")
}

/// Key of an address's record.
#[must_use]
pub fn address_key(address: IpAddr) -> String {
    format!("{ADDRESSES}{address}")
}

/// Key of a job's record.
#[must_use]
pub fn job_key(id: &JobId) -> String {
    format!("{JOBS}{id}")
}

/// Key of the claim on a name.
#[must_use]
pub fn name_key(name: &str) -> String {
    format!("name/{name}")
}

/// A record as the directory stores it: MessagePack with field names, so that later versions can add fields.
///
/// # Panics
/// Never: the records above hold nothing that can't be written.
#[must_use]
pub fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    rmp_serde::to_vec_named(record).expect("records are plain data")
}

/// A record read back.
///
/// # Errors
/// [`DirectoryError::Storage`] if the bytes are not such a record.
pub fn decode<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, DirectoryError> {
    rmp_serde::from_slice(bytes)
        .map_err(|e| DirectoryError::Storage(format!("the record under {key} can't be read: {e}")))
}
