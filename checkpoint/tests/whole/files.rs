//! Open files of trees that hop from sandbox to sandbox.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{Job, Outcome, Precopy, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("files::one_of_every_kind_moves_twice", everything),
        trial("files::a_stream_that_was_opened_again_is_two_after_moves", opened_again),
        trial("files::a_unix_socket_that_was_linked_into_place_is_there_after_moves", linked),
        trial("files::redis_and_its_client_move_with_their_unix_socket", redis),
    ]
}

fn everything() -> Outcome {
    let directory = tempfile::tempdir()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/descriptors/everything.py");
    let script = script.to_str().unwrap_or_default();
    let mut job = Job::start(&["python3", "-S", script, "open", &directory.path().to_string_lossy()])?;
    let mut line = String::new();
    BufReader::new(job.output.get_ref().try_clone()?).read_line(&mut line)?;
    ensure!(line == "ready\n", "it says {line:?}");
    job.hop(Precopy::None)?;
    job.hop(Precopy::Rounds(1))?;
    job.sandbox.signal_root(sys::libc::SIGUSR1)?;
    let verdict = directory.path().join("verdict");
    let deadline = Instant::now() + Duration::from_secs(30);
    while !verdict.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let verdict = std::fs::read_to_string(verdict)?;
    ensure!(verdict == "fine", "{verdict}");
    Ok(())
}

/// Opens its standard streams once more, as programs do that are told to log to /dev/stdout, and one of them the other way round.
const OPENED_AGAIN: &str = "
import fcntl, os, sys
again = os.open('/dev/stdout', os.O_WRONLY | os.O_NONBLOCK)
both = os.open('/dev/stdout', os.O_RDWR)
source = os.open('/dev/stdin', os.O_RDONLY | os.O_NONBLOCK)
os.write(both, b'ready\\n')
while True:
    word = sys.stdin.readline().strip()
    modes = [fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_NONBLOCK) for fd in (0, 1, again, both, source)]
    expected = [os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_NONBLOCK, os.O_RDWR, os.O_RDONLY | os.O_NONBLOCK]
    os.write(1, word.encode() + b' ')
    os.write(again, b'again ')
    os.write(both, b'fine\\n' if modes == expected else repr(modes).encode() + b'\\n')
";

fn opened_again() -> Outcome {
    let mut job = Job::start(&["python3", "-S", "-c", OPENED_AGAIN])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    for precopy in [Precopy::None, Precopy::Rounds(1), Precopy::None] {
        job.hop(precopy)?;
        job.say("word")?;
        let line = job.line()?;
        ensure!(line == "word again fine", "{line}");
    }
    Ok(())
}

/// Lets its socket appear in one step, as supervisord does.
const LINKED: &str = "
import os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1] + '/sock.new')
server.listen()
os.link(sys.argv[1] + '/sock.new', sys.argv[1] + '/sock')
os.unlink(sys.argv[1] + '/sock.new')
print('ready', flush=True)
while True:
    client, _ = server.accept()
    client.sendall(server.getsockname().rsplit('/')[-1].encode())
    client.close()
";

fn linked() -> Outcome {
    let directory = tempfile::tempdir()?;
    let mut job = Job::start(&["python3", "-S", "-c", LINKED, &directory.path().to_string_lossy()])?;
    ensure!(job.line()? == "ready", "it doesn't start");
    for precopy in [Precopy::None, Precopy::Rounds(1), Precopy::None] {
        let mut greeting = String::new();
        UnixStream::connect(directory.path().join("sock"))?.read_to_string(&mut greeting)?;
        ensure!(greeting == "sock.new", "{greeting}");
        job.hop(precopy)?;
    }
    let names = std::fs::read_dir(directory.path())?.map(|entry| Ok(entry?.file_name()));
    let names = names.collect::<std::io::Result<Vec<_>>>()?;
    ensure!(names == ["sock"], "{names:?} is there");
    Ok(())
}

/// Starts a redis that listens on a Unix socket only, and counts in it over that socket.
const CLIENT: &str = "
import socket, subprocess, sys, time
path = sys.argv[1] + '/redis.sock'
server = subprocess.Popen(['redis-server', '--port', '0', '--unixsocket', path, '--save', '', '--dir', sys.argv[1]],
                          stdout=subprocess.DEVNULL)
while True:
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(path)
        break
    except OSError:
        time.sleep(0.02)
stream = client.makefile('rwb')
for count in range(1, 1 << 30):
    stream.write(b'INCR counter\\r\\n')
    stream.flush()
    answer = stream.readline()
    assert answer == b':%d\\r\\n' % count, answer
    if count % 50 == 0:
        assert server.poll() is None
        fresh = socket.socket(socket.AF_UNIX)
        fresh.connect(path)
        fresh.send(b'PING\\r\\n')
        assert fresh.recv(10) == b'+PONG\\r\\n'
        fresh.close()
        print(count, flush=True)
        time.sleep(0.005)
";

fn redis() -> Outcome {
    let directory = tempfile::tempdir()?;
    let mut job = Job::start(&["python3", "-S", "-c", CLIENT, &directory.path().to_string_lossy()])?;
    let mut output = BufReader::new(job.output.get_ref().try_clone()?);
    let mut next = 50;
    let mut read_on = |lines: u32| -> Outcome {
        for _ in 0..lines {
            let mut line = String::new();
            output.read_line(&mut line)?;
            ensure!(line.trim() == next.to_string(), "{next} expected, read {line:?}");
            next += 50;
        }
        Ok(())
    };
    read_on(5)?;
    for precopy in [Precopy::None, Precopy::Rounds(2), Precopy::Rounds(1), Precopy::None] {
        job.hop(precopy)?;
        read_on(20)?;
    }
    Ok(())
}
