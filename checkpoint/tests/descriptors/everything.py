# Opens one of every kind, at fixed numbers, then waits; on SIGUSR1 checks what it has and says how that went.
#
# usage: everything.py open|stub DIRECTORY
# "stub" opens nothing: its descriptors are put there by the test.
import array, ctypes, fcntl, os, select, signal, socket, struct, sys, time

os.closerange(3, 1024)
role, directory = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
BASE = 20


def at(number, fd, cloexec=True):
    os.dup2(fd, number, inheritable=not cloexec)
    os.close(fd)
    return number


def open_everything():
    path = os.path.join(directory, "file")
    with open(path, "w") as f:
        f.write("0123456789" * 10)
    # Regular files: offset, append, shared by dup and by a second open; locks.
    at(20, os.open(path, os.O_RDWR))
    os.lseek(20, 42, os.SEEK_SET)
    os.dup2(20, 21)
    at(22, os.open(path, os.O_WRONLY | os.O_APPEND), cloexec=False)
    fcntl.flock(22, fcntl.LOCK_EX)
    fcntl.lockf(20, fcntl.LOCK_EX, 5, 10)
    at(23, os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
    at(24, os.open(path, os.O_PATH))
    at(25, os.open("/dev/null", os.O_RDWR))
    # Deleted file, opened twice, and a memfd.
    gone = os.path.join(directory, "gone")
    at(26, os.open(gone, os.O_RDWR | os.O_CREAT))
    at(27, os.open(gone, os.O_RDONLY))
    os.write(26, b"deleted content")
    os.unlink(gone)
    at(28, os.memfd_create("some memory", os.MFD_ALLOW_SEALING))
    os.write(28, b"memfd content")
    os.truncate(28, 1 << 20)
    fcntl.fcntl(28, 1033, 0x0002)  # F_ADD_SEALS, F_SEAL_SHRINK
    # A file that was made without a name.
    at(82, os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600))
    os.write(82, b"temporary")
    # Pipes: with data; in packets; with the reader gone.
    r, w = os.pipe()
    at(30, r), at(31, w)
    fcntl.fcntl(31, 1031, 1 << 17)
    os.write(31, b"in the pipe" * 100)
    r, w = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    at(32, r), at(33, w)
    os.write(33, b"one"), os.write(33, b"two")
    r, w = os.pipe()
    at(34, w)
    os.close(r)
    fifo = os.path.join(directory, "fifo")
    os.mkfifo(fifo)
    at(35, os.open(fifo, os.O_RDWR))
    os.write(35, b"fifo")
    # Event descriptors.
    at(40, libc.eventfd(5, 1 | os.O_NONBLOCK))
    at(41, libc.timerfd_create(1, 0))
    libc.timerfd_settime(41, 0, struct.pack("qqqq", 1000, 5, 3600, 7), None)
    mask = struct.pack("Q", 1 << (signal.SIGUSR2 - 1))
    at(42, libc.signalfd(-1, mask, 0))
    # Unix sockets: a pair with data both ways, one half closed; a listener with an accepted and a waiting client.
    a, b = socket.socketpair()
    a.send(b"to b"), b.send(b"to a " * 1000)
    a.shutdown(socket.SHUT_WR)
    at(50, a.detach()), at(51, b.detach())
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    a.send(b"first"), a.send(b"second")
    at(52, a.detach()), at(53, b.detach())
    name = os.path.join(directory, "listener")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(name)
    os.chmod(name, 0o770)
    listener.listen(7)
    client = socket.socket(socket.AF_UNIX)
    client.connect(name)
    server, _ = listener.accept()
    client.send(b"for the server")
    waiting = socket.socket(socket.AF_UNIX)
    waiting.connect(name)
    at(54, listener.detach()), at(55, client.detach()), at(56, server.detach()), at(57, waiting.detach())
    abstract = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    abstract.bind("\0migd-test-" + str(os.getpid()))
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.connect(abstract.getsockname())
    sender.send(b"datagram")
    at(58, abstract.detach()), at(59, sender.detach())
    orphan, other = socket.socketpair()
    other.send(b"last words")
    other.close()
    at(60, orphan.detach())
    # Other sockets.
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    netlink.bind((0, 1))
    at(61, netlink.detach())
    # epoll: level, edge with words of its own, a spent one-shot, a number that is closed, one that means something else.
    at(70, libc.epoll_create1(0))
    ctl = lambda op, fd, events, data: libc.epoll_ctl(70, op, fd, struct.pack("=IQ", events, data))
    assert ctl(1, 40, select.EPOLLIN, 0xDEADBEEF00000040) == 0
    assert ctl(1, 51, select.EPOLLIN | select.EPOLLET, 51) == 0
    assert ctl(1, 53, select.EPOLLIN | select.EPOLLONESHOT, 53) == 0
    buffer = ctypes.create_string_buffer(12 * 16)
    libc.epoll_wait(70, buffer, 16, 0)
    os.dup2(30, 80)
    assert ctl(1, 80, select.EPOLLIN, 80) == 0
    os.close(80)
    os.dup2(32, 81)
    assert ctl(1, 81, select.EPOLLIN, 81) == 0
    os.dup2(25, 81)
    # inotify, and far away numbers.
    at(71, libc.inotify_init1(0))
    libc.inotify_add_watch(71, directory.encode(), 0x100)
    os.dup2(31, 900)
    os.dup2(20, 901)


def check():
    assert os.lseek(20, 0, os.SEEK_CUR) == 42
    assert os.read(21, 3) == b"234"
    assert os.lseek(901, 0, os.SEEK_CUR) == 45
    assert fcntl.fcntl(22, fcntl.F_GETFL) & os.O_APPEND
    assert fcntl.fcntl(22, fcntl.F_GETFD) == 0 and fcntl.fcntl(20, fcntl.F_GETFD) == 1
    try:
        fd = os.open(os.path.join(directory, "file"), os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert False, "flock is not held"
    except BlockingIOError:
        os.close(fd)
    assert "file" in os.listdir(23)
    assert os.pread(27, 100, 0) == b"deleted content"
    os.pwrite(26, b"D", 0)
    assert os.pread(27, 1, 0) == b"D"
    assert os.pread(28, 13, 0) == b"memfd content" and os.fstat(28).st_size == 1 << 20
    assert fcntl.fcntl(28, 1034) == 2
    assert os.pread(82, 100, 0) == b"temporary" and os.lseek(82, 0, os.SEEK_CUR) == 9
    assert os.read(30, 4096) == b"in the pipe" * 100
    assert fcntl.fcntl(30, 1032) == 1 << 17
    assert os.read(32, 100) == b"one" and os.read(32, 100) == b"two"
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        os.write(34, b"x")
        assert False, "the reader is not gone"
    except BrokenPipeError:
        pass
    assert os.read(35, 10) == b"fifo"
    assert struct.unpack("Q", os.read(40, 8)) == (1,)
    left = ctypes.create_string_buffer(32)
    libc.timerfd_gettime(41, left)
    isec, insec, sec, nsec = struct.unpack("qqqq", left.raw)
    assert (isec, insec) == (1000, 5) and 3500 < sec <= 3600, (isec, insec, sec)
    a, b = socket.socket(fileno=50), socket.socket(fileno=51)
    assert a.recv(10000) == b"to a " * 1000
    assert b.recv(100) == b"to b" and b.recv(100) == b""
    b.send(b"still"), None
    assert a.recv(100) == b"still"
    b = socket.socket(fileno=53)
    assert b.recv(100) == b"first" and b.recv(100) == b"second"
    name = os.path.join(directory, "listener")
    listener, client, server = (socket.socket(fileno=fd) for fd in (54, 55, 56))
    assert server.getsockname() == name and client.getpeername() == name and listener.getsockname() == name
    assert server.recv(100) == b"for the server"
    accepted, _ = listener.accept()
    socket.socket(fileno=57).send(b"late")
    assert accepted.recv(100) == b"late"
    fresh = socket.socket(socket.AF_UNIX)
    fresh.connect(name)
    listener.accept()[0].send(b"hello")
    assert fresh.recv(10) == b"hello"
    assert os.stat(name).st_mode & 0o777 == 0o770
    datagrams, sender = socket.socket(fileno=58), socket.socket(fileno=59)
    assert datagrams.recv(100) == b"datagram"
    sender.send(b"more")
    assert datagrams.recv(100) == b"more"
    orphan = socket.socket(fileno=60)
    assert orphan.recv(100) == b"last words" and orphan.recv(100) == b""
    # What the epoll reports: semaphore eventfd readable (it counts on), nothing of the spent one-shot.
    buffer = ctypes.create_string_buffer(12 * 16)
    count = libc.epoll_wait(70, buffer, 16, 0)
    seen = {struct.unpack_from("=IQ", buffer, i * 12)[1] for i in range(count)}
    assert 0xDEADBEEF00000040 in seen, seen
    os.write(900, b"x"), os.write(33, b"y")
    socket.socket(fileno=52).send(b"z")
    count = libc.epoll_wait(70, buffer, 16, 0)
    seen = {struct.unpack_from("=IQ", buffer, i * 12)[1] for i in range(count)}
    assert {80, 81} <= seen and 53 not in seen, seen
    os.close(os.open(os.path.join(directory, "new"), os.O_CREAT))
    assert b"new" in os.read(71, 4096)


signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
if role == "open":
    open_everything()
print("ready", flush=True)
signal.sigwait([signal.SIGUSR1])
try:
    check()
    verdict = "fine"
except BaseException as error:
    import traceback
    verdict = traceback.format_exc()
with open(os.path.join(directory, "verdict.tmp"), "w") as f:
    f.write(verdict)
os.rename(os.path.join(directory, "verdict.tmp"), os.path.join(directory, "verdict"))
os._exit(0)
