//! Programs, stopped processes and directories for the tests. All of them end with their values.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use checkpoint::descriptors::image::{Kind, OpenFile, TreeDescriptors};
use checkpoint::descriptors::{self, Job, Process, Restorer, Tapes};
use checkpoint::{External, ExternalKey, Layout, StayReason};
use sys::Pid;
use sys::ptrace::{Seized, Stopped};
use sys::tape::{Region, Results, Tape};

/// A directory that goes away.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("migd-test-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a new directory");
        Directory(path)
    }

    pub fn path(&self) -> &str {
        self.0.to_str().expect("ASCII")
    }

    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).expect("it is there");
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("ASCII")).collect()
    }

    pub fn await_file(&self, name: &str, patience: Duration) -> String {
        let begin = Instant::now();
        loop {
            match std::fs::read_to_string(self.0.join(name)) {
                Ok(text) => return text,
                Err(_) if begin.elapsed() < patience => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A program that runs until it is dropped.
pub struct Program {
    child: Child,
    first_line: String,
}

impl Program {
    pub fn start(script: &str, arguments: &[&str]) -> Program {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/descriptors").join(script);
        let mut command = Command::new("python3");
        command.arg("-S").arg(script).args(arguments).stdin(Stdio::null()).stderr(Stdio::null());
        Program::run(command)
    }

    /// One in a network namespace of its own, as a target has it: names of sockets are free there.
    pub fn start_elsewhere(script: &str, arguments: &[&str]) -> Program {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/descriptors").join(script);
        let mut command = Command::new("unshare");
        command.args(["--net", "python3", "-S"]).arg(script).args(arguments);
        command.stdin(Stdio::null()).stderr(Stdio::null());
        Program::run(command)
    }

    /// A sleeper in a network namespace of its own, with this as its standard input.
    pub fn sleeper_elsewhere(input: OwnedFd) -> Program {
        let mut command = Command::new("unshare");
        let script = "import os, time\nos.closerange(3, 1024)\nprint('ready', flush=True)\nwhile True: time.sleep(600)";
        command.args(["--net", "python3", "-S", "-c", script]).stdin(input).stderr(Stdio::null());
        Program::run(command)
    }

    /// One whose descriptors don't matter.
    pub fn sleeper() -> Program {
        let mut command = Command::new("python3");
        command.args([
            "-S",
            "-c",
            "import os, time\nos.closerange(3, 1024)\nprint('ready', flush=True)\nwhile True: time.sleep(600)",
        ]);
        command.stdin(Stdio::null()).stderr(Stdio::null());
        Program::run(command)
    }

    fn run(mut command: Command) -> Program {
        // Its output must not end in the image: a pipe to us would be one that leads out of the job.
        let (read, write) = io::pipe().expect("a pipe");
        let mut child = command.stdout(write).spawn().expect("python3 runs");
        drop(command);
        let mut first_line = String::new();
        let length = BufReader::new(read).read_line(&mut first_line).expect("it says that it is ready");
        if length == 0 {
            let _ = child.kill();
            panic!("the program ended: {:?}", child.wait());
        }
        Program { child, first_line }
    }

    pub fn start_with_child(script: &str, argument: &str) -> (Program, Pid) {
        let program = Program::start(script, &[argument]);
        let child = program.first_line.split_whitespace().nth(1).and_then(|word| word.parse().ok());
        let child = Pid::from_raw(child.expect("the child's number"));
        (program, child)
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a number"))
    }

    pub fn signal(&self, signal: i32) {
        let kill = Command::new("kill").arg(format!("-{signal}")).arg(self.pid().to_string()).status();
        assert!(kill.expect("kill runs").success());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Processes as a job, stopped or not.
pub struct Tree {
    processes: Vec<Process>,
    stopped: HashMap<u32, (Stopped, Region)>,
}

impl Tree {
    pub fn without_stopping(pids: &[Pid]) -> Tree {
        let processes = pids.iter().zip(2..).map(|(&pid, process)| Process { process, pid }).collect();
        Tree { processes, stopped: HashMap::new() }
    }

    pub fn stop(programs: &[&Program]) -> Tree {
        Tree::stop_pids(&programs.iter().map(|program| program.pid()).collect::<Vec<_>>())
    }

    pub fn stop_pids(pids: &[Pid]) -> Tree {
        let mut tree = Tree::without_stopping(pids);
        for &Process { process, pid } in &tree.processes {
            let seized = Seized::new(pid).expect("it can be traced");
            seized.interrupt().expect("it can be stopped");
            let stopped = seized.wait_stop(Duration::from_secs(10)).expect("it stops");
            let mut stopped = stopped.expect("it is alive");
            let region = Region::install(&mut stopped, 0x10_0000, true).expect("there is room");
            tree.stopped.insert(process, (stopped, region));
        }
        tree
    }

    fn job(&self) -> Job<'_> {
        // A process of the job is in its namespaces as much as its init.
        Job { init: self.processes[0].pid, processes: &self.processes }
    }

    pub fn stay_reasons(&self, external: &dyn External) -> Vec<StayReason> {
        descriptors::stay_reasons(&self.job(), external).expect("they can be found")
    }

    pub fn dump(&mut self, external: &dyn External) -> checkpoint::Result<TreeDescriptors> {
        let processes = self.processes.clone();
        let job = Job { init: processes[0].pid, processes: &processes };
        // The programs' output, a pipe to the test that it has closed by now, is a pipe without a reader.
        descriptors::dump(&job, external, &Layout::default(), &mut [], self)
    }

    pub fn restore(
        &mut self,
        image: TreeDescriptors,
        externals: &mut dyn FnMut(ExternalKey) -> io::Result<OwnedFd>,
    ) -> Restorer {
        let mut restorer = Restorer::new(image, &self.job()).expect("the image is sound");
        restorer.place(self, externals, &mut |_, _| None).expect("it can be restored");
        restorer
    }

    pub fn finish(&mut self, restorer: &mut Restorer) {
        restorer.finish(self).expect("it can be finished");
    }

    /// Lets them run on.
    pub fn release(&mut self) {
        for (_, (mut stopped, region)) in self.stopped.drain() {
            region.remove(&mut stopped).expect("the region goes away");
            stopped.release().expect("it runs on");
        }
    }

    pub fn kill(&mut self) {
        for (_, (stopped, _)) in self.stopped.drain() {
            let pid = stopped.thread();
            let _ = Command::new("kill").arg("-9").arg(pid.to_string()).status();
            drop(stopped);
            let begin = Instant::now();
            while std::fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|entries| entries.count() > 0) {
                assert!(begin.elapsed() < Duration::from_secs(10), "process {pid} doesn't end");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

impl Tapes for Tree {
    fn run(&mut self, process: u32, tape: &Tape) -> io::Result<Results> {
        let (stopped, region) = self.stopped.get_mut(&process).expect("a process of the tree");
        Ok(tape.run(stopped, *region)?)
    }

    fn import(&mut self, _: u32, _: BorrowedFd<'_>) -> io::Result<RawFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Two images say the same, but for the numbers that a kernel gives.
pub fn assert_alike(one: &TreeDescriptors, other: &TreeDescriptors) {
    let slots = |image: &TreeDescriptors| image.tables.iter().map(|table| table.slots.clone()).collect::<Vec<_>>();
    assert_eq!(slots(one), slots(other));
    assert_eq!(one.files.len(), other.files.len());
    for (index, (one, other)) in one.files.iter().zip(&other.files).enumerate() {
        assert_eq!(plain_file(one), plain_file(other), "open file {index}");
    }
    let pipes = |image: &TreeDescriptors| {
        let pipes = image.pipes.iter().cloned();
        pipes.map(|pipe| checkpoint::descriptors::image::PipeImage { inode: 0, ..pipe }).collect::<Vec<_>>()
    };
    assert_eq!(pipes(one), pipes(other));
    let sockets = |image: &TreeDescriptors| {
        let sockets = image.sockets.iter().cloned();
        let plain = |mut socket: checkpoint::descriptors::image::UnixImage| {
            socket.inode = 0;
            // The process that connected is the test now.
            socket.peer_credentials = socket.peer_credentials.map(|(uid, gid, _)| (uid, gid, None));
            // A stream's data may come in other pieces.
            if socket.kind == sys::libc::SOCK_STREAM && !socket.queue.is_empty() {
                let data: Vec<u8> = socket.queue.iter().flat_map(|message| message.data.to_vec()).collect();
                socket.queue.truncate(1);
                socket.queue[0].data = data.into();
            }
            socket
        };
        sockets.map(plain).collect::<Vec<_>>()
    };
    assert_eq!(sockets(one), sockets(other));
    assert_eq!(one.process_locks, other.process_locks);
    for (one, other) in one.contents.iter().zip(&other.contents) {
        assert_eq!((one.size, &one.data, one.seals, one.mode), (other.size, &other.data, other.seals, other.mode));
    }
}

fn plain_file(file: &OpenFile) -> OpenFile {
    let mut file = file.clone();
    // The kernel adds it to whatever a 64-bit process opens by itself.
    file.flags &= !sys::libc::O_LARGEFILE & !0o100_000;
    match &mut file.kind {
        Kind::External(ExternalKey::Socket(key)) => *key = 0,
        Kind::Timer(timer) => timer.left_ns = 0,
        Kind::Epoll { watches } => watches.sort_by_key(|watch| (watch.number, watch.file)),
        _ => {}
    }
    file
}
