//! Where results go: a table, JSON or CSV on standard output, and a report with pictures in a directory.

use std::path::PathBuf;

use serde::Serialize;

use super::machine::Machine;
use super::report::{self, Section};

/// How results are given out.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct Output {
    /// As JSON
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// As comma-separated values
    #[arg(long)]
    csv: bool,
    /// Also write a report (report.html, and each chart as SVG and PNG) into this directory
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

/// The results of a benchmark.
pub(super) trait Results: Serialize {
    /// A table for a terminal.
    fn text(&self) -> String;
    /// With a header line.
    fn csv(&self) -> String;
    /// The parts of a report.
    fn sections(&self) -> Vec<Section>;
    /// What they were measured on.
    fn machine(&self) -> &Machine;
}

impl Output {
    /// Gives them out.
    pub(super) fn give(&self, results: &impl Results) -> anyhow::Result<()> {
        use std::io::Write;
        if let Some(directory) = &self.report {
            report::write(directory, "migd: measured", &results.machine().line(), &results.sections())?;
            eprintln!("wrote {}", directory.join("report.html").display());
        }
        let text = if self.json {
            serde_json::to_string_pretty(results)? + "\n"
        } else if self.csv {
            results.csv()
        } else {
            results.text()
        };
        // Whoever closed the output does not want to read it.
        let _ = std::io::stdout().write_all(text.as_bytes());
        Ok(())
    }
}

/// Fields of a line; those with commas or quotation marks in them are quoted (RFC 4180).
pub(super) fn csv_line(fields: &[String]) -> String {
    let quoted = |field: &String| {
        if field.contains([',', '"', '\n']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field.clone() }
    };
    fields.iter().map(quoted).collect::<Vec<_>>().join(",") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_with_commas_are_quoted() {
        assert_eq!(csv_line(&["a".into(), "b,\"c\"".into()]), "a,\"b,\"\"c\"\"\"\n");
    }
}
