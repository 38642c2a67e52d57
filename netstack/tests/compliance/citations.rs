//! Citations in the source: `//= URL#section-x`, then `//= type=test` beside a test, then the quote in lines of `//# `.
//!
//! The form is s2n-quic's, so that its tools can read it too.

use std::path::{Path, PathBuf};

/// Where a citation stands and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Citation {
    /// File, relative to the crate.
    pub file: PathBuf,
    pub line: usize,
    /// As in `rfc9293`.
    pub document: String,
    pub section: String,
    pub quote: String,
    /// The test that shows the requirement is met, if the citation stands beside a test.
    pub test: Option<String>,
}

impl Citation {
    /// The place as an editor takes it, with the test's name.
    pub fn place(&self) -> String {
        let at = format!("{}:{}", self.file.display(), self.line);
        match &self.test {
            Some(test) => format!("{at} {test}"),
            None => at,
        }
    }
}

/// All citations of the Rust files under `directories` of `root`, and what is wrong with some.
pub fn collect(root: &Path, directories: &[&str]) -> (Vec<Citation>, Vec<String>) {
    let mut files = Vec::new();
    for directory in directories {
        list(&root.join(directory), &mut files);
    }
    files.sort();
    let (mut citations, mut faults) = (Vec::new(), Vec::new());
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let name = file.strip_prefix(root).unwrap_or(&file);
        read(name, &text, &mut citations, &mut faults);
    }
    (citations, faults)
}

fn list(directory: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            // This tool's own examples are no citations.
            if path.file_name().is_none_or(|name| name != "compliance") {
                list(&path, files);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Reads the citations of one file.
pub fn read(file: &Path, text: &str, citations: &mut Vec<Citation>, faults: &mut Vec<String>) {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let mut at = 0;
    while at < lines.len() {
        let Some(target) = lines[at].strip_prefix("//= ").filter(|rest| rest.contains("://")) else {
            at += 1;
            continue;
        };
        let line = at + 1;
        let fault = |what: &str| format!("{}:{line}: {what}", file.display());
        at += 1;
        let is_test = lines.get(at) == Some(&"//= type=test");
        at += usize::from(is_test);
        let mut quote = Vec::new();
        while let Some(rest) = lines.get(at).and_then(|line| line.strip_prefix("//#")) {
            quote.push(rest.trim());
            at += 1;
        }
        let Some((document, section)) = target.rsplit('/').next().and_then(|last| last.split_once("#section-")) else {
            faults.push(fault("the citation names no section"));
            continue;
        };
        if quote.is_empty() {
            faults.push(fault("the citation quotes nothing"));
            continue;
        }
        let test = if is_test { test_at(&lines, at) } else { None };
        if is_test && test.is_none() {
            faults.push(fault("the citation says that it is a test's, but there is no test"));
            continue;
        }
        citations.push(Citation {
            file: file.to_path_buf(),
            line,
            document: document.into(),
            section: section.into(),
            quote: quote.join(" "),
            test,
        });
    }
}

/// The test that a citation ending before line `at` belongs to: the one that follows if attributes or other citations are
/// all that lies between, else the function around it if that is a test.
fn test_at(lines: &[&str], at: usize) -> Option<String> {
    let between = |line: &&&str| line.starts_with("//") || line.is_empty();
    let next = lines.iter().skip(at).find(|line| !between(line))?;
    if next.starts_with("#[test]") {
        return lines.iter().skip(at).find_map(|line| function_name(line));
    }
    let start = (0..at).rev().find(|&line| function_name(lines[line]).is_some())?;
    let is_test = lines[start.saturating_sub(4)..start].iter().rev().take_while(|line| !line.is_empty());
    is_test.into_iter().any(|line| line.starts_with("#[test]")).then(|| function_name(lines[start])).flatten()
}

fn function_name(line: &str) -> Option<String> {
    let rest = line.strip_prefix("pub ").unwrap_or(line).strip_prefix("fn ")?;
    Some(rest.split(|letter: char| !letter.is_alphanumeric() && letter != '_').next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = r"
//= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
//# the receiver MUST
//# check it (MUST-3)
fn code() {}

#[test]
fn checked() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# the receiver MUST check it (MUST-3)
    assert!(true);
}

//= https://www.rfc-editor.org/rfc/rfc9293#section-3.2
//= type=test
//# above
#[test]
fn named_below() {}

fn helper() {
    //= https://www.rfc-editor.org/rfc/rfc9293#section-3.1
    //= type=test
    //# not in a test
}
";

    #[test]
    fn citations_are_found_with_their_tests() {
        let (mut found, mut faults) = (Vec::new(), Vec::new());
        read(Path::new("x.rs"), SAMPLE, &mut found, &mut faults);
        let short: Vec<_> = found.iter().map(|one| (one.section.as_str(), one.test.as_deref())).collect();
        assert_eq!(short, [("3.1", None), ("3.1", Some("checked")), ("3.2", Some("named_below"))]);
        assert_eq!(found[0].quote, "the receiver MUST check it (MUST-3)");
        assert_eq!(faults.len(), 1, "a test's citation outside a test: {faults:?}");
    }
}
