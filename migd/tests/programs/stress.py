"""Echo under strain. `stress.py serve PORT`: an echo server; `stress.py drive HOST PORT SEED ROUNDS`: clients that compare every byte.

Each connection does one of: tiny writes, one big write, half-close and read to the end, a reset in the middle, a close with bytes
unread, staying idle. The driver's exit status says whether every byte that should come back did.
"""
import asyncio
import os
import random
import socket
import struct
import sys
import hashlib


async def echo(reader, writer):
    try:
        while block := await reader.read(1 << 16):
            writer.write(block)
            await writer.drain()
        writer.write_eof()
    except (ConnectionError, OSError):
        pass
    finally:
        writer.close()


async def serve(port):
    server = await asyncio.start_server(echo, "0.0.0.0", port, backlog=1024)
    print("serving", flush=True)
    async with server:
        await server.serve_forever()


async def one(host, port, seed):
    random_source = random.Random(seed)
    kind = random_source.choice(["tiny", "big", "half", "reset", "unread", "idle"])
    reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 20)
    sock = writer.get_extra_info("socket")
    try:
        if kind == "idle":
            await asyncio.sleep(random_source.random())
            writer.write(b"ping")
            assert await reader.readexactly(4) == b"ping", "ping"
            return
        size = {"tiny": 2000, "big": 3 << 20, "half": 1 << 20, "reset": 1 << 20, "unread": 1 << 18}[kind]
        data = random_source.randbytes(size)
        chunk = {"tiny": 1 + random_source.randrange(50)}.get(kind, 1 + random_source.randrange(1 << 17))

        async def send():
            for at in range(0, size, chunk):
                writer.write(data[at:at + chunk])
                await writer.drain()
            if kind == "half":
                writer.write_eof()

        sending = asyncio.ensure_future(send())
        if kind == "half":
            back = await reader.read(-1)
            assert len(back) == size and back == data, f"half: {len(back)} of {size}"
            await sending
        elif kind in ("reset", "unread"):
            back = await reader.readexactly(size // 4)
            assert back == data[:size // 4], kind
            sending.cancel()
            if kind == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            back = await reader.readexactly(size)
            assert back == data, kind
            await sending
    finally:
        writer.close()


async def drive(host, port, seed, rounds, parallel=60):
    failures, limit = [], asyncio.Semaphore(parallel)

    async def limited(number):
        async with limit:
            try:
                await asyncio.wait_for(one(host, port, seed * 1000003 + number), 60)
            except Exception as failure:
                failures.append((number, repr(failure)))

    await asyncio.gather(*(limited(number) for number in range(rounds)))
    for failure in failures[:10]:
        print("failed:", failure)
    print(f"{rounds - len(failures)} of {rounds} connections as they should be")
    return 1 if failures else 0


if sys.argv[1] == "serve":
    asyncio.run(serve(int(sys.argv[2])))
else:
    sys.exit(asyncio.run(drive(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))))
