//! What the filler asks of the stub processes at the target: system calls in them.

use std::io;
use std::os::fd::BorrowedFd;

use sys::Pid;

/// Runs system calls inside stubs.
pub trait Stubs {
    /// The stub's number for us.
    fn pid(&self, process: u32) -> Option<Pid>;

    /// Runs the calls one after the other, also after one that failed, and returns what each returned (`-errno` for a
    /// failure).
    ///
    /// # Errors
    /// The stub can't run calls.
    fn run(&mut self, process: u32, batch: &Batch) -> io::Result<Vec<i64>>;

    /// Duplicates a descriptor of ours into the stub and returns its number there. The filler closes it with the next batch.
    ///
    /// # Errors
    /// The stub can't take it.
    fn import(&mut self, process: u32, descriptor: BorrowedFd<'_>) -> io::Result<u64>;
}

/// System calls to be run in a row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// The calls.
    pub calls: Vec<Call>,
    /// Bytes that arguments point to; [`Argument::Data`] is an offset in here.
    pub data: Vec<u8>,
}

/// The most calls in a batch of the filler.
pub const MAX_CALLS: usize = 128;
/// The most data of a batch of the filler, in bytes.
pub const MAX_DATA: usize = 16 << 10;

/// One system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Its number on x86-64.
    pub number: i64,
    /// Its arguments.
    pub arguments: [Argument; 6],
}

/// An argument of a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Argument {
    /// A number.
    Value(u64),
    /// What an earlier call of the batch returned.
    Result(usize),
    /// The address in the stub of this offset in [`Batch::data`].
    Data(usize),
}

/// What to make of a call's result.
#[derive(Debug, Clone)]
enum Check {
    /// A failure ends the move.
    Succeeds(String),
    /// It must return this.
    Returns(u64, String),
    /// A failure doesn't matter.
    Any,
}

/// Collects calls and runs them in batches of a bounded size.
pub(super) struct Script<'a> {
    stubs: &'a mut dyn Stubs,
    process: u32,
    batch: Batch,
    checks: Vec<Check>,
}

impl<'a> Script<'a> {
    pub fn new(stubs: &'a mut dyn Stubs, process: u32) -> Script<'a> {
        Script { stubs, process, batch: Batch::default(), checks: Vec::new() }
    }

    /// Makes room for a group of calls that refer to each other.
    pub fn begin(&mut self, calls: usize, data: usize) -> io::Result<()> {
        if self.batch.calls.len() + calls > MAX_CALLS || self.batch.data.len() + data > MAX_DATA {
            self.run()?;
        }
        Ok(())
    }

    /// A call that must succeed; `what` is said when it doesn't.
    pub fn call(&mut self, number: i64, arguments: [Argument; 6], what: impl Into<String>) -> Argument {
        self.push(number, arguments, Check::Succeeds(what.into()))
    }

    /// A call that must return this.
    pub fn call_expecting(&mut self, number: i64, arguments: [Argument; 6], expected: u64, what: impl Into<String>) {
        self.push(number, arguments, Check::Returns(expected, what.into()));
    }

    /// A call that may fail.
    pub fn attempt(&mut self, number: i64, arguments: [Argument; 6]) -> Argument {
        self.push(number, arguments, Check::Any)
    }

    /// A terminated string for a call to point to.
    pub fn string(&mut self, bytes: &[u8]) -> Argument {
        let at = self.batch.data.len();
        self.batch.data.extend_from_slice(bytes);
        self.batch.data.push(0);
        Argument::Data(at)
    }

    /// Duplicates a descriptor into the stub; see [`Stubs::import`].
    pub fn import(&mut self, descriptor: BorrowedFd<'_>) -> io::Result<Argument> {
        Ok(Argument::Value(self.stubs.import(self.process, descriptor)?))
    }

    /// Runs what has been collected.
    pub fn run(&mut self) -> io::Result<()> {
        if self.batch.calls.is_empty() {
            return Ok(());
        }
        let results = self.stubs.run(self.process, &self.batch)?;
        for (check, result) in self.checks.iter().zip(&results) {
            let failed = match check {
                Check::Succeeds(what) => (*result < 0).then_some(what),
                Check::Returns(expected, what) => (u64::try_from(*result) != Ok(*expected)).then_some(what),
                Check::Any => None,
            };
            if let Some(what) = failed {
                let error = match i32::try_from(-result) {
                    Ok(code) if code > 0 => io::Error::from_raw_os_error(code),
                    _ => io::Error::other(format!("unexpected result {result:x}")),
                };
                return Err(io::Error::new(error.kind(), format!("process {}: {what}: {error}", self.process)));
            }
        }
        if results.len() < self.checks.len() {
            return Err(io::Error::other(format!("process {}: its stub stopped in the middle", self.process)));
        }
        self.batch = Batch::default();
        self.checks.clear();
        Ok(())
    }

    fn push(&mut self, number: i64, arguments: [Argument; 6], check: Check) -> Argument {
        self.batch.calls.push(Call { number, arguments });
        self.checks.push(check);
        Argument::Result(self.batch.calls.len() - 1)
    }
}
