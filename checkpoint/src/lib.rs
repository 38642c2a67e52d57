//! A process tree to an image and back, with live pre-copy of its memory.

pub mod memory;
