//! Namespaces and mounts.
