//! Calls that transfer all or wait, stopped half-way by a hop.

use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{Job, Outcome, Precopy, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("partial::calls_that_transfer_all_do_so_over_hops", || whole(false)),
        trial("partial::calls_that_transfer_all_do_so_after_a_hop_in_vain", || whole(true)),
    ]
}

/// Threads that write or receive more than fits, each with one call. For each line the other ends take or give a third.
const TRANSFERS: &str = r#"
import ctypes, hashlib, os, signal, socket, sys, threading, time
signal.alarm(60)  # A call that ends too early has its other end wait for good.
libc = ctypes.CDLL(None, use_errno=True)
SIZE = 3 << 20
data = hashlib.shake_128(b"data").digest(SIZE)
WAITALL = 0x100
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
class Message(ctypes.Structure):
    _fields_ = [("name", ctypes.c_void_p), ("name_length", ctypes.c_int), ("parts", ctypes.c_void_p),
        ("count", ctypes.c_size_t), ("control", ctypes.c_void_p), ("control_length", ctypes.c_size_t), ("flags", ctypes.c_int)]
def parts_of(buffer):
    cuts = [0, 1000, 1000, 700000, 700001, 2000000, SIZE]
    address = ctypes.addressof(buffer)
    return (Part * 6)(*[Part(address + a, b - a) for a, b in zip(cuts, cuts[1:])])
def write(fd, buffer): return libc.write(fd, buffer, SIZE)
def sendto(fd, buffer): return libc.send(fd, buffer, SIZE, 0)
def writev(fd, buffer): return libc.writev(fd, parts_of(buffer), 6)
def sendmsg(fd, buffer):
    parts = parts_of(buffer)
    return libc.sendmsg(fd, ctypes.byref(Message(None, 0, ctypes.addressof(parts), 6, None, 0, 0)), 0)
def recv(fd, buffer): return libc.recv(fd, buffer, SIZE, WAITALL)
def recvmsg(fd, buffer):
    parts = parts_of(buffer)
    return libc.recvmsg(fd, ctypes.byref(Message(None, 0, ctypes.addressof(parts), 6, None, 0, 0)), WAITALL)
for call in (libc.write, libc.send, libc.writev, libc.sendmsg, libc.recv, libc.recvmsg):
    call.restype = ctypes.c_ssize_t
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.send.argtypes = libc.recv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
class Transfer:
    def __init__(self, call, ends):
        (self.own, self.other), self.call, self.done = ends, call, 0
        self.receives = call in (recv, recvmsg)
        self.buffer = ctypes.create_string_buffer(SIZE) if self.receives else ctypes.create_string_buffer(data, SIZE)
        self.result, self.taken = None, b""
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        self.step(1000)  # Now it is in the midst of it.
        if not self.receives:
            return
        while libc.ioctl(self.own, 0x541B, ctypes.byref(left := ctypes.c_int())) == 0 and left.value:
            time.sleep(0.001)
    def run(self):
        self.result = self.call(self.own, self.buffer)
    def step(self, size):
        while size:
            if self.receives:
                some = os.write(self.other, data[self.done:self.done + size])
            else:
                some = len(chunk := os.read(self.other, size))
                self.taken += chunk
            self.done += some
            size -= some
    def end(self):
        self.step(SIZE - self.done)
        self.thread.join()
        return self.result == SIZE and (self.buffer.raw if self.receives else self.taken) == data
def stream():
    one, two = socket.socketpair()
    return one.detach(), two.detach()
def pipe():
    reader, writer = os.pipe()
    return writer, reader
transfers = [Transfer(call, stream()) for call in (write, sendto, writev, sendmsg, recv, recvmsg)]
transfers += [Transfer(call, pipe()) for call in (write, writev)]
print("ready", flush=True)
for line in sys.stdin:
    for transfer in transfers:
        transfer.step(SIZE // 10)
    print([transfer.result for transfer in transfers if transfer.result is not None], flush=True)
    if line == "end\n":
        break
print([transfer.end() for transfer in transfers], flush=True)
"#;

fn whole(in_vain: bool) -> Outcome {
    let mut job = Job::start(&["python3", "-S", "-c", TRANSFERS])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    for (word, precopy) in [("on", Precopy::Rounds(1)), ("on", Precopy::None), ("end", Precopy::Rounds(2))] {
        if in_vain {
            job.hop_in_vain(precopy)?;
        } else {
            job.hop(precopy)?;
        }
        job.say(word)?;
        let line = job.line()?;
        ensure!(line == "[]", "calls have ended too early with {line}");
    }
    let line = job.line()?;
    let expected = format!("[{}]", ["True"; 8].join(", "));
    ensure!(line == expected, "what was transferred is not all, or not right: {line}");
    Ok(())
}
