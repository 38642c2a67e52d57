//! The registers of a traced thread, and what they say of the system call it is in.

use std::io;

use super::request;
use crate::Pid;

const NT_PRSTATUS: usize = 1;

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
    pub(super) fn hide_interruption(&mut self) -> bool {
        let interrupted = self.result() == -i64::from(libc::EINTR)
            && self.call().is_some_and(|number| INTERRUPTIBLE.contains(&number));
        if interrupted {
            self.set(Register::Rax, restart::NO_HANDLER.cast_unsigned());
        }
        interrupted
    }
}

pub(super) fn raw_registers(thread: Pid) -> io::Result<Registers> {
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

pub(super) fn set_raw_registers(thread: Pid, registers: &Registers) -> io::Result<()> {
    let size = size_of_val(&registers.0);
    let vector = libc::iovec { iov_base: registers.0.as_ptr().cast_mut().cast(), iov_len: size };
    request(libc::PTRACE_SETREGSET, thread, NT_PRSTATUS, (&raw const vector).addr()).map(drop)
}
