//! System V IPC: shared memory, semaphores and message queues of the calling thread's IPC namespace.
//!
//! What makes an object gives it a chosen identifier (`/proc/sys/kernel/*_next_id`, which needs a kernel with
//! `CONFIG_CHECKPOINT_RESTORE`), because programs keep identifiers in their memory.

use std::fs::{self, File};
use std::io;
use std::ptr;

use crate::outcome::{check, counted};

/// Identity and rights of an object (`struct ipc_perm`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    /// The key that it can be found by; 0 when it has none, or has none any more.
    pub key: i32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Mode bits, for shared memory with [`DESTROYED`] and [`LOCKED`].
    pub mode: u32,
}

/// In the mode of shared memory: it goes with its last attachment (SHM_DEST).
pub const DESTROYED: u32 = 0o1000;
/// In the mode of shared memory: it isn't swapped out (SHM_LOCKED).
pub const LOCKED: u32 = 0o2000;
/// What of a mode are rights.
const RIGHTS: u32 = 0o777;

/// A shared memory segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its identifier.
    pub id: i32,
    /// Its rights.
    pub permissions: Permissions,
    /// Its size in bytes.
    pub bytes: u64,
    /// How often it is attached.
    pub attached: u64,
}

/// A set of semaphores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SemaphoreSet {
    /// Its identifier.
    pub id: i32,
    /// Its rights.
    pub permissions: Permissions,
    /// How many semaphores it has.
    pub count: usize,
}

/// A message queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Its identifier.
    pub id: i32,
    /// Its rights.
    pub permissions: Permissions,
    /// Bytes of the messages in it.
    pub bytes: usize,
    /// How many messages are in it.
    pub messages: usize,
}

/// The identifier that a `*get` call returned.
fn number(result: i32) -> io::Result<i32> {
    check(result).map(|_| result)
}

/// The lines of a table of /proc/sysvipc, each as numbers. The rights are octal. No table, no objects: such a kernel has none.
fn table(name: &str) -> io::Result<Vec<Vec<i64>>> {
    let text = match fs::read_to_string(format!("/proc/sysvipc/{name}")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let number = |(column, word): (usize, &str)| {
        if column == RIGHTS_COLUMN { i64::from_str_radix(word, 8) } else { word.parse() }
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/sysvipc/{name}: {word:?}")))
    };
    text.lines().skip(1).map(|line| line.split_whitespace().enumerate().map(number).collect()).collect()
}

const RIGHTS_COLUMN: usize = 2;

fn column<T: TryFrom<i64>>(line: &[i64], index: usize) -> io::Result<T> {
    let value = line.get(index).copied().and_then(|value| T::try_from(value).ok());
    value.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a table of /proc/sysvipc has another form"))
}

/// `owner` is the column of the owner, which the group follows.
fn permissions(line: &[i64], owner: usize) -> io::Result<Permissions> {
    Ok(Permissions {
        key: column(line, 0)?,
        uid: column(line, owner)?,
        gid: column(line, owner + 1)?,
        mode: column(line, RIGHTS_COLUMN)?,
    })
}

/// All segments.
///
/// # Errors
/// /proc isn't there, or has a form that isn't known.
pub fn segments() -> io::Result<Vec<Segment>> {
    let segment = |line: Vec<i64>| {
        Ok(Segment {
            id: column(&line, 1)?,
            permissions: permissions(&line, 7)?,
            bytes: column(&line, 3)?,
            attached: column(&line, 6)?,
        })
    };
    table("shm")?.into_iter().map(segment).collect()
}

/// All sets of semaphores.
///
/// # Errors
/// As [`segments`].
pub fn semaphore_sets() -> io::Result<Vec<SemaphoreSet>> {
    let set = |line: Vec<i64>| {
        Ok(SemaphoreSet { id: column(&line, 1)?, permissions: permissions(&line, 4)?, count: column(&line, 3)? })
    };
    table("sem")?.into_iter().map(set).collect()
}

/// All message queues.
///
/// # Errors
/// As [`segments`].
pub fn queues() -> io::Result<Vec<Queue>> {
    let queue = |line: Vec<i64>| {
        Ok(Queue {
            id: column(&line, 1)?,
            permissions: permissions(&line, 7)?,
            bytes: column(&line, 3)?,
            messages: column(&line, 4)?,
        })
    };
    table("msg")?.into_iter().map(queue).collect()
}

/// Makes the next object of a kind (`shm`, `sem`, `msg`) have this identifier if that is free.
fn choose(kind: &str, id: i32) -> io::Result<()> {
    fs::write(format!("/proc/sys/kernel/{kind}_next_id"), id.to_string())
}

fn chosen(kind: &str, wanted: i32, got: i32, remove: fn(i32) -> io::Result<()>) -> io::Result<()> {
    if got == wanted {
        return Ok(());
    }
    remove(got)?;
    let what = format!("System V {kind} {wanted} can't be made: the identifier is taken");
    Err(io::Error::new(io::ErrorKind::AlreadyExists, what))
}

fn creation(permissions: Permissions) -> i32 {
    libc::IPC_CREAT | libc::IPC_EXCL | (permissions.mode & RIGHTS).cast_signed()
}

/// Makes a segment. Its owner is the caller, until [`set_segment`].
///
/// # Errors
/// As shmget(2); `EEXIST` when the key or the identifier is taken.
pub fn make_segment(id: i32, permissions: Permissions, bytes: u64) -> io::Result<()> {
    let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
    choose("shm", id)?;
    // SAFETY: shmget takes numbers only.
    let got = number(unsafe { libc::shmget(permissions.key, bytes, creation(permissions)) })?;
    chosen("shared memory", id, got, remove_segment)
}

/// Gives a segment its owner and rights, and marks it as locked or destroyed if it is to be.
///
/// # Errors
/// As shmctl(2).
pub fn set_segment(id: i32, permissions: Permissions) -> io::Result<()> {
    // SAFETY: all zeros is a value of this struct of integers.
    let mut settings: libc::shmid_ds = unsafe { std::mem::zeroed() };
    settings.shm_perm = perm(permissions);
    // SAFETY: the kernel reads a struct shmid_ds at the address of one.
    check(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut settings) })?;
    if permissions.mode & LOCKED != 0 {
        // SAFETY: SHM_LOCK takes no argument.
        check(unsafe { libc::shmctl(id, libc::SHM_LOCK, ptr::null_mut()) })?;
    }
    if permissions.mode & DESTROYED != 0 {
        remove_segment(id)?;
    }
    Ok(())
}

/// Removes a segment: at once, or when nobody has it attached any more.
///
/// # Errors
/// As shmctl(2).
pub fn remove_segment(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID takes no argument.
    check(unsafe { libc::shmctl(id, libc::IPC_RMID, ptr::null_mut()) }).map(drop)
}

/// A segment's memory as a file. The segment is attached to this process for a moment.
///
/// # Errors
/// As shmat(2) and open(2).
pub fn open_segment(id: i32, bytes: u64) -> io::Result<File> {
    // SAFETY: the kernel chooses an address where nothing is.
    let start = unsafe { libc::shmat(id, ptr::null(), 0) };
    if start.addr() == usize::MAX {
        return Err(io::Error::last_os_error());
    }
    let end = start.addr() as u64 + bytes.next_multiple_of(4096);
    let file = File::options().read(true).write(true).open(format!("/proc/self/map_files/{:x}-{end:x}", start.addr()));
    // SAFETY: the segment was attached here just now, and nobody has a reference into it.
    check(unsafe { libc::shmdt(start) })?;
    file
}

fn perm(permissions: Permissions) -> libc::ipc_perm {
    // SAFETY: all zeros is a value of this struct of integers.
    let mut perm: libc::ipc_perm = unsafe { std::mem::zeroed() };
    perm.uid = permissions.uid;
    perm.gid = permissions.gid;
    // Nine bits.
    perm.mode = (permissions.mode & RIGHTS) as _;
    perm
}

/// The values of a set's semaphores.
///
/// # Errors
/// As semctl(2).
pub fn semaphore_values(set: &SemaphoreSet) -> io::Result<Vec<u16>> {
    let mut values = vec![0u16; set.count];
    // SAFETY: the kernel writes as many values as the set has, which is fixed when it's made.
    check(unsafe { libc::semctl(set.id, 0, libc::GETALL, values.as_mut_ptr()) })?;
    Ok(values)
}

/// Makes a set of semaphores with these values.
///
/// # Errors
/// As semget(2) and semctl(2); `EEXIST` when the key or the identifier is taken.
pub fn make_semaphores(id: i32, permissions: Permissions, values: &[u16]) -> io::Result<()> {
    let count = i32::try_from(values.len()).map_err(io::Error::other)?;
    choose("sem", id)?;
    // SAFETY: semget takes numbers only.
    let got = number(unsafe { libc::semget(permissions.key, count, creation(permissions)) })?;
    chosen("semaphores", id, got, remove_semaphores)?;
    // SAFETY: the kernel reads as many values as the set has, which are those given.
    check(unsafe { libc::semctl(id, 0, libc::SETALL, values.as_ptr()) })?;
    // SAFETY: all zeros is a value of this struct of integers.
    let mut settings: libc::semid_ds = unsafe { std::mem::zeroed() };
    settings.sem_perm = perm(permissions);
    // SAFETY: the kernel reads a struct semid_ds at the address of one.
    check(unsafe { libc::semctl(id, 0, libc::IPC_SET, &raw mut settings) }).map(drop)
}

/// Removes a set of semaphores.
///
/// # Errors
/// As semctl(2).
pub fn remove_semaphores(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID takes no argument.
    check(unsafe { libc::semctl(id, 0, libc::IPC_RMID) }).map(drop)
}

/// A message: its type and its bytes.
pub type Message = (i64, Vec<u8>);

/// How many bytes of messages a queue takes.
///
/// # Errors
/// As msgctl(2).
pub fn queue_capacity(id: i32) -> io::Result<u64> {
    Ok(queue_settings(id)?.msg_qbytes)
}

fn queue_settings(id: i32) -> io::Result<libc::msqid_ds> {
    // SAFETY: all zeros is a value of this struct of integers.
    let mut settings: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes a struct msqid_ds at the address of one.
    check(unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut settings) })?;
    Ok(settings)
}

/// The messages that wait in a queue. They stay there.
///
/// # Errors
/// As msgrcv(2) with `MSG_COPY`.
pub fn messages(queue: &Queue) -> io::Result<Vec<Message>> {
    const MSG_COPY: i32 = 0o40000;
    const WORD: usize = size_of::<i64>();
    let mut buffer = vec![0u8; WORD + queue.bytes];
    (0..queue.messages)
        .map(|index| {
            let index = i64::try_from(index).map_err(io::Error::other)?;
            // SAFETY: the kernel writes a word and at most the given number of bytes, for which there is room.
            let got = unsafe {
                libc::msgrcv(queue.id, buffer.as_mut_ptr().cast(), queue.bytes, index, MSG_COPY | libc::IPC_NOWAIT)
            };
            let length = counted(got)?;
            let (kind, content) = buffer.split_at(WORD);
            let kind = kind.try_into().map(i64::from_ne_bytes).map_err(io::Error::other)?;
            Ok((kind, content[..length].to_vec()))
        })
        .collect()
}

/// Makes a queue with these messages in it.
///
/// # Errors
/// As msgget(2), msgctl(2) and msgsnd(2); `EEXIST` when the key or the identifier is taken.
pub fn make_queue(id: i32, permissions: Permissions, capacity: u64, messages: &[Message]) -> io::Result<()> {
    choose("msg", id)?;
    // SAFETY: msgget takes numbers only.
    let got = number(unsafe { libc::msgget(permissions.key, creation(permissions)) })?;
    chosen("message queue", id, got, remove_queue)?;
    let mut settings = queue_settings(id)?;
    settings.msg_perm = perm(permissions);
    settings.msg_qbytes = capacity;
    // SAFETY: the kernel reads a struct msqid_ds at the address of one.
    check(unsafe { libc::msgctl(id, libc::IPC_SET, &raw mut settings) })?;
    for (kind, content) in messages {
        let message = [kind.to_ne_bytes().as_slice(), content].concat();
        // SAFETY: the kernel reads a word and the given number of bytes, which are there.
        check(unsafe { libc::msgsnd(id, message.as_ptr().cast(), content.len(), libc::IPC_NOWAIT) })?;
    }
    Ok(())
}

/// Removes a queue.
///
/// # Errors
/// As msgctl(2).
pub fn remove_queue(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID takes no argument.
    check(unsafe { libc::msgctl(id, libc::IPC_RMID, ptr::null_mut()) }).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// Runs in a thread with an IPC namespace of its own. Needs root, as the rest of these tests.
    fn apart(test: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWIPC).unwrap();
                test();
            });
            thread.join().unwrap();
        });
    }

    const RIGHTS_OF_ONE: Permissions = Permissions { key: 0x1234_5678, uid: 7, gid: 8, mode: 0o640 };

    #[test]
    fn segments_have_the_identifier_and_content_they_are_given() {
        apart(|| {
            make_segment(32768 * 3 + 5, RIGHTS_OF_ONE, 5000).unwrap();
            let taken = make_segment(32768 * 3 + 5, Permissions::default(), 5000).unwrap_err();
            assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists);
            let file = open_segment(32768 * 3 + 5, 5000).unwrap();
            file.write_all_at(b"end", 4997).unwrap();
            set_segment(32768 * 3 + 5, RIGHTS_OF_ONE).unwrap();
            let [segment] = segments().unwrap()[..] else { panic!("{:?}", segments()) };
            assert_eq!(segment, Segment { id: 32768 * 3 + 5, permissions: RIGHTS_OF_ONE, bytes: 5000, attached: 0 });
            let mut end = [0; 3];
            open_segment(segment.id, 5000).unwrap().read_exact_at(&mut end, 4997).unwrap();
            assert_eq!(&end, b"end");
            remove_segment(segment.id).unwrap();
            assert_eq!(segments().unwrap(), []);
        });
    }

    #[test]
    fn semaphores_and_messages_come_back() {
        apart(|| {
            make_semaphores(77, RIGHTS_OF_ONE, &[1, 0, 9]).unwrap();
            let [set] = semaphore_sets().unwrap()[..] else { panic!("{:?}", semaphore_sets()) };
            assert_eq!(set, SemaphoreSet { id: 77, permissions: RIGHTS_OF_ONE, count: 3 });
            assert_eq!(semaphore_values(&set).unwrap(), [1, 0, 9]);

            let sent = vec![(4, b"four".to_vec()), (2, vec![]), (4, vec![7; 3000])];
            make_queue(99, RIGHTS_OF_ONE, 10_000, &sent).unwrap();
            let [queue] = queues().unwrap()[..] else { panic!("{:?}", queues()) };
            assert_eq!(queue, Queue { id: 99, permissions: RIGHTS_OF_ONE, bytes: 3004, messages: 3 });
            assert_eq!(messages(&queue).unwrap(), sent);
            assert_eq!(messages(&queue).unwrap(), sent);
            assert_eq!(queue_capacity(99).unwrap(), 10_000);
            remove_semaphores(77).unwrap();
            remove_queue(99).unwrap();
        });
    }
}
