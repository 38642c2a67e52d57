//! From SVG to PNG, by `rsvg-convert` of librsvg: drawing text takes more code than all of migd has, and only whoever
//! regenerates the results needs it.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::Context;

/// Pixels of the PNG for each of the SVG's: readable on screens of any density.
const SCALE: &str = "2";
const PROGRAM: &str = "rsvg-convert";

/// Draws pictures with the system's fonts.
pub(in crate::bench) struct Painter(());

impl Painter {
    /// Looks for the program.
    ///
    /// # Errors
    /// When it is not installed.
    pub(in crate::bench) fn new() -> anyhow::Result<Painter> {
        let version = Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).status();
        version
            .with_context(|| format!("{PROGRAM} is not there; install it (Debian: apt-get install librsvg2-bin)"))?;
        Ok(Painter(()))
    }

    /// Draws one.
    pub(in crate::bench) fn png(&self, svg: &str) -> anyhow::Result<Vec<u8>> {
        let mut command = Command::new(PROGRAM);
        command.args(["--format=png", "--zoom", SCALE]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("can't start {PROGRAM}"))?;
        let mut input = child.stdin.take().context("it was asked for a pipe")?;
        // The picture is written only after the whole text was read, so neither side waits for the other.
        let written = input.write_all(svg.as_bytes());
        drop(input);
        let output = child.wait_with_output()?;
        anyhow::ensure!(output.status.success(), "{PROGRAM} refuses a chart: {}", output.status);
        written?;
        Ok(output.stdout)
    }
}
