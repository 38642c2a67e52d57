//! Counting what passes a member's uplink, while it passes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use sys::capture::{Capture, Sieve};
use sys::netlink::Netlink;
use sys::netns::NetNamespace;

/// How often waiting frames are taken.
const POLL: Duration = Duration::from_millis(2);
/// How much of a frame is looked at.
const HEAD: usize = 96;
/// How many frames are kept to be shown.
const KEPT: usize = 16;

/// What passed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Passed {
    /// Frames.
    pub frames: u64,
    /// Their bytes, link headers included.
    pub bytes: u64,
    /// The beginnings of the first few.
    pub samples: Vec<Vec<u8>>,
    /// Frames that passed but were not seen, because too many came at once.
    pub lost: u32,
}

/// A count that goes on until it is asked for.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<Passed>>,
}

impl Watch {
    /// Starts counting on the uplink (`eth0`) of a namespace; what passes from the return on is counted.
    ///
    /// # Errors
    /// When there is no such device or no privilege.
    pub fn start(namespace: &NetNamespace, sieve: Sieve) -> io::Result<Watch> {
        let capture = namespace.run(|| Capture::open(Netlink::open()?.link("eth0")?.index, sieve))?;
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut passed = Passed::default();
            loop {
                // Read before the queue is emptied, so that what came before the stop is counted.
                let last = flag.load(Ordering::Acquire);
                let mut head = [0; HEAD];
                while let Some(length) = capture.next(&mut head)? {
                    passed.frames += 1;
                    passed.bytes += u64::try_from(length).unwrap_or(u64::MAX);
                    if passed.samples.len() < KEPT {
                        passed.samples.push(head[..length.min(HEAD)].to_vec());
                    }
                }
                if last {
                    passed.lost = capture.lost()?;
                    return Ok(passed);
                }
                std::thread::sleep(POLL);
            }
        });
        Ok(Watch { stop, thread })
    }

    /// Ends the count.
    ///
    /// # Errors
    /// When the device went away meanwhile.
    ///
    /// # Panics
    /// When the counting thread did.
    pub fn stop(self) -> io::Result<Passed> {
        self.stop.store(true, Ordering::Release);
        match self.thread.join() {
            Ok(passed) => passed,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
