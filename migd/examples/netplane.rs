//! Runs one program under the net plane, without daemon, shim or move: for tests and measurements of the plane alone.
//!
//! `netplane ADDRESS TUN PROGRAM ARGS...`, in a network namespace made for it. A SIGINT or SIGTERM reaches the program.

use std::ffi::OsString;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use checkpoint::{CommandSpec, Event, ExitStatus, Sandbox, SandboxSpec};
use migd::net::{NetConfig, NetPlane, filter};
use sys::epoll::{Epoll, Events, Interest};

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
    let namespace = format!("/proc/{}/ns/net", sandbox.init_pid());
    run_in(&namespace, &["ip", "link", "set", "lo", "up"])?;
    let config = NetConfig {
        addresses,
        namespace: Some(sandbox.net_namespace().try_clone_to_owned()?),
        init_pid: Some(sandbox.init_pid().as_raw()),
        ..NetConfig::default()
    };
    let plane = NetPlane::start(config, tun.into(), listener)?;
    let started = sandbox.spawn(CommandSpec {
        argv,
        env: std::env::vars_os().collect(),
        cwd: std::env::current_dir()?,
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        umask: 0o022,
        stdio: [std::io::stdin().as_fd(), std::io::stdout().as_fd(), std::io::stderr().as_fd()]
            .map(|fd| fd.try_clone_to_owned())
            .into_iter()
            .collect::<Result<Vec<OwnedFd>, _>>()?
            .try_into()
            .map_err(|_| "three descriptors")?,
        rlimits: Vec::new(),
    })?;
    eprintln!("netplane: program is process {started}, init {}", sandbox.init_pid());
    let code = wait(&mut sandbox)?;
    let deadline = Instant::now() + Duration::from_secs(5);
    while !plane.is_quiet() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    sandbox.destroy();
    Ok(code)
}

fn wait(sandbox: &mut Sandbox) -> Result<u8, Failure> {
    let epoll = Epoll::new()?;
    epoll.add(sandbox.events(), 0, Interest::IN)?;
    let mut events = Events::with_capacity(1);
    loop {
        epoll.wait(&mut events, None)?;
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

fn run_in(namespace: &str, command: &[&str]) -> Result<(), Failure> {
    let status = Command::new("nsenter").arg(format!("--net={namespace}")).args(command).status()?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}
