//! Fills the descriptor table of a stub.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use sys::fds::sockets::{self, DESCRIPTORS_IN_MESSAGE};
use sys::tape::{Address, Results, Tape};
use sys::{fds, libc};

use super::super::Tapes;
use super::super::image::Kind;
use super::{Externals, Restorer, early, make};
use crate::error::{Error, Result};
use crate::external::ExternalKey;

/// Gaps in the numbers up to this many are filled with descriptors that are closed again.
const SMALL_GAP: RawFd = 64;

/// A way for descriptors into a stub.
#[derive(Debug)]
pub(super) struct Channel {
    /// The stub.
    pub process: u32,
    /// Our end.
    own: OwnedFd,
    /// Its number in the stub.
    number: RawFd,
}

/// A message on its way, to be received on a tape.
struct Message {
    at: Address,
    control: Address,
    count: usize,
}

impl Channel {
    /// Opens one. The other end has a number that none of the stub's descriptors will need.
    /// Everything else in the stub's table is closed, but for the numbers that are `kept`.
    fn open(
        process: u32,
        pid: sys::Pid,
        occupied: &[RawFd],
        kept: &BTreeSet<RawFd>,
        tapes: &mut dyn Tapes,
    ) -> io::Result<Channel> {
        let mut tape = Tape::new();
        let limits = tape.room(16);
        tape.require(libc::SYS_prlimit64, &[0.into(), u64::from(libc::RLIMIT_NOFILE).into(), 0.into(), limits.into()]);
        let ends = tape.room(8);
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        tape.require(libc::SYS_socketpair, &[libc::AF_UNIX.into(), kind.into(), 0.into(), ends.into()]);
        let results = tapes.run(process, &tape)?;
        let numbers = results.word(ends).to_ne_bytes();
        let half = |at: usize| i32::from_ne_bytes([numbers[at], numbers[at + 1], numbers[at + 2], numbers[at + 3]]);
        let (here, there) = (half(0), half(4));
        let hard = results.word(limits.plus(8));

        let stub = sys::process::pidfd_open(pid)?;
        let own = sys::process::pidfd_getfd(stub.as_fd(), here)?;
        sockets::set_int_option(own.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 64i32 << 20)?;

        let most = RawFd::try_from(hard).unwrap_or(RawFd::MAX);
        let last = occupied.last().copied().unwrap_or(-1);
        // Above all others when the limit allows, otherwise the highest number that is free.
        let number = if last < most - 1 {
            (last + 1).max(there.max(here) + 1).min(most - 1)
        } else {
            (0..most)
                .rev()
                .find(|number| occupied.binary_search(number).is_err())
                .ok_or_else(|| io::Error::other("the process uses every descriptor that its limit allows"))?
        };
        let mut tape = Tape::new();
        // The soft limit is set to what it was with the others, later.
        let raised = tape.data(&[hard.to_ne_bytes(), hard.to_ne_bytes()].concat());
        tape.require(libc::SYS_prlimit64, &[0.into(), u64::from(libc::RLIMIT_NOFILE).into(), raised.into(), 0.into()]);
        if number != there {
            tape.require(libc::SYS_dup3, &[there.into(), number.into(), libc::O_CLOEXEC.into()]);
        }
        let mut left: Vec<RawFd> = kept.iter().copied().chain([number]).collect();
        left.sort_unstable();
        let mut from = 0;
        for number in left {
            if from < number {
                tape.require(libc::SYS_close_range, &[from.into(), (number - 1).into(), 0.into()]);
            }
            from = number + 1;
        }
        tape.require(libc::SYS_close_range, &[from.into(), u32::MAX.into(), 0.into()]);
        tapes.run(process, &tape)?;
        Ok(Channel { process, own, number })
    }

    /// Sends descriptors and puts their receipt on a tape.
    fn send(&self, descriptors: &[RawFd], close_on_exec: bool, tape: &mut Tape) -> io::Result<Message> {
        sockets::send_with_descriptors(self.own.as_fd(), b"d", descriptors)?;
        let room = sockets::rights_message_bytes(descriptors.len());
        let control = tape.room(room);
        let byte = tape.room(1);
        // struct iovec.
        let part = tape.data(&[0u64.to_ne_bytes(), 1u64.to_ne_bytes()].concat());
        tape.link(part, byte);
        // struct msghdr: name, its length, iov, iovlen, control, controllen, flags.
        let words = [0u64, 0, 0, 1, 0, room as u64, 0];
        let header = tape.data(&words.map(u64::to_ne_bytes).concat());
        tape.link(header.plus(16), part);
        tape.link(header.plus(32), control);
        let flags = libc::MSG_DONTWAIT | if close_on_exec { libc::MSG_CMSG_CLOEXEC } else { 0 };
        tape.require(libc::SYS_recvmsg, &[self.number.into(), header.into(), flags.into()]);
        Ok(Message { at: header, control, count: descriptors.len() })
    }

    /// Puts one descriptor into the stub; its number there.
    pub(super) fn import(&self, descriptor: &OwnedFd, tapes: &mut dyn Tapes) -> io::Result<RawFd> {
        let mut tape = Tape::new();
        let message = self.send(&[descriptor.as_raw_fd()], true, &mut tape)?;
        let results = tapes.run(self.process, &tape)?;
        message.numbers(&results)?.first().copied().ok_or_else(|| io::Error::other("no descriptor came"))
    }

    /// Closes the stub's end.
    pub(super) fn close(&self, tapes: &mut dyn Tapes) -> Result<()> {
        let mut tape = Tape::new();
        tape.require(libc::SYS_close, &[self.number.into()]);
        tapes.run(self.process, &tape).map_err(|error| failed(self.process, error))?;
        Ok(())
    }
}

impl Message {
    /// The numbers that its descriptors got.
    fn numbers(&self, results: &Results) -> io::Result<Vec<RawFd>> {
        let flags = results.data(self.at.plus(48), 4);
        let truncated = flags.first().is_none_or(|low| i32::from(*low) & libc::MSG_CTRUNC != 0);
        let body = results.data(self.control.plus(16), self.count * 4);
        if truncated || body.len() != self.count * 4 {
            return Err(io::Error::other("descriptors were lost on their way into a process; is its limit too low?"));
        }
        Ok(body.chunks_exact(4).map(|bytes| i32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect())
    }
}

fn failed(process: u32, error: io::Error) -> Error {
    Error::process(process, "placing its descriptors", error)
}

/// What is on its way to one table.
struct Filling<'a> {
    channel: &'a Channel,
    tape: Tape,
    messages: Vec<(Message, Vec<RawFd>)>,
    /// Descriptors of the message being gathered, with their numbers there and whether they are to be close-on-exec.
    gathered: Vec<(RawFd, RawFd, bool)>,
}

impl Filling<'_> {
    /// Sends what was gathered. Afterwards the descriptors can be closed here.
    fn flush(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let gathered = std::mem::take(&mut self.gathered);
        let descriptors: Vec<RawFd> = gathered.iter().map(|(descriptor, ..)| *descriptor).collect();
        // What most of them want comes with the message, the others are changed one by one.
        let marked = gathered.iter().filter(|(.., close_on_exec)| *close_on_exec).count();
        let mostly = marked * 2 > gathered.len();
        let message = self.channel.send(&descriptors, mostly, &mut self.tape)?;
        for &(_, number, close_on_exec) in gathered.iter().filter(|(.., close_on_exec)| *close_on_exec != mostly) {
            let flag = if close_on_exec { libc::FD_CLOEXEC } else { 0 };
            self.tape.require(libc::SYS_fcntl, &[number.into(), libc::F_SETFD.into(), flag.into()]);
        }
        self.messages.push((message, gathered.iter().map(|(_, number, _)| *number).collect()));
        Ok(())
    }
}

/// Fills one table. `uses` counts down how often each file is still needed; what isn't is closed here.
pub(super) fn place(
    restorer: &mut Restorer,
    index: usize,
    uses: &mut [u32],
    tapes: &mut dyn Tapes,
    externals: &mut Externals<'_>,
) -> Result<Channel> {
    let slots = restorer.image.tables[index].slots.clone();
    let process = restorer.image.tables[index].processes.first().copied().unwrap_or_default();
    let pid = restorer.processes.iter().find(|candidate| candidate.process == process).map(|candidate| candidate.pid);
    let pid = pid.ok_or_else(|| Error::Image(format!("process {process} has no stub")))?;
    let failed = |error| failed(process, error);
    let occupied: Vec<RawFd> = slots.iter().map(|slot| slot.number).collect();
    let mut settings = Tape::new();
    let kept = early::kept(restorer, process, &slots, &mut settings);
    let channel = Channel::open(process, pid, &occupied, &kept, tapes).map_err(failed)?;
    if !settings.is_empty() {
        tapes.run(process, &settings).map_err(failed)?;
    }
    let filler = fds::events::eventfd(0, false).map_err(failed)?;

    let mut filling = Filling { channel: &channel, tape: Tape::new(), messages: Vec::new(), gathered: Vec::new() };
    let mut to_close: Vec<(RawFd, RawFd)> = Vec::new();
    // Files whose descriptor here can go once the message has been sent.
    let mut sent: Vec<u32> = Vec::new();
    let mut next: RawFd = 0;
    // Numbers after a large gap: received in the gap and moved.
    let mut moves: Vec<(RawFd, RawFd, bool)> = Vec::new();
    let skip_taken = |next: &mut RawFd| {
        while *next == channel.number || kept.contains(next) {
            *next += 1;
        }
    };
    let mut slots = slots.into_iter().filter(|slot| !kept.contains(&slot.number)).peekable();
    while let Some(slot) = slots.next() {
        let descriptor = fetch(restorer, slot.file as usize, externals)?;
        skip_taken(&mut next);
        if moves.is_empty() && slot.number - next <= SMALL_GAP {
            while next < slot.number {
                filling.gathered.push((filler.as_raw_fd(), next, true));
                to_close.push((next, next));
                next += 1;
                skip_taken(&mut next);
                if filling.gathered.len() == DESCRIPTORS_IN_MESSAGE {
                    filling.flush().map_err(failed)?;
                }
            }
            filling.gathered.push((descriptor, slot.number, slot.close_on_exec));
            next = slot.number + 1;
        } else {
            let mut lowest = moves.last().map_or(next, |(number, ..)| number + 1);
            skip_taken(&mut lowest);
            if moves.is_empty() {
                filling.flush().map_err(failed)?;
            }
            filling.gathered.push((descriptor, lowest, true));
            moves.push((lowest, slot.number, slot.close_on_exec));
        }
        sent.push(slot.file);
        // A group of moves must end before it reaches its own targets.
        let group_is_full = moves.first().is_some_and(|(_, target, _)| {
            let mut reached = moves.last().map_or(0, |(number, ..)| number + 1);
            skip_taken(&mut reached);
            reached + 1 >= *target
        });
        if filling.gathered.len() == DESCRIPTORS_IN_MESSAGE || group_is_full || slots.peek().is_none() {
            filling.flush().map_err(failed)?;
            for (number, target, close_on_exec) in moves.drain(..) {
                let flags = if close_on_exec { libc::O_CLOEXEC } else { 0 };
                filling.tape.require(libc::SYS_dup3, &[number.into(), target.into(), flags.into()]);
                filling.tape.require(libc::SYS_close, &[number.into()]);
            }
            for file in sent.drain(..) {
                release(restorer, file as usize, uses);
            }
        }
    }
    let Filling { mut tape, messages, .. } = filling;
    for (first, last) in join(to_close) {
        tape.require(libc::SYS_close_range, &[first.into(), last.into(), 0.into()]);
    }
    let results = tapes.run(process, &tape).map_err(failed)?;
    for (message, expected) in messages {
        if message.numbers(&results).map_err(failed)? != expected {
            return Err(failed(io::Error::other("descriptors got other numbers than expected")));
        }
    }
    Ok(channel)
}

/// Adjacent ranges as one.
fn join(ranges: Vec<(RawFd, RawFd)>) -> Vec<(RawFd, RawFd)> {
    let mut joined: Vec<(RawFd, RawFd)> = Vec::new();
    for (first, last) in ranges {
        match joined.last_mut() {
            Some((_, end)) if *end + 1 == first => *end = last,
            _ => joined.push((first, last)),
        }
    }
    joined
}

/// Our descriptor of a file, fetched from the caller when it is one of the caller's.
pub(super) fn fetch(restorer: &mut Restorer, index: usize, externals: &mut Externals<'_>) -> Result<RawFd> {
    if let Some(fd) = &restorer.files[index] {
        return Ok(fd.as_raw_fd());
    }
    let Kind::External(key) = restorer.image.files[index].kind else {
        return Err(Error::Image("an open file is needed that wasn't made".into()));
    };
    let fd = take_over(restorer, index, key, externals)
        .map_err(|error| Error::system(format!("taking over {key:?}"), error))?;
    make::finish(restorer, &restorer.image.files[index], &fd)
        .map_err(|error| Error::system(format!("setting the flags of {key:?}"), error))?;
    let number = fd.as_raw_fd();
    restorer.files[index] = Some(fd);
    Ok(number)
}

/// A descriptor of the caller's. The caller is asked for a stream once, and gives one open file description; whatever else the job has of the
/// same stream, or with another access mode, is opened from that.
fn take_over(
    restorer: &mut Restorer,
    index: usize,
    key: ExternalKey,
    externals: &mut Externals<'_>,
) -> io::Result<OwnedFd> {
    if matches!(key, ExternalKey::Socket(_)) {
        return externals(key);
    }
    let mode = restorer.image.files[index].flags & libc::O_ACCMODE;
    // A pipe whose other end is closed must not be waited for; the status flags are set to what they were in any case.
    let again = |end: &OwnedFd| fds::reopen(end.as_fd(), mode | libc::O_NONBLOCK);
    if let Some(end) = restorer.streams.get(&key) {
        return again(end);
    }
    let end = externals(key)?;
    let fd = if fds::status_flags(end.as_fd())? & libc::O_ACCMODE == mode { end.try_clone()? } else { again(&end)? };
    restorer.streams.insert(key, end);
    Ok(fd)
}

fn release(restorer: &mut Restorer, index: usize, uses: &mut [u32]) {
    uses[index] = uses[index].saturating_sub(1);
    if uses[index] == 0 {
        restorer.files[index] = None;
    }
}
