//! What the directory stores, and under which keys.
//!
//! | key | value |
//! | --- | --- |
//! | `cluster` | [`ClusterRecord`] |
//! | `node/NAME` | [`NodeRecord`] |
//! | `block/NET` | [`BlockRecord`] |
//! | `address/IP` | [`AddressRecord`]; IPv6 addresses with all their digits, so that a block's have a prefix in common |
//! | `reservation/NAME` | [`ReservationRecord`] |
//! | `job/ID` | [`JobRecord`] |
//! | `name/NAME` | the id of the job that has the name |

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, DeserializeOwned, Visitor},
};

use crate::{allocator::Family, directory::DirectoryError};

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

/// Prefix of all [`ReservationRecord`] keys.
pub const RESERVATIONS: &str = "reservation/";

/// Prefix of all claims on names.
pub const CLAIMED_NAMES: &str = "name/";

/// Bytes that most records fit into.
const RECORD_USUAL: usize = 256;

/// A job's name for machines: 96 random bits as 24 hexadecimal digits, unique for ever.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId([u8; 24]);

impl JobId {
    /// From entropy that the caller took from the system.
    #[must_use]
    pub fn from_entropy(bytes: [u8; 12]) -> Self {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut digits = [0; 24];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(bytes) {
            pair[0] = DIGITS[usize::from(byte >> 4)];
            pair[1] = DIGITS[usize::from(byte & 15)];
        }
        Self(digits)
    }

    /// The digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("an id has nothing but digits and a to f")
    }

    /// The first digits, as listings show them.
    #[must_use]
    pub fn short(&self) -> &str {
        &self.as_str()[..12]
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("JobId").field(&self.as_str()).finish()
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for JobId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        match <[u8; 24]>::try_from(text.as_bytes()) {
            Ok(id) if digits => Ok(Self(id)),
            _ => Err(format!("{text:?} is not a job id")),
        }
    }
}

impl TryFrom<String> for JobId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> Self {
        id.as_str().to_owned()
    }
}

impl Serialize for JobId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for JobId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Digits;
        impl Visitor<'_> for Digits {
            type Value = JobId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("24 hexadecimal digits")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<JobId, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Digits)
    }
}

/// Facts of the whole cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StoredCluster")]
pub struct ClusterRecord {
    /// Random, so that nodes of another cluster are told apart.
    pub id: String,
    /// Where jobs' addresses come from. Disjoint; at least one of IPv4.
    pub prefixes: Vec<Prefix>,
}

/// A range of addresses that belongs to the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefix {
    /// The range.
    pub net: IpNet,
    /// Length of the blocks that nodes lease of it, in bits of prefix.
    pub block_length: u8,
}

/// As [`ClusterRecord`] is read: the first version knew one prefix.
#[derive(Deserialize)]
struct StoredCluster {
    id: String,
    #[serde(default)]
    prefixes: Vec<Prefix>,
    prefix: Option<Ipv4Net>,
    block_length: Option<u8>,
}

impl From<StoredCluster> for ClusterRecord {
    fn from(stored: StoredCluster) -> Self {
        let StoredCluster { id, mut prefixes, prefix, block_length } = stored;
        if let (Some(net), Some(block_length)) = (prefix, block_length) {
            prefixes.push(Prefix { net: IpNet::V4(net), block_length });
        }
        Self { id, prefixes }
    }
}

impl ClusterRecord {
    /// The prefix that an address lies in.
    #[must_use]
    pub fn prefix_of(&self, address: IpAddr) -> Option<&Prefix> {
        self.prefixes.iter().find(|prefix| prefix.net.contains(&address))
    }

    /// The prefixes of a family.
    pub fn of_family(&self, family: Family) -> impl Iterator<Item = &Prefix> {
        self.prefixes.iter().filter(move |prefix| Family::of_net(prefix.net) == family)
    }

    /// The families that jobs have addresses of.
    pub fn families(&self) -> impl Iterator<Item = Family> {
        Family::BOTH.into_iter().filter(|family| self.of_family(*family).next().is_some())
    }

    /// All prefixes in words.
    #[must_use]
    pub fn prefixes_in_words(&self) -> String {
        self.prefixes.iter().map(|prefix| prefix.net.to_string()).collect::<Vec<_>>().join(", ")
    }

    /// Addresses of the prefixes that are no job's: hosts that have a prefix on-link take the first and the last of an
    /// IPv4 subnet for "this network" and "everybody" (RFC 1122 section 3.2.1.3), and the first of an IPv6 subnet for any
    /// router (RFC 4291 section 2.6.1).
    #[must_use]
    pub fn special(&self) -> Vec<IpAddr> {
        let of = |prefix: &Prefix| match prefix.net {
            IpNet::V4(net) if net.prefix_len() >= 31 => vec![],
            IpNet::V4(net) => vec![IpAddr::V4(net.network()), IpAddr::V4(net.broadcast())],
            IpNet::V6(net) if net.prefix_len() >= 127 => vec![],
            IpNet::V6(net) => vec![IpAddr::V6(net.network())],
        };
        self.prefixes.iter().flat_map(of).collect()
    }
}

/// A node, as the others reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name, unique in the cluster.
    pub name: String,
    /// Where its daemon listens for the other daemons. Its IP is also the next hop of routes to the node's jobs.
    pub peer: SocketAddr,
    /// Further addresses of the node: next hops for jobs' addresses of the other family.
    #[serde(default)]
    pub hops: Vec<IpAddr>,
}

impl NodeRecord {
    /// The next hop to a job's address when the job is on this node: an address of the node of the same family.
    #[must_use]
    pub fn hop_for(&self, address: IpAddr) -> Option<IpAddr> {
        let all = std::iter::once(self.peer.ip()).chain(self.hops.iter().copied());
        all.into_iter().find(|hop| hop.is_ipv4() == address.is_ipv4())
    }
}

/// A block of addresses and the node that may hand them out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRecord {
    /// The addresses.
    pub net: IpNet,
    /// The holder.
    pub node: String,
    /// Which start of the holder's daemon renewed the lease last: the revision at which it registered.
    #[serde(default)]
    pub incarnation: u64,
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
        /// The job that had it; `None` after a reservation that no job used.
        last: Option<JobId>,
    },
    /// Kept for a reservation and used by no job.
    Reserved {
        /// The reservation's name.
        name: String,
    },
}

/// Addresses kept under a name, for one job at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReservationRecord {
    /// The name.
    pub name: String,
    /// The addresses, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// Grows when a job that was about to take the addresses must not come into being any more.
    #[serde(default)]
    pub generation: u64,
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
    /// The same of IPv6; `None` in a cluster without an IPv6 prefix.
    #[serde(default)]
    pub address6: Option<Ipv6Addr>,
    /// The reservation that the addresses are of.
    #[serde(default)]
    pub reservation: Option<String>,
    /// Where it runs.
    pub owner: Owner,
    /// Where its addresses and sockets are, when that is not where it runs.
    #[serde(default)]
    pub home: Option<String>,
    /// The command, for listings.
    pub command: Vec<String>,
    /// When it was started, milliseconds since 1970 by the clock of the node that started it. For people only.
    pub started_ms: u64,
}

impl JobRecord {
    /// All the job's addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        std::iter::once(IpAddr::V4(self.address)).chain(self.address6.map(IpAddr::V6))
    }

    /// The node that the job's addresses are on.
    #[must_use]
    pub fn addressed_at(&self) -> &str {
        self.home.as_deref().unwrap_or(&self.owner.node)
    }
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
    match address {
        IpAddr::V4(address) => format!("{ADDRESSES}{address}"),
        IpAddr::V6(address) => {
            let digits = address.segments().map(|segment| format!("{segment:04x}")).join(":");
            format!("{ADDRESSES}{digits}")
        }
    }
}

/// The address whose record is under this key.
#[must_use]
pub fn address_of_key(key: &str) -> Option<IpAddr> {
    key.strip_prefix(ADDRESSES)?.parse().ok()
}

/// What the keys of all addresses of a block begin with; those of others may, too.
#[must_use]
pub fn addresses_of_block(net: IpNet) -> String {
    let mut key = address_key(net.network());
    match net {
        IpNet::V4(net) => {
            let whole = usize::from(net.prefix_len() / 8);
            let end = key.match_indices('.').nth(whole.saturating_sub(1)).map_or(key.len(), |(at, _)| at + 1);
            key.truncate(if whole == 0 { ADDRESSES.len() } else { end });
        }
        IpNet::V6(net) => {
            let digits = usize::from(net.prefix_len() / 4);
            key.truncate(ADDRESSES.len() + digits + digits.saturating_sub(1) / 4);
        }
    }
    key
}

/// Key of a reservation.
#[must_use]
pub fn reservation_key(name: &str) -> String {
    format!("{RESERVATIONS}{name}")
}

/// Key of a job's record.
#[must_use]
pub fn job_key(id: &JobId) -> String {
    format!("{JOBS}{id}")
}

/// Key of the claim on a name.
#[must_use]
pub fn name_key(name: &str) -> String {
    format!("{CLAIMED_NAMES}{name}")
}

/// A record as the directory stores it: MessagePack with field names, so that later versions can add fields.
///
/// # Panics
/// Never: the records above hold nothing that can't be written.
#[must_use]
pub fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(RECORD_USUAL);
    rmp_serde::encode::write_named(&mut bytes, record).expect("records are plain data");
    bytes
}

/// A record read back.
///
/// # Errors
/// [`DirectoryError::Storage`] if the bytes are not such a record.
pub fn decode<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, DirectoryError> {
    rmp_serde::from_slice(bytes)
        .map_err(|e| DirectoryError::Storage(format!("the record under {key} can't be read: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn the_keys_of_a_block_begin_alike_and_few_others_do() {
        for (net, prefix) in [
            ("10.77.3.64/26", "address/10.77.3."),
            ("10.77.0.0/16", "address/10.77."),
            ("10.77.3.64/32", "address/10.77.3.64"),
            ("0.0.0.0/0", "address/"),
            ("fd77::40/122", "address/fd77:0000:0000:0000:0000:0000:0000:00"),
            ("fd77::/64", "address/fd77:0000:0000:0000"),
            ("fd77::5/128", "address/fd77:0000:0000:0000:0000:0000:0000:0005"),
            ("::/0", "address/"),
        ] {
            let net: IpNet = net.parse().expect("a net");
            assert_eq!(addresses_of_block(net), prefix, "{net}");
            assert!(address_key(net.network()).starts_with(prefix));
        }
        for text in ["10.77.0.5", "fd77::5", "::"] {
            assert_eq!(address_of_key(&address_key(address(text))), Some(address(text)));
        }
    }

    #[test]
    fn records_of_the_first_version_are_read() {
        #[derive(Serialize)]
        struct First {
            id: &'static str,
            prefix: Ipv4Net,
            block_length: u8,
        }
        let first = First { id: "x", prefix: "10.77.0.0/16".parse().expect("a net"), block_length: 26 };
        let read: ClusterRecord = decode("cluster", &encode(&first)).expect("read");
        assert_eq!(read.prefixes_in_words(), "10.77.0.0/16");
        assert_eq!(decode::<ClusterRecord>("cluster", &encode(&read)).expect("read"), read);
    }

    #[test]
    fn the_next_hop_is_of_the_addresses_family() {
        let peer = "10.99.0.1:7070".parse().expect("an address");
        let node = NodeRecord { name: "a".into(), peer, hops: vec![address("fd99::1")] };
        assert_eq!(node.hop_for(address("fd77::1")), Some(address("fd99::1")));
        assert_eq!(node.hop_for(address("10.77.0.1")), Some(address("10.99.0.1")));
    }
}
