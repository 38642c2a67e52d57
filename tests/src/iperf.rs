//! What a client's iperf3 says of a run during which the server was moved.

use std::process::Output;

use crate::fixture::Fixture;

/// Shortest run that is long enough to be judged, in whole seconds.
const SECONDS: usize = 5;

/// The run of `iperf3 -J` that ended with this output went on all the time: bytes arrived in each of its seconds.
///
/// # Panics
/// When it didn't, with what client and server wrote.
pub fn must_have_flowed(output: &Output, fixture: &Fixture, reverse: bool) {
    let text = String::from_utf8_lossy(&output.stdout);
    let result: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let received = result["end"]["sum_received"]["bytes"].as_f64().unwrap_or(0.0);
    assert!(
        output.status.success() && result["error"].is_null() && received > 1e6,
        "reverse {reverse}: {} {received} bytes: {}\n{}",
        output.status,
        result["error"],
        fixture.logs("A", "iperf")
    );
    // A second without any byte would be a stall that no move may cause.
    let intervals = result["intervals"].as_array().cloned().unwrap_or_default();
    assert!(intervals.len() >= SECONDS, "{intervals:?}");
    for interval in intervals {
        assert!(interval["sum"]["bytes"].as_f64().unwrap_or(0.0) > 0.0, "reverse {reverse}: {interval}");
    }
}
