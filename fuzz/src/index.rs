//! Arbitrary bytes as `model.safetensors.index.json`, beside two shards.
//!
//! An accepted index names every tensor of the shards, each in the shard that has it, and nothing
//! else: no file outside the folder, no tensor twice, none left out.

use std::{cell::OnceCell, collections::BTreeMap, fs, path::PathBuf};

use polytape::formats::{checkpoint::Checkpoint, safetensors::write_safetensors};

use crate::messages::assert_presentable;

/// The tensors of each shard.
const SHARDS: [(&str, &[&str]); 2] =
    [("a.safetensors", &["decoder.x", "encoder.y"]), ("b.safetensors", &["shared.weight"])];
const INDEX_FILE: &str = "model.safetensors.index.json";

/// What is read of an index. The rest may be JSON that no program can hold, such as a number of 1e999.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

thread_local! {
    static FOLDER: OnceCell<PathBuf> = const { OnceCell::new() };
}

/// A folder with the two shards, one for each thread.
fn folder() -> PathBuf {
    let make = || {
        let thread = format!("{:?}", std::thread::current().id()).replace(['(', ')'], "-");
        let name = format!("polytape-fuzz-index-{}-{thread}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).expect("a scratch folder");
        // Outside, and in the folder but no shard: neither may be opened.
        fs::write(folder.join("c.safetensors"), "no safetensors file").expect("a file");
        for (shard, names) in SHARDS {
            let shape: &[usize] = &[1, 2];
            let tensors: Vec<_> =
                names.iter().map(|&name| (name, shape, &[1.0, 2.0][..])).collect();
            write_safetensors(&folder.join(shard), &tensors).expect("a shard");
        }
        folder
    };
    FOLDER.with(|folder| folder.get_or_init(make).clone())
}

/// An index of the two shards.
pub fn check(data: &[u8]) {
    let folder = folder();
    fs::write(folder.join(INDEX_FILE), data).expect("the scratch folder is writable");
    let checkpoint = match Checkpoint::open(&folder) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return assert_presentable(&error, ""),
    };
    let index: Index = serde_json::from_slice(data).expect("it was accepted");
    let names = index.weight_map.iter().map(|(name, shard)| (name.as_str(), shard.as_str()));
    let named: BTreeMap<&str, &str> = names.collect();
    let there: BTreeMap<&str, &str> = SHARDS
        .into_iter()
        .filter(|(shard, _)| named.values().any(|named| named == shard))
        .flat_map(|(shard, names)| names.iter().map(move |&name| (name, shard)))
        .collect();
    assert_eq!(named, there);
    assert!(checkpoint.names().eq(there.keys().copied()));
    for file in checkpoint.files() {
        assert_eq!(file.path().parent(), Some(folder.as_path()));
    }
    let found = checkpoint.mapped_files().len();
    assert_eq!(found, there.values().collect::<std::collections::BTreeSet<_>>().len());
}
