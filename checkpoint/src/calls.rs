//! System calls whose deadline only the kernel knows.
//!
//! nanosleep, poll and futex waits that are interrupted without a handler go on by restart_syscall(2), which finds what to
//! do and until when in the kernel's memory of the thread. Nobody else can read that memory, and after the first restart
//! not even the call's number shows. So whenever a thread is stopped in such a call for the first time, the call and its
//! deadline are noted, and at the target each thread makes the call again with the time that is left.
//!
//! nanosleep writes the time left to the program's memory if it was given an address for it. For the others the time
//! between the call and the first stop isn't known, and counts again: too late is allowed, too early isn't.
//!
//! A program with a system call filter of its own may have forbidden restart_syscall, which it never makes itself, and be killed for
//! it. So there the call is made again as it was, and its time begins anew.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sys::libc;
use sys::ptrace::{Register, Registers, Stopped, restart};
use sys::tape::Region;
use sys::vm::{self, Remote};

use crate::image::InterruptedCall;

const SECOND_NS: u64 = 1_000_000_000;

/// What is known of the calls that a job's threads are in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Calls(Arc<Mutex<BTreeMap<u32, Known>>>);

#[derive(Clone, Copy, Debug)]
struct Known {
    number: i64,
    arguments: [u64; 6],
    /// By the job's CLOCK_MONOTONIC.
    deadline_ns: Option<i64>,
    /// Where the call was made: the same place with the same stack is the same call.
    place: (u64, u64),
}

/// Bytes of a `syscall` instruction.
const CALL_BYTES: u64 = 2;

/// Whether the thread stands right before the instruction that makes the kernel continue this call.
fn is_about_to_continue(registers: &Registers, call: &Known) -> bool {
    let (rip, rsp) = place(registers);
    registers.result() == libc::SYS_restart_syscall && (rip.wrapping_add(CALL_BYTES), rsp) == call.place
}

fn place(registers: &Registers) -> (u64, u64) {
    (registers.get(Register::Rip), registers.get(Register::Rsp))
}

impl Calls {
    fn known(&self) -> MutexGuard<'_, BTreeMap<u32, Known>> {
        // Nothing that holds it can fail half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what a thread that was just stopped was doing. `now_ns` is the job's CLOCK_MONOTONIC; `filters` tells how many system
    /// call filters each thread has that are not its own; it is asked when that matters.
    pub fn note(
        &self,
        thread: u32,
        stopped: &mut Stopped,
        now_ns: i64,
        filters: impl FnOnce() -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut registers = stopped.registers()?;
        let mut known = self.known();
        let is_first = registers.result() == restart::BLOCK && registers.call() != Some(libc::SYS_restart_syscall);
        if is_first && stopped.has_filter(filters()?)? {
            known.remove(&thread);
            registers.set(Register::Rax, restart::NO_HANDLER.cast_unsigned());
            let mask = stopped.signal_mask()?;
            return stopped.set_state(registers, mask);
        }
        if known.get(&thread).is_some_and(|call| is_about_to_continue(&registers, call)) {
            // The same as a step earlier, when the kernel hadn't decided yet to restart it.
            registers.set(Register::Rip, registers.get(Register::Rip) + CALL_BYTES);
            registers.set(Register::Rax, restart::BLOCK.cast_unsigned());
            registers.set(Register::OrigRax, libc::SYS_restart_syscall.cast_unsigned());
            let mask = stopped.signal_mask()?;
            return stopped.set_state(registers, mask);
        }
        if registers.result() != restart::BLOCK {
            known.remove(&thread);
            return Ok(());
        }
        let place = place(&registers);
        match registers.call() {
            // Somebody else (a stop signal) may have stopped it in another call before we came.
            Some(libc::SYS_restart_syscall) => {
                let is_other = known.get(&thread).is_some_and(|call| call.place != place);
                let _ = is_other.then(|| known.remove(&thread));
            }
            Some(number) => {
                let arguments = registers.call_arguments();
                let left = time_left(stopped, number, &arguments, now_ns);
                let deadline_ns = left.map(|left| now_ns.saturating_add(i64::try_from(left).unwrap_or(i64::MAX)));
                known.insert(thread, Known { number, arguments, deadline_ns, place });
            }
            None => {}
        }
        Ok(())
    }

    /// The call that a stopped thread is in, if it is one of these.
    pub fn interrupted(&self, thread: u32, registers: &Registers, now_ns: i64) -> Option<InterruptedCall> {
        if registers.result() != restart::BLOCK {
            return None;
        }
        let known = self.known();
        let Known { number, arguments, deadline_ns, .. } = *known.get(&thread)?;
        let left_ns = deadline_ns.map(|deadline| u64::try_from(deadline.saturating_sub(now_ns)).unwrap_or_default());
        Some(InterruptedCall { number, arguments, left_ns })
    }

    /// Makes the kernel remember the call as it did at the source, so that it goes on with the time that was left. Sets
    /// the registers to what the thread has to go on with. `passed_ns` is the time since the image was made.
    pub fn continue_call(
        &self,
        stopped: &mut Stopped,
        region: Region,
        thread: u32,
        call: &InterruptedCall,
        registers: &mut Registers,
        (now_ns, passed_ns): (i64, u64),
    ) -> io::Result<()> {
        let InterruptedCall { number, mut arguments, left_ns } = *call;
        let left_ns = left_ns.map(|left| left.saturating_sub(passed_ns).max(1));
        let time = left_ns.map(|left| {
            let begin = end_clock(number, &arguments).map(read_clock(now_ns)).unwrap_or_default();
            let time = left.saturating_add(u64::try_from(begin).unwrap_or_default());
            [time / SECOND_NS, time % SECOND_NS].map(u64::to_ne_bytes).concat()
        });
        let pointed = match (timeout_argument(number), &time) {
            (Some(index), Some(time)) => Some((index, time.as_slice())),
            _ if number == libc::SYS_poll => {
                if let Some(left) = left_ns {
                    arguments[2] = left.div_ceil(1_000_000);
                }
                None
            }
            // Without its time-out the call would never end.
            _ => {
                finish_with(registers, -i64::from(libc::EINTR));
                return Ok(());
            }
        };
        match sys::tape::enter_call(stopped, region, number, arguments, pointed)? {
            restart::BLOCK => {
                registers.set(Register::Rax, restart::BLOCK.cast_unsigned());
                let deadline_ns = left_ns.map(|left| now_ns.saturating_add(i64::try_from(left).unwrap_or(i64::MAX)));
                let known = Known { number, arguments: call.arguments, deadline_ns, place: place(registers) };
                self.known().insert(thread, known);
            }
            // It had something to report at once.
            result => finish_with(registers, result),
        }
        Ok(())
    }
}

/// Ends a thread's call with a result.
pub(crate) fn finish_with(registers: &mut Registers, result: i64) {
    registers.set(Register::Rax, result.cast_unsigned());
    registers.set(Register::OrigRax, u64::MAX);
}

/// Which argument points to the time-out.
fn timeout_argument(number: i64) -> Option<usize> {
    match number {
        libc::SYS_nanosleep => Some(0),
        libc::SYS_clock_nanosleep => Some(2),
        libc::SYS_futex => Some(3),
        _ => None,
    }
}

/// The clock of a time-out that is a point in time. (Of nanosleep's, the kernel restarts only relative ones so.)
fn end_clock(number: i64, arguments: &[u64; 6]) -> Option<libc::clockid_t> {
    const FUTEX_COMMANDS: u64 = 0x7f;
    const FUTEX_WAIT: u64 = 0;
    const FUTEX_CLOCK_REALTIME: u64 = 256;
    let operation = arguments[1];
    if number != libc::SYS_futex || operation & FUTEX_COMMANDS == FUTEX_WAIT {
        None
    } else if operation & FUTEX_CLOCK_REALTIME != 0 {
        Some(libc::CLOCK_REALTIME)
    } else {
        Some(libc::CLOCK_MONOTONIC)
    }
}

/// Readings of clocks as the job sees them, of which only the monotonic one differs from ours.
fn read_clock(monotonic_ns: i64) -> impl Fn(libc::clockid_t) -> i64 {
    move |clock| if clock == libc::CLOCK_MONOTONIC { monotonic_ns } else { sys::process::clock_ns(clock) }
}

fn time_left(stopped: &Stopped, number: i64, arguments: &[u64; 6], now_ns: i64) -> Option<u64> {
    let duration = |address: u64| -> Option<u64> {
        let mut bytes = [0; 16];
        let remote = [Remote { address, length: 16 }];
        if address == 0 || vm::read_vectored(stopped.thread(), &mut bytes, &remote).ok()? != 16 {
            return None;
        }
        let (seconds, rest) = bytes.split_at(8);
        let seconds = u64::from_ne_bytes(seconds.try_into().ok()?);
        Some(seconds.saturating_mul(SECOND_NS).saturating_add(u64::from_ne_bytes(rest.try_into().ok()?)))
    };
    match number {
        libc::SYS_nanosleep => duration(arguments[1]).or_else(|| duration(arguments[0])),
        libc::SYS_clock_nanosleep => duration(arguments[3]).or_else(|| duration(arguments[2])),
        libc::SYS_futex => {
            let begin = end_clock(number, arguments).map(read_clock(now_ns)).unwrap_or_default();
            duration(arguments[3]).map(|end| end.saturating_sub(u64::try_from(begin).unwrap_or_default()))
        }
        // The argument is an int; a negative one means no time-out.
        libc::SYS_poll => {
            let milliseconds = u32::try_from(arguments[2] & 0xffff_ffff).ok()?.cast_signed();
            u64::try_from(milliseconds).ok().map(|milliseconds| milliseconds * 1_000_000)
        }
        _ => None,
    }
}
