//! The net plane of a job: packet pump and bridge.
