//! epoll.
//!
//! The kernel identifies what is watched by open file *and* by the number it was added with, and shows the number and the
//! file's inode. The number may be closed or mean another file by now while the watch lives on, because a duplicate of the
//! file is still open somewhere: such watches are looked for among all files of the job.

use std::collections::HashMap;
use std::io;

use sys::fds;

use super::super::image::{EpollWatch, Kind};
use super::super::scan::{Scan, Seen, is_gone};
use super::{Dumping, Handler, Problem, View, index32};

/// An epoll instance.
pub(in super::super) struct Epoll;

/// A `tfd:` line of fdinfo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Line {
    /// The number that the file was added with.
    pub number: i32,
    /// EPOLL*.
    pub events: u32,
    /// The program's word.
    pub data: u64,
    /// The file's.
    pub inode: u64,
}

pub(in super::super) fn parse(line: &str) -> Option<Line> {
    // "       5 events:       19 data:                5  pos:0 ino:29f sdev:9"
    let mut words = line.split_ascii_whitespace();
    let number = words.next()?.parse().ok()?;
    let (mut events, mut data, mut inode) = (None, None, None);
    while let Some(word) = words.next() {
        let (key, value) = word.split_once(':')?;
        let value = if value.is_empty() { words.next()? } else { value };
        let hex = || u64::from_str_radix(value, 16).ok();
        match key {
            "events" => events = Some(u32::try_from(hex()?).ok()?),
            "data" => data = hex(),
            "ino" => inode = hex(),
            _ => {}
        }
    }
    Some(Line { number, events: events?, data: data?, inode: inode? })
}

/// Finds the files behind the lines.
struct Finder<'a> {
    scan: &'a Scan,
    epoll: &'a Seen,
    /// Tables that have the epoll instance.
    tables: Vec<usize>,
    /// Files by inode, made when the numbers alone don't do.
    by_inode: Option<HashMap<u64, Vec<usize>>>,
    /// How many lines there were for each number.
    lines_of: HashMap<i32, u32>,
}

impl Finder<'_> {
    fn find(&mut self, line: Line) -> io::Result<Option<usize>> {
        let earlier = self.lines_of.entry(line.number).or_default();
        let skip = *earlier;
        *earlier += 1;
        for &table in &self.tables {
            let entries = &self.scan.tables[table].entries;
            let Ok(at) = entries.binary_search_by_key(&line.number, |entry| entry.number) else { continue };
            if self.is_target(entries[at].file, line, skip)? {
                return Ok(Some(entries[at].file));
            }
        }
        let scan = self.scan;
        let by_inode = self.by_inode.get_or_insert_with(|| {
            let mut by_inode: HashMap<u64, Vec<usize>> = HashMap::new();
            for (index, file) in scan.files.iter().enumerate() {
                if let Some(inode) = inode(file) {
                    by_inode.entry(inode).or_default().push(index);
                }
            }
            by_inode
        });
        let candidates = by_inode.get(&line.inode).cloned().unwrap_or_default();
        for file in candidates {
            if self.is_target(file, line, skip)? {
                return Ok(Some(file));
            }
        }
        Ok(None)
    }

    fn is_target(&self, file: usize, line: Line, skip: u32) -> io::Result<bool> {
        let file = &self.scan.files[file];
        if inode(file) != Some(line.inode) {
            return Ok(false);
        }
        // A socket's inode has one open file only.
        if file.socket().is_some() {
            return Ok(true);
        }
        let epoll = (self.epoll.pid, self.epoll.number);
        match fds::kcmp_epoll_target((file.pid, file.number), epoll, line.number, skip) {
            Err(error) if is_gone(&error) => Ok(false),
            result => result,
        }
    }
}

fn inode(file: &Seen) -> Option<u64> {
    file.socket().or_else(|| file.status.map(|status| status.inode))
}

impl Handler for Epoll {
    fn recognises(&self, seen: &Seen) -> bool {
        seen.is_anonymous("eventpoll")
    }

    fn obstacle(&self, _: &Seen, _: &View<'_>) -> io::Result<Option<String>> {
        Ok(None)
    }

    fn dump(&self, seen: &Seen, index: usize, dump: &mut Dumping<'_>) -> Result<Kind, Problem> {
        let scan = dump.view.scan;
        let has_it = |table: usize| scan.tables[table].entries.iter().any(|entry| entry.file == index);
        let mut finder = Finder {
            scan,
            epoll: seen,
            tables: (0..scan.tables.len()).filter(|table| has_it(*table)).collect(),
            by_inode: None,
            lines_of: HashMap::new(),
        };
        let mut watches = Vec::new();
        for text in seen.info()?.values("tfd:") {
            let line = parse(text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "epoll fdinfo"))?;
            // A file that no process of the job has any more can't be removed from the epoll by the job either, and
            // nothing can happen on it that the job could see.
            let Some(file) = finder.find(line)? else {
                tracing::debug!(number = line.number, inode = line.inode, "an epoll watch outlived its descriptors");
                continue;
            };
            let Line { number, events, data, .. } = line;
            watches.push(EpollWatch { number, file: index32(file), events, data });
        }
        Ok(Kind::Epoll { watches })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_understood() {
        let line = "       5 events: 8000201d data: deadbeef00000005  pos:0 ino:29f sdev:9";
        let expected = Line { number: 5, events: 0x8000_201d, data: 0xdead_beef_0000_0005, inode: 0x29f };
        assert_eq!(parse(line), Some(expected));
    }
}
