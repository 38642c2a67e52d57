//! A frozen process as an image.
//!
//! What /proc and ptrace tell is read from outside; the rest each thread is asked for with one tape.

mod thread;

use std::os::unix::ffi::OsStrExt;

use serde_bytes::ByteBuf;
use sys::libc;
use sys::proc::{Place, Stat, Timer};
use sys::ptrace::Cause;
use sys::tape::{Address, Region, Results, Slot, Tape};

use crate::error::{Error, Result};
use crate::filters::Filters;
use crate::freeze::Frozen;
use crate::image::{IntervalTimer, LiveProcess, MemoryFields, PosixTimer, ProcessImage, ProcessState, SignalAction};
use crate::sandbox::Inside;
use crate::terminals;

/// Signals are numbered from 1 to this.
pub(crate) const SIGNALS: usize = 64;
/// Bytes of the kernel's `struct sigaction` and of its signal set.
pub(crate) const ACTION_BYTES: usize = 32;
pub(crate) const SIGNAL_SET_BYTES: usize = 8;

/// An ended process.
pub(crate) fn zombie(process: u32, stat: &Stat) -> ProcessImage {
    place(process, stat, ProcessState::Zombie { status: stat.exit_status })
}

fn place(process: u32, stat: &Stat, state: ProcessState) -> ProcessImage {
    ProcessImage {
        process,
        parent: stat.parent,
        group: stat.group,
        session: stat.session,
        terminal: terminals::controlling(stat),
        name: ByteBuf::from(stat.comm.clone()),
        exit_signal: stat.exit_signal,
        state,
    }
}

/// A process that stands still, with a region to run tapes in.
pub(crate) fn process(
    inside: &Inside,
    frozen: &mut Frozen,
    region: Region,
    filters: &mut Filters,
) -> Result<ProcessImage> {
    let number = frozen.process;
    let failed = |what: &'static str| move |error: std::io::Error| Error::process(number, what, error);
    let here = Place::Process(number);
    let stat = inside.proc.stat(here).map_err(failed("reading its stat"))?;
    let status = inside.proc.status(here).map_err(failed("reading its status"))?;
    let timers = inside.proc.timers(number).map_err(failed("reading its timers"))?;
    let link = |file: &'static str| -> Result<String> {
        let target = inside.proc.link(here, file).map_err(failed("reading a link of it"))?;
        String::from_utf8(target.as_os_str().as_bytes().to_vec())
            .map_err(|_| Error::Image(format!("process {number}: the path of its {file} isn't UTF-8")))
    };
    let number_in = |file: &'static str, radix: u32| -> Result<i64> {
        let text = inside.proc.read_text(here, file).map_err(failed("reading a setting of it"))?;
        i64::from_str_radix(text.trim(), radix)
            .map_err(|_| Error::Image(format!("process {number}: {file} is {text:?}")))
    };

    let leader = frozen.leader()?;
    let stopped_by = match leader.cause() {
        Cause::Group(signal) => Some(signal),
        Cause::Interrupted => None,
    };
    let pending = leader.pending_signals(true).map_err(failed("reading its pending signals"))?;
    let mut tape = Tape::new();
    let question = Question::ask(&mut tape, &timers);
    let results = tape.run(leader, region).map_err(|error| Error::process(number, "asking it", error))?;
    let answer = question.answer(&results, &timers);

    let mut threads = Vec::new();
    for (&thread, stopped) in &mut frozen.threads {
        threads.push(thread::thread(inside, number, thread, stopped, region, filters)?);
    }
    // The first is the one that has the process's number.
    threads.sort_by_key(|thread| (thread.thread != number, thread.thread));

    let limits = inside.proc.limits(number).map_err(failed("reading its limits"))?;
    let auxv = inside.proc.read(here, "auxv").map_err(failed("reading its auxiliary vector"))?;
    let live = LiveProcess {
        memory: MemoryFields {
            start_code: stat.start_code,
            end_code: stat.end_code,
            start_data: stat.start_data,
            end_data: stat.end_data,
            start_brk: stat.start_brk,
            brk: answer.brk,
            start_stack: stat.start_stack,
            arg_start: stat.arg_start,
            arg_end: stat.arg_end,
            env_start: stat.env_start,
            env_end: stat.env_end,
            auxv: ByteBuf::from(auxv),
        },
        program: link("exe")?,
        directory: link("cwd")?,
        root_directory: link("root")?,
        umask: status.umask,
        actions: answer.actions,
        pending: pending.into_iter().map(|info| ByteBuf::from(info.to_vec())).collect(),
        interval_timers: answer.interval_timers,
        posix_timers: answer.posix_timers,
        limits,
        stopped_by,
        // Only its parent knows.
        stop_seen: false,
        dumpable: answer.dumpable,
        subreaper: answer.subreaper,
        huge_pages_disabled: answer.huge_pages_disabled,
        memory_deny_write_execute: answer.memory_deny_write_execute,
        memory_barriers: answer.memory_barriers,
        oom_score_adjust: i32::try_from(number_in("oom_score_adj", 10)?).unwrap_or_default(),
        coredump_filter: u32::try_from(number_in("coredump_filter", 16)?).unwrap_or_default(),
        personality: u32::try_from(number_in("personality", 16)?).unwrap_or_default(),
        threads,
    };
    Ok(place(number, &stat, ProcessState::Alive(Box::new(live))))
}

/// What only the process itself knows, on a tape.
struct Question {
    actions: Vec<Address>,
    interval_timers: [Address; 3],
    posix_timers: Vec<Address>,
    brk: Slot,
    dumpable: Slot,
    subreaper: Address,
    huge_pages: Slot,
    deny: Slot,
    barriers: Slot,
}

struct Answer {
    actions: Vec<SignalAction>,
    interval_timers: [IntervalTimer; 3],
    posix_timers: Vec<PosixTimer>,
    brk: u64,
    dumpable: u32,
    subreaper: bool,
    huge_pages_disabled: bool,
    memory_deny_write_execute: u64,
    memory_barriers: u64,
}

const PR_GET_MDWE: i32 = 66;
const MEMBARRIER_CMD_GET_REGISTRATIONS: i32 = 1 << 9;

impl Question {
    fn ask(tape: &mut Tape, timers: &[Timer]) -> Question {
        let actions = (1..=SIGNALS)
            .map(|signal| {
                let room = tape.room(ACTION_BYTES);
                let set = SIGNAL_SET_BYTES;
                tape.require(libc::SYS_rt_sigaction, &[signal.into(), 0.into(), room.into(), set.into()]);
                room
            })
            .collect();
        let interval_timers = [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF].map(|which| {
            let room = tape.room(32);
            tape.require(libc::SYS_getitimer, &[which.into(), room.into()]);
            room
        });
        let posix_timers = timers
            .iter()
            .map(|timer| {
                let room = tape.room(32);
                tape.require(libc::SYS_timer_gettime, &[timer.id.into(), room.into()]);
                room
            })
            .collect();
        let subreaper = tape.room(8);
        tape.require(libc::SYS_prctl, &[libc::PR_GET_CHILD_SUBREAPER.into(), subreaper.into()]);
        Question {
            actions,
            interval_timers,
            posix_timers,
            brk: tape.require(libc::SYS_brk, &[0.into()]),
            dumpable: tape.require(libc::SYS_prctl, &[libc::PR_GET_DUMPABLE.into()]),
            subreaper,
            huge_pages: tape.require(libc::SYS_prctl, &[libc::PR_GET_THP_DISABLE.into()]),
            deny: tape.syscall(libc::SYS_prctl, &[PR_GET_MDWE.into()]),
            // Fails in a kernel that was built without membarrier(2).
            barriers: tape
                .syscall(libc::SYS_membarrier, &[MEMBARRIER_CMD_GET_REGISTRATIONS.into(), 0.into(), 0.into()]),
        }
    }

    fn answer(&self, results: &Results, timers: &[Timer]) -> Answer {
        let word = |address: Address, index: usize| results.word(address.plus(index * 8));
        let value = |slot: Slot| results.get(slot).unwrap_or_default();
        let actions = self.actions.iter().map(|&at| SignalAction {
            handler: word(at, 0),
            flags: word(at, 1),
            restorer: word(at, 2),
            mask: word(at, 3),
        });
        let interval_timers = self.interval_timers.map(|at| IntervalTimer {
            interval_us: word(at, 0) * 1_000_000 + word(at, 1),
            left_us: word(at, 2) * 1_000_000 + word(at, 3),
        });
        let posix_timers = timers.iter().zip(&self.posix_timers).map(|(timer, &at)| PosixTimer {
            id: timer.id,
            clock: timer.clock,
            notify: timer.notify,
            signal: timer.signal,
            value: timer.value,
            thread: timer.target,
            interval_ns: word(at, 0) * 1_000_000_000 + word(at, 1),
            left_ns: word(at, 2) * 1_000_000_000 + word(at, 3),
        });
        Answer {
            actions: actions.collect(),
            interval_timers,
            posix_timers: posix_timers.collect(),
            brk: value(self.brk),
            dumpable: u32::try_from(value(self.dumpable)).unwrap_or_default(),
            subreaper: word(self.subreaper, 0) & 0xffff_ffff != 0,
            huge_pages_disabled: value(self.huge_pages) != 0,
            memory_deny_write_execute: value(self.deny),
            memory_barriers: value(self.barriers),
        }
    }
}
