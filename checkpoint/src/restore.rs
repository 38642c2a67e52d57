//! A stub becomes the process of an image.
//!
//! Order matters. The program and directories come while everything may still be opened; threads are made while the stub
//! may still choose their numbers; then each thread takes on its own identity and gives rights up; what those steps reset
//! (dumpable, death signals) follows; clocks start to run at the very last.

mod thread;

use serde_bytes::ByteBuf;
use sys::clone::CloneArguments;
use sys::libc;
use sys::proc::Place;
use sys::ptrace::Seized;
use sys::tape::Tape;

use crate::dump::SIGNAL_SET_BYTES;
use crate::error::{Error, Result};
use crate::filters::{self, Filter};
use crate::image::{LiveProcess, MemoryFields, ProcessImage, SignalAction};
use crate::offer::Clocks;
use crate::stubs::{Stub, Stubs, clone};

const PR_SET_MM_MAP: i32 = 14;
const PR_SET_MDWE: i32 = 65;
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
const BIRTH: std::time::Duration = std::time::Duration::from_secs(5);

/// Everything but what must wait until the process is about to run.
pub(crate) fn process(
    stubs: &mut Stubs,
    image: &ProcessImage,
    live: &LiveProcess,
    frozen_at: Clocks,
    filters: &[Filter],
) -> Result<()> {
    let inside = stubs.inside.clone();
    let stub = stubs.get(image.process)?;
    set_program(stub, live)?;
    set_process(stub, live)?;
    // What is installed now, all threads to come have from the first.
    let common = filters::common(&live.threads);
    if let Some(first) = live.threads.first() {
        for tape in filters::install(filters, &first.filters[..common])? {
            stub.run(&tape, "installing its system call filters")?;
        }
    }
    make_threads(stub, live, &inside.pids)?;
    for thread in &live.threads {
        let now_ns = inside.clocks().monotonic_ns;
        let passed_ns = u64::try_from(now_ns - frozen_at.monotonic_ns).unwrap_or_default();
        for tape in filters::install(filters, &thread.filters[common..])? {
            stub.run_on(thread.thread, &tape, "installing a thread's system call filters")?;
        }
        thread::restore(stub, thread, &inside.calls, (now_ns, passed_ns))?;
    }
    set_after_identity(stub, live)?;
    let here = Place::Process(image.process);
    let write = |file: &str, content: String| {
        inside
            .proc
            .write(here, file, content.as_bytes())
            .map_err(|error| Error::process(image.process, format!("setting its {file}"), error))
    };
    write("oom_score_adj", live.oom_score_adjust.to_string())?;
    write("coredump_filter", format!("{:#x}", live.coredump_filter))?;
    set_limits(stub, live)
}

/// Last, for they might stand in the way of all the rest. The process lowers them itself: it may have another user or group by now, and
/// then only it can without a capability.
fn set_limits(stub: &mut Stub, live: &LiveProcess) -> Result<()> {
    let mut tape = Tape::new();
    for (resource, &(soft, hard)) in (0u32..).zip(&live.limits) {
        let limit = tape.data(&[soft.to_ne_bytes(), hard.to_ne_bytes()].concat());
        tape.require(libc::SYS_prlimit64, &[0.into(), resource.into(), limit.into(), 0.into()]);
    }
    stub.run(&tape, "setting its resource limits")?;
    Ok(())
}

/// Its program and where it is, as long as everything can be opened.
fn set_program(stub: &mut Stub, live: &LiveProcess) -> Result<()> {
    let mut tape = Tape::new();
    let path = tape.string(live.program.as_bytes());
    let flags = libc::O_RDONLY | libc::O_CLOEXEC;
    let opened = tape.require(libc::SYS_openat, &[libc::AT_FDCWD.into(), path.into(), flags.into()]);
    let results = stub.run(&tape, "opening its program")?;
    let program = results.raw(opened);

    let mut tape = Tape::new();
    let auxv = tape.data(&live.memory.auxv);
    let map = mm_map(&live.memory, u32::try_from(program).unwrap_or(u32::MAX));
    let place = tape.data(&map);
    const AUXV_AT: usize = 11 * 8;
    tape.link(place.plus(AUXV_AT), auxv);
    let arguments = [libc::PR_SET_MM.into(), PR_SET_MM_MAP.into(), place.into(), map.len().into(), 0.into()];
    tape.require(libc::SYS_prctl, &arguments);
    tape.require(libc::SYS_close, &[program.into()]);
    if live.root_directory != "/" {
        let root = tape.string(live.root_directory.as_bytes());
        tape.require(libc::SYS_chroot, &[root.into()]);
    }
    // The working directory is known by its path inside the root that the process sees.
    let inner = match live.directory.strip_prefix(live.root_directory.trim_end_matches('/')) {
        Some("") => "/",
        Some(inner) => inner,
        None => &live.directory,
    };
    let directory = tape.string(inner.as_bytes());
    tape.require(libc::SYS_chdir, &[directory.into()]);
    stub.run(&tape, "setting its program and directories")?;
    Ok(())
}

/// `struct prctl_mm_map`, with the auxiliary vector's address left open.
fn mm_map(memory: &MemoryFields, program: u32) -> Vec<u8> {
    let MemoryFields {
        start_code,
        end_code,
        start_data,
        end_data,
        start_brk,
        brk,
        start_stack,
        arg_start,
        arg_end,
        env_start,
        env_end,
        auxv,
    } = memory;
    let words = [
        start_code,
        end_code,
        start_data,
        end_data,
        start_brk,
        brk,
        start_stack,
        arg_start,
        arg_end,
        env_start,
        env_end,
    ];
    let mut bytes: Vec<u8> = words.into_iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&u32::try_from(auxv.len()).unwrap_or_default().to_ne_bytes());
    bytes.extend_from_slice(&program.to_ne_bytes());
    bytes
}

fn set_process(stub: &mut Stub, live: &LiveProcess) -> Result<()> {
    let mut tape = Tape::new();
    tape.require(libc::SYS_umask, &[live.umask.into()]);
    tape.require(libc::SYS_personality, &[live.personality.into()]);
    for (signal, action) in (1i32..).zip(&live.actions) {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        let SignalAction { handler, flags, restorer, mask } = action;
        let bytes: Vec<u8> = [handler, flags, restorer, mask].into_iter().flat_map(|word| word.to_ne_bytes()).collect();
        let place = tape.data(&bytes);
        let set = SIGNAL_SET_BYTES;
        tape.require(libc::SYS_rt_sigaction, &[signal.into(), place.into(), 0.into(), set.into()]);
    }
    let prctl = |tape: &mut Tape, what: i32, value: u64| {
        tape.require(libc::SYS_prctl, &[what.into(), value.into(), 0.into(), 0.into(), 0.into()]);
    };
    prctl(&mut tape, libc::PR_SET_CHILD_SUBREAPER, live.subreaper.into());
    prctl(&mut tape, libc::PR_SET_THP_DISABLE, live.huge_pages_disabled.into());
    // While it has one thread: with more the kernel waits until every processor has switched.
    for command in (0..64).map(|bit| 1u64 << bit).filter(|command| live.memory_barriers & command != 0) {
        tape.require(libc::SYS_membarrier, &[command.into(), 0.into(), 0.into()]);
    }
    stub.run(&tape, "setting its signal handlers")?;
    Ok(())
}

/// All threads but the first, in one go.
fn make_threads(stub: &mut Stub, live: &LiveProcess, pids: &sys::process::PidNamespace) -> Result<()> {
    const SHARED: i32 = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let numbers: Vec<u32> = live.threads.iter().map(|thread| thread.thread).filter(|n| *n != stub.process).collect();
    if numbers.is_empty() {
        return Ok(());
    }
    let process = stub.process;
    let mut tape = Tape::new();
    for &number in &numbers {
        let flags = u64::from(SHARED.unsigned_abs());
        clone(&mut tape, CloneArguments { flags, ..CloneArguments::default() }, number);
    }
    stub.run(&tape, "making its threads")?;
    for tid in stub.leader.take_children() {
        let failed = |error| Error::process(process, "waiting for a new thread", error);
        let number = pids.inside(tid).map_err(failed)?;
        let thread = Seized::born(tid).wait_stop(BIRTH).map_err(failed)?.ok_or(Error::Gone)?;
        stub.threads.insert(number, thread);
    }
    Ok(())
}

/// What changes of identity reset.
fn set_after_identity(stub: &mut Stub, live: &LiveProcess) -> Result<()> {
    let mut tape = Tape::new();
    // 2 is set by the kernel only; 0 is what is meant for a program.
    let dumpable = u32::from(live.dumpable == 1);
    tape.require(libc::SYS_prctl, &[libc::PR_SET_DUMPABLE.into(), dumpable.into(), 0.into(), 0.into(), 0.into()]);
    if live.memory_deny_write_execute != 0 {
        let value = live.memory_deny_write_execute;
        tape.require(libc::SYS_prctl, &[PR_SET_MDWE.into(), value.into(), 0.into(), 0.into(), 0.into()]);
    }
    create_timers(&mut tape, live);
    stub.run(&tape, "making its timers")?;
    Ok(())
}

fn create_timers(tape: &mut Tape, live: &LiveProcess) {
    if live.posix_timers.is_empty() {
        return;
    }
    let restoring = |tape: &mut Tape, on: u64| {
        let arguments = [PR_TIMER_CREATE_RESTORE_IDS.into(), on.into(), 0.into(), 0.into(), 0.into()];
        tape.require(libc::SYS_prctl, &arguments);
    };
    restoring(tape, 1);
    for timer in &live.posix_timers {
        // struct sigevent: value, signal, notify, thread.
        let mut event = timer.value.to_ne_bytes().to_vec();
        event.extend_from_slice(&timer.signal.to_ne_bytes());
        event.extend_from_slice(&timer.notify.to_ne_bytes());
        event.extend_from_slice(&timer.thread.to_ne_bytes());
        event.resize(64, 0);
        let event = tape.data(&event);
        let id = tape.data(&timer.id.to_ne_bytes());
        tape.require(libc::SYS_timer_create, &[timer.clock.into(), event.into(), id.into()]);
    }
    restoring(tape, 0);
}

/// What must wait until the process is about to run: pending signals, running timers.
pub(crate) fn start_clocks(stub: &mut Stub, live: &LiveProcess, frozen_at: Clocks, now: Clocks) -> Result<()> {
    let mut tape = Tape::new();
    // Children that were made and ended during the restore have left a SIGCHLD, which isn't the program's; what was done to
    // terminals, and leaders of sessions that have gone meanwhile, have left others.
    let left = [libc::SIGCHLD, libc::SIGHUP, libc::SIGCONT, libc::SIGWINCH];
    let set = left.iter().fold(0u64, |set, signal| set | 1 << (signal - 1));
    let set = tape.data(&set.to_ne_bytes());
    let at_once = tape.data(&[0; 16]);
    for _ in left {
        tape.syscall(libc::SYS_rt_sigtimedwait, &[set.into(), 0.into(), at_once.into(), SIGNAL_SET_BYTES.into()]);
    }
    queue(&mut tape, stub.process, None, &live.pending);

    let passed_ns = u64::try_from(now.monotonic_ns - frozen_at.monotonic_ns).unwrap_or_default();
    for (which, timer) in (0i32..).zip(&live.interval_timers) {
        let is_wall = which == libc::ITIMER_REAL;
        let left_us = match timer.left_us {
            // It has expired, and would be started again when its signal is taken. That is at most a period away; nothing tells how much less.
            0 if is_wall && timer.interval_us != 0 => timer.interval_us,
            0 => continue,
            left_us => left_us.saturating_sub(if is_wall { passed_ns / 1000 } else { 0 }).max(1),
        };
        let value =
            [timer.interval_us / 1_000_000, timer.interval_us % 1_000_000, left_us / 1_000_000, left_us % 1_000_000];
        let value = tape.data(&value.map(u64::to_ne_bytes).concat());
        tape.syscall(libc::SYS_setitimer, &[which.into(), value.into(), 0.into()]);
    }
    for timer in live.posix_timers.iter().filter(|timer| timer.left_ns != 0) {
        let is_wall = matches!(
            timer.clock,
            libc::CLOCK_REALTIME
                | libc::CLOCK_MONOTONIC
                | libc::CLOCK_BOOTTIME
                | libc::CLOCK_REALTIME_ALARM
                | libc::CLOCK_BOOTTIME_ALARM
                | libc::CLOCK_TAI
        );
        let left_ns = timer.left_ns.saturating_sub(if is_wall { passed_ns } else { 0 }).max(1);
        const SECOND: u64 = 1_000_000_000;
        let value = [timer.interval_ns / SECOND, timer.interval_ns % SECOND, left_ns / SECOND, left_ns % SECOND];
        let value = tape.data(&value.map(u64::to_ne_bytes).concat());
        tape.syscall(libc::SYS_timer_settime, &[timer.id.into(), 0.into(), value.into(), 0.into()]);
    }
    stub.run(&tape, "starting its timers")?;
    for thread in live.threads.iter().filter(|thread| !thread.pending.is_empty()) {
        let mut tape = Tape::new();
        queue(&mut tape, stub.process, Some(thread.thread), &thread.pending);
        stub.run_on(thread.thread, &tape, "queueing a thread's signals")?;
    }
    Ok(())
}

/// Queues pending signals again. The kernel lets only the thread itself queue one with an origin that isn't the queueing
/// program, so those of a process go on the tape of its first thread and those of a thread on its own.
///
/// Past the commit a signal that is lost is better than a job that is: the calls may fail.
fn queue(tape: &mut Tape, process: u32, thread: Option<u32>, pending: &[ByteBuf]) {
    for info in pending {
        let Some(signal) = info.get(..4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes) else {
            continue;
        };
        let info = tape.data(info);
        match thread {
            None => tape.syscall(libc::SYS_rt_sigqueueinfo, &[process.into(), signal.into(), info.into()]),
            Some(thread) => {
                let arguments = [process.into(), thread.into(), signal.into(), info.into()];
                tape.syscall(libc::SYS_rt_tgsigqueueinfo, &arguments)
            }
        };
    }
}

/// Ends a stub as the image's process had ended.
pub(crate) fn end(mut stub: Stub, name: &[u8], status: i32) -> Result<()> {
    let process = stub.process;
    let mut tape = Tape::new();
    let name = tape.string(name);
    tape.require(libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name.into()]);
    let no_core = tape.data(&[0; 16]);
    tape.require(libc::SYS_setrlimit, &[libc::RLIMIT_CORE.into(), no_core.into()]);
    let signal = status & 0x7f;
    if signal != 0 {
        let default = tape.data(&[0; 32]);
        // Fails for SIGKILL and SIGSTOP, whose action is the default anyway.
        let set = SIGNAL_SET_BYTES;
        tape.syscall(libc::SYS_rt_sigaction, &[signal.into(), default.into(), 0.into(), set.into()]);
        stub.run(&tape, "preparing its end")?;
        return stub.leader.die_of(signal).map_err(|error| Error::process(process, "ending it", error));
    }
    stub.run(&tape, "preparing its end")?;
    let mut tape = Tape::new();
    tape.syscall(libc::SYS_exit_group, &[(status >> 8 & 0xff).into()]);
    // The run can't come to its end, since the process has come to its own.
    let _ = tape.run(&mut stub.leader, stub.region);
    stub.leader.forget();
    Ok(())
}
