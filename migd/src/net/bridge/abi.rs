//! Numbers of the Linux socket interface that the filter and the bridge share.

/// `SO_*` names whose setting the bridge must know of. The rest acts on the program's end itself, which is a real socket.
pub(in crate::net) const SET_NOTIFIED: [i32; 16] = [
    libc::SO_LINGER,
    libc::SO_KEEPALIVE,
    libc::SO_REUSEADDR,
    libc::SO_REUSEPORT,
    libc::SO_SNDBUF,
    libc::SO_RCVBUF,
    libc::SO_SNDBUFFORCE,
    libc::SO_RCVBUFFORCE,
    libc::SO_BINDTODEVICE,
    libc::SO_OOBINLINE,
    // These act on the program's end, and the bridge only takes note for the image.
    libc::SO_RCVLOWAT,
    libc::SO_RCVTIMEO,
    libc::SO_SNDTIMEO,
    SO_RCVTIMEO_NEW,
    SO_SNDTIMEO_NEW,
    libc::SO_PRIORITY,
];

/// `SO_*` names that a Unix socket would answer differently.
pub(in crate::net) const GET_NOTIFIED: [i32; 13] = [
    libc::SO_ERROR,
    libc::SO_DOMAIN,
    libc::SO_PROTOCOL,
    libc::SO_ACCEPTCONN,
    libc::SO_LINGER,
    libc::SO_KEEPALIVE,
    libc::SO_REUSEADDR,
    libc::SO_REUSEPORT,
    libc::SO_SNDBUF,
    libc::SO_RCVBUF,
    libc::SO_BINDTODEVICE,
    libc::SO_OOBINLINE,
    libc::SO_PEERCRED,
];

/// `ioctl` requests that a Unix socket would answer differently. Those about interfaces are answered by the kernel, for
/// the namespace that the socket was made in, which is the job's.
pub(in crate::net) const IOCTL_NOTIFIED: [i32; 2] = [SIOCOUTQNSD, SIOCOUTQ];

/// Calls that move bytes, the argument that their flags are in, and the flag that has the bridge asked: before urgent data is
/// written, so that it is looked for, and for errors that are queued, which a Unix socket has no queue of.
pub(in crate::net) const FLAGS_NOTIFIED: [([i64; 2], u32, i32); 4] = [
    ([libc::SYS_sendto, libc::SYS_sendmmsg], 3, libc::MSG_OOB),
    ([libc::SYS_sendmsg, libc::SYS_sendmsg], 2, libc::MSG_OOB),
    ([libc::SYS_recvfrom, libc::SYS_recvmmsg], 3, libc::MSG_ERRQUEUE),
    ([libc::SYS_recvmsg, libc::SYS_recvmsg], 2, libc::MSG_ERRQUEUE),
];

/// asm/socket.h: the time-outs with 64-bit seconds, which on x86-64 have the layout of the old ones.
pub(in crate::net) const SO_RCVTIMEO_NEW: i32 = 66;
/// See [`SO_RCVTIMEO_NEW`].
pub(in crate::net) const SO_SNDTIMEO_NEW: i32 = 67;

/// Bytes not sent yet (linux/sockios.h).
pub(in crate::net) const SIOCOUTQNSD: i32 = 0x894b;
/// Bytes not acknowledged yet; the number is also that of `TIOCOUTQ`.
pub(in crate::net) const SIOCOUTQ: i32 = 0x5411;
