//! What the net thread of a home lets the rest of the shim see.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sys::epoll::EventFd;

use crate::api::NodeAddress;

/// The number of a line of one home.
pub type LineId = u64;

/// Who is at the other end of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visitor {
    /// The node.
    pub node: NodeAddress,
    /// The owner's epoch that its move starts from.
    pub epoch: u64,
}

/// How it stands with a home.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum HomeState {
    /// The process's node has not said yet that it runs there.
    #[default]
    Expecting,
    /// The process is there.
    Serving {
        /// Where.
        node: NodeAddress,
        /// Its epoch.
        epoch: u64,
    },
    /// The job has ended; what it sent last is on its way. Final.
    Finished,
    /// The sockets have gone to where the process is. Final.
    Inherited {
        /// Where.
        node: NodeAddress,
        /// Its epoch.
        epoch: u64,
    },
    /// The process is gone or can't be reached; its connections were reset. Final.
    Lost {
        /// Why.
        reason: String,
    },
}

impl HomeState {
    /// Whether nothing more follows.
    pub fn is_final(&self) -> bool {
        match self {
            HomeState::Expecting | HomeState::Serving { .. } => false,
            HomeState::Finished | HomeState::Inherited { .. } | HomeState::Lost { .. } => true,
        }
    }
}

/// A look at the board.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HomeView {
    /// How it stands.
    pub state: HomeState,
    /// The stack stands still for a move to this node, under this epoch, and the node has gone without a word: the directory
    /// must be asked.
    pub unclear: Option<Visitor>,
    /// The process's present node is connected.
    pub served: bool,
    /// Bytes of programs that passed, to the process and from it.
    pub relayed: (u64, u64),
}

/// Where the net thread writes and others read.
#[derive(Clone, Debug)]
pub struct Board {
    view: Arc<Mutex<HomeView>>,
    changed: Arc<EventFd>,
}

impl Board {
    /// An empty one.
    ///
    /// # Errors
    /// As eventfd(2).
    pub fn new() -> std::io::Result<Board> {
        Ok(Board { view: Arc::default(), changed: Arc::new(EventFd::new()?) })
    }

    fn lock(&self) -> MutexGuard<'_, HomeView> {
        // Each change is a single assignment.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it says now.
    pub fn view(&self) -> HomeView {
        self.lock().clone()
    }

    /// Readable after a change, until [`Board::clear`].
    pub fn changed(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&*self.changed)
    }

    /// The changes so far have been seen, or are about to.
    pub fn clear(&self) {
        self.changed.clear();
    }

    pub(super) fn is_over(&self) -> bool {
        self.lock().state.is_final()
    }

    pub(super) fn set(&self, state: HomeState) {
        let mut view = self.lock();
        if view.state != state {
            view.state = state;
            self.changed.signal();
        }
    }

    pub(super) fn note(&self, unclear: Option<&Visitor>, served: bool, relayed: (u64, u64)) {
        let mut view = self.lock();
        view.relayed = relayed;
        if view.unclear.as_ref() != unclear || view.served != served {
            view.unclear = unclear.cloned();
            view.served = served;
            self.changed.signal();
        }
    }
}

/// How a line to a job's home is, as seen from where the process is.
#[derive(Clone, Debug, Default)]
pub struct LineBoard(Arc<Mutex<LineView>>);

#[derive(Clone, Debug, Default)]
struct LineView {
    sent_bytes: u64,
    received_bytes: u64,
    lost: Option<String>,
}

impl LineBoard {
    /// As it is shown, for a home on this node.
    pub fn view(&self, node: &str) -> crate::api::HomeView {
        let LineView { sent_bytes, received_bytes, lost } =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        crate::api::HomeView { node: node.to_owned(), sent_bytes, received_bytes, lost }
    }

    pub(super) fn note(&self, (sent_bytes, received_bytes): (u64, u64), lost: Option<&str>) {
        let mut view = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        view.sent_bytes = sent_bytes;
        view.received_bytes = received_bytes;
        if let Some(reason) = lost {
            view.lost = Some(reason.to_owned());
        }
    }
}
