//! Every target on every kept input, and on some thousand mutations of them that a seed decides.

use std::path::PathBuf;

/// Mutations of each input.
const MUTATIONS: u64 = 9;

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.expect("it can be read").path())
        .collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read(&path).expect("it can be read"))).collect()
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound.max(1)
    }
}

fn mutate(random: &mut Random, input: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..1 + random.below(6) {
        let at = random.below(bytes.len());
        match random.below(6) {
            _ if bytes.is_empty() => bytes.push(random.below(256) as u8),
            0 => bytes[at] = random.below(256) as u8,
            1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes.truncate(at),
            3 => bytes.insert(at, random.below(256) as u8),
            4 => {
                bytes.remove(at);
            }
            _ => {
                let from = random.below(other.len());
                let len = random.below(40).min(other.len() - from);
                bytes.splice(at..at, other[from..from + len].iter().copied());
            }
        }
    }
    bytes
}

#[test]
fn the_corpus_and_its_neighbours_find_nothing() {
    for (name, target) in fuzz::TARGETS {
        let corpus = corpus(name);
        assert!(!corpus.is_empty(), "{name} has no corpus");
        for (index, (path, input)) in corpus.iter().enumerate() {
            println!("{}", path.display());
            target(input);
            let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (index as u64 + 1));
            for mutation in 0..MUTATIONS {
                let other = &corpus[random.below(corpus.len())].1;
                let bytes = mutate(&mut random, input, other);
                let outcome = std::panic::catch_unwind(|| target(&bytes));
                assert!(outcome.is_ok(), "{name}: mutation {mutation} of {}: {bytes:02x?}", path.display());
            }
        }
    }
}

/// Makes the first inputs of a corpus, when asked to (`FUZZ_WRITE_SEEDS=1`): what a fuzzer would need long to come upon.
#[test]
fn write_seeds() {
    if std::env::var_os("FUZZ_WRITE_SEEDS").is_none() {
        return;
    }
    let images = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../netstack/tests/images");
    for (name, _) in fuzz::TARGETS {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        std::fs::create_dir_all(&directory).expect("it can be made");
        let mut random = Random(0x1234_5678);
        for index in 0..8u8 {
            let len = 40 + 40 * usize::from(index);
            let mut bytes: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
            bytes[0] = index;
            std::fs::write(directory.join(format!("seed-{index}")), bytes).expect("it can be written");
        }
        if name == "options" {
            std::fs::write(directory.join("offers"), offers()).expect("it can be written");
        }
        if name == "stack_image" {
            for family in ["ipv4", "ipv6"] {
                let image = std::fs::read(images.join(format!("v1-packed-{family}.image"))).expect("it is there");
                std::fs::write(directory.join(format!("zoo-{family}")), [&[0], &image[..]].concat()).expect("written");
            }
        }
    }
}

/// What a SYN offers, then timestamps and SACK blocks, one more in each segment.
fn offers() -> Vec<u8> {
    const OPTIONS_LEN: usize = 40;
    let mut segments = vec![vec![2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 1, 3, 3, 7]];
    for blocks in 0..4 {
        let mut options = vec![8, 10, 0, 0, 0, 10 + blocks, 0, 0, 0, 0];
        if blocks > 0 {
            options.extend([5, 2 + 8 * blocks]);
            options.extend(0..8 * blocks);
        }
        segments.push(options);
    }
    let padded = segments.into_iter().flat_map(|mut options| {
        options.resize(OPTIONS_LEN, 1);
        options
    });
    std::iter::once(0x30).chain(padded).collect()
}
