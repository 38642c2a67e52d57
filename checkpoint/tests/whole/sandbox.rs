//! Namespaces and init.

use checkpoint::{ClockOffsets, Error, Event, ExitStatus, Sandbox, SandboxSpec};
use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{Outcome, command, read_all, trial, wait_event};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("sandbox::runs_a_program_in_its_namespaces", runs_a_program),
        trial("sandbox::starts_a_program_with_no_signal_blocked_or_ignored", signals),
        trial("sandbox::knows_its_own_name", own_name),
        trial("sandbox::reports_a_program_that_is_not_there", missing_program),
        trial("sandbox::reaps_orphans_and_reports_the_end", reaps_orphans),
        trial("sandbox::shifts_the_clocks", shifts_clocks),
        trial("sandbox::destroy_leaves_no_process", destroy),
    ]
}

fn runs_a_program() -> Outcome {
    let mut sandbox = Sandbox::create(SandboxSpec { hostname: "job-7".into(), ..SandboxSpec::default() })?;
    let script = "hostname; ps -e -o pid= -o comm= | grep -v ps; umask; exit 3";
    let (spec, output) = command(&["sh", "-c", script])?;
    sandbox.spawn(spec)?;
    let event = wait_event(&mut sandbox, |event| matches!(event, Event::RootExited { .. }))?;
    ensure!(event == Event::RootExited { status: ExitStatus::Code(3) }, "ended with {event:?}");
    let text = read_all(output)?;
    ensure!(text.starts_with("job-7\n"), "{text}");
    ensure!(text.lines().nth(1).is_some_and(|line| line.trim().starts_with("1 ")), "{text}");
    ensure!(text.ends_with("0022\n"), "{text}");
    Ok(())
}

fn signals() -> Outcome {
    let mut sandbox = Sandbox::create(SandboxSpec::default())?;
    // A program that asks the kernel itself: a shell or an interpreter sets some of them.
    let (spec, output) = command(&["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"])?;
    sandbox.spawn(spec)?;
    let text = read_all(output)?;
    ensure!(text == "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n", "{text}");
    Ok(())
}

fn own_name() -> Outcome {
    let addresses = vec!["10.77.3.4".parse()?, "fd77::304".parse()?];
    let mut sandbox = Sandbox::create(SandboxSpec { hostname: "job-7".into(), addresses, ..Default::default() })?;
    let (spec, output) = command(&["sh", "-c", "tail -n 2 /etc/hosts; getent hosts job-7; ls -A /dev/shm"])?;
    sandbox.spawn(spec)?;
    let text = read_all(output)?;
    ensure!(text.starts_with("10.77.3.4\tjob-7\nfd77::304\tjob-7\nfd77::304 "), "{text}");
    ensure!(!text.contains("hosts"), "something is left in /dev/shm: {text}");
    ensure!(!std::fs::read_to_string("/etc/hosts")?.contains("job-7"), "the machine's file is changed");
    Ok(())
}

fn missing_program() -> Outcome {
    let mut sandbox = Sandbox::create(SandboxSpec::default())?;
    let (spec, _output) = command(&["no-such-program-anywhere"])?;
    let error = sandbox.spawn(spec).err().ok_or("it started")?;
    ensure!(matches!(&error, Error::Program { .. }), "{error:?}");
    ensure!(error.to_string() == "can't run no-such-program-anywhere: no such program", "{error}");
    let directory = tempfile::tempdir()?;
    let script = directory.path().join("script");
    std::fs::write(&script, "#!/no/such/interpreter\n")?;
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let script = script.to_string_lossy();
    for (program, cwd, word) in
        [("/tmp", "/", "directory"), (&*script, "/", "interpreter"), ("true", "/no/such/place", "/no/such/place")]
    {
        let (spec, _output) = command(&[program])?;
        let error = sandbox.spawn(checkpoint::Launch { cwd: cwd.into(), ..spec }).err().ok_or("it started")?;
        ensure!(error.to_string().contains(word), "{error}");
    }
    // The sandbox is still good.
    let (spec, output) = command(&["echo", "fine"])?;
    sandbox.spawn(spec)?;
    ensure!(read_all(output)? == "fine\n", "no output");
    Ok(())
}

fn reaps_orphans() -> Outcome {
    let mut sandbox = Sandbox::create(SandboxSpec::default())?;
    let (spec, _output) = command(&["sh", "-c", "(sleep 0.2; exit 4) & kill -TERM $$"])?;
    sandbox.spawn(spec)?;
    let event = wait_event(&mut sandbox, |_| true)?;
    ensure!(event == Event::RootExited { status: ExitStatus::Signal(15) }, "{event:?}");
    let event = wait_event(&mut sandbox, |_| true)?;
    ensure!(event == Event::JobEmpty, "{event:?}");
    Ok(())
}

fn shifts_clocks() -> Outcome {
    let offsets = ClockOffsets { monotonic_ns: 5_000_000_000_123, boottime_ns: -1_000_000_001 };
    let mut sandbox = Sandbox::create(SandboxSpec { clock_offsets: Some(offsets), ..SandboxSpec::default() })?;
    let script = "import time; print(time.clock_gettime_ns(time.CLOCK_MONOTONIC), \
                  time.clock_gettime_ns(time.CLOCK_BOOTTIME))";
    let (spec, output) = command(&["python3", "-c", script])?;
    let before = [1, 7].map(sys::process::clock_ns);
    sandbox.spawn(spec)?;
    let text = read_all(output)?;
    let seen: Vec<i64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    ensure!(seen.len() == 2, "{text}");
    for (index, (seen, offset)) in seen.iter().zip([offsets.monotonic_ns, offsets.boottime_ns]).enumerate() {
        let ahead = seen - before[index] - offset;
        ensure!((0..5_000_000_000).contains(&ahead), "clock {index} is off by {ahead} ns");
    }
    Ok(())
}

fn destroy() -> Outcome {
    let mut sandbox = Sandbox::create(SandboxSpec::default())?;
    let (spec, output) = command(&["sh", "-c", "sleep 1000 & sleep 1000 & echo up; wait"])?;
    let root = sandbox.spawn(spec)?;
    sandbox.destroy();
    ensure!(sys::process::kill(root, 0).is_err(), "the job's first process is still there");
    // The end of the output comes only when nobody holds the pipe any more.
    read_all(output)?;
    Ok(())
}
