//! Everything that stays, with its name and what would help.

use std::io;

use super::super::image::Kind;
use super::super::scan::Seen;
use super::{Dumping, Handler, Problem, View};

/// Anything that no other handler knows.
pub(super) struct Other;

/// (name of the anonymous inode, what it is and what would help)
const KNOWN: &[(&str, &str)] = &[
    ("io_uring", "io_uring; start the program with io_uring off (most fall back to epoll)"),
    ("userfaultfd", "userfaultfd; its owner handles page faults of its own"),
    ("perf_event", "performance counter; stop profiling inside the job"),
    ("fanotify", "fanotify; stop the watching program"),
    ("bpf-map", "BPF map; it belongs to this machine's kernel"),
    ("bpf-prog", "BPF program; it belongs to this machine's kernel"),
    ("bpf_link", "BPF link; it belongs to this machine's kernel"),
    ("bpf-link", "BPF link; it belongs to this machine's kernel"),
    ("btf", "BPF type information; it belongs to this machine's kernel"),
    ("seccomp notify", "seccomp listener; the program supervises another one"),
    ("landlock-ruleset", "Landlock rule set under construction"),
    ("fscontext", "mount under construction"),
    ("kvm-vm", "KVM virtual machine"),
    ("kvm-vcpu", "KVM virtual processor"),
];

/// (prefix of the link, what it is)
const NAMESPACES: &[&str] = &["net:[", "mnt:[", "pid:[", "user:[", "uts:[", "ipc:[", "cgroup:[", "time:["];

fn reason(seen: &Seen) -> String {
    for (name, reason) in KNOWN {
        if seen.is_anonymous(name) {
            return (*reason).to_owned();
        }
    }
    if NAMESPACES.iter().any(|prefix| seen.link.starts_with(prefix.as_bytes())) {
        return format!("namespace {}; close it or stop what entered it", seen.shown());
    }
    if let Some(kind) = seen.link.strip_prefix(b"anon_inode:") {
        return format!("{}; this kind can't be moved", String::from_utf8_lossy(kind));
    }
    format!("{}; this kind can't be moved", seen.shown())
}

impl Handler for Other {
    fn recognises(&self, _: &Seen) -> bool {
        true
    }

    fn obstacle(&self, seen: &Seen, _: &View<'_>) -> io::Result<Option<String>> {
        Ok(Some(reason(seen)))
    }

    fn dump(&self, seen: &Seen, _: usize, _: &mut Dumping<'_>) -> Result<Kind, Problem> {
        Err(Problem::Stays(reason(seen)))
    }
}
