//! inotify: its watches, found again by the file handles that fdinfo shows.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use serde_bytes::ByteBuf;
use sys::fds::{self, events};
use sys::libc;

use super::super::image::{InotifyWatch, Kind};
use super::super::namespace;
use super::super::scan::Seen;
use super::{Dumping, Handler, Problem, View};

/// inotify.
pub(in super::super) struct Inotify;

/// A `inotify` line of fdinfo.
struct Line {
    number: i32,
    inode: u64,
    device: (u32, u32),
    mask: u32,
    handle_kind: i32,
    handle: Vec<u8>,
}

fn parse(text: &str) -> Option<Line> {
    let field = |name: &str| text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix(':'));
    let hex = |name: &str| u64::from_str_radix(field(name)?, 16).ok();
    let device = u32::try_from(hex("sdev")?).ok()?;
    let handle = field("f_handle")?;
    let handle = (0..handle.len() / 2)
        .map(|at| u8::from_str_radix(handle.get(at * 2..at * 2 + 2)?, 16).ok())
        .collect::<Option<Vec<u8>>>()?;
    Some(Line {
        number: i32::try_from(hex("wd")?).ok()?,
        inode: hex("ino")?,
        // The kernel's own encoding: 20 bits of minor.
        device: (device >> 20, device & 0xf_ffff),
        mask: u32::try_from(hex("mask")?).ok()?,
        handle_kind: i32::try_from(hex("fhandle-type")?).ok()?,
        handle,
    })
}

/// Where the watched file is now.
fn path_of(line: &Line, view: &View<'_>) -> io::Result<Option<Vec<u8>>> {
    let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", view.job.init))?;
    let device = format!("{}:{}", line.device.0, line.device.1);
    for mount in mounts.lines() {
        let mut words = mount.split(' ').skip(2);
        let (Some(found), Some(_), Some(point)) = (words.next(), words.next(), words.next()) else { continue };
        // Mount points with spaces are escaped; none of them is worth more code here.
        if found != device || point.contains('\\') {
            continue;
        }
        let resolved = namespace::enter(view.job.init, || {
            let mount = fds::open_at(None, point.as_ref(), libc::O_RDONLY | libc::O_NONBLOCK, 0)?;
            events::open_by_handle(mount.as_fd(), line.handle_kind, &line.handle, libc::O_PATH)
        });
        // The job's own /proc doesn't know us, so the path is asked for outside.
        let Ok(path) = resolved.and_then(|file| fds::link_of(file.as_fd())) else { continue };
        let path = path.as_bytes().to_vec();
        let is_same = view
            .status_of(&path)
            .is_ok_and(|status| status.inode == line.inode && fds::device_numbers(status.device).1 == line.device.1);
        if is_same {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

fn watches(seen: &Seen, view: &View<'_>) -> Result<Vec<InotifyWatch>, Problem> {
    let info = seen.info()?;
    let mut watches = Vec::new();
    for text in info.values("inotify ") {
        let stays = || Problem::Stays("inotify watch of a file that has no path any more".into());
        let line = parse(text).ok_or_else(stays)?;
        let path = path_of(&line, view)?.ok_or_else(stays)?;
        watches.push(InotifyWatch { number: line.number, path: ByteBuf::from(path), mask: line.mask });
    }
    Ok(watches)
}

impl Handler for Inotify {
    fn recognises(&self, seen: &Seen) -> bool {
        seen.is_anonymous("inotify")
    }

    fn obstacle(&self, seen: &Seen, view: &View<'_>) -> io::Result<Option<String>> {
        match watches(seen, view) {
            Ok(_) => Ok(None),
            Err(Problem::Stays(reason)) => Ok(Some(reason)),
            Err(Problem::System(error)) => Err(error),
        }
    }

    fn dump(&self, seen: &Seen, _: usize, dump: &mut Dumping<'_>) -> Result<Kind, Problem> {
        if fds::bytes_waiting(seen.file()?.as_fd())? > 0 {
            return Err(Problem::Stays("inotify events that the program hasn't read yet; try again".into()));
        }
        Ok(Kind::Inotify { watches: watches(seen, dump.view)? })
    }
}

/// Checks that what it watches is there; to be called inside the job's mount namespace.
pub(in super::super) fn check(watches: &[InotifyWatch]) -> io::Result<()> {
    for watch in watches {
        let path = std::ffi::OsStr::from_bytes(&watch.path);
        fds::open_at(None, path, libc::O_PATH | libc::O_NOFOLLOW, 0)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.to_string_lossy())))?;
    }
    Ok(())
}

/// Watches what it watched; to be called inside the job's mount namespace, as the last thing: what we do ourselves in a watched
/// directory is no news to the program.
pub(in super::super) fn watch(fd: &OwnedFd, watches: &[InotifyWatch]) -> io::Result<()> {
    // The kernel shows flags of the event too; only what inotify_add_watch(2) takes is kept.
    const SETTABLE: u32 = libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK | libc::IN_ONESHOT;
    let mut watches: Vec<&InotifyWatch> = watches.iter().collect();
    // The kernel gives the next free number from the one asked for.
    watches.sort_by_key(|watch| watch.number);
    for watch in watches {
        let path = std::ffi::OsStr::from_bytes(&watch.path);
        events::inotify_watch(fd.as_fd(), path, watch.mask & SETTABLE, watch.number)?;
    }
    Ok(())
}
