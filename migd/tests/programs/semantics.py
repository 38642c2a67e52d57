"""What a program can see of sockets, case by case, one line each.

Run natively and under the net plane; the outputs must be the same. Everything happens within one host (argument 1, one of its
own addresses, and loopback), so that both runs have the same peer: themselves.
"""
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time

HOST = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1"
ONLY = sys.argv[2] if len(sys.argv) > 2 else None
LIBC = ctypes.CDLL(None, use_errno=True)
SWAP = "NETPLANE_SWAP" in os.environ
CASES = []


def case(function):
    CASES.append(function)
    return function


def show(*values):
    print("   ", *values, flush=True)


def attempt(function, *arguments):
    """The result, or the errno's name."""
    try:
        return function(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, repr(error))


def events(sock, wanted=select.POLLIN | select.POLLOUT | select.POLLRDHUP | select.POLLPRI, timeout=300):
    poll = select.poll()
    poll.register(sock, wanted)
    found = dict(poll.poll(timeout)).get(sock.fileno(), 0)
    names = ["IN", "PRI", "OUT", "ERR", "HUP", "RDHUP"]
    return "|".join(name for name in names if found & getattr(select, "POLL" + name)) or "0"


def wait_for(sock, wanted=select.POLLIN, timeout=2000):
    poll = select.poll()
    poll.register(sock, wanted)
    poll.poll(timeout)
    if SWAP:
        settle()


def settle():
    """Lets everything that is under way arrive; then, if asked for, all sockets are frozen and thawed behind our back."""
    time.sleep(0.05)
    if not SWAP or threading.active_count() > 1:
        return
    control = socket.socket(fileno=os.dup(0))
    control.sendall(b"f")
    text, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 250)
    for number, index in json.loads(text).items():
        new = descriptors[index]
        fcntl.fcntl(new, fcntl.F_SETFL, fcntl.fcntl(int(number), fcntl.F_GETFL))
        os.dup2(new, int(number), inheritable=False)
    for descriptor in set(descriptors):
        os.close(descriptor)
    control.sendall(b"k")
    control.recv(1)
    control.close()


def listener(host=None, family=socket.AF_INET, backlog=16):
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((HOST if host is None else host, 0))
    sock.listen(backlog)
    return sock


def connected(swap=SWAP):
    server = listener()
    client = socket.create_connection(server.getsockname())
    if swap:
        settle()
    peer, _ = server.accept()
    if swap:
        settle()
    server.close()
    return client, peer


def receive(sock, count):
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


def error_of(sock):
    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return errno.errorcode.get(number, number)


RESERVED = []


def free_port():
    """A port that refuses connections: bound, so that no connection takes it as its own, and not listening."""
    sock = socket.socket()
    sock.bind((HOST, 0))
    RESERVED.append(sock)
    return sock.getsockname()[1]


def linger_reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@case
def fresh_socket():
    sock = socket.socket()
    show(sock.getsockname(), attempt(sock.getpeername), attempt(sock.shutdown, 2), attempt(sock.accept))
    for name in (socket.SO_TYPE, 39, 38, 30, socket.SO_KEEPALIVE, socket.SO_REUSEADDR, 15):
        show(name, sock.getsockopt(socket.SOL_SOCKET, name))
    for name in ("NODELAY", "CORK", "KEEPIDLE", "KEEPINTVL", "KEEPCNT", "SYNCNT", "LINGER2", "DEFER_ACCEPT", "QUICKACK",
                 "USER_TIMEOUT"):
        show(name, sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, "TCP_" + name)))
    show(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG))
    show(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
    show(attempt(sock.setsockopt, socket.IPPROTO_TCP, 250, 1), attempt(sock.getsockopt, socket.IPPROTO_TCP, 250))
    show(attempt(sock.setsockopt, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1))
    show(attempt(sock.getsockopt, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    show(attempt(sock.setsockopt, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 0))
    show(attempt(sock.setsockopt, socket.IPPROTO_TCP, socket.TCP_NODELAY, b"\1"))


@case
def options_read_back():
    sock = socket.socket()
    for level, name, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 7), (socket.SOL_SOCKET, socket.SO_SNDBUF, 50000),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 60000), (socket.SOL_SOCKET, socket.SO_SNDBUF, 1),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 1), (socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 5), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 33),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 12345), (socket.IPPROTO_IP, socket.IP_TOS, 0x10),
        (socket.IPPROTO_IP, socket.IP_TTL, 33), (socket.SOL_SOCKET, socket.SO_PRIORITY, 3),
        (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 9), (socket.IPPROTO_TCP, socket.TCP_LINGER2, -1),
    ):
        show(level, name, attempt(sock.setsockopt, level, name, value), sock.getsockopt(level, name))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 9))
    show(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
    show(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 4))


@case
def bind_and_listen():
    sock = socket.socket()
    sock.bind((HOST, 0))
    port = sock.getsockname()[1]
    show(sock.getsockname()[0], port != 0, attempt(sock.bind, (HOST, 0)))
    other = socket.socket()
    show(attempt(other.bind, (HOST, port)), attempt(other.bind, ("203.0.113.9", 0)))
    sock.listen(1)
    show(sock.getsockopt(socket.SOL_SOCKET, 30), attempt(sock.listen, 5), attempt(sock.connect, (HOST, port)))
    reuse = socket.socket()
    reuse.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    show(attempt(reuse.bind, (HOST, port)))
    auto = socket.socket()
    auto.listen(1)
    show(auto.getsockname()[0], auto.getsockname()[1] != 0)
    one, two = socket.socket(), socket.socket()
    for sock in (one, two):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind((HOST, 0))
    show(attempt(two.bind, one.getsockname()), attempt(one.listen, 1), attempt(two.listen, 1))


@case
def names():
    server = listener("0.0.0.0")
    client = socket.create_connection((HOST, server.getsockname()[1]))
    peer, address = server.accept()
    show(address == client.getsockname(), peer.getpeername() == client.getsockname())
    show(peer.getsockname() == client.getpeername(), peer.getsockname()[0] == HOST)
    show(peer.getsockopt(socket.SOL_SOCKET, 30), attempt(client.connect, server.getsockname()), attempt(client.listen, 1))


@case
def accept_modes():
    server = listener()
    show(events(server, timeout=0))
    server.setblocking(False)
    show(attempt(server.accept))
    client = socket.create_connection(server.getsockname())
    wait_for(server)
    show(events(server))
    peer, _ = server.accept()
    show(attempt(server.accept), events(server, timeout=0), peer.getblocking())
    server.setblocking(True)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 100000))
    started = time.monotonic()
    show(attempt(server.accept), 0.09 < time.monotonic() - started < 0.6)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
    address = server.getsockname()
    thread = threading.Timer(0.1, lambda: socket.create_connection(address))
    thread.start()
    peer, _ = server.accept()
    show("accepted")
    flags = LIBC.accept4
    extra = socket.create_connection(address)
    number = flags(server.fileno(), None, None, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    show(bool(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_NONBLOCK), fcntl.fcntl(number, fcntl.F_GETFD))
    os.close(number)
    # Many in a row: whatever was made ahead is used up.
    kept = []
    for wanted in (0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC) * 8:
        kept.append(socket.create_connection(address))
        kept.append(socket.socket(fileno=flags(server.fileno(), None, None, wanted)))
        kept.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM | wanted))
        for one in kept[-2:]:
            show(wanted, fcntl.fcntl(one, fcntl.F_GETFL) & os.O_NONBLOCK, fcntl.fcntl(one, fcntl.F_GETFD))
    show(flags(server.fileno(), None, None, 0x100000), errno.errorcode[ctypes.get_errno()])


@case
def an_accepted_connection_is_not_announced():
    server = listener()
    poller = select.poll()
    poller.register(server, select.POLLIN)
    again = 0
    # While everything is swapped at each step, what polls sees may be what was before.
    for _ in range(1 if SWAP else 150):
        client = socket.create_connection(server.getsockname())
        wait_for(server)
        peer, _ = server.accept()
        again += len(poller.poll(0))
        client.close()
        peer.close()
    show("readable with nobody waiting", again if not SWAP else 0)


@case
def accept_is_interrupted():
    server = listener()
    seen = []
    signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    result = LIBC.accept(server.fileno(), None, None)
    show(result, errno.errorcode[ctypes.get_errno()], seen)
    # With SA_RESTART the call goes on.
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    address = server.getsockname()
    clients = []
    timer = threading.Timer(0.3, lambda: clients.append(socket.create_connection(address)))
    timer.start()
    result = LIBC.accept(server.fileno(), None, None)
    timer.join()
    show(result > 0, seen, len(clients))
    os.close(result)


@case
def accept_finds_no_room():
    server = listener()
    client = socket.create_connection(server.getsockname())
    client.sendall(b"early")
    wait_for(server)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    tries = [attempt(server.accept) for _ in range(3)]
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    show(tries, events(server))
    peer, _ = server.accept()
    show(peer.recv(10), events(server, timeout=0))


@case
def connect_refused_blocking():
    port = free_port()
    sock = socket.socket()
    show(attempt(sock.connect, (HOST, port)), error_of(sock), attempt(sock.getpeername))
    server = listener()
    show(attempt(sock.connect, server.getsockname()))
    peer, _ = server.accept()
    sock.sendall(b"again")
    show(peer.recv(10))


@case
def connect_refused_nonblocking():
    port = free_port()
    sock = socket.socket()
    sock.setblocking(False)
    show(attempt(sock.connect, (HOST, port)))
    wait_for(sock, select.POLLOUT)
    show(events(sock), error_of(sock), error_of(sock))
    server = listener()
    show(attempt(sock.connect, server.getsockname()), attempt(sock.connect, server.getsockname()))
    wait_for(sock, select.POLLOUT)
    show(events(sock), error_of(sock))
    server.settimeout(2)
    peer, _ = server.accept()
    sock.sendall(b"again")
    show(peer.recv(10))


@case
def connect_refused_told_by_connect():
    port = free_port()
    sock = socket.socket()
    sock.setblocking(False)
    show(attempt(sock.connect, (HOST, port)))
    wait_for(sock, select.POLLOUT)
    show(attempt(sock.connect, (HOST, port)), error_of(sock))


@case
def connect_nonblocking():
    server = listener()
    sock = socket.socket()
    sock.setblocking(False)
    show(attempt(sock.connect, server.getsockname()))
    wait_for(sock, select.POLLOUT)
    show(events(sock), error_of(sock))
    show(attempt(sock.connect, server.getsockname()), attempt(sock.connect, server.getsockname()))
    peer, _ = server.accept()
    sock.sendall(b"x" * 100000)
    got = 0
    while got < 100000:
        got += len(peer.recv(65536))
    show(got)


@case
def connect_with_epoll_edges():
    global SWAP
    # Putting another descriptor under the same number ends its registration with epoll.
    SWAP, swap = False, SWAP
    epoll_edges()
    SWAP = swap


def epoll_edges():
    server = listener()
    sock = socket.socket()
    sock.setblocking(False)
    epoll = select.epoll()
    attempt(sock.connect, server.getsockname())
    epoll.register(sock, select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET)
    found = [event for _, event in epoll.poll(2)]
    # A second edge of the same readiness is allowed.
    show(found, error_of(sock), [event for _, event in epoll.poll(0.1) if event != select.EPOLLOUT])
    peer, _ = server.accept()
    peer.sendall(b"hello")
    show([event & select.EPOLLIN for _, event in epoll.poll(2)], epoll.poll(0.1), sock.recv(100))
    peer.close()
    settle()
    show([event & (select.EPOLLIN | select.EPOLLRDHUP) for _, event in epoll.poll(2)], sock.recv(100))


@case
def half_close():
    client, peer = connected()
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    show(peer.recv(100), peer.recv(100), attempt(client.send, b"x"))
    settle()
    show(events(client), events(peer))
    peer.sendall(b"answer")
    peer.shutdown(socket.SHUT_WR)
    show(client.recv(100), client.recv(100))
    settle()
    show(events(client), events(peer))
    show(attempt(client.shutdown, socket.SHUT_RDWR), attempt(peer.getpeername))


@case
def states_in_poll():
    client, peer = connected()
    show(events(client), events(peer))
    client.sendall(b"x")
    settle()
    show(events(peer))
    client.close()
    settle()
    show(events(peer), peer.recv(10), peer.recv(10), events(peer))


@case
def shutdown_read():
    client, peer = connected()
    client.shutdown(socket.SHUT_RD)
    show(client.recv(10), events(client))
    client.sendall(b"still")
    show(peer.recv(10))
    client.shutdown(socket.SHUT_WR)
    show(peer.recv(10))


@case
def shutdown_both():
    client, peer = connected()
    peer.sendall(b"before")
    settle()
    client.shutdown(socket.SHUT_RDWR)
    settle()
    show(events(client), client.recv(10), client.recv(10), attempt(client.send, b"x"))
    show(peer.recv(10))


@case
def reset_while_idle():
    client, peer = connected()
    linger_reset(client)
    settle()
    show(events(peer), attempt(peer.recv, 10), attempt(peer.recv, 10), attempt(peer.send, b"x"), attempt(peer.getpeername))


@case
def reset_told_by_so_error():
    client, peer = connected()
    linger_reset(client)
    settle()
    show(error_of(peer), error_of(peer), attempt(peer.recv, 10), attempt(peer.send, b"x"))


@case
def reset_after_data():
    client, peer = connected()
    client.sendall(b"last words")
    settle()
    linger_reset(client)
    settle()
    show(attempt(peer.recv, 4), attempt(peer.recv, 100), attempt(peer.recv, 100), attempt(peer.recv, 100))


@case
def close_with_unread_data():
    client, peer = connected()
    client.sendall(b"never read")
    settle()
    peer.sendall(b"answer")
    peer.close()
    settle()
    show(attempt(client.recv, 100), attempt(client.recv, 100), attempt(client.recv, 100))


@case
def write_after_peer_closed():
    client, peer = connected()
    peer.close()
    settle()
    show(attempt(client.send, b"first"))
    settle()
    show(attempt(client.send, b"second"), attempt(client.recv, 10), events(client))


@case
def listener_closed_with_waiting_connections():
    server = listener()
    client = socket.create_connection(server.getsockname())
    settle()
    server.close()
    settle()
    show(attempt(client.recv, 10), attempt(socket.create_connection, client.getpeername() if False else (HOST, free_port())))


@case
def listener_shut_down():
    server = listener()
    results = []
    thread = threading.Thread(target=lambda: results.append(attempt(server.accept)))
    thread.start()
    settle()
    show(attempt(server.shutdown, socket.SHUT_RDWR))
    thread.join(2)
    show(results, attempt(server.accept), server.getsockopt(socket.SOL_SOCKET, 30))


@case
def port_is_free_after_close():
    sock = socket.socket()
    sock.bind((HOST, 0))
    address = sock.getsockname()
    sock.close()
    settle()
    again = socket.socket()
    show(attempt(again.bind, address))
    server = listener()
    address = server.getsockname()
    server.close()
    # What a close frees is free at once, for the next call already.
    again = socket.socket()
    show(attempt(again.bind, address), attempt(again.listen, 1))


@case
def dual_stack():
    server = listener("::", socket.AF_INET6)
    show(server.getsockname()[0], server.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    client = socket.create_connection((HOST, server.getsockname()[1]))
    peer, address = server.accept()
    show(address[0] == "::ffff:" + HOST, peer.getsockname()[0] == "::ffff:" + HOST, peer.family == socket.AF_INET6)
    mapped = socket.socket(socket.AF_INET6)
    show(attempt(mapped.connect, ("::ffff:" + HOST, server.getsockname()[1])))
    show(mapped.getpeername()[0] == "::ffff:" + HOST)
    only = socket.socket(socket.AF_INET6)
    only.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    only.bind(("::", 0))
    only.listen(1)
    port = only.getsockname()[1]
    show(attempt(socket.create_connection, (HOST, port)), attempt(listener().bind, ("0.0.0.0", port)))
    loop = socket.socket(socket.AF_INET6)
    show(attempt(loop.connect, ("::1", port)), loop.getsockname()[0])
    show(attempt(only.setsockopt, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0))


@case
def descriptors_are_shared():
    client, peer = connected()
    copy = client.dup()
    client.close()
    show(attempt(copy.send, b"one"), peer.recv(10))
    child = os.fork()
    if child == 0:
        copy.sendall(b"from the child")
        os._exit(0)
    os.waitpid(child, 0)
    show(peer.recv(100))
    copy.close()
    show(peer.recv(10))


@case
def children_share_a_listener():
    server = listener()
    children = []
    for index in range(3):
        child = os.fork()
        if child == 0:
            peer, _ = server.accept()
            peer.sendall(b"served")
            peer.close()
            os._exit(0)
        children.append(child)
    for _ in children:
        client = socket.create_connection(server.getsockname())
        show(client.recv(10), client.recv(10))
    for child in children:
        os.waitpid(child, 0)


@case
def many_waiting_connections():
    server = listener(backlog=200)
    clients = [socket.create_connection(server.getsockname()) for _ in range(150)]
    server.setblocking(False)
    wait_for(server)
    count = 0
    while True:
        if isinstance(attempt(server.accept), str):
            break
        count += 1
    show(count, events(server, timeout=0))


@case
def disconnect():
    client, peer = connected()
    address = struct.pack("H14x", socket.AF_UNSPEC)
    show(LIBC.connect(client.fileno(), address, 16))
    settle()
    show(attempt(peer.recv, 10), attempt(client.getpeername))


@case
def duplicates_are_one_socket():
    sock = socket.socket()
    copies = [sock, sock.dup(), sock.dup()]
    sock.setblocking(False)
    show(attempt(sock.connect, (HOST, free_port())))
    settle()
    show([error_of(copy) for copy in copies], attempt(sock.connect, (HOST, free_port())))
    show(copies[1].bind((HOST, 0)), len({copy.getsockname() for copy in copies}), [copy.family for copy in copies])
    show(copies[2].listen(1))
    client = socket.create_connection(sock.getsockname())
    settle()
    peer, _ = sock.accept()
    show(peer.send(b"hello"), client.recv(10), [attempt(copy.accept) for copy in copies])


def set_and_read(level, name, value):
    sock = socket.socket()
    sock.setsockopt(level, name, value)
    return sock.getsockopt(level, name)


@case
def options_of_no_effect():
    for family, level, names in (
        (socket.AF_INET, socket.IPPROTO_IP, (8, 10, 11, 12, 13, 20, 21, 24, 33, 34)),
        (socket.AF_INET6, socket.IPPROTO_IPV6, (18, 19, 23, 25, 70, 72)),
        (socket.AF_INET, socket.IPPROTO_TCP, (15, 16, 17, 23, 27, 30, 34, 37)),
    ):
        sock = socket.socket(family)
        show([attempt(sock.getsockopt, level, name) for name in names])
    for level, name in ((socket.IPPROTO_IP, 10), (socket.IPPROTO_IP, 33)):
        show([attempt(set_and_read, level, name, value) for value in (-1, 0, 5, 6)])
    client, peer = connected()
    show([attempt(client.setsockopt, socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, value) for value in (0, 5000)])


@case
def connect_when_it_was_shut():
    server = listener()
    client = socket.socket()
    client.setblocking(False)
    show(attempt(client.connect, server.getsockname()))
    wait_for(client, select.POLLOUT)
    client.shutdown(socket.SHUT_WR)
    show(attempt(client.connect, server.getsockname()))


@case
def unsent_low_water_mark():
    client, peer = connected()
    show(client.getsockopt(socket.IPPROTO_TCP, 25))
    for value in (0, -1, 1, 16384):
        client.setsockopt(socket.IPPROTO_TCP, 25, value)
        show(client.getsockopt(socket.IPPROTO_TCP, 25), client.sendall(b"x" * 3000))
        settle()
        show(len(receive(peer, 3000)))


@case
def small_buffers_block():
    client, peer = connected()
    client.setblocking(False)
    total = 0
    progress = True
    while progress:
        progress = False
        while not isinstance(count := attempt(client.send, b"x" * 65536), str):
            total += count
            progress = True
        settle()
    show(count, events(client), total > 65536)
    got = 0
    while got < total:
        got += len(peer.recv(1 << 20))
    settle()
    show(events(client))


def transfer(size, chunk):
    client, peer = connected()
    data = os.urandom(1 << 20) * (size >> 20)

    def send():
        for at in range(0, len(data), chunk):
            client.sendall(data[at:at + chunk])
        client.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    digest, count = hashlib.sha256(), 0
    while True:
        block = peer.recv(200000)
        if not block:
            break
        digest.update(block)
        count += len(block)
    thread.join()
    show(count == len(data), digest.digest() == hashlib.sha256(data).digest())


@case
def bulk():
    transfer(64 << 20, 1 << 20)


@case
def bulk_in_odd_chunks():
    transfer(4 << 20, 7777)


@case
def socket_queues():
    client, peer = connected()
    peer.sendall(b"12345")
    settle()
    buffer = bytearray(4)
    fcntl.ioctl(client, 0x541B, buffer)
    show(struct.unpack("i", buffer))
    fcntl.ioctl(peer, 0x5411, buffer)
    show(struct.unpack("i", buffer))
    fcntl.ioctl(client, 0x8905, buffer)
    show(struct.unpack("i", buffer))


@case
def tcp_info():
    client, peer = connected()
    show(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)[0], len(client.getsockopt(6, 11, 104)))
    server = listener()
    show(server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[0])


V6_OPTIONS = (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def listener6(host="::", v6only=None):
    sock = socket.socket(socket.AF_INET6)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if v6only is not None:
        sock.setsockopt(*V6_OPTIONS, v6only)
    sock.bind((host, 0))
    sock.listen(16)
    return sock


def raw_call(name, sock, address):
    """bind or connect with the bytes of an address that Python wouldn't make."""
    result = getattr(LIBC, name)(sock.fileno(), address, len(address))
    return result if result == 0 else errno.errorcode[ctypes.get_errno()]


def sockaddr_in(host, port):
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(host) + bytes(8)


def sockaddr_in6(host, port, scope=0, flow=0):
    address = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, flow)
    return address + socket.inet_pton(socket.AF_INET6, host) + struct.pack("=I", scope)


def port_hidden(name, port):
    return tuple("PORT" if part == port else part for part in name)


@case
def v6_fresh_socket():
    sock = socket.socket(socket.AF_INET6)
    show(sock.getsockname(), attempt(sock.getpeername), sock.getsockopt(socket.SOL_SOCKET, 39))
    for name in ("V6ONLY", "TCLASS", "UNICAST_HOPS", "RECVPKTINFO"):
        show(name, sock.getsockopt(socket.IPPROTO_IPV6, getattr(socket, "IPV6_" + name)))
    for level, name, value in (
        (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1),
        (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 0x28),
        (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 256),
        (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 33),
        (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 256),
        (socket.IPPROTO_IP, socket.IP_TOS, 16),
        (socket.IPPROTO_IP, socket.IP_TTL, 12),
    ):
        show(level, name, value, attempt(sock.setsockopt, level, name, value), attempt(sock.getsockopt, level, name))


@case
def v6_stream():
    server = listener6("::1")
    port = server.getsockname()[1]
    client = socket.create_connection(("::1", port))
    if SWAP:
        settle()
    peer, address = server.accept()
    show(port_hidden(server.getsockname(), port), port_hidden(client.getpeername(), port), client.getsockname()[0])
    show(address == client.getsockname(), peer.getpeername() == address, port_hidden(peer.getsockname(), port))
    client.sendall(b"over six")
    settle()
    show(peer.recv(100))
    peer.shutdown(socket.SHUT_WR)
    settle()
    show(client.recv(100), events(client), peer.getsockopt(socket.SOL_SOCKET, 39))


@case
def dual_stack_listener():
    server = listener6()
    port = server.getsockname()[1]
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6), ("::ffff:127.0.0.1", socket.AF_INET6)):
        client = socket.socket(family)
        client.connect((host, port))
        if SWAP:
            settle()
        peer, address = server.accept()
        show(address[0], len(address), port_hidden(peer.getsockname(), port), port_hidden(client.getpeername(), port))
        show(client.getsockname()[0], peer.getsockopt(*V6_OPTIONS))
        client.sendall(b"x")
        show(peer.recv(1))
        client.close(), peer.close()


@case
def v6only_listener():
    server = listener6(v6only=1)
    port = server.getsockname()[1]
    show(attempt(socket.create_connection, ("127.0.0.1", port)), server.getsockopt(*V6_OPTIONS))
    show(attempt(server.setsockopt, *V6_OPTIONS, 0))
    socket.create_connection(("::1", port)).close()
    four = socket.socket()
    show(attempt(four.bind, ("0.0.0.0", port)))
    four.listen()
    socket.create_connection(("127.0.0.1", port)).close()
    show(four.accept()[1][0])


@case
def dual_stack_takes_the_port_of_both():
    server = listener6()
    port = server.getsockname()[1]
    show(attempt(socket.socket().bind, ("0.0.0.0", port)), attempt(socket.socket().bind, ("127.0.0.1", port)))
    show(attempt(socket.socket(socket.AF_INET6).bind, ("::1", port)))
    server.close()
    four = socket.socket()
    four.bind(("127.0.0.1", port))
    show(attempt(socket.socket(socket.AF_INET6).bind, ("::", port)))
    only = socket.socket(socket.AF_INET6)
    only.setsockopt(*V6_OPTIONS, 1)
    show(attempt(only.bind, ("::", port)))


@case
def mapped_addresses():
    server = listener("127.0.0.1")
    port = server.getsockname()[1]
    client = socket.socket(socket.AF_INET6)
    show(attempt(client.connect, ("::ffff:127.0.0.1", port)), client.getsockname()[0], port_hidden(client.getpeername(), port))
    server.accept()
    only = socket.socket(socket.AF_INET6)
    only.setsockopt(*V6_OPTIONS, 1)
    show(attempt(only.connect, ("::ffff:127.0.0.1", port)))
    show(attempt(only.bind, ("::ffff:127.0.0.1", 0)))
    bound = socket.socket(socket.AF_INET6)
    show(attempt(bound.bind, ("::ffff:127.0.0.1", 0)), bound.getsockname()[0])
    show(attempt(bound.connect, ("::1", port)))
    show(attempt(bound.connect, ("::ffff:127.0.0.1", port)))
    server.accept()


@case
def v6_connect_errors():
    reserved = socket.socket(socket.AF_INET6)
    reserved.bind(("::1", 0))
    port = reserved.getsockname()[1]
    show(attempt(socket.create_connection, ("::1", port)))
    client = socket.socket(socket.AF_INET6)
    client.setblocking(False)
    show(attempt(client.connect, ("::1", port)))
    settle()
    show(events(client), error_of(client))
    fresh = lambda: socket.socket(socket.AF_INET6)
    show(raw_call("connect", fresh(), sockaddr_in("127.0.0.1", port)))
    show(raw_call("connect", fresh(), sockaddr_in6("::1", port)[:24]), raw_call("connect", fresh(), sockaddr_in6("::1", port)[:20]))
    show(raw_call("connect", socket.socket(), sockaddr_in6("::1", port)))
    show(raw_call("bind", fresh(), sockaddr_in("127.0.0.1", 0)), raw_call("bind", socket.socket(), sockaddr_in6("::1", 0)))
    show(raw_call("connect", fresh(), sockaddr_in6("fe80::1", port)))
    show(raw_call("bind", fresh(), sockaddr_in6("fe80::1", 0)))
    show(attempt(fresh().bind, ("2001:db8::1", 0)), attempt(fresh().bind, ("ff02::1", 0)))


@case
def v6_wildcard_means_this_host():
    server = listener6("::1")
    client = socket.socket(socket.AF_INET6)
    show(attempt(client.connect, ("::", server.getsockname()[1])), client.getpeername()[0])


@case
def v6_names_in_short_buffers():
    server = listener6("::1")
    for room in (0, 2, 16, 28, 100):
        buffer, length = ctypes.create_string_buffer(128), ctypes.c_uint(room)
        result = LIBC.getsockname(server.fileno(), buffer, ctypes.byref(length))
        show(room, result, length.value, buffer.raw[:2], buffer.raw[8:24] if room >= 28 else None)


def datagram_pair(family=socket.AF_INET, host="127.0.0.1"):
    one, other = socket.socket(family, socket.SOCK_DGRAM), socket.socket(family, socket.SOCK_DGRAM)
    one.bind((host, 0)), other.bind((host, 0))
    return one, other


@case
def datagrams():
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        one, other = datagram_pair(family, host)
        one.sendto(b"first", other.getsockname()), one.sendto(b"", other.getsockname())
        one.sendmsg([b"third", b" in parts"], [], 0, other.getsockname())
        data, sender = other.recvfrom(100, socket.MSG_PEEK)
        show(data, sender == one.getsockname())
        data, ancillary, flags, sender = other.recvmsg(3)
        show(data, ancillary, flags, sender == one.getsockname())
        show(other.recv(100), other.recv_into(bytearray(4), 4, socket.MSG_TRUNC), attempt(other.recv, 1, socket.MSG_DONTWAIT))
        other.settimeout(0.05)
        show(attempt(other.recv, 1), events(other), error_of(other))
        show(attempt(one.send, b"x"), attempt(one.getpeername), attempt(one.sendto, bytes(65536), other.getsockname()))
        show(attempt(one.listen), attempt(one.accept), attempt(one.shutdown, 2))


@case
def connected_datagrams():
    one, other = datagram_pair()
    stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.connect(other.getsockname())
    stranger.sendto(b"no", one.getsockname()), other.sendto(b"yes", one.getsockname())
    show(one.recv(100), one.getpeername() == other.getsockname(), one.send(b"back"), other.recvfrom(9)[1] == one.getsockname())
    port = one.getsockname()[1]
    show(raw_call("connect", one, bytes(16)), attempt(one.getpeername), one.getsockname() == ("127.0.0.1", port))
    free = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    free.connect(other.getsockname())
    show(free.getsockname()[0], free.getsockname()[1] != 0)


@case
def refused_datagrams():
    for family, host, level, receive_errors in (
        (socket.AF_INET, "127.0.0.1", socket.IPPROTO_IP, 11),
        (socket.AF_INET6, "::1", socket.IPPROTO_IPV6, 25),
    ):
        one, other = datagram_pair(family, host)
        name = other.getsockname()
        other.close()
        one.sendto(b"x", name)
        settle()
        show("unconnected", events(one), error_of(one))
        one.connect(name)
        one.send(b"x")
        settle()
        show(events(one), attempt(one.send, b"y"), attempt(one.recv, 1, socket.MSG_DONTWAIT))
        one.send(b"x")
        settle()
        show(error_of(one), error_of(one))
        told = socket.socket(family, socket.SOCK_DGRAM)
        told.setsockopt(level, receive_errors, 1)
        told.sendto(b"payload", name)
        settle()
        data, ancillary, flags, sender = told.recvmsg(100, 512, socket.MSG_ERRQUEUE)
        show(data, [(a, b, c[:12]) for a, b, c in ancillary], flags == socket.MSG_ERRQUEUE, sender == name)


@case
def datagram_ports():
    def bound(*options, address=("127.0.0.1", 0), family=socket.AF_INET):
        sock = socket.socket(family, socket.SOCK_DGRAM)
        for option in options:
            sock.setsockopt(*option)
        return attempt(sock.bind, address), sock

    _, first = bound()
    port = first.getsockname()[1]
    show(bound(address=("127.0.0.1", port))[0], bound(address=("0.0.0.0", port))[0], bound(address=("127.0.0.2", port))[0])
    reuse, share = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1), (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    show(bound(reuse, address=("127.0.0.1", port))[0])
    group = [bound(share), None]
    port = group[0][1].getsockname()[1]
    group[1] = bound(share, address=("127.0.0.1", port))
    show(group[1][0], bound(address=("127.0.0.1", port))[0], bound(address=("::", port), family=socket.AF_INET6)[0])
    sender = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(64)]
    for number, sock in enumerate(sender):
        sock.sendto(b"%d" % number, ("127.0.0.1", port))
    shares = []
    for _, sock in group:
        sock.setblocking(False)
        shares.append(0)
        while isinstance(attempt(sock.recv, 9), bytes):
            shares[-1] += 1
    show(sum(shares), all(shares))


@case
def dual_stack_datagrams():
    both = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    both.bind(("::", 0))
    port = both.getsockname()[1]
    both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    both.setsockopt(socket.IPPROTO_IP, 12, 1)
    four = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    four.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 77)
    six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    for sock, host in ((four, "127.0.0.1"), (six, "::1"), (six, "::ffff:127.0.0.1")):
        sock.sendto(b"x", (host, port))
        data, ancillary, flags, sender = both.recvmsg(9, 256)
        show(data, ancillary, flags, sender[0])
        both.sendto(b"answer", sender)
        data, sender = sock.recvfrom(9)
        show(data, port_hidden(sender, port))


@case
def datagram_buffers():
    one, other = datagram_pair()
    show(one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), one.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    for _ in range(100):
        other.sendto(bytes(1000), one.getsockname())
    count = 0
    while isinstance(attempt(one.recv, 2000, socket.MSG_DONTWAIT), bytes):
        count += 1
    show(0 < count < 100)
    buffer = bytearray(4)
    other.sendto(b"12345", one.getsockname()), other.sendto(b"1", one.getsockname())
    fcntl.ioctl(one, 0x541B, buffer)
    show(struct.unpack("i", buffer))
    big = bytes(range(250)) * 260
    other.sendto(big, one.getsockname())
    show(one.recv(10), one.recv(10), attempt(one.recv, 70000, socket.MSG_DONTWAIT) == big)


# An end of a pair that was never connected takes what is written, and waits when it is read.
UNCONNECTED = ("fresh", "bound", "listening", "failed", "dissolved", "stopped listening")


def in_each_state():
    """Sockets in every state that a program can get hold of, each with its name."""
    port = free_port()
    fresh = socket.socket()
    bound = socket.socket()
    bound.bind((HOST, 0))
    listening = listener()
    failed = socket.socket()
    attempt(failed.connect, (HOST, port))
    connected_one, peer = connected(False)
    half, half_peer = connected(False)
    half.shutdown(socket.SHUT_WR)
    read_shut, read_shut_peer = connected(False)
    read_shut.shutdown(socket.SHUT_RD)
    both, both_peer = connected(False)
    both.shutdown(socket.SHUT_RDWR)
    passive, passive_peer = connected(False)
    passive_peer.shutdown(socket.SHUT_WR)
    over, over_peer = connected(False)
    over_peer.close()
    settle()
    over.shutdown(socket.SHUT_WR)
    reset, reset_peer = connected(False)
    linger_reset(reset_peer)
    told, told_peer = connected(False)
    linger_reset(told_peer)
    settle()
    error_of(told)
    unbound, unbound_peer = connected(False)
    raw_call("connect", unbound, bytes(16))
    stopped = listener()
    stopped.shutdown(socket.SHUT_RD)
    settle()
    keep = [peer, half_peer, read_shut_peer, both_peer, passive_peer, unbound_peer]
    return keep, [
        ("fresh", fresh), ("bound", bound), ("listening", listening), ("failed", failed), ("connected", connected_one),
        ("write shut", half), ("read shut", read_shut), ("both shut", both), ("peer shut", passive), ("over", over),
        ("reset", reset), ("reset and told", told), ("dissolved", unbound), ("stopped listening", stopped),
    ]


@case
def names_in_each_state():
    keep, sockets = in_each_state()
    for name, sock in sockets:
        host, port = sock.getsockname()
        peer = attempt(sock.getpeername)
        # Linux goes on showing the port of an attempt that failed, and the peer until that is done as well.
        if name != "both shut":
            show(name, host, port != 0 or name == "failed", peer if isinstance(peer, str) else peer[0])


@case
def options_in_each_state():
    keep, sockets = in_each_state()
    for name, sock in sockets:
        show(name, error_of(sock), sock.getsockopt(socket.SOL_SOCKET, 30))
        if name != "both shut":
            show(sock.getsockopt(6, 11, 1)[0])
        show(attempt(sock.setsockopt, 6, socket.TCP_NODELAY, 1), attempt(sock.getsockopt, 6, socket.TCP_NODELAY),
             attempt(sock.setsockopt, 0, 250, 1), attempt(sock.getsockopt, 0, 250))


@case
def shutdown_in_each_state():
    for how in (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR):
        keep, sockets = in_each_state()
        show(how, [(name, attempt(sock.shutdown, how)) for name, sock in sockets])
    show([(name, attempt(sock.shutdown, 7)) for name, sock in sockets])


@case
def shutdown_twice_in_each_state():
    keep, sockets = in_each_state()
    for name, sock in sockets:
        show(name, attempt(sock.shutdown, socket.SHUT_RD), attempt(sock.shutdown, socket.SHUT_WR),
             attempt(sock.shutdown, socket.SHUT_RDWR))
        if name not in UNCONNECTED:
            show(attempt(sock.recv, 1), attempt(sock.send, b"x"))


@case
def bind_in_each_state():
    keep, sockets = in_each_state()
    show([(name, attempt(sock.bind, (HOST, 0))) for name, sock in sockets if name != "stopped listening"])


@case
def listen_in_each_state():
    keep, sockets = in_each_state()
    show([(name, attempt(sock.listen, 1)) for name, sock in sockets])


@case
def accept_in_each_state():
    keep, sockets = in_each_state()
    for _, sock in sockets:
        sock.setblocking(False)
    show([(name, attempt(sock.accept)) for name, sock in sockets])


@case
def reads_and_writes_in_each_state():
    keep, sockets = in_each_state()
    for name, sock in sockets:
        if name not in UNCONNECTED:
            sock.setblocking(False)
            show(name, events(sock, timeout=0), attempt(sock.recv, 1), attempt(sock.recv, 1, socket.MSG_PEEK), attempt(sock.send, b"x"))


@case
def connect_in_each_state():
    keep, sockets = in_each_state()
    server = listener()
    for name, sock in sockets:
        show(name, attempt(sock.connect, server.getsockname()))


@case
def dissolve_in_each_state():
    keep, sockets = in_each_state()
    server = listener()
    for name, sock in sockets:
        result = raw_call("connect", sock, bytes(16))
        show(name, result, attempt(sock.getpeername), error_of(sock), attempt(sock.connect, server.getsockname()))


@case
def dissolve_while_connecting():
    server = listener(backlog=1)
    sock = socket.socket()
    sock.setblocking(False)
    show(attempt(sock.connect, server.getsockname()), raw_call("connect", sock, bytes(16)))
    settle()
    show(attempt(sock.getpeername), error_of(sock))
    sock.setblocking(True)
    other = listener()
    show(attempt(sock.connect, other.getsockname()))
    other.accept()[0].sendall(b"here")
    show(sock.recv(9))


@case
def a_dissolved_socket_keeps_what_it_was_bound_to():
    server = listener()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((HOST, 0))
    name = sock.getsockname()
    sock.connect(server.getsockname())
    settle()
    show(raw_call("connect", sock, bytes(16)), sock.getsockname() == name)
    free = socket.create_connection(server.getsockname())
    show(raw_call("connect", free, bytes(16)), free.getsockname()[0])
    stopped = listener()
    name = stopped.getsockname()
    show(raw_call("connect", stopped, bytes(16)), stopped.getsockname() == name, stopped.getsockopt(socket.SOL_SOCKET, 30))


@case
def linger_zero_resets():
    client, peer = connected()
    client.sendall(b"first")
    settle()
    show(peer.recv(10))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    settle()
    show(events(client), attempt(client.recv, 10), attempt(client.send, b"x"))


@case
def linger_zero_after_shutdown():
    client, peer = connected()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.shutdown(socket.SHUT_WR)
    settle()
    show(events(client), client.recv(10))
    peer.close()
    settle()
    show(attempt(client.recv, 10), attempt(client.send, b"x"))


@case
def linger_is_taken_over_by_accepted_sockets():
    server = listener()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client = socket.create_connection(server.getsockname())
    peer, _ = server.accept()
    show(peer.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
    peer.close()
    settle()
    show(attempt(client.recv, 10))


@case
def linger_ends_when_all_is_received():
    client, peer = connected()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 20))
    client.sendall(b"all of it")
    client.close()
    settle()
    show(peer.recv(100), peer.recv(100))


def urgent_state(sock):
    """Without POLLIN, which here a lone urgent byte sets, too."""
    mark = bytearray(4)
    fcntl.ioctl(sock, 0x8905, mark)
    return events(sock, select.POLLPRI, timeout=0), struct.unpack("i", mark)[0]


@case
def urgent_byte():
    for client, peer in (connected(), reversed(connected())):
        show(attempt(peer.recv, 1, socket.MSG_OOB), urgent_state(peer))
        client.sendall(b"before")
        show(client.send(b"!", socket.MSG_OOB))
        client.sendall(b"behind")
        settle()
        show(urgent_state(peer), attempt(peer.recv, 1, socket.MSG_OOB | socket.MSG_PEEK))
        show(attempt(peer.recv, 9, socket.MSG_OOB), attempt(peer.recv, 1, socket.MSG_OOB), urgent_state(peer))
        show(peer.recv(100), urgent_state(peer), peer.recv(100), urgent_state(peer))


@case
def urgent_byte_left_where_it_is():
    client, peer = connected()
    client.sendall(b"before")
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b"behind")
    settle()
    show(peer.recv(100), urgent_state(peer), peer.recv(100), attempt(peer.recv, 1, socket.MSG_OOB), urgent_state(peer))


@case
def urgent_byte_in_line():
    client, peer = connected()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    show(peer.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE))
    client.sendall(b"before")
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b"behind")
    settle()
    show(urgent_state(peer), attempt(peer.recv, 1, socket.MSG_OOB))
    show(peer.recv(100), urgent_state(peer), peer.recv(100), urgent_state(peer))


@case
def urgent_bytes_of_several():
    client, peer = connected()
    show(client.send(b"abc", socket.MSG_OOB))
    settle()
    show(peer.recv(10), urgent_state(peer), attempt(peer.recv, 1, socket.MSG_OOB))
    client.sendall(b"de")
    settle()
    show(peer.recv(10), urgent_state(peer))
    client.sendmsg([b"f", b"g"], [], socket.MSG_OOB)
    settle()
    show(attempt(peer.recv, 1, socket.MSG_OOB), peer.recv(10))


@case
def urgent_bytes_one_after_the_other():
    client, peer = connected()
    for byte in (b"1", b"2"):
        client.sendall(b"between")
        client.send(byte, socket.MSG_OOB)
        settle()
        show(urgent_state(peer), attempt(peer.recv, 1, socket.MSG_OOB), peer.recv(100), urgent_state(peer))


@case
def urgent_byte_signals():
    client, peer = connected()
    seen = []
    signal.signal(signal.SIGURG, lambda *_: seen.append("URG"))
    fcntl.fcntl(peer, fcntl.F_SETOWN, os.getpid())
    client.send(b"!", socket.MSG_OOB)
    settle()
    show(seen, attempt(peer.recv, 1, socket.MSG_OOB))
    signal.signal(signal.SIGURG, signal.SIG_DFL)


@case
def urgent_byte_and_select():
    client, peer = connected()
    client.send(b"!", socket.MSG_OOB)
    settle()
    show(bool(select.select([], [], [peer], 2)[2]), attempt(peer.recv, 1, socket.MSG_OOB))
    show(bool(select.select([], [], [peer], 0)[2]))


@case
def urgent_byte_of_closed_connections():
    client, peer = connected()
    client.send(b"!", socket.MSG_OOB)
    client.close()
    settle()
    show(attempt(peer.recv, 1, socket.MSG_OOB), peer.recv(10))


@case
def no_errors_are_queued():
    client, peer = connected()
    client.setblocking(False)
    peer.sendall(b"data")
    settle()
    show(attempt(client.recvmsg, 10, 100, socket.MSG_ERRQUEUE), attempt(client.recv, 10, socket.MSG_ERRQUEUE))
    show(attempt(client.setsockopt, 0, 11, 1), client.getsockopt(0, 11), attempt(client.recvmsg, 10, 100, socket.MSG_ERRQUEUE))
    show(client.recv(10))


@case
def errors_of_a_router():
    """Networks that the test has made beyond a router: one that it refuses, one it knows nothing of, one it drops everything for."""
    for host in ("10.98.1.1", "10.98.3.1"):
        for queued in (0, 1):
            sock = socket.socket()
            sock.setsockopt(socket.IPPROTO_IP, 11, queued)
            show(host, queued, attempt(sock.connect, (host, 9)))
    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 700)
    show(attempt(sock.connect, ("10.98.4.1", 9)), error_of(sock), attempt(sock.getpeername))


for function in CASES:
    # To a job whose sockets are at home an urgent byte is like any other.
    if "NETPLANE_HOME" in os.environ and "urgent" in function.__name__:
        continue
    if ONLY in (None, function.__name__):
        print(function.__name__, flush=True)
        try:
            function()
        except Exception as failure:  # the line shows it, and the comparison fails
            show("raised", repr(failure))
