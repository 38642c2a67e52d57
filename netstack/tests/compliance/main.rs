//! What is required of a TCP, where the stack meets it, and which test would fail if it didn't.
//!
//! `make compliance` prints the report. The requirements of RFC 9293 are the rows of its own appendix B, read from
//! `specs/rfc9293.txt`; those of the other documents are listed in `specs/rfcN.toml`. Each needs a citation beside the code
//! and one inside a test, or a recorded reason. What a citation quotes must be what the document (or the list) says.

mod citations;
mod specification;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use citations::Citation;
use specification::{Document, Requirement};

/// Where a requirement is met and shown.
#[derive(Default)]
struct Cover<'a> {
    code: Vec<&'a Citation>,
    tests: Vec<&'a Citation>,
}

/// What is covered, as text, and what is missing.
struct Report {
    text: String,
    faults: Vec<String>,
}

fn judge(documents: &[Document], citations: &[Citation], mut faults: Vec<String>) -> Report {
    let mut covers: BTreeMap<(&str, String), Cover<'_>> = BTreeMap::new();
    for citation in citations {
        let Some(document) = documents.iter().find(|document| document.name == citation.document) else {
            faults.push(format!("{}: no list for {}", citation.place(), citation.document));
            continue;
        };
        match document.covered(&citation.section, &citation.quote) {
            Err(what) => faults.push(format!("{}: {what}: {}", citation.place(), citation.quote)),
            Ok(covered) => {
                for key in covered {
                    let cover = covers.entry((&document.name, key)).or_default();
                    if citation.test.is_some() { &mut cover.tests } else { &mut cover.code }.push(citation);
                }
            }
        }
    }
    let mut text = String::new();
    let mut totals = [0; 2];
    for document in documents {
        let mut counts = [0; 2];
        let mut body = String::new();
        for requirement in &document.requirements {
            let key = if requirement.section == "B" { &requirement.label } else { &requirement.text };
            let empty = Cover::default();
            let cover = covers.get(&(document.name.as_str(), key.clone())).unwrap_or(&empty);
            let excepted = requirement.reason.is_some();
            counts[usize::from(excepted)] += 1;
            describe(&mut body, requirement, cover);
            let missing = match (cover.code.is_empty(), cover.tests.is_empty()) {
                (false, false) if excepted && requirement.section != "B" => "an exception that isn't needed any more",
                _ if excepted => continue,
                (false, false) => continue,
                (true, true) => "neither code nor test",
                (true, false) => "a test, but no code",
                (false, true) => "code, but no test",
            };
            let Requirement { label, section, text, .. } = requirement;
            faults.push(format!("{} {section} {label}: {text}: {missing}", document.name));
        }
        let [met, excepted] = counts;
        totals = [totals[0] + met, totals[1] + excepted];
        let _ = writeln!(
            text,
            "{}: {}\n{} requirements: {met} met and tested, {excepted} with a recorded reason\n{body}",
            document.name,
            document.title,
            met + excepted
        );
    }
    let _ = writeln!(
        text,
        "all documents: {} met and tested, {} with a recorded reason, {} faults",
        totals[0],
        totals[1],
        faults.len()
    );
    Report { text, faults }
}

fn describe(body: &mut String, requirement: &Requirement, cover: &Cover<'_>) {
    let Requirement { label, section, text, level, reason } = requirement;
    let label = if label == level { format!("{section} {level}") } else { format!("{label} ({level})") };
    let _ = writeln!(body, "  {label}: {text}");
    for (what, places) in [("code", &cover.code), ("test", &cover.tests)] {
        for citation in places {
            let _ = writeln!(body, "      {what}: {}", citation.place());
        }
    }
    if let Some(reason) = reason {
        let _ = writeln!(body, "      exception: {reason}");
    }
}

fn report() -> Report {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (citations, mut faults) = citations::collect(root, &["src", "tests"]);
    let specs = root.join("specs");
    let mut names: Vec<String> = std::fs::read_dir(&specs)
        .expect("specs/ is there")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".toml").map(str::to_owned))
        .collect();
    names.sort_by_key(|name| (name != "rfc9293", name.trim_start_matches("rfc").parse::<u32>().unwrap_or(u32::MAX)));
    let documents: Vec<Document> = names.iter().filter_map(|name| Document::read(&specs, name, &mut faults)).collect();
    judge(&documents, &citations, faults)
}

#[test]
fn every_requirement_has_code_and_test_or_a_reason() {
    let Report { text, faults } = report();
    println!("{text}");
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

/// The report is worth nothing if a requirement could be lost on the way.
#[test]
fn appendix_b_is_read_whole() {
    let mut faults = Vec::new();
    let specs = Path::new(env!("CARGO_MANIFEST_DIR")).join("specs");
    let document = Document::read(&specs, "rfc9293", &mut faults).expect("specs/rfc9293.toml can be read");
    let rows = document.requirements.iter().filter(|row| row.section == "B");
    let mut musts: Vec<u32> =
        rows.filter_map(|row| row.label.strip_prefix("MUST-").and_then(|number| number.parse().ok())).collect();
    musts.sort_unstable();
    musts.dedup();
    // MUST-32 and its like are all there: 69 in all, none left out.
    assert_eq!(musts, (1..=69).collect::<Vec<u32>>());
}
