//! migd: moves running Linux servers between machines without dropping a connection.
