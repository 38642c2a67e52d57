//! The engines, with what can happen to them.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use cluster_addr::directory::{Directory, DirectoryError, Expect, Outcome, Transaction};
use cluster_addr::{Embedded, Etcd};

use crate::members::Members;

/// Set in a process that writes to the file it names until it is killed.
pub const WRITER: &str = "CLUSTER_ADDR_TEST_WRITER";
/// Set in a process that fills the disk of the directory it names.
pub const FULL: &str = "CLUSTER_ADDR_TEST_FULL";

/// Changes that the embedded engine keeps here: more than any test makes between two looks.
const HISTORY: u64 = 200;

pub type Handle = Arc<dyn Directory>;

/// An engine.
#[async_trait]
pub trait Host {
    /// A handle; there may be several at a time.
    async fn handle(&mut self) -> Handle;
    /// Ends the engine and starts it again on what it has stored.
    fn restart(&mut self);
    /// Forgets all changes up to now.
    async fn compact(&mut self);
    /// Starts something that writes `count/N` = N and tells each acknowledged N, kills what stores (and writes) in the middle
    /// of it, and starts it again. Returns the newest number acknowledged.
    async fn kill_while_writing(&mut self, first: u64) -> u64;
}

/// So that the trait can have asynchronous functions and still be used behind a reference.
pub use async_trait::async_trait;

pub struct EmbeddedHost {
    directory: tempfile::TempDir,
    engine: Option<Handle>,
}

impl EmbeddedHost {
    pub fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a temporary directory"), engine: None }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("directory.redb")
    }
}

#[async_trait]
impl Host for EmbeddedHost {
    async fn handle(&mut self) -> Handle {
        let path = self.path();
        let open = || -> Handle { Arc::new(Embedded::open_keeping(&path, HISTORY).expect("a sound file")) };
        Arc::clone(self.engine.get_or_insert_with(open))
    }

    fn restart(&mut self) {
        let engine = self.engine.take();
        assert!(engine.is_none_or(|engine| Arc::strong_count(&engine) == 1), "handles would keep the file open");
    }

    async fn compact(&mut self) {
        let engine = self.handle().await;
        for _ in 0..=HISTORY {
            engine.transact(&Transaction::default().put("filler", vec![0])).await.expect("written");
        }
    }

    async fn kill_while_writing(&mut self, first: u64) -> u64 {
        self.restart();
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "the_embedded_engine_killed_in_the_middle_of_writes", "--nocapture", "--test-threads=1"])
            .env(WRITER, self.path())
            .env("FIRST", first.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let newest = listen_and_kill(&mut child, first);
        child.wait().expect("ours");
        newest
    }
}

/// Reads what is acknowledged, kills the writer after some, and reads what it had still said.
fn listen_and_kill(child: &mut Child, first: u64) -> u64 {
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let mut newest = None;
    while let Some(Ok(line)) = lines.next() {
        if let Some(number) = line.strip_prefix("ack ") {
            newest = number.parse().ok();
            if newest >= Some(first + 30) {
                // Again and again: only the first counts.
                let _ = child.kill();
            }
        }
    }
    newest.expect("something was written")
}

/// The process that is killed.
pub fn write_until_killed(path: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let engine = Embedded::open(path).expect("a sound file");
    let first: u64 = std::env::var("FIRST").expect("told").parse().expect("a number");
    for number in first..first + 1_000_000 {
        runtime.block_on(write_count(&engine, number)).expect("written");
        println!("ack {number}");
        std::io::stdout().flush().expect("a pipe");
    }
}

/// Two keys that change together, and one of their own.
pub async fn write_count(engine: &dyn Directory, number: u64) -> Result<Outcome, DirectoryError> {
    let text = number.to_string().into_bytes();
    let transaction = Transaction::default()
        .expect(format!("count/{number:020}"), Expect::Absent)
        .put("left", text.clone())
        .put("right", text.clone())
        .put(format!("count/{number:020}"), text);
    engine.transact(&transaction).await
}

pub struct EtcdHost {
    pub members: Members,
}

impl EtcdHost {
    pub fn new(count: usize) -> Self {
        Self { members: Members::start(count, &[]) }
    }

    fn place(&self) -> cluster_addr::etcd::Place {
        format!("etcd:{}", self.members.endpoints().join(",")).parse().expect("a place")
    }
}

#[async_trait]
impl Host for EtcdHost {
    async fn handle(&mut self) -> Handle {
        Arc::new(Etcd::connect(self.place()).await.expect("endpoints"))
    }

    fn restart(&mut self) {
        self.members.kill(0);
        self.members.restart(0);
    }

    async fn compact(&mut self) {
        let revision = self.handle().await.list("").await.expect("listed").revision;
        let mut client = etcd_client::Client::connect(self.members.endpoints(), None).await.expect("endpoints");
        client.compact(i64::try_from(revision).expect("small"), None).await.expect("compacted");
    }

    async fn kill_while_writing(&mut self, first: u64) -> u64 {
        let engine = self.handle().await;
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        let writer = tokio::spawn(async move {
            for number in first.. {
                if !matches!(write_count(&*engine, number).await, Ok(Outcome::Done(_))) {
                    return;
                }
                if sender.send(number).is_err() {
                    return;
                }
            }
        });
        let mut newest = None;
        while let Some(number) = receiver.recv().await {
            newest = Some(number);
            if number == first + 30 {
                self.members.kill(0);
            }
        }
        writer.await.expect("it ends with the member");
        self.members.restart(0);
        newest.expect("something was written")
    }
}

/// Runs this test again in a mount namespace of its own, with a small disk.
pub fn on_small_disk() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let script = "mount -t tmpfs -o size=3m small \"$CLUSTER_ADDR_TEST_FULL\" && exec \"$0\" \"$@\"";
    let status = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", "the_embedded_engine_on_a_full_disk", "--nocapture"])
        .env(FULL, directory.path())
        .status();
    assert!(status.expect("unshare runs (this needs root)").success());
}

/// Writes until nothing fits any more: that is said, what was written stays, and with room again all goes on.
pub async fn fill_disk(directory: PathBuf) {
    let engine = Embedded::open(&directory.join("directory.redb")).expect("a new file");
    let mut acknowledged = 0u64;
    let failure = loop {
        let put = Transaction::default().put(format!("big/{acknowledged:06}"), vec![7; 60_000]);
        match engine.transact(&put).await {
            Ok(Outcome::Done(_)) => acknowledged += 1,
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
        assert!(acknowledged < 1000, "the disk is small");
    };
    assert!(matches!(failure, DirectoryError::Storage(_) | DirectoryError::Unknown(_)), "{failure:?}");
    assert!(acknowledged > 0);
    // Still full: it goes on saying so, and answers questions when it can be opened at all.
    let again = engine.transact(&Transaction::default().put("more", vec![7; 60_000])).await;
    assert!(matches!(again, Err(DirectoryError::Storage(_) | DirectoryError::Unknown(_))), "{again:?}");
    let status = Command::new("mount").args(["-o", "remount,size=64m"]).arg(&directory).status().expect("mount runs");
    assert!(status.success());
    engine.transact(&Transaction::default().put("after", vec![1])).await.expect("there is room again");
    let listing = engine.list("big/").await.expect("listed");
    let count = u64::try_from(listing.entries.len()).expect("few");
    // The one that failed may have been written or not.
    assert!(count == acknowledged || count == acknowledged + 1, "{count} of {acknowledged}");
    assert!(engine.get("after").await.expect("read").is_some());
}

/// The same with etcd, whose own bound on its size stands for the disk's.
pub async fn fill_etcd() {
    let members = Members::start(1, &["--quota-backend-bytes", "2097152"]);
    let place = format!("etcd:{}", members.endpoints().join(",")).parse().expect("a place");
    let engine = Etcd::connect(place).await.expect("endpoints");
    let mut acknowledged = 0u64;
    let failure = loop {
        let put = Transaction::default().put(format!("big/{acknowledged:06}"), vec![7; 60_000]);
        match engine.transact(&put).await {
            Ok(Outcome::Done(_)) => acknowledged += 1,
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
        assert!(acknowledged < 1000, "it is small");
    };
    assert!(matches!(failure, DirectoryError::Unknown(_)), "{failure:?}");
    let count = u64::try_from(engine.list("big/").await.expect("it can be read").entries.len()).expect("few");
    // The one that failed may have been written or not.
    assert!(count == acknowledged || count == acknowledged + 1, "{count} of {acknowledged}");
}
