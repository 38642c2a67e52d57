//! Making processes.
