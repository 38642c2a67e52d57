//! Making processes.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use crate::Pid;
use crate::outcome::check;

/// `struct clone_args` of clone3(2), in its third version.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CloneArguments {
    /// CLONE_*.
    pub flags: u64,
    /// Address of an int for the pidfd.
    pub pidfd: u64,
    /// Address of the child's tid word.
    pub child_tid: u64,
    /// Address of the parent's tid word.
    pub parent_tid: u64,
    /// Signal at the child's end.
    pub exit_signal: u64,
    /// Lowest byte of the stack.
    pub stack: u64,
    /// Its size.
    pub stack_size: u64,
    /// Thread-local storage.
    pub tls: u64,
    /// Address of an array of numbers for the new thread, innermost namespace first.
    pub set_tid: u64,
    /// Its length.
    pub set_tid_size: u64,
    /// A cgroup.
    pub cgroup: u64,
}

impl CloneArguments {
    /// The bytes as the kernel reads them.
    pub fn bytes(&self) -> [u8; 88] {
        let words = [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
            self.cgroup,
        ];
        let mut bytes = [0; 88];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// Starts a program as a sibling of the caller (its parent is the caller's parent), in the namespaces that the caller's
/// children get. The new process has everything else of the caller, also its descriptors that survive an exec.
///
/// An exec that fails shows as exit code 127 at the parent. The caller must have one thread only.
pub fn start_sibling(program: &str, arguments: &[String]) -> io::Result<Pid> {
    let program = CString::new(program)?;
    let arguments = arguments.iter().map(|a| CString::new(a.as_bytes())).collect::<Result<Vec<_>, _>>()?;
    let mut pointers: Vec<*const libc::c_char> = arguments.iter().map(|a| a.as_ptr()).collect();
    pointers.push(std::ptr::null());

    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: without CLONE_VM the child has its own copy of all memory, like after fork; the null stack keeps the
    // caller's. The child makes only async-signal-safe calls.
    let result = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if check(result)? == 0 {
        // SAFETY: the path and the null-terminated array of strings were made before and are alive.
        unsafe { libc::execv(program.as_ptr(), pointers.as_ptr()) };
        crate::process::exit_now(127);
    }
    Ok(Pid::from_raw(libc::pid_t::try_from(result).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))?))
}

/// A program to start as the leader of a new session: as root, in no other group, with umask 022.
#[derive(Debug)]
pub struct Launch {
    /// Program and arguments; a program without a slash is looked up in the `PATH` of `env`.
    pub argv: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Working directory.
    pub cwd: PathBuf,
    /// Standard input, output and error.
    pub stdio: [OwnedFd; 3],
}

impl Launch {
    /// Starts it as a child of the caller. An exec that fails is an error with the error number of execve(2).
    pub fn start(self) -> io::Result<Pid> {
        let mut argv = self.argv.iter();
        let program = argv.next().ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        if self.cwd.as_os_str().as_bytes().contains(&0) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let [input, output, error] = self.stdio;
        let mut command = Command::new(program);
        command.args(argv).env_clear().envs(self.env).current_dir(&self.cwd);
        command.stdin(input).stdout(output).stderr(error);
        // SAFETY: the function makes system calls only; it allocates nothing and takes no lock.
        unsafe { command.pre_exec(become_root) };
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))?;
        Ok(Pid::from_raw(pid))
    }
}

fn become_root() -> io::Result<()> {
    // SAFETY: setsid takes nothing and touches no memory.
    check(unsafe { libc::setsid() })?;
    // Init blocks SIGCHLD, and a daemon's caller may have anything ignored.
    crate::process::reset_signals()?;
    // SAFETY: umask takes one integer.
    unsafe { libc::umask(0o022) };
    let nobody: *const libc::gid_t = std::ptr::null();
    // SAFETY: of no groups nothing is read.
    check(unsafe { libc::syscall(libc::SYS_setgroups, 0, nobody) })?;
    // SAFETY: setresgid takes three integers. The raw call is right here: the child has one thread.
    check(unsafe { libc::syscall(libc::SYS_setresgid, 0, 0, 0) })?;
    // SAFETY: setresuid takes three integers.
    check(unsafe { libc::syscall(libc::SYS_setresuid, 0, 0, 0) }).map(drop)
}
