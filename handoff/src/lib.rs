//! The move of a job between two nodes as two state machines without I/O.
