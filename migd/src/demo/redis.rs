//! As much of a redis client as the demonstration and the tests need: blocking, one connection, RESP 2.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest time a reply may take. No move comes near it; a connection that waits longer is taken for broken.
const REPLY: Duration = Duration::from_secs(30);
/// Largest bulk string that a server may announce.
const BULK_MAX: usize = 512 << 20;
/// Most elements of an array that a server may announce.
const ARRAY_MAX: usize = 1 << 20;

/// A reply of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// `+OK`
    Simple(String),
    /// `-ERR ...`
    Error(String),
    /// `:1`
    Integer(i64),
    /// `$3`, or a missing one.
    Bulk(Option<Vec<u8>>),
    /// `*2`
    Array(Vec<Reply>),
}

/// A connection to a redis server.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// As connect(2).
    pub fn open(server: SocketAddr) -> io::Result<Connection> {
        let stream = TcpStream::connect_timeout(&server, Duration::from_secs(3))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(REPLY))?;
        stream.set_write_timeout(Some(REPLY))?;
        Ok(Connection { stream: BufReader::with_capacity(256 << 10, stream) })
    }

    /// The socket, for instance to shut it down from another thread.
    #[must_use]
    pub fn socket(&self) -> &TcpStream {
        self.stream.get_ref()
    }

    /// Sends a command and waits for its reply.
    ///
    /// # Errors
    /// When the connection broke or the server's words make no sense.
    pub fn command(&mut self, parts: &[&[u8]]) -> io::Result<Reply> {
        self.send(&encode(parts))?;
        self.reply()
    }

    /// Adds one to a counter and returns its value.
    ///
    /// # Errors
    /// As [`Connection::command`], and when the server refuses.
    pub fn increment(&mut self, key: &str) -> io::Result<i64> {
        match self.command(&[b"INCR", key.as_bytes()])? {
            Reply::Integer(value) => Ok(value),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends bytes that were made with [`encode`]; the replies are to be read later.
    ///
    /// # Errors
    /// As write(2).
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// Reads a reply.
    ///
    /// # Errors
    /// When the connection broke or the server's words make no sense.
    pub fn reply(&mut self) -> io::Result<Reply> {
        let (kind, text) = self.line()?;
        Ok(match kind {
            b'+' => Reply::Simple(text),
            b'-' => Reply::Error(text),
            b':' => Reply::Integer(text.parse().map_err(|_| nonsense("no number"))?),
            b'$' if text == "-1" => Reply::Bulk(None),
            b'$' => {
                let mut bytes = vec![0; length(&text, BULK_MAX)?];
                self.stream.read_exact(&mut bytes)?;
                self.end_of_line()?;
                Reply::Bulk(Some(bytes))
            }
            b'*' if text == "-1" => Reply::Array(Vec::new()),
            b'*' => {
                let count = length(&text, ARRAY_MAX)?;
                Reply::Array((0..count).map(|_| self.reply()).collect::<io::Result<_>>()?)
            }
            _ => return Err(nonsense("a reply of an unknown kind")),
        })
    }

    /// Reads a bulk string piece by piece, without keeping it; returns its length.
    ///
    /// # Errors
    /// As [`Connection::reply`], and when the reply is no bulk string.
    pub fn bulk(&mut self, mut each: impl FnMut(&[u8])) -> io::Result<usize> {
        let (kind, text) = self.line()?;
        if kind != b'$' {
            return Err(nonsense(&format!("{}{text} instead of a string", char::from(kind))));
        }
        let total = length(&text, BULK_MAX)?;
        let mut left = total;
        while left > 0 {
            let chunk = self.stream.fill_buf()?;
            if chunk.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let count = chunk.len().min(left);
            each(&chunk[..count]);
            self.stream.consume(count);
            left -= count;
        }
        self.end_of_line()?;
        Ok(total)
    }

    /// A line as its first byte and the rest.
    fn line(&mut self) -> io::Result<(u8, String)> {
        let mut line = Vec::new();
        self.stream.by_ref().take(64 << 10).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let text = line.strip_suffix(b"\r\n").ok_or_else(|| nonsense("a line that does not end"))?;
        let (&kind, rest) = text.split_first().ok_or_else(|| nonsense("an empty line"))?;
        Ok((kind, String::from_utf8_lossy(rest).into_owned()))
    }

    fn end_of_line(&mut self) -> io::Result<()> {
        let mut end = [0; 2];
        self.stream.read_exact(&mut end)?;
        if &end == b"\r\n" { Ok(()) } else { Err(nonsense("a string that does not end where it should")) }
    }
}

/// A command as redis reads it.
#[must_use]
pub fn encode(parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", parts.len()).into_bytes();
    for part in parts {
        bytes.extend_from_slice(format!("${}\r\n", part.len()).as_bytes());
        bytes.extend_from_slice(part);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

fn length(text: &str, most: usize) -> io::Result<usize> {
    text.parse().ok().filter(|&length| length <= most).ok_or_else(|| nonsense(&format!("a length of {text}")))
}

fn nonsense(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server sent {what}"))
}

fn unexpected(reply: &Reply) -> io::Error {
    nonsense(&format!("{reply:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// A connection to a server that says `words` and hangs up.
    fn server_that_says(words: &'static [u8]) -> Connection {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let server = listener.local_addr().expect("has an address");
        std::thread::spawn(move || listener.accept().and_then(|(mut stream, _)| stream.write_all(words)));
        Connection::open(server).expect("connects")
    }

    #[test]
    fn every_kind_of_reply_is_read() {
        let mut connection =
            server_that_says(b"+OK\r\n-ERR no\r\n:-7\r\n$3\r\na\r\n\r\n$-1\r\n*2\r\n:1\r\n$0\r\n\r\n$4\r\nabcd\r\n");
        let mut next = || connection.reply().expect("a reply");
        assert_eq!(next(), Reply::Simple("OK".into()));
        assert_eq!(next(), Reply::Error("ERR no".into()));
        assert_eq!(next(), Reply::Integer(-7));
        assert_eq!(next(), Reply::Bulk(Some(b"a\r\n".to_vec())));
        assert_eq!(next(), Reply::Bulk(None));
        assert_eq!(next(), Reply::Array(vec![Reply::Integer(1), Reply::Bulk(Some(Vec::new()))]));
        let mut seen = Vec::new();
        assert_eq!(connection.bulk(|bytes| seen.extend_from_slice(bytes)).expect("a string"), 4);
        assert_eq!(seen, b"abcd");
        assert_eq!(connection.reply().expect_err("the end").kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn nonsense_is_an_error() {
        for words in [&b"?\r\n"[..], b":x\r\n", b"$99999999999\r\n", b"$1\r\nabc", b"\r\n", b"+OK", b"*9999999\r\n"] {
            assert!(server_that_says(words).reply().is_err(), "{words:?}");
        }
    }
}
