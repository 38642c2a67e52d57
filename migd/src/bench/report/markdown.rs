//! A page of Markdown with the pictures in a folder beside it.

use std::fmt::Write as _;

use super::{Section, Table};

/// The whole page.
pub(super) fn page(title: &str, head: &str, pictures: &str, sections: &[Section]) -> String {
    let mut out = format!("# {title}\n\n{head}\n");
    for section in sections {
        let _ = write!(out, "\n## {}\n\n{}\n", section.title, section.intro);
        for chart in &section.charts {
            let _ = write!(out, "\n![{}]({pictures}/{}.svg)\n", chart.caption, chart.name);
        }
        section.tables.iter().for_each(|one| table(&mut out, one));
        if !section.notes.is_empty() {
            out.push('\n');
            for note in &section.notes {
                let _ = writeln!(out, "- {note}");
            }
        }
    }
    out
}

fn table(out: &mut String, table: &Table) {
    let line = |cells: &[String]| {
        let cells: Vec<_> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule = |index| if index < table.words { "---".to_owned() } else { "---:".to_owned() };
    let rules: Vec<String> = (0..table.header.len()).map(rule).collect();
    let rows: String = table.rows.iter().map(|row| line(row)).collect();
    let _ = write!(out, "\n**{}**\n\n{}{}{rows}", table.title, line(&table.header), line(&rules));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_those_of_markdown() {
        let table = Table {
            title: "T".into(),
            header: vec!["a".into(), "b".into()],
            rows: vec![vec!["x|y".into(), "1".into()]],
            words: 1,
        };
        let section = Section { title: "One".into(), intro: "Done.".into(), tables: vec![table], ..Section::default() };
        let page = page("R", "head", "pictures", &[section]);
        assert_eq!(page, "# R\n\nhead\n\n## One\n\nDone.\n\n**T**\n\n| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n");
    }
}
