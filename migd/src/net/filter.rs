//! The seccomp filter of a job: which calls the shim hears of.
//!
//! The data path never does, but for splice(2), and for urgent data and error queues, which stand in the flags of a call. Of the
//! control path only what concerns stream sockets of the internet families, as far as that can be
//! told from the arguments; the bridge lets through what turns out to belong to another descriptor. Calls that would give
//! a job a socket nothing here can move, or a way around this filter, fail with the errno of a kernel that lacks
//! the feature, so that programs take their fallback: io_uring, native asynchronous I/O, MPTCP, SCTP, raw and packet sockets, the
//! x32 ABI, and the socket calls of 32-bit programs.
//!
//! Datagram sockets are native sockets of the job's own network namespace, whose `eth0` the plane joins to the job's TUN device: see
//! [`datagram`].

use sys::seccomp::{ARCH_I386, Action, Assembler, Program, X32_BIT};

use super::bridge::abi;

/// The filter to install on a job's init, before it runs anything of the job.
pub fn filter() -> Program {
    let mut program = Assembler::new();
    program.if_arch(ARCH_I386, |program| {
        program.if_number(&I386_SOCKET_CALLS, |program| program.finish(Action::Errno(libc::ENOSYS)));
        program.finish(Action::Allow);
    });
    program.if_number_has_bits(X32_BIT, |program| program.finish(Action::Errno(libc::ENOSYS)));
    program.if_number(&KEEPING_REQUESTS, |program| program.finish(Action::Errno(libc::ENOSYS)));
    for (numbers, flags, wanted) in abi::FLAGS_NOTIFIED {
        program.if_number(&numbers, |program| {
            program.if_argument(flags, wanted.cast_unsigned(), &[wanted], |program| program.finish(Action::Notify));
            program.finish(Action::Allow);
        });
    }
    program.if_number(&[libc::SYS_socket], socket);
    program.if_number(
        &[
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_accept,
            libc::SYS_accept4,
            libc::SYS_connect,
            libc::SYS_getsockname,
            libc::SYS_getpeername,
            libc::SYS_shutdown,
        ],
        |program| program.finish(Action::Notify),
    );
    // Both can take pages out of a socket, and not only bytes: see `Bridge::note_splice`. sendfile does so with no offset.
    program.if_number(&[libc::SYS_splice], |program| program.finish(Action::Notify));
    program.if_number(&[libc::SYS_sendfile], |program| {
        program.if_argument(2, u32::MAX, &[0], |program| program.finish(Action::Notify));
        program.finish(Action::Allow);
    });
    program.if_number(&[libc::SYS_setsockopt], |program| options(program, &abi::SET_NOTIFIED));
    program.if_number(&[libc::SYS_getsockopt], |program| options(program, &abi::GET_NOTIFIED));
    program.if_number(&[libc::SYS_ioctl], |program| {
        program.if_argument(1, u32::MAX, &abi::IOCTL_NOTIFIED, |program| program.finish(Action::Notify));
        program.finish(Action::Allow);
    });
    program.build()
}

/// Ways to have the kernel hold requests, which nobody could take out of it again. Databases use threads where they are missing.
const KEEPING_REQUESTS: [i64; 4] =
    [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register, libc::SYS_io_setup];

/// `socketcall`, `socket`, `bind`, `connect`, `listen`, `accept4` and `io_uring_setup` of the i386 table, and `splice`, `sendfile` and
/// `sendfile64`, which could be used on a socket inherited from a 64-bit program.
const I386_SOCKET_CALLS: [i64; 10] = [102, 359, 361, 362, 363, 364, 425, 313, 187, 239];

/// TCP over RDMA (linux/socket.h).
const AF_SMC: i32 = 43;
/// The obsolete way to packet sockets (linux/net.h).
const SOCK_PACKET: i32 = 10;

/// Socket types come with `SOCK_NONBLOCK` and `SOCK_CLOEXEC` in the same argument.
const TYPE_MASK: u32 = 0xf;

fn socket(program: &mut Assembler) {
    program.if_argument(0, u32::MAX, &[libc::AF_PACKET], |program| program.finish(Action::Errno(libc::EPERM)));
    program.if_argument(0, u32::MAX, &[libc::AF_VSOCK, AF_SMC], |program| {
        program.finish(Action::Errno(libc::EAFNOSUPPORT));
    });
    program.if_argument(0, u32::MAX, &[libc::AF_INET, libc::AF_INET6], |program| {
        program.if_argument(1, TYPE_MASK, &[libc::SOCK_STREAM], |program| {
            program.if_argument(2, u32::MAX, &[0, libc::IPPROTO_TCP], |program| program.finish(Action::Notify));
            program.finish(Action::Errno(libc::EPROTONOSUPPORT));
        });
        program.if_argument(1, TYPE_MASK, &[libc::SOCK_DGRAM], datagram);
        program.if_argument(1, TYPE_MASK, &[libc::SOCK_RAW, SOCK_PACKET], |program| {
            program.finish(Action::Errno(libc::EPERM));
        });
        program.finish(Action::Errno(libc::EPROTONOSUPPORT));
    });
    program.finish(Action::Allow);
}

/// Datagram sockets: kernel sockets in the job's namespace. To carry datagrams over Unix sockets, as TCP's bytes are, names would have
/// to be translated in every `sendmsg` and `recvmsg`; a filter can't see whether there is a name in a message, nor which
/// kind of socket a descriptor is, so those calls would trap on TCP sockets as well.
fn datagram(program: &mut Assembler) {
    program.finish(Action::Allow);
}

fn options(program: &mut Assembler, socket_level: &[i32]) {
    program.if_argument(1, u32::MAX, &[libc::IPPROTO_TCP, libc::IPPROTO_IP, libc::IPPROTO_IPV6], |program| {
        program.finish(Action::Notify);
    });
    program.if_argument(1, u32::MAX, &[libc::SOL_SOCKET], |program| {
        program.if_argument(2, u32::MAX, socket_level, |program| program.finish(Action::Notify));
    });
    program.finish(Action::Allow);
}

#[cfg(test)]
mod tests {
    use sys::seccomp::ARCH_X86_64;

    use super::*;

    fn action(number: i64, args: &[i32]) -> u32 {
        let mut all = [0u64; 6];
        for (to, &from) in all.iter_mut().zip(args) {
            *to = u64::from(from.cast_unsigned());
        }
        filter().evaluate(ARCH_X86_64, number, all)
    }

    const NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

    fn errno(number: i32) -> u32 {
        libc::SECCOMP_RET_ERRNO | number.cast_unsigned()
    }

    #[test]
    fn sockets_are_judged_by_family_type_and_protocol() {
        let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        for (args, expected) in [
            ([libc::AF_INET, libc::SOCK_STREAM, 0], NOTIFY),
            ([libc::AF_INET6, libc::SOCK_STREAM | flags, libc::IPPROTO_TCP], NOTIFY),
            ([libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP], errno(libc::EPROTONOSUPPORT)),
            ([libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_SCTP], errno(libc::EPROTONOSUPPORT)),
            ([libc::AF_INET, libc::SOCK_SEQPACKET, 0], errno(libc::EPROTONOSUPPORT)),
            ([libc::AF_INET, libc::SOCK_RAW | flags, 1], errno(libc::EPERM)),
            ([libc::AF_INET, libc::SOCK_DGRAM | flags, 0], ALLOW),
            ([libc::AF_PACKET, libc::SOCK_RAW, 0], errno(libc::EPERM)),
            ([libc::AF_UNIX, libc::SOCK_STREAM, 0], ALLOW),
            ([libc::AF_NETLINK, libc::SOCK_RAW, 0], ALLOW),
        ] {
            assert_eq!(action(libc::SYS_socket, &args), expected, "socket({args:?})");
        }
    }

    #[test]
    fn the_data_path_is_never_notified() {
        for number in [
            libc::SYS_read,
            libc::SYS_write,
            libc::SYS_readv,
            libc::SYS_writev,
            libc::SYS_sendto,
            libc::SYS_recvfrom,
            libc::SYS_sendmsg,
            libc::SYS_recvmsg,
            libc::SYS_sendfile,
            libc::SYS_epoll_wait,
            libc::SYS_close,
        ] {
            // The third is a length, a pointer to an offset, or flags.
            assert_eq!(action(number, &[3, 2, 0x1000]), ALLOW, "{number}");
        }
    }

    #[test]
    fn calls_that_move_pages_out_of_sockets_are_notified() {
        assert_eq!(action(libc::SYS_splice, &[3, 0, 4, 0]), NOTIFY);
        assert_eq!(action(libc::SYS_sendfile, &[4, 3, 0, 100]), NOTIFY);
        assert_eq!(action(libc::SYS_sendfile, &[4, 3, 0x1000, 100]), ALLOW);
    }

    #[test]
    fn urgent_data_and_error_queues_are() {
        let more = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        for flags in [libc::MSG_OOB, libc::MSG_OOB | more] {
            assert_eq!(action(libc::SYS_sendto, &[3, 0, 1, flags]), NOTIFY);
            assert_eq!(action(libc::SYS_sendmsg, &[3, 0, flags]), NOTIFY);
            // What the program receives is on its own end, where the kernel knows it as urgent.
            assert_eq!(action(libc::SYS_recvfrom, &[3, 0, 1, flags]), ALLOW);
        }
        assert_eq!(action(libc::SYS_recvmsg, &[3, 0, libc::MSG_ERRQUEUE | more]), NOTIFY);
        assert_eq!(action(libc::SYS_recvfrom, &[3, 0, 1, libc::MSG_ERRQUEUE]), NOTIFY);
        assert_eq!(action(libc::SYS_sendto, &[3, 0, 1, more]), ALLOW);
        assert_eq!(action(libc::SYS_recvmsg, &[3, 0, more]), ALLOW);
    }

    #[test]
    fn options_are_judged_by_level_and_name() {
        let set = |level, name| action(libc::SYS_setsockopt, &[3, level, name]);
        let get = |level, name| action(libc::SYS_getsockopt, &[3, level, name]);
        assert_eq!(set(libc::IPPROTO_TCP, libc::TCP_NODELAY), NOTIFY);
        assert_eq!(get(libc::SOL_SOCKET, libc::SO_ERROR), NOTIFY);
        assert_eq!(get(libc::SOL_SOCKET, libc::SO_RCVTIMEO), ALLOW);
        assert_eq!(set(libc::SOL_SOCKET, libc::SO_RCVTIMEO), NOTIFY);
        assert_eq!(set(libc::SOL_SOCKET, libc::SO_PASSCRED), ALLOW);
        assert_eq!(set(libc::SOL_NETLINK, 1), ALLOW);
    }

    #[test]
    fn ways_around_are_closed() {
        for number in KEEPING_REQUESTS {
            assert_eq!(action(number, &[8]), errno(libc::ENOSYS), "{number}");
        }
        let x32_socket = filter().evaluate(ARCH_X86_64, libc::SYS_socket | i64::from(X32_BIT), [2, 1, 0, 0, 0, 0]);
        assert_eq!(x32_socket, errno(libc::ENOSYS));
        assert_eq!(filter().evaluate(ARCH_I386, 102, [1, 0, 0, 0, 0, 0]), errno(libc::ENOSYS));
        assert_eq!(filter().evaluate(ARCH_I386, 4, [1, 0, 0, 0, 0, 0]), ALLOW);
    }
}
