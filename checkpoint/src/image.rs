//! A process tree as data.
//!
//! Nothing here refers to a live resource. Times are durations or readings of the job's own clocks, so that they keep
//! their meaning on another machine.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::descriptors::TreeDescriptors;
use crate::error::{Error, Result};
use crate::filters::Filter;
use crate::init::protocol::Root;
use crate::memory::Layout;
use crate::offer::Clocks;
use crate::sandbox::ExitStatus;
use crate::shm;
use crate::sysv::SystemV;
use crate::terminals::Controlling;

/// Version of [`TreeImage`]'s meaning; a higher one is refused.
pub const VERSION: u32 = 5;
/// The version of an image that has nothing which came after the fourth: registrations for membarrier(2).
pub const VERSION_FOURTH: u32 = 4;
/// The version of an image that has nothing which came after the third: terminals.
pub const VERSION_THIRD: u32 = 3;
/// The version of an image that has nothing which came after the second: system call filters of programs' own.
pub const VERSION_SECOND: u32 = 2;
/// The version of an image with nothing that the first version didn't know: the job has its first process still, and nothing in
/// `/dev/shm`.
pub const VERSION_FIRST: u32 = 1;

/// A whole tree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TreeImage {
    /// Between [`VERSION_FIRST`] and [`VERSION`]: the lowest whose readers know all that is in it.
    pub version: u32,
    /// The job's clocks when the dump was complete.
    pub clocks: Clocks,
    /// The job's first process, whose end is what the job's exit status tells; 0 when it has ended while others go on.
    pub root: u32,
    /// How it ended, if it has.
    #[serde(default)]
    pub root_exit: Option<ExitStatus>,
    /// The number most recently given to a process, so that numbers aren't reused early.
    pub last_pid: u32,
    /// Address spaces at the freeze.
    pub layout: Layout,
    /// Processes, parents before their children.
    pub processes: Vec<ProcessImage>,
    /// Open files.
    pub descriptors: TreeDescriptors,
    /// System V IPC.
    #[serde(default)]
    pub system_v: SystemV,
    /// What is in `/dev/shm`.
    #[serde(default)]
    pub shm: Vec<shm::Entry>,
    /// System call filters that programs have set for themselves, each once.
    #[serde(default)]
    pub filters: Vec<Filter>,
}

impl TreeImage {
    /// The job's first process, or how it ended.
    pub(crate) fn first(&self) -> Result<Root> {
        if let Some(status) = self.root_exit {
            return Ok(Root::Ended(status));
        }
        let known = self.processes.iter().any(|process| process.process == self.root);
        let root = i32::try_from(self.root).ok().filter(|_| known);
        root.map(Root::Runs).ok_or_else(|| Error::Image(format!("its first process, {}, isn't in it", self.root)))
    }
}

/// One process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessImage {
    /// Its number in the job.
    pub process: u32,
    /// Its parent; 1 is init.
    pub parent: u32,
    /// Its process group.
    pub group: u32,
    /// Its session.
    pub session: u32,
    /// Its controlling terminal.
    #[serde(default)]
    pub terminal: Option<Controlling>,
    /// Name of its first thread.
    pub name: ByteBuf,
    /// The signal its parent gets when it ends.
    pub exit_signal: i32,
    /// Running or ended.
    pub state: ProcessState,
}

/// Whether a process still runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ProcessState {
    /// Ended, with its wait status not yet collected.
    Zombie {
        /// As wait(2) reports it.
        status: i32,
    },
    /// Alive.
    Alive(Box<LiveProcess>),
}

/// What a living process has beyond its place in the tree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LiveProcess {
    /// Addresses and vector the kernel keeps about the address space.
    pub memory: MemoryFields,
    /// Path of its program.
    pub program: String,
    /// Working directory.
    pub directory: String,
    /// Root directory; "/" unless chroot(2) was used.
    pub root_directory: String,
    /// File mode creation mask.
    pub umask: u32,
    /// What each signal does, from signal 1 on.
    pub actions: Vec<SignalAction>,
    /// Signals that wait for any of its threads.
    pub pending: Vec<ByteBuf>,
    /// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
    pub interval_timers: [IntervalTimer; 3],
    /// timer_create(2) timers.
    pub posix_timers: Vec<PosixTimer>,
    /// Resource limits by number: (soft, hard).
    pub limits: Vec<(u64, u64)>,
    /// The signal that stopped it, when it is stopped.
    pub stopped_by: Option<i32>,
    /// Its parent has been told of that (wait(2) with WUNTRACED).
    #[serde(default)]
    pub stop_seen: bool,
    /// PR_SET_DUMPABLE.
    pub dumpable: u32,
    /// PR_SET_CHILD_SUBREAPER.
    pub subreaper: bool,
    /// PR_SET_THP_DISABLE.
    pub huge_pages_disabled: bool,
    /// PR_SET_MDWE.
    pub memory_deny_write_execute: u64,
    /// The membarrier(2) commands that it has registered for, as `MEMBARRIER_CMD_GET_REGISTRATIONS` tells them.
    #[serde(default)]
    pub memory_barriers: u64,
    /// oom_score_adj.
    pub oom_score_adjust: i32,
    /// Coredump filter.
    pub coredump_filter: u32,
    /// mlockall(MCL_FUTURE) default flags can't be read back; not part of an image.
    pub personality: u32,
    /// Its threads, first the one whose number is the process's.
    pub threads: Vec<ThreadImage>,
}

/// `struct prctl_mm_map` without the program's descriptor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFields {
    /// Start of the program text.
    pub start_code: u64,
    /// End of the program text.
    pub end_code: u64,
    /// Start of initialised data.
    pub start_data: u64,
    /// End of initialised data.
    pub end_data: u64,
    /// Start of the heap.
    pub start_brk: u64,
    /// End of the heap.
    pub brk: u64,
    /// Start of the stack.
    pub start_stack: u64,
    /// Start of the arguments.
    pub arg_start: u64,
    /// End of the arguments.
    pub arg_end: u64,
    /// Start of the environment.
    pub env_start: u64,
    /// End of the environment.
    pub env_end: u64,
    /// The auxiliary vector.
    pub auxv: ByteBuf,
}

/// The kernel's `struct sigaction`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalAction {
    /// Handler address, 0 (default) or 1 (ignore).
    pub handler: u64,
    /// SA_* flags.
    pub flags: u64,
    /// SA_RESTORER.
    pub restorer: u64,
    /// Signals blocked while the handler runs.
    pub mask: u64,
}

/// setitimer(2), in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalTimer {
    /// Period; 0 is once.
    pub interval_us: u64,
    /// Time left; 0 is off, or with a period one of ITIMER_REAL that has expired and whose signal nobody has taken.
    pub left_us: u64,
}

/// timer_create(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// The program's number for it.
    pub id: i32,
    /// The clock.
    pub clock: i32,
    /// SIGEV_*.
    pub notify: i32,
    /// Signal number.
    pub signal: i32,
    /// `sigev_value`.
    pub value: u64,
    /// The thread to notify, for SIGEV_THREAD_ID.
    pub thread: u32,
    /// Period in nanoseconds; 0 is once.
    pub interval_ns: u64,
    /// Time left in nanoseconds; 0 is off.
    pub left_ns: u64,
}

/// One thread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ThreadImage {
    /// Its number in the job.
    pub thread: u32,
    /// Its name.
    pub name: ByteBuf,
    /// `struct user_regs_struct`, 27 words.
    pub registers: Vec<u64>,
    /// The XSAVE area in the standard format.
    pub xstate: ByteBuf,
    /// The call to continue, for one that keeps its deadline in the kernel.
    pub interrupted: Option<InterruptedCall>,
    /// Blocked signals.
    pub blocked: u64,
    /// Signals that wait for this thread.
    pub pending: Vec<ByteBuf>,
    /// sigaltstack: address, flags, size.
    pub alternate_stack: (u64, u32, u64),
    /// Restartable sequences area.
    pub rseq: Option<Rseq>,
    /// Robust futex list: head and length.
    pub robust_list: (u64, u64),
    /// Address cleared when the thread ends.
    pub clear_child_tid: u64,
    /// Identity and rights.
    pub credentials: Credentials,
    /// Scheduling.
    pub scheduling: Scheduling,
    /// PR_SET_PDEATHSIG.
    pub parent_death_signal: i32,
    /// PR_SET_TIMERSLACK in nanoseconds.
    pub timer_slack_ns: u64,
    /// Its own system call filters, oldest first: indexes of [`TreeImage::filters`].
    #[serde(default)]
    pub filters: Vec<u32>,
}

/// A call that the kernel would continue with restart_syscall(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptedCall {
    /// Its number.
    pub number: i64,
    /// Its arguments.
    pub arguments: [u64; 6],
    /// Time left of its timeout, in nanoseconds; `None` without one.
    pub left_ns: Option<u64>,
}

/// `PTRACE_GET_RSEQ_CONFIGURATION`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    /// Address of the area.
    pub address: u64,
    /// Its size.
    pub size: u32,
    /// Signature before abort handlers.
    pub signature: u32,
}

/// Identity and rights of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved, file system user.
    pub uids: [u32; 4],
    /// Real, effective, saved, file system group.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable capabilities.
    pub inheritable: u64,
    /// Permitted capabilities.
    pub permitted: u64,
    /// Effective capabilities.
    pub effective: u64,
    /// Bounding set.
    pub bounding: u64,
    /// Ambient capabilities.
    pub ambient: u64,
    /// Secure bits.
    pub secure_bits: u32,
    /// No new privileges.
    pub no_new_privileges: bool,
}

/// How a thread is scheduled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// SCHED_*.
    pub policy: u32,
    /// SCHED_FLAG_*.
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Real-time priority.
    pub priority: u32,
    /// ioprio_get(2).
    pub io_priority: i32,
    /// Processors it may run on, when not all of them.
    pub affinity: Option<Vec<u32>>,
}
