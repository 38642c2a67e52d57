//! A lab for one test.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use migd::api::{Exit, JobView, SocketPlace};
use migd::lab::{Lab, Moved, Spec, own_name, remove_abandoned};
use sys::netns::NetNamespace;

use crate::processes;
use crate::programs::{REDIS, REDIS_PORT};

/// How long a job may take to end.
const ENDING: Duration = Duration::from_secs(40);
/// How long a server may take until it accepts connections.
const SERVING: Duration = Duration::from_secs(20);
const PURPOSE: &str = "test";

/// A lab of two nodes and a client, and a directory for files; both go away with the test, however it ends.
#[derive(Debug)]
pub struct Fixture {
    /// The lab. First, so that it is taken down before the directory goes.
    pub lab: Lab,
    /// A directory that jobs and tests may use.
    pub directory: tempfile::TempDir,
}

impl Fixture {
    /// Brings the lab up.
    ///
    /// # Panics
    /// When that fails, with the reason.
    #[must_use]
    #[allow(clippy::new_without_default)]
    pub fn new() -> Fixture {
        Fixture::with_nodes(2)
    }

    /// As [`Fixture::new`] with so many nodes.
    ///
    /// # Panics
    /// As [`Fixture::new`].
    #[must_use]
    pub fn with_nodes(nodes: usize) -> Fixture {
        Fixture::of(Spec { nodes, ..Spec::new(own_name(PURPOSE)).expect("this program has a path") })
    }

    /// Brings up a lab of another make; the name is given by the fixture.
    ///
    /// # Panics
    /// When that fails, with the reason.
    #[must_use]
    pub fn of(spec: Spec) -> Fixture {
        remove_abandoned(PURPOSE);
        let spec = Spec { binary: binary(), name: own_name(PURPOSE), ..spec };
        let lab = Lab::up(&spec).unwrap_or_else(|error| panic!("no lab: {error:#}"));
        let directory = tempfile::Builder::new().prefix("migd-test-").tempdir().expect("a directory for files");
        // Servers that give up root must be able to read what is in it.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(directory.path(), mode).expect("it is ours");
        Fixture { lab, directory }
    }

    /// A path in the test's directory, as text.
    ///
    /// # Panics
    /// When the directory's name is no text.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().expect("plain names").to_owned()
    }

    /// Starts a job on a node.
    ///
    /// # Panics
    /// When that fails, with the reason.
    #[must_use]
    pub fn run(&self, node: &str, name: &str, argv: &[&str]) -> JobView {
        self.lab.run(node, name, argv).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Starts a server on node A and waits until it accepts connections from the client.
    ///
    /// # Panics
    /// When it does not serve in time; what it wrote is shown.
    #[must_use]
    pub fn serve(&self, name: &str, argv: &[&str], port: u16) -> SocketAddr {
        let job = self.run("A", name, argv);
        let server = SocketAddr::new(IpAddr::V4(job.address), port);
        self.wait_until_it_serves(name, server);
        server
    }

    /// Starts a redis called `redis` on node A, as [`Fixture::serve`].
    ///
    /// # Panics
    /// When it does not serve in time.
    #[must_use]
    pub fn serve_redis(&self) -> SocketAddr {
        self.serve("redis", &REDIS, REDIS_PORT)
    }

    /// Waits until somebody accepts connections from the client at `server`.
    ///
    /// # Panics
    /// When nobody does in time.
    pub fn wait_until_it_serves(&self, name: &str, server: SocketAddr) {
        let deadline = Instant::now() + SERVING;
        loop {
            match self.connect(server) {
                Ok(_) => return,
                Err(error) => {
                    assert!(
                        Instant::now() < deadline,
                        "{name} does not serve {server}: {error}\n{}",
                        self.logs("A", name)
                    );
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A connection of the kernel's from the client.
    ///
    /// # Errors
    /// As connect(2).
    pub fn connect(&self, server: SocketAddr) -> std::io::Result<TcpStream> {
        let stream = self.client().run(|| TcpStream::connect_timeout(&server, Duration::from_secs(3)))?;
        // Far longer than any move takes: who waits so long has lost its connection.
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.set_write_timeout(Some(Duration::from_secs(20)))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Moves a job from one node to the other.
    ///
    /// # Panics
    /// When it does not move, with the reason and the ends of the logs.
    pub fn move_job(&self, name: &str, from: &str, to: &str) -> Moved {
        self.lab.move_job(name, from, to).unwrap_or_else(|error| panic!("{error:#}\n{}", self.state_logs()))
    }

    /// Moves a job from one node to the other and leaves its sockets at home.
    ///
    /// # Panics
    /// As [`Fixture::move_job`].
    pub fn move_process(&self, name: &str, from: &str, to: &str) -> Moved {
        let moved = self.lab.move_job_with(name, from, to, SocketPlace::Home);
        moved.unwrap_or_else(|error| panic!("{error:#}\n{}", self.state_logs()))
    }

    /// Moves a job from A to B and back, `times` times, and calls `check` after each move.
    ///
    /// # Panics
    /// When a move fails or `check` panics.
    pub fn back_and_forth(&self, name: &str, times: usize, mut check: impl FnMut(&Moved)) {
        for _ in 0..times {
            check(&self.move_job(name, "A", "B"));
            check(&self.move_job(name, "B", "A"));
        }
    }

    /// The process ids of the shims on a node.
    ///
    /// # Panics
    /// When /proc can't be read.
    #[must_use]
    pub fn shims(&self, node: &str) -> Vec<u32> {
        let jobs = self.lab.names().state(node).join("jobs");
        let jobs = jobs.to_str().expect("plain names").as_bytes().to_owned();
        processes::with_argument(|argument| argument.starts_with(&jobs))
    }

    /// The client's namespace.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn client(&self) -> NetNamespace {
        self.lab.namespace("client1").expect("the client's namespace")
    }

    /// The client's address.
    ///
    /// # Panics
    /// When the lab has no client.
    #[must_use]
    pub fn client_address(&self) -> Ipv4Addr {
        self.lab.layout().member("client1").expect("the lab has a client").address
    }

    /// Starts a plain process in the client's namespace; it ends with the returned value.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_in_client(&self, argv: &[&str]) -> Process {
        let mut command = Command::new(argv[0]);
        command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.client().run(|| command.spawn());
        Process(Some(child.unwrap_or_else(|error| panic!("{}: {error}", argv[0]))))
    }

    /// The `migd` command for a node.
    #[must_use]
    pub fn migd(&self, node: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.arg("--socket").arg(self.lab.control(node)).args(arguments);
        command
    }

    /// Runs `migd` for a node and returns what it wrote.
    ///
    /// # Panics
    /// When it fails.
    #[must_use]
    pub fn migd_output(&self, node: &str, arguments: &[&str]) -> String {
        let output = self.migd(node, arguments).output().expect("migd starts");
        assert!(output.status.success(), "migd {arguments:?}: {}\n{}", output.status, text(&output.stderr));
        text(&output.stdout)
    }

    /// What a job wrote; empty when that can't be told.
    #[must_use]
    pub fn logs(&self, node: &str, job: &str) -> String {
        match self.migd(node, &["logs", job]).output() {
            Ok(Output { stdout, stderr, .. }) => text(&stdout) + &text(&stderr),
            Err(error) => error.to_string(),
        }
    }

    /// Waits until a job has written something that contains `words`.
    ///
    /// # Panics
    /// When it does not in time.
    pub fn wait_for_log(&self, node: &str, job: &str, words: &str) {
        let deadline = Instant::now() + SERVING;
        loop {
            let logs = self.logs(node, job);
            if logs.contains(words) {
                return;
            }
            assert!(Instant::now() < deadline, "{job} did not write {words:?}: {logs}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until a job has ended, wherever it is, and says how.
    ///
    /// # Panics
    /// When it does not in time.
    #[must_use]
    pub fn wait_for_end(&self, name: &str) -> Exit {
        let deadline = Instant::now() + ENDING;
        loop {
            let jobs = self.lab.jobs("A").unwrap_or_else(|error| panic!("{error:#}"));
            let job = jobs.into_iter().find(|job| job.name == name).unwrap_or_else(|| panic!("{name} is not listed"));
            if let Some(exit) = job.exit {
                return exit;
            }
            assert!(Instant::now() < deadline, "{name} does not end: {job:?}\n{}", self.state_logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The ends of the logs of all daemons and shims, for the message of a failed test.
    #[must_use]
    pub fn state_logs(&self) -> String {
        let mut all = String::new();
        for node in ["A", "B"] {
            let root = self.lab.names().state(node);
            let mut files = vec![root.join("daemon.log")];
            let jobs = std::fs::read_dir(root.join("jobs")).into_iter().flatten().flatten();
            files.extend(jobs.map(|job| job.path().join("shim.log")));
            for file in files {
                let content = std::fs::read_to_string(&file).unwrap_or_default();
                let lines: Vec<_> = content.lines().collect();
                let end = lines[lines.len().saturating_sub(15)..].join("\n  ");
                all += &format!("--- {}\n  {end}\n", file.display());
            }
        }
        all
    }
}

/// A process that ends with this value.
#[derive(Debug)]
pub struct Process(Option<Child>);

impl Process {
    /// Waits for its end and returns what it wrote.
    ///
    /// # Panics
    /// When its output can't be read.
    #[must_use]
    pub fn output(mut self) -> Output {
        let child = self.0.take().expect("it is taken only here");
        child.wait_with_output().expect("its output")
    }

    /// Its number.
    ///
    /// # Panics
    /// Never: it is there until `output` takes it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.0.as_ref().expect("it is taken only by `output`").id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // Both fail only when it ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The `migd` that is tested.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn binary() -> PathBuf {
    let named = std::env::var_os("MIGD_BINARY").map(PathBuf::from);
    let path = named.unwrap_or_else(|| {
        // target/debug/deps/TEST, beside which cargo puts target/debug/migd.
        let test = std::env::current_exe().expect("the path of the test");
        let built = test.parent().and_then(std::path::Path::parent).expect("two directories up");
        built.join("migd")
    });
    assert!(
        path.is_file(),
        "{} is not there; build it (cargo build --bin migd) or name it in MIGD_BINARY",
        path.display()
    );
    path
}

/// Bytes as text, for messages.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
