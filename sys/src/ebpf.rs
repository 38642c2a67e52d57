//! Small programs that the kernel runs on packets (extended BPF), and memory shared with them (bpf(2), linux/bpf.h).
//!
//! [`Assembler`] writes what a filter on packets needs: loads from the packet, arithmetic, forward jumps, the clock, and words
//! of a [`SharedWords`]. The kernel's verifier has the last word on whether a program is safe, so nothing here has to be: a
//! program that reads where it must not isn't loaded.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use crate::outcome::owned;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
/// In the source register of a 64-bit load: the value is the address of a map's value.
const PSEUDO_MAP_VALUE: u8 = 2;
const KTIME_GET_NS: i32 = 5;
const WORD_LEN: usize = 8;

/// What of `union bpf_attr` makes a map.
#[repr(C)]
struct MapAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// What of `union bpf_attr` loads a program.
#[repr(C)]
struct ProgramAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads the attributes for their size; what they point to outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>()) })
}

/// Words that programs and this process share. They begin as zeros.
#[derive(Debug)]
pub struct SharedWords {
    map: OwnedFd,
    start: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the mapping belongs to this value alone and may be used from any thread, as its words are atomic.
unsafe impl Send for SharedWords {}

impl SharedWords {
    /// Makes `count` words: at most 524,287, which all kernels give (4 MiB).
    ///
    /// # Errors
    /// As bpf(2) and mmap(2); EPERM without CAP_BPF.
    pub fn new(count: usize) -> io::Result<SharedWords> {
        let len = count * WORD_LEN;
        let value_size = u32::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
        let attributes =
            MapAttributes { kind: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size, max_entries: 1, flags: BPF_F_MMAPABLE };
        let map = bpf(BPF_MAP_CREATE, &attributes)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, map.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(SharedWords { map, start, count })
    }

    /// The words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has `count` words, aligned to a page, and lives as long as `self`; all access is atomic.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and nothing borrows it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * WORD_LEN) };
    }
}

/// A register of the machine. Loads from the packet and the clock change `R0` to `R5`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Register {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    /// The packet, which loads from it need here.
    R6,
    R7,
    R8,
    R9,
}

/// The second operand of an operation.
#[derive(Clone, Copy, Debug)]
pub enum Operand {
    /// What is in a register.
    Register(Register),
    /// A number, extended with its sign.
    Value(i32),
}

impl From<Register> for Operand {
    fn from(register: Register) -> Operand {
        Operand::Register(register)
    }
}

impl From<i32> for Operand {
    fn from(value: i32) -> Operand {
        Operand::Value(value)
    }
}

/// 64-bit arithmetic, wrapping.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Arithmetic {
    Add = 0x07,
    Subtract = 0x17,
    Multiply = 0x27,
    Or = 0x47,
    And = 0x57,
    ShiftLeft = 0x67,
    ShiftRight = 0x77,
    Xor = 0xa7,
    Set = 0xb7,
}

/// A comparison of unsigned numbers.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Condition {
    Equal = 0x15,
    NotEqual = 0x55,
    Greater = 0x25,
    AtLeast = 0x35,
    /// They have a bit in common.
    AnyBit = 0x45,
}

/// How much is loaded from a packet, in network byte order.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Size {
    Word = 0x00,
    Half = 0x08,
    Byte = 0x10,
}

/// A jump whose end isn't known yet.
#[derive(Debug)]
#[must_use]
pub struct Jump(usize);

/// Writes a program.
#[derive(Debug, Default)]
pub struct Assembler(Vec<u64>);

impl Assembler {
    /// A program that has saved the packet where loads from it need it, in `R6`.
    pub fn new() -> Assembler {
        let mut assembler = Assembler::default();
        assembler.apply(Arithmetic::Set, Register::R6, Register::R1);
        assembler
    }

    fn push(&mut self, code: u8, to: u8, from: u8, offset: i16, value: i32) {
        let bytes = [
            u64::from(code),
            u64::from(from << 4 | to) << 8,
            u64::from(offset.cast_unsigned()) << 16,
            u64::from(value.cast_unsigned()) << 32,
        ];
        self.0.push(bytes.iter().sum());
    }

    fn push_with(&mut self, code: u8, to: Register, operand: Operand) {
        // The bit that says that the operand is a register.
        const FROM_REGISTER: u8 = 0x08;
        match operand {
            Operand::Register(from) => self.push(code | FROM_REGISTER, to as u8, from as u8, 0, 0),
            Operand::Value(value) => self.push(code, to as u8, 0, 0, value),
        }
    }

    /// `to = to operation operand`
    pub fn apply(&mut self, operation: Arithmetic, to: Register, operand: impl Into<Operand>) {
        self.push_with(operation as u8, to, operand.into());
    }

    fn set_wide(&mut self, to: Register, from: u8, low: u32, high: u32) {
        self.push(0x18, to as u8, from, 0, low.cast_signed());
        self.push(0, 0, 0, 0, high.cast_signed());
    }

    /// `to = value`
    pub fn set(&mut self, to: Register, value: u64) {
        self.set_wide(to, 0, (value & 0xffff_ffff) as u32, (value >> 32) as u32);
    }

    /// `to` becomes the address of the word `index`.
    pub fn address(&mut self, to: Register, words: &SharedWords, index: usize) {
        // There are fewer than 2^19 words.
        let offset = (index * WORD_LEN) as u32;
        self.set_wide(to, PSEUDO_MAP_VALUE, words.map.as_raw_fd().cast_unsigned(), offset);
    }

    /// `to` becomes the word `index` words behind the address in `base`.
    pub fn load(&mut self, to: Register, base: Register, index: i16) {
        self.push(0x79, to as u8, base as u8, index * WORD_LEN as i16, 0);
    }

    /// Writes the word `index` words behind the address in `base`.
    pub fn store(&mut self, base: Register, index: i16, from: Register) {
        self.push(0x7b, base as u8, from as u8, index * WORD_LEN as i16, 0);
    }

    /// Adds to the word `index` words behind the address in `base`, atomically.
    pub fn add_to(&mut self, base: Register, index: i16, from: Register) {
        self.push(0xdb, base as u8, from as u8, index * WORD_LEN as i16, 0x00);
    }

    /// Sets bits of the word `index` words behind the address in `base`, atomically.
    pub fn or_to(&mut self, base: Register, index: i16, from: Register) {
        self.push(0xdb, base as u8, from as u8, index * WORD_LEN as i16, 0x40);
    }

    /// `R0` becomes what stands in the packet at `offset`, or so far behind what `base` says. If the packet ends before, so
    /// does the program, with 0.
    pub fn load_packet(&mut self, size: Size, base: Option<Register>, offset: i32) {
        match base {
            None => self.push(0x20 | size as u8, 0, 0, 0, offset),
            Some(base) => self.push(0x40 | size as u8, 0, base as u8, 0, offset),
        }
    }

    /// `R0` becomes CLOCK_MONOTONIC in nanoseconds.
    pub fn load_clock(&mut self) {
        self.push(0x85, 0, 0, 0, KTIME_GET_NS);
    }

    /// Jumps to where [`Assembler::land`] says, if so.
    pub fn jump_if(&mut self, condition: Condition, left: Register, right: impl Into<Operand>) -> Jump {
        self.push_with(condition as u8, left, right.into());
        Jump(self.0.len() - 1)
    }

    /// Jumps to where [`Assembler::land`] says.
    pub fn jump(&mut self) -> Jump {
        self.push(0x05, 0, 0, 0, 0);
        Jump(self.0.len() - 1)
    }

    /// Jumps come out here.
    pub fn land(&mut self, jumps: impl IntoIterator<Item = Jump>) {
        for Jump(at) in jumps {
            // Programs have far fewer than 32,768 instructions.
            let distance = (self.0.len() - at - 1) as u64;
            self.0[at] |= distance << 16;
        }
    }

    /// The program ends and returns `value`.
    pub fn finish(&mut self, value: i32) {
        self.apply(Arithmetic::Set, Register::R0, value);
        self.push(0x95, 0, 0, 0, 0);
    }

    /// Has the kernel take it as a filter on packets, whose result says how much of a packet is let through.
    ///
    /// # Errors
    /// As bpf(2); EPERM without CAP_BPF. What the verifier found wrong is in the message.
    pub fn load_filter(&self) -> io::Result<Filter> {
        match self.load_with(&mut []) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EACCES)) => {
                let mut log = vec![0; 256 << 10];
                // It fails for the same reason.
                drop(self.load_with(&mut log));
                let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
                let log = String::from_utf8_lossy(&log[..end]);
                let last: Vec<&str> = log.lines().rev().take(4).collect();
                Err(io::Error::new(error.kind(), format!("{error}: {}", last.join(" < "))))
            }
            result => result.map(Filter),
        }
    }

    fn load_with(&self, log: &mut [u8]) -> io::Result<OwnedFd> {
        let attributes = ProgramAttributes {
            kind: BPF_PROG_TYPE_SOCKET_FILTER,
            count: u32::try_from(self.0.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
            instructions: self.0.as_ptr().addr() as u64,
            license: c"Apache-2.0".as_ptr().addr() as u64,
            log_level: u32::from(!log.is_empty()),
            log_size: u32::try_from(log.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?,
            log: if log.is_empty() { 0 } else { log.as_mut_ptr().addr() as u64 },
        };
        bpf(BPF_PROG_LOAD, &attributes)
    }
}

/// A loaded filter on packets.
#[derive(Debug)]
pub struct Filter(OwnedFd);

impl AsFd for Filter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
