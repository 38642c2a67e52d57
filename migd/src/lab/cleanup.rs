//! Taking a lab down, whatever state it is in.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;
use nix::mount::{MntFlags, umount2};
use sys::netns::{NetNamespace, named_with_prefix, remove_named};

use super::layout::Names;
use super::processes::Belonging;

/// What could not be removed. Empty when all went well.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Leftovers {
    /// Processes that did not end.
    pub processes: Vec<u32>,
    /// Namespaces, mounts and files, with the reason.
    pub others: Vec<String>,
}

impl Leftovers {
    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.processes.is_empty() && self.others.is_empty()
    }
}

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing is left");
        }
        f.write_str("left behind:")?;
        for pid in &self.processes {
            write!(f, " process {pid} does not end;")?;
        }
        for other in &self.others {
            write!(f, " {other};")?;
        }
        Ok(())
    }
}

/// Ends the lab's processes and removes its namespaces (with their devices and routes), mounts and files. A lab that is
/// not there, or only half there, is no error.
///
/// # Errors
/// When it can't even be found out what is there.
pub fn down(lab: &str) -> anyhow::Result<Leftovers> {
    let names = Names::new(lab)?;
    let lock = super::lock(&names)?;
    let namespaces = namespaces(&names)?;
    let mut ids = BTreeSet::new();
    for name in &namespaces {
        // A name whose namespace is unmounted already is an empty file and has no processes.
        if let Ok(id) = NetNamespace::open_named(name).and_then(|namespace| namespace.id()) {
            ids.insert(id);
        }
    }
    let mut leftovers = Leftovers::default();
    leftovers.processes.extend(Belonging { lab: lab.to_owned(), namespaces: ids }.end());
    for name in &namespaces {
        note(&mut leftovers, remove_named(name), || format!("namespace {name}"));
    }
    for path in mounts_below(&names.root()).context("can't read the mounts of this process")? {
        let unmounted = umount2(&path, MntFlags::MNT_DETACH).map_err(io::Error::from);
        note(&mut leftovers, unmounted, || format!("mount {}", path.display()));
    }
    let removed = match fs::remove_dir_all(names.root()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    note(&mut leftovers, removed, || format!("directory {}", names.root().display()));
    // While it is still locked: who opened the file meanwhile and gets the lock then holds one that nobody else
    // sees, but finds the lab gone as well.
    let _ = fs::remove_file(names.lock());
    drop(lock);
    Ok(leftovers)
}

/// The name of a lab that belongs to this process and ends with it; `purpose` begins the name.
#[must_use]
pub fn own_name(purpose: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{purpose}{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Takes down the labs that [`own_name`] named for processes that are no more (killed, so that they could not clean up).
pub fn remove_abandoned(purpose: &str) {
    let Ok(entries) = fs::read_dir("/run") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let lab = name.to_str().and_then(|name| name.strip_prefix("migd-"));
        let Some(lab) = lab else { continue };
        if abandoned_by(lab, purpose).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // Whoever runs next tries again; what this one does needs a lab of another name.
            let _ = down(lab);
        }
    }
}

/// The process that a lab belonged to, when [`own_name`] made its name for this purpose.
fn abandoned_by(lab: &str, purpose: &str) -> Option<u32> {
    let (pid, number) = lab.strip_prefix(purpose)?.split_once('x')?;
    number.parse::<u32>().ok()?;
    pid.parse().ok()
}

/// The lab's namespaces, as their names tell.
pub(super) fn namespaces(names: &Names) -> anyhow::Result<Vec<String>> {
    let mut found = named_with_prefix(&names.namespace("")).context("can't list the named namespaces")?;
    found.retain(|name| names.owns_namespace(name));
    Ok(found)
}

fn note(leftovers: &mut Leftovers, result: io::Result<()>, what: impl FnOnce() -> String) {
    if let Err(error) = result {
        leftovers.others.push(format!("{}: {error}", what()));
    }
}

/// What is mounted at or below `root`, the innermost first.
fn mounts_below(root: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let mut found: Vec<PathBuf> = table.lines().filter_map(mount_point).filter(|path| path.starts_with(root)).collect();
    found.reverse();
    Ok(found)
}

/// The mount point of a line of mountinfo (its fifth field, with blanks written as octal escapes).
fn mount_point(line: &str) -> Option<PathBuf> {
    let field = line.split(' ').nth(4)?;
    let text = field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
    Some(PathBuf::from(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        let line = r"36 35 98:0 / /mnt/with\040blank rw,noatime master:1 - ext3 /dev/root rw";
        assert_eq!(mount_point(line), Some(PathBuf::from("/mnt/with blank")));
        assert_eq!(mount_point("36 35"), None);
    }

    #[test]
    fn only_labs_of_a_purpose_and_a_process_are_taken_for_abandoned() {
        assert_eq!(abandoned_by("demo12x3", "demo"), Some(12));
        for other in ["demo", "demo12", "demox3", "demo12x", "demo12x3y", "lab", "demolition1x1"] {
            assert_eq!(abandoned_by(other, "demo"), None, "{other}");
        }
        let name = own_name("demo");
        assert_eq!(abandoned_by(&name, "demo"), Some(std::process::id()));
        assert_ne!(name, own_name("demo"));
    }

    #[test]
    fn taking_down_what_is_not_there_is_no_error() {
        let lab = format!("none{}", std::process::id());
        assert_eq!(down(&lab).expect("goes well"), Leftovers::default());
        assert!(!Names::new(&lab).expect("a name").lock().exists());
    }
}
