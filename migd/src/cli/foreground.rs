//! `run` and `logs`: the job's output as if the program ran right here, wherever it runs.
//!
//! The stream from the daemon survives moves by itself; when the daemon is stopped and started again it is taken up at the
//! offset reached.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::Target;
use super::arguments::{LogsArgs, RunArgs};
use super::listing::{print, unwritable};
use crate::api::{
    ApiError, AttachEvent, AttachInput, Client, ClientError, Connection, DaemonRequest, ErrorKind, Exit, JobView,
    Output, Receiver, RunRequest, Sender, Stream,
};

/// How long a daemon may be away before it is given up; the job runs on.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between tries to reach it.
const RETRY: Duration = Duration::from_millis(100);
/// Standard input that may be under way to the job.
const WINDOW: u64 = 256 << 10;
/// Standard input is read in pieces of at most this.
const PIECE: usize = 32 << 10;
/// Variables that are for migd itself and not for the job.
const OWN_VARIABLES: [&str; 3] = ["MIGD_SOCKET", "MIGD_LOG", "MIGD_LAB"];

/// `migd run`.
pub async fn run(target: &Target, args: RunArgs) -> anyhow::Result<ExitCode> {
    let (client, node) = target.client_for_run();
    let request = RunRequest {
        name: args.name,
        argv: args.argv,
        env: environment(args.env)?,
        cwd: cwd(args.workdir)?,
        node,
        address: args.address,
    };
    let job: JobView = client.ask(&DaemonRequest::Run(request)).await?;
    if args.detach {
        let unsaid = || format!("job {} ({}) runs in the background, but its id can't be told", job.name, job.id);
        print(&format!("{}\n", job.id)).with_context(unsaid)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut session = Session::new(client, job);
    let exit = session.attend().await?;
    if exit == Exit::Lost {
        eprintln!("migd: job {} was lost: its shim on node {} died", session.job.name, session.node);
    }
    Ok(ExitCode::from(exit.shell_status()))
}

fn environment(extra: Vec<(String, String)>) -> anyhow::Result<Vec<(String, String)>> {
    let mut variables = Vec::new();
    for (key, value) in std::env::vars_os() {
        let text = (key.clone().into_string(), value.into_string());
        let (Ok(key), Ok(value)) = text else {
            let key = key.to_string_lossy();
            anyhow::bail!(
                "the variable {key} of the environment is not UTF-8; unset it for the job: env -u {key} migd run ..."
            );
        };
        if !OWN_VARIABLES.contains(&key.as_str()) && !extra.iter().any(|(other, _)| *other == key) {
            variables.push((key, value));
        }
    }
    variables.extend(extra);
    Ok(variables)
}

fn cwd(workdir: Option<std::path::PathBuf>) -> anyhow::Result<String> {
    let path = match workdir {
        Some(dir) => std::path::absolute(&dir).with_context(|| format!("--workdir {}", dir.display()))?,
        None => std::env::current_dir().context("the present working directory is gone; give --workdir")?,
    };
    path.into_os_string().into_string().map_err(|path| anyhow::anyhow!("the working directory {path:?} is not UTF-8"))
}

/// A job in the foreground.
struct Session {
    client: Client,
    job: JobView,
    /// Where it runs.
    node: String,
    /// Output up to here was printed.
    next: u64,
    input: Input,
    sink: Sink,
}

/// Standard input: what was read and what of it is in safety.
#[derive(Debug, Default)]
struct Input {
    /// Bytes read.
    read: u64,
    /// Bytes that the job's shim has.
    accepted: u64,
    /// What was read and is not in safety, by offset.
    pending: VecDeque<(u64, Vec<u8>)>,
    eof: bool,
}

/// How a connection to the daemon ended.
enum Ending {
    Exited(Exit),
    /// The daemon went away; it may come back.
    Broken(io::Error),
}

impl Session {
    fn new(client: Client, job: JobView) -> Self {
        let node = job.node.clone();
        Self { client, job, node, next: 0, input: Input::default(), sink: Sink::default() }
    }

    async fn attend(&mut self) -> anyhow::Result<Exit> {
        let mut signals = forwarded_signals()?;
        let mut stdin = read_stdin();
        loop {
            let (receiver, sender) = self.connect(&mut signals).await?.split();
            match self.attend_connection(receiver, sender, &mut signals, &mut stdin).await? {
                Ending::Exited(exit) => return Ok(exit),
                Ending::Broken(error) => {
                    eprintln!("migd: the daemon went away ({error}); job {} runs on, waiting for it", self.job.name);
                }
            }
        }
    }

    /// Attaches at the offset reached; waits for a daemon that is being started again.
    async fn connect(&mut self, signals: &mut mpsc::Receiver<i32>) -> anyhow::Result<Connection> {
        let request = DaemonRequest::Attach { job: self.job.id.clone(), from_offset: self.next, input: true };
        // A daemon that is there gets the signals; only one that is away can't.
        match self.client.open::<JobView>(&request).await {
            Ok((_, connection)) => return Ok(connection),
            Err(error @ ClientError::Api(_)) => return Err(error.into()),
            Err(_) => {}
        }
        tokio::select! {
            opened = open_patiently(&self.client, &request) => Ok(opened?),
            Some(signal) = signals.recv() => {
                let name = &self.job.name;
                anyhow::bail!("signal {signal} can't be passed on while the daemon is away; job {name} runs on");
            }
        }
    }

    async fn attend_connection(
        &mut self,
        mut receiver: Receiver,
        mut sender: Sender,
        signals: &mut mpsc::Receiver<i32>,
        stdin: &mut mpsc::Receiver<Option<Vec<u8>>>,
    ) -> anyhow::Result<Ending> {
        // Sending must not hold up receiving: the job may have to be read from before it reads. The window bounds what
        // waits in the channel.
        let (outbox, mut messages) = mpsc::unbounded_channel::<AttachInput>();
        let sending = tokio::spawn(async move {
            while let Some(message) = messages.recv().await {
                // When this fails the receiving side sees the end, too.
                if sender.send(&message).await.is_err() {
                    return;
                }
            }
        });
        let _sending = AbortOnDrop(sending);
        for message in self.input.pending.iter().map(piece).chain(self.input.eof.then_some(AttachInput::StdinEof)) {
            let _ = outbox.send(message);
        }
        loop {
            let may_read = !self.input.eof && self.input.read - self.input.accepted < WINDOW;
            let message = tokio::select! {
                event = receiver.receive::<AttachEvent>() => match event {
                    Ok(Some(event)) => match self.take(event).await? {
                        Taken::Exited(exit) => return Ok(Ending::Exited(exit)),
                        Taken::Reply(message) => Some(message),
                        Taken::Nothing => None,
                    },
                    Ok(None) => return Ok(Ending::Broken(io::ErrorKind::UnexpectedEof.into())),
                    Err(error) => return Ok(Ending::Broken(error)),
                },
                Some(signal) = signals.recv() => Some(AttachInput::Signal { signal }),
                bytes = stdin.recv(), if may_read => Some(self.input.take(bytes.flatten())),
            };
            if let Some(message) = message {
                let _ = outbox.send(message);
            }
        }
    }

    async fn take(&mut self, event: AttachEvent) -> anyhow::Result<Taken> {
        match event {
            AttachEvent::Output(output) => {
                self.next = output.offset + output.bytes.len() as u64;
                // A reader of the output that is gone ends the program the way it would without migd.
                let unsaid = |error: io::Error| {
                    let name = &self.job.name;
                    ApiError::new(ErrorKind::Internal, format!("the output of job {name} can't be passed on: {error}"))
                        .hint(format!(
                            "the job runs on: `migd logs {name}` shows its output, `migd kill {name}` ends it"
                        ))
                };
                let gone = self.sink.write(&output).map_err(unsaid)?;
                Ok(if gone { Taken::Reply(AttachInput::Signal { signal: nix::libc::SIGPIPE }) } else { Taken::Nothing })
            }
            AttachEvent::Accepted { bytes } => {
                self.input.accept(bytes);
                Ok(Taken::Nothing)
            }
            AttachEvent::Moved { node } => {
                self.node = node;
                Ok(Taken::Nothing)
            }
            AttachEvent::Exited(exit) => Ok(Taken::Exited(exit)),
            AttachEvent::Failed(error) => Err(ClientError::from(error).into()),
            AttachEvent::CaughtUp => Ok(Taken::Nothing),
        }
    }
}

/// Ends a task with its scope.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

enum Taken {
    Nothing,
    Reply(AttachInput),
    Exited(Exit),
}

fn piece((offset, bytes): &(u64, Vec<u8>)) -> AttachInput {
    AttachInput::Stdin { offset: *offset, bytes: bytes.clone() }
}

impl Input {
    /// Notes what was read; nothing is the end.
    fn take(&mut self, bytes: Option<Vec<u8>>) -> AttachInput {
        let Some(bytes) = bytes else {
            self.eof = true;
            return AttachInput::StdinEof;
        };
        let entry = (self.read, bytes);
        self.read += entry.1.len() as u64;
        let message = piece(&entry);
        self.pending.push_back(entry);
        message
    }

    fn accept(&mut self, bytes: u64) {
        self.accepted = bytes.clamp(self.accepted, self.read);
        let accepted = self.accepted;
        self.pending.retain(|(offset, bytes)| offset + bytes.len() as u64 > accepted);
    }
}

/// Signals that are passed on to the job: those that a terminal or a supervisor sends to end or reload a program.
fn forwarded_signals() -> anyhow::Result<mpsc::Receiver<i32>> {
    let (sender, receiver) = mpsc::channel(16);
    let kinds = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
    ];
    for kind in kinds {
        let mut stream = signal(kind)?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                if sender.send(kind.as_raw_value()).await.is_err() {
                    return;
                }
            }
        });
    }
    Ok(receiver)
}

/// Reads standard input in a thread of its own (a read can't be interrupted, and must not hold up the end of the
/// process). `None` is its end.
fn read_stdin() -> mpsc::Receiver<Option<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        loop {
            let piece = match io::stdin().lock().read(&mut buffer) {
                Ok(0) | Err(_) => None,
                Ok(count) => Some(buffer[..count].to_vec()),
            };
            let last = piece.is_none();
            if sender.blocking_send(piece).is_err() || last {
                return;
            }
        }
    });
    receiver
}

/// Where output goes.
#[derive(Debug, Default)]
struct Sink {
    out_gone: bool,
    err_gone: bool,
}

impl Sink {
    /// Passes output on; `true` when its reader turned out to be gone just now.
    fn write(&mut self, output: &Output) -> io::Result<bool> {
        let (gone, result) = match output.stream {
            Stream::Out if self.out_gone => return Ok(false),
            Stream::Err if self.err_gone => return Ok(false),
            Stream::Out => (&mut self.out_gone, write_flush(&mut io::stdout().lock(), &output.bytes)),
            Stream::Err => (&mut self.err_gone, write_flush(&mut io::stderr().lock(), &output.bytes)),
        };
        match result {
            Ok(()) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                *gone = true;
                Ok(true)
            }
            Err(error) => {
                let what = if output.stream == Stream::Out { "standard output" } else { "standard error" };
                Err(unwritable(what, &error))
            }
        }
    }
}

fn write_flush(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    out.flush()
}

/// `migd logs`.
pub async fn logs(target: &Target, args: LogsArgs) -> anyhow::Result<ExitCode> {
    let client = target.client()?;
    let LogsArgs { follow, tail, job } = args;
    let (job, mut connection) = client.open::<JobView>(&DaemonRequest::Logs { job, follow, tail }).await?;
    let mut sink = Sink::default();
    let mut next = 0;
    loop {
        match connection.receive::<AttachEvent>().await {
            Ok(Some(AttachEvent::Output(output))) => {
                next = output.offset + output.bytes.len() as u64;
                if sink.write(&output)? {
                    return Ok(ExitCode::SUCCESS);
                }
            }
            Ok(Some(AttachEvent::Accepted { .. } | AttachEvent::Moved { .. })) => {}
            Ok(Some(AttachEvent::CaughtUp | AttachEvent::Exited(_))) => return Ok(ExitCode::SUCCESS),
            Ok(Some(AttachEvent::Failed(error))) => return Err(ClientError::from(error).into()),
            Ok(None) if follow => {
                eprintln!("migd: the daemon went away; waiting for it");
                let again = DaemonRequest::Attach { job: job.id.clone(), from_offset: next, input: false };
                connection = open_patiently(&client, &again).await?;
            }
            Ok(None) => return Err(client.broken(io::ErrorKind::UnexpectedEof.into()).into()),
            Err(error) => return Err(client.broken(error).into()),
        }
    }
}

/// Opens a stream at a daemon that may be just being started again.
pub(super) async fn open_patiently(client: &Client, request: &DaemonRequest) -> Result<Connection, ClientError> {
    let began = Instant::now();
    loop {
        match client.open::<JobView>(request).await {
            Ok((_, connection)) => return Ok(connection),
            Err(error @ ClientError::Api(_)) => return Err(error),
            Err(error) if began.elapsed() > PATIENCE => return Err(error),
            Err(_) => tokio::time::sleep(RETRY).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_is_kept_until_it_is_in_safety() {
        let mut input = Input::default();
        input.take(Some(b"abc".to_vec()));
        let message = input.take(Some(b"de".to_vec()));
        assert_eq!(message, AttachInput::Stdin { offset: 3, bytes: b"de".to_vec() });
        input.accept(3);
        assert_eq!(input.pending, [(3, b"de".to_vec())]);
        input.accept(1);
        assert_eq!(input.accepted, 3, "never goes back");
        input.accept(99);
        assert_eq!(input.accepted, 5, "never beyond what was read");
        assert!(input.pending.is_empty());
        assert_eq!(input.take(None), AttachInput::StdinEof);
        assert!(input.eof);
    }
}
