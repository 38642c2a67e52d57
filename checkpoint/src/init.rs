//! PID 1 of a job.

use std::process::ExitCode;

/// What `/proc/self/exe init` does. Never returns while the job lives.
pub fn main() -> ExitCode {
    ExitCode::FAILURE
}
