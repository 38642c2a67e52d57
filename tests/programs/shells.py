"""Gives each connection a shell on a terminal of its own, as telnetd or sshd do."""
import os
import pty
import select
import socket
import sys


def serve(connection):
    pid, master = pty.fork()
    if pid == 0:
        os.environ["PS1"] = "$ "
        os.execvp("bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"])
    ends = {connection.fileno(): master, master: connection.fileno()}
    while True:
        for end in select.select(list(ends), [], [])[0]:
            try:
                data = os.read(end, 65536)
            except OSError:
                data = b""
            if not data:
                return
            while data:
                data = data[os.write(ends[end], data):]


listener = socket.create_server(("0.0.0.0", int(sys.argv[1])))
while True:
    connection, _ = listener.accept()
    if os.fork() == 0:
        listener.close()
        serve(connection)
        os._exit(0)
    connection.close()
