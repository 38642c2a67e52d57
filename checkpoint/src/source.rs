//! A running tree that is to move: pre-copy, freeze, dump.

use std::marker::PhantomData;

use crate::error::{Error, Result};
use crate::external::External;
use crate::image::TreeImage;
use crate::memory::{MemorySink, RoundStats};
use crate::offer::Offer;
use crate::sandbox::Sandbox;
use crate::stay::StayReason;

/// A running tree that is to move.
#[derive(Debug)]
pub struct Source {
    // ptrace belongs to a thread, so a source does too.
    thread_bound: PhantomData<*const ()>,
}

impl Source {
    /// Takes hold of the tree in a sandbox; stops nothing.
    pub fn attach(_sandbox: &Sandbox) -> Result<Source> {
        Err(Error::Gone)
    }

    /// What keeps the tree here. Freezes nothing.
    pub fn stay_reasons(&mut self, _external: &dyn External) -> Result<Vec<StayReason>> {
        Err(Error::Gone)
    }

    /// What the tree needs of a target.
    pub fn offer(&mut self) -> Result<Offer> {
        Err(Error::Gone)
    }

    /// Starts to track which memory is written to. Each process stops for a moment.
    pub fn start_tracking(&mut self) -> Result<()> {
        Err(Error::Gone)
    }

    /// Sends what was written to since the last round (the first: everything), while the tree runs on.
    pub fn copy_round(&mut self, _sink: &mut dyn MemorySink) -> Result<RoundStats> {
        Err(Error::Gone)
    }

    /// Stops every thread.
    pub fn freeze(&mut self) -> Result<()> {
        Err(Error::Gone)
    }

    /// Dumps the frozen tree; memory that wasn't sent yet goes to the sink.
    pub fn dump(&mut self, _external: &dyn External, _sink: &mut dyn MemorySink) -> Result<TreeImage> {
        Err(Error::Gone)
    }

    /// Lets the tree run on as if nothing had been.
    pub fn resume(self) -> Result<()> {
        Ok(())
    }

    /// Kills the tree without a trace, after it runs elsewhere.
    pub fn discard(self) {}
}
