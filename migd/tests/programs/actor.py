"""Sockets driven from outside, one command a line on standard input, one answer a line on standard output.

    open N 4|6                  a TCP socket called N
    bind N ADDRESS PORT         and SO_REUSEADDR
    listen N BACKLOG
    accept N M                  accept on N, waited for; the new socket is M
    connect N ADDRESS PORT      begin to connect, without waiting
    connected N                 wait for the end of that
    send N TEXT                 one write
    pour N COUNT                write COUNT bytes, as many as are taken at once
    recv N                      what can be read, waited for: the text, or "end", or the error
    set N LEVEL NAME VALUE      an option, by numbers; "linger" for NAME sets SO_LINGER to VALUE seconds
    shutdown N                  the direction towards the peer
    close N
"""
import errno
import select
import socket
import struct
import sys

PATIENCE = int(sys.argv[1])
sockets = {}


def wait(sock, event):
    poll = select.poll()
    poll.register(sock, event)
    return poll.poll(PATIENCE * 1000)


def run(verb, name, *arguments):
    if verb == "open":
        family = socket.AF_INET if arguments[0] == "4" else socket.AF_INET6
        sockets[name] = socket.socket(family, socket.SOCK_STREAM)
        sockets[name].setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        return "ok"
    sock = sockets[name]
    if verb == "bind":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((arguments[0], int(arguments[1])))
    elif verb == "listen":
        sock.listen(int(arguments[0]))
    elif verb == "accept":
        sock.settimeout(PATIENCE)
        sockets[arguments[0]], _ = sock.accept()
    elif verb == "connect":
        sock.setblocking(False)
        try:
            sock.connect((arguments[0], int(arguments[1])))
        except BlockingIOError:
            pass
    elif verb == "connected":
        if not wait(sock, select.POLLOUT):
            return "nothing"
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        sock.setblocking(True)
        return errno.errorcode[error] if error else "ok"
    elif verb == "send":
        sock.send(arguments[0].encode())
    elif verb == "pour":
        sock.setblocking(False)
        sock.send(b"p" * int(arguments[0]))
        sock.setblocking(True)
    elif verb == "recv":
        sock.settimeout(PATIENCE)
        data = sock.recv(65536)
        return data.decode() if data else "end"
    elif verb == "set":
        level, option, value = arguments
        if option == "linger":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, int(value)))
        else:
            sock.setsockopt(int(level), int(option), int(value))
    elif verb == "shutdown":
        sock.shutdown(socket.SHUT_WR)
    elif verb == "close":
        sockets.pop(name).close()
    else:
        return "no such command"
    return "ok"


for line in sys.stdin:
    try:
        answer = run(*line.split())
    except TimeoutError:
        answer = "nothing"
    except KeyError as error:
        answer = f"no socket {error}"
    except OSError as error:
        answer = errno.errorcode.get(error.errno, str(error))
    print(answer, flush=True)
