//! The server on smoltcp's sockets: the same protocol as the peer of the other stacks ([`super::super::peer`]), and an
//! HTTP server of one fixed answer in the place of nginx.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as Time;
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::device::Device;
use crate::bench::peer::{CHUNK, ECHO, SEND, TELL};
use crate::bench::programs::Program;

/// Sockets for streams and exchanges, and the size of their buffers each way.
const STREAMS: usize = 16;
const STREAM_BUFFER: usize = 4 << 20;
/// Sockets for HTTP (smoltcp has no accept queue: each connection under way needs a listening socket of its own; wrk
/// keeps 16 open), and the size of their buffers.
const REQUESTS: usize = 32;
const REQUEST_BUFFER: usize = 4096;
/// Packets taken before the sockets are served, and rounds of sending before packets are taken again.
const BATCH: usize = 64;
/// Longest sleep.
const SLEEP: Duration = Duration::from_secs(1);

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nServer: smoltcp\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\
    Connection: close\r\n\r\nok\n";

/// What the client at a socket asked for.
#[derive(Debug)]
enum Wish {
    /// Nothing yet.
    None,
    Send,
    Receive {
        received: u64,
        told: Instant,
    },
    Echo,
}

/// A socket and what is done on it.
#[derive(Debug)]
enum Service {
    Peer(Wish),
    Http,
}

/// Serves until the device goes away.
pub(super) fn serve(mut device: Device, address: Ipv4Addr) -> io::Result<()> {
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = u64::from(std::process::id());
    let mut interface = Interface::new(config, &mut device, Time::now());
    interface.update_ip_addrs(|addresses| {
        // It has room for two.
        let _ = addresses.push(IpCidr::new(address.into(), 32));
    });
    let mut sockets = SocketSet::new(Vec::new());
    let mut services: Vec<(SocketHandle, Service)> = Vec::new();
    for _ in 0..STREAMS {
        services.push((sockets.add(socket(STREAM_BUFFER)), Service::Peer(Wish::None)));
    }
    for _ in 0..REQUESTS {
        services.push((sockets.add(socket(REQUEST_BUFFER)), Service::Http));
    }
    let chunk = vec![0x5a; CHUNK];
    loop {
        let mut idle = true;
        for _ in 0..BATCH {
            match interface.poll_ingress_single(Time::now(), &mut device, &mut sockets) {
                PollIngressSingleResult::None => break,
                _ => idle = false,
            }
        }
        for (handle, service) in &mut services {
            service.advance(sockets.get_mut(*handle), &chunk);
        }
        for _ in 0..BATCH {
            match interface.poll_egress(Time::now(), &mut device, &mut sockets) {
                PollResult::None => break,
                PollResult::SocketStateChanged => idle = false,
            }
        }
        if idle {
            let delay = interface.poll_delay(Time::now(), &sockets).map_or(SLEEP, Duration::from);
            // In whole milliseconds; less than one is spun away, as the resolution of poll(2) can't express it.
            let timeout = PollTimeout::try_from(delay.min(SLEEP)).unwrap_or(PollTimeout::ZERO);
            let mut watched = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
            poll(&mut watched, timeout)?;
        }
    }
}

fn socket(buffer: usize) -> Socket<'static> {
    let mut socket = Socket::new(SocketBuffer::new(vec![0; buffer]), SocketBuffer::new(vec![0; buffer]));
    socket.set_nagle_enabled(false);
    socket
}

impl Service {
    fn advance(&mut self, socket: &mut Socket<'_>, chunk: &[u8]) {
        match socket.state() {
            State::Closed => self.listen_again(socket),
            // The last acknowledgement went out in the batch before. smoltcp would keep the socket for ten seconds, and there is
            // none to spare; the clients' sequence numbers and timestamps keep old segments apart.
            State::TimeWait => {
                socket.abort();
                self.listen_again(socket);
            }
            State::CloseWait if !socket.can_recv() => socket.close(),
            _ => self.work(socket, chunk),
        }
    }

    fn listen_again(&mut self, socket: &mut Socket<'_>) {
        let program = match self {
            Service::Peer(wish) => {
                *wish = Wish::None;
                Program::Peer
            }
            Service::Http => Program::Nginx,
        };
        // Fails only for a socket that is open or a port of zero.
        let _ = socket.listen(program.port());
    }

    /// What fails here fails because the connection is ending, which the state shows the next time.
    fn work(&mut self, socket: &mut Socket<'_>, chunk: &[u8]) {
        match self {
            Service::Http => {
                // A request of wrk is one segment, so its beginning is its whole.
                if socket.can_recv() && socket.recv(|bytes| (bytes.len(), ())).is_ok() {
                    let _ = socket.send_slice(ANSWER);
                    socket.close();
                }
            }
            Service::Peer(Wish::None) => {
                if !socket.can_recv() {
                    return;
                }
                let mut wish = [0];
                if socket.recv_slice(&mut wish) == Ok(1) {
                    let asked = match wish[0] {
                        SEND => Wish::Send,
                        ECHO => Wish::Echo,
                        _ => Wish::Receive { received: 0, told: Instant::now() },
                    };
                    *self = Service::Peer(asked);
                    self.work(socket, chunk);
                }
            }
            Service::Peer(Wish::Send) => while socket.can_send() && socket.send_slice(chunk).is_ok() {},
            Service::Peer(Wish::Receive { received, told }) => {
                while socket.can_recv() {
                    let Ok(count) = socket.recv(|bytes| (bytes.len(), bytes.len())) else { break };
                    *received += count as u64;
                }
                if told.elapsed() >= TELL {
                    *told = Instant::now();
                    let _ = socket.send_slice(&received.to_be_bytes());
                }
            }
            Service::Peer(Wish::Echo) => {
                while socket.can_recv() && socket.can_send() {
                    let room = socket.send_capacity() - socket.send_queue();
                    let taken = socket.recv(|bytes| {
                        let count = bytes.len().min(room);
                        (count, bytes[..count].to_vec())
                    });
                    let Ok(taken) = taken else { break };
                    let _ = socket.send_slice(&taken);
                }
            }
        }
    }
}
