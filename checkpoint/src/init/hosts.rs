//! The job's own `/etc/hosts`.
//!
//! A job has a host name of its own, which nobody else knows. Programs look up the name of the host that they are on, and wait for a name
//! server or fail if it can't be found. So the job sees the machine's file with one line more for each of its addresses. Both are the
//! same at every machine, so the file is made anew there and isn't part of an image.

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use sys::namespaces;

const PLACE: &str = "/etc/hosts";

/// Puts it over the machine's, in this mount namespace only. `room` is a directory that something will be mounted on afterwards. Does
/// nothing where there is no such file.
pub(super) fn mount(name: &str, addresses: &[IpAddr], room: &Path) -> io::Result<()> {
    if name.is_empty() || addresses.is_empty() || !room.is_dir() {
        return Ok(());
    }
    let mut text = match fs::read(PLACE) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if text.last().is_some_and(|last| *last != b'\n') {
        text.push(b'\n');
    }
    for address in addresses {
        text.extend_from_slice(format!("{address}\t{name}\n").as_bytes());
    }
    // The file needs a file system: one that nobody else sees, and that lasts as long as the file is mounted.
    namespaces::mount_memory(room)?;
    let file = room.join("hosts");
    let written = fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&file);
    let mounted = written
        .and_then(|mut file| file.write_all(&text))
        .and_then(|()| namespaces::mount_over(&file, Path::new(PLACE)));
    namespaces::detach(room)?;
    mounted
}
