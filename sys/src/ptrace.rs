//! Tracing threads (ptrace(2)).
