//! Makes the open files.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use sys::fds::{self, Owner};
use sys::{Pid, libc};

use super::super::image::{ContentImage, Kind, OpenFile, SignalTarget, TargetKind};
use super::super::kinds::{content, events, inotify, paths, pipes, sockets, unix};
use super::super::namespace;
use super::{Objects, Restorer};
use crate::error::{Error, Result};

/// What is made inside the job's namespaces.
struct Inside {
    files: HashMap<usize, OwnedFd>,
    pipes: Vec<pipes::Made>,
    contents: Vec<Option<OwnedFd>>,
    sockets: unix::make::Made,
}

/// Makes all files but the caller's, which are fetched when they are placed, and what is in its place already.
pub(super) fn make(restorer: &mut Restorer, objects: &mut Objects<'_>) -> Result<()> {
    let inside = make_inside(restorer).map_err(|error| Error::system("opening the job's files here", error))?;
    let Inside { mut files, mut pipes, contents, sockets } = inside;
    restorer.scratches = sockets.scratches;

    // What the job maps exists already; descriptors must refer to the same object.
    let mut contents: Vec<Option<OwnedFd>> = contents;
    for (image, made) in restorer.image.contents.iter().zip(&mut contents) {
        if made.is_none() {
            *made = objects(image.device, image.inode);
        }
    }
    let mut unix: Vec<Option<OwnedFd>> = sockets.sockets.into_iter().map(Some).collect();
    for (index, file) in restorer.image.files.iter().enumerate() {
        if u32::try_from(index).is_ok_and(|index| restorer.kept_epolls.contains_key(&index)) {
            continue;
        }
        let made = match &file.kind {
            Kind::External(_) => continue,
            Kind::Path(_) | Kind::Inotify { .. } | Kind::Socket(_) => files.remove(&index),
            Kind::Terminal(_) => restorer.terminals.remove(&index),
            Kind::Unix(socket) => unix.get_mut(*socket as usize).and_then(Option::take),
            kind => {
                Some(simple(restorer, kind, file.flags, &mut pipes, &contents).map_err(|error| describe(file, error))?)
            }
        };
        let made = made.ok_or_else(|| Error::Image(format!("two open files of one {:?}", name_of(&file.kind))))?;
        finish(restorer, file, &made).map_err(|error| describe(file, error))?;
        restorer.files[index] = Some(made);
    }
    for (image, made) in restorer.image.contents.iter().zip(&contents) {
        if let Some(made) = made.as_ref().filter(|_| !image.in_memory_image) {
            content::seal(made, image).map_err(|error| Error::system("sealing a memfd", error))?;
        }
    }
    Ok(())
}

fn describe(file: &OpenFile, error: io::Error) -> Error {
    Error::system(format!("restoring a descriptor ({})", name_of(&file.kind)), error)
}

fn name_of(kind: &Kind) -> String {
    match kind {
        Kind::External(key) => format!("{key:?}"),
        Kind::Path(image) => String::from_utf8_lossy(&image.path).into_owned(),
        Kind::Content(_) => "a file without a name".into(),
        Kind::Pipe(_) => "a pipe".into(),
        Kind::Event { .. } => "an eventfd".into(),
        Kind::Timer(_) => "a timerfd".into(),
        Kind::Signal { .. } => "a signalfd".into(),
        Kind::Epoll { .. } => "an epoll".into(),
        Kind::Inotify { .. } => "an inotify".into(),
        Kind::Process { .. } => "a pidfd".into(),
        Kind::Unix(_) => "a unix socket".into(),
        Kind::Socket(_) => "a socket".into(),
        Kind::Terminal(_) => "a terminal".into(),
    }
}

fn make_inside(restorer: &Restorer) -> io::Result<Inside> {
    let image = &restorer.image;
    let processes = &restorer.processes;
    let pid_of = |process: u32| -> Option<i32> {
        processes.iter().find(|candidate| candidate.process == process).map(|candidate| candidate.pid.as_raw())
    };
    namespace::enter(restorer.init, || {
        let mut files = HashMap::new();
        for (index, file) in image.files.iter().enumerate() {
            let made = match &file.kind {
                Kind::Path(path) => paths::open(path, file.flags).map_err(|error| {
                    io::Error::new(error.kind(), format!("{}: {error}", String::from_utf8_lossy(&path.path)))
                })?,
                Kind::Inotify { watches } => {
                    inotify::check(watches)?;
                    fds::events::inotify()?
                }
                Kind::Socket(socket) => sockets::make(socket)?,
                _ => continue,
            };
            files.insert(index, made);
        }
        let pipes = image.pipes.iter().map(pipes::make).collect::<io::Result<Vec<_>>>()?;
        let own = |image: &ContentImage| (!image.in_memory_image).then(|| content::make(image)).transpose();
        let contents = image.contents.iter().map(own).collect::<io::Result<Vec<_>>>()?;
        let sockets = unix::make::make(&image.sockets, &pid_of)?;
        Ok(Inside { files, pipes, contents, sockets })
    })
}

/// What needs no namespace.
fn simple(
    restorer: &Restorer,
    kind: &Kind,
    flags: i32,
    pipes: &mut [pipes::Made],
    contents: &[Option<OwnedFd>],
) -> io::Result<OwnedFd> {
    let missing = |what: &str| io::Error::new(io::ErrorKind::NotFound, what.to_owned());
    match kind {
        Kind::Content(image) => {
            let content = contents.get(image.content as usize).and_then(Option::as_ref);
            content::open(content.ok_or_else(|| missing("its shared memory isn't there"))?, image, flags)
        }
        Kind::Pipe(end) => pipes.get_mut(end.pipe as usize).ok_or_else(|| missing("no such pipe"))?.open(flags),
        Kind::Event { count, semaphore } => fds::events::eventfd(*count, *semaphore),
        Kind::Timer(image) => events::make_timer(image),
        Kind::Signal { mask } => fds::events::signalfd(*mask),
        Kind::Epoll { .. } => fds::events::epoll(),
        Kind::Process { process } => {
            let pid = pid_of(restorer, *process).ok_or_else(|| missing("no such process"))?;
            sys::process::pidfd_open(pid)
        }
        Kind::External(_)
        | Kind::Path(_)
        | Kind::Inotify { .. }
        | Kind::Socket(_)
        | Kind::Unix(_)
        | Kind::Terminal(_) => Err(missing("not made here")),
    }
}

pub(super) fn pid_of(restorer: &Restorer, process: u32) -> Option<Pid> {
    restorer.processes.iter().find(|candidate| candidate.process == process).map(|candidate| candidate.pid)
}

/// Status flags that may be changed.
pub(super) const SETTABLE: i32 = libc::O_APPEND | libc::O_DIRECT | libc::O_NOATIME | libc::O_NONBLOCK;

/// Status flags and owner.
pub(super) fn finish(restorer: &Restorer, file: &OpenFile, made: &OwnedFd) -> io::Result<()> {
    if file.flags & libc::O_PATH != 0 {
        return Ok(());
    }
    if let Some(SignalTarget { to, signal }) = file.owner {
        if let Some((kind, number)) = to
            && let Some(pid) = pid_of(restorer, number)
        {
            let owner = match kind {
                TargetKind::Thread => Owner::Thread(pid),
                TargetKind::Process => Owner::Process(pid),
                TargetKind::Group => Owner::Group(pid),
            };
            fds::set_io_owner(made.as_fd(), owner)?;
        }
        if signal != 0 {
            fds::set_io_signal(made.as_fd(), signal)?;
        }
    }
    // O_ASYNC last: it is what makes signals come.
    fds::set_status_flags(made.as_fd(), file.flags & (SETTABLE | libc::O_ASYNC))
}
