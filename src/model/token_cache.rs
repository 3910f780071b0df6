//! Tokenised texts, kept between runs.
//!
//! ```text
//! DIR/train-3f0c9a51d2e87b64.tokens    of a data file and a tokenizer
//!   "polytape tokens 1\n"
//!   u64 the tokenizer's fingerprint    u64 entries
//!   for each entry                     u128 its text's key    u32 how many    u32 ids ...
//!   u64 the fingerprint of all before                         (all little-endian)
//! ```
//!
//! An entry is found by its text, not by its place: length limits, columns, splits and the order of rows
//! are dealt with after tokenisation, so nothing of them can make an entry wrong. What it does depend on
//! is the tokenizer (the bytes of its file and this program's version), which the name and the header
//! hold, and the text, of which 128 bits are compared. A file that is cut, changed or of another version
//! is made anew; texts that are new are added.

use std::{
    collections::HashMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::dataset::Encode;
use crate::{
    error::{Error, Result},
    formats::{fingerprint::Fingerprint, json::open_regular, safetensors::write_atomically},
};

const MAGIC: &[u8] = b"polytape tokens 1\n";
/// The most bytes of a file: it is read whole.
const MAX_BYTES: u64 = 16 << 30;

/// A tokenizer that remembers.
pub struct TokenCache<'t> {
    tokenizer: &'t dyn Encode,
    fingerprint: u64,
    path: PathBuf,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    ids: HashMap<u128, Vec<u32>>,
    n_found: usize,
    n_new: usize,
}

impl<'t> TokenCache<'t> {
    /// Opens or begins the cache of a data file in a folder, which is made if it is not there.
    /// `fingerprint` is the tokenizer's.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn open(
        dir: &Path,
        data: &Path,
        tokenizer: &'t dyn Encode,
        mut fingerprint: Fingerprint,
    ) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        fingerprint.add(env!("CARGO_PKG_VERSION").as_bytes());
        let mut place = fingerprint;
        let whole = data.canonicalize().unwrap_or_else(|_| data.to_path_buf());
        place.add(whole.as_os_str().as_encoded_bytes());
        let stem = data.file_stem().unwrap_or_default().to_string_lossy();
        let path = dir.join(format!("{stem}-{place}.tokens"));
        let fingerprint = fingerprint.value();
        let mut entries = Entries::default();
        match read(&path) {
            None => {}
            Some(bytes) => match parse(&bytes, fingerprint) {
                Some(ids) => entries.ids = ids,
                None => tracing::warn!("{}: not a whole cache, made anew", path.display()),
            },
        }
        Ok(Self { tokenizer, fingerprint, path, entries: Mutex::new(entries) })
    }

    /// Every change is whole, so a panic elsewhere is no reason to do without.
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is new.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(self) -> Result<()> {
        let Entries { ids, n_found, n_new } =
            self.entries.into_inner().unwrap_or_else(PoisonError::into_inner);
        tracing::info!("{}: {n_found} texts found, {n_new} new", self.path.display());
        if n_new == 0 {
            return Ok(());
        }
        let mut all: Vec<_> = ids.into_iter().collect();
        all.sort_unstable_by_key(|(key, _)| *key);
        write_atomically(&self.path, |file| {
            let mut print = Fingerprint::default();
            let mut put = |bytes: &[u8]| {
                print.add(bytes);
                file.write_all(bytes)
            };
            put(MAGIC)?;
            put(&self.fingerprint.to_le_bytes())?;
            put(&(all.len() as u64).to_le_bytes())?;
            for (key, ids) in &all {
                put(&key.to_le_bytes())?;
                put(&(ids.len() as u32).to_le_bytes())?;
                put(bytemuck::cast_slice::<u32, u8>(&little_endian(ids)))?;
            }
            file.write_all(&print.value().to_le_bytes())
        })
    }
}

impl Encode for TokenCache<'_> {
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let key = key(text, special);
        {
            let mut entries = self.entries();
            if let Some(ids) = entries.ids.get(&key).cloned() {
                entries.n_found += 1;
                return Ok(ids);
            }
        }
        let ids = self.tokenizer.encode(text, special)?; // While others look theirs up.
        let mut entries = self.entries();
        let is_new = entries.ids.insert(key, ids.clone()).is_none();
        entries.n_new += usize::from(is_new);
        entries.n_found += usize::from(!is_new); // By another thread, meanwhile.
        Ok(ids)
    }
}

fn little_endian(ids: &[u32]) -> Vec<u32> {
    ids.iter().map(|id| id.to_le()).collect()
}

/// FNV-1a in 128 bits.
fn key(text: &str, special: bool) -> u128 {
    let bytes = text.bytes().chain([u8::from(special)]);
    bytes.fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |key, byte| {
        (key ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    })
}

/// The bytes of a file that is there and can be read; a cache is no reason to fail.
fn read(path: &Path) -> Option<Vec<u8>> {
    use std::io::Read;
    if !path.exists() {
        return None;
    }
    let mut bytes = Vec::new();
    open_regular(path).ok()?.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The entries of a file, if it is whole and of this tokenizer.
fn parse(bytes: &[u8], fingerprint: u64) -> Option<HashMap<u128, Vec<u32>>> {
    let (content, print) = bytes.split_at_checked(bytes.len().checked_sub(8)?)?;
    let mut found = Fingerprint::default();
    found.add(content);
    if found.value().to_le_bytes() != print {
        return None;
    }
    let mut rest = content.strip_prefix(MAGIC)?;
    let mut take = |n: usize| {
        let (first, others) = rest.split_at_checked(n)?;
        rest = others;
        Some(first)
    };
    if take(8)? != fingerprint.to_le_bytes() {
        return None;
    }
    let n = u64::from_le_bytes(take(8)?.try_into().ok()?);
    let mut entries = HashMap::new();
    for _ in 0..n {
        let key = u128::from_le_bytes(take(16)?.try_into().ok()?);
        let n_ids = u32::from_le_bytes(take(4)?.try_into().ok()?) as usize;
        let ids = take(n_ids.checked_mul(4)?)?.as_chunks::<4>().0;
        entries.insert(key, ids.iter().map(|id| u32::from_le_bytes(*id)).collect());
    }
    rest.is_empty().then_some(entries)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Bytes as ids; counts how often it is asked.
    #[derive(Default)]
    struct Bytes(AtomicUsize);
    impl Encode for Bytes {
        fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(text.bytes().map(u32::from).chain(special.then_some(1)).collect())
        }
    }

    fn print(of: &str) -> Fingerprint {
        let mut print = Fingerprint::default();
        print.add(of.as_bytes());
        print
    }

    /// What is asked, and how often the tokenizer was.
    fn run(dir: &Path, data: &str, tokenizer: &str, texts: &[&str]) -> usize {
        let bytes = Bytes::default();
        let cache = TokenCache::open(dir, Path::new(data), &bytes, print(tokenizer)).unwrap();
        for text in texts {
            for special in [true, false] {
                let expected = Bytes::default().encode(text, special).unwrap();
                assert_eq!(cache.encode(text, special).unwrap(), expected);
            }
        }
        cache.save().unwrap();
        bytes.0.into_inner()
    }

    #[test]
    fn texts_are_tokenised_once() {
        let dir = std::env::temp_dir().join(format!("polytape-tokens-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        assert_eq!(run(&dir, "a.jsonl", "t", &["x", "yy", "x"]), 4);
        assert_eq!(run(&dir, "a.jsonl", "t", &["yy", "x"]), 0, "in any order");
        assert_eq!(run(&dir, "a.jsonl", "t", &["yy", "z"]), 2, "what is new");
        assert_eq!(run(&dir, "a.jsonl", "t", &["x", "yy", "z"]), 0, "nothing was lost");
        assert_eq!(run(&dir, "b.jsonl", "t", &["x"]), 2, "another file");
        assert_eq!(run(&dir, "a.jsonl", "u", &["x"]), 2, "another tokenizer");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 3);
        fs::remove_dir_all(dir).unwrap();
    }

    /// Every byte that is lost or changed is noticed, and the file is made anew.
    #[test]
    fn a_damaged_file_is_made_anew() {
        let dir = std::env::temp_dir().join(format!("polytape-damaged-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        assert_eq!(run(&dir, "a.jsonl", "t", &["x", "yy"]), 4);
        let path = fs::read_dir(&dir).unwrap().next().unwrap().unwrap().path();
        let whole = fs::read(&path).unwrap();
        let mut damaged: Vec<Vec<u8>> = (0..whole.len()).map(|n| whole[..n].to_vec()).collect();
        damaged.extend((0..whole.len()).map(|i| {
            let mut bytes = whole.clone();
            bytes[i] ^= 1;
            bytes
        }));
        damaged.push([&whole[..], b"more"].concat());
        for bytes in damaged {
            fs::write(&path, &bytes).unwrap();
            assert_eq!(run(&dir, "a.jsonl", "t", &["x", "yy"]), 4, "{} bytes", bytes.len());
            assert_eq!(fs::read(&path).unwrap(), whole);
        }
        fs::remove_dir_all(dir).unwrap();
    }
}
