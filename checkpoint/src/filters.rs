//! System call filters that programs of the job have set for themselves (seccomp(2)).
//!
//! A thread has a chain of them, of which the oldest are the sandbox's own: every thread has those by inheritance, here and at the
//! target. The others travel as code and are installed again, oldest first, by the thread itself while it may still do all; they don't
//! judge what it does on our behalf, since a tracer's tapes run with filters suspended. What threads of one process have in common
//! is installed before they are made, so that it is one chain at the target as well (SECCOMP_FILTER_FLAG_TSYNC asks for that).

use std::io;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use sys::libc;
use sys::ptrace::Stopped;
use sys::seccomp::Instruction;
use sys::tape::Tape;

use crate::error::{Error, Result};
use crate::image::ThreadImage;

/// A filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Its code: the kernel's `struct sock_filter`, 8 bytes each.
    pub code: ByteBuf,
    /// SECCOMP_FILTER_FLAG_* that stay with it.
    pub flags: u64,
}

/// The filters of a tree, each once.
#[derive(Debug)]
pub(crate) struct Filters {
    /// How many every thread has from the sandbox.
    inherited: usize,
    pub found: Vec<Filter>,
}

impl Filters {
    /// None yet; `inherited` is how many the sandbox's init has.
    pub fn new(inherited: u32) -> Filters {
        Filters { inherited: inherited as usize, found: Vec::new() }
    }

    /// A thread's own filters, oldest first, as indexes of [`Filters::found`]. `count` is how many it has in all.
    pub fn of(&mut self, thread: &Stopped, count: u32) -> io::Result<Vec<u32>> {
        let mut own = Vec::new();
        for number in self.inherited..count as usize {
            let (program, flags) = thread.filter(number)?.ok_or(io::ErrorKind::NotFound)?;
            let code = program.instructions().iter().flat_map(Instruction::bytes).collect::<Vec<u8>>();
            let filter = Filter { code: ByteBuf::from(code), flags };
            let known = self.found.iter().position(|known| *known == filter);
            let index = known.unwrap_or_else(|| {
                self.found.push(filter);
                self.found.len() - 1
            });
            own.push(u32::try_from(index).map_err(io::Error::other)?);
        }
        Ok(own)
    }
}

/// How many filters, counted from the oldest, all these threads have in common.
pub(crate) fn common(threads: &[ThreadImage]) -> usize {
    let Some((first, others)) = threads.split_first() else { return 0 };
    let alike = |other: &ThreadImage| first.filters.iter().zip(&other.filters).take_while(|(a, b)| a == b).count();
    others.iter().map(alike).min().unwrap_or(first.filters.len())
}

/// Tapes that install these of the tree's filters on the thread that runs them, each with one: they may be large.
pub(crate) fn install(all: &[Filter], own: &[u32]) -> Result<Vec<Tape>> {
    own.iter()
        .map(|&index| {
            let missing = || Error::Image(format!("it has no system call filter {index}"));
            let Filter { code, flags } = all.get(index as usize).ok_or_else(missing)?;
            let mut tape = Tape::new();
            let length = u16::try_from(code.len() / Instruction::BYTES).map_err(|_| missing())?;
            let code = tape.data(code);
            // struct sock_fprog: length, padding, address.
            let program = tape.data(&[u64::from(length).to_ne_bytes(), [0; 8]].concat());
            tape.link(program.plus(8), code);
            let mode = libc::SECCOMP_SET_MODE_FILTER;
            tape.require(libc::SYS_seccomp, &[mode.into(), (*flags).into(), program.into()]);
            Ok(tape)
        })
        .collect()
}
