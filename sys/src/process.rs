//! Operations on processes other than tracing: descriptors that stand for them, signals, waiting, clocks, and what the
//! kernel tells about them by system call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use crate::Pid;
use crate::outcome::{check, owned};

/// Reading of a clock in nanoseconds; 0 for a clock that doesn't exist.
pub fn clock_ns(clock: libc::clockid_t) -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours that outlives the call.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    if result != 0 {
        return 0;
    }
    time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec)
}

/// A descriptor that stands for a process (pidfd_open(2)); it is closed on exec.
pub fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })
}

/// A descriptor that stands for one thread (`PIDFD_THREAD`, Linux 6.9); before, `EINVAL`. It is closed on exec.
pub fn pidfd_open_thread(thread: Pid) -> io::Result<OwnedFd> {
    // PIDFD_THREAD has the value of O_EXCL.
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, thread.as_raw(), libc::O_EXCL) })
}

/// A duplicate of another process's descriptor (pidfd_getfd(2)): it shares the open file description and is closed on exec.
pub fn pidfd_getfd(process: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three integers and touches no memory of ours.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// Sends a signal to the process that a descriptor stands for, so never to another one with the same number.
pub fn pidfd_send_signal(process: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: a null siginfo asks for the same as kill(2); no memory is touched.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal, info, 0) }).map(drop)
}

/// Sends a signal to a process (kill(2)).
pub fn kill(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes two integers.
    check(unsafe { libc::kill(pid.as_raw(), signal) }).map(drop)
}

/// Sends a signal to one thread (tgkill(2)).
pub fn tgkill(process: Pid, thread: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: tgkill takes three integers.
    check(unsafe { libc::syscall(libc::SYS_tgkill, process.as_raw(), thread.as_raw(), signal) }).map(drop)
}

/// The caller's parent.
pub fn parent() -> Pid {
    Pid::parent()
}

/// Ends the calling process at once, running nothing of it.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit doesn't return and runs no code of this process.
    unsafe { libc::_exit(code) }
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitStatus(pub i32);

impl WaitStatus {
    /// The exit code, when it exited.
    pub fn code(self) -> Option<i32> {
        libc::WIFEXITED(self.0).then(|| libc::WEXITSTATUS(self.0))
    }

    /// The signal, when one killed it.
    pub fn signal(self) -> Option<i32> {
        libc::WIFSIGNALED(self.0).then(|| libc::WTERMSIG(self.0))
    }
}

/// Collects a child that has ended, any one; `None` when none has. `ECHILD` when there are no children.
pub fn reap_any() -> io::Result<Option<(Pid, WaitStatus)>> {
    wait(-1, libc::WNOHANG)
}

/// Waits for a child to end.
pub fn reap(pid: Pid) -> io::Result<WaitStatus> {
    loop {
        if let Some((_, status)) = wait(pid.as_raw(), 0)? {
            return Ok(status);
        }
    }
}

/// Collects this child, or thread that the caller traces, if it has ended. `ECHILD` when it is neither, any more.
pub fn reap_if_ended(pid: Pid) -> io::Result<Option<WaitStatus>> {
    Ok(wait(pid.as_raw(), libc::WNOHANG)?.map(|(_, status)| status))
}

fn wait(pid: libc::pid_t, options: libc::c_int) -> io::Result<Option<(Pid, WaitStatus)>> {
    loop {
        let mut status = 0;
        // SAFETY: the status pointer is to an int of ours that outlives the call.
        let result = unsafe { libc::waitpid(pid, &raw mut status, options | libc::__WALL) };
        match result {
            -1 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            0 => return Ok(None),
            // A stop of a traced child is its tracer's affair; only ends count here.
            pid if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) => {
                return Ok(Some((Pid::from_raw(pid), WaitStatus(status))));
            }
            _ => {}
        }
    }
}

/// A descriptor from which SIGCHLD is read; the signal is blocked for the calling thread.
pub fn child_signals() -> io::Result<OwnedFd> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set it is given.
    check(unsafe { libc::sigemptyset(set.as_mut_ptr()) })?;
    // SAFETY: the set was initialised above.
    let mut set = unsafe { set.assume_init() };
    // SAFETY: the set is initialised and ours.
    check(unsafe { libc::sigaddset(&raw mut set, libc::SIGCHLD) })?;
    // SAFETY: blocking a signal touches only the calling thread's mask; the old mask isn't asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) })?;
    // SAFETY: the set is initialised; -1 asks for a new descriptor.
    owned(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })
}

/// Gives every signal its default action and blocks none, as a program that is started may expect. Makes system calls only, so that it
/// can be called between fork and exec.
pub(crate) fn reset_signals() -> io::Result<()> {
    const SIGNALS: i32 = 64;
    const SET_BYTES: usize = 8;
    // The kernel's struct sigaction: handler, flags, restorer, mask.
    let default = [0u64; 4];
    for signal in (1..=SIGNALS).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal)) {
        let old: *mut [u64; 4] = std::ptr::null_mut();
        // SAFETY: the kernel reads its struct sigaction from an array of that size; the old one isn't asked for. The raw call
        // is right here: glibc refuses to set those signals that it uses itself, which nobody does between fork and exec.
        check(unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, old, SET_BYTES) })?;
    }
    let none = 0u64;
    let old: *mut u64 = std::ptr::null_mut();
    // SAFETY: the kernel reads a set of eight bytes; the old one isn't asked for.
    check(unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, old, SET_BYTES) })
        .map(drop)
}

/// Head and length of another thread's robust futex list (get_robust_list(2)).
pub fn robust_list(thread: Pid) -> io::Result<(u64, u64)> {
    let mut head = 0u64;
    let mut length = 0u64;
    // SAFETY: both pointers are to words of ours that outlive the call.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, thread.as_raw(), &raw mut head, &raw mut length) })?;
    Ok((head, length))
}

/// The kernel's `struct sched_attr`, its first version (sched_setattr(2)).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulingAttributes {
    /// Size of this structure.
    pub size: u32,
    /// SCHED_*.
    pub policy: u32,
    /// SCHED_FLAG_*.
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Real-time priority.
    pub priority: u32,
    /// SCHED_DEADLINE, or the slice of SCHED_OTHER, in nanoseconds.
    pub runtime: u64,
    /// SCHED_DEADLINE.
    pub deadline: u64,
    /// SCHED_DEADLINE.
    pub period: u64,
}

/// How a thread is scheduled.
pub fn scheduling(thread: Pid) -> io::Result<SchedulingAttributes> {
    let mut attributes = SchedulingAttributes::default();
    let size = size_of::<SchedulingAttributes>();
    // SAFETY: the kernel writes at most `size` bytes into the structure, which outlives the call.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, thread.as_raw(), &raw mut attributes, size, 0) })?;
    Ok(attributes)
}

/// Sets how a thread is scheduled.
pub fn set_scheduling(thread: Pid, attributes: &SchedulingAttributes) -> io::Result<()> {
    let attributes = SchedulingAttributes { size: 48, ..*attributes };
    // SAFETY: the kernel reads as many bytes as the structure says, all of which are there.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, thread.as_raw(), &raw const attributes, 0) }).map(drop)
}

/// Sets the I/O priority of a thread.
pub fn set_io_priority(thread: Pid, priority: i32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: ioprio_set takes three integers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, thread.as_raw(), priority) }).map(drop)
}

/// The calling thread, for the calls that take a thread's number.
pub const MYSELF: Pid = Pid::from_raw(0);

/// Sets the processors a thread may run on.
pub fn set_affinity(thread: Pid, processors: &[u32]) -> io::Result<()> {
    let mut mask = [0u8; 1024];
    for processor in processors {
        if let Some(byte) = mask.get_mut(*processor as usize / 8) {
            *byte |= 1 << (processor % 8);
        }
    }
    // SAFETY: the kernel reads the given number of bytes from the array.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, thread.as_raw(), mask.len(), mask.as_ptr()) }).map(drop)
}

/// I/O priority of a thread (ioprio_get(2)).
pub fn io_priority(thread: Pid) -> io::Result<i32> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: ioprio_get takes two integers.
    let value = check(unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, thread.as_raw()) })?;
    Ok(i32::try_from(value).unwrap_or_default())
}

/// The processors a thread may run on, in ascending order (sched_getaffinity(2)).
pub fn affinity(thread: Pid) -> io::Result<Vec<u32>> {
    let mut mask = [0u8; 1024];
    // SAFETY: the kernel writes at most the given number of bytes into the array.
    check(unsafe { libc::syscall(libc::SYS_sched_getaffinity, thread.as_raw(), mask.len(), mask.as_mut_ptr()) })?;
    let processors = (0..).zip(mask).flat_map(|(byte, bits)| (0..8).map(move |bit| (byte * 8 + bit, bits >> bit & 1)));
    Ok(processors.filter(|&(_, allowed)| allowed == 1).map(|(processor, _)| processor).collect())
}

/// The soft and hard limit of a process; number 0 is the caller.
pub fn limit(pid: Pid, resource: u32) -> io::Result<(u64, u64)> {
    let mut old = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    let new: *const libc::rlimit64 = std::ptr::null();
    // SAFETY: nothing is set, and the result goes to a structure of ours that outlives the call.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, pid.as_raw(), resource, new, &raw mut old) })?;
    Ok((old.rlim_cur, old.rlim_max))
}

/// Sets the soft and hard limit of a process; number 0 is the caller.
pub fn set_limit(pid: Pid, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let new = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    let old: *mut libc::rlimit64 = std::ptr::null_mut();
    // SAFETY: the new limits are read from a structure of ours that outlives the call; the old aren't asked for.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, pid.as_raw(), resource, &raw const new, old) }).map(drop)
}

/// Raises this process's soft limit of open descriptors to the hard one; returns it.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (_, hard) = limit(MYSELF, libc::RLIMIT_NOFILE)?;
    set_limit(MYSELF, libc::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Lets a descriptor survive the next exec.
pub fn keep_on_exec(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_SETFD takes an integer.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) }).map(drop)
}

/// Takes a descriptor that was inherited over an exec under a number told by whoever executed this program. The number
/// itself is free afterwards.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= libc::STDERR_FILENO {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: F_DUPFD_CLOEXEC takes an integer; a number that isn't open is an error.
    let duplicate = owned(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: nothing in this program owns the number: it came from before the exec.
    check(unsafe { libc::close(number) })?;
    Ok(duplicate)
}

/// A PID namespace, to translate numbers of processes and threads.
#[derive(Debug)]
pub struct PidNamespace(OwnedFd);

impl PidNamespace {
    /// Opens the namespace that a process is in.
    pub fn of(pid: Pid) -> io::Result<PidNamespace> {
        Ok(PidNamespace(std::fs::File::open(format!("/proc/{pid}/ns/pid"))?.into()))
    }

    /// The caller's number for the thread or process that the namespace numbers so.
    pub fn outside(&self, inside: u32) -> io::Result<Pid> {
        /// `NS_GET_PID_FROM_PIDNS` (linux/nsfs.h): `_IOR(0xb7, 6, int)`.
        const NS_GET_PID_FROM_PIDNS: libc::c_ulong = 0x8004_b706;
        // SAFETY: the argument of this request is an integer, not a pointer.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), NS_GET_PID_FROM_PIDNS, libc::c_ulong::from(inside)) };
        check(result)?;
        Ok(Pid::from_raw(result))
    }

    /// The namespace's number for a thread or process of the caller's.
    pub fn inside(&self, outside: Pid) -> io::Result<u32> {
        /// `NS_GET_PID_IN_PIDNS` (linux/nsfs.h): `_IOR(0xb7, 8, int)`.
        const NS_GET_PID_IN_PIDNS: libc::c_ulong = 0x8004_b708;
        let number = libc::c_ulong::from(outside.as_raw().unsigned_abs());
        // SAFETY: the argument of this request is an integer, not a pointer.
        let result = check(unsafe { libc::ioctl(self.0.as_raw_fd(), NS_GET_PID_IN_PIDNS, number) })?;
        u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))
    }
}

/// State components that the processor saves for programs (XCR0); 0 when it has no XSAVE.
pub fn xstate_features() -> u64 {
    if !std::arch::is_x86_feature_detected!("xsave") {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: the processor has XSAVE and the kernel uses it, or the feature wouldn't be reported; XGETBV of register 0
    // then only reads.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// The kernel's release.
pub fn kernel_release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// Has every descriptor but standard input, output and error closed in programs that this process starts from now on.
pub fn bequeath_nothing() -> io::Result<()> {
    let first: libc::c_uint = 3;
    // SAFETY: this changes only what happens at an execve; no descriptor is closed in this process.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) })
        .map(drop)
}

/// Closes every descriptor but standard input, output and error: what a program inherited by somebody's mistake. To be
/// called before anything was opened.
pub fn close_inherited() -> io::Result<()> {
    let first: libc::c_uint = 3;
    // SAFETY: the caller has opened nothing yet, so nobody owns one of these numbers.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) }).map(drop)
}
