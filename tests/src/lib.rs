//! Helpers of the whole-system tests: labs that go away with the test, loads that verify what they get, and the programs
//! that are moved.
//!
//! The tests need root, and a `migd` to test: `MIGD_BINARY` names it, otherwise the one built beside the tests is taken.

pub mod counter;
pub mod datagrams;
pub mod fixture;
pub mod iperf;
pub mod load;
pub mod pattern;
pub mod processes;
pub mod programs;
pub mod remote;
pub mod wire;

pub use fixture::Fixture;
pub use load::Load;
