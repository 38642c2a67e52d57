//! The demonstration: the distribution's redis-server moves between two nodes of a lab while clients that know nothing of
//! migd keep talking to it, and what they saw is told. Every figure is measured in that run.

pub mod clients;
pub mod redis;
mod report;
mod script;
pub mod wire;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

pub(crate) use report::longest_operation;
pub use report::{MoveReport, Report};

/// Arguments of `migd demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Fill redis with so many megabytes before it is moved
    #[arg(long, value_name = "N", default_value_t = 0)]
    dataset_mb: usize,
    /// The engine of the cluster's directory; of an etcd one of its three members is killed and started again meanwhile
    #[arg(long, value_name = "ENGINE", default_value = "embedded")]
    directory: crate::lab::Engine,
    /// Print the result as JSON, and nothing else
    #[arg(long)]
    json: bool,
}

/// Runs `migd demo`: status 0 only when no connection broke, the counter is exact, all hashes match, the idle subscriber
/// got its message, and no traffic crossed an old node.
///
/// # Errors
/// What kept it from being carried out.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    if args.dataset_mb > 0 {
        refuse_too_large(args.dataset_mb)?;
    }
    let interrupt = Interrupt::watch()?;
    let settings = script::Settings { dataset_mb: args.dataset_mb, quiet: args.json, directory: args.directory };
    let report = script::run(&settings, &interrupt)?;
    if args.json {
        crate::cli::print_json(&report)?;
    } else {
        report.print_verdict();
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Refuses a data set that the machine can't hold: while redis moves its memory is there twice.
fn refuse_too_large(dataset_mb: usize) -> anyhow::Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").context("can't read how much memory the machine has")?;
    let available =
        text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse().ok());
    let available_mb = available.unwrap_or(0usize) >> 10;
    if dataset_mb.checked_mul(2).is_none_or(|twice| twice > available_mb) {
        anyhow::bail!(
            "{dataset_mb} MB don't fit: while redis moves they are in memory twice, and this machine has {available_mb} MB free; \
             take less with --dataset-mb"
        );
    }
    Ok(())
}

/// Ctrl-C, SIGTERM and a terminal that closes become a flag, so that the lab is taken down before the program ends.
pub(crate) struct Interrupt {
    flag: std::sync::Arc<AtomicBool>,
}

impl Interrupt {
    /// Starts to watch.
    pub(crate) fn watch() -> anyhow::Result<Interrupt> {
        use tokio::signal::unix::{SignalKind, signal};
        let flag = std::sync::Arc::new(AtomicBool::new(false));
        let seen = std::sync::Arc::clone(&flag);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let context = runtime.enter();
        let mut interrupts = signal(SignalKind::interrupt()).context("can't watch for Ctrl-C")?;
        let mut terminations = signal(SignalKind::terminate()).context("can't watch for SIGTERM")?;
        let mut hang_ups = signal(SignalKind::hangup()).context("can't watch for SIGHUP")?;
        let mut quits = signal(SignalKind::quit()).context("can't watch for SIGQUIT")?;
        drop(context);
        std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = interrupts.recv() => {}
                    _ = terminations.recv() => {}
                    _ = hang_ups.recv() => {}
                    _ = quits.recv() => {}
                }
            });
            seen.store(true, Ordering::Relaxed);
        });
        Ok(Interrupt { flag })
    }

    /// An error once a signal came.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        if self.flag.load(Ordering::Relaxed) {
            anyhow::bail!("interrupted");
        }
        Ok(())
    }

    /// Sleeps, but not through a signal.
    pub(crate) fn sleep(&self, duration: std::time::Duration) -> anyhow::Result<()> {
        let end = std::time::Instant::now() + duration;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(std::time::Duration::from_millis(50)));
        }
    }
}
