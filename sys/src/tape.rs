//! System calls run by another process on our behalf.
