//! What a running tree is made of: reasons to stay, and what a target must have.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use sys::fds::{self, Compare};
use sys::proc::{Place, Stat, Status};
use sys::vm::{self, Remote};
use sys::{Pid, libc};

use crate::descriptors;
use crate::error::{Error, Result};
use crate::external::External;
use crate::memory::{self, TrackedProcess};
use crate::offer::{Offer, ProcessSummary, RequiredFile};
use crate::sandbox::Inside;
use crate::shm;
use crate::stay::StayReason;
use crate::sysv;
use crate::terminals;

impl Inside {
    /// The processes that have an address space of their own, parents first.
    pub fn living(&self) -> Result<Vec<TrackedProcess>> {
        let mut living = Vec::new();
        for process in self.processes()? {
            let Ok(stat) = self.proc.stat(Place::Process(process)) else { continue };
            let Ok(pid) = self.pids.outside(process) else { continue };
            if !stat.is_zombie() {
                let terminal = terminals::number(&stat);
                living.push(TrackedProcess { process, parent: stat.parent, session: stat.session, terminal, pid });
            }
        }
        // A child of vfork borrows its parent's memory until it executes a program.
        let pids: BTreeMap<u32, Pid> = living.iter().map(|p| (p.process, p.pid)).collect();
        living.retain(|process| pids.get(&process.parent).is_none_or(|parent| !share_memory(*parent, process.pid)));
        sort_by_descent(&mut living, |process| (process.process, process.parent));
        Ok(living)
    }
}

fn share_memory(one: Pid, other: Pid) -> bool {
    matches!(fds::kcmp(Compare::Memory, (one, 0), (other, 0)), Ok(Ordering::Equal))
}

/// Sorts so that every parent comes before its children. `numbers` gives an item's own number and its parent's.
pub(crate) fn sort_by_descent<T>(items: &mut Vec<T>, numbers: impl Fn(&T) -> (u32, u32)) {
    let mut rest: Vec<T> = std::mem::take(items);
    let all: BTreeSet<u32> = rest.iter().map(|item| numbers(item).0).collect();
    let mut placed: BTreeSet<u32> = BTreeSet::new();
    while !rest.is_empty() {
        let before = rest.len();
        let mut later = Vec::new();
        for item in rest {
            let (number, parent) = numbers(&item);
            if !all.contains(&parent) || placed.contains(&parent) || number == parent {
                placed.insert(number);
                items.push(item);
            } else {
                later.push(item);
            }
        }
        rest = later;
        if rest.len() == before {
            // A circle, which a kernel has not; keep the order rather than loop.
            items.append(&mut rest);
        }
    }
}

/// Everything that keeps the processes here.
pub(crate) fn stay_reasons(
    inside: &Inside,
    processes: &[TrackedProcess],
    external: &dyn External,
) -> Result<Vec<StayReason>> {
    let mut reasons = Vec::new();
    for process in inside.processes()? {
        let here = Place::Process(process);
        let (Ok(stat), Ok(status)) = (inside.proc.stat(here), inside.proc.status(here)) else { continue };
        let mut stay = |what: &str, why: String| reasons.push(StayReason::new(process, what, why));
        judge_place(&stat, &mut stay);
        if !stat.is_zombie() {
            judge_process(inside, process, &status, &mut stay);
        } else if stat.threads > 1 {
            stay("process", "its first thread has ended while others run".into());
        }
    }
    for process in processes {
        // A process that ends meanwhile keeps nobody.
        for obstacle in memory::obstacles(process.pid).unwrap_or_default() {
            reasons.push(StayReason::new(process.process, obstacle.what, obstacle.why));
        }
    }
    reasons.extend(sysv::stay_reasons(inside.init)?);
    reasons.extend(shm::stay_reasons(inside.init, processes)?);
    let listed: Vec<descriptors::Process> =
        processes.iter().map(|p| descriptors::Process { process: p.process, pid: p.pid }).collect();
    let job = descriptors::Job { init: inside.init, processes: &listed };
    reasons.extend(descriptors::stay_reasons(&job, external)?);
    Ok(reasons)
}

fn judge_place(stat: &Stat, stay: &mut impl FnMut(&str, String)) {
    if stat.parent == 0 {
        stay("process", "it was brought into the job from outside (its parent isn't in the job)".into());
    }
    if stat.session == 0 || stat.group == 0 {
        stay("process", "its session or process group isn't in the job".into());
    }
}

fn judge_process(inside: &Inside, process: u32, status: &Status, stay: &mut impl FnMut(&str, String)) {
    if status.tracer != 0 {
        stay("process", format!("process {} traces it (a debugger or strace)", status.tracer));
    }
    if status.seccomp == 1 {
        stay("process", "it is in strict seccomp mode".into());
    }
    if status.untag_mask != u64::MAX {
        stay("process", "it uses linear address masking".into());
    }
    if !status.thread_features.is_empty() {
        stay("process", format!("it uses the processor feature {}", status.thread_features));
    }
    let here = Place::Process(process);
    for kind in ["cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "time", "user", "uts"] {
        let file = format!("ns/{kind}");
        let own = inside.proc.link(here, &file);
        let init = inside.proc.link(Place::Process(1), &file);
        if let (Ok(own), Ok(init)) = (own, init)
            && own != init
        {
            stay("process", format!("it is in a {kind} namespace of its own"));
        }
    }
    for (file, what) in [("exe", "program"), ("cwd", "working directory"), ("root", "root directory")] {
        if let Ok(target) = inside.proc.link(here, file)
            && target.as_os_str().as_bytes().ends_with(b" (deleted)")
        {
            stay(what, format!("{} is deleted", target.display()));
        }
    }
    let mut header = [0; 5];
    let class = std::fs::File::open(inside.proc.path(here, "exe"))
        .and_then(|file| std::os::unix::fs::FileExt::read_exact_at(&file, &mut header, 0).map(|()| header[4]));
    if class.is_ok_and(|class| class == 1) {
        stay("process", "it is a 32-bit program".into());
    }
    if let Ok(pid) = inside.pids.outside(process)
        && let Ok(attributes) = sys::process::scheduling(pid)
        && attributes.policy == 6
    {
        stay("process", "it is scheduled by deadline".into());
    }
}

/// Extensions that programs find out about and use; other words of /proc/cpuinfo concern the kernel.
const FEATURES: &[&str] = &[
    "abm",
    "adx",
    "aes",
    "amx_bf16",
    "amx_int8",
    "amx_tile",
    "avx",
    "avx2",
    "avx512_4fmaps",
    "avx512_4vnniw",
    "avx512_bf16",
    "avx512_bitalg",
    "avx512_fp16",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_vp2intersect",
    "avx512_vpopcntdq",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512er",
    "avx512f",
    "avx512ifma",
    "avx512pf",
    "avx512vbmi",
    "avx512vl",
    "avx_vnni",
    "bmi1",
    "bmi2",
    "clflushopt",
    "clwb",
    "cmov",
    "cx16",
    "cx8",
    "erms",
    "f16c",
    "fma",
    "fma4",
    "fsgsbase",
    "fsrm",
    "fxsr",
    "gfni",
    "hle",
    "lahf_lm",
    "lzcnt",
    "mmx",
    "movbe",
    "movdir64b",
    "movdiri",
    "pclmulqdq",
    "pku",
    "pni",
    "popcnt",
    "prefetchwt1",
    "rdpid",
    "rdrand",
    "rdseed",
    "rdtscp",
    "rtm",
    "serialize",
    "sha_ni",
    "sse",
    "sse2",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "tbm",
    "vaes",
    "vpclmulqdq",
    "waitpkg",
    "xgetbv1",
    "xop",
    "xsave",
    "xsavec",
    "xsaveopt",
    "xsaves",
];

/// Instruction set extensions of this machine that programs may use.
pub(crate) fn cpu_features() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let flags = flags.split_once(':').map(|(_, flags)| flags).unwrap_or_default();
    flags.split_whitespace().filter(|flag| FEATURES.contains(flag)).map(str::to_owned).collect()
}

/// Hash of this kernel's vdso: its code is part of every program's address space.
pub(crate) fn vdso_hash() -> u64 {
    let own = sys::Pid::this();
    let Some(vdso) = vm::maps(own).ok().and_then(|maps| maps.into_iter().find(|map| map.name == b"[vdso]")) else {
        return 0;
    };
    let mut bytes = vec![0; usize::try_from(vdso.end - vdso.start).unwrap_or_default()];
    let length = bytes.len();
    if vm::read_vectored(own, &mut bytes, &[Remote { address: vdso.start, length }]).is_err() {
        return 0;
    }
    // FNV-1a
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// What a target must have.
pub(crate) fn offer(inside: &Inside, processes: &[TrackedProcess]) -> Result<Offer> {
    let mut summaries = Vec::new();
    let mut files: BTreeSet<RequiredFile> = BTreeSet::new();
    let shm = shm::device(inside.init);
    for process in processes {
        let here = Place::Process(process.process);
        // One that ends meanwhile isn't part of the offer.
        let (Ok(stat), Ok(status)) = (inside.proc.stat(here), inside.proc.status(here)) else { continue };
        summaries.push(ProcessSummary {
            process: process.process,
            parent: stat.parent,
            session: stat.session,
            name: String::from_utf8_lossy(&stat.comm).into_owned(),
            threads: stat.threads,
            memory_bytes: status.resident,
        });
        for mapping in vm::maps(process.pid).unwrap_or_default() {
            if mapping.shared || !mapping.name.starts_with(b"/") || mapping.name.ends_with(b" (deleted)") {
                continue;
            }
            let Ok(path) = String::from_utf8(mapping.name) else { continue };
            if let Ok(metadata) = std::fs::metadata(inside.proc.path(here, &format!("root{path}")))
                && Some(metadata.dev()) != shm
            {
                files.insert(RequiredFile {
                    path,
                    size: metadata.size(),
                    modified_ns: metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()),
                });
            }
        }
    }
    let listed: Vec<descriptors::Process> =
        processes.iter().map(|p| descriptors::Process { process: p.process, pid: p.pid }).collect();
    let job = descriptors::Job { init: inside.init, processes: &listed };
    files.extend(descriptors::required_files(&job)?);
    let page = 4096;
    debug_assert_eq!(libc::_SC_PAGESIZE, 30);
    Ok(Offer {
        kernel: sys::process::kernel_release(),
        cpu_features: cpu_features(),
        xstate_features: sys::process::xstate_features(),
        page_bytes: page,
        vdso: vdso_hash(),
        memory_bytes: summaries.iter().map(|summary| summary.memory_bytes).sum(),
        processes: summaries,
        files: files.into_iter().collect(),
        clocks: inside.clocks(),
    })
}

/// Why this machine can't take what is offered.
pub(crate) fn check(inside: &Inside, offer: &Offer) -> Result<()> {
    let refuse = |why: String| Err(Error::Refused(why));
    let own = cpu_features();
    let missing: Vec<&str> =
        offer.cpu_features.iter().filter(|feature| !own.contains(feature)).map(String::as_str).collect();
    if !missing.is_empty() {
        return refuse(format!("its processor lacks {}", missing.join(", ")));
    }
    let lacking = offer.xstate_features & !sys::process::xstate_features();
    if lacking != 0 {
        return refuse(format!("its processor doesn't save the register state {lacking:#x}"));
    }
    if offer.page_bytes != 4096 {
        return refuse(format!("the job has pages of {} bytes", offer.page_bytes));
    }
    if offer.vdso != vdso_hash() {
        let own = sys::process::kernel_release();
        return refuse(format!("its kernel ({own}) has another vdso than the job's ({})", offer.kernel));
    }
    for file in &offer.files {
        let path = inside.proc.path(Place::Process(1), &format!("root{}", file.path));
        match std::fs::metadata(path) {
            Err(error) => return refuse(format!("{}: {error}", file.path)),
            Ok(metadata) if metadata.size() != file.size => {
                return refuse(format!("{} is {} bytes here and {} there", file.path, metadata.size(), file.size));
            }
            Ok(_) => {}
        }
    }
    Ok(())
}
