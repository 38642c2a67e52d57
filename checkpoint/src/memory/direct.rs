//! Reads with `O_DIRECT`, which write tracking doesn't see.
//!
//! The kernel pins the pages of the buffer before the device writes into them. A page that a round protects and reads in
//! between is written without a fault afterwards, so the round would hand on old content and never learn of the new. (The
//! freeze is safe: it waits for such reads to end.) Nothing tells whether a page is pinned, so a process that has a file open
//! in this way isn't copied while it runs.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use sys::Pid;

const O_DIRECT: u32 = 0o40000;

/// Whether the process has a file open with `O_DIRECT`. A process that has ended hasn't.
pub(super) fn is_used_by(pid: Pid) -> bool {
    let directory = format!("/proc/{pid}");
    let Ok(descriptors) = fs::read_dir(format!("{directory}/fd")) else { return false };
    descriptors.flatten().any(|entry| {
        // Sockets and pipes, of which there may be thousands, needn't be looked at: a pipe's O_DIRECT means packets.
        let is_file = fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str().as_bytes().starts_with(b"/"));
        is_file
            && flags(&Path::new(&directory).join("fdinfo").join(entry.file_name()))
                .is_ok_and(|flags| flags & O_DIRECT != 0)
    })
}

fn flags(information: &Path) -> io::Result<u32> {
    let text = fs::read_to_string(information)?;
    let octal = text.lines().find_map(|line| line.strip_prefix("flags:")).map(str::trim);
    octal.and_then(|octal| u32::from_str_radix(octal, 8).ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    #[test]
    fn direct_reading_is_noticed() {
        let own = Pid::from_raw(i32::try_from(std::process::id()).unwrap());
        assert!(!is_used_by(own));
        let program = std::env::current_exe().unwrap();
        let file = fs::OpenOptions::new().read(true).custom_flags(O_DIRECT as i32).open(program).unwrap();
        assert!(is_used_by(own));
        drop(file);
        assert!(!is_used_by(own));
    }
}
