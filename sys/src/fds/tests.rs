use std::io::IoSliceMut;
use std::os::fd::AsFd;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::*;

#[test]
fn a_peek_leaves_a_stream_as_it_was() {
    let (one, other) = sockets::socket_pair(libc::SOCK_STREAM).unwrap();
    write(one.as_fd(), b"hello ").unwrap();
    write(one.as_fd(), b"world").unwrap();
    for _ in 0..2 {
        let queue = sockets::peek_queue(other.as_fd(), true).unwrap();
        let bytes: Vec<u8> = queue.into_iter().flat_map(|message| message.data).collect();
        assert_eq!(bytes, b"hello world");
    }
    let mut buffer = [0; 64];
    assert_eq!(read(other.as_fd(), &mut buffer).unwrap(), 11);
}

#[test]
fn a_peek_keeps_datagrams_apart_and_sees_descriptors() {
    for kind in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
        let (one, other) = sockets::socket_pair(kind).unwrap();
        write(one.as_fd(), b"first").unwrap();
        write(one.as_fd(), &vec![7; 100_000]).unwrap();
        sockets::send_with_descriptors(one.as_fd(), b"x", &[one.as_raw_fd()]).unwrap();
        let queue = sockets::peek_queue(other.as_fd(), false).unwrap();
        let sizes: Vec<_> = queue.iter().map(|message| message.data.len()).collect();
        assert_eq!(sizes, [5, 100_000, 1]);
        let rights: Vec<_> = queue.iter().map(|message| message.carries_descriptors).collect();
        assert_eq!(rights, [false, false, true]);
    }
}

#[test]
fn a_peek_ends_at_a_shut_socket() {
    for (kind, stream) in [(libc::SOCK_STREAM, true), (libc::SOCK_SEQPACKET, false)] {
        let (one, other) = sockets::socket_pair(kind).unwrap();
        write(one.as_fd(), b"last").unwrap();
        drop(one);
        let queue = sockets::peek_queue(other.as_fd(), stream).unwrap();
        assert_eq!(queue.len(), 1);
        assert_eq!(queue[0].data, b"last");
    }
}

#[test]
fn sock_diag_knows_the_peer() {
    let (one, other) = sockets::socket_pair(libc::SOCK_STREAM).unwrap();
    let inodes = [status(one.as_fd()).unwrap().inode, status(other.as_fd()).unwrap().inode];
    let known = diag::unix_sockets(&diag::open().unwrap()).unwrap();
    assert_eq!(known[&inodes[0]].peer, Some(inodes[1]));
    assert_eq!(known[&inodes[1]].peer, Some(inodes[0]));
}

#[test]
fn kcmp_tells_a_duplicate_from_another_file() {
    let (one, other) = pipe(0).unwrap();
    let copy = one.try_clone().unwrap();
    let own = Pid::this();
    let order = |a: &OwnedFd, b: &OwnedFd| kcmp(Compare::File, (own, a.as_raw_fd()), (own, b.as_raw_fd())).unwrap();
    assert_eq!(order(&one, &copy), Ordering::Equal);
    assert_ne!(order(&one, &other), Ordering::Equal);
    assert_eq!(order(&one, &other), order(&other, &one).reverse());
}

#[test]
fn descriptors_pass_in_bulk() {
    let (one, other) = sockets::socket_pair(libc::SOCK_SEQPACKET).unwrap();
    let copies: Vec<OwnedFd> = (0..100).map(|_| one.try_clone().unwrap()).collect();
    let numbers: Vec<RawFd> = copies.iter().map(AsRawFd::as_raw_fd).collect();
    sockets::send_with_descriptors(one.as_fd(), b"x", &numbers).unwrap();
    let mut byte = [0; 8];
    let mut slices = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 100]);
    let message = recvmsg::<()>(other.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::empty()).unwrap();
    let Some(ControlMessageOwned::ScmRights(received)) = message.cmsgs().unwrap().next() else {
        panic!("no descriptors came")
    };
    assert_eq!((message.bytes, received.len()), (1, 100));
}

#[test]
fn a_directory_lists_its_numbers() {
    let fd = open_at(None, OsStr::new("/proc/self/fd"), libc::O_RDONLY | libc::O_DIRECTORY, 0).unwrap();
    let numbers = numbers_in(fd.as_fd()).unwrap();
    assert!(numbers.contains(&fd.as_raw_fd()));
    assert!(numbers.contains(&0));
}
