//! TCP/IP as a pure state machine: packets, time and entropy go in, packets and socket changes come out.
//!
//! The crate does no I/O and knows no process, descriptor, clock or thread. Every socket is plain data: a whole
//! [stack image](self) can be taken at any moment and continued elsewhere.
