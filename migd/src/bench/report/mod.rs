//! Reports: what results look like outside of a terminal, as one HTML page without outside assets, as Markdown, and as pictures.

mod html;
mod markdown;

use std::path::Path;

use anyhow::Context;

use super::chart::{Chart, Painter};
pub(super) use html::page;

/// A part of a report.
#[derive(Debug, Clone, Default)]
pub(super) struct Section {
    pub(super) title: String,
    /// What was done, in plain sentences.
    pub(super) intro: String,
    pub(super) charts: Vec<Chart>,
    pub(super) tables: Vec<Table>,
    /// What is to be known about the figures.
    pub(super) notes: Vec<String>,
}

/// A table; the cells of all but the first columns are figures.
#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    pub(super) title: String,
    pub(super) header: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
    /// How many columns on the left are words.
    pub(super) words: usize,
}

/// Writes `report.html` and every chart as SVG and PNG into a directory.
pub(super) fn write(directory: &Path, title: &str, machine: &str, sections: &[Section]) -> anyhow::Result<()> {
    pictures(directory, sections)?;
    save(&directory.join("report.html"), page(title, machine, sections).as_bytes())
}

/// Writes a Markdown page beside a folder of pictures.
pub(super) fn write_markdown(
    page: &Path,
    pictures_in: &str,
    title: &str,
    head: &str,
    sections: &[Section],
) -> anyhow::Result<()> {
    let directory = page.parent().context("the page has no directory")?;
    pictures(&directory.join(pictures_in), sections)?;
    save(page, markdown::page(title, head, pictures_in, sections).as_bytes())
}

fn pictures(directory: &Path, sections: &[Section]) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory).with_context(|| format!("can't make {}", directory.display()))?;
    let painter = Painter::new();
    if let Err(error) = &painter {
        eprintln!("migd: the pictures are written as SVG only: {error:#}");
    }
    for chart in sections.iter().flat_map(|section| &section.charts) {
        save(&directory.join(format!("{}.svg", chart.name)), chart.svg.as_bytes())?;
        if let Ok(painter) = &painter {
            save(&directory.join(format!("{}.png", chart.name)), &painter.png(&chart.svg)?)?;
        }
    }
    Ok(())
}

/// Writes a file.
pub(super) fn save(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    std::fs::write(path, bytes).with_context(|| format!("can't write {}", path.display()))
}
