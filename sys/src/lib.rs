//! The kernel interfaces migd needs, behind safe wrappers. The only crate of the workspace with `unsafe`.
