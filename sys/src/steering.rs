//! Receive packet steering: which processors carry packets on that a device has received
//! (Documentation/networking/scaling.rst of the kernel). What is written to a TUN device counts as received by it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::namespaces::{self, Namespaces};
use crate::tun::Tun;

/// The steering of one device.
#[derive(Debug)]
pub struct Steering {
    file: File,
    /// All processors, as the file wants them.
    all: String,
}

impl Steering {
    /// That of a TUN device with one queue.
    ///
    /// # Errors
    /// `/sys` can't be had for the device's network namespace (it needs `CAP_SYS_ADMIN`), or the kernel has no steering.
    pub fn of(tun: &Tun) -> io::Result<Steering> {
        let name = tun.name()?;
        let all = mask(&fs::read_to_string("/sys/devices/system/cpu/online")?)?;
        let file = tun.namespace()?.run(|| {
            // What /sys shows is the namespace of whoever mounted it. The mount goes with this thread and the file.
            namespaces::leave_shared_directory()?;
            namespaces::unshare(Namespaces::MOUNT)?;
            namespaces::detach_mounts()?;
            namespaces::mount_virtual("sysfs", Path::new("/sys"), "")?;
            File::options().read(true).write(true).open(format!("/sys/class/net/{name}/queues/rx-0/rps_cpus"))
        })?;
        Ok(Steering { file, all })
    }

    /// Spreads packets over all processors, each flow to one; or leaves them to the one that wrote them.
    pub fn set(&self, spread: bool) -> io::Result<()> {
        let text = if spread { self.all.as_bytes() } else { b"0" };
        self.file.write_all_at(text, 0)
    }
}

/// A list of processors like `0-3,5` as a mask in words of 32 bits.
fn mask(list: &str) -> io::Result<String> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, format!("{list:?} is no list of processors"));
    let mut words = vec![0u32];
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) =
            first.parse().ok().zip(last.parse().ok()).filter(|&(_, last)| last < 1 << 16).ok_or_else(invalid)?;
        for processor in first..=last {
            words.resize(words.len().max(processor / 32 + 1), 0);
            words[processor / 32] |= 1 << (processor % 32);
        }
    }
    let words: Vec<String> = words.iter().rev().map(|word| format!("{word:08x}")).collect();
    Ok(words.join(","))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_kernel_takes_it() {
        let thread = std::thread::spawn(|| {
            namespaces::unshare(Namespaces::NETWORK).expect("these tests need root");
            let tun = Tun::create("steered").unwrap();
            assert_eq!(tun.name().unwrap(), "steered");
            let mut steering = Steering::of(&tun).unwrap();
            let own = |steering: &mut Steering| {
                let mut text = String::new();
                io::Seek::rewind(&mut steering.file).unwrap();
                steering.file.read_to_string(&mut text).unwrap();
                u64::from_str_radix(&text.trim().replace(',', ""), 16).unwrap()
            };
            assert_eq!(own(&mut steering), 0);
            steering.set(true).unwrap();
            assert_eq!(own(&mut steering), u64::from_str_radix(&steering.all.replace(',', ""), 16).unwrap());
            steering.set(false).unwrap();
            assert_eq!(own(&mut steering), 0);
            assert!(!Path::new("/sys/class/net/steered").exists(), "the mount stays with the thread that made it");
        });
        thread.join().unwrap();
    }

    #[test]
    fn processors_become_bits() {
        assert_eq!(mask("0-1\n").unwrap(), "00000003");
        assert_eq!(mask("0,2-4,33").unwrap(), "00000002,0000001d");
        for bad in ["", "x", "1-", "0-99999999"] {
            assert!(mask(bad).is_err(), "{bad}");
        }
    }
}
