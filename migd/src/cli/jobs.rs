//! `inspect`, `kill` and `rm`.

use std::fmt::Write;
use std::process::ExitCode;

use serde_json::Value;

use super::Target;
use super::arguments::{InspectArgs, KillArgs, RmArgs};
use super::failure;
use super::listing::{age, harmless, print, print_json, state};
use crate::api::{Client, DaemonRequest, JobInspection, JobState, unix_ms};

/// `migd inspect`.
pub async fn inspect(target: &Target, args: InspectArgs) -> anyhow::Result<ExitCode> {
    let inspection: JobInspection = target.client()?.ask(&DaemonRequest::Inspect { job: args.job }).await?;
    if args.json {
        print_json(&inspection)?;
    } else {
        print(&describe(&inspection))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(inspection: &JobInspection) -> String {
    let JobInspection { job, spec, detail } = inspection;
    let now = unix_ms();
    let mut text = String::new();
    let mut line = |key: &str, value: &str| {
        let _ = writeln!(text, "{key:<10} {value}");
    };
    line("name", &job.name);
    line("id", &job.id);
    line("command", &harmless(&job.argv.join(" ")));
    line("node", &job.node);
    line("address", &job.address.to_string());
    if let Some(address) = job.address6 {
        line("ipv6", &address.to_string());
    }
    line("state", &state(job, now));
    line("epoch", &job.epoch.to_string());
    line("started", &format!("{} ago", age(now.saturating_sub(job.created_ms))));
    match job.pid {
        Some(pid) => line("pid", &pid.to_string()),
        None if job.state == JobState::Running => line("pid", "none: its first process has ended, others run on"),
        None => {}
    }
    if let Some(spec) = spec {
        line("workdir", &harmless(&spec.cwd));
    }
    if let Some(detail) = detail {
        outline(&mut text, detail, 0);
    }
    text
}

/// JSON for reading: one line for each plain value and for each object that fits into a line.
fn outline(text: &mut String, value: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::Object(_) | Value::Array(_) => {
                        let _ = writeln!(text, "{indent}{key}:");
                        outline(text, value, depth + 1);
                    }
                    plain => {
                        let _ = writeln!(text, "{indent}{key:<10} {}", show(plain));
                    }
                }
            }
        }
        Value::Array(items) => {
            if items.is_empty() {
                let _ = writeln!(text, "{indent}none");
            }
            for item in items {
                match item {
                    Value::Object(map) => {
                        let fields: Vec<_> = map.iter().map(|(key, value)| format!("{key}={}", show(value))).collect();
                        let _ = writeln!(text, "{indent}{}", fields.join(" "));
                    }
                    other => {
                        let _ = writeln!(text, "{indent}{}", show(other));
                    }
                }
            }
        }
        plain => {
            let _ = writeln!(text, "{indent}{}", show(plain));
        }
    }
}

fn show(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

/// `migd kill`.
pub async fn kill(target: &Target, args: KillArgs) -> anyhow::Result<ExitCode> {
    let signal = args.signal;
    each(&target.client()?, args.jobs, |job| DaemonRequest::Kill { job, signal }).await
}

/// `migd rm`.
pub async fn rm(target: &Target, args: RmArgs) -> anyhow::Result<ExitCode> {
    each(&target.client()?, args.jobs, |job| DaemonRequest::Remove { job }).await
}

/// Asks the same for each job; goes on after a failure, which shows in the exit status.
async fn each(
    client: &Client,
    jobs: Vec<String>,
    request: impl Fn(String) -> DaemonRequest,
) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for job in jobs {
        if let Err(error) = client.ask::<()>(&request(job)).await {
            failure::show(&error.into());
            code = ExitCode::from(failure::GENERAL);
        }
    }
    Ok(code)
}
