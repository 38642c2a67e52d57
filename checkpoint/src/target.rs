//! A tree built anew from what a source sent.

use std::io;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;

use crate::error::{Error, Result};
use crate::external::ExternalKey;
use crate::image::TreeImage;
use crate::memory::Layout;
use crate::offer::Offer;
use crate::sandbox::Sandbox;

/// A tree under construction.
#[derive(Debug)]
pub struct Target {
    // ptrace belongs to a thread, so a target does too.
    thread_bound: PhantomData<*const ()>,
}

impl Target {
    /// Checks whether this machine can take the tree, and prepares to build it in an empty sandbox.
    pub fn create(_sandbox: &mut Sandbox, _offer: &Offer) -> Result<Target> {
        Err(Error::Gone)
    }

    /// Makes the address spaces as they are at the source now.
    pub fn layout(&mut self, _layout: Layout) -> Result<()> {
        Err(Error::Gone)
    }

    /// Fills in memory.
    pub fn pages(&mut self, _process: u32, _address: u64, _data: &[u8]) -> Result<()> {
        Err(Error::Gone)
    }

    /// Everything else; after it the tree is complete and stands still.
    pub fn restore(
        &mut self,
        _image: TreeImage,
        _externals: &mut dyn FnMut(ExternalKey) -> io::Result<OwnedFd>,
    ) -> Result<()> {
        Err(Error::Gone)
    }

    /// Lets the tree run. From here on its instructions execute.
    pub fn run(self) -> Result<()> {
        Err(Error::Gone)
    }
}
