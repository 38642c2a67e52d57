//! What a second thread reads while the processes are asked.
//!
//! What an epoll instance watches is told by its fdinfo only, a line for each; with thousands of them that takes as long as all the rest. Nothing
//! changes it while the job stands still, so it is read while the processes tell of their descriptors.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::RawFd;

use sys::Pid;

use super::kinds::View;
use super::scan::{FdInfo, Scan, Seen};

/// The fdinfo of an epoll instance, open to be read again: for its first reader the kernel gathers the text several times until
/// its buffer is large enough.
#[derive(Debug)]
pub struct EpollInfo {
    pid: Pid,
    number: RawFd,
    file: File,
    /// Bytes that it had when last read.
    length: usize,
}

impl EpollInfo {
    /// Opens and reads it.
    fn open(seen: &Seen) -> io::Result<(EpollInfo, FdInfo)> {
        let (pid, number) = (seen.pid, seen.number);
        let file = File::open(format!("/proc/{pid}/fdinfo/{number}"))?;
        let mut info = EpollInfo { pid, number, file, length: 0 };
        let text = info.read()?;
        Ok((info, text))
    }

    fn read(&mut self) -> io::Result<FdInfo> {
        let mut text = String::with_capacity(self.length + 4096);
        self.file.rewind()?;
        self.file.read_to_string(&mut text)?;
        self.length = text.len();
        FdInfo::parse(text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "fdinfo without flags"))
    }
}

/// What was read in the freeze.
pub(super) struct Ahead(Vec<(Pid, RawFd, FdInfo)>);

impl Ahead {
    /// Reads. The job stands still.
    pub(super) fn read(epolls: &mut [EpollInfo]) -> Ahead {
        let read = |epoll: &mut EpollInfo| Some((epoll.pid, epoll.number, epoll.read().ok()?));
        Ahead(epolls.iter_mut().filter_map(read).collect())
    }

    /// Gives it to those who would read it otherwise.
    pub(super) fn tell(self, view: &View<'_>) {
        for (pid, number, info) in self.0 {
            let place = |seen: &&Seen| (seen.pid, seen.number) == (pid, number) && is_epoll(seen);
            if let Some(seen) = view.scan.files.iter().find(place) {
                seen.know(info);
            }
        }
    }
}

/// The epoll instances of a scan; what their fdinfo says now is known to the scan then.
pub(super) fn epolls(scan: &Scan) -> Vec<EpollInfo> {
    let open = |seen: &Seen| {
        let (epoll, info) = EpollInfo::open(seen).ok()?;
        seen.know(info);
        Some(epoll)
    };
    scan.files.iter().filter(|seen| is_epoll(seen)).filter_map(open).collect()
}

pub(super) fn is_epoll(seen: &Seen) -> bool {
    seen.is_anonymous("eventpoll")
}
