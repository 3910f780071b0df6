//! A base with a LoRA merged into it: the same folder, some of its weights others.
//!
//! ```text
//! model-00001-of-00002.safetensors    header      the same bytes
//!                                     q.weight    round(W + (1/r) B̂ᵀÂᵀ)
//!                                     others      the same bytes
//! index, config, tokenizer            the same bytes
//! ```
//!
//! A merged weight is summed in f32 (its delta in f64) and rounded once to the type of its file. Files
//! are written tensor by tensor: of a model larger than memory one tensor's rows are held at a time.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::Path,
};

use half::{bf16, f16};
use rayon::prelude::*;

use crate::{
    dtype::Dtype,
    error::{Error, Result},
    formats::{
        checkpoint::Checkpoint,
        json::open_regular,
        lora::LoraPair,
        safetensors::{SafetensorsFile, write_atomically},
    },
    tensor::{Bytes, Frozen},
};

/// What was merged.
#[derive(Clone, Debug, Default)]
pub struct Merged {
    /// Weights that changed.
    pub n_merged: usize,
    /// Tensors that are the same bytes.
    pub n_kept: usize,
    /// Files beside the weights that were copied.
    pub copied: Vec<String>,
    /// Files of the source that were not.
    pub left: Vec<String>,
}

/// Bytes of a merged weight that are made at a time.
const CHUNK_BYTES: usize = 8 << 20;

/// Writes the folder of `checkpoint` to the folder `out`, with `scale · bᵀaᵀ` of each pair added to
/// `<path>.weight`, which lies `[d_out, d_in]`, or where `transposed` (GPT-2) `[d_in, d_out]`.
///
/// # Errors
/// If there is no such weight, its shape is another, a sum is not finite in its type, or a file
/// cannot be read or written.
pub fn write_merged(
    checkpoint: &Checkpoint,
    pairs: &BTreeMap<String, LoraPair>,
    scale: f64,
    transposed: bool,
    out: &Path,
) -> Result<Merged> {
    let mut by_name: BTreeMap<String, &LoraPair> = BTreeMap::new();
    let turned: BTreeMap<String, LoraPair> = match transposed {
        true => pairs.iter().map(|(path, pair)| (path.clone(), pair.transposed())).collect(),
        false => BTreeMap::new(),
    };
    for (path, pair) in if transposed { &turned } else { pairs } {
        let name = format!("{path}.weight");
        // A file of the bare model has names without the wrapper's prefix.
        let bare = ["model.", "transformer."].iter().find_map(|prefix| name.strip_prefix(prefix));
        let bare = bare.unwrap_or(&name);
        let found = [name.as_str(), bare].into_iter().find(|n| checkpoint.info(n).is_some());
        let Some(found) = found else {
            return Err(Error::Tensors {
                path: checkpoint.dir().to_path_buf(),
                detail: format!("tensor {name} is missing, which the adapter changes"),
            });
        };
        let expected = [pair.d_out, pair.d_in];
        match checkpoint.info(found) {
            Some(info) if info.shape != expected => {
                return Err(Error::Shape {
                    path: checkpoint.dir().to_path_buf(),
                    name,
                    expected: expected.to_vec(),
                    found: info.shape.clone(),
                });
            }
            _ => by_name.insert(found.to_owned(), pair),
        };
    }
    let mut merged = Merged::default();
    for file in checkpoint.files() {
        write_file(file, &by_name, scale, out, &mut merged)?;
        file.file().verify_unchanged()?;
    }
    copy_rest(checkpoint, out, &mut merged)?;
    Ok(merged)
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn write_file(
    file: &SafetensorsFile,
    pairs: &BTreeMap<String, &LoraPair>,
    scale: f64,
    out: &Path,
    merged: &mut Merged,
) -> Result<()> {
    let bytes = file.file().bytes();
    let mut tensors: Vec<_> = file.header().tensors.iter().collect();
    tensors.sort_by_key(|(_, info)| (info.range.start, info.range.end));
    let header = tensors.first().map_or(bytes.len(), |(_, info)| info.range.start);
    let mut weights = BTreeMap::new();
    for (name, _) in &tensors {
        if let Some(&pair) = pairs.get(*name) {
            weights.insert(name.as_str(), (file.tensor(name)?, pair));
        }
    }
    merged.n_merged += weights.len();
    merged.n_kept += tensors.len() - weights.len();
    let mut overflow = None;
    let written = write_atomically(&out.join(file_name(file.path())), |to| {
        to.write_all(&bytes[..header])?;
        for (name, info) in &tensors {
            match weights.get(name.as_str()) {
                Some((Some((weight, _)), pair)) => {
                    if let Some(row) = write_sum(weight, pair, scale, to)? {
                        overflow = Some((name.to_string(), weight.dtype(), row));
                        return Err(io::Error::other("a value is not finite"));
                    }
                }
                _ => to.write_all(&bytes[info.range.clone()])?,
            }
        }
        Ok(())
    });
    match overflow {
        Some((name, dtype, row)) => Err(Error::NotFinite(format!(
            "row {row} of {name} is not finite in {dtype} with the adapter merged; nothing was written"
        ))),
        None => written,
    }
}

/// Writes `round(weight + scale · bᵀaᵀ)`; the first row with a sum that is not finite although the
/// weight is, if any.
fn write_sum(
    weight: &Frozen,
    pair: &LoraPair,
    scale: f64,
    to: &mut dyn Write,
) -> io::Result<Option<usize>> {
    let &LoraPair { r, d_in, d_out, .. } = pair;
    let rows_at_once = (CHUNK_BYTES / (4 * d_in).max(1)).max(1);
    for first in (0..d_out).step_by(rows_at_once) {
        let n_rows = rows_at_once.min(d_out - first);
        let rows = (first..first + n_rows).into_par_iter().map(|o| {
            let mut delta = vec![0.0_f64; d_in];
            for k in 0..r {
                let b = scale * f64::from(pair.b[o * r + k]);
                let a = &pair.a[k * d_in..][..d_in];
                delta.iter_mut().zip(a).for_each(|(delta, &a)| *delta += b * f64::from(a));
            }
            let old = weight.part(o * d_in, 1, d_in).to_f32();
            let mut bytes = Vec::with_capacity(d_in * weight.dtype().size_bytes());
            let mut is_finite = true;
            for (&old, &delta) in old.iter().zip(&delta) {
                let new = old + delta as f32;
                let rounded = match weight.dtype() {
                    Dtype::Bf16 => {
                        let new = bf16::from_f32(new);
                        bytes.extend(new.to_le_bytes());
                        new.to_f32()
                    }
                    Dtype::F16 => {
                        let new = f16::from_f32(new);
                        bytes.extend(new.to_le_bytes());
                        new.to_f32()
                    }
                    Dtype::F32 | Dtype::F64 => {
                        bytes.extend(new.to_le_bytes());
                        new
                    }
                };
                is_finite &= rounded.is_finite() || !old.is_finite();
            }
            (bytes, is_finite)
        });
        for (row, (bytes, is_finite)) in rows.collect::<Vec<_>>().into_iter().enumerate() {
            if !is_finite {
                return Ok(Some(first + row));
            }
            to.write_all(&bytes)?;
        }
    }
    Ok(None)
}

/// Copies configuration, tokenizer, index and licence. Other weights and folders stay behind.
fn copy_rest(checkpoint: &Checkpoint, out: &Path, merged: &mut Merged) -> Result<()> {
    const COPIED: [&str; 6] = [".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"];
    const LEGAL: [&str; 3] = ["LICENSE", "NOTICE", "USE_POLICY"];
    let dir = checkpoint.dir();
    let mut names: Vec<String> = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let entry = entry.map_err(Error::io("read", dir))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    for name in names {
        let source = dir.join(&name);
        if checkpoint.files().iter().any(|file| file_name(file.path()) == name) {
            continue;
        }
        let is_index = name.ends_with(".index.json") && !name.contains(".safetensors.");
        let wanted = COPIED.iter().any(|end| name.ends_with(end)) && !is_index
            || LEGAL.iter().any(|start| name.starts_with(start));
        if !wanted || !source.is_file() || name.starts_with('.') {
            merged.left.push(name);
            continue;
        }
        let mut from = open_regular(&source)?;
        write_atomically(&out.join(&name), |to| io::copy(&mut from, to).map(|_| ()))?;
        merged.copied.push(name);
    }
    Ok(())
}
