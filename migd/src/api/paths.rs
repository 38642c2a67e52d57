//! Where things are in a daemon's state directory.

use std::path::{Path, PathBuf};

/// State directory of a daemon that was not told otherwise.
pub const DEFAULT_STATE: &str = "/run/migd";
/// Parent of the state directories of the lab's nodes.
pub const LAB_STATE: &str = "/run/migd-lab";

/// A daemon's state directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatePaths {
    root: PathBuf,
}

impl StatePaths {
    /// The state directory at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// That of a lab's node, given as `NODE` (of the default lab) or `LAB/NODE`.
    pub fn of_lab_node(name: &str) -> Self {
        Self::new(crate::lab::state_directory(name).unwrap_or_else(|| Path::new(LAB_STATE).join(name)))
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The socket that the daemon serves.
    pub fn control(&self) -> PathBuf {
        self.root.join("control.sock")
    }

    /// Held locked by the running daemon.
    pub fn lock(&self) -> PathBuf {
        self.root.join("daemon.lock")
    }

    /// The embedded directory's file, on the node that serves it.
    pub fn directory(&self) -> PathBuf {
        self.root.join("directory.redb")
    }

    /// Parent of the jobs' directories.
    pub fn jobs(&self) -> PathBuf {
        self.root.join("jobs")
    }

    /// One job's directory.
    pub fn job(&self, id: &str) -> JobPaths {
        JobPaths::new(self.jobs().join(id))
    }
}

/// A job's directory on its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobPaths {
    root: PathBuf,
}

impl JobPaths {
    /// The job's directory at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// [`super::JobFile`].
    pub fn spec(&self) -> PathBuf {
        self.root.join("job.json")
    }

    /// [`super::ExitFile`].
    pub fn exit(&self) -> PathBuf {
        self.root.join("exit.json")
    }

    /// The socket that the shim serves.
    pub fn socket(&self) -> PathBuf {
        self.root.join("shim.sock")
    }

    /// The job's output.
    pub fn output(&self) -> PathBuf {
        self.root.join("output.log")
    }

    /// The shim's own log.
    pub fn shim_log(&self) -> PathBuf {
        self.root.join("shim.log")
    }
}
