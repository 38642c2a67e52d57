//! System calls run by another process on our behalf.
//!
//! Much can be asked of a process, or done to it, only by itself. A [`Tape`] is a list of system calls with their data; a
//! stopped thread of the process runs all of them in one go, in a small [`Region`] mapped into its address space:
//!
//! ```text
//! | code page, r-x | data pages, rw-: calls with arguments and results, then the data they point to |
//! ```
//!
//! Arguments may be plain numbers, addresses of the tape's data, or results of earlier calls. A call made with
//! [`Tape::require`] ends the run when it fails, and the run reports which and why; one made with [`Tape::syscall`] just
//! leaves its result. The run ends with a SIGTRAP that the thread sends to itself, which the tracer keeps from it: unlike
//! a breakpoint it leaves the program's own handler alone.

use std::arch::global_asm;
use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use crate::Pid;
use crate::proc;
use crate::ptrace::{Register, Registers, Stopped};
use crate::vm::{self, Memory, Remote};

/// Bytes in a page.
const PAGE: u64 = 4096;
/// Bytes of an entry: number, six arguments, flags, result.
const ENTRY: usize = 72;
const FLAGS_AT: usize = 56;
const RESULT_AT: usize = 64;
/// The run ends when the call fails. Lower bits: the argument is the address of a word that holds the value.
const REQUIRED: u64 = 1 << 6;
/// What an entry's result says before the call was made. No system call returns it.
const NOT_RUN: i64 = i64::MIN;

global_asm!(
    ".pushsection .rodata.migd_tape,\"a\",@progbits",
    ".globl migd_tape_begin",
    "migd_tape_begin:",
    // rbx: the next entry, r12: one past the last. No stack is used.
    "2:",
    "cmp rbx, r12",
    "jae 9f",
    "mov r13, [rbx + 56]",
    "mov rax, [rbx]",
    "mov rdi, [rbx + 8]",
    "test r13b, 1",
    "jz 3f",
    "mov rdi, [rdi]",
    "3:",
    "mov rsi, [rbx + 16]",
    "test r13b, 2",
    "jz 3f",
    "mov rsi, [rsi]",
    "3:",
    "mov rdx, [rbx + 24]",
    "test r13b, 4",
    "jz 3f",
    "mov rdx, [rdx]",
    "3:",
    "mov r10, [rbx + 32]",
    "test r13b, 8",
    "jz 3f",
    "mov r10, [r10]",
    "3:",
    "mov r8, [rbx + 40]",
    "test r13b, 16",
    "jz 3f",
    "mov r8, [r8]",
    "3:",
    "mov r9, [rbx + 48]",
    "test r13b, 32",
    "jz 3f",
    "mov r9, [r9]",
    "3:",
    ".globl migd_tape_call",
    "migd_tape_call:",
    "syscall",
    "mov [rbx + 64], rax",
    "test r13b, 64",
    "jz 4f",
    "cmp rax, -4095",
    "jae 9f",
    "4:",
    "add rbx, 72",
    "jmp 2b",
    // tgkill(getpid(), gettid(), SIGTRAP)
    "9:",
    "mov eax, 39",
    "syscall",
    "mov r14, rax",
    "mov eax, 186",
    "syscall",
    "mov rsi, rax",
    "mov rdi, r14",
    "mov edx, 5",
    "mov eax, 234",
    "syscall",
    "8:",
    "pause",
    "jmp 8b",
    ".globl migd_tape_end",
    "migd_tape_end:",
    ".popsection",
);

unsafe extern "C" {
    static migd_tape_begin: u8;
    static migd_tape_call: u8;
    static migd_tape_end: u8;
}

/// The code of the run.
fn code() -> &'static [u8] {
    let (begin, end) = ((&raw const migd_tape_begin), (&raw const migd_tape_end));
    // SAFETY: both symbols delimit one read-only block of the assembly above.
    unsafe { std::slice::from_raw_parts(begin, end.addr() - begin.addr()) }
}

/// Where in the code the `syscall` instruction is.
fn call_offset() -> u64 {
    ((&raw const migd_tape_call).addr() - (&raw const migd_tape_begin).addr()) as u64
}

/// Pages in a process for running tapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First byte: the code page. The data pages follow.
    pub start: u64,
    /// Bytes, the code page included.
    pub length: u64,
}

impl Region {
    /// Bytes in a region of the usual size.
    pub const LENGTH: u64 = 64 * PAGE;

    /// Maps a region into the process of a stopped thread with the instruction of its vdso.
    ///
    /// `at` is where, if nothing is there; otherwise the kernel chooses. With `hidden` the pages aren't copied by fork.
    pub fn install(thread: &mut Stopped, at: u64, hidden: bool) -> io::Result<Region> {
        let instruction = vdso_call(thread.thread())?;
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let length = Region::LENGTH;
        let mut map = |at: u64, flags: u64| {
            let arguments = [at, length, protection, flags, u64::MAX, 0];
            thread.call_at(instruction, libc::SYS_mmap, arguments).and_then(succeed)
        };
        let start = match map(at, flags | libc::MAP_FIXED_NOREPLACE as u64) {
            Ok(start) => start,
            Err(_) => map(0, flags)?,
        };
        let region = Region { start, length };
        let result = region.prepare(thread, instruction, hidden);
        if result.is_err() {
            let _ = thread.call_at(instruction, libc::SYS_munmap, [start, length, 0, 0, 0, 0]);
        }
        result.map(|()| region)
    }

    fn prepare(self, thread: &mut Stopped, instruction: u64, hidden: bool) -> io::Result<()> {
        // Executable from the first, and written past that: PR_SET_MDWE forbids to make a page so that was writable.
        let executable = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as u64;
        let arguments = [self.start, PAGE, executable, flags, u64::MAX, 0];
        thread.call_at(instruction, libc::SYS_mmap, arguments).and_then(succeed)?;
        Memory::open(thread.thread())?.write(self.start, code())?;
        if hidden {
            let arguments = [self.start, self.length, libc::MADV_DONTFORK as u64, 0, 0, 0];
            thread.call_at(instruction, libc::SYS_madvise, arguments).and_then(succeed)?;
        }
        Ok(())
    }

    /// Moves the region to where nothing is mapped. `EEXIST` when something is.
    pub fn relocate(self, thread: &mut Stopped, at: u64) -> io::Result<Region> {
        let instruction = self.start + call_offset();
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let arguments = [at, self.length, protection, flags, u64::MAX, 0];
        let start = thread.call_at(instruction, libc::SYS_mmap, arguments).and_then(succeed)?;
        let moved = Region { start, length: self.length };
        moved.prepare(thread, instruction, false)?;
        let arguments = [self.start, self.length, 0, 0, 0, 0];
        thread.call_at(moved.start + call_offset(), libc::SYS_munmap, arguments).and_then(succeed)?;
        Ok(moved)
    }

    /// Unmaps the region. The thread can't run tapes in it any more.
    pub fn remove(self, thread: &mut Stopped) -> io::Result<()> {
        // The call made from the region's own code: the thread never returns to it.
        let instruction = self.start + call_offset();
        let arguments = [self.start, self.length, 0, 0, 0, 0];
        thread.call_at(instruction, libc::SYS_munmap, arguments).and_then(succeed).map(drop)
    }

    /// One past the last byte.
    pub fn end(self) -> u64 {
        self.start + self.length
    }

    fn data(self) -> u64 {
        self.start + PAGE
    }

    fn capacity(self) -> usize {
        usize::try_from(self.length - PAGE).unwrap_or_default()
    }
}

fn succeed(result: i64) -> io::Result<u64> {
    match i32::try_from(result) {
        Ok(errno @ -4095..=-1) => Err(io::Error::from_raw_os_error(-errno)),
        _ => Ok(result.cast_unsigned()),
    }
}

/// Address of a `syscall` instruction in a process's vdso.
fn vdso_call(pid: Pid) -> io::Result<u64> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    // One vdso serves the whole machine; each process has it elsewhere.
    static OFFSET: OnceLock<Option<u64>> = OnceLock::new();
    if let (Some(Some(offset)), Some(start)) = (OFFSET.get(), told_vdso(pid)) {
        // It may have been moved since the process was told.
        let (at, mut found) = (start.saturating_add(*offset), [0; SYSCALL.len()]);
        if read(pid, at, &mut found).is_ok() && found == SYSCALL {
            return Ok(at);
        }
    }
    let mapping = vm::maps(pid)?.into_iter().find(|mapping| mapping.name == b"[vdso]");
    let missing = || io::Error::new(io::ErrorKind::Unsupported, "the process has unmapped its vdso");
    let (start, end) = mapping.map(|mapping| (mapping.start, mapping.end)).ok_or_else(missing)?;
    let offset = match OFFSET.get() {
        Some(offset) => *offset,
        None => {
            let mut content = vec![0; usize::try_from(end - start).unwrap_or_default()];
            read(pid, start, &mut content)?;
            let found = content.windows(SYSCALL.len()).position(|pair| pair == SYSCALL).map(|at| at as u64);
            *OFFSET.get_or_init(|| found)
        }
    };
    offset
        .map(|offset| start + offset)
        .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "the kernel's vdso makes no system call"))
}

/// Where a process was told that its vdso is (getauxval(3), AT_SYSINFO_EHDR).
fn told_vdso(pid: Pid) -> Option<u64> {
    let text = proc::read_file(format!("/proc/{pid}/auxv").as_ref()).ok()?;
    let words = text.chunks_exact(8).filter_map(|word| Some(u64::from_ne_bytes(word.try_into().ok()?)));
    let words: Vec<u64> = words.collect();
    words.chunks_exact(2).find(|pair| pair[0] == libc::AT_SYSINFO_EHDR).map(|pair| pair[1])
}

/// A call on a tape, and later its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(usize);

/// A place in a tape's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(usize);

impl Address {
    /// The place so many bytes further on.
    #[must_use]
    pub fn plus(self, bytes: usize) -> Address {
        Address(self.0 + bytes)
    }
}

/// An argument of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// A number or an address of the process's own.
    Value(u64),
    /// The address of a place in the tape's data.
    Data(Address),
    /// The result of an earlier call.
    Result(Slot),
}

impl From<u64> for Argument {
    fn from(value: u64) -> Argument {
        Argument::Value(value)
    }
}

impl From<u32> for Argument {
    fn from(value: u32) -> Argument {
        Argument::Value(value.into())
    }
}

impl From<usize> for Argument {
    fn from(value: usize) -> Argument {
        Argument::Value(value as u64)
    }
}

impl From<i64> for Argument {
    fn from(value: i64) -> Argument {
        Argument::Value(value.cast_unsigned())
    }
}

impl From<i32> for Argument {
    fn from(value: i32) -> Argument {
        Argument::Value(i64::from(value).cast_unsigned())
    }
}

impl From<Address> for Argument {
    fn from(address: Address) -> Argument {
        Argument::Data(address)
    }
}

impl From<Slot> for Argument {
    fn from(slot: Slot) -> Argument {
        Argument::Result(slot)
    }
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A required call failed. Those after it weren't made.
    #[error("system call {number} (call {} of the tape): {source}", .slot.0)]
    Call {
        /// Which.
        slot: Slot,
        /// Its number.
        number: i64,
        /// Its error.
        source: io::Error,
    },
    /// The tape has more data than fits a region.
    #[error("a tape has {0} bytes of data, more than its region holds")]
    TooLong(usize),
    /// A call refers to the result of one that comes after it.
    #[error("call {} of a tape uses a result that isn't there yet", .0.0)]
    Order(Slot),
    /// The thread can't run it.
    #[error("running a tape: {0}")]
    Thread(#[source] io::Error),
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        match &error {
            Error::Call { source, .. } | Error::Thread(source) => match source.raw_os_error() {
                // The number is kept, so that callers can tell errors apart.
                Some(errno) => io::Error::from_raw_os_error(errno),
                None => io::Error::new(source.kind(), error),
            },
            _ => io::Error::other(error),
        }
    }
}

/// A list of system calls with their data.
#[derive(Clone, Debug, Default)]
pub struct Tape {
    calls: Vec<Call>,
    data: Vec<u8>,
    /// (place, address): the word at the place holds the address.
    links: Vec<(Address, Address)>,
}

#[derive(Clone, Debug)]
struct Call {
    number: i64,
    arguments: [Argument; 6],
    required: bool,
}

impl Tape {
    /// An empty tape.
    pub fn new() -> Tape {
        Tape::default()
    }

    /// Whether it has no calls.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Adds a call that may fail. Arguments not given are 0.
    pub fn syscall(&mut self, number: i64, arguments: &[Argument]) -> Slot {
        self.add(number, arguments, false)
    }

    /// Adds a call that ends the run when it fails.
    pub fn require(&mut self, number: i64, arguments: &[Argument]) -> Slot {
        self.add(number, arguments, true)
    }

    fn add(&mut self, number: i64, given: &[Argument], required: bool) -> Slot {
        let mut arguments = [Argument::Value(0); 6];
        for (place, argument) in arguments.iter_mut().zip(given) {
            *place = *argument;
        }
        self.calls.push(Call { number, arguments, required });
        Slot(self.calls.len() - 1)
    }

    /// Adds data; it is aligned to 16 bytes.
    pub fn data(&mut self, bytes: &[u8]) -> Address {
        let at = self.data.len().next_multiple_of(16);
        self.data.resize(at, 0);
        self.data.extend_from_slice(bytes);
        Address(at)
    }

    /// Adds a zero-terminated string.
    pub fn string(&mut self, text: &[u8]) -> Address {
        let address = self.data(text);
        self.data.push(0);
        address
    }

    /// Adds room for something that a call writes.
    pub fn room(&mut self, bytes: usize) -> Address {
        let at = self.data.len().next_multiple_of(16);
        self.data.resize(at + bytes, 0);
        Address(at)
    }

    /// Makes the word at a place of the data hold the address of another place.
    pub fn link(&mut self, place: Address, to: Address) {
        self.links.push((place, to));
    }

    /// Runs it on a thread of the process that has the region.
    pub fn run(&self, thread: &mut Stopped, region: Region) -> Result<Results, Error> {
        let room = region.capacity();
        let data_at = room.checked_sub(self.data.len()).map(|at| at & !15).unwrap_or_default();
        let batch = data_at / ENTRY;
        if batch == 0 && !self.calls.is_empty() {
            return Err(Error::TooLong(self.data.len()));
        }
        let base = region.data() + data_at as u64;
        let mut data = self.data.clone();
        for &(place, to) in &self.links {
            let word = (base + to.0 as u64).to_ne_bytes();
            let Some(bytes) = data.get_mut(place.0..place.0 + 8) else { return Err(Error::TooLong(data.len())) };
            bytes.copy_from_slice(&word);
        }
        let pid = thread.thread();
        write(pid, base, &data).map_err(Error::Thread)?;

        let mut values: Vec<i64> = Vec::with_capacity(self.calls.len());
        for calls in self.calls.chunks(batch.max(1)) {
            let first = values.len();
            let bytes = encode(calls, &values, base, region.data())?;
            write(pid, region.data(), &bytes).map_err(Error::Thread)?;
            let registers = start_registers(thread, region, calls.len()).map_err(Error::Thread)?;
            thread.run(&registers).map_err(Error::Thread)?;
            let mut back = vec![0; bytes.len()];
            read(pid, region.data(), &mut back).map_err(Error::Thread)?;
            for (index, (entry, call)) in back.chunks_exact(ENTRY).zip(calls).enumerate() {
                let value = i64::from_ne_bytes(std::array::from_fn(|byte| entry[RESULT_AT + byte]));
                if call.required
                    && let Err(source) = succeed(value)
                {
                    return Err(Error::Call { slot: Slot(first + index), number: call.number, source });
                }
                values.push(value);
            }
        }
        read(pid, base, &mut data).map_err(Error::Thread)?;
        Ok(Results { values, data })
    }
}

fn encode(calls: &[Call], earlier: &[i64], data: u64, entries: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::with_capacity(calls.len() * ENTRY);
    let first = earlier.len();
    for (index, call) in calls.iter().enumerate() {
        let mut flags = if call.required { REQUIRED } else { 0 };
        bytes.extend_from_slice(&call.number.to_ne_bytes());
        for (position, argument) in call.arguments.iter().enumerate() {
            let word = match *argument {
                Argument::Value(value) => value,
                Argument::Data(address) => data + address.0 as u64,
                Argument::Result(slot) if slot.0 < first => earlier[slot.0].cast_unsigned(),
                Argument::Result(slot) if slot.0 < first + index => {
                    flags |= 1 << position;
                    entries + ((slot.0 - first) * ENTRY + RESULT_AT) as u64
                }
                Argument::Result(_) => return Err(Error::Order(Slot(first + index))),
            };
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        debug_assert_eq!(bytes.len() % ENTRY, FLAGS_AT);
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&NOT_RUN.to_ne_bytes());
    }
    Ok(bytes)
}

fn start_registers(thread: &mut Stopped, region: Region, calls: usize) -> io::Result<Registers> {
    let mut registers = thread.registers()?;
    registers.set(Register::Rip, region.start);
    registers.set(Register::Rbx, region.data());
    registers.set(Register::R12, region.data() + (calls * ENTRY) as u64);
    // No system call is to be restarted on the way there.
    registers.set(Register::OrigRax, u64::MAX);
    // A program that single-steps itself must not single-step us.
    const TRAP_FLAG: u64 = 1 << 8;
    registers.set(Register::Eflags, registers.get(Register::Eflags) & !TRAP_FLAG);
    Ok(registers)
}

fn write(pid: Pid, address: u64, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let written = vm::write_vectored(pid, std::iter::once((address, bytes)))?;
    if written == bytes.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EFAULT)) }
}

fn read(pid: Pid, address: u64, bytes: &mut [u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let length = bytes.len();
    let read = vm::read_vectored(pid, bytes, &[Remote { address, length }])?;
    if read == length { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EFAULT)) }
}

/// What a run brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Results {
    values: Vec<i64>,
    data: Vec<u8>,
}

impl Results {
    /// What a call returned: a value, or its error.
    pub fn get(&self, slot: Slot) -> io::Result<u64> {
        succeed(self.values.get(slot.0).copied().unwrap_or(-i64::from(libc::ENOSYS)))
    }

    /// What a call returned, errors as negative numbers.
    pub fn raw(&self, slot: Slot) -> i64 {
        self.values.get(slot.0).copied().unwrap_or(-i64::from(libc::ENOSYS))
    }

    /// All results in the order of the calls, errors as negative numbers.
    pub fn values(&self) -> &[i64] {
        &self.values
    }

    /// Data after the run.
    pub fn data(&self, address: Address, bytes: usize) -> &[u8] {
        self.data.get(address.0..address.0 + bytes).unwrap_or_default()
    }

    /// The word at a place of the data after the run.
    pub fn word(&self, address: Address) -> u64 {
        self.data(address, 8).try_into().map(u64::from_ne_bytes).unwrap_or_default()
    }
}

/// Lets a thread run into a call that blocks, with data for one of its arguments to point to, and takes it out of it
/// again. The kernel then remembers how to continue the call, exactly as if the program had made it.
///
/// Returns the call's result: [`crate::ptrace::restart::BLOCK`] when it was interrupted so, and its real result when it
/// didn't block.
pub fn enter_call(
    thread: &mut Stopped,
    region: Region,
    number: i64,
    arguments: [u64; 6],
    pointed: Option<(usize, &[u8])>,
) -> io::Result<i64> {
    let mut registers = start_registers(thread, region, 0)?;
    registers.set(Register::Rip, region.start + call_offset());
    registers.set(Register::Rax, number.cast_unsigned());
    let places = [Register::Rdi, Register::Rsi, Register::Rdx, Register::R10, Register::R8, Register::R9];
    for (register, value) in places.into_iter().zip(arguments) {
        registers.set(register, value);
    }
    if let Some((index, bytes)) = pointed {
        write(thread.thread(), region.data(), bytes)?;
        if let Some(place) = places.get(index) {
            registers.set(*place, region.data());
        }
    }
    // The entry of the interrupted run's last result: it is never looked at.
    registers.set(Register::Rbx, region.data() + PAGE);
    let after = thread.start_and_interrupt(&registers, Duration::from_secs(2))?;
    Ok(after.result())
}
