//! What the figures were measured on and with.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::site::Site;

/// A machine and the versions of what ran on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Machine {
    /// Name of the processor.
    pub(super) cpu: String,
    /// Processors.
    pub(super) cpus: usize,
    pub(super) memory_mb: u64,
    /// Release of the kernel.
    pub(super) kernel: String,
    /// The kernel's congestion control for its own TCP.
    pub(super) congestion_control: String,
    /// Of each program taking part.
    pub(super) versions: BTreeMap<String, String>,
    /// When it was looked at, UTC.
    pub(super) date: String,
}

impl Machine {
    /// This machine, now.
    pub(super) fn look(site: &Site) -> Machine {
        let mut versions = BTreeMap::new();
        let mut add = |name: &str, version: Option<String>| {
            versions.insert(name.to_owned(), version.unwrap_or_else(|| "?".to_owned()));
        };
        add("migd", Some(env!("CARGO_PKG_VERSION").to_owned()));
        add("smoltcp", Some("0.14".to_owned()));
        add("redis-server", said(&["redis-server", "--version"], "v="));
        add("redis-benchmark", said(&["redis-benchmark", "--version"], "redis-benchmark "));
        add("nginx", said(&["nginx", "-v"], "nginx/"));
        add("wrk", said(&["wrk", "--version"], "wrk "));
        if let Some(version) = site.criu_version() {
            add("criu", Some(version.to_owned()));
        }
        let congestion_control = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default();
        Machine {
            cpu: value_of("/proc/cpuinfo", "model name").unwrap_or_else(|| "?".to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mb: value_of("/proc/meminfo", "MemTotal")
                .and_then(|text| text.split(' ').next()?.parse::<u64>().ok())
                .map_or(0, |kilobytes| kilobytes / 1024),
            kernel: sys::process::kernel_release(),
            congestion_control: congestion_control.trim().to_owned(),
            versions,
            date: said(&["date", "-u", "+at %Y-%m-%d.%H:%MZ"], "at ")
                .map_or_else(String::new, |date| date.replace('.', " ")),
        }
    }

    /// In one line.
    pub(super) fn line(&self) -> String {
        let versions = self.versions.iter().map(|(name, version)| format!("{name} {version}"));
        format!(
            "{} x {}, {} MB, Linux {} ({}); {}; {}",
            self.cpus,
            self.cpu,
            self.memory_mb,
            self.kernel,
            self.congestion_control,
            versions.collect::<Vec<_>>().join(", "),
            self.date
        )
    }
}

/// The word after `mark` in what a command says.
fn said(command: &[&str], mark: &str) -> Option<String> {
    let output = Command::new(command[0]).args(&command[1..]).stdin(Stdio::null()).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let (_, rest) = text.split_once(mark)?;
    Some(rest.split_ascii_whitespace().next()?.to_owned())
}

/// What stands after the colon in the first line that begins with `key`.
fn value_of(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
