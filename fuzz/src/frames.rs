//! Frames of a move.

use handoff::frame::{DecodeError, HEADER_LEN, Header, MAGIC, VERSION};
use handoff::message::Message;

fn decode(bytes: &[u8]) -> Option<Result<Message<'_>, DecodeError>> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>()?;
    let header = match Header::decode(header) {
        Ok(header) => header,
        Err(error) => return Some(Err(error)),
    };
    Some(header.open(rest.get(..header.payload_len())?))
}

/// Bytes as a peer might send them; and as the payload of a frame whose envelope is right.
pub fn handoff(data: &[u8]) {
    if let Some(Err(error)) = decode(data) {
        // What went wrong must be sayable.
        let _ = error.to_string();
    }
    let Some((&kind, payload)) = data.split_first() else { return };
    let mut frame = MAGIC.to_vec();
    frame.extend_from_slice(&VERSION.to_be_bytes());
    frame.extend_from_slice(&u16::from(kind % 20).to_be_bytes());
    frame.extend_from_slice(&u32::try_from(payload.len()).expect("short").to_be_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&frame[4..]);
    crc.update(payload);
    frame.extend_from_slice(&crc.finalize().to_be_bytes());
    frame.extend_from_slice(payload);
    match decode(&frame).expect("a whole frame") {
        Ok(message) => {
            let mut again = Vec::new();
            handoff::encode(&message, &mut again);
            let same = decode(&again).expect("a whole frame").expect("what was decoded can be encoded");
            assert_eq!(same, message);
        }
        Err(error) => {
            let _ = error.to_string();
            assert!(!matches!(error, DecodeError::Checksum { .. } | DecodeError::Magic(_)), "{error}");
        }
    }
}
