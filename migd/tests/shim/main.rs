//! Shims of jobs, driven as the daemon drives them: two nodes in network namespaces of their own, joined by a cable, and a
//! directory of one record. Everything ends with the test, also when it fails: namespaces have no names, shims are killed,
//! and what they run dies with them.

mod harness;
mod life;
mod moves;
