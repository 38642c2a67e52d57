# UDP sockets with full queues, at fixed numbers, in a network namespace of its own that looks like a job's; on SIGUSR1 checks what it
# has and says how that went.
#
# usage: datagrams.py open|stub DIRECTORY
import ctypes, os, signal, socket, struct, subprocess, sys, time

os.closerange(3, 1024)
role, directory = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
SO_RCVBUF, SO_REUSEPORT, SO_BINDTODEVICE, IP_PKTINFO, IP_RECVTTL, IP_RECVTOS = 8, 15, 25, 8, 12, 13
IPV6_RECVPKTINFO, IPV6_PKTINFO, IPV6_RECVHOPLIMIT, IPV6_HOPLIMIT, IPV6_RECVTCLASS, IPV6_TCLASS = 49, 50, 51, 52, 66, 67
UDP = socket.AF_INET, socket.SOCK_DGRAM
UDP6 = socket.AF_INET6, socket.SOCK_DGRAM


def furnish():
    # The kernel takes an IPv6 address into use when it gets round to it; here, where nothing was received yet, after a second or more.
    late = "nodad" if role == "open" else ""
    for line in (
        "link set lo up",
        "link add eth0 type veth peer name other",
        "link set other up",
        "link set eth0 up",
        "addr add 10.77.0.5/16 dev eth0",
        "addr add fd77::5/64 dev eth0 " + late,
        "route add default dev eth0",
    ):
        subprocess.run(["ip"] + line.split(), check=True)
    while role == "open" and b"fd77::5" not in subprocess.run(["ip", "-6", "route", "show", "table", "local"], stdout=-1, check=True).stdout:
        time.sleep(0.01)


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF or 0xFFFF


# As if it came through eth0.
def arrive(source, port, destination, to_port, data):
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    raw.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, b"eth0\0")
    ends = socket.inet_pton(family, source) + socket.inet_pton(family, destination)
    udp = struct.pack("!HHHH", port, to_port, 8 + len(data), 0)
    pseudo = ends + struct.pack("!II", 17, len(udp + data))
    udp = udp[:6] + struct.pack("!H", checksum(pseudo + udp + data)) + data
    if family == socket.AF_INET:
        header = struct.pack("!BBHHHBBH", 0x45, 8, 0, 0, 0, 33, 17, 0)
    else:
        header = struct.pack("!IHBB", 6 << 28 | 8 << 20, len(udp), 17, 33)
    raw.sendto(header + ends + udp, (destination, 0))


def bound(family, address, *options):
    sock = socket.socket(*family)
    for option in options:
        sock.setsockopt(*option)
    sock.bind(address)
    return sock


def at(number, sock):
    os.dup2(sock.fileno(), number, inheritable=False)
    sock.close()


def big(n):
    return bytes(i % 251 for i in range(n))


def open_everything():
    both = bound(UDP6, ("::", 5000), (41, IPV6_RECVPKTINFO, 1), (41, IPV6_RECVHOPLIMIT, 1), (0, IP_RECVTTL, 1))
    arrive("8.8.8.8", 99, "10.77.0.5", 5000, b"four")
    arrive("2001:db8::1", 99, "fd77::5", 5000, b"six")
    socket.socket(*UDP6).sendto(b"loop", ("::1", 5000))
    arrive("8.8.8.8", 0, "10.77.0.5", 5000, big(65507))
    socket.socket(*UDP6).sendto(big(65527), ("::1", 5000))
    at(20, both)
    # One whose peer is not the only one it heard of.
    peer = bound(UDP, ("127.0.0.1", 5001))
    connected = bound(UDP, ("127.0.0.1", 5002), (0, IP_RECVTOS, 1))
    arrive("9.9.9.9", 53, "10.77.0.5", 5002, b"for nobody")
    socket.socket(*UDP).sendto(b"before", ("127.0.0.1", 5002))
    connected.connect(("127.0.0.1", 5001))
    socket.socket(*UDP).sendto(b"refused", ("127.0.0.1", 5002))
    peer.sendto(b"after", ("127.0.0.1", 5002))
    at(21, connected), at(22, peer)
    # Two on one port: what waits at one must not go to the other.
    pair = [bound(UDP, ("0.0.0.0", 7000), (1, SO_REUSEPORT, 1)) for _ in range(2)]
    for turn in range(10):
        arrive("8.8.8.8", 1000 + turn, "10.77.0.5", 7000, b"%d" % turn)
    at(23, pair[0]), at(24, pair[1])
    # A buffer that is smaller than what was let in while it was large.
    small = bound(UDP, ("0.0.0.0", 8000), (1, SO_BINDTODEVICE, b"eth0\0"))
    for turn in range(8):
        arrive("8.8.8.8", 99, "10.77.0.5", 8000, big(4000))
    small.setsockopt(1, SO_RCVBUF, 4096)
    at(25, small)
    unbound = socket.socket(*UDP)
    unbound.setsockopt(0, 1, 16)
    unbound.setsockopt(0, 10, 2)
    at(26, unbound)


def take(sock, length=70000):
    data, control, flags, sender = sock.recvmsg(length, 512, socket.MSG_DONTWAIT)
    told = {(level, kind): value for level, kind, value in control}
    return data, sender[:2], told


def drained(sock):
    try:
        sock.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True


def check():
    eth0, lo = socket.if_nametoindex("eth0"), socket.if_nametoindex("lo")
    both = socket.socket(fileno=20)
    index = lambda told: struct.unpack("I", told[41, IPV6_PKTINFO][16:])[0]
    data, sender, told = take(both)
    assert (data, sender, index(told)) == (b"four", ("::ffff:8.8.8.8", 99), eth0), (data, sender, told)
    assert told[41, IPV6_PKTINFO][:16] == socket.inet_pton(socket.AF_INET6, "::ffff:10.77.0.5")
    assert struct.unpack("i", told[0, 2]) == (33,), told
    data, sender, told = take(both)
    assert (data, sender, index(told)) == (b"six", ("2001:db8::1", 99), eth0), (data, sender, told)
    assert struct.unpack("i", told[41, IPV6_HOPLIMIT]) == (33,) and (41, IPV6_TCLASS) not in told
    data, sender, told = take(both)
    assert (data, sender[0], index(told)) == (b"loop", "::1", lo), (data, sender, told)
    assert take(both)[:2] == (big(65507), ("::ffff:8.8.8.8", 0))
    assert take(both)[0] == big(65527) and drained(both)
    assert both.getsockname()[:2] == ("::", 5000)
    connected, peer = socket.socket(fileno=21), socket.socket(fileno=22)
    assert take(connected)[0] == b"before"
    data, sender, told = take(connected)
    assert (data, sender) == (b"after", ("127.0.0.1", 5001)) and (0, 1) in told and drained(connected)
    assert connected.getpeername() == ("127.0.0.1", 5001)
    connected.send(b"there"), peer.sendto(b"back", ("127.0.0.1", 5002))
    assert peer.recv(10) == b"there" and connected.recv(10) == b"back"
    seen = []
    for sock in (socket.socket(fileno=23), socket.socket(fileno=24)):
        assert sock.getsockname() == ("0.0.0.0", 7000)
        seen.append([])
        while not seen[-1] or True:
            try:
                seen[-1].append(take(sock)[:2])
            except BlockingIOError:
                break
    with open(os.path.join(directory, "shares-" + role), "w") as f:
        f.write(repr(seen))
    assert sorted(turn for share in seen for turn, _ in share) == [b"%d" % turn for turn in range(10)], seen
    small = socket.socket(fileno=25)
    assert small.getsockopt(1, SO_RCVBUF) == 8192, small.getsockopt(1, SO_RCVBUF)
    assert small.getsockopt(1, SO_BINDTODEVICE, 16).rstrip(b"\0") == b"eth0"
    for _ in range(8):
        assert take(small)[:2] == (big(4000), ("8.8.8.8", 99))
    assert drained(small)
    unbound = socket.socket(fileno=26)
    assert unbound.getsockopt(0, 1) == 16 and unbound.getsockopt(0, 10) == 2
    assert unbound.getsockname() == ("0.0.0.0", 0)


furnish()
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
