//! The same raw packets to a program with the kernel's TCP and to one with ours: the answers must be the same.
//!
//! Each case is a connection of its own, so that limits on answers to nonsense don't carry over. The kernel goes first;
//! what it answered is waited for from ours. Every difference is a failure unless netstack/specs/linux.md records it with a
//! reason, and what is recorded there must still be so.

mod case;
mod cases;
mod packet;
mod rig;

use std::collections::BTreeSet;

use case::{Case, Step};
use rig::{Family, Rig, Stack};

/// Rows of the table of differences: case, step, the kernel's answers, ours.
const RECORDED: &str = include_str!("../../../netstack/specs/linux.md");

fn run(rig: &mut Rig, expected: Option<&[Vec<Step>]>) -> Vec<Vec<Step>> {
    let mut transcripts = Vec::new();
    let recorded = recorded();
    for (index, (name, script)) in cases::all().into_iter().enumerate() {
        let number = u16::try_from(index).expect("few cases");
        let expected = expected.map(|all| all[index].iter().map(|step| expectation(name, step, &recorded)).collect());
        rig.choose_client(number);
        let mut case = Case::new(rig, (20_000 + number, 7000 + number), expected);
        script(&mut case);
        transcripts.push(case.end());
    }
    transcripts
}

/// The recorded differences as (case and step, kernel, ours).
fn recorded() -> Vec<[String; 3]> {
    let rows = RECORDED.lines().filter_map(|line| line.strip_prefix('|')?.strip_suffix('|'));
    let cells = rows.map(|row| row.split('|').map(|cell| cell.trim().replace('`', "")).collect::<Vec<_>>());
    cells
        .filter(|cells| cells.len() == 5 && cells[0] != "case" && !cells[0].starts_with('-'))
        .map(|cells| [format!("{}: {}", cells[0], cells[1]), cells[2].clone(), cells[3].clone()])
        .collect()
}

/// How many answers are to be waited for, when the kernel gave these: as many, unless ours are known to differ.
fn expectation(name: &str, kernel: &Step, recorded: &[[String; 3]]) -> usize {
    let (step, said) = said(kernel);
    let row = recorded.iter().find(|row| row[0] == format!("{name}: {step}") && row[1] == said);
    match row {
        None => kernel.answers.len(),
        Some([_, _, ours]) => {
            let packets = ours.split_once("; ").map_or(ours.as_str(), |(_, packets)| packets);
            if packets == "nothing" { 0 } else { packets.split(", ").count() }
        }
    }
}

/// What a step showed: its name without what the program answered, and that with the packets.
fn said(step: &Step) -> (String, String) {
    let packets = if step.answers.is_empty() { "nothing".to_owned() } else { step.answers.join(", ") };
    match step.what.split_once(": ") {
        None => (step.what.clone(), packets),
        Some((command, answer)) => (command.to_owned(), format!("{answer}; {packets}")),
    }
}

/// What differs between the two, or is recorded and no longer does.
fn differences(family: Family) -> BTreeSet<String> {
    let kernel = run(&mut Rig::new(Stack::Kernel, family), None);
    let ours = run(&mut Rig::new(Stack::Ours, family), Some(&kernel));
    let mut unseen = recorded();
    let known = unseen.clone();
    let mut found = BTreeSet::new();
    for ((name, _), (kernel, ours)) in cases::all().into_iter().zip(kernel.iter().zip(&ours)) {
        assert_eq!(kernel.len(), ours.len(), "{name}: as many steps");
        for (kernel, ours) in kernel.iter().zip(ours).filter(|(kernel, ours)| kernel != ours) {
            let ((step, kernel), (_, ours)) = (said(kernel), said(ours));
            let row = [format!("{name}: {step}"), kernel, ours];
            unseen.retain(|seen| *seen != row);
            if !known.contains(&row) {
                let [step, kernel, ours] = row;
                found.insert(format!("{step}\n    kernel: {kernel}\n    ours:   {ours}"));
            }
        }
    }
    found.extend(
        unseen.into_iter().map(|[step, ..]| format!("{step}: recorded in netstack/specs/linux.md, but no longer so")),
    );
    found
}

/// On a busy machine a timer may come between two packets on one side and not on the other. What differs by that differs in
/// another place the next time.
fn compare(family: Family) {
    const ATTEMPTS: usize = 3;
    let mut lasting = differences(family);
    for _ in 1..ATTEMPTS {
        if lasting.is_empty() {
            return;
        }
        let again = differences(family);
        lasting.retain(|difference| again.contains(difference));
    }
    let report: Vec<String> = lasting.into_iter().collect();
    assert!(report.is_empty(), "{family:?}: the answers differ\n{}", report.join("\n"));
}

#[test]
#[ignore = "needs a machine that isn't too busy: make differential"]
fn raw_packets_are_answered_as_by_linux_over_ipv4() {
    compare(Family::V4);
}

#[test]
#[ignore = "needs a machine that isn't too busy: make differential"]
fn raw_packets_are_answered_as_by_linux_over_ipv6() {
    compare(Family::V6);
}
