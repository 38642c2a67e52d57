//! From one layout of a process to the next, as system calls in its stub.

use std::io;
use std::os::fd::BorrowedFd;

use super::layout::{Area, AreaFlags, Backing, ProcessLayout, Protection};
use super::ranges::{Span, SpanSet};
use super::stubs::{Argument, Argument::Value, Script};

/// Files of shared objects at the target.
pub(super) trait ObjectFiles {
    fn file(&self, id: u32, writable: bool) -> Option<BorrowedFd<'_>>;

    /// The identifier of System V shared memory, which is attached and not mapped.
    fn segment(&self, id: u32) -> Option<i32>;
}

/// System call numbers of x86-64: the target of the calls is a stub, not us.
mod number {
    pub const CLOSE: i64 = 3;
    pub const MMAP: i64 = 9;
    pub const MPROTECT: i64 = 10;
    pub const MUNMAP: i64 = 11;
    pub const MADVISE: i64 = 28;
    pub const SHMAT: i64 = 30;
    pub const PRCTL: i64 = 157;
    pub const OPENAT: i64 = 257;
    pub const MLOCK2: i64 = 325;
    pub const MSEAL: i64 = 462;
}

const MAP_SHARED: u64 = 0x01;
const MAP_PRIVATE: u64 = 0x02;
const MAP_DROPPABLE: u64 = 0x08;
const MAP_ANONYMOUS: u64 = 0x20;
const MAP_GROWSDOWN: u64 = 0x0100;
const MAP_NORESERVE: u64 = 0x4000;
const MAP_HUGETLB: u64 = 0x4_0000;
const MAP_FIXED_NOREPLACE: u64 = 0x10_0000;
const MAP_HUGE_SHIFT: u32 = 26;

const SHM_RDONLY: u64 = 0o10_000;
const SHM_EXEC: u64 = 0o100_000;

const O_RDWR: u64 = 2;
const O_CLOEXEC: u64 = 0o2_000_000;
const AT_FDCWD: u64 = -100_i64 as u64;

const PR_SET_VMA: u64 = 0x5356_4d41;
const PR_SET_VMA_ANON_NAME: u64 = 0;

const MADV_NORMAL: u64 = 0;
const MADV_DONTNEED: u64 = 4;
const MADV_GUARD_INSTALL: u64 = 102;
const MLOCK_ONFAULT: u64 = 1;

/// What sets and what clears each property that madvise sets. MADV_HUGEPAGE and its opposite can't be cleared, only
/// exchanged.
const ADVICE: [(AreaFlags, u64, Option<u64>); 8] = [
    (AreaFlags::DONT_FORK, 10, Some(11)),
    (AreaFlags::WIPE_ON_FORK, 18, Some(19)),
    (AreaFlags::DONT_DUMP, 16, Some(17)),
    (AreaFlags::HUGE_PAGE, 14, None),
    (AreaFlags::NO_HUGE_PAGE, 15, None),
    (AreaFlags::MERGEABLE, 12, Some(13)),
    (AreaFlags::SEQUENTIAL, 2, Some(MADV_NORMAL)),
    (AreaFlags::RANDOM, 1, Some(MADV_NORMAL)),
];

/// Turns the mappings of `before` into those of `next`.
pub(super) fn change(
    before: &ProcessLayout,
    next: &ProcessLayout,
    objects: &dyn ObjectFiles,
    script: &mut Script<'_>,
) -> io::Result<()> {
    let kept = before.kept(next);
    let spans = |layout: &ProcessLayout| -> SpanSet {
        layout.areas.iter().filter(|area| !area.is_kernels()).map(|area| area.span()).collect()
    };
    for gone in spans(before).difference(&kept).spans() {
        script.begin(1, 0)?;
        let arguments = [Value(gone.start), Value(gone.length()), Value(0), Value(0), Value(0), Value(0)];
        script.call(number::MUNMAP, arguments, format!("unmap {:x}-{:x}", gone.start, gone.end));
    }
    for area in next.areas.iter().filter(|area| !area.is_kernels()) {
        let whole = SpanSet::from_iter([area.span()]);
        for new in whole.difference(&kept).spans() {
            map(&area.part(*new), objects, script)?;
        }
        for same in whole.intersection(&kept).spans() {
            adjust(before, *same, area, script)?;
        }
    }
    Ok(())
}

/// What comes after the last page.
pub(super) fn finish(process: &ProcessLayout, script: &mut Script<'_>) -> io::Result<()> {
    let own: SpanSet = process.areas.iter().filter(|area| area.has_own_pages()).map(Area::span).collect();
    for span in process.discards.intersection(&own).spans() {
        advise(*span, MADV_DONTNEED, "drop pages", script)?;
    }
    let any: SpanSet = process.areas.iter().filter(|area| !area.is_kernels()).map(Area::span).collect();
    for span in process.guards.intersection(&any).spans() {
        advise(*span, MADV_GUARD_INSTALL, "install guard pages (needs Linux 6.13)", script)?;
    }
    for area in &process.areas {
        let (start, length) = (Value(area.start), Value(area.end - area.start));
        if area.flags.contains(AreaFlags::LOCKED) {
            let on_fault = if area.flags.contains(AreaFlags::LOCKED_ON_FAULT) { MLOCK_ONFAULT } else { 0 };
            script.begin(1, 0)?;
            let arguments = [start, length, Value(on_fault), Value(0), Value(0), Value(0)];
            script.call(number::MLOCK2, arguments, format!("lock {area} in memory"));
        }
        if area.flags.contains(AreaFlags::SEALED) {
            script.begin(1, 0)?;
            let arguments = [start, length, Value(0), Value(0), Value(0), Value(0)];
            script.call(number::MSEAL, arguments, format!("seal {area} (needs Linux 6.10)"));
        }
    }
    Ok(())
}

fn map(area: &Area, objects: &dyn ObjectFiles, script: &mut Script<'_>) -> io::Result<()> {
    let path_length = match &area.backing {
        Backing::File { path, .. } => path.len() + 1,
        _ => 0,
    };
    script.begin(5 + ADVICE.len(), path_length + area.name.len() + 1)?;
    let mut flags = MAP_FIXED_NOREPLACE | if area.shared { MAP_SHARED } else { MAP_PRIVATE };
    for (flag, value) in [(AreaFlags::GROWS_DOWN, MAP_GROWSDOWN), (AreaFlags::NO_RESERVE, MAP_NORESERVE)] {
        if area.flags.contains(flag) {
            flags |= value;
        }
    }
    let mut descriptor = Value(u64::MAX);
    let mut file_offset = 0;
    let mut closes = false;
    let mut segment = None;
    match &area.backing {
        Backing::Anonymous if area.flags.contains(AreaFlags::DROPPABLE) => {
            flags = flags & !MAP_PRIVATE | MAP_DROPPABLE | MAP_ANONYMOUS;
        }
        Backing::Anonymous => flags |= MAP_ANONYMOUS,
        Backing::HugePages { page_size } => {
            flags |= MAP_ANONYMOUS | MAP_HUGETLB | u64::from(page_size.trailing_zeros()) << MAP_HUGE_SHIFT;
        }
        Backing::File { path, offset, writable, .. } => {
            let mode = if *writable { O_RDWR } else { 0 } | O_CLOEXEC;
            let name = script.string(path);
            let arguments = [Value(AT_FDCWD), name, Value(mode), Value(0), Value(0), Value(0)];
            let what = format!("open {} for a mapping", String::from_utf8_lossy(path));
            descriptor = script.call(number::OPENAT, arguments, what);
            file_offset = *offset;
            closes = true;
        }
        Backing::Object { id, writable, .. } if objects.segment(*id).is_some() => {
            segment = objects.segment(*id).map(|segment| (segment, *writable));
        }
        Backing::Object { id, offset, writable } => {
            let file = objects.file(*id, *writable).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, format!("no shared memory {id} for {area}"))
            })?;
            descriptor = script.import(file)?;
            file_offset = *offset;
            closes = true;
        }
        Backing::Kernel(_) => return Ok(()),
    }
    let length = area.end - area.start;
    // The kernel counts private memory against the overcommit limit once it is writable, and keeps counting it.
    let counts = area.flags.contains(AreaFlags::ACCOUNTED) && !area.shared;
    let first = if counts { area.protection | Protection::WRITE } else { area.protection };
    if let Some((segment, writable)) = segment {
        attach(area, segment, writable, script);
        return Ok(());
    }
    let arguments = [
        Value(area.start),
        Value(length),
        Value(u64::from(first.bits())),
        Value(flags),
        descriptor,
        Value(file_offset),
    ];
    script.call_expecting(number::MMAP, arguments, area.start, format!("map {area}"));
    if first != area.protection {
        protect(area.span(), area.protection, area, script);
    }
    if closes {
        script.attempt(number::CLOSE, [descriptor, Value(0), Value(0), Value(0), Value(0), Value(0)]);
    }
    if !area.name.is_empty() {
        give_name(area.span(), &area.name, script);
    }
    for (flag, set, _) in ADVICE {
        if area.flags.contains(flag) {
            advise_now(area.span(), set, format!("set {flag:?} of {area}"), script);
        }
    }
    Ok(())
}

/// Attaches System V shared memory, all of it.
fn attach(area: &Area, segment: i32, writable: bool, script: &mut Script<'_>) {
    let mut flags = if writable { 0 } else { SHM_RDONLY };
    let mut given = if writable { Protection::READ | Protection::WRITE } else { Protection::READ };
    if area.protection.contains(Protection::EXECUTE) {
        flags |= SHM_EXEC;
        given |= Protection::EXECUTE;
    }
    let segment = Value(u64::from(segment.cast_unsigned()));
    let arguments = [segment, Value(area.start), Value(flags), Value(0), Value(0), Value(0)];
    script.call_expecting(number::SHMAT, arguments, area.start, format!("attach {area}"));
    if given != area.protection {
        protect(area.span(), area.protection, area, script);
    }
    for (flag, set, _) in ADVICE {
        if area.flags.contains(flag) {
            advise_now(area.span(), set, format!("set {flag:?} of {area}"), script);
        }
    }
}

/// Gives a part of a mapping that stays the properties it has now.
fn adjust(before: &ProcessLayout, span: Span, area: &Area, script: &mut Script<'_>) -> io::Result<()> {
    let overlapping = before.areas.iter().filter(|old| old.end > span.start && old.start < span.end);
    for (old, part) in overlapping.filter_map(|old| Some((old, old.span().overlap(span)?))) {
        script.begin(5 + 2 * ADVICE.len(), area.name.len() + 1)?;
        // Being writable for a moment is what makes the kernel count it.
        let is_counted = |area: &Area| area.flags.contains(AreaFlags::ACCOUNTED) && !area.shared;
        let counts = is_counted(area) && !is_counted(old) && !area.protection.contains(Protection::WRITE);
        if counts {
            protect(part, area.protection | Protection::WRITE, area, script);
        }
        if old.protection != area.protection || counts {
            protect(part, area.protection, area, script);
        }
        if old.name != area.name {
            give_name(part, &area.name, script);
        }
        // Clearing comes first: what clears one property may clear another (MADV_NORMAL).
        for (flag, _, clear) in ADVICE {
            if let (true, Some(clear)) = (old.flags.contains(flag) && !area.flags.contains(flag), clear) {
                advise_now(part, clear, format!("clear {flag:?} of {area}"), script);
            }
        }
        for (flag, set, _) in ADVICE {
            if area.flags.contains(flag) && !old.flags.contains(flag) {
                advise_now(part, set, format!("set {flag:?} of {area}"), script);
            }
        }
    }
    Ok(())
}

fn protect(span: Span, protection: Protection, area: &Area, script: &mut Script<'_>) {
    let protection = Value(u64::from(protection.bits()));
    let arguments = [Value(span.start), Value(span.length()), protection, Value(0), Value(0), Value(0)];
    script.call(number::MPROTECT, arguments, format!("protect {area}"));
}

fn give_name(span: Span, name: &[u8], script: &mut Script<'_>) {
    let name = if name.is_empty() { Value(0) } else { script.string(name) };
    // A kernel without names for anonymous memory does without.
    let arguments =
        [Value(PR_SET_VMA), Value(PR_SET_VMA_ANON_NAME), Value(span.start), Value(span.length()), name, Value(0)];
    script.attempt(number::PRCTL, arguments);
}

fn advise(span: Span, advice: u64, what: &str, script: &mut Script<'_>) -> io::Result<()> {
    script.begin(1, 0)?;
    advise_now(span, advice, format!("{what} {:x}-{:x}", span.start, span.end), script);
    Ok(())
}

fn advise_now(span: Span, advice: u64, what: String, script: &mut Script<'_>) {
    let arguments: [Argument; 6] =
        [Value(span.start), Value(span.length()), Value(advice), Value(0), Value(0), Value(0)];
    script.call(number::MADVISE, arguments, what);
}
