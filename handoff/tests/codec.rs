//! Frames survive the way there and back, and no bytes make the decoder panic.

use handoff::frame::{DecodeError, HEADER_LEN, Header, MAX_PAYLOAD, encode, pages_prefix};
use handoff::message::{Claim, Committed, Hello, Message, Offer, Reason, ResidualEnd, Round, SectionKind};
use proptest::prelude::*;

fn decode(bytes: &[u8]) -> Option<Result<Message<'_>, DecodeError>> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>()?;
    let header = match Header::decode(header) {
        Ok(header) => header,
        Err(error) => return Some(Err(error)),
    };
    Some(header.open(rest.get(..header.payload_len())?))
}

fn section() -> impl Strategy<Value = SectionKind> {
    prop_oneof![Just(SectionKind::Tree), Just(SectionKind::Net), Just(SectionKind::Output), Just(SectionKind::Shim)]
}

fn owned() -> impl Strategy<Value = Message<'static>> {
    let claim =
        (".*", any::<u64>(), ".*", ".*").prop_map(|(job, epoch, source, target)| Claim { job, epoch, source, target });
    let bytes = || proptest::collection::vec(any::<u8>(), 0..300);
    prop_oneof![
        (any::<u16>(), any::<u16>(), ".*", ".*").prop_map(|(protocol_min, protocol_max, node, release)| {
            Message::Hello(Hello { protocol_min, protocol_max, node, release })
        }),
        (claim, bytes(), bytes(), bytes()).prop_map(|(claim, spec, process, net)| Message::Offer(Offer {
            claim,
            spec,
            process,
            net
        })),
        Just(Message::Accept),
        ".*".prop_map(|reason| Message::Refuse(Reason { reason })),
        any::<u32>().prop_map(|number| Message::RoundEnd(Round { number })),
        any::<u32>().prop_map(|number| Message::RoundAck(Round { number })),
        Just(Message::Freezing),
        proptest::collection::vec((section(), any::<u64>()), 0..5)
            .prop_map(|sections| Message::ResidualEnd(ResidualEnd { sections })),
        Just(Message::Prepared),
        (any::<u64>(), any::<u64>(), proptest::collection::vec((".*", any::<u64>()), 0..4))
            .prop_map(|(epoch, running_at_ns, steps)| Message::Committed(Committed { epoch, running_at_ns, steps })),
        ".*".prop_map(|reason| Message::Abort(Reason { reason })),
    ]
}

proptest! {
    #[test]
    fn control_messages_come_back(message in owned()) {
        let mut bytes = Vec::new();
        encode(&message, &mut bytes);
        prop_assert_eq!(decode(&bytes).expect("whole").expect("valid"), message);
    }

    #[test]
    fn bulk_comes_back(process: u32, address: u64, data in proptest::collection::vec(any::<u8>(), 0..5000),
                       kind in section()) {
        for message in [Message::Pages { process, address, data: &data }, Message::Layout(&data),
                        Message::Section { kind, data: &data }] {
            let mut bytes = Vec::new();
            encode(&message, &mut bytes);
            prop_assert_eq!(decode(&bytes).expect("whole").expect("valid"), message);
        }
        let mut parts = pages_prefix(process, address, &data).to_vec();
        parts.extend_from_slice(&data);
        prop_assert_eq!(decode(&parts).expect("whole").expect("valid"), Message::Pages { process, address, data: &data });
    }

    #[test]
    fn a_damaged_byte_is_noticed(message in owned(), at: prop::sample::Index, flip in 1_u8..) {
        let mut bytes = Vec::new();
        encode(&message, &mut bytes);
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        // A damaged length may ask for more than is there; whatever is complete must be refused.
        if let Some(result) = decode(&bytes) {
            prop_assert!(result.is_err());
        }
    }

    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(&bytes);
    }

    /// Past magic, version and checksum, where the decoders of the payloads are.
    #[test]
    fn any_payload_of_any_kind_is_survived(kind in 0_u16..20, payload in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = b"MIGD\x00\x01".to_vec();
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(payload.len()).expect("small").to_be_bytes());
        let crc = {
            let mut crc = crc32fast::Hasher::new();
            crc.update(&bytes[4..]);
            crc.update(&payload);
            crc.finalize()
        };
        bytes.extend_from_slice(&crc.to_be_bytes());
        bytes.extend_from_slice(&payload);
        let refused_by_the_envelope = matches!(
            decode(&bytes).expect("whole"),
            Err(DecodeError::Checksum { .. } | DecodeError::Magic(_) | DecodeError::Version(_))
        );
        prop_assert!(!refused_by_the_envelope, "this test frames as the crate does");
    }
}

#[test]
fn a_length_beyond_the_limit_is_refused_from_the_header_alone() {
    let mut bytes = Vec::new();
    encode(&Message::Accept, &mut bytes);
    let limit = u32::try_from(MAX_PAYLOAD).expect("small");
    bytes[8..12].copy_from_slice(&(limit + 1).to_be_bytes());
    assert!(matches!(decode(&bytes), Some(Err(DecodeError::TooLarge(length))) if length == limit + 1));
}
