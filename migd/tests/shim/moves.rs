//! A job that moves, and moves that are given up.
