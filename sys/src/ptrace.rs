//! Tracing threads (ptrace(2), seized, never attached).
//!
//! A thread goes through two types. [`Seized`] is traced and running; [`Seized::interrupt`] and [`Seized::poll_stop`]
//! bring it to a [`Stopped`], on which everything else works. Dropping either lets the thread run on as if nothing had
//! been, with the registers and the signal mask it had when it stopped.
//!
//! ptrace belongs to the thread that seized: on any other thread all of this fails with `ESRCH`. Tracees are killed by
//! the kernel when that thread ends without letting them go.

mod filters;

use std::io;
use std::os::raw::c_void;
use std::time::{Duration, Instant};

use crate::Pid;
use crate::outcome::check;
use crate::process::tgkill;
use crate::vm::{self, Remote};

const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_EVENT_STOP: i32 = 128;
const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;

/// Follow new threads and processes, and don't let a tracee outlive its tracer.
const FOLLOW: i32 =
    libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK | libc::PTRACE_O_EXITKILL;
const SUSPEND_SECCOMP: i32 = 1 << 21;

/// One ptrace request whose arguments are integers or the address of something of ours that outlives the call.
fn request(request: u32, thread: Pid, address: usize, data: usize) -> io::Result<i64> {
    // SAFETY: callers in this file pass, where the kernel takes a pointer, one to memory of ours that is valid for the
    // size they state; what it does to the tracee's memory is the tracee's affair.
    check(unsafe { libc::ptrace(request, thread.as_raw(), address as *mut c_void, data as *mut c_void) })
}

/// `struct user_regs_struct` as words, with names for those that matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers(pub [u64; 27]);

/// Indices into [`Registers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
#[repr(usize)]
pub enum Register {
    R15,
    R14,
    R13,
    R12,
    Rbp,
    Rbx,
    R11,
    R10,
    R9,
    R8,
    Rax,
    Rcx,
    Rdx,
    Rsi,
    Rdi,
    OrigRax,
    Rip,
    Cs,
    Eflags,
    Rsp,
    Ss,
    FsBase,
    GsBase,
    Ds,
    Es,
    Fs,
    Gs,
}

impl Registers {
    /// Reads one.
    pub fn get(&self, register: Register) -> u64 {
        self.0[register as usize]
    }

    /// Writes one.
    pub fn set(&mut self, register: Register, value: u64) {
        self.0[register as usize] = value;
    }

    /// The number of the system call the thread is in or has just left, if any.
    pub fn call(&self) -> Option<i64> {
        let number = self.get(Register::OrigRax).cast_signed();
        (number >= 0).then_some(number)
    }

    /// The arguments of that call.
    pub fn call_arguments(&self) -> [u64; 6] {
        use Register::{R8, R9, R10, Rdi, Rdx, Rsi};
        [Rdi, Rsi, Rdx, R10, R8, R9].map(|register| self.get(register))
    }

    /// The call's result so far.
    pub fn result(&self) -> i64 {
        self.get(Register::Rax).cast_signed()
    }
}

/// Calls that report EINTR when something interrupts them, even if no handler runs (signal(7)): those with a time-out of
/// their own that the kernel doesn't keep.
const INTERRUPTIBLE: [i64; 20] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    333, // io_pgetevents
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
];

/// The kernel's own error numbers for interrupted calls (linux/errno.h), which programs never see.
pub mod restart {
    /// Restart unless a handler runs; then EINTR.
    pub const NO_HANDLER: i64 = -514;
    /// Continue with restart_syscall(2), which knows the deadline.
    pub const BLOCK: i64 = -516;
}

impl Registers {
    /// Whether a call has failed with EINTR for no other reason than that we stopped the thread; if so, makes the kernel
    /// restart it, unless a handler is to run.
    fn hide_interruption(&mut self) -> bool {
        let interrupted = self.result() == -i64::from(libc::EINTR)
            && self.call().is_some_and(|number| INTERRUPTIBLE.contains(&number));
        if interrupted {
            self.set(Register::Rax, restart::NO_HANDLER.cast_unsigned());
        }
        interrupted
    }
}

/// Configuration of restartable sequences of a thread (rseq(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RseqConfiguration {
    /// Address of the area.
    pub address: u64,
    /// Its size.
    pub size: u32,
    /// The signature.
    pub signature: u32,
}

/// What waiting for a tracee brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Report {
    Stopped { signal: i32, event: i32 },
    Ended,
}

fn wait(thread: Pid, options: libc::c_int) -> io::Result<Option<Report>> {
    loop {
        let mut status = 0;
        // SAFETY: the status pointer is to an int of ours that outlives the call.
        let result = unsafe { libc::waitpid(thread.as_raw(), &raw mut status, options | libc::__WALL) };
        if result == 0 {
            return Ok(None);
        }
        if result < 0 {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                // A thread of a process that executed a program or ended is collected by the kernel itself.
                Some(libc::ECHILD) => return Ok(Some(Report::Ended)),
                _ => return Err(error),
            }
        }
        if libc::WIFSTOPPED(status) {
            return Ok(Some(Report::Stopped { signal: libc::WSTOPSIG(status), event: status >> 16 }));
        }
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            return Ok(Some(Report::Ended));
        }
    }
}

/// Why a thread stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// We interrupted it, or it is new.
    Interrupted,
    /// Its process is stopped by this signal and stays so when let go.
    Group(i32),
}

/// What [`Seized::poll_stop`] found.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "it is taken apart where it is returned")]
pub enum Progress {
    /// It still runs.
    Running(Seized),
    /// It stands still.
    Stopped(Stopped),
    /// It has ended.
    Ended,
}

/// A thread that is traced and runs.
#[derive(Debug)]
pub struct Seized {
    thread: Pid,
    children: Vec<Pid>,
    ended: bool,
}

impl Seized {
    /// Starts to trace a running thread without stopping it. `ESRCH`: it has ended. `EPERM`: it is ending, or traced.
    pub fn new(thread: Pid) -> io::Result<Seized> {
        request(libc::PTRACE_SEIZE, thread, 0, FOLLOW as usize)?;
        Ok(Seized { thread, children: Vec::new(), ended: false })
    }

    /// A thread or process that a tracee has made, which is traced from its birth and stops by itself.
    pub fn born(thread: Pid) -> Seized {
        Seized { thread, children: Vec::new(), ended: false }
    }

    /// The thread.
    pub fn thread(&self) -> Pid {
        self.thread
    }

    /// Threads and processes made by it since the last call. They are traced as well: pass them to [`Seized::born`].
    pub fn take_children(&mut self) -> Vec<Pid> {
        std::mem::take(&mut self.children)
    }

    /// Asks it to stop.
    pub fn interrupt(&self) -> io::Result<()> {
        match request(libc::PTRACE_INTERRUPT, self.thread, 0, 0) {
            // Ended in the meantime: waiting tells.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Whether it has stopped. Signals and events that come first take their course.
    pub fn poll_stop(mut self) -> io::Result<Progress> {
        loop {
            match wait(self.thread, libc::WNOHANG)? {
                None => return Ok(Progress::Running(self)),
                Some(Report::Ended) => {
                    self.ended = true;
                    return Ok(Progress::Ended);
                }
                Some(Report::Stopped { signal, event: PTRACE_EVENT_STOP }) => {
                    let cause = match signal {
                        libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU => Cause::Group(signal),
                        _ => Cause::Interrupted,
                    };
                    let children = self.take_children();
                    // From here on the Stopped lets the thread go.
                    self.ended = true;
                    return Ok(Progress::Stopped(Stopped::new(self.thread, cause, children)));
                }
                Some(Report::Stopped { signal, event }) => {
                    // Any stop clears a pending interrupt, so ask again before going on.
                    let signal = if event == 0 { signal } else { 0 };
                    if matches!(event, libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE) {
                        self.children.push(event_message(self.thread)?);
                    }
                    self.interrupt()?;
                    resume(libc::PTRACE_CONT, self.thread, signal)?;
                }
            }
        }
    }

    /// Waits for it to stop, at most so long. `None` when it has ended; `TimedOut` when it runs on.
    pub fn wait_stop(mut self, patience: Duration) -> io::Result<Option<Stopped>> {
        let start = Instant::now();
        loop {
            self = match self.poll_stop()? {
                Progress::Stopped(stopped) => return Ok(Some(stopped)),
                Progress::Ended => return Ok(None),
                Progress::Running(seized) => seized,
            };
            let waited = start.elapsed();
            if waited > patience {
                return Err(io::ErrorKind::TimedOut.into());
            }
            pause(waited);
        }
    }
}

/// Gives the processor away for a moment: first to whoever waits for it, later for longer.
pub fn pause(waited: Duration) {
    if waited < Duration::from_millis(1) {
        std::thread::yield_now();
    } else {
        std::thread::sleep(Duration::from_micros(100));
    }
}

impl Drop for Seized {
    /// A running tracee can't be let go: it is stopped first.
    fn drop(&mut self) {
        if self.ended {
            for child in self.take_children() {
                drop(Seized::born(child));
            }
            return;
        }
        let seized = Seized { thread: self.thread, children: std::mem::take(&mut self.children), ended: false };
        // Moving out of a drop needs a value of its own, which must not come back here.
        self.ended = true;
        if seized.interrupt().is_ok() {
            drop(stop_for_good(seized));
        }
    }
}

/// Stops a thread however long it takes to come out of the kernel, but not for ever.
fn stop_for_good(mut seized: Seized) -> Option<Stopped> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        seized = match seized.poll_stop() {
            Ok(Progress::Stopped(stopped)) => return Some(stopped),
            Ok(Progress::Running(seized)) => seized,
            Ok(Progress::Ended) | Err(_) => return None,
        };
        pause(start.elapsed());
    }
    // It waits in the kernel and can't be interrupted: the tracer's end lets it go.
    seized.ended = true;
    None
}

fn event_message(thread: Pid) -> io::Result<Pid> {
    let mut message = 0usize;
    request(libc::PTRACE_GETEVENTMSG, thread, 0, (&raw mut message).addr())?;
    let number = i32::try_from(message).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))?;
    Ok(Pid::from_raw(number))
}

fn resume(kind: u32, thread: Pid, signal: i32) -> io::Result<()> {
    request(kind, thread, 0, signal.unsigned_abs() as usize).map(drop)
}

/// A thread that is traced and stands still.
///
/// Dropping it lets the thread run on with the registers and signal mask it had.
#[derive(Debug)]
pub struct Stopped {
    thread: Pid,
    cause: Cause,
    saved: Option<Saved>,
    children: Vec<Pid>,
    /// Signals that can't be blocked and came while it ran for us; delivered when it is let go.
    deferred: Vec<i32>,
    /// It has ended, or somebody else lets it go.
    over: bool,
    /// It stands where the kernel wouldn't restart an interrupted system call.
    unsettled: bool,
}

#[derive(Debug, Clone, Copy)]
struct Saved {
    registers: Registers,
    mask: u64,
}

impl Stopped {
    fn new(thread: Pid, cause: Cause, children: Vec<Pid>) -> Stopped {
        Stopped { thread, cause, saved: None, children, deferred: Vec::new(), over: false, unsettled: false }
    }

    /// The thread.
    pub fn thread(&self) -> Pid {
        self.thread
    }

    /// Why it stands still.
    pub fn cause(&self) -> Cause {
        self.cause
    }

    /// Threads and processes made by it since the last call. They are traced as well: pass them to [`Seized::born`].
    pub fn take_children(&mut self) -> Vec<Pid> {
        std::mem::take(&mut self.children)
    }

    /// Its registers as they were when it stopped; it goes on with these.
    pub fn registers(&mut self) -> io::Result<Registers> {
        Ok(self.save()?.registers)
    }

    /// Its signal mask as it was when it stopped; it goes on with this.
    pub fn signal_mask(&mut self) -> io::Result<u64> {
        Ok(self.save()?.mask)
    }

    /// Replaces the registers and the signal mask that it goes on with.
    pub fn set_state(&mut self, registers: Registers, mask: u64) -> io::Result<()> {
        self.save()?;
        self.saved = Some(Saved { registers, mask });
        Ok(())
    }

    /// Remembers what it must go on with and readies it to run for us: signals blocked, system call filters off.
    fn save(&mut self) -> io::Result<Saved> {
        if let Some(saved) = self.saved {
            return Ok(saved);
        }
        let mut registers = raw_registers(self.thread)?;
        let mut mask = 0u64;
        request(PTRACE_GETSIGMASK, self.thread, 8, (&raw mut mask).addr())?;
        self.leave_critical_section(&mut registers)?;
        registers.hide_interruption();
        // Only now that it stands still: a running thread must not get past its filter.
        request(libc::PTRACE_SETOPTIONS, self.thread, 0, (FOLLOW | SUSPEND_SECCOMP) as usize)?;
        // SIGTRAP stays open: it ends every run, and a forced one would reset the program's own handler if blocked.
        let blocked = !(1u64 << (libc::SIGTRAP - 1));
        request(PTRACE_SETSIGMASK, self.thread, 8, (&raw const blocked).addr())?;
        let saved = Saved { registers, mask };
        self.saved = Some(saved);
        Ok(saved)
    }

    /// What the kernel does when it interrupts a restartable sequence: go to its abort handler. It has to be done before
    /// the thread runs anything else, since the kernel then forgets that it was in one.
    fn leave_critical_section(&self, registers: &mut Registers) -> io::Result<()> {
        let Some(rseq) = self.rseq()? else { return Ok(()) };
        let mut pointer = [0; 8];
        if !self.read(rseq.address + 8, &mut pointer) || pointer == [0; 8] {
            return Ok(());
        }
        // struct rseq_cs: version and flags (4 bytes each), start, length, abort address.
        let mut section = [0; 32];
        if !self.read(u64::from_ne_bytes(pointer), &mut section) {
            return Ok(());
        }
        let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|index| section[at + index]));
        let (start, length, abort) = (word(8), word(16), word(24));
        if registers.get(Register::Rip).wrapping_sub(start) < length {
            registers.set(Register::Rip, abort);
        }
        Ok(())
    }

    fn read(&self, address: u64, buffer: &mut [u8]) -> bool {
        let length = buffer.len();
        vm::read_vectored(self.thread, buffer, &[Remote { address, length }]).is_ok_and(|read| read == length)
    }

    /// Its vector and floating-point state in the standard XSAVE format.
    pub fn xstate(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0u8; 16 << 10];
        let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        request(libc::PTRACE_GETREGSET, self.thread, NT_X86_XSTATE, (&raw mut vector).addr())?;
        buffer.truncate(vector.iov_len);
        Ok(buffer)
    }

    /// Sets that state at once.
    pub fn set_xstate(&self, state: &[u8]) -> io::Result<()> {
        let vector = libc::iovec { iov_base: state.as_ptr().cast_mut().cast(), iov_len: state.len() };
        request(libc::PTRACE_SETREGSET, self.thread, NT_X86_XSTATE, (&raw const vector).addr()).map(drop)
    }

    /// Signals that wait for this thread, or for any thread of its process, as `siginfo_t`s.
    pub fn pending_signals(&self, of_process: bool) -> io::Result<Vec<[u8; 128]>> {
        #[repr(C)]
        struct Arguments {
            offset: u64,
            flags: u32,
            count: i32,
        }
        let mut all = Vec::new();
        loop {
            let mut some = [[0u8; 128]; 32];
            let offset = all.len() as u64;
            let arguments = Arguments { offset, flags: u32::from(of_process), count: 32 };
            let address = (&raw const arguments).addr();
            let count = request(PTRACE_PEEKSIGINFO, self.thread, address, some.as_mut_ptr().addr())?;
            let count = usize::try_from(count).unwrap_or_default().min(some.len());
            if count == 0 {
                return Ok(all);
            }
            all.extend_from_slice(&some[..count]);
        }
    }

    /// Its restartable sequences, if it has registered any.
    pub fn rseq(&self) -> io::Result<Option<RseqConfiguration>> {
        #[repr(C)]
        #[derive(Default)]
        struct Configuration {
            address: u64,
            size: u32,
            signature: u32,
            flags: u32,
            padding: u32,
        }
        let mut found = Configuration::default();
        let address = (&raw mut found).addr();
        request(PTRACE_GET_RSEQ_CONFIGURATION, self.thread, size_of::<Configuration>(), address)?;
        let Configuration { address, size, signature, flags: _, padding: _ } = found;
        Ok((address != 0).then_some(RseqConfiguration { address, size, signature }))
    }

    /// Runs from the given registers until a signal-delivery stop with SIGTRAP, and returns the registers then.
    /// `ESRCH` when the thread has ended.
    pub(crate) fn run(&mut self, registers: &Registers) -> io::Result<Registers> {
        self.save()?;
        set_raw_registers(self.thread, registers)?;
        loop {
            resume(libc::PTRACE_CONT, self.thread, 0)?;
            if self.wait_report()? == (libc::SIGTRAP, 0) {
                self.unsettled = false;
                return raw_registers(self.thread);
            }
        }
    }

    /// Makes one system call with the `syscall` instruction at an address of the tracee.
    pub(crate) fn call_at(&mut self, instruction: u64, number: i64, arguments: [u64; 6]) -> io::Result<i64> {
        use Register::{OrigRax, R8, R9, R10, Rax, Rdi, Rdx, Rip, Rsi};
        let mut registers = self.save()?.registers;
        registers.set(Rip, instruction);
        registers.set(Rax, number.cast_unsigned());
        registers.set(OrigRax, u64::MAX);
        for (register, value) in [Rdi, Rsi, Rdx, R10, R8, R9].into_iter().zip(arguments) {
            registers.set(register, value);
        }
        set_raw_registers(self.thread, &registers)?;
        // Entry and exit: stops that go through no signal, so no handler is ever touched.
        self.unsettled = true;
        for _ in 0..2 {
            resume(libc::PTRACE_SYSCALL, self.thread, 0)?;
            loop {
                match self.wait_report()? {
                    (libc::SIGTRAP, 0) => break,
                    _ => resume(libc::PTRACE_SYSCALL, self.thread, 0)?,
                }
            }
        }
        Ok(raw_registers(self.thread)?.result())
    }

    /// Waits for the next stop and notes what mustn't be lost.
    fn wait_report(&mut self) -> io::Result<(i32, i32)> {
        match wait(self.thread, 0)? {
            None | Some(Report::Ended) => {
                self.over = true;
                Err(io::Error::from_raw_os_error(libc::ESRCH))
            }
            Some(Report::Stopped { signal, event }) => {
                if matches!(event, libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE) {
                    self.children.push(event_message(self.thread)?);
                } else if event == 0 && signal != libc::SIGTRAP {
                    self.deferred.push(signal);
                }
                Ok((signal, event))
            }
        }
    }

    /// Lets it run into a call that blocks, and takes it out of it again: the kernel then remembers how to continue the
    /// call. Returns the call's result (-516 when it was interrupted so).
    pub(crate) fn start_and_interrupt(&mut self, registers: &Registers, patience: Duration) -> io::Result<Registers> {
        self.save()?;
        set_raw_registers(self.thread, registers)?;
        resume(libc::PTRACE_SYSCALL, self.thread, 0)?;
        // The stop at the call's entry; from there on an interrupt finds it in the call.
        while self.wait_report()? != (libc::SIGTRAP, 0) {
            resume(libc::PTRACE_SYSCALL, self.thread, 0)?;
        }
        request(libc::PTRACE_INTERRUPT, self.thread, 0, 0)?;
        resume(libc::PTRACE_CONT, self.thread, 0)?;
        let start = Instant::now();
        loop {
            match wait(self.thread, libc::WNOHANG)? {
                None if start.elapsed() > patience => return Err(io::ErrorKind::TimedOut.into()),
                None => pause(start.elapsed()),
                Some(Report::Stopped { event: PTRACE_EVENT_STOP, .. }) => return raw_registers(self.thread),
                Some(Report::Stopped { signal, event }) => {
                    if event == 0 {
                        self.deferred.push(signal);
                    }
                    request(libc::PTRACE_INTERRUPT, self.thread, 0, 0)?;
                    resume(libc::PTRACE_CONT, self.thread, 0)?;
                }
                Some(Report::Ended) => {
                    self.over = true;
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
            }
        }
    }

    /// Brings it from whatever stop it is in to one on the way out of the kernel at which an interrupted system call is
    /// restarted by its registers.
    pub fn settle(&mut self) -> io::Result<()> {
        self.save()?;
        request(libc::PTRACE_INTERRUPT, self.thread, 0, 0)?;
        resume(libc::PTRACE_CONT, self.thread, 0)?;
        while self.wait_report()?.1 != PTRACE_EVENT_STOP {
            request(libc::PTRACE_INTERRUPT, self.thread, 0, 0)?;
            resume(libc::PTRACE_CONT, self.thread, 0)?;
        }
        self.unsettled = false;
        Ok(())
    }

    /// Lets it run on.
    pub fn release(mut self) -> io::Result<()> {
        self.let_go()
    }

    fn let_go(&mut self) -> io::Result<()> {
        for child in self.take_children() {
            drop(Seized::born(child));
        }
        if std::mem::replace(&mut self.over, true) {
            return Ok(());
        }
        // Whatever fails before, it isn't left stopped.
        let restored = self.put_back();
        request(libc::PTRACE_DETACH, self.thread, 0, 0)?;
        restored
    }

    fn put_back(&mut self) -> io::Result<()> {
        if self.unsettled {
            self.settle()?;
        }
        if let Some(Saved { registers, mask }) = self.saved {
            set_raw_registers(self.thread, &registers)?;
            request(PTRACE_SETSIGMASK, self.thread, 8, (&raw const mask).addr())?;
        } else if let Ok(mut registers) = raw_registers(self.thread)
            && registers.hide_interruption()
        {
            set_raw_registers(self.thread, &registers)?;
        }
        for &signal in &self.deferred {
            tgkill(thread_group(self.thread)?, self.thread, signal)?;
        }
        Ok(())
    }

    /// Lets it die of a signal whose action is the default. It must have run a tape last.
    pub fn die_of(mut self, signal: i32) -> io::Result<()> {
        self.over = true;
        let open = 0u64;
        request(PTRACE_SETSIGMASK, self.thread, 8, (&raw const open).addr())?;
        // At a stop for a signal the tracer decides which one it is.
        request(libc::PTRACE_CONT, self.thread, 0, signal.unsigned_abs() as usize)?;
        loop {
            match wait(self.thread, 0)? {
                Some(Report::Stopped { .. }) => request(libc::PTRACE_CONT, self.thread, 0, 0).map(drop)?,
                Some(Report::Ended) | None => return Ok(()),
            }
        }
    }

    /// Lets go of one that has ended by itself.
    pub fn forget(mut self) {
        self.over = true;
    }

    /// Collects it after it was killed; waits until it is gone.
    pub fn bury(mut self) {
        self.over = true;
        while let Ok(Some(Report::Stopped { .. })) = wait(self.thread, 0) {
            // Only SIGKILL is on its way; whatever stop comes before it ends by itself.
            if resume(libc::PTRACE_CONT, self.thread, 0).is_err() {
                std::thread::yield_now();
            }
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have been killed in the meantime; then there is nothing to let go.
        let _ = self.let_go();
    }
}

fn thread_group(thread: Pid) -> io::Result<Pid> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status"))?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok())
        .map(Pid::from_raw)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

fn raw_registers(thread: Pid) -> io::Result<Registers> {
    let mut registers = [0u64; 27];
    let size = size_of_val(&registers);
    let mut vector = libc::iovec { iov_base: registers.as_mut_ptr().cast(), iov_len: size };
    request(libc::PTRACE_GETREGSET, thread, NT_PRSTATUS, (&raw mut vector).addr())?;
    if vector.iov_len != size {
        // The short form is that of a 32-bit program.
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the thread runs 32-bit code"));
    }
    Ok(Registers(registers))
}

fn set_raw_registers(thread: Pid, registers: &Registers) -> io::Result<()> {
    let size = size_of_val(&registers.0);
    let vector = libc::iovec { iov_base: registers.0.as_ptr().cast_mut().cast(), iov_len: size };
    request(libc::PTRACE_SETREGSET, thread, NT_PRSTATUS, (&raw const vector).addr()).map(drop)
}
