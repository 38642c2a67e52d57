//! What is done with bytes from outside, for a fuzzer to look for panics and broken promises.
//!
//! Each public function takes arbitrary bytes and panics if something is wrong. `libfuzzer/` (a crate of its own, for
//! nightly compilers) hands them to libFuzzer: `make fuzz`. `tests/corpus.rs` runs them on the kept corpus and on some
//! thousand mutations of it with every `make test`.

mod example;
mod frames;
mod images;
mod script;
mod traffic;

pub use frames::handoff;
pub use images::{checkpoint_image, stack_image};
pub use traffic::{fragments, options, packets};

/// What is done with bytes.
pub type Target = fn(&[u8]);

/// Every target by its name.
pub const TARGETS: [(&str, Target); 6] = [
    ("packets", packets),
    ("options", options),
    ("fragments", fragments),
    ("stack_image", stack_image),
    ("handoff", handoff),
    ("checkpoint_image", checkpoint_image),
];
