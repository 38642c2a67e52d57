//! Pseudo-terminals whose both ends are in the job.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};

use libtest_mimic::Trial;

use crate::ensure;
use crate::support::{Job, Moment, Outcome, Precopy, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("terminals::a_shell_goes_on_with_its_jobs", shell),
        trial("terminals::what_waits_in_them_stays_what_it_is", content),
        trial("terminals::keep_their_numbers_and_settings", settings),
        trial("terminals::a_write_that_waits_for_a_reader_is_finished", writer),
        trial("terminals::sessions_that_come_during_the_copy_have_theirs", sessions),
        trial("terminals::what_cannot_move_is_said", obstacles),
    ]
}

/// Evaluates or executes each line, and prints what came of it.
const SERVER: &str = r#"
import errno, fcntl, os, pty, select, signal, struct, sys, termios, time, tty
GPTLCK, GEXCL, GPKT = 0x80045439, 0x80045440, 0x80045438
def ask(fd, call):
    return struct.unpack("i", fcntl.ioctl(fd, call, bytes(4)))[0]
def set_size(fd, rows, columns):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
def until(fd, end, seen=b""):
    while not seen.endswith(end):
        if not select.select([fd], [], [], 30)[0]:
            raise TimeoutError(seen)
        seen += os.read(fd, 65536)
    return seen
def now(fd):
    "All that is there."
    seen = b""
    while select.select([fd], [], [], 0)[0]:
        more = os.read(fd, 65536)
        seen += more
        if not more:
            break
    return seen
def start(*argv):
    pid, master = pty.fork()
    if pid == 0:
        os.execvp(argv[0], argv)
    os.set_inheritable(master, False)
    return pid, master
def say(text, end=b"$ "):
    os.write(shell, text)
    return until(shell, end)
def failure(call, *arguments):
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
def fill(fd, text):
    "Writes it again and again until there is no room."
    sent = b""
    while isinstance(length := failure(os.write, fd, text), int):
        sent += text[:length]
        time.sleep(0.001)
    return sent
def fill_up(fd, other):
    "The other end has all it takes, and the kernel keeps what it can in blocks of 512 and 3584 bytes."
    sent = b"".join(bytes(os.write(fd, bytes(size))) for size in [256] * 15 + [255])
    wait_for(lambda: struct.unpack("i", fcntl.ioctl(other, termios.FIONREAD, bytes(4))) == (4095,))
    every = bytes(range(256))
    for _ in range(8):
        sent += every[:os.write(fd, every)]
    return sent + fill(fd, every * 7) + fill(fd, every)
def fields(pid):
    "Session, terminal and foreground."
    return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[3:6]
def wait_for(what):
    end = time.monotonic() + 30
    while not what():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.01)
for line in sys.stdin:
    try:
        try:
            print(repr(eval(line)), flush=True)
        except SyntaxError:
            exec(line)
            print("done", flush=True)
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
"#;

fn start() -> Result<Job, Box<dyn Error>> {
    Job::start(&["python3", "-S", "-c", SERVER])
}

/// Has the server do something.
fn run(job: &mut Job, lines: &[&str]) -> Outcome {
    for line in lines {
        job.say(line)?;
        let answer = job.line()?;
        ensure!(!answer.contains("Error"), "{line}: {answer}");
    }
    Ok(())
}

/// Has the server tell something.
fn expect(job: &mut Job, question: &str, wanted: &str) -> Outcome {
    job.say(question)?;
    let answer = job.line()?;
    ensure!(answer == wanted, "{question}: {answer}, not {wanted}");
    Ok(())
}

fn both_ways(job: &mut Job) -> Outcome {
    job.hop_in_vain(Precopy::None)?;
    job.hop(Precopy::Rounds(1))?;
    Ok(())
}

fn shell() -> Outcome {
    let mut job = start()?;
    run(
        &mut job,
        &[
            "os.environ['PS1'] = '$ '",
            "pid, shell = start('bash', '--norc', '--noprofile', '--noediting', '-i')",
            "until(shell, b'$ ')",
            "say(b'trap \"echo resized\" WINCH; trap \"echo hung up\" HUP\\n')",
            "set_size(shell, 33, 77)",
            "b'resized' in say(b'\\n') or 1/0",
            "say(b'cat\\n', b'cat\\r\\n')",
            "wait_for(lambda: fields(pid)[2] != str(pid))",
            "say(b'one\\n', b'one\\r\\none\\r\\n')",
        ],
    )?;
    both_ways(&mut job)?;
    expect(&mut job, "say(b'two\\n', b'two\\r\\ntwo\\r\\n')", r"b'two\r\ntwo\r\n'")?;
    // Stopped, moved, and taken up again.
    run(&mut job, &["say(b'\\x1a')", "fields(pid)[2] == str(pid) or 1/0"])?;
    both_ways(&mut job)?;
    expect(&mut job, "say(b'tty\\n')", r"b'tty\r\n/dev/pts/0\r\n$ '")?;
    expect(&mut job, "say(b'stty size\\n')", r"b'stty size\r\n33 77\r\n$ '")?;
    expect(&mut job, "say(b'fg\\n', b'cat\\r\\n')", r"b'fg\r\ncat\r\n'")?;
    expect(&mut job, "say(b'three\\n', b'three\\r\\nthree\\r\\n')", r"b'three\r\nthree\r\n'")?;
    both_ways(&mut job)?;
    expect(&mut job, "say(b'\\x03')", r"b'^C\r\n$ '")?;
    // Size and hang-up come when they happen, and only then.
    run(&mut job, &["set_size(shell, 44, 88)", "b'resized' in say(b'\\n') or 1/0"])?;
    run(&mut job, &["say(b'trap - HUP\\n')", "os.close(shell)"])?;
    expect(&mut job, "os.waitpid(pid, 0)[1]", "1")?;
    Ok(())
}

fn content() -> Outcome {
    let mut job = start()?;
    run(&mut job, &["m, s = pty.openpty()", "modes = termios.tcgetattr(s)", "modes[3] &= ~termios.ECHO"])?;
    run(&mut job, &["termios.tcsetattr(s, termios.TCSANOW, modes)"])?;
    // Lines, ends of file, a line half typed; and output with a carriage return that was added.
    run(&mut job, &[r"os.write(m, b'one\ntwo\x04\x04\nthre')", r"os.write(s, b'answer\n')"])?;
    both_ways(&mut job)?;
    run(&mut job, &[r"os.write(m, b'E\x7fe\n')"])?;
    for wanted in [r"b'one\n'", "b'two'", "b''", r"b'\n'", r"b'three\n'"] {
        expect(&mut job, "os.read(s, 100)", wanted)?;
    }
    expect(&mut job, "now(s), now(m)", r"(b'', b'answer\r\n')")?;

    // Everything that a byte can be, as if typed one by one, in raw mode; and more of it than a terminal takes.
    run(&mut job, &["tty.setraw(s)", "every = bytes(range(256))", "os.write(m, every)", "os.write(s, every)"])?;
    both_ways(&mut job)?;
    expect(&mut job, "now(s) == every, now(m) == every", "(True, True)")?;
    for end in ["m", "s"] {
        let other = if end == "m" { "s" } else { "m" };
        run(&mut job, &[&format!("os.set_blocking({end}, False); sent = b''; text = every * 3 + bytes(39)")])?;
        let fill = format!("sent += fill({end}, text)");
        run(&mut job, &[&fill, "len(sent) > 8000 or 1/0"])?;
        both_ways(&mut job)?;
        expect(&mut job, &format!("until({other}, sent) == sent"), "True")?;
        // As full as writes of any size make it. For that the kernel must have made many blocks before.
        run(&mut job, &[&format!("sent = fill({end}, every)"), &format!("until({other}, sent)")])?;
        run(&mut job, &[&format!("sent = fill_up({end}, {other})"), "len(sent) > 38000 or 1/0"])?;
        both_ways(&mut job)?;
        expect(&mut job, &format!("until({other}, sent) == sent"), "True")?;
        run(&mut job, &[&format!("os.set_blocking({end}, True)")])?;
    }

    // Output that was stopped by a character goes on by one.
    run(&mut job, &["termios.tcsetattr(s, termios.TCSANOW, modes)", r"os.write(m, b'\x13')"])?;
    run(&mut job, &["wait_for(lambda: not select.select([], [s], [], 0)[1])"])?;
    both_ways(&mut job)?;
    expect(&mut job, "select.select([], [s], [], 0)[1]", "[]")?;
    run(&mut job, &[r"os.write(m, b'\x11')", r"os.write(s, b'on\n')"])?;
    expect(&mut job, r"until(m, b'\n')", r"b'on\r\n'")?;
    run(&mut job, &["termios.tcflow(s, termios.TCOOFF)"])?;
    both_ways(&mut job)?;
    run(&mut job, &[r"os.write(m, b'\x11')"])?;
    expect(&mut job, "select.select([], [s], [], 0.1)[1]", "[]")?;
    run(&mut job, &["termios.tcflow(s, termios.TCOON)", r"os.write(s, b'on\n')"])?;
    expect(&mut job, r"until(m, b'\n')", r"b'on\r\n'")?;
    Ok(())
}

fn settings() -> Outcome {
    let mut job = start()?;
    run(
        &mut job,
        &[
            "pairs = [pty.openpty() for _ in range(5)]",
            // One that is gone, one that is hung up, one whose slave is closed.
            "list(map(os.close, pairs[1]))",
            "os.close(pairs[2][0])",
            "os.close(pairs[3][1])",
            "m, s = pairs[4]",
            "copy = os.dup(m)",
            "modes = termios.tcgetattr(s)",
            "modes[0] |= 0o40000; modes[3] &= ~termios.ECHOE; modes[6][termios.VERASE] = b'#'",
            "termios.tcsetattr(s, termios.TCSANOW, modes)",
            "set_size(s, 50, 132)",
            "fcntl.ioctl(m, termios.TIOCPKT, struct.pack('i', 1))",
            "fcntl.ioctl(s, termios.TIOCEXCL)",
            "os.set_blocking(m, False)",
            "os.chmod('/dev/pts/4', 0o600)",
            "os.chown('/dev/pts/4', 7, 8)",
        ],
    )?;
    for _ in 0..2 {
        both_ways(&mut job)?;
        let names = "[os.ttyname(s) for s in (pairs[0][1], s)]";
        expect(&mut job, names, "['/dev/pts/0', '/dev/pts/4']")?;
        expect(&mut job, "sorted(os.listdir('/dev/pts'))", "['0', '3', '4', 'ptmx']")?;
        expect(&mut job, "termios.tcgetattr(s) == modes", "True")?;
        expect(&mut job, "os.get_terminal_size(m)", "os.terminal_size(columns=132, lines=50)")?;
        expect(&mut job, "[ask(m, GPKT), ask(s, GEXCL), ask(m, GPTLCK)]", "[1, 1, 0]")?;
        expect(&mut job, "os.get_blocking(copy), os.get_blocking(s)", "(False, True)")?;
        let node = "(lambda n: (oct(n.st_mode), n.st_uid, n.st_gid, n.st_rdev))(os.fstat(s))";
        expect(&mut job, node, "('0o20600', 7, 8, 34820)")?;
        // The one that is hung up.
        expect(&mut job, "os.read(pairs[2][1], 9), failure(os.write, pairs[2][1], b'x')", "(b'', 'EIO')")?;
        // The one without a slave.
        expect(&mut job, "failure(os.read, pairs[3][0], 9)", "'EIO'")?;
    }
    expect(&mut job, "os.write(s, b'x'), until(m, b'x')", r"(1, b'\x00x')")?;
    expect(&mut job, "os.ttyname(pty.openpty()[1])", "'/dev/pts/1'")?;
    Ok(())
}

/// A session with a terminal of its own, whose leader has threads and a child.
const MEMBER: &str = r#"
import os, threading, time
def turn():
    while True:
        time.sleep(0.001)
for _ in range(3):
    threading.Thread(target=turn, daemon=True).start()
if os.fork() == 0:
    for line in open("/dev/tty", "rb"):
        os.write(1, line.upper())
turn()
"#;

fn writer() -> Outcome {
    let mut job = start()?;
    run(&mut job, &["pid, m = start('sh', '-c', 'stty raw; printf .; exec head -c 300000 /dev/zero')"])?;
    run(&mut job, &["os.read(m, 1) == b'.' or 1 / 0", "seen = b''"])?;
    for _ in 0..3 {
        // It waits for room.
        run(&mut job, &["wait_for(lambda: open(f'/proc/{pid}/syscall').read().startswith('1 '))"])?;
        both_ways(&mut job)?;
        run(&mut job, &["seen += os.read(m, 40000)"])?;
    }
    run(&mut job, &["while isinstance(more := failure(os.read, m, 65536), bytes): seen += more"])?;
    expect(&mut job, "more, len(seen), seen == bytes(300000)", "('EIO', 300000, True)")?;
    Ok(())
}

fn sessions() -> Outcome {
    let mut job = start()?;
    run(&mut job, &[&format!("member = {MEMBER:?}"), "first = pty.openpty()", "new = []"])?;
    let mut input = job.input.try_clone()?;
    let mut output = BufReader::new(job.output.get_ref().try_clone()?);
    job.hop_while(Precopy::Rounds(2), |moment, _| {
        if moment == Moment::Round {
            for line in ["new.append(start('python3', '-S', '-c', member))", "os.write(new[-1][1], b'x\\n')"] {
                writeln!(input, "{line}")?;
                output.read_line(&mut String::new())?;
            }
            let mut line = String::new();
            writeln!(input, r"until(new[-1][1], b'X\r\n')")?;
            output.read_line(&mut line)?;
            ensure!(!line.contains("Error"), "{line}");
        }
        Ok(())
    })?;
    for number in 0..2 {
        let (pid, master) = (format!("new[{number}][0]"), format!("new[{number}][1]"));
        // What is stopped stays so, and its parent is told just once.
        for told in [true, false] {
            run(&mut job, &[&format!("os.kill({pid}, signal.SIGSTOP)")])?;
            let status = format!("os.waitid(os.P_PID, {pid}, os.WSTOPPED | os.WEXITED | WHEN) and 'stopped'");
            let when = if told { "0" } else { "os.WNOWAIT" };
            expect(&mut job, &status.replace("WHEN", when), "'stopped'")?;
            both_ways(&mut job)?;
            let again = if told { "None" } else { "'stopped'" };
            // A stop that the parent hasn't been told of begins anew when it runs.
            let when = if told { "os.WNOHANG" } else { "0" };
            expect(&mut job, &status.replace("WHEN", when), again)?;
            let state = format!("open(f'/proc/{{{pid}}}/stat').read().rsplit(')', 1)[1].split()[0]");
            expect(&mut job, &state, "'T'")?;
            run(&mut job, &[&format!("os.kill({pid}, signal.SIGCONT)")])?;
        }
        expect(&mut job, &format!(r"os.write({master}, b'more\n')"), "5")?;
        run(&mut job, &[&format!(r"until({master}, b'MORE\r\n')")])?;
        let device = number + 1;
        let fields = format!("fields({pid}) == [str({pid}), '{}', str({pid})]", (136 << 8) + device);
        expect(&mut job, &fields, "True")?;
    }
    // Who leads a session loses its terminal with the master, as ever.
    run(&mut job, &["os.close(new[0][1])"])?;
    expect(&mut job, "os.waitpid(new[0][0], 0)[1]", "1")?;
    Ok(())
}

fn obstacles() -> Outcome {
    let mut job = start()?;
    let reasons = |job: &Job| -> Result<String, Box<dyn Error>> {
        Ok(job.reasons()?.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    };
    run(&mut job, &["m = os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY)"])?;
    let error = job.hop(Precopy::None).err().ok_or("it moved")?.to_string();
    ensure!(error.contains("terminal 0, which nobody has opened yet; try again"), "{error}");
    run(&mut job, &["fcntl.ioctl(m, 0x40045431, bytes(4))", "s = os.open('/dev/pts/0', os.O_RDWR | os.O_NOCTTY)"])?;
    ensure!(reasons(&job)?.is_empty(), "{}", reasons(&job)?);
    // A change of state that waits to be read.
    run(&mut job, &["fcntl.ioctl(m, termios.TIOCPKT, struct.pack('i', 1))", "termios.tcflush(s, termios.TCIFLUSH)"])?;
    let error = job.hop(Precopy::None).err().ok_or("it moved")?.to_string();
    ensure!(error.contains("(TIOCPKT) waits to be read; try again"), "{error}");
    expect(&mut job, "os.read(m, 1)", r"b'\x01'")?;
    both_ways(&mut job)?;
    Ok(())
}
