//! Cluster-wide unique addresses and the directory that says who owns them.
