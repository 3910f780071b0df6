//! A model's weights: one file or shards, and an account of which tensors were used.
//!
//! ```text
//! model.safetensors                           -> Checkpoint -> tensor(name, shape) -> Frozen
//! model.safetensors.index.json + its shards   ->      |
//!                                                     +-> finish() -> every tensor used or ignored
//! ```
//!
//! A model takes its tensors by name and shape, says which others it knows and does not need
//! ([`Checkpoint::ignore`]), and [`Checkpoint::finish`] fails if any is left: a tensor that nobody
//! asked for means that the model computes something else than its file says. Each of the names that
//! an index lists lies in the shard it names, in no other shard, and no shard has a name that the
//! index does not list.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    error::{Error, Result},
    formats::{
        json::{self, UniqueMap, excerpt, list_names},
        mmap::{Access, MappedFile},
        safetensors::{SafetensorsFile, TensorInfo},
    },
    tensor::Frozen,
};

/// The most bytes of `model.safetensors.index.json`.
pub const MAX_INDEX_BYTES: u64 = 64 << 20;
/// The most shards of a model.
pub const MAX_SHARDS: usize = 4096;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const PICKLE_FILES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// The open weights of a model folder.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Of each tensor, its file and what became of it.
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Debug)]
struct Tensor {
    file: usize,
    fate: Option<Fate>,
}

/// What became of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The model computes with it.
    Used,
    /// The model does not need it, for this reason.
    Ignored(&'static str),
}

/// A line of the account: a tensor and what became of it.
#[derive(Clone, Debug)]
pub struct TensorUse {
    /// Its name.
    pub name: String,
    /// Its type, shape and place.
    pub info: TensorInfo,
    /// The file that has it.
    pub path: PathBuf,
    /// What became of it.
    pub fate: Fate,
}

impl Checkpoint {
    /// Opens the weights of a model folder and checks all headers.
    pub fn open(model_dir: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(model_dir, Access::Mapped)
    }

    /// [`Checkpoint::open`], with files that are mapped or read into memory.
    pub fn open_with(model_dir: impl AsRef<Path>, access: Access) -> Result<Self> {
        let dir = model_dir.as_ref().to_path_buf();
        let exists = |name: &str| dir.join(name).exists();
        // Like transformers: the single file wins if both are there.
        let files = if exists(SINGLE_FILE) {
            vec![SafetensorsFile::open_with(dir.join(SINGLE_FILE), access)?]
        } else if exists(INDEX_FILE) {
            return Self::open_shards(dir, access);
        } else {
            return Err(no_weights(&dir, PICKLE_FILES.into_iter().find(|name| exists(name))));
        };
        let names = files[0].header().tensors.keys();
        let tensors = names.map(|name| (name.clone(), Tensor { file: 0, fate: None })).collect();
        Ok(Self { dir, files, tensors })
    }

    fn open_shards(dir: PathBuf, access: Access) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: UniqueMap<String>,
        }
        let index_path = dir.join(INDEX_FILE);
        let index: Index = json::read_json(&index_path, MAX_INDEX_BYTES)?;
        let index = index.weight_map.0;
        let fail = |detail: String| Error::file(&index_path, detail);

        let shards: BTreeSet<&str> = index.values().map(String::as_str).collect();
        if shards.len() > MAX_SHARDS {
            return Err(fail(format!("{} shards; at most {MAX_SHARDS} are read", shards.len())));
        }
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        let mut unlisted = Vec::new();
        for &shard in &shards {
            check_shard_name(shard).map_err(&fail)?;
            let path = dir.join(shard);
            if !path.exists() {
                let n_tensors = index.values().filter(|name| *name == shard).count();
                return Err(fail(format!(
                    "shard {shard}, which has {n_tensors} of the tensors, is missing; copy or \
                    download the whole folder again"
                )));
            }
            let file = SafetensorsFile::open_with(path, access)?;
            for name in file.header().tensors.keys() {
                let tensor = Tensor { file: files.len(), fate: None };
                if let Some(Tensor { file: first, .. }) = tensors.insert(name.clone(), tensor) {
                    let first: &SafetensorsFile = &files[first];
                    return Err(Error::file(
                        file.path(),
                        format!("tensor {} is also in {}", excerpt(name), first.path().display()),
                    ));
                }
                if !index.contains_key(name) {
                    unlisted.push((shard, name.clone()));
                }
            }
            files.push(file);
        }
        for (name, shard) in &index {
            match tensors.get(name).map(|tensor| files[tensor.file].path()) {
                Some(path) if path == dir.join(shard) => {}
                Some(path) => {
                    let found = path.display();
                    return Err(fail(format!(
                        "tensor {} is said to be in {shard}, but is in {found}",
                        excerpt(name)
                    )));
                }
                None => {
                    return Err(fail(format!(
                        "tensor {} is said to be in {shard}, which does not have it; the index \
                        and the shards are not of one model",
                        excerpt(name)
                    )));
                }
            }
        }
        if let Some((shard, name)) = unlisted.first() {
            return Err(fail(format!(
                "shard {shard} has tensor {}, which the index does not list ({} such tensors); \
                the index and the shards are not of one model",
                excerpt(name),
                unlisted.len()
            )));
        }
        Ok(Self { dir, files, tensors })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The files that have the tensors.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The elements of all tensors.
    pub fn n_elements(&self) -> usize {
        let infos = self.names().filter_map(|name| self.info(name));
        infos.map(|info| info.shape.iter().product::<usize>()).sum()
    }

    /// A tensor's type, shape and place, without using it.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.files[self.tensors.get(name)?.file].header().tensors.get(name)
    }

    /// The mapped files, for [`MappedFile::verify_unchanged`] while the weights are in use.
    pub fn mapped_files(&self) -> Vec<Arc<MappedFile>> {
        self.files.iter().map(|file| Arc::clone(file.file())).collect()
    }

    /// A tensor that the model needs, of the shape that its configuration implies. A vector becomes a
    /// matrix of one row.
    pub fn tensor(&mut self, name: &str, expected_shape: &[usize]) -> Result<Frozen> {
        if let Some(tensor) = self.try_tensor(name, expected_shape)? {
            return Ok(tensor);
        }
        let near = near_names(name, self.names());
        let hint = if near.is_empty() {
            "config.json and the weights are not of one model".to_owned()
        } else {
            format!("near names: {}", list_names(near.into_iter()))
        };
        Err(Error::Tensors {
            path: self.dir.clone(),
            detail: format!("tensor {name} of shape {expected_shape:?} is missing; {hint}"),
        })
    }

    /// A tensor that the model uses if it is there.
    pub fn try_tensor(&mut self, name: &str, expected_shape: &[usize]) -> Result<Option<Frozen>> {
        let Some(tensor) = self.tensors.get_mut(name) else { return Ok(None) };
        let file = &self.files[tensor.file];
        let Some((frozen, shape)) = file.tensor(name)? else { return Ok(None) };
        if shape != expected_shape {
            return Err(Error::Shape {
                path: file.path().to_path_buf(),
                name: name.to_owned(),
                expected: expected_shape.to_vec(),
                found: shape.to_vec(),
            });
        }
        tensor.fate = Some(Fate::Used);
        Ok(Some(frozen))
    }

    /// Says why the model does not need a tensor. Without it, or if it was used, nothing happens.
    pub fn ignore(&mut self, name: &str, reason: &'static str) {
        if let Some(Tensor { fate: fate @ None, .. }) = self.tensors.get_mut(name) {
            *fate = Some(Fate::Ignored(reason));
        }
    }

    /// Says that the model needs no tensor but `original`, of which this is a copy; without it nothing happens.
    ///
    /// # Errors
    /// If its numbers are others.
    pub fn ignore_copy(&mut self, name: &str, original: &str, reason: &'static str) -> Result<()> {
        let tensor = |name: &str| match self.tensors.get(name) {
            Some(tensor) => self.files[tensor.file].tensor(name),
            None => Ok(None),
        };
        let Some((copy, shape)) = tensor(name)? else { return Ok(()) };
        let is_same = tensor(original)?.is_some_and(|(original, shape_of_original)| {
            (copy.dtype(), shape) == (original.dtype(), shape_of_original)
                && copy.bytes() == original.bytes()
        });
        if !is_same {
            return Err(Error::Tensors {
                path: self.dir.clone(),
                detail: format!(
                    "{name} is not the same as {original}: embeddings of its own for a stack are not supported"
                ),
            });
        }
        self.ignore(name, reason);
        Ok(())
    }

    /// The account of all tensors, by name. Fails if one was neither used nor ignored.
    pub fn finish(self) -> Result<Vec<TensorUse>> {
        let Self { dir, files, tensors } = self;
        let mut uses = Vec::with_capacity(tensors.len());
        let mut unexpected = Vec::new();
        for (name, Tensor { file, fate }) in tensors {
            let file = &files[file];
            let Some(fate) = fate else {
                unexpected.push(name);
                continue;
            };
            let info = file.header().tensors[&name].clone();
            uses.push(TensorUse { name, info, path: file.path().to_path_buf(), fate });
        }
        if !unexpected.is_empty() {
            return Err(Error::Tensors {
                path: dir,
                detail: format!(
                    "{} tensors belong to no part of the model that config.json describes: {}; \
                    config.json and the weights are not of one model, or it has parts that are \
                    not supported here",
                    unexpected.len(),
                    list_names(unexpected.iter().map(String::as_str))
                ),
            });
        }
        Ok(uses)
    }
}

/// A shard must be a file of the folder itself: an index is no way to other folders.
fn check_shard_name(name: &str) -> Result<(), String> {
    let bare = !matches!(name, "" | "." | "..")
        && !name.contains(|c: char| c.is_control() || matches!(c, '/' | '\\'));
    if bare { Ok(()) } else { Err(format!("shard {} is not a bare file name", excerpt(name))) }
}

fn no_weights(dir: &Path, pickle: Option<&str>) -> Error {
    if let Err(error) = std::fs::metadata(dir) {
        return Error::io("open", dir)(error);
    }
    Error::file(
        dir,
        match pickle {
            Some(found) => format!(
                "found {found}, a pickle, which can run code and is not read; convert it once \
                in Python: AutoModelForSeq2SeqLM.from_pretrained(DIR).save_pretrained(DIR, \
                safe_serialization=True) (AutoModelForCausalLM for causal models)"
            ),
            None => format!("not a model folder: neither {SINGLE_FILE} nor {INDEX_FILE} is in it"),
        },
    )
}

/// The up to three names with most dotted components in common with `name`.
pub(crate) fn near_names<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let wanted: Vec<&str> = name.split('.').collect();
    let mut near: Vec<(usize, &str)> = names
        .map(|other| (other.split('.').filter(|part| wanted.contains(part)).count(), other))
        // Less than half in common is another tensor altogether.
        .filter(|(n_common, _)| 2 * n_common >= wanted.len())
        .collect();
    near.sort_by_key(|&(n_common, other)| {
        (std::cmp::Reverse(n_common), other.len().abs_diff(name.len()), other)
    });
    near.into_iter().take(3).map(|(_, other)| other).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::formats::safetensors::write_safetensors;

    struct Folder(PathBuf);
    impl Folder {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("polytape-ckpt-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
        fn weights(&self, file: &str, names: &[&str]) {
            let shape: &[usize] = &[1, 2];
            let tensors: Vec<_> =
                names.iter().map(|&name| (name, shape, &[1.0, 2.0][..])).collect();
            write_safetensors(&self.0.join(file), &tensors).unwrap();
        }
        fn index(&self, entries: &[(&str, &str)]) {
            let map: BTreeMap<_, _> = entries.iter().copied().collect();
            let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
            fs::write(self.0.join(INDEX_FILE), index.to_string()).unwrap();
        }
        fn refusal(&self) -> String {
            Checkpoint::open(&self.0).unwrap_err().to_string()
        }
    }
    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn every_tensor_is_used_or_ignored() {
        let folder = Folder::new("account");
        folder.weights(SINGLE_FILE, &["a.q.weight", "a.k.weight", "rotary"]);
        let open = || Checkpoint::open(&folder.0).unwrap();

        let mut checkpoint = open();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a.k.weight", "a.q.weight", "rotary"]);
        assert_eq!(checkpoint.tensor("a.q.weight", &[1, 2]).unwrap().to_f32(), [1.0, 2.0]);
        assert!(checkpoint.try_tensor("lm_head.weight", &[1, 2]).unwrap().is_none());
        checkpoint.ignore("rotary", "recomputed");
        checkpoint.ignore("a.q.weight", "not after it was used");
        checkpoint.ignore("absent", "nothing to ignore");
        let error = checkpoint.tensor("a.v.weight", &[1, 2]).unwrap_err().to_string();
        assert!(error.contains("tensor a.v.weight of shape [1, 2] is missing"), "{error}");
        assert!(error.contains("near names: \"a.k.weight\", \"a.q.weight\""), "{error}");
        let error = checkpoint.tensor("a.k.weight", &[2, 1]).unwrap_err().to_string();
        assert!(error.contains("a.k.weight has shape [1, 2], not [2, 1]"), "{error}");
        let error = checkpoint.finish().unwrap_err().to_string();
        assert!(
            error.contains("1 tensors belong to no part") && error.contains("\"a.k.weight\""),
            "{error}"
        );

        let mut checkpoint = open();
        checkpoint.tensor("a.q.weight", &[1, 2]).unwrap();
        checkpoint.tensor("a.k.weight", &[1, 2]).unwrap();
        checkpoint.ignore("rotary", "recomputed");
        let uses = checkpoint.finish().unwrap();
        assert_eq!(uses.len(), 3);
        assert_eq!((uses[0].name.as_str(), &uses[0].fate), ("a.k.weight", &Fate::Used));
        assert_eq!(uses[2].fate, Fate::Ignored("recomputed"));
    }

    #[test]
    fn shards_agree_with_their_index() {
        let folder = Folder::new("shards");
        folder.weights("one.safetensors", &["a", "b"]);
        folder.weights("two.safetensors", &["c"]);
        let all = [("a", "one.safetensors"), ("b", "one.safetensors"), ("c", "two.safetensors")];
        folder.index(&all);
        let mut checkpoint = Checkpoint::open(&folder.0).unwrap();
        for name in ["a", "b", "c"] {
            checkpoint.tensor(name, &[1, 2]).unwrap();
        }
        assert_eq!(checkpoint.mapped_files().len(), 2);
        assert_eq!(checkpoint.finish().unwrap().len(), 3);

        folder.index(&[all[0], all[1], all[2], ("d", "two.safetensors")]);
        assert!(
            folder
                .refusal()
                .contains("\"d\" is said to be in two.safetensors, which does not have it")
        );
        folder.index(&[all[0], all[2]]);
        assert!(
            folder
                .refusal()
                .contains("one.safetensors has tensor \"b\", which the index does not list")
        );
        folder.index(&[all[0], ("b", "two.safetensors"), all[2]]);
        assert!(folder.refusal().contains("\"b\" is said to be in two.safetensors, but is in"));
        folder.index(&[all[0], all[1], ("c", "three.safetensors")]);
        assert!(
            folder
                .refusal()
                .contains("shard three.safetensors, which has 1 of the tensors, is missing")
        );
        folder.weights("two.safetensors", &["c", "a"]);
        folder.index(&all);
        assert!(folder.refusal().contains("tensor \"a\" is also in"));
        for name in ["../one.safetensors", "/etc/passwd", "x\\y", "..", ".", "", "a\0b"] {
            folder.index(&[("a", name)]);
            assert!(folder.refusal().contains("is not a bare file name"), "{name}");
        }
        fs::write(folder.0.join(INDEX_FILE), r#"{"weight_map":{"a":"x","a":"y"}}"#).unwrap();
        assert!(folder.refusal().contains("\"a\" comes twice"));
        fs::write(folder.0.join(INDEX_FILE), r#"{"weight_map":[]}"#).unwrap();
        assert!(folder.refusal().contains("expected an object"));
    }

    #[test]
    fn other_folders_are_refused_with_a_remedy() {
        let folder = Folder::new("other");
        assert!(folder.refusal().contains("neither model.safetensors nor"));
        fs::write(folder.0.join("pytorch_model.bin"), b"").unwrap();
        let error = folder.refusal();
        assert!(
            error.contains("pytorch_model.bin, a pickle")
                && error.contains("safe_serialization=True")
        );
        let error = Checkpoint::open(folder.0.join("absent")).unwrap_err().to_string();
        assert!(error.starts_with("cannot open "), "{error}");
    }
}
