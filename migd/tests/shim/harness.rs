//! Two nodes, their directory, and shims on them.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use migd::api::{
    AttachEvent, AttachInput, Connection, DaemonRequest, DaemonStatus, DirectoryHealth, Exit, ExitFile, JobFile,
    JobPaths, JobSpec, MoveEvent, MoveOutcome, NodeAddress, Reply, ShimEvent, ShimRequest, ShimStatus, TransferReply,
    frame, unix_ms,
};
use sys::netlink::Netlink;
use sys::netns::NetNamespace;

/// The job's address.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);
/// Every wait of the tests ends at the latest after this.
pub const PATIENCE: Duration = Duration::from_secs(20);
const UPLINK: &str = "eth0";

/// Who owns the job.
#[derive(Debug, Clone)]
pub struct Directory {
    owner: Arc<Mutex<(String, u64)>>,
    /// While set, nobody who asks for a transfer gets an answer.
    pub silent: Arc<AtomicBool>,
    /// While set, nobody gets any answer.
    pub dead: Arc<AtomicBool>,
    exits: Arc<Mutex<Vec<Exit>>>,
}

impl Directory {
    fn new(owner: &str, epoch: u64) -> Directory {
        Directory {
            owner: Arc::new(Mutex::new((owner.to_owned(), epoch))),
            silent: Arc::default(),
            dead: Arc::default(),
            exits: Arc::default(),
        }
    }

    pub fn owner(&self) -> (String, u64) {
        self.owner.lock().unwrap().clone()
    }

    pub fn exits(&self) -> Vec<Exit> {
        self.exits.lock().unwrap().clone()
    }

    fn answer(&self, request: DaemonRequest) -> io::Result<Vec<u8>> {
        match request {
            DaemonRequest::Transfer { from_epoch, from_node, to_node, .. } => {
                let mut owner = self.owner.lock().unwrap();
                let reply = if *owner == (from_node, from_epoch) {
                    *owner = (to_node, from_epoch + 1);
                    TransferReply::Won { epoch: from_epoch + 1 }
                } else if *owner == (to_node, from_epoch + 1) {
                    TransferReply::Won { epoch: from_epoch + 1 }
                } else {
                    TransferReply::Lost { owner: Some(owner.0.clone()), epoch: owner.1 }
                };
                frame::encode(&Reply::Ok(reply))
            }
            DaemonRequest::JobExited { exit, .. } => {
                self.exits.lock().unwrap().push(exit);
                frame::encode(&Reply::Ok(()))
            }
            DaemonRequest::Status => frame::encode(&Reply::Ok(DaemonStatus {
                node: "A".into(),
                version: String::new(),
                cluster: None,
                prefix: None,
                peer: (Ipv4Addr::LOCALHOST, 7700).into(),
                pid: 0,
                directory: DirectoryHealth::Local,
            })),
            other => panic!("a shim asked {other:?}"),
        }
    }

    /// Serves a node's control socket until the test ends.
    fn serve(&self, path: &Path) {
        let listener = UnixListener::bind(path).unwrap();
        let directory = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let directory = directory.clone();
                std::thread::spawn(move || directory.converse(stream));
            }
        });
    }

    fn converse(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut header = [0; 4];
        stream.read_exact(&mut header)?;
        let mut body = vec![0; frame::body_length(header)?];
        stream.read_exact(&mut body)?;
        let request = frame::decode(&body)?;
        let unheard = self.silent.load(Ordering::SeqCst) && matches!(request, DaemonRequest::Transfer { .. });
        if unheard || self.dead.load(Ordering::SeqCst) {
            return Ok(());
        }
        stream.write_all(&self.answer(request)?)
    }
}

/// A node.
pub struct Node {
    pub name: String,
    pub namespace: NetNamespace,
    address: Ipv4Addr,
    directory: tempfile::TempDir,
}

/// Two nodes on one cable.
pub struct Cluster {
    pub a: Node,
    pub b: Node,
    pub directory: Directory,
}

fn new_namespace() -> NetNamespace {
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests need root");
        NetNamespace::current().unwrap()
    });
    thread.join().unwrap()
}

impl Cluster {
    /// Node A owns the job with epoch 1.
    pub fn new() -> Cluster {
        let directory = Directory::new("A", 1);
        let [a, b] = [("A", 1), ("B", 2)].map(|(name, number)| {
            let node = Node {
                name: name.to_owned(),
                namespace: new_namespace(),
                address: Ipv4Addr::new(10, 98, 0, number),
                directory: tempfile::tempdir().unwrap(),
            };
            directory.serve(&node.control());
            node
        });
        a.namespace.run(|| Netlink::open()?.add_veth(UPLINK, UPLINK, b.namespace.as_fd())).unwrap();
        for node in [&a, &b] {
            node.namespace
                .run(|| {
                    let mut netlink = Netlink::open()?;
                    for name in ["lo", UPLINK] {
                        let link = netlink.link(name)?;
                        netlink.set_up(link.index, None, None)?;
                    }
                    let index = netlink.link(UPLINK)?.index;
                    netlink.add_address(index, node.address.into(), 24)
                })
                .unwrap();
        }
        Cluster { a, b, directory }
    }
}

impl Node {
    fn control(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }

    pub fn address(&self) -> NodeAddress {
        NodeAddress { name: self.name.clone(), peer: (self.address, 7700).into(), hops: vec![] }
    }

    /// Names of the network devices of the node.
    pub fn devices(&self) -> Vec<String> {
        self.namespace.run(|| Ok(Netlink::open()?.links()?.into_iter().map(|link| link.name).collect())).unwrap()
    }

    /// The node's routing table, as text.
    pub fn routes(&self) -> String {
        self.namespace
            .run(|| {
                let thread = format!("/proc/self/task/{}/net/route", nix::unistd::gettid());
                std::fs::read_to_string(thread)
            })
            .unwrap()
    }

    /// Starts a shim: of a new job, or of one that is to be received.
    pub fn shim(&self, argv: &[&str], epoch: u64, receive: bool) -> Shim {
        let id = "0123456789ab".to_owned();
        let paths = JobPaths::new(self.directory.path().join(format!("job-{epoch}")));
        std::fs::create_dir(paths.root()).unwrap();
        let file = JobFile {
            spec: JobSpec {
                id,
                name: "job".into(),
                argv: argv.iter().map(|&word| word.to_owned()).collect(),
                env: vec![("PATH".into(), "/usr/bin:/bin:/usr/sbin:/sbin".into())],
                cwd: "/".into(),
                created_ms: unix_ms(),
            },
            address: ADDRESS,
            prefix_length: 16,
            address6: None,
            prefix_length6: 0,
            node: self.address(),
            epoch,
            receive,
            uplinks: vec![UPLINK.into()],
            control: self.control(),
        };
        std::fs::write(paths.spec(), serde_json::to_vec(&file).unwrap()).unwrap();
        let listener = UnixListener::bind(paths.socket()).unwrap();
        let log = std::fs::File::create(paths.shim_log()).unwrap();
        let child = self
            .namespace
            .run(|| {
                Command::new(env!("CARGO_BIN_EXE_migd"))
                    .arg("shim")
                    .arg("--dir")
                    .arg(paths.root())
                    .stdin(Stdio::from(OwnedFd::from(listener)))
                    .stdout(Stdio::null())
                    .stderr(log)
                    .spawn()
            })
            .unwrap();
        Shim { child, paths, runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap() }
    }
}

/// A shim.
pub struct Shim {
    pub child: Child,
    pub paths: JobPaths,
    runtime: tokio::runtime::Runtime,
}

impl Drop for Shim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.paths.shim_log()).unwrap_or_default();
            eprintln!("--- log of the shim in {}\n{log}", self.paths.root().display());
        }
    }
}

impl Shim {
    fn connect(&self) -> Connection {
        self.runtime.block_on(Connection::connect(&self.paths.socket())).unwrap()
    }

    fn receive<T: serde::de::DeserializeOwned>(&self, connection: &mut Connection) -> Option<T> {
        self.runtime.block_on(async {
            tokio::time::timeout(PATIENCE, connection.receive()).await.expect("an answer in time").unwrap()
        })
    }

    /// Asks something that has one answer.
    pub fn ask<T: serde::de::DeserializeOwned>(&self, request: &ShimRequest) -> Result<T, migd::api::ApiError> {
        let mut connection = self.connect();
        self.runtime.block_on(connection.send(request)).unwrap();
        self.receive::<Reply<T>>(&mut connection).expect("an answer").into()
    }

    pub fn status(&self) -> ShimStatus {
        self.ask(&ShimRequest::Status).unwrap()
    }

    /// Waits for an event that fits.
    pub fn wait_event(&self, fits: impl Fn(&ShimEvent) -> bool) -> ShimEvent {
        let mut connection = self.connect();
        self.runtime.block_on(connection.send(&ShimRequest::Watch)).unwrap();
        loop {
            match self.receive::<ShimEvent>(&mut connection) {
                Some(event) if fits(&event) => return event,
                Some(event @ ShimEvent::Failed(_)) => panic!("instead of what was waited for: {event:?}"),
                Some(_) => {}
                None => panic!("the shim ended without what was waited for"),
            }
        }
    }

    pub fn wait_running(&self) -> u64 {
        match self.wait_event(|event| matches!(event, ShimEvent::Running { .. })) {
            ShimEvent::Running { epoch } => epoch,
            other => panic!("{other:?}"),
        }
    }

    pub fn attach(&self, from_offset: u64, follow: bool, input: bool) -> Attachment<'_> {
        let mut connection = self.connect();
        self.runtime.block_on(connection.send(&ShimRequest::Attach { from_offset, follow, input })).unwrap();
        let accepted: Reply<()> = self.receive(&mut connection).expect("an answer");
        assert_eq!(accepted, Reply::Ok(()));
        Attachment { shim: self, connection, offset: from_offset, text: String::new() }
    }

    /// The exit recorded.
    pub fn exit_file(&self) -> Exit {
        let text = std::fs::read(self.paths.exit()).expect("exit.json");
        serde_json::from_slice::<ExitFile>(&text).unwrap().exit
    }

    pub fn wait_end(&mut self) {
        let until = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < until, "the shim does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Somebody attached.
pub struct Attachment<'a> {
    shim: &'a Shim,
    connection: Connection,
    pub offset: u64,
    pub text: String,
}

impl Attachment<'_> {
    pub fn input(&mut self, offset: u64, text: &str) {
        let input = AttachInput::Stdin { offset, bytes: text.into() };
        self.shim.runtime.block_on(self.connection.send(&input)).unwrap();
    }

    pub fn end_input(&mut self) {
        self.shim.runtime.block_on(self.connection.send(&AttachInput::StdinEof)).unwrap();
    }

    /// Takes output until an event that is not output (nor about input) comes.
    pub fn read_to_event(&mut self) -> AttachEvent {
        loop {
            if let Some(event) = self.step() {
                return event;
            }
        }
    }

    /// Takes output until `text` was in it.
    pub fn read_until(&mut self, text: &str) {
        while !self.text.contains(text) {
            if let Some(event) = self.step() {
                panic!("{event:?} before {text:?} in {:?}", self.text);
            }
        }
    }

    fn step(&mut self) -> Option<AttachEvent> {
        match self.shim.receive::<AttachEvent>(&mut self.connection).expect("an event") {
            AttachEvent::Output(output) => {
                assert_eq!(output.offset, self.offset, "output is lost or doubled");
                self.offset += output.bytes.len() as u64;
                self.text.push_str(&String::from_utf8_lossy(&output.bytes));
                None
            }
            AttachEvent::Accepted { .. } => None,
            event => Some(event),
        }
    }
}

/// A connection as the daemons make it.
pub fn connected_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one, listener.accept().unwrap().0)
}

/// A move under way.
pub struct Moving<'a> {
    from: &'a Shim,
    connection: Connection,
}

/// Starts a move over `streams` (source's, target's).
pub fn start_move<'a>(
    from: (&'a Shim, &Node),
    to: (&Shim, &Node),
    epoch: u64,
    streams: (TcpStream, TcpStream),
) -> Moving<'a> {
    let mut receiving = to.0.connect();
    let request = ShimRequest::Receive { source: from.1.address() };
    to.0.runtime.block_on(receiving.send_with(&request, &[streams.1.as_fd()])).unwrap();
    assert_eq!(to.0.receive::<Reply<()>>(&mut receiving), Some(Reply::Ok(())));
    let mut connection = from.0.connect();
    let request = ShimRequest::MoveOut { target: to.1.address(), epoch, sockets: migd::api::SocketPlace::Along };
    from.0.runtime.block_on(connection.send_with(&request, &[streams.0.as_fd()])).unwrap();
    Moving { from: from.0, connection }
}

impl Moving<'_> {
    pub fn outcome(mut self) -> MoveOutcome {
        loop {
            match self.from.receive::<MoveEvent>(&mut self.connection).expect("an outcome") {
                MoveEvent::Progress { .. } => {}
                MoveEvent::Done(outcome) => return outcome,
                MoveEvent::Failed(error) => panic!("{error}"),
            }
        }
    }
}
