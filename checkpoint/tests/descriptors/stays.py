# Holds one of everything that can't move. The other ends are in a process outside the job.
import ctypes, os, pty, socket, sys, time

os.closerange(3, 1024)
libc = ctypes.CDLL(None)


def at(number, fd):
    os.dup2(fd, number)
    os.close(fd)


inner, outer = socket.socketpair()
reader, writer = os.pipe()
in_flight, other = socket.socketpair()
parent = os.getpid()
if os.fork() == 0:
    inner.close(), os.close(writer), in_flight.close(), other.close()
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(0)
outer.close(), os.close(reader)
at(20, inner.detach())
at(21, writer)
params = ctypes.create_string_buffer(120)
ring = libc.syscall(425, 1, params)
if ring < 0:
    sys.exit("io_uring is off on this machine")
at(22, ring)
at(23, os.open("/proc/self/ns/net", os.O_RDONLY))
_, slave = pty.openpty()
at(24, slave)
at(25, os.pidfd_open(1))
socket.send_fds(in_flight, [b"x"], [0])
at(26, other.detach()), at(27, in_flight.detach())
print("ready", flush=True)
time.sleep(600)
