//! Whole daemons with a machine and shims that are only played: no namespace, no route, no process.
//!
//! A played shim writes its offset as output every few milliseconds, echoes nothing, ends at SIGTERM, dies at SIGKILL without a
//! word, and moves by sending its offset over the connection between the daemons.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixListener as StdListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener};
use tokio::sync::watch;

use super::jobs::write_json;
use super::join::Way;
use super::machine::{Machine, ShimEnd};
use super::{Settings, serve};
use crate::api::*;

const PATIENCE: Duration = Duration::from_secs(20);
const STEP: Duration = Duration::from_millis(5);

/// One machine for all daemons of a test. Shims run on its runtime, so that they survive daemons.
struct Stage {
    runtime: Option<tokio::runtime::Runtime>,
    routes: Mutex<BTreeMap<(String, IpAddr), IpAddr>>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        // The last to hold it may be a task, where waiting is not allowed.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct PlayedMachine {
    name: String,
    stage: Arc<Stage>,
}

impl Machine for PlayedMachine {
    fn start_shim(&self, job: &JobPaths, listener: StdListener) -> io::Result<ShimEnd> {
        listener.set_nonblocking(true)?;
        let job = job.clone();
        let shim = self
            .stage
            .runtime
            .as_ref()
            .unwrap()
            .spawn(async move { Shim::play(job, UnixListener::from_std(listener).unwrap()).await });
        Ok(Box::pin(async move {
            if shim.await.unwrap_or_default() {
                // The kernel takes down what it held, and takes its time.
                std::future::pending::<()>().await;
            }
        }))
    }

    fn follow(&self, address: IpAddr, via: IpAddr) -> io::Result<()> {
        self.stage.routes.lock().unwrap().insert((self.name.clone(), address), via);
        Ok(())
    }

    fn unfollow(&self, address: IpAddr) -> io::Result<()> {
        self.stage.routes.lock().unwrap().remove(&(self.name.clone(), address));
        Ok(())
    }

    fn followed(&self) -> Vec<IpAddr> {
        let routes = self.stage.routes.lock().unwrap();
        routes.keys().filter(|(name, _)| *name == self.name).map(|(_, address)| *address).collect()
    }

    fn clean_up(&self, _: &[IpAddr], _: &[String]) -> io::Result<()> {
        Ok(())
    }
}

/// A played shim.
struct Shim {
    paths: JobPaths,
    file: JobFile,
    event: watch::Sender<ShimEvent>,
    /// Bytes of output so far: the text of all numbers from 0, a line each.
    output: AtomicU64,
    dead: watch::Sender<bool>,
}

/// The output of a played job from `offset` to `end`: the same bytes wherever it runs.
fn text(offset: u64, end: u64) -> Vec<u8> {
    (offset..end).map(|at| b'a' + u8::try_from(at % 26).unwrap()).collect()
}

impl Shim {
    /// Plays until its job has ended or moved away. Returns whether its process is then to take for ever to end.
    async fn play(paths: JobPaths, listener: UnixListener) -> bool {
        let file: JobFile = serde_json::from_slice(&std::fs::read(paths.spec()).unwrap()).unwrap();
        let first = match file.spec.argv[0].as_str() {
            "missing" => ShimEvent::Failed(ApiError::new(ErrorKind::NoSuchProgram, "no such program")),
            _ if file.receive => ShimEvent::Receiving,
            _ => ShimEvent::Running { epoch: file.epoch },
        };
        let shim = Arc::new(Shim {
            paths,
            file,
            event: watch::Sender::new(first),
            output: AtomicU64::new(0),
            dead: watch::Sender::new(false),
        });
        let mut event = shim.event.subscribe();
        let mut dead = shim.dead.subscribe();
        let mut tasks = tokio::task::JoinSet::new();
        let last = loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let shim = Arc::clone(&shim);
                    tasks.spawn(async move { shim.answer(accepted.unwrap().0.into()).await });
                }
                _ = dead.wait_for(|dead| *dead) => return false,
                () = tokio::time::sleep(STEP) => {
                    if matches!(*shim.event.borrow(), ShimEvent::Running { .. }) {
                        shim.output.fetch_add(1, Ordering::SeqCst);
                    }
                }
                event = event.wait_for(super::supervise::is_final) => break event.unwrap().clone(),
            }
        };
        if let ShimEvent::Exited(exit) = last {
            write_json(&shim.paths.exit(), &ExitFile { exit, finished_ms: unix_ms() }).unwrap();
        }
        // Those who listen, or are about to, hear the end.
        let farewell = async {
            while let Ok((stream, _)) = listener.accept().await {
                let shim = Arc::clone(&shim);
                tasks.spawn(async move { shim.answer(stream.into()).await });
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(200), farewell).await;
        shim.file.spec.argv[0] == "ends slowly" && matches!(last, ShimEvent::Moved { .. })
    }

    async fn answer(self: Arc<Self>, mut connection: Connection) {
        let Ok(Some(request)) = connection.receive::<ShimRequest>().await else { return };
        match request {
            ShimRequest::Status | ShimRequest::Inspect | ShimRequest::Sockets | ShimRequest::Capture { .. } => {
                let error = ApiError::new(ErrorKind::Internal, "only played");
                let _ = connection.send(&Reply::<()>::Error(error)).await;
            }
            ShimRequest::File => drop(connection.send(&Reply::Ok(&self.file)).await),
            ShimRequest::Kill { signal } => {
                let _ = connection.send(&Reply::Ok(())).await;
                match signal {
                    nix::libc::SIGKILL => drop(self.dead.send_replace(true)),
                    signal => self.exit(Exit::Signal(signal)),
                }
            }
            ShimRequest::Watch => {
                let mut event = self.event.subscribe();
                loop {
                    let now = event.borrow_and_update().clone();
                    let last = super::supervise::is_final(&now);
                    if connection.send(&now).await.is_err() || last || event.changed().await.is_err() {
                        return;
                    }
                }
            }
            ShimRequest::Attach { from_offset, .. } => self.attach(connection, from_offset).await,
            ShimRequest::MoveOut { target, epoch, .. } => self.move_out(connection, target, epoch).await,
            ShimRequest::Receive { source } => self.receive(connection, source.name).await,
            ShimRequest::Line { .. } | ShimRequest::Cancel => {}
        }
    }

    fn exit(&self, exit: Exit) {
        write_json(&self.paths.exit(), &ExitFile { exit, finished_ms: unix_ms() }).unwrap();
        self.event.send_replace(ShimEvent::Exited(exit));
    }

    async fn attach(&self, mut connection: Connection, mut offset: u64) {
        connection.send(&Reply::Ok(())).await.unwrap();
        loop {
            let event = self.event.borrow().clone();
            let end = self.output.load(Ordering::SeqCst);
            if offset < end {
                let output = Output { stream: Stream::Out, offset, bytes: text(offset, end) };
                offset = end;
                if connection.send(&AttachEvent::Output(output)).await.is_err() {
                    return;
                }
            }
            let last = match event {
                ShimEvent::Exited(exit) => AttachEvent::Exited(exit),
                ShimEvent::Moved { to, .. } => AttachEvent::Moved { node: to },
                _ => {
                    tokio::time::sleep(STEP).await;
                    continue;
                }
            };
            let _ = connection.send(&last).await;
            return;
        }
    }

    async fn move_out(&self, mut connection: Connection, target: NodeAddress, epoch: u64) {
        let mut stream = stream_of(&mut connection);
        self.event.send_replace(ShimEvent::Moving { to: target.name.clone() });
        stream.write_u64(self.output.load(Ordering::SeqCst)).await.unwrap();
        let outcome = match stream.read_u64().await {
            Ok(won) => {
                self.event.send_replace(ShimEvent::Moved { to: target.name.clone(), epoch: won });
                MoveOutcome::Moved(MoveSummary {
                    from: self.file.node.name.clone(),
                    to: target.name,
                    epoch: won,
                    downtime_us: 1,
                    total_us: 2,
                    precopy_bytes: 0,
                    freeze_bytes: 8,
                    phases: Vec::new(),
                })
            }
            Err(error) => {
                self.event.send_replace(ShimEvent::Running { epoch });
                MoveOutcome::Aborted { phase: "residual".into(), reason: error.to_string() }
            }
        };
        let _ = connection.send(&MoveEvent::Done(outcome)).await;
    }

    async fn receive(&self, mut connection: Connection, source: String) {
        let mut stream = stream_of(&mut connection);
        connection.send(&Reply::Ok(())).await.unwrap();
        let offset = stream.read_u64().await.unwrap();
        let JobFile { spec, node, epoch, control, .. } = &self.file;
        if spec.argv[0] == "refuses" {
            let error = ApiError::new(ErrorKind::Internal, "this shim refuses");
            self.event.send_replace(ShimEvent::Failed(error));
            return;
        }
        let transfer = DaemonRequest::Transfer {
            job: spec.id.clone(),
            from_epoch: *epoch,
            from_node: source,
            to_node: node.name.clone(),
            home: None,
        };
        let client = Client::new(control.clone());
        let won = loop {
            match client.ask::<TransferReply>(&transfer).await {
                Ok(TransferReply::Won { epoch }) => break epoch,
                Ok(TransferReply::Lost { .. }) => panic!("nobody else is there to win"),
                Ok(TransferReply::Unknown { .. }) | Err(_) => tokio::time::sleep(STEP).await,
            }
        };
        self.output.store(offset, Ordering::SeqCst);
        self.event.send_replace(ShimEvent::Running { epoch: won });
        stream.write_u64(won).await.unwrap();
    }
}

fn stream_of(connection: &mut Connection) -> TcpStream {
    let stream = std::net::TcpStream::from(connection.take_descriptor().expect("comes with the request"));
    stream.set_nonblocking(true).unwrap();
    TcpStream::from_std(stream).unwrap()
}

/// A daemon on a runtime of its own; dropping it is like killing it.
struct Daemon {
    runtime: Option<tokio::runtime::Runtime>,
    peer: SocketAddr,
    paths: StatePaths,
    client: Client,
}

struct Scene {
    stage: Arc<Stage>,
    directory: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let stage = Arc::new(Stage { runtime: Some(runtime), routes: Mutex::default() });
        Self { stage, directory: tempfile::tempdir().unwrap() }
    }

    /// Starts a daemon and waits until it has joined.
    async fn daemon(&self, name: &str, listen: Option<SocketAddr>, way: Way) -> Daemon {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let paths = StatePaths::new(self.directory.path().join(name));
        let settings = Settings {
            name: name.into(),
            paths: paths.clone(),
            listen: listen.unwrap_or_else(|| "127.0.0.1:0".parse().unwrap()),
            hops: vec!["::1".parse().unwrap()],
            uplinks: Vec::new(),
            way,
            etcd: None,
        };
        let machine = PlayedMachine { name: name.into(), stage: Arc::clone(&self.stage) };
        let mut served = runtime.spawn(serve(settings, Arc::new(machine)));
        let client = Client::new(paths.control());
        let status = until(async || {
            if served.is_finished() {
                panic!("the daemon of {name} ended: {:#}", (&mut served).await.unwrap().unwrap_err());
            }
            client.ask::<DaemonStatus>(&DaemonRequest::Status).await.ok().filter(|status| status.cluster.is_some())
        })
        .await;
        Daemon { runtime: Some(runtime), peer: status.peer, paths, client }
    }

    async fn pair(&self) -> (Daemon, Daemon) {
        let a = self.daemon("A", None, Way::Create { prefixes: Vec::new() }).await;
        let b = self.daemon("B", None, Way::Join(a.peer)).await;
        (a, b)
    }

    fn route(&self, node: &str, address: impl Into<IpAddr>) -> Option<IpAddr> {
        self.stage.routes.lock().unwrap().get(&(node.to_owned(), address.into())).copied()
    }
}

impl Daemon {
    /// Ends it as SIGKILL would: at once, with the socket left behind.
    fn kill(mut self) -> SocketAddr {
        let runtime = self.runtime.take().unwrap();
        // In a thread of its own: it waits until nothing of the daemon is left, its locks above all.
        std::thread::spawn(move || runtime.shutdown_timeout(PATIENCE)).join().unwrap();
        self.peer
    }

    async fn run(&self, name: &str, program: &str, home: &str) -> Result<JobView, ClientError> {
        let request = RunRequest {
            name: Some(name.into()),
            argv: vec![program.into()],
            env: Vec::new(),
            cwd: "/".into(),
            node: Some(home.into()),
            address: None,
        };
        self.client.ask(&DaemonRequest::Run(request)).await
    }

    async fn jobs(&self) -> JobList {
        self.client.ask(&DaemonRequest::Jobs { all: true }).await.unwrap()
    }

    async fn job(&self, name: &str) -> Option<JobView> {
        self.jobs().await.jobs.into_iter().find(|job| job.name == name)
    }

    async fn kill_job(&self, job: &str, signal: i32) -> Result<(), ClientError> {
        self.client.ask(&DaemonRequest::Kill { job: job.into(), signal }).await
    }

    async fn move_job(&self, job: &str, node: &str) -> MoveEvent {
        let request = DaemonRequest::Move { job: job.into(), node: node.into(), sockets: SocketPlace::Along };
        let (_, mut connection) = self.client.open::<JobView>(&request).await.unwrap();
        loop {
            match connection.receive::<MoveEvent>().await.unwrap().expect("an end") {
                MoveEvent::Progress { .. } => {}
                end => return end,
            }
        }
    }

    async fn attach(&self, job: &str) -> Connection {
        let request = DaemonRequest::Attach { job: job.into(), from_offset: 0, input: false };
        self.client.open::<JobView>(&request).await.unwrap().1
    }

    async fn transfer(&self, job: &JobView, from_epoch: u64, from: &str, to: &str) -> TransferReply {
        let (job, from_node, to_node) = (job.id.clone(), from.to_owned(), to.to_owned());
        self.client.ask(&DaemonRequest::Transfer { job, from_epoch, from_node, to_node, home: None }).await.unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Asks until there is an answer.
async fn until<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let wait = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(STEP).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("in time")
}

/// Reads a stream until at least `bytes` of output came, or to its end; checks that nothing is lost or doubled.
async fn read_output(connection: &mut Connection, next: &mut u64, bytes: u64) -> Option<Exit> {
    while *next < bytes {
        let event = tokio::time::timeout(PATIENCE, connection.receive::<AttachEvent>()).await.expect("in time");
        match event.unwrap().expect("an end is told") {
            AttachEvent::Output(output) => {
                assert_eq!(output.offset, *next, "nothing lost, nothing doubled");
                *next += output.bytes.len() as u64;
                assert_eq!(output.bytes, text(output.offset, *next));
            }
            AttachEvent::Exited(exit) => return Some(exit),
            AttachEvent::Moved { .. } | AttachEvent::Accepted { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    None
}

fn kind(error: ClientError) -> ErrorKind {
    match error {
        ClientError::Api(error) => error.kind,
        other => panic!("{other:#}"),
    }
}

#[tokio::test]
async fn a_job_is_seen_and_ended_from_any_node() {
    let scene = Scene::new();
    let (a, b) = scene.pair().await;
    let job = b.run("web", "prog", "A").await.unwrap();
    assert_eq!((job.node.as_str(), job.state, job.epoch), ("A", JobState::Running, 1));
    assert_eq!(kind(b.run("web", "prog", "B").await.unwrap_err()), ErrorKind::Conflict, "names are unique");
    let seen = b.job("web").await.unwrap();
    assert_eq!((seen.id.as_str(), seen.state), (job.id.as_str(), JobState::Running));
    until(async || scene.route("B", job.address)).await;
    assert_eq!(scene.route("B", job.address), Some(a.peer.ip()));
    let address6 = job.address6.unwrap();
    until(async || scene.route("B", address6)).await;
    assert_eq!(scene.route("B", address6), "::1".parse().ok());
    assert_eq!(scene.route("A", job.address), None);

    let mut output = b.attach(&job.id[..8]).await;
    let mut next = 0;
    assert_eq!(read_output(&mut output, &mut next, 5).await, None);
    b.kill_job("web", 15).await.unwrap();
    assert_eq!(read_output(&mut output, &mut next, u64::MAX).await, Some(Exit::Signal(15)));

    until(async || a.job("web").await.filter(|job| job.exit == Some(Exit::Signal(15)))).await;
    until(async || scene.route("B", job.address).is_none().then_some(())).await;
    until(async || scene.route("B", job.address6.unwrap()).is_none().then_some(())).await;
    let again = until(async || b.run("web", "prog", "B").await.ok()).await;
    assert_ne!(again.address, job.address, "the address rests");
    assert_eq!(
        kind(a.client.ask::<()>(&DaemonRequest::Remove { job: "web".into() }).await.unwrap_err()),
        ErrorKind::Conflict
    );
    a.kill_job("web", 15).await.unwrap();
    until(async || a.client.ask::<()>(&DaemonRequest::Remove { job: again.id.clone() }).await.ok()).await;
    b.client.ask::<()>(&DaemonRequest::Remove { job: job.id.clone() }).await.unwrap();
    assert_eq!(a.jobs().await.jobs, []);
    assert_eq!(kind(a.kill_job("web", 15).await.unwrap_err()), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_program_that_can_not_be_started_leaves_nothing() {
    let scene = Scene::new();
    let (a, _b) = scene.pair().await;
    assert_eq!(kind(a.run("web", "missing", "A").await.unwrap_err()), ErrorKind::NoSuchProgram);
    assert_eq!(a.jobs().await, JobList::default());
    assert_eq!(std::fs::read_dir(a.paths.jobs()).unwrap().count(), 0);
    a.run("web", "prog", "A").await.expect("the name is free");
    assert_eq!(kind(a.run("no name!", "prog", "A").await.unwrap_err()), ErrorKind::Invalid);
    assert_eq!(kind(a.run("x", "prog", "C").await.unwrap_err()), ErrorKind::NotFound, "there is no node C");
}

#[tokio::test]
async fn output_and_routes_follow_a_move() {
    let scene = Scene::new();
    let (a, b) = scene.pair().await;
    let job = a.run("web", "prog", "A").await.unwrap();
    let mut output = a.attach("web").await;
    let mut next = 0;
    read_output(&mut output, &mut next, 3).await;

    // Asked at the node that does not have it.
    let end = b.move_job("web", "B").await;
    let MoveEvent::Done(MoveOutcome::Moved(summary)) = end else { panic!("{end:?}") };
    assert_eq!((summary.from.as_str(), summary.to.as_str(), summary.epoch), ("A", "B", 2));
    let seen = until(async || a.job("web").await.filter(|job| job.node == "B")).await;
    assert_eq!((seen.address, seen.epoch, seen.state), (job.address, 2, JobState::Running));
    until(async || scene.route("A", job.address)).await;
    until(async || scene.route("B", job.address).is_none().then_some(())).await;
    until(async || scene.route("B", job.address6.unwrap()).is_none().then_some(())).await;
    let goal = next + 10;
    assert_eq!(read_output(&mut output, &mut next, goal).await, None, "the stream goes on");
    until(async || (!a.paths.job(&job.id).root().exists()).then_some(())).await;

    a.kill_job("web", 15).await.unwrap();
    assert_eq!(read_output(&mut output, &mut next, u64::MAX).await, Some(Exit::Signal(15)));
}

#[tokio::test]
async fn a_job_comes_back_while_the_process_of_its_former_shim_still_ends() {
    let scene = Scene::new();
    let (a, b) = scene.pair().await;
    let job = a.run("web", "ends slowly", "A").await.unwrap();
    for (epoch, name, node, other) in [(2, "B", &b, &a), (3, "A", &a, &b), (4, "B", &b, &a), (5, "A", &a, &b)] {
        let end = a.move_job("web", name).await;
        assert!(matches!(end, MoveEvent::Done(MoveOutcome::Moved(_))), "{end:?}");
        let runs = |job: &JobView| (job.node.as_str(), job.epoch, job.state) == (name, epoch, JobState::Running);
        until(async || node.job("web").await.filter(runs)).await;
        until(async || (!other.paths.job(&job.id).root().exists()).then_some(())).await;
        assert!(node.paths.job(&job.id).root().exists());
    }
}

#[tokio::test]
async fn a_move_that_fails_leaves_the_job_where_it_was() {
    let scene = Scene::new();
    let (a, b) = scene.pair().await;
    let job = a.run("web", "refuses", "A").await.unwrap();
    let end = a.move_job("web", "B").await;
    assert!(matches!(end, MoveEvent::Done(MoveOutcome::Aborted { .. })), "{end:?}");
    // Again at once, while the shim that refused it is still there.
    let end = a.move_job("web", "B").await;
    assert!(matches!(end, MoveEvent::Done(MoveOutcome::Aborted { .. })), "{end:?}");
    let seen = until(async || b.job("web").await.filter(|job| job.state == JobState::Running)).await;
    assert_eq!((seen.node.as_str(), seen.epoch), ("A", 1));
    until(async || (!b.paths.job(&job.id).root().exists()).then_some(())).await;
    let to_itself = DaemonRequest::Move { job: "web".into(), node: "A".into(), sockets: SocketPlace::Along };
    assert_eq!(kind(a.client.open::<JobView>(&to_itself).await.unwrap_err()), ErrorKind::Invalid);
}

#[tokio::test]
async fn jobs_outlive_their_daemon() {
    let scene = Scene::new();
    let (a, b) = scene.pair().await;
    let job = b.run("web", "prog", "B").await.unwrap();
    let brief = b.run("brief", "prog", "B").await.unwrap();
    let mut output = a.attach("web").await;
    let mut next = 0;
    read_output(&mut output, &mut next, 3).await;

    let peer = b.kill();
    let gone = a.job("web").await.unwrap();
    assert_eq!(gone.state, JobState::Unreachable);
    assert!(!a.jobs().await.warnings.is_empty(), "it is said why");
    // Ends while nobody looks.
    let shim = Client::new(scene.directory.path().join("B/jobs").join(&brief.id).join("shim.sock"));
    shim.ask_with::<_, ()>(&ShimRequest::Kill { signal: 1 }).await.unwrap();

    let b = scene.daemon("B", Some(peer), Way::Join(a.peer)).await;
    let found = until(async || b.job("web").await.filter(|job| job.state == JobState::Running)).await;
    assert_eq!((found.id, found.epoch), (job.id, 1));
    let goal = next + 10;
    read_output(&mut output, &mut next, goal).await;
    until(async || a.job("brief").await.filter(|job| job.exit == Some(Exit::Signal(1)))).await;
    until(async || a.run("brief", "prog", "A").await.ok()).await;
}

#[tokio::test]
async fn a_damaged_job_file_costs_no_job() {
    let scene = Scene::new();
    let (a, b) = scene.pair().await;
    let job = b.run("web", "prog", "B").await.unwrap();
    let path = scene.directory.path().join("B/jobs").join(&job.id).join("job.json");
    let whole = std::fs::read(&path).unwrap();
    let peer = b.kill();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();

    let b = scene.daemon("B", Some(peer), Way::Join(a.peer)).await;
    let found = until(async || b.job("web").await.filter(|job| job.state == JobState::Running)).await;
    assert_eq!((found.id, found.address), (job.id, job.address));
    assert_eq!(kind(a.run("web", "prog", "A").await.unwrap_err()), ErrorKind::Conflict, "the name is taken");
    assert_eq!(std::fs::read(&path).unwrap(), whole);
}

#[tokio::test]
async fn a_job_whose_shim_dies_is_lost_and_its_name_free() {
    let scene = Scene::new();
    let (a, b) = scene.pair().await;
    a.run("web", "prog", "A").await.unwrap();
    let mut output = b.attach("web").await;
    b.kill_job("web", 9).await.unwrap();
    let mut next = 0;
    assert_eq!(read_output(&mut output, &mut next, u64::MAX).await, Some(Exit::Lost));
    assert_eq!(b.job("web").await.unwrap().exit, Some(Exit::Lost));
    until(async || b.run("web", "prog", "B").await.ok()).await;
}

#[tokio::test]
async fn an_owner_changes_once_per_epoch() {
    let scene = Scene::new();
    let (a, b) = scene.pair().await;
    let job = a.run("web", "prog", "A").await.unwrap();
    assert_eq!(b.transfer(&job, 1, "A", "B").await, TransferReply::Won { epoch: 2 });
    assert_eq!(b.transfer(&job, 1, "A", "B").await, TransferReply::Won { epoch: 2 }, "asked again");
    let lost = TransferReply::Lost { owner: Some("B".into()), epoch: 2 };
    assert_eq!(a.transfer(&job, 1, "A", "A").await, lost, "the fence comes too late");
    assert_eq!(a.transfer(&job, 2, "B", "B").await, TransferReply::Won { epoch: 3 }, "a fence");
    assert_eq!(a.transfer(&job, 2, "B", "A").await, TransferReply::Lost { owner: Some("B".into()), epoch: 3 });
}

#[tokio::test]
async fn without_the_directory_what_is_local_goes_on_and_nothing_is_guessed() {
    let scene = Scene::new();
    let (a, b) = scene.pair().await;
    let job = b.run("web", "prog", "B").await.unwrap();
    until(async || b.job("web").await).await;
    let peer = a.kill();

    let list = b.jobs().await;
    assert_eq!(list.jobs.iter().map(|job| job.state).collect::<Vec<_>>(), [JobState::Running]);
    assert!(list.warnings.iter().any(|warning| warning.contains("directory")), "{:?}", list.warnings);
    let nodes: NodeList = b.client.ask(&DaemonRequest::Nodes).await.unwrap();
    assert_eq!(nodes.nodes.iter().map(|node| node.alive).collect::<Vec<_>>(), [false, true]);
    assert!(matches!(b.transfer(&job, 1, "B", "A").await, TransferReply::Unknown { .. }));
    assert_eq!(kind(b.run("more", "prog", "B").await.unwrap_err()), ErrorKind::Unavailable);
    b.kill_job("web", 15).await.unwrap();
    until(async || b.job("web").await.filter(|job| job.exit.is_some())).await;

    let a = scene.daemon("A", Some(peer), Way::Create { prefixes: Vec::new() }).await;
    until(async || a.run("web", "prog", "A").await.ok()).await;
}

#[tokio::test]
async fn nodes_that_do_not_belong_together_refuse_each_other() {
    let scene = Scene::new();
    let (a, _b) = scene.pair().await;
    let c = scene.daemon("C", None, Way::Create { prefixes: Vec::new() }).await;
    let peers = super::peer::Peers::new("B");
    peers.set_cluster("another");
    let refused = peers.connect(a.peer).await.unwrap_err();
    assert!(refused.to_string().contains("belongs to cluster"), "{refused}");
    assert_eq!(c.job("web").await, None);
}
