# A parent and a child that share open files: one under two numbers, one under the same; and a socket.
import os, socket, sys, time

os.closerange(3, 1024)
directory, = sys.argv[1:]
os.dup2(os.open(os.path.join(directory, "shared"), os.O_RDWR | os.O_CREAT), 30)
a, b = socket.socketpair()
os.dup2(a.fileno(), 40), os.dup2(b.fileno(), 41)
a.close(), b.close()
parent = os.getpid()
child = os.fork()
if child == 0:
    os.dup2(30, 31)
    os.close(30)
    print("ready", os.getpid(), flush=True)
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(0)
os.waitpid(child, 0)
