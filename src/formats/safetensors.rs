//! The safetensors format, read strictly and written as Hugging Face writes it.
//!
//! ```text
//! 8 bytes         n, little-endian u64
//! n bytes         JSON: {"__metadata__": {"format": "pt"},
//!                        "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
//! the rest        data; the tensors tile it
//! ```
//!
//! What [`parse_header`] accepts keeps these promises, and `Frozen` and the kernels rely on them:
//! every tensor's range lies in the file and holds exactly shape x dtype; the ranges tile the data
//! area (no hole, no overlap, nothing after the last one), so a truncated file is seen at once; names
//! are unique; at most [`MAX_DIMS`] dimensions. Data need not be aligned.
//!
//! The crate `safetensors` is not used for reading because it keeps the last of two equal names, sets
//! no limit on dimensions and takes 1.3 GB for a hostile 99 MB header. It is a dev-dependency: what
//! it writes loads here, and [`write_safetensors`] gives its bytes exactly.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt, fs,
    io::{self, Write},
    ops::Range,
    path::Path,
    sync::Arc,
};

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::{
    dtype::Dtype,
    error::{Error, Result},
    formats::{
        disk::{self, InBlocks, NewFile},
        json::{UniqueMap, describe, duplicate, excerpt},
        mmap::{Access, MappedFile},
    },
    tensor::{Bytes, Frozen},
};

/// The largest header that is read. The format allows [`FORMAT_MAX_HEADER_BYTES`]; the largest in
/// public use are below 2 MiB.
pub const MAX_HEADER_BYTES: usize = 16 << 20;
/// The largest header that the format allows.
pub const FORMAT_MAX_HEADER_BYTES: usize = 100_000_000;
/// The most dimensions of a tensor.
pub const MAX_DIMS: usize = 8;
/// The most tensors of a file.
pub const MAX_TENSORS: usize = 262_144;
/// The most bytes of a tensor's name.
pub const MAX_NAME_BYTES: usize = 512;
/// The most bytes of one tensor: 128 TiB, so that no size below overflows.
const MAX_TENSOR_BYTES: u128 = 1 << 47;
/// Bytes of the length in front of the header.
const LENGTH_BYTES: usize = 8;

/// An element type of the format: every one it has may stand in a file, and those with a
/// [`Dtype`] can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredDtype {
    name: &'static str,
    bits: u32,
    dtype: Option<Dtype>,
}

impl StoredDtype {
    /// All of the format's, from its reference implementation (0.8).
    const ALL: [Self; 22] = [
        Self { name: "F32", bits: 32, dtype: Some(Dtype::F32) },
        Self { name: "BF16", bits: 16, dtype: Some(Dtype::Bf16) },
        Self { name: "F16", bits: 16, dtype: Some(Dtype::F16) },
        Self::unsupported("F64", 64),
        Self::unsupported("I64", 64),
        Self::unsupported("U64", 64),
        Self::unsupported("C64", 64),
        Self::unsupported("I32", 32),
        Self::unsupported("U32", 32),
        Self::unsupported("I16", 16),
        Self::unsupported("U16", 16),
        Self::unsupported("I8", 8),
        Self::unsupported("U8", 8),
        Self::unsupported("BOOL", 8),
        Self::unsupported("F8_E4M3", 8),
        Self::unsupported("F8_E5M2", 8),
        Self::unsupported("F8_E8M0", 8),
        Self::unsupported("F8_E4M3FNUZ", 8),
        Self::unsupported("F8_E5M2FNUZ", 8),
        Self::unsupported("F6_E2M3", 6),
        Self::unsupported("F6_E3M2", 6),
        Self::unsupported("F4", 4),
    ];

    const fn unsupported(name: &'static str, bits: u32) -> Self {
        Self { name, bits, dtype: None }
    }

    /// The format's name for it: "BF16".
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The element type here, if it can be computed with.
    pub fn dtype(self) -> Option<Dtype> {
        self.dtype
    }
}

impl<'de> Deserialize<'de> for StoredDtype {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let found = Cow::<str>::deserialize(deserializer)?;
        Self::ALL.into_iter().find(|dtype| dtype.name == found).ok_or_else(|| {
            D::Error::custom(format_args!(
                "unknown dtype {}; the format has {}",
                excerpt(&found),
                Self::ALL.map(Self::name).join(", ")
            ))
        })
    }
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The type of its elements.
    pub dtype: StoredDtype,
    /// Its shape, of at most [`MAX_DIMS`] dimensions.
    pub shape: Vec<usize>,
    /// Its bytes, as offsets in the file.
    pub range: Range<usize>,
}

/// What a file's header says, checked.
#[derive(Debug)]
pub struct Header {
    /// `__metadata__`, usually `{"format": "pt"}`.
    pub metadata: BTreeMap<String, String>,
    /// The tensors, by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// Parses and checks the header of a whole file, `bytes`. `path` is for the messages.
pub fn parse_header(bytes: &[u8], path: &Path) -> Result<Header> {
    let fail = |detail: String| Error::file(path, detail);
    let (length, rest) = bytes.split_first_chunk::<LENGTH_BYTES>().ok_or_else(|| {
        fail(format!(
            "a safetensors file has at least {LENGTH_BYTES} bytes, this one has {}: it was \
            truncated or is another kind of file",
            bytes.len()
        ))
    })?;
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES as u64 {
        return Err(fail(format!(
            "the header is said to have {header_bytes} bytes; at most {MAX_HEADER_BYTES} are \
            read (the format allows {FORMAT_MAX_HEADER_BYTES}): this is not a safetensors file, \
            or a hostile one"
        )));
    }
    // At most 16 MiB, so it fits.
    let header_bytes = header_bytes as usize;
    let Some((json, data)) = rest.split_at_checked(header_bytes) else {
        return Err(fail(format!(
            "the header is said to have {header_bytes} bytes, but only {} follow: the file was \
            truncated; copy or download it again",
            rest.len()
        )));
    };
    if json.first() != Some(&b'{') {
        return Err(fail("the header does not begin with '{'".to_owned()));
    }
    let raw: RawHeader = serde_json::from_slice(json).map_err(|error| {
        fail(format!("the header is not what the format asks for: {}", describe(&error)))
    })?;

    let data_start = LENGTH_BYTES + header_bytes;
    let mut tensors = BTreeMap::new();
    for (name, entry) in raw.tensors {
        let info = entry.check(&name, data_start).map_err(&fail)?;
        tensors.insert(name, info);
    }
    check_tiling(&tensors, data_start, data.len()).map_err(fail)?;
    Ok(Header { metadata: raw.metadata, tensors })
}

/// The tensors' ranges must follow each other from the data's start to its end.
fn check_tiling(
    tensors: &BTreeMap<String, TensorInfo>,
    data_start: usize,
    data_bytes: usize,
) -> Result<(), String> {
    let mut in_order: Vec<(&String, &Range<usize>)> =
        tensors.iter().map(|(name, info)| (name, &info.range)).collect();
    in_order.sort_by_key(|(_, range)| (range.start, range.end));

    let (mut end, mut previous) = (data_start, None::<&String>);
    for (name, range) in in_order {
        if range.start < end {
            let previous = previous.map_or("the header", |name| name);
            return Err(format!(
                "tensor {} begins at byte {} of the data, inside {}, which ends at byte {}",
                excerpt(name),
                range.start - data_start,
                excerpt(previous),
                end - data_start
            ));
        }
        if range.start > end {
            return Err(format!(
                "{} bytes before tensor {} (from byte {} of the data) belong to no tensor",
                range.start - end,
                excerpt(name),
                end - data_start
            ));
        }
        (end, previous) = (range.end, Some(name));
    }
    let (found, expected) = (data_bytes, end - data_start);
    if found < expected {
        return Err(format!(
            "the tensors need {expected} bytes of data, the file has {found}: it was truncated; \
            copy or download it again"
        ));
    }
    if found > expected {
        return Err(format!(
            "{} bytes after the last tensor belong to no tensor",
            found - expected
        ));
    }
    Ok(())
}

/// The header as it stands in the file.
#[derive(Default)]
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, RawTensor>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: StoredDtype,
    shape: Shape,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                let mut has_metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut has_metadata, true) {
                            return Err(duplicate(&name));
                        }
                        header.metadata = map.next_value::<UniqueMap<String>>()?.0;
                        continue;
                    }
                    if name.len() > MAX_NAME_BYTES {
                        return Err(A::Error::custom(format_args!(
                            "the name {} has {} bytes; at most {MAX_NAME_BYTES} are allowed",
                            excerpt(&name),
                            name.len()
                        )));
                    }
                    if header.tensors.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format_args!(
                            "more than {MAX_TENSORS} tensors"
                        )));
                    }
                    if header.tensors.contains_key(&name) {
                        return Err(duplicate(&name));
                    }
                    let tensor = map.next_value().map_err(|error| {
                        A::Error::custom(format_args!("tensor {}: {error}", excerpt(&name)))
                    })?;
                    header.tensors.insert(name, tensor);
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// At most [`MAX_DIMS`] dimensions: nothing is kept of a longer list.
struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dims;
        impl<'de> Visitor<'de> for Dims {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element()? {
                    if dims.len() == MAX_DIMS {
                        return Err(A::Error::custom(format_args!(
                            "more than {MAX_DIMS} dimensions"
                        )));
                    }
                    dims.push(dim);
                }
                Ok(Shape(dims))
            }
        }
        deserializer.deserialize_seq(Dims)
    }
}

impl RawTensor {
    /// Checks a tensor by itself: its bytes are its elements.
    fn check(self, name: &str, data_start: usize) -> Result<TensorInfo, String> {
        let Self { dtype, shape: Shape(shape), data_offsets: [begin, end] } = self;
        let name = excerpt(name);
        // Over the dimensions that are not 0 first, so that [0, max, max] is refused in any order.
        let too_large = || format!("tensor {name} with shape {shape:?} is larger than 128 TiB");
        let bits = shape
            .iter()
            .filter(|&&dim| dim != 0)
            .try_fold(u128::from(dtype.bits), |bits, &dim| bits.checked_mul(u128::from(dim)))
            .filter(|bits| bits / 8 <= MAX_TENSOR_BYTES)
            .ok_or_else(too_large)?;
        let bits = if shape.contains(&0) { 0 } else { bits };
        if !bits.is_multiple_of(8) {
            return Err(format!(
                "tensor {name} with shape {shape:?} of {} does not fill whole bytes",
                dtype.name
            ));
        }
        if begin > end {
            return Err(format!(
                "tensor {name} has data_offsets [{begin}, {end}]: it ends before it begins"
            ));
        }
        if u128::from(end - begin) != bits / 8 {
            return Err(format!(
                "tensor {name} has {} bytes of data; shape {shape:?} of {} needs {}",
                end - begin,
                dtype.name,
                bits / 8
            ));
        }
        let in_file = |offset: u64| {
            usize::try_from(offset).ok().and_then(|offset| offset.checked_add(data_start))
        };
        let (Some(begin), Some(end)) = (in_file(begin), in_file(end)) else {
            return Err(format!("tensor {name} ends at byte {end} of the data, beyond any file"));
        };
        let shape = shape
            .iter()
            .map(|&dim| usize::try_from(dim))
            .collect::<Result<_, _>>()
            .map_err(|_| too_large())?;
        Ok(TensorInfo { dtype, shape, range: begin..end })
    }
}

/// A mapped safetensors file with its checked header.
#[derive(Debug)]
pub struct SafetensorsFile {
    file: Arc<MappedFile>,
    header: Header,
}

impl SafetensorsFile {
    /// Maps a file and checks its header.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, Access::Mapped)
    }

    /// Opens a file, mapped or read into memory, and checks its header.
    pub fn open_with(path: impl AsRef<Path>, access: Access) -> Result<Self> {
        let file = MappedFile::open_with(path, access)?;
        let header = parse_header(file.bytes(), file.path())?;
        Ok(Self { file, header })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The mapping, for [`MappedFile::verify_unchanged`].
    pub fn file(&self) -> &Arc<MappedFile> {
        &self.file
    }

    /// The checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// A tensor, read in place, with its shape. As a matrix it has the last dimension as columns and
    /// all others as rows (a vector has one row, as has a scalar). `None` if there is none of that
    /// name; an error if its elements are of a type that cannot be computed with.
    pub fn tensor(&self, name: &str) -> Result<Option<(Frozen, &[usize])>> {
        let Some(TensorInfo { dtype, shape, range }) = self.header.tensors.get(name) else {
            return Ok(None);
        };
        let dtype = dtype.dtype().ok_or_else(|| {
            Error::file(
                self.path(),
                format!(
                    "tensor {} has dtype {}, which is not supported here: F32, BF16 and F16 \
                    are; convert the weights",
                    excerpt(name),
                    dtype.name()
                ),
            )
        })?;
        let (rows, cols) = match shape.split_last() {
            None => (1, 1),
            // An empty tensor's other dimensions may have a product beyond usize.
            Some(_) if range.is_empty() => (0, 0),
            Some((&cols, rows)) => (rows.iter().product(), cols),
        };
        let bytes: Arc<dyn Bytes> = Arc::clone(&self.file) as _;
        Ok(Some((Frozen::new(bytes, range.clone(), dtype, rows, cols), shape)))
    }
}

/// The name, type and shape of a tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// `F32`, `Bf16` or `F16`.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Elements, if a file can have so many.
    fn n_bytes(&self) -> Option<usize> {
        let elements = self.shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim))?;
        elements.checked_mul(self.dtype.size_bytes()).filter(|&n| n as u128 <= MAX_TENSOR_BYTES)
    }

    /// The format's name of the type.
    ///
    /// # Panics
    /// For `F64`, which files do not have.
    fn dtype_name(&self) -> &'static str {
        match self.dtype {
            Dtype::F32 => "F32",
            Dtype::Bf16 => "BF16",
            Dtype::F16 => "F16",
            Dtype::F64 => panic!("files have f32, bf16 or f16"),
        }
    }
}

/// Writes a file whose tensors are made one at a time, in the file's order: `fill` writes the
/// little-endian elements of the tensor it is given. A model larger than memory can be written so.
///
/// The bytes around them are those of Hugging Face's writer: `{"format":"pt"}` first, then f32
/// before bf16 before f16, then by name, the header padded with spaces to a multiple of 8.
///
/// # Panics
/// If two tensors have the same name, one is larger than memory, or `fill` writes more or fewer
/// bytes than its tensor has.
pub fn write_streamed(
    path: &Path,
    mut tensors: Vec<TensorSpec>,
    mut fill: impl FnMut(&TensorSpec, &mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let rank = |dtype| [Dtype::F32, Dtype::Bf16, Dtype::F16].iter().position(|&d| d == dtype);
    tensors.sort_by(|l, r| rank(l.dtype).cmp(&rank(r.dtype)).then_with(|| l.name.cmp(&r.name)));
    let header = header_json(&tensors);
    write_atomically(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for tensor in &tensors {
            let mut counted = Counted { inner: file, n_bytes: 0 };
            fill(tensor, &mut counted)?;
            assert_eq!(Some(counted.n_bytes), tensor.n_bytes(), "all of tensor {}", tensor.name);
        }
        Ok(())
    })
}

/// The padded header of tensors in the file's order.
fn header_json(tensors: &[TensorSpec]) -> String {
    let mut json = r#"{"__metadata__":{"format":"pt"}"#.to_owned();
    let mut begin = 0;
    let mut names = std::collections::BTreeSet::new();
    for tensor in tensors {
        assert!(names.insert(&tensor.name), "two tensors are called {}", tensor.name);
        let size = tensor.n_bytes().and_then(|n| n.checked_add(begin));
        let end = size.expect("a tensor that exists fits the address space");
        let name = serde_json::Value::from(tensor.name.as_str());
        let shape = tensor.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let dtype = tensor.dtype_name();
        json += &format!(
            r#",{name}:{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}"#
        );
        begin = end;
    }
    json.push('}');
    while !json.len().is_multiple_of(LENGTH_BYTES) {
        json.push(' ');
    }
    json
}

/// Counts what passes through.
struct Counted<'a> {
    inner: &'a mut dyn Write,
    n_bytes: usize,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.n_bytes += n;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes f32 tensors (name, shape, values) as [`write_streamed`] does. The order given is of no
/// consequence.
///
/// # Panics
/// If two have the same name, or values are not as many as the shape says.
pub fn write_safetensors(path: &Path, tensors: &[(&str, &[usize], &[f32])]) -> Result<()> {
    let by_name: BTreeMap<&str, &[f32]> = tensors.iter().map(|&(name, _, v)| (name, v)).collect();
    let specs = tensors
        .iter()
        .map(|&(name, shape, _)| TensorSpec {
            name: name.to_owned(),
            dtype: Dtype::F32,
            shape: shape.to_vec(),
        })
        .collect();
    write_streamed(path, specs, |tensor, file| {
        by_name[tensor.name.as_str()]
            .iter()
            .try_for_each(|value| file.write_all(&value.to_le_bytes()))
    })
}

/// Gives `path` new content, or leaves it as it was: whatever happens, and whenever the machine
/// stops, the name never shows half a file.
///
/// The content goes to a file of a name of its own in the same folder (a rename does not cross file
/// systems), is synced, and takes the name by a rename, which is synced in turn. Of several writers at a
/// time the last one's content stays. After an error the temporary file is removed.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut InBlocks) -> io::Result<()>,
) -> Result<()> {
    /// Removes the file when dropped, so on errors and panics alike.
    struct Temporary<'a>(&'a Path);
    impl Drop for Temporary<'_> {
        fn drop(&mut self) {
            // Nothing more can be done if this fails; the error that led here is the one to report.
            let _ = disk::remove_file(self.0);
        }
    }

    // A device or a pipe has no content to protect, and a rename would replace it.
    if let Ok(metadata) = fs::metadata(path)
        && !metadata.is_file()
        && !metadata.is_dir()
    {
        let file = NewFile::open(path).map_err(Error::io("write", path))?;
        let mut file = InBlocks::new(file);
        return write(&mut file).and_then(|()| file.flush()).map_err(Error::io("write", path));
    }
    if path.file_name().is_none() {
        return Err(Error::Usage(format!("{} is not the name of a file", path.display())));
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let temporary_path = disk::hidden_beside(path);
    let temporary = Temporary(&temporary_path); // Borrowed, so that forgetting it leaks nothing.
    let file = NewFile::create(temporary.0).map_err(Error::io("create", path))?;
    let mut file = InBlocks::new(file);
    write(&mut file).map_err(Error::io("write", path))?;
    let file = file.finish().map_err(Error::io("write", path))?;
    file.sync().map_err(Error::io("sync", path))?;
    drop(file);
    disk::rename(temporary.0, path).map_err(Error::io("rename", path))?;
    std::mem::forget(temporary);
    disk::sync_dir(folder).map_err(Error::io("sync", folder))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A file from its header and its data.
    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    fn refusal(bytes: &[u8]) -> String {
        parse_header(bytes, Path::new("m.safetensors")).unwrap_err().to_string()
    }

    fn temporary(name: &str) -> PathBuf {
        let folder =
            std::env::temp_dir().join(format!("polytape-st-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn a_good_file_is_read_in_place_at_any_alignment() {
        // The odd header length puts the data at an odd address.
        let header = r#"{"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"e":{"dtype":"F32","shape":[0,3],"data_offsets":[8,8]},"n":{"dtype":"I64","shape":[1],"data_offsets":[8,16]}, "s":{"dtype":"BF16","shape":[],"data_offsets":[16,18]}} "#;
        let data: Vec<u8> = [1.5f32, -2.0]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .chain([0; 8])
            .chain([0x80, 0x3f])
            .collect();
        let folder = temporary("good");
        let path = folder.join("m.safetensors");
        for padding in ["", " ", "   "] {
            fs::write(&path, file(&format!("{header}{padding}"), &data)).unwrap();
            let opened = SafetensorsFile::open(&path).unwrap();
            let (a, shape) = opened.tensor("a").unwrap().unwrap();
            assert_eq!(
                (a.to_f32(), a.rows(), a.cols(), shape),
                (vec![1.5, -2.0], 2, 1, &[2, 1][..])
            );
            let (s, shape) = opened.tensor("s").unwrap().unwrap();
            assert_eq!((s.to_f32(), s.rows(), s.cols(), shape), (vec![1.0], 1, 1, &[][..]));
            assert!(opened.tensor("e").unwrap().unwrap().0.to_f32().is_empty());
            assert!(opened.tensor("zz").unwrap().is_none());
            let error = opened.tensor("n").unwrap_err().to_string();
            assert!(error.contains("\"n\" has dtype I64, which is not supported"), "{error}");
        }
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn every_bad_header_is_refused_with_its_reason() {
        let one = |entry: &str| file(&format!("{{\"t\":{entry}}}"), &[0; 8]);
        let two = |first: [u32; 2], second: [u32; 2], n_data: usize| {
            let entry = |[b, e]: [u32; 2]| {
                format!(r#"{{"dtype":"U8","shape":[{}],"data_offsets":[{b},{e}]}}"#, e - b)
            };
            file(&format!(r#"{{"x":{},"y":{}}}"#, entry(first), entry(second)), &vec![0; n_data])
        };
        let cases: &[(Vec<u8>, &str)] = &[
            (vec![], "at least 8 bytes, this one has 0"),
            (vec![1, 2, 3], "at least 8 bytes, this one has 3"),
            (u64::MAX.to_le_bytes().to_vec(), "said to have 18446744073709551615 bytes"),
            (
                [&((16u64 << 20) + 1).to_le_bytes()[..], b"{}"].concat(),
                "the format allows 100000000",
            ),
            (
                [&100u64.to_le_bytes()[..], b"{}"].concat(),
                "but only 2 follow: the file was truncated",
            ),
            (file("", b""), "does not begin with '{'"),
            (file(" {}", b""), "does not begin with '{'"),
            (file("{", b""), "EOF"),
            (file("{} {}", b""), "trailing characters"),
            (file("{}", b"x"), "1 bytes after the last tensor"),
            (
                one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,12]}"#),
                "need 12 bytes of data, the file has 8: it was truncated",
            ),
            (
                one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#),
                "4 bytes after the last tensor",
            ),
            (
                one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#),
                "4 bytes before tensor \"t\"",
            ),
            (two([0, 5], [3, 8], 8), "\"y\" begins at byte 3 of the data, inside \"x\""),
            (two([0, 3], [5, 8], 8), "2 bytes before tensor \"y\" (from byte 3 of the data)"),
            (two([0, 8], [0, 8], 8), "inside \"x\""),
            (
                one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#),
                "has 4 bytes of data; shape [2] of F32 needs 8",
            ),
            (
                one(r#"{"dtype":"F32","shape":[0],"data_offsets":[0,8]}"#),
                "shape [0] of F32 needs 0",
            ),
            (one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#), "ends before it begins"),
            (
                one(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,8]}"#),
                "does not fill whole bytes",
            ),
            (
                one(r#"{"dtype":"F31","shape":[2],"data_offsets":[0,8]}"#),
                "unknown dtype \"F31\"; the format has F32",
            ),
            (
                one(
                    r#"{"dtype":"F32","shape":[0,18446744073709551615,18446744073709551615],"data_offsets":[0,0]}"#,
                ),
                "larger than 128 TiB",
            ),
            (
                one(
                    r#"{"dtype":"F32","shape":[18446744073709551615,18446744073709551615,0],"data_offsets":[0,0]}"#,
                ),
                "larger than 128 TiB",
            ),
            (
                one(r#"{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]}"#),
                "more than 8 dimensions",
            ),
            (
                one(r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#),
                "tensor \"t\": invalid value: integer `-2`",
            ),
            (one(r#"{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}"#), "floating point"),
            (one(r#"{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}"#), "floating point"),
            (one(r#"{"dtype":"F32","shape":[02],"data_offsets":[0,8]}"#), "invalid number"),
            (
                one(r#"{"dtype":"F32","shape":[99999999999999999999999],"data_offsets":[0,8]}"#),
                "floating point",
            ),
            (one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0]}"#), "invalid length 1"),
            (one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}"#), "tensor \"t\""),
            (one(r#"{"dtype":"F32","shape":[2]}"#), "missing field `data_offsets`"),
            (one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}"#), "unknown field `x`"),
            (
                one(r#"{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}"#),
                "duplicate field `dtype`",
            ),
            (one("7"), "tensor \"t\""),
            (
                file(
                    r#"{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
                    b"",
                ),
                "\"t\" comes twice",
            ),
            (file(r#"{"__metadata__":{"a":"1","a":"2"}}"#, b""), "\"a\" comes twice"),
            (file(r#"{"__metadata__":{},"__metadata__":{}}"#, b""), "\"__metadata__\" comes twice"),
            (file(r#"{"__metadata__":{"a":1}}"#, b""), "expected a string"),
            (
                file(
                    &format!(
                        r#"{{"{}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}}}"#,
                        "n".repeat(513)
                    ),
                    b"",
                ),
                "has 513 bytes; at most 512",
            ),
            (file(&"[".repeat(1000), b""), "does not begin"),
            (file(&format!("{{\"t\":{}", "[".repeat(1000)), b""), "tensor \"t\""),
        ];
        for (bytes, reason) in cases {
            let error = refusal(bytes);
            assert!(
                error.starts_with("m.safetensors: ") && error.contains(reason),
                "{error}\nnot: {reason}"
            );
        }
    }

    #[test]
    fn no_prefix_and_no_flipped_byte_panics() {
        let good = file(
            r#"{"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"F16","shape":[1],"data_offsets":[8,10]}}"#,
            &[0; 10],
        );
        let path = Path::new("m");
        parse_header(&good, path).unwrap();
        for n in 0..good.len() {
            parse_header(&good[..n], path).unwrap_err();
        }
        for i in 0..good.len() - 10 {
            for value in [0, b'0', b'9', b'"', b'}', b'-', 0xff] {
                let mut bytes = good.clone();
                bytes[i] = value;
                if let Ok(header) = parse_header(&bytes, path) {
                    assert!(header.tensors.values().all(|t| t.range.end <= bytes.len()));
                }
            }
        }
    }

    #[test]
    fn what_is_written_is_what_the_reference_writes() {
        let folder = temporary("write");
        let values: Vec<f32> = (0..24).map(|i| i as f32 * 0.37 - 3.0).collect();
        let tensors: Vec<(&str, Vec<usize>, &[f32])> = vec![
            ("encoder.b.é\"\n", vec![2, 3, 2, 2], &values),
            ("decoder.z", vec![3], &values[..3]),
            ("Z", vec![], &values[..1]),
            ("a.empty", vec![0, 7], &[]),
        ];
        // Headers of every length modulo 8.
        for n in 0..=tensors.len() {
            let path = folder.join("w.safetensors");
            let ours: Vec<(&str, &[usize], &[f32])> = tensors[..n]
                .iter()
                .map(|(name, shape, values)| (*name, &shape[..], *values))
                .collect();
            write_safetensors(&path, &ours).unwrap();
            let bytes: Vec<Vec<u8>> = tensors
                .iter()
                .map(|(.., values)| values.iter().flat_map(|v| v.to_le_bytes()).collect())
                .collect();
            let views = tensors[..n].iter().zip(&bytes).map(|((name, shape, _), bytes)| {
                let view = safetensors::tensor::TensorView::new(
                    safetensors::Dtype::F32,
                    shape.clone(),
                    bytes,
                );
                (*name, view.unwrap())
            });
            let metadata = [("format".to_owned(), "pt".to_owned())].into();
            let expected = safetensors::serialize(views, Some(metadata)).unwrap();
            assert_eq!(fs::read(&path).unwrap(), expected);
            let read = SafetensorsFile::open(&path).unwrap();
            assert_eq!(read.header().tensors.len(), n);
            assert_eq!(read.header().metadata["format"], "pt");
        }
        // Mixed types, as of a model that is written tensor by tensor.
        let path = folder.join("mixed.safetensors");
        let spec = |name: &str, dtype| TensorSpec { name: name.to_owned(), dtype, shape: vec![2] };
        let specs = vec![spec("a", Dtype::F16), spec("b", Dtype::F32), spec("c", Dtype::Bf16)];
        write_streamed(&path, specs, |tensor, file| {
            file.write_all(&vec![7; 2 * tensor.dtype.size_bytes()])
        })
        .unwrap();
        let sevens = [7u8; 8];
        use safetensors::{Dtype as D, tensor::TensorView};
        let views = [("a", D::F16, 4), ("b", D::F32, 8), ("c", D::BF16, 4)]
            .map(|(name, dtype, n)| (name, TensorView::new(dtype, vec![2], &sevens[..n]).unwrap()));
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        assert_eq!(
            fs::read(&path).unwrap(),
            safetensors::serialize(views, Some(metadata)).unwrap()
        );
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn of_two_writers_at_a_time_each_writes_a_whole_file() {
        let folder = temporary("two");
        let path = folder.join("f");
        write_atomically(&path, |file| {
            file.write_all(b"of the outer, ")?;
            write_atomically(&path, |file| file.write_all(b"of the inner"))
                .map_err(io::Error::other)?;
            assert_eq!(fs::read(&path)?, b"of the inner");
            file.write_all(b"which is longer")
        })
        .unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"of the outer, which is longer");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = temporary("atomic");
        let path = folder.join("f");
        write_atomically(&path, |file| file.write_all(b"old")).unwrap();
        let error = write_atomically(&path, |file| {
            file.write_all(b"half of the n")?;
            Err(io::Error::other("disk full"))
        })
        .unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(
            error.to_string().contains("cannot write") && error.to_string().ends_with("disk full")
        );
        assert_eq!(fs::read(&path).unwrap(), b"old");
        write_atomically(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        let error = write_atomically(&folder.join("absent/f"), |_| Ok(())).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        fs::remove_dir_all(folder).unwrap();
    }
}
