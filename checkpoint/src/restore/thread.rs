//! A stub's thread becomes the thread of an image.

use sys::libc;
use sys::process::SchedulingAttributes;
use sys::ptrace::{Registers, restart};
use sys::tape::Tape;

use crate::calls::{self, Calls};
use crate::error::{Error, Result};
use crate::image::{Credentials, Scheduling, ThreadImage};
use crate::stubs::Stub;

/// Everything of one thread.
pub(super) fn restore(stub: &mut Stub, image: &ThreadImage, known: &Calls, times: (i64, u64)) -> Result<()> {
    let process = stub.process;
    let region = stub.region;
    let stopped = match stub.threads.get_mut(&image.thread) {
        Some(thread) => thread,
        None => &mut stub.leader,
    };
    let failed = |what: &'static str| move |error: std::io::Error| Error::process(process, what, error);

    set_scheduling(stopped.thread(), &image.scheduling).map_err(failed("setting how a thread is scheduled"))?;
    let mut tape = Tape::new();
    set_own(&mut tape, image);
    set_identity(&mut tape, &image.credentials);
    let prctl = |tape: &mut Tape, what: i32, value: u64| {
        tape.require(libc::SYS_prctl, &[what.into(), value.into(), 0.into(), 0.into(), 0.into()]);
    };
    if image.parent_death_signal != 0 {
        prctl(&mut tape, libc::PR_SET_PDEATHSIG, u64::from(image.parent_death_signal.unsigned_abs()));
    }
    if image.credentials.no_new_privileges {
        prctl(&mut tape, libc::PR_SET_NO_NEW_PRIVS, 1);
    }
    tape.run(stopped, region).map_err(|error| Error::process(process, "setting a thread up", error))?;
    stopped.set_xstate(&image.xstate).map_err(failed("setting vector registers"))?;

    let registers: [u64; 27] = image
        .registers
        .as_slice()
        .try_into()
        .map_err(|_| Error::Image(format!("thread {} has {} registers", image.thread, image.registers.len())))?;
    let mut registers = Registers(registers);
    match &image.interrupted {
        Some(call) => known
            .continue_call(stopped, region, image.thread, call, &mut registers, times)
            .map_err(failed("continuing a call"))?,
        // A call whose deadline is lost: all that can be said of it is that it was interrupted.
        None if registers.result() == restart::BLOCK => calls::finish_with(&mut registers, -i64::from(libc::EINTR)),
        None => {}
    }
    stopped.set_state(registers, image.blocked).map_err(failed("setting registers"))
}

/// What the kernel keeps of a thread at the thread's own word.
fn set_own(tape: &mut Tape, image: &ThreadImage) {
    tape.require(libc::SYS_set_tid_address, &[image.clear_child_tid.into()]);
    let (head, length) = image.robust_list;
    if head != 0 {
        tape.require(libc::SYS_set_robust_list, &[head.into(), length.into()]);
    }
    if let Some(rseq) = image.rseq {
        let arguments = [rseq.address.into(), rseq.size.into(), 0.into(), rseq.signature.into()];
        tape.require(libc::SYS_rseq, &arguments);
    }
    // Whether the thread is on that stack now is no setting.
    const SS_ONSTACK: u32 = 1;
    let (address, flags, size) = image.alternate_stack;
    let flags = u64::from(flags & !SS_ONSTACK);
    let stack = tape.data(&[address, flags, size].map(u64::to_ne_bytes).concat());
    tape.require(libc::SYS_sigaltstack, &[stack.into(), 0.into()]);
    let name = tape.string(&image.name);
    tape.require(libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name.into()]);
    tape.require(libc::SYS_prctl, &[libc::PR_SET_TIMERSLACK.into(), image.timer_slack_ns.into()]);
}

/// Users, groups and capabilities. The raw calls concern one thread only.
fn set_identity(tape: &mut Tape, credentials: &Credentials) {
    let Credentials {
        uids,
        gids,
        groups,
        inheritable,
        permitted,
        effective,
        bounding,
        ambient,
        secure_bits,
        no_new_privileges: _,
    } = credentials;
    let prctl = |tape: &mut Tape, what: i32, value: u64| {
        tape.require(libc::SYS_prctl, &[what.into(), value.into(), 0.into(), 0.into(), 0.into()]);
    };
    // Capabilities are set one by one below, so changes of user must leave them alone.
    const NO_SETUID_FIXUP: u64 = 1 << 2;
    prctl(tape, libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP);
    for capability in 0..64 {
        if bounding >> capability & 1 == 0 {
            // Fails for those that this kernel doesn't know.
            let arguments = [libc::PR_CAPBSET_DROP.into(), u64::into(capability), 0.into(), 0.into(), 0.into()];
            tape.syscall(libc::SYS_prctl, &arguments);
        }
    }
    let list: Vec<u8> = groups.iter().flat_map(|group| group.to_ne_bytes()).collect();
    let list = tape.data(&list);
    tape.require(libc::SYS_setgroups, &[groups.len().into(), list.into()]);
    tape.require(libc::SYS_setresgid, &[gids[0].into(), gids[1].into(), gids[2].into()]);
    tape.syscall(libc::SYS_setfsgid, &[gids[3].into()]);
    tape.require(libc::SYS_setresuid, &[uids[0].into(), uids[1].into(), uids[2].into()]);
    tape.syscall(libc::SYS_setfsuid, &[uids[3].into()]);
    prctl(tape, libc::PR_SET_SECUREBITS, u64::from(*secure_bits));

    // struct __user_cap_header_struct, version 3, and two of __user_cap_data_struct.
    let header = tape.data(&[0x2008_0522u32, 0].map(u32::to_ne_bytes).concat());
    let half = |set: &u64, high: bool| u32::try_from(if high { set >> 32 } else { set & 0xffff_ffff }).unwrap_or(0);
    let mut sets = Vec::new();
    for high in [false, true] {
        for set in [effective, permitted, inheritable] {
            sets.extend_from_slice(&half(set, high).to_ne_bytes());
        }
    }
    let sets = tape.data(&sets);
    tape.require(libc::SYS_capset, &[header.into(), sets.into()]);
    for capability in (0..64u64).filter(|capability| ambient >> capability & 1 == 1) {
        let raise = libc::PR_CAP_AMBIENT_RAISE;
        let arguments = [libc::PR_CAP_AMBIENT.into(), raise.into(), capability.into(), 0.into(), 0.into()];
        tape.require(libc::SYS_prctl, &arguments);
    }
}

fn set_scheduling(thread: sys::Pid, scheduling: &Scheduling) -> std::io::Result<()> {
    let Scheduling { policy, flags, nice, priority, io_priority, affinity } = scheduling;
    if (*policy, *flags, *nice, *priority) != (0, 0, 0, 0) {
        let attributes = SchedulingAttributes {
            policy: *policy,
            flags: *flags,
            nice: *nice,
            priority: *priority,
            ..SchedulingAttributes::default()
        };
        sys::process::set_scheduling(thread, &attributes)?;
    }
    if *io_priority != 0 {
        sys::process::set_io_priority(thread, *io_priority)?;
    }
    if let Some(processors) = affinity
        && let Err(error) = sys::process::set_affinity(thread, processors)
    {
        // This machine may have fewer processors; then all of them are as good.
        tracing::debug!(thread = thread.as_raw(), %error, "a thread isn't bound to processors that aren't here");
    }
    Ok(())
}
