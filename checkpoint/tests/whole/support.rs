//! What the trials share.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use checkpoint::{CommandSpec, Event, Sandbox};

/// The result of a trial.
pub type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Turns a trial's result into what the runner wants.
pub fn trial(name: &str, run: fn() -> Outcome) -> libtest_mimic::Trial {
    libtest_mimic::Trial::test(name, move || run().map_err(|error| error.to_string().into()))
}

/// Fails a trial unless a condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+).into());
        }
    };
}

/// A command whose output goes to the returned pipe.
pub fn command(argv: &[&str]) -> io::Result<(CommandSpec, File)> {
    let (reader, writer) = io::pipe()?;
    let error = OwnedFd::from(writer.try_clone()?);
    let spec = CommandSpec {
        argv: argv.iter().map(Into::into).collect(),
        env: vec![("PATH".into(), "/usr/local/bin:/usr/bin:/bin".into()), ("HOME".into(), "/root".into())],
        cwd: "/".into(),
        uid: 0,
        gid: 0,
        groups: vec![],
        umask: 0o022,
        stdio: [File::open("/dev/null")?.into(), writer.into(), error],
        rlimits: vec![],
    };
    Ok((spec, File::from(OwnedFd::from(reader))))
}

/// Waits for an event that is wanted; others are passed over.
pub fn wait_event(sandbox: &mut Sandbox, wanted: impl Fn(&Event) -> bool) -> Result<Event, String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        match sandbox.next_event().map_err(|error| error.to_string())? {
            Some(event) if wanted(&event) => return Ok(event),
            Some(_) => {}
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    Err("the event didn't come".into())
}

/// All output until everybody who could write has gone.
pub fn read_all(mut output: File) -> io::Result<String> {
    let mut text = String::new();
    output.read_to_string(&mut text)?;
    Ok(text)
}
