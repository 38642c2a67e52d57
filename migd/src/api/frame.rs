//! Framing: a 32-bit big-endian length, then that many bytes of JSON.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest frame that is sent or accepted. Nothing large travels in frames: the longest are parts of a log and the inspection of a job with
/// very many sockets.
pub const MAX_FRAME: usize = 64 << 20;

/// A frame for `message`, its length in front.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] when it is longer than [`MAX_FRAME`].
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let length = frame.len() - 4;
    if length > MAX_FRAME {
        return Err(too_long(length));
    }
    let length = u32::try_from(length).map_err(|_| too_long(length))?;
    frame[..4].copy_from_slice(&length.to_be_bytes());
    Ok(frame)
}

/// The message in a frame's body.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] when it is not a `T`.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> io::Result<T> {
    serde_json::from_slice(body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The length of the body that follows this header.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] when it is more than [`MAX_FRAME`].
pub fn body_length(header: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_be_bytes(header) as usize;
    if length > MAX_FRAME { Err(too_long(length)) } else { Ok(length) }
}

fn too_long(length: usize) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes is longer than {MAX_FRAME}"))
}

/// Puts a length in front of a body.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] when it is longer than [`MAX_FRAME`].
pub fn enclose(body: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(body.len()).ok().filter(|_| body.len() <= MAX_FRAME);
    let length = length.ok_or_else(|| too_long(body.len()))?;
    Ok([&length.to_be_bytes(), body].concat())
}

/// Reads the body of one frame and not a byte more, so that the stream can be handed to somebody else afterwards. `None` at a
/// clean end. Not cancel-safe.
///
/// # Errors
/// As the stream's, or [`io::ErrorKind::InvalidData`].
pub async fn read_body(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut header = [0; 4];
    let mut got = 0;
    while got < header.len() {
        match stream.read(&mut header[got..]).await? {
            0 if got == 0 => return Ok(None),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => got += n,
        }
    }
    let length = body_length(header)?;
    // Grows with what really arrives: a length alone must not make anybody allocate.
    let mut body = Vec::with_capacity(length.min(64 << 10));
    (&mut *stream).take(length as u64).read_to_end(&mut body).await?;
    if body.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    async fn read<T: DeserializeOwned>(stream: &mut &[u8]) -> io::Result<Option<T>> {
        read_body(stream).await?.map(|body| decode(&body)).transpose()
    }

    #[test]
    fn two_messages_then_the_end() {
        let mut bytes = encode(&"one").unwrap();
        bytes.extend(encode(&"two").unwrap());
        block_on(async {
            let mut stream = &bytes[..];
            assert_eq!(read::<String>(&mut stream).await.unwrap().as_deref(), Some("one"));
            assert_eq!(read::<String>(&mut stream).await.unwrap().as_deref(), Some("two"));
            assert_eq!(read::<String>(&mut stream).await.unwrap(), None);
        });
    }

    #[test]
    fn what_follows_a_message_is_left_in_the_stream() {
        let mut bytes = encode(&7u32).unwrap();
        bytes.extend(b"raw");
        let mut stream = &bytes[..];
        assert_eq!(block_on(read::<u32>(&mut stream)).unwrap(), Some(7));
        assert_eq!(stream, b"raw");
    }

    #[test]
    fn a_cut_message_is_an_error() {
        let bytes = encode(&"a message").unwrap();
        for cut in 1..bytes.len() {
            let error = block_on(read::<String>(&mut &bytes[..cut])).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "cut at {cut}");
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_at_once() {
        let header = u32::MAX.to_be_bytes();
        let error = block_on(read::<String>(&mut &header[..])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn whatever_arrives_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = block_on(read::<super::super::DaemonRequest>(&mut &bytes[..]));
            let _ = block_on(read::<super::super::ShimRequest>(&mut &bytes[..]));
        }
    }
}
