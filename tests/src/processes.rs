//! Processes of this machine.

use sys::{Pid, libc};

/// The living processes that have an argument of this kind.
///
/// # Panics
/// When /proc can't be read.
#[must_use]
pub fn with_argument(is_wanted: impl Fn(&[u8]) -> bool) -> Vec<u32> {
    with_entry("cmdline", is_wanted)
}

/// The living processes that have a variable of this kind in the environment they were started with.
///
/// # Panics
/// When /proc can't be read.
#[must_use]
pub fn with_variable(is_wanted: impl Fn(&[u8]) -> bool) -> Vec<u32> {
    with_entry("environ", is_wanted)
}

fn with_entry(file: &str, is_wanted: impl Fn(&[u8]) -> bool) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let has = |pid: &u32| {
        let text = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        text.split(|&byte| byte == 0).any(&is_wanted)
    };
    pids.filter(has).collect()
}

/// Kills a process.
///
/// # Panics
/// When it is gone already.
pub fn kill(pid: u32) {
    signal(pid, libc::SIGKILL);
}

/// Does what Ctrl-C does to a process.
///
/// # Panics
/// When it is gone already.
pub fn interrupt(pid: u32) {
    signal(pid, libc::SIGINT);
}

fn signal(pid: u32, signal: i32) {
    let pid = Pid::from_raw(pid.try_into().expect("pids are small"));
    sys::process::kill(pid, signal).expect("it is there");
}
