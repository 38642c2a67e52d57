//! Values come back; readers and writers may differ by fields; no bytes make the reader panic.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use codec::{Error, from_slice, is_packed, to_vec};
use proptest::prelude::*;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Inner {
    number: u64,
    signed: i64,
    maybe: Option<u32>,
    float: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Choice {
    Nothing,
    One(Inner),
    Two(u8, String),
    Named { inner: Option<Inner>, flag: bool },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Wrapper(u16);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Empty {}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Everything {
    inner: Vec<Inner>,
    choices: VecDeque<Choice>,
    map: BTreeMap<u32, Choice>,
    names: HashMap<String, (u8, i16)>,
    #[serde(with = "serde_bytes")]
    bytes: Vec<u8>,
    array: [u8; 16],
    address: Option<SocketAddr>,
    duration: Duration,
    wrapper: Wrapper,
    unit: (),
    empty: Empty,
    letter: char,
    boxed: Option<Box<Everything>>,
}

fn inner() -> impl Strategy<Value = Inner> {
    let number = prop_oneof![any::<u64>(), 0..300u64, Just(u64::from(u32::MAX)), Just(1 << 32)];
    let signed = prop_oneof![any::<i64>(), -300..300i64, Just(i64::from(i32::MIN)), Just(-40_000)];
    (number, signed, any::<Option<u32>>(), -1e9..1e9).prop_map(|(number, signed, maybe, float)| Inner {
        number,
        signed,
        maybe,
        float,
    })
}

fn choice() -> impl Strategy<Value = Choice> {
    prop_oneof![
        Just(Choice::Nothing),
        inner().prop_map(Choice::One),
        (any::<u8>(), ".{0,40}").prop_map(|(number, text)| Choice::Two(number, text)),
        (proptest::option::of(inner()), any::<bool>()).prop_map(|(inner, flag)| Choice::Named { inner, flag }),
    ]
}

fn everything() -> impl Strategy<Value = Everything> {
    let first = (
        proptest::collection::vec(inner(), 0..40),
        proptest::collection::vec(choice(), 0..10),
        proptest::collection::btree_map(any::<u32>(), choice(), 0..20),
        proptest::collection::hash_map(".{0,9}", any::<(u8, i16)>(), 0..5),
        proptest::collection::vec(any::<u8>(), 0..70_000),
    );
    let second = (any::<[u8; 16]>(), any::<Option<(IpAddr, u16)>>(), any::<Duration>(), any::<u16>(), any::<char>());
    (first, second, any::<bool>()).prop_map(|((inner, choices, map, names, bytes), second, twice)| {
        let (array, address, duration, wrapper, letter) = second;
        let value = Everything {
            inner,
            choices: choices.into(),
            map,
            names,
            bytes,
            array,
            address: address.map(SocketAddr::from),
            duration,
            wrapper: Wrapper(wrapper),
            unit: (),
            empty: Empty {},
            letter,
            boxed: None,
        };
        Everything { boxed: twice.then(|| Box::new(value.clone())), ..value }
    })
}

fn back<T: Serialize + DeserializeOwned>(value: &T) -> T {
    from_slice(&to_vec(value).expect("encodes")).expect("decodes")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn values_come_back(value in everything()) {
        prop_assert_eq!(back(&value), value);
    }

    #[test]
    fn damaged_images_are_refused_or_read(
        value in everything(), at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()
    ) {
        let mut bytes = to_vec(&Everything { bytes: vec![7; 20], ..value }).expect("encodes");
        let _ = from_slice::<Everything>(&bytes[..cut.index(bytes.len())]);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = from_slice::<Everything>(&bytes);
    }

    #[test]
    fn any_bytes_are_survived(body in proptest::collection::vec(any::<u8>(), 0..200), len in 0..200u64) {
        let mut bytes = b"\xc1MI\x01".to_vec();
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(&body);
        let _ = from_slice::<Everything>(&bytes);
        let _ = from_slice::<Vec<Choice>>(&bytes);
        let _ = from_slice::<Everything>(&body);
    }
}

#[test]
fn names_stand_once() {
    let value = vec![Inner { number: 5, signed: -5, maybe: None, float: 0.0 }; 1000];
    let bytes = to_vec(&value).expect("encodes");
    let named = bytes.windows(6).filter(|window| window == b"number").count();
    assert_eq!(named, 1);
    assert!(bytes.len() < 1000 * 15, "{} bytes", bytes.len());
    assert!(is_packed(&bytes) && !is_packed(&bytes[1..]));
}

#[test]
fn a_reader_may_know_more_or_less() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Newer {
        float: f64,
        added: Vec<Inner>,
        number: u64,
        choice: Choice,
        signed: i64,
        maybe: Option<u32>,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Older {
        #[serde(default)]
        later: Option<String>,
        signed: i64,
        number: u64,
    }
    let inner = Inner { number: 9, signed: -9, maybe: Some(1), float: 0.5 };
    let newer = Newer {
        float: 0.5,
        added: vec![inner.clone(); 3],
        number: 9,
        choice: Choice::Named { inner: Some(inner.clone()), flag: true },
        signed: -9,
        maybe: Some(1),
    };
    let bytes = to_vec(&vec![newer]).expect("encodes");
    assert_eq!(from_slice::<Vec<Inner>>(&bytes).expect("decodes"), [inner]);
    let older = Older { later: None, signed: -9, number: 9 };
    assert_eq!(from_slice::<Vec<Older>>(&bytes).expect("decodes"), [older]);
}

/// Structs of one name with other fields each time have a shape each, and more than 128 of them are numbered in two bytes.
#[test]
fn shapes_are_told_apart() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Sparse {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        a: Option<u8>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        b: Option<u8>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        c: Option<u8>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        d: Option<u8>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        e: Option<u8>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        f: Option<u8>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        g: Option<u8>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        h: Option<u8>,
        #[serde(default)]
        deeper: Vec<Sparse>,
    }
    let sparse = |bits: u8, deeper| {
        let at = |bit: u8| (bits >> bit & 1 != 0).then_some(bit);
        Sparse { a: at(0), b: at(1), c: at(2), d: at(3), e: at(4), f: at(5), g: at(6), h: at(7), deeper }
    };
    let value: Vec<Sparse> =
        (0..=255).map(|bits| sparse(bits, vec![sparse(!bits, vec![]), sparse(bits, vec![])])).collect();
    assert_eq!(back(&value), value);
}

#[test]
fn depth_is_limited() {
    let mut bytes = b"\xc1MI\x01".to_vec();
    let body = [vec![0x91; 100_000], vec![0xc0]].concat();
    bytes.extend_from_slice(&(body.len() as u64).to_be_bytes());
    bytes.extend_from_slice(&body);
    bytes.extend_from_slice(&[0x92, 0x90, 0x90]);
    #[derive(Debug, Deserialize)]
    struct Nest {
        #[allow(dead_code)]
        inside: Vec<Nest>,
    }
    assert!(from_slice::<Nest>(&bytes).is_err());
    // What nobody reads may be as deep as it likes.
    from_slice::<serde::de::IgnoredAny>(&bytes).expect("it is passed over");
    assert_eq!(from_slice::<Vec<u8>>(b"").expect_err("no image"), Error::Magic);
}
