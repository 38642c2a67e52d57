//! Another process's memory: its list of mappings, and reading and writing its content.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::Pid;
use crate::proc;

/// The most segments one `process_vm_readv`/`process_vm_writev` takes on each side.
pub const MAX_SEGMENTS: usize = 1024;

/// A run of bytes in the other process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remote {
    /// First byte.
    pub address: u64,
    /// Bytes.
    pub length: usize,
}

impl Remote {
    fn iovec(self) -> libc::iovec {
        libc::iovec { iov_base: self.address as *mut libc::c_void, iov_len: self.length }
    }
}

/// Reads the runs, one after the other, into `local`, with one system call (so at most [`MAX_SEGMENTS`] runs).
///
/// Returns the bytes read. Fewer than asked for (even none) means that the first page not read is not mapped or not
/// readable *by the process itself*: [`Memory`] reads protected pages too.
///
/// # Errors
/// `ESRCH` when the process is gone, `EPERM`.
pub fn read_vectored(pid: Pid, local: &mut [u8], remote: &[Remote]) -> io::Result<usize> {
    let local = [libc::iovec { iov_base: local.as_mut_ptr().cast(), iov_len: local.len() }];
    let remote: Vec<libc::iovec> = remote.iter().take(MAX_SEGMENTS).map(|run| run.iovec()).collect();
    // SAFETY: the local segment is an exclusively borrowed slice; remote addresses belong to the other process and are checked
    // by the kernel.
    let result = unsafe {
        libc::process_vm_readv(pid.as_raw(), local.as_ptr(), 1, remote.as_ptr(), remote.len() as libc::c_ulong, 0)
    };
    transferred(result)
}

/// Writes the slices to their addresses with one system call (so at most [`MAX_SEGMENTS`] of them).
///
/// Returns the bytes written; fewer than given (even none) means that the first page not written is not mapped or not
/// writable by the process itself. The caller must know the process: this overwrites its memory, which is the point of it.
///
/// # Errors
/// As [`read_vectored`].
pub fn write_vectored<'a>(pid: Pid, runs: impl Iterator<Item = (u64, &'a [u8])>) -> io::Result<usize> {
    let mut local = Vec::with_capacity(64);
    let mut remote = Vec::with_capacity(64);
    for (address, data) in runs.take(MAX_SEGMENTS) {
        local.push(libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() });
        remote.push(Remote { address, length: data.len() }.iovec());
    }
    // SAFETY: the local segments are borrowed slices that are only read; remote addresses belong to the other process and are
    // checked by the kernel.
    let result = unsafe {
        libc::process_vm_writev(
            pid.as_raw(),
            local.as_ptr(),
            local.len() as libc::c_ulong,
            remote.as_ptr(),
            remote.len() as libc::c_ulong,
            0,
        )
    };
    transferred(result)
}

fn transferred(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).or_else(|_| match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EFAULT) => Ok(0),
        error => Err(error),
    })
}

/// `/proc/PID/mem`: slower than the vectored calls, but goes through protections (`PROT_NONE`, read-only text).
#[derive(Debug)]
pub struct Memory {
    file: File,
}

impl Memory {
    /// Opens the memory of the program the process runs now (an execve leaves this handle with nothing).
    ///
    /// # Errors
    /// The error of open(2).
    pub fn open(pid: Pid) -> io::Result<Memory> {
        Ok(Memory { file: File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))? })
    }

    /// Fills `buffer` from `address` on.
    ///
    /// # Errors
    /// `EIO` where nothing is mapped or can't be read at all (guard pages, devices).
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, address)
    }

    /// Writes `data` at `address`, also into pages the process itself may not write (private ones are copied first).
    ///
    /// # Errors
    /// `EIO` where nothing is mapped or the mapping is shared and read-only.
    pub fn write(&self, address: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, address)
    }
}

/// One line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// PROT_READ.
    pub read: bool,
    /// PROT_WRITE.
    pub write: bool,
    /// PROT_EXEC.
    pub execute: bool,
    /// MAP_SHARED.
    pub shared: bool,
    /// Offset in the file.
    pub offset: u64,
    /// Device of the file, `(major, minor)`; (0, 0) without a file.
    pub device: (u32, u32),
    /// Inode of the file; 0 without a file.
    pub inode: u64,
    /// Path of the file as the kernel prints it (with ` (deleted)`), a name in brackets, or nothing.
    pub name: Vec<u8>,
}

/// What `/proc/PID/smaps` tells beyond `maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetailedMapping {
    /// The line of `maps`.
    pub mapping: Mapping,
    /// Page size in bytes: more than the system's for hugetlb.
    pub page_size: u64,
    /// Memory protection key; 0 is none.
    pub protection_key: u32,
    /// The two-letter codes of `VmFlags` (proc_pid_smaps(5)).
    pub flags: Vec<[u8; 2]>,
}

impl DetailedMapping {
    /// Whether `VmFlags` has the code.
    #[must_use]
    pub fn has(&self, code: &[u8; 2]) -> bool {
        self.flags.contains(code)
    }
}

/// Reads `/proc/PID/maps`.
///
/// # Errors
/// The error of open(2) or read(2); `InvalidData` for a line that can't be understood.
pub fn maps(pid: Pid) -> io::Result<Vec<Mapping>> {
    let text = proc::read_file(format!("/proc/{pid}/maps").as_ref())?;
    text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(parse_mapping).collect()
}

/// Reads `/proc/PID/smaps`: slower than [`maps`], the kernel walks every page table.
///
/// # Errors
/// As [`maps`].
pub fn detailed_maps(pid: Pid) -> io::Result<Vec<DetailedMapping>> {
    let text = proc::read_file(format!("/proc/{pid}/smaps").as_ref())?;
    parse_detailed(&text)
}

fn parse_detailed(text: &[u8]) -> io::Result<Vec<DetailedMapping>> {
    let mut result: Vec<DetailedMapping> = Vec::new();
    for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        // Only a mapping's own line starts with a lower-case hexadecimal digit; the keys are capitalised.
        if line[0].is_ascii_digit() || line[0].is_ascii_lowercase() {
            result.push(DetailedMapping {
                mapping: parse_mapping(line)?,
                page_size: 0,
                protection_key: 0,
                flags: Vec::new(),
            });
            continue;
        }
        let Some(last) = result.last_mut() else { return Err(malformed(line)) };
        if let Some(rest) = line.strip_prefix(b"KernelPageSize:") {
            last.page_size = u64::from(number(rest).ok_or_else(|| malformed(line))?) << 10;
        } else if let Some(rest) = line.strip_prefix(b"ProtectionKey:") {
            last.protection_key = number(rest).ok_or_else(|| malformed(line))?;
        } else if let Some(rest) = line.strip_prefix(b"VmFlags:") {
            last.flags = rest.split(|byte| *byte == b' ').filter_map(|code| <[u8; 2]>::try_from(code).ok()).collect();
        }
    }
    Ok(result)
}

/// The decimal digits of a value such as `   2048 kB`.
fn number(value: &[u8]) -> Option<u32> {
    let digits: Vec<u8> = value.iter().copied().filter(u8::is_ascii_digit).collect();
    std::str::from_utf8(&digits).ok()?.parse().ok()
}

fn malformed(line: &[u8]) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("unexpected line in /proc/PID/maps: {}", String::from_utf8_lossy(line)),
    )
}

fn parse_mapping(line: &[u8]) -> io::Result<Mapping> {
    try_parse_mapping(line).ok_or_else(|| malformed(line))
}

fn try_parse_mapping(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let (start, end) = split_pair(next_field(&mut rest)?, b'-')?;
    let permissions: [u8; 4] = next_field(&mut rest)?.try_into().ok()?;
    let offset = hexadecimal(next_field(&mut rest)?)?;
    let (major, minor) = split_pair(next_field(&mut rest)?, b':')?;
    let inode = std::str::from_utf8(next_field(&mut rest)?).ok()?.parse().ok()?;
    let name_at = rest.iter().position(|byte| *byte != b' ').unwrap_or(rest.len());
    Some(Mapping {
        start,
        end,
        read: permissions[0] == b'r',
        write: permissions[1] == b'w',
        execute: permissions[2] == b'x',
        shared: permissions[3] == b's',
        offset,
        device: (u32::try_from(major).ok()?, u32::try_from(minor).ok()?),
        inode,
        name: unescape(&rest[name_at..]),
    })
}

fn next_field<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let at = rest.iter().position(|byte| *byte == b' ').unwrap_or(rest.len());
    let (field, tail) = rest.split_at(at);
    *rest = tail.get(1..).unwrap_or_default();
    (!field.is_empty()).then_some(field)
}

fn split_pair(field: &[u8], separator: u8) -> Option<(u64, u64)> {
    let at = field.iter().position(|byte| *byte == separator)?;
    Some((hexadecimal(&field[..at])?, hexadecimal(&field[at + 1..])?))
}

fn hexadecimal(digits: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// The kernel prints a newline in a name as `\012` and leaves every other byte as it is.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut result = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((first, tail)) = rest.split_first() {
        if let Some(after) = rest.strip_prefix(b"\\012") {
            result.push(b'\n');
            rest = after;
        } else {
            result.push(*first);
            rest = tail;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_maps_is_parsed() {
        let line = b"7f0e1c000000-7f0e1c021000 rw-s 00001000 fd:01 42                         /tmp/a b\\012c (deleted)";
        let mapping = parse_mapping(line).unwrap();
        assert_eq!((mapping.start, mapping.end), (0x7f0e_1c00_0000, 0x7f0e_1c02_1000));
        assert!(mapping.read && mapping.write && !mapping.execute && mapping.shared);
        assert_eq!((mapping.offset, mapping.device, mapping.inode), (0x1000, (0xfd, 1), 42));
        assert_eq!(mapping.name, b"/tmp/a b\nc (deleted)");
    }

    #[test]
    fn a_line_without_a_name_is_parsed() {
        let mapping = parse_mapping(b"1000-2000 ---p 00000000 00:00 0 ").unwrap();
        assert!(mapping.name.is_empty());
    }

    #[test]
    fn nonsense_is_an_error() {
        for line in [&b""[..], b"1000", b"1000-2000 rw", b"x-y rw-p 0 0:0 0", b"1000-2000 rw-p 0 0:0"] {
            assert!(parse_mapping(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn details_are_parsed() {
        let text = b"1000-2000 rw-p 00000000 00:00 0 [heap]\nSize: 4 kB\nKernelPageSize:        4 kB\nVmFlags: rd wr mr mw me ac \n\
            2000-3000 rw-p 00000000 00:00 0 \nKernelPageSize:  2048 kB\nVmFlags: ht\n";
        let maps = parse_detailed(text).unwrap();
        assert_eq!(maps.len(), 2);
        assert!(maps[0].has(b"ac") && !maps[0].has(b"ht"));
        assert_eq!(maps[1].page_size, 2 << 20);
    }

    #[test]
    fn own_maps_are_readable() {
        let pid = Pid::from_raw(i32::try_from(std::process::id()).unwrap());
        let maps = maps(pid).unwrap();
        let value = 7_u8;
        let address = &raw const value as u64;
        assert!(maps.iter().any(|mapping| mapping.start <= address && address < mapping.end && mapping.write));
        let detailed = detailed_maps(pid).unwrap();
        assert!(detailed.iter().all(|mapping| mapping.page_size >= 4096));
        let mut read = [0];
        assert_eq!(read_vectored(pid, &mut read, &[Remote { address, length: 1 }]).unwrap(), 1);
        assert_eq!(read, [7]);
    }
}
