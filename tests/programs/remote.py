"""A server whose sockets are driven from outside, one command a line over a control connection; answers one line each.

    listen BACKLOG          listen on the test port; does not accept
    accept                  accept one connection and answer its number
    recv N COUNT            read exactly COUNT bytes (or up to the end) and answer how many and their SHA-256
    send N COUNT SEED       write COUNT bytes of the pattern of SEED
    fill N SEED             write the pattern of SEED until the socket takes no more; answer how many bytes it took
    shutdown N              close the direction towards the peer
    close N                 close the socket
    name N                  the peer's address and port
"""
import hashlib
import socket
import sys

MASK = (1 << 64) - 1


def pattern(seed):
    state = (seed * 0x9E3779B97F4A7C15 & MASK) | 1
    while True:
        state ^= state >> 12
        state ^= state << 25 & MASK
        state ^= state >> 27
        yield (state * 0x2545F4914F6CDD1D & MASK).to_bytes(8, "little")


def take(words, count):
    pieces = bytearray()
    while len(pieces) < count:
        pieces += next(words)
    return bytes(pieces[:count])


class Server:
    def __init__(self, port):
        self.port = port
        self.listener = None
        self.connections = {}

    def listen(self, backlog):
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("0.0.0.0", self.port))
        self.listener.listen(int(backlog))
        return "listening"

    def accept(self):
        connection, _ = self.listener.accept()
        number = len(self.connections)
        self.connections[number] = connection
        return str(number)

    def recv(self, number, count):
        digest, left = hashlib.sha256(), int(count)
        connection = self.connections[int(number)]
        while left:
            data = connection.recv(min(left, 65536))
            if not data:
                break
            digest.update(data)
            left -= len(data)
        return f"{int(count) - left} {digest.hexdigest()}"

    def send(self, number, count, seed):
        self.connections[int(number)].sendall(take(pattern(int(seed)), int(count)))
        return "sent"

    def fill(self, number, seed):
        connection = self.connections[int(number)]
        words, pending, taken = pattern(int(seed)), b"", 0
        # Full is when nothing more fits for a second: the stack moves bytes on from one buffer to the next.
        connection.settimeout(1)
        try:
            while True:
                pending = pending or take(words, 4096)
                count = connection.send(pending)
                taken, pending = taken + count, pending[count:]
        except TimeoutError:
            pass
        connection.settimeout(None)
        return str(taken)

    def shutdown(self, number):
        self.connections[int(number)].shutdown(socket.SHUT_WR)
        return "done"

    def close(self, number):
        self.connections[int(number)].close()
        return "done"

    def name(self, number):
        return "%s:%d" % self.connections[int(number)].getpeername()


def main():
    control = socket.create_server(("0.0.0.0", int(sys.argv[1])))
    server = Server(int(sys.argv[2]))
    while True:
        # One at a time; who only looks whether somebody serves hangs up at once.
        connection, _ = control.accept()
        with connection, connection.makefile("rwb") as stream:
            for line in stream:
                verb, *arguments = line.decode().split()
                try:
                    answer = getattr(server, verb)(*arguments)
                except OSError as error:
                    answer = f"error {error.errno} {error.strerror}"
                stream.write(answer.encode() + b"\n")
                stream.flush()


main()
