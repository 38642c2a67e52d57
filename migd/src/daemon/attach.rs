//! Output and input of a job, wherever it is and while it moves.
//!
//! Three layers with the same interface, [`Attachment`]: [`local`] (a job of this node: its shim, or its log when it
//! ended), [`at`] (a job of any node, until it moves) and [`following`] (a job, until it ends).
//!
//! Output and input never wait for each other, on no layer: a job may write only when it was read from and read only when it
//! was written to. Output is held back by its reader; of input there is never more under way than the sender's window, so it is
//! passed on through channels without a bound of their own.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use cluster_addr::JobId;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::jobs::{LocalJob, Phase};
use super::locate;
use super::node::Node;
use super::peer::protocol::{self, PeerRequest};
use crate::api::{ApiError, AttachEvent, AttachInput, Connection, ErrorKind, Output, Reply, ShimRequest};
use crate::shim::output::Reader;

/// Events under way; few, so that a reader that pauses makes the writer pause.
const QUEUE: usize = 16;
/// How long a job may be nowhere to be found (its node's daemon restarts) before its followers give up.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the supervisor may take to say what became of a shim that closed a connection.
const VERDICT: Duration = Duration::from_secs(10);
/// How long the end of a job is held back until its name and addresses are free, so that the next one can have them at once.
const GIVING_BACK: Duration = Duration::from_secs(2);
/// Pause before looking for a job again.
const RETRY: Duration = Duration::from_millis(50);

/// A running conversation with a job. Ends when `events` ends; dropping it detaches.
#[derive(Debug)]
pub struct Attachment {
    /// What the job writes, and how it ends.
    pub events: mpsc::Receiver<AttachEvent>,
    /// Input for the job.
    pub input: mpsc::UnboundedSender<AttachInput>,
}

/// The other side of an [`Attachment`].
struct Pump {
    events: mpsc::Sender<AttachEvent>,
    input: mpsc::UnboundedReceiver<AttachInput>,
}

impl Attachment {
    fn new() -> (Attachment, Pump) {
        let (events, events_receiver) = mpsc::channel(QUEUE);
        let (input, input_receiver) = mpsc::unbounded_channel();
        (Attachment { events: events_receiver, input }, Pump { events, input: input_receiver })
    }
}

/// What to attach to.
#[derive(Debug, Clone)]
pub struct Request {
    /// Full id.
    pub id: String,
    /// Where in the output to begin.
    pub from_offset: u64,
    /// Whether to go on after what there is now.
    pub follow: bool,
    /// Whether input will come.
    pub input: bool,
}

/// Attaches to a job of this node until it ends or moves.
pub fn local(job: Arc<LocalJob>, request: Request) -> Attachment {
    let (attachment, mut pump) = Attachment::new();
    tokio::spawn(async move {
        let mut next = request.from_offset;
        if !matches!(job.standing().phase, Phase::Ended(_)) && from_shim(&job, &request, &mut next, &mut pump).await {
            return;
        }
        // The shim said nothing final: its end is found out by the supervisor.
        let over = |phase: &Phase| matches!(phase, Phase::Ended(_) | Phase::MovedAway { .. } | Phase::Failed(_));
        let last = match job.wait(VERDICT, over).await.map(|standing| standing.phase) {
            Some(Phase::Ended(ended)) => {
                from_log(&job, &mut next, &pump).await;
                job.wait_given_back(GIVING_BACK).await;
                AttachEvent::Exited(ended.exit)
            }
            Some(Phase::MovedAway { to }) => AttachEvent::Moved { node: to },
            Some(Phase::Failed(error)) => AttachEvent::Failed(error),
            _ => AttachEvent::Failed(ApiError::new(
                ErrorKind::Unavailable,
                format!("the shim of job {} closed the connection", job.label()),
            )),
        };
        // A receiver that is gone has no interest in the end either.
        let _ = pump.events.send(last).await;
    });
    attachment
}

/// Passes events and input between a shim and the pump; whether the stream came to a final event (or nobody listens).
async fn from_shim(job: &LocalJob, request: &Request, next: &mut u64, pump: &mut Pump) -> bool {
    let Request { from_offset, follow, input, .. } = *request;
    let Ok(mut connection) = Connection::connect(&job.paths.socket()).await else { return false };
    if connection.send(&ShimRequest::Attach { from_offset, follow, input }).await.is_err() {
        return false;
    }
    match connection.receive::<Reply<()>>().await {
        Ok(Some(Reply::Ok(()))) => {}
        Ok(Some(Reply::Error(error))) => {
            let _ = pump.events.send(AttachEvent::Failed(error)).await;
            return true;
        }
        Ok(None) | Err(_) => return false,
    }
    let (mut receiver, mut sender) = connection.split();
    let output = async {
        loop {
            let event = tokio::select! {
                event = receiver.receive::<AttachEvent>() => event,
                () = pump.events.closed() => return true,
            };
            let Ok(Some(event)) = event else { return false };
            if let AttachEvent::Output(output) = &event {
                *next = output.offset + output.bytes.len() as u64;
            }
            let last = is_final(&event);
            if matches!(event, AttachEvent::Exited(_)) {
                job.wait_given_back(GIVING_BACK).await;
            }
            if pump.events.send(event).await.is_err() || last {
                return true;
            }
        }
    };
    let input = async {
        while let Some(message) = pump.input.recv().await {
            if sender.send(&message).await.is_err() {
                break;
            }
        }
        // The end is the output's to tell.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = output => ended,
        () = input => false,
    }
}

async fn from_log(job: &LocalJob, next: &mut u64, pump: &Pump) {
    let mut reader = Reader::new(&job.paths.output(), *next);
    loop {
        match reader.next_frame() {
            Ok(Some(frame)) => {
                *next = frame.offset + frame.bytes.len() as u64;
                let output = Output { stream: frame.stream, offset: frame.offset, bytes: frame.bytes };
                if pump.events.send(AttachEvent::Output(output)).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(job = job.label(), %error, "can't read the job's output");
                return;
            }
        }
    }
}

/// Whether nothing can follow an event of a stream that is not [`following`].
pub fn is_final(event: &AttachEvent) -> bool {
    match event {
        AttachEvent::Output(_) | AttachEvent::Accepted { .. } => false,
        AttachEvent::CaughtUp | AttachEvent::Exited(_) | AttachEvent::Moved { .. } | AttachEvent::Failed(_) => true,
    }
}

/// Attaches to a job on the node named until it ends or moves.
///
/// # Errors
/// When that node does not answer or does not know the job.
async fn at(node: &Arc<Node>, place: &str, request: Request) -> Result<Attachment, ApiError> {
    if place == node.name {
        let job = node.jobs.get(&request.id);
        let job = job.ok_or_else(|| locate::not_found(&request.id))?;
        return Ok(local(job, request));
    }
    let target = node.find_node(place).await?;
    let mut connection = node.peers.connect(target.peer).await?;
    let Request { id, from_offset, follow, input } = request;
    let ask = PeerRequest::Attach { id, from_offset, follow, input };
    let broken = |error: std::io::Error| {
        ApiError::new(ErrorKind::Unavailable, format!("the connection to node {place} broke: {error}"))
    };
    Result::from(connection.exchange::<Reply<()>>(&ask).await.map_err(broken)?)?;
    let (attachment, mut pump) = Attachment::new();
    let (mut read_half, mut write_half) = connection.stream.into_split();
    let events = pump.events.clone();
    let reader = tokio::spawn(async move {
        while let Ok(Some(event)) = protocol::read::<AttachEvent>(&mut read_half).await {
            let last = is_final(&event);
            if events.send(event).await.is_err() || last {
                return;
            }
        }
        let lost = ApiError::new(ErrorKind::Unavailable, "the connection to the job's node broke");
        let _ = events.send(AttachEvent::Failed(lost)).await;
    });
    tokio::spawn(async move {
        loop {
            let message = tokio::select! {
                message = pump.input.recv() => message,
                () = pump.events.closed() => None,
            };
            let Some(message) = message else { break };
            if protocol::write(&mut write_half, &message).await.is_err() {
                break;
            }
        }
        // Input may end long before the output does; but when nobody reads any more the connection is to end.
        pump.events.closed().await;
        reader.abort();
    });
    Ok(attachment)
}

/// Serves an attachment to another daemon over its connection.
pub async fn serve_peer(stream: tokio::net::TcpStream, mut attachment: Attachment) -> std::io::Result<()> {
    let (mut read_half, mut write_half) = stream.into_split();
    let input = attachment.input.clone();
    let reader = tokio::spawn(async move {
        while let Ok(Some(message)) = protocol::read::<AttachInput>(&mut read_half).await {
            // After the end of the job there is nobody to take input; the connection still shows when the other side goes.
            let _ = input.send(message);
        }
    });
    let mut reader = reader;
    let result = loop {
        tokio::select! {
            event = attachment.events.recv() => {
                let Some(event) = event else { break Ok(()) };
                if let Err(error) = protocol::write(&mut write_half, &event).await {
                    break Err(error);
                }
            }
            _ = &mut reader => return Ok(()),
        }
    };
    reader.abort();
    result
}

/// Attaches to a job until it ends, going after it wherever it moves. [`AttachEvent::Moved`] is a notice here.
pub fn following(node: Arc<Node>, place: String, request: Request) -> Attachment {
    let (attachment, pump) = Attachment::new();
    tokio::spawn(async move {
        let follower = Follower {
            node,
            place,
            request,
            pump,
            pending: VecDeque::new(),
            accepted: 0,
            eof: false,
            lost_since: None,
        };
        follower.run().await;
    });
    attachment
}

struct Follower {
    node: Arc<Node>,
    place: String,
    /// Its offset advances with what was passed on.
    request: Request,
    pump: Pump,
    /// Input that no shim has accepted yet; sent again to the next one.
    pending: VecDeque<(u64, Vec<u8>)>,
    accepted: u64,
    eof: bool,
    /// Since when the job can't be reached.
    lost_since: Option<Instant>,
}

/// How one attachment of a [`Follower`] ended.
enum Ending {
    /// Go on at this node.
    Moved(String),
    /// Look for the job.
    Lost(ApiError),
    /// Done, or nobody listens.
    Over,
}

impl Follower {
    async fn run(mut self) {
        loop {
            let ending = match at(&self.node, &self.place, self.request.clone()).await {
                Ok(attachment) => self.pass(attachment).await,
                Err(error) => Ending::Lost(error),
            };
            match ending {
                Ending::Over => return,
                Ending::Moved(to) => {
                    self.place.clone_from(&to);
                    if self.pump.events.send(AttachEvent::Moved { node: to }).await.is_err() {
                        return;
                    }
                }
                Ending::Lost(error) => {
                    let since = *self.lost_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > PATIENCE {
                        let _ = self.pump.events.send(AttachEvent::Failed(error)).await;
                        return;
                    }
                    tracing::debug!(job = self.request.id, %error, "lost sight, looking again");
                    tokio::select! {
                        () = tokio::time::sleep(RETRY) => {}
                        () = self.pump.events.closed() => return,
                    }
                    if let Some(place) = locate::current_node(&self.node, &self.request.id).await {
                        self.place = place;
                    }
                }
            }
        }
    }

    /// Passes events and input on for as long as the job stays where it is.
    async fn pass(&mut self, mut attachment: Attachment) -> Ending {
        let gone = || Ending::Lost(ApiError::new(ErrorKind::Unavailable, "the job's node closed the connection"));
        for (offset, bytes) in &self.pending {
            let again = AttachInput::Stdin { offset: *offset, bytes: bytes.clone() };
            if attachment.input.send(again).is_err() {
                return gone();
            }
        }
        if self.eof && attachment.input.send(AttachInput::StdinEof).is_err() {
            return gone();
        }
        let mut input_open = true;
        loop {
            tokio::select! {
                event = attachment.events.recv() => match event {
                    None => return gone(),
                    Some(AttachEvent::Moved { node }) => return Ending::Moved(node),
                    Some(AttachEvent::Failed(error)) if error.kind == ErrorKind::Unavailable => return Ending::Lost(error),
                    Some(event) => {
                        self.lost_since = None;
                        let Some(event) = self.note(event) else { continue };
                        let last = is_final(&event);
                        if self.pump.events.send(event).await.is_err() || last {
                            return Ending::Over;
                        }
                    }
                },
                message = self.pump.input.recv(), if input_open => match message {
                    None => input_open = false,
                    Some(message) => self.pass_input(message, &attachment),
                },
                () = self.pump.events.closed() => return Ending::Over,
            }
        }
    }

    /// Takes note of progress; what was passed on before is cut off.
    fn note(&mut self, event: AttachEvent) -> Option<AttachEvent> {
        match event {
            AttachEvent::Output(mut output) => {
                let known =
                    usize::try_from(self.request.from_offset.saturating_sub(output.offset)).unwrap_or(usize::MAX);
                if known >= output.bytes.len() {
                    return None;
                }
                output.bytes.drain(..known);
                output.offset += known as u64;
                self.request.from_offset = output.offset + output.bytes.len() as u64;
                Some(AttachEvent::Output(output))
            }
            AttachEvent::Accepted { bytes } => {
                self.accepted = self.accepted.max(bytes);
                let accepted = self.accepted;
                self.pending.retain(|(offset, bytes)| offset + bytes.len() as u64 > accepted);
                Some(AttachEvent::Accepted { bytes: accepted })
            }
            other => Some(other),
        }
    }

    fn pass_input(&mut self, message: AttachInput, attachment: &Attachment) {
        match &message {
            AttachInput::Stdin { offset, bytes } => self.pending.push_back((*offset, bytes.clone())),
            AttachInput::StdinEof => self.eof = true,
            AttachInput::Signal { signal } => {
                // Not by this connection, since it would be lost if the job moved at this moment.
                let (node, id, signal) = (Arc::clone(&self.node), self.request.id.clone(), *signal);
                tokio::spawn(async move {
                    if let Err(error) = super::control::kill(&node, &id, signal).await {
                        tracing::warn!(job = id, signal, %error, "can't pass a signal on");
                    }
                });
                return;
            }
        }
        // If the attachment just ended the message is sent again with the next one.
        let _ = attachment.input.send(message);
    }
}

/// The offset at which the last `lines` lines of a job's output begin, as far as it is on this node.
///
/// # Errors
/// When the log can't be read.
pub fn tail_offset(job: &LocalJob, lines: u64) -> Result<u64, ApiError> {
    let unreadable = |error| ApiError::internal(format!("can't read the output of job {}: {error}", job.label()));
    let mut reader = Reader::new(&job.paths.output(), 0);
    // Offsets right after each newline, the newest `lines + 1`; the first piece's offset stands for the beginning.
    let mut starts = VecDeque::new();
    let mut end = 0;
    while let Some(frame) = reader.next_frame().map_err(unreadable)? {
        if starts.is_empty() {
            starts.push_back(frame.offset);
        }
        let newlines = frame.bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
        for (index, _) in newlines {
            starts.push_back(frame.offset + index as u64 + 1);
            if starts.len() as u64 > lines.saturating_add(1) {
                starts.pop_front();
            }
        }
        end = frame.offset + frame.bytes.len() as u64;
    }
    // What follows the last newline is a line of its own, unless there is nothing.
    let complete = starts.back() == Some(&end);
    let wanted = usize::try_from(lines).unwrap_or(usize::MAX).saturating_add(usize::from(complete));
    let first = starts.len().saturating_sub(wanted);
    Ok(starts.get(first).copied().unwrap_or(end))
}

/// Whether a job's id is one: what comes from another node goes into a path.
pub fn is_id(id: &str) -> bool {
    id.parse::<JobId>().is_ok()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::api::{Exit, ExitFile, JobFile, JobPaths, JobSpec, NodeAddress};

    #[tokio::test]
    async fn an_end_is_told_when_the_job_has_given_back_what_it_had() {
        let directory = tempfile::tempdir().unwrap();
        let file = JobFile {
            spec: JobSpec {
                id: JobId::from_entropy([7; 12]).to_string(),
                name: "web".into(),
                argv: vec!["true".into()],
                env: Vec::new(),
                cwd: "/".into(),
                created_ms: 0,
            },
            address: Ipv4Addr::new(10, 77, 0, 1),
            prefix_length: 16,
            address6: None,
            prefix_length6: 0,
            node: NodeAddress { name: "A".into(), peer: "10.99.0.1:7070".parse().unwrap(), hops: Vec::new() },
            epoch: 1,
            receive: false,
            uplinks: Vec::new(),
            control: "/nowhere".into(),
        };
        let request = Request { id: file.spec.id.clone(), from_offset: 0, follow: true, input: false };
        let job = LocalJob::new(file, JobPaths::new(directory.path()));
        let exit = Exit::Code(0);
        // Its shim had ended before anybody could attach.
        job.set(Phase::Ended(ExitFile { exit, finished_ms: 0 }), None);
        let mut attachment = local(Arc::clone(&job), request);
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(attachment.events.try_recv().is_err(), "told too early");
        job.set_given_back();
        assert!(matches!(attachment.events.recv().await, Some(AttachEvent::Exited(told)) if told == exit));
    }
}
