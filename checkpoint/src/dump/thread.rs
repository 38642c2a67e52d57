//! A frozen thread as an image.

use serde_bytes::ByteBuf;
use sys::libc;
use sys::proc::Place;
use sys::ptrace::Stopped;
use sys::tape::{Region, Tape};

use crate::error::{Error, Result};
use crate::filters::Filters;
use crate::image::{Credentials, Rseq, Scheduling, ThreadImage};
use crate::sandbox::Inside;

const PR_GET_TID_ADDRESS: i32 = 40;

/// A thread that stands still.
pub(super) fn thread(
    inside: &Inside,
    process: u32,
    thread: u32,
    stopped: &mut Stopped,
    region: Region,
    filters: &mut Filters,
) -> Result<ThreadImage> {
    let failed = |what: &'static str| move |error: std::io::Error| Error::process(process, what, error);
    let here = Place::Thread(process, thread);
    let tid = stopped.thread();
    let registers = stopped.registers().map_err(failed("reading registers"))?;
    let blocked = stopped.signal_mask().map_err(failed("reading a signal mask"))?;
    let pending = stopped.pending_signals(false).map_err(failed("reading pending signals"))?;
    let rseq = stopped.rseq().map_err(failed("reading its restartable sequences"))?;
    let xstate = stopped.xstate().map_err(failed("reading vector registers"))?;
    let interrupted = inside.calls.interrupted(thread, &registers, inside.clocks().monotonic_ns);

    let mut tape = Tape::new();
    let stack = tape.room(24);
    tape.require(libc::SYS_sigaltstack, &[0.into(), stack.into()]);
    let tid_address = tape.room(8);
    tape.require(libc::SYS_prctl, &[PR_GET_TID_ADDRESS.into(), tid_address.into()]);
    let death_signal = tape.room(8);
    tape.require(libc::SYS_prctl, &[libc::PR_GET_PDEATHSIG.into(), death_signal.into()]);
    let slack = tape.require(libc::SYS_prctl, &[libc::PR_GET_TIMERSLACK.into()]);
    let secure_bits = tape.require(libc::SYS_prctl, &[libc::PR_GET_SECUREBITS.into()]);
    let results = tape.run(stopped, region).map_err(|error| Error::process(process, "asking a thread", error))?;
    let low = |word: u64| u32::try_from(word & 0xffff_ffff).unwrap_or_default();

    let status = inside.proc.status(here).map_err(failed("reading a thread's status"))?;
    let name = inside.proc.read(here, "comm").map_err(failed("reading a thread's name"))?;
    let name = name.strip_suffix(b"\n").unwrap_or(&name).to_vec();
    let attributes = sys::process::scheduling(tid).map_err(failed("reading how it is scheduled"))?;
    let affinity = sys::process::affinity(tid).map_err(failed("reading its processors"))?;
    Ok(ThreadImage {
        thread,
        name: ByteBuf::from(name),
        registers: registers.0.to_vec(),
        xstate: ByteBuf::from(xstate),
        interrupted,
        blocked,
        pending: pending.into_iter().map(|info| ByteBuf::from(info.to_vec())).collect(),
        alternate_stack: (results.word(stack), low(results.word(stack.plus(8))), results.word(stack.plus(16))),
        rseq: rseq.map(|rseq| Rseq { address: rseq.address, size: rseq.size, signature: rseq.signature }),
        robust_list: sys::process::robust_list(tid).map_err(failed("reading its robust futexes"))?,
        clear_child_tid: results.word(tid_address),
        credentials: Credentials {
            uids: status.uids,
            gids: status.gids,
            groups: status.groups,
            inheritable: status.inheritable,
            permitted: status.permitted,
            effective: status.effective,
            bounding: status.bounding,
            ambient: status.ambient,
            secure_bits: u32::try_from(results.get(secure_bits).unwrap_or_default()).unwrap_or_default(),
            no_new_privileges: status.no_new_privileges,
        },
        scheduling: Scheduling {
            policy: attributes.policy,
            flags: attributes.flags,
            nice: attributes.nice,
            priority: attributes.priority,
            io_priority: sys::process::io_priority(tid).map_err(failed("reading its I/O priority"))?,
            affinity: restricted(affinity),
        },
        parent_death_signal: low(results.word(death_signal)).cast_signed(),
        timer_slack_ns: results.get(slack).unwrap_or_default(),
        filters: filters.of(stopped, status.seccomp_filters).map_err(failed("reading its system call filters"))?,
    })
}

/// The processors of a thread, unless they are all that this program may use as well.
fn restricted(processors: Vec<u32>) -> Option<Vec<u32>> {
    let own = sys::process::affinity(sys::process::MYSELF).unwrap_or_default();
    (processors != own).then_some(processors)
}
