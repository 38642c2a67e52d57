//! Which daemon is asked.

use anyhow::bail;

use super::Target;
use crate::api::{Client, DEFAULT_STATE, StatePaths};

impl Target {
    /// The daemon to ask.
    ///
    /// # Errors
    /// When the lab has no such node.
    pub fn client(&self) -> anyhow::Result<Client> {
        match (&self.node, &self.socket) {
            (Some(name), _) => match lab_node(name) {
                Some(client) => Ok(client),
                None => bail!(
                    "there is no node {name} in the lab (no {}); `migd lab status` shows its nodes",
                    StatePaths::of_lab_node(name).control().display()
                ),
            },
            (None, Some(path)) => Ok(Client::new(path)),
            (None, None) => Ok(Client::new(StatePaths::new(DEFAULT_STATE).control())),
        }
    }

    /// The daemon to ask for starting a job, and the node on which it is to start it if not its own.
    pub fn client_for_run(&self) -> (Client, Option<String>) {
        if let Some(client) = self.node.as_deref().and_then(lab_node) {
            return (client, None);
        }
        let path = self.socket.clone().unwrap_or_else(|| StatePaths::new(DEFAULT_STATE).control());
        (Client::new(path), self.node.clone())
    }
}

/// The daemon of a node of the lab, if its state directory exists: whether it answers is another question.
fn lab_node(name: &str) -> Option<Client> {
    let paths = StatePaths::of_lab_node(name);
    paths.root().is_dir().then(|| Client::new(paths.control()))
}
