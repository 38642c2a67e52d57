//! The shim's control socket.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

use super::commands::{Asker, Command};
use super::output::Reader;
use super::stdio::{Hold, Stdio};
use super::{Shared, has_left, is_final};
use crate::api::{
    ApiError, AttachEvent, AttachInput, CaptureEvent, Connection, ErrorKind, MoveEvent, Output, Receiver, Reply,
    Sender, ShimEvent, ShimRequest, ShimState, ShimStatus,
};
use crate::net::SocketDescription;
use crate::net::Visitor;

/// How long those who listen may take to hear the end.
const FAREWELL: Duration = Duration::from_secs(3);
/// How long a signal waits for a job that is frozen in the middle of a move.
const KILL_WAIT: Duration = Duration::from_secs(30);

/// The control thread.
#[derive(Debug)]
pub struct Control {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Control {
    /// Lets the connections hear what there is to hear, and ends the thread.
    pub fn finish(self) {
        // The thread may have ended already, with an error in the log.
        let _ = self.stop.send(());
        let _ = self.thread.join();
    }
}

#[derive(Debug, Clone)]
struct Server {
    shared: Arc<Shared>,
    asker: Asker,
    /// Every open connection holds one; when all are gone the last receiver knows.
    _open: mpsc::Sender<()>,
}

/// Starts the thread that serves `listener`.
///
/// # Errors
/// When the thread or its runtime can't be made.
pub fn start(listener: StdListener, shared: Arc<Shared>, asker: Asker) -> io::Result<Control> {
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    {
        let _context = runtime.enter();
        // The handler stays though nobody listens to it.
        drop(signal(crate::FILE_TOO_LARGE)?);
    }
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::Builder::new().name("control".into()).spawn(move || {
        runtime.block_on(async move {
            if let Err(error) = serve(listener, shared, asker, stopped).await {
                tracing::error!(%error, "the control socket is not served any more");
            }
        });
    })?;
    Ok(Control { stop, thread })
}

async fn serve(
    listener: StdListener,
    shared: Arc<Shared>,
    asker: Asker,
    mut stopped: oneshot::Receiver<()>,
) -> io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    let (open, mut all_closed) = mpsc::channel(1);
    let server = Server { shared, asker, _open: open };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let server = server.clone();
                    tokio::spawn(async move {
                        if let Err(error) = server.answer(stream.into()).await {
                            tracing::debug!(%error, "a control connection broke");
                        }
                    });
                }
                Err(error) => {
                    // Descriptors may be short for a moment.
                    tracing::warn!(%error, "can't accept a control connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            _ = terminate.recv() => drop(server.asker.ask(Command::Shutdown)),
            _ = interrupt.recv() => drop(server.asker.ask(Command::Shutdown)),
            _ = &mut stopped => break,
        }
    }
    drop(server);
    // Ends when the last connection does.
    if tokio::time::timeout(FAREWELL, all_closed.recv()).await.is_err() {
        tracing::warn!("somebody did not listen to the end");
    }
    Ok(())
}

impl Server {
    async fn answer(self, mut connection: Connection) -> io::Result<()> {
        let Some(request) = connection.receive::<ShimRequest>().await? else { return Ok(()) };
        match request {
            ShimRequest::Status => connection.send(&Reply::Ok(self.status())).await,
            ShimRequest::File => connection.send(&Reply::Ok(&self.shared.file)).await,
            ShimRequest::Inspect => {
                let answer = self.inspect().await;
                connection.send(&Reply::from(answer)).await
            }
            ShimRequest::Sockets => {
                let answer = self.sockets().await;
                connection.send(&Reply::from(answer)).await
            }
            ShimRequest::Capture { number, snap_length } => {
                connection.send(&Reply::Ok(())).await?;
                self.capture(connection, number, snap_length).await
            }
            ShimRequest::Kill { signal } => {
                let answer = self.kill(signal).await;
                connection.send(&Reply::from(answer)).await
            }
            ShimRequest::Attach { from_offset, follow, input } => {
                self.attach(connection, from_offset, follow, input).await
            }
            ShimRequest::Watch => self.watch(connection).await,
            ShimRequest::MoveOut { target, epoch, sockets } => {
                let (progress, events) = mpsc::unbounded_channel();
                if let Some(stream) = connection.take_descriptor() {
                    self.asker.ask(Command::MoveOut { target, epoch, sockets, stream, progress });
                } else {
                    let error = ApiError::new(ErrorKind::Invalid, "the move came without its connection");
                    // The receiver is right here.
                    let _ = progress.send(MoveEvent::Failed(error));
                }
                self.forward(events, connection).await
            }
            ShimRequest::Line { from, epoch } => {
                let answer = self.line(Visitor { node: from, epoch }, &mut connection).await;
                connection.send(&Reply::from(answer)).await
            }
            ShimRequest::Receive { source } => {
                let answer = self.receive(source, &mut connection);
                connection.send(&Reply::from(answer)).await
            }
            ShimRequest::Cancel => {
                let answer = match self.shared.status().state {
                    ShimState::Receiving => {
                        self.asker.ask(Command::Cancel);
                        Ok(())
                    }
                    _ => {
                        Err(ApiError::new(ErrorKind::Conflict, format!("job {} runs here", self.shared.file.spec.name)))
                    }
                };
                connection.send(&Reply::from(answer)).await
            }
        }
    }

    /// Passes on how a move goes.
    async fn forward(
        &self,
        mut events: mpsc::UnboundedReceiver<MoveEvent>,
        mut connection: Connection,
    ) -> io::Result<()> {
        let mut last = None;
        while let Some(event) = events.recv().await {
            connection.send(&event).await?;
            last = Some(event);
        }
        if matches!(last, Some(MoveEvent::Done(_) | MoveEvent::Failed(_))) {
            return Ok(());
        }
        // The job was gone when its turn came; what became of it is told in a moment.
        let mut event = self.shared.event.subscribe();
        let ended = tokio::time::timeout(FAREWELL, event.wait_for(|event| event.as_ref().is_some_and(has_left))).await;
        let became = match ended.ok().and_then(|ended| ended.ok()?.clone()) {
            Some(ShimEvent::Moved { to, .. } | ShimEvent::Home { to, .. }) => format!("has just moved to node {to}"),
            Some(ShimEvent::Exited(_)) => "ended before it could move".to_owned(),
            _ => "is lost: its shim ends".to_owned(),
        };
        let message = format!("job {} {became}", self.shared.file.spec.name);
        connection.send(&MoveEvent::Failed(ApiError::new(ErrorKind::Conflict, message))).await
    }

    fn receive(&self, source: crate::api::NodeAddress, connection: &mut Connection) -> Result<(), ApiError> {
        if !matches!(self.shared.status().state, ShimState::Receiving | ShimState::Home { .. }) {
            return Err(ApiError::new(ErrorKind::Conflict, format!("job {} runs here", self.shared.file.spec.name)));
        }
        let stream = connection.take_descriptor();
        let stream = stream.ok_or_else(|| ApiError::new(ErrorKind::Invalid, "the move came without its connection"))?;
        let line = connection.take_descriptor();
        self.asker.ask(Command::Receive { source, stream, line });
        Ok(())
    }

    fn status(&self) -> ShimStatus {
        let status = self.shared.status();
        let output_bytes = self.shared.stdio.borrow().as_ref().map_or(0, |stdio| *stdio.output_offset().borrow());
        ShimStatus {
            id: self.shared.file.spec.id.clone(),
            state: status.state,
            epoch: status.epoch,
            shim_pid: std::process::id(),
            pid: status.root.map(sys::Pid::as_raw),
            output_bytes,
            home: self.shared.home(),
        }
    }

    async fn line(&self, visitor: Visitor, connection: &mut Connection) -> Result<(), ApiError> {
        let line = connection.take_descriptor();
        let line = line.ok_or_else(|| ApiError::new(ErrorKind::Invalid, "the line came without its connection"))?;
        let (reply, answer) = oneshot::channel();
        self.asker.ask(Command::Line { line, visitor, reply });
        answer.await.map_err(|_| {
            let name = &self.shared.file.spec.name;
            ApiError::new(ErrorKind::Unavailable, format!("the sockets of job {name} are not on this node"))
        })
    }

    async fn inspect(&self) -> Result<serde_json::Value, ApiError> {
        if let ShimState::Moving { to } = self.shared.status().state {
            return Ok(serde_json::json!({ "moving_to": to }));
        }
        let (reply, answer) = oneshot::channel();
        self.asker.ask(Command::Inspect(reply));
        answer.await.map_err(|_| {
            ApiError::new(ErrorKind::Unavailable, format!("job {} does not run here", self.shared.file.spec.name))
        })
    }

    async fn sockets(&self) -> Result<Vec<SocketDescription>, ApiError> {
        let name = &self.shared.file.spec.name;
        if let ShimState::Moving { to } = self.shared.status().state {
            let error = ApiError::new(ErrorKind::Unavailable, format!("job {name} is on its way to node {to}"));
            return Err(error.hint("try again when it has arrived"));
        }
        let (reply, answer) = oneshot::channel();
        self.asker.ask(Command::Sockets(reply));
        answer.await.map_err(|_| ApiError::new(ErrorKind::Unavailable, format!("job {name} does not run on this node")))
    }

    /// Streams the job's packets while it is here; the last event says what became of it.
    async fn capture(&self, connection: Connection, number: u64, snap_length: u32) -> io::Result<()> {
        let mut event = self.shared.event.subscribe();
        let (mut receiver, mut sender) = connection.split();
        // A job that is on its way here has no network yet; its packets are kept for the recordings that come with it.
        let here = |event: &Option<ShimEvent>| !matches!(event, None | Some(ShimEvent::Receiving));
        if event.wait_for(here).await.is_err() {
            return Ok(());
        }
        let (reply, answer) = oneshot::channel();
        self.asker.ask(Command::Record { number, snap_length, reply });
        if let Ok(stream) = answer.await {
            let mut stream = match stream {
                Ok(stream) => stream,
                Err(error) => {
                    let message = format!("job {} can't be recorded: {error}", self.shared.file.spec.name);
                    return sender.send(&CaptureEvent::Failed(ApiError::new(ErrorKind::Conflict, message))).await;
                }
            };
            loop {
                tokio::select! {
                    blocks = stream.next() => match blocks {
                        Some(blocks) => sender.send(&CaptureEvent::Packets { blocks }).await?,
                        None => break,
                    },
                    // Nothing is said in this direction; what comes is the end.
                    _ = receiver.receive::<serde_json::Value>() => return Ok(()),
                }
            }
        }
        // The network is gone from here; why is told in a moment.
        let ended = tokio::time::timeout(FAREWELL, event.wait_for(|event| event.as_ref().is_some_and(has_left))).await;
        let last = match ended.ok().and_then(|ended| ended.ok()?.clone()) {
            Some(ShimEvent::Moved { to, .. } | ShimEvent::Home { to, .. }) => CaptureEvent::Moved { node: to },
            Some(ShimEvent::Failed(error)) => CaptureEvent::Failed(error),
            Some(ShimEvent::Exited(_)) => CaptureEvent::Ended,
            _ => {
                let name = &self.shared.file.spec.name;
                let message = format!("the packets of job {name} can't be recorded any more");
                CaptureEvent::Failed(ApiError::new(ErrorKind::Unavailable, message))
            }
        };
        sender.send(&last).await
    }

    async fn kill(&self, signal: i32) -> Result<(), ApiError> {
        let name = &self.shared.file.spec.name;
        if !(0..=nix::libc::SIGRTMAX()).contains(&signal) {
            return Err(ApiError::new(ErrorKind::Invalid, format!("there is no signal {signal}")));
        }
        let mut event = self.shared.event.subscribe();
        let here = tokio::time::timeout(KILL_WAIT, async {
            loop {
                let status = self.shared.status();
                match status.state {
                    // A signal to a job whose image was taken would be lost with it.
                    ShimState::Moving { .. } | ShimState::Receiving | ShimState::Starting => {}
                    _ => return,
                }
                if event.changed().await.is_err() {
                    return;
                }
            }
        });
        here.await.map_err(|_| {
            ApiError::new(ErrorKind::Unavailable, format!("job {name} is on its way to another node"))
                .hint("try again when the move has ended")
        })?;
        let gone = || ApiError::new(ErrorKind::Conflict, format!("job {name} does not run here"));
        let (reply, answer) = oneshot::channel();
        self.asker.ask(Command::Signal { signal, reply });
        match answer.await {
            Ok(Ok(())) => Ok(()),
            // It has just ended, or left.
            Ok(Err(checkpoint::Error::Gone)) | Err(_) => Err(gone()),
            Ok(Err(error)) => Err(ApiError::internal(io::Error::other(error))),
        }
    }

    /// Tells what happens. After the last word the end of the connection tells that nobody else is served any more.
    async fn watch(self, mut connection: Connection) -> io::Result<()> {
        let mut events = self.shared.event.subscribe();
        loop {
            let event = events.borrow_and_update().clone();
            if let Some(event) = event {
                connection.send(&event).await?;
                if is_final(&event) {
                    // This one isn't waited for; it ends with the thread's runtime.
                    drop(self);
                    let _ = connection.receive::<serde_json::Value>().await;
                    return Ok(());
                }
            }
            tokio::select! {
                changed = events.changed() => if changed.is_err() { return Ok(()) },
                // A watcher says nothing more; what is received here is its end.
                said = connection.receive::<serde_json::Value>() => if said?.is_none() { return Ok(()) },
            }
        }
    }

    async fn attach(&self, mut connection: Connection, offset: u64, follow: bool, input: bool) -> io::Result<()> {
        let mut event = self.shared.event.subscribe();
        let mut stdio = self.shared.stdio.subscribe();
        let stdio = tokio::select! {
            ready = stdio.wait_for(Option::is_some) => ready.ok().and_then(|stdio| stdio.clone()),
            _ = event.wait_for(|event| event.as_ref().is_some_and(has_left)) => None,
        };
        let Some(stdio) = stdio else {
            let name = &self.shared.file.spec.name;
            let error = ApiError::new(ErrorKind::Unavailable, format!("job {name} does not run on this node"));
            return connection.send(&Reply::<()>::Error(error)).await;
        };
        connection.send(&Reply::Ok(())).await?;
        let (receiver, sender) = connection.split();
        let offset = offset.min(*stdio.output_offset().borrow());
        let attachment = Attachment {
            asker: self.asker.clone(),
            reader: Reader::new(stdio.log_path(), offset),
            hold: input.then(|| stdio.hold(offset)),
            stdio,
            sender,
            receiver,
            event,
            follow,
            input: None,
        };
        attachment.run().await
    }
}

/// One who is attached.
struct Attachment {
    asker: Asker,
    stdio: Arc<Stdio>,
    reader: Reader,
    hold: Option<Hold>,
    sender: Sender,
    receiver: Receiver,
    event: watch::Receiver<Option<ShimEvent>>,
    follow: bool,
    /// Input that waits for room.
    input: Option<AttachInput>,
}

impl Attachment {
    async fn run(mut self) -> io::Result<()> {
        let mut offset = self.stdio.output_offset();
        let mut accepted = self.stdio.input_accepted();
        let mut told = None;
        loop {
            // Asked before the log is read: what the job wrote before its end is in the log by then.
            let event = self.event.borrow_and_update().clone();
            offset.borrow_and_update();
            accepted.borrow_and_update();
            self.send_output().await?;
            match event {
                Some(ShimEvent::Exited(exit)) => return self.sender.send(&AttachEvent::Exited(exit)).await,
                Some(ShimEvent::Moved { to, .. } | ShimEvent::Home { to, .. }) => {
                    return self.sender.send(&AttachEvent::Moved { node: to }).await;
                }
                Some(ShimEvent::Failed(error)) => return self.sender.send(&AttachEvent::Failed(error)).await,
                _ if !self.follow => return self.sender.send(&AttachEvent::CaughtUp).await,
                _ => {}
            }
            if let Err(error) = self.accept_input() {
                let error = ApiError::new(ErrorKind::Invalid, error.to_string());
                return self.sender.send(&AttachEvent::Failed(error)).await;
            }
            let now = *self.stdio.input_accepted().borrow();
            if self.hold.is_some() && told != Some(now) {
                told = Some(now);
                self.sender.send(&AttachEvent::Accepted { bytes: now }).await?;
            }
            tokio::select! {
                changed = self.event.changed() => changed.map_err(io::Error::other)?,
                changed = offset.changed() => changed.map_err(io::Error::other)?,
                changed = accepted.changed() => changed.map_err(io::Error::other)?,
                said = self.receiver.receive::<AttachInput>(), if self.input.is_none() => match said? {
                    None => return Ok(()),
                    said => self.input = said,
                },
            }
        }
    }

    async fn send_output(&mut self) -> io::Result<()> {
        while let Some(frame) = self.reader.next_frame()? {
            let output = Output { stream: frame.stream, offset: frame.offset, bytes: frame.bytes };
            self.sender.send(&AttachEvent::Output(output)).await?;
            if let Some(hold) = &self.hold {
                hold.advance(self.reader.offset());
            }
        }
        Ok(())
    }

    fn accept_input(&mut self) -> io::Result<()> {
        match self.input.take() {
            Some(AttachInput::Stdin { offset, bytes }) => {
                let accepted = self.stdio.accept_input(offset, &bytes)?;
                if accepted < offset + bytes.len() as u64 {
                    self.input = Some(AttachInput::Stdin { offset, bytes });
                }
            }
            Some(AttachInput::StdinEof) if !self.stdio.end_input() => self.input = Some(AttachInput::StdinEof),
            Some(AttachInput::Signal { signal }) => {
                // The job may have ended just now; nobody waits for an answer.
                self.asker.ask(Command::Signal { signal, reply: oneshot::channel().0 });
            }
            Some(AttachInput::StdinEof) | None => {}
        }
        Ok(())
    }
}
