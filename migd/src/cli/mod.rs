//! The command line.
//!
//! Standard output carries what was asked for and nothing else; what migd has to say itself goes to standard error.

mod addr;
mod arguments;
mod failure;
mod foreground;
mod jobs;
mod listing;
mod moving;
mod pcap;
mod sockets;
mod target;

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use clap::Parser;

pub use arguments::{Arguments, Command, Target};
pub(crate) use listing::{print, print_json};

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    // Process 1 of a job: before anything else, since it must stay small and have one thread.
    if std::env::args_os().nth(1).as_deref() == Some(OsStr::new("init")) {
        return checkpoint::init::main();
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        // Its other statuses are the job's.
        Err(error) if error.use_stderr() && is_run(std::env::args_os().skip(1)) => {
            // There is nobody else to tell.
            let _ = error.print();
            return ExitCode::from(failure::RUN);
        }
        Err(error) => error.exit(),
    };
    let failed = match arguments.command {
        Command::Run(_) => failure::RUN,
        _ => failure::GENERAL,
    };
    match dispatch(arguments) {
        Ok(code) => code,
        Err(error) => {
            failure::show(&error);
            failure::status(&error, failed)
        }
    }
}

/// Whether these arguments, which need not make sense otherwise, are meant for `migd run`.
fn is_run(mut arguments: impl Iterator<Item = OsString>) -> bool {
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            // With a value.
            Some("--socket" | "--node") => drop(arguments.next()),
            Some(option) if option.starts_with('-') => {}
            command => return command == Some("run"),
        }
    }
    false
}

fn dispatch(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { command, target } = arguments;
    match command {
        Command::Daemon(args) => crate::daemon::main(args),
        Command::Shim(args) => {
            // Nothing that is sent to the daemon's terminal or session is meant for the job.
            nix::unistd::setsid()?;
            crate::shim::main(args)
        }
        Command::Lab(args) => crate::lab::main(args),
        Command::Demo(args) => crate::demo::main(args),
        Command::Bench(args) => crate::bench::main(args),
        Command::Run(args) => block_on(foreground::run(&target, args)),
        Command::Logs(args) => block_on(foreground::logs(&target, args)),
        Command::Ps(args) => block_on(listing::ps(&target, args)),
        Command::Nodes(args) => block_on(listing::nodes(&target, args)),
        Command::Inspect(args) if args.sockets => block_on(sockets::list(&target, args)),
        Command::Pcap(args) => block_on(pcap::record(&target, args)),
        Command::Inspect(args) => block_on(jobs::inspect(&target, args)),
        Command::Kill(args) => block_on(jobs::kill(&target, args)),
        Command::Rm(args) => block_on(jobs::rm(&target, args)),
        Command::Addr(args) => block_on(addr::addr(&target, args)),
        Command::Cluster(args) => block_on(addr::cluster(&target, args)),
        Command::Move(args) => block_on(moving::move_job(&target, args)),
    }
}

fn block_on(future: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(future)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_is_recognised_whatever_else_is_wrong() {
        let is_run = |line: &str| is_run(line.split(' ').map(OsString::from));
        assert!(is_run("run") && is_run("--node A run --bad") && is_run("--socket=/x run -e"));
        assert!(!is_run("ps run") && !is_run("--node run ps") && !is_run("--node"));
    }
}
