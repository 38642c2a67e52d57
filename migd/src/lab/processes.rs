//! Which processes belong to a lab, and ending just those.
//!
//! A process is the lab's when its network namespace is one of the lab's (daemons, shims, and what `lab exec` ran), when
//! it carries the mark that daemons hand down, or when one of its ancestors is the lab's (jobs have namespaces of their
//! own). Processes are ended through a pidfd, and looked at again once it is open, so that a number that was
//! given to somebody else meanwhile is not hit.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use sys::netns::{NamespaceId, of_process};

use super::nodes::MARK;

/// How long killed processes may take to be gone. The kernel ends a large job in well under a second.
const GONE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(5);

/// What makes a process the lab's.
pub(super) struct Belonging {
    pub(super) lab: String,
    pub(super) namespaces: BTreeSet<NamespaceId>,
}

impl Belonging {
    /// The lab's processes, without the calling one and its ancestors: who takes a lab down from inside survives it.
    pub(super) fn find(&self) -> BTreeSet<u32> {
        let parents = parents();
        let mut found: BTreeSet<u32> = parents.keys().copied().filter(|&pid| self.is_direct(pid)).collect();
        // A child's number may be lower than its parent's, so go over the table until nothing is added.
        loop {
            let more: Vec<u32> = parents
                .iter()
                .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
                .map(|(&pid, _)| pid)
                .collect();
            if more.is_empty() {
                break;
            }
            found.extend(more);
        }
        let mut own = std::process::id();
        while own > 1 {
            found.remove(&own);
            own = parents.get(&own).copied().unwrap_or(0);
        }
        found
    }

    fn is_direct(&self, pid: u32) -> bool {
        of_process(pid).is_ok_and(|namespace| self.namespaces.contains(&namespace)) || self.is_marked(pid)
    }

    fn is_marked(&self, pid: u32) -> bool {
        let mark = format!("{MARK}={}", self.lab);
        fs::read(format!("/proc/{pid}/environ"))
            .is_ok_and(|environment| environment.split(|&byte| byte == 0).any(|entry| entry == mark.as_bytes()))
    }

    /// Kills the lab's processes until none is left; returns those that would not go.
    pub(super) fn end(&self) -> BTreeSet<u32> {
        let deadline = Instant::now() + GONE;
        loop {
            let found = self.find();
            if found.is_empty() || Instant::now() > deadline {
                return found;
            }
            for &pid in &found {
                self.kill(pid);
            }
            std::thread::sleep(POLL);
        }
    }

    fn kill(&self, pid: u32) {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
        let Ok(descriptor) = pidfd_open(number, PidfdFlags::empty()) else { return };
        if self.find().contains(&pid) {
            // Fails only when it is gone already.
            let _ = pidfd_send_signal(&descriptor, Signal::KILL);
        }
    }
}

/// Every process that is not a zombie, with its parent. A zombie has ended and waits only for its parent.
fn parents() -> BTreeMap<u32, u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return BTreeMap::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| Some((pid, parent_of_living(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?)))
        .collect()
}

/// The parent's number out of a `/proc/PID/stat` line, unless it is a zombie's. The command's name stands in parentheses
/// and may hold anything, so it is skipped by its last closing parenthesis.
fn parent_of_living(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_lines_are_read_past_any_name() {
        assert_eq!(parent_of_living("12 (redis) S 7 1 1 0"), Some(7));
        assert_eq!(parent_of_living("12 (a) R 1) (b) S 7 1 1 0"), Some(7));
        assert_eq!(parent_of_living("12 (redis) Z 7 1 1 0"), None);
        assert_eq!(parent_of_living("12 (redis"), None);
    }

    #[test]
    fn marked_processes_and_their_children_are_found_and_ended() {
        let lab = format!("unit{}", std::process::id());
        let belonging = Belonging { lab: lab.clone(), namespaces: BTreeSet::new() };
        // The shell's child loses the mark, so it is found by its parent only.
        let mut shell = std::process::Command::new("sh")
            .args(["-c", "env -u MIGD_LAB sleep 100 & wait"])
            .env(MARK, &lab)
            .spawn()
            .expect("sh starts");
        let deadline = Instant::now() + Duration::from_secs(5);
        while belonging.find().len() < 2 && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        let found = belonging.find();
        // The shell stays a zombie of ours until it is waited for; that must not count as left over.
        let left = belonging.end();
        shell.wait().expect("it was ours");
        assert_eq!(found.len(), 2);
        assert!(found.contains(&shell.id()));
        assert_eq!(left, BTreeSet::new());
        assert_eq!(belonging.find(), BTreeSet::new());
    }
}
