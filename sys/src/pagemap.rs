//! `PAGEMAP_SCAN` on `/proc/PID/pagemap`: which pages a process has, and which of them were written since they were protected.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use crate::Pid;
use crate::lend::{PAGE, Pages};
use crate::uffd::{self, WriteTracker};

bitflags::bitflags! {
    /// `PAGE_IS_*` of `linux/fs.h`, those that are asked for.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Category: u64 {
        /// Not write-protected: written since the last protecting scan, or never protected.
        const WRITTEN = 1 << 1;
        /// A page of a file or of shared memory, as opposed to the process's own copy.
        const FILE = 1 << 2;
        /// In memory.
        const PRESENT = 1 << 3;
        /// Swapped out (or a marker: write-protected while absent, guard, poison).
        const SWAPPED = 1 << 4;
        /// The shared page of zeros.
        const ZERO = 1 << 5;
        /// A guard page made with `MADV_GUARD_INSTALL` (Linux 6.15).
        const GUARD = 1 << 8;
    }
}

/// A run of pages of the same categories.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    categories: u64,
}

impl Region {
    /// A run of which no categories are known.
    #[must_use]
    pub fn new(start: u64, end: u64) -> Region {
        Region { start, end, categories: 0 }
    }

    /// The categories that were asked for with [`Query::report`] and hold for every page of the run.
    #[must_use]
    pub fn categories(&self) -> Category {
        Category::from_bits_retain(self.categories)
    }
}

/// Which pages a scan reports. A page matches when, after flipping the categories in `inverted`, it has all of `all_of` and
/// at least one of `any_of` (if there are any).
#[derive(Debug, Clone, Copy, Default)]
pub struct Query {
    /// Categories whose meaning is flipped before the match.
    pub inverted: Category,
    /// Every one of these must hold.
    pub all_of: Category,
    /// At least one of these must hold; empty means no condition.
    pub any_of: Category,
    /// What the regions tell; runs are split where these differ.
    pub report: Category,
    /// Write-protect each reported page in the same atomic step.
    pub protect: bool,
    /// Fail with `EPERM` on a mapping that isn't registered for asynchronous write protection.
    pub require_tracked: bool,
}

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

#[repr(C)]
struct Argument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGEMAP_SCAN: u64 = (3 << 30) | ((size_of::<Argument>() as u64) << 16) | ((b'f' as u64) << 8) | 16;

/// Regions fetched by one system call.
const BATCH_REGIONS: usize = 1024;

/// The page table of one process, as of the moment of opening: after an execve it stays that of the old program (and is empty).
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    buffer: Vec<Region>,
}

impl Pagemap {
    /// Opens `/proc/PID/pagemap`.
    ///
    /// # Errors
    /// The error of open(2): `ENOENT` when there is no such process.
    pub fn open(pid: Pid) -> io::Result<Pagemap> {
        Ok(Pagemap {
            file: File::open(format!("/proc/{pid}/pagemap"))?,
            buffer: vec![Region { start: 0, end: 0, categories: 0 }; BATCH_REGIONS],
        })
    }

    /// Whether the kernel can tell guard pages ([`Category::GUARD`]) apart.
    #[must_use]
    pub fn knows_guard_pages(&mut self) -> bool {
        let query = Query { all_of: Category::GUARD, report: Category::GUARD, ..Query::default() };
        // An empty range: only the arguments are checked.
        self.scan(4096, 4096, &query, |_| ()).is_ok()
    }

    /// Walks `start..end` and calls `visit` for each matching run, in ascending order. Adjacent runs of equal categories may be
    /// reported separately.
    ///
    /// # Errors
    /// `EPERM` when `require_tracked` is set and a mapping isn't tracked (the runs below it were visited, and protected if
    /// asked for); `ESRCH` when the address space is gone; `EINVAL` for a category the kernel doesn't know.
    pub fn scan(&mut self, start: u64, end: u64, query: &Query, mut visit: impl FnMut(Region)) -> io::Result<()> {
        let mut at = start;
        loop {
            let mut argument = Argument {
                size: size_of::<Argument>() as u64,
                flags: if query.protect { PM_SCAN_WP_MATCHING } else { 0 }
                    | if query.require_tracked { PM_SCAN_CHECK_WPASYNC } else { 0 },
                start: at,
                end,
                walk_end: 0,
                vec: self.buffer.as_mut_ptr() as u64,
                // The kernel gets itself memory for as many; there are no more than pages.
                vec_len: (end - at).div_ceil(PAGE as u64).clamp(1, self.buffer.len() as u64),
                max_pages: 0,
                category_inverted: query.inverted.bits(),
                category_mask: query.all_of.bits(),
                category_anyof_mask: query.any_of.bits(),
                return_mask: query.report.bits(),
            };
            // SAFETY: PAGEMAP_SCAN reads and writes one `struct pm_scan_arg`, which `Argument` mirrors, and writes at most
            // `vec_len` regions into our buffer, which outlives the call. It changes no content of the scanned memory.
            let count = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            let error = io::Error::last_os_error();
            let Ok(count) = usize::try_from(count) else {
                if error.raw_os_error() == Some(libc::EINTR) {
                    continue;
                }
                return Err(error);
            };
            for region in self.buffer.iter().take(count) {
                visit(*region);
            }
            if argument.walk_end >= end || argument.walk_end <= at {
                return Ok(());
            }
            at = argument.walk_end;
        }
    }
}

/// Whether a scan for [`Category::WRITTEN`] and nothing else, for which the kernel has a way that takes a tenth of the time, also reports pages
/// of private anonymous memory that were protected and have gone since (`MADV_DONTNEED`). It doesn't where the page table itself
/// has gone. Tried out once, on memory of our own.
pub fn written_scan_reports_absent_pages() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| try_absent_pages().unwrap_or(false))
}

fn try_absent_pages() -> io::Result<bool> {
    const PAGES: usize = 8;
    const GONE: usize = 3;
    let mut scratch = Pages::new(PAGES)?;
    scratch.bytes_mut(0..PAGES).fill(1);
    let start = scratch.bytes(0..PAGES).as_ptr().addr();
    let page = |number: usize| (start + number * PAGE) as u64;
    let tracker = WriteTracker::new(uffd::create()?)?;
    tracker.register(page(0), page(PAGES))?;
    let mut pagemap = Pagemap::open(Pid::this())?;
    let protect = Query { any_of: Category::PRESENT, protect: true, require_tracked: true, ..Query::default() };
    pagemap.scan(page(0), page(PAGES), &protect, |_| ())?;
    scratch.renew(GONE..GONE + 1)?;
    let written =
        Query { all_of: Category::WRITTEN, report: Category::WRITTEN, require_tracked: true, ..Query::default() };
    let mut reported = Vec::new();
    pagemap.scan(page(0), page(PAGES), &written, |run| reported.push((run.start, run.end)))?;
    Ok(reported == [(page(GONE), page(GONE + 1))])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_is_understood() {
        // Where it may not be tried at all it counts as no.
        if uffd::create().is_ok_and(|fd| WriteTracker::new(fd).is_ok()) {
            assert!(written_scan_reports_absent_pages());
        }
    }
}
