//! The home of a job whose process runs on another node: its sockets, its address and what leads there.
//!
//! The process may move on, come back, or have its sockets follow it; the home ends when the job does, when the sockets are gone, or
//! when the process can't be reached any more. What happened is told by the net thread on its board; what only the
//! directory knows is asked there.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::commands::{Command, Commands};
use super::job::{Job, LINGER, LINGER_STEP, wait_for};
use super::links::Links;
use super::transfer::{self, Back};
use super::{Shared, daemon};
use crate::api::{ApiError, ErrorKind, MoveEvent, NodeAddress, ShimEvent, ShimState};
use crate::net::{Board, HomeState, NetPlane, Visitor};

/// How often the directory is asked what became of a move.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// See the module's documentation.
#[derive(Debug)]
pub struct Home {
    shared: Arc<Shared>,
    links: Links,
    plane: NetPlane,
    board: Board,
    /// Where the process is.
    process: NodeAddress,
    epoch: u64,
    /// When the directory was last asked.
    asked: Instant,
}

impl Home {
    /// The home of a job that has just left for `process`, with everything of it that stays.
    pub fn new(
        shared: Arc<Shared>,
        links: Links,
        plane: NetPlane,
        process: NodeAddress,
        epoch: u64,
    ) -> io::Result<Home> {
        let board = Board::new()?;
        // The line that the move left from is the one of the epoch before.
        plane.become_home(epoch.saturating_sub(1), board.clone());
        let home = Home { shared, links, plane, board, process, epoch, asked: Instant::now() };
        home.tell();
        Ok(home)
    }

    /// A node whose line came before the job left.
    pub fn add_line(&self, line: std::os::fd::OwnedFd, visitor: Visitor) {
        self.plane.add_line(line, visitor);
    }

    fn tell(&self) {
        let (to, epoch) = (self.process.name.clone(), self.epoch);
        self.shared.set_status(|status| {
            status.state = ShimState::Home { process: to.clone() };
            status.epoch = epoch;
            status.root = None;
        });
        self.shared.tell(ShimEvent::Home { to, epoch });
    }

    /// Serves until the process is back, which is returned, or this is its home no more.
    pub fn serve(mut self, queue: &mut Commands) -> anyhow::Result<Option<Job>> {
        loop {
            self.board.clear();
            let view = self.board.view();
            match view.state {
                HomeState::Expecting => {}
                HomeState::Serving { node, epoch } => {
                    if epoch != self.epoch || node != self.process {
                        tracing::info!(node = node.name, epoch, "the process runs there now");
                        (self.process, self.epoch) = (node, epoch);
                        self.tell();
                    }
                }
                HomeState::Finished | HomeState::Lost { .. } => {
                    self.linger();
                    self.links.withdraw();
                    self.end();
                    return Ok(None);
                }
                HomeState::Inherited { node, epoch } => {
                    self.hand_over(node, epoch);
                    return Ok(None);
                }
            }
            let mut wake_at = None;
            if let Some(guest) = view.unclear {
                if self.asked.elapsed() >= ASK_AGAIN {
                    self.asked = Instant::now();
                    if self.judge(&guest, view.served) {
                        self.hand_over(guest.node, guest.epoch);
                        return Ok(None);
                    }
                }
                wake_at = Some(self.asked + ASK_AGAIN);
            }
            while let Some(command) = queue.take() {
                match command {
                    Command::Inspect(reply) => {
                        // The asker may be gone.
                        let _ = reply.send(self.describe());
                    }
                    Command::Line { line, visitor, reply } => {
                        self.plane.add_line(line, visitor);
                        let _ = reply.send(());
                    }
                    Command::Receive { source, stream, line: _ } => {
                        let back = Back { plane: &self.plane, epoch: self.epoch };
                        match transfer::take_back(&self.shared, &source, stream, &back) {
                            Ok(job) => {
                                self.leave_to_itself();
                                return Ok(Some(job));
                            }
                            Err(error) => {
                                tracing::warn!(error = format!("{error:#}"), "the process did not come back");
                                self.plane.resume();
                                self.tell();
                            }
                        }
                    }
                    Command::MoveOut { progress, .. } => {
                        let message = format!("job {} runs on node {}", self.shared.file.spec.name, self.process.name);
                        // Whoever asked may be gone.
                        let _ = progress.send(MoveEvent::Failed(ApiError::new(ErrorKind::Conflict, message)));
                    }
                    Command::Shutdown => {
                        tracing::info!("the shim was told to end, and the job's connections with it");
                        self.links.withdraw();
                        self.end();
                        return Ok(None);
                    }
                    // There is no process here; dropping the request tells its asker.
                    Command::Sockets(_) | Command::Record { .. } | Command::Signal { .. } | Command::Cancel => {}
                }
            }
            wait_for(&[queue.as_fd(), self.board.changed()], wake_at)?;
        }
    }

    /// Asks the directory about a move that took the sockets' image and fell silent. True when it was made.
    fn judge(&mut self, guest: &Visitor, served: bool) -> bool {
        match daemon::owner(&self.shared.file.control, &self.shared.file.spec.id) {
            Err(error) => tracing::warn!(%error, "the directory does not say who has the job; its sockets stand still"),
            Ok(Some(owner)) if (owner.node.as_str(), owner.epoch) == (guest.node.name.as_str(), guest.epoch) => {
                return true;
            }
            Ok(Some(owner)) if served || owner.epoch < guest.epoch => {
                tracing::info!(owner = owner.node, epoch = owner.epoch, "the move of the sockets is not decided yet");
            }
            Ok(owner) => {
                let owner = owner.map_or_else(|| "nobody".to_owned(), |owner| format!("node {}", owner.node));
                self.plane.abandon(format!("{owner} has the job, and did not say so here"));
            }
        }
        false
    }

    fn linger(&self) {
        let until = Instant::now() + LINGER;
        while Instant::now() < until && !self.plane.is_quiet() {
            std::thread::sleep(LINGER_STEP);
        }
    }

    /// The sockets are on that node now.
    fn hand_over(mut self, node: NodeAddress, epoch: u64) {
        let left = Instant::now();
        self.links.hand_over(&node);
        transfer::forward_strays(&self.plane, left);
        self.links.stop_answering();
        self.shared.tell(ShimEvent::Moved { to: node.name, epoch });
    }

    /// The process is back, and what leads here has been taken over by its new plane.
    fn leave_to_itself(self) {
        transfer::forward_strays(&self.plane, Instant::now());
    }

    fn end(&self) {
        self.shared.tell(ShimEvent::Moved { to: self.process.name.clone(), epoch: self.epoch });
    }

    fn describe(&self) -> serde_json::Value {
        let view = self.board.view();
        serde_json::json!({
            "device": self.links.device(),
            "process_on": self.process.name,
            "relayed_to_process_bytes": view.relayed.0,
            "relayed_from_process_bytes": view.relayed.1,
        })
    }
}
