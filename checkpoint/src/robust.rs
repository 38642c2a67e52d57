//! The robust mutexes of a copy that ends.
//!
//! A thread that ends leaves word in each robust futex that it holds (`FUTEX_OWNER_DIED`, get_robust_list(2)). That is for whoever else maps
//! the file that it is in. But if one of a job's two copies is killed, nobody has ended: the mutex belongs to the thread of the other
//! copy, which may map the same file.

use std::io;

use sys::libc;
use sys::ptrace::Stopped;
use sys::tape::{Region, Tape};

/// Bytes of a `struct robust_list_head`: the first entry, an offset, and the entry that is being taken or given back.
const HEAD_BYTES: usize = 24;

/// Has a thread that is to be killed forget its list, if anything is in it.
///
/// # Errors
/// `ESRCH` when the thread has ended, and those of running a tape.
pub(crate) fn forget(thread: &mut Stopped, region: Region) -> io::Result<()> {
    let (head, _) = sys::process::robust_list(thread.thread())?;
    if head == 0 || is_empty(thread, head) {
        return Ok(());
    }
    let mut tape = Tape::new();
    tape.require(libc::SYS_set_robust_list, &[0.into(), HEAD_BYTES.into()]);
    tape.run(thread, region)?;
    Ok(())
}

/// Whether the list of this head leads nowhere but back to it. One that can't be read means nothing to the kernel either.
fn is_empty(thread: &Stopped, head: u64) -> bool {
    let mut bytes = [0; HEAD_BYTES];
    if sys::seccomp::read_memory(thread.thread().as_raw(), head, &mut bytes).is_err() {
        return true;
    }
    let word = |at: usize| bytes[at..at + 8].try_into().map(u64::from_ne_bytes).unwrap_or_default();
    word(0) == head && word(16) == 0
}
