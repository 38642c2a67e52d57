//! What /proc tells of a process.
