//! A traced thread that stands still: what it is, and what it does for us before it goes on.

use std::io;
use std::time::{Duration, Instant};

use super::registers::{raw_registers, set_raw_registers};
use super::{
    Cause, FOLLOW, PTRACE_EVENT_STOP, Register, Registers, Report, Seized, event_message, pause, request, resume, wait,
};
use crate::Pid;
use crate::process::tgkill;
use crate::vm::{self, Remote};

const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const NT_X86_XSTATE: usize = 0x202;
const SUSPEND_SECCOMP: i32 = 1 << 21;
/// How long the end of a killed thread is waited for.
const COLLECTING: Duration = Duration::from_millis(200);

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

/// A thread that is traced and stands still.
///
/// Dropping it lets the thread run on with the registers and signal mask it had.
#[derive(Debug)]
pub struct Stopped {
    pub(super) thread: Pid,
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
    pub(super) fn new(thread: Pid, cause: Cause, children: Vec<Pid>) -> Stopped {
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

    /// Brings it into the stop that a SIGSTOP for its process begins, in which it stays when it is let go. The signal was sent, and each
    /// thread of the process has to come there; before the signal, each was [settled](Stopped::settle).
    pub fn stop_with_process(&mut self) -> io::Result<()> {
        resume(libc::PTRACE_CONT, self.thread, 0)?;
        loop {
            match wait(self.thread, 0)? {
                Some(Report::Stopped { signal: libc::SIGSTOP, event: PTRACE_EVENT_STOP }) => {
                    self.cause = Cause::Group(libc::SIGSTOP);
                    return Ok(());
                }
                Some(Report::Stopped { signal: libc::SIGSTOP, event: 0 }) => {
                    resume(libc::PTRACE_CONT, self.thread, libc::SIGSTOP)?;
                }
                Some(Report::Stopped { signal, event }) => {
                    if event == 0 && signal != libc::SIGTRAP {
                        self.deferred.push(signal);
                    }
                    resume(libc::PTRACE_CONT, self.thread, 0)?;
                }
                None | Some(Report::Ended) => {
                    self.over = true;
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
            }
        }
    }

    /// Lets it run on. `ESRCH` says that it was killed, for one by another thread of its process that ended that.
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
        match request(libc::PTRACE_DETACH, self.thread, 0, 0) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                self.collect();
                Err(error)
            }
            Err(error) => Err(error),
            Ok(_) => restored,
        }
    }

    /// Takes notice of its end, which its parent learns of only after its tracer has. A process whose other threads are traced, too, ends
    /// for us after those, so this isn't waited for long.
    fn collect(&self) {
        let start = Instant::now();
        while start.elapsed() < COLLECTING && matches!(crate::process::reap_if_ended(self.thread), Ok(None)) {
            std::thread::sleep(Duration::from_micros(200));
        }
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
