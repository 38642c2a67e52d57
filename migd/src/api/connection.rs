//! A Unix connection that carries frames, and descriptors beside them.
//!
//! Receiving is cancel-safe: a frame that has arrived in part stays in the [`Receiver`], so it may sit in a `select!`.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use bytes::{Buf, BytesMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::frame;

/// Most descriptors beside one frame.
const MAX_DESCRIPTORS: usize = 4;
/// Bytes asked for at once.
const READ_SIZE: usize = 64 << 10;

/// Both directions of a connection.
#[derive(Debug)]
pub struct Connection {
    receiver: Receiver,
    sender: Sender,
}

/// The receiving direction.
#[derive(Debug)]
pub struct Receiver {
    stream: Arc<UnixStream>,
    buffer: BytesMut,
    descriptors: VecDeque<OwnedFd>,
}

/// The sending direction. The connection ends for the other side when both halves are dropped.
#[derive(Debug)]
pub struct Sender {
    stream: Arc<UnixStream>,
}

impl From<UnixStream> for Connection {
    fn from(stream: UnixStream) -> Self {
        let stream = Arc::new(stream);
        let sender = Sender { stream: Arc::clone(&stream) };
        let receiver = Receiver { stream, buffer: BytesMut::new(), descriptors: VecDeque::new() };
        Self { receiver, sender }
    }
}

impl Connection {
    /// Connects to a socket in the file system.
    ///
    /// # Errors
    /// As connect(2).
    pub async fn connect(path: &Path) -> io::Result<Self> {
        Ok(UnixStream::connect(path).await?.into())
    }

    /// Sends one message; see [`Sender::send`].
    ///
    /// # Errors
    /// As sendmsg(2).
    pub async fn send<T: Serialize>(&mut self, message: &T) -> io::Result<()> {
        self.sender.send(message).await
    }

    /// Sends one message and descriptors; see [`Sender::send_with`].
    ///
    /// # Errors
    /// As sendmsg(2).
    pub async fn send_with<T: Serialize>(&mut self, message: &T, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.sender.send_with(message, descriptors).await
    }

    /// The next message; see [`Receiver::receive`].
    ///
    /// # Errors
    /// As recvmsg(2), or [`io::ErrorKind::InvalidData`].
    pub async fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        self.receiver.receive().await
    }

    /// A descriptor that came with a message received; see [`Receiver::take_descriptor`].
    pub fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.receiver.take_descriptor()
    }

    /// Both directions, to be used by different tasks.
    pub fn split(self) -> (Receiver, Sender) {
        (self.receiver, self.sender)
    }
}

impl Sender {
    /// Sends one message. Not cancel-safe: when dropped halfway the connection is of no more use.
    ///
    /// # Errors
    /// As sendmsg(2); [`io::ErrorKind::BrokenPipe`] when the other side is gone.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> io::Result<()> {
        self.send_with(message, &[]).await
    }

    /// Sends one message with descriptors, which the receiver has with or before the message.
    ///
    /// # Errors
    /// As sendmsg(2).
    pub async fn send_with<T: Serialize>(&mut self, message: &T, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = frame::encode(message)?;
        let mut sent = 0;
        while sent < bytes.len() {
            let now = if sent == 0 { descriptors } else { &[] };
            sent += self.stream.async_io(Interest::WRITABLE, || self.send_some(&bytes[sent..], now)).await?;
        }
        Ok(())
    }

    fn send_some(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        Ok(rustix::net::sendmsg(&*self.stream, &[IoSlice::new(bytes)], &mut control, flags)?)
    }
}

impl Receiver {
    /// The next message; `None` when the other side closed the connection between two messages. Cancel-safe.
    ///
    /// # Errors
    /// As recvmsg(2); [`io::ErrorKind::UnexpectedEof`] when the connection ended within a message;
    /// [`io::ErrorKind::InvalidData`] when what came is not a `T`.
    pub async fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        loop {
            if let Some(message) = self.buffered()? {
                return Ok(Some(message));
            }
            let stream = Arc::clone(&self.stream);
            let count = stream.async_io(Interest::READABLE, || self.receive_some()).await?;
            if count == 0 && self.buffer.is_empty() {
                return Ok(None);
            }
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// The oldest descriptor received that was not taken yet. They come with the message they were sent with, or before it.
    pub fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }

    fn buffered<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let Some(header) = self.buffer.first_chunk::<4>() else { return Ok(None) };
        let length = frame::body_length(*header)?;
        if self.buffer.len() < 4 + length {
            return Ok(None);
        }
        self.buffer.advance(4);
        frame::decode(&self.buffer.split_to(length)).map(Some)
    }

    fn receive_some(&mut self) -> io::Result<usize> {
        let start = self.buffer.len();
        self.buffer.resize(start + READ_SIZE, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let result =
            rustix::net::recvmsg(&*self.stream, &mut [IoSliceMut::new(&mut self.buffer[start..])], &mut control, flags);
        self.buffer.truncate(start + result.as_ref().map_or(0, |message| message.bytes));
        let message = result?;
        for ancillary in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = ancillary {
                self.descriptors.extend(descriptors);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "more descriptors came than fit"));
        }
        Ok(message.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[tokio::test]
    async fn messages_arrive_whole_and_in_order() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Connection::from(a), Connection::from(b));
        let long = "x".repeat(300_000);
        let send = async {
            a.send(&long).await.unwrap();
            a.send(&"short").await.unwrap();
            drop(a);
        };
        let receive = async {
            assert_eq!(b.receive::<String>().await.unwrap(), Some(long.clone()));
            assert_eq!(b.receive::<String>().await.unwrap().as_deref(), Some("short"));
            assert_eq!(b.receive::<String>().await.unwrap(), None);
        };
        tokio::join!(send, receive);
    }

    #[tokio::test]
    async fn a_descriptor_comes_with_its_message() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Connection::from(a), Connection::from(b));
        let (mut reader, writer) = io::pipe().unwrap();
        a.send(&"before").await.unwrap();
        a.send_with(&"with", &[writer.as_fd()]).await.unwrap();
        drop(writer);
        assert_eq!(b.receive::<String>().await.unwrap().as_deref(), Some("before"));
        assert_eq!(b.receive::<String>().await.unwrap().as_deref(), Some("with"));
        let mut writer = io::PipeWriter::from(b.take_descriptor().expect("came with the message"));
        assert!(b.take_descriptor().is_none());
        writer.write_all(b"through").unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[tokio::test]
    async fn receiving_may_be_cancelled_in_the_middle_of_a_message() {
        use tokio::io::AsyncWriteExt;
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut b = Connection::from(b);
        let bytes = frame::encode(&"divided").unwrap();
        a.write_all(&bytes[..6]).await.unwrap();
        let cancelled = tokio::time::timeout(std::time::Duration::from_millis(20), b.receive::<String>()).await;
        assert!(cancelled.is_err());
        a.write_all(&bytes[6..]).await.unwrap();
        assert_eq!(b.receive::<String>().await.unwrap().as_deref(), Some("divided"));
    }
}
