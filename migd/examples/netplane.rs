//! Runs one program under the net plane, without daemon, shim or move: for tests and measurements of the plane alone.
//!
//! `netplane ADDRESS TUN PROGRAM ARGS...`, in a network namespace made for it.
//!
//! With `NETPLANE_SWAP` set, the program's standard input is a Unix socket on which it can ask for a freeze: for every byte `f`
//! the plane is frozen, its image encoded, the plane retired, a new one thawed from the image, and the program gets the new
//! descriptors (`{"number": index}` as JSON, with the descriptors beside it), which it puts in place of its old ones. It answers `k`, and the
//! new plane runs. So everything about sockets is tested that a move does, without the move.
//!
//! With `NETPLANE_HOME` set as well, the freezes go in turn through the ways of a home-routed job: the sockets stay with the first
//! plane, which becomes their home; the process goes on to another plane; the process comes back to the home; the
//! sockets stay again; they follow the process.
//!
//! With `NETPLANE_PREVIEW` set the sockets are told to nobody again and again while the program runs, as a move does before its freeze.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use checkpoint::{Event, ExitStatus, Launch, Sandbox, SandboxSpec};
use migd::api::NodeAddress;
use migd::net::{Board, Guest, NetConfig, NetImage, NetPlane, SocketKey, Stock, Visitor, filter, furnish_namespace};
use sys::epoll::{Epoll, Events, Interest};
use sys::fds::sockets::{self, DESCRIPTORS_IN_MESSAGE};

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "init") {
        return checkpoint::init::main();
    }
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(if std::env::var_os("NETPLANE_DEBUG").is_some() {
            tracing::Level::DEBUG
        } else {
            tracing::Level::WARN
        })
        .init();
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("netplane: {error}");
            ExitCode::FAILURE
        }
    }
}

type Failure = Box<dyn std::error::Error>;

fn run() -> Result<u8, Failure> {
    let mut arguments = std::env::args_os().skip(1);
    let usage = "usage: netplane ADDRESS[,ADDRESS] TUN PROGRAM ARGS...";
    let addresses = arguments.next().and_then(|text| text.into_string().ok()).ok_or(usage)?;
    let addresses: Vec<IpAddr> = addresses.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let device = arguments.next().and_then(|text| text.into_string().ok()).ok_or(usage)?;
    let argv: Vec<OsString> = arguments.collect();

    let tun = sys::tun::Tun::create(&device)?;
    ip(&["link", "set", &device, "up", "mtu", "1500", "txqueuelen", "5000"])?;
    for address in &addresses {
        ip(&["route", "add", &address.to_string(), "dev", &device])?;
    }
    let mut sandbox =
        Sandbox::create(SandboxSpec { hostname: "netplane".into(), filter: Some(filter()), ..Default::default() })?;
    let listener = sandbox.take_listener().ok_or("the sandbox has no listener")?;
    let with_prefix = |&address: &IpAddr| (address, if address.is_ipv4() { 16 } else { 64 });
    let prefixed: Vec<(IpAddr, u8)> = addresses.iter().map(with_prefix).collect();
    let eth0 = furnish_namespace(sandbox.net_namespace(), &prefixed, 1500)?;
    let spare = std::env::var_os("NETPLANE_HOME").map(|_| sys::tun::Tun::create(&format!("{device}b"))).transpose()?;
    let mut net = Net {
        home: None,
        spare: spare.map(Into::into),
        step: 0,
        addresses,
        namespace: sandbox.net_namespace().try_clone_to_owned()?,
        init_pid: sandbox.init_pid().as_raw(),
        listener: listener.try_clone()?,
        eth0,
    };
    let mut plane = NetPlane::start(net.config()?, tun.into(), listener)?;
    let mut control = None;
    let mut stdin = std::io::stdin().as_fd().try_clone_to_owned()?;
    if std::env::var_os("NETPLANE_SWAP").is_some() {
        let (ours, theirs) = UnixStream::pair()?;
        control = Some(ours);
        stdin = theirs.into();
    }
    let output = || std::io::stdout().as_fd().try_clone_to_owned();
    let pid = sandbox.spawn(Launch {
        argv,
        env: std::env::vars_os().collect(),
        cwd: std::env::current_dir()?,
        stdio: [stdin, output()?, std::io::stderr().as_fd().try_clone_to_owned()?],
    })?;
    if let Some(control) = &mut control {
        // Ends with the program, which holds the other end alone.
        plane = swap_on_demand(plane, &mut net, control, pid.as_raw())?;
    }
    let tells = std::env::var_os("NETPLANE_PREVIEW").is_some();
    let code = wait(&mut sandbox, || if tells { tell_all(&plane) } else { Ok(None) })?;
    let deadline = Instant::now() + Duration::from_secs(5);
    let is_quiet = |plane: &NetPlane| plane.is_quiet();
    while !(is_quiet(&plane) && net.home.as_ref().is_none_or(is_quiet)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    sandbox.destroy();
    Ok(code)
}

/// What every plane of the job is made with.
struct Net {
    /// The plane at which the sockets stayed, when they did.
    home: Option<NetPlane>,
    /// A device without a route, for planes whose sockets are elsewhere; with it the ways of a home-routed job are taken.
    spare: Option<OwnedFd>,
    /// Freezes so far.
    step: u64,
    addresses: Vec<IpAddr>,
    namespace: OwnedFd,
    init_pid: i32,
    listener: OwnedFd,
    eth0: OwnedFd,
}

impl Net {
    fn config(&self) -> Result<NetConfig, Failure> {
        Ok(NetConfig {
            addresses: self.addresses.clone(),
            namespace: Some(self.namespace.try_clone()?),
            init_pid: Some(self.init_pid),
            eth0: Some(self.eth0.try_clone()?),
            ..NetConfig::default()
        })
    }
}

/// A plane, and the programs' new ends of its sockets.
type Thawed = (NetPlane, BTreeMap<SocketKey, OwnedFd>);

impl Net {
    /// Freezes a plane and goes on with a new one.
    fn swap(&mut self, plane: NetPlane) -> Result<Thawed, Failure> {
        self.step += 1;
        let Some(spare) = &self.spare else {
            let image = through_bytes(&plane.freeze()?)?;
            let tun = plane.retire()?;
            drop(plane);
            return self.thaw(image, tun, None);
        };
        let spare = spare.try_clone()?;
        let (ours, theirs) = UnixStream::pair()?;
        let node = NodeAddress { name: "here".into(), peer: ([127, 0, 0, 1], 1).into(), hops: Vec::new() };
        let visitor = Visitor { node, epoch: self.step };
        let guest = Guest::new(ours.into());
        let image = match self.home.take() {
            // The sockets stay behind.
            None => {
                let image = through_bytes(&plane.freeze_without_sockets()?)?;
                plane.become_home(self.step, Board::new()?);
                plane.add_line(theirs.into(), visitor);
                self.home = Some(plane);
                image
            }
            Some(home) => {
                let mut image: NetImage = through_bytes(&plane.freeze()?)?;
                match self.step % 5 {
                    // The process comes back to its sockets.
                    3 => image.stack = home.freeze()?.stack,
                    // The sockets follow it.
                    0 => {
                        home.add_line(theirs.into(), visitor);
                        let (stack, packets) = guest.fetch(self.step + 1, 0, Duration::from_secs(10))?;
                        (image.stack, image.packets) = (Some(Box::new(stack)), packets);
                    }
                    // It goes on to another node.
                    _ => {
                        home.add_line(theirs.into(), visitor);
                        self.home = Some(home);
                        let line = Some((guest, self.step + 1));
                        drop(plane);
                        return self.thaw(image, spare, line);
                    }
                }
                drop(plane);
                let tun = home.retire()?;
                drop(home);
                return self.thaw(image, tun, None);
            }
        };
        let line = Some((guest, self.step + 1));
        self.thaw(image, spare, line)
    }

    fn thaw(&self, image: NetImage, tun: OwnedFd, line: Option<(Guest, u64)>) -> Result<Thawed, Failure> {
        Ok(NetPlane::thaw(self.config()?, image, tun, self.listener.try_clone()?, Stock::new(None)?, line)?)
    }
}

fn through_bytes(image: &NetImage) -> Result<NetImage, Failure> {
    Ok(rmp_serde::from_slice(&rmp_serde::to_vec_named(image)?)?)
}

fn swap_on_demand(mut plane: NetPlane, net: &mut Net, control: &mut UnixStream, pid: i32) -> Result<NetPlane, Failure> {
    let mut byte = [0u8; 1];
    while control.read(&mut byte)? == 1 {
        let keys = plane.descriptor_keys();
        let (thawed, ends) = net.swap(plane)?;
        plane = thawed;
        let mut placed = BTreeMap::new();
        let mut descriptors: Vec<RawFd> = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = entry?.path();
            let number = path.file_name().map(|name| name.to_string_lossy().into_owned()).ok_or("a name")?;
            let target = std::fs::read_link(&path).map(|target| target.to_string_lossy().into_owned());
            let inode = target.ok().and_then(|target| target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            let Some(key) = inode.and_then(|inode: u64| keys.get(&inode)) else {
                continue;
            };
            let end = ends.get(&key).ok_or_else(|| format!("socket {key} has no end"))?;
            placed.insert(number, descriptors.len());
            descriptors.push(end.as_raw_fd());
        }
        let text = serde_json::to_vec(&placed)?;
        if descriptors.len() > DESCRIPTORS_IN_MESSAGE {
            return Err("too many descriptors for one message".into());
        }
        sockets::send_with_descriptors(control.as_fd(), &text, &descriptors)?;
        control.read_exact(&mut byte)?;
        drop(ends);
        plane.resume();
        control.write_all(b"g")?;
    }
    Ok(plane)
}

/// Returns how long to wait before it is done again.
fn tell_all(plane: &NetPlane) -> Result<Option<Duration>, Failure> {
    let keys = plane.describe().into_iter().filter_map(|socket| socket.key).collect();
    plane.preview(keys, true)?;
    Ok(Some(Duration::from_millis(1)))
}

/// Waits for the program's end; does something `meanwhile`, which says when it is to be done again.
fn wait(sandbox: &mut Sandbox, meanwhile: impl Fn() -> Result<Option<Duration>, Failure>) -> Result<u8, Failure> {
    let epoll = Epoll::new()?;
    epoll.add(sandbox.events(), 0, Interest::IN)?;
    let mut events = Events::with_capacity(1);
    loop {
        epoll.wait(&mut events, meanwhile()?)?;
        while let Some(event) = sandbox.next_event()? {
            match event {
                Event::RootExited { status: ExitStatus::Code(code) } => return Ok(u8::try_from(code & 0xff)?),
                Event::RootExited { status: ExitStatus::Signal(signal) } => return Ok(u8::try_from(128 + signal)?),
                Event::JobEmpty => {}
                Event::Gone => return Err("init is gone".into()),
            }
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), Failure> {
    let status = Command::new("ip").args(arguments).status()?;
    if status.success() { Ok(()) } else { Err(format!("ip {arguments:?}: {status}").into()) }
}
