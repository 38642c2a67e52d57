//! Descriptors in the tables of the job's processes.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use sys::Pid;
use sys::process::{pidfd_getfd, pidfd_open, pidfd_open_thread};

/// Threads remembered; more are forgotten all at once, which costs one pidfd_open(2) each to learn anew.
const THREADS_MAX: usize = 512;

/// The job's processes, as far as the bridge knows them.
pub(super) struct Processes {
    threads: HashMap<i32, Thread>,
    /// A process whose PID namespace is the job's.
    witness: Option<i32>,
}

struct Thread {
    pidfd: OwnedFd,
    process: i32,
}

impl Processes {
    pub(super) fn new(init_pid: Option<i32>) -> Processes {
        Processes { threads: HashMap::new(), witness: init_pid }
    }

    /// A duplicate of a descriptor of the thread.
    pub(super) fn duplicate(&mut self, thread: i32, number: RawFd) -> io::Result<OwnedFd> {
        if let Some(known) = self.threads.get(&thread) {
            match pidfd_getfd(known.pidfd.as_fd(), number) {
                // The thread has ended, and its number may belong to a new one by now.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => drop(self.threads.remove(&thread)),
                result => return result,
            }
        }
        let pidfd = self.learn(thread)?;
        pidfd_getfd(pidfd.as_fd(), number)
    }

    fn learn(&mut self, thread: i32) -> io::Result<&OwnedFd> {
        if self.threads.len() >= THREADS_MAX {
            self.threads.clear();
        }
        // Linux before 6.9 has pidfds for whole processes only, and those by their first thread.
        let process = process_of(thread).unwrap_or(thread);
        let pidfd = match pidfd_open_thread(Pid::from_raw(thread)) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => pidfd_open(Pid::from_raw(process))?,
            result => result?,
        };
        if self.witness.is_none() {
            self.witness = Some(process);
        }
        Ok(&self.threads.entry(thread).insert_entry(Thread { pidfd, process }).into_mut().pidfd)
    }

    /// The process that a thread belongs to; the thread's own number when that can't be told.
    pub(super) fn process(&self, thread: i32) -> i32 {
        self.threads.get(&thread).map_or(thread, |known| known.process)
    }

    /// Whether a descriptor of the thread has `FD_CLOEXEC`.
    pub(super) fn closes_on_exec(&self, thread: i32, number: RawFd) -> bool {
        let info = std::fs::read_to_string(format!("/proc/{thread}/fdinfo/{number}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        flags
            .and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok())
            .is_some_and(|flags| flags & libc::O_CLOEXEC != 0)
    }

    /// The descriptors of the thread's process that are this socket.
    pub(super) fn numbers_of(&self, thread: i32, inode: u64) -> Vec<RawFd> {
        let is_it = |number: &RawFd| {
            let target = std::fs::read_link(format!("/proc/{thread}/fd/{number}")).ok();
            target.and_then(|target| socket_inode(&target.to_string_lossy())) == Some(inode)
        };
        numbers_in(&format!("/proc/{thread}/fd")).into_iter().filter(is_it).collect()
    }

    /// Looks through the descriptors of all processes of the job: where each socket inode is open.
    pub(super) fn scan(&self) -> HashMap<u64, (i32, RawFd)> {
        let mut found = HashMap::new();
        let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let Some(ours) = self.witness.and_then(namespace) else {
            return found;
        };
        for pid in numbers_in("/proc") {
            if namespace(pid).as_ref() != Some(&ours) {
                continue;
            }
            for number in numbers_in(&format!("/proc/{pid}/fd")) {
                let Ok(target) = std::fs::read_link(format!("/proc/{pid}/fd/{number}")) else {
                    continue;
                };
                if let Some(inode) = socket_inode(&target.to_string_lossy()) {
                    found.insert(inode, (pid, number));
                }
            }
        }
        found
    }
}

fn numbers_in(directory: &str) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

fn socket_inode(target: &str) -> Option<u64> {
    target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

fn process_of(thread: i32) -> Option<i32> {
    status_field(thread, "Tgid:")?.parse().ok()
}

/// Whether the thread has a capability in its effective set.
pub(super) fn has_capability(thread: i32, capability: u32) -> bool {
    status_field(thread, "CapEff:")
        .and_then(|mask| u64::from_str_radix(&mask, 16).ok())
        .is_some_and(|mask| mask & (1 << capability) != 0)
}

fn status_field(thread: i32, name: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;
    use sys::unix;

    #[test]
    fn finds_sockets_of_its_own_process() {
        let (one, _other) = unix::pair(true).expect("pair");
        let inode = unix::inode(one.as_fd()).expect("inode");
        let pid = i32::try_from(std::process::id()).expect("pid");
        let found = Processes::new(Some(pid)).scan();
        let &(process, number) = found.get(&inode).expect("found");
        let copy = Processes::new(None).duplicate(process, number).expect("duplicate");
        assert_eq!(unix::inode(copy.as_fd()).expect("inode"), inode);
        let again = one.try_clone().expect("duplicate");
        let mut numbers = Processes::new(None).numbers_of(pid, inode);
        numbers.retain(|&number| number != copy.as_raw_fd());
        numbers.sort_unstable();
        let mut wanted = [one.as_raw_fd(), again.as_raw_fd()];
        wanted.sort_unstable();
        assert_eq!(numbers, wanted);
    }
}
