//! Processor time spent: by the whole machine, and by what runs on one node of the lab.

use std::fs;

use sys::netns::{NamespaceId, of_process};

/// Ticks a second in `/proc/stat` (USER_HZ, fixed on x86-64).
const TICKS: f64 = 100.0;

/// Seconds in which the machine's processors were busy since its start: user, system, interrupts and softirqs, in
/// steps of a hundredth. Meaningful on a machine that does nothing else.
pub(super) fn machine_s() -> f64 {
    busy_s(&fs::read_to_string("/proc/stat").unwrap_or_default())
}

fn busy_s(stat: &str) -> f64 {
    let line = stat.lines().next().unwrap_or_default();
    let fields: Vec<f64> = line.split_ascii_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq
    [0, 1, 2, 5, 6].iter().filter_map(|&at| fields.get(at)).sum::<f64>() / TICKS
}

/// Seconds that the processes in a network namespace have run since they were started. Of a node of the lab these are its
/// daemon and its shims, and plain servers; jobs have namespaces of their own. Softirq work counts where it happened
/// to be done.
pub(super) fn processes_s(namespace: NamespaceId) -> f64 {
    let Ok(entries) = fs::read_dir("/proc") else { return 0.0 };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let ours = pids.filter(|&pid| of_process(pid).is_ok_and(|found| found == namespace));
    ours.map(process_s).sum()
}

/// By the scheduler's account of each thread: nanoseconds on a processor come first.
fn process_s(pid: u32) -> f64 {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0.0 };
    let texts = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok());
    texts.filter_map(|text| text.split_ascii_whitespace().next()?.parse::<f64>().ok()).sum::<f64>() / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_leaves_idling_out() {
        let stat = "cpu  100 20 300 4000 50 6 70 8 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n";
        assert!((busy_s(stat) - 4.96).abs() < 1e-9);
        assert_eq!(busy_s(""), 0.0);
    }

    #[test]
    fn a_running_process_has_spent_time() {
        let own = sys::netns::NetNamespace::current().and_then(|namespace| namespace.id()).expect("/proc is there");
        assert!(processes_s(own) > 0.0);
    }
}
