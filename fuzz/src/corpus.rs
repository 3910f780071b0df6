//! The committed corpus, for tests: as it is, and with random damage.

use std::{
    env, fs,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// What is put in place of a number, or of anything.
const WORDS: [&[u8]; 14] = [
    b"0",
    b"-1",
    b"1e308",
    b"NaN",
    b"4294967296",
    b"9223372036854775807",
    b"18446744073709551615",
    b"null",
    b"[]",
    b"{}",
    b"\"\"",
    b"..",
    b"\xff\xfe",
    b"\0",
];

/// Runs `check` on every file of `fuzz/corpus/<target>`, as the fuzzer would, and then for
/// `POLYTAPE_FUZZ_SECONDS` (4) on damaged ones. The damage is new in each run unless
/// `POLYTAPE_FUZZ_SEED` repeats one; what fails is kept in a file that the failure names.
pub fn replay(target: &str, check: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = (fs::read_dir(&folder).expect("the corpus is committed"))
        .map(|entry| entry.expect("a file").path())
        .collect();
    files.sort();
    assert!(files.len() >= 5, "{} is nearly empty", folder.display());
    let corpus: Vec<Vec<u8>> = files
        .iter()
        .map(|file| {
            println!("{}", file.display()); // Shown if the check fails.
            let bytes = fs::read(file).expect("a readable file");
            check(&bytes);
            bytes
        })
        .collect();
    damage(target, &corpus, check);
}

fn damage(target: &str, corpus: &[Vec<u8>], check: fn(&[u8])) {
    let number = |name| env::var(name).ok().map(|n| n.parse::<u64>().expect("a number"));
    let seconds = number("POLYTAPE_FUZZ_SECONDS").unwrap_or(4);
    let seed = number("POLYTAPE_FUZZ_SEED").unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64)
    });
    let (started, mut random, mut n) = (Instant::now(), Random(seed), 0);
    while started.elapsed() < Duration::from_secs(seconds) {
        let bytes = random.damaged(corpus);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(&bytes))) {
            let kept =
                PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}-{seed}-{n}"));
            fs::write(&kept, &bytes).expect("the folder for tests' files");
            println!("{target}: damaged file {n} of seed {seed} fails; it is {}", kept.display());
            resume_unwind(panic);
        }
        n += 1;
    }
    println!("{target}: {n} damaged files, seed {seed}");
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.word() % n.max(1) as u64) as usize
    }

    /// A short range in `0..n`.
    fn range(&mut self, n: usize) -> std::ops::Range<usize> {
        let start = self.below(n + 1);
        let longest = (n - start).min(1 << self.below(8));
        start..start + self.below(longest + 1)
    }

    /// A file of the corpus with up to eight faults.
    fn damaged(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = corpus[self.below(corpus.len())].clone();
        for _ in 0..1 + self.below(8) {
            let range = self.range(bytes.len());
            match self.below(8) {
                0 if !bytes.is_empty() => {
                    let at = self.below(bytes.len());
                    bytes[at] ^= 1 << self.below(8);
                }
                1 if !bytes.is_empty() => {
                    let at = self.below(bytes.len());
                    bytes[at] = self.word() as u8;
                }
                2 => drop(bytes.drain(range)),
                3 => {
                    let again = bytes[range].to_vec();
                    let at = self.below(bytes.len() + 1);
                    bytes.splice(at..at, again);
                }
                4 => {
                    let other = &corpus[self.below(corpus.len())];
                    let part = self.range(other.len());
                    bytes.splice(range, other[part].iter().copied());
                }
                5 => {
                    let word = WORDS[self.below(WORDS.len())];
                    bytes.splice(range, word.iter().copied());
                }
                6 => {
                    let starts: Vec<usize> = (0..bytes.len())
                        .filter(|&i| {
                            bytes[i].is_ascii_digit() && (i == 0 || !bytes[i - 1].is_ascii_digit())
                        })
                        .collect();
                    if starts.is_empty() {
                        continue;
                    }
                    let start = starts[self.below(starts.len())];
                    let n = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                    let word = WORDS[self.below(WORDS.len())];
                    bytes.splice(start..start + n, word.iter().copied());
                }
                _ => bytes.truncate(range.end),
            }
        }
        bytes
    }
}
