//! Arbitrary bytes as an adapter folder: `adapter_config.json`, a zero byte, then
//! `adapter_model.safetensors`.
//!
//! What is opened has, tensor by tensor, the values that the reference crate finds in the file; saved
//! and opened again it is the same; saved once more it is the same bytes, and no memory is lost.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use polytape::formats::{
    adapter::{self, AdapterFiles, save_adapter},
    poly_config,
};
use safetensors::{Dtype, SafeTensors};

use crate::{memory::net_bytes, messages::assert_presentable};

/// One adapter folder.
pub fn check(data: &[u8]) {
    let folder = Folder::new();
    let (config, tensors) = match data.iter().position(|&byte| byte == 0) {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (data, &[][..]),
    };
    let [given, saved, saved_again] = ["given", "saved", "again"].map(|name| folder.0.join(name));
    fs::create_dir_all(&given).expect("a folder");
    fs::write(given.join(poly_config::FILE_NAME), config).expect("a file");
    fs::write(given.join(adapter::FILE_NAME), tensors).expect("a file");
    let files = match AdapterFiles::open(&given) {
        Ok(files) => files,
        Err(error) => return assert_presentable(&error, "adapter_"),
    };

    save_adapter(&saved, &files.config, &files.modules, None).expect("a good adapter is saved");
    let written = fs::read(saved.join(adapter::FILE_NAME)).expect("a saved file");
    assert_same_values(tensors, &written, &files.ignored);
    let read = AdapterFiles::open(&saved).expect("a saved adapter is opened");
    assert_eq!((&read.config, &read.modules), (&files.config, &files.modules));
    let kept = net_bytes(|| {
        save_adapter(&saved_again, &read.config, &read.modules, None).expect("it is saved again");
    });
    assert_eq!(kept, 0, "saving leaks");
    for name in [adapter::FILE_NAME, poly_config::FILE_NAME] {
        let bytes = |folder: &Path| fs::read(folder.join(name)).expect("a saved file");
        assert_eq!(bytes(&saved), bytes(&saved_again), "{name}");
    }
}

/// All tensors of the file given, less the ignored ones, are in the one written, widened to f32.
fn assert_same_values(given: &[u8], written: &[u8], ignored: &[String]) {
    let parse = |bytes| SafeTensors::deserialize(bytes).expect("the reference crate accepts it");
    let (given, written) = (parse(given), parse(written));
    assert_eq!(given.len(), written.len() + ignored.len());
    for (name, tensor) in written.iter() {
        let original = given.tensor(name).expect("no tensor is invented");
        assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, original.shape()), "{name}");
        let bytes = original.data();
        let widened: Vec<u8> = match original.dtype() {
            Dtype::F32 => bytes.to_vec(),
            Dtype::BF16 => widen(bytes, |pair| half::bf16::from_le_bytes(pair).to_f32()),
            Dtype::F16 => widen(bytes, |pair| half::f16::from_le_bytes(pair).to_f32()),
            other => panic!("{name} was read although it is {other:?}"),
        };
        assert!(tensor.data() == widened, "{name} has other values");
    }
}

fn widen(bytes: &[u8], value: impl Fn([u8; 2]) -> f32) -> Vec<u8> {
    bytes.as_chunks().0.iter().flat_map(|&pair| value(pair).to_le_bytes()).collect()
}

/// A folder in memory where there is one, removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        Self(parent.join(format!("polytape-fuzz-{}-{number}", std::process::id())))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
