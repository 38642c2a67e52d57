//! `ps` and `nodes`.

use std::io::{self, Write};
use std::process::ExitCode;

use serde::Serialize;

use super::Target;
use super::arguments::{NodesArgs, PsArgs};
use crate::api::{DaemonRequest, JobList, JobState, JobView, NodeList, NodeView, unix_ms};

/// Commands are cut at so many characters in tables.
const COMMAND_MAX: usize = 60;

/// `migd ps`.
pub async fn ps(target: &Target, args: PsArgs) -> anyhow::Result<ExitCode> {
    let list: JobList = target.client()?.ask(&DaemonRequest::Jobs { all: args.all }).await?;
    warn(&list.warnings);
    if args.json {
        print_json(&list.jobs)?;
    } else if args.quiet {
        print_lines(list.jobs.iter().map(|job| job.id.clone()))?;
    } else {
        let now = unix_ms();
        let header = ["NAME", "ID", "NODE", "ADDRESS", "STATE", "STARTED", "COMMAND"].map(str::to_owned);
        print_table(header, list.jobs.iter().map(|job| row(job, now)))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(job: &JobView, now: u64) -> [String; 7] {
    [
        job.name.clone(),
        job.id.chars().take(12).collect(),
        place(job),
        job.address.to_string(),
        state(job, now),
        format!("{} ago", age(now.saturating_sub(job.created_ms))),
        command(&job.argv),
    ]
}

/// Where a job is, and where its sockets are if that is another node.
pub fn place(job: &JobView) -> String {
    match &job.home {
        None => job.node.clone(),
        Some(home) if home.lost.is_some() => format!("{} (home {} lost)", job.node, home.node),
        Some(home) => format!("{} (home {})", job.node, home.node),
    }
}

/// A job's state in words.
pub fn state(job: &JobView, now: u64) -> String {
    match (job.state, &job.moving_to, job.exit) {
        (JobState::Starting, ..) => "starting".into(),
        (JobState::Running, ..) => "running".into(),
        (JobState::Moving, Some(to), _) => format!("moving to {to}"),
        (JobState::Moving, None, _) => "moving".into(),
        (JobState::Unreachable, ..) => "unreachable".into(),
        (JobState::Exited, _, exit) => {
            let exit = exit.map_or_else(|| "exited".into(), |exit| exit.to_string());
            match job.finished_ms {
                Some(finished) => format!("{exit} {} ago", age(now.saturating_sub(finished))),
                None => exit,
            }
        }
    }
}

/// A user's text without what a terminal would obey.
pub fn harmless(text: &str) -> String {
    text.replace(char::is_control, "?")
}

fn command(argv: &[String]) -> String {
    let text = harmless(&argv.join(" "));
    match text.char_indices().nth(COMMAND_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A span of time with one unit.
pub fn age(ms: u64) -> String {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    match ms / 1000 {
        s if s < 2 * MINUTE => format!("{s}s"),
        s if s < 2 * HOUR => format!("{}m", s / MINUTE),
        s if s < 2 * DAY => format!("{}h", s / HOUR),
        s => format!("{}d", s / DAY),
    }
}

/// `migd nodes`.
pub async fn nodes(target: &Target, args: NodesArgs) -> anyhow::Result<ExitCode> {
    let list: NodeList = target.client()?.ask(&DaemonRequest::Nodes).await?;
    warn(&list.warnings);
    if args.json {
        print_json(&list.nodes)?;
        return Ok(ExitCode::SUCCESS);
    }
    let row = |node: &NodeView| {
        let state = match (node.alive, node.last_seen_ms) {
            (true, _) => "up".to_owned(),
            (false, Some(ms)) => format!("down, heard {} ago", age(ms)),
            (false, None) => "down, never heard".to_owned(),
        };
        [
            node.name.clone(),
            node.peer.to_string(),
            state,
            node.jobs.to_string(),
            if node.directory { "directory".into() } else { "-".into() },
            node.version.clone().unwrap_or_else(|| "-".into()),
        ]
    };
    let header = ["NAME", "ADDRESS", "STATE", "JOBS", "ROLE", "VERSION"].map(str::to_owned);
    print_table(header, list.nodes.iter().map(row))?;
    Ok(ExitCode::SUCCESS)
}

fn warn(warnings: &[String]) {
    for warning in warnings {
        eprintln!("migd: warning: {warning}");
    }
}

/// Prints a value as JSON for programs and people.
///
/// # Errors
/// As standard output's.
pub fn print_json<T: Serialize>(value: &T) -> io::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

fn print_lines(lines: impl Iterator<Item = String>) -> io::Result<()> {
    print(&lines.map(|line| line + "\n").collect::<String>())
}

/// Prints text; a reader that has gone away is no error.
///
/// # Errors
/// As standard output's.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(unwritable("standard output", &error)),
        Ok(()) => Ok(()),
    }
}

/// An error of a write, with the name of what was to be written.
pub fn unwritable(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("can't write to {what}: {error}"))
}

/// Prints rows under a header, in columns.
///
/// # Errors
/// As standard output's.
pub fn print_table<const N: usize>(header: [String; N], rows: impl Iterator<Item = [String; N]>) -> io::Result<()> {
    print(&table(header, rows))
}

fn table<const N: usize>(header: [String; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width.saturating_sub(cell.chars().count()) + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a", "1"], ["long", "22"]].map(|row| row.map(str::to_owned));
        let text = table(["NAME", "N"].map(str::to_owned), rows.into_iter());
        assert_eq!(text, "NAME  N\na     1\nlong  22\n");
    }

    #[test]
    fn ages_have_one_unit() {
        let ages = [0, 119_999, 120_000, 7_200_000, 200_000_000].map(age);
        assert_eq!(ages, ["0s", "119s", "2m", "2h", "2d"]);
    }

    #[test]
    fn commands_are_cut_and_harmless() {
        assert_eq!(command(&["a\x1b[1m".into(), "b".into()]), "a?[1m b");
        assert_eq!(command(&["é".repeat(100)]).chars().count(), COMMAND_MAX + 1);
    }
}
