//! Images: from bytes, and made up.

use std::net::IpAddr;

use netstack::{Config, Instant, Offload, Stack, StackImage};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::example;
use crate::script::Script;
use crate::traffic::Subject;

/// Reads as a target does: packed, or plain as older sources wrote it.
fn read<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    if codec::is_packed(bytes) { codec::from_slice(bytes).ok() } else { rmp_serde::from_slice(bytes).ok() }
}

/// A value that was read, or made up, comes back the same in both encodings.
fn comes_back<T: Serialize + DeserializeOwned>(value: &T) {
    let packed = codec::to_vec(value).expect("it can be written");
    let again: T = codec::from_slice(&packed).expect("it can be read");
    let plain = rmp_serde::to_vec_named(value).expect("it can be written");
    // Maps with an order of their own aside, equal values are written equally; sizes are equal in any case.
    assert_eq!(rmp_serde::to_vec_named(&again).expect("it can be written").len(), plain.len());
    let again: T = rmp_serde::from_slice(&plain).expect("it can be read");
    assert_eq!(codec::to_vec(&again).expect("it can be written").len(), packed.len());
}

/// First byte 0: the rest is an image; else it decides what is in one.
fn image<T: Serialize + DeserializeOwned>(data: &[u8]) -> Option<T> {
    let (&how, rest) = data.split_first()?;
    let value: T = if how == 0 { read(rest)? } else { example::make(rest)? };
    comes_back(&value);
    Some(value)
}

fn run(image: StackImage, v6: bool, script: &[u8]) {
    let own: [IpAddr; 2] = [[10, 0, 0, 2].into(), "fd00::2".parse().expect("an address")];
    let config = Config { addresses: own.to_vec(), offload: Offload::NONE, foreign: true, ..Config::default() };
    let now = Instant::from_millis(5000);
    let Ok(stack) = Stack::thaw(image, now, config) else { return };
    let mut subject = Subject::new(stack, now, v6);
    subject.play(&mut Script::new(script));
}

/// A stack's image; if it is accepted, traffic follows.
pub fn stack_image(data: &[u8]) {
    // The script is short and comes last, so that bytes of an image keep their places.
    let (bytes, script) = data.split_at(data.len().saturating_sub(24));
    let v6 = script.first().is_some_and(|byte| byte & 1 != 0);
    if let Some(image) = image::<StackImage>(bytes) {
        run(image, v6, script);
    } else if let Some(image) = image::<StackImage>(data) {
        run(image, v6, &[]);
    }
}

/// What a process tree is made of.
pub fn checkpoint_image(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else { return };
    match kind % 4 {
        0 => drop(image::<checkpoint::TreeImage>(rest)),
        1 => drop(image::<checkpoint::Layout>(rest)),
        2 => drop(image::<checkpoint::Offer>(rest)),
        _ => drop(image::<checkpoint::Preview>(rest)),
    }
}
