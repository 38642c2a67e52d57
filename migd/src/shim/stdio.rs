//! The job's standard streams: three pipes, the output log behind two of them, and a buffer before the third.
//!
//! One thread (the pump) moves bytes. Everything it touches is behind one lock, so that a move can take the lock, empty
//! the pipes of a frozen job into the log and park the pump: from then on no byte moves until the job runs again,
//! here or elsewhere.
//!
//! Output is read as long as nobody who is attached in the foreground would lose some of it to the log's rotation;
//! otherwise the pipes fill and the job waits, as it would at a terminal that was stopped.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::stat::{Mode, fstat};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::output::{Log, MAX_PIECE};
use crate::api::{Stream, unix_ms};

/// Bytes of standard input that are kept for a job that does not read them yet.
const INPUT_BYTES: usize = 64 << 10;
/// Reads of one pipe in a row before the others get their turn.
const READS_IN_A_ROW: usize = 16;

/// What of the standard streams goes with the job; the log goes beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdioImage {
    /// Bytes of output so far.
    output_offset: u64,
    /// Bytes of input accepted so far.
    input_accepted: u64,
    /// Of these, what the job has not read.
    #[serde(with = "serde_bytes")]
    input_pending: Vec<u8>,
    /// Whether the input ends after that.
    input_ended: bool,
    /// Whether the job has closed its output or its errors.
    closed: [bool; 2],
}

/// The shim's side of the job's standard streams.
#[derive(Debug)]
pub struct Stdio {
    state: Mutex<State>,
    wake: EventFd,
    output_offset: watch::Sender<u64>,
    input_accepted: watch::Sender<u64>,
    path: PathBuf,
    inodes: [u64; 3],
}

#[derive(Debug)]
struct State {
    log: Log,
    outputs: [Option<Arc<OwnedFd>>; 2],
    input: Option<Arc<OwnedFd>>,
    buffer: VecDeque<u8>,
    input_accepted: u64,
    input_ended: bool,
    parked: bool,
    finished: bool,
    /// Where the foreground readers are, by their number.
    readers: BTreeMap<u64, u64>,
    next_reader: u64,
}

/// The program's ends, in the order of their numbers.
pub type ProgramEnds = [OwnedFd; 3];

impl Stdio {
    /// New pipes and an empty log at `path`.
    ///
    /// # Errors
    /// As pipe(2) and open(2).
    pub fn create(path: &Path) -> io::Result<(Arc<Stdio>, ProgramEnds)> {
        Stdio::with_log(Log::create(path, 0)?, path, false)
    }

    /// New pipes for a job that comes from another node, parked. `log` holds what came of its output.
    ///
    /// # Errors
    /// As pipe(2).
    pub fn restore(mut log: Log, path: &Path, image: &StdioImage) -> io::Result<(Arc<Stdio>, ProgramEnds)> {
        log.skip_to(image.output_offset);
        let (stdio, ends) = Stdio::with_log(log, path, true)?;
        {
            let mut state = stdio.lock();
            state.buffer.extend(&image.input_pending);
            state.input_accepted = image.input_accepted;
            state.input_ended = image.input_ended;
            for (output, closed) in state.outputs.iter_mut().zip(image.closed) {
                if closed {
                    *output = None;
                }
            }
            // The job may look before the pump runs: what it could have read must be readable.
            state.feed_input();
            stdio.input_accepted.send_replace(image.input_accepted);
        }
        Ok((stdio, ends))
    }

    fn with_log(log: Log, path: &Path, parked: bool) -> io::Result<(Arc<Stdio>, ProgramEnds)> {
        let (input_program, input) = pipe()?;
        let (output, output_program) = pipe()?;
        let (error, error_program) = pipe()?;
        for end in [&input, &output, &error] {
            fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        let inodes = [fstat(&input)?.st_ino, fstat(&output)?.st_ino, fstat(&error)?.st_ino];
        let (output_offset, _) = watch::channel(log.next_offset());
        let (input_accepted, _) = watch::channel(0);
        let state = State {
            log,
            outputs: [Some(Arc::new(output)), Some(Arc::new(error))],
            input: Some(Arc::new(input)),
            buffer: VecDeque::new(),
            input_accepted: 0,
            input_ended: false,
            parked,
            finished: false,
            readers: BTreeMap::new(),
            next_reader: 0,
        };
        let stdio = Arc::new(Stdio {
            state: Mutex::new(state),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            output_offset,
            input_accepted,
            path: path.to_owned(),
            inodes,
        });
        let pump = Arc::clone(&stdio);
        std::thread::Builder::new().name("stdio".into()).spawn(move || pump.run())?;
        Ok((stdio, [input_program, output_program, error_program]))
    }

    /// Which of the job's standard streams a pipe is.
    pub fn stream_of(&self, inode: u64) -> Option<u8> {
        self.inodes.iter().position(|mine| *mine == inode).and_then(|index| u8::try_from(index).ok())
    }

    /// Where the log is.
    pub fn log_path(&self) -> &Path {
        &self.path
    }

    /// Bytes of output so far, and whenever they get more.
    pub fn output_offset(&self) -> watch::Receiver<u64> {
        self.output_offset.subscribe()
    }

    /// Bytes of input accepted so far; also wakes when there is room for more.
    pub fn input_accepted(&self) -> watch::Receiver<u64> {
        self.input_accepted.subscribe()
    }

    /// Takes input that begins at `offset`, as far as there is room, and says how many bytes are accepted in all;
    /// what was accepted before is skipped. None are accepted while the job is on its way.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] when bytes before `offset` are missing.
    pub fn accept_input(&self, offset: u64, bytes: &[u8]) -> io::Result<u64> {
        let mut state = self.lock();
        let Some(skip) = state.input_accepted.checked_sub(offset) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a part of the standard input is missing"));
        };
        let new = bytes.get(usize::try_from(skip).unwrap_or(usize::MAX)..).unwrap_or_default();
        let room = INPUT_BYTES.saturating_sub(state.buffer.len());
        let taken = if state.parked { 0 } else { new.len().min(room) };
        if !state.input_ended {
            state.buffer.extend(&new[..taken]);
        }
        state.input_accepted += taken as u64;
        let accepted = state.input_accepted;
        drop(state);
        if taken > 0 {
            self.input_accepted.send_replace(accepted);
            self.wake();
        }
        Ok(accepted)
    }

    /// The input ends after what was accepted. `false` while the job is on its way: say it again there.
    pub fn end_input(&self) -> bool {
        let mut state = self.lock();
        if state.parked {
            return false;
        }
        state.input_ended = true;
        drop(state);
        self.wake();
        true
    }

    /// A reader in the foreground, which must not lose output to a rotation.
    pub fn hold(self: &Arc<Stdio>, offset: u64) -> Hold {
        let mut state = self.lock();
        let number = state.next_reader;
        state.next_reader += 1;
        state.readers.insert(number, offset);
        Hold { stdio: Arc::clone(self), number }
    }

    /// Empties the pipes of a frozen job into the log and stops the pump.
    ///
    /// # Errors
    /// When what is left in the input pipe can't be read.
    pub fn freeze(&self) -> io::Result<StdioImage> {
        let mut state = self.lock();
        state.parked = true;
        state.drain_outputs();
        let mut input_pending = match &state.input {
            Some(input) => peek_pipe(input)?,
            None => Vec::new(),
        };
        input_pending.extend(&state.buffer);
        let image = StdioImage {
            output_offset: state.log.next_offset(),
            input_accepted: state.input_accepted,
            input_pending,
            input_ended: state.input_ended,
            closed: [state.outputs[0].is_none(), state.outputs[1].is_none()],
        };
        drop(state);
        self.publish();
        Ok(image)
    }

    /// The job runs: after a move that was given up, or after [`Stdio::restore`].
    pub fn resume(&self) {
        self.lock().parked = false;
        self.publish();
        self.wake();
    }

    /// The job has ended: the last output is in the log when this returns.
    pub fn finish(&self) {
        let mut state = self.lock();
        state.drain_outputs();
        state.finished = true;
        drop(state);
        self.publish();
        self.wake();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is complete before anything in it could panic.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            // Full means that it is readable already.
            tracing::debug!(%error, "the pump was not woken");
        }
    }

    fn publish(&self) {
        let state = self.lock();
        let (offset, accepted) = (state.log.next_offset(), state.input_accepted);
        drop(state);
        self.output_offset.send_if_modified(|value| std::mem::replace(value, offset) != offset);
        // Also sent when only room was made.
        self.input_accepted.send_replace(accepted);
    }

    /// The pump.
    fn run(&self) {
        loop {
            let state = self.lock();
            if state.finished {
                return;
            }
            let mut watched: Vec<(Arc<OwnedFd>, PollFlags)> = Vec::with_capacity(3);
            if !state.parked {
                if !state.must_wait_for_readers() {
                    let outputs = state.outputs.iter().flatten();
                    watched.extend(outputs.map(|output| (Arc::clone(output), PollFlags::POLLIN)));
                }
                if !state.buffer.is_empty() {
                    watched.extend(state.input.iter().map(|input| (Arc::clone(input), PollFlags::POLLOUT)));
                }
            }
            drop(state);
            let mut polled = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
            polled.extend(watched.iter().map(|(fd, flags)| PollFd::new(fd.as_fd(), *flags)));
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the job's output can't be read any more");
                    return;
                }
            }
            // Nothing to be read is as good: the next round looks at everything anyway.
            let _ = self.wake.read();
            let mut state = self.lock();
            if !state.parked && !state.finished {
                for index in 0..2 {
                    for _ in 0..READS_IN_A_ROW {
                        if state.must_wait_for_readers() || !state.read_output(index) {
                            break;
                        }
                    }
                }
                state.feed_input();
            }
            drop(state);
            self.publish();
        }
    }
}

impl State {
    fn must_wait_for_readers(&self) -> bool {
        self.log.would_rotate(MAX_PIECE) && self.readers.values().any(|at| *at < self.log.kept_by_rotation())
    }

    fn drain_outputs(&mut self) {
        while self.read_output(0) {}
        while self.read_output(1) {}
    }

    /// Whether something was read.
    fn read_output(&mut self, index: usize) -> bool {
        let Some(pipe) = &self.outputs[index] else { return false };
        let mut buffer = vec![0; MAX_PIECE];
        match nix::unistd::read(pipe, &mut buffer) {
            Ok(0) => {
                self.outputs[index] = None;
                false
            }
            Ok(count) => {
                let stream = if index == 0 { Stream::Out } else { Stream::Err };
                if let Err(error) = self.log.append(stream, unix_ms(), &buffer[..count]) {
                    tracing::error!(%error, count, "output of the job was lost: the log can't be written");
                }
                true
            }
            Err(Errno::EINTR) => true,
            Err(Errno::EAGAIN) => false,
            Err(error) => {
                tracing::error!(%error, "an output pipe can't be read");
                self.outputs[index] = None;
                false
            }
        }
    }

    fn feed_input(&mut self) {
        while let Some(input) = &self.input {
            if self.buffer.is_empty() {
                if self.input_ended {
                    self.input = None;
                }
                return;
            }
            let (bytes, _) = self.buffer.as_slices();
            match nix::unistd::write(input, bytes) {
                Ok(count) => drop(self.buffer.drain(..count)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(error) => {
                    if error != Errno::EPIPE {
                        tracing::error!(%error, "the job's input can't be written");
                    }
                    self.input = None;
                    self.buffer.clear();
                }
            }
        }
        self.buffer.clear();
    }
}

/// Keeps the log from rotating away what a foreground reader has not read.
#[derive(Debug)]
pub struct Hold {
    stdio: Arc<Stdio>,
    number: u64,
}

impl Hold {
    /// The reader has everything before `offset`.
    pub fn advance(&self, offset: u64) {
        let mut state = self.stdio.lock();
        let waited = state.must_wait_for_readers();
        state.readers.insert(self.number, offset);
        let waits = state.must_wait_for_readers();
        drop(state);
        if waited && !waits {
            self.stdio.wake();
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.stdio.lock().readers.remove(&self.number);
        self.stdio.wake();
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(OFlag::O_CLOEXEC)?)
}

/// What waits in the pipe behind its writing end, without taking it out: should the move be given up, the job finds it.
fn peek_pipe(writing_end: &OwnedFd) -> io::Result<Vec<u8>> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", writing_end.as_raw_fd());
    let reading_end = open(path.as_str(), OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())?;
    let capacity = fcntl(&reading_end, FcntlArg::F_GETPIPE_SZ)?;
    let (copy, copy_writing) = pipe()?;
    fcntl(&copy_writing, FcntlArg::F_SETPIPE_SZ(capacity))?;
    let length = usize::try_from(capacity).unwrap_or(usize::MAX);
    let flags = nix::fcntl::SpliceFFlags::SPLICE_F_NONBLOCK;
    let count = match nix::fcntl::tee(&reading_end, &copy_writing, length, flags) {
        Ok(count) => count,
        Err(Errno::EAGAIN) => 0,
        Err(error) => return Err(error.into()),
    };
    drop(copy_writing);
    let mut bytes = Vec::with_capacity(count);
    io::Read::read_to_end(&mut std::fs::File::from(copy), &mut bytes)?;
    Ok(bytes)
}
