//! Seccomp filters and their user notifications (seccomp(2), seccomp_unotify(2)).
//!
//! [`Program`] is a classic BPF filter, built from blocks by [`Assembler`]; [`Program::install`] puts it on the calling
//! thread and returns the [`Listener`], from which a supervisor receives the calls that the filter handed to it. What a
//! supervisor reads from the memory of a notified thread may be trusted only while the notification still stands:
//! [`Listener::is_valid`] after the read says so.

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use serde::{Deserialize, Serialize};

use crate::outcome::{check, counted, owned};

/// `AUDIT_ARCH_X86_64` (linux/audit.h): `EM_X86_64 | __AUDIT_ARCH_64BIT | __AUDIT_ARCH_LE`.
pub const ARCH_X86_64: u32 = 0xc000_003e;
/// `AUDIT_ARCH_I386` (linux/audit.h): `EM_386 | __AUDIT_ARCH_LE`.
pub const ARCH_I386: u32 = 0x4000_0003;
/// The bit that marks a system call number of the x32 ABI.
pub const X32_BIT: u32 = 0x4000_0000;

/// One instruction of classic BPF, as the kernel takes it (`struct sock_filter`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instruction {
    /// Operation code.
    pub code: u16,
    /// Instructions to skip when the comparison holds.
    pub jump_true: u8,
    /// Instructions to skip when it doesn't.
    pub jump_false: u8,
    /// The operand.
    pub operand: u32,
}

impl Instruction {
    /// Bytes of one.
    pub const BYTES: usize = 8;

    /// As the kernel has it in memory.
    pub fn bytes(&self) -> [u8; Instruction::BYTES] {
        let [c0, c1] = self.code.to_ne_bytes();
        let [o0, o1, o2, o3] = self.operand.to_ne_bytes();
        [c0, c1, self.jump_true, self.jump_false, o0, o1, o2, o3]
    }
}

/// A complete filter. It can be sent to another process, which installs it on itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program(Vec<Instruction>);

/// What a filter answers for a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The kernel runs the call.
    Allow,
    /// The call fails with this error number and never reaches the kernel.
    Errno(i32),
    /// The call is handed to the supervisor.
    Notify,
}

impl Action {
    fn value(self) -> u32 {
        match self {
            Action::Allow => libc::SECCOMP_RET_ALLOW,
            Action::Errno(errno) => libc::SECCOMP_RET_ERRNO | (errno.unsigned_abs() & libc::SECCOMP_RET_DATA),
            Action::Notify => libc::SECCOMP_RET_USER_NOTIF,
        }
    }
}

/// Builds a [`Program`] out of nested conditions.
///
/// Every condition guards a block, and a block that doesn't end in an action falls through to what follows it, so a
/// filter reads from top to bottom like a list of rules. Only the low halves of arguments are looked at: the calls
/// filtered here take `int`s, of which the kernel itself ignores the upper half.
#[derive(Default)]
pub struct Assembler {
    code: Vec<Instruction>,
}

const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

impl Assembler {
    /// An empty program.
    pub fn new() -> Assembler {
        Assembler::default()
    }

    fn push(&mut self, code: u16, jump_true: u8, jump_false: u8, operand: u32) {
        self.code.push(Instruction { code, jump_true, jump_false, operand });
    }

    /// Puts the block's instructions behind a comparison of the accumulator; `wanted` holds when any value matches.
    fn guard(&mut self, test: u16, values: &[u32], block: impl FnOnce(&mut Assembler)) {
        let mut inner = Assembler::new();
        block(&mut inner);
        // One comparison a value: a match jumps over the remaining comparisons and the jump around the block. The jump
        // itself has a 32-bit distance, so a block may be of any length.
        let count = values.len();
        for (index, &value) in values.iter().enumerate() {
            let to_block = u8::try_from(count - index).expect("a condition lists fewer than 256 values");
            self.push(test, to_block, 0, value);
        }
        self.push(JUMP, 0, 0, u32::try_from(inner.code.len()).expect("a filter has at most 4096 instructions"));
        self.code.append(&mut inner.code);
    }

    /// Ends the program here with an action.
    pub fn finish(&mut self, action: Action) {
        self.push(RETURN, 0, 0, action.value());
    }

    /// The block applies to calls of these architectures.
    pub fn if_arch(&mut self, arch: u32, block: impl FnOnce(&mut Assembler)) {
        self.push(LOAD_WORD, 0, 0, offset_of!(libc::seccomp_data, arch) as u32);
        self.guard(JUMP_EQUAL, &[arch], block);
    }

    /// The block applies to calls with one of these numbers.
    pub fn if_number(&mut self, numbers: &[i64], block: impl FnOnce(&mut Assembler)) {
        self.push(LOAD_WORD, 0, 0, offset_of!(libc::seccomp_data, nr) as u32);
        let numbers: Vec<u32> =
            numbers.iter().map(|&number| u32::try_from(number).expect("a system call number is small")).collect();
        self.guard(JUMP_EQUAL, &numbers, block);
    }

    /// The block applies to calls whose number has any of these bits.
    pub fn if_number_has_bits(&mut self, bits: u32, block: impl FnOnce(&mut Assembler)) {
        self.push(LOAD_WORD, 0, 0, offset_of!(libc::seccomp_data, nr) as u32);
        self.guard(JUMP_ANY_BIT, &[bits], block);
    }

    /// The block applies when the argument, masked, is one of the values.
    pub fn if_argument(&mut self, index: u32, mask: u32, values: &[i32], block: impl FnOnce(&mut Assembler)) {
        assert!(index < 6, "a system call has six arguments");
        self.push(LOAD_WORD, 0, 0, offset_of!(libc::seccomp_data, args) as u32 + index * 8);
        if mask != u32::MAX {
            self.push(AND, 0, 0, mask);
        }
        let values: Vec<u32> = values.iter().map(|&value| value.cast_unsigned()).collect();
        self.guard(JUMP_EQUAL, &values, block);
    }

    /// The finished program; calls that no rule ended are allowed.
    pub fn build(mut self) -> Program {
        self.finish(Action::Allow);
        assert!(self.code.len() <= libc::BPF_MAXINSNS as usize, "the kernel takes at most 4096 instructions");
        Program(self.code)
    }
}

impl From<Vec<Instruction>> for Program {
    fn from(instructions: Vec<Instruction>) -> Program {
        Program(instructions)
    }
}

impl Program {
    /// The instructions.
    pub fn instructions(&self) -> &[Instruction] {
        &self.0
    }

    /// Installs the filter on the calling thread, for good, and for everything it forks and executes from now on.
    ///
    /// Sets no-new-privs only when the caller lacks `CAP_SYS_ADMIN`: with it the filter may be installed without, and
    /// set-user-ID programs keep working.
    pub fn install(&self) -> io::Result<Listener> {
        let filter: Vec<libc::sock_filter> = self
            .0
            .iter()
            .map(|instruction| libc::sock_filter {
                code: instruction.code,
                jt: instruction.jump_true,
                jf: instruction.jump_false,
                k: instruction.operand,
            })
            .collect();
        let program = libc::sock_fprog {
            len: u16::try_from(filter.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?,
            filter: filter.as_ptr().cast_mut(),
        };
        match install(&program) {
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
                set_no_new_privs()?;
                install(&program)
            }
            result => result,
        }
    }

    /// Runs the filter over a call, as the kernel would, for tests and for explaining.
    pub fn evaluate(&self, arch: u32, number: i64, args: [u64; 6]) -> u32 {
        let mut accumulator = 0u32;
        let mut at = 0usize;
        while let Some(instruction) = self.0.get(at) {
            at += 1;
            let jump = |holds: bool| usize::from(if holds { instruction.jump_true } else { instruction.jump_false });
            match instruction.code {
                LOAD_WORD => {
                    let offset = instruction.operand as usize;
                    accumulator = if offset == offset_of!(libc::seccomp_data, nr) {
                        number as u32
                    } else if offset == offset_of!(libc::seccomp_data, arch) {
                        arch
                    } else {
                        args[(offset - offset_of!(libc::seccomp_data, args)) / 8] as u32
                    };
                }
                AND => accumulator &= instruction.operand,
                JUMP => at += instruction.operand as usize,
                JUMP_EQUAL => at += jump(accumulator == instruction.operand),
                JUMP_ANY_BIT => at += jump(accumulator & instruction.operand != 0),
                _ => return instruction.operand,
            }
        }
        libc::SECCOMP_RET_KILL_PROCESS
    }
}

fn install(program: &libc::sock_fprog) -> io::Result<Listener> {
    // SAFETY: `program` points to a filter that outlives the call; the kernel copies and verifies it.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            std::ptr::from_ref(program),
        )
    };
    owned(listener).map(Listener)
}

fn set_no_new_privs() -> io::Result<()> {
    // SAFETY: takes integers only.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    check(result).map(drop)
}

/// A call that the filter handed over. The calling thread waits until it is answered, or until a signal cancels it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Names this call of this thread; becomes invalid when the call is cancelled.
    pub id: u64,
    /// The calling thread, in the receiver's PID namespace.
    pub thread: i32,
    /// The number of the call.
    pub number: i64,
    /// Its arguments.
    pub args: [u64; 6],
}

/// Receives notifications and answers them.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl From<OwnedFd> for Listener {
    fn from(fd: OwnedFd) -> Listener {
        Listener(fd)
    }
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> OwnedFd {
        listener.0
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP` (linux/seccomp.h).
const SYNC_WAKE_UP: u64 = 1;

impl Listener {
    /// Receives the next notification; `None` when it was cancelled meanwhile or none waits. Call after the listener has become
    /// readable, for it waits otherwise.
    pub fn receive(&self) -> io::Result<Option<Notification>> {
        // SAFETY: an all-zero value is valid for this plain C structure, and is what the kernel demands here.
        let mut raw: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills a structure of the size that the request number encodes.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut raw) };
        if result < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ENOENT | libc::EINTR | libc::EAGAIN) => Ok(None),
                _ => Err(error),
            };
        }
        Ok(Some(Notification {
            id: raw.id,
            thread: raw.pid.cast_signed(),
            number: i64::from(raw.data.nr),
            args: raw.data.args,
        }))
    }

    /// Whether the call still waits for its answer.
    pub fn is_valid(&self, id: u64) -> bool {
        // SAFETY: the kernel reads eight bytes.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const id) };
        result == 0
    }

    /// Ends the call with a result. `NotFound` says that it was cancelled before.
    pub fn answer(&self, id: u64, result: Result<i64, i32>) -> io::Result<()> {
        let (val, error) = match result {
            Ok(value) => (value, 0),
            Err(errno) => (0, -errno),
        };
        self.send(libc::seccomp_notif_resp { id, val, error, flags: 0 })
    }

    /// Lets the kernel run the call after all.
    pub fn proceed(&self, id: u64) -> io::Result<()> {
        let flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
        self.send(libc::seccomp_notif_resp { id, val: 0, error: 0, flags })
    }

    fn send(&self, mut response: libc::seccomp_notif_resp) -> io::Result<()> {
        // SAFETY: the kernel reads a structure of the size that the request number encodes.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut response) };
        check(result).map(drop)
    }

    /// Puts a descriptor into the caller's table and ends the call with its number, both at once; returns the number.
    pub fn answer_with_descriptor(&self, id: u64, fd: BorrowedFd<'_>, close_on_exec: bool) -> io::Result<RawFd> {
        self.add(id, fd, libc::SECCOMP_ADDFD_FLAG_SEND as u32, 0, close_on_exec)
    }

    /// Replaces the descriptor with this number in the caller's table; the call still waits afterwards.
    pub fn replace_descriptor(
        &self,
        id: u64,
        fd: BorrowedFd<'_>,
        number: RawFd,
        close_on_exec: bool,
    ) -> io::Result<()> {
        self.add(id, fd, libc::SECCOMP_ADDFD_FLAG_SETFD as u32, number.cast_unsigned(), close_on_exec).map(|_| ())
    }

    fn add(&self, id: u64, fd: BorrowedFd<'_>, flags: u32, number: u32, close_on_exec: bool) -> io::Result<RawFd> {
        let request = libc::seccomp_notif_addfd {
            id,
            flags,
            srcfd: fd.as_raw_fd().cast_unsigned(),
            newfd: number,
            newfd_flags: if close_on_exec { libc::O_CLOEXEC.cast_unsigned() } else { 0 },
        };
        // SAFETY: the kernel reads a structure of the size that the request number encodes.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD, &raw const request) };
        check(result).map(|_| result)
    }

    /// Asks for wake-ups on the waker's own CPU, which shortens the exchange of a call and its answer.
    pub fn set_synchronous_wake_up(&self, on: bool) -> io::Result<()> {
        let flags = if on { SYNC_WAKE_UP } else { 0 };
        // SAFETY: the request takes an integer.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS, flags) };
        check(result).map(drop)
    }
}

/// Reads memory of another thread's process; all of `buffer` or an error.
pub fn read_memory(thread: i32, address: u64, buffer: &mut [u8]) -> io::Result<()> {
    if buffer.is_empty() {
        return Ok(());
    }
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(address as usize), iov_len: buffer.len() };
    // SAFETY: `local` describes `buffer`, which we hold exclusively; the remote side is checked by the kernel.
    let count = unsafe { libc::process_vm_readv(thread, &raw const local, 1, &raw const remote, 1, 0) };
    complete(count, buffer.len())
}

/// Writes memory of another thread's process; all of `data` or an error.
pub fn write_memory(thread: i32, address: u64, data: &[u8]) -> io::Result<()> {
    write_memory_at(thread, [(address, data)])
}

/// Writes several places of another thread's memory with one system call; all of them or an error.
pub fn write_memory_at<const N: usize>(thread: i32, places: [(u64, &[u8]); N]) -> io::Result<()> {
    let local = places.map(|(_, data)| libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() });
    let remote = places.map(|(address, data)| libc::iovec {
        iov_base: std::ptr::without_provenance_mut(address as usize),
        iov_len: data.len(),
    });
    let length = places.iter().map(|(_, data)| data.len()).sum();
    if length == 0 {
        return Ok(());
    }
    let count = libc::c_ulong::try_from(N).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: the kernel only reads from `local`, which describes the data; the remote side is checked by the kernel.
    let count = unsafe { libc::process_vm_writev(thread, local.as_ptr(), count, remote.as_ptr(), count, 0) };
    complete(count, length)
}

fn complete(count: isize, wanted: usize) -> io::Result<()> {
    if counted(count)? == wanted { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EFAULT)) }
}

const _: () = assert!(size_of::<libc::seccomp_notif>() == 80);
const _: () = assert!(size_of::<libc::seccomp_notif_resp>() == 24);
const _: () = assert!(size_of::<libc::seccomp_notif_addfd>() == 24);
