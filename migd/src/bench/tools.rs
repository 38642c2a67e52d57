//! The foreign load generators: `redis-benchmark` and `wrk`, run in the client's namespace.

use std::io;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use sys::netns::NetNamespace;

use crate::lab::require;

/// Connections of redis-benchmark (its own default).
pub(super) const REDIS_CLIENTS: u32 = 50;
/// Connections that wrk keeps opening at a time.
pub(super) const WRK_CONNECTIONS: u32 = 16;
/// How long a tool may take beyond what it was told: one that hangs must not hang the benchmark.
const PATIENCE: Duration = Duration::from_secs(60);

/// `redis-benchmark` with 50 connections and no pipelining: SETs, then GETs, `requests` of each. Returns requests per
/// second over both.
pub(super) fn redis_benchmark(client: &NetNamespace, server: SocketAddr, requests: u32) -> anyhow::Result<f64> {
    require("redis-benchmark", "redis-tools")?;
    let mut command = Command::new("redis-benchmark");
    command.args(["-h", &server.ip().to_string(), "-p", &server.port().to_string(), "-t", "set,get", "--csv"]);
    command.args(["-c", &REDIS_CLIENTS.to_string(), "-n", &requests.to_string()]);
    let text = output(client, command, PATIENCE)?;
    per_second(&text).with_context(|| format!("redis-benchmark said: {text}"))
}

/// The rate over all commands of equal number: the harmonic mean of theirs.
fn per_second(csv: &str) -> anyhow::Result<f64> {
    let mut seconds = 0.0;
    let mut commands = 0_u32;
    for line in csv.lines() {
        let mut fields = line.split(',').map(|field| field.trim_matches('"'));
        if !matches!(fields.next(), Some("SET" | "GET")) {
            continue;
        }
        let rate: f64 = fields.next().context("a line without a rate")?.parse().context("a rate that is no number")?;
        anyhow::ensure!(rate > 0.0, "a rate of zero");
        seconds += 1.0 / rate;
        commands += 1;
    }
    anyhow::ensure!(commands == 2, "{commands} of two results");
    Ok(f64::from(commands) / seconds)
}

/// What wrk saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Connects {
    /// Connections per second, each with one request and its answer.
    pub(super) per_s: f64,
    /// Connections that failed.
    pub(super) errors: u64,
}

/// `wrk` with `Connection: close`: a new connection for each request.
pub(super) fn wrk_connects(client: &NetNamespace, server: SocketAddr, seconds: u64) -> anyhow::Result<Connects> {
    require("wrk", "wrk")?;
    let mut command = Command::new("wrk");
    command.args(["-t", "1", "-c", &WRK_CONNECTIONS.to_string(), "-d", &format!("{seconds}s")]);
    command.args(["-H", "Connection: close", &format!("http://{server}/")]);
    let text = output(client, command, PATIENCE + Duration::from_secs(seconds))?;
    connects(&text).with_context(|| format!("wrk said: {text}"))
}

fn connects(text: &str) -> anyhow::Result<Connects> {
    let mut per_s = None;
    let mut errors = 0;
    for line in text.lines().map(str::trim) {
        if let Some(rate) = line.strip_prefix("Requests/sec:") {
            per_s = Some(rate.trim().parse().context("a rate that is no number")?);
        } else if line.starts_with("Socket errors:") || line.starts_with("Non-2xx") {
            let numbers = line.split(|letter: char| !letter.is_ascii_digit());
            // The 2 and 3 of "Non-2xx or 3xx responses" are no counts, but then there are counts to come.
            let mut counts = numbers.filter_map(|number| number.parse::<u64>().ok());
            errors += if line.starts_with("Non-2xx") { counts.next_back().unwrap_or(1) } else { counts.sum::<u64>() };
        }
    }
    Ok(Connects { per_s: per_s.context("no rate")?, errors })
}

/// Runs a command inside a namespace and returns what it printed.
///
/// # Errors
/// When it fails or takes longer than `patience`.
pub(super) fn output(namespace: &NetNamespace, mut command: Command, patience: Duration) -> anyhow::Result<String> {
    let name = command.get_program().display().to_string();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = namespace.run(|| command.spawn()).with_context(|| format!("can't start {name}"))?;
    let pid = child.id();
    let (sender, ended) = std::sync::mpsc::channel();
    let waiting = std::thread::spawn(move || {
        let output = child.wait_with_output();
        // Nobody listens any more when the tool was given up.
        let _ = sender.send(());
        output
    });
    let began = Instant::now();
    let in_time = ended.recv_timeout(patience).is_ok();
    if !in_time {
        kill(pid);
    }
    let output = waiting.join().map_err(|_| io::Error::other("the waiting thread panicked"))??;
    if !in_time {
        bail!("{name} did not end within {:.0} s", began.elapsed().as_secs_f64());
    }
    if !output.status.success() {
        bail!("{name} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Of a child that is not waited for yet, so the number is still its own.
fn kill(pid: u32) {
    if let Ok(pid) = i32::try_from(pid) {
        // Fails only when it just ended.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_of_redis_benchmark_are_put_together_by_time() {
        let csv = "\"test\",\"rps\",\"avg_latency_ms\"\n\"SET\",\"50000.00\",\"0.5\"\n\"GET\",\"100000.00\",\"0.5\"\n";
        let rate = per_second(csv).expect("both are there");
        assert!((rate - 66_666.67).abs() < 0.1, "{rate}");
        assert!(per_second("\"SET\",\"50000.00\"\n").is_err());
    }

    #[test]
    fn errors_of_wrk_are_counted() {
        let text = "Running 1s test @ http://10.0.0.1/\n  1 threads and 16 connections\n  12000 requests in 1.00s\n  \
                    Socket errors: connect 1, read 20, write 0, timeout 3\n  Non-2xx or 3xx responses: 5\n\
                    Requests/sec:  11990.50\nTransfer/sec:      1.10MB\n";
        assert_eq!(connects(text).expect("a rate"), Connects { per_s: 11990.5, errors: 29 });
        assert!(connects("Requests/min: 1").is_err());
    }
}
