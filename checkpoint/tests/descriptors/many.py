# Many sockets, all in one epoll.
import os, resource, select, socket, sys, time

os.closerange(3, 1024)
count = int(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
epoll = select.epoll()
pairs = [socket.socketpair() for _ in range(count // 2)]
for pair in pairs:
    for end in pair:
        end.setblocking(False)
        epoll.register(end, select.EPOLLIN | select.EPOLLET)
print("ready", flush=True)
time.sleep(600)
