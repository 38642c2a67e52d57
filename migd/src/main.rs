//! The `migd` command.

fn main() {}
