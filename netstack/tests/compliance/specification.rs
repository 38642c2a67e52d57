//! The requirements: read from the RFC's own text where it is in `specs/`, else from a list there.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

/// `specs/rfcN.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    title: String,
    /// Requirements in our own words, or in the document's where `specs/rfcN.txt` is there to check them against.
    #[serde(default)]
    requirement: Vec<Listed>,
    /// Requirements of appendix B whose label the text doesn't carry where it makes them.
    #[serde(default)]
    unlabelled: Vec<Unlabelled>,
    /// Requirements of appendix B that aren't met, or that can't be tested here.
    #[serde(default)]
    exception: Vec<Exception>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    section: String,
    level: String,
    text: String,
    /// Why it isn't met, or isn't tested.
    reason: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Unlabelled {
    id: String,
    section: String,
    text: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exception {
    id: String,
    /// The row, if only one of several with this label is meant.
    row: Option<String>,
    reason: String,
}

/// Something that must be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// `MUST-3`, or the level for those without labels.
    pub label: String,
    pub section: String,
    /// The row of the appendix, or the requirement itself.
    pub text: String,
    pub level: String,
    pub reason: Option<String>,
}

/// A document with its requirements.
#[derive(Debug)]
pub struct Document {
    pub name: String,
    pub title: String,
    pub requirements: Vec<Requirement>,
    /// Text of each section, without blanks; none if the text isn't in the repository.
    sections: Option<BTreeMap<String, String>>,
    unlabelled: Vec<Unlabelled>,
}

/// Without blanks, since RFCs break lines at hyphens and inside labels, and without the bars of boxed text.
fn squeeze(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_whitespace() && *letter != '|').collect()
}

impl Document {
    /// Reads `specs/NAME.toml` and, if it is there, `specs/NAME.txt`.
    pub fn read(specs: &Path, name: &str, faults: &mut Vec<String>) -> Option<Document> {
        let path = specs.join(name).with_extension("toml");
        let list = std::fs::read_to_string(&path).map_err(|error| error.to_string());
        let list: Result<List, String> = list.and_then(|text| toml::from_str(&text).map_err(|error| error.to_string()));
        let list = match list {
            Ok(list) => list,
            Err(error) => {
                faults.push(format!("{}: {error}", path.display()));
                return None;
            }
        };
        let text = std::fs::read_to_string(path.with_extension("txt")).ok();
        Some(Document::new(name, list, text.as_deref(), faults))
    }

    fn new(name: &str, list: List, text: Option<&str>, faults: &mut Vec<String>) -> Document {
        let sections = text.map(sections);
        let mut requirements = text.map_or(Vec::new(), appendix);
        for requirement in list.requirement {
            let Listed { section, level, text, reason } = requirement;
            if let Some(sections) = &sections
                && !sections.get(&section).is_some_and(|body| body.contains(&squeeze(&text)))
            {
                faults.push(format!("{name}: section {section} doesn't say: {text}"));
            }
            requirements.push(Requirement { label: level.clone(), section, text, level, reason });
        }
        for Exception { id, row, reason } in list.exception {
            let mut known = false;
            for requirement in &mut requirements {
                if requirement.label == id && row.as_ref().is_none_or(|row| *row == requirement.text) {
                    requirement.reason = Some(reason.clone());
                    known = true;
                }
            }
            if !known || reason.trim().is_empty() {
                faults.push(format!("{name}: an exception for {id} {row:?}, which isn't there, or without a reason"));
            }
        }
        Document { name: name.into(), title: list.title, requirements, sections, unlabelled: list.unlabelled }
    }

    /// The labels or texts of what a quote from `section` covers; an error if the document doesn't say that.
    pub fn covered(&self, section: &str, quote: &str) -> Result<Vec<String>, String> {
        let quote = squeeze(quote);
        if let Some(sections) = &self.sections {
            let body = sections.get(section).ok_or_else(|| format!("{} has no section {section}", self.name))?;
            if !body.contains(&quote) {
                return Err(format!("{}, section {section}, doesn't say that", self.name));
            }
        }
        let mut covered = labels(&quote);
        let unlabelled = self.unlabelled.iter().filter(|one| one.section == section && squeeze(&one.text) == quote);
        covered.extend(unlabelled.map(|one| one.id.clone()));
        let listed = self.requirements.iter().filter(|one| one.section == section && squeeze(&one.text) == quote);
        covered.extend(listed.map(|one| one.text.clone()));
        if covered.is_empty() {
            return Err(format!("{}, section {section}, has no requirement with this text", self.name));
        }
        Ok(covered)
    }
}

/// Each section's text without blanks, by its number.
fn sections(text: &str) -> BTreeMap<String, String> {
    let mut sections: BTreeMap<String, String> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some((number, _)) = line.split_once(".  ")
            && !number.is_empty()
            && number.split('.').all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
        {
            current = number.into();
        } else if line.starts_with("Appendix ") || line.starts_with("Acknowledgments") {
            current.clear();
        }
        if !current.is_empty() {
            sections.entry(current.clone()).or_default().push_str(&squeeze(line));
        }
    }
    sections
}

/// The labels in a text without blanks: a word in capitals, a hyphen, a number.
fn labels(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for kind in ["MUST-", "SHLD-", "MAY-", "REC-"] {
        for (at, _) in text.match_indices(kind) {
            let digits: String = text[at + kind.len()..].chars().take_while(char::is_ascii_digit).collect();
            if !digits.is_empty() {
                found.push(format!("{kind}{digits}"));
            }
        }
    }
    found
}

/// The rows of RFC 9293's appendix B: a table of seven columns, in which rows are ruled off and cells may have several
/// lines.
fn appendix(text: &str) -> Vec<Requirement> {
    let Some(start) = text.rfind("Appendix B.  TCP Requirement Summary") else {
        return Vec::new();
    };
    const LEVELS: [&str; 5] = ["MUST", "SHOULD", "MAY", "SHOULD NOT", "MUST NOT"];
    let mut rows = Vec::new();
    let mut cells: Vec<String> = Vec::new();
    for line in text[start..].lines().map(str::trim) {
        if line.starts_with("+-") || line.starts_with("+=") {
            if let [row, label, levels @ ..] = &cells[..]
                && !labels(label).is_empty()
            {
                let level = levels.iter().position(|cell| cell == "X").and_then(|at| LEVELS.get(at));
                rows.push(Requirement {
                    label: label.clone(),
                    section: "B".into(),
                    text: row.replace('*', "").trim().into(),
                    level: (*level.unwrap_or(&"?")).into(),
                    reason: None,
                });
            }
            cells.clear();
        } else if let Some(inner) = line.strip_prefix('|').and_then(|line| line.strip_suffix('|')) {
            let parts: Vec<&str> = inner.split('|').map(str::trim).collect();
            cells.resize(parts.len().max(cells.len()), String::new());
            for (cell, part) in cells.iter_mut().zip(parts).filter(|(_, part)| !part.is_empty()) {
                // Words are broken at hyphens only.
                if !cell.is_empty() && !cell.ends_with('-') {
                    cell.push(' ');
                }
                cell.push_str(part);
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "
3.1.  Header

   The receiver MUST check
   it (MUST-
   3).  And more.

3.2.  Other

   Words (MAY-2).

Appendix B.  TCP Requirement Summary

    +======+========+======+========+=====+========+======+
    | Some heading                                        |
    +======+========+======+========+=====+========+======+
    | *  Check | MUST-3 |  X   |        |     |        |      |
    | it       |        |      |        |     |        |      |
    +------+--------+------+--------+-----+--------+------+
    | Other| MAY-2  |      |        |  X  |        |      |
    +------+--------+------+--------+-----+--------+------+
";

    #[test]
    fn appendix_rows_and_quotes_are_read() {
        let list: List = toml::from_str("title = 't'\n[[exception]]\nid = 'MAY-2'\nreason = 'no'").unwrap();
        let mut faults = Vec::new();
        let document = Document::new("rfc1", list, Some(TEXT), &mut faults);
        assert!(faults.is_empty(), "{faults:?}");
        let rows: Vec<_> = document
            .requirements
            .iter()
            .map(|row| (row.label.as_str(), row.text.as_str(), row.level.as_str(), row.reason.is_some()))
            .collect();
        assert_eq!(rows, [("MUST-3", "Check it", "MUST", false), ("MAY-2", "Other", "MAY", true)]);
        assert_eq!(document.covered("3.1", "MUST check it (MUST-3)"), Ok(vec!["MUST-3".to_owned()]));
        assert!(document.covered("3.2", "MUST check it (MUST-3)").is_err(), "another section");
        assert!(document.covered("3.1", "MUST check it twice (MUST-3)").is_err(), "not the document's words");
        assert!(document.covered("3.1", "And more.").is_err(), "no requirement");
    }

    #[test]
    fn exceptions_must_be_for_something() {
        let list: List = toml::from_str("title = 't'\n[[exception]]\nid = 'MUST-9'\nreason = 'no'").unwrap();
        let mut faults = Vec::new();
        Document::new("rfc1", list, Some(TEXT), &mut faults);
        assert_eq!(faults.len(), 1);
    }
}
