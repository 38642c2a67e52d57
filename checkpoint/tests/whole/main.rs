//! Whole processes: started, dumped, restored. Needs root.

mod ends;
mod files;
mod filters;
mod limits;
mod moves;
mod partial;
mod sandbox;
mod servers;
mod sessions;
mod shared;
mod support;
mod terminals;
mod timers;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("init") {
        return checkpoint::init::main();
    }
    let mut arguments = Arguments::from_args();
    // Every trial has processes of its own; on a small machine more at once only makes timing worse.
    arguments.test_threads.get_or_insert(2);
    let all = [
        sandbox::trials(),
        moves::trials(),
        servers::trials(),
        shared::trials(),
        ends::trials(),
        files::trials(),
        filters::trials(),
        limits::trials(),
        timers::trials(),
        sessions::trials(),
        terminals::trials(),
        partial::trials(),
    ];
    let trials: Vec<Trial> = all.into_iter().flatten().collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
