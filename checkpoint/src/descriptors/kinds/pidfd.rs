//! pidfds of processes of the job.

use std::io;

use sys::Pid;

use super::super::image::Kind;
use super::super::scan::Seen;
use super::{Dumping, Handler, Problem, View};

/// A pidfd.
pub(in super::super) struct Process;

impl Process {
    fn target(seen: &Seen) -> io::Result<Option<Pid>> {
        let pid = seen.info()?.value("Pid:").and_then(|text| text.parse::<i32>().ok());
        Ok(pid.filter(|pid| *pid > 0).map(Pid::from_raw))
    }
}

impl Handler for Process {
    fn recognises(&self, seen: &Seen) -> bool {
        seen.is_anonymous("pidfd") || seen.link.starts_with(b"pidfd:[")
    }

    fn obstacle(&self, seen: &Seen, view: &View<'_>) -> io::Result<Option<String>> {
        const PIDFD_THREAD: i32 = sys::libc::O_EXCL;
        Ok(match Process::target(seen)? {
            None => Some("pidfd of a process that has ended; it can move once the program has closed it".into()),
            Some(_) if seen.info()?.flags & PIDFD_THREAD != 0 => Some("pidfd of a single thread".into()),
            Some(pid) if view.job.number_of(pid).is_none() => Some(format!("pidfd of process {pid} outside the job")),
            Some(_) => None,
        })
    }

    fn dump(&self, seen: &Seen, _: usize, dump: &mut Dumping<'_>) -> Result<Kind, Problem> {
        let process = Process::target(seen)?.and_then(|pid| dump.view.job.number_of(pid));
        process
            .map(|process| Kind::Process { process })
            .ok_or_else(|| Problem::Stays("pidfd of a process that has ended".into()))
    }
}
