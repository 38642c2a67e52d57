//! `migd move`.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use super::Target;
use super::arguments::MoveArgs;
use super::failure;
use super::listing::{print, print_json};
use crate::api::{ApiError, DaemonRequest, ErrorKind, JobView, MoveEvent, MoveOutcome, MoveSummary};

/// `migd move`.
pub async fn move_job(target: &Target, args: MoveArgs) -> anyhow::Result<ExitCode> {
    let client = target.client()?;
    let request = DaemonRequest::Move { job: args.job, node: args.to, sockets: args.sockets };
    let (job, mut connection) = client.open::<JobView>(&request).await?;
    let mut progress = Progress::new();
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let outcome = loop {
        let event = tokio::select! {
            event = connection.receive::<MoveEvent>() => event.unwrap_or(None),
            _ = interrupt.recv() => {
                progress.clear();
                eprintln!("migd: the move of job {} goes on without you; `migd ps` shows where it runs", job.name);
                return Ok(ExitCode::from(failure::INTERRUPTED));
            }
        };
        match event {
            Some(MoveEvent::Progress { phase, round, bytes, total_bytes }) => {
                progress.show(&phase, round, bytes, total_bytes);
            }
            Some(MoveEvent::Done(outcome)) => break outcome,
            Some(MoveEvent::Failed(error)) => {
                progress.clear();
                return Err(error.into());
            }
            None => {
                progress.clear();
                let message = format!("the daemon went away while job {} was moving", job.name);
                let hint = "the move goes on or is given up without it; `migd ps` shows where the job runs";
                return Err(ApiError::new(ErrorKind::Unavailable, message).hint(hint).into());
            }
        }
    };
    progress.clear();
    if args.json {
        print_json(&outcome)?;
    }
    match &outcome {
        MoveOutcome::Moved(summary) => {
            if !args.json {
                print(&describe(&job.name, summary))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        MoveOutcome::Refused { reasons } => {
            eprintln!("migd: job {} stays on node {}:", job.name, job.node);
            for reason in reasons {
                eprintln!("  {reason}");
            }
            Ok(ExitCode::from(failure::REFUSED))
        }
        MoveOutcome::Aborted { phase, reason } => {
            eprintln!("migd: the move of job {} was given up in phase {phase}: {reason}", job.name);
            eprintln!("migd: it runs on on node {}; trying again is safe", job.node);
            Ok(ExitCode::from(failure::ABORTED))
        }
    }
}

fn describe(name: &str, summary: &MoveSummary) -> String {
    let MoveSummary { from, to, epoch: _, downtime_us, total_us, precopy_bytes, freeze_bytes, phases } = summary;
    let mut text = format!(
        "{name}: {from} -> {to} in {}, stood still for {}; {} sent before, {} meanwhile\n",
        time(*total_us),
        time(*downtime_us),
        size(*precopy_bytes),
        size(*freeze_bytes),
    );
    for phase in phases {
        let bytes = if phase.bytes > 0 { size(phase.bytes) } else { String::new() };
        let _ =
            writeln!(text, "{}", format!("  {:<12} {:>10}  {bytes}", phase.name, time(phase.duration_us)).trim_end());
    }
    text
}

fn time(us: u64) -> String {
    let time = Duration::from_micros(us);
    if us < 10_000_000 { format!("{:.1} ms", time.as_secs_f64() * 1e3) } else { format!("{:.1} s", time.as_secs_f64()) }
}

fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KB", "MB", "GB", "TB"];
    // Exact enough to be shown with one decimal.
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// One line on a terminal, nothing elsewhere.
struct Progress {
    terminal: bool,
    shown: bool,
}

impl Progress {
    fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), shown: false }
    }

    fn show(&mut self, phase: &str, round: Option<u32>, bytes: u64, total_bytes: Option<u64>) {
        if !self.terminal {
            return;
        }
        let mut line = phase.to_owned();
        if let Some(round) = round {
            let _ = write!(line, ", round {round}");
        }
        match total_bytes {
            Some(total) => drop(write!(line, ": {} of {}", size(bytes), size(total))),
            None => drop(write!(line, ": {}", size(bytes))),
        }
        self.line(&line);
        self.shown = true;
    }

    fn clear(&mut self) {
        if self.shown {
            self.line("");
            self.shown = false;
        }
    }

    fn line(&self, text: &str) {
        let mut out = std::io::stderr().lock();
        // The terminal may have gone; that is no reason to stop.
        let _ = write!(out, "\r\x1b[K{text}");
        let _ = out.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::MovePhase;

    #[test]
    fn sizes_and_times_have_fitting_units() {
        assert_eq!(
            [0, 999, 1000, 999_949, 999_950, 1_500_000_000].map(size),
            ["0 B", "999 B", "1.0 KB", "999.9 KB", "1.0 MB", "1.5 GB"]
        );
        assert_eq!([1234, 10_000_000].map(time), ["1.2 ms", "10.0 s"]);
    }

    #[test]
    fn a_summary_names_what_matters() {
        let summary = MoveSummary {
            from: "A".into(),
            to: "B".into(),
            epoch: 2,
            downtime_us: 12_300,
            total_us: 80_000,
            precopy_bytes: 5_000_000,
            freeze_bytes: 300_000,
            phases: vec![MovePhase { name: "freeze".into(), duration_us: 2_000, bytes: 0 }],
        };
        assert_eq!(
            describe("web", &summary),
            "web: A -> B in 80.0 ms, stood still for 12.3 ms; 5.0 MB sent before, 300.0 KB meanwhile\n  \
             freeze           2.0 ms\n"
        );
    }
}
