//! Calls that were interrupted half-way.
//!
//! A blocking write(2) returns when all is written, and a recv(2) with `MSG_WAITALL` when all has come, unless a signal handler runs
//! meanwhile: programs rely on that. A thread that is stopped in such a call, however, has it end with what was done so far, and no
//! restart makes it whole, since what was done is done. So the thread is sent through a few instructions of ours, which make the
//! call again for the rest, add up what both have done, and go on where the program made the call:
//!
//! ```text
//! | code page, r-x: a row of equal slots | data pages, rw-: what each slot is to do |
//! ```
//!
//! From then on that is part of the program: it moves along and may be stopped again, also in a slot, whose rest is then another
//! slot's. A slot is free again when its thread has left it; the pages stay, and are found again by their code.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

use sys::fds::{self, sockets};
use sys::process;
use sys::ptrace::{Register, Registers, Stopped};
use sys::tape::{Region, Tape};
use sys::vm::{self, Remote};
use sys::{Pid, libc};

use crate::source::REGION_AT;
use crate::terminals;

const PAGE: u64 = 4096;
const SLOTS: u64 = 16;
/// Bytes of a slot's code and of its data.
const CODE_BYTES: u64 = 64;
const DATA_BYTES: u64 = 512;
const DATA_PAGES: u64 = SLOTS * DATA_BYTES / PAGE;
/// Where in a slot's data is what.
const DONE: u64 = 0;
const SECOND: u64 = 8;
const THIRD: u64 = 16;
const BACK: u64 = 24;
const BUSY: u64 = 32;
const MESSAGE: u64 = 48;
const PARTS: u64 = 112;
/// How many parts of a message a slot has room for.
const MOST_PARTS: usize = ((DATA_BYTES - PARTS) / PART_BYTES) as usize;
/// struct iovec, struct msghdr.
const PART_BYTES: u64 = 16;
const MESSAGE_BYTES: usize = 56;

/// What is left to do of a call.
#[derive(Debug)]
struct Rest {
    number: i64,
    /// The second and third argument of the call for the rest, unless it has parts.
    arguments: [u64; 2],
    /// What is left of the parts of its data, as address and length.
    parts: Option<Vec<(u64, u64)>>,
}

/// Has a thread that was stopped half-way through a call finish it when it runs again. `pid` is its process.
pub(crate) fn finish_later(pid: Pid, stopped: &mut Stopped) -> io::Result<()> {
    let mut registers = stopped.registers()?;
    let Some(rest) = rest_of(pid, &registers)? else { return Ok(()) };
    let mask = stopped.signal_mask()?;
    let Some(slot) = free_slot(pid, stopped)? else { return Ok(()) };
    let mut data = vec![0; DATA_BYTES as usize];
    let mut put = |at: u64, word: u64| data[at as usize..][..8].copy_from_slice(&word.to_ne_bytes());
    put(DONE, registers.result().cast_unsigned());
    put(SECOND, registers.get(Register::Rsi));
    put(THIRD, registers.get(Register::Rdx));
    put(BACK, registers.get(Register::Rip));
    put(BUSY, 1);
    let [mut second, mut third] = rest.arguments;
    if let Some(parts) = &rest.parts {
        for (index, (address, length)) in (0..).zip(parts) {
            put(PARTS + index * PART_BYTES, *address);
            put(PARTS + index * PART_BYTES + 8, *length);
        }
        let (list, count) = (slot.data + PARTS, parts.len() as u64);
        if rest.number == libc::SYS_writev {
            (second, third) = (list, count);
        } else {
            // struct msghdr: its third and fourth word. The peer's name and the control messages went with the first part.
            put(MESSAGE + 16, list);
            put(MESSAGE + 24, count);
            (second, third) = (slot.data + MESSAGE, registers.get(Register::Rdx));
        }
    }
    write(pid, slot.data, &data)?;
    registers.set(Register::Rsi, second);
    registers.set(Register::Rdx, third);
    registers.set(Register::Rax, rest.number.cast_unsigned());
    registers.set(Register::OrigRax, u64::MAX);
    registers.set(Register::Rip, slot.code);
    stopped.set_state(registers, mask)
}

/// What a thread has left to do of a call that ended too early.
fn rest_of(pid: Pid, registers: &Registers) -> io::Result<Option<Rest>> {
    let (Some(number), Ok(done @ 1..)) = (registers.call(), u64::try_from(registers.result())) else { return Ok(None) };
    let [descriptor, second, third, fourth, ..] = registers.call_arguments();
    let flags = |word: u64| (word & 0xffff_ffff) as i32;
    const OTHERWISE: i32 = libc::MSG_DONTWAIT | libc::MSG_OOB | libc::MSG_PEEK | libc::MSG_TRUNC | libc::MSG_ERRQUEUE;
    let waits = |flags: i32, receives: bool| flags & OTHERWISE == 0 && (!receives || flags & libc::MSG_WAITALL != 0);
    let parts = match number {
        libc::SYS_write => None,
        libc::SYS_sendto if waits(flags(fourth), false) => None,
        libc::SYS_recvfrom if waits(flags(fourth), true) => None,
        libc::SYS_writev => Some((second, third)),
        libc::SYS_sendmsg | libc::SYS_recvmsg if waits(flags(third), number == libc::SYS_recvmsg) => {
            let mut header = [0; MESSAGE_BYTES];
            read(pid, second, &mut header)?;
            let word = |index: usize| u64::from_ne_bytes(std::array::from_fn(|byte| header[index * 8 + byte]));
            // Who asks for control messages gets what came with them in one piece.
            if number == libc::SYS_recvmsg && word(5) != 0 {
                return Ok(None);
            }
            Some((word(2), word(3)))
        }
        _ => return Ok(None),
    };
    let rest = match parts {
        None if done < third => Rest { number, arguments: [second + done, third - done], parts: None },
        None => return Ok(None),
        Some((list, count)) => {
            let Some(parts) = parts_left(pid, list, count, done)? else { return Ok(None) };
            Rest { number, arguments: [0; 2], parts: Some(parts) }
        }
    };
    Ok(is_blocking_stream(pid, flags(descriptor))?.then_some(rest))
}

/// What is left of the parts of a message when so many bytes of it are done; `None` when nothing is, or too many parts.
fn parts_left(pid: Pid, list: u64, count: u64, done: u64) -> io::Result<Option<Vec<(u64, u64)>>> {
    let Some(count) = usize::try_from(count).ok().filter(|count| *count <= libc::UIO_MAXIOV as usize) else {
        return Ok(None);
    };
    let mut bytes = vec![0; count * PART_BYTES as usize];
    read(pid, list, &mut bytes)?;
    let words = bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(std::array::from_fn(|byte| word[byte])));
    let words: Vec<u64> = words.collect();
    let mut parts: VecDeque<(u64, u64)> = words.chunks_exact(2).map(|part| (part[0], part[1])).collect();
    let mut done = done;
    while let Some((address, length)) = parts.pop_front() {
        if done < length {
            parts.push_front((address + done, length - done));
            break;
        }
        done -= length;
    }
    Ok((1..=MOST_PARTS).contains(&parts.len()).then(|| parts.into()))
}

/// Whether a descriptor is a pipe, a terminal or a stream socket on which calls wait.
fn is_blocking_stream(pid: Pid, descriptor: i32) -> io::Result<bool> {
    let handle = process::pidfd_open(pid)?;
    let file = process::pidfd_getfd(handle.as_fd(), descriptor)?;
    if fds::status_flags(file.as_fd())? & libc::O_NONBLOCK != 0 {
        return Ok(false);
    }
    let status = fds::status(file.as_fd())?;
    Ok(match status.file_type() {
        libc::S_IFIFO => true,
        libc::S_IFCHR => terminals::end(status.special).is_some(),
        libc::S_IFSOCK => sockets::int_option(file.as_fd(), libc::SOL_SOCKET, libc::SO_TYPE)? == libc::SOCK_STREAM,
        _ => false,
    })
}

/// Addresses of a slot.
struct Slot {
    code: u64,
    data: u64,
}

fn slots(code: u64) -> impl Iterator<Item = Slot> {
    (0..SLOTS).map(move |index| Slot { code: code + index * CODE_BYTES, data: code + PAGE + index * DATA_BYTES })
}

/// A slot that no thread is in, in pages that are there or in new ones; `None` when the process can't have any.
fn free_slot(pid: Pid, stopped: &mut Stopped) -> io::Result<Option<Slot>> {
    let page = code_page();
    for mapping in vm::maps(pid)? {
        let is_candidate =
            mapping.execute && !mapping.write && mapping.inode == 0 && mapping.end - mapping.start == PAGE;
        let mut found = vec![0; page.len()];
        if !is_candidate || read(pid, mapping.start, &mut found).is_err() || found != page {
            continue;
        }
        for slot in slots(mapping.start) {
            let mut busy = [0; 8];
            read(pid, slot.data + BUSY, &mut busy)?;
            if busy == [0; 8] {
                return Ok(Some(slot));
            }
        }
    }
    Ok(slots(install(pid, stopped, &page)?).next())
}

/// Maps pages with the code; returns where.
fn install(pid: Pid, stopped: &mut Stopped, page: &[u8]) -> io::Result<u64> {
    let region = Region::install(stopped, REGION_AT, true)?;
    let made = (|| {
        let mut tape = Tape::new();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let length = (1 + DATA_PAGES) * PAGE;
        let arguments = [0.into(), length.into(), protection.into(), flags.into(), (-1).into(), 0.into()];
        let mapped = tape.require(libc::SYS_mmap, &arguments);
        let start = tape.run(stopped, region)?.get(mapped)?;
        write(pid, start, page)?;
        let mut tape = Tape::new();
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        tape.require(libc::SYS_mprotect, &[start.into(), PAGE.into(), protection.into()]);
        tape.run(stopped, region)?;
        Ok(start)
    })();
    region.remove(stopped)?;
    made
}

/// The code of all slots.
fn code_page() -> Vec<u8> {
    let mut page = Vec::new();
    for slot in slots(0) {
        page.extend_from_slice(&slot_code(slot.code, slot.data));
    }
    page
}

/// The code of a slot. The kernel's calls leave all registers but rax, rcx and r11 as they were, and so does this.
fn slot_code(code: u64, data: u64) -> [u8; CODE_BYTES as usize] {
    let mut bytes: Vec<u8> = Vec::new();
    // An instruction that ends in the distance from its end to a word of the data, and what comes after the distance.
    let with_word = |bytes: &mut Vec<u8>, instruction: &[u8], word: u64, after: &[u8]| {
        bytes.extend_from_slice(instruction);
        let end = code + bytes.len() as u64 + 4 + after.len() as u64;
        let distance = u32::try_from(data + word - end).unwrap_or_default();
        bytes.extend_from_slice(&distance.to_le_bytes());
        bytes.extend_from_slice(after);
    };
    bytes.extend_from_slice(&[0x0f, 0x05]); // syscall
    bytes.extend_from_slice(&[0x48, 0x85, 0xc0]); // test rax, rax
    bytes.extend_from_slice(&[0x7e, 0x09]); // jle 1f
    with_word(&mut bytes, &[0x48, 0x03, 0x05], DONE, &[]); // add rax, [done]
    bytes.extend_from_slice(&[0xeb, 0x07]); // jmp 2f
    with_word(&mut bytes, &[0x48, 0x8b, 0x05], DONE, &[]); // 1: mov rax, [done]
    with_word(&mut bytes, &[0x48, 0x8b, 0x35], SECOND, &[]); // 2: mov rsi, [second]
    with_word(&mut bytes, &[0x48, 0x8b, 0x15], THIRD, &[]); // mov rdx, [third]
    with_word(&mut bytes, &[0x48, 0x8b, 0x0d], BACK, &[]); // mov rcx, [back]
    // From here on nothing of the data is needed.
    with_word(&mut bytes, &[0xc6, 0x05], BUSY, &[0]); // mov byte [busy], 0
    bytes.extend_from_slice(&[0xff, 0xe1]); // jmp rcx
    bytes.resize(CODE_BYTES as usize, 0xcc);
    std::array::from_fn(|index| bytes[index])
}

fn read(pid: Pid, address: u64, buffer: &mut [u8]) -> io::Result<()> {
    let length = buffer.len();
    match vm::read_vectored(pid, buffer, &[Remote { address, length }])? {
        read if read == length => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

fn write(pid: Pid, address: u64, data: &[u8]) -> io::Result<()> {
    match vm::write_vectored(pid, std::iter::once((address, data)))? {
        written if written == data.len() => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}
