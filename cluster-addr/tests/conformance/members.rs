//! etcd processes.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a member may take to be ready, or to end. It takes about a second on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The members of one etcd, with their data in a temporary directory. They end with this value.
pub struct Members {
    directory: tempfile::TempDir,
    ports: Vec<(u16, u16)>,
    options: Vec<String>,
    running: Vec<Option<Child>>,
}

impl Members {
    /// Starts so many and waits until they answer.
    pub fn start(count: usize, options: &[&str]) -> Self {
        for _ in 0..10 {
            // Somebody else may take a port between our finding it free and etcd's taking it: then with others.
            let ports = (0..count).map(|_| (free_port(), free_port())).collect();
            let mut members = Self {
                directory: tempfile::tempdir().expect("a temporary directory"),
                ports,
                options: options.iter().map(|&option| option.to_owned()).collect(),
                running: (0..count).map(|_| None).collect(),
            };
            (0..count).for_each(|index| members.spawn(index));
            if members.wait_until_ready() {
                return members;
            }
        }
        panic!("etcd does not start; its logs are in its directory");
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.ports.iter().map(|(client, _)| format!("http://127.0.0.1:{client}")).collect()
    }

    fn log(&self, index: usize) -> PathBuf {
        self.directory.path().join(format!("m{index}.log"))
    }

    fn spawn(&mut self, index: usize) {
        let peer = |index: usize| format!("http://127.0.0.1:{}", self.ports[index].1);
        let client = format!("http://127.0.0.1:{}", self.ports[index].0);
        let cluster: Vec<_> = (0..self.ports.len()).map(|index| format!("m{index}={}", peer(index))).collect();
        let log = std::fs::File::options().create(true).append(true).open(self.log(index)).expect("a log");
        let child = Command::new("etcd")
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .current_dir(self.directory.path())
            .args(["--name", &format!("m{index}"), "--data-dir", &format!("m{index}")])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer(index), "--initial-advertise-peer-urls", &peer(index)])
            .args(["--initial-cluster", &cluster.join(",")])
            // A loaded machine must not look like a dead leader.
            .args(["--heartbeat-interval", "200", "--election-timeout", "2000"])
            .args(&self.options)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .spawn();
        self.running[index] = Some(child.expect("etcd starts: is Debian's etcd-server installed?"));
    }

    /// Whether all of them answer; `false` when one ended instead.
    fn wait_until_ready(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        for index in 0..self.ports.len() {
            if self.running[index].is_none() {
                continue;
            }
            while !self.is_healthy(index) {
                let ended = self.running[index].as_mut().is_none_or(|child| child.try_wait().expect("ours").is_some());
                if ended {
                    return false;
                }
                let log = || std::fs::read_to_string(self.log(index)).unwrap_or_default();
                assert!(Instant::now() < deadline, "etcd is not ready: {}", log());
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        true
    }

    /// Asks `/health`, which answers well only with a leader.
    fn is_healthy(&self, index: usize) -> bool {
        use std::io::{Read, Write};
        let ask = || {
            let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.ports[index].0))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok::<_, std::io::Error>(answer.contains("\"health\":\"true\""))
        };
        ask().unwrap_or(false)
    }

    /// SIGKILL.
    pub fn kill(&mut self, index: usize) {
        if let Some(mut child) = self.running[index].take() {
            child.kill().expect("ours");
            child.wait().expect("ours");
        }
    }

    /// Starts one again that was killed, and waits until all answer.
    pub fn restart(&mut self, index: usize) {
        for _ in 0..10 {
            self.spawn(index);
            if self.wait_until_ready() {
                return;
            }
            // Its port may be an outgoing connection's for a moment.
            std::thread::sleep(Duration::from_millis(200));
        }
        panic!("etcd does not start again: {}", std::fs::read_to_string(self.log(index)).unwrap_or_default());
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        (0..self.running.len()).for_each(|index| self.kill(index));
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("bound").port()
}
