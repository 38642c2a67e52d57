//! Packets received into memory whose pages are lent to the program's end of a socket, so that the bulk of a stream is copied
//! once on its way from the TUN device and not a second time into the pair.
//!
//! A packet is read into a *slot*, so that its payload begins at a page's border. Some are read before the first of them is
//! taken in: what they bring then reaches a program in quick succession, and wakes it once. A slot whose payload a pair has queued is on
//! *loan* until the program has read it; then it serves the next packet, still in the processor's cache. The kernel says how
//! much a program hasn't read, which bounds from below what it has. When that can't be asked any more (our end is closed) or
//! says too little (the program has spliced pages away, see `Bridge::spliced`), the slot gets new pages instead.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

use sys::lend::{Lane, PAGE, Pages};
use sys::tun;

/// Slots of a job: what eight streams can have on its way in their pairs. Memory is taken as slots come into use.
const SLOTS: usize = 128;
/// Packets read before they are taken in.
pub(super) const BATCH: usize = 8;
/// Pages for the headers, and for the longest payload.
const SLOT_PAGES: usize = 1 + 16;
/// Pages that a payload can lie on, at whatever place it begins.
const LANE_PAGES: usize = 32;
/// Payloads below this are copied, which is faster than handling their pages.
const PAYLOAD_MIN: usize = 16 << 10;
/// IPv4, TCP and time stamps.
const HEADERS_DEFAULT: usize = 20 + 20 + 12;
/// The longest headers that are reckoned with.
const HEADERS_MAX: usize = 40 + 60;

/// Slots by what can be done with them.
#[derive(Debug)]
struct Shelf {
    /// Free, the last one used last.
    free: Vec<usize>,
    /// Somebody may still read their pages.
    stale: Vec<usize>,
}

/// A slot that a pair has in its queue.
#[derive(Debug)]
pub(super) struct Loan {
    slot: usize,
    shelf: Rc<RefCell<Shelf>>,
    settled: bool,
    /// Where its bytes end, counted in all bytes ever written into the pair.
    pub(super) end: u64,
}

impl Loan {
    /// Gives the slot back: all of it has been read.
    pub(super) fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let mut shelf = self.shelf.borrow_mut();
        if self.settled { shelf.free.push(self.slot) } else { shelf.stale.push(self.slot) }
    }
}

/// Where packets are received.
pub(super) struct Slots {
    pages: Pages,
    desk: Desk,
    batch: [Place; BATCH],
}

/// One packet of a batch.
#[derive(Clone, Copy)]
struct Place {
    slot: usize,
    /// Where in its slot the packet begins.
    start: usize,
    length: usize,
}

/// Lends the slot with the present packet.
pub(super) struct Desk {
    shelf: Rc<RefCell<Shelf>>,
    /// `None` when it couldn't be made, or pages not be renewed: nothing is lent.
    lane: Option<Lane>,
    /// The slot with the present packet.
    current: usize,
    /// Length of the headers of packets with much payload.
    headers: Cell<usize>,
    lent: Cell<bool>,
}

impl Slots {
    pub(super) fn new() -> io::Result<Slots> {
        let shelf = Shelf { free: (BATCH..SLOTS).rev().collect(), stale: Vec::new() };
        let shelf = Rc::new(RefCell::new(shelf));
        let lane = Lane::new(LANE_PAGES).map_err(|error| {
            tracing::warn!(%error, "can't make a pipe to lend received bytes; they are copied");
        });
        let lane = lane.ok();
        let (headers, lent) = (Cell::new(HEADERS_DEFAULT), Cell::new(false));
        let desk = Desk { shelf, lane, current: 0, headers, lent };
        let batch = std::array::from_fn(|slot| Place { slot, start: 0, length: 0 });
        Ok(Slots { pages: Pages::new(SLOTS * SLOT_PAGES)?, desk, batch })
    }

    /// Where to read the packet of a batch that has this place, with its virtio-net header.
    pub(super) fn buffer(&mut self, place: usize) -> &mut [u8] {
        let place = &mut self.batch[place];
        place.start = PAGE - tun::HEADER_LEN - self.desk.headers.get();
        &mut self.pages.bytes_mut(pages_of(place.slot))[place.start..]
    }

    /// How many bytes [`Slots::buffer`] got.
    pub(super) fn set_length(&mut self, place: usize, length: usize) {
        self.batch[place].length = length;
    }

    /// These bytes, and the desk that can lend them.
    pub(super) fn packet(&mut self, place: usize) -> (&[u8], &Desk) {
        let Place { slot, start, length } = self.batch[place];
        self.desk.current = slot;
        (&self.pages.bytes(pages_of(slot))[start..][..length], &self.desk)
    }

    /// The packet has been taken in. If it was lent, its place gets another slot.
    pub(super) fn advance(&mut self, place: usize) {
        if !self.desk.lent.replace(false) {
            return;
        }
        let mut shelf = self.desk.shelf.borrow_mut();
        if let Some(slot) = shelf.free.pop() {
            self.batch[place].slot = slot;
            return;
        }
        let slot = shelf.stale.pop().expect("a slot is lent only when there is another one");
        drop(shelf);
        self.batch[place].slot = slot;
        if let Err(error) = self.pages.renew(pages_of(slot)).or_else(|_| self.replace_pages()) {
            tracing::error!(%error, "can't renew the pages of a receive buffer; received bytes are copied from now on");
            self.desk.lane = None;
        }
    }

    /// New pages for all slots, whoever has the old ones. The rest of the batch is lost with those, as if on its way.
    fn replace_pages(&mut self) -> io::Result<()> {
        self.pages = Pages::new(SLOTS * SLOT_PAGES)?;
        Ok(())
    }

    /// Whether slots are running short, so that it pays to look for what has been read meanwhile.
    pub(super) fn is_short(&self) -> bool {
        self.desk.shelf.borrow().free.is_empty()
    }
}

impl Desk {
    /// Whether a payload is large enough to be lent.
    pub(super) fn pays(payload: &[u8]) -> bool {
        payload.len() >= PAYLOAD_MIN
    }

    /// Has `end` queue `payload`, the end of the present packet of `length` bytes, without a copy. `None` when it has to be
    /// copied.
    pub(super) fn lend(&self, end: BorrowedFd<'_>, payload: &[u8], length: usize) -> Option<io::Result<(usize, Loan)>> {
        let lane = self.lane.as_ref().filter(|lane| Desk::pays(payload) && !self.lent.get() && !lane.is_blocked())?;
        // So that the next one's payload begins at a page's border.
        let headers = length.saturating_sub(payload.len());
        if headers <= HEADERS_MAX {
            self.headers.set(headers);
        }
        let shelf = self.shelf.borrow();
        if shelf.free.is_empty() && shelf.stale.is_empty() {
            return None;
        }
        Some(lane.lend(end, payload).map(|count| {
            self.lent.set(true);
            (count, Loan { slot: self.current, shelf: Rc::clone(&self.shelf), settled: false, end: 0 })
        }))
    }
}

fn pages_of(slot: usize) -> Range<usize> {
    slot * SLOT_PAGES..(slot + 1) * SLOT_PAGES
}
