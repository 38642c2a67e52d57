//! Reading the system call filters that a traced thread has.

use std::io;

use super::{Stopped, request};
use crate::seccomp::{Instruction, Program};

const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;

impl Stopped {
    /// Whether it has a filter with this number, the oldest one being number 0.
    pub fn has_filter(&self, number: usize) -> io::Result<bool> {
        match request(PTRACE_SECCOMP_GET_FILTER, self.thread, number, 0) {
            // It has fewer, or none at all.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(false),
            other => other.map(|_| true),
        }
    }

    /// A filter of the thread's, the oldest one being number 0; `None` past the newest. With it the SECCOMP_FILTER_FLAG_* that the
    /// kernel remembers.
    pub fn filter(&self, number: usize) -> io::Result<Option<(Program, u64)>> {
        let length = match request(PTRACE_SECCOMP_GET_FILTER, self.thread, number, 0) {
            Ok(length) => usize::try_from(length).map_err(io::Error::other)?,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error),
        };
        let empty = libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 };
        let mut code = vec![empty; length];
        // As many instructions as it had a moment ago: a filter never changes, and the thread stands still.
        request(PTRACE_SECCOMP_GET_FILTER, self.thread, number, code.as_mut_ptr().addr())?;
        // struct seccomp_metadata: number and flags.
        let mut metadata = [number as u64, 0];
        let size = size_of_val(&metadata);
        request(PTRACE_SECCOMP_GET_METADATA, self.thread, size, metadata.as_mut_ptr().addr())?;
        let [_, flags] = metadata;
        let instructions = code.into_iter().map(|raw| Instruction {
            code: raw.code,
            jump_true: raw.jt,
            jump_false: raw.jf,
            operand: raw.k,
        });
        Ok(Some((Program::from(instructions.collect::<Vec<_>>()), flags)))
    }
}
