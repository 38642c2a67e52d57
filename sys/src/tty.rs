//! Pseudo-terminals: what ioctl_tty(2) tells and sets.
//!
//! A call on a master that is about modes, sizes, sessions or groups means its slave.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::outcome::{check, owned};

const TIOCSTI: libc::c_ulong = 0x5412;
const TIOCGDEV: libc::c_ulong = 0x8004_5432;
const TIOCGPTN: libc::c_ulong = 0x8004_5430;
const TIOCSPTLCK: libc::c_ulong = 0x4004_5431;
const TIOCGPKT: libc::c_ulong = 0x8004_5438;
const TIOCGPTLCK: libc::c_ulong = 0x8004_5439;
const TIOCGEXCL: libc::c_ulong = 0x8004_5440;
const TIOCGPTPEER: libc::c_ulong = 0x5441;

/// The line discipline of terminals.
pub const N_TTY: i32 = 0;

/// The kernel's `struct termios2`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modes {
    /// c_iflag.
    pub input: u32,
    /// c_oflag.
    pub output: u32,
    /// c_cflag.
    pub control: u32,
    /// c_lflag.
    pub local: u32,
    /// c_line.
    pub line: u8,
    /// c_cc: 0 disables a character.
    pub characters: [u8; 19],
    /// c_ispeed.
    pub input_speed: u32,
    /// c_ospeed.
    pub output_speed: u32,
}

/// The kernel's `struct winsize`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Rows of characters.
    pub rows: u16,
    /// Columns of characters.
    pub columns: u16,
    /// Width in pixels.
    pub width: u16,
    /// Height in pixels.
    pub height: u16,
}

/// Makes a call that takes an integer or nothing.
fn command(tty: BorrowedFd<'_>, number: libc::c_ulong, argument: libc::c_int) -> io::Result<i64> {
    // SAFETY: the callers below pass numbers of calls whose argument is an integer or is ignored.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), number, argument) })
}

/// Makes a call that writes an integer.
fn ask(tty: BorrowedFd<'_>, number: libc::c_ulong) -> io::Result<i32> {
    let mut value: libc::c_int = 0;
    // SAFETY: the callers below pass numbers of calls that write an int, to the address of one.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), number, &raw mut value) })?;
    Ok(value)
}

/// Makes a call that reads an integer.
fn tell(tty: BorrowedFd<'_>, number: libc::c_ulong, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the callers below pass numbers of calls that read an int, from the address of one.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), number, &raw const value) }).map(drop)
}

/// The modes. EIO when the terminal was hung up.
pub fn modes(tty: BorrowedFd<'_>) -> io::Result<Modes> {
    let mut modes = Modes::default();
    // SAFETY: the kernel writes a struct termios2 to the address of one.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TCGETS2, &raw mut modes) })?;
    Ok(modes)
}

/// Sets the modes, at once.
pub fn set_modes(tty: BorrowedFd<'_>, modes: &Modes) -> io::Result<()> {
    // SAFETY: the kernel reads a struct termios2 from the address of one.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TCSETS2, std::ptr::from_ref(modes)) }).map(drop)
}

/// The size.
pub fn window(tty: BorrowedFd<'_>) -> io::Result<Window> {
    let mut window = Window::default();
    // SAFETY: the kernel writes a struct winsize to the address of one.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCGWINSZ, &raw mut window) })?;
    Ok(window)
}

/// Sets the size. The foreground process group gets a SIGWINCH if it is another.
pub fn set_window(tty: BorrowedFd<'_>, window: &Window) -> io::Result<()> {
    // SAFETY: the kernel reads a struct winsize from the address of one.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCSWINSZ, std::ptr::from_ref(window)) }).map(drop)
}

/// Number of the pseudo-terminal of a master.
pub fn index(master: BorrowedFd<'_>) -> io::Result<u32> {
    ask(master, TIOCGPTN).map(i32::cast_unsigned)
}

/// Device number of the terminal behind a descriptor, which for `/dev/tty` isn't that of the file.
pub fn device(tty: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(decode_device(ask(tty, TIOCGDEV)?))
}

/// A device number as the kernel shows it in 32 bits, also in `/proc/PID/stat`.
pub fn decode_device(number: i32) -> u64 {
    let number = number.cast_unsigned();
    libc::makedev(number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00)
}

/// The session that it controls, as the caller numbers it. ENOTTY when there is none.
pub fn session(master: BorrowedFd<'_>) -> io::Result<i32> {
    ask(master, libc::TIOCGSID)
}

/// Number of the line discipline.
pub fn line_discipline(tty: BorrowedFd<'_>) -> io::Result<i32> {
    ask(tty, libc::TIOCGETD)
}

/// Whether the slave of a master can't be opened yet.
pub fn is_locked(master: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(ask(master, TIOCGPTLCK)? != 0)
}

/// Locks or unlocks the slave of a master.
pub fn set_locked(master: BorrowedFd<'_>, locked: bool) -> io::Result<()> {
    tell(master, TIOCSPTLCK, locked.into())
}

/// Whether a master is in packet mode.
pub fn is_packet(master: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(ask(master, TIOCGPKT)? != 0)
}

/// Sets packet mode.
pub fn set_packet(master: BorrowedFd<'_>, packet: bool) -> io::Result<()> {
    tell(master, libc::TIOCPKT, packet.into())
}

/// Whether it can't be opened once more (but by root).
pub fn is_exclusive(tty: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(ask(tty, TIOCGEXCL)? != 0)
}

/// Has it not be opened once more (but by root).
pub fn set_exclusive(tty: BorrowedFd<'_>) -> io::Result<()> {
    command(tty, libc::TIOCEXCL, 0).map(drop)
}

/// Opens the slave of a master with these flags (`O_*`); close-on-exec.
pub fn open_slave(master: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    owned(command(master, TIOCGPTPEER, flags | libc::O_CLOEXEC)?)
}

/// Puts a byte into its input as if it were typed. All that follows of that has happened when this returns.
pub fn type_byte(tty: BorrowedFd<'_>, byte: u8) -> io::Result<()> {
    // SAFETY: the kernel reads one byte from the address of one.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), TIOCSTI, &raw const byte) }).map(drop)
}

/// Stops its output, or lets it go on (tcflow(3)).
pub fn set_output_stopped(tty: BorrowedFd<'_>, stopped: bool) -> io::Result<()> {
    command(tty, libc::TCXONC, if stopped { libc::TCOOFF } else { libc::TCOON }).map(drop)
}

/// Throws away what was typed and not read.
pub fn discard_input(tty: BorrowedFd<'_>) -> io::Result<()> {
    command(tty, libc::TCFLSH, libc::TCIFLUSH).map(drop)
}

/// Throws away what was written and has not reached the other end.
pub fn discard_output(tty: BorrowedFd<'_>) -> io::Result<()> {
    command(tty, libc::TCFLSH, libc::TCOFLUSH).map(drop)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::fd::AsFd;

    use super::*;
    use crate::fds;

    #[test]
    fn a_pseudo_terminal_tells_what_it_is() {
        let flags = libc::O_RDWR | libc::O_NOCTTY;
        let held = fds::open_at(None, OsStr::new("/dev/ptmx"), flags, 0).unwrap();
        let master = held.as_fd();
        assert!(is_locked(master).unwrap() && open_slave(master, flags).is_err());
        set_locked(master, false).unwrap();
        let slave = open_slave(master, flags | libc::O_NONBLOCK).unwrap();
        let slave = slave.as_fd();
        assert_eq!(device(slave).unwrap(), libc::makedev(136, index(master).unwrap()));
        assert_eq!(device(slave).unwrap(), fds::status(slave).unwrap().special);
        assert_eq!(line_discipline(slave).unwrap(), N_TTY);
        assert_eq!(session(master).unwrap_err().raw_os_error(), Some(libc::ENOTTY));

        let size = Window { rows: 33, columns: 77, width: 1, height: 2 };
        set_window(master, &size).unwrap();
        assert_eq!(window(slave).unwrap(), size);
        let quiet = Modes { local: libc::ICANON, ..modes(slave).unwrap() };
        set_modes(slave, &quiet).unwrap();
        assert_eq!(modes(master).unwrap(), quiet);
        for byte in b"a\n" {
            type_byte(slave, *byte).unwrap();
        }
        let mut line = [0; 9];
        assert_eq!(fds::read(slave, &mut line).unwrap(), 2);

        assert!(!is_packet(master).unwrap() && !is_exclusive(slave).unwrap());
        set_packet(master, true).unwrap();
        set_exclusive(slave).unwrap();
        assert!(is_packet(master).unwrap() && is_exclusive(slave).unwrap());
        set_packet(master, false).unwrap();
        set_output_stopped(slave, true).unwrap();
        assert_eq!(fds::readiness(slave, libc::POLLOUT).unwrap() & libc::POLLOUT, 0);
        set_output_stopped(slave, false).unwrap();
        assert_ne!(fds::readiness(slave, libc::POLLOUT).unwrap() & libc::POLLOUT, 0);
        drop(held);
        assert_eq!(modes(slave).unwrap_err().raw_os_error(), Some(libc::EIO));
    }

    #[test]
    fn device_numbers_are_understood() {
        assert_eq!(decode_device(0x8807), libc::makedev(136, 7));
        assert_eq!(decode_device(0x0010_8834), libc::makedev(136, 0x134));
    }
}
