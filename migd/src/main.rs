//! The one binary.

fn main() -> std::process::ExitCode {
    migd::cli::main()
}
