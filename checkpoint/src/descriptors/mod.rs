//! Open files to an image and back.

use serde::{Deserialize, Serialize};

/// All open files of a tree.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TreeDescriptors {}
