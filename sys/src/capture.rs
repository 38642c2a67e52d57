//! Watching the frames on a network device, sifted by the kernel: what is not looked for is not even copied.
//!
//! man 7 packet; linux/filter.h. Frames are seen as they pass the device, in both directions; a super-frame that is cut into
//! packets later counts once, with its whole length.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::outcome::{check, owned};

/// What a capture lets through. Only IPv4 is looked into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sieve {
    /// Packets from or to this address.
    Host(Ipv4Addr),
    /// What tells a sender that its connection or destination is no more: TCP segments with RST, ICMP destination
    /// unreachable.
    Refusals,
}

/// Classic BPF, as `struct sock_filter`.
#[derive(Debug, Clone, Copy)]
struct Step {
    code: u32,
    jump_true: u8,
    jump_false: u8,
    value: u32,
}

const LOAD_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const LOAD_BYTE_INDEXED: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_IND;
const LOAD_HEADER_LENGTH: u32 = libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH;
const JUMP_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const JUMP_ANY_SET: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

const ETHERTYPE: u32 = 12;
const IPV4: u32 = 14;
const PROTOCOL: u32 = IPV4 + 9;
const FRAGMENT: u32 = IPV4 + 6;
const SOURCE: u32 = IPV4 + 12;
const DESTINATION: u32 = IPV4 + 16;
const TCP_FLAGS: u32 = 13;
const TCP_RST: u32 = 0x04;
const ICMP_UNREACHABLE: u32 = 3;
const EVERYTHING: u32 = u32::MAX;

impl Sieve {
    fn program(self) -> Vec<Step> {
        let step = |code, value| Step { code, jump_true: 0, jump_false: 0, value };
        let jump = |code, value, jump_true, jump_false| Step { code, jump_true, jump_false, value };
        match self {
            Sieve::Host(address) => vec![
                step(LOAD_HALF, ETHERTYPE),
                jump(JUMP_EQUAL, libc::ETH_P_IP as u32, 0, 5),
                step(LOAD_WORD, SOURCE),
                jump(JUMP_EQUAL, address.to_bits(), 2, 0),
                step(LOAD_WORD, DESTINATION),
                jump(JUMP_EQUAL, address.to_bits(), 0, 1),
                step(RETURN, EVERYTHING),
                step(RETURN, 0),
            ],
            Sieve::Refusals => vec![
                step(LOAD_HALF, ETHERTYPE),
                jump(JUMP_EQUAL, libc::ETH_P_IP as u32, 0, 11),
                step(LOAD_HALF, FRAGMENT),
                jump(JUMP_ANY_SET, 0x1fff, 9, 0),
                step(LOAD_HEADER_LENGTH, IPV4),
                step(LOAD_BYTE, PROTOCOL),
                jump(JUMP_EQUAL, libc::IPPROTO_TCP as u32, 3, 0),
                jump(JUMP_EQUAL, libc::IPPROTO_ICMP as u32, 0, 5),
                step(LOAD_BYTE_INDEXED, IPV4),
                jump(JUMP_EQUAL, ICMP_UNREACHABLE, 2, 3),
                step(LOAD_BYTE_INDEXED, IPV4 + TCP_FLAGS),
                jump(JUMP_ANY_SET, TCP_RST, 0, 1),
                step(RETURN, EVERYTHING),
                step(RETURN, 0),
            ],
        }
    }
}

/// A running capture on one device.
#[derive(Debug)]
pub struct Capture(OwnedFd);

impl Capture {
    /// Starts a capture on the device with index `link` in the calling thread's network namespace.
    ///
    /// # Errors
    /// As socket(2) and bind(2); EPERM without CAP_NET_RAW.
    pub fn open(link: u32, sieve: Sieve) -> io::Result<Capture> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // Protocol 0 receives nothing until bind names one: so nothing arrives unsifted.
        // SAFETY: no pointer is passed.
        let capture = Capture(owned(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?);
        capture.attach(&sieve.program())?;
        capture.bind(link)?;
        Ok(capture)
    }

    fn attach(&self, steps: &[Step]) -> io::Result<()> {
        let encode = |step: &Step| libc::sock_filter {
            // BPF_ operation codes have sixteen bits.
            code: step.code as u16,
            jt: step.jump_true,
            jf: step.jump_false,
            k: step.value,
        };
        let mut program: Vec<libc::sock_filter> = steps.iter().map(encode).collect();
        // The programs above have some ten steps.
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        self.set_option(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)
    }

    fn set_option<T>(&self, level: i32, name: i32, value: &T) -> io::Result<()> {
        let length = size_of::<T>() as libc::socklen_t;
        // SAFETY: `value` is readable for its size, and what it may point to outlives the call, which copies it.
        let result = unsafe { libc::setsockopt(self.0.as_raw_fd(), level, name, (&raw const *value).cast(), length) };
        check(result).map(drop)
    }

    fn bind(&self, link: u32) -> io::Result<()> {
        // SAFETY: an all-zero `sockaddr_ll` is a valid one.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = i32::try_from(link).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the address is readable for the length given.
        let result = unsafe { libc::bind(self.0.as_raw_fd(), (&raw const address).cast(), length) };
        check(result).map(drop)
    }

    /// The next frame: its beginning is put into `buffer`, its whole length is returned. `None` when none waits.
    ///
    /// # Errors
    /// As recv(2); ENETDOWN when the device went down.
    pub fn next(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        // SAFETY: the buffer is writable for the length given.
        let length =
            unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_TRUNC) };
        match usize::try_from(length) {
            Ok(length) => Ok(Some(length)),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            },
        }
    }

    /// How many matching frames were lost since the last call because nobody took them in time.
    ///
    /// # Errors
    /// As getsockopt(2).
    pub fn lost(&self) -> io::Result<u32> {
        let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: both pointers are writable for what the option fills in.
        let result = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        check(result).map(|_| statistics.tp_drops)
    }
}

impl AsFd for Capture {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    /// Runs `test` in a network namespace of its own with `lo` up.
    fn in_new_namespace(test: impl FnOnce(u32) + Send) {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests need root");
                let mut netlink = crate::netlink::Netlink::open().unwrap();
                let link = netlink.link("lo").unwrap().index;
                netlink.set_up(link, None, None).unwrap();
                test(link);
            });
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        });
    }

    fn count(capture: &Capture) -> usize {
        let mut buffer = [0; 64];
        std::iter::from_fn(|| capture.next(&mut buffer).unwrap()).count()
    }

    #[test]
    fn a_host_is_told_from_others() {
        in_new_namespace(|link| {
            let capture = Capture::open(link, Sieve::Host(Ipv4Addr::new(127, 0, 0, 2))).unwrap();
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let receiver = UdpSocket::bind("127.0.0.3:4000").unwrap();
            socket.send_to(&[0; 10], receiver.local_addr().unwrap()).unwrap();
            assert_eq!(count(&capture), 0);
            let receiver = UdpSocket::bind("127.0.0.2:4000").unwrap();
            socket.send_to(&[0; 1000], receiver.local_addr().unwrap()).unwrap();
            let mut buffer = [0; 20];
            assert_eq!(capture.next(&mut buffer).unwrap(), Some(14 + 20 + 8 + 1000));
            assert_eq!(capture.lost().unwrap(), 0);
        });
    }

    #[test]
    fn refusals_are_seen_and_nothing_else() {
        in_new_namespace(|link| {
            let capture = Capture::open(link, Sieve::Refusals).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            drop(listener.accept().unwrap());
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            drop(client);
            assert_eq!(count(&capture), 0);
            assert!(TcpStream::connect("127.0.0.1:9").is_err());
            // Seen on its way out of `lo` and on its way in.
            assert_eq!(count(&capture), 2);
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.send_to(&[0], "127.0.0.1:9").unwrap();
            assert_eq!(count(&capture), 2);
        });
    }
}
