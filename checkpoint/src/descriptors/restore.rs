//! Makes the descriptors of an image anew and puts them into the stubs.
//!
//! Open files are made by us: inside the job's namespaces where that matters, with our rights, since a program may have opened
//! a file before it gave up the right to. Then each table is filled by the process itself: descriptors come to it in messages
//! over a socket pair, 253 at once, and the kernel gives each the lowest free number; sent in ascending order, with gaps
//! filled, nearly all of them land where they belong. That costs a tenth of fetching them one by one.

mod early;
mod epolls;
mod make;
mod tables;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use sys::tape::Tape;
use sys::{fds, libc};

pub(crate) use self::early::place as place_early;
use self::tables::Channel;
use super::image::{Kind, LockImage, TreeDescriptors};
use super::kinds::unix::make::Scratches;
use super::kinds::{inotify, locks};
use super::{Early, Job, Process, Tapes, namespace};
use crate::error::{Error, Result};
use crate::external::ExternalKey;

/// Gives the caller's descriptor for a key.
pub(crate) type Externals<'a> = dyn FnMut(ExternalKey) -> io::Result<OwnedFd> + 'a;
/// Gives the shared memory object that was this inode of this device at the source.
pub(crate) type Objects<'a> = dyn FnMut((u32, u32), u64) -> Option<OwnedFd> + 'a;

/// How long to wait for locks that others hold, and for a file system that spans machines to notice that the source doesn't.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// Restores descriptors: [`place`](Restorer::place) while nothing is decided yet, then [`finish`](Restorer::finish) once the job
/// is ours. Dropped before that it takes back what it made.
#[derive(Debug)]
pub struct Restorer {
    image: TreeDescriptors,
    init: sys::Pid,
    processes: Vec<Process>,
    /// By index of the image's files; those that are needed still.
    files: Vec<Option<OwnedFd>>,
    /// What is in the stubs' tables already.
    early: Early,
    /// The epoll instances among that which the image has there: by index of the file, process and number.
    kept_epolls: HashMap<u32, (u32, RawFd)>,
    scratches: Scratches,
    /// Ends of terminals, by index of the file.
    terminals: HashMap<usize, OwnedFd>,
    /// The caller's ends of standard streams, while the tables are filled: a program that opens /dev/stdout has a second description
    /// of the same pipe.
    streams: HashMap<ExternalKey, OwnedFd>,
}

impl Restorer {
    /// A restorer for these stubs. They must share tables as the image says.
    ///
    /// # Errors
    /// The image contradicts itself.
    pub fn new(image: TreeDescriptors, job: &Job<'_>) -> Result<Restorer> {
        check(&image, job)?;
        let files = image.files.iter().map(|_| None).collect();
        Ok(Restorer {
            image,
            init: job.init,
            processes: job.processes.to_vec(),
            files,
            early: Early::default(),
            kept_epolls: HashMap::new(),
            scratches: Scratches::default(),
            terminals: HashMap::new(),
            streams: HashMap::new(),
        })
    }

    /// Leaves what was put into the stubs' tables before where it is, if the image has it there.
    pub(crate) fn with_early(self, early: Early) -> Restorer {
        Restorer { early, ..self }
    }

    /// Takes the ends of terminals, which are made by [`crate::terminals`].
    pub(crate) fn with_terminals(self, terminals: HashMap<usize, OwnedFd>) -> Restorer {
        Restorer { terminals, ..self }
    }

    /// Makes all open files and fills the stubs' tables with them. Whatever else was in the tables is closed.
    ///
    /// # Errors
    /// A file is missing or different here, or the kernel refused something. The stubs are of no use then.
    pub fn place(
        &mut self,
        tapes: &mut dyn Tapes,
        externals: &mut Externals<'_>,
        objects: &mut Objects<'_>,
    ) -> Result<()> {
        let mut uses = self.count_uses();
        self.kept_epolls = early::kept_epolls(self);
        make::make(self, objects)?;
        early::fetch_misplaced(self, &uses)?;
        let watched = early::settle_watches(self, tapes)?;
        let mut channels: Vec<Channel> = Vec::with_capacity(self.image.tables.len());
        for index in 0..self.image.tables.len() {
            channels.push(tables::place(self, index, &mut uses, tapes, externals)?);
        }
        epolls::fill(self, &channels, &watched, tapes, externals)?;
        self.streams.clear();
        for channel in &channels {
            channel.close(tapes)?;
        }
        for (index, file) in self.files.iter_mut().enumerate() {
            if !is_unfinished(&self.image.files[index].kind) {
                *file = None;
            }
        }
        Ok(())
    }

    /// Takes what source and target can't both have: locks, and the names of Unix sockets in the file system; and lets inotify
    /// watch. To be called
    /// when the job's owner has changed and before it runs.
    ///
    /// A lock that somebody else has by now is reported in the log: the job is ours, and has to run.
    ///
    /// # Errors
    /// A stub is gone.
    pub fn finish(&mut self, tapes: &mut dyn Tapes) -> Result<()> {
        // Their directories go with the restorer, when the job runs.
        self.scratches.publish();
        if let Err(error) = self.watch() {
            tracing::error!(%error, "an inotify of the job doesn't watch what it should");
        }
        let deadline = Instant::now() + LOCK_PATIENCE;
        for (index, file) in self.image.files.iter().enumerate() {
            let Some(fd) = self.files[index].take() else { continue };
            for lock in locks::own_locks(&file.kind) {
                report_lock(insist(deadline, || locks::take(fd.as_fd(), lock)), lock);
            }
        }
        for process_lock in &self.image.process_locks {
            let table = &self.image.tables[process_lock.table as usize];
            let Some(&process) = table.processes.first() else { continue };
            let lock = &process_lock.lock;
            let mut tape = Tape::new();
            let record = tape.data(&fds::lock_record_bytes(lock.write, lock.start, lock.length));
            tape.require(libc::SYS_fcntl, &[process_lock.number.into(), libc::F_SETLK.into(), record.into()]);
            report_lock(insist(deadline, || tapes.run(process, &tape).map(drop)), lock);
        }
        Ok(())
    }

    /// Adds the watches of inotify descriptors.
    fn watch(&self) -> io::Result<()> {
        let watching = self.image.files.iter().zip(&self.files).filter_map(|(file, fd)| match &file.kind {
            Kind::Inotify { watches } => Some((fd.as_ref()?, watches)),
            _ => None,
        });
        let watching: Vec<_> = watching.collect();
        if watching.is_empty() {
            return Ok(());
        }
        namespace::enter(self.init, || watching.into_iter().try_for_each(|(fd, watches)| inotify::watch(fd, watches)))
    }

    /// In how many slots and watches each file is needed.
    fn count_uses(&self) -> Vec<u32> {
        let mut uses = vec![0; self.image.files.len()];
        for slot in self.image.tables.iter().flat_map(|table| &table.slots) {
            uses[slot.file as usize] += 1;
        }
        for (index, file) in self.image.files.iter().enumerate() {
            if is_unfinished(&file.kind) {
                uses[index] += 1;
            }
        }
        for (_, watch) in epolls::displaced(&self.image) {
            uses[watch.file as usize] += 1;
        }
        uses
    }
}

/// Whether something is left for [`Restorer::finish`].
fn is_unfinished(kind: &Kind) -> bool {
    matches!(kind, Kind::Inotify { .. }) || !locks::own_locks(kind).is_empty()
}

fn report_lock(result: io::Result<()>, lock: &LockImage) {
    if let Err(error) = result {
        tracing::error!(%error, ?lock, "a file lock of the job could not be taken here");
    }
}

/// Repeats what fails because somebody else holds a lock: the source has let go of its own, and may be far away.
fn insist(deadline: Instant, mut attempt: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match attempt() {
            Err(error) if is_contended(&error) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_micros(200));
            }
            result => return result,
        }
    }
}

fn is_contended(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// Indexes lead to something, and every table has a stub.
fn check(image: &TreeDescriptors, job: &Job<'_>) -> Result<()> {
    let wrong = |what: String| Err(Error::Image(format!("descriptors: {what}")));
    let files = image.files.len();
    let inside = |index: u32, length: usize| (index as usize) < length;
    for table in &image.tables {
        let Some(first) = table.processes.first() else { return wrong("a table of no process".into()) };
        if job.pid_of(*first).is_none() {
            return wrong(format!("process {first} has no stub"));
        }
        if !table.slots.iter().all(|slot| inside(slot.file, files) && slot.number >= 0) {
            return wrong(format!("process {first} has a descriptor of no file"));
        }
        if !table.slots.is_sorted_by(|one, next| one.number < next.number) {
            return wrong(format!("the descriptors of process {first} are not in order"));
        }
    }
    for file in &image.files {
        let fine = match &file.kind {
            Kind::Pipe(end) => inside(end.pipe, image.pipes.len()),
            Kind::Content(content) => inside(content.content, image.contents.len()),
            Kind::Unix(socket) => inside(*socket, image.sockets.len()),
            Kind::Epoll { watches } => watches.iter().all(|watch| inside(watch.file, files)),
            Kind::Process { process } => job.pid_of(*process).is_some(),
            Kind::Terminal(end) => inside(end.terminal, image.terminals.len()),
            Kind::External(_) | Kind::Path(_) | Kind::Event { .. } | Kind::Timer(_) | Kind::Signal { .. } => true,
            Kind::Inotify { .. } | Kind::Socket(_) => true,
        };
        if !fine {
            return wrong("an open file of something that isn't there".into());
        }
    }
    if image.process_locks.iter().any(|lock| !inside(lock.table, image.tables.len())) {
        return wrong("a lock of no table".into());
    }
    Ok(())
}
