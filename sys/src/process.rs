//! Operations on processes other than tracing: descriptors of processes, their memory, clocks, limits.

/// Reading of a clock in nanoseconds; 0 for a clock that doesn't exist.
pub fn clock_ns(clock: libc::clockid_t) -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours that outlives the call.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    if result != 0 {
        return 0;
    }
    time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec)
}
