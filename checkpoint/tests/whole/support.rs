//! What the trials share.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use checkpoint::{
    ClockOffsets, Event, External, ExternalKey, FdKind, Launch, Layout, MemoryChunk, MemorySink, Sandbox, SandboxSpec,
    Source, Target,
};

/// The result of a trial.
pub type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Turns a trial's result into what the runner wants.
pub fn trial(name: &str, run: fn() -> Outcome) -> libtest_mimic::Trial {
    libtest_mimic::Trial::test(name, move || run().map_err(|error| error.to_string().into()))
}

/// Fails a trial unless a condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+).into());
        }
    };
}

/// Counts lines in a program of several threads.
pub const COUNTER: &str = "
import threading, time, sys, os
lock = threading.Lock()
count = 0
def work():
    global count
    while True:
        with lock:
            count += 1
        time.sleep(0.001)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
last = 0
line = 0
while True:
    time.sleep(0.02)
    with lock:
        now = count
    assert now >= last
    line += 1
    print(line, now - last, threading.active_count(), os.getpid(), flush=True)
    last = now
";

/// A command whose output goes to the returned pipe.
pub fn command(argv: &[&str]) -> io::Result<(Launch, File)> {
    let (reader, writer) = io::pipe()?;
    let error = OwnedFd::from(writer.try_clone()?);
    let spec = Launch {
        argv: argv.iter().map(Into::into).collect(),
        env: vec![
            ("PATH".into(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()),
            ("HOME".into(), "/root".into()),
        ],
        cwd: "/".into(),
        stdio: [File::open("/dev/null")?.into(), writer.into(), error],
    };
    Ok((spec, File::from(OwnedFd::from(reader))))
}

/// Waits for an event that is wanted; others are passed over.
pub fn wait_event(sandbox: &mut Sandbox, wanted: impl Fn(&Event) -> bool) -> Result<Event, String> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        match sandbox.next_event().map_err(|error| error.to_string())? {
            Some(event) if wanted(&event) => return Ok(event),
            Some(_) => {}
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    Err("the event didn't come".into())
}

/// All output until everybody who could write has gone.
pub fn read_all(mut output: File) -> io::Result<String> {
    let mut text = String::new();
    output.read_to_string(&mut text)?;
    Ok(text)
}

/// How to copy memory ahead of the freeze.
#[derive(Clone, Copy, Debug)]
pub enum Precopy {
    /// Everything in the freeze.
    None,
    /// So many rounds while the job runs.
    Rounds(u32),
}

/// A job that can be moved from sandbox to sandbox.
pub struct Job {
    pub sandbox: Sandbox,
    pub output: BufReader<File>,
    pub input: File,
    streams: Streams,
}

/// Our ends of the job's standard streams, with which they are known and made again.
struct Streams {
    input: File,
    output: File,
}

impl External for Streams {
    fn key(&self, kind: FdKind, inode: u64) -> Option<ExternalKey> {
        let is = |file: &File| kind == FdKind::Pipe && file.metadata().is_ok_and(|metadata| metadata.ino() == inode);
        if is(&self.input) {
            return Some(ExternalKey::Stdio(0));
        }
        if is(&self.output) {
            return Some(ExternalKey::Stdio(1));
        }
        None
    }
}

impl Streams {
    fn open(&self, key: ExternalKey) -> io::Result<OwnedFd> {
        match key {
            ExternalKey::Stdio(0) => self.input.try_clone().map(OwnedFd::from),
            ExternalKey::Stdio(_) => self.output.try_clone().map(OwnedFd::from),
            ExternalKey::Socket(_) => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// Hands what a source sends straight to a target.
struct Wire<'a>(&'a mut Target);

impl MemorySink for Wire<'_> {
    fn layout(&mut self, layout: Layout) -> io::Result<()> {
        self.0.layout(layout).map_err(io::Error::other)
    }

    fn pages(&mut self, chunk: MemoryChunk<'_>) -> io::Result<()> {
        self.0.pages(chunk.process, chunk.address, chunk.data).map_err(io::Error::other)
    }
}

/// Where on its way a hop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A round of pre-copy is done.
    Round,
    /// The job stands still.
    Frozen,
}

/// How long a hop stopped the job.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code, reason = "it is printed")]
pub struct Hop {
    pub freeze: Duration,
    pub dump: Duration,
    pub restore: Duration,
    pub run: Duration,
}

impl Job {
    pub fn start(argv: &[&str]) -> Result<Job, Box<dyn std::error::Error>> {
        let mut sandbox =
            Sandbox::create(SandboxSpec { clock_offsets: Some(ClockOffsets::default()), ..Default::default() })?;
        let (mut command, output) = command(argv)?;
        let (reader, input) = io::pipe()?;
        let reader = OwnedFd::from(reader);
        let streams =
            Streams { input: File::from(reader.try_clone()?), output: File::from(command.stdio[1].try_clone()?) };
        command.stdio[0] = reader;
        sandbox.spawn(command)?;
        Ok(Job { sandbox, output: BufReader::new(output), input: File::from(OwnedFd::from(input)), streams })
    }

    /// The next line of the job's output.
    pub fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    /// Sends the job a line.
    pub fn say(&mut self, line: &str) -> io::Result<()> {
        self.input.write_all(format!("{line}\n").as_bytes())
    }

    /// What keeps it here.
    pub fn reasons(&self) -> Result<Vec<checkpoint::StayReason>, Box<dyn std::error::Error>> {
        Ok(Source::attach(&self.sandbox)?.stay_reasons(&self.streams)?)
    }

    /// Everything up to the commit, and then the source goes on after all.
    pub fn hop_in_vain(&mut self, precopy: Precopy) -> Result<(), Box<dyn std::error::Error>> {
        let mut source = Source::attach(&self.sandbox)?;
        let offer = source.offer()?;
        let mut next =
            Sandbox::create(SandboxSpec { clock_offsets: Some(ClockOffsets::default()), ..Default::default() })?;
        let mut target = Target::create(&mut next, &offer)?;
        if let Precopy::Rounds(rounds) = precopy {
            for _ in 0..rounds {
                source.copy_round(&mut Wire(&mut target))?;
            }
        }
        source.freeze()?;
        let memory = source.dump_memory(&mut Wire(&mut target))?;
        let image = source.dump_rest(&self.streams, memory)?;
        let streams = &self.streams;
        target.restore(image, &mut |key| streams.open(key))?;
        drop(target);
        source.resume()?;
        Ok(())
    }

    /// Moves the job into a new sandbox; the old one is gone afterwards.
    pub fn hop(&mut self, precopy: Precopy) -> Result<Hop, Box<dyn std::error::Error>> {
        self.hop_while(precopy, |_, _| Ok(()))
    }

    /// The same, with something that happens on the way, after each round and when all stands still.
    pub fn hop_while(
        &mut self,
        precopy: Precopy,
        mut happens: impl FnMut(Moment, &Sandbox) -> Outcome,
    ) -> Result<Hop, Box<dyn std::error::Error>> {
        let reasons = self.reasons()?;
        let mut source = Source::attach(&self.sandbox)?;
        if !reasons.is_empty() {
            return Err(checkpoint::Error::Stays(reasons).into());
        }
        let offer = source.offer()?;
        let spec = SandboxSpec { clock_offsets: Some(ClockOffsets::continuing(offer.clocks)), ..Default::default() };
        let mut next = Sandbox::create(spec)?;
        let mut target = Target::create(&mut next, &offer)?;
        if let Precopy::Rounds(rounds) = precopy {
            for _ in 0..rounds {
                source.copy_round(&mut Wire(&mut target))?;
                happens(Moment::Round, &self.sandbox)?;
            }
        }
        let start = Instant::now();
        source.freeze()?;
        let freeze = start.elapsed();
        happens(Moment::Frozen, &self.sandbox)?;
        let memory = source.dump_memory(&mut Wire(&mut target))?;
        let image = source.dump_rest(&self.streams, memory)?;
        let dump = start.elapsed() - freeze;
        let streams = &self.streams;
        target.restore(image, &mut |key| streams.open(key))?;
        let restore = start.elapsed() - freeze - dump;
        // The source hears that the job runs elsewhere only when it does.
        target.run()?;
        let run = start.elapsed() - freeze - dump - restore;
        source.discard();
        self.sandbox = next;
        Ok(Hop { freeze, dump, restore, run })
    }
}
