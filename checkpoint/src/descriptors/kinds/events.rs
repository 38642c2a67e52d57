//! eventfd, timerfd and signalfd: all they hold is in fdinfo.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sys::fds::events;
use sys::libc;

use super::super::image::{Kind, TimerImage};
use super::super::scan::{FdInfo, Seen};
use super::{Dumping, Handler, Problem, View};

fn incomplete(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the kernel doesn't tell the state of {what}"))
}

/// eventfd.
pub(in super::super) struct Event;

impl Handler for Event {
    fn recognises(&self, seen: &Seen) -> bool {
        seen.is_anonymous("eventfd")
    }

    fn obstacle(&self, _: &Seen, _: &View<'_>) -> io::Result<Option<String>> {
        Ok(None)
    }

    fn dump(&self, seen: &Seen, _: usize, _: &mut Dumping<'_>) -> Result<Kind, Problem> {
        let info = seen.info()?;
        let count = info.value("eventfd-count:").and_then(|text| u64::from_str_radix(text, 16).ok());
        let semaphore = info.value("eventfd-semaphore:").map(|text| text != "0");
        match (count, semaphore) {
            (Some(count), Some(semaphore)) => Ok(Kind::Event { count, semaphore }),
            _ => Err(incomplete("an eventfd").into()),
        }
    }
}

/// timerfd.
pub(in super::super) struct Timer;

impl Handler for Timer {
    fn recognises(&self, seen: &Seen) -> bool {
        seen.is_anonymous("timerfd")
    }

    fn obstacle(&self, _: &Seen, _: &View<'_>) -> io::Result<Option<String>> {
        Ok(None)
    }

    fn dump(&self, seen: &Seen, _: usize, _: &mut Dumping<'_>) -> Result<Kind, Problem> {
        let mut timer = settled_timer(seen)?;
        if timer.settime_flags & libc::TFD_TIMER_ABSTIME != 0 && is_settable(timer.clock) && timer.left_ns > 0 {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let now_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
            timer.expires_at_ns = Some(now_ns.saturating_add(timer.left_ns));
        }
        Ok(Kind::Timer(timer))
    }
}

/// A timer with the time that is left of it. A periodic one that has expired and wasn't read shows none, as one that is off; when its
/// expiries are counted it runs again. That changes nothing that a program could notice: whoever reads the timer has the same done.
fn settled_timer(seen: &Seen) -> io::Result<TimerImage> {
    let mut attempts = 0;
    loop {
        events::count_expiries(seen.file()?.as_fd())?;
        let info = FdInfo::read(seen.pid, seen.number)?;
        let mut timer = parse_timer(&info).ok_or_else(|| incomplete("a timerfd"))?;
        if timer.interval_ns == 0 || timer.left_ns > 0 || timer.ticks == 0 {
            return Ok(timer);
        }
        // It has expired again between the two.
        attempts += 1;
        if attempts == ATTEMPTS {
            timer.left_ns = timer.interval_ns;
            return Ok(timer);
        }
    }
}

/// How often a timer that expires all the time is looked at before it is given its whole interval.
const ATTEMPTS: u32 = 16;

fn is_settable(clock: i32) -> bool {
    clock == libc::CLOCK_REALTIME || clock == libc::CLOCK_REALTIME_ALARM
}

fn parse_timer(info: &FdInfo) -> Option<TimerImage> {
    // "(seconds, nanoseconds)"
    let nanoseconds = |key| {
        let text: &str = info.value(key)?;
        let (seconds, rest) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(", ")?;
        let time = Duration::new(seconds.parse().ok()?, rest.parse().ok()?);
        u64::try_from(time.as_nanos()).ok()
    };
    Some(TimerImage {
        clock: info.value("clockid:")?.parse().ok()?,
        settime_flags: i32::from_str_radix(info.value("settime flags:")?, 8).ok()?,
        ticks: info.value("ticks:")?.parse().ok()?,
        left_ns: nanoseconds("it_value:")?,
        expires_at_ns: None,
        interval_ns: nanoseconds("it_interval:")?,
    })
}

/// A timer that goes on where the image's stopped.
pub(in super::super) fn make_timer(image: &TimerImage) -> io::Result<OwnedFd> {
    let TimerImage { clock, settime_flags, ticks, left_ns, expires_at_ns, interval_ns } = *image;
    let fd = events::timerfd(clock)?;
    let interval = Duration::from_nanos(interval_ns);
    match expires_at_ns {
        Some(at) => events::set_timer(fd.as_fd(), settime_flags, Duration::from_nanos(at), interval)?,
        // On a clock that nobody sets, an absolute time is as well kept as what is left of it.
        None if left_ns > 0 => events::set_timer(fd.as_fd(), 0, Duration::from_nanos(left_ns), interval)?,
        None => {}
    }
    if ticks > 0 {
        events::set_timer_ticks(fd.as_fd(), ticks)?;
    }
    Ok(fd)
}

/// signalfd.
pub(in super::super) struct Signal;

impl Handler for Signal {
    fn recognises(&self, seen: &Seen) -> bool {
        seen.is_anonymous("signalfd")
    }

    fn obstacle(&self, _: &Seen, _: &View<'_>) -> io::Result<Option<String>> {
        Ok(None)
    }

    fn dump(&self, seen: &Seen, _: usize, _: &mut Dumping<'_>) -> Result<Kind, Problem> {
        let mask = seen.info()?.value("sigmask:").and_then(|text| u64::from_str_radix(text, 16).ok());
        mask.map(|mask| Kind::Signal { mask }).ok_or_else(|| incomplete("a signalfd").into())
    }
}
