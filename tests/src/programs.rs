//! The programs that are moved and have to be built or written first.

use std::path::Path;
use std::process::Command;

use crate::fixture::Fixture;
use crate::pattern::Pattern;

/// Source of the threaded echo server in Rust.
const ECHO_RUST: &str = include_str!("../programs/echo.rs");
/// Source of the echo server in Go.
const ECHO_GO: &str = include_str!("../programs/echo.go");
/// The asyncio echo server.
const ECHO_PYTHON: &str = include_str!("../programs/echo.py");
/// The server of shells.
const SHELLS_PYTHON: &str = include_str!("../programs/shells.py");
/// Source of the echo server for datagrams in Go.
const UDP_GO: &str = include_str!("../programs/udp.go");
/// The asyncio echo server for datagrams.
const UDP_PYTHON: &str = include_str!("../programs/udp.py");

/// A redis that keeps nothing on disk, on [`REDIS_PORT`] of all its addresses.
pub const REDIS: [&str; 10] =
    ["redis-server", "--port", "6379", "--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", ""];
/// Where [`REDIS`] listens.
pub const REDIS_PORT: u16 = 6379;

/// Builds the threaded Rust echo server without any shared library.
///
/// # Panics
/// When the compiler fails.
#[must_use]
pub fn static_rust_echo(fixture: &Fixture) -> String {
    let (source, program) = (fixture.path("echo.rs"), fixture.path("echo-rust"));
    std::fs::write(&source, ECHO_RUST).expect("the test's directory");
    let compiler = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let options = ["--edition=2024", "-O", "-C", "target-feature=+crt-static", "-o", &program, &source];
    build(Command::new(compiler).args(options));
    program
}

/// Builds the Go echo server; `None` when there is no Go.
///
/// # Panics
/// When the compiler fails.
#[must_use]
pub fn static_go_echo(fixture: &Fixture) -> Option<String> {
    static_go(fixture, "echo", ECHO_GO)
}

/// Builds the Go echo server for datagrams; `None` when there is no Go.
///
/// # Panics
/// When the compiler fails.
#[must_use]
pub fn static_go_udp(fixture: &Fixture) -> Option<String> {
    static_go(fixture, "udp", UDP_GO)
}

fn static_go(fixture: &Fixture, name: &str, text: &str) -> Option<String> {
    Command::new("go").arg("version").output().ok()?;
    let (source, program) = (fixture.path(&format!("{name}.go")), fixture.path(&format!("{name}-go")));
    std::fs::write(&source, text).expect("the test's directory");
    let mut command = Command::new("go");
    command.args(["build", "-o", &program, &source]);
    command.env("CGO_ENABLED", "0").env("GO111MODULE", "off").env("GOCACHE", fixture.path("go-cache"));
    build(&mut command);
    Some(program)
}

/// Writes the asyncio echo server; returns its path.
///
/// # Panics
/// When the test's directory is gone.
#[must_use]
pub fn python_echo(fixture: &Fixture) -> String {
    let path = fixture.path("echo.py");
    std::fs::write(&path, ECHO_PYTHON).expect("the test's directory");
    path
}

/// Writes the server of shells on terminals; returns its path.
///
/// # Panics
/// When the test's directory is gone.
#[must_use]
pub fn shells(fixture: &Fixture) -> String {
    let path = fixture.path("shells.py");
    std::fs::write(&path, SHELLS_PYTHON).expect("the test's directory");
    path
}

/// Writes the asyncio echo server for datagrams; returns its path.
///
/// # Panics
/// When the test's directory is gone.
#[must_use]
pub fn python_udp(fixture: &Fixture) -> String {
    let path = fixture.path("udp.py");
    std::fs::write(&path, UDP_PYTHON).expect("the test's directory");
    path
}

/// Writes a file with the pattern of `seed`.
///
/// # Panics
/// When that fails.
pub fn write_pattern(path: impl AsRef<Path>, seed: u64, size: usize) {
    std::fs::write(path, Pattern::new(seed).take(size)).expect("the test's directory");
}

/// Writes a configuration for an nginx that keeps all its files in the test's directory; returns its path.
///
/// # Panics
/// When that fails.
#[must_use]
pub fn nginx_configuration(fixture: &Fixture, port: u16) -> String {
    let root = fixture.directory.path().display().to_string();
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("    {kind}_temp_path {root}/nginx-{kind};\n"))
        .concat();
    let configuration = format!(
        "user root;\npid {root}/nginx.pid;\nerror_log {root}/nginx-error.log;\nevents {{}}\nhttp {{\n    \
         access_log off;\n    sendfile on;\n{temporary}    server {{ listen {port}; root {root}; }}\n}}\n"
    );
    let path = fixture.path("nginx.conf");
    std::fs::write(&path, configuration).expect("the test's directory");
    path
}

fn build(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
