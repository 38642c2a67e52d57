//! One page of HTML with its style and its pictures inside.

use std::fmt::Write as _;

use super::{Section, Table};
use crate::bench::chart::escape;

const STYLE: &str = "\
body{font:15px/1.5 'DejaVu Sans',Verdana,Helvetica,sans-serif;color:#1f2933;background:#f6f7f9;margin:0}\
main{max-width:1010px;margin:0 auto;padding:28px 24px 60px}\
h1{font-size:25px;margin:0 0 6px}h2{font-size:19px;margin:44px 0 6px}h3{font-size:14px;margin:22px 0 6px}\
p{margin:6px 0 12px}.machine,figcaption,li{color:#55606c;font-size:13px}\
figure{margin:16px 0;background:#fff;border:1px solid #e3e7eb;border-radius:6px;padding:12px;overflow-x:auto}\
figure svg{max-width:100%;height:auto;display:block;margin:0 auto}figcaption{margin-top:8px}\
.table{overflow-x:auto}table{border-collapse:collapse;background:#fff;font-size:13px;width:100%}\
th,td{padding:5px 10px;border-bottom:1px solid #e3e7eb;text-align:right;font-variant-numeric:tabular-nums}\
th.w,td.w{text-align:left}th{background:#eef1f4;font-weight:600}tr:last-child td{border-bottom:0}";

/// The whole page.
pub(in crate::bench) fn page(title: &str, machine: &str, sections: &[Section]) -> String {
    let mut out = String::new();
    let title = escape(title);
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\"><title>{title}</title>\n<style>{STYLE}</style></head>\n<body><main>\n\
         <h1>{title}</h1>\n<p class=\"machine\">{}</p>\n",
        escape(machine)
    );
    for section in sections {
        let _ = write!(out, "<h2>{}</h2>\n<p>{}</p>\n", escape(&section.title), escape(&section.intro));
        for chart in &section.charts {
            let caption = escape(&chart.caption);
            let _ = write!(out, "<figure>\n{}<figcaption>{caption}</figcaption></figure>\n", chart.svg);
        }
        section.tables.iter().for_each(|one| table(&mut out, one));
        if !section.notes.is_empty() {
            let items: String = section.notes.iter().map(|note| format!("<li>{}</li>\n", escape(note))).collect();
            let _ = write!(out, "<ul>\n{items}</ul>\n");
        }
    }
    out + "</main></body></html>\n"
}

fn table(out: &mut String, table: &Table) {
    let cells = |kind: &str, row: &[String]| -> String {
        let cell = |(index, text): (usize, &String)| {
            let class = if index < table.words { " class=\"w\"" } else { "" };
            format!("<{kind}{class}>{}</{kind}>", escape(text))
        };
        row.iter().enumerate().map(cell).collect()
    };
    let rows: String = table.rows.iter().map(|row| format!("<tr>{}</tr>\n", cells("td", row))).collect();
    let _ = write!(
        out,
        "<h3>{}</h3>\n<div class=\"table\"><table><tr>{}</tr>\n{rows}</table></div>\n",
        escape(&table.title),
        cells("th", &table.header)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_needs_nothing_from_outside() {
        let table = Table {
            title: "a & b".into(),
            header: vec!["stack".into(), "median".into()],
            rows: vec![vec!["<x>".into(), "1".into()]],
            words: 1,
        };
        let section = Section { title: "One".into(), tables: vec![table], ..Section::default() };
        let page = page("Results", "a machine", &[section]);
        assert!(page.contains("<td class=\"w\">&lt;x&gt;</td><td>1</td>"), "{page}");
        assert!(!page.contains("src=") && !page.contains("href="), "{page}");
    }
}
