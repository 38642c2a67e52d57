//! TUN and TAP devices, opened directly.
//!
//! The `tun-tap` crate (asked for by the plan, dormant since 2018) knows neither `IFF_VNET_HDR` nor offloads; `tun-rs` has
//! both, but hides packets behind its own segmentation code and wants to own the interface's configuration, which the shim
//! does itself over netlink. What is needed is three ioctls, a `read` and a `writev`, so they are made here.
//!
//! With a virtio-net header before each packet, the kernel and we exchange segments of up to 64 KiB and leave checksums to
//! whoever must compute them (Documentation/networking/tuntap.rst, `struct virtio_net_hdr` of linux/virtio_net.h).

use std::ffi::CStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::ebpf::Filter;
use crate::netns::NetNamespace;
use crate::outcome::{check, counted, owned};

/// Length of the header before each packet, `struct virtio_net_hdr`.
pub const HEADER_LEN: usize = 10;

// Request numbers and flags of linux/if_tun.h.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const TUNSETFILTEREBPF: libc::Ioctl = 0x8004_54e1;
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;
const TUNGETDEVNETNS: libc::Ioctl = 0x54e3;
const IFF_TUN: i16 = 0x0001;
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const TUN_F_CSUM: u64 = 0x01;
const TUN_F_TSO4: u64 = 0x02;
const TUN_F_TSO6: u64 = 0x04;
const TUN_F_USO4: u64 = 0x20;
const TUN_F_USO6: u64 = 0x40;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// What is known about the checksum of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// The packet carries a full checksum, which nobody has verified.
    Full,
    /// The transport checksum still has to be filled in, from `start` to the end of the packet, at `start + offset`.
    Partial {
        /// First byte that it covers.
        start: u16,
        /// Where it goes, counted from `start`.
        offset: u16,
    },
    /// The checksum was verified.
    Verified,
}

/// A packet that stands for several segments of a TCP stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// Payload bytes a segment.
    pub size: u16,
    /// Length of the IP and TCP headers.
    pub header_len: u16,
    /// Whether the packet is IPv6.
    pub v6: bool,
    /// Whether the TCP header carries CWR, which only the first segment may keep.
    pub ecn: bool,
}

/// The header before a packet, in the machine's byte order as TUN has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What is known about the checksum.
    pub checksum: Checksum,
    /// Set when the packet has to be cut into segments.
    pub segmentation: Option<Segmentation>,
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0u8; HEADER_LEN];
        match self.checksum {
            Checksum::Full => {}
            Checksum::Verified => bytes[0] = DATA_VALID,
            Checksum::Partial { start, offset } => {
                bytes[0] = NEEDS_CSUM;
                bytes[6..8].copy_from_slice(&start.to_ne_bytes());
                bytes[8..10].copy_from_slice(&offset.to_ne_bytes());
            }
        }
        if let Some(segmentation) = self.segmentation {
            bytes[1] = if segmentation.v6 { GSO_TCPV6 } else { GSO_TCPV4 };
            if segmentation.ecn {
                bytes[1] |= GSO_ECN;
            }
            bytes[2..4].copy_from_slice(&segmentation.header_len.to_ne_bytes());
            bytes[4..6].copy_from_slice(&segmentation.size.to_ne_bytes());
        }
        bytes
    }

    /// Reads the header before a packet.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Header {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let checksum = if bytes[0] & NEEDS_CSUM != 0 {
            Checksum::Partial { start: word(6), offset: word(8) }
        } else if bytes[0] & DATA_VALID != 0 {
            Checksum::Verified
        } else {
            Checksum::Full
        };
        let kind = bytes[1] & !GSO_ECN;
        let segmentation = (kind == GSO_TCPV4 || kind == GSO_TCPV6).then(|| Segmentation {
            size: word(4),
            header_len: word(2),
            v6: kind == GSO_TCPV6,
            ecn: bytes[1] & GSO_ECN != 0,
        });
        Header { checksum, segmentation }
    }
}

/// A TUN device with the virtio-net header and TCP offloads, non-blocking. It lives as long as its descriptor.
#[derive(Debug)]
pub struct Tun(OwnedFd);

impl From<OwnedFd> for Tun {
    fn from(fd: OwnedFd) -> Tun {
        Tun(fd)
    }
}

impl From<Tun> for OwnedFd {
    fn from(tun: Tun) -> OwnedFd {
        tun.0
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Tun {
    /// Makes the device in the calling thread's network namespace. Bringing it up is the caller's.
    pub fn create(name: &str) -> io::Result<Tun> {
        let fd = open_device(name, IFF_TUN | IFF_NO_PI | IFF_VNET_HDR)?;
        let length = i32::try_from(HEADER_LEN).expect("ten fits");
        // SAFETY: the kernel reads one int.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const length) })?;
        // SAFETY: the request takes an integer.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6) })?;
        Ok(Tun(fd))
    }

    /// Reads one header and packet; `WouldBlock` when none waits.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the kernel writes at most `buffer.len()` bytes into `buffer`.
        let count = unsafe { libc::read(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        counted(count)
    }

    /// Has `filter` decide which packets wait to be received, or all do. It stays with the device.
    ///
    /// # Errors
    /// EINVAL from kernels before Linux 4.16.
    pub fn set_filter(&self, filter: Option<&Filter>) -> io::Result<()> {
        let fd: i32 = filter.map_or(-1, |filter| filter.as_fd().as_raw_fd());
        // SAFETY: the kernel reads one int.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), TUNSETFILTEREBPF, &raw const fd) }).map(drop)
    }

    /// The device's name in its network namespace.
    pub fn name(&self) -> io::Result<String> {
        let mut request = ifreq_named("")?;
        // SAFETY: the kernel writes one `ifreq`.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), TUNGETIFF, &raw mut request) })?;
        let name = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned());
        Ok(String::from_utf8_lossy(&name.collect::<Vec<u8>>()).into_owned())
    }

    /// The device's network namespace.
    ///
    /// # Errors
    /// EINVAL from kernels before Linux 5.7.
    pub fn namespace(&self) -> io::Result<NetNamespace> {
        // SAFETY: the request takes no argument.
        owned(unsafe { libc::ioctl(self.0.as_raw_fd(), TUNGETDEVNETNS) }).map(NetNamespace::from)
    }

    /// Hands the kernel one packet, the first slice of which is its [`Header`].
    pub fn send(&self, slices: &[IoSlice<'_>]) -> io::Result<()> {
        let count = i32::try_from(slices.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: an `IoSlice` is guaranteed to have the layout of an iovec, and the slices outlive the call.
        let written = unsafe { libc::writev(self.0.as_raw_fd(), slices.as_ptr().cast(), count) };
        counted(written).map(drop)
    }
}

/// Makes a TUN device without virtio-net header and offloads in the calling thread's network namespace, non-blocking: each read
/// and write is one IP packet of at most the device's MTU. It lives as long as the descriptor.
pub fn create_plain(name: &str) -> io::Result<OwnedFd> {
    open_device(name, IFF_TUN | IFF_NO_PI)
}

/// The same with Ethernet frames, as a TAP device.
pub fn create_plain_tap(name: &str) -> io::Result<OwnedFd> {
    open_device(name, IFF_TAP | IFF_NO_PI)
}

/// Length of the Ethernet header in front of each packet of a [`Tap`].
pub const ETHERNET_LEN: usize = 14;

/// A TAP device with the virtio-net header and offloads for datagrams, non-blocking. It lives as long as its descriptor; frames that
/// the kernel sends through it are dropped when its queue is full.
///
/// The raw bytes of the [`Header`] are left to the caller: what comes from here usually goes into a [`Tun`] with nothing
/// but its positions changed ([`shift`]).
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl From<OwnedFd> for Tap {
    fn from(fd: OwnedFd) -> Tap {
        Tap(fd)
    }
}

impl From<Tap> for OwnedFd {
    fn from(tap: Tap) -> OwnedFd {
        tap.0
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Tap {
    /// Makes the device in the calling thread's network namespace, with this hardware address. Bringing it up is the caller's.
    pub fn create(name: &str, hardware_address: [u8; 6]) -> io::Result<Tap> {
        let fd = open_device(name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)?;
        let length = i32::try_from(HEADER_LEN).expect("ten fits");
        // SAFETY: the kernel reads one int.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const length) })?;
        // SAFETY: the request takes an integer.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6) })?;
        let mut request = ifreq_named(name)?;
        request.ifr_ifru.ifru_hwaddr = hardware(hardware_address);
        // SAFETY: the kernel reads one `ifreq`.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFHWADDR, &raw const request) })?;
        Ok(Tap(fd))
    }

    /// Its hardware address.
    pub fn hardware_address(&self) -> io::Result<[u8; 6]> {
        let mut request = ifreq_named("")?;
        // SAFETY: the kernel writes one `ifreq`.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) })?;
        // SAFETY: the request that succeeded filled this member of the union.
        let data = unsafe { request.ifr_ifru.ifru_hwaddr }.sa_data;
        Ok([0, 1, 2, 3, 4, 5].map(|at| data[at].cast_unsigned()))
    }

    /// Reads one header and frame; `WouldBlock` when none waits.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the kernel writes at most `buffer.len()` bytes into `buffer`.
        let count = unsafe { libc::read(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        counted(count)
    }

    /// Hands the kernel one frame, the first slice of which is its [`Header`].
    pub fn send(&self, slices: &[IoSlice<'_>]) -> io::Result<()> {
        let count = i32::try_from(slices.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: an `IoSlice` is guaranteed to have the layout of an iovec, and the slices outlive the call.
        let written = unsafe { libc::writev(self.0.as_raw_fd(), slices.as_ptr().cast(), count) };
        counted(written).map(drop)
    }
}

fn hardware(address: [u8; 6]) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().zip(address) {
        *to = from.cast_signed();
    }
    libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data }
}

/// Changes the positions in the raw bytes of a [`Header`] for a packet that has gained `by` bytes at its start, or lost them.
/// Whatever the header says beside is kept, kinds of segmentation that [`Header::decode`] doesn't know included.
pub fn shift(header: &mut [u8; HEADER_LEN], by: isize) {
    let (flags, kind) = (header[0], header[1]);
    let mut move_word = |at: usize| {
        let word = u16::from_ne_bytes([header[at], header[at + 1]]);
        let moved = u16::try_from(isize::from(i16::try_from(word).unwrap_or(i16::MAX)) + by).unwrap_or(0);
        header[at..at + 2].copy_from_slice(&moved.to_ne_bytes());
    };
    if flags & NEEDS_CSUM != 0 {
        move_word(6);
    }
    if kind != 0 {
        move_word(2);
    }
}

fn open_device(name: &str, flags: i16) -> io::Result<OwnedFd> {
    let path = c"/dev/net/tun";
    let fd = open_clone_device(path)?;
    let mut request = ifreq_named(name)?;
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: the kernel reads and writes one `ifreq`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
    Ok(fd)
}

fn open_clone_device(path: &CStr) -> io::Result<OwnedFd> {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::OpenOptionsExt;
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(path.to_bytes()));
    let file = std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    Ok(file.into())
}

fn ifreq_named(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an all-zero `ifreq` is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("interface name {name:?} is longer than {} bytes or has a NUL in it", request.ifr_name.len() - 1),
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_move_and_nothing_else() {
        let header = Header {
            checksum: Checksum::Partial { start: 34, offset: 6 },
            segmentation: Some(Segmentation { size: 1448, header_len: 42, v6: false, ecn: false }),
        };
        let mut bytes = header.encode();
        shift(&mut bytes, -14);
        let moved = Header::decode(&bytes);
        assert_eq!(moved.checksum, Checksum::Partial { start: 20, offset: 6 });
        assert_eq!(moved.segmentation.map(|segmentation| segmentation.header_len), Some(28));
        shift(&mut bytes, 14);
        assert_eq!(bytes, header.encode());
        let plain = Header { checksum: Checksum::Full, segmentation: None }.encode();
        let mut bytes = plain;
        shift(&mut bytes, 14);
        assert_eq!(bytes, plain);
    }

    #[test]
    fn header_survives_encoding() {
        for checksum in [Checksum::Full, Checksum::Verified, Checksum::Partial { start: 20, offset: 16 }] {
            for segmentation in [None, Some(Segmentation { size: 1448, header_len: 52, v6: false, ecn: true })] {
                let header = Header { checksum, segmentation };
                assert_eq!(Header::decode(&header.encode()), header);
            }
        }
    }
}
