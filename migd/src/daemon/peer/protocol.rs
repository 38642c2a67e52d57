//! What daemons say to each other: a 32-bit big-endian length, then MessagePack with field names.

use std::io;
use std::net::SocketAddr;

use cluster_addr::JobRecord;
use cluster_addr::directory::{DirectoryError, Listing, Outcome, Revision, Transaction, Versioned};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::api::{JobSpec, NodeAddress, RunRequest, SocketPlace, frame};

/// Version of this protocol. Daemons with different ones refuse each other.
pub const PROTOCOL: u32 = 1;
/// What a hello begins with, so that a stray client is told apart.
pub const MAGIC: &str = "migd-peer";

/// The first frame from the side that connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: String,
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The cluster it belongs to; none while it is joining.
    pub cluster: Option<String>,
    /// Its node's name.
    pub node: String,
}

/// The answer to a [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// Version of the program.
    pub version: String,
    /// The cluster; none while that node itself is still joining.
    pub cluster: Option<String>,
    /// The node's name.
    pub node: String,
    /// Where the directory is served, when the node knows and it is a node's.
    pub directory: Option<SocketAddr>,
    /// Where it is, when it is an etcd.
    #[serde(default)]
    pub etcd: Option<cluster_addr::etcd::Place>,
}

/// What a daemon asks another. Answered by `Reply` of the type named, unless it says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeerRequest {
    /// `Pong`.
    Ping,
    /// `Result<DirectoryAnswer, DirectoryError>`, without `Reply`.
    Directory(DirectoryRequest),
    /// `Result<(), DirectoryError>`, without `Reply`; then a stream of `cluster_addr::directory::Change`. Ends the connection.
    Watch {
        /// Of keys.
        prefix: String,
        /// Changes after this one.
        after: Revision,
    },
    /// `Migrated`. To the node that serves the directory.
    MigrateDirectory {
        /// Where to, as `cluster_addr::etcd::Place` reads it.
        to: String,
    },
    /// `JobView`.
    Run(RunRequest),
    /// `Vec<JobView>`: jobs that are or ended on that node.
    LocalJobs,
    /// `JobInspection`.
    Inspect {
        /// Full id.
        id: String,
    },
    /// `Vec<SocketDescription>`.
    Sockets {
        /// Full id.
        id: String,
    },
    /// A stream of `CaptureEvent`. Ends the connection.
    Capture {
        /// Full id.
        id: String,
        /// Names the recording.
        number: u64,
        /// Bytes kept of each packet.
        snap_length: u32,
    },
    /// `()`.
    Kill {
        /// Full id.
        id: String,
        /// Signal number.
        signal: i32,
    },
    /// `()`.
    Remove {
        /// Full id.
        id: String,
    },
    /// `u64`: the offset in the job's output where its last so many lines begin.
    TailOffset {
        /// Full id.
        id: String,
        /// Lines.
        lines: u64,
    },
    /// A stream of `AttachEvent`, and of `AttachInput` in the other direction. Ends the connection.
    Attach {
        /// Full id.
        id: String,
        /// Where in the output to begin.
        from_offset: u64,
        /// Whether to go on after what there is now.
        follow: bool,
        /// Whether input will come.
        input: bool,
    },
    /// A stream of `MoveEvent`. Ends the connection.
    Move {
        /// Full id.
        id: String,
        /// Target node.
        node: String,
        /// Where its sockets are to be.
        #[serde(default)]
        sockets: SocketPlace,
    },
    /// `()`. After that the connection belongs to the shims: it is the line between the node that asks and the job's home.
    Line {
        /// Full id.
        id: String,
        /// The node that asks.
        from: NodeAddress,
        /// The epoch at which its move starts.
        epoch: u64,
    },
    /// `MoveAnswer`. After `Accepted` the connection belongs to the shims.
    MoveOffer(Box<MoveOffer>),
}

/// Answer to [`PeerRequest::Ping`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// The node's name.
    pub node: String,
    /// Version of its program.
    pub version: String,
}

/// A job that wants to come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveOffer {
    /// What it was started with.
    pub spec: JobSpec,
    /// Its record as the source knows it.
    pub record: JobRecord,
    /// The source.
    pub source: NodeAddress,
    /// The node with the job's sockets, when the target needs a line to it.
    #[serde(default)]
    pub line_to: Option<NodeAddress>,
}

/// Answer to a [`MoveOffer`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveAnswer {
    /// Its shim waits at the other end of this connection.
    Accepted,
    /// It can't come.
    Refused {
        /// One sentence each.
        reasons: Vec<String>,
    },
}

/// An operation of the directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DirectoryRequest {
    /// See `Directory::get`.
    Get(String),
    /// See `Directory::list`.
    List(String),
    /// See `Directory::transact`.
    Transact(Transaction),
}

/// The answer of the same name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DirectoryAnswer {
    /// See `Directory::get`.
    Get(Option<Versioned>),
    /// See `Directory::list`.
    List(Listing),
    /// See `Directory::transact`.
    Transact(Outcome),
}

/// What is sent as the answer to a directory request.
pub type DirectoryReply = Result<DirectoryAnswer, DirectoryError>;

/// Reads one message and not a byte more; `None` at a clean end. Not cancel-safe.
///
/// # Errors
/// As the stream's, or [`io::ErrorKind::InvalidData`].
pub async fn read<T: DeserializeOwned>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<T>> {
    let Some(body) = frame::read_body(stream).await? else { return Ok(None) };
    let mut deserializer = rmp_serde::Deserializer::from_read_ref(&body).with_human_readable();
    let message = T::deserialize(&mut deserializer);
    Ok(Some(message.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?))
}

/// Writes one message.
///
/// # Errors
/// As the stream's.
pub async fn write<T: Serialize>(stream: &mut (impl AsyncWrite + Unpin), message: &T) -> io::Result<()> {
    let mut body = Vec::new();
    // Addresses as text: what serde flattens is read back as if from a text format.
    let mut serializer = rmp_serde::Serializer::new(&mut body).with_struct_map().with_human_readable();
    message.serialize(&mut serializer).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    stream.write_all(&frame::enclose(&body)?).await?;
    stream.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{AttachEvent, JobInspection, JobState, JobView, Output, Reply, Stream};
    use proptest::prelude::*;

    async fn round_trip<T: Serialize + DeserializeOwned>(message: &T) -> T {
        let mut bytes = Vec::new();
        write(&mut bytes, message).await.unwrap();
        let mut stream = &bytes[..];
        let back = read(&mut stream).await.unwrap().unwrap();
        assert!(stream.is_empty(), "the whole message was read");
        back
    }

    #[tokio::test]
    async fn messages_survive_the_wire() {
        let output = Output { stream: Stream::Err, offset: 9, bytes: vec![0, 255, 10] };
        let event = AttachEvent::Output(output);
        assert_eq!(round_trip(&event).await, event);
        let transaction = Transaction::default().put("job/1", vec![1, 2, 3]).delete("name/x");
        let request = PeerRequest::Directory(DirectoryRequest::Transact(transaction));
        assert_eq!(round_trip(&request).await, request);
        let answer: DirectoryReply = Err(DirectoryError::Compacted(7));
        assert_eq!(round_trip(&answer).await, answer);
        let job = JobView {
            id: "ab".repeat(12),
            name: "web".into(),
            argv: vec!["prog".into()],
            created_ms: 1,
            address: [10, 77, 0, 5].into(),
            address6: "fd77::5".parse().ok(),
            node: "A".into(),
            epoch: 1,
            state: JobState::Running,
            home: Some(crate::api::HomeView { node: "B".into(), sent_bytes: 1, received_bytes: 2, lost: None }),
            moving_to: None,
            exit: None,
            finished_ms: None,
            pid: Some(7),
        };
        let inspection = JobInspection { job, spec: None, detail: Some(serde_json::json!({"sockets": [1, null]})) };
        assert_eq!(round_trip(&inspection).await, inspection);
        assert_eq!(round_trip(&Reply::Ok(())).await, Reply::Ok(()));
        assert_eq!(round_trip(&MoveAnswer::Accepted).await, MoveAnswer::Accepted);
    }

    proptest! {
        #[test]
        fn whatever_arrives_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let framed = frame::enclose(&bytes).unwrap();
            let _ = runtime.block_on(read::<PeerRequest>(&mut &framed[..]));
            let _ = runtime.block_on(read::<Hello>(&mut &bytes[..]));
        }
    }
}
