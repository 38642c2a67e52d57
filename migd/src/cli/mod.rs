//! The command line.

mod arguments;

use std::process::ExitCode;

use clap::Parser;

pub use arguments::{Arguments, Command};

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match dispatch(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("migd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: Arguments) -> anyhow::Result<ExitCode> {
    match arguments.command {
        Command::Daemon(args) => crate::daemon::main(args),
        Command::Shim(args) => crate::shim::main(args),
        Command::Lab(args) => crate::lab::main(args),
        Command::Demo(args) => crate::demo::main(args),
        Command::Bench(args) => crate::bench::main(args),
        other => anyhow::bail!("{other:?} is not part of this build"),
    }
}
