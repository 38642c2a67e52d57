"""Readers of several kinds on streams that come faster than they read. `readers.py serve PORT KIND...`: one connection of each kind;
prints what each of them made of its stream. `readers.py feed HOST PORT BYTES KIND...`: connects once for each and sends.

The stream is a block of random bytes over and over, of a length that no page or packet divides, so that a byte from another
place of the stream, or of another stream, doesn't pass for the right one.
"""
import fcntl
import os
import random
import socket
import sys
import threading
import time

PERIOD = (1 << 20) + 8191


def block(kind):
    return random.Random(kind).randbytes(PERIOD)


class Checker:
    def __init__(self, kind):
        self.twice, self.at = block(kind) * 2, 0

    def check(self, data):
        for start in range(0, len(data), PERIOD):
            part = data[start:start + PERIOD]
            place = self.at % PERIOD
            assert part == self.twice[place:place + len(part)], f"wrong bytes after {self.at}"
            self.at += len(part)


def pieces(sock, kind):
    """What a reader of this kind gets, piece by piece."""
    random_source = random.Random(7)
    inlet, outlet = os.pipe()
    fcntl.fcntl(outlet, fcntl.F_SETPIPE_SZ, 1 << 20)
    if kind == "late":
        # The peer has long ended, and what it sent is still to be read.
        time.sleep(1)
    while True:
        if kind == "odd":
            data = sock.recv(random_source.randrange(1, 100_000))
        elif kind == "peek":
            seen = sock.recv(50_000, socket.MSG_PEEK)
            data = sock.recv(len(seen)) if seen else b""
            assert data == seen, "peeked at something else"
        elif kind in ("splice", "sendfile"):
            count = 0
            while count < 500_000:
                if kind == "splice":
                    more = os.splice(sock.fileno(), outlet, 50_000)
                else:
                    more = os.sendfile(outlet, sock.fileno(), None, 50_000)
                if not more:
                    break
                count += more
            # What is in the pipe stays there while the other streams go on.
            time.sleep(random_source.choice([0, 0.01]))
            data = b""
            while len(data) < count:
                data += os.read(inlet, count - len(data))
        else:
            if kind == "slow":
                time.sleep(random_source.choice([0, 0.001]))
            data = sock.recv(1 << 17)
        if not data:
            os.close(inlet)
            os.close(outlet)
            return
        yield data


def serve(port, kinds):
    listener = socket.create_server(("0.0.0.0", port))
    print("serving", flush=True)
    said = {}

    def read(sock):
        kind = sock.recv(10).decode().strip()
        checker = Checker(kind)
        try:
            for piece in pieces(sock, kind):
                checker.check(piece)
            said[kind] = f"{checker.at} bytes"
        except (AssertionError, OSError) as failure:
            said[kind] = repr(failure)
        sock.close()

    threads = [threading.Thread(target=read, args=(listener.accept()[0],)) for _ in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for kind in kinds:
        print(kind, said[kind], flush=True)


def feed(host, port, size, kinds):
    def send(kind):
        sock = socket.create_connection((host, port))
        sock.sendall(kind.ljust(10).encode())
        time.sleep(0.1)
        data = block(kind)
        for _ in range(size // PERIOD):
            sock.sendall(data)
        sock.sendall(data[:size % PERIOD])
        sock.close()

    threads = [threading.Thread(target=send, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if sys.argv[1] == "serve":
    serve(int(sys.argv[2]), sys.argv[3:])
else:
    feed(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
